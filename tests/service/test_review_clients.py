"""`ncml review` and the clients' reviews, against the application."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ncml.cli import main as cli
from ncml.client import AsyncClient, Client
from ncml.errors import InputError, ServiceError
from service.app import create_app
from service.settings import Settings
from tests.service.live import served
from tests.service.outcomes import DETECTOR, MODEL
from tests.service.test_reviews import FLAGGED, PASSED, flat
from worker.contract import UpdateJob


@pytest.fixture
def url(queue: Any, worker: Any) -> Iterator[str]:
    worker.serve(MODEL.model_copy(update={"detector": DETECTOR.model_copy(update={"keeps_images": True})}))
    with served(create_app(Settings(allow_calibration=True), queue)) as url:
        yield url


def test_a_client_reviews_updates_and_deletes(url: str, jobs: Any, tmp_path: Path) -> None:
    (tmp_path / "part.png").write_bytes(FLAGGED)
    with Client(url) as client:
        kept = client.review(tmp_path / "part.png", "good", model="tiny")
        assert (kept["file"], kept["verdict"], kept["is_ood"]) == ("part.png", "good", True)
        client.review(PASSED, "defective", model=f"tiny@{MODEL.version[:8]}")
        assert [review["verdict"] for review in client.reviews("tiny")] == ["good", "defective"]
        answer = client.update("tiny-2", model="tiny", priority="low")
        assert (answer["model"]["name"], answer["calibration"]["reviews"]["good"]) == ("tiny-2", 1)
        *_, job = jobs.values()
        assert isinstance(job, UpdateJob)
        assert (job.name, job.priority) == ("tiny-2", "low")
        client.delete_review("tiny", kept["id"])
        [missed] = client.reviews("tiny")
        assert missed["verdict"] == "defective"
        client.delete_review("tiny", missed["id"])
        with pytest.raises(ServiceError, match="this key has no reviews for tiny"):
            client.update("tiny-3", model="tiny")
        with pytest.raises(ServiceError, match="tiny did not flag this image"):
            client.review(PASSED, "good", model="tiny")
        with pytest.raises(InputError, match="noise is not an option of update"):
            client.update("tiny-3", model="tiny", noise=1)  # type: ignore[call-arg]
        with pytest.raises(InputError, match="model must be the name of a model"):
            client.reviews("a/b")


def test_an_asynchronous_client_does_so_too(url: str) -> None:
    async def use() -> None:
        async with AsyncClient(url) as client:
            kept = await client.review(FLAGGED, "good", model="tiny")
            assert (await client.update("tiny-2", model="tiny"))["calibration"]["reviews"]["good"] == 1
            assert await client.reviews("tiny") == [kept]
            await client.delete_review("tiny", kept["id"])
            assert await client.reviews("tiny") == []

    asyncio.run(use())


def test_the_command_reviews_files_and_folders(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "flagged"
    folder.mkdir()
    (folder / "a.png").write_bytes(FLAGGED)
    (folder / "b.png").write_bytes(flat(210))
    arguments = ["review", str(folder), "--model", "tiny", "--server", url]
    assert cli.main([*arguments, "--good"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"p 0.5000 OOD  {folder / 'a.png'} is kept as good (")
    assert str(folder / "b.png") in second
    assert cli.main([*arguments, "--defective", "--json"]) == 0
    reviews = json.loads(capsys.readouterr().out)["reviews"]
    assert [(Path(review["path"]).name, review["verdict"]) for review in reviews] == [
        ("a.png", "defective"), ("b.png", "defective")
    ]  # fmt: skip
    for wrong, sentence in [
        ([*arguments], "one of --good and --defective"),
        ([*arguments, "--good", "--defective"], "one of --good and --defective"),
        (["review", str(folder), "--model", "tiny", "--good"], "a service keeps reviews: add --server"),
        (["review", "missing.png", "--model", "tiny", "--good", "--server", url], "missing.png cannot be read"),
    ]:
        assert cli.main(wrong) == 2
        assert sentence in capsys.readouterr().err
    (folder / "a.png").write_bytes(PASSED)
    assert cli.main([*arguments, "--good"]) == 2
    assert "tiny did not flag this image" in capsys.readouterr().err


def test_the_command_skips_files_that_are_not_images_and_prints_what_is_kept_before_an_error(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(FLAGGED)
    (tmp_path / "b.txt").write_text("not an image")
    (tmp_path / "c.png").write_bytes(flat(200, side=8))
    (tmp_path / "d.png").write_bytes(flat(210))
    arguments = ["review", str(tmp_path), "--model", "tiny", "--server", url, "--good"]
    assert cli.main(arguments) == 0
    output = capsys.readouterr()
    assert [line.split()[3] for line in output.out.splitlines()] == [str(tmp_path / f"{name}.png") for name in "ad"]
    skipped, too_small, count = output.err.splitlines()
    assert skipped.startswith(f"ncml: skipped: {tmp_path / 'b.txt'} is not an image")
    assert too_small.startswith(f"ncml: skipped: {tmp_path / 'c.png'} ")
    assert count == "ncml: 2 files were skipped"
    (tmp_path / "d.png").write_bytes(PASSED)
    assert cli.main([*arguments, "--json"]) == 2
    output = capsys.readouterr()
    assert [review["path"] for review in json.loads(output.out)["reviews"]] == [str(tmp_path / "a.png")]
    assert output.err.endswith("tiny did not flag this image; only flagged images can be reviewed as good.\n")
    for name in "acd":
        (tmp_path / f"{name}.png").unlink()
    assert cli.main([*arguments, "--json"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"ncml: {tmp_path / 'b.txt'} is not an image")
    assert output.err.count("\n") == 1
