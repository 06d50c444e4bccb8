"""Errors of the library: one sentence each, which names the field and the remedy.

NcmlError
├── InputError        the request or the image is at fault
│   ├── TooLarge      more bytes, pixels or images than allowed
│   ├── TooCostly     more work or memory than allowed
│   ├── NotAnImage    not an image in a supported format
│   └── AccessDenied  object storage refuses this file
├── ModelError        a model folder cannot be used
├── TrainingError     a training run cannot continue
├── ServiceError      a service cannot be reached, or refuses a request
└── StorageError      object storage cannot be reached, or fails
"""

import difflib
from collections.abc import Sequence

MAX_CHOICES = 30
"""Choices that an error names at most."""


def suggestion(word: str, choices: Sequence[str]) -> str:
    """Return the end of a sentence about a `word` that is not one of the choices: its remedy."""
    nearest = difflib.get_close_matches(word, choices, n=1)
    if nearest:
        return f": did you mean {nearest[0]}?"
    return f": choose from {enumerated(choices, MAX_CHOICES)}" if choices else ": none is installed"


def enumerated(names: Sequence[str], maximum: int) -> str:
    """List names, and how many more there are than `maximum`: a, b, c and 2 more."""
    more = len(names) - maximum
    return ", ".join(names[:maximum]) + (f" and {more:,} more" if more > 0 else "")


class NcmlError(Exception):
    """Root of every error that the library raises deliberately; its text is meant for the user."""


class InputError(NcmlError, ValueError):
    """A value from the caller cannot be used; `field` is the caller's name for it."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(detail)
        self.field = field
        self.detail = detail


class TooLarge(InputError):
    """The input exceeds a stated limit."""


class TooCostly(InputError):
    """Decoding the input takes more work or memory than a stated limit."""


class NotAnImage(InputError):
    """The bytes are not an image in a supported format, or are incomplete."""


class AccessDenied(InputError):
    """Object storage refuses to read or write this file or folder."""


class ModelError(NcmlError):
    """A model folder is missing, damaged, or was not written by ncml."""


class TrainingError(NcmlError):
    """A training run diverged, or its settings cannot work."""


class ServiceError(NcmlError):
    """A service cannot be reached, refuses a request, or failed to compute its job."""

    def __init__(
        self, detail: str, *, status: int = 0, kind: str = "", field: str | None = None, request_id: str = ""
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status
        """The HTTP status; 0 if the service cannot be reached, or its response cannot be decoded."""
        self.kind = kind
        """The kind of problem, such as `queue-full`; see docs/api.md. Empty for one without a kind."""
        self.field = field
        """The invalid parameter, if there is one."""
        self.request_id = request_id
        """The id of the request in the service's log."""
        self.retry_after_s = 0.0
        """Seconds after which the service may answer, as it states; 0 if it states none."""

    @property
    def is_lost_job(self) -> bool:
        """Whether the queue does not have the job of the request, as after a power failure."""
        return self.kind == "no-such-job"


class StorageError(NcmlError):
    """Object storage cannot be reached, or fails to answer a request."""

    def __init__(self, detail: str, *, url: str = "") -> None:
        super().__init__(detail)
        self.url = url
        """The file or folder of the request."""
