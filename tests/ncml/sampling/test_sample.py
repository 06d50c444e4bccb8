"""Image generation: draws that belong to a seed, known pixels, progress and dropped images."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import ncml
from ncml.limits import KEEPS
from ncml.network.mixture import HALF_LEVEL, PixelDraws, from_uint8, to_grid
from ncml.network.ncpn import NCPN
from ncml.network.sde import GREY_LEVEL, make_sde
from ncml.progress import Progress
from ncml.sampling.cached import sample_cached
from ncml.sampling.conditions import Conditions, OnRow, Tilt
from ncml.sampling.defaults import SamplingSettings
from ncml.sampling.sample import (
    BatchDraws,
    Plan,
    Sampler,
    SamplerByTilt,
    generate_images,
    make_grad_log_prob,
    sample_naive,
)
from ncml.sampling.solvers import SOLVERS
from tests.ncml import nets

CPU = torch.device("cpu")
HALVES = {
    "top": np.s_[:, :4],
    "bottom": np.s_[:, 4:],
    "left": np.s_[:, :, :4],
    "right": np.s_[:, :, 4:],
}


def test_draws_belong_to_the_seed() -> None:
    both, single = (BatchDraws(seeds, dtype=torch.float64, device=CPU) for seeds in ([3, 7], [7]))
    for a, b in zip(vars(both.draw_pixels(2, 4, 4)).values(), vars(single.draw_pixels(2, 4, 4)).values(), strict=True):
        assert torch.equal(a[1:], b)
        assert not torch.equal(a[:1], b)
    assert torch.equal(both.draw_normal(4, 4)[1:], single.draw_normal(4, 4))


NO_CLASS = len(nets.config().model.classes)
UNGUIDED, GUIDED = Tilt(temperature=0.9), Tilt(guidance=3.0, temperature=0.9)


@pytest.mark.parametrize(
    ("class_B", "parts"),
    [
        ([NO_CLASS, NO_CLASS], [(UNGUIDED, [0, 1])]),
        ([1, 0], [(GUIDED, [0, 1])]),
        ([0, NO_CLASS, 1], [(GUIDED, [0, 2]), (UNGUIDED, [1])]),
    ],
    ids=["no classes", "classes", "both"],
)
def test_guidance_reaches_only_images_of_a_class(class_B: list[int], parts: list[tuple[Tilt, list[int]]]) -> None:
    tilts_and_indices: list[tuple[Tilt, list[int]]] = []
    tilts_and_classes: list[tuple[Tilt, list[int]]] = []

    def sampler(network: NCPN, x_BCHW: Tensor, conditions: Conditions, draws: PixelDraws, on_row: OnRow) -> None:
        tilts_and_classes.append((conditions.tilt, conditions.class_B.tolist()))

    def choose_sampler(tilt: Tilt, indices: list[int]) -> Sampler:
        tilts_and_indices.append((tilt, indices))
        return sampler

    net = nets.network(nets.config())
    settings = SamplingSettings(noise=0.0, steps=1, solver="tweedie", guidance=3.0, temperature=0.9)
    seeds = list(range(len(class_B)))
    generate_images(net, Plan(seeds, torch.tensor(class_B), settings), SamplerByTilt(choose_sampler))
    assert tilts_and_indices == parts
    assert tilts_and_classes == [(tilt, [class_B[index] for index in indices]) for tilt, indices in parts]


@pytest.mark.parametrize(
    ("field", "distribution"),
    [
        ("gumbel_BK", stats.gumbel_r()),
        ("logistic_BC", stats.logistic()),
        ("uniform_BC", stats.uniform(-HALF_LEVEL, 2 * HALF_LEVEL)),
    ],
)
def test_draws_have_the_right_distribution(field: str, distribution: stats.rv_continuous) -> None:
    """Kolmogorov-Smirnov test at 0.001."""
    values = getattr(BatchDraws([0], dtype=torch.float64, device=CPU).draw_pixels(3, 64, 64), field)
    assert stats.kstest(values.flatten().numpy(), distribution.cdf).pvalue > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_images_are_those_of_the_naive_sampler(solver: str) -> None:
    """The bytes are equal after refinement and rounding, in fp64."""
    config = nets.config(((4, 1), (6, 1)), height=4, width=4)
    net = nets.network(config, spread=0.08)
    canvases = from_uint8(nets.images(3, 4, 4)).double()
    for keep in (None, "right"):
        plan = Plan(
            seeds=[1, 2, 3],
            class_B=torch.arange(3),
            settings=SamplingSettings(noise=8.0, steps=1 if solver == "tweedie" else 3, solver=solver),
            known_BCHW=canvases if keep else None,
            keep=keep or "top",  # type: ignore[arg-type]
        )
        assert np.array_equal(generate_images(net, plan, sample_naive), generate_images(net, plan, sample_cached))


@pytest.mark.parametrize("noise", [0.0, 10.0], ids=["direct", "noisy"])
@pytest.mark.parametrize("keep", KEEPS)
def test_known_pixels_are_returned_exactly(model: ncml.Model, keep: str, noise: float) -> None:
    """The unknown half of a canvas makes no difference, the known half does."""
    canvases = nets.images(2).numpy()
    foreign, changed = canvases.copy(), canvases.copy()
    unknown = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}[keep]
    foreign[HALVES[unknown]] = 255 - foreign[HALVES[unknown]]
    changed[HALVES[keep]] = 255 - changed[HALVES[keep]]
    image, same, other = (model.complete(c, keep=keep, noise=noise, steps=2) for c in (canvases, foreign, changed))
    assert np.array_equal(image[HALVES[keep]], canvases[HALVES[keep]])
    assert np.array_equal(image, same)
    assert not np.array_equal(image[HALVES[unknown]], other[HALVES[unknown]])
    assert not np.array_equal(image[HALVES[unknown]], canvases[HALVES[unknown]])


def test_the_larger_half_of_an_odd_size_is_returned_completely() -> None:
    """As in `ncml.images`, the middle row belongs to the bottom half."""
    config = nets.config(((4, 1),), height=7, width=7, orientations=True)
    network = nets.network(config, dtype=torch.float32)
    canvas = nets.images(1, 7, 7)
    settings = SamplingSettings(noise=0.0, steps=1, solver="tweedie")
    for keep, half in {
        "top": np.s_[:, :3],
        "bottom": np.s_[:, 3:],
        "left": np.s_[:, :, :3],
        "right": np.s_[:, :, 3:],
    }.items():
        plan = Plan([0], torch.zeros(1, dtype=torch.long), settings, from_uint8(canvas), keep)  # type: ignore[arg-type]
        image = generate_images(network, plan, sample_cached)
        assert np.array_equal(image[half], canvas.numpy()[half]), keep
        assert not np.array_equal(image, canvas.numpy())


def test_a_completion_that_fails_leaves_the_model_as_it_was(model: ncml.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error such as out of memory, a worker continues with the same model."""
    expected = [score.bpd for score in model.score(nets.images(3).numpy())]

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(model.network.head, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.complete(nets.images(2).numpy())
    assert [score.bpd for score in model.score(nets.images(3).numpy())] == expected


def test_known_rows_have_the_noise_of_the_sampled_ones() -> None:
    starts: list[Tensor] = []

    def sampler(network: NCPN, x_BCHW: Tensor, conditions: Conditions, draws: PixelDraws, on_row: OnRow) -> None:
        starts.append(x_BCHW.clone())

    net, known_BCHW = nets.network(nets.config()), from_uint8(nets.images(4)).double()
    settings = SamplingSettings(noise=10.0, steps=1, solver="tweedie", guidance=1.0, temperature=1.0)
    generate_images(net, Plan(list(range(4)), torch.zeros(4).long(), settings, known_BCHW), sampler)
    sde = make_sde(net.config.sde)
    t = torch.tensor(sde.time_of(10.0), dtype=torch.float64)
    eps = (starts[0] - sde.alpha(t) * known_BCHW)[:, :, :4] / sde.sigma(t)
    assert stats.kstest(eps.flatten(), "norm").pvalue > 1e-3
    assert (starts[0][:, :, 4:] == 0).all()


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "tweedie"])
def test_every_solver_keeps_known_pixels(model: ncml.Model, solver: str) -> None:
    canvas = nets.images(1).numpy()
    image = model.complete(canvas, keep="left", n=2, solver=solver, steps=3)
    assert (image[HALVES["left"]] == canvas[HALVES["left"]]).all()
    assert not np.array_equal(image[0], image[1])


def test_progress_is_reported_by_row_and_by_step(model: ncml.Model) -> None:
    reports: list[tuple[str, int, int]] = []

    def callback(progress: Progress) -> None:
        reports.append((progress.stage, progress.done, progress.total))
        preview = progress.preview()
        assert preview.dtype == np.uint8
        assert preview.shape == (2, 8, 8, 3)

    model.generate(2, steps=3, callback=callback)
    assert reports == [("noisy_sampling", i, 8) for i in range(1, 9)] + [("refine", i, 3) for i in (1, 2, 3)]


def test_previews_of_a_completion_show_the_known_half_in_its_place(model: ncml.Model) -> None:
    canvas = nets.images(1).numpy()
    previews = []
    model.complete(canvas, keep="right", noise=0, callback=lambda progress: previews.append(progress.preview()))
    assert len(previews) == 4
    assert all((preview[HALVES["right"]] == canvas[HALVES["right"]]).all() for preview in previews)


@pytest.mark.parametrize("sampler", ["incremental", "naive"])
@pytest.mark.parametrize("stop", [("noisy_sampling", 3), ("refine", 2)], ids=["in a row", "in a step"])
def test_sampling_stops_once_all_images_are_dropped(model: ncml.Model, stop: tuple[str, int], sampler: str) -> None:
    reports: list[tuple[str, int]] = []
    dropped: set[int] = set()

    def callback(progress: Progress) -> None:
        reports.append((progress.stage, progress.done))
        dropped.update({0, 1} if reports[-1] == stop else ())

    images = model.generate(2, steps=4, sampler=sampler, callback=callback, dropped=dropped)
    assert reports[-1] == stop
    assert (images == 0).all()


def test_a_dropped_image_leaves_the_others_unchanged(model: ncml.Model) -> None:
    whole = model.generate(3, steps=2, seeds=5)
    calls = 0
    dropped: set[int] = set()

    def callback(progress: Progress) -> None:
        nonlocal calls
        calls += 1
        dropped.update([1] if progress.done == 2 else [])

    remaining = model.generate(3, steps=2, seeds=5, callback=callback, dropped=dropped)
    assert calls == 8 + 2
    assert (remaining[1] == 0).all()
    assert np.array_equal(remaining[[0, 2]], whole[[0, 2]])


def test_a_callback_may_call_the_model_at_work(model: ncml.Model) -> None:
    """In rows and in steps: refinement needs gradients, without which rows are sampled."""
    options, image = {"steps": 2, "noise": 5.0}, nets.images(1).numpy()
    alone = [model.generate(2, seeds=seed, **options) for seed in (3, 8)]
    bpd = model.score(image)[0].bpd
    nested: list[tuple[str, np.ndarray, float]] = []

    def callback(progress: Progress) -> None:
        nested.append((progress.stage, model.generate(2, seeds=8, **options), model.score(image)[0].bpd))

    assert np.array_equal(model.generate(2, seeds=3, **options, callback=callback), alone[0])
    assert {stage for stage, _, _ in nested} == {"noisy_sampling", "refine"}
    assert all(np.array_equal(images, alone[1]) and score == bpd for _, images, score in nested)


def test_direct_images_are_on_the_grid() -> None:
    """At t = 0 no value needs rounding."""
    config = nets.config()
    net = nets.network(config)
    x = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    draws = BatchDraws([1, 2], dtype=torch.float64, device=CPU).draw_pixels(2, 8, 8)
    sample_cached(net, x, nets.conditions(2, 0.0, config), draws, lambda row: False)
    assert torch.equal(to_grid(x), x)


@pytest.mark.parametrize("sde", ["ve", "vp", "sub-vp"])
def test_refinement_removes_the_noise(sde: str) -> None:
    """Under every SDE, refinement removes most noise from data on which the model's density is a known peak.

    The network's body is zeroed, so that every channel is logistic about one grey with a small scale; then the whole
    image is one grey, and noise shows as deviation from it.
    """
    config = nets.config(((4, 1),), mixtures=1, sde=sde)  # type: ignore[arg-type]
    net = nets.network(config)
    net.head.weight.zero_()
    net.head.bias.copy_(torch.tensor([0.0] + [0.1] * 3 + [-3.0] * 3 + [0.0] * 3))
    settings = SamplingSettings(noise=10.0, steps=20, solver="euler-maruyama")
    plan = Plan(torch.arange(4).tolist(), torch.zeros(4, dtype=torch.long), settings)
    x = from_uint8(torch.from_numpy(generate_images(net, plan, sample_cached)))
    assert x.mean().item() == pytest.approx(0.1, abs=0.01)
    # The model's own spread at every level is that of a logistic of scale e^-3; denoising by 10 grey levels narrows it.
    spread = np.pi / np.sqrt(3) * np.exp(-3)
    expected_variance = spread**2 * (1 - (10 * GREY_LEVEL / spread) ** 2)
    assert x.std().item() < 1.05 * spread
    assert x.std().item() == pytest.approx(np.sqrt(max(expected_variance, 0)), abs=0.25 * spread)


@pytest.mark.parametrize("count", [1, 3])
def test_the_gradient_of_an_image_does_not_depend_on_its_batch(count: int) -> None:
    """On a CPU, the bits are equal."""
    config = nets.config(((6, 1), (10, 1)))
    net = nets.network(config, dtype=torch.float32)
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    conditions = nets.conditions(8, 0.0, config)
    whole = make_grad_log_prob(net, conditions)(x, 0.01)
    assert torch.equal(
        make_grad_log_prob(net, conditions.select(slice(2, 2 + count)))(x[2 : 2 + count], 0.01), whole[2 : 2 + count]
    )


@pytest.mark.parametrize("noise", [0.0, 5.0, 10.0])
def test_the_network_reads_pixels_in_the_range_of_noised_data_only(noise: float) -> None:
    """Values further than a standard deviation of the noise at t outside [-1, 1] are clamped."""
    config = nets.config()
    network = nets.network(config)
    t = torch.tensor([make_sde(config.sde).time_of(noise)])
    reach = 1 + noise * GREY_LEVEL
    assert network.reach(t).item() == pytest.approx(reach, rel=1e-5)
    inside = torch.rand(1, 3, 8, 8, dtype=torch.float64) * 2 - 1
    far, edge, below = inside.clone(), inside.clone(), inside.clone()
    far[0, 0, 2, 3], edge[0, 0, 2, 3], below[0, 0, 2, 3] = 1e6, network.reach(t).item(), reach - 0.01
    orientation = torch.tensor([0])
    assert torch.equal(network(far, t, None, orientation), network(edge, t, None, orientation))
    assert not torch.equal(network(below, t, None, orientation), network(edge, t, None, orientation))


@pytest.mark.parametrize(
    ("class_name", "seed", "options"),
    [
        ("automobile", 900201, {}),
        ("dog", 900105, {"guidance": 1, "noise": 5}),
        ("airplane", 700094, {"guidance": 1, "noise": 5}),
        ("bird", 720160, {"guidance": 1, "noise": 5}),
        ("airplane", 1003660, {"guidance": 1, "noise": 5}),
    ],
)
def test_an_extreme_draw_does_not_turn_the_rest_of_an_image_into_noise(
    class_name: str, seed: int, options: dict[str, float]
) -> None:
    """These seeds once gave white noise: neighbouring values differed by 96 to 127 grey levels, 33 in real images."""
    image = ncml.load("cifar10").generate(1, classes=class_name, seeds=seed, **options)[0].astype(float)
    assert max(np.abs(np.diff(image, axis=axis)).mean() for axis in (0, 1)) < 40
