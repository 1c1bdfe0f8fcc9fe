"""How ΔW lies towards W and towards other ΔW: amplification, subspaces, principal angles, lengths of rows.

Source: Hu et al. 2021, arXiv:2106.09685, §7.2, §7.3, Table 7, appendices G and H.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from core.errors import LoRAError
from core.matrices import Factors
from core.spectrum import Spectrum, spectrum
from core.weights import WeightSVD, top_sigma

Directions = Literal["delta", "weight", "random"]
Basis = Literal["A-right", "B-left", "delta-left", "delta-right"]
Side = Literal["left", "right"]


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

    @property
    def null_factor(self) -> float | None:
        """The factor that a random ΔW of the same norm would have, = factor · enrichment; None where ΔW or W = 0."""
        return self.delta_norm / self.null if self.delta_norm and self.null else None


def amplification(
    factors: Factors | Spectrum, W: Tensor, r: int | None = None, directions: Directions = "delta", *, seed: int = 0
) -> Amplification | None:
    """Returns how much of W lies in the top-r directions of ΔW, of W itself, or of chance.

    Args:
        factors: ΔW in factored form, or its spectrum, where that is there already.
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
    found = factors if isinstance(factors, Spectrum) else spectrum(factors)
    _check_shape(W, found.factors)
    r = found.rank if r is None else r
    if found.rank == 0:
        return None
    limit = found.rank if directions == "delta" else min(W.shape)
    if not 1 <= r <= limit:
        raise LoRAError(f"`r` (={r}) must be from 1 to {limit}, the rank at hand.")
    W = W.to("cpu", torch.float64)
    weight_norm = float(torch.linalg.matrix_norm(W))
    if directions == "weight":
        projected = float(torch.linalg.vector_norm(top_sigma(W, r)))
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
    _check_same_space(U1, U2)
    overlap = (U1.double().T @ U2.double()).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, U1.shape[1] + 1), torch.arange(1, U2.shape[1] + 1)
    return overlap / torch.minimum(i[:, None], j[None, :])


def similarity_null(dim: int, r1: int, r2: int) -> Tensor:
    """Returns the mean of φ(i, j) over random subspaces, max(i, j) / dim, (r1, r2).

    Args:
        dim: Of the space in which both live.
        r1, r2: How many columns the bases have.

    Raises:
        LoRAError: A basis has more columns than the space has dimensions.
    """
    if max(r1, r2) > dim:
        raise LoRAError(f"`dim` (={dim}) must be at least the number of columns, {max(r1, r2)}.")
    i, j = torch.arange(1, r1 + 1), torch.arange(1, r2 + 1)
    return torch.maximum(i[:, None], j[None, :]).double() / dim


def basis_of(factors: Factors, basis: Basis) -> Tensor:
    """Returns directions of an update, orthonormal columns, the strongest first, (dim, k), in float64.

    Directions whose singular value is zero, up to rounding, are none and left out: of B = 0 nothing is left, but
    "A-right" of an adapter that has not trained yet are those of A as it was drawn.

    Args:
        factors: Of the update.
        basis: "A-right": right singular vectors of A, as in the paper's figures 3 and 4. "B-left": left ones of B.
            "delta-right" and "delta-left": those of ΔW, which differ from them.

    Raises:
        LoRAError: There is no such basis, or a factor is not finite.
    """
    if basis not in get_args(Basis):
        raise LoRAError(f"`basis` (={basis!r}) must be one of {', '.join(get_args(Basis))}.")
    if basis in ("A-right", "B-left"):
        # A factor is the update whose other factor is the identity.
        X, dtype = (factors.A.T, factors.A.dtype) if basis == "A-right" else (factors.B, factors.B.dtype)
        found = spectrum(Factors(torch.eye(X.shape[1], dtype=dtype, device=X.device), X, 1.0))
        return found.U[:, : found.rank]
    found = spectrum(factors)
    return (found.U if basis == "delta-left" else found.V)[:, : found.rank]


def principal_angles(U1: Tensor, U2: Tensor) -> Tensor:
    """Returns the principal angles of two subspaces in radians, rising, (min(r1, r2)), in float64.

    Small ones come from their sines, as a cosine near 1 has lost them to rounding (Björck and Golub 1973).

    Args:
        U1: (dim, r1), orthonormal columns.
        U2: (dim, r2), likewise.

    Raises:
        LoRAError: The two live in spaces of different dimension.
    """
    _check_same_space(U1, U2)
    wide, slim = (U1.double(), U2.double()) if U1.shape[1] >= U2.shape[1] else (U2.double(), U1.double())
    inner = wide.T @ slim
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(slim - wide @ inner).flip(0).clamp(max=1)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


@dataclass(frozen=True)
class Alignment:
    """How ΔW's directions lie towards the strongest ones of W; the paper's figure 8.

    Attributes:
        cosines: |cos| between direction i of ΔW and direction j of W, (k, q).
        similarity: φ(i, j) of the leading i directions of ΔW and j of W, (k, q).
        null: What φ is for random directions, max(i, j) / dim, (k, q).
    """

    cosines: Tensor
    similarity: Tensor
    null: Tensor


def alignment(factors: Factors | Spectrum, svd: WeightSVD, q: int | None = None, *, side: Side = "right") -> Alignment:
    """Returns how the directions of ΔW lie towards the top q of W. Source: Hu et al. 2021, H.3, figure 8.

    Args:
        factors: ΔW in factored form, or its spectrum.
        svd: W's own, whole or its top (`weight_svd`, `top_svd`).
        q: How many of W's directions; by default a tenth of all, as in the paper, or those that `svd` has.
        side: "right": what both read. "left": what both write.

    Raises:
        LoRAError: W does not have ΔW's shape, `svd` does not have `q` directions, or there is no such side.
    """
    found = factors if isinstance(factors, Spectrum) else spectrum(factors)
    if side not in get_args(Side):
        raise LoRAError(f"`side` (={side!r}) must be one of {', '.join(get_args(Side))}.")
    if svd.shape != found.factors.shape:
        raise LoRAError(f"`svd` (={svd.shape}) must be that of a weight of ΔW's shape, {found.factors.shape}.")
    known = len(svd.sigma)
    q = min(known, -(-min(svd.shape) // 10)) if q is None else q
    if not 1 <= q <= known:
        raise LoRAError(f"`q` (={q}) must be from 1 to {known}, the directions of W at hand.")
    U, X = (found.U, svd.U) if side == "left" else (found.V, svd.V)
    U, X = U[:, : found.rank], X[:, :q]
    null = similarity_null(len(U), found.rank, q)
    return Alignment((U.T @ X).abs(), subspace_similarity(U, X), null)


def row_norms(W: Tensor, factors: Factors) -> Tensor:
    """Returns the length of each row of W + ΔW, (out_features), in float64; DoRA divides by it.

    ‖W_i + s·B_i·A‖² = ‖W_i‖² + 2s·⟨(W·Aᵀ)_i, B_i⟩ + s²·B_i·(A·Aᵀ)·B_iᵀ: ΔW is not formed.
    Source: Liu et al. 2024, arXiv:2402.09353, §4.

    Args:
        W: (out_features, in_features), the frozen weight as a map from in to out.
        factors: ΔW in factored form.

    Raises:
        LoRAError: W does not have ΔW's shape.
    """
    _check_shape(W, factors)
    W, A, B = (t.detach().to("cpu", torch.float64) for t in (W, factors.A, factors.B))
    cross = ((W @ A.T) * B).sum(1)
    own = ((B @ (A @ A.T)) * B).sum(1)
    return (W.square().sum(1) + 2 * factors.scaling * cross + factors.scaling**2 * own).clamp_min(0).sqrt()


def _check_shape(W: Tensor, factors: Factors) -> None:
    if tuple(W.shape) != factors.shape:
        raise LoRAError(
            f"`W` (={tuple(W.shape)}) must have the shape of ΔW, {factors.shape} = (out_features, in_features)."
        )


def _check_same_space(U1: Tensor, U2: Tensor) -> None:
    if U1.shape[0] != U2.shape[0]:
        raise LoRAError(f"`U2` (={tuple(U2.shape)}) must have as many rows as `U1` (={tuple(U1.shape)}).")


def _random_directions(W: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))[0] for n in W.shape)
    return U, V
