"""The worker: jobs from a queue in Redis, gathered into batches, computed by an engine process, each finished once.

The only room that knows both RQ and `ncml`. It knows no HTTP. `contract` needs pydantic alone and `queue` needs RQ
but no torch: the service imports these two and nothing else from here.
"""
