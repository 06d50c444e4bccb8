"""Messages of `ncml watch` to a webhook: flagged images and alarms, in order, each at least once over restarts.

The table of verdicts determines the messages and their order, so the record of what was sent is one number. The address
is the user's own, on the user's machine, so any host is allowed, other than in a service.
"""

import asyncio
import contextlib
import json
import math
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import httpx2

from ncml.checkpoint import replace_file
from ncml.cli.score_output import TEXT_COLUMNS
from ncml.errors import InputError
from ncml.webhooks import SecretError, Signer

SEND_S = 15.0
"""Seconds that an attempt may take in all."""

LAST_S = 15.0
"""Seconds after a signal in which further messages are begun."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Pauses between attempts: each is twice the previous one."""


def make_signer(url: str, secret_file: Path | None) -> Signer:
    """Return the signer of messages to a webhook. Raises `InputError` for an invalid address or secret."""
    try:
        is_valid = re.fullmatch(r"https?://[^/\s@#]+(/[^\s#]*)?", url) is not None and bool(httpx2.URL(url).host)
    except httpx2.InvalidURL:
        is_valid = False
    if not is_valid:
        raise InputError("webhook", f"--webhook must be an address like https://hooks.example.org/ncml, not {url!r}.")
    path = secret_file or os.environ.get("NCML_WEBHOOK_SECRET_FILE")
    if not path:
        raise InputError(
            "webhook_secret_file", "--webhook needs --webhook-secret-file, or NCML_WEBHOOK_SECRET_FILE, to sign with."
        )
    try:
        return Signer.from_file(Path(path))
    except SecretError as error:
        raise InputError("webhook_secret_file", f"{error}.") from None


class Notices:
    """Sends messages in a thread, one after another, and records how many the receiver has accepted."""

    def __init__(self, url: str, signer: Signer, record: Path) -> None:
        """record: file with the number of messages that were accepted."""
        self._url, self._signer, self._record = url, signer, record
        self.host = httpx2.URL(url).netloc.decode()
        """Where messages go; the rest of the address may be a secret."""
        self._report: Callable[[str], None] = print
        self._problem = ""
        self._count = 0  # of messages that the table determines so far
        self._waiting: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._end = math.inf  # monotonic time from which no message is begun
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._token, self._accepted = self._read_record()

    def add(self, kind: str, timestamp: str, data: Mapping[str, Any]) -> None:
        """Add the next message; one that an earlier run has sent is skipped."""
        self._count += 1
        if self._accepted is None or self._count <= self._accepted:
            return
        body = json.dumps({"type": kind, "timestamp": timestamp, "data": _document(data)})
        self._waiting.put((f"msg_{self._token}_{self._count}", body))

    @contextlib.contextmanager
    def sending(self, report: Callable[[str], None]) -> Generator[None]:
        """Send in the background, once the messages of the rows of earlier runs have been added.

        Without a record of this table, its earlier rows are not sent. At the end, what waits is sent for `LAST_S` if
        the receiver accepts it; the next run sends the rest. `report` prints a problem. Raises `InputError` if the
        record cannot be written.
        """
        if self._accepted is None or self._accepted > self._count:
            self._token, self._accepted = secrets.token_hex(8), self._count
        try:
            self._write_record()
        except OSError as error:
            raise InputError("output", f"{self._record} cannot be written: {error.strerror}.") from error
        self._report = report
        self._runner.get_loop()  # one for all attempts, because it cannot be made while too many files are open
        thread = threading.Thread(target=self._send_all)
        thread.start()
        try:
            yield
        finally:
            self._end = time.monotonic() + LAST_S
            self._stopping.set()
            self._waiting.put(None)
            thread.join()

    def _send_all(self) -> None:
        with self._runner:
            while (message := self._waiting.get()) is not None and time.monotonic() < self._end:
                if not self._send(*message):
                    return
                assert self._accepted is not None
                self._accepted += 1
                try:
                    self._write_record()
                    self._problem = ""
                except OSError as error:
                    self._report_once(
                        f"{self._record} cannot be written: {error.strerror}; after a restart, messages may be repeated"
                    )

    def _send(self, message_id: str, body: str) -> bool:
        """Send a message until it is accepted; return False if that has not succeeded before the end."""
        pause_s = FIRST_PAUSE_S
        while problem := self._attempt(message_id, body):
            self._report_once(f"a message cannot be sent to the webhook: {problem}; trying again until that succeeds")
            if self._stopping.wait(pause_s):
                return False
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return True

    def _attempt(self, message_id: str, body: str) -> str:
        """Send a message once; return why it was not accepted, "" if it was. Only the status of the answer counts."""
        try:
            status = self._runner.run(self._post(message_id, body))
        except TimeoutError:
            return f"it did not answer within {SEND_S:g} s"
        except (httpx2.RequestError, OSError) as error:  # such as too many open files, or certificates being replaced
            return str(error) or type(error).__name__
        return "" if 200 <= status < 300 else f"it answered {status}"

    async def _post(self, message_id: str, body: str) -> int:
        """Send a message once; return the status of the answer."""
        headers = self._signer.headers(message_id, body)
        async with (
            asyncio.timeout(SEND_S),  # the limits of the client are those of each read
            httpx2.AsyncClient(timeout=None, follow_redirects=False) as client,
            client.stream("POST", self._url, content=body, headers=headers) as response,
        ):
            return response.status_code

    def _report_once(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            self._report(problem)

    def _read_record(self) -> tuple[str, int | None]:
        """Return the first part of the ids, and how many messages were accepted; None without a valid record."""
        try:
            token, accepted = self._record.read_text().split()
            return token, int(accepted)
        except (OSError, ValueError):
            return "", None

    def _write_record(self) -> None:
        replace_file(self._record, lambda new: new.write_text(f"{self._token} {self._accepted}\n"))


def _document(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells of a row, as they are written or read, without empty ones."""
    texts = {name: str(cell) for name, cell in cells.items() if str(cell)}
    return {name: text if name in TEXT_COLUMNS else _number(text) for name, text in texts.items()}


def _number(text: str) -> float | str:
    """Return a number as JSON has it; text for infinity and NaN, which JSON lacks."""
    number = float(text)
    return text if not math.isfinite(number) else int(text) if text.isdecimal() else number
