"""How A and B start: at random, or from W0's own directions."""

import math

import torch
from torch import Tensor


def draw_A(r: int, in_features: int, init: str, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Returns A, (r, in_features), drawn on the CPU: "gaussian" as the paper says (§4.1), "kaiming" as loralib does."""
    if device.type == "meta":
        return torch.empty(r, in_features, device=device)
    A = torch.empty(r, in_features)
    if init == "gaussian":
        A.normal_(0.0, 1 / math.sqrt(r), generator=generator)
    else:  # kaiming_uniform_ with a = √5, as in loralib: uniform within ±1/√in_features
        bound = 1 / math.sqrt(in_features)
        A.uniform_(-bound, bound, generator=generator)
    return A.to(device)


def pissa(W: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns A and B of the top r singular directions of W, split evenly (arXiv:2404.02948, eq. 2 and 3)."""
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (sigma[:r] / scaling).sqrt()
    return (root[:, None] * Vh[:r]).contiguous(), (U[:, :r] * root).contiguous()


def olora(W: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns A and B as the first r rows of R and columns of Q, W = Q·R (arXiv:2406.01775, alg. 1)."""
    Q, R = torch.linalg.qr(W)
    return R[:r].contiguous(), Q[:, :r].contiguous()
