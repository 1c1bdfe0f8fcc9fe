"""The spectra that a run measured while it trained, kept as arrays: four bytes a singular value."""

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from core import SpectrumMeasured


@dataclass(frozen=True)
class _Layout:
    """Which matrices' singular values stand where in the arrays of a run."""

    paths: tuple[str, ...]
    lengths: tuple[int, ...]

    @cached_property
    def places(self) -> dict[str, slice]:
        ends = np.cumsum(self.lengths).tolist()
        return {p: slice(end - n, end) for p, end, n in zip(self.paths, ends, self.lengths, strict=True)}

    @cached_property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *self.lengths[:-1]])


class Spectra:
    """The singular values of each ΔW over the steps of a run; grows while the run's log is read."""

    def __init__(self) -> None:
        self._held: list[tuple[int, _Layout, np.ndarray]] = []
        self._means: list[tuple[float, float]] = []

    def append(self, event: SpectrumMeasured) -> None:
        """Takes in what was measured next; an event without a matrix says nothing."""
        if not event.sigma or not all(event.sigma.values()):
            return
        layout = _Layout(tuple(event.sigma), tuple(map(len, event.sigma.values())))
        if self._held and self._held[-1][1] == layout:
            layout = self._held[-1][1]
        sigma = np.fromiter(chain.from_iterable(event.sigma.values()), np.float32, sum(layout.lengths))
        ranks = _effective_ranks(sigma, layout.starts)
        self._means.append((float(sigma[layout.starts].mean()), float(ranks.mean())))
        self._held.append((event.step, layout, sigma))  # last: another thread that reads meanwhile sees whole ones

    def __len__(self) -> int:
        return len(self._held)

    @property
    def steps(self) -> np.ndarray:
        """(n) int64: after which steps."""
        return np.array([step for step, _, _ in self._held], np.int64)

    @property
    def paths(self) -> tuple[str, ...]:
        """The matrices that were measured last."""
        return self._held[-1][1].paths if self._held else ()

    def means(self) -> np.ndarray:
        """Returns (n, 2): the mean over all matrices of the largest singular value, and of the effective rank."""
        return np.array(self._means[: len(self._held)], np.float64).reshape(-1, 2)

    def sigma(self, path: str) -> np.ndarray:
        """Returns (n, k) of one matrix, NaN where it was not measured; k = 0 where it never was."""
        held = list(self._held)
        rows = [sigma[layout.places[path]] if path in layout.places else sigma[:0] for _, layout, sigma in held]
        found = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
        for place, row in enumerate(rows):
            found[place, : len(row)] = row
        return found

    def effective_rank(self, path: str) -> np.ndarray:
        """Returns (n) of one matrix, NaN where it was not measured."""
        return np.array([_effective_ranks(row[~np.isnan(row)], np.zeros(1, int))[0] for row in self.sigma(path)])


def _effective_ranks(sigma: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns exp of the entropy of p = sigma / Σ sigma of each part; 0 where all are zero, NaN where there are none.

    Args:
        sigma: (n), of several matrices one after the other.
        starts: Where each begins.
    """
    if not len(sigma):
        return np.full(len(starts), np.nan)
    values = sigma.astype(np.float64)
    totals = np.add.reduceat(values, starts)
    lengths = np.diff([*starts, len(values)])
    shares = values / np.repeat(np.where(totals == 0, 1.0, totals), lengths)
    terms = shares * np.log(np.where(shares == 0, 1.0, shares))
    return np.where(totals == 0, 0.0, np.exp(-np.add.reduceat(terms, starts)))
