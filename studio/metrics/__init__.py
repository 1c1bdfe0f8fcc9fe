"""How near generated texts are to their references: metrics, those of each task, and how sure they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from studio.metrics.base import Difference, Metric, References, Result, difference, mean_of, measure
from studio.metrics.meteor import meteor
from studio.metrics.overlap import EXACT, ROUGE_L, bleu, cider, exact_match, nist, rouge, rouge_l
from studio.metrics.sql import logical_form, parsed, problem

__all__ = [
    "METRICS",
    "TASKS",
    "Difference",
    "Metric",
    "References",
    "Result",
    "Task",
    "bleu",
    "cider",
    "difference",
    "exact_match",
    "measure",
    "meteor",
    "nist",
    "rouge",
    "rouge_l",
]

METRICS = {"Exact match": exact_match, "ROUGE-L": rouge_l}
"""What a single answer of a list is given, wherever it comes from."""


@dataclass(frozen=True)
class Task:
    """What a model is to do, as far as its answers are measured.

    Attributes:
        label: In words.
        metrics: What is measured; by the first the best step is chosen. More is better for all.
        problem: Says what is wrong with an answer by itself; "" for nothing.
    """

    label: str
    metrics: tuple[Metric, ...]
    problem: Callable[[str], str] = lambda answer: ""

    def measure(self, predictions: Sequence[str], references: References) -> list[Result]:
        """Returns what each metric gives; errors as of a metric."""
        return [measure(metric, predictions, references) for metric in self.metrics]

    def check(self) -> None:
        """Raises LoRAError where a library is missing that its metrics need."""
        for metric in self.metrics:
            metric([_EXAMPLE], [[_EXAMPLE]])


_EXAMPLE = "SELECT a FROM b"

TASKS = {
    "data_to_text": Task("Data to text", (bleu(), nist(), meteor(), ROUGE_L, cider())),
    "text_to_sql": Task(
        "Text to SQL", (mean_of("Logical form", logical_form), EXACT, mean_of("Can be read", parsed)), problem
    ),
    "summary": Task("Summary", (rouge("ROUGE-1"), rouge("ROUGE-2"), rouge("ROUGE-L"))),
    "exact": Task("Exact answer", (EXACT,)),
}
