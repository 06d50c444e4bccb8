"""The incremental sampler against one forward pass of the same batch, side by side in one run.

    python benchmarks/sampler.py [--model models/cifar10] [--device cpu] [--threads 1] [--json FILE]

Each figure is the median of several runs in which the two sides take turns; ratios are of medians. Nothing else should
be running. `ratio` is keyed by batch size.
"""

from __future__ import annotations

import argparse
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
from ncml.config import SOLVERS, paper_cifar10
from ncml.network.ncpn import NCPN
from ncml.network.sde import end_time, process
from ncml.runtime import reuse_freed_memory
from ncml.sampling.batch_invariance import GroupedSampler
from ncml.sampling.batching import fast_groups, fixed_groups
from ncml.sampling.cuda_graphs import Replay
from ncml.sampling.sample import Conditions, Noise, Sampler, naive, score_function
from ncml.sampling.solvers import refine
from ncml.training.provenance import machine

GOALS = {1: 12.0, 16: 3.0, 64: 1.5}

WARM_UP = 2
"""Drawings after which a GPU replays them."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/cifar10", help="folder of the model (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="processor cores, the same for both sides (default: 1)")
    parser.add_argument("--quick", action="store_true", help="leave out the 73M network, the naive sampler and memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reuse_freed_memory()
    model = ncml.load(options.model, options.device, batching="auto")
    network = model.network
    results: dict[str, Any] = {"model": options.model, "machine": machine(options.device)}
    say(f"{options.model}, fp32, {results['machine']}")
    if model.batching is not None:
        results["batching"] = asdict(model.batching)
        say(f"check of fast groups: {model.batching.check}; {model.batching.detail}")
    with torch.inference_mode():
        rows = {batch: compare(network, batch, repeats=9 if batch == 1 else 5) for batch in GOALS}
        results |= {"ratio": {b: row["ratio"] for b, row in rows.items()}, "seconds": rows}
        for batch, row in rows.items():
            say(f"batch {batch:2}: {row_text(row)}   goal {GOALS[batch]:g}")
        if options.device == "cpu":
            fixed = {batch: compare(network, batch, repeats=3, sampler=in_fixed_groups(batch)) for batch in GOALS}
            results["fixed_groups"] = fixed
            for batch, row in fixed.items():
                say(f"batch {batch:2}, in fixed groups: {row_text(row)}")
        results["growth_per_pixel_32_to_64"] = growth(network)
        say(f"cost per pixel, 64x64 over 32x32, batch 1: {results['growth_per_pixel_32_to_64']:.2f}   goal 1.15")
    results["refinement"] = {batch: refinement(network, batch) for batch in (1, 8)}
    for batch, figures in results["refinement"].items():
        for name, value in figures.items():
            say(f"refinement, batch {batch}, {name}: {value:.1f} forward passes of the batch")
    if not options.quick:
        with torch.inference_mode():
            seconds = timed(lambda: sample(network, 1, sampler=naive))
            results["naive_ratio_batch_1"] = seconds / rows[1]["forward"]
            say(f"naive sampler, batch 1 (one run): {results['naive_ratio_batch_1']:.0f} forward passes")
            large = NCPN(paper_cifar10()).channels_last().to(options.device).eval().requires_grad_(False)
            results["paper_cifar10"] = {batch: compare(large, batch, repeats=1) for batch in (1, 8)}
            for batch, row in results["paper_cifar10"].items():
                say(f"paper_cifar10 (73M, random weights), batch {batch}: {row_text(row)}")
    if not options.quick and options.device == "cpu":
        results["peak_mib_per_image"] = memory(options.model, options.threads)
        say(f"peak memory for each further image: {results['peak_mib_per_image']:.1f} MiB")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def say(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


def row_text(row: dict[str, float]) -> str:
    """A comparison in words."""
    return f"incremental {row['incremental']:.3f} s, forward {row['forward']:.4f} s, ratio {row['ratio']:.2f}"


def conditions(network: NCPN, batch: int) -> Conditions:
    """Unconditional, at the network's largest time."""
    null = torch.full((batch,), len(network.config.model.classes), device=network.head.weight.device)
    return Conditions(end_time(network.config.sde), null, torch.zeros_like(null))


REPLAY = Replay()


def sample(network: NCPN, batch: int, *, side: int | None = None, sampler: Sampler | None = None) -> torch.Tensor:
    """One sampling run, by what a model samples with unless another sampler is given: fast groups on a CPU."""
    model, device = network.config.model, network.head.weight.device
    side = side or model.height
    sampler = sampler or (GroupedSampler(fast_groups(batch)) if device.type == "cpu" else REPLAY)
    x_BCHW = torch.zeros(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    noise = Noise(list(range(batch)), dtype=x_BCHW.dtype, device=x_BCHW.device).pixels(model.mixtures, side, side)
    sampler(network, x_BCHW, conditions(network, batch), noise, first_row=0, on_row=lambda row: False)
    return x_BCHW


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def in_fixed_groups(batch: int) -> Sampler:
    """What a model samples with where the check fails."""
    return GroupedSampler(fixed_groups(range(batch)))


def compare(network: NCPN, batch: int, *, repeats: int, sampler: Sampler | None = None) -> dict[str, float]:
    """Seconds of both sides, taking turns, and their ratio."""
    given = conditions(network, batch)
    *_, x_BCHW = (sample(network, batch, sampler=sampler) for _ in range(WARM_UP))

    def forward() -> torch.Tensor:
        return network(x_BCHW, given.t_B, given.class_B, given.orientation_B)

    forward()
    turns = [
        (timed(lambda: sample(network, batch, sampler=sampler)), timed(forward), timed(forward)) for _ in range(repeats)
    ]
    incremental_s = statistics.median(turn[0] for turn in turns)
    forward_s = statistics.median(seconds for turn in turns for seconds in turn[1:])
    return {"incremental": incremental_s, "forward": forward_s, "ratio": incremental_s / forward_s}


def growth(network: NCPN) -> float:
    """Seconds per pixel at 64x64 over those at 32x32, batch 1."""
    side = network.config.model.height
    for _ in range(WARM_UP):
        sample(network, 1, side=2 * side)
    turns = [(timed(lambda: sample(network, 1, side=2 * side)), timed(lambda: sample(network, 1))) for _ in range(5)]
    return statistics.median(turn[0] for turn in turns) / statistics.median(turn[1] for turn in turns) / 4


def refinement(network: NCPN, batch: int) -> dict[str, float]:
    """A score evaluation, and each solver at its default steps, in forward passes of the same batch."""
    x_BCHW, given = sample(network, batch), conditions(network, batch)
    score = score_function(network, given)

    @torch.inference_mode()
    def forward() -> None:
        network(x_BCHW, given.t_B, given.class_B, given.orientation_B)

    forward()
    score(x_BCHW, given.t)
    turns = [(timed(forward), timed(lambda: score(x_BCHW, given.t))) for _ in range(9)]
    pass_s, evaluation_s = (statistics.median(turn[side] for turn in turns) for side in (0, 1))
    figures = {"one score evaluation (goal 3.2)": evaluation_s / pass_s}
    process_ = process(network.config.sde)
    for solver, steps in SOLVERS.items():
        seconds = timed(
            lambda solver=solver, steps=steps: refine(
                x_BCHW,
                given.t,
                t_end=process_.time_of(1.5),
                steps=steps,
                solver=solver,
                process=process_,
                score=score,
                normal=lambda: torch.randn_like(x_BCHW),
            )
        )
        figures[f"{solver}, {steps} step(s)"] = seconds / pass_s
    return figures


def peak(model: str, threads: int, batch: int) -> float:
    """Peak resident MiB of a process that samples one batch."""
    torch.set_num_threads(threads)
    network = ncml.load(model).network
    with torch.inference_mode():
        sample(network, batch)
    # Not getrusage, whose maximum goes on from that of the process which started this one.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory(model: str, threads: int) -> float:
    """MiB that each image of a batch adds, from processes that sample 64 and 512."""
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        few, many = pool.starmap(peak, [(model, threads, 64), (model, threads, 512)], chunksize=1)
    return (many - few) / 448


if __name__ == "__main__":
    sys.exit(main())
