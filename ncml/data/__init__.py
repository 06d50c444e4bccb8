"""Images of a folder or a dataset: found, decoded, counted, divided into parts and cropped.

Must not import calibration, training or evaluation. Read `dataset.py` first.
"""
