"""A classifier that is independent of the model, to recognise the class that an image shows.

Logistic regression on the standardised features of a named network (`ncml.evaluation.distances`), trained on the data
set's own training images. Its accuracy on real images is reported with every figure for generated ones.

Shapes: N images, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncml.evaluation.distances import Features

INVERSE_REGULARIZATION = 0.01
"""C of the logistic regression: few images for many features need a strong penalty."""

MAX_ITERATIONS = 500

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Probe:
    """A trained classifier of features."""

    pipeline: Any

    @classmethod
    def train(cls, features_NF: Features, labels_N: Labels) -> Probe:
        """Train on features of images and their classes."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        regression = LogisticRegression(C=INVERSE_REGULARIZATION, max_iter=MAX_ITERATIONS)
        return cls(make_pipeline(StandardScaler(), regression).fit(features_NF, labels_N))

    def recognised(self, features_NF: Features, labels_N: Labels) -> NDArray[np.bool_]:
        """Return whether the class of each image is recognised. [N]."""
        return self.pipeline.predict(features_NF) == labels_N
