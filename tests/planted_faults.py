"""Plant faults in a copy of the code, one by one, and report which test fails for each.

    python -m tests.planted_faults [PART OF A NAME ...]    (make test-faults)

Each fault is a change of one place in the source. The test file that should notice it, which is part of `make test`,
runs until its first failure. A fault that no test notices, or whose place is not found exactly once, makes the exit
status 1.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str
    new: str
    tests: str
    """The test file that should notice it, below tests/."""


LIKELIHOOD = "ncml/network/mixture.py"
LIKELIHOOD_TESTS = "ncml/network/test_likelihood.py"
SOLVER_TESTS = "ncml/sampling/test_solvers.py"
SAMPLE_TESTS = "ncml/sampling/test_sample.py"
CACHED_TESTS = "ncml/sampling/test_cached.py"
CONFORMAL = "ncml/ood/conformal.py"
CONFORMAL_TESTS = "ncml/ood/test_conformal.py"
SCENE_RANKS = "ncml/ood/scene_ranks.py"
SCENE_RANKS_TESTS = "ncml/ood/test_scene_ranks.py"
DETECTOR_TESTS = "ncml/calibration/test_detector.py"
QUEUE_TESTS = "worker/test_queue.py"
LEASE_TESTS = "worker/test_leases.py"

FAULTS = (
    # Likelihood
    Fault(
        "likelihood: the mass of a grey level is shifted",
        LIKELIHOOD,
        "a = (centred_BKCHW + HALF_LEVEL) * inverse_scale",
        "a = (centred_BKCHW + 2 * HALF_LEVEL) * inverse_scale",
        LIKELIHOOD_TESTS,
    ),
    Fault(
        "likelihood: level 255 excludes what lies beyond it",
        LIKELIHOOD,
        "torch.where(at_255, log_above, log_mass)",
        "log_mass",
        LIKELIHOOD_TESTS,
    ),
    Fault(
        "likelihood: blue does not depend on green",
        LIKELIHOOD,
        " + c_gb * g[:, None, None]",
        "",
        LIKELIHOOD_TESTS,
    ),
    Fault(
        "likelihood: the outlier component does not bound the bits",
        LIKELIHOOD,
        "log_outlier_BHW + math.log(OUTLIER_SHARE)",
        "log_outlier_BHW + 9 * math.log(OUTLIER_SHARE)",
        LIKELIHOOD_TESTS,
    ),
    Fault(
        "likelihood: normal scores use the upper end of a level",
        LIKELIHOOD,
        "(below + up_to) / 2",
        "up_to",
        LIKELIHOOD_TESTS,
    ),
    Fault(
        "likelihood: bits are per pixel",
        LIKELIHOOD,
        "(math.log(2) * 3 * pixels)",
        "(math.log(2) * pixels)",
        LIKELIHOOD_TESTS,
    ),
    Fault(
        "network: a pixel sees itself and the next ones of its row",
        "ncml/network/layers.py",
        'self.row_is_causal = stream == "ul"',
        "self.row_is_causal = False",
        "ncml/network/test_causality.py",
    ),
    Fault(
        "network: VP noise does not preserve the variance",
        "ncml/network/sde.py",
        "return (-0.5 * self.integral(t)).exp()",
        "return (-self.integral(t)).exp()",
        "ncml/network/test_sde.py",
    ),
    # Sampler
    Fault(
        "sampler: all images of a batch have the first one's random numbers",
        "ncml/sampling/sample.py",
        "torch.Generator().manual_seed(seed)",
        "torch.Generator().manual_seed(seeds[0])",
        SAMPLE_TESTS,
    ),
    Fault(
        "sampler: known rows lack the noise of the others",
        "ncml/sampling/sample.py",
        "x_BCHW = set_known(torch.zeros_like(known_BCHW), t)",
        "x_BCHW = set_known(torch.zeros_like(known_BCHW), 0.0)",
        SAMPLE_TESTS,
    ),
    Fault(
        "sampler: images that were dropped are returned",
        "ncml/sampling/sample.py",
        "images[sorted(plan.dropped)] = 0",
        "images[:0] = 0",
        SAMPLE_TESTS,
    ),
    Fault(
        "sampler: Tweedie's step uses sigma instead of its square",
        "ncml/sampling/solvers.py",
        "sde.sigma(time) ** 2 * grad_log_prob(x_BCHW, t)",
        "sde.sigma(time) * grad_log_prob(x_BCHW, t)",
        SOLVER_TESTS,
    ),
    Fault(
        "sampler: Heun's second slope is that of the start",
        "ncml/sampling/solvers.py",
        "slope(x + dt * first, t_next)",
        "slope(x, t)",
        SOLVER_TESTS,
    ),
    Fault(
        "sampler: a Langevin step depends on the rest of the batch",
        "ncml/sampling/solvers.py",
        "(SIGNAL_TO_NOISE * ratio_B) ** 2",
        "(SIGNAL_TO_NOISE * ratio_B.mean().expand_as(ratio_B)) ** 2",
        "ncml/sampling/test_batch_invariance.py",
    ),
    Fault(
        "sampler: guidance pushes towards no class",
        "ncml/sampling/guidance.py",
        "(1 - tilt.guidance) / tilt.temperature",
        "(tilt.guidance - 1) / tilt.temperature",
        "ncml/sampling/test_guidance.py",
    ),
    Fault(
        "sampler: the cache omits the context of the known rows",
        "ncml/sampling/cached/prefill.py",
        "row_SWF[images] = x_BFHW[:, :, -1].transpose(1, 2)",
        "row_SWF[images] = 0 * x_BFHW[:, :, -1].transpose(1, 2)",
        CACHED_TESTS,
    ),
    Fault(
        "sampler: groups whose bytes differ pass the check",
        "ncml/sampling/batch_invariance.py",
        "if count := int(differs_G.sum()):",
        "if (count := int(differs_G.sum())) > 10**9:",
        "ncml/sampling/test_batch_invariance.py",
    ),
    # Queue
    Fault(
        "queue: a claimed job stays in its queue",
        "worker/lua/claim.lua",
        "  leave_queue(queue, id, job)\n  redis.call('ZADD', KEYS[1]",
        "  redis.call('ZADD', KEYS[1]",
        LEASE_TESTS,
    ),
    Fault(
        "queue: a batch exceeds its room",
        "worker/lua/claim.lua",
        "taken + n <= room",
        "taken <= room",
        LEASE_TESTS,
    ),
    Fault(
        "queue: a job that waited too long is computed",
        "worker/lua/claim.lua",
        "elseif start_by and start_by < now then",
        "elseif false then",
        LEASE_TESTS,
    ),
    Fault(
        "queue: a worker ends a job that others took over",
        "worker/lua/finish.lua",
        "if not lease or (ARGV[3] == '1' and tonumber(lease) > clock()) then return 0 end",
        "",
        LEASE_TESTS,
    ),
    Fault(
        "queue: ended jobs are kept for ever",
        "worker/lua/common.lua",
        "  redis.call('EXPIRE', job, ttl)\n",
        "",
        LEASE_TESTS,
    ),
    Fault(
        "queue: a job of a lost worker goes to the end of its queue",
        "worker/lua/requeue.lua",
        "redis.call('LPUSH', KEYS[3], ARGV[1])",
        "redis.call('RPUSH', KEYS[3], ARGV[1])",
        LEASE_TESTS,
    ),
    Fault(
        "queue: one more job than the limit waits",
        "worker/lua/submit.lua",
        "depth >= tonumber(ARGV[2])",
        "depth > tonumber(ARGV[2])",
        QUEUE_TESTS,
    ),
    Fault(
        "queue: a running job is not canceled",
        "worker/lua/cancel.lua",
        "redis.call('HSET', KEYS[1], 'cancel', '1')\n",
        "",
        QUEUE_TESTS,
    ),
    Fault(
        "queue: a job that kills its workers takes others with it",
        "worker/leases.py",
        "retries[claim.attempts >= 2].append(claim)",
        "retries[False].append(claim)",
        LEASE_TESTS,
    ),
    # Calibration
    Fault(
        "calibration: p-values can be 0",
        CONFORMAL,
        "return 1 + len(ranked) - np.searchsorted",
        "return len(ranked) - np.searchsorted",
        CONFORMAL_TESTS,
    ),
    Fault(
        "calibration: an image equal to a ranking image ranks above it",
        CONFORMAL,
        'side="left")',
        'side="right")',
        CONFORMAL_TESTS,
    ),
    Fault(
        "calibration: the threshold flags one image too many",
        CONFORMAL,
        "math.floor(false_positive_rate * (n + 1) + 1e-9)) - 1",
        "math.floor(false_positive_rate * (n + 1) + 1e-9))",
        CONFORMAL_TESTS,
    ),
    Fault(
        "calibration: several views have no correction",
        CONFORMAL,
        "min(views * rank, at_most)",
        "min(rank, at_most)",
        CONFORMAL_TESTS,
    ),
    Fault(
        "calibration: the false discovery rate is not divided by the number of images",
        CONFORMAL,
        "bounds = rate * np.arange(1, len(p) + 1) / max(1, len(p))",
        "bounds = rate * np.ones(len(p))",
        CONFORMAL_TESTS,
    ),
    Fault(
        "calibration: ranking scores are rounded down",
        CONFORMAL,
        "rounding=ROUND_CEILING",
        'rounding="ROUND_FLOOR"',
        CONFORMAL_TESTS,
    ),
    Fault(
        "calibration: one of another model is accepted",
        "ncml/ood/storage.py",
        'if content.get("model_version") != model_version:',
        "if False:",
        "ncml/calibration/test_estimation.py",
    ),
    Fault(
        "calibration: the images that estimate also rank",
        "ncml/calibration/estimation.py",
        'measure_all("rank", rank_pixels,',
        'measure_all("rank", fit_pixels,',
        "ncml/calibration/test_estimation.py",
    ),
    # Detectors
    Fault(
        "detector: ranks count images of a scene one by one",
        SCENE_RANKS,
        "weights_N = 1 / np.bincount(self.scenes_N)[self.scenes_N]",
        "weights_N = np.ones(len(self.scenes_N))",
        SCENE_RANKS_TESTS,
    ),
    Fault(
        "detector: an image equal to a ranking image counts as above it",
        SCENE_RANKS,
        'np.asarray(scores, np.float64), side="left")',
        'np.asarray(scores, np.float64), side="right")',
        SCENE_RANKS_TESTS,
    ),
    Fault(
        "detector: the confidence does not lower the rate",
        SCENE_RANKS,
        "while ranks > 1 and rate_bound(ranks, scenes, confidence) > false_positive_rate:",
        "while False:",
        SCENE_RANKS_TESTS,
    ),
    Fault(
        "detector: estimation images rank, too",
        "ncml/calibration/division.py",
        "np.flatnonzero(is_estimating_N), np.flatnonzero(~is_estimating_N)",
        "np.flatnonzero(is_estimating_N), np.arange(len(is_estimating_N))",
        DETECTOR_TESTS,
    ),
    Fault(
        "detector: every second or third scene estimates",
        "ncml/calibration/division.py",
        "is_estimating[one_of_each_block(count, estimating)] = True",
        "is_estimating[np.arange(estimating) * count // estimating] = True",
        "ncml/data/test_blocks.py",
    ),
    Fault(
        "detector: many photographs of one ranking part are reviewed",
        "ncml/data/scenes.py",
        "and _share(members, count, original_count) <= MAX_SHARE",
        "and len(members) / count <= MAX_SHARE",
        "ncml/data/test_scenes.py",
    ),
    Fault(
        "alarm: scenes of several images have one",
        "ncml/ood/alarm.py",
        "return FlaggedRateAlarm(n_rank, cutoff) if is_of_images else None",
        "return FlaggedRateAlarm(n_rank, cutoff)",
        "ncml/ood/test_alarm.py",
    ),
    Fault(
        "detector: scenes rank that only lower the rate",
        SCENE_RANKS,
        "return bisect.bisect_left(range(scenes), ranks(scenes),",
        "return bisect.bisect_left(range(scenes), ranks(scenes) + 1,",
        SCENE_RANKS_TESTS,
    ),
    Fault(
        "detector: a score that is equal for all good images decides everything",
        "ncml/calibration/good_scores.py",
        "self.least_deviations.get(name, MIN_DEVIATION),",
        "MIN_DEVIATION,",
        "ncml/calibration/test_updating.py",
    ),
    Fault(
        "detector: what is ordinary in a view counts as unusual",
        "ncml/ood/detector_calibration.py",
        "excess = max(0.0, self.standardise(score))",
        "excess = self.standardise(score)",
        "ncml/calibration/test_good_scores.py",
    ),
    Fault(
        "detector: the weights are learned from ranking images",
        "ncml/calibration/good_scores.py",
        "good = {name: scores_N[self._unreviewed(estimating)] for",
        "good = {name: scores_N[self.ranking] for",
        "ncml/calibration/test_good_scores.py",
    ),
    Fault(
        "detector: all images get the same tolerated brightness",
        "ncml/data/good_images.py",
        "(1 + self.brightness) ** rng.uniform(-1, 1)",
        "1 + self.brightness",
        "ncml/calibration/test_tolerated_brightness.py",
    ),
    Fault(
        "detector: reviewed images are altered, too",
        "ncml/calibration/view_estimation.py",
        "images.take(estimating[estimating < len(images) - divided.reviewed])",
        "images.take(estimating)",
        "ncml/calibration/test_view_estimation.py",
    ),
    Fault(
        "detector: processing and marks weigh the same",
        "ncml/ood/weights.py",
        "np.where(are_processed_M, PROCESSING_SHARE / processed, (1 - PROCESSING_SHARE) / others)",
        "np.where(are_processed_M, 0.5 / processed, 0.5 / others)",
        "ncml/ood/test_weights.py",
    ),
    Fault(
        "detector: a defective image is judged by weights that were learned from it",
        "ncml/calibration/good_scores.py",
        "self.are_learned_D & ~is_own_D",
        "self.are_learned_D",
        "ncml/calibration/test_good_scores.py",
    ),
    Fault(
        "detector: a good image is scored by a view of known defects that has seen it",
        "ncml/ood/views/known_defects.py",
        "Moments.without(of_good, fold)",
        "Moments.sum(of_good)",
        "ncml/ood/test_known_defects.py",
    ),
    Fault(
        "detector: a defective image is scored by a view of known defects that has seen it",
        "ncml/ood/views/known_defects.py",
        "Moments.without(of_defective, fold)",
        "Moments.sum(of_defective)",
        "ncml/ood/test_known_defects.py",
    ),
    Fault(
        "detector: weights are learned from defective images of scenes that rank",
        "ncml/calibration/division.py",
        "~np.isin(scenes_D, common_N[divided.ranking])",
        "np.ones(len(scenes_D), bool)",
        "ncml/calibration/test_updating.py",
    ),
    Fault(
        "detector: a bank of other weights is used",
        "ncml/ood/judging.py",
        "if file_digest(path) != digest:",
        "if False:",
        DETECTOR_TESTS,
    ),
    Fault(
        "detector: a second kill loses the arrays that detector.json names",
        "ncml/ood/judging.py",
        "    adopt_arrays(folder)  # those that `detector.json` names must not be overwritten\n",
        "",
        "ncml/calibration/test_updating.py",
    ),
    Fault(
        "detector: an image whose score is not finite passes for a good one",
        "ncml/ood/detector_calibration.py",
        "if not math.isfinite(score):",
        "if False:",
        "ncml/calibration/test_updating.py",
    ),
    Fault(
        "detector: the usual patches with which a stain is compared include its own scene",
        "ncml/ood/views/stains.py",
        "mean_hwF = total.without(_Sums.of([images[i] for i in own])).mean_hwF",
        "mean_hwF = total.mean_hwF",
        "ncml/ood/test_stains.py",
    ),
    Fault(
        "detector: the whole image is judged instead of the region",
        "ncml/ood/judging.py",
        "image_HWC if region is None else region.crop(image_HWC)",
        "image_HWC",
        DETECTOR_TESTS,
    ),
    # Service
    Fault(
        "service: a client sees the jobs of others",
        "service/jobs.py",
        "if view.owner != request.state.owner:",
        "if False:",
        "service/test_auth.py",
    ),
    Fault(
        "service: an Idempotency-Key returns the job of another request",
        "service/jobs.py",
        ".fingerprint != fingerprint:",
        ".fingerprint == ():",
        "service/test_endpoints.py",
    ),
    Fault(
        "service: a client that disconnects leaves its job running",
        "service/jobs.py",
        "cancels=not key and not webhook)",
        "cancels=False)",
        "service/test_waiting.py",
    ),
    Fault(
        "service: a body without a length is read to its end",
        "service/http/bodies.py",
        "if received_bytes > self.max_body_bytes:",
        "if False:",
        "service/test_refusals.py",
    ),
    Fault(
        "service: a decoder may take all memory",
        "service/decoder.py",
        "    _limit_memory(limits.memory_bytes)\n",
        "",
        "service/test_decoders.py",
    ),
    Fault(
        "service: a decoder may compute for ever",
        "service/decoder.py",
        "signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)",
        "signal.setitimer(signal.ITIMER_PROF, 0)",
        "service/test_decoders.py",
    ),
    Fault(
        "service: a decoder can make the service run code",
        "service/decoders.py",
        "if (module, name) in _PARTS_OF_ANSWERS:",
        "if module:",
        "service/test_decoders.py",
    ),
    Fault(
        "images: a decompression bomb is decoded",
        "ncml/images/decoding.py",
        "if image.width * image.height > max_pixels:",
        "if False:",
        "ncml/images/test_preprocess.py",
    ),
)


def write(source: Path, text: str) -> None:
    """Change a file of the copy; two changes in one second would leave a compiled module that looks current."""
    source.write_text(text)
    for compiled in source.parent.glob(f"__pycache__/{source.stem}.*"):
        compiled.unlink()


def failing(tests: str, copy: Path) -> str | None:
    """Run tests in the copy until one fails; return its name, or None. Raises ValueError if they cannot run."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", tests]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode != (1 if failed else 0):
        raise ValueError(f"pytest did not run: {done.stdout[-500:]}{done.stderr[-500:]}")
    return failed[1] if failed else None


def plant(fault: Fault, copy: Path) -> str | None:
    """Return a test that fails with a fault and passes without it, or None if all pass.

    Raises ValueError if the fault cannot be planted.
    """
    source = copy / fault.file
    text = source.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.file} contains the place {text.count(fault.old)} times")
    write(source, text.replace(fault.old, fault.new))
    try:
        failed = failing(f"tests/{fault.tests}", copy)
    finally:
        write(source, text)
    if failed and failing(failed, copy):
        raise ValueError(f"{failed} fails without the fault, too")
    return failed


def main(parts: list[str]) -> int:
    """Plant the faults whose name contains one of the parts, or all; return the exit status."""
    faults = [fault for fault in FAULTS if not parts or any(part in fault.name for part in parts)]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="ncml-faults-") as folder:
        copy = Path(folder) / "ncml"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
        shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
        for fault in faults:
            start = time.monotonic()
            try:
                result = plant(fault, copy) or "NOT NOTICED by any test"
            except ValueError as error:
                result = f"NOT PLANTED: {error}"
            missed += result.startswith("NOT ")
            print(f"{fault.name}\n    {result}  ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{len(faults) - missed} of {len(faults)} faults are noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
