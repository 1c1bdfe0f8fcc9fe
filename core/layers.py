"""The adapted layer: h = W0·x + strength · scaling · B·A·x, with W0 frozen.

Source: Hu et al. 2021, arXiv:2106.09685, §4.1, eq. 3.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from core.errors import LoRAError


@dataclass(frozen=True)
class Factors:
    """ΔW = scaling · B·A of one matrix, never multiplied out.

    Attributes:
        A: (r, in_features)
        B: (out_features, r)
        scaling: alpha / r, or alpha / √r for rsLoRA.
    """

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def r(self) -> int:
        """The rank that the factors allow: the rows of A."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    def delta_weight(self) -> Tensor:
        """Returns ΔW = scaling · B·A, (out_features, in_features), in the factors' type."""
        return self.scaling * (self.B @ self.A)


def is_conv1d(module: nn.Module) -> bool:
    """Says whether `module` is the `Conv1D` of GPT-2: a linear layer whose weight is (in, out)."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(getattr(module, "nf", None), int)
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and weight.shape[1] == module.nf
    )


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """Returns (out_features, in_features) when LoRA can adapt `module`, else None."""
    if is_conv1d(module):
        in_features, out_features = module.get_parameter("weight").shape
        return out_features, in_features
    # nn.MultiheadAttention's out_proj: torch reads its weight past the module, so a wrapper would have no effect.
    if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear):
        return module.out_features, module.in_features
    return None


class LoRALinear(nn.Module):
    """A frozen linear layer and a trainable low-rank update beside it.

    h = W0·x + b + strength · scaling · B·A·dropout(x)

    `base_layer` is an `nn.Linear` or a transformers `Conv1D`, whose weight lies transposed; A and B
    have the same shapes for both. A and B are float32 whatever the base's type, so that small
    updates are not lost; the product runs in the type of x.

    The paper draws A from a normal distribution (§4.1); `init="kaiming"` is the authors' code
    instead. B starts at zero in both, so the layer starts equal to its base.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        scaling: float,
        *,
        dropout: float = 0.0,
        init: str = "kaiming",
        generator: torch.Generator | None = None,
    ) -> None:
        """Wraps `base_layer` and freezes it.

        Args:
            base_layer: The layer to adapt; kept as the same object.
            r: Rank. More than min(out_features, in_features) is a waste, but adapters of others have it.
            scaling: Factor on B·A.
            dropout: Share of x dropped before A, in training only.
            init: "kaiming" or "gaussian".
            generator: Source of A's random numbers, on the CPU, so that a seed gives one A on every device.

        Raises:
            LoRAError: The layer is of no kind that can be adapted, or `r` is below 1.
        """
        super().__init__()
        shape = matrix_shape(base_layer)
        if shape is None:
            raise LoRAError(
                f"`base_layer` (={type(base_layer).__name__}) must be nn.Linear or transformers' Conv1D; "
                "choose other target_modules."
            )
        self.out_features, self.in_features = shape
        if r < 1:
            raise LoRAError(f"`r` (={r}) must be at least 1.")
        self.base_layer = base_layer
        self.base_layer.requires_grad_(False)
        self.transposed = is_conv1d(base_layer)
        self.r = r
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self._strength = 1.0
        # The parameter object that merge() took out; not a registered one, so that it stays out of
        # state_dict() and out of the optimizer.
        self._unmerged: tuple[nn.Parameter, ...] = ()
        device = self.weight.device
        self.lora_A = nn.Parameter(_draw_A(r, self.in_features, init, device, generator))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))

    @property
    def weight(self) -> nn.Parameter:
        """The base layer's weight as it lies there: (out, in), or (in, out) for Conv1D."""
        return self.base_layer.get_parameter("weight")

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias, (out_features), or None."""
        bias = self.base_layer.bias
        return bias if isinstance(bias, nn.Parameter) else None

    @property
    def merged(self) -> bool:
        """Whether the base weight now holds W0 + ΔW."""
        return bool(self._unmerged)

    @property
    def strength(self) -> float:
        """Factor on ΔW at use: 1 as trained, 0 the base model, 2 twice as loud, below 0 the opposite."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        if self.merged and value != self._strength:
            raise LoRAError(f"`strength` (={value}) must not change while the layer is merged; call unmerge first.")
        if not math.isfinite(value):
            raise LoRAError(f"`strength` (={value}) must be a finite number.")
        self._strength = float(value)

    @property
    def factors(self) -> Factors:
        """A, B and scaling as they stand, detached; `strength` is not in them."""
        return Factors(self.lora_A.detach(), self.lora_B.detach(), self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """Returns h, (…, out_features), for x, (…, in_features)."""
        h = self.base_layer(x)
        if self.merged or self._strength == 0.0:
            return h
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))
        return torch.add(h, F.linear(low, self.lora_B.to(low.dtype)), alpha=self._strength * self.scaling)

    def delta_weight(self) -> Tensor:
        """Returns ΔW = scaling · B·A, (out_features, in_features), float32."""
        return self.factors.delta_weight()

    @torch.no_grad()
    def merge(self) -> None:
        """Puts W0 + strength · ΔW in the base layer's place of W0, so that it costs no latency.

        W0 itself is kept: the base layer gets a new parameter, and `unmerge` gives the old one
        back. So a weight that is shared with another module (a tied embedding) is not changed
        there. The sum is taken in float32 or better and rounded once to the weight's type.

        Source: Hu et al. 2021, arXiv:2106.09685, §4.1, "No Additional Inference Latency".
        """
        if self.merged:
            return
        original = self.weight
        exact = torch.promote_types(original.dtype, torch.float32)
        delta = (self._strength * self.scaling) * (self.lora_B.to(exact) @ self.lora_A.to(exact))
        total = original.to(exact) + (delta.T if self.transposed else delta)
        self.base_layer.register_parameter("weight", nn.Parameter(total.to(original.dtype), requires_grad=False))
        self._unmerged = (original,)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives the base layer its own W0 back, bit for bit, as the same object."""
        if not self.merged:
            return
        (original,) = self._unmerged
        now = self.weight
        if original.device != now.device or original.dtype != now.dtype:  # the model was moved meanwhile
            original.data = original.data.to(device=now.device, dtype=now.dtype)
        self.base_layer.register_parameter("weight", original)
        self._unmerged = ()

    def extra_repr(self) -> str:
        """Returns what `print(model)` shows of this layer."""
        return f"r={self.r}, scaling={self.scaling:g}, strength={self._strength:g}, merged={self.merged}"


def _draw_A(r: int, in_features: int, init: str, device: torch.device, generator: torch.Generator | None) -> Tensor:
    if device.type == "meta":
        return torch.empty(r, in_features, device=device)
    A = torch.empty(r, in_features)
    if init == "gaussian":
        A.normal_(0.0, 1 / math.sqrt(r), generator=generator)
    else:  # kaiming_uniform_ with a = √5, as in loralib: uniform within ±1/√in_features
        bound = 1 / math.sqrt(in_features)
        A.uniform_(-bound, bound, generator=generator)
    return A.to(device)
