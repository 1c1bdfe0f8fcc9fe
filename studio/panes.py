"""What a chat pane runs, as a declaration that is checked and can be written down."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from core import Adapter, Baseline, Config, LoRAError, setting

LOWEST, HIGHEST = -1.0, 2.0
"""Bounds of a strength: 0 is the base, 1 the adapter as it was trained; −1 takes away what it adds."""

_ADDED = "Task arithmetic, arXiv:2212.04089"


class Source(NamedTuple):
    """An adapter as a pane runs it.

    Attributes:
        adapter: Its name; the studio's are those of runs.
        step: Of the checkpoint that it is taken from; 0 for the adapter as it was saved last.
        rank: Directions of each ΔW that are kept; 0 for all.
    """

    adapter: str
    step: int = 0
    rank: int = 0

    @property
    def label(self) -> str:
        """What the engine calls it; different for different sources."""
        at = f" at step {self.step}" if self.step else ""
        return f"{self.adapter}{at}{f' cut to rank {self.rank}' if self.rank else ''}"


@dataclass(frozen=True)
class Pane(Config):
    """What one pane runs: W0 + strength · ΔW + plus_strength · ΔW₂; without an adapter, W0.

    Raises:
        LoRAError: A setting is out of range, or asks something of an adapter that is not named.
    """

    adapter: str = setting("", "Adapter", "The run whose adapter is used.")
    strength: float = setting(
        1.0,
        "Strength",
        "0: the base, 1: as trained, up to 2: exaggerated; -1 takes away what it adds. Takes effect at the next token.",
        minimum=LOWEST,
        maximum=HIGHEST,
        why="LoRA paper, §4.1",
    )
    rank: int = setting(
        0,
        "Rank",
        "Only the strongest directions of each ΔW, so many; 0: all. Too few, and it forgets what it learnt.",
        minimum=0,
        why="LoRA paper, §7.2",
    )
    step: int = setting(0, "Checkpoint", "The step it is taken from; 0: as it was saved last.", minimum=0)
    plus: str = setting("", "Second adapter", "Its ΔW is added to the first one's.", why=_ADDED)
    plus_strength: float = setting(
        1.0, "Strength of the second", "As the first's: -1 to 2.", minimum=LOWEST, maximum=HIGHEST, why=_ADDED
    )
    merged: bool = setting(False, "Merged", "W0 + ΔW as one matrix, without a LoRA layer.", why="LoRA paper, §4.1")

    def further_problems(self) -> list[str]:
        """Returns what is asked of an adapter that is not named."""
        asked = {name: getattr(self, name) for name in ("rank", "step", "plus", "merged")}
        given = [f"`{name}` (={value!r})" for name, value in asked.items() if value]
        if given and not self.adapter:
            return [f"{' and '.join(given)} must go with an adapter; name one in `adapter`"]
        return []

    @property
    def sources(self) -> tuple[Source, ...]:
        """The adapters that it needs, at whatever strength."""
        first = [Source(self.adapter, self.step, self.rank)] if self.adapter else []
        return tuple(dict.fromkeys([*first, *([Source(self.plus)] if self.plus else [])]))

    @property
    def terms(self) -> dict[Source, float]:
        """Source → strength of all that is added to W0; those of strength 0 are left out."""
        found: dict[Source, float] = {}
        if self.adapter:
            found[Source(self.adapter, self.step, self.rank)] = self.strength
        if self.plus:
            found[Source(self.plus)] = found.get(Source(self.plus), 0.0) + self.plus_strength
        return {source: strength for source, strength in found.items() if strength}

    def title(self, home: str = "") -> str:
        """Returns what it runs in a few words; an adapter is named unless it is that of `home`."""
        if not self.adapter:
            return "Base"
        at = [self.adapter] if self.adapter != home else []
        at += [f"step {self.step}"] if self.step else []
        at += [f"rank {self.rank}"] if self.rank else []
        at += [f"strength {self.strength:g}"] if self.strength != 1 else []
        at += [f"plus {self.plus_strength:g} × {self.plus}"] if self.plus else []
        return ", ".join(["Merged" if self.merged else "Base + adapter", *at])


def only_as_it_is(trained: Baseline, asked: str) -> LoRAError:
    """Returns why what another method trained cannot be run as it is asked."""
    return LoRAError(
        f"What {trained.method.title} trained must not be {asked}: it has no ΔW = scaling · B·A. Let the pane run it "
        "as it was trained: Adapter, strength 1."
    )


def of_lora(adapters: Sequence[Adapter | Baseline]) -> list[Adapter]:
    """Returns the adapters, if all are LoRA's.

    Raises:
        LoRAError: One is not.
    """
    for each in adapters:
        if isinstance(each, Baseline):
            raise only_as_it_is(each, "added to another")
    return [each for each in adapters if isinstance(each, Adapter)]
