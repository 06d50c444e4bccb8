"""Views of a detector: functions of an image at its own size, each estimated from good images.

A view computes one or several OOD scores in one pass. Read `view.py` first.
"""
