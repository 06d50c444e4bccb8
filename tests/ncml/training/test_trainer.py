"""The objective, and runs that stop at any moment."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor

from ncml import format1
from ncml.config import Config, TrainingConfig
from ncml.data.dataset import Dataset
from ncml.errors import InputError, TrainingError
from ncml.network.mixture import bits_per_dim, from_uint8, log_mixture, to_uint8
from ncml.network.ncpn import NCPN
from ncml.network.sde import end_time, make_sde
from ncml.recipes import maximum_likelihood, smoke
from ncml.training.batches import draw_batch
from ncml.training.distributed import ProcessGroup
from ncml.training.loop import train_loop
from ncml.training.objective import held_out_bits, loss_bits, measure_held_out
from ncml.training.optimizer import Optimizer, learning_rate_share
from ncml.training.trainer import MAX_SKIPPED, Execution, Trainer
from tests.ncml import nets

SMOKE = replace(
    smoke(), training=replace(smoke().training, batch_size=16, total_images=256, warmup_images=64, ema_images=160)
)


def dataset(count: int = 64) -> Dataset:
    images = nets.images(count)
    bright = (images.float().mean((1, 2, 3)) > 127).long()
    return Dataset(images, bright, ("dark", "light"))


def test_processes_share_the_held_out_images_even_if_there_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessGroup, "all_reduce", lambda self, value: value)  # each one's share of the sum
    network, data = nets.network(nets.config(), dtype=torch.float32), dataset(2)
    shares = [held_out_bits(network, data, group=ProcessGroup(rank=rank, world_size=3)) for rank in range(3)]
    assert shares[2] == 0
    assert sum(shares) == pytest.approx(held_out_bits(network, data))


def test_maximum_likelihood_is_ncml_with_all_mass_at_t_0() -> None:
    """Every t is 0, every pixel lies on the grid, and the loss is the discretised likelihood of the images."""
    config = maximum_likelihood(SMOKE)
    config = replace(
        config, training=replace(config.training, flip=False, orientation_probability=0.0, class_dropout=0.0)
    )
    data = dataset(16)
    batch = draw_batch(data, config, 0)
    assert (batch.t_B == 0).all()
    torch.manual_seed(0)
    net = NCPN(config)
    x = from_uint8(data.images_NHWC)
    clean = torch.ones(16, dtype=torch.bool)
    plain = bits_per_dim(log_mixture(x, net(x, torch.zeros(16), data.labels_N), clean).sum((1, 2)), 64)
    loss_B = loss_bits(net, batch, bf16=False)
    assert torch.allclose(loss_B.sort().values, plain.sort().values, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_images_is_grey(share: float) -> None:
    """Grey as Pillow makes them, and on the grid of grey levels."""
    config = replace(
        maximum_likelihood(SMOKE),
        training=replace(maximum_likelihood(SMOKE).training, flip=False, orientation_probability=0.0, grey_share=share),
    )
    data = dataset(16)
    batches = [draw_batch(data, config, step) for step in range(20)]
    images = torch.cat([to_uint8(batch.x_BCHW) for batch in batches]).numpy()
    is_grey = (images == images[..., :1]).all((1, 2, 3))
    assert abs(is_grey.mean() - share) <= 4 * math.sqrt(share * (1 - share) / len(images))
    for image, index in zip(images, torch.cat([batch.index_B for batch in batches]), strict=True):
        original = Image.fromarray(data.images_NHWC[index].numpy())
        grey = np.asarray(original.convert("L")).astype(int)[..., None]
        assert np.array_equal(image, original) or np.abs(image - grey).max() <= 1


def test_a_batch_is_a_function_of_its_step() -> None:
    data = dataset()
    first, again, next_one = (draw_batch(data, SMOKE, step) for step in (3, 3, 4))
    for name in vars(first):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.x_BCHW, next_one.x_BCHW)


def test_every_image_is_drawn_once_per_epoch() -> None:
    data = dataset(40)  # not a multiple of the batch
    config = replace(
        SMOKE, training=replace(SMOKE.training, flip=False, orientation_probability=0.0, clean_probability=1.0)
    )
    images = torch.cat([draw_batch(data, config, step).x_BCHW for step in range(5)])
    for epoch in images.split(40):
        pixels = {image.numpy().tobytes() for image in epoch.contiguous()}
        assert pixels == {image.numpy().tobytes() for image in from_uint8(data.images_NHWC).contiguous()}


def test_mu_has_its_mass_at_0_and_is_uniform_elsewhere() -> None:
    """Binomial within four standard errors; Kolmogorov-Smirnov at 0.001."""
    config = replace(SMOKE, training=replace(SMOKE.training, batch_size=4096, clean_probability=0.25))
    batch = draw_batch(dataset(), config, 0)
    clean = batch.t_B == 0
    assert abs(clean.double().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4096)
    T = end_time(config.sde)
    assert batch.t_B.max() <= T
    assert stats.kstest(batch.t_B[~clean].double().numpy(), stats.uniform(0, T).cdf).pvalue > 1e-3


def test_noise_is_added_by_the_sde() -> None:
    """(x_t - alpha x_0) / sigma is standard normal; clean items are untouched."""
    black = Dataset(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.long), ("dark", "light"))
    config = replace(SMOKE, training=replace(SMOKE.training, batch_size=256))
    batch = draw_batch(black, config, 0)
    clean = batch.t_B == 0
    assert (batch.x_BCHW[clean] == -1).all()
    sde = make_sde(config.sde)
    alpha, sigma = (part(batch.t_B[~clean])[:, None, None, None] for part in (sde.alpha, sde.sigma))
    standard = (batch.x_BCHW[~clean] + alpha) / sigma
    assert stats.kstest(standard.flatten()[:20_000].numpy(), stats.norm.cdf).pvalue > 1e-3


def test_classes_are_dropped_and_images_oriented_at_the_stated_rates() -> None:
    config = replace(SMOKE, training=replace(SMOKE.training, batch_size=4096))
    batch = draw_batch(dataset(), config, 0)
    assert abs((batch.class_B == 2).double().mean() - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 4096)
    assert abs((batch.orientation_B != 0).double().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4096)


def test_images_that_are_not_square_are_oriented_as_a_batch() -> None:
    config = nets.config(width=12, training=TrainingConfig(batch_size=4, orientation_probability=1.0))
    data = Dataset(nets.images(4, 8, 12), torch.zeros(4, dtype=torch.long), ("a", "b"))
    shapes = {tuple(draw_batch(data, config, step).x_BCHW.shape[2:]) for step in range(12)}
    assert shapes == {(8, 12), (12, 8)}


def test_the_learning_rate_warms_up_and_cools_down() -> None:
    training = TrainingConfig(total_images=1000, batch_size=10, warmup_images=100, cooldown_fraction=0.3)
    rates = [learning_rate_share(training, images) for images in range(0, 1010, 10)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:71] == [1.0] * 62
    assert rates[85] == pytest.approx(0.5)
    assert rates[100] == 0


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return dict(trainer.network.state_dict()) | {f"ema.{k}": v for k, v in trainer.ema.state_dict().items()}


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """Losses, weights and moving average are equal bit for bit, with dropout, whose draws continue too."""
    config = replace(SMOKE, model=replace(SMOKE.model, dropout=0.1))
    whole = Trainer(config, dataset())
    losses = [whole.train_step() for _ in range(6)]
    interrupted = Trainer(config, dataset())
    first = [interrupted.train_step() for _ in range(3)]
    interrupted.save(tmp_path / "state.safetensors")
    torch.manual_seed(999)
    resumed = Trainer(config, dataset())
    resumed.resume(tmp_path / "state.safetensors")
    assert resumed.images_seen == 48
    assert first + [resumed.train_step() for _ in range(3)] == losses
    for name, tensor in state(whole).items():
        assert torch.equal(state(resumed)[name], tensor), name


def test_a_resumed_run_continues_the_mean_of_the_loss(tmp_path: Path) -> None:
    """Stopped between two measurements, it writes the same learning curve."""
    whole = Trainer(SMOKE, dataset())
    whole.set_length(12 * SMOKE.training.batch_size)
    train_loop(whole, tmp_path / "whole.safetensors", held_out=dataset())
    interrupted = Trainer(SMOKE, dataset())
    interrupted.set_length(12 * SMOKE.training.batch_size)

    def stop(trainer: Trainer, mean_loss: float, rate: float) -> None:
        if trainer.step == 5:
            signal.raise_signal(signal.SIGTERM)

    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_loop(interrupted, path, held_out=dataset(), on_step=stop)
    resumed = Trainer(SMOKE, dataset())
    resumed.resume(path)
    train_loop(resumed, path, held_out=dataset())
    assert [row["train_bpd"] for row in resumed.history] == [row["train_bpd"] for row in whole.history]


def test_a_state_without_the_mean_of_the_loss_continues_that_of_its_last_measurement(tmp_path: Path) -> None:
    trainer = Trainer(SMOKE, dataset())
    trainer.history.append({"images": 16, "seconds": 1, "train_bpd": 7.5, "held_out_bpd": 7.4})
    trainer.save(tmp_path / "state.safetensors")
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    assert progress.pop("mean_loss") is None
    tensors = load_file(tmp_path / "state.safetensors")
    save_file(tensors, tmp_path / "earlier.safetensors", metadata={"progress": json.dumps(progress)})
    resumed = Trainer(SMOKE, dataset())
    resumed.resume(tmp_path / "earlier.safetensors")
    assert resumed.running_loss.mean == 7.5


def as_format_1(path: Path) -> None:
    """Rewrite a training state's description in format 1, with the decay per step of the average."""
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    progress["config"] = format1.downgrade(progress["config"])
    assert progress.pop("format") == 2
    save_file(load_file(path), path, metadata={"progress": json.dumps(progress)})


def test_a_run_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    """It resumes like a run of this version, with its own horizon of the moving average."""
    config = replace(SMOKE, training=replace(SMOKE.training, muon_learning_rate=4e-3, ema_images=80))
    whole = Trainer(config, dataset())
    losses = [whole.train_step() for _ in range(4)]
    first = Trainer(config, dataset())
    assert [first.train_step() for _ in range(2)] == losses[:2]
    first.save(tmp_path / "state.safetensors")
    as_format_1(tmp_path / "state.safetensors")
    resumed = Trainer(replace(config, training=replace(config.training, ema_images=160)), dataset())
    resumed.resume(tmp_path / "state.safetensors")
    assert resumed.config == config
    assert [resumed.train_step() for _ in range(2)] == losses[2:]
    assert all(torch.equal(tensor, state(resumed)[name]) for name, tensor in state(whole).items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 3}, "has format 3, newer than 2, .*: upgrade ncml"),
        ({"format": 1}, "has a configuration that this ncml cannot read"),
        ({"config": {}}, "has a configuration that this ncml cannot read"),
    ],
    ids=["newer", "wrong", "damaged"],
)
def test_a_state_of_another_format_is_not_resumed(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    path = tmp_path / "state.safetensors"
    Trainer(SMOKE, dataset()).save(path)
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"]) | change
    save_file(load_file(path), path, metadata={"progress": json.dumps(progress)})
    with pytest.raises(TrainingError, match=reason):
        Trainer(SMOKE, dataset()).resume(path)


@pytest.mark.parametrize("damage", ["cut", "text", "absent"])
def test_a_damaged_state_is_not_resumed(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.safetensors"
    trainer = Trainer(SMOKE, dataset())
    trainer.train_step()
    trainer.save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "text":
        path.write_text("state")
    else:
        path.unlink()
    with pytest.raises(TrainingError, match="not a training state that can be resumed"):
        Trainer(SMOKE, dataset()).resume(path)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (replace(SMOKE, model=replace(SMOKE.model, mixtures=4)), r"model \(mixtures 3, not 4\)"),
        (replace(SMOKE, sde=replace(SMOKE.sde, kind="ve")), r"--process \(kind 'vp', not 've'\)"),
        (maximum_likelihood(SMOKE), r"--objective \(clean_probability 0.25, not 1.0\)"),
        (replace(SMOKE, recipe="big", model=replace(SMOKE.model, mixtures=4)), r"recipe \(smoke, not big\)"),
    ],
)
def test_another_run_is_not_resumed(tmp_path: Path, other: Config, difference: str) -> None:
    Trainer(SMOKE, dataset()).save(tmp_path / "state.safetensors")
    with pytest.raises(TrainingError, match=f"is a run with another {difference}: resume with"):
        Trainer(other, dataset()).resume(tmp_path / "state.safetensors")


def test_a_run_can_be_made_longer(tmp_path: Path) -> None:
    Trainer(SMOKE, dataset()).save(tmp_path / "state.safetensors")
    longer = Trainer(SMOKE, dataset())
    longer.resume(tmp_path / "state.safetensors", total_images=1024)
    assert longer.config.training.total_images == longer.ema.config.training.total_images == 1024
    longer.save(tmp_path / "state.safetensors")
    again = Trainer(SMOKE, dataset())
    again.resume(tmp_path / "state.safetensors")
    assert again.config.training.total_images == 1024


def test_a_run_is_not_made_shorter_than_it_is(tmp_path: Path) -> None:
    """Its model would state a length that differs from the images seen; those of the last batch may exceed it."""
    trainer = Trainer(SMOKE, dataset())
    trainer.step, batch_size = 3, SMOKE.training.batch_size
    trainer.save(tmp_path / "state.safetensors")
    Trainer(SMOKE, dataset()).resume(tmp_path / "state.safetensors", total_images=2 * batch_size + 1)
    with pytest.raises(InputError, match=f"has seen {3 * batch_size} images already; --max-images must") as refused:
        Trainer(SMOKE, dataset()).resume(tmp_path / "state.safetensors", total_images=2 * batch_size)
    assert refused.value.field == "max-images"


def test_a_branch_cools_down_from_the_state_of_its_run(tmp_path: Path) -> None:
    """The rate is constant before and falls linearly to 0 after; a resumed branch does the same."""
    config = replace(
        SMOKE, training=replace(SMOKE.training, cooldown_fraction=0.0, total_images=100_000, warmup_images=16)
    )
    constant = Trainer(config, dataset())
    for _ in range(10):
        constant.train_step()
    assert learning_rate_share(constant.config.training, 90_000) == 1.0
    constant.save(tmp_path / "constant.safetensors")
    branch = Trainer(config, dataset())
    branch.resume(tmp_path / "constant.safetensors")
    branch.cool_down(320)
    rates = [learning_rate_share(branch.config.training, images) for images in (160, 240, 320)]
    assert rates == pytest.approx([1.0, 0.5, 0.0])
    branch.train_step()
    branch.save(tmp_path / "branch.safetensors")
    resumed = Trainer(config, dataset())
    resumed.resume(tmp_path / "branch.safetensors")
    assert resumed.config.training == branch.config.training
    assert resumed.train_step() == branch.train_step()
    with pytest.raises(InputError, match="has seen 192 images already; --max-images must be more than that"):
        resumed.cool_down(160)


def test_processes_draw_dropout_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: dict[int, Tensor] = {}
    for rank in range(3):
        trainer = Trainer(SMOKE, dataset(), group=ProcessGroup(rank=rank))
        loss = trainer.loss

        def draw(*args: Any, rank: int = rank, loss: Any = loss, **options: Any) -> Tensor:
            draws[rank] = torch.rand(8)
            return loss(*args, **options)

        monkeypatch.setattr(trainer, "loss", draw)
        trainer.train_step()
    assert not any(torch.equal(draws[rank], draws[other]) for rank in range(3) for other in range(rank))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("hangups")
def test_a_signal_stops_the_run_between_steps_after_saving(tmp_path: Path, number: int) -> None:
    """The state is saved without the measurement that is due after this step."""
    trainer, path = Trainer(SMOKE, dataset()), tmp_path / "state.safetensors"

    def report(trainer: Trainer, bits: float, rate: float) -> None:
        if trainer.step == 3:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt, match="stopped after 48 images, all saved"):
        train_loop(trainer, path, held_out=dataset(), interval=48, on_step=report)
    assert trainer.history == []
    resumed = Trainer(SMOKE, dataset())
    resumed.resume(path)
    assert resumed.step == 3
    assert state(resumed).keys() == state(trainer).keys()
    assert all(torch.equal(tensor, state(trainer)[name]) for name, tensor in state(resumed).items())


def test_a_signal_during_the_last_measurement_stops_the_run_after_saving(tmp_path: Path) -> None:
    trainer, path = Trainer(SMOKE, dataset()), tmp_path / "state.safetensors"

    def stop(trainer: Trainer) -> None:
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match="stopped after 256 images, all saved"):
        train_loop(trainer, path, held_out=dataset(), on_measurement=stop)


def test_a_finished_run_that_was_never_measured_is_measured(tmp_path: Path) -> None:
    trainer, path = Trainer(SMOKE, dataset()), tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_loop(trainer, path, held_out=dataset(), on_step=lambda *_: signal.raise_signal(signal.SIGINT))
    resumed = Trainer(SMOKE, dataset())
    resumed.resume(path)
    resumed.set_length(resumed.images_seen)
    train_loop(resumed, path, held_out=dataset())
    assert [row["images"] for row in resumed.history] == [resumed.images_seen]


GOLDEN = [9.2465, 9.485, 10.0387, 9.5874, 9.5001, 9.4116, 9.0601, 9.229]


def test_the_loss_curve_is_reproduced() -> None:
    """Eight steps of the smoke recipe reproduce recorded bits per dimension to 2e-3, to protect refactorings."""
    trainer = Trainer(replace(SMOKE, training=replace(SMOKE.training, total_images=512)), dataset())
    assert [trainer.train_step() for _ in range(8)] == pytest.approx(GOLDEN, abs=2e-3)


def test_a_run_learns_and_keeps_its_average(tmp_path: Path) -> None:
    config = replace(SMOKE, training=replace(SMOKE.training, total_images=640))
    trainer = Trainer(config, dataset())
    before = held_out_bits(trainer.ema, dataset())
    losses: list[float] = []
    train_loop(
        trainer,
        tmp_path / "state.safetensors",
        held_out=dataset(),
        interval=320,
        on_step=lambda trainer, bits, rate: losses.append(bits),
    )
    assert trainer.finished
    assert len(losses) == 40
    assert [row["images"] for row in trainer.history] == [320, 640]
    assert held_out_bits(trainer.ema, dataset()) < before - 0.5
    assert trainer.history[-1]["held_out_bpd"] == pytest.approx(held_out_bits(trainer.ema, dataset()), abs=1e-4)
    json.dumps(trainer.history)


def test_a_measurement_without_a_step_has_the_training_loss_of_the_state(tmp_path: Path) -> None:
    """A run that was stopped after its last step, or is shortened to where it stopped, has a finite learning curve."""
    trainer, path = Trainer(SMOKE, dataset()), tmp_path / "state.safetensors"
    trainer.set_length(32)
    train_loop(trainer, path, held_out=dataset())
    trainer.train_step()
    trainer.save(path)
    resumed = Trainer(SMOKE, dataset())
    resumed.resume(path, total_images=48)
    train_loop(resumed, path, held_out=dataset())
    assert [row["images"] for row in resumed.history] == [32, 48]
    assert resumed.history[1]["train_bpd"] == round(trainer.running_loss.mean, 4)


def test_the_average_over_less_than_a_batch_is_the_network() -> None:
    trainer = Trainer(replace(SMOKE, training=replace(SMOKE.training, batch_size=32, ema_images=16)), dataset())
    for _ in range(3):
        trainer.train_step()
    weights = trainer.network.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.ema.state_dict().items())


def test_divergence_is_reported_by_step_and_parameter() -> None:
    trainer = Trainer(SMOKE, dataset())
    trainer.train_step()
    name, weight = list(trainer.network.named_parameters())[-2]
    kept = {k: v.clone() for k, v in state(trainer).items()}
    with torch.no_grad():
        weight[0, 0] = math.nan
    with pytest.raises(
        TrainingError, match=r"diverged at step 1 \(16 images\).*the weight head.weight is not finite"
    ) as error:
        trainer.train_step()
    assert str(error.value).endswith("nothing was saved yet: start again with a lower --learning-rate.")
    assert trainer.step == 1
    unchanged = {k: v for k, v in state(trainer).items() if k != name}
    assert all(torch.equal(v, kept[k]) for k, v in unchanged.items())


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(tmp_path: Path) -> None:
    """No weight, average or moment changes; ten in a row end the run."""
    trainer = Trainer(SMOKE, dataset())
    trainer.train_step()
    before = {k: v.clone() for k, v in (state(trainer) | trainer.optimizer.state_dict()).items()}
    hook = trainer.network.head.weight.register_hook(lambda gradient: gradient * math.nan)
    trainer.train_step()
    assert (trainer.step, trainer.skipped_steps) == (2, 1)
    assert all(torch.equal(v, before[k]) for k, v in (state(trainer) | trainer.optimizer.state_dict()).items())
    hook.remove()
    trainer.train_step()
    assert (trainer.skipped_steps, trainer.skipped_in_a_row) == (1, 0)
    assert not torch.equal(trainer.network.head.weight, before["head.weight"])
    trainer.save(tmp_path / "state.safetensors")
    resumed = Trainer(SMOKE, dataset())
    resumed.resume(tmp_path / "state.safetensors")
    assert resumed.skipped_steps == 1
    trainer.network.head.weight.register_hook(lambda gradient: gradient * math.nan)
    for _ in range(MAX_SKIPPED - 1):
        trainer.train_step()
    with pytest.raises(TrainingError, match=r"diverged at step 12 .*the gradient of head.weight is not finite"):
        trainer.train_step()


def test_held_out_bits_weigh_all_images_equally() -> None:
    """Batches of unequal size make no difference, and dropout is off."""
    config = replace(SMOKE, model=replace(SMOKE.model, dropout=0.5))
    trainer = Trainer(config, dataset())
    data = dataset(10)
    whole = held_out_bits(trainer.ema, data)
    assert held_out_bits(trainer.ema, data, batch_size=3) == pytest.approx(whole, abs=1e-6)
    bits_of_images = [
        held_out_bits(trainer.ema, Dataset(x[None], data.labels_N[:1], data.classes)) for x in data.images_NHWC
    ]
    assert sum(bits_of_images) / 10 == pytest.approx(whole, abs=1e-6)
    mean, standard_error = measure_held_out(trainer.ema, data, batch_size=3)
    assert mean == pytest.approx(whole, abs=1e-6)
    assert standard_error == pytest.approx(np.std(bits_of_images, ddof=1) / math.sqrt(10), rel=1e-3)
    assert math.isnan(measure_held_out(trainer.ema, data.first(1))[1])


def test_a_run_without_images_is_refused() -> None:
    with pytest.raises(InputError) as refused:
        Trainer(SMOKE, dataset().first(0))
    assert refused.value.field == "data"


@pytest.mark.parametrize(
    "execution",
    [Execution(grad_accum_steps=4), Execution(activation_checkpointing=True)],
    ids=["grad-accum-steps", "activation-checkpointing"],
)
def test_saving_memory_does_not_change_the_result(execution: Execution) -> None:
    """Losses of several steps, and so gradients, are the same up to rounding."""
    plain, other = Trainer(SMOKE, dataset()), Trainer(SMOKE, dataset(), execution=execution)
    for _ in range(3):
        assert other.train_step() == pytest.approx(plain.train_step(), abs=1e-4)
    for name, tensor in state(plain).items():
        assert torch.allclose(state(other)[name], tensor, atol=2e-4), name


def test_activation_checkpointing_stores_less() -> None:
    """The forward pass saves much less for the backward pass."""

    def saved(execution: Execution) -> int:
        trainer, total = Trainer(SMOKE, dataset(), execution=execution), 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_bits(trainer.network, draw_batch(dataset(), SMOKE, 0), bf16=False)
        assert loss.isfinite().all()
        return total

    assert saved(Execution(activation_checkpointing=True)) < 0.7 * saved(Execution())


@pytest.mark.slow
@pytest.mark.timeout(900)  # it compiles for minutes
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
def test_a_compiled_step_computes_the_same() -> None:
    plain, other = Trainer(SMOKE, dataset()), Trainer(SMOKE, dataset(), execution=Execution(compile=True))
    for _ in range(3):
        assert other.train_step() == pytest.approx(plain.train_step(), abs=1e-3)


@pytest.mark.parametrize("muon_rate", [None, 4e-3])
def test_measuring_the_step_time_updates_weights_but_does_not_change_the_run(
    muon_rate: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMOKE, training=replace(SMOKE.training, muon_learning_rate=muon_rate))
    rehearsed, plain = Trainer(config, dataset()), Trainer(config, dataset())
    for trainer in rehearsed, plain:
        trainer.train_step()
    shares: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr("ncml.training.trainer.Optimizer", _recorded(shares))
        assert rehearsed.measure_step_seconds() > 0
    assert shares == [0.0, 0.0]
    assert rehearsed.train_step() == plain.train_step()
    assert all(torch.equal(tensor, state(plain)[name]) for name, tensor in state(rehearsed).items())


def _recorded(shares: list[float]) -> type[Optimizer]:
    """Return an optimiser that records the shares of its steps."""

    class Recorder(Optimizer):
        def step(self, share: float) -> None:
            shares.append(share)
            super().step(share)

    return Recorder


def test_short_runs_warm_up_over_a_fifth() -> None:
    training = TrainingConfig(total_images=100, batch_size=10, warmup_images=20_000)
    assert [learning_rate_share(training, images) for images in (0, 10, 20)] == [0.5, 1.0, 1.0]


def test_a_long_interval_is_saved_in_between(tmp_path: Path) -> None:
    short = replace(SMOKE, training=replace(SMOKE.training, total_images=128))
    trainer, path = Trainer(short, dataset()), tmp_path / "state.safetensors"
    saved: list[bool] = []
    train_loop(
        trainer,
        path,
        held_out=dataset(),
        interval=10_000,
        save_seconds=0.0,
        on_step=lambda trainer, mean, rate: saved.append(path.exists()),
    )
    assert saved == [False] + [True] * 7
    assert [row["images"] for row in trainer.history] == [128]
