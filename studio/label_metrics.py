"""How well labels are predicted, by the scores that GLUE goes by.

Wang et al. 2018, *GLUE*, arXiv:1804.07461: accuracy; F1 beside it on MRPC and QQP; Matthews correlation on CoLA;
Pearson and Spearman correlation on STS-B. A score that is not defined, of what is all the same, is NaN.
"""

import math
from collections.abc import Mapping

import numpy as np

TITLES = {"accuracy": "Accuracy", "f1": "F1", "matthews": "Matthews", "pearson": "Pearson", "spearman": "Spearman"}
"""Name → what people call it."""

OF_TASK = {"classification": ("accuracy", "f1", "matthews"), "regression": ("pearson", "spearman")}
"""Task → the scores that it has."""


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns name → score of a classifier, or of a regressor where labels are floats.

    Args:
        logits: (rows, num_labels), or (rows, 1) of a regressor.
        labels: (rows) numbers of the labels, or the values.
    """
    if np.issubdtype(labels.dtype, np.floating):
        predicted = logits[:, 0]
        return {"pearson": pearson(predicted, labels), "spearman": spearman(predicted, labels)}
    predicted = logits.argmax(1)
    return {
        "accuracy": accuracy(predicted, labels),
        "f1": f1(predicted, labels, logits.shape[1]),
        "matthews": matthews(predicted, labels),
    }


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of labels, (rows), that are predicted."""
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray, num_labels: int) -> float:
    """Returns F1 = 2·P·R / (P + R): of two labels that of the second, number 1, else the mean over those that occur.

    Precision P and recall R are those of one label; F1 is 0 where none of it is found.
    """
    wanted = [1] if num_labels == 2 else np.unique(np.concatenate([predicted, labels])).tolist()
    found = []
    for label in wanted:
        hits = int(((predicted == label) & (labels == label)).sum())
        total = int((predicted == label).sum() + (labels == label).sum())
        found.append(2 * hits / total if total else 0.0)
    return float(np.mean(found))


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Returns Matthews' correlation, of any number of labels; 0 as by chance, and where one side is constant.

    Gorodkin 2004, *Comparing two K-category assignments by a K-category correlation coefficient*.
    """
    kinds = np.unique(np.concatenate([predicted, labels]))
    p, t = ((x[:, None] == kinds).astype(float) for x in (predicted, labels))
    p, t = p - p.mean(0), t - t.mean(0)
    spread = math.sqrt(float((p * p).sum() * (t * t).sum()))
    return float((p * t).sum()) / spread if spread else 0.0


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the correlation of two columns of numbers, (rows); NaN where one of them is constant."""
    x, y = (np.asarray(of, np.float64) for of in (x, y))
    if x.min() == x.max() or y.min() == y.max():
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Returns Pearson's correlation of the ranks; what is equal shares the mean of its ranks."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[place]


def words(metrics: Mapping[str, float]) -> str:
    """Returns scores as a few words: Accuracy 0.712, F1 0.801."""
    return ", ".join(f"{TITLES.get(name, name)} {number(value)}" for name, value in metrics.items())


def number(value: float) -> str:
    """Returns a score as text."""
    return "undefined" if math.isnan(value) else f"{value:.3f}"
