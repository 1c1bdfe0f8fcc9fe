"""The singular spectrum of ΔW, from its factors: ΔW itself is never formed.

B = Q_B·R_B and Aᵀ = Q_A·R_A, so ΔW = s·B·A = Q_B·(s·R_B·R_Aᵀ)·Q_Aᵀ, and one small SVD, of r × r,
gives everything. Cost O((out + in)·r² + r³) instead of O(out·in·min(out, in)).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from core.errors import LoRAError
from core.matrices import Factors


@dataclass(frozen=True)
class Spectrum:
    """Singular values and directions of one ΔW = U·diag(sigma)·Vᵀ, in float64.

    Attributes:
        sigma: (k), falling; k = min(r, out_features, in_features).
        factors: Of ΔW, on the CPU in float64. The directions are computed when they are first asked for.
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
        Q_B, R_B = torch.linalg.qr(f.B)
        Q_A, R_A = torch.linalg.qr(f.A.T)
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
    A, B = factors.A.to("cpu", torch.float64), factors.B.to("cpu", torch.float64)
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise LoRAError("`factors` must be finite; this adapter holds NaN or infinity, so its training diverged.")
    R_B, R_A = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.T, mode="r").R
    return Spectrum(torch.linalg.svdvals(factors.scaling * (R_B @ R_A.T)), Factors(A, B, factors.scaling))


def random_sigma(factors: Factors) -> Tensor:
    """Returns sigma of chance, (k): Gaussian B and A of the same shapes, scaled to the same ‖ΔW‖_F.

    The null for a spectrum: what falls no faster than this shows no structure.
    """
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(factors.A.shape, generator=generator, dtype=torch.float64)
    B = torch.randn(factors.B.shape, generator=generator, dtype=torch.float64)
    sigma = spectrum(Factors(A, B, 1.0)).sigma
    return sigma * (spectrum(factors).norm / float(torch.linalg.vector_norm(sigma)))
