"""The singular values and directions of a frozen weight W: what is beyond chance in it, and its SVD kept on disk."""

import hashlib
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import LoRAError

EXACT_SVD_LIMIT = 2048
"""Up to this many rows or columns of W its top directions come from a full SVD; above, from a randomized one."""


@dataclass(frozen=True)
class WeightSpectrum:
    """All singular values of a weight, and where those of pure noise would end.

    Attributes:
        sigma: (min(out_features, in_features)), falling, in float64.
        shape: (out_features, in_features).
    """

    sigma: Tensor
    shape: tuple[int, int]

    @property
    def norm(self) -> float:
        """‖W‖_F."""
        return float(torch.linalg.vector_norm(self.sigma))

    @property
    def edge(self) -> float:
        """The largest sigma of a random matrix of W's size and norm, s·(√out + √in) with s = ‖W‖_F / √(out·in).

        Source: Marchenko and Pastur 1967, in the limit of large matrices.
        """
        out, width = self.shape
        return self.norm / math.sqrt(out * width) * (math.sqrt(out) + math.sqrt(width))

    @property
    def num_above(self) -> int:
        """How many sigma lie above `edge`: directions that are not noise."""
        return int((self.sigma > self.edge).sum())


@dataclass(frozen=True)
class WeightSVD:
    """W = U·diag(sigma)·Vᵀ, all of it or its strongest directions, in float64.

    Attributes:
        U: (out_features, p), orthonormal columns.
        sigma: (p), falling; p = min(out_features, in_features) where it is whole.
        V: (in_features, p), orthonormal columns.
    """

    U: Tensor
    sigma: Tensor
    V: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of W."""
        return self.U.shape[0], self.V.shape[0]

    @property
    def is_whole(self) -> bool:
        """Whether it has all directions of W."""
        return len(self.sigma) == min(self.shape)


def weight_spectrum(W: Tensor) -> WeightSpectrum:
    """Returns the singular values of a weight, (out_features, in_features).

    Raises:
        LoRAError: W is not a finite matrix.
    """
    W = _checked(W)
    return WeightSpectrum(torch.linalg.svdvals(W), (W.shape[0], W.shape[1]))


def weight_svd(W: Tensor, cache: Path | None = None) -> WeightSVD:
    """Returns the whole SVD of a weight, from the cache if it is there; else it is computed and put there.

    What is read from the cache is held against W, so that a damaged file is made anew.

    Args:
        W: (out_features, in_features), the frozen weight as a map from in to out.
        cache: A folder; the file's name in it is the SHA-256 of the weight's bytes. 8 · p · (out + in) bytes each.

    Raises:
        LoRAError: W is not a finite matrix, or the cache cannot be written.
    """
    exact = _checked(W)
    file = None if cache is None else cache / f"{_sha256(W)}.safetensors"
    kept = None if file is None else _read(file, exact)
    if kept is not None:
        return kept
    U, sigma, Vh = torch.linalg.svd(exact, full_matrices=False)
    found = WeightSVD(U.contiguous(), sigma, Vh.T.contiguous())
    if file is not None:
        _write(file, found)
    return found


def top_svd(W: Tensor, q: int) -> WeightSVD:
    """Returns the q strongest directions of a weight; of a large one by a randomized method, without a whole SVD.

    On the flat spectrum of noise the randomized directions are poor, and their sigma too small by a part in 100.

    Raises:
        LoRAError: W is not a finite matrix, or does not have q directions.
    """
    W = _checked(W)
    if not 1 <= q <= min(W.shape):
        raise LoRAError(f"`q` (={q}) must be from 1 to {min(W.shape)}, the directions of W.")
    if min(W.shape) <= EXACT_SVD_LIMIT:
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        return WeightSVD(U[:, :q], sigma[:q], Vh[:q].T)
    # The defaults (q as asked for, niter = 2) lose up to 1 % of the energy; these lose 1e-5 of it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, sigma, V = torch.svd_lowrank(W, q=min(q + 10, *W.shape), niter=6)
    return WeightSVD(U[:, :q], sigma[:q], V[:, :q])


def top_sigma(W: Tensor, q: int) -> Tensor:
    """Returns the q largest singular values of a weight, as of `top_svd`, (q)."""
    if min(W.shape) <= EXACT_SVD_LIMIT:
        return torch.linalg.svdvals(_checked(W))[:q]
    return top_svd(W, q).sigma


def _checked(W: Tensor) -> Tensor:
    """Returns the weight on the CPU in float64."""
    exact = W.detach().to("cpu", torch.float64)
    if exact.dim() != 2 or not exact.numel() or not torch.isfinite(exact).all():
        raise LoRAError(f"`W` (={tuple(W.shape)}) must be a matrix of finite numbers, (out_features, in_features).")
    return exact


def _sha256(W: Tensor) -> str:
    raw = W.detach().to("cpu").contiguous()
    told = hashlib.sha256(f"{raw.dtype} {tuple(raw.shape)} ".encode())
    told.update(raw.view(torch.uint8).numpy().data)
    return told.hexdigest()


def _read(file: Path, W: Tensor) -> WeightSVD | None:
    """Returns the SVD in `file` if it is that of W."""
    try:
        tensors = load_file(file)
        found = WeightSVD(tensors["U"], tensors["sigma"], tensors["V"])
    except (OSError, SafetensorError, KeyError):  # not there, or damaged
        return None
    p = min(W.shape)
    shapes = [tuple(t.shape) for t in (found.U, found.sigma, found.V)]
    if shapes != [(W.shape[0], p), (p,), (W.shape[1], p)] or {t.dtype for t in tensors.values()} != {torch.float64}:
        return None
    # Any entry that is not as it was shows in the product with a random vector.
    x = torch.randn(W.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = torch.linalg.vector_norm(found.U @ (found.sigma * (found.V.T @ x)) - W @ x)
    return found if error <= 1e-10 * torch.linalg.matrix_norm(W) * torch.linalg.vector_norm(x) else None


def _write(file: Path, found: WeightSVD) -> None:
    """Puts the file in its place whole or not at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".saving-") as scratch:
            written = Path(scratch) / file.name
            save_file({"U": found.U, "sigma": found.sigma, "V": found.V}, written)
            with written.open("rb") as handle:
                os.fsync(handle.fileno())
            written.replace(file)
    except (OSError, SafetensorError) as error:
        raise LoRAError(
            f"`cache` (={str(file.parent)!r}) could not be written: {error}. Free some space, or name another folder."
        ) from error
