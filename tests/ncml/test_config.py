"""Recipes, and the ranges of a configuration."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import ncml
from ncml import config, format1, recipes
from ncml.config import SOLVERS, Config, LevelConfig, ModelConfig
from ncml.errors import InputError
from ncml.network.ncpn import NCPN
from ncml.recipes import RECIPES
from ncml.sampling.solvers import SOLVERS as REFINERS


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_a_network_of_its_size(name: str) -> None:
    recipe = recipes.by_name(name)
    assert recipe.recipe == name
    assert parameters(recipe) > 0


@pytest.mark.parametrize("name", ["smoke", "cifar10_tiny", "cifar10_small"])
def test_small_recipes_run(name: str) -> None:
    recipe = recipes.by_name(name)
    height, width = recipe.model.height, recipe.model.width
    with torch.inference_mode():
        out = NCPN(recipe)(torch.zeros(1, 3, height, width), torch.zeros(1))
    assert out.shape == (1, 10 * recipe.model.mixtures, height, width)
    assert out.isfinite().all()


def parameters(recipe: Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in NCPN(recipe).parameters())


def test_the_paper_s_network_has_73_million_parameters() -> None:
    assert parameters(recipes.paper_cifar10()) == pytest.approx(73e6, rel=0.05)


def test_the_bundled_model_fits_16_mib() -> None:
    assert 2 * parameters(recipes.cifar10_base()) < 16 * 2**20  # in bf16


@pytest.mark.parametrize("name", RECIPES)
def test_json_restores_a_configuration(name: str) -> None:
    recipe = recipes.by_name(name)
    assert Config.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9995, 0.9999, 0.97, 0.0, 0.123456789])
@pytest.mark.parametrize("batch_size", [1, 16, 32, 48])
def test_the_spelling_of_format_1_is_restored_exactly(decay: float, batch_size: int) -> None:
    """The decay of the moving average becomes a horizon in images and back, bit for bit: versions depend on it."""
    spelling = format1.downgrade(recipes.smoke().to_json())
    spelling["training"] |= {"ema": decay, "batch_size": batch_size}
    upgraded = Config.from_json(format1.upgrade(spelling))
    assert format1.downgrade(upgraded.to_json()) == spelling | {"model": upgraded.to_json()["model"]}
    assert 1 - batch_size / upgraded.training.ema_images == pytest.approx(decay, abs=1e-15)


@pytest.mark.parametrize(("decay", "batch_size"), [(0.999, 32), (0.9995, 16)])
def test_equal_averages_over_images_have_equal_horizons(decay: float, batch_size: int) -> None:
    spelling = format1.downgrade(recipes.smoke().to_json())
    spelling["training"] |= {"ema": decay, "batch_size": batch_size}
    assert format1.upgrade(spelling)["training"]["ema_images"] == 32_000


@pytest.mark.parametrize(
    ("height", "width", "levels"), [(30, 32, 3), (32, 31, 2), (2, 4, 3), (0, 0, 1), (8, 8, 0)], ids=str
)
def test_sizes_that_do_not_halve_evenly_are_refused(height: int, width: int, levels: int) -> None:
    with pytest.raises(InputError) as refused:
        ModelConfig(height=height, width=width, levels=(LevelConfig(width=8, blocks=1),) * levels, heads=2)
    assert refused.value.field == "size"
    if levels:
        assert f"multiples of {2 ** (levels - 1)}, not {height}x{width}" in refused.value.detail


def test_heads_must_divide_the_width_where_there_is_attention() -> None:
    plain, attending = (LevelConfig(width=9, blocks=1, attention=attention) for attention in (False, True))
    ModelConfig(levels=(plain,), heads=2)
    with pytest.raises(InputError, match="the 2 heads must divide") as refused:
        ModelConfig(levels=(plain, attending), heads=2)
    assert refused.value.field == "heads"


def test_a_misspelt_recipe_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean cifar10_small") as refused:
        recipes.by_name("cifar10-smal")
    assert refused.value.field == "recipe"
    with pytest.raises(InputError, match="choose from smoke, cifar10_tiny, cifar10_small"):
        recipes.by_name("zebra")


def test_maximum_likelihood_changes_only_the_objective() -> None:
    recipe = recipes.smoke()
    plain = recipes.maximum_likelihood(recipe)
    assert plain.training.clean_probability == 1
    assert replace(plain, training=recipe.training) == recipe


def test_configured_solvers_exist() -> None:
    assert SOLVERS.keys() == REFINERS.keys()
    assert config.DEFAULT_SOLVER in SOLVERS


def test_the_public_names() -> None:
    assert ncml.__all__ == [
        "InputError", "Model", "ModelError", "NcmlError", "NotAnImage", "Score", "TooLarge", "TrainingError", "adapt",
        "load",
    ]  # fmt: skip
    assert all(hasattr(ncml, name) for name in ncml.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        ncml.lod  # noqa: B018


@pytest.mark.parametrize("module", ["ncml", "ncml.images", "ncml.config", "ncml.paths", "ncml.cli.main"])
def test_importing_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
