"""Jobs of a batch share its options: none gets a result with the options of another."""

import random
from typing import Any

import numpy as np
import pytest

from tests.worker.fleet import Fleet, score
from tests.worker.synthetic import HEIGHT, WIDTH, SyntheticModel, write_model
from worker.contract import Pixels
from worker.job_results import Score, ScoreResult


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_options_in_concurrent_batches_give_each_job_what_it_gets_alone(fleet: Fleet, count: int) -> None:
    write_model(fleet.models, batch_s=0.0, image_s=0.0)
    pick = random.Random(0)
    values = [bytes([value]) for value in range(256)]
    options: dict[str, list[Any]] = {
        "class_name": [None, "cat", "elephant"], "noise": [0.0, 1.0], "map": [False, True], "ood": [True, False],
        "calibration": [None, "weak"], "statistic": [None, "bpd"], "sanity": [False, True],
        "statistics": [(), ("bpd",), ("bpd", "mean"), ("mean", "bpd"), "all"],
    }  # fmt: skip
    jobs = [
        score(
            images=[Pixels(height=HEIGHT, width=WIDTH, data=pick.choice(values) * HEIGHT * WIDTH * 3)],
            **{name: pick.choice(choices) for name, choices in options.items()},
        )
        for _ in range(count)
    ]
    ids = [fleet.queue.submit(job) for job in jobs]
    fleet.start("score", max_batch=32)
    batches = [view.timing.batch_size for view in fleet.wait(ids) if view.timing]
    model = SyntheticModel(fleet.models / "synthetic")
    for job, job_id in zip(jobs, ids, strict=True):
        [alone] = model.score(
            np.frombuffer(job.images[0].data, np.uint8).reshape(1, HEIGHT, WIDTH, 3), classes=[job.class_name],
            batch_size=1, callback=lambda progress: None,
            **{name: getattr(job, name) for name in options if name != "class_name"},
        )  # fmt: skip
        result = fleet.queue.result(job_id)
        assert isinstance(result, ScoreResult)
        assert result.results == (Score.model_validate(alone, from_attributes=True),)
    assert max(size for size in batches if size) > 1
    fleet.check(ids)


def test_jobs_that_were_claimed_together_are_computed_together_only_with_the_same_options(fleet: Fleet) -> None:
    """The key in the record may be damaged, or that of a service of another version."""
    clean, noisy = (fleet.queue.submit(score(noise=noise)) for noise in (0.0, 1.0))
    for job_id in (clean, noisy):
        fleet.queue.redis.hset(f"rq:job:{job_id}", "batch_key", "of an earlier version")
    fleet.start()
    views = fleet.wait([clean, noisy])
    assert [view.status for view in views] == ["succeeded", "failed"]
    assert views[1].error
    assert views[1].error.reason == "worker"
    fleet.check([clean, noisy])
