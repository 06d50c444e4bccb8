"""The public interface of the library: a trained model that scores, generates and completes images."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from ncml import checkpoint, runtime
from ncml.arguments import (
    Classes,
    class_indices,
    read_halves,
    read_images,
    resolve_sampling,
    sampling_limits,
)
from ncml.errors import InputError, ModelError
from ncml.hub import find_model
from ncml.images.reading import Image, Images, list_images, name_image, name_of, read_image
from ncml.limits import MAX_IMAGES_PER_CALL, Keep, check_count
from ncml.network.mixture import bits_per_dim, from_uint8
from ncml.network.ncpn import NCPN
from ncml.network.sde import make_sde
from ncml.ood import calibrations, detector_calibration
from ncml.ood.calibration import Calibration
from ncml.ood.calibrations import Selection
from ncml.ood.detector_calibration import DetectorCalibration
from ncml.ood.judging import Detector
from ncml.ood.measurements import LevelMeasurement, measure, measure_level
from ncml.ood.statistics import build_statistics, required_columns
from ncml.ood.storage import DEFAULT_NAME
from ncml.ood.tile_calibration import TileCalibration, read_if_present
from ncml.ood.tiles import scan
from ncml.options import SamplingOptions, leaves_verdict_to_detector, spell_out
from ncml.progress import OnProgress, Progress, ignore_progress
from ncml.results import Detection, ImageArray, Scan, Score, Verdict
from ncml.sampling import outcomes
from ncml.sampling.batch_invariance import GroupedSampler, choose_batching
from ncml.sampling.batching import Batching, BatchingSetting, batching_setting
from ncml.sampling.conditions import NO_TILT, Tilt
from ncml.sampling.cuda_graphs import ReplaySampler
from ncml.sampling.defaults import SamplingLimits, check_noise
from ncml.sampling.sample import Plan, Sampler, SamplerByTilt, generate_images, sample_naive


def load(model: str | os.PathLike[str] = "", device: str = "cpu", *, batching: str | None = None) -> Model:
    """Load a model; raise `ModelError` if it does not exist, is invalid or cannot be placed on the device.

    model: a name, as `ncml models` lists them, a model folder, or `hf://owner/model@revision`, which is fetched from
        the Hugging Face Hub. "": the default model.
    batching: how a CPU samples a batch so that a seed gives the same bytes in every one: "fast" groups, slower "fixed"
        ones that need no check, or "auto", fast groups where they pass a check before the first sampling. Default: that
        of the environment variable NCML_BATCHING, else auto.
    """
    setting = batching_setting(batching)
    folder = find_model(model)
    runtime.use_full_precision()
    if error := runtime.device_error(device):
        raise ModelError(f"{folder} cannot be placed on {device!r}: {runtime.first_line(error)}") from error
    try:
        network, description = checkpoint.load(folder, device)
    except RuntimeError as error:  # the device is out of memory
        raise ModelError(f"{folder} cannot be placed on {device!r}: {runtime.first_line(error)}") from error
    return Model(network.requires_grad_(False), description, setting)


def _load_again(folder: Path, device: str, setting: BatchingSetting, version: str) -> Model:
    model = load(folder, device, batching=setting)
    if model.version != version:
        raise ModelError(f"{folder} no longer holds the model that was loaded from it: load it again.")
    return model


class Model:
    """A trained NCPN: `score`, `generate` and `complete` on uint8 images, for one thread at a time.

    A copy, also one that is passed to another process, is loaded from the folder again.
    """

    def __init__(self, network: NCPN, description: checkpoint.Description, batching: BatchingSetting = "auto") -> None:
        self.network = network
        self.description = description
        self.folder: Path = description.folder
        self.name, self.config = description.name, description.config
        self.version = description.version
        """SHA-256 of configuration and weights, 64 hexadecimal digits."""
        self.metrics = description.metrics
        self.sampling = description.sampling
        """The sampling options that the model folder recommends."""
        self.height, self.width = description.height, description.width
        self.classes: tuple[str, ...] = description.classes
        self.noise: float = description.noise
        """The largest noise level, at t = T, in grey levels."""
        self.keeps: tuple[Keep, ...] = description.keeps
        """The known halves that are completed exactly."""
        self.statistics = build_statistics(self.config)
        """The out-of-distribution statistics by name."""
        self._replay = ReplaySampler()
        self._batching_setting: BatchingSetting = batching
        self._batchings: dict[tuple[int, int, bool], Batching] = {}
        """By number of threads, rows per image, and whether distributions are tilted."""
        self.read_calibration()

    def __reduce__(self) -> tuple[Callable[..., Model], tuple[Path, str, BatchingSetting, str]]:
        return _load_again, (self.folder.resolve(), str(self.device), self._batching_setting, self.version)

    def __repr__(self) -> str:
        size = f"{self.height}x{self.width}, {len(self.classes)} classes"
        return f"Model({self.name!r}, version {self.version[:12]}, {size}, on {self.device})"

    @property
    def sampling_limits(self) -> SamplingLimits:
        """The ranges and the defaults of sampling options."""
        return sampling_limits(self.description)

    def read_calibration(self) -> None:
        """Reload `calibration.json`. If it belongs to another model, ignore it and explain why in `missing_reason`.

        A detector is loaded again when it is used.
        """
        self.calibrations = calibrations.read(self.folder, self.version, self.config)
        self._detector: Detector | None = None
        self._is_detector_loaded = False

    @property
    def calibration(self) -> Calibration | None:
        """The default calibration; None if there is none, for the reason in `missing_reason`."""
        return self.calibrations.by_name.get(DEFAULT_NAME)

    @property
    def detector(self) -> DetectorCalibration | None:
        """The calibration of a detector, if the folder is one. Raises `ModelError` if it cannot be read."""
        if self._is_detector_loaded:
            return self._detector and self._detector.calibration
        return detector_calibration.read_if_present(self.folder, self.version)

    def load_detector(self) -> DetectorCalibration | None:
        """Load what a detector judges with before the first image, and return its calibration.

        Raises `ModelError` if it is damaged, or needs what is not installed.
        """
        if not self._is_detector_loaded:
            stored = detector_calibration.read_if_present(self.folder, self.version)
            self._detector = stored and Detector.load(self.folder, stored, str(self.device))
            self._is_detector_loaded = True
        return self.detector

    @property
    def missing_reason(self) -> str:
        """Why there is no default calibration, if there is none."""
        return self.calibrations.missing_reason

    uncalibrated = missing_reason
    """The former name of `missing_reason`."""

    @property
    def card(self) -> str:
        """The model card in Markdown. Raises `ModelError` if it is not UTF-8 text."""
        return checkpoint.read_card(self.folder)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.network.head.weight.device

    @property
    def batching(self) -> Batching | None:
        """How batches are sampled on a CPU with the current number of threads; the first call may run the check.

        None on other devices, where a seed gives the same bytes only in the same batch.
        """
        return None if self.device.type != "cpu" else self._batching(NO_TILT)

    @property
    def known_batching(self) -> Batching | None:
        """As `batching`, but None if that needs a check that has not run yet on this machine."""
        if self.device.type != "cpu" or self._batching_setting != "auto":
            return self.batching
        key = torch.get_num_threads(), NO_TILT.rows_per_image, False
        return self._batchings.get(key) or outcomes.recall(self.network, self.version, NO_TILT)

    def _batching(self, tilt: Tilt) -> Batching:
        key = torch.get_num_threads(), tilt.rows_per_image, tilt != NO_TILT  # operations do not depend on its values
        if key not in self._batchings:
            self._batchings[key] = self._choose_batching(tilt)
        return self._batchings[key]

    def _choose_batching(self, tilt: Tilt) -> Batching:
        if self._batching_setting != "auto":
            return choose_batching(self.network, self._batching_setting)
        if recalled := outcomes.recall(self.network, self.version, tilt):
            return recalled
        untilted_passed = tilt != NO_TILT and self._batching(NO_TILT).check == "passed"
        chosen = choose_batching(self.network, "auto", tilt, untilted_passed=untilted_passed)
        outcomes.store(self.network, self.version, tilt, chosen)
        return chosen

    def score(
        self,
        images: Images,
        *,
        classes: Classes = None,
        noise: float = 0.0,
        map: bool = False,
        ood: bool = True,
        calibration: str | None = None,
        statistic: str | None = None,
        statistics: str | Sequence[str] = (),
        sanity: bool = False,
        preprocess: bool = True,
        batch_size: int = 32,
        callback: OnProgress = ignore_progress,
    ) -> list[Score]:
        """Score images: paths, bytes, PIL images, uint8 [H, W, 3], a list of these, uint8 [B, H, W, 3], or a folder.

        classes: a name, an index or None (the null class), for all images or for each.
        noise: grey levels at which to score, from 0 to `Model.noise`. At more than 0 the image is scaled by alpha(t)
            but no noise is added, so that scores are deterministic.
        ood: return a verdict for each image, if the model is calibrated. Statistics use their own conditions: the null
            class and the noise levels of `ncml.ood`, regardless of `classes` and `noise`. False: one pass.
        calibration: the name of the calibration of the verdict; None: that of the detector, if the folder is one and no
            statistic is named, else default. A detector judges an image at its own size (`Score.detection`).
        statistic: the statistic of the verdict; None: the calibration's.
        statistics: names of statistics to return, or "all": those of the calibration, or without a calibration those
            that need none.
        sanity: also score each image with the lowest bit of every value flipped, at t = 0 and the null class.
        preprocess: crop and resize images of another size than the model's, as the service does; images of exactly
            its size are never changed. False refuses those of another size.
        batch_size: images scored together.
        callback: called with the number of images scored.

        Raises `InputError` for anything that is not an image, and for an argument out of range.
        """
        batch_size = check_count("batch_size", batch_size)
        listed = list_images(images)
        pixels, files = read_images(listed, self.height, self.width, preprocess=preprocess)
        class_B = torch.tensor(class_indices(classes, len(pixels), self.classes))
        t = self._time(noise)
        judging = self._select_detector(calibration, statistic) if ood else None
        selected = None if judging else self.calibrations.select(calibration)
        selection = self.calibrations.select_statistics(
            selected, self.statistics, statistic, statistics, with_verdict=ood
        )
        detections = self._detect(judging, listed, callback) if judging else [None] * len(pixels)
        scores: list[Score] = []
        for start in range(0, len(pixels), batch_size):
            batch = slice(start, start + batch_size)
            scores += self._score(pixels[batch], class_B[batch], t, selection, with_map=map, with_sanity=sanity)
            callback(Progress("score", len(scores), len(pixels)))
        for score, file, detection in zip(scores, files, detections, strict=True):
            score.file, score.detection = file, detection
            if detection is not None:
                score.ood = detection.verdict(detector_calibration.NAME)
        return scores

    def _select_detector(self, calibration: str | None, statistic: str | None) -> Detector | None:
        """Return the detector that gives the verdict, loaded; None if another calibration does."""
        if not leaves_verdict_to_detector(calibration, statistic):
            return None
        if self.load_detector() is not None and statistic is not None:
            raise InputError("statistic", "a detector has views instead of a statistic: omit the statistic.")
        return self._detector

    def _detect(self, judging: Detector, listed: Sequence[Image], callback: OnProgress) -> list[Detection]:
        """Judge images at their own sizes, one at a time."""
        detections: list[Detection] = []
        for position, image in enumerate(listed):
            try:
                detections.append(judging.judge(read_image(image)))
            except InputError as error:
                own_name = "image" if len(listed) == 1 else f"image[{position}]"
                raise name_image(error, name_of(image) or own_name) from error
            callback(Progress("judge", len(detections), len(listed)))
        return detections

    def _score(
        self,
        pixels: NDArray[np.uint8],
        class_B: torch.Tensor,
        t: float,
        selection: Selection,
        *,
        with_map: bool,
        with_sanity: bool,
    ) -> list[Score]:
        is_null_class = bool((class_B == len(self.classes)).all())
        columns, clean = measure(self.network, pixels, required_columns(selection.computed, self.statistics))
        measurement: LevelMeasurement = (
            clean
            if clean is not None and is_null_class and t == 0
            else measure_level(self.network, pixels, t, (), class_B)
        )
        log_prob_BHW = measurement.log_prob_BHW.cpu()
        total_B = log_prob_BHW.sum((1, 2), dtype=torch.float64)
        bits_B = bits_per_dim(total_B, self.height * self.width).tolist()
        map_BHW = bits_per_dim(log_prob_BHW, 1).numpy()
        calibration = selection.calibration
        estimates = None if calibration is None else calibration.estimates
        values = {name: self.statistics[name].compute(columns, estimates) for name in selection.computed}
        verdicts: Sequence[Verdict | None] = [None] * len(pixels)
        if calibration is not None and selection.statistic is not None:
            verdicts = calibration.verdicts(selection.statistic, values[selection.statistic])
        flipped: list[float] | list[None] = [None] * len(pixels)
        if with_sanity:
            flipped = measure(self.network, pixels ^ np.uint8(1), ["bits_0"])[0]["bits_0"].tolist()
        return [
            Score(
                bpd=bits_B[i],
                log_likelihood=float(total_B[i]),
                map=map_BHW[i] if with_map else None,
                ood=verdicts[i],
                statistics={name: float(values[name][i]) for name in selection.names},
                flipped_bpd=flipped[i],
            )
            for i in range(len(pixels))
        ]

    @property
    def tiles(self) -> TileCalibration | None:
        """The calibration of tiles, if there is one. Raises `ModelError` if it cannot be used."""
        return read_if_present(self.description)

    def scan(
        self,
        image: Image,
        *,
        tile_size: int | None = None,
        batch_size: int = 32,
        callback: OnProgress = ignore_progress,
    ) -> Scan:
        """Score an image of any size in overlapping tiles, and judge it by three views of their scores.

        image: a path, a PIL image or uint8 [H, W, 3].
        tile_size: shorter side of a tile in pixels; None: the calibration's, or the model's. Without a calibration
            of tiles (`ncml calibrate --tile`) there is a map, but no p-value.
        callback: called with the number of tiles scored.

        Raises `InputError` for an image smaller than a tile, for tiles of another size than the calibrated one, and for
        a model without any calibration.
        """
        batch_size = check_count("batch_size", batch_size)
        tile_size = None if tile_size is None else check_count("tile_size", tile_size)
        calibration = self.tiles
        if calibration is None:
            if self.calibration is None:
                reason = self.calibrations.problems.get(DEFAULT_NAME) or (
                    "neither they nor whole images are calibrated: run ncml calibrate --tile."
                )
                raise InputError("tile", f"tiles cannot be scored: {reason}")
            calibration = self.calibration.estimates.gaussians["multiscale"]
        return scan(
            self.network,
            read_image(image, "image"),
            calibration,
            side=tile_size,
            batch_size=batch_size,
            on_progress=callback,
        )

    @spell_out
    def generate(
        self,
        n: int = 1,
        *,
        classes: Classes = None,
        seeds: int | Sequence[int] = 0,
        sampler: str | None = None,
        callback: OnProgress = ignore_progress,
        dropped: Collection[int] = (),
        **options: Unpack[SamplingOptions],
    ) -> ImageArray:
        """Generate n images, 1 to 1024, uint8 [n, H, W, 3].

        classes: a name, an index or None, for all images or for each.
        seeds: 0 to 2^32 - 1; image i uses seeds + i, or the i-th of a sequence of n seeds.
        {options}
        sampler: incremental (the default), or naive for the reference.
        callback: called with the rows, then the refinement steps done.
        dropped: indices of images that are no longer needed, which become black. A set to which the callback adds all
            of them ends the call.

        `ncml.options.SamplingOptions` declares the options; those that are None have the model's defaults, listed in
        `Model.sampling_limits.defaults`.

        Raises `InputError` for an argument out of range.
        """
        n = check_count("n", n, MAX_IMAGES_PER_CALL)
        return self._sample(n, classes, seeds, options, sampler, callback, dropped)

    @spell_out
    def complete(
        self,
        images: Images,
        *,
        keep: Keep | None = None,
        n: int = 1,
        classes: Classes = None,
        seeds: int | Sequence[int] = 0,
        sampler: str | None = None,
        preprocess: bool = True,
        callback: OnProgress = ignore_progress,
        dropped: Collection[int] = (),
        **options: Unpack[SamplingOptions],
    ) -> ImageArray:
        """Complete 1 to 1024 images, of which the half `keep` is known; uint8 [B, H, W, 3] of the model's size.

        images: whole images or halves: paths, PIL images, uint8 [H, W, 3], a list of these, uint8 [B, H, W, 3], or a
            folder. One image gives n variants. Pixels of the unknown half are ignored; known pixels of an image of the
            model's size are returned exactly.
        keep: top, bottom, left or right; None: derived from a half, or from the opaque half of an image with
            transparency, else top.
        preprocess: crop and resize images of another size than the model's; False refuses them.

        The other arguments are those of `generate`.

        Raises `InputError` for anything that is not an image, for a half that the model does not complete, and for an
        argument out of range.
        """
        n = check_count("n", n, MAX_IMAGES_PER_CALL)
        canvases, half = read_halves(
            images, self.height, self.width, keeps=self.keeps, keep=keep, preprocess=preprocess
        )
        if len(canvases) > MAX_IMAGES_PER_CALL:
            raise InputError(
                "images", f"at most {MAX_IMAGES_PER_CALL} images can be passed in one call, not {len(canvases)}."
            )
        if n > 1 and len(canvases) > 1:
            raise InputError("n", "several variants need exactly one image; give one image or n=1.")
        canvases = np.repeat(canvases, n, axis=0)
        return self._sample(len(canvases), classes, seeds, options, sampler, callback, dropped, canvases, half)

    def _sample(
        self,
        n: int,
        classes: Classes,
        seeds: int | Sequence[int],
        options: SamplingOptions,
        sampler: str | None,
        on_progress: OnProgress,
        dropped: Collection[int],
        canvases: NDArray[np.uint8] | None = None,
        keep: Keep = "top",
    ) -> ImageArray:
        class_B, seed_B, settings = resolve_sampling(self.description, n, classes, seeds, options, sampler)
        plan = Plan(
            seeds=seed_B,
            class_B=torch.tensor(class_B),
            settings=settings,
            known_BCHW=None if canvases is None else from_uint8(torch.from_numpy(canvases)),
            keep=keep,
            dropped=dropped,
        )
        try:
            return generate_images(self.network, plan, self._sampler(plan), on_progress).view(ImageArray)
        except Exception as error:
            if runtime.is_out_of_memory(error):  # so that the caller can retry with fewer images
                self._replay.release()
            raise

    def _sampler(self, plan: Plan) -> Sampler:
        def choose_sampler(tilt: Tilt, indices: list[int]) -> Sampler:
            if plan.settings.sampler == "naive":
                return sample_naive
            if self.device.type == "cuda":
                return self._replay
            seeds = [plan.seeds[index] for index in indices]
            return GroupedSampler(self._batching(tilt).divide(seeds, tilt.rows_per_image))

        return SamplerByTilt(choose_sampler)

    def _time(self, noise: float) -> float:
        return make_sde(self.config.sde).time_of(check_noise(noise, self.noise))
