"""Intruder dimensions: strong directions of W + ΔW that are none of W's; found exactly, W + ΔW is never formed.

With the SVD W = U0·Σ0·V0ᵀ at hand, W + ΔW is in these bases a diagonal matrix plus one of rank r. What of B and A
lies outside of U0 and V0 (W need not be square) gets a basis of its own beside them. The cosine of a singular
vector with U0's columns is then simply its entry.

Source: Shuttleworth et al. 2024, arXiv:2410.21228. What they cost is contested: see `damp`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.errors import LoRAError
from core.matrices import Factors
from core.spectrum import spectrum
from core.weights import WeightSVD

DENSE_LIMIT = 256
"""Up to this many directions of W the small matrix is decomposed whole."""

_SPARE, _DEPTH, _MOST_ROUNDS, _TOLERANCE = 10, 4, 60, 1e-12


@dataclass(frozen=True)
class Intruders:
    """The strongest directions of W + ΔW, and how near each comes to one of W's.

    Attributes:
        sigma: (k), the largest singular values of W + ΔW, falling.
        U, V: (out_features, k) and (in_features, k), their directions.
        cosines: (k, p), |cos| of each left direction with each of W's; signs mean nothing.
        threshold: A direction whose largest cosine is below it is an intruder.
    """

    sigma: Tensor
    U: Tensor
    V: Tensor
    cosines: Tensor
    threshold: float

    @property
    def max_cosine(self) -> Tensor:
        """(k), the largest |cos| of each direction with any of W's."""
        return self.cosines.max(1).values

    @property
    def is_intruder(self) -> Tensor:
        """(k), which of the directions are intruders."""
        return self.max_cosine < self.threshold

    @property
    def indices(self) -> tuple[int, ...]:
        """The intruders' places among the directions, from 0."""
        return tuple(self.is_intruder.nonzero().flatten().tolist())

    @property
    def count(self) -> int:
        """How many of the k directions are intruders; a count saturates, so see `energy_share`, too."""
        return len(self.indices)

    @property
    def energy_share(self) -> float:
        """Σ sigma² of the intruders over that of all k directions."""
        squares = self.sigma.square()
        return float(squares[self.is_intruder].sum() / squares.sum()) if len(squares) else 0.0

    @property
    def null(self) -> float:
        """About the largest |cos| that a random direction has with any of W's p, √(2·ln p / out_features).

        It lies far below a threshold of 0.5: every direction at random would count as an intruder.
        """
        p = self.cosines.shape[1]
        return min(1.0, math.sqrt(2 * math.log(p) / self.U.shape[0])) if p > 1 else 1.0


def intruder_dimensions(factors: Factors, svd: WeightSVD, k: int = 10, threshold: float = 0.5) -> Intruders:
    """Returns the k strongest directions of W + ΔW, each with its cosines to all of W's.

    Args:
        factors: ΔW in factored form; for DoRA W + ΔW is not what the model computes with.
        svd: All of W's own, from `weight_svd`.
        k: How many directions; fewer come back where W + ΔW has a lower rank.
        threshold: The cosine below which a direction is an intruder; the paper's example is 0.5.

    Raises:
        LoRAError: W does not have ΔW's shape, `svd` is not whole, or `k` or `threshold` is out of range.
    """
    if svd.shape != factors.shape:
        raise LoRAError(f"`svd` (={svd.shape}) must be that of a weight of ΔW's shape, {factors.shape}.")
    if not svd.is_whole:
        raise LoRAError(
            f"`svd` (={len(svd.sigma)} directions) must be whole, {min(svd.shape)} directions, as of weight_svd: "
            "a top alone cannot tell an intruder."
        )
    if not 1 <= k <= len(svd.sigma):
        raise LoRAError(f"`k` (={k}) must be from 1 to {len(svd.sigma)}, the directions of W.")
    if not 0 < threshold <= 1:
        raise LoRAError(f"`threshold` (={threshold}) must be above 0 and at most 1.")
    found = spectrum(factors)
    root = found.sigma[: found.rank].sqrt()
    outside_U, L = _coordinates(found.U[:, : found.rank] * root, svd.U)
    outside_V, R = _coordinates(found.V[:, : found.rank] * root, svd.V)
    small = _DiagonalPlusLowRank(svd.sigma, L, R)
    Z = small.top_left(k)
    Y = small.transposed(Z)
    sigma = torch.linalg.vector_norm(Y, dim=0)
    kept = sigma > len(svd.sigma) * torch.finfo(torch.float64).eps * sigma[:1]
    Z, Y, sigma = Z[:, kept], Y[:, kept] / sigma[kept], sigma[kept]
    p = len(svd.sigma)
    U, V = svd.U @ Z[:p] + outside_U @ Z[p:], svd.V @ Y[:p] + outside_V @ Y[p:]
    return Intruders(sigma, U, V, Z[:p].T.abs(), threshold)


def damp(factors: Factors, intruders: Intruders, strength: float, which: Sequence[int] | None = None) -> Factors:
    """Returns the update ΔW + (strength − 1)·Σ u·σ·vᵀ over the intruders, exactly: the rank grows by their number.

    In the paper this reduces what a model forgets while it keeps most of what it learned; one replication saw no more
    than from an update that is smaller as a whole. So look at `shrink` beside it.

    Args:
        factors: Of the ΔW that `intruders` was found with.
        intruders: Its intruders.
        strength: What is left of each: 1 changes nothing, 0 takes them out of W + ΔW.
        which: Their places among the directions, from 0; by default all intruders. The paper takes the strongest.

    Raises:
        LoRAError: `intruders` are of another shape, `strength` is not finite, or there is no such direction.
    """
    if not math.isfinite(strength):
        raise LoRAError(f"`strength` (={strength}) must be a finite number.")
    if (len(intruders.U), len(intruders.V)) != factors.shape:
        raise LoRAError(f"`intruders` must be those of a weight of ΔW's shape, {factors.shape}.")
    chosen = list(intruders.indices if which is None else which)
    num = len(intruders.sigma)
    if any(not 0 <= i < num for i in chosen) or len(set(chosen)) < len(chosen):
        raise LoRAError(f"`which` (={chosen}) must be different places from 0 to {num - 1}.")
    if not chosen:
        return factors
    scaling = factors.scaling or 1.0
    B_old = factors.B if factors.scaling else torch.zeros_like(factors.B)
    # Half precision would round away what is exact here.
    dtype = torch.promote_types(factors.A.dtype, torch.float32)
    root = intruders.sigma[chosen].sqrt()
    A = (root * intruders.V[:, chosen]).T.to(factors.A.device, dtype)
    B = ((strength - 1) / scaling * root * intruders.U[:, chosen]).to(factors.B.device, dtype)
    return replace(
        factors, A=torch.cat([factors.A.to(dtype), A]), B=torch.cat([B_old.to(dtype), B], 1), scaling=scaling
    )


def shrink(factors: Factors, like: Factors) -> Factors:
    """Returns c · ΔW with the norm of `like`: the control for `damp`, which also makes the update smaller."""
    own = spectrum(factors).norm
    return replace(factors, scaling=factors.scaling * spectrum(like).norm / own) if own else factors


def _coordinates(X: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Returns an orthonormal basis of what of X lies outside of `basis`, and X in both bases together."""
    inside = basis.T @ X
    room = basis.shape[0] - basis.shape[1]
    if not room:
        return X.new_zeros(len(X), 0), inside
    rest = X - basis @ inside
    again = basis.T @ rest  # once more: the first difference leaves rounding of X's size inside
    inside, rest = inside + again, rest - basis @ again
    Q, S, Vh = torch.linalg.svd(rest, full_matrices=False)
    is_there = 1e-13 * torch.linalg.matrix_norm(X) < S
    is_there[room:] = False  # a space has no more directions than are left in it
    return Q[:, is_there], torch.cat([inside, S[is_there, None] * Vh[is_there]])


class _DiagonalPlusLowRank:
    """K = diag(sigma), with rows and columns of zeros below and right of it, + L·Rᵀ."""

    def __init__(self, sigma: Tensor, L: Tensor, R: Tensor) -> None:
        self.sigma, self.L, self.R = sigma, L, R
        self.p = len(sigma)

    def times(self, Y: Tensor) -> Tensor:
        """Returns K·Y."""
        out = self.L @ (self.R.T @ Y)
        out[: self.p] += self.sigma[:, None] * Y[: self.p]
        return out

    def transposed(self, Z: Tensor) -> Tensor:
        """Returns Kᵀ·Z."""
        out = self.R @ (self.L.T @ Z)
        out[: self.p] += self.sigma[:, None] * Z[: self.p]
        return out

    def top_left(self, k: int) -> Tensor:
        """Returns the left singular vectors of the k largest singular values, (p + …, k).

        By block Krylov iteration on K·Kᵀ, begun anew with what is found so far, until the residuals are rounding; it
        starts from W's and ΔW's strongest directions, which the answer is mostly made of.
        """
        size, r = self.L.shape
        width = k + _SPARE
        if self.p <= DENSE_LIMIT or _DEPTH * (width + r) > size:
            return self._dense(k)
        X = torch.cat([torch.eye(size, width, dtype=self.L.dtype), self.L], 1)
        for _ in range(_MOST_ROUNDS):
            Q = _orthonormal(X)
            block = Q
            for _ in range(_DEPTH - 1):
                block = _orthonormal(self.times(self.transposed(block)), Q)
                Q = torch.cat([Q, block], 1)
            # The vectors are those of Kᵀ·Q's own SVD: K·Kᵀ in Q would square their rounding.
            KQ = self.transposed(Q)
            values, vectors = torch.linalg.eigh(KQ.T @ KQ)
            values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
            X = Q @ vectors
            residual = self.times(KQ @ vectors[:, :k]) - X[:, :k] * values[:k]
            if torch.linalg.vector_norm(residual, dim=0).max() <= _TOLERANCE * values[0]:
                return X[:, :k]
        return self._dense(k)

    def _dense(self, k: int) -> Tensor:
        K = self.L @ self.R.T
        K.diagonal()[: self.p] += self.sigma
        return torch.linalg.svd(K, full_matrices=False)[0][:, :k]


def _orthonormal(X: Tensor, besides: Tensor | None = None) -> Tensor:
    """Returns an orthonormal basis of X's columns that is orthogonal to `besides`; what lies in there is dropped."""
    if besides is not None:
        X = X / torch.linalg.vector_norm(X, dim=0).clamp_min(torch.finfo(X.dtype).tiny)
        X = X - besides @ (besides.T @ X)
    Q, S, _ = torch.linalg.svd(X, full_matrices=False)
    Q = Q[:, 1e-12 * S[:1].clamp_min(1.0 if besides is not None else 0.0) < S]
    return Q if besides is None else torch.linalg.qr(Q - besides @ (besides.T @ Q)).Q
