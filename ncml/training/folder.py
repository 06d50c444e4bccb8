"""The folder of a training run, and what it must contain before a run starts. Does not import torch."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path

from ncml import checkpoint, locks
from ncml.errors import InputError
from ncml.paths import check_model_name, check_output_folder, printable

STATE = "training/state.safetensors"
"""The file of a run's state inside the model folder."""

IMAGE_CACHE = "training/images"
"""The folder of a run's decoded images inside the model folder."""


def check_folder(
    out: Path,
    source: str,
    *,
    resume: bool,
    cooldown_from: Path | None,
    total_images: int | None,
    has_initial_model: bool,
) -> None:
    """Raise `InputError` for a folder that cannot hold this run, before anything is read.

    The arguments are those of `ncml.training.run.train`.
    """
    if printable(out) != str(out):
        raise InputError(
            "out", f"{printable(out)} is not UTF-8, as TensorBoard's file names must be: choose another folder."
        )
    if not resume:  # a run in such a folder can be completed, and the folder renamed
        check_model_name(out)
    state = out / STATE
    if state.exists() and not resume:
        raise InputError(
            "out", f"{out} already contains a training run; add --resume to continue it, or choose another folder."
        )
    if not state.exists() and (out / checkpoint.CONFIG).exists():
        raise InputError("out", f"{out} already contains a finished model; choose another folder.")
    if resume and not state.exists():
        raise InputError("resume", f"{out} contains no training run to resume; omit --resume to start one.")
    check_output_folder(out, "out")
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise InputError("out", f"{out} is inside the data, {source}: choose another folder.")
    if cooldown_from is not None and not (cooldown_from / STATE).exists():
        raise InputError("cooldown-from", f"{cooldown_from} contains no training run; name a folder that contains one.")
    if cooldown_from is not None and total_images is None and not resume:
        raise InputError("max-images", "--cooldown-from needs --max-images: the length at which the rate reaches 0.")
    if cooldown_from is not None and has_initial_model:
        raise InputError(
            "init-from", "--init-from cannot be combined with --cooldown-from, which determines the weights."
        )


@contextlib.contextmanager
def exclusive(out: Path) -> Generator[None]:
    """Let only this process train in a folder; raise `InputError` if another one does.

    What a killed process had written of a new state is removed.
    """
    state = out / STATE
    state.parent.mkdir(parents=True, exist_ok=True)
    refusal = InputError("out", f"another process is training in {out}: wait until it ends, or choose another folder.")
    file, is_held = locks.acquire(state.parent / "lock", refusal)
    with file:
        for unfinished in state.parent.glob(f".{state.name}.*") if is_held else ():
            unfinished.unlink()
        yield
