"""How ΔW lies towards W: does it amplify directions that W already has, or bring new ones?

Source: Hu et al. 2021, arXiv:2106.09685, §7.3 and Table 7.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core.errors import LoRAError
from core.matrices import Factors
from core.spectrum import spectrum

Directions = Literal["delta", "weight", "random"]

EXACT_SVD_LIMIT = 2048
"""Up to this many rows or columns of W its top directions come from a full SVD; above, from a randomized one."""


@dataclass(frozen=True)
class Amplification:
    """One column of the paper's Table 7, with the level that chance would give.

    Attributes:
        r: How many directions were taken on each side.
        delta_norm: ‖ΔW‖_F.
        weight_norm: ‖W‖_F.
        projected_norm: ‖Uᵀ·W·V‖_F: how much of W lies in the chosen directions.
        null: Root mean square of projected_norm for random directions, r·‖W‖_F / √(out·in).
    """

    r: int
    delta_norm: float
    weight_norm: float
    projected_norm: float
    null: float

    @property
    def factor(self) -> float | None:
        """The paper's amplification factor ‖ΔW‖_F / ‖Uᵀ·W·V‖_F; None where ΔW = 0."""
        return self.delta_norm / self.projected_norm if self.delta_norm and self.projected_norm else None

    @property
    def enrichment(self) -> float | None:
        """projected_norm / null: 1 is chance, above it the directions are more W's own; None for W = 0."""
        return self.projected_norm / self.null if self.null else None


def amplification(
    factors: Factors, W: Tensor, r: int | None = None, directions: Directions = "delta", *, seed: int = 0
) -> Amplification | None:
    """Returns how much of W lies in the top-r directions of ΔW, of W itself, or of chance.

    Args:
        factors: ΔW in factored form.
        W: (out_features, in_features), the frozen weight as a map from in to out; that of a Conv1D
            must be transposed first.
        r: How many directions; by default ΔW's numerical rank.
        directions: "delta": U, V of ΔW. "weight": U, V of W. "random": drawn uniformly.
        seed: For "random".

    Returns:
        The figures, or None where ΔW = 0 and so has no directions.

    Raises:
        LoRAError: W does not have ΔW's shape, or ΔW does not have `r` directions.
    """
    if tuple(W.shape) != factors.shape:
        raise LoRAError(
            f"`W` (={tuple(W.shape)}) must have the shape of ΔW, {factors.shape} = (out_features, in_features)."
        )
    found = spectrum(factors)
    r = found.rank if r is None else r
    if found.rank == 0:
        return None
    limit = found.rank if directions == "delta" else min(W.shape)
    if not 1 <= r <= limit:
        raise LoRAError(f"`r` (={r}) must be from 1 to {limit}, the rank at hand.")
    W = W.to("cpu", torch.float64)
    weight_norm = float(torch.linalg.matrix_norm(W))
    if directions == "weight":
        projected = float(torch.linalg.vector_norm(_top_sigma(W, r)))
    else:
        U, V = (found.U[:, :r], found.V[:, :r]) if directions == "delta" else _random_directions(W, r, seed)
        projected = float(torch.linalg.matrix_norm(U.T @ (W @ V)))
    null = r * weight_norm / math.sqrt(W.shape[0] * W.shape[1])
    return Amplification(r, found.norm, weight_norm, projected, null)


def subspace_similarity(U1: Tensor, U2: Tensor) -> Tensor:
    """Returns φ(i, j) = ‖U1[:, :i]ᵀ·U2[:, :j]‖_F² / min(i, j) for all i, j, (r1, r2), each in [0, 1].

    Chance gives max(i, j) / dim. Source: Hu et al. 2021, arXiv:2106.09685, §7.2, eq. 4.

    Args:
        U1: (dim, r1), orthonormal columns, the most important first.
        U2: (dim, r2), likewise.

    Raises:
        LoRAError: The two live in spaces of different dimension.
    """
    if U1.shape[0] != U2.shape[0]:
        raise LoRAError(f"`U2` (={tuple(U2.shape)}) must have as many rows as `U1` (={tuple(U1.shape)}).")
    overlap = (U1.double().T @ U2.double()).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, U1.shape[1] + 1), torch.arange(1, U2.shape[1] + 1)
    return overlap / torch.minimum(i[:, None], j[None, :])


def _top_sigma(W: Tensor, r: int) -> Tensor:
    if min(W.shape) <= EXACT_SVD_LIMIT:
        return torch.linalg.svdvals(W)[:r]
    # The defaults (q = r, niter = 2) lose up to 1 % of the energy; these lose 1e-5 of it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(W, q=min(r + 10, *W.shape), niter=6)[1][:r]


def _random_directions(W: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))[0] for n in W.shape)
    return U, V
