"""All that is trained in one piece of memory: one AdamW step, one norm, one clip, whatever the number of matrices."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_ALIGNMENT = 16
"""Every parameter begins at a multiple of so many entries, as it would in memory of its own."""

MOMENTS = ("exp_avg", "exp_avg_sq")


class Flat:
    """Parameters as views of one buffer, and their gradients as views of another.

    A backward pass adds to the gradients where they lie, so they are there from the start and zero at first: of what
    a loss does not reach the gradient is zero, as it is in mathematics.

    Attributes:
        values: The buffer, (entries and what lies between them); what an optimizer takes.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Moves the parameters, of one type and on one device, into a buffer; they stay the same objects."""
        self._parameters = list(parameters)
        first = self._parameters[0]
        self._starts, size = {}, 0
        for p in self._parameters:
            self._starts[p] = size
            size += -(-p.numel() // _ALIGNMENT) * _ALIGNMENT
        self.values = nn.Parameter(torch.zeros(size, dtype=first.dtype, device=first.device))
        self.values.grad = torch.zeros_like(self.values)
        for p in self._parameters:
            place = self.view(self.values.detach(), p)
            place.copy_(p.detach())
            p.data = place
            p.grad = self.view(self.values.grad, p)

    def view(self, buffer: Tensor, p: nn.Parameter) -> Tensor:
        """Returns the part of a buffer like `values` that is a parameter's, in its shape."""
        return buffer[self._starts[p] :][: p.numel()].view(p.shape)

    def release(self) -> None:
        """Ends it: the parameters have no gradients any more; their values stay where they are."""
        for p in self._parameters:
            p.grad = None
        self.values.grad = None

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Returns AdamW's state of each parameter, as if it had been trained alone; empty before the first step."""
        state = optimizer.state.get(self.values)
        if not state:
            return {}
        return {
            p: {"step": state["step"], **{name: self.view(state[name], p) for name in MOMENTS}}
            for p in self._parameters
        }

    def set_moments(
        self, optimizer: torch.optim.Optimizer, moments: Mapping[nn.Parameter, Mapping[str, Tensor]]
    ) -> None:
        """Puts back what `moments` gave."""
        own = {p: moments[p] for p in self._parameters if p in moments}
        if not own:
            return
        state: dict[str, Any] = {name: torch.zeros_like(self.values) for name in MOMENTS}
        for p, of in own.items():
            for name in MOMENTS:
                self.view(state[name], p).copy_(of[name])
        step = next(iter(own.values()))["step"]
        is_fused = optimizer.param_groups[0].get("fused")
        state["step"] = step.to(self.values.device if is_fused else "cpu", torch.float32, copy=True)
        optimizer.state[self.values] = state
