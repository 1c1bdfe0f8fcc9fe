"""The directions of two updates, beside those that their runs began with."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from core import Factors, LoRAConfig, basis_of, inject, lora_layers, similarity_null, subspace_similarity
from studio.specs import RunSpec

Basis = Literal["A-right", "B-left", "delta-right", "delta-left"]


def start(spec: RunSpec, path: str, factors: Factors) -> Factors | None:
    """Returns the factors that a run began with, B = 0 and A as it was drawn; None where they do not follow from it.

    Each matrix's A follows from the seed, its path and its r alone, so a matrix of the same name and width will do.

    Args:
        spec: The run's.
        path: The matrix.
        factors: What the run made of it.
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
) -> Mapping[str, Tensor]:
    """Returns φ(i, j) of two updates by title: as trained, at step 0 where both starts are known, and by chance.

    Args:
        first, second: Of one shape.
        basis: Which of their directions; at step 0 there are those of A alone, as B is zero.
        starts: What each began with.
    """
    U1, U2 = basis_of(first, basis), basis_of(second, basis)
    found = {"trained": subspace_similarity(U1, U2)}
    if basis == "A-right" and starts[0] is not None and starts[1] is not None:
        found["step 0"] = subspace_similarity(basis_of(starts[0], basis), basis_of(starts[1], basis))
    found["chance"] = similarity_null(len(U1), U1.shape[1], U2.shape[1])
    return found
