"""All experiments by their names."""

from studio.experiments.amplified import AMPLIFICATION, SUBSPACES
from studio.experiments.base import Experiment
from studio.experiments.costs import COSTS
from studio.experiments.latency import LATENCY
from studio.experiments.methods import DATA_TO_TEXT, LABELS, LOW_DATA
from studio.experiments.where import MATRICES, RANKS

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e for e in (LABELS, DATA_TO_TEXT, MATRICES, RANKS, SUBSPACES, AMPLIFICATION, LATENCY, LOW_DATA, COSTS)
}
"""Name → experiment, in the order in which they are offered."""
