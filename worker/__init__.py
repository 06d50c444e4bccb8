"""The worker: claims jobs from a queue in Redis in batches, has an engine process compute them, ends each job once.

Must not import HTTP. The service imports only `contract` (pydantic), `queue` (RQ, no torch) and `logs` from here. Read
`contract.py` first, then `queue.py`, `worker.py` and `engine.py`.
"""
