"""Noise conditional maximum likelihood (Li and Kluger, 2022, Eq. 7-8).

    maximise  E_{t ~ mu} E_{x ~ p_t} log p_{theta, t}(x),

with mu uniform on (0, T] with a point mass at t = 0. With all of the mass at 0 this is plain maximum likelihood.

Every step draws its own randomness from (seed, step), and its pictures from (seed, epoch): a run that stops and resumes
continues as if it had never stopped. The weights that are kept are the moving average (EMA).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint as checkpointed

from ncml import checkpoint
from ncml.config import Config, TrainingConfig
from ncml.errors import InputError, ModelError, TrainingError
from ncml.network import orientation
from ncml.network.likelihood import bits_per_dim, from_uint8, log_prob
from ncml.network.ncpn import NCPN, Pair
from ncml.network.sde import end_time, grey_levels, process, scale
from ncml.progress import OnProgress, Progress, ignore_progress
from ncml.training.dataset import Dataset
from ncml.training.distributed import Team, apart
from ncml.training.optimizer import Optimizer

STATE = "training/state.safetensors"
"""Where a run keeps its state, inside the model folder."""

MAX_SKIPPED = 10
"""Steps in a row whose loss or gradient may not be finite before the run counts as diverged."""

SAVE_SECONDS = 600.0
"""The state is saved at least this often."""

KEPT = ("total_images", "cooldown_fraction", "ema_images")
"""Settings that a resumed run takes from its state, whatever the configuration says."""

CHANGEABLE = (*KEPT, "learning_rate", "muon_learning_rate")
"""Settings that may differ between a run and the configuration that it is resumed with."""

ALONE = Team()


@dataclass(frozen=True)
class Batch:
    """What a training step sees."""

    x_BCHW: Tensor
    """Noised pictures, laid in their orientation."""
    t_B: Tensor
    class_B: Tensor
    orientation_B: Tensor
    index_B: Tensor
    """Where in the dataset each picture lies."""

    def of(self, some: slice) -> Batch:
        """Some items of the batch."""
        return Batch(*(getattr(self, field.name)[some] for field in dataclasses.fields(self)))

    def to(self, device: str | torch.device) -> Batch:
        """The batch on another device."""
        return Batch(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is computed; what it computes is the same up to rounding."""

    pieces: int = 1
    """Each process takes its share of a batch in so many pieces and adds their gradients up: less memory."""
    recompute: bool = False
    """Activations between the network's blocks alone are kept, the rest computed again: much less memory, a third
    more arithmetic."""
    compile: bool = False
    """Network and likelihood are compiled first, which takes minutes and a C++ compiler."""


PLAIN = Execution()


def draw_batch(data: Dataset, config: Config, step: int) -> Batch:
    """The batch of a step: a function of the data, the configuration and the step alone."""
    training, model = config.training, config.model
    first = step * training.batch_size
    index_B = torch.tensor([_at(first + i, len(data), training.seed) for i in range(training.batch_size)])
    generator = torch.Generator().manual_seed(_mix(training.seed, step))
    B = training.batch_size
    drawn = data.take(index_B)
    x_BCHW = from_uint8(drawn.images_NHWC)
    if training.flip:
        mirrored_B = torch.rand(B, generator=generator) < 0.5
        x_BCHW = torch.where(mirrored_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)
    turned = training.orientation_probability if model.orientations else 0.0
    orientation_B = orientation.draw(B, turned, model.height == model.width, generator)
    if model.height == model.width:
        x_BCHW = orientation.orient_each(x_BCHW, orientation_B)
    else:
        x_BCHW = orientation.orient(x_BCHW, int(orientation_B[0]))
    null_B = torch.rand(B, generator=generator) < training.class_dropout
    class_B = torch.where(null_B, len(model.classes), drawn.labels_N)
    return Batch(*_noised(x_BCHW, config, generator), class_B, orientation_B, index_B)


def _noised(x_BCHW: Tensor, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw t ~ mu and x ~ p_t."""
    B = len(x_BCHW)
    t_B = (1 - torch.rand(B, generator=generator)) * end_time(config.sde)
    t_B[torch.rand(B, generator=generator) < config.training.clean_probability] = 0
    noise_BCHW = torch.randn(x_BCHW.shape, generator=generator)
    process_ = process(config.sde)
    alpha_B, sigma_B = process_.alpha(t_B), process_.sigma(t_B)
    return scale(alpha_B, x_BCHW) * x_BCHW + scale(sigma_B, x_BCHW) * noise_BCHW, t_B


def loss_bits(network: torch.nn.Module, batch: Batch, *, bf16: bool) -> Tensor:
    """-log2 p_{theta, t}(x) for each item, in bits per dimension. [B]."""
    with torch.autocast(batch.x_BCHW.device.type, torch.bfloat16, enabled=bf16):
        parameters_BPHW = network(batch.x_BCHW, batch.t_B, batch.class_B, batch.orientation_B)
    log_prob_B = log_prob(batch.x_BCHW, parameters_BPHW, batch.t_B == 0).sum((1, 2))
    return bits_per_dim(log_prob_B, batch.x_BCHW[0, 0].numel())


@torch.inference_mode()
def held_out_bits(
    network: NCPN,
    data: Dataset,
    *,
    batch_size: int = 64,
    team: Team = ALONE,
    on_progress: OnProgress = ignore_progress,
) -> float:
    """Bits per dimension of clean pictures under the null class, each picture weighing the same.

    The processes of a team take every n-th picture each, and all get the answer.
    on_progress: counts images, in the stage "measure".
    """
    device = next(network.parameters()).device
    total, done = 0.0, 0
    for index_B in torch.arange(len(data))[team.share(len(data))].split(batch_size):
        x_BCHW = from_uint8(data.take(index_B).images_NHWC).to(device)
        t_B = torch.zeros(len(x_BCHW), device=device)
        total += float(log_prob(x_BCHW, network(x_BCHW, t_B), t_B == 0).sum(dtype=torch.float64))
        done += len(x_BCHW)
        on_progress(Progress("measure", min(done * team.size, len(data)), len(data)))
    height, width = data.store_NHWC.shape[1:3]
    return float(bits_per_dim(torch.tensor(team.total(total) / len(data)), height * width))


def schedule(training: TrainingConfig, images: int) -> float:
    """Return the share of the learning rates that applies after this many images, in [0, 1].

    Linear warm-up, over a fifth of the run at most; constant; linear cool-down to 0 at the end of the run.
    """
    warmup = max(1.0, min(training.warmup_images, training.total_images / 5))
    left = (training.total_images - images) / max(1.0, training.cooldown_fraction * training.total_images)
    return max(0.0, min(1.0, (images + training.batch_size) / warmup, left))


class Trainer:
    """A training run: network, moving average, optimiser and position."""

    def __init__(
        self,
        config: Config,
        data: Dataset,
        *,
        start: Callable[[NCPN], None] = lambda network: None,
        team: Team = ALONE,
        execution: Execution = PLAIN,
    ) -> None:
        """start: what may replace the random weights that a network begins with, in place."""
        if len(data) == 0:
            raise InputError("data", "there is no picture to fit; give at least 8.")
        if execution.pieces < 1 or config.training.batch_size % (team.size * execution.pieces):
            raise InputError(
                "batch-size",
                f"a batch of {config.training.batch_size} pictures cannot be cut into {execution.pieces} pieces for "
                f"each of {team.size} processes; choose a batch size that they divide.",
            )
        self.config, self.data, self.team, self.execution = config, data, team, execution
        self.device = torch.device(team.device)
        torch.manual_seed(config.training.seed)
        network = NCPN(config)
        start(network)
        self.network = network.to(self.device).channels_last()
        self.average: AveragedModel = AveragedModel(self.network, multi_avg_fn=self._average, use_buffers=True)
        self.average.eval()  # it is measured and kept, never trained: no dropout
        self.optimizer = Optimizer(self.network, config.training)
        if execution.recompute:  # after the average has been copied, which needs no gradient
            for pair in (module for module in self.network.modules() if isinstance(module, Pair)):
                pair.forward = functools.partial(checkpointed, pair.forward, use_reentrant=False)
        self.parallel = team.joined(self.network)
        self.loss = torch.compile(loss_bits) if execution.compile else loss_bits
        self.step = 0
        self.skipped_steps = 0
        """Steps without an update, since their loss or gradient was not finite."""
        self.skipped_in_a_row = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.saved = False
        """Whether there is a state to resume from."""

    @property
    def images(self) -> int:
        """Pictures seen so far."""
        return self.step * self.config.training.batch_size

    @property
    def finished(self) -> bool:
        """Whether the run has seen all that its configuration asks for."""
        return self.images >= self.config.training.total_images

    @property
    def ema(self) -> NCPN:
        """The network with averaged weights."""
        network = self.average.module
        assert isinstance(network, NCPN)
        return network

    def _average(self, average: Any, current: Any, updates: Any) -> None:
        """Update the moving average, with a shorter memory at first so that it forgets the random initial weights."""
        training, n = self.config.training, int(updates)
        decay = 1 - training.batch_size / training.ema_images
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(average, current, updates)

    def set_images(self, images: int) -> None:
        """Make the run longer or shorter."""
        config = replace(self.config, training=replace(self.config.training, total_images=images))
        self.config = self.network.config = self.ema.config = config

    def cool_down(self, images: int) -> None:
        """Let the learning rate fall to 0 from here until this many images have been seen in all."""
        if images <= self.images:
            raise InputError(
                "max-images", f"the run has seen {self.images} images already; --max-images must be more than that."
            )
        training = replace(self.config.training, cooldown_fraction=1 - self.images / images)
        self.config = replace(self.config, training=training)
        self.set_images(images)
        self.saved = False  # the state that was resumed is of the run that this one branched off

    def train_step(self) -> float:
        """Take one step of the optimiser; returns the batch's mean loss in bits per dimension.

        A step whose loss or gradient is not finite changes no weight. TrainingError after `MAX_SKIPPED` of them in a
        row, or where a weight is not finite.
        """
        training = self.config.training
        loss_B, batch = self._gradients()
        loss = self.team.total(loss_B.mean()) / self.team.size
        parameters = list(self.network.parameters())
        self.norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if math.isfinite(loss) and torch.isfinite(self.norm):
            torch.nn.utils.clip_grads_with_norm_(parameters, training.grad_clip, self.norm)
            self.optimizer.step(schedule(training, self.images))
            self.average.update_parameters(self.network)
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row == MAX_SKIPPED or not all(p.isfinite().all() for p in parameters):
                raise TrainingError(self._diverged(loss_B, batch))
        self.network.zero_grad()
        self.step += 1
        return loss

    def rehearse(self) -> float:
        """Seconds that a step takes, measured without taking one."""
        begun = 0.0
        for _ in range(2):  # the first makes kernels ready
            begun = time.perf_counter()
            self._gradients()
            self.network.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return self.team.total(time.perf_counter() - begun) / self.team.size

    def _gradients(self) -> tuple[Tensor, Batch]:
        """The loss of each item of this process's share of the batch, whose gradients are left in the parameters."""
        training, pieces = self.config.training, self.execution.pieces
        torch.manual_seed(_mix(training.seed + (self.team.rank << 32), self.step) ^ 1)  # dropout
        batch = draw_batch(self.data, self.config, self.step)
        batch = batch.of(self.team.share(training.batch_size)).to(self.device)
        losses: list[Tensor] = []
        for piece in range(pieces):
            with apart(self.parallel, piece < pieces - 1):
                some = batch.of(slice(piece, None, pieces)) if pieces > 1 else batch
                loss_B = self.loss(self.parallel, some, bf16=training.precision == "bf16")
                (loss_B.mean() / pieces).backward()
            losses.append(loss_B.detach())
        return torch.stack(losses, 1).flatten(), batch

    def _diverged(self, loss_B: Tensor, batch: Batch) -> str:
        named = list(self.network.named_parameters())
        bad = [f"the weight {n} is" for n, p in named if not p.isfinite().all()]
        bad += [f"the gradient of {n} is" for n, p in named if p.grad is not None and not p.grad.isfinite().all()]
        where = f" and {bad[0]} not finite" if bad else ""
        lost = (~loss_B.isfinite()).nonzero().flatten()
        first = int(lost[0]) if len(lost) else int(loss_B.argmax())
        noise = grey_levels(process(self.config.sde), float(batch.t_B[first]))
        return (
            f"training diverged at step {self.step} ({self.images} images): {len(lost)} of the batch's {len(loss_B)} "
            f"losses are not finite, the worst is {float(loss_B[first]):.4g} bits/dim of picture "
            f"{int(batch.index_B[first])} of the fit part at {noise:.3g} grey levels of noise{where}; "
            f"{self._remedy} with a lower --learning-rate."
        )

    @property
    def _remedy(self) -> str:
        return "the last state that was saved is whole: --resume" if self.saved else "nothing was saved yet: begin anew"

    def save(self, path: Path) -> None:
        """Write all that an exact resume needs into one safetensors file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        state |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        state |= {f"optimizer.{k}": v for k, v in self.optimizer.state_dict().items()}
        state = {k: v.contiguous().clone() for k, v in state.items()}
        progress = {
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "seconds": self.seconds,
            "history": self.history,
            "format": checkpoint.FORMAT,
            "config": self.config.to_json(),
        }
        metadata = {"progress": json.dumps(progress)}
        try:
            checkpoint.replace_file(path, lambda new: save_file(state, new, metadata=metadata))
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"the run cannot be saved to {path} after {self.images} images ({error}): see that there is room; "
                f"{self._remedy}."
            ) from error
        self.saved = True

    def resume(self, path: Path, *, images: int | None = None) -> None:
        """Continue a saved run; TrainingError if the file is damaged or another network's.

        images: how long the run is now; None leaves it as it was.
        """
        try:
            with safe_open(path, "pt") as file:
                progress = json.loads(file.metadata()["progress"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TrainingError(f"{path} is not a training state that can be resumed: {error}.") from error
        saved = self._check_same_run(path, progress)

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        kept = {name: getattr(saved.training, name) for name in KEPT}
        self.config = replace(self.config, training=replace(self.config.training, **kept))
        self.set_images(images or saved.training.total_images)
        try:
            self._load(under, progress)
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(f"{path} does not fit the run that it names: {reason}.") from error

    def _check_same_run(self, path: Path, progress: dict[str, Any]) -> Config:
        """Return the configuration of a saved run; raise TrainingError unless it is this one but for `CHANGEABLE`."""
        try:
            saved = checkpoint.read_config({"format": 1} | progress)
        except ModelError as error:
            raise TrainingError(f"{path} {error}") from error
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise TrainingError(f"{path} has a configuration that this ncml cannot read: {error}.") from error
        for part in ("model", "sde", "training"):
            then, now = getattr(saved, part), getattr(self.config, part)
            for name in (field.name for field in dataclasses.fields(now)):
                if name not in CHANGEABLE and getattr(then, name) != getattr(now, name):
                    raise TrainingError(
                        f"{path} is a run with {part} {name} {getattr(then, name)!r}, not {getattr(now, name)!r}; "
                        "resume with the options it began with, or give another --out."
                    )
        return saved

    def _load(self, under: Callable[[str], dict[str, Tensor]], progress: dict[str, Any]) -> None:
        self.network.load_state_dict(under("network."))
        self.average.load_state_dict(under("average."))
        self.optimizer.load_state_dict(under("optimizer."))
        self.skipped_steps = progress.get("skipped_steps", 0)
        self.step, self.seconds, self.history = progress["step"], progress["seconds"], progress["history"]
        self.saved = True


def run(
    trainer: Trainer,
    state: Path,
    *,
    held_out: Dataset,
    interval: int = 20_000,
    max_seconds: float = math.inf,
    save_seconds: float = SAVE_SECONDS,
    report: Callable[[Trainer, float, float], None] = lambda trainer, mean, rate: None,
    measured: Callable[[Trainer], None] = lambda trainer: None,
) -> None:
    """Train until the run is finished or the time is up, saving to the file `state` and measuring every so many images.

    Where that takes longer than `save_seconds` it is saved in between, too, so that no crash costs more.

    report: called after every step with the trainer, a running mean of the loss in bits per dimension, and images per
    second. measured: called when a line has been added to the trainer's history. SIGINT and SIGTERM end the step that
    runs, and raise KeyboardInterrupt after the state is saved.
    """
    team = trainer.team
    begun, before, first = time.monotonic(), trainer.seconds, trainer.images
    mean, saved_at = math.nan, begun

    def save() -> None:
        nonlocal saved_at
        trainer.seconds = before + time.monotonic() - begun
        if team.first:
            trainer.save(state)
        trainer.saved, saved_at = True, time.monotonic()  # of every process: the first has

    def measure() -> None:
        trainer.history.append(
            {
                "images": trainer.images,
                "seconds": round(before + time.monotonic() - begun),
                "train_bpd": round(mean, 4),
                "held_out_bpd": round(held_out_bits(trainer.ema, held_out, team=team), 4),
            }
        )
        save()
        measured(trainer)

    with _signals() as asked:
        while not trainer.finished and not team.any(bool(asked) or time.monotonic() - begun >= max_seconds):
            loss = trainer.train_step()
            if math.isfinite(loss):
                mean = loss if math.isnan(mean) else mean + 0.02 * (loss - mean)
            report(trainer, mean, (trainer.images - first) / (time.monotonic() - begun))
            if trainer.images % interval < trainer.config.training.batch_size:
                measure()
            elif time.monotonic() - saved_at >= save_seconds:
                save()
        if trainer.images != (trainer.history[-1]["images"] if trainer.history else first):
            measure()
    if team.any(bool(asked)):
        raise KeyboardInterrupt(
            f"stopped after {trainer.images} images, all saved; the same command with --resume goes on"
        )


@contextlib.contextmanager
def _signals() -> Generator[list[int]]:
    """A list of the stop signals that have come in, which is all that they do meanwhile: no step is cut in two."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield asked
        return
    before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _at(position: int, count: int, seed: int) -> int:
    """The picture at a position of the endless stream of shuffled epochs."""
    return int(_order(position // count, count, seed)[position % count])


_ORDERS: dict[tuple[int, int, int], Tensor] = {}


def _order(epoch: int, count: int, seed: int) -> Tensor:
    key = (epoch, count, seed)
    if key not in _ORDERS:
        while len(_ORDERS) >= 2:
            del _ORDERS[next(iter(_ORDERS))]
        _ORDERS[key] = torch.randperm(count, generator=torch.Generator().manual_seed(_mix(seed, -1 - epoch)))
    return _ORDERS[key]


def _mix(seed: int, step: int) -> int:
    """A generator's seed for a step; seeds of two steps differ by 2 or more, so that one between is free."""
    return (seed * 1_000_003 + step * 2) & (2**63 - 1)
