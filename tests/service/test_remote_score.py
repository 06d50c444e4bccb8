"""`ncml score --server` and `ncml watch --server` through the application."""

import contextlib
import csv
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ncml.cli import arrivals, remote_model, rows, watch, watch_loop
from ncml.cli import main as cli
from ncml.cli.score_output import TEXT_COLUMNS, print_row
from ncml.cli.table import Table
from ncml.client import Client
from ncml.errors import ServiceError
from ncml.ood.alarm import FlaggedRateAlarm
from ncml.results import Score
from service.app import create_app
from service.keys import digest
from service.settings import Settings
from tests.conftest import eventually, free_port
from tests.service.live import served
from worker.contract import Lane, ScoreJob
from worker.job_results import EXPIRED, JobError
from worker.queue import QueueFull

Run = Callable[..., tuple[int, str, str]]


def write(folder: Path, levels: range) -> None:
    folder.mkdir(exist_ok=True)
    for level in levels:
        Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(folder / f"{level:03}.png")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run `ncml score` in a temporary folder, against a service with an API key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows, "REQUEST", 4)
    (tmp_path / "keys").write_text(f"ann:{digest('secret')}\n")
    with served(create_app(Settings(api_keys_file=tmp_path / "keys"), queue)) as url:

        def score(*arguments: str, server: str = url, key: str = "secret") -> tuple[int, str, str]:
            status = cli.main(["score", *arguments, "--server", server, "--api-key", key])
            output = capsys.readouterr()
            return status, output.out, output.err

        yield score


def test_a_folder_is_scored_by_a_service_into_the_same_table(run: Run, jobs, model, tmp_path: Path) -> None:
    write(tmp_path / "images", range(80, 120, 2))
    (tmp_path / "images" / "bad.png").write_text("not an image")
    status, out, err = run("images", "--output", "scores.csv", "--fdr", "0.9")
    assert status == 0, err
    assert "20 images, 9 flagged" in out
    assert "1 file was skipped" in err
    *scored, bad = table(tmp_path / "scores.csv")
    assert [float(row["bpd"]) for row in scored] == list(range(80, 120, 2))
    assert list(scored[0]) == [
        "file", "bpd", "log_likelihood", "score", "p_value", "is_ood", "bytes", "modified", "model", "calibration",
        "statistic", "error", "discovery",
    ]  # fmt: skip
    assert (scored[0]["model"], scored[0]["calibration"]) == (model.version[:12], "c0" * 6)
    assert (scored[0]["statistic"], scored[-1]["is_ood"]) == ("multiscale", "1")
    assert "bad.png is not an image" in bad["error"]
    scoring = [job for job in jobs.values() if isinstance(job, ScoreJob)]
    assert {job.version for job in scoring} == {model.version}  # a model that is replaced meanwhile is not mixed in
    assert {job.priority for job in scoring} == {"low"}
    assert [job.n for job in scoring].count(4) == 5


@pytest.mark.parametrize("command", ["score", "watch"])
def test_verdicts_of_a_calibration_that_was_replaced_meanwhile_are_not_mixed_in(
    queue, worker, model, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "images", range(80, 84))
    again = {name: entry.model_copy(update={"version": "c1" * 32}) for name, entry in model.calibrations.items()}
    accept = queue.submit

    def calibrate_again(job: ScoreJob, **kwargs: object) -> str:
        worker.serve(model.model_copy(update={"calibrations": again}))
        return accept(job, **kwargs)

    queue.submit = calibrate_again
    with served(create_app(Settings(), queue)) as url:
        assert cli.main([command, "images", "--server", url, "--output", "verdicts.csv"]) == 2
    assert capsys.readouterr().err.endswith(
        "ncml: the calibration of tiny has been replaced or removed since this command started: run it again, with "
        "another --output if it writes a table.\n"
    )
    assert not (tmp_path / "verdicts.csv").exists() or not table(tmp_path / "verdicts.csv")


def test_an_interrupted_run_resumes(run: Run, queue, jobs, tmp_path: Path) -> None:
    write(tmp_path / "images", range(80, 120, 2))
    accept, part = queue.submit, tmp_path / "scores.csv.part"

    def break_down(job: ScoreJob, **kwargs: object) -> str:
        if job.images[0].data[0] < 104:
            return accept(job, **kwargs)
        eventually(lambda: part.exists() and table(part))  # answers to earlier requests are in it
        raise RuntimeError("out of order")

    queue.submit = break_down
    status, _, err = run("images", "--output", "scores.csv")
    assert status == 2, err
    assert err.startswith("ncml: The service failed unexpectedly")
    done = {Path(row["file"]).name for row in table(part)}
    assert len(done) in (4, 8, 12)
    before = set(jobs)
    queue.submit = accept
    status, _, err = run("images", "--output", "scores.csv")
    assert status == 0, err
    files = {f"{level:03}.png" for level in range(80, 120, 2)}
    assert sorted(Path(row["file"]).name for row in table(tmp_path / "scores.csv")) == sorted(files)
    # a request that the interrupted run had sent may be submitted late, but none of images whose scores it had written
    late = [jobs[key] for key in jobs.keys() - before]
    assert {f"{image.data[0]:03}.png" for job in late for image in job.images} == files - done


def test_a_full_queue_slows_the_run_down(
    run: Run, queue, worker, info, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(Client, "_pause", lambda self, seconds: pauses.append(seconds))
    write(tmp_path / "images", range(80, 120, 2))
    accept, refused = queue.submit, [0]

    def refuse_twice(*args: object, **kwargs: object) -> str:
        refused[0] += 1
        if refused[0] <= 2:
            raise QueueFull("2 jobs are waiting")
        return accept(*args, **kwargs)

    queue.submit = refuse_twice
    worker.appear_as(info.model_copy(update={"pace": {Lane.SCORE: 0.01}}))
    status, _, err = run("images", "--output", "scores.csv")
    assert status == 0, err
    assert len(table(tmp_path / "scores.csv")) == 20
    assert len([pause for pause in pauses if pause >= 1]) == 2


def test_an_error_ends_the_run_although_others_wait_for_the_queue(
    run: Run, queue, worker, info, tmp_path: Path
) -> None:
    """Those that wait would do so for an hour."""
    write(tmp_path / "images", range(80, 120, 2))
    waiting = threading.Event()

    def refuse(job: ScoreJob, **kwargs: object) -> str:
        if job.images[0].data[0] > 80:
            waiting.set()
            raise QueueFull("2 jobs are waiting")
        assert waiting.wait(30)
        raise RuntimeError("out of order")

    queue.submit = refuse
    worker.appear_as(info.model_copy(update={"pace": {Lane.SCORE: 0.01}}))
    before = set(threading.enumerate())
    status, _, err = run("images", "--output", "scores.csv")
    assert status == 2, err
    assert err.startswith("ncml: The service failed unexpectedly")
    for thread in {thread for thread in threading.enumerate() if thread.name.endswith("(call)")} - before:
        thread.join(30)
        assert not thread.is_alive()


def test_a_watch_waits_for_a_service_that_restarts(queue, tmp_path: Path) -> None:
    verdicts, log, port = tmp_path / "verdicts.csv", tmp_path / "log", free_port()
    write(tmp_path / "images", range(80, 81))
    judged = lambda: len(table(verdicts)) if verdicts.exists() else 0  # noqa: E731
    with contextlib.ExitStack() as ending:
        with served(create_app(Settings(), queue), port) as url, log.open("w") as stderr:
            code = "from ncml.client import exchange; exchange.OUTAGE_S = 0; from ncml.cli.main import main; main()"
            command = [sys.executable, "-c", code, "watch", "images", "--server", url, "-o", "verdicts.csv"]
            process = subprocess.Popen(command, cwd=tmp_path, stderr=stderr)
            ending.callback(process.kill)
            eventually(lambda: judged() == 1 or process.poll() is not None)
        write(tmp_path / "images", range(81, 83))
        eventually(lambda: "cannot be reached" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        with served(create_app(Settings(), queue), port):
            eventually(lambda: judged() == 3 or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
    assert [(float(row["bpd"]), row["error"]) for row in table(verdicts)] == [(80, ""), (81, ""), (82, "")]
    assert log.read_text().count("trying again until that succeeds") == 1


@pytest.mark.parametrize(
    ("reason", "attempts", "words"),
    [
        (
            "timeout",
            3,
            " takes the service longer than its time limit for a job (3 attempts): raise NCML_JOB_TIMEOUT_S where it "
            "runs.",
        ),
        ("engine", 1, ": It failed."),
    ],
)
def test_a_watch_skips_an_image_that_the_service_cannot_compute(
    queue,
    worker,
    jobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reason: str,
    attempts: int,
    words: str,
) -> None:
    """Other images of its request are judged, and one whose job waited for a worker in vain is not skipped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arrivals, "PATIENCE_S", 0.0)
    monkeypatch.setattr(watch_loop, "RETRY_S", 0.01)
    write(tmp_path / "images", range(80, 83))
    vain, failure = iter([True, True]), JobError(reason=reason, detail="it failed")

    def fail(job: ScoreJob) -> JobError | None:
        if next(vain, False):
            return EXPIRED
        return failure if 81 in (image.data[0] for image in job.images) else None

    def stop_after_the_last(row: dict) -> None:
        if row["bpd"] == 82:
            signal.raise_signal(signal.SIGINT)

    worker.error = fail
    monkeypatch.setattr(watch, "_print_object", stop_after_the_last)
    with served(create_app(Settings(), queue)) as url:
        assert cli.main(["watch", "images", "--server", url, "--json"]) == 0
    first, second, third = table(tmp_path / "verdicts.csv")
    assert (first["bpd"], third["bpd"], first["error"], third["error"]) == ("80.0", "82.0", "", "")
    assert second["error"] == f"images/081.png{words}"
    assert f"skipped: {second['error']}" in capsys.readouterr().err
    assert [job.n for job in jobs.values()] == [3, 3, 3, 1, *[1] * attempts, 1]


@pytest.mark.parametrize(
    ("status", "kind", "is_waited_for"),
    [(429, "", True), (502, "", True), (503, "", True), (504, "", True), (404, "no-such-job", True), (401, "", False)],
)
def test_a_watch_waits_for_a_service_that_is_unavailable_and_ends_when_it_refuses(
    status: int,
    kind: str,
    is_waited_for: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(watch_loop, "RETRY_S", 0.01)
    write(tmp_path / "images", range(80, 81))
    columns = ["file", "p_value", "is_ood", "bytes", "modified", "moved_to", "error"]
    verdicts = Table(tmp_path / "verdicts.csv", columns, texts=TEXT_COLUMNS, constants={}, is_endless=True)
    refusals, stated_s, pauses = iter([status, status]), iter([0.02, 86_400.0]), list[float]()

    def score(paths: list[Path]) -> list[dict]:
        if refused := next(refusals, 0):
            error = ServiceError("the service refuses", status=refused, kind=kind)
            error.retry_after_s = next(stated_s)
            raise error
        signal.raise_signal(signal.SIGINT)
        return [{"file": str(path), "p_value": 0.5, "is_ood": False} for path in paths]

    scorer, alarm = rows.Scorer(score, 1), FlaggedRateAlarm(20, 0.05)
    watcher = watch_loop.Watch(tmp_path / "images", verdicts, scorer, alarm, None, lambda row: None, judge="a model")
    wait = watcher._stopping.wait

    def note_and_wait(timeout_s: float | None = None) -> bool:
        pauses.append(timeout_s or 0.0)
        return wait(min(timeout_s or 0.0, 0.05))

    monkeypatch.setattr(watcher._stopping, "wait", note_and_wait)
    with contextlib.nullcontext() if is_waited_for else pytest.raises(ServiceError):
        watcher.run(0.05)
    if is_waited_for:
        assert [pause_s for pause_s in pauses if pause_s in (0.02, 600)] == [0.02, 600]
    assert [row["error"] for row in verdicts.rows()] == ([""] if is_waited_for else [])
    assert capsys.readouterr().err.count("trying again") == is_waited_for


def test_a_watch_that_is_stopped_waits_only_for_a_while_for_a_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service has no room, and is waited for by the client."""
    monkeypatch.setattr(rows, "STOP_S", 0.05)
    write(tmp_path / "images", range(80, 84))
    columns = ["file", "p_value", "is_ood", "bytes", "modified", "moved_to", "error"]
    verdicts = Table(tmp_path / "verdicts.csv", columns, texts=TEXT_COLUMNS, constants={}, is_endless=True)
    waiting, has_room = threading.Barrier(2), threading.Event()

    def score(paths: list[Path]) -> list[dict]:
        if paths[0].name == "082.png":
            waiting.wait(60)
            assert has_room.wait(300)
        return [{"file": str(path), "p_value": 0.5, "is_ood": False} for path in paths]

    def stop() -> None:
        waiting.wait(60)
        eventually(lambda: len(list(verdicts.rows())) == 2)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    scorer = rows.Scorer(score, 1, 2)
    watch_loop.Watch(tmp_path / "images", verdicts, scorer, None, None, lambda row: None, judge="a model").run(0.05)
    assert not has_room.is_set()
    has_room.set()
    thread.join(60)
    assert [row["file"][-7:] for row in verdicts.rows()] == ["080.png", "081.png"]


def test_an_interrupted_run_does_not_wait_for_requests_on_their_way() -> None:
    code = """
import signal, threading
from pathlib import Path
from ncml.cli import rows

requested, stopped = threading.Barrier(3), threading.Event()

def wait_forever(paths):
    requested.wait()
    threading.Event().wait()

def interrupt():
    requested.wait()
    while True:  # a signal can come just before the main thread waits
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if stopped.wait(5):
            break

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
threading.Thread(target=interrupt).start()
try:
    next(rows.score_batches([Path("a"), Path("b")], rows.Scorer(wait_forever, 1, 2)))
except KeyboardInterrupt:
    stopped.set()
    print("stopped")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")


def test_few_requests_are_in_progress_at_once() -> None:
    """Memory does not grow with the number of files, even if the service is slow."""
    gate = threading.Event()

    def slow(paths: list[Path]) -> list[dict]:
        assert gate.wait(30)
        return [{"file": str(path)} for path in paths]

    read = 0

    def paths() -> Iterator[Path]:
        nonlocal read
        for i in range(100_000):
            read += 1
            yield Path(str(i))

    batches = rows.score_batches(paths(), rows.Scorer(slow, rows.REQUEST, remote_model.REQUESTS))
    threading.Timer(0.5, gate.set).start()
    first = next(batches)
    assert [row["file"] for row in first] == [str(i) for i in range(rows.REQUEST)]
    assert next(row["file"] for row in next(batches)) == str(rows.REQUEST)
    assert read <= (remote_model.REQUESTS + 2) * rows.REQUEST
    batches.close()


def test_lines_json_statistics_and_maps_are_written(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "images", range(80, 84, 2))
    status, out, err = run("images", "--statistics", "all", "--map", "maps", "--class", "cat")
    assert status == 0, err
    assert "80.0000 bits/dim" in out
    assert "multiscale 80" in out
    assert np.allclose(np.load(tmp_path / "maps" / "images" / "080.png.npz")["map"], 80)
    status, out, _ = run("images", "--json", "--calibration", "weak")
    body = json.loads(out)
    assert (body["model"]["name"], body["calibration"], body["images"]) == ("tiny", "weak", 2)
    assert "ranks among 19 images" in body["weakness"]
    status, out, err = run("images", "--only-bpd", "--model", "tiny")
    assert (status, "OOD" in out) == (0, False), err


def test_large_images_are_judged_by_their_tiles(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "images", range(80, 120, 20))
    status, _, err = run("images", "--tile", "--output", "scores.csv", "--map", "maps")
    assert status == 0, err
    first, second = table(tmp_path / "scores.csv")
    assert (first["score"], first["tiles"], first["width"], second["score"]) == ("80.0", "9", "8", "100.0")
    assert (tmp_path / "maps" / "images" / "080.png.png").exists()


def test_an_image_with_too_many_tiles_is_skipped(
    queue, worker, model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "images", range(80, 100, 20))
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "big.png")
    worker.serve(model.model_copy(update={"tiles": None}))
    with served(create_app(Settings(max_tiles=10), queue)) as url:
        status = cli.main(["score", "images", "--tile", "--output", "scores.csv", "--server", url])
    assert status == 0, capsys.readouterr().err
    scored, big = table(tmp_path / "scores.csv")
    assert scored["tiles"] == "9"
    assert big["error"].startswith("images/big.png is 64 x 64 pixels, which makes 225 tiles of 8 x 8; ")


def test_large_images_are_sent_as_files_and_those_that_the_service_refuses_are_skipped(
    queue, jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The JPEG is below the service's limit, as a PNG it would not be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8))
    noise.save(tmp_path / "images" / "1.png")
    noise.save(tmp_path / "images" / "2.jpg")
    noise.resize((4, 4)).save(tmp_path / "images" / "3.png")
    (tmp_path / "images" / "4.png").write_text("not an image")
    assert (tmp_path / "images" / "2.jpg").stat().st_size < 25_000 < (tmp_path / "images" / "1.png").stat().st_size
    with served(create_app(Settings(max_body_bytes=25_000), queue)) as url:
        status = cli.main(["score", "images", "--tile", "--output", "scores.csv", "--server", url])
    assert status == 0, capsys.readouterr().err
    too_large, scored, too_small, unreadable = table(tmp_path / "scores.csv")
    assert too_large["error"].startswith("images/1.png: The request body is too large: at most 25000 bytes")
    assert (scored["error"], scored["tiles"]) == ("", str(31 * 31))
    assert "smaller than a tile" in too_small["error"]
    assert too_small["error"].startswith("images/3.png: ")
    assert unreadable["error"].startswith("images/4.png is not an image")
    assert len(jobs) == 1


@pytest.mark.parametrize("reason", ["timeout", "engine"])
def test_an_image_that_cannot_be_computed_is_skipped(run: Run, worker, tmp_path: Path, reason: str) -> None:
    write(tmp_path / "images", range(80, 81))
    Image.new("RGB", (24, 16)).save(tmp_path / "images" / "wide.png")
    failure = JobError(reason=reason, detail="it failed")
    worker.error = lambda job: failure if job.width == 24 else None
    status, _, err = run("images", "--tile", "--output", "scores.csv")
    assert status == 0, err
    assert [row["error"] for row in table(tmp_path / "scores.csv")] == ["", "images/wide.png: It failed."]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["images"], {"key": "wrong"}, "API key"),
        (["images", "--model", "other"], {}, "'other' is not available; the available models are tiny"),
        (["images", "--calibration", "none"], {}, "there is no calibration 'none': choose from default, weak."),
        (["images", "--statistics", "luck"], {}, "there is no statistic 'luck': choose from multiscale, bpd."),
        (["images", "--class", "unicorn"], {}, "its classes are cat, dog"),
        (["images", "--device", "cuda"], {}, "--device cannot be combined with --server"),
        (["empty"], {}, "there is no image in empty."),
        (["nowhere"], {}, "nowhere cannot be read"),
        (["images"], {"server": "localhost"}, "is not the address of a service"),
        (["images"], {"server": "http://localhost:abc"}, "is not the address of a service"),
        (["images"], {"server": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence_and_leaves_no_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], options: dict, message: str
) -> None:
    monkeypatch.setattr(Client, "_pause", lambda self, seconds: None)
    write(tmp_path / "images", range(80, 82, 2))
    (tmp_path / "empty").mkdir()
    files = set(tmp_path.iterdir())
    for output in ([], ["--output", "scores.csv"]):
        status, out, err = run(*arguments, *output, **options)
        assert (status, out) == (2, "")
        assert err.startswith("ncml: ")
        assert message in err
        assert err.count("\n") == 1
        assert set(tmp_path.iterdir()) == files


def test_statistics_of_an_uncalibrated_model_are_refused(run: Run, worker, model, tmp_path: Path) -> None:
    worker.serve(model.model_copy(update={"calibrations": {}}))
    write(tmp_path / "images", [80])
    status, _, err = run("images", "--statistics", "typicality")
    assert status == 2
    assert err.startswith("ncml: --statistics needs a calibration: the service's model tiny is not calibrated")
    worker.serve(model.model_copy(update={"calibrations": {"tolerant": model.calibrations["default"]}}))
    status, _, err = run("images", "--statistics", "typicality")
    assert status == 2
    assert "this model has no default calibration: choose from tolerant." in err


@pytest.mark.parametrize("others", [{"height": float("inf")}, {"calibrations": [1]}])
def test_a_model_of_something_else_is_refused(
    others: dict[str, object], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "images", range(80, 82, 2))
    models = Client.models
    monkeypatch.setattr(Client, "models", lambda client: [models(client)[0] | others])
    status, _, err = run("images")
    assert status == 2
    assert "does not describe models as an ncml service does" in err


def test_what_a_service_answers_cannot_change_the_terminal(
    run: Run, jobs, worker, model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "images", range(80, 82, 2))
    models = Client.models
    monkeypatch.setattr(Client, "models", lambda client: [models(client)[0] | {"name": "a\x1b[2J", "calibrations": {}}])
    monkeypatch.setattr(Client, "score", lambda *_, **__: [Score(1.0, -1.0)])
    status, _, err = run("images")
    assert status == 0
    assert "the service's model a\\x1b[2J is not calibrated" in err

    def refuse(*_: object, **__: object) -> None:
        raise ServiceError("\x1b[2J", status=422)

    monkeypatch.setattr(Client, "score", refuse)
    assert run("images") == (2, "", "ncml: \\x1b[2J\n")


@pytest.mark.parametrize("kind", [{"tiles": 1}, {"rarity": "rare", "differences": "grey", "p_value": None}])
def test_the_view_of_a_service_cannot_change_the_terminal(
    kind: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"file": "a.png", "view": "a\x1b[2J", "score": 1.0, "left": 0, "top": 0, "width": 1, "height": 1}
    print_row(row | kind, ())
    assert capsys.readouterr().out.startswith("a\\x1b[2J ")


def test_messages_of_watch_cannot_change_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    watch_loop.Watch._print(watch_loop.Watch.__new__(watch_loop.Watch), "in/a\x1b[2J.png cannot be moved")
    assert capsys.readouterr().err == "ncml: in/a\\x1b[2J.png cannot be moved\n"


def test_no_module_imports_torch() -> None:
    modules = "ncml.cli.main, ncml.cli.remote_model, ncml.cli.rows, ncml.cli.score"
    code = f"import sys; sys.modules['torch'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_torch_is_needed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without torch can score its files."""
    write(tmp_path / "images", range(80, 82, 2))
    monkeypatch.delitem(sys.modules, "ncml.cli.score", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    status, _, err = run("images", "--statistics", "all", "--fdr", "0.9", "--map", "maps")
    assert status == 0, err


def test_a_key_needs_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "images", range(80, 82, 2))
    assert cli.main(["score", str(tmp_path / "images"), "--api-key", "secret"]) == 2
    assert "--api-key requires --server" in capsys.readouterr().err


def test_another_preprocessing_is_refused(
    run: Run, worker, model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "images", range(80, 82, 2))
    preprocessing = model.preprocessing.model_copy(update={"version": 2})
    worker.serve(model.model_copy(update={"preprocessing": preprocessing}))
    status, _, err = run("images")
    assert status == 2
    assert "preprocesses images by other rules" in err
    worker.serve()
    assert "serves no model" in run("images")[2]
    worker.serve(model)
    monkeypatch.setattr("ncml.client.Client.models", lambda client: [{"name": "llama", "default": True}])
    assert "does not describe models as an ncml service does" in run("images")[2]
