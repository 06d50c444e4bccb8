"""Bodies that schemathesis cannot generate: images for `image/*` and binary strings of the OpenAPI document."""

import io
from typing import Any

import numpy as np
import schemathesis
from hypothesis import strategies as st
from PIL import Image


def image_file(size: tuple[int, int], form: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(out, form)
    return out.getvalue()


IMAGES = st.builds(
    image_file, st.tuples(st.integers(1, 40), st.integers(1, 40)), st.sampled_from(["PNG", "JPEG", "GIF", "BMP"])
)
schemathesis.openapi.media_type("image/*", IMAGES)
schemathesis.openapi.media_type("application/octet-stream", IMAGES)
schemathesis.openapi.format("binary", IMAGES)


@schemathesis.hook
def before_load_schema(context: schemathesis.HookContext, raw_schema: dict[str, Any]) -> None:
    """Remove the examples of file bodies: they are text for readers, but a request needs bytes."""
    for path in raw_schema["paths"].values():
        for operation in path.values():
            for media in ("image/*", "application/octet-stream"):
                operation.get("requestBody", {}).get("content", {}).get(media, {}).pop("example", None)
