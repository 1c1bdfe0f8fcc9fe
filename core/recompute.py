"""Activation checkpointing on a CPU: a block keeps its input alone, and is passed again in the backward pass.

Chen et al. 2016, arXiv:1604.06174. torch's own builds the graph of the first pass, too, and keeps its nodes: hundreds
of small objects that settle in what is left over at the sides of aligned tensors. When those tensors are gone, no two
of their places become one, and none does for the next tensor of its size; so what checkpointing saves was lost again
in holes of the heap, more with every block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from core.attention import Segments


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Returns function(*args), of whose activations none is kept: what transformers calls a checkpointing function.

    torch's own does it where the pass may depend on a gradient, or leave behind something, that only its graph tells
    of; on other devices than a CPU, which have no such heap; while it is compiled; and under autocast.

    Args:
        function: `partial(forward, block, **settings)`, as transformers gives it; of another, nothing is assumed.
        args: The hidden states, (batch, seq, features), and what else the block takes.
    """
    block = function.args[0] if isinstance(function, partial) and len(function.args) == 1 else None
    if (
        not isinstance(function, partial)
        or not isinstance(block, nn.Module)
        or not args
        or not isinstance(args[0], Tensor)
        or args[0].device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or not all(map(_is_constant, (*args[1:], *function.keywords.values())))
    ):
        return checkpoint(function, *args, use_reentrant=False)
    trained = [p for p in block.parameters() if p.requires_grad]
    return _Recomputed.apply(lambda hidden: function(hidden, *args[1:]), args[0], *trained)


def _is_constant(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.requires_grad
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, Segments))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Any], hidden: Tensor, *trained: Tensor) -> Any:
        ctx.run, ctx.random = run, torch.get_rng_state()
        ctx.save_for_backward(hidden, *trained)
        room = torch.empty_like(hidden)  # first, so that what stays lies together, below all that goes
        found = run(hidden)
        if isinstance(found, Tensor) and (found.shape, found.dtype) == (room.shape, room.dtype):
            return room.copy_(found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # type: ignore[override]
        hidden, *trained = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[1])
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.random)
            found = ctx.run(hidden)
            found = found if isinstance(found, tuple) else (found,)
        pairs = [(y, g) for y, g in zip(found, gradients, strict=True) if isinstance(y, Tensor) and y.requires_grad]
        outputs, given = [y for y, _ in pairs], [g for _, g in pairs]
        wanted = [x for x in (hidden, *trained) if x.requires_grad]
        by = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True) if outputs else ())
        return None, *(next(by, None) if x.requires_grad else None for x in (hidden, *trained))
