"""A training run: the network, its moving average, the optimiser, and the progress made.

Read `objective.py` for the loss and `batches.py` for the input of a step. The weights that are measured and saved in
the model folder are the moving average (EMA).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ncml.config import Config, TrainingConfig
from ncml.data.dataset import Dataset
from ncml.errors import InputError, TrainingError
from ncml.network.ncpn import NCPN
from ncml.network.sde import make_sde
from ncml.runtime import first_line
from ncml.training.batches import Batch, draw_batch, step_seed
from ncml.training.distributed import SINGLE_PROCESS, ProcessGroup, no_gradient_sync
from ncml.training.objective import loss_bits
from ncml.training.optimizer import Optimizer, learning_rate_share
from ncml.training.running_loss import RunningLoss
from ncml.training.state import KEPT, TrainingState, check_same_run

MAX_SKIPPED = 10
"""Consecutive steps whose loss or gradient may not be finite before the run counts as diverged."""

MAX_RETURNS = 3
"""Returns to the same saved state before the run counts as diverged."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is computed; the result is the same up to rounding."""

    grad_accum_steps: int = 1
    """Number of parts of a process's share of a batch, computed one after the other to save memory."""
    activation_checkpointing: bool = False
    """Store only the activations between the network's blocks and recompute the others: much less memory, a third more
    arithmetic."""
    compile: bool = False
    """Compile the network and the likelihood first, which takes minutes and a C++ compiler."""

    def check(self, batch_size: int, processes: int) -> None:
        """Raise InputError for a batch that cannot be divided into these parts."""
        parts = self.grad_accum_steps
        if parts < 1 or batch_size % (processes * parts):
            raise InputError(
                "batch-size",
                f"a batch of {batch_size} images cannot be divided into {parts} parts for each of {processes} "
                "processes; choose a batch size that is a multiple of their product.",
            )


DEFAULT_EXECUTION = Execution()


class Trainer:
    """A training run: network, moving average, optimiser and progress."""

    def __init__(
        self,
        config: Config,
        data: Dataset,
        *,
        initialize: Callable[[NCPN], None] = lambda network: None,
        group: ProcessGroup = SINGLE_PROCESS,
        execution: Execution = DEFAULT_EXECUTION,
    ) -> None:
        """initialize: called with the network, whose random weights it may replace in place."""
        if len(data) == 0:
            raise InputError("data", "there is no image to train on; at least 8 are needed.")
        execution.check(config.training.batch_size, group.world_size)
        self.config, self.data, self.group, self.execution = config, data, group, execution
        self.device = torch.device(group.device)
        torch.manual_seed(config.training.seed)
        network = NCPN(config)
        initialize(network)
        self.network = network.to(self.device).channels_last()
        self.network.activation_checkpointing = execution.activation_checkpointing
        self.average: AveragedModel = AveragedModel(
            self.network, multi_avg_fn=_ema_update(config.training), use_buffers=True
        )
        self.average.eval()  # no dropout: it is measured and saved, never trained
        self.optimizer = Optimizer(self.network, config.training)
        self.parallel = group.data_parallel(self.network)
        self.loss = torch.compile(loss_bits) if execution.compile else loss_bits
        self.starting_model = ""
        """The model whose weights the run began with, as name@version; "" for random weights."""
        self.step = 0
        self.skipped_steps = 0
        """Steps without effect: their loss or gradient was not finite, or `go_back` undid them."""
        self.skipped_in_a_row = 0
        self.returns = 0
        """Number of returns to the state that is saved."""
        self.grad_norm = torch.tensor(math.nan)
        """Global norm of the latest step's gradient, before clipping."""
        self.seconds = 0.0
        self.running_loss = RunningLoss(config.training.batch_size)
        self.history: list[dict[str, float]] = []
        """The learning curve: a row for each measurement."""
        self.saved = False
        """Whether there is a state to resume from."""

    @property
    def images_seen(self) -> int:
        """Images drawn so far."""
        return self.step * self.config.training.batch_size

    @property
    def finished(self) -> bool:
        """Whether the run has seen all images of its configuration."""
        return self.images_seen >= self.config.training.total_images

    @property
    def ema(self) -> NCPN:
        """The network with averaged weights."""
        network = self.average.module
        assert isinstance(network, NCPN)
        return network

    def set_length(self, total_images: int) -> None:
        """Make the run longer or shorter."""
        self._change(total_images=total_images)

    def cool_down(self, total_images: int) -> None:
        """Make the learning rate fall from its full value to 0 from now on, until `total_images` have been seen."""
        if total_images <= self.images_seen:
            raise InputError(
                "max-images",
                f"the run has seen {self.images_seen} images already; --max-images must be more than that.",
            )
        self._change(total_images=total_images, cooldown_fraction=1 - self.images_seen / total_images)
        # The state that was resumed belongs to the run that this one branches off.
        self.saved, self.running_loss.saved = False, math.nan

    def _change(self, **settings: Any) -> None:
        config = replace(self.config, training=replace(self.config.training, **settings))
        self.config = self.network.config = self.ema.config = config
        self.average.multi_avg_fn = _ema_update(config.training)

    def train_step(self) -> float:
        """Take one step of the optimiser; return the batch's mean loss in bits per dimension.

        A step whose loss or gradient is not finite changes no weight. Raises TrainingError after `MAX_SKIPPED` of them
        in a row, or if a weight is not finite.
        """
        loss_B, batch = self._compute_gradients()
        loss = self.group.all_reduce(loss_B.mean()) / self.group.world_size
        self.running_loss.include(loss)
        parameters = list(self.network.parameters())
        self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if math.isfinite(loss) and torch.isfinite(self.grad_norm):
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.training.grad_clip, self.grad_norm)
            self.optimizer.step(learning_rate_share(self.config.training, self.images_seen))
            self.average.update_parameters(self.network)
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row == MAX_SKIPPED or not all(p.isfinite().all() for p in parameters):
                raise TrainingError(self._describe_divergence(loss_B, batch))
        self.network.zero_grad()
        self.step += 1
        return loss

    def measure_step_seconds(self) -> float:
        """Return the seconds that a step takes, without taking one: a copy of the network is updated instead."""
        twin = copy.deepcopy(self.network)
        optimizer = Optimizer(twin, self.config.training)
        average = AveragedModel(twin, multi_avg_fn=_ema_update(self.config.training), use_buffers=True)
        start = 0.0
        for _ in range(2):  # the first also initialises kernels and moments
            start = time.perf_counter()
            self._compute_gradients()
            for updated, parameter in zip(twin.parameters(), self.network.parameters(), strict=True):
                updated.grad = parameter.grad
            optimizer.step(0.0)
            average.update_parameters(twin)
            self.network.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return self.group.all_reduce(time.perf_counter() - start) / self.group.world_size

    def _compute_gradients(self) -> tuple[Tensor, Batch]:
        """Leave gradients in the parameters; return the loss of each item, and this process's share of the batch."""
        training, parts = self.config.training, self.execution.grad_accum_steps
        # For dropout, which differs between processes.
        torch.manual_seed(step_seed(training.seed + self.group.rank, self.step) ^ 1)
        batch = draw_batch(self.data, self.config, self.step)[self.group.shard(training.batch_size)].to(self.device)
        losses: list[Tensor] = []
        for part in range(parts):
            with no_gradient_sync(self.parallel, part < parts - 1):
                items = batch[slice(part, None, parts)] if parts > 1 else batch
                loss_B = self.loss(self.parallel, items, bf16=training.precision == "bf16")
                (loss_B.mean() / parts).backward()
            losses.append(loss_B.detach())
        return torch.stack(losses, 1).flatten(), batch

    def _describe_divergence(self, loss_B: Tensor, batch: Batch) -> str:
        named = list(self.network.named_parameters())
        culprits = [f"the weight {n} is" for n, p in named if not p.isfinite().all()]
        culprits += [f"the gradient of {n} is" for n, p in named if p.grad is not None and not p.grad.isfinite().all()]
        culprit = f" and {culprits[0]} not finite" if culprits else ""
        not_finite = (~loss_B.isfinite()).nonzero().flatten()
        worst = int(not_finite[0]) if len(not_finite) else int(loss_B.argmax())
        noise = make_sde(self.config.sde).grey_levels_at(float(batch.t_B[worst]))
        return (
            f"training diverged at step {self.step} ({self.images_seen} images): {len(not_finite)} of the batch's "
            f"{len(loss_B)} losses are not finite, the worst is {float(loss_B[worst]):.4g} bits/dim of image "
            f"{int(batch.index_B[worst])} of the training part at {noise:.3g} grey levels of noise{culprit}; "
            f"{self._remedy} with a lower --learning-rate."
        )

    @property
    def _remedy(self) -> str:
        return "the last saved state is intact: --resume" if self.saved else "nothing was saved yet: start again"

    def save(self, path: Path) -> None:
        """Write the run's state to a file atomically, in rank 0; raise TrainingError where that fails."""
        if self.group.is_main:
            self._write(path)
        self._note_saved()

    def _note_saved(self) -> None:
        self.saved, self.returns = True, 0
        self.running_loss.note_saved()

    def _write(self, path: Path) -> None:
        parts = {"network": self.network, "average": self.average, "optimizer": self.optimizer}
        state = TrainingState(
            tensors={f"{part}.{k}": v for part, holder in parts.items() for k, v in holder.state_dict().items()},
            config=self.config,
            step=self.step,
            skipped_steps=self.skipped_steps,
            seconds=self.seconds,
            mean_loss=self.running_loss.mean,
            history=self.history,
            images=self.data.inventory.order,
            starting_model=self.starting_model,
        )
        try:
            state.write(path)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"the run cannot be saved to {path} after {self.images_seen} images ({error}): free disk space; "
                f"{self._remedy}."
            ) from error

    def resume(self, path: Path, *, total_images: int | None = None) -> None:
        """Continue a saved run exactly.

        Raises TrainingError if the file is damaged or of another run, and InputError if it began with other images or
        has seen more than `total_images`.

        total_images: the run's new length; None keeps it.
        """
        state = TrainingState.read(path)
        check_same_run(path, state.config, self.config)
        if state.images is not None:
            state.images.check(self.data.inventory.order)
        self._change(**{name: getattr(state.config.training, name) for name in KEPT})
        if total_images is not None:
            batch_size = self.config.training.batch_size
            images_seen = state.step * batch_size
            if total_images <= images_seen - batch_size:  # the last batch may exceed the length
                raise InputError(
                    "max-images",
                    f"the run has seen {images_seen} images already; --max-images must be at least that, or be "
                    "omitted.",
                )
            self.set_length(total_images)
        self._load(state, path)
        self.step, self.skipped_steps, self.seconds = state.step, state.skipped_steps, state.seconds
        self.running_loss.mean, self.running_loss.count = state.mean_loss, state.step
        self.history, self.starting_model = state.history, state.starting_model
        self._note_saved()

    def go_back(self, path: Path) -> str:
        """Restore the weights and moments of the saved state, because the loss has risen since; return what was done.

        The steps since then count as skipped, and the run continues with the batches after theirs: with the same ones,
        it would diverge again. Raises TrainingError for a state that was returned to `MAX_RETURNS` times already.
        """
        rise = f"the loss rose from {self.running_loss.saved:.3f} to {self.running_loss.mean:.3f} bits/dim"
        state = TrainingState.read(path)
        images_saved = state.step * self.config.training.batch_size
        if self.returns == MAX_RETURNS:
            raise TrainingError(
                f"training diverged at step {self.step} ({self.images_seen} images): {rise}, as it did after each of "
                f"{MAX_RETURNS} returns to the state of {images_saved} images; {self._remedy} with a lower "
                "--learning-rate."
            )
        self._load(state, path)
        self.skipped_steps = state.skipped_steps + self.step - state.step
        self.running_loss.mean = state.mean_loss
        self.returns += 1
        return (
            f"{rise}: training continues with the weights saved after {images_saved:,} images, without those up to "
            f"{self.images_seen:,}"
        )

    def _load(self, state: TrainingState, path: Path) -> None:
        """Load the tensors of a state; raise TrainingError for those of another network."""
        try:
            self.network.load_state_dict(state.part("network"))
            self.average.load_state_dict(state.part("average"))
            self.optimizer.load_state_dict(state.part("optimizer"))
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            reason = first_line(error)
            raise TrainingError(f"{path} does not match the run that it names: {reason}.") from error


def _ema_update(training: TrainingConfig) -> Callable[[Any, Any, Any], None]:
    """Return the moving average's update, with a shorter horizon at first so that it forgets the random weights."""
    decay = max(0.0, 1 - training.batch_size / training.ema_images)  # a horizon within a batch: the latest weights

    def update(average: Any, current: Any, updates: Any) -> None:
        n = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(average, current, updates)

    return update
