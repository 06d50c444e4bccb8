"""Compare a training step with a plain one, and its FLOP/s with those of a convolution, in one run.

    python benchmarks/train.py [--device cpu] [--threads 1] [--compile] [--data FOLDER|NAME] [--json FILE]

The plain step uses the same network and loss in fp32 with channels first (NCHW), Adam, no averaged weights and
PyTorch's default memory allocation, in its own process. All variants alternate; each figure is the median of their
steps, and ratios are ratios of medians. FLOP are those of the convolutions and matrix products of a step, forward and
backward, as PyTorch counts them. Nothing else should run at the same time.

With `--data`, the script also compares held-out bits/dim after the same CPU time of the recipe's training and of plain
training: the same network, objective and batches in fp32 with Adam at a constant learning rate of 1e-3, without the
recipe's optimiser, precision, schedule and averaging, as published for PixelCNN++.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ncml import recipes
from ncml.config import Config
from ncml.data import dataset
from ncml.data.dataset import Dataset
from ncml.network.ncpn import NCPN
from ncml.runtime import reuse_freed_memory
from ncml.training.batches import draw_batch
from ncml.training.distributed import ProcessGroup
from ncml.training.objective import held_out_bits, loss_bits
from ncml.training.precision import without_emulation
from ncml.training.provenance import machine
from ncml.training.run import MARGIN
from ncml.training.trainer import Execution, Trainer

RECIPES = {"cifar10_small": (32, 7), "paper_cifar10": (2, 3)}
"""Batch size and number of steps of each recipe on a CPU; a GPU uses the recipe's batch size."""

PRECISIONS = ("fp32", "bf16")
GOALS = {"of the plain step": 3.0, "of a convolution's FLOP/s": 0.5}
LEARNING_RECIPE, HELD_OUT_IMAGES = "cifar10_small", 500
"""The recipe whose learning is compared, and the number of images that measure it."""

PLAIN_RATE = 1e-3
"""Learning rate of plain training."""

print_line = functools.partial(print, flush=True)

CONVOLUTION = (32, 160, 32)
"""Batch size, channels, and side of the plain 3x3 convolution: the paper's width at CIFAR-10's size."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="number of threads, the same for all variants (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="also measure a compiled step; compiling takes minutes")
    parser.add_argument(
        "--data", help="data set; also compare held-out bits/dim after training on it for the same CPU time"
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="CPU time of each training with --data (default: %(default)g)"
    )
    parser.add_argument("--quick", action="store_true", help="omit the 73M network")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reuse_freed_memory()
    results: dict[str, Any] = {"device": options.device, "threads": options.threads}
    results["machine"] = machine(options.device)
    print_line(results["machine"])
    results["convolution_flops"] = {name: convolution(name, options.device) for name in PRECISIONS}
    for precision, rate in results["convolution_flops"].items():
        print_line(f"plain 3x3 convolution, forward and backward, {precision}: {rate / 1e9:.1f} GFLOP/s")
    for recipe, (batch_size, repeats) in list(RECIPES.items())[: 1 if options.quick else None]:
        results[recipe] = compare(recipe, batch_size, repeats, options, results["convolution_flops"])
    if options.data:
        results["learned"] = compare_learning(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def recipe_at(recipe: str, batch_size: int | None, precision: str) -> Config:
    """Return a recipe with another batch size and precision."""
    recipe_config = recipes.by_name(recipe)
    batch_size = batch_size or recipe_config.training.batch_size
    training = replace(recipe_config.training, precision=precision, batch_size=batch_size)
    return replace(recipe_config, training=training)


def random_images(recipe_config: Config) -> Dataset:
    """Return random images, with which a step takes as long as with real ones."""
    model, generator = recipe_config.model, torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (256, model.height, model.width, 3), generator=generator, dtype=torch.uint8)
    return Dataset(pixels, torch.arange(256) % len(model.classes), model.classes)


def compare(
    recipe: str, batch_size: int | None, repeats: int, options: argparse.Namespace, convolution_flops: dict[str, float]
) -> dict[str, Any]:
    """Time the steps of all variants, alternating."""
    batch_size = batch_size if options.device == "cpu" else None
    pipe, remote_pipe = multiprocessing.get_context("spawn").Pipe()
    arguments = (remote_pipe, recipe_at(recipe, batch_size, "fp32"), options.device, options.threads)
    plain = multiprocessing.get_context("spawn").Process(target=time_plain_steps, args=arguments, daemon=True)
    plain.start()

    def plain_step() -> float:
        pipe.send(True)
        return pipe.recv()

    variants: dict[str, Callable[[], float]] = {"plain fp32": plain_step}
    for precision in PRECISIONS:
        recipe_config = recipe_at(recipe, batch_size, precision)
        variants[precision] = step_timer(recipe_config, options.device, Execution())
        if options.compile:
            variants[f"{precision} compiled"] = step_timer(recipe_config, options.device, Execution(compile=True))
    for step in variants.values():  # the first step initialises kernels
        step()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, step in variants.items():
            times[name].append(step())
    pipe.send(False)
    plain.join()
    recipe_config = recipe_at(recipe, batch_size, "fp32")
    images, flops = recipe_config.training.batch_size, flops_of(recipe_config)
    print_line(f"{recipe}, batch {images}: {flops / images / 1e9:.2f} GFLOP an image")
    results: dict[str, Any] = {"batch": images, "flop_per_image": flops / images}
    for name, seconds_of_steps in times.items():
        seconds = statistics.median(seconds_of_steps)
        ratio = statistics.median(times["plain fp32"]) / seconds
        share = flops / seconds / convolution_flops["fp32" if "fp32" in name else "bf16"]
        results[name] = {"images_per_second": images / seconds, "of_plain": ratio, "of_convolution": share}
        print_line(
            f"  {name:14} {images / seconds:8.2f} images/s, {ratio:5.2f} of the plain step, "
            f"{flops / seconds / 1e9:7.1f} GFLOP/s, {share:.0%} of the convolution's"
        )
    print_line("  goals: " + ", ".join(f"{goal:g} {name}" for name, goal in GOALS.items()))
    return results


def step_timer(recipe_config: Config, device: str, execution: Execution) -> Callable[[], float]:
    """Return a function that takes a training step and returns its seconds."""
    group = ProcessGroup(device=device)
    trainer = Trainer(recipe_config, random_images(recipe_config), group=group, execution=execution)
    return lambda: seconds_of(trainer.train_step)


def seconds_of(step: Callable[[], object]) -> float:
    """Return the seconds of a call that waits for its result."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


class PlainTraining:
    """Plain training: the same network, loss and batches in fp32 with Adam at a constant learning rate."""

    def __init__(self, recipe_config: Config, data: Dataset, device: str) -> None:
        torch.manual_seed(0)
        self.config, self.data, self.device, self.step = recipe_config, data, device, 0
        self.network = NCPN(recipe_config).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=PLAIN_RATE)

    def train_step(self) -> float:
        """Take one step; return the mean loss in bits per dimension."""
        batch = draw_batch(self.data, self.config, self.step).to(self.device)
        loss = loss_bits(self.network, replace(batch, x_BCHW=batch.x_BCHW.contiguous()), bf16=False).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.training.grad_clip)
        self.optimizer.step()
        self.step += 1
        return loss.item()


def compare_learning(options: argparse.Namespace) -> dict[str, Any]:
    """Train both ways for the same CPU time, one after the other, and measure held-out bits/dim."""
    group = ProcessGroup(device=options.device)
    recipe_config = without_emulation(recipes.by_name(LEARNING_RECIPE), group)
    model = recipe_config.model
    data = dataset.load(options.data, model.height, model.width)
    recipe_config = replace(recipe_config, model=replace(model, classes=data.classes))
    training_part, held_out = data.part("fit"), data.part("calibration-fit").first(HELD_OUT_IMAGES)
    trainer = Trainer(recipe_config, training_part, group=group)
    step_seconds = trainer.measure_step_seconds()
    batch_size, budget = recipe_config.training.batch_size, 60 * options.minutes
    # The budget is CPU time, and a step is measured in wall time.
    total_images = int(MARGIN * budget / (step_seconds * options.threads)) * batch_size
    trainer.set_length(total_images)  # its learning rate reaches 0 there
    limits = {"this trainer": total_images, "plain": math.inf}
    plain = PlainTraining(recipe_config, training_part, options.device)
    results: dict[str, Any] = {}
    for name, training, network in (("this trainer", trainer, trainer.ema), ("plain", plain, plain.network)):
        start = time.process_time()
        while time.process_time() - start < budget and training.step * batch_size < limits[name]:
            training.train_step()
        seconds = budget = time.process_time() - start  # the other one may take as long
        bits = held_out_bits(network.eval(), held_out)
        images = training.step * batch_size
        results[name] = {"cpu_seconds": seconds, "images": images, "held_out_bpd": bits}
        print_line(
            f"{LEARNING_RECIPE}, {name}: {bits:.3f} held-out bits/dim, {images:,} images in {seconds:.0f} CPU seconds"
        )
    return results


def time_plain_steps(pipe: Connection, recipe_config: Config, device: str, threads: int) -> None:
    """Take a plain step whenever the pipe requests one, and send its seconds."""
    torch.set_num_threads(threads)
    plain = PlainTraining(recipe_config, random_images(recipe_config), device)
    while pipe.recv():
        pipe.send(seconds_of(plain.train_step))


def flops_of(recipe_config: Config) -> int:
    """Count the FLOP of a step's convolutions and matrix products, forward and backward."""
    network = NCPN(recipe_config)
    single = replace(recipe_config, training=replace(recipe_config.training, batch_size=1))
    with FlopCounterMode(display=False) as counter:
        loss_bits(network, draw_batch(random_images(single), single, 0), bf16=False).sum().backward()
    return counter.get_total_flops() * recipe_config.training.batch_size


def convolution(precision: str, device: str) -> float:
    """Return the FLOP/s of a plain convolution with channels last, forward and backward."""
    batch, channels, side = CONVOLUTION
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    x.requires_grad_()
    weight.requires_grad_()

    def step() -> None:
        y = F.conv2d(x, weight, padding=1)
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    seconds = statistics.median(seconds_of(step) for _ in range(7))
    return 3 * 2 * batch * side**2 * channels**2 * 9 / seconds


if __name__ == "__main__":
    sys.exit(main())
