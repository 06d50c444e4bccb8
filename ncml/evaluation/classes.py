"""Knowledge of classes in a model's likelihoods, and in the images that it generates.

    gain         mean of log p(x | true class) - log p(x | no class), in nats: above 0 if the class helps to predict
    posterior    share of images whose true class has the largest p(x | class) (Bayes' rule, all classes equally likely)
    fidelity     share of images generated for a class in which an independent probe recognises it

Shapes: N images, C classes, H rows, W columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ncml.errors import InputError
from ncml.evaluation import bootstrap
from ncml.evaluation.features import Features, load_extractor
from ncml.evaluation.image_sets import SEED, ImageSet
from ncml.evaluation.inputs import Inputs
from ncml.evaluation.probe import Labels, Probe
from ncml.evaluation.quality import classes_in_turn, extract_features, sample_features
from ncml.evaluation.report import OURS, Cell, Section, Table
from ncml.evaluation.samples import IN_TURN, Arguments, as_trained, default_arguments
from ncml.model import Model
from ncml.network.likelihood import from_uint8, log_prob
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


def class_labels(model: Model, images: ImageSet) -> Labels:
    """Return the index of each image's class among the model's, [N]; raise `InputError` if they do not correspond."""
    if not model.classes:
        raise InputError("model", f"{model.name} has no classes: choose a model of a data set with classes.")
    if not images.classes or not set(images.classes) <= set(model.classes):
        names = ", ".join(images.classes[:3]) or "none"
        raise InputError("data", f"the classes of {images.name} ({names}) are not those of {model.name}.")
    indices = np.array([model.classes.index(name) for name in images.classes])
    return indices[images.labels_N]


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


def fidelities(inputs: Inputs, model: Model) -> dict[str, bootstrap.Estimate]:
    """Measure the share of real images, then of images generated in each way, whose class a probe recognises.

    Empty, with a note, if no probe can be trained.
    """
    test = inputs.images(inputs.data, model, "probe")
    try:
        train = _probe_training_images(inputs, model, test)
    except InputError as error:
        inputs.notes.append(f"Fidelity is not measured, because no probe can be trained: {error}")
        return {}
    probe = Probe.train(_features(inputs, train), class_labels(model, train))
    real = {"real": bootstrap.share(probe.recognised(_features(inputs, test), class_labels(model, test)))}
    return real | {
        method: class_fidelity(inputs, model, probe, inputs.limits["fidelity"], arguments)
        for method, arguments in sampling_methods(model).items()
    }


def _probe_training_images(inputs: Inputs, model: Model, test: ImageSet) -> ImageSet:
    """Return the training images; raise `InputError` without several classes, or images that are not `test`."""
    if len(model.classes) < 2:
        raise InputError("model", f"{model.name} has only one class.")
    train = inputs.images(inputs.data, model, "probe", split="train")
    if train.digest == test.digest:
        raise InputError("data", f"{inputs.data_name} has no training split.")
    if len(set(class_labels(model, train))) < 2:
        raise InputError("data", f"{inputs.data_name} has training images of one class only.")
    return train


def _features(inputs: Inputs, images: ImageSet) -> Features:
    return extract_features(inputs, {"data": images.digest}, images.pixels_NHWC)


def class_fidelity(inputs: Inputs, model: Model, probe: Probe, n: int, arguments: Arguments) -> bootstrap.Estimate:
    """Measure the share of n generated images, of all classes in turn, in which the probe recognises the class."""
    features_NF = sample_features(inputs, model, n, arguments | {"classes": IN_TURN})
    return bootstrap.share(probe.recognised(features_NF, classes_in_turn(model, n)))


def sampling_methods(model: Model) -> dict[str, Arguments]:
    """Return the sampling methods that are compared: as trained, directly and from noise, and the defaults."""
    limits = model.sampling_limits
    levels = noise_levels(model.config, (0.0, 0.25, 1.0))
    methods = {f"noise {noise:g}, as trained": as_trained(noise) for noise in levels}
    defaults = default_arguments(model)
    if defaults not in methods.values():
        name = (
            f"defaults: start noise {limits.noise:g}, guidance {limits.guidance:g}, temperature {limits.temperature:g}"
        )
        methods[name] = defaults
    return methods


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
    """Measure gain, posterior and fidelity of every model."""
    knowledge: list[tuple[Cell, ...]] = []
    fidelity: list[tuple[Cell, ...]] = []
    results: dict[str, dict[str, Any]] = {}
    for label, model in _models_with_classes(inputs).items():
        images = inputs.test_images(model, "classes")
        levels = noise_levels(model.config, (0.0, 0.25, 1.0))
        by_level = {f"{noise:g}": class_knowledge(inputs, model, images, noise) for noise in levels}
        knowledge += [(label, OURS, noise, *estimates.values()) for noise, estimates in by_level.items()]
        recognised = fidelities(inputs, model)
        for method, estimate in recognised.items():
            name = f"{inputs.data_name} (real images)" if method == "real" else f"{label}, {method}"
            fidelity.append((name, OURS, estimate))
        results[label] = {
            "likelihood": {
                noise: {name: estimate.to_json() for name, estimate in estimates.items()}
                for noise, estimates in by_level.items()
            },
            "fidelity": {method: estimate.to_json() for method, estimate in recognised.items()},
        }
    network = load_extractor().network
    text = (
        "Gain is the mean of log p(x | true class) - log p(x) in nats, at noise levels in grey levels (images are "
        "noised as in training). Posterior is the share of images whose true class has the largest likelihood. "
        "Fidelity is the share of generated images in which a probe recognises the requested class: logistic "
        f"regression on the features of {network}, trained on at most "
        f"{inputs.limits['probe']:,} training images. Classes are generated in turn, seeds are consecutive, no image "
        "is left out. Brackets are 95% intervals over images: bootstrap for gain, Wilson's for shares."
    )
    header = ("images", "source", "recognised")
    return Section(
        kind="classes",
        title="Class knowledge",
        text=[text],
        tables=[
            Table("classes", "Classes in the likelihood", ("model", "source", "noise", "gain", "posterior"), knowledge),
            Table("class_fidelity", "Classes in generated images", header, list(dict.fromkeys(fidelity))),
        ],
        results=results,
        notes=list(dict.fromkeys(inputs.notes)),
    )
