"""Nothing mixes devices: drawing, scoring and training on one that is not the CPU, as shapes alone (fake tensors).

What would fail on a GPU for standing on the CPU fails here, on a machine that has none.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ncml.network.ncpn import NCPN
from ncml.network.sde import process
from ncml.ood.measurements import measure_level
from ncml.sampling.cached import sample_cached
from ncml.sampling.sample import Conditions, Noise, score_function
from ncml.sampling.solvers import SOLVERS, tweedie
from ncml.training.batches import Batch
from ncml.training.objective import loss_bits
from tests.ncml import nets

T = 0.02
CONFIG = nets.config(((4, 1), (6, 1)), height=4, width=4)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device for which PyTorch has no code, only shapes; autocast does not know it."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("lazy:0")


def network(device: torch.device) -> NCPN:
    """A network that lies on it."""
    with device:
        return NCPN(CONFIG).requires_grad_(False)


def conditions(device: torch.device) -> Conditions:
    """Of three images, on it."""
    there = (torch.zeros(3, dtype=torch.long, device=device) for _ in range(2))
    return Conditions(T, *there)


def test_mixing_is_noticed(elsewhere: torch.device) -> None:
    """Or the other tests would prove nothing."""
    with pytest.raises(Exception, match="device"):
        network(elsewhere)(torch.zeros(1, 3, 4, 4), torch.zeros(1))


@pytest.mark.parametrize("first_row", [0, 2])
def test_sampling(elsewhere: torch.device, first_row: int) -> None:
    """From nothing, and from known rows."""
    x = torch.zeros(3, 3, 4, 4, device=elsewhere)
    noise = Noise([0, 1, 2], dtype=x.dtype, device=elsewhere).pixels(CONFIG.model.mixtures, 4, 4)
    sample_cached(network(elsewhere), x, conditions(elsewhere), noise, first_row=first_row, on_row=lambda row: False)
    assert x.device == elsewhere


@pytest.mark.parametrize("solver", ["tweedie", "euler-maruyama", "heun", "predictor-corrector"])
def test_solvers(elsewhere: torch.device, solver: str) -> None:
    """One step of each, with the network's own score."""
    x = torch.zeros(3, 3, 4, 4, device=elsewhere)
    noise = Noise([0, 1, 2], dtype=x.dtype, device=elsewhere)
    score = score_function(network(elsewhere), conditions(elsewhere))
    process_ = process(CONFIG.sde)
    if solver == "tweedie":
        after = tweedie(x, T, process=process_, score=score)
    else:
        step = SOLVERS[solver]
        after = step(x, T, T / 2, process=process_, score=score, normal=lambda: noise.normal(4, 4))
    assert after.device == elsewhere


def test_what_an_image_is_measured_by(elsewhere: torch.device) -> None:
    """Its likelihood, and all that statistics are made of."""
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    measurement = measure_level(
        network(elsewhere), pixels, T, ("bits", "direct", "fine", "coarse", "norm"), torch.zeros(3).long()
    )
    assert {part.device for part in (measurement.log_prob_BHW, *measurement.values.values())} == {elsewhere}


def test_a_training_step(elsewhere: torch.device) -> None:
    """Loss and gradients."""
    net = network(elsewhere).requires_grad_()
    index_B = torch.zeros(3, dtype=torch.long)
    batch = Batch(torch.zeros(3, 3, 4, 4), torch.full((3,), T), index_B, index_B, index_B).to(elsewhere)
    loss_bits(net, batch, bf16=False).mean().backward()
    assert all(p.grad is not None and p.grad.device == elsewhere for p in net.parameters())
