"""Guidance and temperature against a slow implementation, and their ranges."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ncml
from ncml import checkpoint
from ncml.errors import InputError
from ncml.network.mixture import HALF_LEVEL, PixelDraws, group_by_component, log_mixture, split_parameters
from ncml.network.sde import make_sde
from ncml.progress import Progress
from ncml.sampling import guidance
from ncml.sampling.batching import FIXED_SIZE, fast_groups, fast_sizes, fixed_groups
from ncml.sampling.cached import sample_cached
from ncml.sampling.conditions import Conditions, Tilt
from ncml.sampling.defaults import SamplingSettings
from ncml.sampling.guidance import CELLS, TiltedPixelSampler, make_grid
from ncml.sampling.sample import Plan, Sampler, SamplerByTilt, generate_images, make_grad_log_prob, sample_naive
from tests.ncml import nets

K = 3
GREY = (torch.arange(256, dtype=torch.float64) - 127.5) / 127.5
TILTS = [Tilt(3.0, 0.8), Tilt(0.5, 1.0), Tilt(1.0, 0.7), Tilt(1.0, 1.0)]


def mixtures(count: int, *, seed: int) -> Tensor:
    """Return the parameters of random mixtures, broad and narrow, [N, P]."""
    torch.manual_seed(seed)
    parameters = torch.randn(count, 10 * K, dtype=torch.float64)
    parameters[:, 4 * K : 7 * K] -= 2  # among them the log-scales
    return parameters


def draws_for(count: int, *, seed: int = 0) -> PixelDraws:
    generator = torch.Generator().manual_seed(seed)
    logistic = torch.logit(torch.rand(count, 3, generator=generator, dtype=torch.float64))
    uniform = (2 * torch.rand(count, 3, generator=generator, dtype=torch.float64) - 1) * HALF_LEVEL
    return PixelDraws(torch.zeros(count, K, dtype=torch.float64), logistic, uniform)


def masses_by_component(parameters_P: Tensor, x_C: list[float], values_V: Tensor, *, clean: bool) -> Tensor:
    """Return each component's mass of a channel's values, given the channels x before it. [K, V]."""
    mixture = split_parameters(parameters_P[None, :, None, None])
    c = len(x_C)
    mean_K, log_scale_K = mixture.mean_BKC[0, :, c, 0, 0], mixture.log_scale_BKC[0, :, c, 0, 0]
    coefficient_KC = mixture.coefficient_BKC[0, :, :, 0, 0]
    if c == 1:
        mean_K = mean_K + coefficient_KC[:, 0] * x_C[0]
    if c == 2:
        mean_K = mean_K + coefficient_KC[:, 1] * x_C[0] + coefficient_KC[:, 2] * x_C[1]
    low, high = ((values_V + sign * HALF_LEVEL - mean_K[:, None]) / torch.exp(log_scale_K)[:, None] for sign in (-1, 1))
    if clean:
        low[:, values_V < -1 + HALF_LEVEL] = -torch.inf
        high[:, values_V > 1 - HALF_LEVEL] = torch.inf
    # In the upper tail as a difference of small numbers, too.
    upper = torch.sigmoid(-low) - torch.sigmoid(-high)
    return torch.where(low > 0, upper, torch.sigmoid(high) - torch.sigmoid(low))


def channel_distribution(parameters_P: Tensor, x_C: list[float], values_V: Tensor, *, clean: bool) -> Tensor:
    """Return p of a channel's values, given the channels x before it. [V]."""
    weight_K = torch.softmax(parameters_P[:K], 0)
    for c, value in enumerate(x_C):
        at_value = torch.tensor([value], dtype=torch.float64)
        weight_K = weight_K * masses_by_component(parameters_P, x_C[:c], at_value, clean=clean)[:, 0]
    return weight_K / weight_K.sum() @ masses_by_component(parameters_P, x_C, values_V, clean=clean)


def sample_slowly(with_P: Tensor, without_P: Tensor, draws: PixelDraws, b: int, tilt: Tilt) -> list[int]:
    """Sample one colour by the equation, in levels."""
    x_C: list[float] = []
    levels: list[int] = []
    for c in range(3):
        log_with, log_without = (channel_distribution(p, x_C, GREY, clean=True).log() for p in (with_P, without_P))
        log_q = (log_without + tilt.guidance * (log_with - log_without)) / tilt.temperature
        cumulative = torch.softmax(log_q, 0).cumsum(0)
        levels.append(int((cumulative < torch.sigmoid(draws.logistic_BC[b, c])).sum()))
        x_C.append(float(GREY[levels[-1]]))
    return levels


@pytest.fixture(params=[np, torch], ids=["numpy", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with the library of networks on a CPU, then with that of networks on a GPU."""
    monkeypatch.setattr(guidance, "choose_library", lambda device: request.param)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("tilt", TILTS, ids=str)
def test_colours_follow_the_equation(tilt: Tilt) -> None:
    count = 40
    with_NP, without_NP = mixtures(count, seed=1), mixtures(count, seed=2)
    rows_NP = torch.cat([with_NP, without_NP]) if tilt.rows_per_image == 2 else with_NP
    draws = draws_for(count)
    sampler = TiltedPixelSampler(count, tilt, GREY.numpy(), with_NP, clean=True)
    x_NC = sampler(0, *group_by_component(rows_NP, K), draws)
    assert torch.equal(x_NC[:count], x_NC[-count:])  # both rows of an image
    levels = (x_NC[:count] * 127.5 + 127.5).round().long().tolist()
    assert levels == [sample_slowly(with_NP[b], without_NP[b], draws, b, tilt) for b in range(count)]


@pytest.mark.usefixtures("library")
def test_a_sampler_with_another_tilt_and_grid_equals_a_new_one() -> None:
    """As in a recorded row, whose memory stays the same."""
    sde, count = make_sde(nets.config().sde), 40
    rows_NP, draws = mixtures(2 * count, seed=5), draws_for(count)
    tilts = [(Tilt(3.0, 0.8), make_grid(sde, sde.time_of(noise))) for noise in (9.0, 6.0)]
    changed, new = (TiltedPixelSampler(count, *tilt, rows_NP, clean=False) for tilt in tilts)
    x_NC = [sampler(0, *group_by_component(rows_NP, K), draws).clone() for sampler in (changed, new)]
    assert not torch.equal(*x_NC)
    changed.set_tilt(*tilts[1])
    assert torch.equal(changed(0, *group_by_component(rows_NP, K), draws), x_NC[1])
    with pytest.raises(RuntimeError, match="shape"):
        changed.set_tilt(Tilt(3.0, 0.8), make_grid(sde, 0))


def test_distributions_before_the_tilt_are_those_of_the_likelihood() -> None:
    """The product over the channels is the probability of the colour."""
    parameters_1P = mixtures(1, seed=3)
    for levels in ([0, 128, 255], [17, 0, 90], [255, 255, 254]):
        x_C = [float(GREY[level]) for level in levels]
        product = 1.0
        for c, level in enumerate(levels):
            product *= float(channel_distribution(parameters_1P[0], x_C[:c], GREY, clean=True)[level])
        x_BCHW = torch.tensor(x_C, dtype=torch.float64)[None, :, None, None]
        expected = log_mixture(x_BCHW, parameters_1P[:, :, None, None], torch.tensor([True])).exp()
        assert product == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.usefixtures("library")
def test_noisy_values_have_the_density_of_the_model() -> None:
    """Without a tilt, each fifth of the density on the grid has a fifth of the values (chi-square at 0.001)."""
    count = 4000
    sde = make_sde(nets.config().sde)
    parameters_1P = mixtures(1, seed=4)
    grid_V = make_grid(sde, 0.02)
    assert grid_V[0] == -grid_V[-1]
    time = torch.tensor(0.02, dtype=torch.float64)
    assert grid_V[-1] > sde.alpha(time) + 4 * sde.sigma(time)
    assert [len(make_grid(sde, sde.time_of(levels))) for levels in (0.01, 100)] == [CELLS[1], CELLS[0]]
    sampler, draws = TiltedPixelSampler(count, Tilt(), grid_V, parameters_1P, clean=False), draws_for(count)
    x_NC = sampler(0, *group_by_component(parameters_1P.expand(count, -1), K), draws)
    place_N = (x_NC[:, 0].numpy() - grid_V[0]) / (grid_V[1] - grid_V[0])
    assert place_N - place_N.round() == pytest.approx(draws.uniform_BC[:, 0].numpy() / (2 * HALF_LEVEL), abs=1e-9)
    fine_V = torch.linspace(float(grid_V[0]), float(grid_V[-1]), 20_000, dtype=torch.float64)
    cumulative = channel_distribution(parameters_1P[0], [], fine_V, clean=False).cumsum(0)
    borders = fine_V[torch.searchsorted(cumulative / cumulative[-1], torch.tensor([0.2, 0.4, 0.6, 0.8]))]
    counts = torch.bincount(torch.bucketize(x_NC[:, 0].contiguous(), borders), minlength=5)
    assert float(((counts - count / 5) ** 2 / (count / 5)).sum()) < 18.5


@pytest.mark.parametrize("noise", [0.0, 8.0], ids=["direct", "noisy"])
@pytest.mark.parametrize("tilt", TILTS[:3], ids=str)
def test_images_equal_those_of_the_naive_sampler(tilt: Tilt, noise: float) -> None:
    net = nets.network(nets.config(((4, 1), (6, 1)), height=4, width=4), spread=0.08)
    canvases = nets.images(2, 4, 4)
    for keep in (None, "right"):
        plan = Plan(
            seeds=[1, 2],
            class_B=torch.arange(2),
            settings=SamplingSettings(
                noise=noise, steps=1, solver="tweedie", guidance=tilt.guidance, temperature=tilt.temperature
            ),
            known_BCHW=(canvases.permute(0, 3, 1, 2).double() - 127.5) / 127.5 if keep else None,
            keep=keep or "top",  # type: ignore[arg-type]
        )
        images = generate_images(net, plan, sample_cached)
        assert np.array_equal(images, generate_images(net, plan, sample_naive))
        if keep:
            assert np.array_equal(images[:, :, 2:], canvases.numpy()[:, :, 2:])


@pytest.mark.parametrize("sampler", [sample_naive, sample_cached])
def test_an_image_without_a_class_is_sampled_without_guidance_among_those_of_classes(sampler: Sampler) -> None:
    net = nets.network(nets.config(((4, 1), (6, 1)), height=4, width=4), spread=0.08)
    settings = SamplingSettings(noise=8.0, steps=1, solver="tweedie", guidance=3.0)
    plan = Plan([1, 2, 3], torch.tensor([0, 2, 1]), settings)  # the second has no class
    rows: list[int] = []
    by_tilt = SamplerByTilt(lambda tilt, indices: sampler)

    def on_progress(progress: Progress) -> None:
        if progress.stage == "noisy_sampling":
            rows.append(progress.done)

    images = generate_images(net, plan, by_tilt, on_progress)
    assert rows == [row // 2 for row in range(1, 9)]
    for index, seed in enumerate(plan.seeds):
        alone_settings = replace(settings, guidance=1.0) if index == 1 else settings
        alone = generate_images(net, Plan([seed], plan.class_B[[index]], alone_settings), sampler)
        assert np.array_equal(alone[0], images[index]), seed
    rows.clear()
    dropped: set[int] = set()

    def drop_all(progress: Progress) -> None:
        rows.append(progress.done)
        dropped.update({0, 1, 2})

    assert not generate_images(net, replace(plan, dropped=dropped), by_tilt, drop_all).any()
    assert rows == [0]


def test_the_score_function_is_guided() -> None:
    net = nets.network(nets.config())
    x_BCHW = 0.3 * torch.randn(2, 3, 8, 8, dtype=torch.float64)
    class_B, orientation_B = torch.tensor([0, 2]), torch.zeros(2, dtype=torch.long)  # the second has no class

    def score(class_B: Tensor, tilt: Tilt) -> Tensor:
        return make_grad_log_prob(net, Conditions(0.02, class_B, orientation_B, tilt))(x_BCHW, 0.02)

    guided, of_class, of_none = score(class_B, Tilt(3.0, 0.5)), score(class_B, Tilt()), score(class_B * 0 + 2, Tilt())
    torch.testing.assert_close(guided, of_none + 3 * (of_class - of_none))
    assert torch.equal(guided[1], of_none[1])
    assert not torch.equal(guided[0], of_class[0])


# -- the same bytes in every batch


@pytest.mark.parametrize("batching", ["fast", "fixed", "auto"])
def test_a_seed_gives_the_same_bytes_whatever_else_is_guided(
    model: ncml.Model, batching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = ncml.load(model.folder, batching=batching)
    classes = ["a", None, "b", "a", None]
    options = {"guidance": None, "temperature": 0.9}
    # A default acts on images of a class only.
    monkeypatch.setattr(loaded, "description", replace(loaded.description, sampling={"guidance": 2.5}))
    together = loaded.generate(5, classes=classes, seeds=[3, 11, 19, 4, 3], **options)
    for image, name, seed in zip(together, classes, [3, 11, 19, 4, 3], strict=True):
        assert np.array_equal(image, loaded.generate(1, classes=name, seeds=seed, **options)[0])
    unguided = loaded.generate(5, classes=classes, seeds=[3, 11, 19, 4, 3], guidance=1, temperature=0.9)
    assert [bool((a == b).all()) for a, b in zip(together, unguided, strict=True)] == [name is None for name in classes]


def test_groups_have_room_for_both_rows_of_an_image() -> None:
    assert fast_sizes(2) == [2, 4, 8, 16, 32]
    assert fast_groups(3, 2) == [[0, 1, 2, None]]
    assert [len(group) for group in fast_groups(33, 2)] == [32, 2]
    groups = fixed_groups([1, 5, 2], 2)
    assert groups == [[None, 0, 2, None], [None, 1, None, None]]
    assert {len(group) for group in groups} == {FIXED_SIZE // 2}


def test_without_a_tilt_the_plain_sampler_is_used(model: ncml.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.generate(2, classes="a", seeds=5)
    monkeypatch.setattr(guidance, "TiltedPixelSampler", pytest.fail)
    assert np.array_equal(model.generate(2, classes="a", seeds=5, guidance=1.0, temperature=1), expected)


# -- refusals and defaults


@pytest.mark.parametrize(
    ("options", "detail"),
    [
        ({"guidance": 2}, "guidance needs a class: name a class, or leave guidance out."),
        ({"guidance": 0.4, "classes": "a"}, "guidance must be 0.5 to 10, not 0.4."),
        ({"guidance": 11, "classes": "a"}, "guidance must be 0.5 to 10, not 11."),
        ({"guidance": float("nan"), "classes": "a"}, "guidance must be 0.5 to 10, not nan."),
        ({"temperature": 1.6}, "temperature must be 0.5 to 1.5, not 1.6."),
        ({"temperature": 0}, "temperature must be 0.5 to 1.5, not 0."),
        (
            {"guidance": 2, "n": 2, "classes": ["a", None]},
            "guidance needs a class: name a class, or leave guidance out.",
        ),
    ],
)
def test_an_invalid_option_is_named(model: ncml.Model, options: dict[str, Any], detail: str) -> None:
    with pytest.raises(InputError) as refused:
        model.generate(**options)
    assert str(refused.value) == detail
    assert refused.value.field in options


def test_guidance_needs_a_model_with_classes() -> None:
    from ncml.sampling.defaults import SamplingLimits, resolve

    limits = SamplingLimits(max_noise=10, has_classes=False)
    with pytest.raises(
        InputError, match=r"^guidance needs a model with classes, and this one has none: leave it out\.$"
    ):
        resolve({"guidance": 2}, limits, has_class=False)
    assert resolve({"guidance": 1}, limits, has_class=False).guidance == 1


def test_the_model_folder_sets_the_defaults(model: ncml.Model, tmp_path: Path) -> None:
    network, description = checkpoint.load(model.folder)
    folder = tmp_path / "tuned"
    defaults = {"start_noise": 2.5, "solver": "heun", "steps": 3, "guidance": 2.0, "temperature": 0.9}
    checkpoint.save(folder, network)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"sampling": defaults}))
    tuned = ncml.load(folder)
    assert tuned.version == description.version
    explicit = {"noise": 2.5, "solver": "heun", "steps": 3, "guidance": 2.0, "temperature": 0.9}
    assert np.array_equal(tuned.generate(classes="a", seeds=3), model.generate(classes="a", seeds=3, **explicit))
    plain = {"noise": 10, "solver": "tweedie", "guidance": 1, "temperature": 1}
    assert np.array_equal(tuned.generate(classes="a", seeds=3, **plain), model.generate(classes="a", seeds=3))
    assert tuned.sampling_limits.defaults.noise == 2.5
    assert tuned.sampling_limits.max_noise == model.noise
