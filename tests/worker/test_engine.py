"""The engine through its pipe: jobs of a batch are dropped while they are computed."""

from pathlib import Path

import pytest

from tests.worker.fleet import score
from tests.worker.synthetic import load, write_model
from worker.messages import Batch, Catalogue, Done, Drop, EngineSettings, Opening, Step
from worker.process import EngineProcess


def test_a_job_dropped_while_it_is_computed_alone_does_not_fail(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is computed alone because the failure of the batch could have come from any of its jobs."""
    write_model(tmp_path, batch_s=0.1, rows=40)
    engine = EngineProcess(EngineSettings(directories=(tmp_path,), load=load))
    try:
        assert isinstance(engine.receive(60), Opening)
        assert isinstance(engine.receive(60), Catalogue)
        engine.send(Batch(1, {"slow": score(class_name="slow"), "bad": score(class_name="bad")}))
        assert isinstance(engine.receive(10), Step)  # so the slow job is being computed, alone
        engine.send(Drop(1, frozenset({"slow"})))
        while isinstance(done := engine.receive(10), Step):
            pass
    finally:
        engine.stop()
    assert isinstance(done, Done)
    assert done.outcomes["slow"].error is None
    assert done.outcomes["bad"].error
    assert done.outcomes["bad"].error.reason == "input"
    assert "the computation failed" not in capfd.readouterr().err
