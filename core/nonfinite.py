"""Where a number that is not finite comes from: asked once, after training has met one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_in_weights(model: nn.Module) -> str:
    """Returns the name of the first trained parameter that holds NaN or infinity, or ""."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return next((name for name, p in trained if not torch.isfinite(p).all()), "")


def first_in_gradients(model: nn.Module) -> str:
    """Returns the name of the first parameter whose gradient holds NaN or infinity, or ""."""
    gradients = ((name, p.grad) for name, p in model.named_parameters())
    return next((name for name, g in gradients if g is not None and not torch.isfinite(g).all()), "")


def longest_in_gradients(model: nn.Module) -> str:
    """Returns the name of the parameter with the longest gradient, or ""."""
    lengths = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    return max(lengths, key=lengths.__getitem__, default="")


@torch.no_grad()
def first_in_forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """Returns the path of the first module to give NaN or infinity for `inputs`, the innermost one, or ""."""
    found: list[str] = []

    def look(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not found and _holds_non_finite(output):
                found.append(path)

        return hook

    handles = [module.register_forward_hook(look(path)) for path, module in model.named_modules() if path]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _holds_non_finite(output: Any) -> bool:
    if isinstance(output, Tensor):
        return output.is_floating_point() and not bool(torch.isfinite(output).all())
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return any(_holds_non_finite(part) for part in parts)
