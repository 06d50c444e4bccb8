"""Compare the time of the cached sampler with that of one forward pass of the same batch, in one run.

    python benchmarks/sampler.py [--model models/cifar10] [--device cpu] [--threads 1] [--json FILE]

Each figure is the median of several runs in which the two alternate; ratios are ratios of medians. Nothing else should
run at the same time. In the JSON, `ratio` is keyed by batch size.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import ncml
from ncml.config import SOLVERS
from ncml.network.ncpn import NCPN
from ncml.network.sde import end_time, make_sde
from ncml.recipes import paper_cifar10
from ncml.runtime import reuse_freed_memory
from ncml.sampling.batch_invariance import GroupedSampler
from ncml.sampling.batching import fast_groups, fixed_groups
from ncml.sampling.conditions import Conditions, Tilt
from ncml.sampling.cuda_graphs import ReplaySampler
from ncml.sampling.sample import BatchDraws, Sampler, make_grad_log_prob, sample_naive
from ncml.sampling.solvers import refine
from ncml.training.provenance import machine

GOALS = {1: 12.0, 16: 3.0, 64: 1.5}
GUIDANCE_GOAL = 2.2

GUIDED = Tilt(guidance=3.0, temperature=0.95)

print_line = functools.partial(print, flush=True)

WARM_UP = 2
"""Batches after which a GPU replays recorded graphs."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/cifar10", help="folder of the model (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="number of threads (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="omit the 73M network, the naive sampler and the memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reuse_freed_memory()
    model = ncml.load(options.model, options.device, batching="auto")
    network = model.network
    results: dict[str, Any] = {"model": options.model, "machine": machine(options.device)}
    print_line(f"{options.model}, fp32, {results['machine']}")
    if model.batching is not None:
        results["batching"] = asdict(model.batching)
        print_line(f"check of fast groups: {model.batching.check}; {model.batching.detail}")
    with torch.inference_mode():
        rows = {batch: compare(network, batch, repeats=9 if batch == 1 else 5) for batch in GOALS}
        results |= {"ratio": {b: row["ratio"] for b, row in rows.items()}, "seconds": rows}
        for batch, row in rows.items():
            print_line(f"batch {batch:2}: {row_text(row)}   goal {GOALS[batch]:g}")
        if options.device == "cpu":
            fixed = {batch: compare(network, batch, repeats=3, sampler=in_fixed_groups(batch)) for batch in GOALS}
            results["fixed_groups"] = fixed
            for batch, row in fixed.items():
                print_line(f"batch {batch:2}, in fixed groups: {row_text(row)}")
        if options.device == "cpu" and model.classes:
            results["guided"] = {batch: measure_guidance(network, batch) for batch in GOALS}
            for batch, ratio in results["guided"].items():
                print_line(
                    f"batch {batch:2}, guided: {ratio:.2f} times as long as without guidance   goal {GUIDANCE_GOAL:g}"
                )
        results["growth_per_pixel_32_to_64"] = measure_growth(network)
        print_line(f"cost per pixel, 64x64 over 32x32, batch 1: {results['growth_per_pixel_32_to_64']:.2f}   goal 1.15")
    results["refinement"] = {batch: measure_refinement(network, batch) for batch in (1, 8)}
    for batch, figures in results["refinement"].items():
        for name, value in figures.items():
            print_line(f"refinement, batch {batch}, {name}: {value:.1f} forward passes of the batch")
    if not options.quick:
        with torch.inference_mode():
            seconds = measure_seconds(lambda: sample_batch(network, 1, sampler=sample_naive))
            results["naive_ratio_batch_1"] = seconds / rows[1]["forward"]
            print_line(f"naive sampler, batch 1 (one run): {results['naive_ratio_batch_1']:.0f} forward passes")
            large = NCPN(paper_cifar10()).channels_last().to(options.device).eval().requires_grad_(False)
            results["paper_cifar10"] = {batch: compare(large, batch, repeats=1) for batch in (1, 8)}
            for batch, row in results["paper_cifar10"].items():
                print_line(f"paper_cifar10 (73M, random weights), batch {batch}: {row_text(row)}")
    if not options.quick and options.device == "cpu":
        results["peak_mib_per_image"] = measure_memory(options.model, options.threads)
        print_line(f"peak memory for each further image: {results['peak_mib_per_image']:.1f} MiB")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def row_text(row: dict[str, float]) -> str:
    """Format a comparison."""
    return f"cached {row['cached']:.3f} s, forward {row['forward']:.4f} s, ratio {row['ratio']:.2f}"


def make_conditions(network: NCPN, batch: int) -> Conditions:
    """Return conditions without a class at the network's largest time."""
    null = torch.full((batch,), len(network.config.model.classes), device=network.head.weight.device)
    return Conditions(end_time(network.config.sde), null, torch.zeros_like(null))


REPLAY = ReplaySampler()


def sample_batch(network: NCPN, batch: int, *, side: int | None = None, sampler: Sampler | None = None) -> torch.Tensor:
    """Sample one batch, by default with the sampler of a loaded model: fast groups on a CPU, replay on a GPU."""
    model, device = network.config.model, network.head.weight.device
    side = side or model.height
    sampler = sampler or (GroupedSampler(fast_groups(batch)) if device.type == "cpu" else REPLAY)
    x_BCHW = torch.zeros(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    draws = BatchDraws(list(range(batch)), dtype=x_BCHW.dtype, device=x_BCHW.device).draw_pixels(
        model.mixtures, side, side
    )
    sampler(network, x_BCHW, make_conditions(network, batch), draws, lambda row: False)
    return x_BCHW


def measure_seconds(call: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_fixed_groups(batch: int) -> Sampler:
    """Return the sampler that a model uses if the check of fast groups fails."""
    return GroupedSampler(fixed_groups(range(batch)))


def compare(network: NCPN, batch: int, *, repeats: int, sampler: Sampler | None = None) -> dict[str, float]:
    """Measure the seconds of the sampler and of a forward pass, alternating, and their ratio."""
    conditions = make_conditions(network, batch)
    *_, x_BCHW = (sample_batch(network, batch, sampler=sampler) for _ in range(WARM_UP))

    def forward() -> torch.Tensor:
        return network(x_BCHW, conditions.t_B, conditions.class_B, conditions.orientation_B)

    forward()
    turns = [
        (
            measure_seconds(lambda: sample_batch(network, batch, sampler=sampler)),
            measure_seconds(forward),
            measure_seconds(forward),
        )
        for _ in range(repeats)
    ]
    cached_s = statistics.median(turn[0] for turn in turns)
    forward_s = statistics.median(seconds for turn in turns for seconds in turn[1:])
    return {"cached": cached_s, "forward": forward_s, "ratio": cached_s / forward_s}


def measure_guidance(network: NCPN, batch: int) -> float:
    """Return the time of a batch with guidance and temperature divided by that without, alternating."""
    index_B = torch.zeros(batch, dtype=torch.long)
    model, t = network.config.model, end_time(network.config.sde)
    draws = BatchDraws(list(range(batch)), dtype=torch.float32, device=index_B.device).draw_pixels(
        model.mixtures, model.height, model.width
    )

    def sample(tilt: Tilt) -> None:
        x_BCHW = torch.zeros(batch, 3, model.height, model.width).contiguous(memory_format=torch.channels_last)
        sampler = GroupedSampler(fast_groups(batch, tilt.rows_per_image))
        conditions = Conditions(t, index_B, index_B, tilt)
        sampler(network, x_BCHW, conditions, draws, lambda row: False)

    sample(GUIDED)
    turns = [[measure_seconds(lambda tilt=tilt: sample(tilt)) for tilt in (GUIDED, Tilt())] for _ in range(5)]
    guided_s, plain_s = (statistics.median(turn[side] for turn in turns) for side in (0, 1))
    return guided_s / plain_s


def measure_growth(network: NCPN) -> float:
    """Return the time per pixel at twice the model's height and width divided by that at the model's size, batch 1."""
    side = network.config.model.height
    for _ in range(WARM_UP):
        sample_batch(network, 1, side=2 * side)
    turns = [
        (
            measure_seconds(lambda: sample_batch(network, 1, side=2 * side)),
            measure_seconds(lambda: sample_batch(network, 1)),
        )
        for _ in range(5)
    ]
    return statistics.median(turn[0] for turn in turns) / statistics.median(turn[1] for turn in turns) / 4


def measure_refinement(network: NCPN, batch: int) -> dict[str, float]:
    """Return the cost of one gradient of the log-density, and of each solver, in forward passes of the same batch."""
    x_BCHW, conditions = sample_batch(network, batch), make_conditions(network, batch)
    evaluate = make_grad_log_prob(network, conditions)

    @torch.inference_mode()
    def forward() -> None:
        network(x_BCHW, conditions.t_B, conditions.class_B, conditions.orientation_B)

    forward()
    evaluate(x_BCHW, conditions.t)
    turns = [(measure_seconds(forward), measure_seconds(lambda: evaluate(x_BCHW, conditions.t))) for _ in range(9)]
    pass_s, evaluation_s = (statistics.median(turn[side] for turn in turns) for side in (0, 1))
    figures = {"one gradient (goal 3.2)": evaluation_s / pass_s}
    sde = make_sde(network.config.sde)
    for solver, steps in SOLVERS.items():
        seconds = measure_seconds(
            lambda solver=solver, steps=steps: refine(
                x_BCHW,
                conditions.t,
                t_end=sde.time_of(1.5),
                steps=steps,
                solver=solver,
                sde=sde,
                grad_log_prob=evaluate,
                draw_normal=lambda: torch.randn_like(x_BCHW),
            )
        )
        figures[f"{solver}, {steps} step(s)"] = seconds / pass_s
    return figures


def measure_peak(model: str, threads: int, batch: int) -> float:
    """Return the peak resident set in MiB of a process that samples one batch."""
    torch.set_num_threads(threads)
    network = ncml.load(model).network
    with torch.inference_mode():
        sample_batch(network, batch)
    # getrusage would include the maximum of the parent process.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure_memory(model: str, threads: int) -> float:
    """Return the MiB that each image of a batch adds, measured with batches of 64 and 512."""
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        few, many = pool.starmap(measure_peak, [(model, threads, 64), (model, threads, 512)], chunksize=1)
    return (many - few) / 448


if __name__ == "__main__":
    sys.exit(main())
