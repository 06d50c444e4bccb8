"""Sampling, scoring, training and detectors on a GPU: nothing mixes devices, and the results are those of the CPU.

A tensor left on the CPU, which would fail on a GPU, fails on the emulated one.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ncml
from ncml.calibration.detector import make_detector
from ncml.data.good_images import open_folder
from ncml.network.ncpn import NCPN
from ncml.network.sde import make_sde
from ncml.ood.judging import Detector
from ncml.ood.measurements import measure_level
from ncml.results import Detection
from ncml.sampling.cached import RowSampler, sample_cached
from ncml.sampling.conditions import NO_TILT, Conditions, Tilt
from ncml.sampling.cuda_graphs import ReplaySampler
from ncml.sampling.sample import BatchDraws, Sampler, make_grad_log_prob
from ncml.sampling.solvers import SOLVERS, tweedie
from ncml.training.batches import Batch
from ncml.training.objective import loss_bits
from tests.detectors import turned_image, use_small_scale
from tests.ncml import nets
from tests.ncml.emulated_gpu import DeviceTensor, NoTransfers, emulated_gpu

T = 0.02
CONFIG = nets.config(((4, 1), (6, 1)), height=4, width=2)
CPU = torch.device("cpu")


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """An emulated GPU."""
    with emulated_gpu() as device:
        yield device


def network(device: torch.device) -> NCPN:
    """Return a network on a device."""
    return nets.network(CONFIG, dtype=torch.float32, spread=0.08).to(device)


def conditions(device: torch.device) -> Conditions:
    """Return the conditions of three images, on a device."""
    on_cpu = nets.conditions(3, T, CONFIG)
    return Conditions(T, on_cpu.class_B.to(device), on_cpu.orientation_B.to(device))


def images(device: torch.device) -> Tensor:
    """Return three images in [-1, 1], on a device."""
    return (torch.rand(3, 3, 4, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(device)


def draws(device: torch.device) -> BatchDraws:
    """Return the draws of three images, on a device."""
    return BatchDraws([0, 1, 2], dtype=torch.float32, device=device)


def assert_same(on_gpu: Tensor | None, on_cpu: Tensor | None) -> None:
    """Compare a result of the GPU with that of the CPU."""
    assert isinstance(on_gpu, DeviceTensor)
    torch.testing.assert_close(on_gpu.inner, on_cpu, rtol=1e-5, atol=1e-5)


def test_the_emulated_gpu_refuses_what_a_gpu_refuses(gpu: torch.device) -> None:
    """If it accepted everything, the other tests would prove nothing."""
    with pytest.raises(RuntimeError, match="two devices"):
        network(gpu)(torch.zeros(1, 3, 4, 2), torch.zeros(1, device=gpu))
    x = torch.arange(3.0, device=gpu)
    with pytest.raises(RuntimeError, match="two devices"):
        torch.arange(3)[x.long()]
    with pytest.raises(RuntimeError, match="numpy"):
        np.asarray(x)
    assert (x[torch.tensor([2, 0])] + torch.tensor(1)).tolist() == [3, 1]
    with NoTransfers():
        moves = [lambda: float(x[0]), x.cpu, x.tolist, x.nonzero, lambda: x[x > 1], lambda: torch.tensor(1, device=gpu)]
        for move in (*moves, lambda: x[torch.tensor([0])], lambda: x * torch.tensor(2.0)):
            with pytest.raises(RuntimeError, match="values move between CPU and device"):
                move()


@pytest.mark.parametrize("sampler", [sample_cached, ReplaySampler()], ids=["cached", "padded"])
@pytest.mark.parametrize(("first_row", "tilt"), [(2, NO_TILT), (0, Tilt(temperature=0.9)), (2, Tilt(2.0, 0.9))])
def test_sampling(
    gpu: torch.device, first_row: int, tilt: Tilt, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample whole images, and complete known rows; every row can be recorded."""
    sample_row, results = RowSampler.sample_row, list[Tensor]()

    def sample_without_transfers(self: RowSampler, i: int) -> None:
        with NoTransfers():
            sample_row(self, i)

    monkeypatch.setattr(RowSampler, "sample_row", sample_without_transfers)
    for device in (gpu, CPU):
        x, net = images(device), network(device)
        known_rows = replace(conditions(device), first_row=first_row, tilt=tilt)
        pixel_draws = draws(device).draw_pixels(CONFIG.model.mixtures, 4, 2)
        with torch.inference_mode():
            sampler(net, x, known_rows, pixel_draws, lambda row: False)
        results.append(x)
    assert not torch.equal(results[1], images(CPU))
    assert_same(*results)


@pytest.mark.parametrize("solver", ["tweedie", "euler-maruyama", "heun", "predictor-corrector"])
def test_solvers(gpu: torch.device, solver: str) -> None:
    """One step of each, with the gradient of the network's log-density."""
    sde = make_sde(CONFIG.sde)
    results: list[Tensor] = []
    for device in (gpu, CPU):
        x, noise = images(device), draws(device)
        evaluate = make_grad_log_prob(network(device), replace(conditions(device), tilt=Tilt(2.0)))
        if solver == "tweedie":
            results.append(tweedie(x, T, sde=sde, grad_log_prob=evaluate))
        else:
            step = SOLVERS[solver]
            draw_normal = lambda noise=noise: noise.draw_normal(4, 2)  # noqa: E731
            results.append(step(x, T, T / 2, sde=sde, grad_log_prob=evaluate, draw_normal=draw_normal))
    assert_same(*results)


def test_measurements(gpu: torch.device) -> None:
    """The likelihood of an image, and everything that statistics use."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 2, 3), np.uint8)
    parts = ("bits", "direct", "fine", "coarse", "norm")
    on_gpu, on_cpu = (measure_level(network(d), pixels, T, parts, torch.zeros(3).long()) for d in (gpu, CPU))
    assert_same(on_gpu.log_prob_BHW, on_cpu.log_prob_BHW)
    assert_same(on_gpu.log_mixture_BHW, on_cpu.log_mixture_BHW)
    for name, value in on_gpu.values.items():
        assert_same(value, on_cpu.values[name])


def test_a_training_step(gpu: torch.device) -> None:
    """Loss and gradients."""
    networks = [network(device).requires_grad_() for device in (gpu, CPU)]
    for net, device in zip(networks, (gpu, CPU), strict=True):
        index_B = torch.zeros(3, dtype=torch.long)
        batch = Batch(images(CPU), torch.full((3,), T), index_B, index_B, index_B).to(device)
        loss_bits(net, batch, bf16=False).mean().backward()
    for on_gpu, on_cpu in zip(*(net.parameters() for net in networks), strict=True):
        assert_same(on_gpu.grad, on_cpu.grad)


def test_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one that brings parts to one position and knows defects, and judge with it."""
    use_small_scale(monkeypatch)
    for steps in ("COARSE_STEPS", "FINE_STEPS"):  # most operations of a judgement are steps of alignment
        monkeypatch.setattr(f"ncml.ood.views.alignment.{steps}", 2)

    def defective_image(seed: int) -> np.ndarray:
        image = turned_image(seed)
        image[32:40, 44:52] = np.random.default_rng(seed).integers(0, 256, (8, 8, 3))
        return image

    for name, make, seeds in (("good", turned_image, range(32)), ("defective", defective_image, range(100, 110))):
        (tmp_path / name).mkdir()
        for seed in seeds:
            Image.fromarray(make(seed)).save(tmp_path / name / f"{seed:03}.png")
    good, defective = (
        open_folder(tmp_path / name, sorted((tmp_path / name).iterdir())) for name in ("good", "defective")
    )
    model = ncml.load("detector-base")

    def judge(device: str) -> list[Detection]:
        made = make_detector(model, good, tmp_path / device, defective=defective, power_images=0, device=device)
        assert made.calibration.aligns
        detector = Detector.load(tmp_path / device, made.calibration, device)
        return [detector.judge(make(seed)) for seed in (200, 201) for make in (turned_image, defective_image)]

    on_cpu = judge("cpu")
    with emulated_gpu() as gpu:
        on_gpu = judge(str(gpu))
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert (one.p_value, one.view, one.box) == (other.p_value, other.view, other.box)
        np.testing.assert_allclose(one.map, other.map, rtol=1e-4, atol=1e-4)
