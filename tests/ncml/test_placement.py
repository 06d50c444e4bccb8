"""Sampling, scoring and training on a device other than the CPU do not mix devices, tested with fake tensors.

A tensor left on the CPU, which would fail on a GPU, fails here on a machine without one.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ncml.network.ncpn import NCPN
from ncml.network.sde import make_sde
from ncml.ood.measurements import measure_level
from ncml.sampling.cached import sample_cached
from ncml.sampling.conditions import NO_TILT, Conditions, Tilt
from ncml.sampling.sample import BatchDraws, make_grad_log_prob
from ncml.sampling.solvers import SOLVERS, tweedie
from ncml.training.batches import Batch
from ncml.training.objective import loss_bits
from tests.ncml import nets

T = 0.02
CONFIG = nets.config(((4, 1), (6, 1)), height=4, width=2)


@pytest.fixture
def other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device for which PyTorch has no code, only shapes; autocast does not know it."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("lazy:0")


def network(device: torch.device) -> NCPN:
    """Return a network on the device."""
    with device:
        return NCPN(CONFIG).requires_grad_(False)


def conditions(device: torch.device) -> Conditions:
    """Return conditions of three images, on the device."""
    index_B = torch.zeros(3, dtype=torch.long, device=device)
    return Conditions(T, index_B, index_B)


def test_mixed_devices_are_detected(other_device: torch.device) -> None:
    """If the device accepted mixed tensors, the other tests would prove nothing."""
    with pytest.raises(Exception, match="device"):
        network(other_device)(torch.zeros(1, 3, 4, 2), torch.zeros(1))


@pytest.mark.parametrize(("first_row", "tilt"), [(2, NO_TILT), (0, Tilt(temperature=0.9)), (2, Tilt(2.0, 0.9))])
def test_sampling(other_device: torch.device, first_row: int, tilt: Tilt) -> None:
    """Sample whole images, and complete known rows; nothing waits for a value, which a fake tensor lacks."""
    x = torch.zeros(3, 3, 4, 2, device=other_device)
    draws = BatchDraws([0, 1, 2], dtype=x.dtype, device=other_device).draw_pixels(CONFIG.model.mixtures, 4, 2)
    known_rows = replace(conditions(other_device), first_row=first_row, tilt=tilt)
    sample_cached(network(other_device), x, known_rows, draws, lambda row: False)
    assert x.device == other_device


@pytest.mark.parametrize("solver", ["tweedie", "euler-maruyama", "heun", "predictor-corrector"])
def test_solvers_stay_on_their_device(other_device: torch.device, solver: str) -> None:
    """One step of each, with the gradient of the network's log-density."""
    x = torch.zeros(3, 3, 4, 2, device=other_device)
    draws = BatchDraws([0, 1, 2], dtype=x.dtype, device=other_device)
    evaluate = make_grad_log_prob(network(other_device), conditions(other_device))
    sde = make_sde(CONFIG.sde)
    if solver == "tweedie":
        after = tweedie(x, T, sde=sde, grad_log_prob=evaluate)
    else:
        step = SOLVERS[solver]
        after = step(x, T, T / 2, sde=sde, grad_log_prob=evaluate, draw_normal=lambda: draws.draw_normal(4, 2))
    assert after.device == other_device


def test_measurements_stay_on_their_device(other_device: torch.device) -> None:
    """The likelihood of an image, and everything that statistics use."""
    pixels = np.zeros((3, 4, 2, 3), np.uint8)
    measurement = measure_level(
        network(other_device), pixels, T, ("bits", "direct", "fine", "coarse", "norm"), torch.zeros(3).long()
    )
    parts = (measurement.log_prob_BHW, measurement.log_mixture_BHW, *measurement.values.values())
    assert {part.device for part in parts} == {other_device}


def test_a_training_step_stays_on_its_device(other_device: torch.device) -> None:
    """Loss and gradients."""
    net = network(other_device).requires_grad_()
    index_B = torch.zeros(3, dtype=torch.long)
    batch = Batch(torch.zeros(3, 3, 4, 2), torch.full((3,), T), index_B, index_B, index_B).to(other_device)
    loss_bits(net, batch, bf16=False).mean().backward()
    assert all(p.grad is not None and p.grad.device == other_device for p in net.parameters())
