"""`ncml push` and `ncml pull`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ncml import hub
from ncml.cli.terminal import JsonOption, identity, print_json
from ncml.paths import check_model_name, search_path


def push(
    model: Annotated[Positional[str], arg(metavar="NAME|PATH")],
    repository: Annotated[Positional[str], arg(metavar="OWNER/NAME")],
    /,
    *,
    revision: Annotated[str | None, arg(metavar="BRANCH", help_behavior_hint="(default: main)")] = None,
    license: Annotated[str | None, arg(metavar="ID", help_behavior_hint="(default: the card's)")] = None,
    private: bool = False,
    message: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="(default: name and version)")] = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a model on the Hugging Face Hub, with its calibrations and its card, as one commit.

    The weights are checked against the model's version first. HF_TOKEN or `hf auth login` gives access, HF_ENDPOINT
    names another server.

    Args:
        model: Name or folder of the model.
        repository: Where to publish it; created if it does not exist.
        revision: Branch to publish to; created if it does not exist.
        license: License that the card states, such as apache-2.0.
        private: Create a private repository.
        message: Message of the commit.
        as_json: Print JSON.
    """
    pushed = hub.push(model, repository, revision=revision, license=license, private=private, message=message)
    if as_json:
        print_json({"url": pushed.url, "revision": pushed.revision})
    else:
        print(f"{pushed.url}  (ncml pull {repository}@{pushed.revision[:12]})")


def pull(
    reference: Annotated[Positional[str], arg(metavar="OWNER/NAME[@REVISION]")],
    /,
    *,
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: beside the other models)")] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a model from the Hugging Face Hub and check its weights against its version.

    Args:
        reference: The model, and its branch, tag or commit.
        out: Model folder to write.
        as_json: Print JSON.
    """
    repository, _ = hub.parse(reference)
    if out is not None:
        check_model_name(out)
    folder = out or search_path()[0] / repository.partition("/")[2]
    model = hub.pull(reference, folder)
    if as_json:
        print_json({"model": identity(model), "folder": str(folder)})
    else:
        print(f"{folder}  {model.version[:12]}")
