"""Rank surgery: adapters with fewer directions of ΔW, what that keeps, and a place of their own for them."""

import random
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from core import Adapter, LoRAError, Spectrum, Truncation, quoted, truncate
from studio.workspace import Workspace

STRONGEST, POOLED, CHANCE = "strongest of each", "strongest of all", "random (chance)"
CURVES = (STRONGEST, POOLED, CHANCE)
"""Which directions are kept along a curve: k of each matrix; of all together, k is the mean; k of each at random."""

WHAT = {
    "rank": "So many of each matrix",
    "energy": "A share of ‖ΔW‖²",
    "chosen": "Chosen ones of one matrix",
}
"""What a cut may go by, in words."""

_STOPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Cut:
    """Which directions of an adapter are kept.

    Attributes:
        by: A key of `WHAT`.
        rank: Of each matrix, or with `pooled` on average.
        energy: Share of ‖ΔW‖_F², above 0 and at most 1.
        pooled: Whether the directions of all matrices compete.
        path: With "chosen", of which matrix.
        chosen: Its directions that are kept, from 0; the other matrices stay as they are.
    """

    by: str = "rank"
    rank: int = 1
    energy: float = 0.9
    pooled: bool = False
    path: str = ""
    chosen: tuple[int, ...] = ()

    def of(self, adapter: Adapter) -> Truncation:
        """Returns the adapter with these directions alone.

        Raises:
            LoRAError: As of `core.truncate`.
        """
        if self.by == "chosen":
            return truncate(adapter, keep={self.path: self.chosen})
        if self.by == "energy":
            return truncate(adapter, energy=self.energy, pooled=self.pooled)
        return truncate(adapter, rank=self.rank, pooled=self.pooled)

    @property
    def title(self) -> str:
        """What people call it."""
        of = " of all matrices together" if self.pooled else ""
        if self.by == "chosen":
            numbers = ", ".join(str(i + 1) for i in self.chosen) or "none"
            return f"directions {numbers} of {self.path}"
        if self.by == "energy":
            return f"{100 * self.energy:g} % of the energy{of}"
        return f"rank {self.rank}{', pooled' if self.pooled else ''}"


def num_bytes(adapter: Adapter) -> int:
    """Returns what the tensors of an adapter take."""
    held = [t for f in adapter.factors.values() for t in (f.A, f.B)]
    held += [*adapter.magnitudes.values(), *adapter.trained_in_full.values()]
    return sum(t.numel() * t.element_size() for t in held)


def curve_ranks(spectra: Mapping[str, Spectrum]) -> list[int]:
    """Returns at which numbers of kept directions a curve is measured, below that of the whole adapter."""
    most = max((len(s.sigma) for s in spectra.values()), default=0)
    return [k for k in _STOPS if k < most]


def curve(adapter: Adapter, kind: str, ranks: list[int]) -> dict[int, Adapter]:
    """Returns k → the adapter with k directions a matrix, chosen as `kind`, of `CURVES`, says.

    Raises:
        LoRAError: As of `core.truncate`.
    """
    if kind != CHANCE:
        return {k: truncate(adapter, rank=k, pooled=kind == POOLED).adapter for k in ranks}
    draws = {}
    for path, f in adapter.factors.items():
        order = list(range(min(f.r, *f.shape)))
        random.Random(path).shuffle(order)  # noqa: S311 (the same ones each time, and k of them among k + 1)
        draws[path] = order
    return {k: truncate(adapter, keep={path: order[:k] for path, order in draws.items()}).adapter for k in ranks}


def save(adapter: Adapter, name: str, workspace: Workspace) -> Path:
    """Writes an adapter into a folder of its own below `adapters` in the workspace, in PEFT's layout.

    Returns:
        The folder.

    Raises:
        LoRAError: The name holds no letter, is taken, or the folder cannot be written.
    """
    slug = re.sub(r"[^\w.-]+", "-", name.strip()).strip("-.")[:80]
    if not slug:
        raise LoRAError(f"`Name` (={quoted(name)}) must hold a letter or a digit.")
    home = workspace.root / "adapters"
    try:
        home.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=".saving-") as scratch:
            whole = Path(scratch) / slug
            adapter.save(whole)
            if (home / slug).exists():
                raise LoRAError(f"`Name` (={quoted(name)}) is taken by {home / slug}; choose another one.")
            whole.rename(home / slug)
    except OSError as error:
        raise LoRAError(f"{home / slug} could not be written ({error.strerror}); free some space.") from error
    return home / slug


def named(adapter: Adapter, base_model: str | None) -> Adapter:
    """Returns the adapter with its base model's name, where it has none yet."""
    return replace(adapter, base_model=adapter.base_model or base_model)
