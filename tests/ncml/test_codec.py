"""Archives are lossless, have the length of the model's bits, and are refused if damaged."""

import errno
import json
import os
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ncml
from ncml import checkpoint
from ncml.archive import GROUP, START
from ncml.cli import main as cli
from ncml.codec import compress, decompress
from tests.conftest import full_disk
from tests.ncml import nets
from tests.ncml.cli.test_main import save_image
from tests.ncml.images.test_preprocess import png

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ncml.Model:
    """A model of random weights that gives no value of `pixels` a smaller probability than the coder can express."""
    folder = tmp_path_factory.mktemp("models") / "quiet"
    checkpoint.save(folder, nets.network(nets.config(), dtype=torch.float32, spread=0.08))
    return ncml.load(folder)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return nets.images(GROUP + 5).numpy()


@pytest.fixture(scope="module")
def archive(model: ncml.Model, pixels: np.ndarray) -> bytes:
    return compress(model, pixels, [f"image {i}" for i in range(len(pixels))])


def test_an_archive_of_several_groups_decodes_bit_for_bit(
    model: ncml.Model, archive: bytes, pixels: np.ndarray
) -> None:
    done: list[tuple[int, int]] = []
    names, decoded = decompress(model, archive, lambda progress: done.append((progress.done, progress.total)))
    np.testing.assert_array_equal(decoded, pixels)
    assert names[-1] == f"image {GROUP + 4}"
    assert done[-1] == (8 * len(pixels), 8 * len(pixels))
    assert done == sorted(done)


def test_an_archive_has_the_length_of_the_bits_of_the_model(
    model: ncml.Model, archive: bytes, pixels: np.ndarray
) -> None:
    bits = sum(score.bpd for score in model.score(pixels)) * pixels[0].size
    header = START.size + START.unpack_from(archive)[-1]
    assert 8 * (len(archive) - header) == pytest.approx(bits, rel=0.01)


def test_extreme_images_are_restored(model: ncml.Model) -> None:
    """Values of almost no probability are coded, too."""
    noise = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (3, 8, 8, 3))
    _, decoded = decompress(model, compress(model, noise, ["a", "b", "c"]))
    np.testing.assert_array_equal(decoded, noise)


def test_the_decoder_uses_the_threads_of_the_encoder(model: ncml.Model, pixels: np.ndarray) -> None:
    before = torch.get_num_threads()
    threads: set[int] = set()
    try:
        torch.set_num_threads(3)
        archive = compress(model, pixels[:2], ["a", "b"])
        torch.set_num_threads(2)
        _, decoded = decompress(model, archive, lambda _: threads.add(torch.get_num_threads()))
        assert threads == {3}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(decoded, pixels[:2])


def test_the_archive_of_another_model_is_refused(plain_model: ncml.Model, archive: bytes) -> None:
    with pytest.raises(ncml.InputError, match=r"was made by quiet .* not by plain"):
        decompress(plain_model, archive)


def test_damaged_archives_are_refused(model: ncml.Model, archive: bytes) -> None:
    damaged = [
        (b"", "not an archive"),
        (b"PNG" + archive[3:], "not an archive"),
        (archive[:4] + b"\x02" + archive[5:], "not of format 1"),
        (archive[:40], "damaged"),
        (archive[:70], "damaged"),
        (archive[:-4], "damaged"),
        (archive[:-3], "damaged"),
        (archive[: START.size + 3] + b"\xff" + archive[START.size + 4 :], "damaged"),
        (archive[:-40] + bytes(b ^ 255 for b in archive[-40:]), "damaged|does not decode"),
    ]
    for data, message in damaged:
        with pytest.raises(ncml.InputError, match=message):
            decompress(model, data)


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "", ".", "..", ".hidden", "a\\b", "12:30"])
def test_names_must_be_file_names(model: ncml.Model, pixels: np.ndarray, name: str) -> None:
    with pytest.raises(ncml.InputError, match=r"the file name .* is empty or hidden, or contains .*: rename the file"):
        compress(model, pixels[:1], [name])


def test_names_must_be_utf_8(model: ncml.Model, pixels: np.ndarray) -> None:
    with pytest.raises(ncml.InputError, match=r"the file name 'caf\\udce9' is not valid UTF-8.*rename the file"):
        compress(model, pixels[:1], [os.fsdecode(b"caf\xe9")])


@pytest.fixture
def run(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCML_MODELS", str(model_folder.parent))

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        status = cli.main(arguments)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return command


def test_the_commands_restore_every_file(run: Run, tmp_path: Path, pixels: np.ndarray) -> None:
    (tmp_path / "more").mkdir()
    for i, name in enumerate(("0.png", "more/1.png", "more/2.png")):
        Image.fromarray(pixels[i]).save(tmp_path / name)
    done = run("compress", "0.png", "more", "-o", "three.ncml", "--model", "tiny", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["images"] == 3
    assert answer["bytes"] == (tmp_path / "three.ncml").stat().st_size
    assert run("compress", "0.png", "-o", "one.ncml", "--model", "tiny").stdout.startswith("one.ncml  1 image, ")
    done = run("decompress", "three.ncml", "-o", "back", "--model", "tiny")
    assert done.returncode == 0, done.stderr
    for i in range(3):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "back" / f"{i}.png")), pixels[i])
    again = run("decompress", "three.ncml", "-o", "back", "--model", "tiny")
    assert (again.returncode, "already exists" in again.stderr) == (2, True)


def test_files_that_cannot_be_restored_are_refused(run: Run, tmp_path: Path, pixels: np.ndarray) -> None:
    """The archive holds 8-bit RGB, so a file that holds more than that is refused."""
    first, second = (Image.fromarray(p) for p in pixels[:2])
    translucent = first.copy()
    translucent.putalpha(128)
    translucent.save(tmp_path / "alpha.png")
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    Image.fromarray(pixels[0, :, :, 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    (tmp_path / "deeper.png").write_bytes(png(8, 8, 16, 2, zlib.compress(bytes(8 * (1 + 8 * 6)))))
    first.convert("CMYK").save(tmp_path / "ink.tif")
    for name, message in [
        ("alpha.png", "alpha.png has transparency"),
        ("moving.gif", "moving.gif has several frames"),
        ("deep.png", "deep.png is not 8-bit RGB or grey"),
        ("deeper.png", "deeper.png is not 8-bit RGB or grey"),
        ("ink.tif", "ink.tif is not 8-bit RGB or grey"),
    ]:
        done = run("compress", name, "-o", "x.ncml", "--model", "tiny")
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    first.convert("L").convert("1").save(tmp_path / "bits.png")
    first.quantize(16).save(tmp_path / "palette.png")
    done = run("compress", "bits.png", "palette.png", "-o", "x.ncml", "--model", "tiny")
    assert done.returncode == 0, done.stderr


def test_the_commands_refuse_invalid_input_in_a_sentence(run: Run, tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    Image.fromarray(pixels[0][:4]).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    assert run("compress", "a.png", "-o", "good.ncml", "--model", "tiny").returncode == 0
    for arguments, message in [
        (("compress", "-o", "x.ncml"), "no image is given"),
        (("compress", "none.png", "-o", "x.ncml"), "none.png cannot be read"),
        (("compress", "empty", "-o", "x.ncml"), "there is no image in empty: name a folder of"),
        (("compress", "a.png", "small.png", "-o", "x.ncml"), "small.png is 8 x 4 pixels"),
        (("compress", "text.png", "-o", "x.ncml"), "not an image"),
        (("compress", "a.png", "a.png", "-o", "x.ncml"), "two images are named 'a'"),
        (("compress", "a.png", "-o", "missing/x.ncml"), "cannot be written"),
        (("compress", "a.png", "-o", "empty"), "empty cannot be written: it is a folder"),
        (("decompress", "a.png", "-o", "out"), "not an archive"),
        (("decompress", "none.ncml", "-o", "out"), "none.ncml cannot be read: there is no such file"),
        (("decompress", "empty", "-o", "out"), "empty cannot be read: Is a directory"),
        (("decompress", "good.ncml", "-o", "a.png"), "a.png is a file: choose a folder"),
        (("decompress", "good.ncml", "-o", "a.png/out"), "a.png/out cannot be written"),
        (("decompress", "good.ncml", "-o", "new.PNG"), "-o names a folder, not an image: choose another name than new"),
    ]:
        done = run(*arguments, "--model", "tiny")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert message in done.stderr
    assert not (tmp_path / "x.ncml").exists()


def test_decompressing_onto_a_full_disk_leaves_no_image(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")  # a small file, which is written before the other fails
    save_image(tmp_path / "b.png")
    assert run("compress", "a.png", "b.png", "-o", "c.ncml", "--model", "tiny").returncode == 0
    with full_disk():
        done = run("decompress", "c.ncml", "-o", "out", "--model", "tiny")
    assert (done.returncode, done.stderr) == (2, f"ncml: out/b.png: {os.strerror(errno.EFBIG)}\n")
    assert not list((tmp_path / "out").iterdir())
    assert run("decompress", "c.ncml", "-o", "out", "--model", "tiny").returncode == 0
