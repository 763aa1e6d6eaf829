"""A no-answer probability that is as often right as it says: Platt scaling of its log-odds.

What span decoding weighs are two replies out of many, so its na_prob ranks questions well and need
not be as often right as it says. Two numbers, fitted to validation questions, put that right.
Source: Platt 1999, "Probabilistic Outputs for Support Vector Machines", with its targets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_squad.metrics import ScoreTable

BINS = 15
"""Of a calibration error: as many as in its source."""


@dataclass(frozen=True)
class Calibration:
    """na_prob = sigmoid(scale · log-odds + shift), of the log-odds that a model gives.

    ``scale`` is positive, so the order of questions stays, and with it what a threshold can reach.

    Raises:
        ValueError: it is not, or one of both is not finite.
    """

    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        """Check both numbers."""
        if not (0 < self.scale < math.inf and math.isfinite(self.shift)):
            raise ValueError(f"no calibration has a scale of {self.scale}, a shift of {self.shift}")

    def __call__(self, log_odds: float) -> float:
        """Return na_prob, in [0, 1]."""
        return sigmoid(self.scale * log_odds + self.shift)

    def expecting(self, share: float, fitted_to: float) -> "Calibration":
        """Return it for questions of which another share has no answer than it was fitted to.

        Source: Saerens, Latinne and Decaestecker 2002, "Adjusting the Outputs of a Classifier to
        New a Priori Probabilities: A Simple Procedure".
        """
        moved = math.log(share / (1 - share)) - math.log(fitted_to / (1 - fitted_to))
        return Calibration(self.scale, self.shift + moved)


@dataclass(frozen=True)
class Abstention:
    """When to abstain: where na_prob, calibrated, is above the threshold."""

    threshold: float = 0.5
    calibration: Calibration = field(default_factory=Calibration)

    @property
    def options(self) -> dict[str, Any]:
        """What ``Generator`` takes of it."""
        return {"na_prob_thresh": self.threshold, "calibration": self.calibration}


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)), for numbers of any size."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def fit_calibration(log_odds: Sequence[float], no_answer: Sequence[bool]) -> Calibration:
    """Fit na_prob to the questions that have no answer: the highest likelihood, by Newton's method.

    Args:
        log_odds: of no answer, of each question.
        no_answer: whether there is none.

    Raises:
        ValueError: there are not both kinds of question, or higher log-odds do not go with those
            that have no answer; or log-odds are not finite.
    """
    import numpy as np

    without = sum(no_answer)
    having = len(no_answer) - without
    if not without or not having:
        raise ValueError("they are all of one kind: with an answer, or all without")
    if not all(map(math.isfinite, log_odds)):
        raise ValueError("of some the model gave log-probabilities that are not finite")
    # not 1 and 0: no number of questions makes sure
    targets = np.where(no_answer, (without + 1) / (without + 2), 1 / (having + 2))
    features = np.stack([np.asarray(log_odds, float), np.ones(len(targets))])

    def loss(weights: Any) -> float:
        given = weights @ features
        return float((np.logaddexp(0, given) - targets * given).sum())

    weights = np.array([0.0, math.log((without + 1) / (having + 1))])
    for _ in range(100):
        found = (1 + np.tanh(weights @ features / 2)) / 2
        slope = features @ (found - targets)
        curvature = (features * found * (1 - found)) @ features.T
        step = np.linalg.solve(curvature + 1e-9 * np.eye(2), slope)
        while loss(weights - step) > loss(weights) and abs(step).max() > 1e-12:
            step /= 2
        weights = weights - step
        if abs(step).max() < 1e-9:
            break
    if weights[0] <= 0:
        raise ValueError("na_prob is no higher where there is no answer")
    return Calibration(*map(float, weights))


def reliability(table: ScoreTable) -> list[tuple[float, float, float]]:
    """Compare na_prob with how often there is no answer, in ``BINS`` bins of equal width.

    Returns:
        Of each bin that holds a question, how many they count, the mean of their na_prob, and
        the share that has no answer; in [0, 1].
    """
    bins: dict[int, list[float]] = {}
    for na_prob, has in zip(table.na_prob, table.has_answer, strict=True):
        weight = table.weights[has]
        total = bins.setdefault(min(int(na_prob * BINS), BINS - 1), [0.0, 0.0, 0.0])
        total[0] += weight
        total[1] += weight * na_prob
        total[2] += weight * (not has)
    return [(n, p / n, without / n) for _, (n, p, without) in sorted(bins.items())]


def calibration_error(table: ScoreTable) -> float | None:
    """Return na_prob's expected calibration error in points; None if it is no probability.

    The mean over all questions of how far na_prob and the share without an answer are apart in
    their bin. Source: Guo et al. 2017, "On Calibration of Modern Neural Networks",
    arXiv 1706.04599.
    """
    if not all(0 <= na_prob <= 1 for na_prob in table.na_prob):
        return None
    apart = math.fsum(n * abs(mean - share) for n, mean, share in reliability(table))
    return 100.0 * apart / len(table)
