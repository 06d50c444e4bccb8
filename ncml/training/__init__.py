"""Training: the dataset, the objective and its loop, and the run that makes a model folder.

Must not import evaluation or the command line. Read `run.py` first.
"""
