"""The weights of views in the score of an image, learned from altered good images and from defective ones, if any.

Does not import torch.

The score of an image is S = sqrt(sum over views of w_v max(0, z_v)^2), where z are its standardised scores
(`ncml.ood.detector_calibration`). With x_v = min(max(0, z_v), `MAX_STANDARDISED`)^2, the weights are those of a
logistic regression that distinguishes altered and defective images (y = 1) from good ones (y = -1), which have half of
the total weight each:

    minimise over w >= 0 and b    mean of log(1 + exp(-y (w x + b))) + `RIDGE` / 2 |w|^2

They are not negative, so that no view excuses what another finds, and are scaled so that the largest is 1. No weight is
below `LEAST_WEIGHT`: what resembles no alteration is found where it exceeds good images by far. The view of known
defects, which is learned from them itself, has the weight `KNOWN_WEIGHT`. Chosen by measurement: `docs/ood-method.md`.

Shapes: V views; N good, M altered and D defective images, K of all; X parameters, the weights and b.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ncml.ood.conformal import Floats

LEAST_WEIGHT = 0.05
KNOWN_WEIGHT = 0.5
"""Weight of the view of known defects; with more, fewer defects of other kinds are found."""
PROCESSING_SHARE = 0.2
"""Weight of altered images of which processing has changed the whole; marks and missing parts have the rest."""
DEFECTIVE_SCENES = 10
"""Scenes of defective images that count as much as all altered images."""
OUTLIER = 6.0
"""Good images with a larger standardised score have no part in the weights, unless most have: a few that are not good
would hide the views that find them."""
RIDGE = 0.02
"""Strength of the penalty; from 0.005 to 0.1 it hardly matters."""
MAX_STANDARDISED = 8.0
"""Standardised scores count as at most this many deviations when weights are learned: an altered image that is found in
any case says no more about them."""
STEPS = 3000
"""Number of steps of accelerated projected gradient descent, after which no weight changes by a thousandth."""


def learn_weights(
    good_VN: Floats,
    altered_VM: Floats,
    are_processed_M: NDArray[np.bool_],
    defective_VD: Floats,
    scenes_D: NDArray[np.int64],
) -> Floats:
    """Return the weight of each view, from `LEAST_WEIGHT` to 1, [V]; all 1 if no view has more than 0.

    good_VN, altered_VM, defective_VD: standardised scores.
    are_processed_M: whether the whole of an altered image has changed.
    scenes_D: the scenes of the defective images, each of which counts once.
    """
    largest_N = good_VN.max(0)
    good_VN = good_VN[:, largest_N <= max(OUTLIER, float(np.median(largest_N)))]
    views, good = good_VN.shape
    x_XK = np.concatenate([good_VN, altered_VM, defective_VD], 1).clip(0, MAX_STANDARDISED) ** 2
    x_XK = np.concatenate([x_XK, np.ones((1, x_XK.shape[1]))])
    sign_K = np.append(np.full(good, -1.0), np.ones(x_XK.shape[1] - good))
    share_K = 0.5 * np.append(np.full(good, 1 / good), _shares(are_processed_M, scenes_D))
    unit_X = np.maximum(1, np.sqrt((share_K * x_XK**2).sum(1)))  # in it, all weights converge equally fast
    x_XK /= unit_X[:, None]
    ridge_X = np.append(RIDGE / unit_X[:-1] ** 2, 0.0)  # none for b
    lowest_X = np.append(np.zeros(views), -np.inf)
    step = 1 / (ridge_X.max() + float((share_K * (x_XK**2).sum(0)).sum()) / 4)
    w_X = ahead_X = np.zeros(views + 1)
    momentum = 1.0
    for _ in range(STEPS):  # Beck and Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm", 2009
        residual_K = 1 / (1 + np.exp(np.minimum(sign_K * (ahead_X @ x_XK), 500)))
        gradient_X = ridge_X * ahead_X - x_XK @ (share_K * sign_K * residual_K)
        next_X = np.maximum(ahead_X - step * gradient_X, lowest_X)
        next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead_X = next_X + (momentum - 1) / next_momentum * (next_X - w_X)
        w_X, momentum = next_X, next_momentum
    weights_V = w_X[:-1] / unit_X[:-1]
    return np.maximum(LEAST_WEIGHT, weights_V / weights_V.max()) if weights_V.any() else np.ones(views)


def _shares(are_processed_M: NDArray[np.bool_], scenes_D: NDArray[np.int64]) -> Floats:
    """Return the weights of altered and then of defective images, which sum to 1, [M + D]."""
    scene_D, size_of = np.unique(scenes_D, return_inverse=True, return_counts=True)[1:]
    scenes = len(size_of)
    altered_M = _altered_shares(are_processed_M) * DEFECTIVE_SCENES / (scenes + DEFECTIVE_SCENES)
    return np.append(altered_M, 1 / size_of[scene_D] / (scenes + DEFECTIVE_SCENES))


def _altered_shares(are_processed_M: NDArray[np.bool_]) -> Floats:
    """Return weights of altered images that sum to 1; equal ones if all or none are processed."""
    processed = int(are_processed_M.sum())
    others = len(are_processed_M) - processed
    if not processed or not others:
        return np.full(len(are_processed_M), 1 / len(are_processed_M))
    return np.where(are_processed_M, PROCESSING_SHARE / processed, (1 - PROCESSING_SHARE) / others)
