"""Muon compared with its definition, and the division of the parameters between Muon and Adam."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ncml.config import TrainingConfig
from ncml.network.ncpn import NCPN
from ncml.recipes import cifar10_small, smoke
from ncml.training.muon import COEFFICIENTS, EPSILON, ITERATIONS, Muon, orthogonalize
from ncml.training.optimizer import FUSED, Optimizer

TRAINING = TrainingConfig(learning_rate=1e-3, muon_learning_rate=4e-3, embedding_lr_multiplier=5.0)


def network(seed: int = 0) -> NCPN:
    """The smoke recipe's network, with random gradients."""
    torch.manual_seed(seed)
    net = NCPN(smoke()).channels_last()
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    return net


def orthogonalised(gradient: Tensor) -> Tensor:
    """Compute U V^T of the singular value decomposition, which Newton-Schulz approximates."""
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    return u @ vh


def test_a_first_update_of_muon_is_the_orthogonalised_gradient() -> None:
    """Each fused matrix is orthogonalised separately; Newton-Schulz moves its singular values close to 1."""
    net = network()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    Optimizer(net, TRAINING).step(0.5)
    checked = 0
    for name, p in net.named_parameters():
        if p.ndim < 2 or name.startswith(("head.", "stem.", "conditioning.")) or ".condition." in name:
            continue
        parts = FUSED.get(name.split(".")[-2], 1)
        assert p.grad is not None
        update, gradient = (t.movedim(1, -1).flatten(1).chunk(parts) for t in (before[name] - p.detach(), p.grad))
        for u, g in zip(update, gradient, strict=True):
            u = u / (0.5 * 4e-3 * 0.2 * max(u.shape) ** 0.5)
            values = torch.linalg.svdvals(u)
            assert values.median() > 0.5, name
            assert values.max() < 1.5, name
            expected = orthogonalised(g)
            assert (u * expected).sum() > 0.9 * u.norm() * expected.norm(), name
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (48, 48)])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_muon_agrees_with_the_one_of_pytorch_which_computes_in_bf16(shape: tuple[int, int], decay: float) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    ours, reference = matrix.clone(), matrix.clone()
    muon = Muon([{"params": [ours], "lr": 4e-3}], momentum=0.95, weight_decay=decay)
    twin = torch.optim.Muon([reference], lr=4e-3, momentum=0.95, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        gradient = torch.randn(shape)
        ours.grad, reference.grad = gradient, gradient.clone()
        muon.step()
        twin.step()
    expected = reference - matrix
    assert torch.linalg.norm(ours - reference) < 0.02 * torch.linalg.norm(expected)
    assert torch.equal(muon.state[ours]["momentum_buffer"], twin.state[reference]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(32, 384), (384, 32), (128, 128)])
@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6, 0.0])
def test_the_iteration_of_the_gram_matrix_is_that_of_the_matrix(shape: tuple[int, int], smallest: float) -> None:
    """Singular values fall from 1 to the smallest; with 0, a quarter of them are 0."""
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    rank = min(shape)
    values = torch.logspace(0, math.log10(smallest or 1e-3), rank, dtype=torch.float64)
    if smallest == 0:
        values[-rank // 4 :] = 0
    gradient = u * values @ vh
    a, b, c = COEFFICIENTS
    expected = gradient / gradient.norm()
    for _ in range(ITERATIONS):
        gram = expected @ expected.mT
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    assert torch.linalg.norm(orthogonalize(gradient.float()[None])[0] - expected) < 2e-3 * torch.linalg.norm(expected)


def test_an_update_shrinks_with_a_gradient_that_vanishes() -> None:
    """Behind a closed gate gradients have norms of 1e-10; steps of full size would let the weights grow by chance."""
    torch.manual_seed(0)
    gradient = torch.randn(1, 32, 96)
    gradient /= gradient.norm()
    full = orthogonalize(gradient).norm()
    usual, half, none, zero = (
        float(orthogonalize(gradient * scale).norm() / full) for scale in (1e-4, EPSILON, 1e-10, 0.0)
    )
    assert usual == pytest.approx(1, rel=0.02)
    assert half == pytest.approx(0.5, rel=0.1)
    assert none < 1e-3
    assert zero == 0


def test_adam_trains_the_edges_and_embeddings_learn_faster() -> None:
    """Adam's first step moves every element by its learning rate."""
    net = network()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    Optimizer(net, TRAINING).step(1.0)
    moved = {name: (p.detach() - before[name]).abs() for name, p in net.named_parameters()}
    assert torch.allclose(moved["head.weight"], torch.full_like(moved["head.weight"], 1e-3), rtol=1e-3)
    assert torch.allclose(moved["stem.u.weight"], torch.full_like(moved["stem.u.weight"], 1e-3), rtol=1e-3)
    for name in ("conditioning.label.weight", "conditioning.orientation.weight"):
        assert torch.allclose(moved[name], torch.full_like(moved[name], 5e-3), rtol=1e-3)


@pytest.mark.parametrize("muon_rate", [None, 4e-3])
def test_moments_are_loaded_as_they_were_saved(muon_rate: float | None) -> None:
    training = replace(TRAINING, muon_learning_rate=muon_rate)
    first, second = network(0), network(1)
    optimizer, other = Optimizer(first, training), Optimizer(second, training)
    optimizer.step(1.0)
    second.load_state_dict(first.state_dict())
    stored = {name: moment.contiguous().clone() for name, moment in optimizer.state_dict().items()}
    other.load_state_dict(stored)
    loaded = other.state_dict()
    assert all(moment.stride() == loaded[name].stride() for name, moment in optimizer.state_dict().items())
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    optimizer.step(1.0)
    other.step(1.0)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_moments_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match="which this network does not have"):
        Optimizer(network(), TRAINING).load_state_dict(
            {"up.9.0.u_block.conv_in.weight.0.momentum_buffer": torch.ones(1)}
        )


def test_every_parameter_is_trained_once() -> None:
    """Each parameter has one optimiser; the views of a fused weight cover it."""
    net = NCPN(cifar10_small()).channels_last()
    optimizer = Optimizer(net, TRAINING)
    trained = sum(p.numel() for part, _ in optimizer.parts for group in part.param_groups for p in group["params"])
    assert trained == sum(p.numel() for p in net.parameters())
