"""Blind votes on answers, kept with the run, and what they say so far."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core import LoRAError
from studio.panes import Pane

FILE = "votes.jsonl"
Z95 = 1.959964


@dataclass(frozen=True)
class Score:
    """How often one pane was liked best.

    Attributes:
        pane: What it ran.
        num_wins: Votes for it.
        num_decided: Votes where it took part and one was liked best.
        num_ties: Votes where it took part and none was.
    """

    pane: Pane
    num_wins: int
    num_decided: int
    num_ties: int

    @property
    def share(self) -> float:
        """Of the decided votes; 0 before there is one."""
        return self.num_wins / self.num_decided if self.num_decided else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share."""
        return wilson(self.num_wins, self.num_decided)


def wilson(num: int, total: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a share num / total (Wilson 1927); (0, 1) where nothing was counted."""
    if not total:
        return 0.0, 1.0
    share, z2 = num / total, Z95**2 / total
    centre, half = share + z2 / 2, Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total))
    return max(0.0, (centre - half) / (1 + z2)), min(1.0, (centre + half) / (1 + z2))


def cast(folder: Path, message: str, panes: Sequence[Pane], answers: Sequence[str], best: int | None) -> None:
    """Adds a vote to those of a run's folder.

    Args:
        folder: The run's.
        message: What was asked.
        panes: What answered.
        answers: What they said.
        best: The place of the one liked best, or None for a tie.

    Raises:
        LoRAError: There are not two panes, or the vote could not be written.
    """
    if len(panes) < 2 or not (best is None or 0 <= best < len(panes)):
        raise LoRAError(f"A vote (={best} of {len(panes)} panes) must be for one of at least two panes, or a tie.")
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "message": message,
        "panes": [pane.to_dict() for pane in panes],
        "answers": list(answers),
        "best": best,
    }
    try:
        with (folder / FILE).open("ab") as file:
            file.write(json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n")
    except OSError as error:
        raise LoRAError(
            f"The vote could not be kept in {folder / FILE} ({error.strerror}); free some space."
        ) from error


def votes(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the votes of a run's folder, and how many lines of the file could not be read."""
    try:
        lines = (folder / FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    found, num_bad = [], 0
    for line in lines:
        try:
            vote = json.loads(line)
            vote["panes"] = [Pane.from_dict(pane) for pane in vote["panes"]]
            best = vote["best"]
            if best is not None and not (type(best) is int and 0 <= best < len(vote["panes"])):
                raise ValueError("no such pane")
            found.append(vote)
        except (ValueError, TypeError, KeyError, RecursionError):  # LoRAError is a ValueError
            num_bad += 1
    return found, num_bad


def tally(cast_votes: Sequence[dict[str, Any]]) -> list[Score]:
    """Returns each pane's score over all votes where it took part, the most liked first."""
    counts: dict[Pane, list[int]] = {}
    for vote in cast_votes:
        for place, pane in enumerate(vote["panes"]):
            count = counts.setdefault(pane, [0, 0, 0])
            count[0] += vote["best"] == place
            count[1] += vote["best"] is not None
            count[2] += vote["best"] is None
    return sorted((Score(pane, *count) for pane, count in counts.items()), key=lambda s: (-s.share, -s.num_decided))
