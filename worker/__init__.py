"""The worker: jobs from a queue in Redis, gathered into batches, computed by an engine process, each finished once.

The only room that knows both RQ and `ncml`. It knows no HTTP. `contract` needs pydantic alone, `queue` needs RQ but
no torch, and `logs` nothing: the service imports these three and nothing else from here.
"""
