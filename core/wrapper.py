"""Layers that stand in the places of others, and how a weight is merged and given back."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from core.matrices import dense_weight, plain_linear


class StandIn(nn.Module):
    """A layer in another's place; what it is asked and does not know, the other is: a model's code may want its weight.

    Attributes:
        base_layer: The other.
    """

    base_layer: nn.Module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base_layer = self.__dict__.get("_modules", {}).get("base_layer")
            if base_layer is None or name.startswith("_"):
                raise
            return getattr(base_layer, name)


class Wrapper(StandIn):
    """A layer in another's place that can put W0 + ΔW in the place of W0."""

    weight_name: str = "weight"
    """What the base layer calls W0."""

    def __init__(self) -> None:
        """Starts unmerged; the base layer is still to be set."""
        super().__init__()
        # What _put() took out: a parameter, or a whole quantized layer. Not registered, so that it
        # stays out of state_dict() and out of the optimizer.
        self._unmerged: tuple[nn.Parameter | nn.Module, ...] = ()

    @property
    def merged(self) -> bool:
        """Whether the base weight now holds W0 + ΔW."""
        return bool(self._unmerged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives the base layer its own W0 back, bit for bit, as the same object."""
        if not self.merged:
            return
        (original,) = self._unmerged
        if isinstance(original, nn.Module):
            self.base_layer = original
        else:
            now = self.base_layer.get_parameter(self.weight_name)
            if original.device != now.device or original.dtype != now.dtype:  # the model was moved meanwhile
                original.data = original.data.to(device=now.device, dtype=now.dtype)
            self.base_layer.register_parameter(self.weight_name, original)
        self._unmerged = ()

    def _W0(self) -> Tensor:
        """Returns W0 as it lies, merged or not, in a floating type."""
        original = self._unmerged[0] if self.merged else self.base_layer
        return dense_weight(original) if isinstance(original, nn.Module) else original.detach()

    def _put(self, total: Tensor) -> None:
        """Puts `total` in the place of W0, rounded to its type; what stood there is kept."""
        base_layer = self.base_layer
        weight = nn.Parameter(total.to(self._W0().dtype), requires_grad=False)
        original: Any = getattr(base_layer, self.weight_name, None)
        if isinstance(original, nn.Parameter) and original.is_floating_point():
            base_layer.register_parameter(self.weight_name, weight)
            self._unmerged = (original,)
            return
        warnings.warn(
            f"A {type(base_layer).__name__} is merged in {str(weight.dtype).removeprefix('torch.')}, not quantized: "
            "quantizing W0 + ΔW again would change the function. unmerge gives the quantized layer back.",
            stacklevel=3,
        )
        self.base_layer = plain_linear(base_layer, weight)
        self._unmerged = (base_layer,)
