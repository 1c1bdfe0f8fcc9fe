"""What a pane has said, and what its engine says of itself."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core import AdapterBank, injection_of, lora_layers, method_of
from studio.panes import Pane


@dataclass(frozen=True)
class Answer:
    """What a pane has said so far.

    Attributes:
        token_ids: The new tokens, without the end token.
        done: Whether the answer has ended.
        first_token_seconds: From the question to the first token.
        tokens_per_second: After the first token; 0 before there are two.
        engine: What really computed the last token, read from the model itself.
        fingerprint: A short hash of the first logits, bit for bit.
        same_as: Places of the panes that should say something else and begin with the same logits.
    """

    token_ids: tuple[int, ...]
    done: bool
    first_token_seconds: float
    tokens_per_second: float
    engine: str
    fingerprint: str = ""
    same_as: tuple[int, ...] = ()


def describe(model: nn.Module, base: nn.Module, bank: AdapterBank | None = None, row: int = 0) -> str:
    """Returns what `model` computes at this moment, read from its layers and weights.

    Args:
        model: The model that generates.
        base: The model whose weights it shares; itself, or the one that it is a merged copy of.
        bank: The adapters that rows of `model` choose among.
        row: Which row of the bank's.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    layers = [] if bank is not None else list(lora_layers(model).values())  # to look takes a millisecond
    if bank is not None:
        chosen = bank.rows[row if len(bank.rows) > 1 else 0]
        levels = {chosen: 1.0} if isinstance(chosen, str) else chosen or {}
        running = [
            f"{name} unmerged on {bank.num_matrices(name)} matrices, strength {level:g}"
            for name, level in levels.items()
            if level
        ]
        state = " and ".join(running) or "adapter off (strength 0)"
    elif not layers and (method := method_of(model)) is not None:
        state = f"trained by {method.title}, {injection_of(model).num_trainable:,} parameters, as it was trained"
    elif not layers:
        shared = {id(p) for p in base.parameters()}
        num_changed = sum(id(p) not in shared for p in model.parameters())
        state = f"W₀ + ΔW in {num_changed} matrices, no LoRA layer" if num_changed else "no adapter"
    elif any(layer.merged for layer in layers):
        state = f"{sum(layer.merged for layer in layers)} of {len(layers)} LoRA layers merged"
    elif all(layer.strength == 0.0 for layer in layers):
        state = "adapter off (strength 0)"
    else:
        levels = " and ".join(f"{level:g}" for level in sorted({layer.strength for layer in layers}))
        state = f"adapter unmerged on {len(layers)} matrices, strength {levels}"
    return f"{state} · {dtype}"


def signs_of(
    panes: Sequence[Pane], first: dict[int, Tensor], dtype: torch.dtype
) -> dict[int, tuple[str, tuple[int, ...]]]:
    """Returns of each pane its first logits' fingerprint, and the panes that should begin otherwise and do not.

    Of models that compute alike, logits may differ by rounding: by the batch's size, merged or not.
    """
    share = max(1e-5, 2 * torch.finfo(dtype).eps)
    found = {}
    for i, mine in first.items():
        bound = share * float(mine.abs().max())
        alike = [
            j
            for j, other in first.items()
            if j != i and panes[i].terms != panes[j].terms and float((mine - other).abs().max()) <= bound
        ]
        found[i] = hashlib.sha256(mine.numpy().tobytes()).hexdigest()[:8], tuple(sorted(alike))
    return found
