"""Models are published to, fetched from and checked on a stand-in for the Hub."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ncml import checkpoint
from tests.flow.commands import hub_server
from tests.flow.commands.hub_server import TOKEN, Hub

ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub without models."""
    with hub_server.serve() as hub:
        yield hub


@pytest.fixture
def run(hub: Hub, model_folder: Path, tmp_path: Path) -> Run:
    """Run ncml in a separate process: the Hub's library reads its settings when it is imported."""

    def ncml(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NCML_MODELS": str(model_folder.parent),
            "OMP_NUM_THREADS": "1",
        }
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        return subprocess.run(
            [sys.executable, "-m", "ncml.cli", *arguments],
            cwd=tmp_path,
            env=environment | settings | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )

    return ncml


@pytest.fixture
def published(run: Run) -> str:
    """The commit of a model on the Hub."""
    done = run("push", "tiny", "someone/tiny", "--license", "mit", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["revision"]


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("ncml: ")
    return done.stderr


def test_a_fetched_model_equals_the_published_one(
    run: Run, hub: Hub, published: str, model_folder: Path, tmp_path: Path
) -> None:
    files = hub.commits["someone/tiny"][published]
    assert files.keys() == {"model.safetensors", "config.json", "card.md", "README.md"}
    done = run("pull", f"someone/tiny@{published}", "--out", "mine")
    assert done.returncode == 0, done.stderr
    description = checkpoint.describe(tmp_path / "mine")
    assert description.version == checkpoint.describe(model_folder).version
    checkpoint.check_version(description)
    again = run("pull", "hf://someone/tiny", "--out", "mine", "--json")
    assert json.loads(again.stdout)["model"] == {"name": "mine", "version": description.version}


def test_the_card_has_the_hub_s_metadata(published: str, hub: Hub) -> None:
    card = ModelCard(hub.commits["someone/tiny"][published]["README.md"].decode(), ignore_metadata_errors=False)
    assert card.data.license == "mit"
    assert card.data.library_name == "ncml"
    assert card.text.strip().startswith("# tiny")


def test_the_bundled_card_has_the_hub_s_metadata_and_is_shown_without_them() -> None:
    folder = ROOT / "models" / "cifar10"
    card = ModelCard((folder / "card.md").read_text(), ignore_metadata_errors=False)
    assert (card.data.license, card.data.datasets) == ("apache-2.0", ["uoft-cs/cifar10"])
    assert card.data.tags
    assert card.data.metrics
    assert checkpoint.read_card(folder).startswith("# cifar10\n")


def test_the_metadata_of_a_new_card_are_valid() -> None:
    text = checkpoint.card_metadata(license="mit", datasets=["owner/images"]) + "# mine\n"
    card = ModelCard(text, ignore_metadata_errors=False)
    assert (card.data.license, card.data.datasets) == ("mit", ["owner/images"])
    assert checkpoint.split_card(text)[1] == "# mine\n"
    assert checkpoint.split_card("# plain\n\n---\n\ntext\n---\n") == ("", "# plain\n\n---\n\ntext\n---\n")


def test_a_model_is_loaded_from_the_hub_under_its_name(run: Run, published: str, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    done = run("score", "a.png", "--model", f"hf://someone/tiny@{published[:12]}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["name"] == "tiny"


def test_a_branch_is_published_and_named(run: Run, hub: Hub, published: str) -> None:
    done = run("push", "tiny", "someone/tiny", "--revision", "next")
    assert done.returncode == 0, done.stderr
    assert hub.branches["someone/tiny"]["next"] in hub.commits["someone/tiny"]
    assert "README.md" in hub.resolve("someone/tiny", "next")[1]  # type: ignore[index]


def test_calibrations_that_a_model_no_longer_has_are_removed(
    run: Run, hub: Hub, published: str, tmp_path: Path
) -> None:
    calibration = tmp_path / "mine" / checkpoint.CALIBRATION
    assert run("pull", "someone/tiny", "--out", "mine").returncode == 0
    calibration.write_text("{}")
    assert run("push", "mine", "someone/tiny").returncode == 0
    assert checkpoint.CALIBRATION in hub.resolve("someone/tiny", "main")[1]  # type: ignore[index]
    calibration.unlink()
    assert run("push", "mine", "someone/tiny").returncode == 0
    assert checkpoint.CALIBRATION not in hub.resolve("someone/tiny", "main")[1]  # type: ignore[index]


def test_an_upload_that_fails_is_one_sentence_and_no_commit(
    run: Run, hub: Hub, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "accepts_uploads", False)
    message = refused(run("push", "tiny", "someone/tiny"))
    assert message.startswith("ncml: a file of someone/tiny cannot be exchanged with the Hub: ")
    assert "403" in message
    assert hub.branches["someone/tiny"]["main"] == published


def test_damaged_weights_are_refused_and_leave_nothing(run: Run, hub: Hub, published: str, tmp_path: Path) -> None:
    files = hub.commits["someone/tiny"][published]
    weights = bytearray(files["model.safetensors"])
    weights[-1] ^= 1
    hub.commits["someone/bent"] = {"0" * 40: files | {"model.safetensors": bytes(weights)}}
    hub.branches["someone/bent"] = {"main": "0" * 40}
    message = refused(run("pull", "someone/bent", "--out", "bent"))
    assert "someone/bent is not a complete model" in message
    assert "the weights do not match the version" in message
    assert not (tmp_path / "bent").exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["pull", "someone/nothing"], {}, "there is no model someone/nothing on the Hub that you may read"),
        (["pull", "someone/tiny@v9"], {}, "someone/tiny has no revision v9: name a branch, tag or commit"),
        (["pull", "tiny"], {}, "'tiny' is not a model of the Hub: name one as owner/model"),
        (["pull", "someone/tiny"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
        (["pull", "someone/tiny"], {"HF_HUB_OFFLINE": "1"}, "cannot be reached, and its cache has no someone/tiny"),
        (["pull", "someone/tiny", "--out", "full"], {}, "full exists and is not a model folder"),
        (["push", "tinny", "someone/tiny"], {}, "there is no model 'tinny': did you mean tiny?"),
        (["push", "tiny", "someone/tiny"], {"HF_TOKEN": "hf_wrong"}, "the Hub refuses the token for someone/tiny"),
        (["push", "tiny", "someone/tiny@main"], {}, "name a branch with --revision"),
        (["push", "tiny", "someone/tiny"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
)
def test_an_error_is_one_sentence_and_writes_nothing(
    run: Run, published: str, tmp_path: Path, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    if "HF_HUB_OFFLINE" in variables or "HF_ENDPOINT" in variables:
        variables = variables | {"HF_HOME": str(tmp_path / "another")}
    assert message in refused(run(*arguments, **variables))
    assert {path.name for path in tmp_path.iterdir()} <= {"full", "hf", "another"}
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
