"""What a request holds while it waits for its job: no space for uploads."""

from collections.abc import Callable

import numpy as np
from starlette.testclient import TestClient

from ncml.images import to_png

IMAGE = to_png(np.full((8, 8, 3), 50, np.uint8))


def test_the_body_of_an_event_stream_takes_no_space_from_uploads(new_client: Callable[..., TestClient]) -> None:
    client = new_client(max_body_bytes=1024, max_receiving_bytes=2048)
    client.post("/score", files=[("image", IMAGE)])
    for _ in range(4):
        assert client.request("GET", "/jobs/job-0/events", content=bytes(1000)).status_code == 200
    assert client.post("/score", files=[("image", IMAGE)]).status_code == 200
