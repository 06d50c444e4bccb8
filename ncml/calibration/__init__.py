"""Calibration of a model on held-out images and on tiles of large ones.

Uses `ncml.model`; must not import training or evaluation. Read `estimation.py` first.
"""
