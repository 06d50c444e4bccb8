"""A detector gives the same verdicts in the library, on the command line, through the client and by a service."""

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

import ncml
from ncml.cli import main as cli
from ncml.client import Client
from service.app import create_app
from service.settings import Settings
from tests.conftest import eventually
from tests.detectors import good_image, without_disc
from tests.service.live import served
from worker.queue import JobQueue


@pytest.fixture
def service(detector_folder: Path, valkey_url: str, tmp_path: Path) -> Iterator[str]:
    """A service with a worker of the lane of scores, which serves the detector."""
    command = [sys.executable, "-m", "ncml.cli", "worker", "--models", str(detector_folder.parent), "--lane", "score"]
    environment = os.environ | {"NCML_REDIS_URL": valkey_url, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        worker = subprocess.Popen([*command, "--threads", "1", "--drain-s", "1"], env=environment, stderr=log)
    try:
        with closing(JobQueue.from_url(valkey_url)) as queue:
            eventually(lambda: queue.monitor.models())
            with served(create_app(Settings(), queue)) as url:
                yield url
    finally:
        worker.terminate()
        worker.wait(60)


def test_library_command_client_and_service_give_the_same_verdicts(
    service: str, detector_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(3):
        Image.fromarray(good_image(1000 + seed)).save(folder / f"good{seed}.png")
    Image.fromarray(without_disc(1003)).save(folder / "missing.jpg", quality=95)
    Image.fromarray(good_image(1004, 100, 80)).save(folder / "other size.png")
    files = sorted(folder.iterdir())

    library = ncml.load(detector_folder).score(files)
    with Client(service) as client:
        by_client = client.score(files)
    for expected, score in zip(library, by_client, strict=True):
        assert score.ood == expected.ood
        assert score.bpd == pytest.approx(expected.bpd, rel=1e-6)  # the batches differ in size
        assert score.detection is not None
        assert expected.detection is not None
        for name in ("view", "p_value", "box", "views", "at_least_as_unusual", "ranking_images", "covered"):
            assert getattr(score.detection, name) == getattr(expected.detection, name), name
        assert list(score) == list(expected)
    assert {score.detection.is_ood for score in library if score.detection} == {False, True}

    tables = [tmp_path / "local.csv", tmp_path / "remote.csv"]
    for table, options in zip(tables, ([], ["--server", service]), strict=True):
        model = ["--model", detector_folder] if not options else []
        assert cli.main(["score", *map(str, [folder, *model, "--output", table, *options])]) == 0
    local, remote = (list(csv.DictReader(table.read_text().splitlines())) for table in tables)
    assert local == remote
    assert [row["view"] for row in local] == [score.detection.view for score in library if score.detection]
    assert [float(row["p_value"]) for row in local] == [score.ood.p_value for score in library if score.ood]


def test_a_table_of_a_detector_is_continued(
    detector_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = tmp_path / "images", tmp_path / "verdicts.csv"
    folder.mkdir()
    Image.fromarray(good_image(1000)).save(folder / "0.png")
    command = ["score", str(folder), "--model", str(detector_folder), "--output", str(table)]
    assert cli.main(command) == 0
    Image.fromarray(good_image(1001)).save(folder / "1.png")
    assert cli.main(command) == 0
    assert "1 of them unchanged since the table was written" in capsys.readouterr().out
    table.rename(f"{table}.part")  # as of a run that was interrupted after the last row
    assert cli.main(command) == 0
    (statistic,) = {row["statistic"] for row in csv.DictReader(table.read_text().splitlines())}
    assert statistic == "weighted views"
