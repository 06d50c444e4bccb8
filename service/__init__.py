"""The HTTP side: a request is read, becomes a job, and its result is answered.

This package knows no torch and no worker process. It sees the queue through `worker.queue` and `worker.contract`,
pictures through `ncml.images`, and models only as the descriptors that workers publish.
"""
