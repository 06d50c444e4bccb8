"""What the library says when it cannot do what was asked: one sentence that names the field and the remedy.

NcmlError
├── InputError        the request or the picture is at fault
│   ├── TooLarge      more bytes, pixels or images than allowed
│   └── NotAnImage    not a picture in a format that is read here
├── ModelError        a model folder cannot be used
└── TrainingError     a training run cannot go on
"""


class NcmlError(Exception):
    """Root of every error that the library raises on purpose; its text is meant for the user."""


class InputError(NcmlError, ValueError):
    """A value that the caller gave cannot be used; `field` names it as the caller knows it."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(detail)
        self.field = field
        self.detail = detail


class TooLarge(InputError):
    """The input exceeds a stated limit."""


class NotAnImage(InputError):
    """The bytes are not a picture in a supported format, or are cut short."""


class ModelError(NcmlError):
    """A model folder is missing, damaged, or not one of ours."""


class TrainingError(NcmlError):
    """A training run diverged or was set up so that it cannot run."""
