"""Adapters as vectors: sums, differences, angles and recompression, all on the factors; ΔW is never formed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.adapter import Adapter
from core.errors import LoRAError, listed
from core.files import config_for
from core.matrices import Factors
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

    A matrix that an adapter does not have counts as zero there. `truncate` brings the rank down again.

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
    for adapter in adapters:
        _check_factors_only(adapter)
    _check_shapes(adapters)
    paths = list(dict.fromkeys(path for adapter in adapters for path in adapter.factors))
    factors = {}
    for path in paths:
        terms = [(a.factors[path], w) for a, w in zip(adapters, weights, strict=True) if path in a.factors]
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
    _check_shapes([first, second])
    total = 0.0
    for path in first.factors.keys() & second.factors.keys():
        f, g = first.factors[path], second.factors[path]
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
    _check_shapes([first, second])
    squares = 0.0
    for path in first.factors.keys() | second.factors.keys():
        terms = [(a.factors[path], sign) for a, sign in ((first, 1.0), (second, -1.0)) if path in a.factors]
        A = torch.cat([f.A.double() for f, _ in terms])
        B = torch.cat([sign * f.scaling * f.B.double() for f, sign in terms], 1)
        squares += float((_triangle(B) @ _triangle(A.T).T).square().sum())
    return math.sqrt(squares)


def equal(first: Adapter, second: Adapter, *, tolerance: float = 1e-6) -> bool:
    """Says whether two adapters are the same update, whatever their factors: B·A is also (B·G)·(G⁻¹·A).

    Args:
        first: One adapter.
        second: Another.
        tolerance: The largest difference over the larger norm that counts as none.

    Raises:
        LoRAError: Matrices of one path differ in shape, or an adapter is one of DoRA's.
    """
    return distance(first, second) <= tolerance * max(norm(first), norm(second))


def _triangle(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix, mode="r")[1]


def _check_shapes(adapters: Sequence[Adapter]) -> None:
    shapes: dict[str, tuple[int, int]] = {}
    problems = []
    for adapter in adapters:
        if adapter.magnitudes:
            raise LoRAError("`adapters` must not hold one of DoRA's: its ΔW is not B·A alone.")
        for path, f in adapter.factors.items():
            if shapes.setdefault(path, f.shape) != f.shape:
                problems.append(f"{path} is {shapes[path]} and {f.shape}")
    if problems:
        raise LoRAError(f"`adapters` must fit one model: {listed(problems)}.")


def _check_factors_only(adapter: Adapter) -> None:
    if adapter.trained_in_full:
        names = ", ".join(list(adapter.trained_in_full)[:3])
        raise LoRAError(
            f"`adapters` must hold A and B only; one has {names} trained in full, whose values do not add up."
        )
