"""Bodies that schemathesis cannot make by itself: pictures, for the OpenAPI document's `image/*` and binary strings."""

import io

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
