"""The network, and each of its parts."""

import pytest
import torch
from torch.nn import functional as F

from ncml import runtime
from ncml.network.layers import AxialAttention, CausalConv, FourierFeatures, Grow, concat_elu, gate
from ncml.network.mixture import initial_bias, log_mixture
from ncml.network.ncpn import NCPN
from ncml.network.sde import end_time
from ncml.recipes import cifar10_base, smoke
from ncml.training.batches import draw_batch
from ncml.training.objective import loss_bits
from tests.ncml import nets
from tests.ncml.training.test_trainer import SMOKE, dataset


def test_concat_elu_is_elu_of_both_signs_and_so_is_its_gradient() -> None:
    x = torch.linspace(-6, 6, 48, dtype=torch.float64).view(2, 3, 2, 4).requires_grad_()
    twin = F.elu(torch.cat([x, -x], 1))
    assert torch.allclose(concat_elu(x), twin, atol=1e-15)
    weight = torch.randn(twin.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (actual,), (expected,) = (torch.autograd.grad((y * weight).sum(), x) for y in (concat_elu(x), twin))
    assert torch.allclose(actual, expected, atol=1e-14)
    with torch.inference_mode():
        assert torch.allclose(concat_elu(x), twin, atol=1e-15)


def test_the_gate_is_glu_and_so_is_its_gradient() -> None:
    ab = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(gate(ab), F.glu(ab, 1), atol=1e-15)
    assert torch.autograd.gradcheck(gate, (ab,))
    with torch.no_grad():
        assert torch.equal(gate(ab), F.glu(ab, 1))


def test_pixels_outside_the_range_of_noised_data_are_read_at_its_end() -> None:
    net = nets.network(nets.config())
    x, t = 3 * torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.full((2,), 0.02)
    reach = float(net.reach(t)[0])
    assert torch.equal(net(x, t), net(x.clamp(-reach, reach), t))


@pytest.mark.parametrize("stream", ["u", "ul"])
def test_halving_and_doubling_restore_the_size(stream: str) -> None:
    x = torch.rand(1, 4, 6, 10)
    assert CausalConv(stream, 4, 5)(x).shape == (1, 5, 6, 10)  # type: ignore[arg-type]
    assert CausalConv(stream, 4, 5, stride=2)(x).shape == (1, 5, 3, 5)  # type: ignore[arg-type]
    assert Grow(stream, 4, 5)(x).shape == (1, 5, 12, 20)  # type: ignore[arg-type]


@pytest.mark.parametrize(("stream", "beside"), [("u", 1), ("ul", 0)])
def test_doubling_is_a_transposed_convolution(stream: str, beside: int) -> None:
    """Of u, the column that the first position emits beside the image is left out."""
    torch.manual_seed(0)
    grow, x = Grow(stream, 4, 5).double(), torch.randn(2, 4, 3, 5, dtype=torch.float64)  # type: ignore[arg-type]
    expected = F.conv_transpose2d(x, grow.weight, grow.bias, stride=2)[..., beside:]
    torch.testing.assert_close(grow(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stream", ["u", "ul"])
def test_attention_agrees_with_the_definition(stream: str) -> None:
    """Compare with a loop over positions, with the masks of each stream."""
    torch.manual_seed(0)
    H, W, N, D = 3, 4, 2, 3
    attention = AxialAttention(stream, N * D, N).double()  # type: ignore[arg-type]
    x = torch.randn(1, N * D, H, W, dtype=torch.float64)
    rows = attention.norm(x[0].permute(1, 2, 0))
    qkv = attention.project(rows).view(H, W, 2, 3, N, D)

    def attend(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """q [N, D]; keys [L, 3, N, D]."""
        weight = torch.softmax(torch.einsum("nd,lnd->nl", q, keys[:, 1]) / D**0.5, 1)
        return torch.einsum("nl,lnd->nd", weight, keys[:, 2]).flatten()

    actual = attention(x)
    for i in range(H):
        for j in range(W):
            row = attend(qkv[i, j, 0, 0], qkv[i, : W if stream == "u" else j + 1, 0])
            column = attend(qkv[i, j, 1, 0], qkv[: i + 1, j, 1])
            expected = (x[0, :, i, j] + attention.out(torch.cat([row, column]))) / 2**0.5
            assert torch.allclose(actual[0, :, i, j], expected, atol=1e-12)


def test_fourier_features_are_bounded_and_distinguish_noise_levels() -> None:
    torch.manual_seed(0)
    features = FourierFeatures(64)(torch.tensor([0.0, 0.1, 2.4]))
    assert features.shape == (3, 64)
    assert features.abs().max() <= 1
    assert torch.pdist(features).min() > 0.5


def test_the_network_is_conditioned_on_noise_class_and_orientation() -> None:
    net = nets.network(nets.config())
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)

    def out(t: float = 0.0, label: int = 0, orientation: int = 0) -> torch.Tensor:
        return net(x, torch.tensor([t]), torch.tensor([label]), torch.tensor([orientation]))

    different = [
        out(),
        out(t=0.02),
        out(t=1e-4),
        out(label=1),
        out(label=2),
        out(orientation=1),
        out(orientation=2),
        out(orientation=3),
    ]
    for i, a in enumerate(different):
        assert a.isfinite().all()
        assert all(not torch.allclose(a, b, atol=1e-6) for b in different[:i])
    assert torch.equal(net(x, torch.zeros(1)), out(label=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_weight_gets_a_gradient(dtype: torch.dtype) -> None:
    """In the initial network of the smoke recipe, no gradient is missing, zero or NaN."""
    torch.manual_seed(0)
    net = NCPN(smoke()).to(dtype)
    batch = draw_batch(dataset(64), SMOKE, 0)
    x = batch.x_BCHW.to(dtype)
    out = net(x, batch.t_B, batch.class_B, batch.orientation_B)
    assert out.dtype == dtype
    (-log_mixture(x, out, batch.t_B == 0).sum((1, 2)).mean()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_extreme_images_have_finite_bits_and_gradients(value: float) -> None:
    """Black, grey and white, clean and noisy, at the bundled model's shape."""
    torch.manual_seed(0)
    config = cifar10_base()
    net = NCPN(config)
    x = torch.full((2, 3, 32, 32), value)
    t = torch.tensor([0.0, end_time(config.sde)])
    bits = -log_mixture(x, net(x, t), t == 0).sum((1, 2)).mean()
    bits.backward()
    assert bits.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_bf16_is_near_fp32() -> None:
    torch.manual_seed(0)
    net = NCPN(smoke())
    batch = draw_batch(dataset(64), SMOKE, 0)
    with torch.no_grad():
        full, half = (loss_bits(net, batch, bf16=bf16) for bf16 in (False, True))
    assert half.dtype == torch.float32
    assert torch.allclose(full, half, atol=0.02)
    assert not torch.equal(full, half)


def test_pixels_are_read_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    net, x_BCHW = NCPN(smoke()), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        exact = net.stem(x_BCHW)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = net.stem(x_BCHW)
    for stream, expected in ((mixed.u, exact.u), (mixed.ul, exact.ul)):
        assert torch.equal(stream.x, expected.x)
        assert torch.equal(stream.elu, expected.elu)


def test_the_initial_mixture_covers_all_grey_levels() -> None:
    bias = initial_bias(3)
    assert bias.shape == (30,)
    assert bias[3:12].view(3, 3)[:, 0].tolist() == pytest.approx([-0.9, 0, 0.9])


def test_convolutions_and_products_stay_in_fp32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    runtime.use_full_precision()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
