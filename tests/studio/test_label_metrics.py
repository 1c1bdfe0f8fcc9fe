"""scikit-learn and SciPy are the oracles of the scores, and what a public implementation gave."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from studio import label_metrics

ORACLES = Path("/work/shared/data/metric_oracles.json")
metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the oracle here")
stats = pytest.importorskip("scipy.stats", reason="SciPy is the oracle here")


@pytest.mark.parametrize("num_labels", [2, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_scores_of_classifiers_are_scikit_learn_s(num_labels: int, seed: int):
    draw = np.random.default_rng(seed)
    labels = draw.integers(num_labels, size=50)
    logits = draw.normal(size=(50, num_labels)) + 1.5 * np.eye(num_labels)[labels]
    found, predicted = label_metrics.scores(logits, labels), logits.argmax(1)
    average = {"average": "binary"} if num_labels == 2 else {"average": "macro"}
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, predicted, **average))
    assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(labels, predicted))


def test_scores_of_regressors_are_scipy_s_with_ties_too():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 6, size=80).astype(np.float32)  # many ties
    logits = (labels + draw.normal(size=80).round(0)).astype(np.float32)[:, None]
    found = label_metrics.scores(logits, labels)
    assert found["pearson"] == pytest.approx(stats.pearsonr(logits[:, 0], labels).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(logits[:, 0], labels).statistic)


def test_what_always_says_the_same_label_has_the_majority_s_accuracy_and_no_correlation():
    labels = np.array([1, 1, 1, 0])
    logits = np.tile([0.0, 1.0], (4, 1))
    found = label_metrics.scores(logits, labels)
    assert (found["accuracy"], found["matthews"]) == (0.75, 0.0)
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, np.ones(4)))
    same = label_metrics.scores(np.zeros((4, 1)), np.array([0.0, 1, 2, 3]))
    assert all(map(math.isnan, same.values()))
    assert label_metrics.words(same) == "Pearson undefined, Spearman undefined"


@pytest.mark.skipif(not ORACLES.is_file(), reason="the stored values of public implementations are not here")
def test_matthews_is_what_a_public_implementation_stores():
    held = json.loads(ORACLES.read_text())["matthews"]
    found = label_metrics.matthews(np.array(held["predictions"]), np.array(held["references"]))
    assert found == pytest.approx(held["expected"])
