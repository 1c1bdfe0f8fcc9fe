"""The singular values of many ΔW at once, fast enough to be taken while training goes on.

With the Gram matrices BᵀB = L·Lᵀ and A·Aᵀ, both r × r, sigma² are the eigenvalues of scaling²·Lᵀ·(A·Aᵀ)·L. They are
taken on the factors' own device, all of one shape at once, and what is then copied is r numbers by r, whatever the
matrices' size. A Gram matrix keeps half of the digits, so sigma is exact to 1e-7 of ‖A‖·‖B‖: enough to watch, and in
float64, as in float32 it would be enough for nothing. For the last digits and the directions, take `core.spectrum`.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from core.matrices import Factors


@torch.no_grad()
def quick_sigma(all_factors: Sequence[Factors]) -> list[Tensor]:
    """Returns of each ΔW its singular values, falling, (min(r, out_features, in_features)), float64 on the CPU.

    Those of factors that hold NaN or infinity, or overflow, are NaN.
    """
    wide = [_in_float64(f) for f in all_factors]
    grams: list[Tensor] = [torch.empty(0)] * (2 * len(wide))
    sides = [f.A.mT for f in wide] + [f.B for f in wide]
    for places in _alike(range(len(sides)), lambda place: sides[place].shape):
        stacked = torch.stack([sides[place] for place in places]).double()
        for place, gram in zip(places, stacked.mT @ stacked, strict=True):
            grams[place] = gram
    grams = _on_cpu(grams)
    found: list[Tensor] = [torch.empty(0)] * len(wide)
    for places in _alike(range(len(wide)), lambda place: wide[place].r):
        of_A = torch.stack([grams[place] for place in places])
        of_B = torch.stack([grams[len(wide) + place] for place in places])
        sigma = _roots(of_A, of_B)
        for place, row in zip(places, sigma, strict=True):
            f = wide[place]
            found[place] = abs(f.scaling) * row[: min(f.r, *f.shape)]
    return found


def _in_float64(f: Factors) -> Factors:
    """Returns factors on a device that computes in float64: Apple's does not."""
    return Factors(f.A.cpu(), f.B.cpu(), f.scaling) if f.A.device.type == "mps" else f


def _alike(places: Sequence[int], kind: Callable[[int], Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for place in places:
        groups.setdefault(kind(place), []).append(place)
    return list(groups.values())


def _on_cpu(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Returns square matrices on the CPU, by one copy."""
    together = torch.cat([m.flatten() for m in matrices]).cpu() if matrices else torch.empty(0)
    parts = together.split([m.numel() for m in matrices])
    return [part.view(len(m), len(m)) for part, m in zip(parts, matrices, strict=True)]


def _roots(of_A: Tensor, of_B: Tensor) -> Tensor:
    """Returns the singular values of each B·A, falling, (n, r), from their Gram matrices, (n, r, r)."""
    finite = (torch.isfinite(of_A) & torch.isfinite(of_B)).all(-1).all(-1)
    of_A, of_B = (torch.where(finite[:, None, None], gram, 0.0) for gram in (of_A, of_B))
    # A whit more of itself, as B of fewer directions than r, which it is at the start, has no Cholesky factor.
    total = of_B.diagonal(dim1=-2, dim2=-1).sum(-1)
    ridge = torch.where(total > 0, 1e-15 * total, 1.0)
    L = torch.linalg.cholesky_ex(of_B + ridge[:, None, None] * torch.eye(of_B.shape[-1], dtype=of_B.dtype)).L
    squares = torch.linalg.eigvalsh(L.mT @ of_A @ L)
    squares = torch.where(total[:, None] > 0, squares, 0.0)
    return torch.where(finite[:, None], squares.clamp(min=0).sqrt().flip(-1), torch.nan)
