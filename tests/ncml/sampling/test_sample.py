"""Drawing pictures: noise that belongs to a seed, known pixels, progress and what is no longer wanted."""

import numpy as np
import pytest
import torch
from scipy import stats

import ncml
from ncml.limits import KEEPS
from ncml.network.likelihood import HALF, from_uint8, to_grid
from ncml.network.sde import GREY_LEVEL
from ncml.progress import Progress
from ncml.sampling.cached import sample_cached
from ncml.sampling.options import SamplingSettings
from ncml.sampling.sample import Noise, Plan, draw, naive, score_function
from ncml.sampling.solvers import SOLVERS
from tests.ncml import nets

CPU = torch.device("cpu")
HALVES = {
    "top": np.s_[:, :4],
    "bottom": np.s_[:, 4:],
    "left": np.s_[:, :, :4],
    "right": np.s_[:, :, 4:],
}


def test_noise_belongs_to_the_seed() -> None:
    both, lone = (Noise(seeds, dtype=torch.float64, device=CPU) for seeds in ([3, 7], [7]))
    for a, b in zip(vars(both.pixels(2, 4, 4)).values(), vars(lone.pixels(2, 4, 4)).values(), strict=True):
        assert torch.equal(a[1:], b)
        assert not torch.equal(a[:1], b)
    assert torch.equal(both.normal(4, 4)[1:], lone.normal(4, 4))


@pytest.mark.parametrize(
    ("part", "law"),
    [
        ("gumbel_BK", stats.gumbel_r()),
        ("logistic_BC", stats.logistic()),
        ("uniform_BC", stats.uniform(-HALF, 2 * HALF)),
    ],
)
def test_noise_has_its_distribution(part: str, law: stats.rv_continuous) -> None:
    """Kolmogorov-Smirnov at 0.001."""
    drawn = getattr(Noise([0], dtype=torch.float64, device=CPU).pixels(3, 64, 64), part)
    assert stats.kstest(drawn.flatten().numpy(), law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_pictures_are_those_of_the_naive_sampler(solver: str) -> None:
    """Through refinement and rounding, in fp64: byte for byte."""
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
        assert np.array_equal(draw(net, plan, naive), draw(net, plan, sample_cached))


@pytest.mark.parametrize("noise", [0.0, 10.0], ids=["direct", "noisy"])
@pytest.mark.parametrize("keep", KEEPS)
def test_known_pixels_come_back(model: ncml.Model, keep: str, noise: float) -> None:
    """And what stands in the unknown half makes no difference, while the known half does."""
    canvases = nets.images(2).numpy()
    foreign, changed = canvases.copy(), canvases.copy()
    unknown = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}[keep]
    foreign[HALVES[unknown]] = 255 - foreign[HALVES[unknown]]
    changed[HALVES[keep]] = 255 - changed[HALVES[keep]]
    found, again, other = (model.complete(c, keep=keep, noise=noise, steps=2) for c in (canvases, foreign, changed))
    assert np.array_equal(found[HALVES[keep]], canvases[HALVES[keep]])
    assert np.array_equal(found, again)
    assert not np.array_equal(found[HALVES[unknown]], other[HALVES[unknown]])
    assert not np.array_equal(found[HALVES[unknown]], canvases[HALVES[unknown]])


def test_the_larger_half_of_an_odd_size_comes_back_whole() -> None:
    """As `ncml.images` cuts it: the row in the middle belongs to the bottom."""
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
        found = draw(network, plan, sample_cached)
        assert np.array_equal(found[half], canvas.numpy()[half]), keep
        assert not np.array_equal(found, canvas.numpy())


def test_a_completion_that_fails_leaves_the_model_as_it_was(model: ncml.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example of memory: the worker goes on with the same model."""
    expected = [score.bpd for score in model.score(nets.images(3).numpy())]

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(model.network.head, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.complete(nets.images(2).numpy())
    assert [score.bpd for score in model.score(nets.images(3).numpy())] == expected


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "tweedie"])
def test_every_solver_keeps_known_pixels(model: ncml.Model, solver: str) -> None:
    canvas = nets.images(1).numpy()
    found = model.complete(canvas, keep="left", n=2, solver=solver, steps=3)
    assert (found[HALVES["left"]] == canvas[HALVES["left"]]).all()
    assert not np.array_equal(found[0], found[1])


def test_progress_is_told_by_row_and_by_step(model: ncml.Model) -> None:
    seen: list[tuple[str, int, int]] = []

    def callback(progress: Progress) -> None:
        seen.append((progress.stage, progress.done, progress.total))
        preview = progress.preview()
        assert preview.dtype == np.uint8
        assert preview.shape == (2, 8, 8, 3)

    model.generate(2, steps=3, callback=callback)
    assert seen == [("noisy_sampling", i, 8) for i in range(1, 9)] + [("refine", i, 3) for i in (1, 2, 3)]


def test_previews_of_a_completion_show_the_known_half_in_its_place(model: ncml.Model) -> None:
    canvas = nets.images(1).numpy()
    previews = []
    model.complete(canvas, keep="right", noise=0, callback=lambda progress: previews.append(progress.preview()))
    assert len(previews) == 4
    assert all((preview[HALVES["right"]] == canvas[HALVES["right"]]).all() for preview in previews)


@pytest.mark.parametrize("sampler", ["incremental", "naive"])
@pytest.mark.parametrize("stop", [("noisy_sampling", 3), ("refine", 2)], ids=["in a row", "in a step"])
def test_nothing_is_drawn_once_nobody_wants_it(model: ncml.Model, stop: tuple[str, int], sampler: str) -> None:
    seen: list[tuple[str, int]] = []

    def callback(progress: Progress) -> set[int] | None:
        seen.append((progress.stage, progress.done))
        return {0, 1} if seen[-1] == stop else None

    pictures = model.generate(2, steps=4, sampler=sampler, callback=callback)
    assert seen[-1] == stop
    assert (pictures == 0).all()


def test_who_is_dropped_leaves_the_others_as_they_are(model: ncml.Model) -> None:
    whole = model.generate(3, steps=2, seeds=5)
    calls = 0

    def callback(progress: Progress) -> list[int]:
        nonlocal calls
        calls += 1
        return [1] if progress.done == 2 else []

    some = model.generate(3, steps=2, seeds=5, callback=callback)
    assert calls == 8 + 2
    assert (some[1] == 0).all()
    assert np.array_equal(some[[0, 2]], whole[[0, 2]])


def test_direct_pictures_are_drawn_on_the_grid() -> None:
    """At t = 0 nothing is left to round."""
    config = nets.config()
    net = nets.network(config)
    drawn = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    noise = Noise([1, 2], dtype=torch.float64, device=CPU).pixels(2, 8, 8)
    sample_cached(net, drawn, nets.conditions(2, 0.0, config), noise, first_row=0, on_row=lambda row: False)
    assert torch.equal(to_grid(drawn), drawn)


@pytest.mark.parametrize("process", ["ve", "vp", "sub-vp"])
def test_refinement_takes_the_noise_away(process: str) -> None:
    """Whatever the process: of noise added to data on which the model's density is a known peak, little is left.

    The network's body is silenced, so that every channel is logistic about grey 0 with the least scale; then the whole
    picture is one grey, and noise shows as deviation from it.
    """
    config = nets.config(((4, 1),), mixtures=1, process=process)  # type: ignore[arg-type]
    net = nets.network(config)
    net.head.weight.zero_()
    net.head.bias.copy_(torch.tensor([0.0] + [0.1] * 3 + [-3.0] * 3 + [0.0] * 3))
    settings = SamplingSettings(noise=10.0, steps=20, solver="euler-maruyama")
    plan = Plan(torch.arange(4).tolist(), torch.zeros(4, dtype=torch.long), settings)
    found = from_uint8(torch.from_numpy(draw(net, plan, sample_cached)))
    assert found.mean().item() == pytest.approx(0.1, abs=0.01)
    # The model's own spread at every level is that of a logistic of scale e^-3; denoising by 10 grey levels narrows it.
    spread = np.pi / np.sqrt(3) * np.exp(-3)
    left = spread**2 * (1 - (10 * GREY_LEVEL / spread) ** 2)
    assert found.std().item() < 1.05 * spread
    assert found.std().item() == pytest.approx(np.sqrt(max(left, 0)), abs=0.25 * spread)


@pytest.mark.parametrize("count", [1, 3])
def test_the_score_of_an_image_does_not_depend_on_its_batch(count: int) -> None:
    """On a CPU, to the bit."""
    config = nets.config(((6, 1), (10, 1)))
    net = nets.network(config, dtype=torch.float32)
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = nets.conditions(8, 0.0, config)
    whole = score_function(net, given)(x, 0.01)
    assert torch.equal(score_function(net, given.of(slice(2, 2 + count)))(x[2 : 2 + count], 0.01), whole[2 : 2 + count])


def test_a_stray_draw_stays_one_stray_draw() -> None:
    """What lies beyond the reach of noised data is read as lying at its edge, by network and sampler alike."""
    network = nets.network(nets.config())
    inside = torch.rand(1, 3, 8, 8, dtype=torch.float64) * 2 - 1
    far, edge = inside.clone(), inside.clone()
    far[0, 0, 2, 3], edge[0, 0, 2, 3] = 1e6, network.reach
    t, orientation = torch.tensor([0.01]), torch.tensor([0])
    assert 1.3 < network.reach < 1.32
    assert torch.equal(network(far, t, None, orientation), network(edge, t, None, orientation))
