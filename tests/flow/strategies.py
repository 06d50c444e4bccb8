"""Bodies that schemathesis cannot make by itself: pictures, for the OpenAPI document's `image/*` and binary strings."""

import io
from typing import Any

import numpy as np
import schemathesis
from hypothesis import strategies as st
from PIL import Image


def picture(size: tuple[int, int], form: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(out, form)
    return out.getvalue()


PICTURES = st.builds(
    picture, st.tuples(st.integers(1, 40), st.integers(1, 40)), st.sampled_from(["PNG", "JPEG", "GIF", "BMP"])
)
schemathesis.openapi.media_type("image/*", PICTURES)
schemathesis.openapi.format("binary", PICTURES)


@schemathesis.hook
def before_load_schema(context: schemathesis.HookContext, raw_schema: dict[str, Any]) -> None:
    """Leave out the example of an `image/*` body: it is words for a reader, where bytes would have to be sent."""
    for path in raw_schema["paths"].values():
        for operation in path.values():
            operation.get("requestBody", {}).get("content", {}).get("image/*", {}).pop("example", None)
