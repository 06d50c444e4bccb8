"""Knowledge of classes in a model's likelihoods, and in the images that it generates.

    gain         mean of log p(x | true class) - log p(x | no class), in nats: above 0 if the class helps to predict
    posterior    share of images whose true class has the largest p(x | class) (Bayes' rule, all classes equally likely)
    fidelity     share of images generated for a class in which a classifier recognises it: a probe, with which options
                 may have been chosen, and a classifier of pixels, with which none was
    variety      how images of the same classes, in the same numbers, vary beside real ones (`ncml.evaluation.variety`)

Shapes: N images, C classes, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ncml.errors import InputError
from ncml.evaluation import bootstrap
from ncml.evaluation.class_samples import measure_samples
from ncml.evaluation.distances import load_extractor
from ncml.evaluation.image_sets import SEED, ImageSet
from ncml.evaluation.inputs import Inputs, class_labels
from ncml.evaluation.report import OURS, Cell, Section, Table
from ncml.evaluation.variety import NEIGHBOURS
from ncml.model import Model
from ncml.network.mixture import from_uint8, log_prob
from ncml.network.sde import make_sde
from ncml.ood.columns import noise_levels


def class_log_probs(model: Model, pixels_NHWC: NDArray[np.uint8], noise: float, first: int = 0) -> NDArray[np.float64]:
    """Compute log p of images at a noise level under every class and, last, under none. Nats, [N, C + 1].

    At noise > 0 each image is noised with draws of its position, `first` being that of the first image.
    """
    sde = make_sde(model.config.sde)
    t = sde.time_of(noise)
    x_NCHW = from_uint8(torch.from_numpy(pixels_NHWC))
    if t > 0:
        generators = [np.random.default_rng((SEED, first + i)) for i in range(len(x_NCHW))]
        eps_NCHW = torch.from_numpy(np.stack([rng.standard_normal(x_NCHW.shape[1:], np.float32) for rng in generators]))
        time = torch.tensor(t)
        x_NCHW = sde.alpha(time) * x_NCHW + sde.sigma(time) * eps_NCHW
    x_NCHW = x_NCHW.to(model.network.head.weight)
    t_N = torch.full((len(x_NCHW),), t, device=x_NCHW.device)
    columns: list[torch.Tensor] = []
    with torch.inference_mode():
        for index in range(len(model.classes) + 1):
            class_N = torch.full((len(x_NCHW),), index, device=x_NCHW.device)
            parameters_NPHW = model.network(x_NCHW, t_N, class_N)
            columns.append(log_prob(x_NCHW, parameters_NPHW, t_N == 0).sum((1, 2), dtype=torch.float64))
    return torch.stack(columns, 1).cpu().numpy()


def class_knowledge(inputs: Inputs, model: Model, images: ImageSet, noise: float) -> dict[str, bootstrap.Estimate]:
    """Measure gain and posterior at a noise level."""

    def measure(start: int, stop: int) -> dict[str, Any]:
        return {"log_prob": class_log_probs(model, images.pixels_NHWC[start:stop], noise, start)}

    key = {"model": model.version, "data": images.digest, "noise": noise}
    log_prob_NC = inputs.cache.rows("classes", key, len(images), measure)["log_prob"]
    labels_N = class_labels(model, images)
    gain_N = log_prob_NC[np.arange(len(labels_N)), labels_N] - log_prob_NC[:, -1]
    correct_N = log_prob_NC[:, :-1].argmax(1) == labels_N
    return {"gain": bootstrap.mean(gain_N), "posterior": bootstrap.share(correct_N)}


def _models_with_classes(inputs: Inputs) -> dict[str, Model]:
    """Return the models that have the classes of the images; a note names each other one.

    Raises `InputError` if there is none.
    """
    models: dict[str, Model] = {}
    for label, model in inputs.models.items():
        try:
            class_labels(model, inputs.test_images(model, "classes"))
        except InputError as error:
            if not models and label == list(inputs.models)[-1]:
                raise
            inputs.notes.append(f"{label} was left out: {error}")
        else:
            models[label] = model
    return models


def classes(inputs: Inputs) -> Section:
    """Measure gain and posterior of every model, and the fidelity and variety of its samples."""
    knowledge: list[tuple[Cell, ...]] = []
    fidelity: list[tuple[Cell, ...]] = []
    variety: list[tuple[Cell, ...]] = []
    by_class: list[tuple[Cell, ...]] = []
    results: dict[str, dict[str, Any]] = {}
    for label, model in _models_with_classes(inputs).items():
        images = inputs.test_images(model, "classes")
        levels = noise_levels(model.config, (0.0, 0.25, 1.0))
        by_level = {f"{noise:g}": class_knowledge(inputs, model, images, noise) for noise in levels}
        knowledge += [(label, OURS, noise, *estimates.values()) for noise, estimates in by_level.items()]
        measured = measure_samples(inputs, model)
        for method, sample in measured.items():
            is_real = method == "real"
            name = f"{label}, {method}"
            fidelity_name = f"{inputs.data_name} (real images)" if is_real else name
            fidelity.append((fidelity_name, OURS, sample.recognised, sample.recognised_pixels))
            variety_name = f"{inputs.data_name} train (the floor)" if is_real else name
            if sample.variety is not None:
                variety.append((variety_name, OURS, *sample.variety.estimates.values()))
        if measured:
            method, last = list(measured.items())[-1]  # the defaults, unless another method has the same options
            by_class += [(f"{label}, {method}", name, *cells.values()) for name, cells in last.by_class.items()]
        results[label] = {
            "likelihood": {
                noise: {name: estimate.to_json() for name, estimate in estimates.items()}
                for noise, estimates in by_level.items()
            },
            "fidelity": {method: sample.recognised.to_json() for method, sample in measured.items()},
            "fidelity_pixels": {method: sample.recognised_pixels.to_json() for method, sample in measured.items()},
            "variety": {
                method: {name: estimate.to_json() for name, estimate in sample.variety.estimates.items()}
                for method, sample in measured.items()
                if sample.variety is not None
            },
            "by_class": {
                method: {
                    name: {column: estimate.to_json() for column, estimate in estimates.items()}
                    for name, estimates in sample.by_class.items()
                }
                for method, sample in measured.items()
            },
        }
    return Section(
        kind="classes",
        title="Class knowledge",
        text=_texts(inputs),
        findings=[
            sentence
            for label, result in results.items()
            for sentence in _findings(label, result, len(inputs.models[label].classes))
        ],
        tables=[
            Table("classes", "Classes in the likelihood", ("model", "source", "noise", "gain", "posterior"), knowledge),
            Table(
                "class_fidelity",
                "Classes in generated images: share recognised by each classifier",
                ("images", "source", "probe", "pixels"),
                list(dict.fromkeys(fidelity)),
            ),
            Table(
                "class_variety",
                "Generated images of all classes in turn against real images of the same classes",
                ("images", "source", "KD within classes", "precision", "recall", "variance within classes"),
                list(dict.fromkeys(variety)),
            ),
            Table("class_details", "By class", ("images", "class", "probe", "pixels", "variance"), by_class),
        ],
        results=results,
        notes=list(dict.fromkeys(inputs.notes)),
    )


def _findings(label: str, result: Mapping[str, Any], classes: int) -> list[str]:
    """Report recognition and variety at the defaults, the posterior, and a gain that classes alone cannot explain."""
    findings: list[str] = []
    pixels, varieties = result["fidelity_pixels"], result["variety"]
    if pixels:
        method = list(pixels)[-1]
        findings.append(
            f"In {bootstrap.format_json(pixels[method])} of the images that the model {label} generates by default, a "
            f"classifier of pixels recognises the class; in real images in {bootstrap.format_json(pixels['real'])}."
        )
        if method in varieties and "real" in varieties:
            recall, real = (varieties[name]["recall"] for name in (method, "real"))
            findings.append(
                f"These images vary less than real ones: recall is {bootstrap.format_json(recall)} (training images: "
                f"{bootstrap.format_json(real)}), the variance within classes "
                f"{bootstrap.format_json(varieties[method]['variance'])}."
            )
    clean = result["likelihood"]["0"]
    findings.append(
        f"For {bootstrap.format_json(clean['posterior'])} of the test images, the likelihood under the model {label} "
        f"is largest with the true class; at random, it would be so for {1 / classes:.3g}."
    )
    gain = clean["gain"]
    if gain["interval"][0] > math.log(classes):
        findings.append(
            f"The gain of the model {label} without noise, {bootstrap.format_json(gain)} nats, exceeds log {classes} = "
            f"{math.log(classes):.3f}, which it could not if p(x) were the mean of p(x | class): without a class, the "
            "model predicts worse than with the mean over classes, so the gain overstates what classes contribute."
        )
    return findings


def _texts(inputs: Inputs) -> list[str]:
    network = load_extractor().network
    limits = inputs.limits
    return [
        "Gain is the mean of log p(x | true class) - log p(x) in nats, at noise levels in grey levels (images are "
        "noised as in training). Posterior is the share of images whose true class has the largest likelihood. Both "
        f"are measured on at most {limits['classes']:,} test images.",
        f"Fidelity is the share of {limits['fidelity']:,} generated images of each method in which a classifier "
        f"recognises the requested class, and of at most {limits['probe']:,} real ones. The *probe* is a logistic "
        f"regression on the features of {network}, trained on at most {limits['probe']:,} training images; `ncml "
        "tune` chooses the default options with such a probe. *Pixels* is a small convolutional network, trained on "
        f"the pixels of at most {limits['classifier']:,} training images and used for nothing but this measurement. "
        "Classes are generated in turn, seeds are consecutive, no image is left out.",
        f"Variety is measured in the features of {network}, on {limits['fidelity']:,} generated images and as many "
        "test images, the same number of each class. KD within classes is the kernel distance from real images of the "
        "same class, averaged over classes. Precision is the share of generated images that lie among real ones, "
        f"recall the share of real images that lie among generated ones (no farther than the {NEIGHBOURS}rd neighbour "
        "of one of them; both depend on the number of images). The variance within classes is relative to real "
        "images: below 1, images of a class are more alike than real ones.",
        "Brackets are 95% intervals over images: Wilson's for shares, otherwise bootstrap. Those of precision and "
        "recall take the neighbourhoods as fixed, and are therefore too narrow.",
    ]
