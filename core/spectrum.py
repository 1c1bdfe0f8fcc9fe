"""The singular spectrum of ΔW, from its factors: ΔW itself is never formed.

B = Q_B·R_B and Aᵀ = Q_A·R_A, so ΔW = s·B·A = Q_B·(s·R_B·R_Aᵀ)·Q_Aᵀ, and one small SVD, of r × r,
gives everything. Cost O((out + in)·r² + r³) instead of O(out·in·min(out, in)).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from core.errors import LoRAError
from core.matrices import Factors

BATCH_NUMEL = 1 << 24
"""Entries of A and B that are decomposed together: 128 MiB in float64."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values and directions of one ΔW = U·diag(sigma)·Vᵀ, in float64.

    Attributes:
        sigma: (k), falling; k = min(r, out_features, in_features).
        factors: A copy of ΔW's on the CPU. The directions are computed from it when they are first asked for.
    """

    sigma: Tensor
    factors: Factors

    @property
    def U(self) -> Tensor:
        """(out_features, k), orthonormal columns: what ΔW writes; those whose sigma is zero span nothing learned."""
        return self._directions[0]

    @property
    def V(self) -> Tensor:
        """(in_features, k), orthonormal columns: what ΔW reads."""
        return self._directions[1]

    @cached_property
    def _directions(self) -> tuple[Tensor, Tensor]:
        f = self.factors
        Q_B, R_B = torch.linalg.qr(f.B.double())
        Q_A, R_A = torch.linalg.qr(f.A.double().T)
        U, _, Vh = torch.linalg.svd(f.scaling * (R_B @ R_A.T), full_matrices=False)
        return Q_B @ U, Q_A @ Vh.T

    @property
    def rank(self) -> int:
        """Numerical rank: how many sigma exceed max(out, in) · eps · sigma₁; 0 for ΔW = 0.

        The eps is float32's, the type in which adapters are trained and stored.
        """
        threshold = max(self.factors.shape) * torch.finfo(torch.float32).eps * self.sigma[0]
        return int((self.sigma > threshold).sum())

    @property
    def effective_rank(self) -> float:
        """Effective rank: exp of the entropy of p = sigma / Σ sigma; 0 for ΔW = 0 (Roy and Vetterli 2007)."""
        counted = self.sigma[: self.rank]  # what is rounding error does not count
        p = counted / counted.sum()
        return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖_F² / sigma₁²; 0 for ΔW = 0."""
        return float((self.sigma / self.sigma[0]).square().sum()) if self.sigma[0] > 0 else 0.0

    @property
    def participation_ratio(self) -> float:
        """(Σ sigma²)² / Σ sigma⁴: the number of directions that share the energy; 0 for ΔW = 0."""
        if self.sigma[0] == 0:
            return 0.0
        squares = (self.sigma / self.sigma[0]).square()
        return float(squares.sum().square() / squares.square().sum())

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return float(torch.linalg.vector_norm(self.sigma))

    def energy(self, k: int) -> float:
        """Returns the share of ‖ΔW‖_F² in the first `k` directions; 0 for ΔW = 0."""
        squares = self.sigma.square()
        return float(squares[:k].sum() / squares.sum()) if self.sigma[0] > 0 else 0.0

    def rank_for_energy(self, share: float) -> int:
        """Returns the fewest directions that hold `share` of ‖ΔW‖_F²; 0 for ΔW = 0.

        Raises:
            LoRAError: `share` is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise LoRAError(f"`share` (={share}) must be above 0 and at most 1.")
        if self.sigma[0] == 0:
            return 0
        shares = self.sigma.square().cumsum(0) / self.sigma.square().sum()
        # The last partial sum is 1 but for rounding, so share = 1 needs the slack.
        return int((shares < share * (1 - 1e-12)).sum()) + 1


def spectrum(factors: Factors) -> Spectrum:
    """Returns the singular value decomposition of ΔW = scaling · B·A, computed in float64.

    Raises:
        LoRAError: A factor holds NaN or infinity.
    """
    return spectra({"": factors})[""]


def spectra(factors: Mapping[str, Factors]) -> dict[str, Spectrum]:
    """Returns path → spectrum of many matrices at once; those of one shape are decomposed together.

    Args:
        factors: Path → factors, such as those of an adapter.

    Raises:
        LoRAError: A factor holds NaN or infinity.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for path, f in factors.items():
        groups.setdefault((*f.shape, f.r), []).append(path)
    found: dict[str, Spectrum] = {}
    for (out, width, r), paths in groups.items():
        size = max(1, BATCH_NUMEL // (r * (out + width)))
        for start in range(0, len(paths), size):
            part = paths[start : start + size]
            sigma = _sigma([factors[path] for path in part])
            found |= {path: Spectrum(own, _copy(factors[path])) for path, own in zip(part, sigma, strict=True)}
    return {path: found[path] for path in factors}


def _sigma(alike: Sequence[Factors]) -> Tensor:
    """Returns sigma of factors of one shape, (number, k)."""
    A = torch.stack([f.A.to("cpu", torch.float64) for f in alike])
    B = torch.stack([f.B.to("cpu", torch.float64) for f in alike])
    R = torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.mT, mode="r").R.mT
    # A NaN or an infinity anywhere in a factor is one in its triangle, too.
    if not torch.isfinite(R).all():
        raise LoRAError("`factors` must be finite; this adapter holds NaN or infinity, so its training diverged.")
    scaling = torch.tensor([f.scaling for f in alike], dtype=torch.float64)[:, None]
    sigma = torch.linalg.svdvals(scaling[..., None] * R)
    # Where terms cancel, as B·A − B0·A0 before training, what is left is the rounding of terms of this size.
    size = (torch.linalg.vector_norm(B, dim=1) * torch.linalg.vector_norm(A, dim=2)).sum(1, keepdim=True)
    rounding = 4 * A.shape[1] * torch.finfo(torch.float64).eps * scaling.abs() * size
    return torch.where(sigma > rounding, sigma, 0.0)


def _copy(f: Factors) -> Factors:
    return Factors(f.A.detach().to("cpu", copy=True), f.B.detach().to("cpu", copy=True), f.scaling)


def random_sigma(factors: Factors) -> Tensor:
    """Returns sigma of chance, (k): Gaussian B and A of the same shapes, scaled to the same ‖ΔW‖_F.

    The null for a spectrum: what falls no faster than this shows no structure.
    """
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(factors.A.shape, generator=generator, dtype=torch.float64)
    B = torch.randn(factors.B.shape, generator=generator, dtype=torch.float64)
    sigma = spectrum(Factors(A, B, 1.0)).sigma
    return sigma * (spectrum(factors).norm / float(torch.linalg.vector_norm(sigma)))
