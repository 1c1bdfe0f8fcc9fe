"""How the next token is chosen."""

from dataclasses import dataclass

import torch
from torch import Tensor

from core import LoRAError


@dataclass(frozen=True)
class ChatSettings:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the likeliest token; above, the logits are divided by it and a token is drawn.
        top_p: Only the likeliest tokens that together have this probability are drawn from.
        seed: Of the draw; the same for every pane.
    """

    max_new_tokens: int = 96
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise LoRAError(f"`max_new_tokens` (={self.max_new_tokens}) must be at least 1.")
        if not 0 <= self.temperature <= 5:
            raise LoRAError(f"`temperature` (={self.temperature}) must be from 0 to 5.")
        if not 0 <= self.seed < 2**63:
            raise LoRAError(f"`seed` (={self.seed}) must be at least 0 and below 2⁶³.")
        if not 0 < self.top_p <= 1:
            raise LoRAError(f"`top_p` (={self.top_p}) must be above 0 and at most 1.")


def choose(logits: Tensor, settings: ChatSettings, generator: torch.Generator) -> int:
    """Returns the next token for logits, (vocabulary)."""
    if settings.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float().cpu() / settings.temperature, dim=-1)
    ordered, ids = probabilities.sort(descending=True)
    # A token stays when those before it do not yet hold top_p; so at least one stays.
    ordered[ordered.cumsum(0) - ordered >= settings.top_p] = 0.0
    return int(ids[torch.multinomial(ordered, 1, generator=generator)])
