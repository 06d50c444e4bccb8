"""A stop of the service: streams end when it begins, and every other request is answered before the process ends."""

import asyncio
import contextlib
from collections.abc import Callable, Generator
from typing import Any, Self

from service.http.problems import Problem


class Moment:
    """A moment at which the calls that wait for it are made."""

    def __init__(self) -> None:
        self._has_come = False
        self._calls: set[Callable[[], object]] = set()

    def come(self) -> None:
        """Make the calls."""
        self._has_come = True
        for call in list(self._calls):
            call()

    @contextlib.contextmanager
    def calls(self, call: Callable[[], object]) -> Generator[None]:
        """Return a context in which the moment makes a call, at once if it has come."""
        self._calls.add(call)
        try:
            if self._has_come:
                call()
            yield
        finally:
            self._calls.discard(call)


class Stop:
    """The two moments of a stop: `begun`, when the process is asked to end, and `due`, when all answers are due."""

    def __init__(self) -> None:
        self.begun, self.due = Moment(), Moment()

    def begin(self, answer_within_s: float) -> None:
        """Begin the stop; answers are due after this time."""
        self.begun.come()
        asyncio.get_running_loop().call_later(answer_within_s, self.due.come)

    def interruption(self) -> "Interruption":
        """Return a context that ends with a 503 `Problem` when the answer is due, unless it is lifted before."""
        return Interruption(self.due)


class Interruption:
    """Interrupts the current task at a moment."""

    def __init__(self, moment: Moment) -> None:
        self._registration = contextlib.ExitStack()
        self._moment = moment
        self._timeout = asyncio.timeout(None)
        self._has_ended = False

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._registration.enter_context(self._moment.calls(self._interrupt))
        return self

    async def __aexit__(self, *exception: Any) -> None:
        self._registration.close()
        self._has_ended = True
        try:
            await self._timeout.__aexit__(*exception)
        except TimeoutError as error:
            raise stopping() from error

    def _interrupt(self) -> None:
        self._timeout.reschedule(asyncio.get_running_loop().time())

    def lift(self) -> None:
        """Let the task continue: it answers by itself. A second call, or one after the context, has no effect."""
        if not self._has_ended:
            self._has_ended = True
            self._registration.close()
            self._timeout.reschedule(None)


def stopping() -> Problem:
    """Return the 503 of a request that the service did not accept before it stopped."""
    return Problem(503, "The service is stopping; send the request again in a few seconds.", kind="stopping")
