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
from core.spectrum import Spectrum, spectra


@dataclass(frozen=True)
class Truncation:
    """An adapter brought to fewer directions, and what that cost.

    Attributes:
        adapter: The smaller adapter.
        errors: Path → ‖ΔW − ΔW_k‖_F, exactly; of the strongest k directions it is the least that any matrix of that
            rank can have (Eckart and Young 1936).
        norm: ‖ΔW‖_F over all matrices together, before.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    norm: float

    @property
    def relative_error(self) -> float:
        """The error of all matrices together over `norm`; 0 for ΔW = 0."""
        return math.hypot(*self.errors.values()) / self.norm if self.norm else 0.0

    @property
    def energy(self) -> float:
        """The share of ‖ΔW‖_F² that is left, over all matrices together; 1 for ΔW = 0."""
        return 1 - self.relative_error**2

    @property
    def ranks(self) -> dict[str, int]:
        """Path → how many directions are left there, 0 of a matrix that is left out."""
        return {path: self.adapter.factors[path].r if path in self.adapter.factors else 0 for path in self.errors}


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
    factors = {path: _stacked(terms) for path, terms in all_terms.items()}
    names = {adapter.base_model for adapter in adapters}
    return Adapter(config_for(factors), factors, names.pop() if len(names) == 1 else None)


def difference(first: Adapter, second: Adapter) -> Adapter:
    """Returns the adapter that leads from `second` to `first`: ΔW is that of the first less that of the second.

    Raises:
        LoRAError: As of `weighted_sum`.
    """
    return weighted_sum([first, second], [1.0, -1.0])


def truncate(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    directions: int | None = None,
    keep: Mapping[str, Sequence[int]] | None = None,
    pooled: bool = False,
) -> Truncation:
    """Returns the adapter nearest to this one with at most `rank` directions a matrix, or holding `energy` of ‖ΔW‖².

    The kept directions are shared evenly between the factors, B = U·√σ and A = √σ·Vᵀ, with scaling 1.
    Pooled, directions of all matrices compete: of all adapters with as many in all, the result is the nearest. A
    matrix of which nothing is kept is left out of it.

    Args:
        adapter: One without DoRA's magnitudes; what it trained in full is kept as it is.
        rank: Directions to keep in each matrix; pooled, on average.
        energy: Share of each matrix's ‖ΔW‖_F² to keep, above 0 and at most 1; pooled, of all matrices together.
        directions: Directions to keep in all matrices together, wherever the strongest are.
        keep: Path → which of its directions to keep, from 0; matrices that are not named stay as they are.
        pooled: Whether `rank` or `energy` is that of the adapter as a whole.

    Raises:
        LoRAError: Not exactly one of `rank`, `energy`, `directions` and `keep` is given, it is out of range, or ΔW is
            not of low rank.
    """
    _check_one_of(rank=rank, energy=energy, directions=directions, keep=keep)
    for name, number in (("rank", rank), ("directions", directions)):
        if number is not None and number < 1:
            raise LoRAError(f"`{name}` (={number}) must be at least 1.")
    if pooled and keep is not None:
        raise LoRAError("`pooled` (=True) must come with `rank` or `energy`; `keep` says itself what is kept.")
    if adapter.magnitudes:
        raise LoRAError("`adapter` must not be one of DoRA's: its ΔW is not of low rank.")
    found = spectra(adapter.factors)
    if keep is not None:
        kept = _chosen(keep, found)
    elif pooled or directions is not None:
        budget = directions if directions is not None else rank and rank * len(found)
        kept = _pooled(found, budget, energy)
    else:
        ranks = {path: rank if rank is not None else s.rank_for_energy(energy or 1.0) for path, s in found.items()}
        kept = {path: list(range(max(1, min(k, len(found[path].sigma))))) for path, k in ranks.items()}
    factors, errors = {}, {}
    for path, f in adapter.factors.items():
        if path not in kept:
            factors[path], errors[path] = f, 0.0
            continue
        smaller, errors[path] = _restricted(f, found[path], kept[path])
        if smaller is not None:
            factors[path] = smaller
    return Truncation(adapter.with_factors(factors), errors, math.hypot(*(s.norm for s in found.values())))


def _check_one_of(**given: object) -> None:
    if sum(value is not None for value in given.values()) != 1:
        named = ", ".join(f"`{name}` (={value})" for name, value in given.items())
        raise LoRAError(f"One of {named} must be given, and not more.")


def _chosen(keep: Mapping[str, Sequence[int]], found: Mapping[str, Spectrum]) -> dict[str, list[int]]:
    """Returns path → the directions that the caller chose, in order.

    Raises:
        LoRAError: A path or a direction does not exist, or nothing at all is kept.
    """
    problems = [f"{path} is no matrix of the adapter" for path in keep if path not in found]
    for path, indices in keep.items():
        num = len(found[path].sigma) if path in found else 0
        wrong = [i for i in indices if not 0 <= i < num]
        if num and (wrong or len(set(indices)) < len(indices)):
            problems.append(f"{path} has directions 0 to {num - 1}, each once, not {list(indices)}")
    if not problems and not any(keep.values()) and keep.keys() == found.keys():
        problems.append("nothing is kept")
    if problems:
        raise LoRAError(f"`keep` must name directions of the adapter: {listed(problems)}.")
    return {path: sorted(indices) for path, indices in keep.items()}


def _pooled(found: Mapping[str, Spectrum], budget: int | None, energy: float | None) -> dict[str, list[int]]:
    """Returns path → its directions among the strongest of all: so many of them, or enough for a share of the energy.

    Raises:
        LoRAError: `energy` is out of range.
    """
    pool = torch.cat([s.sigma for s in found.values()])
    order = pool.argsort(descending=True, stable=True)
    num = Spectrum(pool[order], next(iter(found.values())).factors).rank_for_energy(energy) if energy else budget
    is_kept = torch.zeros(len(pool), dtype=torch.bool)
    is_kept[order[: max(1, num or 0)]] = True
    parts = is_kept.split([len(s.sigma) for s in found.values()])
    return {path: part.nonzero().flatten().tolist() for path, part in zip(found, parts, strict=True)}


def _restricted(f: Factors, found: Spectrum, kept: list[int]) -> tuple[Factors | None, float]:
    """Returns the update of some of ΔW's directions, None for none of them, and ‖ΔW − ΔW_k‖_F."""
    lost = torch.ones_like(found.sigma, dtype=torch.bool)
    lost[kept] = False
    error = float(torch.linalg.vector_norm(found.sigma[lost]))
    if not kept:
        return None, error
    root = found.sigma[kept].sqrt()
    B, A = found.U[:, kept] * root, root[:, None] * found.V[:, kept].T
    smaller = Factors(A.to(f.A.dtype), B.to(f.B.dtype), 1.0, f.layout)
    # In half precision the rounding of the new factors may cost more than the directions.
    return smaller, _norm([(f, 1.0), (smaller, -1.0)]) if f.A.dtype.itemsize < 4 else error


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
        squares += _norm(terms) ** 2
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


def aligned(adapters: Sequence[Adapter]) -> list[dict[str, Factors]]:
    """Returns of each adapter path → its update there, by paths that mean the same in all.

    Slices of a projection that another adapter has whole are one update of it.

    Raises:
        LoRAError: Matrices of one path differ in shape, or an adapter is one of DoRA's.
    """
    return [{path: _stacked([(f, 1.0) for f in found]) for path, found in of.items()} for of in _check_shapes(adapters)]


def _stacked(terms: Sequence[tuple[Factors, float]]) -> Factors:
    """Returns Σ weight · ΔW of updates of one matrix, their factors side by side."""
    (first, weight), *others = terms
    if weight == 1 and not others:
        return first
    B = [f.B if w * f.scaling == first.scaling else f.B * (w * f.scaling / first.scaling) for f, w in terms]
    return Factors(torch.cat([f.A for f, _ in terms]), torch.cat(B, 1), first.scaling, first.layout)


def _norm(terms: Sequence[tuple[Factors, float]]) -> float:
    """Returns ‖Σ weight · ΔW‖_F of updates of one matrix."""
    A = torch.cat([f.A.double() for f, _ in terms])
    B = torch.cat([weight * f.scaling * f.B.double() for f, weight in terms], 1)
    return float(torch.linalg.matrix_norm(_triangle(B) @ _triangle(A.T).T))


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
