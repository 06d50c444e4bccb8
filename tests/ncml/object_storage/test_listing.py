"""Folders in object storage are listed in the order of their keys, and never held as a whole."""

import itertools
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from ncml import paths
from ncml.errors import InputError
from ncml.object_storage import StoragePath, filesystems
from ncml.paths import collect, list_files, sorted_files
from tests.s3 import S3

KEYS = ("b.png", "a/2.png", "a/10.png", "a.b/x.png", "a-b.png", "ä.png", "a b?.png")
PASSED_OVER = (".hidden/x.png", "a/.part.png", "folder/")


def names(files: Iterator[Any], prefix: str) -> list[str]:
    return [str(path).removeprefix(prefix) for path in files]


def test_the_files_of_a_bucket_are_in_the_order_of_their_keys(s3: S3) -> None:
    for key in (*KEYS, *PASSED_OVER):
        s3.put(f"in/{key}", b"x" * len(key))
    s3.put("input.png", b"beside the folder")
    assert names(list_files([StoragePath("s3://line/in")]), "s3://line/in/") == sorted(KEYS)
    assert names(list_files([StoragePath("s3://line")]), "s3://line/") == [
        *(f"in/{key}" for key in sorted(KEYS)),
        "input.png",
    ]
    s3.requests.clear()
    sizes = {path.name: path.state()[0] for path in StoragePath("s3://line/in").list_files()}
    assert sizes["b.png"] == "5"
    assert s3.requests == [("GET", "/line?list")]  # no request for each file


@pytest.mark.parametrize(
    "key",
    ["a?versionId=3.png", "b?versionId=", "c?versionId=x/1.png", "d?e#f.png", "%20.png", "% +&=;'~[1]*.png", "a//b"],
)
def test_a_key_with_characters_that_are_special_in_urls_is_read(s3: S3, key: str) -> None:
    s3.put(f"in/{key}", b"contents")
    [path] = StoragePath("s3://line/in").list_files()
    assert str(path) == f"s3://line/in/{key}"
    for named in (path, StoragePath.parse(str(path))):
        assert named.read(100) == (8, b"contents")
        assert named.is_file()
        assert not named.has_changed()


def test_the_sorted_files_of_a_bucket_are_in_the_order_of_a_copy(s3: S3, tmp_path: Any) -> None:
    for key in KEYS:
        s3.put(key, b"x")
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(b"x")
    assert names(iter(sorted_files(StoragePath("s3://line"))), "s3://line/") == names(
        iter(sorted_files(tmp_path)), f"{tmp_path}/"
    )


def test_a_bucket_is_listed_page_by_page_as_its_files_are_used(s3: S3) -> None:
    for i in range(2500):
        s3.put(f"{i:04}.png", b"x")
    files = StoragePath("s3://line").list_files()
    first = list(itertools.islice(files, 1000))
    assert s3.paths("GET") == ["/line?list"]
    assert [path.name for path in (*first, *files)] == [f"{i:04}.png" for i in range(2500)]
    assert s3.paths("GET") == ["/line?list"] * 3


@pytest.mark.slow
def test_twenty_thousand_keys(s3: S3) -> None:
    for i in range(20_000):
        s3.put(f"{i % 7}/{i:05}.png", b"x")
    expected = sorted(f"s3://line/{i % 7}/{i:05}.png" for i in range(20_000))
    assert [str(path) for path in list_files([StoragePath("s3://line")])] == expected
    assert s3.paths("GET") == ["/line?list"] * 20


class Shelf:
    """A stub of a filesystem: folders that each hold 1,000 files."""

    def __init__(self, folders: int) -> None:
        self.folders, self.listed = folders, 0

    def info(self, path: str) -> dict[str, Any]:
        return {"name": path, "type": "directory", "size": 0}

    def ls(self, path: str, detail: bool) -> list[dict[str, Any]]:
        self.listed += 1
        if path == "shelf":
            return [{"name": f"shelf/{i:05}", "type": "directory", "size": 0} for i in range(self.folders)]
        return [{"name": f"{path}/{i:03}.png", "type": "file", "size": 5} for i in range(1000)]

    def call_s3(self, _: str, ContinuationToken: str = "0", **__: Any) -> dict[str, Any]:
        self.listed += 1
        page = int(ContinuationToken)
        contents = [{"Key": f"{page:05}/{i:03}.png", "Size": 5} for i in range(1000)]
        return {"Contents": contents, "IsTruncated": page + 1 < self.folders, "NextContinuationToken": str(page + 1)}


@pytest.mark.parametrize("folders", [20, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("url", ["s3://shelf", "gs://shelf"])
def test_a_million_names_are_not_in_memory_at_once(url: str, folders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(folders)
    monkeypatch.setattr(filesystems, "open_filesystem", lambda scheme: shelf)
    files = list_files([StoragePath(url)])
    assert str(next(files)) == f"{url}/00000/000.png"
    assert shelf.listed <= 2
    tracemalloc.start()
    try:
        count = 1 + sum(1 for _ in files)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 1000 * folders
    assert peak < 3 * 2**20


def test_a_command_that_needs_all_names_refuses_too_many_as_soon_as_they_are_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shelf = Shelf(10_000)
    monkeypatch.setattr(filesystems, "open_filesystem", lambda scheme: shelf)
    monkeypatch.setattr(paths, "MAX_FILES", 2500)
    with pytest.raises(InputError, match=r"more than 2,500 files, as s3://shelf/00000/000\.png: name fewer folders"):
        collect(list_files([StoragePath("s3://shelf")]))
    assert shelf.listed == 3
