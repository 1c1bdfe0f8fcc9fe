"""Two adapters of one model beside each other: what they share, matrix by matrix, and what adding them would do."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from core.adapter import Adapter
from core.algebra import aligned
from core.geometry import principal_angles, similarity_null, subspace_similarity
from core.matrices import Factors
from core.spectrum import Spectrum, spectra


@dataclass(frozen=True)
class Overlap:
    """How two updates lie towards each other, of one matrix or of all together.

    Attributes:
        norms: ‖ΔW₁‖_F and ‖ΔW₂‖_F.
        inner_product: ⟨ΔW₁, ΔW₂⟩, the sum over the products of their entries.
        size: How many entries ΔW has.
    """

    norms: tuple[float, float]
    inner_product: float
    size: int

    @property
    def cosine(self) -> float | None:
        """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖); None where one of them is zero.

        Near 0 for adapters of unrelated tasks (Ilharco et al. 2022, arXiv:2212.04089, on task vectors).
        """
        first, second = self.norms
        return max(-1.0, min(1.0, self.inner_product / first / second)) if first and second else None

    @property
    def null(self) -> float:
        """The root mean square of `cosine` for updates in random directions, 1 / √size."""
        return 1 / math.sqrt(self.size)

    @property
    def norm_ratio(self) -> float | None:
        """‖ΔW₁‖ / ‖ΔW₂‖; None where ΔW₂ = 0."""
        return self.norms[0] / self.norms[1] if self.norms[1] else None

    @property
    def interference(self) -> float | None:
        """‖ΔW₁ + ΔW₂‖² / (‖ΔW₁‖² + ‖ΔW₂‖²) − 1, from −1 to 1; None where both are zero.

        0: added, each stays what it was. Above 0 they push the same entries the same way, so that the sum overshoots;
        below they cancel: −1 leaves nothing. On interference in merging: Yadav et al. 2023, arXiv:2306.01708, §3.
        """
        squares = self.norms[0] ** 2 + self.norms[1] ** 2
        return 2 * self.inner_product / squares if squares else None


@dataclass(frozen=True)
class MatrixComparison:
    """Two updates of one matrix.

    Attributes:
        overlap: As vectors.
        ranks: Their numerical ranks, r1 and r2.
        left, right: φ(i, j) of the outputs that the leading i and j directions write, and of the inputs that they read,
            (r1, r2); 0 × 0 where an update is zero. Updates with ⟨ΔW₁, ΔW₂⟩ = 0 may still read or write the same.
        left_angles, right_angles: The principal angles of all their directions, in radians, rising.
        left_null, right_null: φ of chance, (r1, r2).
    """

    overlap: Overlap
    ranks: tuple[int, int]
    left: Tensor
    right: Tensor
    left_angles: Tensor
    right_angles: Tensor
    left_null: Tensor
    right_null: Tensor


@dataclass(frozen=True)
class Comparison:
    """Two adapters.

    Attributes:
        matrices: Path → of each matrix that both have.
        only_first, only_second: Paths that one of them has alone.
        overlap: Of all matrices together; one that an adapter lacks counts as zero there.
    """

    matrices: Mapping[str, MatrixComparison]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    overlap: Overlap


def compare(first: Adapter, second: Adapter) -> Comparison:
    """Returns what two adapters of one model share, and what adding them would do, all from their factors.

    A slice of a fused projection is a part of it where the other adapter has it whole.

    Raises:
        LoRAError: Matrices of one path differ in shape, an adapter is one of DoRA's, or a factor is not finite.
    """
    mine, yours = aligned([first, second])
    both = [path for path in mine if path in yours]
    found, other = spectra(mine), spectra(yours)
    matrices = {path: _of_matrix(mine[path], found[path], yours[path], other[path]) for path in both}
    sizes = {path: math.prod(f.shape) for path, f in (mine | yours).items()}
    norms = tuple(math.hypot(*(s.norm for s in side.values())) for side in (found, other))
    product = math.fsum(m.overlap.inner_product for m in matrices.values())
    return Comparison(
        matrices,
        tuple(path for path in mine if path not in yours),
        tuple(path for path in yours if path not in mine),
        Overlap((norms[0], norms[1]), product, sum(sizes.values())),
    )


def _of_matrix(f: Factors, one: Spectrum, g: Factors, other: Spectrum) -> MatrixComparison:
    product = (f.B.double().T @ g.B.double()) * (f.A.double() @ g.A.double().T)
    overlap = Overlap((one.norm, other.norm), f.scaling * g.scaling * float(product.sum()), math.prod(f.shape))
    r1, r2 = one.rank, other.rank
    if not r1 or not r2:
        nothing, none = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        return MatrixComparison(overlap, (r1, r2), nothing, nothing, none, none, nothing, nothing)
    left, right = (one.U[:, :r1], other.U[:, :r2]), (one.V[:, :r1], other.V[:, :r2])
    return MatrixComparison(
        overlap,
        (r1, r2),
        subspace_similarity(*left),
        subspace_similarity(*right),
        principal_angles(*left),
        principal_angles(*right),
        similarity_null(f.shape[0], r1, r2),
        similarity_null(f.shape[1], r1, r2),
    )
