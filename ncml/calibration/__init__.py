"""Calibration of a model on held-out images and of its tiles on large ones, and detectors made from good images.

Uses `ncml.model`; must not import training or evaluation. Read `estimation.py` first, for detectors `detector.py`.
"""
