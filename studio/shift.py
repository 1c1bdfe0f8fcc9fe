"""Where an adapted model and its base see the same text differently, token by token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_SCORED = 2048
"""Longest text that is scored, in tokens: its logits are held."""


@dataclass(frozen=True)
class Shift:
    """How a pane and the base see the same text, for each scored token.

    Attributes:
        token_ids: The tokens.
        kl: KL(pane ‖ base) of the next-token distributions before each, in nats.
        log_probs: Of the token by the pane, and by the base.
        top: The likeliest tokens by the pane, and by the base: (id, probability).
    """

    token_ids: tuple[int, ...]
    kl: tuple[float, ...]
    log_probs: tuple[tuple[float, float], ...]
    top: tuple[tuple[tuple[tuple[int, float], ...], tuple[tuple[int, float], ...]], ...]


def compare(mine: Tensor, base: Tensor, token_ids: list[int], top: int = 5) -> Shift:
    """Returns the shift from the logits before each token, (seq, vocabulary), by a pane and by the base."""
    kl: list[float] = []
    log_probs: list[tuple[float, float]] = []
    tops: list[Any] = []
    for start in range(0, len(token_ids), 64):  # float32 of so many rows of the vocabulary at a time
        p, q = (torch.log_softmax(logits[start : start + 64].float(), dim=-1) for logits in (mine, base))
        kl += (p.exp() * (p - q)).sum(-1).clamp_min(0).tolist()
        ids = torch.tensor(token_ids[start : start + 64], device=p.device)[:, None]
        log_probs += zip(*(d.gather(1, ids)[:, 0].tolist() for d in (p, q)), strict=True)
        tops += zip(*(_likeliest(d, top) for d in (p, q)), strict=True)
    return Shift(tuple(token_ids), tuple(kl), tuple(log_probs), tuple(tops))


def _likeliest(log_probs: Tensor, num: int) -> list[tuple[tuple[int, float], ...]]:
    values, ids = log_probs.topk(min(num, log_probs.shape[-1]), dim=-1)
    return [tuple(zip(i, p, strict=True)) for i, p in zip(ids.tolist(), values.exp().tolist(), strict=True)]
