"""The HTTP service: parses a request, submits it as a job, and responds with the result.

It does not import torch or worker processes: it accesses the queue through `worker.queue` and `worker.contract`, images
through `ncml.images`, and models as the descriptors that workers publish. Read `routes/score.py` first, then `jobs.py`.
"""
