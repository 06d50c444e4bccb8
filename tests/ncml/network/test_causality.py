"""Each output pixel depends on every pixel before it and on no other, tested by gradients in fp64."""

import pytest
import torch
from torch import Tensor

from ncml.network.mixture import log_prob
from ncml.network.ncpn import NCPN
from tests.ncml import nets

SHAPES = [
    pytest.param(levels, size, id=f"{len(levels)} levels, {size[0]}x{size[1]}")
    for levels in (((4, 2),), ((4, 1), (6, 1)), ((4, 1), (4, 0), (6, 1)))
    for size in ((8, 8), (12, 8))
]


def jacobian(net: NCPN, height: int, width: int, *, of_log_prob: bool) -> Tensor:
    """Compute |d y_p / d x| for the output y_p of every pixel p, [H W, 3, H, W], from item p of one batch."""
    generator = torch.Generator().manual_seed(1)
    count = height * width
    x = torch.rand(1, 3, height, width, generator=generator, dtype=torch.float64) * 2 - 1
    x = x.expand(count, -1, -1, -1).clone().requires_grad_()
    conditions = nets.conditions(count, 0.01, net.config)
    out = net(x, conditions.t_B, conditions.class_B, conditions.orientation_B)
    if of_log_prob:
        out = log_prob(x, out, torch.zeros(count, dtype=torch.bool))[:, None]
    weight = torch.randn(out.shape[1], generator=generator, dtype=torch.float64)
    diagonal = torch.einsum("bphw,p->bhw", out, weight).flatten(1).diagonal()
    return torch.autograd.grad(diagonal.sum(), x)[0].abs()


@pytest.mark.parametrize(("levels", "size"), SHAPES)
@pytest.mark.parametrize("of_log_prob", [False, True], ids=["parameters", "log-probability"])
def test_a_pixel_sees_exactly_the_pixels_before_it(
    levels: nets.Levels, size: tuple[int, int], of_log_prob: bool
) -> None:
    height, width = size
    net = nets.network(nets.config(levels, height=height, width=width))
    jacobian_PPC = (
        jacobian(net, height, width, of_log_prob=of_log_prob).permute(0, 2, 3, 1).flatten(1, 2)
    )  # [pixel, seen, C]
    position = torch.arange(height * width)
    # A pixel's log-probability depends on its own value too; its parameters do not.
    earlier = position[None] <= position[:, None] if of_log_prob else position[None] < position[:, None]
    assert (jacobian_PPC[~earlier] == 0).all()
    assert (jacobian_PPC[earlier] > 1e-12).all()


def test_images_of_a_batch_do_not_see_each_other() -> None:
    net = nets.network(nets.config())
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64).requires_grad_()
    conditions = nets.conditions(3, 0.01, net.config)
    out = net(x, conditions.t_B, conditions.class_B, conditions.orientation_B)
    (grad,) = torch.autograd.grad(out[1].square().sum(), x)
    assert (grad[[0, 2]] == 0).all()
    assert (grad[1, :, :-1] != 0).all()
