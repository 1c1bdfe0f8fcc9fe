"""The adapted layers: h = W0·x + strength · scaling · B·A·x, with W0 frozen; linear ones, embeddings, convolutions.

Source: Hu et al. 2021, arXiv:2106.09685, §4.1, eq. 3; for embeddings and convolutions the authors' code, loralib.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import LoRAError
from core.matrices import (
    CONVOLUTIONS,
    Factors,
    Layout,
    as_matrix,
    is_conv1d,
    matrix_form,
    matrix_shape,
)
from core.starts import draw_A, olora, pissa
from core.wrapper import Wrapper


class LoRALayer(Wrapper, ABC):
    """A frozen layer and a trainable low-rank update beside it: what all kinds of adapted layers share.

    h = W0·x + b + strength · scaling · B·A·dropout(x)

    A and B are float32 whatever the base's type, so that small updates are not lost; the product runs
    in the type of x. B starts at zero (for an embedding A does), so the layer starts equal to its base.

    Three ways to start A and B: "kaiming" and "gaussian" draw A at random. The paper draws it from a
    normal distribution (§4.1); kaiming is the authors' code instead. "pissa" (arXiv:2404.02948) and
    "olora" (arXiv:2406.01775) start from W0's own top directions, A0 and B0, and train B·A − B0·A0
    there. They take B0·A0 out of W0; here W0 stays whole and B0·A0 stands beside it, frozen: the same
    function and gradients, but equal to the base bit for bit at the start, for quantized and tied weights, too.

    With `dora` (arXiv:2402.09353) the rows of W0 + ΔW are brought to a trained length, the magnitude:
    W' = magnitude / ‖W0 + ΔW‖_row · (W0 + ΔW), the norm taken as a constant as in the paper's §4.3.
    """

    form: ClassVar[str]
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A0: Tensor | None
    lora_B0: Tensor | None
    magnitude: nn.Parameter | None

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        scaling: float,
        *,
        dropout: float = 0.0,
        init: str = "kaiming",
        dora: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Wraps `base_layer` and freezes it.

        Args:
            base_layer: The layer to adapt; kept as the same object.
            r: Rank. More than min(out_features, in_features) is a waste, but adapters of others have it.
            scaling: Factor on B·A.
            dropout: Share of x dropped before A, in training only.
            init: "kaiming", "gaussian", "pissa" or "olora".
            dora: Whether the rows' lengths are trained, too.
            generator: Source of A's random numbers, on the CPU, so that a seed gives one A on every device.

        Raises:
            LoRAError: The layer is of no kind that can be adapted, or `r` is below 1.
        """
        super().__init__()
        shape = self._shape_in(base_layer)
        if shape is None:
            raise LoRAError(
                f"`base_layer` (={type(base_layer).__name__}) must be a linear layer (nn.Linear, transformers' Conv1D, "
                "or one with in_features and out_features), an nn.Embedding or an nn.Conv1d, 2d or 3d; "
                "choose other target_modules."
            )
        self.out_features, self.in_features = shape
        if r < 1:
            raise LoRAError(f"`r` (={r}) must be at least 1.")
        self._attach(base_layer)
        base_layer.requires_grad_(False)
        self.r = r
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self._strength = 1.0
        device = next(t.device for t in (*base_layer.parameters(), *base_layer.buffers()))
        A, B = self._start(init, device, generator)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        from_base = init in ("pissa", "olora")
        self.register_buffer("lora_A0", A.clone() if from_base else None)
        self.register_buffer("lora_B0", B.clone() if from_base else None)
        self.register_parameter("magnitude", None)
        if dora:
            self.set_magnitude(self._row_norms())

    @property
    def weight(self) -> nn.Parameter:
        """The base layer's weight as it lies there: (out, in), (in, out) for Conv1D and embeddings, or a kernel."""
        return self.base_layer.get_parameter(self.weight_name)

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias, (out_features), or None."""
        bias = getattr(self.base_layer, "bias", None)
        return bias if isinstance(bias, nn.Parameter) else None

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
        """The update's factors as they stand, detached; `strength` and DoRA's magnitude are not in them.

        Started by "pissa" or "olora", the update is scaling · (B·A − B0·A0), of rank up to 2r: A on A0, B beside −B0.
        """
        return Factors(*self.pair, self.scaling, self._layout())

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B of `factors` alone: of a slice, its layout must be fetched from a GPU."""
        A, B = self.lora_A.detach(), self.lora_B.detach()
        if self.lora_A0 is not None and self.lora_B0 is not None:
            A, B = torch.cat([A, self.lora_A0]), torch.cat([B, -self.lora_B0], dim=1)
        return A, B

    def set_factors(self, factors: Factors, magnitude: Tensor | None = None) -> None:
        """Copies A, B and DoRA's magnitude in, of the shapes that the layer has; the start of "pissa" is given up.

        Args:
            factors: A (r, in_features), B (out_features, r).
            magnitude: (out_features), or None for plain LoRA.
        """
        self.lora_A0 = self.lora_B0 = None
        with torch.no_grad():
            self.lora_A.copy_(factors.A)
            self.lora_B.copy_(factors.B)
        self.magnitude = None
        if magnitude is not None:
            self.set_magnitude(magnitude)

    def set_magnitude(self, magnitude: Tensor) -> None:
        """Makes the layer one of DoRA's whose rows are trained to these lengths, (out_features)."""
        self.magnitude = nn.Parameter(magnitude.detach().clone().to(self.lora_A))

    def forward(self, x: Tensor) -> Tensor:
        """Returns h, as the base layer would for x."""
        h = self.base_layer(x)
        return h if self.merged or self._strength == 0.0 else self._adapted(x, h)

    def _adapted(self, x: Tensor, h: Tensor) -> Tensor:
        """Returns h + strength · ΔW·x for h = W0·x + b; x and h as the base layer takes and gives them."""
        x = self._dropped(x)
        update = self._product(x, self.lora_A, self.lora_B, h.dtype)
        if self.lora_A0 is not None and self.lora_B0 is not None:
            # The same operations, so that the difference starts at exactly zero.
            update = update - self._product(x, self.lora_A0, self.lora_B0, h.dtype)
        if self.magnitude is None:
            return torch.add(h, update, alpha=self._strength * self.scaling)
        gain = self._across((self.magnitude / self._row_norms()).to(h.dtype))
        from_base = h if self.bias is None else h - self._across(self.bias.to(h.dtype))
        return h + self._strength * ((gain - 1) * from_base + self.scaling * gain * update)

    def delta_weight(self) -> Tensor:
        """Returns ΔW, (out_features, in_features), float32: scaling · B·A, or with DoRA all of W' − W0."""
        delta = self.factors.delta_weight()
        if self.magnitude is None:
            return delta
        gain = (self.magnitude.detach() / self._row_norms())[:, None]
        return (gain - 1) * self.weight_matrix().to(delta.dtype) + gain * delta

    def weight_matrix(self) -> Tensor:
        """Returns W0 as a map from in to out, (out_features, in_features); dequantized where it must be."""
        return as_matrix(self.base_layer, self._W0())

    @torch.no_grad()
    def merge(self) -> None:
        """Puts W0 + strength · ΔW in the base layer's place of W0, so that it costs no latency.

        W0 itself is kept: the base layer gets a new parameter, and `unmerge` gives the old one
        back. So a weight that is shared with another module (a tied embedding) is not changed
        there. The sum is taken in float32 or better and rounded once to the weight's type. A quantized
        layer gives way to an unquantized one in bfloat16, with a warning that says so.

        For every kind of layer, merged and not, what it gives for one x differs by at most 1e-6 of its norm in
        float32, 2⁻⁹ in float16 and 2⁻⁶ in bfloat16: that is what rounding the sum, and the outputs, comes to. A base
        layer that rounds x to eight bits is coarser by itself.

        Source: Hu et al. 2021, arXiv:2106.09685, §4.1, "No Additional Inference Latency".
        """
        if self.merged:
            return
        W0 = self._W0()
        exact = torch.promote_types(W0.dtype, torch.float32)
        self._put(W0.to(exact) + self._delta_as_weight(exact).view(W0.shape))

    def extra_repr(self) -> str:
        """Returns what `print(model)` shows of this layer."""
        return f"r={self.r}, scaling={self.scaling:g}, strength={self._strength:g}, merged={self.merged}"

    # What a kind of layer has to say for itself.

    def _layout(self) -> Layout:
        return Layout()

    def _attach(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer

    def _shape_in(self, base_layer: nn.Module) -> tuple[int, int] | None:
        return matrix_shape(base_layer) if matrix_form(base_layer) == self.form else None

    @abstractmethod
    def _product(self, x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns B·A·x as the base layer would give it for a weight of B·A."""

    def _dropped(self, x: Tensor) -> Tensor:
        return self.dropout(x)

    def _as_weight(self, matrix: Tensor) -> Tensor:
        """Returns a matrix, (out_features, in_features), as the weight lies: the opposite of `as_matrix`."""
        return matrix

    def _across(self, values: Tensor) -> Tensor:
        """Returns (out_features) values so that they go with the features of what the layer gives."""
        return values

    def _delta_as_weight(self, dtype: torch.dtype) -> Tensor:
        """Returns strength · ΔW as the weight lies, in `dtype`."""
        if self.magnitude is not None:
            return self._as_weight(self._strength * self.delta_weight().to(dtype))
        f = self.factors
        return self._as_weight((self._strength * f.scaling) * (f.B.to(dtype) @ f.A.to(dtype)))

    def _start(self, init: str, device: torch.device, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Returns A and B at the start."""
        B = torch.zeros(self.out_features, self.r, device=device)
        if init in ("pissa", "olora"):
            if device.type == "meta":
                return torch.empty(self.r, self.in_features, device=device), B
            start = pissa if init == "pissa" else olora
            return start(self.weight_matrix().float(), self.r, self.scaling)
        return draw_A(self.r, self.in_features, init, device, generator), B

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """Returns ‖W0 + ΔW‖ of each row, (out_features), in the type of A, from the factors.

        ‖W + s·B·A‖² = ‖W‖² + 2s·⟨W·Aᵀ, B⟩ + s²·⟨B·(A·Aᵀ), B⟩, row by row: ΔW is not formed.
        """
        W, f = self.weight_matrix().to(self.lora_A.dtype), self.factors
        cross = ((W @ f.A.T) * f.B).sum(1)
        own = ((f.B @ (f.A @ f.A.T)) * f.B).sum(1)
        return (W.square().sum(1) + 2 * f.scaling * cross + f.scaling**2 * own).clamp_min(0).sqrt()


class LoRALinear(LoRALayer):
    """An adapted linear layer: `nn.Linear`, transformers' `Conv1D`, or one that only has in_features and out_features.

    `Conv1D` keeps its weight transposed; A and B have the same shapes for all.
    """

    form = "linear"

    @property
    def transposed(self) -> bool:
        """Whether the weight lies as (in, out)."""
        return is_conv1d(self.base_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Returns h, (…, out_features), for x, (…, in_features)."""
        return super().forward(x) if torch.is_grad_enabled() or not self._is_lean() else self._lean(x)

    def _is_lean(self) -> bool:
        """Says whether h = W0·x + b + strength · scaling · B·A·x is all that there is to do."""
        # By the modules' own tables: of a token alone, looking names up takes longer than the arithmetic.
        return (
            self._parameters["magnitude"] is None
            and self._buffers["lora_A0"] is None
            and not self._unmerged
            and self._strength != 0.0
            and not (self.training and self.dropout.p)
        )

    def _lean(self, x: Tensor) -> Tensor:
        parameters: dict[str, Any] = self._parameters
        base, A, B = self._modules["base_layer"], parameters["lora_A"], parameters["lora_B"]
        scale = self._strength * self.scaling
        rows = x.reshape(-1, x.shape[-1])
        if type(base) is nn.Linear and not (base._forward_hooks or base._forward_pre_hooks):
            h = F.linear(rows, base.weight, base.bias)
            if h.dtype == B.dtype:  # nobody else has h: the update is added in its place
                return h.addmm_(F.linear(rows, A), B.t(), alpha=scale).view(*x.shape[:-1], h.shape[-1])
        else:
            h = base(x)  # type: ignore[misc]
        low, all_rows = F.linear(rows, A.to(x.dtype)).to(h.dtype), h.reshape(-1, h.shape[-1])
        return torch.addmm(all_rows, low, B.to(h.dtype).t(), alpha=scale).view(*x.shape[:-1], h.shape[-1])

    def _layout(self) -> Layout:
        return Layout(transposed=self.transposed)

    def _product(self, x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        low = F.linear(x, A.to(x.dtype))
        return F.linear(low, B.to(low.dtype)).to(dtype)

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.transposed else matrix


class LoRAPart(LoRALinear):
    """The update of one matrix in a layer that holds several; W0 and ΔW are that matrix.

    The forward pass is that of its owner, and it merges with its neighbours only.
    """

    def __init__(self, owner: Wrapper, r: int, scaling: float, **options: Any) -> None:
        """Adapts a part of the owner's base layer; other arguments as of `LoRALayer`."""
        object.__setattr__(self, "_owner", owner)  # not a child: the part is one of the owner's
        super().__init__(owner.base_layer, r, scaling, **options)

    def _attach(self, base_layer: nn.Module) -> None:
        """Leaves the base layer with the owner."""

    @property
    def base_layer(self) -> nn.Module:  # type: ignore[override]
        """The layer that holds the matrix among others."""
        return self._owner.base_layer

    @property
    def merged(self) -> bool:
        """Whether the base weight now holds W0 + ΔW, of this part and its neighbours."""
        return self._owner.merged

    def merge(self) -> None:
        """Merges this part and its neighbours."""
        self._owner.merge()

    def unmerge(self) -> None:
        """Unmerges this part and its neighbours."""
        self._owner.unmerge()


class LoRAEmbedding(LoRALayer):
    """An adapted `nn.Embedding`: A, (r, num_embeddings), starts at zero and B, (embedding_dim, r), at random.

    As in loralib. Dropout does not apply: its input is a token's number.
    """

    form = "embedding"

    def _layout(self) -> Layout:
        return Layout("embedding")

    def _product(self, x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        embedding: Any = self.base_layer
        low = F.embedding(x, A.T.to(dtype), embedding.padding_idx)
        return F.linear(low, B.to(dtype))

    def _dropped(self, x: Tensor) -> Tensor:
        return x

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def _start(self, init: str, device: torch.device, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        if init in ("pissa", "olora"):
            return super()._start(init, device, generator)
        A = torch.zeros(self.r, self.in_features, device=device)
        if device.type == "meta":
            return A, torch.empty(self.out_features, self.r, device=device)
        return A, torch.empty(self.out_features, self.r).normal_(generator=generator).to(device)


class LoRAConv(LoRALayer):
    """An adapted `nn.Conv1d`, `2d` or `3d`: ΔW is of rank r as a matrix (out_channels, in_channels / groups · kernel).

    Without groups x goes through r kernels, A, and their outputs are mixed by B, as a 1 × 1 convolution. With groups
    ΔW is multiplied out, as it has the weight's own shape there, too; so it always merges. (loralib's matrix is of
    another shape, out · k by in · k, and fits only square kernels.)
    """

    form = "convolution"

    def _layout(self) -> Layout:
        conv: Any = self.base_layer
        return Layout("convolution", kernel=tuple(self.weight.shape[1:]), groups=conv.groups)

    def _product(self, x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        conv: Any = self.base_layer
        shape = self.weight.shape
        if conv.groups > 1:
            return conv._conv_forward(x, (B @ A).to(x.dtype).view(shape), None).to(dtype)
        low = conv._conv_forward(x, A.to(x.dtype).view(self.r, *shape[1:]), None)
        mix = B.to(low.dtype).view(self.out_features, self.r, *(1 for _ in shape[2:]))
        return CONVOLUTIONS[type(conv)](low, mix).to(dtype)

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.weight.shape)

    def _across(self, values: Tensor) -> Tensor:
        return values.view(-1, *(1 for _ in self.weight.shape[2:]))


def adapted_layer(base_layer: nn.Module, r: int, scaling: float, **options: Any) -> LoRALayer:
    """Returns `base_layer` in the LoRA layer of its kind; arguments and errors as of `LoRALayer`."""
    kind = next((k for k in (LoRAEmbedding, LoRAConv) if k.form == matrix_form(base_layer)), LoRALinear)
    return kind(base_layer, r, scaling, **options)
