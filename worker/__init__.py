"""The worker: claims jobs from a queue in Redis in batches, has an engine process compute them, ends each job once.

Must not import HTTP. The service imports what crosses the queue and what accesses it, none of which imports torch. Read
`contract.py` and `job_results.py` first, then `queue.py`, `worker.py` and `engine.py`.
"""
