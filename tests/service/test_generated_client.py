"""The client that openapi-python-client generates from the OpenAPI document works unchanged for every operation."""

import base64
import importlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ncml.images import open_image, to_png
from service.app import create_app
from service.settings import Settings
from tests.service.live import served
from tests.service.outcomes import DETECTOR, MODEL
from worker.redis_keys import pictures_key

IMAGE = to_png(np.full((8, 8, 3), 40, np.uint8))
PART = to_png(np.full((40, 40, 3), 200, np.uint8))


class Generated:
    """The package, its client, and which operations were called."""

    def __init__(self, package: str, url: str) -> None:
        self.package = package
        self.client = self.module("client").Client(base_url=url)
        self.called: set[str] = set()

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")

    def model(self, name: str) -> Any:
        return getattr(self.module("models"), name)

    def call(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Return the detailed response of an operation such as `images.score`."""
        self.called.add(operation.split(".")[1])
        response = self.module(f"api.{operation}").sync_detailed(*args, client=self.client, **kwargs)
        assert response.status_code < 300, response.content
        return response


@pytest.fixture
def generated(queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Generated]:
    app = create_app(Settings(allow_calibration=True), queue)
    document, folder = tmp_path / "openapi.json", tmp_path / "ncml_generated"
    document.write_text(json.dumps(app.openapi()))
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"]
    done = subprocess.run(
        [*command, "--path", document, "--output-path", folder],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(tmp_path)
    with served(app) as url:
        generated = Generated("ncml_generated", url)
        with generated.client:
            yield generated
    for name in [name for name in sys.modules if name.startswith("ncml_generated")]:
        del sys.modules[name]


def test_a_generated_client_works_for_every_operation(generated: Generated, queue, worker) -> None:
    types = generated.module("types")
    file = types.File(payload=io.BytesIO(IMAGE), file_name="a.png", mime_type="image/png")
    several = generated.model("ScoreFilesBody")(image=[file, types.File(payload=io.BytesIO(IMAGE), file_name="b.png")])
    assert [score.file for score in generated.call("images.score", body=several).parsed.results] == ["a.png", "b.png"]
    in_base64 = generated.model("ScoreJsonBody")(image=base64.b64encode(IMAGE).decode())
    assert generated.call("images.score", body=in_base64).parsed.results[0].bpd == 40
    raw = types.File(payload=io.BytesIO(IMAGE))
    assert generated.call("images.score", body=raw, prefer="wait=5").parsed.results[0].bpd == 40
    as_json = generated.model("GenerateFormat").JSON
    images = generated.call("images.generate", n=2, seed=7, format_=as_json).parsed.images
    assert [image.seed for image in images] == [7, 8]
    half = generated.model("CompleteFilesBody")(
        image=types.File(payload=io.BytesIO(IMAGE), file_name="a.png", mime_type="image/png")
    )
    as_json = generated.model("CompleteFormat").JSON
    completed = generated.call("images.complete", body=half, keep=generated.model("CompleteKeep").TOP, format_=as_json)
    job_id = completed.parsed.id
    assert generated.call("jobs.get_job", job_id).parsed.status == "succeeded"
    as_json = generated.model("GetJobResultFormatType0").JSON
    assert generated.call("jobs.get_job_result", job_id, format_=as_json).parsed.images
    assert generated.call("jobs.get_job_preview", job_id).content.startswith(b"\x89PNG")
    assert "event: succeeded" in generated.call("jobs.follow_job", job_id).content.decode()
    assert generated.call("jobs.cancel_job", job_id).parsed.status == "succeeded"
    assert generated.call("jobs.delete_job", job_id).status_code == 204
    good = generated.model("CalibrateFilesBody")(
        image=[types.File(payload=io.BytesIO(IMAGE), file_name=f"{i}.png", mime_type="image/png") for i in range(40)],
        name="mine",
    )
    assert generated.call("models.calibrate", body=good).parsed.model.name == "mine"
    assert generated.call("models.list_models").parsed.models[0].name == "tiny"
    assert generated.call("models.get_model", "tiny").parsed.height == 8
    worker.serve(MODEL.model_copy(update={"detector": DETECTOR.model_copy(update={"keeps_images": True})}))
    queue.redis.set(pictures_key("c0" * 32), b"a sheet")
    assert generated.call("models.get_pictures", "tiny").content == b"a sheet"
    part = types.File(payload=io.BytesIO(PART), file_name="part.png", mime_type="image/png")
    judged = generated.call("images.score", body=generated.model("ScoreFilesBody")(image=[part])).parsed
    reviewed = generated.model("ReviewFilesBody")(
        image=types.File(payload=io.BytesIO(PART), file_name="part.png", mime_type="image/png"),
        job=judged.id,
        verdict=generated.model("ReviewFilesBodyVerdict").GOOD,
    )
    review_id = generated.call("reviews.review", "tiny", body=reviewed).parsed.id
    [listed] = generated.call("reviews.list_reviews", "tiny").parsed.reviews
    assert (listed.id, listed.file) == (review_id, "part.png")
    thumbnail = generated.call("reviews.get_review_thumbnail", "tiny", review_id).content
    assert open_image(thumbnail).shape == open_image(PART).shape
    update = generated.model("UpdateJsonBody")(model="tiny", name="tiny-2")
    assert generated.call("models.update", body=update).parsed.calibration.reviews.good == 1
    assert generated.call("reviews.delete_review", "tiny", review_id).status_code == 204
    assert generated.call("operations.health").parsed.status == "ok"
    assert generated.call("operations.readiness").parsed.lanes["score"] == 1
    assert generated.call("operations.version").parsed.name == "ncml"
    assert "ncml_redis_up" in generated.call("operations.metrics").parsed
    operations = {path.stem for path in Path(generated.module("api").__path__[0]).glob("*/[!_]*.py")}
    assert generated.called == operations
