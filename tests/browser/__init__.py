"""Tests of the studio in Chromium. A package, so that its services end with its tests."""
