"""The public interface: scores are correct, and every mistake is explained in a sentence."""

import copy
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ncml
from ncml.errors import InputError, ModelError
from ncml.network.mixture import LOG_SCALES, split_parameters
from tests.ncml import nets

IMAGES = nets.images(5).numpy()


def direct_nats(model: ncml.Model, image: np.ndarray, label: int) -> np.ndarray:
    """Compute log p of every pixel by differences of cdfs in fp64, pixel by pixel: [H, W] nats."""
    net = model.network
    x = (torch.from_numpy(image).double().permute(2, 0, 1)[None] - 127.5) / 127.5
    with torch.inference_mode():
        out = net(x.float(), torch.zeros(1), torch.tensor([label])).double()
    mixture = split_parameters(out)
    nats = np.zeros(image.shape[:2])
    for i, j in np.ndindex(*nats.shape):
        r, g, b = x[0, :, i, j].tolist()
        components = [(1e-6, (0.0, 0.0, 0.0), (0.5, 0.5, 0.5))]  # the first is that of outliers
        for k, weight in enumerate(torch.softmax(mixture.logit_BK[0, :, i, j], 0).tolist()):
            mean = mixture.mean_BKC[0, k, :, i, j].tolist()
            scale = mixture.log_scale_BKC[0, k, :, i, j].clamp(*LOG_SCALES).exp().tolist()
            c = mixture.coefficient_BKC[0, k, :, i, j].tolist()
            centres = (mean[0], mean[1] + c[0] * r, mean[2] + c[1] * r + c[2] * g)
            components.append(((1 - 1e-6) * weight, centres, scale))
        total = 0.0
        for weight, centres, scale in components:
            product = weight
            for value, grey, centre, s in zip((r, g, b), image[i, j].tolist(), centres, scale, strict=True):
                upper = 1.0 if grey == 255 else 1 / (1 + math.exp(-(value + 1 / 255 - centre) / s))
                lower = 0.0 if grey == 0 else 1 / (1 + math.exp(-(value - 1 / 255 - centre) / s))
                product *= upper - lower
            total += product
        nats[i, j] = math.log(total)
    return nats


@pytest.mark.parametrize(("classes", "label"), [(None, 2), ("b", 1), (0, 0)])
def test_a_score_is_the_likelihood_computed_by_hand(model: ncml.Model, classes: str | int | None, label: int) -> None:
    image = IMAGES[0].copy()
    image[0, 0], image[3, 4] = 0, 255
    (score,) = model.score(image, classes=classes, map=True)
    nats = direct_nats(model, image, label)
    assert score.log_likelihood == pytest.approx(nats.sum(), rel=1e-4)
    assert score.bpd == pytest.approx(-nats.sum() / (math.log(2) * 8 * 8 * 3), rel=1e-4)
    assert score.map is not None
    assert score.map.dtype == np.float32
    assert np.allclose(score.map, -nats / (3 * math.log(2)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("noise", [0.0, 4.0])
def test_the_map_s_mean_is_the_score(model: ncml.Model, noise: float) -> None:
    for score in model.score(IMAGES, noise=noise, map=True):
        assert score.map is not None
        assert score.map.shape == (8, 8)
        assert score.map.mean() == pytest.approx(score.bpd, rel=1e-5)
        assert score.bpd == pytest.approx(-score.log_likelihood / (192 * math.log(2)))


def test_scores_are_deterministic_and_depend_on_the_arguments(model: ncml.Model) -> None:
    conditions = [{}, {"noise": 2.0}, {"noise": 10.0}, {"classes": "a"}, {"classes": 1}]
    scores = [[score.bpd for score in model.score(IMAGES, **options)] for options in conditions]
    assert scores == [[score.bpd for score in model.score(IMAGES, **options)] for options in conditions]
    assert len({tuple(score) for score in scores}) == len(conditions)
    assert model.score(IMAGES[:1])[0].map is None


def test_large_sets_are_scored_in_batches(model: ncml.Model) -> None:
    whole = [score.bpd for score in model.score(IMAGES, classes=["a", "b", None, 0, 1])]
    parts = [score.bpd for score in model.score(IMAGES, classes=["a", "b", None, 0, 1], batch_size=2)]
    assert parts == pytest.approx(whole, rel=1e-5)


def test_images_are_returned_as_arrays(model: ncml.Model) -> None:
    expected = [score.bpd for score in model.score(IMAGES[:2])]
    as_pil = [Image.fromarray(image) for image in IMAGES[:2]]
    for batch in (list(IMAGES[:2]), as_pil, [as_pil[0], IMAGES[1]], IMAGES[:2][:, :, ::-1][:, :, ::-1]):
        assert [score.bpd for score in model.score(batch)] == expected
    assert model.score(as_pil[0])[0].bpd == pytest.approx(expected[0], rel=1e-5)
    grey = Image.fromarray(IMAGES[0, :, :, 0])
    assert model.score(grey)[0].bpd == model.score(np.stack([IMAGES[0, :, :, 0]] * 3, -1))[0].bpd


def test_a_model_describes_itself(model: ncml.Model, plain_model: ncml.Model) -> None:
    assert (model.name, model.height, model.width) == ("loud", 8, 8)
    assert model.classes == ("a", "b")
    assert model.noise == 10
    assert model.keeps == ("top", "bottom", "left", "right")
    assert model.metrics == {"test_bpd": 5.0}
    assert model.card == "# loud\n"
    assert (plain_model.width, plain_model.classes, plain_model.keeps) == (12, (), ("top",))


def test_seeds_count_up_and_may_be_listed(model: ncml.Model) -> None:
    first = model.generate(3, seeds=7, steps=1)
    assert first.shape == (3, 8, 8, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, model.generate(3, seeds=[7, 8, 9], steps=1))
    assert np.array_equal(first[1:2], model.generate(seeds=8, steps=1))
    assert not np.array_equal(first[0], first[1])
    assert model.generate(seeds=2**32 - 1, steps=1).shape == (1, 8, 8, 3)


def test_classes_noise_and_solvers_change_the_images(model: ncml.Model) -> None:
    conditions: list[dict] = [
        {}, {"classes": "a"}, {"classes": "b"}, {"noise": 0}, {"noise": 5}, {"solver": "heun", "steps": 3},
        {"steps": 1}, {"solver": "predictor-corrector", "steps": 3}, {"steps": 4},
    ]  # fmt: skip
    images = [model.generate(2, **({"steps": 2} | options)).tobytes() for options in conditions]
    assert len(set(images)) == len(conditions)
    assert model.generate(2, steps=1).tobytes() == model.generate(2, solver="tweedie").tobytes()
    assert model.generate(2, classes=["a", 1]).tobytes() == model.generate(2, classes=[0, "b"]).tobytes()


def test_a_model_that_is_not_square_generates_and_completes(plain_model: ncml.Model) -> None:
    assert plain_model.generate(2, steps=2).shape == (2, 8, 12, 3)
    canvas = nets.images(1, 8, 12).numpy()
    completed = plain_model.complete(canvas, n=3, steps=2)
    assert (completed[:, :4] == canvas[:, :4]).all()


def test_the_default_sampler_is_the_fast_one(model: ncml.Model) -> None:
    """It computes the network's output position by position, not for the whole image each time."""
    passes: list[object] = []
    hook = model.network.register_forward_hook(lambda *_: passes.append(None))
    try:
        model.generate(seeds=3, noise=0)
        assert not passes
        model.generate(seeds=3, noise=0, sampler="naive")
        assert len(passes) == 64
    finally:
        hook.remove()


def test_bits_per_dim_of_a_class_are_not_those_of_the_statistic(model: ncml.Model) -> None:
    """The statistic `bpd` ignores the class."""
    (score,) = model.score(IMAGES[0], classes="a", statistics=["bpd", "llr"])
    assert score["bpd"] == score.to_dict()["bpd"] == score.bpd
    assert score.statistics["bpd"] == model.score(IMAGES[0])[0].bpd != score.bpd
    assert score["llr"] == score.statistics["llr"]


MISTAKES: list[tuple[str, Callable[[ncml.Model], object], str]] = [
    ("class", lambda m: m.score(IMAGES, classes=1.5), "there is no class 1.5"),  # type: ignore[arg-type]
    ("noise", lambda m: m.score(IMAGES, noise="1"), "noise must be a number, not '1'"),  # type: ignore[arg-type]
    ("seed", lambda m: m.generate(seeds=None), "seeds must be whole numbers"),  # type: ignore[arg-type]
    ("temperature", lambda m: m.generate(temperature="1"), "must be a number"),  # type: ignore[arg-type]
    ("images[0]", lambda m: m.score(IMAGES.astype(np.float32)), r"must be uint8 \[height, width, 3\], not float32"),
    ("images", lambda m: m.score(IMAGES[:, :4], preprocess=False), r"not uint8 \[4, 8, 3\]: resize them"),
    ("images", lambda m: m.score(IMAGES[0, :, :, :2]), r"must be uint8 \[height, width, 3\], not uint8 \[8, 8, 2\]"),
    ("images", lambda m: m.score(Image.new("RGB", (9, 8)), preprocess=False), r"not uint8 \[8, 9, 3\]: resize them"),
    ("images", lambda m: m.score([IMAGES[0], IMAGES[0, :4]], preprocess=False), "uint8"),
    ("images", lambda m: m.score(Image.new("F", (8, 8))), "a PIL image cannot be converted to RGB: 32-bit samples"),
    ("images", lambda m: m.complete(IMAGES[:, :6], preprocess=False), r"not uint8 \[6, 8, 3\]"),
    ("missing.png", lambda m: m.score("missing.png"), "missing.png cannot be read"),
    ("images", lambda m: m.score([]), "image"),
    ("images", lambda m: m.complete(IMAGES[:0]), "image"),
    ("class", lambda m: m.score(IMAGES, classes="zebra"), "no class 'zebra': choose from a, b"),
    ("class", lambda m: m.generate(classes=2), "no class 2: choose from a, b"),
    ("class", lambda m: m.generate(classes=-1), "no class -1"),
    ("classes", lambda m: m.generate(3, classes=["a", "b"]), "2 classes for 3 images"),
    ("n", lambda m: m.generate(0), "1 to 1024, not 0"),
    ("n", lambda m: m.generate(10**9), "1 to 1024, not 1000000000"),
    ("n", lambda m: m.complete(IMAGES[:1], n=-1), "1 to 1024, not -1"),
    ("n", lambda m: m.complete(IMAGES[:1], n=10**9), "1 to 1024"),
    ("n", lambda m: m.complete(IMAGES[:2], n=2), "one image"),
    ("n", lambda m: m.generate(2.5), "n must be an integer, not 2.5"),  # type: ignore[arg-type]
    ("images", lambda m: m.complete(np.repeat(IMAGES, 205, 0)), "at most 1024 images .*, not 1025"),
    ("batch_size", lambda m: m.score(IMAGES, batch_size=-1), "at least 1, not -1"),
    ("batch_size", lambda m: m.score(IMAGES, batch_size=0), "at least 1, not 0"),
    ("batch_size", lambda m: m.score(IMAGES, batch_size=1.5), "an integer"),  # type: ignore[arg-type]
    ("batch_size", lambda m: m.scan(IMAGES[0], batch_size=-1), "at least 1, not -1"),
    ("tile_size", lambda m: m.scan(IMAGES[0], tile_size=8.5), "an integer"),  # type: ignore[arg-type]
    ("seed", lambda m: m.generate(2, seeds=[1, 1.5]), "whole numbers"),
    ("seed", lambda m: m.generate(seeds=-1), "from 0 to 4294967295"),
    ("seed", lambda m: m.generate(2, seeds=2**32 - 1), "from 0 to 4294967295"),
    ("seeds", lambda m: m.generate(2, seeds=[1]), "1 seeds for 2 images"),
    ("noise", lambda m: m.score(IMAGES, noise=-1), "0 to 10 grey levels, not -1"),
    ("noise", lambda m: m.score(IMAGES, noise=math.nan), "0 to 10 grey levels"),
    ("noise", lambda m: m.generate(noise=10.1), "0 to 10 grey levels, not 10.1"),
    ("steps", lambda m: m.generate(steps=0), "1 to 1000, not 0"),
    ("steps", lambda m: m.generate(steps=1001), "1 to 1000, not 1001"),
    ("steps", lambda m: m.generate(steps=2, solver="tweedie"), "exactly 1 step"),
    ("steps", lambda m: m.generate(steps=5.0, solver="heun"), "an integer, not 5.0"),  # type: ignore[arg-type]
    ("steps", lambda m: m.generate(steps=math.nan), "an integer, not nan"),  # type: ignore[arg-type]
    ("steps", lambda m: m.generate(steps=math.inf), "an integer, not inf"),  # type: ignore[arg-type]
    ("solver", lambda m: m.generate(solver="ddim"), "choose from tweedie, euler-maruyama, heun, predictor-corrector"),
    ("sampler", lambda m: m.generate(sampler="slow"), "choose from incremental, naive"),
    ("keep", lambda m: m.complete(IMAGES, keep="middle"), "or right for this model, not 'middle'"),
]


@pytest.mark.parametrize(("field", "mistake", "message"), MISTAKES)
def test_an_invalid_argument_is_named(
    model: ncml.Model, field: str, mistake: Callable[[ncml.Model], object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        mistake(model)
    assert refused.value.field == field
    assert "\n" not in refused.value.detail


def test_options_that_a_model_does_not_support_are_refused(plain_model: ncml.Model) -> None:
    canvas = nets.images(1, 8, 12).numpy()
    with pytest.raises(InputError, match="keep must be top for this model, not 'left'"):
        plain_model.complete(canvas, keep="left")
    with pytest.raises(InputError, match="this model has no classes"):
        plain_model.generate(classes="cat")


def test_an_unusable_device_is_refused(model: ncml.Model) -> None:
    with pytest.raises(ncml.ModelError, match="cannot be placed on 'cuda:99': ") as refused:
        ncml.load(model.folder, device="cuda:99")
    assert "\n" not in str(refused.value)
    assert refused.value.__cause__  # by which a worker decides whether to try again


@pytest.mark.parametrize("device", ["abacus", "meta", "hpu", "cuda:", "CPU", ""])
def test_an_invalid_device_name_is_refused(model: ncml.Model, device: str) -> None:
    with pytest.raises(ncml.InputError, match=f"there is no device '{device}': name cpu, cuda or cuda:N") as refused:
        ncml.load(model.folder, device=device)
    assert refused.value.field == "device"


def test_numpy_numbers_are_numbers(model: ncml.Model) -> None:
    numbers = [np.int64(i) for i in range(4)]
    images = model.generate(numbers[2], seeds=numbers[3], classes=numbers[1], steps=numbers[1])  # type: ignore[arg-type]
    assert np.array_equal(images, model.generate(2, seeds=3, classes=1, steps=1))


def test_a_relative_folder_has_its_name(model: ncml.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.folder)
    assert ncml.load(Path()).name == "loud"


def test_a_copy_is_loaded_from_the_folder_again_unless_that_has_changed(model: ncml.Model, tmp_path: Path) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(model.folder, folder)
    loaded = ncml.load(folder, batching="fixed")
    expected = [score.bpd for score in loaded.score(IMAGES)]
    copies = copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))
    for copied in copies:
        assert copied.network is not loaded.network
        assert copied.batching == loaded.batching
        assert [score.bpd for score in copied.score(IMAGES)] == expected
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"a"', '"z"'))
    with pytest.raises(ModelError):
        copy.deepcopy(loaded)


def test_recordings_are_released_when_memory_runs_out(model: ncml.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they hold memory that smaller batches need."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("ncml.model.generate_images", fail)
    released: list[bool] = []
    monkeypatch.setattr(model._replay, "release", lambda: released.append(True))
    with pytest.raises(torch.OutOfMemoryError):
        model.generate()
    assert released == [True]
