"""Models on the Hugging Face Hub, or on a server with its interface (HF_ENDPOINT): publish and fetch model folders.

Every folder is checked against its version. Does not import torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from ncml import checkpoint, paths
from ncml.checkpoint import CALIBRATION, CARD, CONFIG, DETECTOR, DETECTOR_ARRAYS, TILES, WEIGHTS, Description
from ncml.data import kept_images
from ncml.errors import InputError, ModelError
from ncml.ood.detector_calibration import adopt_arrays
from ncml.paths import printable

SCHEME = "hf://"
FILES = (WEIGHTS, CALIBRATION, TILES, DETECTOR_ARRAYS, DETECTOR, CARD, CONFIG)
"""Files of a model folder. The configuration is last: a folder without it is not a model folder."""
README = "README.md"
"""The name under which the Hub shows a card."""
REFERENCE = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)(?:@([^@]+))?")


@dataclass(frozen=True)
class Pushed:
    """A commit on the Hub."""

    url: str
    revision: str
    """The commit's hash, which `pull` accepts."""


def find_model(model: str | os.PathLike[str]) -> Path:
    """Return the folder of a model by name, path or `hf://owner/model@revision`; raise `ModelError` for none."""
    if isinstance(model, str) and model.startswith(SCHEME):
        return fetch(model).folder
    return paths.find_model(model)


def parse(reference: str) -> tuple[str, str | None]:
    """Return the repository and the revision of `owner/model@revision`, with or without `hf://`."""
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise InputError(
            "model", f"{reference!r} is not a model of the Hub: name one as owner/model or hf://owner/model@revision."
        )
    return match[1], match[2]


def fetch(reference: str) -> Description:
    """Fetch a model into the Hub's cache, or find it there, and check it; raise `InputError` or `ModelError`."""
    repository, revision = parse(reference)
    with _translate_errors(repository, revision):
        import huggingface_hub

        folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(FILES))
    try:
        description = checkpoint.describe(folder)
        checkpoint.check_version(description)
    except ModelError as error:
        raise ModelError(f"{reference} is not a complete model: {error}") from error
    return description


def pull(reference: str, out: Path) -> Description:
    """Fetch a model and copy it to a folder; raise `InputError` if the folder holds something else.

    A folder that holds the same version gets the Hub's card and calibrations; another detector replaces its own, with
    the images that it keeps. A kill leaves one detector or the other. A failure leaves no new folder behind.
    """
    fetched = fetch(reference)
    checkpoint.check_copy(fetched.folder, out)
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        adopt_arrays(out)  # those that `detector.json` names must not be overwritten
        detector = checkpoint.detector_version(fetched.folder)
        if detector is not None and detector != checkpoint.detector_version(out):
            kept_images.discard(out)
            (out / checkpoint.DETECTOR_PICTURES).unlink(missing_ok=True)
        for name in FILES:
            target = out / (checkpoint.NEW_DETECTOR_ARRAYS if name == DETECTOR_ARRAYS else name)
            if (fetched.folder / name).is_file():
                checkpoint.replace_file(target, lambda new, name=name: shutil.copyfile(fetched.folder / name, new))
        adopt_arrays(out)
    except OSError as error:
        if is_new:
            shutil.rmtree(out, ignore_errors=True)
        raise InputError("out", f"{printable(out)} cannot be written: {error.strerror}.") from error
    return checkpoint.describe(out)


def push(
    model: str | os.PathLike[str],
    repository: str,
    *,
    revision: str | None = None,
    license: str | None = None,
    private: bool = False,
    message: str | None = None,
) -> Pushed:
    """Publish a model folder as one commit; create the repository if there is none.

    revision: the branch; None: main. license: the identifier that the card states, such as apache-2.0.

    Raises `ModelError` for an incomplete folder, `InputError` if the Hub refuses.
    """
    repository_id, branch = parse(repository)
    if branch is not None:
        raise InputError("repository", f"{repository} names a revision: name a branch with --revision instead.")
    description = checkpoint.describe(find_model(model))
    checkpoint.check_version(description)
    adopt_arrays(description.folder)
    card = published_card(description, license)
    with _translate_errors(repository_id, revision):
        import huggingface_hub
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        api = huggingface_hub.HfApi()
        api.create_repo(repository_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository_id, branch=revision, exist_ok=True)
        stored = [name for name in FILES if name != CARD and (description.folder / name).is_file()]
        published = api.list_repo_files(repository_id, revision=revision)
        stale = [name for name in FILES if name != CARD and name in published and name not in stored]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, description.folder / name) for name in stored]
        operations += [CommitOperationAdd(name, card.encode()) for name in (CARD, README)]
        commit = api.create_commit(
            repository_id,
            operations,
            commit_message=message or f"Publish {description.name} {description.version[:12]}",
            revision=revision,
        )
    return Pushed(str(commit.commit_url), commit.oid)


def published_card(description: Description, license: str | None) -> str:
    """Return the card of a model with metadata for the Hub; existing metadata are kept.

    Raises `InputError` if they are not valid YAML.
    """
    from huggingface_hub import ModelCard

    stored = checkpoint.read_file_of_card(description.folder) or f"# {description.name}\n"
    has_metadata = checkpoint.split_card(stored)[0]
    text = stored if has_metadata else checkpoint.card_metadata() + stored
    try:
        card = ModelCard(text, ignore_metadata_errors=False)
    except ValueError as error:
        raise InputError(
            "card", f"the metadata of {printable(description.folder / CARD)} are not valid: {error}."
        ) from error
    if license is not None:
        card.data["license"] = license
    return str(card)


@contextlib.contextmanager
def _translate_errors(repository: str, revision: str | None) -> Generator[None]:
    """Raise `InputError`, in one sentence, for errors of the Hub and of the connection to it."""
    from huggingface_hub import constants, errors

    place = f"{repository}@{revision}" if revision else repository
    try:
        yield
    except errors.HFValidationError as error:
        raise InputError(
            "model", f"{repository!r} cannot be a name on the Hub: name a model as owner/model."
        ) from error
    except errors.GatedRepoError as error:
        raise InputError(
            "token", f"{place} needs its owner's permission: request access on its page, and set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            "revision", f"{repository} has no revision {revision}: name a branch, tag or commit."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            "model", f"there is no model {repository} on the Hub that you may read: check its name, or set HF_TOKEN."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            "model",
            f"the Hub at {constants.ENDPOINT} cannot be reached, and its cache has no {place}: check the connection.",
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise InputError(
                "token", f"the Hub refuses the token for {repository}: set HF_TOKEN to one with access."
            ) from error
        raise InputError("model", f"the Hub refuses {place}: {' '.join(str(error).split())[:300]}") from error
    except (ConnectionError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise InputError("model", f"the Hub at {constants.ENDPOINT} cannot be reached: {error}.") from error
    except (errors.XetDownloadError, RuntimeError) as error:  # of a large file, with the reason as its cause
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError("model", f"a file of {place} cannot be exchanged with the Hub: {reason}") from error
