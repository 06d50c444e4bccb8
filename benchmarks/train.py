"""A training step against a plain one, and the arithmetic that it achieves against a plain convolution's, in one run.

    python benchmarks/train.py [--device cpu] [--threads 1] [--compile] [--json FILE]

The plain step is the same network and loss in fp32 with channels first (NCHW), without autocast, channels-last or the
allocator's setting, in a process of its own. All sides take turns; each figure is the median of their steps, ratios are
of medians. FLOP are those of the convolutions and matrix products of a step, forward and backward, as PyTorch counts
them. Nothing else should be running.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
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

from ncml import config
from ncml.config import Config
from ncml.network.ncpn import NCPN
from ncml.runtime import reuse_freed_memory
from ncml.training.batches import draw_batch
from ncml.training.dataset import Dataset
from ncml.training.distributed import ProcessGroup
from ncml.training.objective import loss_bits
from ncml.training.trainer import Execution, Trainer

RECIPES = {"cifar10_small": (32, 7), "paper_cifar10": (2, 3)}
"""Batch and steps of each on a CPU; a GPU takes the recipe's batch."""

PRECISIONS = ("fp32", "bf16")
GOALS = {"of the plain step": 3.0, "of a convolution's FLOP/s": 0.5}
CONVOLUTION = (32, 160, 32)
"""Batch, channels in and out, and side of the plain 3x3 convolution: the paper's width at CIFAR-10's size."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="processor cores, the same for all sides (default: 1)")
    parser.add_argument("--compile", action="store_true", help="also a compiled step, which takes minutes to make")
    parser.add_argument("--quick", action="store_true", help="leave the 73M network out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reuse_freed_memory()
    results: dict[str, Any] = {"device": options.device, "threads": options.threads, "torch": torch.__version__}
    results["processor"] = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
    say(f"{options.device}, {options.threads} thread(s), PyTorch {torch.__version__}")
    results["convolution_flops"] = {name: convolution(name, options.device) for name in PRECISIONS}
    for precision, rate in results["convolution_flops"].items():
        say(f"plain 3x3 convolution, forward and backward, {precision}: {rate / 1e9:.1f} GFLOP/s")
    for recipe, (batch, repeats) in list(RECIPES.items())[: 1 if options.quick else None]:
        results[recipe] = compare(recipe, batch, repeats, options, results["convolution_flops"])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def say(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


def chosen(recipe: str, batch: int | None, precision: str) -> Config:
    """A recipe at a batch size and a precision."""
    found = config.recipe(recipe)
    training = replace(found.training, precision=precision, batch_size=batch or found.training.batch_size)
    return replace(found, training=training)


def pictures(of: Config) -> Dataset:
    """Random ones: arithmetic takes as long on them."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (256, of.model.height, of.model.width, 3), generator=generator, dtype=torch.uint8)
    return Dataset(pixels, torch.arange(256) % len(of.model.classes), of.model.classes)


def compare(
    recipe: str, batch: int | None, repeats: int, options: argparse.Namespace, convolution_flops: dict[str, float]
) -> dict[str, Any]:
    """Steps of all sides in turn."""
    batch = batch if options.device == "cpu" else None
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    arguments = (theirs, chosen(recipe, batch, "fp32"), options.device, options.threads)
    plain = multiprocessing.get_context("spawn").Process(target=plainly, args=arguments, daemon=True)
    plain.start()

    def plain_step() -> float:
        ours.send(True)
        return ours.recv()

    sides: dict[str, Callable[[], float]] = {"plain fp32": plain_step}
    for precision in PRECISIONS:
        sides[precision] = stepper(chosen(recipe, batch, precision), options.device, Execution())
        if options.compile:
            compiled = stepper(chosen(recipe, batch, precision), options.device, Execution(compile=True))
            sides[f"{precision} compiled"] = compiled
    for step in sides.values():  # the first makes kernels ready
        step()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, step in sides.items():
            times[name].append(step())
    ours.send(False)
    plain.join()
    settled = chosen(recipe, batch, "fp32")
    count, flops = settled.training.batch_size, flops_of(settled)
    say(f"{recipe}, batch {count}: {flops / count / 1e9:.2f} GFLOP an image")
    found: dict[str, Any] = {"batch": count, "flop_per_image": flops / count}
    for name, taken in times.items():
        seconds = statistics.median(taken)
        ratio = statistics.median(times["plain fp32"]) / seconds
        share = flops / seconds / convolution_flops["fp32" if "fp32" in name else "bf16"]
        found[name] = {"images_per_second": count / seconds, "of_plain": ratio, "of_convolution": share}
        say(
            f"  {name:14} {count / seconds:8.2f} images/s, {ratio:5.2f} of the plain step, "
            f"{flops / seconds / 1e9:7.1f} GFLOP/s, {share:.0%} of the convolution's"
        )
    say("  goals: " + ", ".join(f"{goal:g} {name}" for name, goal in GOALS.items()))
    return found


def stepper(of: Config, device: str, execution: Execution) -> Callable[[], float]:
    """What takes a step and returns its seconds."""
    trainer = Trainer(of, pictures(of), group=ProcessGroup(device=device), execution=execution)
    return lambda: timed(trainer.train_step)


def timed(step: Callable[[], object]) -> float:
    """Seconds of a call that waits for its result."""
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def plainly(pipe: Connection, of: Config, device: str, threads: int) -> None:
    """Take a plain step and send its seconds, as long as asked to."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network, data = NCPN(of).to(device), pictures(of)
    average = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), lr=of.training.learning_rate, betas=of.training.betas)

    def step() -> None:
        batch = draw_batch(data, of, 0).to(device)
        batch = replace(batch, x_BCHW=batch.x_BCHW.contiguous())
        loss = loss_bits(network, batch, bf16=False).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), of.training.grad_clip)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                average[name].lerp_(parameter, of.training.batch_size / of.training.ema_images)
        loss.item()

    while pipe.recv():
        pipe.send(timed(step))


def flops_of(of: Config) -> int:
    """Of a step's convolutions and matrix products, forward and backward."""
    network = NCPN(of)
    one = replace(of, training=replace(of.training, batch_size=1))
    with FlopCounterMode(display=False) as counter:
        loss_bits(network, draw_batch(pictures(of), one, 0), bf16=False).sum().backward()
    return counter.get_total_flops() * of.training.batch_size


def convolution(precision: str, device: str) -> float:
    """FLOP/s of a plain convolution with channels last, forward and backward."""
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
    seconds = statistics.median(timed(step) for _ in range(7))
    return 3 * 2 * batch * side**2 * channels**2 * 9 / seconds


if __name__ == "__main__":
    sys.exit(main())
