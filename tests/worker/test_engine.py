"""An engine by its pipe: what it answers to a batch whose members are dropped while they are computed."""

from pathlib import Path

import pytest

from tests.worker.fleet import score
from tests.worker.synthetic import load, write_model
from worker.messages import Batch, Catalogue, Done, Drop, EngineSettings, Step
from worker.process import EngineProcess


def test_a_job_dropped_while_it_is_computed_alone_is_no_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Alone, because the other one's failure could have been any member's."""
    write_model(tmp_path, batch_s=0.1, rows=40)
    engine = EngineProcess(EngineSettings(directories=(tmp_path,), load=load))
    try:
        assert isinstance(engine.receive(60), Catalogue)
        engine.send(Batch(1, {"slow": score(class_name="slow"), "bad": score(class_name="bad")}))
        assert isinstance(engine.receive(10), Step)  # so the slow one is under way, which it is alone
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
