"""The optimiser and its schedule: Muon for the matrices and kernels of the network's body, Adam for everything else."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from ncml.config import TrainingConfig
from ncml.training.muon import Muon

EDGES = ("head.", "stem.", "conditioning.")
"""Prefixes of weights that Adam trains: they read pixels and conditions or write the mixture's parameters."""

EMBEDDINGS = ("conditioning.label.", "conditioning.orientation.")

FUSED = {"project": 6, "conv_out": 2}
"""Layers with several matrices fused along their output, and how many: each matrix is orthogonalised separately."""

MOMENTUM = 0.95


def learning_rate_share(training: TrainingConfig, images_seen: int) -> float:
    """Return the share of the learning rates that applies after this many images, in [0, 1].

    Linear warm-up, over a fifth of the run at most; constant; linear cool-down to 0 at the end of the run.
    """
    warmup = max(1.0, min(training.warmup_images, training.total_images / 5))
    cooldown = max(1.0, training.cooldown_fraction * training.total_images)
    remaining = training.total_images - images_seen
    return max(0.0, min(1.0, (images_seen + training.batch_size) / warmup, remaining / cooldown))


class Optimizer:
    """Muon and Adam over the parameters of one network, or Adam alone where `muon_learning_rate` is None.

    The network must be channels-last in memory: Muon trains views of its kernels as matrices [out, kh kw in], and of
    transposed convolutions as [in, kh kw out].
    """

    def __init__(self, network: nn.Module, training: TrainingConfig) -> None:
        adam: dict[str, dict[str, Tensor]] = {"weights": {}, "embeddings": {}}
        self.weights: list[tuple[nn.Parameter, list[Tensor]]] = []
        """Each weight that Muon trains, with its matrices: detached views of it."""
        matrices: dict[str, Tensor] = {}
        for name, parameter in network.named_parameters():
            if training.muon_learning_rate is not None and _is_trained_by_muon(name, parameter):
                views = _as_matrices(name, parameter.detach())
                self.weights.append((parameter, views))
                matrices |= {f"{name}.{part}": view for part, view in enumerate(views)}
            else:
                adam["embeddings" if name.startswith(EMBEDDINGS) else "weights"][name] = parameter
        groups = [
            {"params": list(adam["weights"].values()), "base_lr": training.learning_rate},
            {
                "params": list(adam["embeddings"].values()),
                "base_lr": training.learning_rate * training.embedding_lr_multiplier,
            },
        ]
        groups = [group for group in groups if group["params"]]
        self.parts: list[tuple[torch.optim.Optimizer, list[str]]] = [
            (torch.optim.Adam(groups, betas=training.betas, foreach=True), [*chain(*adam.values())])
        ]
        """Each optimiser with the names of its parameters, in its own order."""
        if training.muon_learning_rate is not None:
            group = {"params": list(matrices.values()), "base_lr": training.muon_learning_rate}
            muon = Muon([group], momentum=MOMENTUM, weight_decay=training.muon_weight_decay)
            self.parts.append((muon, list(matrices)))

    def step(self, share: float) -> None:
        """Update the parameters by their gradients.

        share: the share of the learning rates that applies.
        """
        for weight, matrices in self.weights:
            assert weight.grad is not None
            gradients = weight.grad.movedim(1, -1).flatten(1).chunk(len(matrices))
            for matrix, gradient in zip(matrices, gradients, strict=True):
                matrix.grad = gradient
        for optimizer, _ in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = share * group["base_lr"]
            optimizer.step()
        for _, matrices in self.weights:
            for matrix in matrices:
                matrix.grad = None  # else they would be kept during the next backward pass

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moments, named by the parameter (with the number of its matrix) and the moment."""
        return {
            f"{names[index]}.{moment}": value
            for optimizer, names in self.parts
            for index, moments in optimizer.state_dict()["state"].items()
            for moment, value in moments.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`; raise ValueError for the moments of another network."""
        remaining = dict(state)
        for optimizer, names in self.parts:
            index = {name: i for i, name in enumerate(names)}
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments: dict[int, dict[str, Tensor]] = {}
            for key in state:
                name, _, moment = key.rpartition(".")
                if name in index:
                    value, like = remaining.pop(key), parameters[index[name]]
                    if value.shape == like.shape:  # files have no strides, and steps are slower with other ones
                        value = torch.empty_like(like).copy_(value)
                    moments.setdefault(index[name], {})[moment] = value
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        if remaining:
            raise ValueError(f"moments of {next(iter(remaining))}, which this network does not have")


def _is_trained_by_muon(name: str, parameter: Tensor) -> bool:
    """Return whether a weight is a matrix or kernel of the body; a block's projection of its conditions is not."""
    return parameter.ndim >= 2 and not name.startswith(EDGES) and ".condition." not in name


def _as_matrices(name: str, weight: Tensor) -> list[Tensor]:
    """Return views [out, kh kw in] of a weight [out, in, kh, kw], one for each matrix fused in it.

    A transposed convolution has a weight [in, out, kh, kw], and so one view [in, kh kw out].
    """
    return list(weight.movedim(1, -1).view(len(weight), -1).chunk(FUSED.get(name.split(".")[-2], 1)))
