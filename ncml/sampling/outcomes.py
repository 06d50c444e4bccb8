"""Outcomes of the check of fast groups, kept in the user's cache: once for each model version and machine.

A file holds everything that the outcome depends on, and its name is the digest of that: another build of PyTorch,
processor, number of threads or setting of a numerical library has another file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ncml import checkpoint
from ncml.network.ncpn import NCPN
from ncml.runtime import CPU_INFO
from ncml.sampling.batching import Batching
from ncml.sampling.conditions import NO_TILT, Tilt

SETTINGS = ("ATEN_", "BLIS_", "DNNL_", "GOMP_", "KMP_", "LD_", "MKL_", "NPY_", "OMP_", "ONEDNN_", "OPENBLAS_", "TORCH_")
"""Beginnings of the environment variables that choose numerical libraries and their kernels."""

CHECKED = {("fast", "passed"), ("fixed", "failed")}
"""What is stored: not the outcome of a check that was skipped, did not run or reached its time limit."""

CORE_FIELDS = frozenset(
    {"processor", "cpu MHz", "bogomips", "BogoMIPS", "apicid", "initial apicid", "core id", "physical id"}
)
"""Fields of /proc/cpuinfo that differ between the cores of a processor, or from moment to moment."""

log = logging.getLogger(__name__)


def recall(network: NCPN, version: str, tilt: Tilt) -> Batching | None:
    """Return the outcome of an earlier check of a model version under the same conditions; None if there is none."""
    conditions = _conditions(network, version, tilt)
    if not (path := _path(conditions)):
        return None
    try:
        stored = json.loads(path.read_text())
        if stored["conditions"] != conditions:
            raise ValueError("it was made under other conditions")
        outcome = Batching(**stored["outcome"])
        if (outcome.groups, outcome.check) not in CHECKED or not isinstance(outcome.detail, str):
            raise ValueError("it is not the outcome of a check")
    except FileNotFoundError:
        return None
    except (OSError, RecursionError, ValueError, TypeError, KeyError) as error:
        log.warning("the stored check of fast groups cannot be used, so the check is repeated: %s", error)
        return None
    return outcome


def store(network: NCPN, version: str, tilt: Tilt, outcome: Batching) -> None:
    """Store the outcome of a check that ran to its end; without a writable cache, the next process checks again."""
    conditions = _conditions(network, version, tilt)
    if (outcome.groups, outcome.check) not in CHECKED or not (path := _path(conditions)):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"conditions": conditions, "outcome": asdict(outcome)}, indent=1)
        checkpoint.replace_file(path, lambda new: new.write_text(text))
    except OSError as error:
        log.info("the check of fast groups is repeated in the next process: %s", error)


def _path(conditions: dict[str, Any]) -> Path | None:
    """Return the file of an outcome; None for a user without a home."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        directory = Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()
    return directory / "ncml" / "batching" / f"{digest}.json"


def _conditions(network: NCPN, version: str, tilt: Tilt) -> dict[str, Any]:
    return {
        "model": version,
        "dtype": str(network.head.weight.dtype),
        "rows_per_image": tilt.rows_per_image,
        "tilt": tilt != NO_TILT,
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,  # pyright: ignore[reportAttributeAccessIssue] - set at import
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
        **_machine(),
    }


@cache
def _machine() -> dict[str, str]:
    """Return what does not change while a process runs."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        sources.update(path.read_bytes())
    return {
        "sources": sources.hexdigest(),
        "numpy": np.__version__,
        "torch": f"{torch.__version__}\n{torch.__config__.show()}",
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "system": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]),
        "processor": _processor(),
    }


def _processor() -> str:
    """Return what the system reports about the first core; elsewhere the names of processor and machine."""
    try:
        lines = CPU_INFO.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.processor()} of {platform.node()}"
    return "\n".join(line for line in lines if line.partition(":")[0].strip() not in CORE_FIELDS)
