"""The command line in its own process, as a user runs it: what it imports, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ncml.cli.test_main import save_image


def process(folder: Path, models: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "ncml.cli", *arguments],
        cwd=folder,
        env=os.environ | {"NCML_MODELS": str(models), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_train_writes_a_model_that_scores_and_a_card(tmp_path: Path) -> None:
    for name in ("dark", "light"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            save_image(tmp_path / "pictures" / name / f"{i}.png", seed=i)
    command = ("train", "smoke", "--data", "pictures", "--out", "models/mine", "--max-images", "128", "--threads", "1")
    done = process(tmp_path, tmp_path / "models", *command, "--precision", "bf16", "--json")
    assert done.returncode == 0, done.stderr
    assert "bf16 on cpu" in done.stderr
    answer = json.loads(done.stdout)
    assert answer["model"]["name"] == "mine"
    assert answer["metrics"]["images_seen"] == 128
    assert "ncml train smoke --data pictures --out models/mine" in (tmp_path / "models/mine/card.md").read_text()
    scored = process(
        tmp_path, tmp_path, "score", "pictures/dark/0.png", "--model", "models/mine", "--class", "dark", "--json"
    )
    assert json.loads(scored.stdout)["model"] == answer["model"]
    again = process(tmp_path, tmp_path, *command)
    assert again.returncode == 2
    assert "--resume" in again.stderr


def test_training_without_enough_memory_ends_in_one_line(tmp_path: Path) -> None:
    """Images of 1024 x 1024 in batches of 32, with half a gibibyte of memory."""
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        save_image(tmp_path / "pictures" / f"{i}.png", seed=i)
    code = """
import resource, sys, torch, ncml.training.run
from ncml.cli.main import main
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29,) * 2)
sys.exit(main(sys.argv[1:]))
"""
    arguments = ("train", "smoke", "--data", "pictures", "--out", "mine", "--size", "1024", "--threads", "1")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("ncml: there is not enough memory"), done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreachable_hub_is_reported_immediately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on port 9; the datasets library would retry six times and print each attempt."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    done = process(tmp_path, tmp_path, "train", "smoke", "--data", "some/pictures", "--out", "y")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "ncml: there is no folder 'some/pictures', and the Hugging Face Hub cannot be reached"
    )
    assert done.stderr.count("\n") == 1


def test_without_the_hub_a_name_is_looked_up_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = process(tmp_path, tmp_path, "train", "smoke", "--data", "some/pictures", "--out", "y")
    assert done.returncode == 2
    assert "'some/pictures' cannot be loaded" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_separate_process_behaves_the_same(tmp_path: Path, model_folder: Path) -> None:
    failed = process(tmp_path, model_folder.parent, "score", "missing.png", "--model", "tiny")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1
    save_image(tmp_path / "a.png")
    succeeded = process(tmp_path, model_folder.parent, "score", "a.png", "--model", "tiny")
    assert succeeded.returncode == 0
    assert succeeded.stderr == "ncml: no verdicts: this model is not calibrated: run ncml calibrate.\n"
    assert "a.png" in succeeded.stdout


WITHOUT_TORCH = """
0 --help
0 --version
0 models
0 models --json
2 scor x.png
2 score
2 score missing.png
2 score text.png
2 score empty
2 score ok.png --josn
2 score ok.png --model tinny
2 score ok.png --model .
2 score ok.png --class cat
2 score ok.png --noise 77
2 score ok.png --statistic likelihood
2 score ok.png --calibration strict
2 score ok.png --fdr 3
2 score ok.png --tile --tile-size 4
2 score ok.png --tile --tile-size 4000
2 score ok.png -o table.txt
2 score ok.png --device gpu
2 score ok.png --map ok.png
2 drift ok.png
2 drift ok.png --calibration strict
2 drift ok.png --alpha 7
2 drift ok.png --device gpu
2 drift ok.png --plot missing/a.png
2 drift ok.png --plot empty
2 drift ok.png --plot a.xyz
2 generate -o a.gif
2 generate -o a.png -n 0
2 generate -o a.png --seed -3
2 generate -o a.png --steps -1
2 generate -o a.png --solver huen
2 generate -o a.png --class cat
2 generate -o a.png --guidance 99
2 generate -o a.png --threads 0
2 generate -o a.png --device gpu
2 complete missing.png -o a.png
2 complete text.png -o a.png
2 calibrate --data empty --limit 0
2 calibrate --data ./not/there
2 calibrate --data empty --model tinny
2 calibrate --data empty
2 calibrate --data mixed
2 calibrate --data ./not/there --tile
2 calibrate --data empty --tile --tile-size 4
2 calibrate --data empty --tile --name strict
2 calibrate --data mixed --false-positive-rate 7
2 calibrate --data mixed --device gpu
2 calibrate --data mixed --model tiny --out ok.png/y
2 adapt ok.png --out y
2 adapt empty --out y --model tinny
2 adapt empty --out y
2 adapt mixed --out y
2 adapt mixed --out mixed
2 adapt mixed --out ok.png/y
2 adapt mixed --out y --false-positive-rate 7
2 adapt mixed --out y --region 1,2
2 adapt mixed --out y --device gpu
2 tune --data ./not/there --model tiny
2 tune --data empty --model tiny
2 tune --data mixed --model tiny --images 2
2 tune --data mixed --model tiny --device gpu
2 compress missing.png -o x
2 compress ok.png -o x --model tinny
2 compress ok.png ok.png -o x
2 compress ok.png -o x --device gpu
2 decompress missing -o x
2 decompress ok.png -o x
2 decompress bad.ncml -o x
2 decompress short.ncml -o x
2 evaluate nothing --data x
2 evaluate likelihood --data empty
2 evaluate likelihood --data ./not/there
2 evaluate likelihood --data mixed --limit some
2 evaluate likelihood --data mixed --model tinny
2 evaluate likelihood --data mixed --threads 0
2 evaluate likelihood --data mixed --out ok.png
2 evaluate likelihood --data mixed --device gpu
2 train smok --data x --out y
2 train smoke --data ./not/there --out y
2 train smoke --data empty --out y --init-from tinny
2 train smoke --data empty --out y --size 30
2 train smoke --data empty --out y
2 train smoke --data mixed --out y
2 train smoke --data mixed --out ok.png
2 train smoke --data mixed --out y --resume
2 train smoke --data mixed --out y --cooldown-from mixed
2 train smoke --data mixed --out y --tracker nothing
2 train smoke --data mixed --out y --noise 999
2 train smoke --data mixed --out y --max-images some
2 train smoke --data mixed --out y --threads 0
2 train smoke --data mixed --out y --device gpu
2 push tinny owner/name
2 push tiny name
2 pull name
"""
"""Commands that end before torch is imported, with their exit status."""


def test_help_lists_and_refusals_import_no_torch(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "bad.ncml").write_bytes(b"NCML\x01" + bytes(100))
    (tmp_path / "short.ncml").write_bytes(b"NCML\x01")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed" / "class").mkdir(parents=True)
    for name in ("ok.png", "mixed/a.png", "mixed/class/a.png"):
        save_image(tmp_path / name)
    code = """
import contextlib, io, sys
from ncml.cli.main import main
for line in sys.stdin:
    expected, *arguments = line.split()
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code or 0
    assert status == int(expected), (line, status, output.getvalue())
    heavy = {"torch", "pandas", "datasets", "scipy"} & sys.modules.keys()
    assert not heavy, (line, heavy)
    assert status == 0 or output.getvalue().count("\\n") == 1, (line, output.getvalue())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=WITHOUT_TORCH.strip(),
        cwd=tmp_path,
        env=os.environ | {"NCML_MODELS": str(model_folder.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr


def test_scoring_imports_no_compiler(tmp_path: Path, model_folder: Path) -> None:
    """PyTorch's compiler takes seconds to import, and building a network on the meta device would import it."""
    save_image(tmp_path / "a.png")
    code = "import sys; from ncml.cli.main import main; main(sys.argv[1:]); assert 'torch._dynamo' not in sys.modules"
    arguments = ("score", "a.png", "--model", str(model_folder))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr


def test_what_a_terminal_cannot_encode_is_escaped(tmp_path: Path, model_folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    done = process(tmp_path, model_folder.parent, "generate", "--model", "tiny", "--seed", "7", "-o", name)
    assert (done.returncode, done.stdout) == (0, "caf\\udce9.png  (seed 7)\n"), done.stderr


def in_shell(redirected: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/bash", "-c", f"{sys.executable} -m ncml.cli {redirected}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_reader_that_closes_early_is_not_an_error() -> None:
    done = in_shell("models | true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("redirected", "status"),
    [("models <&- >&-", 0), ("models 2>&-", 0), ("score no.png 2>&-", 2), ("score no.png 2>/dev/full", 2)],
)
def test_streams_that_are_closed_or_full_do_not_change_the_exit_status(redirected: str, status: int) -> None:
    done = in_shell(redirected)
    assert (done.returncode, done.stderr) == (status, "")
    assert "ncml: " not in done.stdout
