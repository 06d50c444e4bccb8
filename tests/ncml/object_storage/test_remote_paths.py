"""Files in object storage are read under the limits of local ones, and every error is a sentence without secrets."""

import http.server
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ncml import images
from ncml.cli import main as cli
from ncml.data import kept_images
from ncml.data.good_images import open_folder
from ncml.errors import InputError, NcmlError, StorageError, TooLarge
from ncml.object_storage import StoragePath, filesystems, read_ahead
from ncml.object_storage.filesystems import open_filesystem
from ncml.paths import check_exists, list_files, parse_location
from tests.ncml import nets
from tests.s3 import ENVIRONMENT, S3

PNG = images.to_png(nets.images(1).numpy()[0])


def test_an_image_is_read_with_one_request(s3: S3) -> None:
    s3.put("a.png", PNG)
    (path,) = StoragePath("s3://line").list_files()
    s3.requests.clear()
    assert np.array_equal(images.open_image(path), images.open_image(PNG))
    assert s3.requests == [("GET", "/line/a.png")]
    assert np.array_equal(images.open_image(StoragePath("s3://line/a.png")), images.open_image(PNG))


def test_a_key_with_two_slashes_is_not_copied_out_of_the_folder_of_a_detector(s3: S3, tmp_path: Path) -> None:
    s3.put(f"good/{tmp_path}/outside.png", images.to_png(nets.images(1, 64, 64).numpy()[0]))  # good//tmp/...
    folder = StoragePath("s3://line/good")
    good = open_folder(folder, list(folder.list_files()))
    kept_images.keep(tmp_path / "detector", good, None, None, "image")
    (kept,) = tmp_path.rglob("*.png")
    assert kept == Path(f"{tmp_path}/detector/images/good/{tmp_path}/outside.png")


def test_a_file_over_the_limit_is_not_requested(s3: S3) -> None:
    s3.put("a.png", bytes(images.MAX_BYTES + 1))
    s3.put("b.png", b"")
    large, empty = StoragePath("s3://line").list_files()
    s3.requests.clear()
    with pytest.raises(TooLarge, match=f"has {images.MAX_BYTES + 1} bytes; at most"):
        images.open_image(large)
    with pytest.raises(InputError, match="is empty"):
        images.open_image(empty)
    assert s3.requests == []
    s3.put("b.png", bytes(images.MAX_BYTES + 2**20))  # it grows after it has been listed
    with pytest.raises(TooLarge, match=f"has {images.MAX_BYTES + 1} bytes"):
        images.open_image(StoragePath(empty.url, filesystems.Status(is_folder=False, size=10)))


def test_files_are_read_ahead_but_only_a_few(s3: S3) -> None:
    for i in range(40):
        s3.put(f"{i:02}.png", bytes([i]))
    paths = read_ahead(StoragePath("s3://line").list_files(), 100)
    assert next(paths).read(100) == (1, b"\0")
    deadline = time.monotonic() + 60
    while len(s3.paths("GET")) < 1 + 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(s3.paths("GET")) == 1 + 8  # a listing, and the files
    assert [path.read(100)[1][0] for path in paths] == list(range(1, 40))


def test_files_of_this_machine_need_no_package_of_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("fsspec", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.png").write_bytes(PNG)
    (path,) = read_ahead(list_files([tmp_path]), images.MAX_BYTES)
    assert path == tmp_path / "a.png"
    assert np.array_equal(images.open_image(path), images.open_image(PNG))


def test_files_of_this_machine_are_not_read_ahead(tmp_path: Path) -> None:
    assert list(read_ahead([tmp_path / "a", tmp_path / "b"], 1)) == [tmp_path / "a", tmp_path / "b"]


def reason(url: str, error: type[NcmlError] = InputError) -> str:
    """Return the message with which the files of a path are refused."""
    with pytest.raises(error) as caught:
        _read_all(url)
    return str(caught.value)


def _read_all(url: str) -> None:
    for path in list_files([StoragePath(url)]):
        images.open_image(path)


def test_missing_buckets_folders_and_files_are_reported(s3: S3) -> None:
    for url in ("s3://missing", "s3://missing/in", "s3://line/in", "s3://line/a.png"):
        assert reason(url) == f"{url} cannot be read: there is no such bucket, folder or file."
    s3.put("a.png", PNG)
    (path,) = StoragePath("s3://line").list_files()
    s3.remove("a.png")
    with pytest.raises(InputError, match=r"s3://line/a\.png cannot be read: there is no such"):
        images.open_image(path)


@pytest.mark.parametrize("url", ["s3://line", "s3://line/in", "s3://line/in/a.png"])
def test_a_bucket_without_permission_is_reported(s3: S3, url: str) -> None:
    s3.put("in/a.png", PNG)
    s3.refuse = lambda method, path: ("403 Forbidden", "AccessDenied")
    assert reason(url).startswith(f"{url} cannot be read: access is denied (")
    assert reason(url).endswith("): check the credentials and their rights.")


def test_an_object_that_may_not_be_read_is_skipped_but_an_expired_token_ends_the_command(s3: S3) -> None:
    s3.put("in/a.png", PNG)
    (path,) = StoragePath("s3://line/in").list_files()
    for code in ("AccessDenied", "InvalidObjectState"):
        s3.refuse = lambda method, path, code=code: ("403 Forbidden", code)
        with pytest.raises(InputError, match="access is denied"):
            images.open_image(path)
    for code in ("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        s3.refuse = lambda method, path, code=code: ("403 Forbidden", code)
        with pytest.raises(StorageError, match=f"cannot be read: {code}: check the address, the credentials"):
            images.open_image(path)


def test_storage_that_cannot_be_reached_is_reported(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    message = reason("s3://line/a.png", StorageError)
    assert message.startswith("s3://line/a.png cannot be read: Could not connect to the endpoint URL")
    assert message.endswith("check the address, the credentials and the network.")


def test_missing_credentials_are_reported(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "Unable to locate credentials" in reason("s3://line/a.png", StorageError)


SECRET = ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]


@pytest.mark.parametrize(
    "text",
    [f"the key {SECRET} is wrong", f"http://me:{SECRET}@host/x?sig={SECRET}", f"GET /x?X-Amz-Signature={SECRET}"],
)
def test_messages_contain_no_secret(s3: S3, text: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{text}\nand more")

    open_filesystem("s3").info = fail
    message = reason("s3://line/a.png", StorageError)
    assert SECRET not in message
    assert "and more" not in message


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("https://me:hunter2@host/images", "must not contain a user name or a password"),
        ("s3://key:hunter2@bucket/images", "must not contain a user name or a password"),
        ("https://host/a.png?token=hunter2", r"must not contain \? or #"),
        ("https://host/a.png#hunter2", r"must not contain \? or #"),
        ("ftp://host/hunter2", r"ftp:// is not supported: use s3://, gs://, hf:// or https://\."),
        ("s3://", "names no bucket or host"),
        ("S3:///hunter2", "names no bucket or host"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused_before_anything_is_requested(
    url: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=remedy):
        parse_location(url)
    for command in (
        ["score", url],
        ["score", "docs/cat.jpg", "-o", url],
        ["watch", url],
        ["drift", url],
        ["adapt", url, "--out", "x"],
        ["calibrate", "--data", url],
        ["calibrate", "--tile", "--data", url],
        ["train", "smoke", "--data", url, "--out", "x"],
        ["evaluate", "likelihood", "--data", url],
    ):
        assert cli.main(command) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "hunter2" not in message
        assert message.startswith("ncml: ")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["score", "docs/cat.jpg", "--map", "s3://line/maps"], "map"),
        (["adapt", "docs", "--out", "s3://line/model"], "out"),
        (["watch", "docs", "-o", "s3://line/x.csv"], "output"),
        (["watch", "docs", "--move-flagged", "s3://line/x"], "move-flagged"),
        (["compress", "s3://line/a.png", "-o", "x"], "files"),
    ],
)
def test_what_must_be_on_this_machine_is_no_address(
    arguments: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == (
        f"ncml: {option} must be on this machine, not in object storage: name another path.\n"
    )


@pytest.mark.parametrize(
    ("url", "package"),
    [("s3://b/x", "s3fs"), ("gs://b/x", "gcsfs"), ("https://h/x", "aiohttp"), ("s3://b/y", "fsspec")],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    url: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_filesystem.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["score", url]) == 2
    assert capsys.readouterr().err == (
        f"ncml: {package} is not installed: run pip install -e '.[storage]' in the clone of ncml.\n"
    )
    open_filesystem.cache_clear()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def website(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server with an index page for each folder."""
    folder = tmp_path / "site"
    (folder / "images" / "below").mkdir(parents=True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        open_filesystem.cache_clear()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()
    open_filesystem.cache_clear()


def test_a_folder_of_a_web_server_is_listed_by_its_index_pages(website: tuple[str, Path]) -> None:
    url, folder = website
    for name in ("b.png", "a.png", "below/c.png", ".hidden.png"):
        (folder / "images" / name).write_bytes(PNG)
    files = list(list_files([StoragePath(f"{url}/images")]))
    assert [str(path) for path in files] == [f"{url}/images/{name}" for name in ("a.png", "b.png", "below/c.png")]
    assert np.array_equal(images.open_image(files[0]), images.open_image(PNG))
    size, modified = files[0].state()
    assert size == str(len(PNG))
    assert modified
    assert reason(f"{url}/missing.png") == f"{url}/missing.png cannot be read: there is no such bucket, folder or file."
    assert "Connect call failed" in reason("http://127.0.0.1:9/a.png", StorageError)
    check_exists(StoragePath(f"{url}/images/a.png"))


def test_a_web_server_cannot_send_more_than_the_limit(website: tuple[str, Path]) -> None:
    url, folder = website
    (folder / "a.png").write_bytes(bytes(2**20))
    assert StoragePath(f"{url}/a.png").read(1000) == (2**20, b"")
    assert filesystems.read(f"{url}/a.png", 1001) == bytes(1001)
