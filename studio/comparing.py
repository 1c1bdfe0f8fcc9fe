"""Two adapters of one model: how near their directions are, and what each does where the other one reads."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from core import (
    Adapter,
    Factors,
    LoRAConfig,
    LoRAError,
    basis_of,
    inject,
    inner_product,
    lora_layers,
    similarity_null,
    spectrum,
    subspace_similarity,
)
from studio.specs import RunSpec

Basis = Literal["A-right", "B-left", "delta-right", "delta-left"]


@dataclass(frozen=True)
class Pair:
    """What one matrix has in two adapters.

    Attributes:
        first_norm, second_norm: ‖ΔW‖_F of each.
        inner: ⟨ΔW₁, ΔW₂⟩.
        overlap: φ(k, k) of their directions in one basis, k the smaller number of them; None where one has none.
        overlap_null: What it is for random directions.
        interference: ‖ΔW₂·V₁‖_F / ‖ΔW₁‖_F: what the second adds on the inputs that the first reads, beside what the
            first does with them; None where one is zero.
        interference_null: What it is for a random ΔW₂ of its size.
    """

    first_norm: float
    second_norm: float
    inner: float
    overlap: float | None
    overlap_null: float | None
    interference: float | None
    interference_null: float | None

    @property
    def ratio(self) -> float | None:
        """‖ΔW₂‖_F / ‖ΔW₁‖_F."""
        return self.second_norm / self.first_norm if self.first_norm else None

    @property
    def cosine(self) -> float | None:
        """⟨ΔW₁, ΔW₂⟩ over both norms: 1 the same update, 0 unrelated, −1 opposite."""
        size = self.first_norm * self.second_norm
        return self.inner / size if size else None


def shared(first: Adapter, second: Adapter) -> list[str]:
    """Returns the matrices that both adapters have, in the same shape.

    Raises:
        LoRAError: There is none.
    """
    paths = [p for p, f in first.factors.items() if p in second.factors and second.factors[p].shape == f.shape]
    if not paths:
        raise LoRAError("The two adapters must have a matrix of the same name and shape in common; they have none.")
    return paths


def pair(first: Factors, second: Factors, basis: Basis) -> Pair:
    """Returns what one matrix has in two adapters; ΔW is never formed."""
    one, two = spectrum(first), spectrum(second)
    U1, U2 = basis_of(first, basis), basis_of(second, basis)
    k = min(U1.shape[1], U2.shape[1])
    size = (one.norm, two.norm)
    empty = Adapter(LoRAConfig(), {})
    inner = inner_product(replace(empty, factors={"": first}), replace(empty, factors={"": second}))
    interference = null = None
    if all(size):
        V = one.V[:, : one.rank]
        seen = Factors(second.A.double() @ V, second.B.double(), second.scaling)
        interference = spectrum(seen).norm / one.norm
        null = two.norm / one.norm * (one.rank / first.shape[1]) ** 0.5
    overlap = float(subspace_similarity(U1, U2)[k - 1, k - 1]) if k else None
    return Pair(*size, inner, overlap, k / len(U1) if k else None, interference, null)


def pairs(first: Adapter, second: Adapter, basis: Basis) -> dict[str, Pair]:
    """Returns path → what that matrix has in two adapters, of all that they share.

    Raises:
        LoRAError: They share none.
    """
    return {path: pair(first.factors[path], second.factors[path], basis) for path in shared(first, second)}


def start(spec: RunSpec, path: str, factors: Factors) -> Factors | None:
    """Returns the factors that a run began with, B = 0 and A as it was drawn; None where they do not follow from it.

    Each matrix's A follows from the seed, its path and its r alone, so a matrix of the same name and width will do.
    """
    if spec.lora.init not in ("gaussian", "kaiming") or spec.continues:
        return None
    *above, name = path.split(".")
    root = place = nn.Module()
    for part in above:
        place.add_module(part, nn.Module())
        place = place.get_submodule(part)
    place.add_module(name, nn.Linear(factors.shape[1], factors.r, bias=False))
    inject(root, LoRAConfig(r=factors.r, target_modules=(path,), init=spec.lora.init), seed=spec.train.seed)
    A = lora_layers(root)[path].factors.A.detach()
    return Factors(A, torch.zeros_like(factors.B), factors.scaling)


def panels(
    first: Factors, second: Factors, basis: Basis, starts: tuple[Factors | None, Factors | None] = (None, None)
) -> Mapping[str, torch.Tensor]:
    """Returns φ(i, j) of two updates by title: as trained, at step 0 where both are known, and what chance gives."""
    U1, U2 = basis_of(first, basis), basis_of(second, basis)
    found = {"trained": subspace_similarity(U1, U2)}
    if basis == "A-right" and starts[0] is not None and starts[1] is not None:
        found["step 0"] = subspace_similarity(basis_of(starts[0], basis), basis_of(starts[1], basis))
    found["chance"] = similarity_null(len(U1), U1.shape[1], U2.shape[1])
    return found
