"""What an experiment is: pieces that are trained or measured once and kept, and how they are told together."""

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from core import LoRAError
from studio.specs import RunSpec
from studio.workspace import Workspace

if TYPE_CHECKING:
    from studio.figures.style import Plot
    from studio.runs import Run

Size = Literal["tiny", "small", "paper"]
SIZES: dict[Size, str] = {
    "tiny": "a few minutes: does it run?",
    "small": "at most an hour on two cores: the default",
    "paper": "the paper's steps, batches and grids, for those with the hardware; name its model and data besides",
}

Record = dict[str, Any]
"""What a piece found, as JSON can hold it. Where it has a `run`, further pieces need that run: without it the piece is
not done."""


@dataclass(frozen=True)
class Asked:
    """An experiment that somebody wants.

    Attributes:
        name: Which.
        size: How large.
        model: The base model; "" for the experiment's own.
        data: The rows: a data set, or for tasks with labels a folder of GLUE's; "" for the experiment's own.
    """

    name: str
    size: Size = "small"
    model: str = ""
    data: str = ""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise LoRAError(f"`size` (={self.size!r}) must be one of {', '.join(SIZES)}.")

    @property
    def key(self) -> str:
        """Its name among all that were asked for."""
        key = f"{self.name}-{self.size}"
        if not self.model and not self.data:
            return key
        return f"{key}-{hashlib.sha256(json.dumps([self.model, self.data]).encode()).hexdigest()[:8]}"


class Found(NamedTuple):
    """What a piece has at hand when it is measured.

    Attributes:
        workspace: Where models lie.
        run: The run that was trained for it; None where there is none.
    """

    workspace: Workspace
    run: "Run | None"


@dataclass(frozen=True)
class Piece:
    """What is done in one go, and is not done again.

    Attributes:
        key: Its name in the experiment.
        measure: Returns what it found.
        spec: The run that is trained first; None where nothing is. A run of the same spec is used again,
            whatever its name.
        settings: What else it depends on: where they change it is done anew.
    """

    key: str
    measure: Callable[[Found], Record]
    spec: RunSpec | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Says what it was made from."""
        made_from = [self.key, self.spec and self.spec.to_dict(), dict(self.settings)]
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What it shows.
        head: The columns.
        rows: As many cells each; "" where nothing was measured yet.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Returns it as Markdown."""
        lines = [f"**{self.title}**", "", _line(self.head), _line(["---"] * len(self.head))]
        return "\n".join([*lines, *map(_line, self.rows)])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


@dataclass(frozen=True)
class Result:
    """What was found, as far as its pieces are done.

    Attributes:
        tables: The paper's values beside ours.
        findings: What agrees with the paper and what does not, a sentence each, computed from the numbers.
        figure: Draws it; None while there is nothing to draw.
    """

    tables: list[Table]
    findings: list[str] = field(default_factory=list)
    figure: "Callable[[], Plot] | None" = None


@dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments.

    Attributes:
        name: On the command line.
        title: What people call it.
        paper: Where the paper has it.
        question: What it answers.
        differs: What of our set-up is not the paper's, in a sentence or two.
        pieces: Returns what is to be done.
        tell: Returns what was found, from key → record of the pieces that are done.
    """

    name: str
    title: str
    paper: str
    question: str
    differs: str
    pieces: Callable[[Asked, Workspace], list[Piece]]
    tell: Callable[[Asked, Mapping[str, Record]], Result]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Returns mean ± standard deviation as text; the value alone of one; "" of none."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def as_paper(agrees: bool, otherwise: str) -> str:
    """Returns the end of a sentence: that the paper has the same, or what it has instead."""
    return ", as in the paper." if agrees else f"; {otherwise}."


def by_seed(records: Mapping[str, Record], key: str, name: str) -> list[float]:
    """Returns one number of the records of all seeds of a piece, `KEY · seed N`."""
    return [r[name] for k, r in records.items() if k.rpartition(" · seed ")[0] == key and name in r]
