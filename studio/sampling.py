"""How the next token is chosen."""

from dataclasses import dataclass

import torch
from torch import Tensor

from core import Config, setting


@dataclass(frozen=True)
class ChatSettings(Config):
    """How tokens are chosen.

    Raises:
        LoRAError: A setting is out of range.
    """

    max_new_tokens: int = setting(
        96,
        "Longest answer (tokens)",
        "Answers are cut off there; usually 32 to 512. 96 tokens are some 70 words.",
        minimum=1,
    )
    temperature: float = setting(
        0.0,
        "Temperature",
        "How freely tokens are drawn. 0: always the likeliest. 0.7 to 1 is usual; far above, it rambles.",
        minimum=0,
        maximum=5,
    )
    top_p: float = setting(
        0.95,
        "Top p",
        "Draws from the likeliest tokens that together have this probability; 0.9 to 1 is usual. Used above "
        "temperature 0.",
        above=0,
        maximum=1,
        why="Nucleus sampling, arXiv:1904.09751",
    )
    seed: int = setting(
        0,
        "Seed",
        "The same for all panes. Any whole number from 0; another draws other answers, above temperature 0.",
        minimum=0,
        maximum=2**63 - 1,
    )


def choose(logits: Tensor, settings: ChatSettings, generator: torch.Generator) -> int:
    """Returns the next token for logits, (vocabulary)."""
    if settings.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float().cpu() / settings.temperature, dim=-1)
    ordered, ids = probabilities.sort(descending=True)
    # A token stays when those before it do not yet hold top_p; so at least one stays.
    ordered[ordered.cumsum(0) - ordered >= settings.top_p] = 0.0
    return int(ids[torch.multinomial(ordered, 1, generator=generator)])
