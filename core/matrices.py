"""The matrix in a layer: which layers have one that LoRA can adapt, how it lies there, and low-rank updates of it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


@dataclass(frozen=True)
class Layout:
    """How the matrix of some `Factors` lies in its layer: needed to write them to a file, not to compute with them.

    Attributes:
        form: "linear", "embedding", "convolution", "slice" of a fused projection, or "expert" out of a stack.
        kernel: Of a convolution, its kernel without the output channels: (in_channels / groups, k, …).
        groups: Of a convolution, into how many its channels are divided.
        rows: Of a slice, (num_rows) int64, its output features in the whole projection.
        num_rows: Of a slice, the output features of the whole projection.
        transposed: Whether the layer is a `Conv1D`, whose weight lies as (in, out); PEFT's files say so, too.
        num_experts: Of an expert, how many lie in its stack.
        place: Of an expert, the place of its stack among the parameters of the module.
    """

    form: str = "linear"
    kernel: tuple[int, ...] = ()
    groups: int = 1
    rows: Tensor | None = None
    num_rows: int = 0
    transposed: bool = False
    num_experts: int = 0
    place: int = 0


@dataclass(frozen=True)
class Factors:
    """ΔW = scaling · B·A of one matrix, never multiplied out.

    Attributes:
        A: (r, in_features)
        B: (out_features, r)
        scaling: alpha / r, or alpha / √r for rsLoRA.
        layout: How the matrix lies in its layer.
    """

    A: Tensor
    B: Tensor
    scaling: float
    layout: Layout = Layout()

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


def matrix_form(module: nn.Module) -> str | None:
    """Returns what kind of layer LoRA can adapt `module` as: "linear", "embedding", "convolution", or None."""
    if type(module) in CONVOLUTIONS:
        return "convolution"
    if isinstance(module, nn.Embedding):
        # A subclass may do more than look up, and max_norm changes the weight on the way.
        plain = type(module).forward is nn.Embedding.forward and module.max_norm is None
        return "embedding" if plain else None
    return "linear" if matrix_shape(module) is not None else None


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """Returns (out_features, in_features) of the matrix that LoRA can adapt in `module`, else None.

    An embedding maps a token's number to its vector: (embedding_dim, num_embeddings). A convolution's
    kernel lies as a matrix, (out_channels, in_channels / groups · kernel size).
    """
    if is_conv1d(module):
        in_features, out_features = module.get_parameter("weight").shape
        return out_features, in_features
    if type(module) in CONVOLUTIONS:
        weight = module.get_parameter("weight")
        return weight.shape[0], weight[0].numel()
    if isinstance(module, nn.Embedding):
        return (module.embedding_dim, module.num_embeddings) if matrix_form(module) else None
    # nn.MultiheadAttention's out_proj: torch reads its weight past the module, so a wrapper would have no effect.
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    out_features, in_features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(out_features, int) and isinstance(in_features, int) and not list(module.children()):
        return out_features, in_features  # nn.Linear, or what computes like one, such as a quantized one
    return None


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Returns a weight of `module`, as it lies there, as a map from in to out, (out_features, in_features)."""
    if is_conv1d(module) or matrix_form(module) == "embedding":
        return weight.T
    return weight.flatten(1)


@torch.no_grad()
def dense_weight(base_layer: nn.Module) -> Tensor:
    """Returns the weight of a layer as it lies there, in a floating type.

    Of a quantized layer, whose packed form is its own affair, it is what the layer makes of the unit
    vectors: exactly the matrix that it computes with, (out_features, in_features), in bfloat16.
    """
    weight: Any = getattr(base_layer, "weight", None)
    shape = matrix_shape(base_layer)
    size = shape[0] * shape[1] if shape else 0
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.numel() == size:
        return weight.detach()
    in_features = shape[1] if shape else 0
    device = next(t.device for t in (*base_layer.parameters(), *base_layer.buffers()))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    bias: Any = getattr(base_layer, "bias", None)
    columns = []
    for start in range(0, in_features, 1024):
        width = min(1024, in_features - start)
        units = torch.zeros(width, in_features, device=device, dtype=dtype)
        units[torch.arange(width), start + torch.arange(width)] = 1.0
        column = base_layer(units).float()
        columns.append((column if bias is None else column - bias.float()).to(torch.bfloat16))
    return torch.cat(columns).T.contiguous()


def plain_linear(base_layer: nn.Module, weight: nn.Parameter) -> nn.Linear:
    """Returns an unquantized layer of this weight, (out, in), and the base layer's bias."""
    out_features, in_features = weight.shape
    with torch.device("meta"):
        layer = nn.Linear(in_features, out_features, bias=False, dtype=weight.dtype)
    layer.weight = weight
    bias = getattr(base_layer, "bias", None)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return layer.train(base_layer.training)
