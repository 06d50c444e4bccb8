"""Training that starts with another model's weights: the function under the null class is the same."""

from dataclasses import replace

import pytest
import torch

from ncml.config import Config, LevelConfig
from ncml.errors import InputError
from ncml.network.ncpn import NCPN
from ncml.training.transfer import start_from
from tests.ncml import nets


def outputs(network: NCPN, class_B: torch.Tensor | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x_BCHW = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    with torch.inference_mode():
        return network(x_BCHW, torch.tensor([0.0, 0.01], dtype=torch.float64), class_B)


@pytest.mark.parametrize("classes", [("b", "c"), ("a", "b"), ()], ids=["other classes", "same", "none"])
@pytest.mark.parametrize("orientations", [True, False])
@pytest.mark.parametrize(
    "source", [nets.config(), nets.config(classes=(), orientations=False)], ids=["with", "without"]
)
def test_the_null_class_computes_the_same(source: Config, classes: tuple[str, ...], orientations: bool) -> None:
    before = nets.network(source)
    after = nets.network(nets.config(classes=classes, orientations=orientations, sde="ve"), seed=1)
    assert not torch.allclose(outputs(after), outputs(before))
    start_from(after, before, "source")
    # The noise level is read in grey levels, so at t = 0 the processes agree.
    assert torch.allclose(outputs(after)[0], outputs(before)[0], atol=1e-12)


def test_a_class_of_the_same_name_keeps_its_embedding_and_a_new_one_starts_without() -> None:
    before, after = nets.network(nets.config()), nets.network(nets.config(classes=("c", "a")), seed=1)
    start_from(after, before, "source")
    a, c, null = (torch.full((2,), index) for index in (1, 0, 2))
    assert torch.allclose(outputs(after, a), outputs(before, torch.zeros(2, dtype=torch.long)))
    assert torch.equal(outputs(after, c), outputs(after, null))
    assert not torch.allclose(outputs(after, a), outputs(after, null))


def test_another_image_size_may_start_from_the_same_weights() -> None:
    before, after = nets.network(nets.config()), nets.network(nets.config(height=16, width=12), seed=1)
    start_from(after, before, "source")
    assert torch.equal(outputs(after), outputs(before))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixtures": 3}, "the model source has mixtures 3 and the recipe test has 2: use the recipe"),
        ({"levels": (LevelConfig(width=4, blocks=1),)}, "has levels 4x1a and the recipe test has 4x1a/6x1a"),
        ({"heads": 1}, "has heads 1 and"),
    ],
)
def test_another_network_shape_is_refused(change: dict[str, object], message: str) -> None:
    source = nets.config()
    source = replace(source, model=replace(source.model, **change))
    with pytest.raises(InputError, match=message) as refused:
        start_from(nets.network(nets.config()), nets.network(source), "source")
    assert refused.value.field == "init-from"
