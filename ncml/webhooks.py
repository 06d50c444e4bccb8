"""Messages to webhooks by the Standard Webhooks specification: secrets and signatures. Does not import torch.

Receivers verify a message with a library of https://www.standardwebhooks.com and the same secret.
"""

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from standardwebhooks import Webhook

from ncml.errors import NcmlError

MAX_SECRETS_BYTES = 4096
MIN_KEY_BYTES, MAX_KEY_BYTES = 24, 64
"""Bytes of a secret, as the specification demands."""

_PREFIX = "whsec_"


class SecretError(NcmlError):
    """The secrets that sign messages cannot be read."""


class Signer:
    """Signs messages with each of several secrets, of which a receiver needs one. Does not show them."""

    def __init__(self, webhooks: Sequence[Webhook]) -> None:
        self._webhooks = webhooks

    @classmethod
    def from_file(cls, path: Path) -> "Signer":
        """Return the signer with the secrets in a file, one per line; several allow the secret to be replaced.

        Raises `SecretError` if the file cannot be read, or has a line that is not a secret.
        """
        try:
            with path.open("rb") as file:
                content = file.read(MAX_SECRETS_BYTES + 1)
            lines = content.decode("ascii").split() if len(content) <= MAX_SECRETS_BYTES else []
        except OSError as error:
            raise SecretError(f"{path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            lines = []
        remedy = f"create a line with: echo {_PREFIX}$(openssl rand -base64 32)"
        if not lines:
            raise SecretError(f"{path} contains no secret, or more than {MAX_SECRETS_BYTES} bytes; {remedy}")
        return cls([_webhook(line, f"line {i} of {path} is not a secret; {remedy}") for i, line in enumerate(lines, 1)])

    def headers(self, message_id: str, body: str) -> dict[str, str]:
        """Return the headers of one attempt to send a message; its id is the same in every attempt."""
        now = datetime.now(UTC)
        signatures = [webhook.sign(message_id, now, body) for webhook in self._webhooks]
        return {
            "Content-Type": "application/json",
            "User-Agent": "ncml",
            "webhook-id": message_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": " ".join(signatures),
        }


def _webhook(secret: str, refusal: str) -> Webhook:
    if not secret.startswith(_PREFIX):
        raise SecretError(refusal)
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except ValueError:
        key = b""
    if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise SecretError(refusal)
    return Webhook(key)
