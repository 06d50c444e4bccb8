"""The cached sampler equals the naive one: the same images from the same draws."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ncml.config import Config, LevelConfig, ModelConfig
from ncml.limits import KEEPS, Keep
from ncml.network.layers import CausalConv, Grow
from ncml.network.mixture import from_uint8, group_by_component, to_uint8
from ncml.network.ncpn import NCPN
from ncml.network.sde import end_time
from ncml.recipes import cifar10_small
from ncml.sampling.batch_invariance import GroupedSampler, choose_batching
from ncml.sampling.batching import passes
from ncml.sampling.cached import NetworkCache, sample_cached, sampler, visit_pixels
from ncml.sampling.conditions import Conditions, Tilt
from ncml.sampling.defaults import SamplingSettings
from ncml.sampling.sample import BatchDraws, Plan, generate_images, sample_naive
from ncml.sampling.solvers import SOLVERS
from tests.ncml import nets

CPU = torch.device("cpu")
T = 0.02

SHAPES = {
    "1 level, no attention": nets.config(((4, 1),), attention=False, mixtures=1),
    "1 level, two blocks": nets.config(((4, 2),), height=4, width=6, classes=()),
    "1 level, odd size": nets.config(((4, 1),), height=5, width=7),
    "2 levels": nets.config(((4, 1), (6, 1)), orientations=False),
    "2 levels, wide, blocks below only": nets.config(((4, 0), (6, 2)), height=4, width=12),
    "2 levels, tall, no attention": nets.config(((4, 1), (6, 1)), height=12, width=8, attention=False),
    "3 levels, wide": nets.config(((4, 1), (6, 0), (8, 1)), width=12),
    "3 levels, no attention": nets.config(((4, 1), (6, 1), (8, 1)), attention=False, classes=(), orientations=False),
    "3 levels, deep": nets.config(((4, 2), (6, 1), (8, 2))),
}


def make_draws(config: Config, count: int, dtype: torch.dtype = torch.float64) -> BatchDraws:
    return BatchDraws(list(range(count)), dtype=dtype, device=CPU)


@torch.inference_mode()
def sample_reference(net: NCPN, conditions: Conditions) -> Tensor:
    """Sample images with the naive sampler, [B, 3, H, W]."""
    model, count = net.config.model, len(conditions.class_B)
    H, W = model.height, model.width
    x = torch.zeros(count, 3, H, W, dtype=net.head.weight.dtype)
    draws = make_draws(net.config, count, x.dtype).draw_pixels(model.mixtures, H, W)
    sample_naive(net, x, conditions, draws, lambda row: False)
    return x


@pytest.mark.parametrize("t", [0.0, T], ids=["clean", "noisy"])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_both_samplers_agree_from_every_known_prefix(config: Config, t: float) -> None:
    """Compare in fp64. Unknown rows start as NaN, so that nothing is read before it is sampled."""
    net = nets.network(config, spread=0.08)
    conditions = nets.conditions(3, t, config, orientation=2 * config.model.orientations)
    expected = sample_reference(net, conditions)
    assert expected.isfinite().all()
    _, _, H, W = expected.shape
    draws = make_draws(config, 3).draw_pixels(config.model.mixtures, H, W)
    # At t = 0 only the choice of a grey level differs, so a few prefixes suffice.
    for first_row in range(H + 1) if t else (0, 1, H // 2, H):
        x = torch.full_like(expected, torch.nan)
        x[:, :, :first_row] = expected[:, :, :first_row]
        with torch.inference_mode():
            sample_cached(net, x, replace(conditions, first_row=first_row), draws, lambda row: False)
        assert torch.equal(x[:, :, :first_row], expected[:, :, :first_row])
        assert torch.allclose(x, expected, rtol=0, atol=1e-9), f"known rows: {first_row}"


@pytest.mark.parametrize("shape", ["1 level, odd size", "2 levels", "3 levels, wide"])
def test_known_rows_of_several_images_can_be_computed_in_one_pass(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; with guidance, an image has two rows of the batch."""
    config = SHAPES[shape]
    net = nets.network(config, spread=0.08)
    conditions = replace(nets.conditions(3, T, config), tilt=Tilt(2.0, 0.9), first_row=config.model.height // 2)
    H, W = config.model.height, config.model.width
    draws = make_draws(config, 3).draw_pixels(config.model.mixtures, H, W)
    known_BCHW = torch.rand(3, 3, H, W, dtype=torch.float64) * 2 - 1
    images: list[Tensor] = []
    for device_type in ("cpu", "cuda"):
        with torch.inference_mode(), monkeypatch.context() as patch:
            patch.setattr(sampler, "passes", lambda rows, _, on=device_type: passes(rows, on))
            images.append(known_BCHW.clone())
            sample_cached(net, images[-1], conditions, draws, lambda row: False)
    assert not torch.equal(images[0], known_BCHW)
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-9)


@torch.inference_mode()
def cached_parameters(net: NCPN, x: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
    """Compute the mixtures of given pixels with the caches: logits [B, K, H, W] and components [B, K, 9, H, W]."""
    _, _, H, W = x.shape
    mixtures = []

    def choose(i: int, j: int, logits: Tensor, components: Tensor) -> Tensor:
        mixtures.append([logits.clone(), components.clone()])
        return x[:, :, i, j]

    visit_pixels(net, x, conditions, choose, on_row=lambda row: False)
    logits, components = (torch.stack(part, -1).unflatten(-1, (H, W)) for part in zip(*mixtures, strict=True))
    return logits, components


@torch.inference_mode()
def whole_parameters(net: NCPN, x: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
    """Compute the same with one pass of the network."""
    out = net(x, conditions.t_B, conditions.class_B, conditions.orientation_B)
    _, _, H, W = x.shape
    logits, components = group_by_component(out.permute(0, 2, 3, 1).flatten(0, 2), net.config.model.mixtures)
    return tuple(part.unflatten(0, (-1, H, W)).movedim((1, 2), (-2, -1)) for part in (logits, components))  # type: ignore[return-value]


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_parameters_agree_in_fp32(config: Config) -> None:
    """Compare the parameters of every pixel, to 1e-5 of their size."""
    net = nets.network(config, dtype=torch.float32)
    conditions = nets.conditions(3, T, config)
    x = torch.rand(3, 3, config.model.height, config.model.width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for actual, expected in zip(
        cached_parameters(net, x, conditions), whole_parameters(net, x, conditions), strict=True
    ):
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def cached_inputs(cache: NetworkCache, i: int) -> Iterator[tuple[nn.Module, int, Tensor]]:
    """Yield, after pixel row i: layers, a row of their level, and their input there from the caches."""
    net = cache.network
    for index, level in enumerate(cache.levels):
        if i % 2**index:
            continue  # this level does not move
        row = i >> index
        grown = level.grown[row % 2]
        for blocks, before in ((level.up, level.up_states), (level.down, [grown, *level.down_states])):
            for (u_block, ul_block), state in zip(blocks, before, strict=False):
                yield u_block.conv_in.conv, row, u_block.conv_in.current
                yield u_block.conv_out.conv, row, u_block.conv_out.current
                yield ul_block.block.conv_in, row, state.elu.data[:, 1:]
                yield ul_block.block.conv_out, row, ul_block.hidden.elu.data[:, 1:]
        last = level.down_states[-1] if level.down else grown
        if index:
            yield net.grow[index - 1].ul, row, last.x.data[:, 1:].chunk(2, -1)[0]  # type: ignore[union-attr]
        else:
            yield net.head, row, last.elu.data[:, 1:]
        if level.below is not None:
            yield level.resample.shrink_u.conv, row, level.resample.shrink_u.current
            yield level.resample.shrink_module, row, level.up_states[-1].x.data[:, 1:].chunk(2, -1)[0]


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_every_layer_agrees_in_fp32(config: Config) -> None:
    """Compare the input of each layer of both streams, to 1e-5 of its size; a failure names the first layer."""
    net = nets.network(config, dtype=torch.float32)
    conditions = nets.conditions(3, T, config)
    H, W = config.model.height, config.model.width
    x = torch.rand(3, 3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1
    layer_inputs: dict[nn.Module, Tensor] = {}
    in_stem = set(net.stem.children())
    layers = {m for m in net.modules() if isinstance(m, CausalConv) and m not in in_stem}
    layers |= {m for m in net.modules() if isinstance(m, Grow) and m.stream == "ul"} | {net.head}
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, _: layer_inputs.update({module: inputs[0]}))
    net(x, conditions.t_B, conditions.class_B, conditions.orientation_B)

    cache = NetworkCache(net, 3, H, W)
    cache.reset(conditions)
    compared_layers: set[nn.Module] = set()
    for i in range(H):
        cache.advance(i, x, lambda i, j, *_: x[:, :, i, j])
        for layer, row, actual in cached_inputs(cache, i):
            expected = layer_inputs[layer][:, :, row].transpose(1, 2)
            names = [name for name, module in net.named_modules() if module is layer]
            assert torch.allclose(actual[:3], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())), (
                names,
                row,
            )
            compared_layers.add(layer)
    assert compared_layers == layers


@pytest.mark.parametrize("t", [0.0, T], ids=["clean", "noisy"])
def test_bf16_parameters_are_close_to_fp32_on_a_cpu(t: float) -> None:
    """A network in bf16 can be sampled: close to fp32, and exact where pixels are known."""
    config = nets.config(((8, 1), (8, 1)))
    exact = nets.network(config, dtype=torch.float32)
    net = deepcopy(exact).bfloat16()
    conditions = nets.conditions(3, t, config)
    image = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = from_uint8(image)
    for actual, expected in zip(
        cached_parameters(net, x.bfloat16(), conditions), whole_parameters(exact, x, conditions), strict=True
    ):
        assert (actual - expected).abs().max() < 0.05 * expected.abs().max()
    sampled = x.bfloat16()
    sampled[:, :, 4:] = torch.nan
    with torch.inference_mode():
        draws = make_draws(config, 3, torch.bfloat16).draw_pixels(config.model.mixtures, 8, 8)
        exact_draws = make_draws(config, 3, torch.float32).draw_pixels(config.model.mixtures, 8, 8)
        assert torch.equal(draws.logistic_BC, exact_draws.logistic_BC)  # not rounded to bf16
        sample_cached(net, sampled, replace(conditions, first_row=4), draws, lambda row: False)
    assert sampled.isfinite().all()
    assert torch.equal(to_uint8(sampled)[:, :4], image[:, :4])


@pytest.mark.parametrize("noise", [0.0, 10.0], ids=["direct", "refined"])
def test_known_pixels_are_exact_in_bf16(noise: float) -> None:
    config = nets.config(height=4, width=64)
    net = nets.network(config, dtype=torch.bfloat16)
    image = torch.arange(256, dtype=torch.uint8).view(1, 4, 64, 1).expand(1, 4, 64, 3)
    for flipped in (image, image.flip(1)):  # every grey level is in one of the upper halves
        batch_plan = replace(plan(config, [0], noise=noise), known_BCHW=from_uint8(flipped))
        assert torch.equal(torch.from_numpy(generate_images(net, batch_plan, sample_cached))[:, :2], flipped[:, :2])


def test_every_weight_reaches_the_cached_sampler() -> None:
    """Changing any weight changes both samplers equally, so a part of the network that the sampler omits fails here."""
    config = nets.config(((4, 1), (6, 1)), height=4, width=4)
    net = nets.network(config)
    conditions = Conditions(T, torch.tensor([1]), torch.tensor([3]))
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = torch.cat([part.flatten() for part in cached_parameters(net, x, conditions)])
    generator = torch.Generator().manual_seed(1)
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    assert len(tensors) > 100
    for name, tensor in tensors.items():
        original = tensor.clone()
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
        actual = torch.cat([part.flatten() for part in cached_parameters(net, x, conditions)])
        expected = torch.cat([part.flatten() for part in whole_parameters(net, x, conditions)])
        assert (actual - before).abs().max() > 1e-9, name
        assert torch.allclose(actual, expected, rtol=0, atol=1e-9), name
        tensor.copy_(original)


def plan(config: Config, seeds: list[int], *, noise: float, solver: str = "tweedie", keep: Keep | None = None) -> Plan:
    """Class and canvas follow the seed, so that an image is the same at every position."""
    H, W = config.model.height, config.model.width
    canvases = [torch.rand(3, H, W, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in seeds]
    return Plan(
        seeds=seeds,
        class_B=torch.tensor([seed % (len(config.model.classes) + 1) for seed in seeds]),
        settings=SamplingSettings(noise=noise, steps=1 if solver == "tweedie" else 2, solver=solver),
        known_BCHW=None if keep is None else torch.stack(canvases),
        keep=keep or "top",
    )


CASES = (
    [pytest.param(10.0, solver, None, id=solver) for solver in SOLVERS]
    + [pytest.param(0.0, "tweedie", None, id="direct")]
    + [pytest.param(10.0, "euler-maruyama", keep, id=f"complete {keep}") for keep in KEEPS]
    + [pytest.param(0.0, "tweedie", "right", id="complete right directly")]
)


@pytest.mark.parametrize(("noise", "solver", "keep"), CASES)
def test_an_image_has_the_same_bytes_in_every_batch(noise: float, solver: str, keep: Keep | None) -> None:
    """Compare in fp32: alone, and among 3, 16 and 17 images of other seeds and classes."""
    config = nets.config(((6, 1), (10, 1)), height=4, width=4, mixtures=3)
    net = nets.network(config, dtype=torch.float32)
    batching = choose_batching(net)

    def generate(seeds: list[int]) -> NDArray[np.uint8]:
        batch_plan = plan(config, seeds, noise=noise, solver=solver, keep=keep)
        return generate_images(net, batch_plan, GroupedSampler(batching.divide(seeds)))

    whole = generate(list(range(17)))
    for seeds in ([0], [8], [16], [5, 16, 2], list(range(1, 17))):
        images = generate(seeds)
        assert (images == whole[seeds]).all(), seeds


def small(height: int, width: int, **changed: object) -> Config:
    """Return the network of `cifar10_small` for small images, whose products are wide enough for other kernels."""
    model = cifar10_small().model
    return Config(recipe="test", model=replace(model, height=height, width=width, **changed))  # type: ignore[arg-type]


@pytest.fixture
def thread_count(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


WIDE = small(2, 32, levels=(LevelConfig(width=160, blocks=1),))
"""As wide as the paper's: sums long enough, and rows large enough, to be shared among threads."""


@pytest.mark.parametrize(
    ("config", "thread_count"),
    [
        pytest.param(nets.config(((6, 1), (10, 1))), 1, id="tiny"),
        pytest.param(small(4, 32), 1, id="small"),
        pytest.param(small(4, 32), 2, id="small, 2 threads"),
        pytest.param(small(4, 12), 1, id="small, odd"),
        pytest.param(WIDE, 1, id="wide"),
        pytest.param(WIDE, 3, id="wide, 3 threads"),
    ],
    indirect=["thread_count"],
)
def test_samples_have_the_same_bits_in_every_batch(config: Config, thread_count: None) -> None:
    """Compare in fp32 at t > 0, where rounding to grey levels cannot hide a difference, with a known row before the
    sampled ones. Each image has its own seed."""
    net = nets.network(config, dtype=torch.float32, spread=0.03)
    batching = choose_batching(net)
    H, W = config.model.height, config.model.width

    def sample(members: list[int]) -> Tensor:
        conditions = nets.conditions(17, T, config).select(members)
        draws = BatchDraws(members, dtype=torch.float32, device=CPU).draw_pixels(config.model.mixtures, H, W)
        x = torch.rand(17, 3, H, W, generator=torch.Generator().manual_seed(0))[torch.tensor(members)] * 2 - 1
        with torch.inference_mode():
            sampler = GroupedSampler(batching.divide(members))
            sampler(net, x, replace(conditions, first_row=1), draws, lambda row: False)
        return x

    whole = sample(list(range(17)))
    for members in ([0], [7], [16], [3, 9, 0], list(range(1, 17))):
        assert torch.equal(sample(members), whole[members]), members


def test_blocks_on_every_level_may_be_left_out() -> None:
    """The shallowest network that a configuration allows."""
    levels = (LevelConfig(width=4, blocks=0), LevelConfig(width=4, blocks=0, attention=False))
    config = Config(recipe="test", model=ModelConfig(height=4, width=4, levels=levels, mixtures=1, heads=2))
    net = nets.network(config)
    conditions = nets.conditions(2, end_time(config.sde), config)
    x = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    with torch.inference_mode():
        sample_cached(net, x, conditions, make_draws(config, 2).draw_pixels(1, 4, 4), lambda row: False)
    assert torch.allclose(x, sample_reference(net, conditions), rtol=0, atol=1e-9)
