"""Generation and completion of images: the reference sampler, the cached one, and the solvers that refine.

Must not import `ncml.model` or anything above it. Read `sample.py` first.
"""
