"""What a model ends in: a head that writes tokens, or one that gives a row labels or a number."""

from dataclasses import dataclass
from typing import Literal

TaskName = Literal["causal", "classification", "regression"]
TASKS: tuple[TaskName, ...] = ("causal", "classification", "regression")


@dataclass(frozen=True)
class Head:
    """The head of a model.

    Attributes:
        task: "causal" writes on from a text; "classification" gives a row one of few labels; "regression" a number.
        labels: Of a classifier, their names in the order of its logits.
    """

    task: TaskName = "causal"
    labels: tuple[str, ...] = ()

    @property
    def is_of_rows(self) -> bool:
        """Whether a row has one label, in place of a token for each place."""
        return self.task != "causal"


CAUSAL = Head()
