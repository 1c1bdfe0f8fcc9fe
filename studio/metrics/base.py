"""A metric as a sum over rows, so that a bootstrap only has to weigh the rows anew."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from core import LoRAError

References = Sequence[Sequence[str]]

SAMPLES = 1000
"""Resamples of a bootstrap."""


@dataclass(frozen=True)
class Metric:
    """How near predictions are to their references.

    Attributes:
        name: What people call it.
        statistics: Predictions and the references of each → (rows, k) what each row adds; counts of which a corpus's
            score is made, or the row's own score and 1.
        score: (k,) the sum over rows → the score.
    """

    name: str
    statistics: Callable[[Sequence[str], References], np.ndarray]
    score: Callable[[np.ndarray], float]

    def __call__(self, predictions: Sequence[str], references: References) -> float:
        """Returns the score of all rows.

        Raises:
            LoRAError: There is no row, a row without a reference, or another number of either; a library is missing.
        """
        return self.score(self.of_rows(predictions, references).sum(0))

    def of_rows(self, predictions: Sequence[str], references: References) -> np.ndarray:
        """Returns `statistics`, once both are found to fit; errors as of calling it."""
        if not len(predictions) == len(references) > 0:
            raise LoRAError(
                f"`references` (={len(references)} rows) must be of as many rows as there are predictions "
                f"(={len(predictions)}), and at least one."
            )
        if bare := [row for row, wanted in enumerate(references, 1) if not wanted]:
            raise LoRAError(f"`references` must hold at least one text for each row; row {bare[0]} has none.")
        return self.statistics(predictions, references)


def mean_of(name: str, function: Callable[[str, Sequence[str]], float]) -> Metric:
    """Returns the metric that is the mean of a function of a prediction and its references."""

    def statistics(predictions: Sequence[str], references: References) -> np.ndarray:
        return np.array([[function(*pair), 1.0] for pair in zip(predictions, references, strict=True)])

    return Metric(name, statistics, mean)


def mean(total: np.ndarray) -> float:
    """Returns the mean of scores, from their sum and their number."""
    return float(total[0] / total[1])


class Result(NamedTuple):
    """What a metric gave.

    Attributes:
        metric: Its name.
        value: The score.
        low, high: 95 % of bootstrap samples lie between them.
        num: How many rows.
    """

    metric: str
    value: float
    low: float
    high: float
    num: int


class Difference(NamedTuple):
    """How far the predictions of one model score above another's for the same prompts.

    Attributes:
        metric: Its name.
        value: The first's score less the second's.
        low, high: 95 % of bootstrap samples lie between them.
        p: Twice the share of samples in which the sign is the other one, at most 1.
    """

    metric: str
    value: float
    low: float
    high: float
    p: float


def measure(metric: Metric, predictions: Sequence[str], references: References, seed: int = 0) -> Result:
    """Returns a metric with the interval of its bootstrap over rows; errors as of the metric.

    What a metric takes from all references, such as how rare a word is, is that of the rows as they are.
    """
    rows = metric.of_rows(predictions, references)
    low, high = np.quantile(_resampled(metric, rows, seed), [0.025, 0.975])
    return Result(metric.name, metric.score(rows.sum(0)), float(low), float(high), len(rows))


def difference(
    metric: Metric, predictions: Sequence[str], others: Sequence[str], references: References, seed: int = 0
) -> Difference:
    """Returns how far `predictions` score above `others`: a paired bootstrap, in which both have the same rows.

    Source: Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation.
    """
    first, second = metric.of_rows(predictions, references), metric.of_rows(others, references)
    samples = _resampled(metric, first, seed) - _resampled(metric, second, seed)
    low, high = np.quantile(samples, [0.025, 0.975])
    value = metric.score(first.sum(0)) - metric.score(second.sum(0))
    p = min(1.0, 2 * min(float((samples <= 0).mean()), float((samples >= 0).mean())))
    return Difference(metric.name, value, float(low), float(high), p)


def _resampled(metric: Metric, rows: np.ndarray, seed: int) -> np.ndarray:
    weights = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), SAMPLES)
    return np.array([metric.score(total) for total in weights @ rows])
