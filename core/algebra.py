"""Adapters as vectors: sums, differences, angles and recompression, all on the factors; ΔW is never formed."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.adapter import Adapter
from core.errors import LoRAError, listed
from core.files import config_for
from core.matrices import Factors
from core.packing import as_whole
from core.spectrum import spectrum


@dataclass(frozen=True)
class Truncation:
    """An adapter brought to fewer directions, and what that cost.

    Attributes:
        adapter: The smaller adapter.
        errors: Path → ‖ΔW − ΔW_k‖_F, the least that any matrix of that rank can have (Eckart and Young 1936).
        norm: ‖ΔW‖_F over all matrices together, before.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    norm: float

    @property
    def relative_error(self) -> float:
        """The error of all matrices together over `norm`; 0 for ΔW = 0."""
        return math.hypot(*self.errors.values()) / self.norm if self.norm else 0.0


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Returns the adapter whose ΔW is Σ weight · ΔW, exactly: factors stand side by side, and ranks add up.

    A matrix that an adapter does not have counts as zero there; a slice of a fused projection is a part of
    it where another adapter has it whole. `truncate` brings the rank down again.

    Raises:
        LoRAError: The numbers of adapters and weights differ, a weight is not finite, matrices of one path
            differ in shape, or an adapter holds more than factors (DoRA, parameters trained in full).
    """
    if len(adapters) != len(weights) or not adapters:
        raise LoRAError(
            f"`weights` (={len(weights)} numbers) must be as many as `adapters` ({len(adapters)}), and some."
        )
    if not all(math.isfinite(w) for w in weights):
        raise LoRAError(f"`weights` (={list(weights)}) must be finite numbers.")
    _check_factors_only(adapters)
    all_terms: dict[str, list[tuple[Factors, float]]] = {}
    for by_path, w in zip(_check_shapes(adapters), weights, strict=True):
        for path, found in by_path.items():
            all_terms.setdefault(path, []).extend((f, w) for f in found)
    factors = {}
    for path, terms in all_terms.items():
        scaling = terms[0][0].scaling
        B = [f.B if w * f.scaling == scaling else f.B * (w * f.scaling / scaling) for f, w in terms]
        factors[path] = Factors(torch.cat([f.A for f, _ in terms]), torch.cat(B, 1), scaling, terms[0][0].layout)
    names = {adapter.base_model for adapter in adapters}
    return Adapter(config_for(factors), factors, names.pop() if len(names) == 1 else None)


def difference(first: Adapter, second: Adapter) -> Adapter:
    """Returns the adapter that leads from `second` to `first`: ΔW is that of the first less that of the second.

    Raises:
        LoRAError: As of `weighted_sum`.
    """
    return weighted_sum([first, second], [1.0, -1.0])


def truncate(adapter: Adapter, *, rank: int | None = None, energy: float | None = None) -> Truncation:
    """Returns the adapter nearest to this one with at most `rank` directions a matrix, or holding `energy` of ‖ΔW‖².

    The kept directions are shared evenly between the factors, B = U·√σ and A = √σ·Vᵀ, with scaling 1.

    Args:
        adapter: One without DoRA's magnitudes; what it trained in full is kept as it is.
        rank: Directions to keep in each matrix.
        energy: Share of each matrix's ‖ΔW‖_F² to keep, above 0 and at most 1.

    Raises:
        LoRAError: Not exactly one of `rank` and `energy` is given, it is out of range, or ΔW is not of low rank.
    """
    if (rank is None) == (energy is None):
        raise LoRAError(f"`rank` (={rank}) or `energy` (={energy}) must be given, and not both.")
    if rank is not None and rank < 1:
        raise LoRAError(f"`rank` (={rank}) must be at least 1.")
    if adapter.magnitudes:
        raise LoRAError("`adapter` must not be one of DoRA's: its ΔW is not of low rank.")
    factors, errors, squares = {}, {}, 0.0
    for path, f in adapter.factors.items():
        found = spectrum(f)
        k = rank if rank is not None else found.rank_for_energy(energy or 1.0)
        k = max(1, min(k, len(found.sigma)))
        root = found.sigma[:k].sqrt()
        B, A = found.U[:, :k] * root, root[:, None] * found.V[:, :k].T
        factors[path] = Factors(A.to(f.A.dtype), B.to(f.B.dtype), 1.0, f.layout)
        errors[path] = float(torch.linalg.vector_norm(found.sigma[k:]))
        squares += found.norm**2
    smaller = replace(adapter, config=config_for(factors, adapter.trained_in_full), factors=factors)
    return Truncation(smaller, errors, math.sqrt(squares))


def inner_product(first: Adapter, second: Adapter) -> float:
    """Returns ⟨ΔW₁, ΔW₂⟩ summed over the matrices that both have: s₁·s₂·Σ (B₁ᵀB₂) ⊙ (A₁A₂ᵀ), in float64.

    Raises:
        LoRAError: Matrices of one path differ in shape, or an adapter is one of DoRA's.
    """
    mine, yours = _check_shapes([first, second])
    total = 0.0
    for path in mine.keys() & yours.keys():
        for f, g in itertools.product(mine[path], yours[path]):
            product = (f.B.double().T @ g.B.double()) * (f.A.double() @ g.A.double().T)
            total += f.scaling * g.scaling * float(product.sum())
    return total


def norm(adapter: Adapter) -> float:
    """Returns ‖ΔW‖_F over all matrices together.

    Raises:
        LoRAError: The adapter is one of DoRA's.
    """
    return distance(adapter, replace(adapter, factors={}))


def distance(first: Adapter, second: Adapter) -> float:
    """Returns ‖ΔW₁ − ΔW₂‖_F over all matrices together; one that an adapter lacks counts as zero there.

    Taken from the factors side by side, by QR: expanding ‖ΔW₁‖² − 2⟨ΔW₁, ΔW₂⟩ + ‖ΔW₂‖² would lose small
    differences to rounding.

    Raises:
        LoRAError: Matrices of one path differ in shape, or an adapter is one of DoRA's.
    """
    mine, yours = _check_shapes([first, second])
    squares = 0.0
    for path in mine.keys() | yours.keys():
        terms = [(f, sign) for found, sign in ((mine, 1.0), (yours, -1.0)) for f in found.get(path, ())]
        A = torch.cat([f.A.double() for f, _ in terms])
        B = torch.cat([sign * f.scaling * f.B.double() for f, sign in terms], 1)
        squares += float((_triangle(B) @ _triangle(A.T).T).square().sum())
    return math.sqrt(squares)


def equal(first: Adapter, second: Adapter, *, tolerance: float = 1e-6) -> bool:
    """Says whether two adapters are the same update, whatever their factors: B·A is also (B·G)·(G⁻¹·A).

    What they trained in full must be the same, too, up to the same tolerance.

    Args:
        first: One adapter.
        second: Another.
        tolerance: The largest difference over the larger norm that counts as none.

    Raises:
        LoRAError: Matrices of one path differ in shape, or an adapter is one of DoRA's.
    """
    if distance(first, second) > tolerance * max(norm(first), norm(second)):
        return False
    mine, yours = first.trained_in_full, second.trained_in_full
    return mine.keys() == yours.keys() and all(
        t.shape == yours[name].shape
        and float((t - yours[name]).double().norm())
        <= tolerance * max(float(t.double().norm()), float(yours[name].double().norm()))
        for name, t in mine.items()
    )


def _triangle(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix, mode="r")[1]


def _check_shapes(adapters: Sequence[Adapter]) -> list[dict[str, list[Factors]]]:
    """Returns of each adapter path → its factors there; a slice goes as a part of its projection where any has that.

    Raises:
        LoRAError: Matrices of one path differ in shape, or an adapter is one of DoRA's.
    """
    wholes = {path for a in adapters for path, f in a.factors.items() if f.layout.form != "slice"}
    first: dict[str, Factors] = {}
    problems, found = [], []
    for adapter in adapters:
        if adapter.magnitudes:
            raise LoRAError("`adapters` must not hold one of DoRA's: its ΔW is not B·A alone.")
        by_path: dict[str, list[Factors]] = {}
        for path, f in adapter.factors.items():
            whole = path.rpartition(".")[0]
            if f.layout.form == "slice" and whole in wholes:
                path, f = whole, as_whole(f)
            by_path.setdefault(path, []).append(f)
            known, rows = first.setdefault(path, f), f.layout.rows
            if known.shape != f.shape:
                problems.append(f"{path} is {known.shape} and {f.shape}")
            elif rows is not None and known.layout.rows is not None and not torch.equal(rows, known.layout.rows):
                problems.append(f"{path} is of other rows in each")
        found.append(by_path)
    if problems:
        raise LoRAError(f"`adapters` must fit one model: {listed(problems)}.")
    return found


def _check_factors_only(adapters: Sequence[Adapter]) -> None:
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.trained_in_full))
    if names:
        raise LoRAError(
            f"`adapters` must hold A and B only; some have {listed(names, ', ')} trained in full, whose values do not "
            "add up."
        )
