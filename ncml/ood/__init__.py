"""Out-of-distribution statistics of an image, detectors, conformal p-values, drift, and stored calibrations.

Must not import `ncml.model` or anything above it. Read `statistics.py` first, for detectors `judging.py`.
"""
