"""One worker process: batches, chunks, priorities, cancellation, time limits, bad input, signals."""

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import time
import urllib.request

import numpy as np
import psutil
import pytest
import rq
from rq.job import Job as RqJob
from rq.suspension import resume, suspend

from ncml.images.tiling import Tiling
from ncml.ood.alarm import FlaggedRateAlarm
from tests.conftest import eventually, free_port
from tests.worker.fleet import PIXELS, Fleet, complete, generate, scan, score
from tests.worker.synthetic import HEIGHT, WIDTH, write_model
from worker.contract import Job, JobStatus, Lane, Pixels, Priority
from worker.descriptors import WorkerState
from worker.job_results import Box, ImagesResult, Ood, ScanResult, ScoreResult
from worker.leases import Claim
from worker.queue import JobNotFound
from worker.running import RunningJob

HANG_S = 8.0
"""Seconds after which an engine counts as hung; on a busy machine a new one is silent for seconds while it starts."""


def test_scoring_generating_and_completing_return_the_requested_results(fleet: Fleet) -> None:
    fleet.start()
    ids = [fleet.queue.submit(job) for job in (score(map=True, noise=2.0), generate(n=3, seed=7), complete(n=2))]
    assert [view.status for view in fleet.wait(ids)] == ["succeeded"] * 3

    scored, generated, completed = (fleet.queue.result(job_id) for job_id in ids)
    assert isinstance(scored, ScoreResult)
    mean = np.frombuffer(PIXELS.data, np.uint8).mean()
    assert scored.results[0].bpd == pytest.approx(mean / 32 + 2.0)
    assert scored.results[0].map
    assert (scored.height, scored.width) == (HEIGHT, WIDTH)
    np.testing.assert_allclose(np.frombuffer(scored.results[0].map, "<f4"), np.full(HEIGHT * WIDTH, mean), rtol=1e-6)
    assert isinstance(generated, ImagesResult)
    assert generated.seeds == (7, 8, 9)
    assert generated.model.version == fleet.queue.monitor.models()[0].version
    assert generated.timing.compute_s
    assert len(fleet.images(ids[1])) == 3 * HEIGHT * WIDTH * 3
    assert isinstance(completed, ImagesResult)
    half = HEIGHT // 2 * WIDTH * 3
    assert fleet.images(ids[2])[:half] == PIXELS.data[:half]
    fleet.check(ids)


def test_a_calibrated_model_gives_verdicts_statistics_and_the_sanity_test(fleet: Fleet) -> None:
    light = Pixels(height=HEIGHT, width=WIDTH, data=bytes([200]) * len(PIXELS.data))
    dark = Pixels(height=HEIGHT, width=WIDTH, data=bytes([51]) * len(PIXELS.data))
    both = (dark, light)
    port = free_port()
    fleet.start(metrics_port=port)
    ids = [
        fleet.queue.submit(job)
        for job in (
            score(images=both),
            score(images=both, statistic="bpd", statistics="all", sanity=True),
            score(images=both, statistics=("bpd",)),
            score(images=both, ood=False, noise=1.0),
            score(images=both, calibration="weak"),
        )
    ]
    assert [view.status for view in fleet.wait(ids)] == ["succeeded"] * 5
    usual, full, named, bare, weak = ([*fleet.queue.result(job_id).results] for job_id in ids)  # type: ignore[union-attr]
    verdicts = [score.ood for score in usual]
    version = fleet.queue.monitor.models()[0].calibrations["default"].version
    verdict = functools.partial(Ood, calibration_version=version)
    assert verdicts == [
        verdict(statistic="mean", score=51, p_value=0.8, threshold=128, is_ood=False),
        verdict(statistic="mean", score=200, p_value=1 - 200 / 255, threshold=128, is_ood=True),
    ]
    assert (usual[0].statistics, usual[0].flipped_bpd) == ({}, None)
    assert full[1].ood == verdict(statistic="bpd", score=6.25, p_value=1 - 6.25 / 255, threshold=4, is_ood=True)
    assert full[1].statistics == {"mean": 200, "bpd": 6.25}
    assert full[1].flipped_bpd == 6.75
    assert named[0].statistics == {"bpd": pytest.approx(51 / 32)}
    assert [(score.ood, score.statistics) for score in bare] == [(None, {}), (None, {})]
    assert [(score.ood.calibration, score.ood.is_weak) for score in weak if score.ood] == [("weak", True)] * 2
    (model,) = fleet.queue.monitor.models()
    calibration = model.calibrations["default"]
    assert model.default_calibration == calibration
    assert model.calibrations["weak"].weakness == "it ranks among 19 images"
    assert (calibration.statistic, calibration.threshold) == ("mean", 128)
    assert calibration.histograms["bpd"].counts == (50, 49)

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=300) as response:
        lines = response.read().decode().splitlines()
    assert 'ncml_ood_verdicts_total{model="synthetic",verdict="in"} 4.0' in lines
    assert 'ncml_ood_verdicts_total{model="synthetic",verdict="out"} 4.0' in lines
    assert 'ncml_ood_p_value_count{model="synthetic"} 8.0' in lines
    assert 'ncml_ood_p_value_bucket{le="0.3",model="synthetic"} 3.0' in lines
    assert any(line.startswith('ncml_ood_evidence{calibration="weak",model="synthetic"} ') for line in lines)
    alarm = FlaggedRateAlarm(calibration.n_rank, calibration.false_positive_rate)
    for scored in (*usual, *named):  # not those of `full`, which the statistic bpd decides
        evidence = alarm.update(scored.ood.is_ood)
    assert f'ncml_ood_evidence{{calibration="default",model="synthetic"}} {float(evidence)}' in lines
    assert 'ncml_score_bpd_count{model="synthetic"} 8.0' in lines  # scores under noise do not count

    write_model(fleet.models, calibrated=False)
    eventually(lambda: [model.calibrations for model in fleet.queue.monitor.models()] == [{}])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=300) as response:
        assert "ncml_ood_evidence{" not in response.read().decode()  # an alarm that could not end


def test_a_worker_without_models_takes_no_jobs(fleet: Fleet) -> None:
    shutil.rmtree(fleet.models)
    fleet.start(ready=False)
    job_id = fleet.queue.submit(score())
    eventually(lambda: "there is no model to serve" in fleet.log.read_text())
    time.sleep(2)
    assert [worker.state for worker in fleet.queue.monitor.workers()] == [WorkerState.LOADING]
    assert fleet.queue.view(job_id).status is JobStatus.QUEUED
    write_model(fleet.models)
    (view,) = fleet.wait([job_id])
    assert view.status is JobStatus.SUCCEEDED


def test_an_uncalibrated_model_gives_no_verdict(fleet: Fleet) -> None:
    write_model(fleet.models, calibrated=False)
    fleet.start()
    job_id = fleet.queue.submit(score())
    fleet.wait([job_id])
    result = fleet.queue.result(job_id)
    assert isinstance(result, ScoreResult)
    assert result.results[0].ood is None
    assert fleet.queue.monitor.models()[0].default_calibration is None


def test_a_long_score_reports_progress_and_stops_when_canceled(fleet: Fleet) -> None:
    write_model(fleet.models, "endless", batch_s=600.0, rows=6000)
    fleet.start()
    job_id = fleet.queue.submit(score(model="endless", images=(PIXELS,) * 10))
    progress = eventually(lambda: fleet.queue.view(job_id).progress)
    assert (progress.stage, progress.total, progress.n) == ("score", 10, 10)
    fleet.queue.cancel(job_id)
    other = fleet.queue.submit(score())
    views = fleet.wait([job_id, other])
    assert [view.status for view in views] == [JobStatus.CANCELED, JobStatus.SUCCEEDED]
    assert "failed" not in fleet.log.read_text()


LARGE = np.zeros((20, 24, 3), np.uint8)
LARGE[10:18, 4:12] = 200
"""An image of 4 x 5 tiles of 8 x 8 pixels; the tile at row 2, column 1 is the brightest."""


def test_a_large_image_is_judged_by_its_tiles(fleet: Fleet) -> None:
    write_model(fleet.models, tiled=True)
    fleet.start()
    ids = [fleet.queue.submit(job) for job in (scan(LARGE, map=True), scan(LARGE), scan(LARGE[:8, :8]))]
    assert [view.status for view in fleet.wait(ids)] == ["succeeded"] * 3
    whole, bare, small = (fleet.queue.result(job_id) for job_id in ids)
    assert isinstance(whole, ScanResult)
    assert isinstance(bare, ScanResult)
    assert isinstance(small, ScanResult)
    assert whole.scan.tiles
    assert bare.scan == whole.scan.model_copy(update={"tiles": None})
    means = [LARGE[top : top + 8, left : left + 8].mean() for top, left in Tiling(8, 8).corners(20, 24)]
    assert np.frombuffer(whole.scan.tiles, "<f4") == pytest.approx(means)
    assert (whole.scan.height, whole.scan.width, whole.scan.rows, whole.scan.columns) == (20, 24, 4, 5)
    assert whole.scan.score == max(means)
    assert whole.scan.box == Box(left=4, top=8, width=8, height=8)
    assert (whole.scan.p_value, whole.scan.threshold, whole.scan.is_ood) == (0.5, 128, True)
    assert (small.scan.rows, small.scan.columns, small.scan.is_ood) == (1, 1, False)
    (model,) = fleet.queue.monitor.models()
    assert model.tiles
    assert (model.tiles.height, model.tiles.width, model.tiles.threshold, model.tiles.n_rank) == (8, 8, 128, 20)
    fleet.check(ids)


def test_each_scan_is_its_own_batch(fleet: Fleet) -> None:
    """Whole files are too large to be batched."""
    images = (LARGE, np.zeros_like(LARGE), LARGE)
    ids = [fleet.queue.submit(scan(image)) for image in images]
    generated = fleet.queue.submit(generate())
    fleet.start(lanes="generate")
    views = fleet.wait([*ids, generated])
    assert [view.timing.batch_size for view in views if view.timing] == [1] * 4
    batches = [json.loads(line).get("batch") for line in fleet.log.read_text().splitlines() if "job started" in line]
    assert batches == [1, 2, 3, 4]
    scores = [result.scan.score for job_id in ids if isinstance(result := fleet.queue.result(job_id), ScanResult)]
    assert scores == [scores[0], 0, scores[0]]
    assert scores[0] > 0


def test_an_invalid_scan_is_explained_and_an_uncalibrated_one_has_no_verdict(fleet: Fleet) -> None:
    write_model(fleet.models, "damaged", tiled="damaged")
    fleet.start()
    jobs = [
        scan(LARGE),
        scan(LARGE, tile_size=16),
        scan(LARGE, tile_size=4),
        scan(LARGE[:7]),
        scan(LARGE, file=b"junk"),
        scan(LARGE + 1, height=19),
        scan(LARGE, model="damaged"),
    ]
    ids = [fleet.queue.submit(job) for job in jobs]
    views = fleet.wait(ids)
    for job_id, rows in zip(ids[:2], (4, 2), strict=True):
        result = fleet.queue.result(job_id)
        assert isinstance(result, ScanResult)
        assert (result.scan.rows, result.scan.p_value, result.scan.is_ood) == (rows, None, None)
    errors = [(view.error.reason, view.error.field, view.error.detail) for view in views[2:] if view.error]
    assert [error[:2] for error in errors] == [
        ("input", "tile_size"), ("input", "image"), ("input", "image"), ("input", "image"), ("model", "model"),
    ]  # fmt: skip
    for error, words in zip(
        errors, ("8 pixels, not 4", "24 x 7", "not an image", "24 x 20", "is damaged"), strict=True
    ):
        assert words in error[2]
    assert {model.name: model.tiles for model in fleet.queue.monitor.models()} == {"synthetic": None, "damaged": None}
    assert "damaged/calibration-tiles.json is damaged" in fleet.log.read_text()


def test_a_long_scan_reports_progress_and_stops_when_canceled(fleet: Fleet) -> None:
    write_model(fleet.models, batch_s=0.3)
    fleet.start(max_batch=2)
    job_id = fleet.queue.submit(scan(np.zeros((400, 400, 3), np.uint8)))  # 9,801 tiles, 25 minutes
    progress = eventually(lambda: fleet.queue.view(job_id).progress)
    assert (progress.stage, progress.total, progress.n) == ("tiles", 9801, 1)
    fleet.queue.cancel(job_id)
    other = fleet.queue.submit(scan(LARGE[:8, :8]))
    views = fleet.wait([job_id, other])
    assert [view.status for view in views] == [JobStatus.CANCELED, JobStatus.SUCCEEDED]
    assert "failed" not in fleet.log.read_text()


def test_a_scan_whose_worker_is_killed_is_computed_by_another(fleet: Fleet) -> None:
    write_model(fleet.models, batch_s=0.2)
    worker = fleet.start(max_batch=2, lease_s=1.0)
    job_id = fleet.queue.submit(scan(LARGE, map=True))
    eventually(lambda: fleet.queue.view(job_id).progress)
    worker.kill()
    fleet.start()
    assert [view.status for view in fleet.wait([job_id])] == ["succeeded"]
    result = fleet.queue.result(job_id)
    assert isinstance(result, ScanResult)
    assert result.scan.box == Box(left=4, top=8, width=8, height=8)
    fleet.check([job_id])


def test_only_compatible_jobs_share_batches_up_to_the_limit(fleet: Fleet) -> None:
    ids = [fleet.queue.submit(score(noise=float(i % 2))) for i in range(40)]
    fleet.start(max_batch=16)
    sizes = [view.timing.batch_size for view in fleet.wait(ids) if view.timing]
    assert sizes == [16] * 32 + [4] * 8  # 20 jobs of each noise
    for job_id, i in zip(ids, range(40), strict=True):
        result = fleet.queue.result(job_id)
        assert isinstance(result, ScoreResult)
        assert result.results[0].bpd == pytest.approx(95.5 / 32 + i % 2)
    fleet.check(ids)


def test_a_request_larger_than_a_batch_is_computed_in_chunks(fleet: Fleet) -> None:
    fleet.start(max_batch=16)
    large, small = fleet.queue.submit(generate(n=40, seed=100)), fleet.queue.submit(generate(seed=139))
    views = fleet.wait([large, small])
    assert views[0].timing
    assert views[0].timing.batch_size == 16
    assert fleet.images(large)[-HEIGHT * WIDTH * 3 :] == fleet.images(small)


def test_an_image_is_the_same_alone_and_in_any_batch(fleet: Fleet) -> None:
    fleet.start()
    alone = fleet.queue.submit(generate(seed=3))
    fleet.wait([alone])
    batch = [fleet.queue.submit(generate(seed=seed, class_name="good" if seed % 2 else None)) for seed in range(16)]
    fleet.wait(batch)
    assert fleet.images(batch[3]) == fleet.images(alone)
    assert len({fleet.images(job_id) for job_id in batch}) == 16


def test_high_priority_overtakes_a_backlog_and_low_priority_waits(fleet: Fleet) -> None:
    low = fleet.queue.submit(score(priority=Priority.LOW, noise=5.0))
    backlog = [fleet.queue.submit(score()) for _ in range(64)]
    high = fleet.queue.submit(score(priority=Priority.HIGH, noise=1.0))
    fleet.start(max_batch=4)
    high_end, *backlog_ends, low_end = (view.ended_at or 0.0 for view in fleet.wait([high, *backlog, low]))
    assert high_end <= min(backlog_ends)
    assert low_end >= max(backlog_ends)


def test_a_worker_measures_its_pace(fleet: Fleet) -> None:
    write_model(fleet.models, batch_s=0.2, image_s=0.0)
    fleet.start(max_batch=4)
    fleet.wait([fleet.queue.submit(score()) for _ in range(24)])
    pace = eventually(lambda: fleet.queue.monitor.pace(Lane.SCORE))
    eventually(lambda: 1 < fleet.queue.monitor.pace(Lane.SCORE) <= 20)  # 4 in 0.2 s, and the overhead
    assert pace > 0
    assert fleet.queue.monitor.pace(Lane.GENERATE) == 0


def test_a_single_job_on_an_idle_engine_does_not_wait_for_more_jobs(fleet: Fleet) -> None:
    write_model(fleet.models, batch_s=0.0, image_s=0.0)
    fleet.start(window_s=6000.0)
    for _ in range(3):
        eventually(lambda: any("b" in client["flags"] for client in fleet.queue.redis.client_list()))  # it waits
        fleet.wait([fleet.queue.submit(score())])


def test_canceling_one_job_of_a_batch_is_quick_and_leaves_the_others_running(fleet: Fleet) -> None:
    write_model(fleet.models, batch_s=3.0, rows=60)
    fleet.start()
    first = fleet.queue.submit(generate(noise=1.0))  # keeps the engine busy while the eight jobs arrive
    ids = [fleet.queue.submit(generate(seed=seed)) for seed in range(8)]
    eventually(lambda: fleet.queue.view(ids[7]).progress)
    assert fleet.queue.cancel(ids[2]).status is JobStatus.RUNNING
    views = fleet.wait(ids)
    ends = [view.ended_at or 0.0 for view in views]
    assert ends.index(min(ends)) == 2
    assert [view.status for view in views] == ["succeeded"] * 2 + ["canceled"] + ["succeeded"] * 5
    assert fleet.queue.result(ids[2]) is None
    assert fleet.queue.cancel(ids[3]).status is JobStatus.SUCCEEDED
    fleet.wait([first])
    fleet.check([first, *ids])


def test_a_canceled_batch_ends_within_a_row(fleet: Fleet) -> None:
    write_model(fleet.models, "endless", batch_s=600.0, rows=6000)
    fleet.start()
    job_id = fleet.queue.submit(generate(model="endless"))
    eventually(lambda: fleet.queue.view(job_id).progress)
    fleet.queue.cancel(job_id)
    fleet.wait([fleet.queue.submit(score())])


def test_a_job_over_its_time_limit_fails_alone(fleet: Fleet) -> None:
    write_model(fleet.models, batch_s=1.0, rows=40)
    fleet.start()
    blocker = fleet.queue.submit(generate(noise=1.0))
    ids = [fleet.queue.submit(generate(timeout_s=0.3 if i == 1 else 60)) for i in range(5)]
    views = fleet.wait([blocker, *ids])
    assert [view.status for view in views] == ["succeeded"] * 2 + ["failed"] + ["succeeded"] * 3
    error = views[2].error
    assert error
    assert error.reason == "timeout"
    assert error.detail == "the job ran for more than 0.3 s; request fewer images or steps at once"
    fleet.check(ids)


@pytest.mark.parametrize(
    ("job", "remedy"),
    [
        (score(), "send fewer images at once"),
        (scan(np.zeros((8, 8, 3), np.uint8)), "send a smaller image, or parts of it"),
        (complete(), "request fewer images or steps at once"),
    ],
)
def test_a_time_limit_is_explained_by_task(job: Job, remedy: str) -> None:
    running = RunningJob(Claim("id", "token", "ncml:score:normal", 1), job)
    assert running.timeout_error.detail == f"the job ran for more than {job.timeout_s:g} s; {remedy}"


def test_progress_and_previews_can_be_followed(fleet: Fleet) -> None:
    write_model(fleet.models, batch_s=1.6, rows=16)
    fleet.start()
    job_id = fleet.queue.submit(generate(n=2))

    async def follow() -> list:
        try:
            return [event async for event in fleet.queue.events(job_id) if event]
        finally:
            await fleet.queue.aclose()

    events = asyncio.run(follow())
    assert [event.status for event in events if event.status] == ["queued", "running", "succeeded"]
    steps = [event.progress for event in events if event.progress]
    assert len(steps) >= 5
    assert [p.step for p in steps] == sorted(p.step for p in steps)
    assert {(p.stage, p.total, p.n) for p in steps} == {("noisy_sampling", 16, 2)}
    assert any(p.preview for p in steps)


def test_a_preview_names_its_step(fleet: Fleet) -> None:
    write_model(fleet.models, batch_s=2.0, image_s=0.0, rows=20)
    fleet.start()
    job_id = fleet.queue.submit(generate(n=2))
    previews = dict[int, bytes]()
    while not fleet.queue.view(job_id).status.is_terminal:
        if preview := fleet.queue.preview(job_id):
            assert (preview.stage, preview.total, preview.done, preview.n) == ("noisy_sampling", 20, 0, 2)
            assert preview.data == bytes([preview.step - 1]) * (2 * HEIGHT * WIDTH * 3)
            previews[preview.step] = preview.data
        time.sleep(0.02)
    assert len(previews) > 3


def test_a_preview_stays_until_the_next(fleet: Fleet) -> None:
    write_model(fleet.models, batch_s=2.0, image_s=0.0, rows=20)
    fleet.start()
    job_id = fleet.queue.submit(generate())
    eventually(lambda: (progress := fleet.queue.view(job_id).progress) and progress.preview)
    steps = set()
    while not (view := fleet.queue.view(job_id)).status.is_terminal:
        assert view.progress
        assert view.progress.preview
        steps.add(view.progress.step)
        time.sleep(0.02)
    assert len(steps) > 5


def test_bad_input_fails_alone_with_a_reason(fleet: Fleet) -> None:
    broken = write_model(fleet.models, "broken")
    (broken / "config.json").write_text("{")
    fleet.start(unusable="broken")
    queue = fleet.queue
    assert queue.monitor.faults().keys() == {"broken"}
    assert queue.monitor.faults()["broken"].startswith("broken/config.json")
    garbage = queue.submit(score())
    # claimed together with the valid jobs below
    bad = queue.submit(generate(class_name="bad"))
    ids = [queue.submit(generate(seed=seed)) for seed in range(4)]
    unknown = queue.submit(generate(model="nobody"))
    corrupt = queue.submit(generate(model="broken"))
    old = queue.submit(generate(version="0" * 64))
    keep = queue.submit(complete(keep="left"))
    views = fleet.wait([garbage, bad, unknown, corrupt, old, keep, *ids])
    errors = [(view.error.reason, view.error.field, view.error.detail) for view in views[1:6] if view.error]
    assert errors == [
        ("input", "class", "this class cannot be computed"),
        ("input", "model", "there is no model 'nobody' here; the models here are broken, synthetic"),
        ("model", "model", "the model 'broken' cannot be used: broken/config.json is not JSON"),
        (
            "input",
            "model",
            f"version 000000000000 of 'synthetic' is no longer served; request {_version(fleet)[:12]}, the current one",
        ),
        ("input", "keep", "this model completes top only"),
    ]
    assert [view.status for view in views[6:]] == ["succeeded"] * 4


@pytest.mark.parametrize("damage", ["data", "batch_key", "garbage"])
def test_an_invalid_payload_fails_and_the_worker_continues(fleet: Fleet, damage: str) -> None:
    job_id = fleet.queue.submit(score())
    good = [fleet.queue.submit(score()) for _ in range(3)]
    match damage:
        case "data":
            fleet.queue.redis.hset(f"rq:job:{job_id}", "data", b"\x80\x04not json")
        case "batch_key":
            fleet.queue.redis.hdel(f"rq:job:{job_id}", "batch_key", "n")
        case _:
            fleet.queue.redis.rpush("rq:queue:ncml:score:normal", "no-such-job", b"\xff\xfe", "x" * 10_000)
    fleet.start()
    views = fleet.wait([job_id, *good])
    if damage == "data":
        assert views[0].error
        assert views[0].error.reason == "worker"
        assert views[0].error.detail == "the payload is not a job of this worker's version; send the request again"
    else:
        assert views[0].status is JobStatus.SUCCEEDED
    assert [view.status for view in views[1:]] == ["succeeded"] * 3
    fleet.check([job_id, *good])


def test_an_expired_blob_is_none_and_an_expired_job_is_not_found(fleet: Fleet) -> None:
    fleet.start()
    job_id = fleet.queue.submit(generate())
    fleet.wait([job_id])
    result = fleet.queue.result(job_id)
    assert isinstance(result, ImagesResult)
    fleet.queue.redis.delete(result.images.blob)
    assert fleet.queue.blob(result.images.blob) is None
    fleet.queue.redis.delete(f"rq:job:{job_id}")
    with pytest.raises(JobNotFound):
        fleet.queue.result(job_id)


def test_an_image_of_another_size_fails_alone(fleet: Fleet) -> None:
    fleet.start()
    tiny = Pixels(height=2, width=2, data=bytes(12))
    odd = fleet.queue.submit(complete(image=tiny))
    fine = fleet.queue.submit(complete())
    assert [view.status for view in fleet.wait([odd, fine])] == ["failed", "succeeded"]


def test_out_of_memory_halves_the_batch(fleet: Fleet) -> None:
    write_model(fleet.models, batch_s=0.0, fits=5)
    ids = [fleet.queue.submit(generate(seed=seed)) for seed in range(16)]
    hungry = fleet.queue.submit(generate(class_name="hungry"))
    fleet.start()
    views = fleet.wait([*ids, hungry])
    assert [view.status for view in views] == ["succeeded"] * 16 + ["failed"]
    assert {view.timing.batch_size for view in views[:16] if view.timing} <= {4, 5}
    assert views[-1].error
    assert "memory" in views[-1].error.detail
    assert len({fleet.images(job_id) for job_id in ids}) == 16


def test_out_of_memory_halves_the_batch_of_tiles(fleet: Fleet) -> None:
    write_model(fleet.models, batch_s=0.0, fits=5)
    job_id = fleet.queue.submit(scan(LARGE))
    fleet.start(max_batch=16)
    assert [view.status for view in fleet.wait([job_id])] == ["succeeded"]
    assert "16 images do not fit in memory; continuing with 8 at a time" in fleet.log.read_text()


def test_an_engine_that_hangs_is_replaced(fleet: Fleet) -> None:
    fleet.start(hang_s=HANG_S)
    stuck = fleet.queue.submit(score(class_name="stuck"))
    fine = [fleet.queue.submit(score()) for _ in range(3)]
    views = fleet.wait([stuck, *fine])
    assert [view.status for view in views] == ["failed"] + ["succeeded"] * 3
    assert views[0].error
    assert views[0].error.detail == "the engine hung while computing the job alone"
    fleet.check([stuck, *fine])


def test_a_frozen_engine_is_replaced_even_when_its_pipe_is_full(fleet: Fleet) -> None:
    worker = fleet.start(hang_s=HANG_S, max_batch=64)
    os.kill(fleet.engine_of(worker), signal.SIGSTOP)
    large = Pixels(height=256, width=256, data=bytes(256 * 256 * 3))
    ids = [fleet.queue.submit(score(images=(large,) * 4)) for _ in range(2)]  # more than a pipe holds
    views = fleet.wait(ids)
    assert [view.status for view in views] == ["succeeded"] * 2
    assert fleet.queue.redis.hget(f"rq:job:{ids[0]}", "attempts") == b"2"
    fleet.check(ids)


def test_rq_tools_list_the_worker_and_can_suspend_it(fleet: Fleet) -> None:
    fleet.start()
    redis = fleet.queue.redis
    (worker,) = rq.Worker.all(connection=redis)
    assert worker.queue_names()[:2] == ["ncml:score:high", "ncml:generate:high"]
    assert {queue.name for queue in rq.Queue.all(connection=redis)} == set()
    suspend(redis)
    time.sleep(4)  # the worker looks at least once a second
    job_id = fleet.queue.submit(score())
    time.sleep(0.5)
    assert fleet.queue.view(job_id).status is JobStatus.QUEUED
    record = RqJob.fetch(job_id, connection=redis, serializer="json")
    assert (record.get_status(), record.origin, record.func_name) == ("queued", "ncml:score:normal", "ncml.score")
    resume(redis)
    fleet.wait([job_id])
    record.refresh()
    assert record.is_finished
    assert rq.Queue("ncml:score:normal", connection=redis).finished_job_registry.get_job_ids() == [job_id]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("hangups")
def test_a_signal_lets_the_batch_finish_and_nothing_more_is_claimed(fleet: Fleet, number: int) -> None:
    """A closed terminal sends SIGHUP to the engine as well."""
    write_model(fleet.models, batch_s=1.0)
    worker = fleet.start()
    running = fleet.queue.submit(generate())
    eventually(lambda: fleet.queue.view(running).status is JobStatus.RUNNING)
    waiting = fleet.queue.submit(generate())
    for process in (*psutil.Process(worker.pid).children(), worker):
        process.send_signal(number)
    assert worker.wait(timeout=300) == 0
    assert fleet.queue.view(running).status is JobStatus.SUCCEEDED
    assert fleet.queue.view(waiting).status is JobStatus.QUEUED
    assert fleet.queue.monitor.workers() == []
    assert [fleet.queue.monitor.service(lane)[0] for lane in Lane] == [0, 0]


def test_a_batch_too_long_to_drain_returns_to_its_queue_without_counting_as_an_attempt(fleet: Fleet) -> None:
    write_model(fleet.models, batch_s=600.0, rows=6000)
    worker = fleet.start(drain_s=0.5)
    ids = [fleet.queue.submit(generate(noise=float(i))) for i in range(2)]
    eventually(lambda: fleet.queue.view(ids[0]).status is JobStatus.RUNNING)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=300) == 0
    assert [fleet.queue.view(job_id).status for job_id in ids] == ["queued", "queued"]
    assert fleet.queue.redis.hget(f"rq:job:{ids[0]}", "attempts") == b"0"
    assert fleet.queue.redis.lrange("rq:queue:ncml:generate:normal", 0, -1) == [i.encode() for i in ids]


def test_a_model_is_swapped_while_in_use_and_every_result_names_its_version(fleet: Fleet) -> None:
    write_model(fleet.models, batch_s=1.5, rows=15)
    fleet.start()
    old = _version(fleet)
    running = fleet.queue.submit(generate(n=32))  # two chunks
    eventually(lambda: fleet.queue.view(running).progress)
    write_model(fleet.models, batch_s=0.01)
    write_model(fleet.models, "another", batch_s=0.01)
    eventually(lambda: len(fleet.queue.monitor.models()) == 2)
    after = fleet.queue.submit(generate())
    views = fleet.wait([running, after])
    assert views[0].model
    assert views[0].model.version == old
    assert views[1].model
    assert views[1].model.version == _version(fleet) != old


def test_logs_are_json_and_carry_job_and_request(fleet: Fleet) -> None:
    worker = fleet.start()
    job_id = fleet.queue.submit(score(request_id="req-1"))
    fleet.wait([job_id])
    worker.send_signal(signal.SIGTERM)
    worker.wait(timeout=300)
    lines = [json.loads(line) for line in fleet.log.read_text().splitlines()]
    assert [(line["message"], line.get("request")) for line in lines if line.get("job") == job_id] == [
        ("job started", "req-1"),
        ("job ended", "req-1"),
    ]


def test_the_engine_ends_with_its_worker(fleet: Fleet) -> None:
    worker = fleet.start()
    engine = fleet.engine_of(worker)
    worker.kill()
    worker.wait()

    def has_ended() -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine, 0)
            return False
        return True

    eventually(has_ended)


def _version(fleet: Fleet) -> str:
    return next(model.version for model in fleet.queue.monitor.models() if model.name == "synthetic")


def test_a_worker_publishes_whether_it_has_read_all_model_folders(fleet: Fleet) -> None:
    withheld = write_model(fleet.models, "withheld")
    fleet.start(unusable="withheld")
    assert not fleet.queue.monitor.has_all_models()
    (withheld / "released").touch()
    eventually(fleet.queue.monitor.has_all_models)
    assert {model.name for model in fleet.queue.monitor.models()} == {"synthetic", "withheld"}


def test_a_folder_that_ends_two_engines_is_left_out_and_the_others_are_served(fleet: Fleet) -> None:
    write_model(fleet.models, "lethal")
    fleet.start(unusable="lethal")
    assert [model.name for model in fleet.queue.monitor.models()] == ["synthetic"]
    cause = "killed by signal 9, probably for lack of memory"
    assert f"loading this folder ended the engine twice ({cause})" in fleet.log.read_text()
    assert f"the engine died ({cause}); starting another" in fleet.log.read_text()
    write_model(fleet.models, "another")
    eventually(lambda: {model.name for model in fleet.queue.monitor.models()} == {"another", "synthetic"})
