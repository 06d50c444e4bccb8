"""Export a detector to one ONNX file, and check that it judges as the detector does (`ncml.ood.exported` runs it)."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ncml import checkpoint
from ncml.errors import InputError, ModelError
from ncml.images.resizing import Resize
from ncml.ood.detector_calibration import FILE, DetectorCalibration
from ncml.ood.exported import FORMAT, METADATA, ROUNDING, ExportedDetector
from ncml.ood.judging import Detector
from ncml.ood.onnx_graphs import ViewGraph, make_graph
from ncml.ood.views.view import Reader
from ncml.progress import OnProgress, Progress

OPSET = 20


@dataclass(frozen=True)
class Parity:
    """How the exported detector judges the same images."""

    images: int
    largest_difference: float
    """Of the score of an image or of a standardised one of a view, as a share of it where it is above 1."""
    equal_p_values: int
    """The others are larger: their score is that of a ranking image up to rounding."""


def export(
    folder: Path,
    calibration: DetectorCalibration,
    out: Path,
    size: tuple[int, int],
    images: Sequence[Reader],
    on_progress: OnProgress,
) -> Parity:
    """Write a detector for images of a height and width, and compare its verdicts on images of that size.

    Raises `ModelError` if a package is missing, if a view cannot be exported, or if a score differs; then no file is
    written.
    """
    _check_packages()
    height, width = size
    region = calibration.region
    if region is not None and (region.height, region.width) != size:
        raise InputError(
            "size", f"the detector judges a region of images of {region.width}x{region.height}: omit --size."
        )
    detector = Detector.load(folder, calibration)
    judged = size if region is None else (region.box.height, region.box.width)
    graph = _DetectorGraph({kind: make_graph(view, *judged) for kind, view in detector.views.items()})
    on_progress(Progress("export", 0, 1))
    program = _trace(graph)
    on_progress(Progress("export", 1, 1))
    program.model.metadata_props[METADATA] = json.dumps(
        {
            "format": FORMAT,
            "height": height,
            "width": width,
            "inputs": {name: [step.to_json() for step in steps] for name, steps in graph.inputs.items()},
            "detector": checkpoint.read_json(folder / FILE, checkpoint.MAX_CALIBRATION_BYTES),
        }
    )
    parity: list[Parity] = []

    def write(new: Path) -> None:
        program.save(new)
        parity.append(compare(detector, ExportedDetector(new), images, on_progress))

    checkpoint.replace_file(out, write)
    return parity[0]


def compare(
    detector: Detector, exported: ExportedDetector, images: Sequence[Reader], on_progress: OnProgress
) -> Parity:
    """Judge images both ways; raise `ModelError` where a score differs or a p-value is smaller.

    Standardised scores below 0 count as 0, as they do in the score of an image: the distance of a patch from itself, in
    images that the bank holds, is rounding alone.
    """
    largest, equal = 0.0, 0
    for index, reader in enumerate(images):
        image_HWC = reader()
        expected, found = detector.judge(image_HWC), exported.judge(image_HWC)
        compared = {
            f"view {name!r}": (max(0.0, own.standardised), max(0.0, found.views[name].standardised))
            for name, own in expected.views.items()
        }
        for name, (score, other) in (compared | {"score": (expected.score, found.score)}).items():
            difference = abs(other - score) / max(1.0, score)
            largest = max(largest, difference)
            if not difference <= ROUNDING:
                raise ModelError(
                    f"the exported {name} differs by {difference:.2g} of its value on image {index + 1} of "
                    f"{len(images)}, more than {ROUNDING:g}: the file is not kept."
                )
        if found.p_value < expected.p_value:
            raise ModelError(
                f"the exported p-value is {found.p_value:.4f} instead of {expected.p_value:.4f} on image {index + 1} "
                f"of {len(images)}: the file is not kept."
            )
        equal += found.p_value == expected.p_value
        on_progress(Progress("compare", index + 1, len(images)))
    return Parity(len(images), largest, equal)


def _check_packages() -> None:
    """Raise `ModelError` if a package is missing, before minutes of work."""
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise ModelError(f"exporting needs the package {error.name}: pip install 'ncml[onnx]'.") from error
    _ = onnx, onnxruntime, onnxscript


def patterns(height: int, width: int) -> list[Reader]:
    """Return drawn images, most of them unlike good ones: grey, a ramp, blocks, and noise."""
    rng = np.random.default_rng(0)
    ramp_HWC = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    blocks_HWC = np.kron(rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3)), np.ones((16, 16, 1)))
    drawn = [np.full((height, width, 3), 128), ramp_HWC, blocks_HWC[:height, :width]]
    drawn += [rng.normal(mean, deviation, (height, width, 3)) for mean, deviation in ((128, 4), (90, 20), (128, 80))]
    return [lambda image_HWC=image_HWC: image_HWC.clip(0, 255).astype(np.uint8) for image_HWC in drawn]


class _DetectorGraph(nn.Module):
    """All views of a detector: an image for each input -> the candidates and the maps of all scores, by output."""

    def __init__(self, graphs: Mapping[str, ViewGraph]) -> None:
        super().__init__()
        self.graphs = dict(graphs)
        self.registered = nn.ModuleList(graphs.values())

    @property
    def inputs(self) -> dict[str, tuple[Resize, ...]]:
        """What brings an image to each input, by `<view>.<input>`."""
        return {f"{kind}.{name}": steps for kind, graph in self.graphs.items() for name, steps in graph.inputs.items()}

    @property
    def examples(self) -> tuple[Tensor, ...]:
        """Images for all inputs."""
        return tuple(
            torch.zeros((steps[-1].height, steps[-1].width, *(() if steps[-1].grey else (3,))), dtype=torch.uint8)
            for steps in self.inputs.values()
        )

    def forward(self, *images: Tensor) -> dict[str, Tensor]:
        """Score an image by all views."""
        outputs: dict[str, Tensor] = {}
        remaining = iter(images)
        for graph in self.graphs.values():
            own = [next(remaining) for _ in graph.inputs]
            for name, (scores_K, maps_K) in graph(*own).items():
                outputs[name] = scores_K.double()
                outputs |= {f"{name}.map{index}": map_hw for index, map_hw in enumerate(maps_K)}
        return outputs


def _trace(graph: _DetectorGraph) -> torch.onnx.ONNXProgram:
    """Return the graph as a program of onnx."""
    examples = graph.examples
    with torch.inference_mode():
        names = list(graph(*examples))
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")  # reports that torchvision is missing
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch about itself
            program = torch.onnx.export(
                graph.eval().requires_grad_(False),
                examples,
                input_names=list(graph.inputs),
                output_names=names,
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    _rename_modes(program)
    _simplify(program)
    return program


def _simplify(program: torch.onnx.ONNXProgram) -> None:
    """Fold constants and eliminate common subexpressions.

    The exporter's own optimizer also searches every node for hundreds of patterns. That takes over a third of an
    export, and the file judges no faster (`docs/export.md` has the times).
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    optimizer.fold_constants(program.model)
    common.CommonSubexpressionEliminationPass()(program.model)
    common.DeduplicateInitializersPass()(program.model)
    optimizer.remove_unused_nodes(program.model)


def _rename_modes(program: torch.onnx.ONNXProgram) -> None:
    """Name the mode of samples inside loops as since opset 20; the exporter does so outside of them only."""
    import onnx_ir

    for node in onnx_ir.traversal.RecursiveGraphIterator(program.model.graph):
        if node.op_type == "GridSample" and node.attributes["mode"].as_string() == "bilinear":
            node.attributes["mode"] = onnx_ir.AttrString("mode", "linear")
