"""Messages to a webhook of the command line: in order, each at least once over restarts."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from ncml.cli import notices as module
from ncml.cli.notices import Notices, make_signer
from ncml.errors import InputError
from tests.conftest import eventually
from tests.receiver import Receiver, write_secret

ROW = {"file": "a.png", "p_value": "0.0125", "is_ood": "1", "bytes": 217, "view": "places", "error": ""}


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.01)
    receiver = Receiver()
    receiver.start()
    yield receiver
    receiver.stop()


def new(receiver: Receiver, tmp_path: Path, count: int = 0) -> Notices:
    """Return the notices of a run of a table that determines this many messages already."""
    signer = make_signer(receiver.url, write_secret(tmp_path))
    notices = Notices(receiver.url, signer, tmp_path / "verdicts.csv.webhook")
    for i in range(count):
        add(notices, i)
    return notices


def add(notices: Notices, i: int) -> None:
    notices.add("image.flagged", "2026-11-28T12:00:00Z", ROW | {"file": f"{i}.png"})


def files(receiver: Receiver) -> list[str]:
    return [message["data"]["file"] for _, message in receiver.messages]


def test_messages_are_sent_in_order_with_the_values_of_the_row(receiver: Receiver, tmp_path: Path) -> None:
    notices = new(receiver, tmp_path)
    with notices.sending(print):
        for i in range(5):
            add(notices, i)
    assert files(receiver) == [f"{i}.png" for i in range(5)]
    assert receiver.messages[0][1] == {
        "type": "image.flagged",
        "timestamp": "2026-11-28T12:00:00Z",
        "data": {"file": "0.png", "p_value": 0.0125, "is_ood": 1, "bytes": 217, "view": "places"},
    }
    assert not receiver.faults


def test_what_was_not_accepted_is_sent_by_the_next_run_under_the_same_id(receiver: Receiver, tmp_path: Path) -> None:
    statuses = iter([200, 200])
    receiver.status = lambda: next(statuses, 500)
    problems: list[str] = []
    notices = new(receiver, tmp_path)
    with notices.sending(problems.append):
        for i in range(4):
            add(notices, i)
        eventually(lambda: len(receiver.paths) >= 5)
    assert files(receiver) == ["0.png", "1.png"]
    assert problems == ["a message cannot be sent to the webhook: it answered 500; trying again until that succeeds"]
    receiver.status = lambda: 200
    notices = new(receiver, tmp_path, 4)
    with notices.sending(print):
        add(notices, 4)
    assert files(receiver) == [f"{i}.png" for i in range(5)]
    assert len(receiver.bodies) == len(set(receiver.counts)) == 5
    assert all(len(bodies) == 1 for bodies in receiver.bodies.values())


def test_at_the_end_messages_are_sent_only_for_a_while(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver is slow: all of them would take long."""
    notices = new(receiver, tmp_path)
    receiver.status = lambda: (notices._stopping.wait(60) and 200) or 500
    with notices.sending(print):
        for i in range(5):
            add(notices, i)
        eventually(lambda: receiver.paths)
        monkeypatch.setattr(module, "LAST_S", 0.0)
    assert files(receiver) == ["0.png"]
    monkeypatch.setattr(module, "LAST_S", 60.0)
    with new(receiver, tmp_path, 5).sending(print):
        eventually(lambda: len(receiver.messages) == 5)
    assert files(receiver) == [f"{i}.png" for i in range(5)]


def test_a_message_whose_record_was_lost_is_repeated_under_its_id(receiver: Receiver, tmp_path: Path) -> None:
    with new(receiver, tmp_path).sending(print):
        pass
    record = (tmp_path / "verdicts.csv.webhook").read_text()
    with new(receiver, tmp_path, 1).sending(print):
        pass
    (tmp_path / "verdicts.csv.webhook").write_text(record)  # it was killed before it could write
    with new(receiver, tmp_path, 1).sending(print):
        pass
    assert list(receiver.counts.values()) == [2]


def test_earlier_rows_are_not_sent_without_a_record_of_their_table(receiver: Receiver, tmp_path: Path) -> None:
    notices = new(receiver, tmp_path, 3)
    with notices.sending(print):
        add(notices, 3)
    assert files(receiver) == ["3.png"]
    notices = new(receiver, tmp_path)  # a new table beside the record of the former one
    with notices.sending(print):
        add(notices, 0)
    assert files(receiver) == ["3.png", "0.png"]
    assert len(receiver.counts) == 2


def test_a_fault_of_this_machine_delays_messages(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its certificates, no client can be made."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    problems: list[str] = []
    notices = new(receiver, tmp_path)
    with notices.sending(problems.append):
        add(notices, 0)
        eventually(lambda: problems)
        monkeypatch.delenv("SSL_CERT_FILE")
        eventually(lambda: files(receiver) == ["0.png"])
    assert len(problems) == 1
    assert "trying again" in problems[0]


def test_too_many_open_files_delay_messages(receiver: Receiver, tmp_path: Path) -> None:
    problems: list[str] = []
    notices = new(receiver, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with notices.sending(problems.append):
        os.close(lowest_free := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            add(notices, 0)
            eventually(lambda: problems)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        eventually(lambda: files(receiver) == ["0.png"])
    assert "trying again" in problems[0]


def test_a_redirect_is_not_followed(receiver: Receiver, tmp_path: Path) -> None:
    other = Receiver()
    other.start()
    receiver.status, receiver.headers = lambda: 307, {"Location": other.url}
    notices = new(receiver, tmp_path)
    with notices.sending(lambda _: None):
        add(notices, 0)
        eventually(lambda: len(receiver.paths) >= 2)
    other.stop()
    assert not other.paths


def test_only_the_status_of_an_answer_counts(receiver: Receiver, tmp_path: Path) -> None:
    """The body is not what its encoding says."""
    receiver.headers, receiver.body = {"Content-Encoding": "gzip", "Content-Length": "8"}, b"not gzip"
    problems: list[str] = []
    notices = new(receiver, tmp_path)
    with notices.sending(problems.append):
        for i in range(3):
            add(notices, i)
    assert files(receiver) == ["0.png", "1.png", "2.png"]
    assert not problems


@pytest.mark.parametrize(
    ("start", "problem"),
    [
        (b"HTTP/1.1 200 OK\r\n", "it did not answer within 0.5 s"),
        (b"HTTP/1.1 500 Failed\r\nContent-Length: 100000\r\n\r\n", "it answered 500"),
    ],
)
def test_an_attempt_ends_although_the_receiver_goes_on_sending(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, problem: str
) -> None:
    """It drips the header of its answer, or the body after it."""
    monkeypatch.setattr(module, "SEND_S", 0.5)
    receiver.drips = [start, *[b"X: 1\r\n"] * 200]
    problems: list[str] = []
    notices = new(receiver, tmp_path)
    with notices.sending(problems.append):
        add(notices, 0)
        eventually(lambda: problems)
    assert problems == [f"a message cannot be sent to the webhook: {problem}; trying again until that succeeds"]


@pytest.mark.parametrize("url", ["", "x", "ftp://a/", "http://", "http://user@host/", "http://host/#a", "http://a b/"])
def test_other_addresses_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--webhook must be an address like"):
        make_signer(url, write_secret(tmp_path))


def test_a_secret_is_required(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--webhook needs --webhook-secret-file"):
        make_signer("http://localhost/", None)
    with pytest.raises(InputError, match="cannot be read"):
        make_signer("http://localhost/", tmp_path / "missing")
