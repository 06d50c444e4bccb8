"""Clients of the HTTP service, one for threads and one for asyncio. Needs `ncml[client]`; imports no torch.

>>> from ncml.client import Client
>>> with Client("http://localhost:8000") as client:
...     scores = client.score(["a.png", "b.png"])
...     images = client.generate(4, class_="cat", seed=7).images

Read `clients.py` first, then `exchange.py`.
"""

from ncml.client.clients import AsyncClient, Client
from ncml.client.documents import Generated, Job, JobProgress
from ncml.errors import ServiceError
from ncml.results import Detection, Scan, Score, Verdict

__all__ = [
    "AsyncClient",
    "Client",
    "Detection",
    "Generated",
    "Job",
    "JobProgress",
    "Scan",
    "Score",
    "ServiceError",
    "Verdict",
]
