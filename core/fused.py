"""Slices of fused projections as targets of their own: `c_attn.q` is the query's part of GPT-2's `c_attn`.

The paper adapts W_q and W_v of GPT-2, whose query, key and value lie in one matrix; loralib has MergedLinear for it.
A slice is a set of output features; its A and B are those of a matrix of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import LoRAError
from core.layers import LoRAPart
from core.matrices import Layout, as_matrix, matrix_form, matrix_shape
from core.wrapper import Wrapper

Parts = dict[str, Tensor]


class LoRAFused(Wrapper):
    """A frozen fused projection with low-rank updates of some of its slices, each a `LoRASlice` by its own name."""

    def __init__(self, base_layer: nn.Module) -> None:
        """Takes a linear layer in; `add` puts the slices on it."""
        super().__init__()
        self.base_layer = base_layer
        self.base_layer.requires_grad_(False)

    def add(self, name: str, rows: Tensor, r: int, scaling: float, **options: Any) -> None:
        """Adapts the output features `rows`, (num_rows) int64, as slice `name`; other arguments as of `LoRALayer`."""
        self.add_module(name, LoRASlice(self, rows, r, scaling, **options))

    @property
    def slices(self) -> list["LoRASlice"]:
        """The adapted slices, in the order in which they were added."""
        return [module for module in self.children() if isinstance(module, LoRASlice)]

    def forward(self, x: Tensor) -> Tensor:
        """Returns h, (…, out_features), for x, (…, in_features)."""
        h = self.base_layer(x)
        active = [] if self.merged else [part for part in self.slices if part.strength != 0.0]
        if not active:
            return h
        out = h.clone()
        for part in active:
            out.index_copy_(-1, part.rows, part._adapted(x, h.index_select(-1, part.rows)))
        return out

    @torch.no_grad()
    def merge(self) -> None:
        """Merges all slices at once, as `LoRALayer.merge` does one matrix."""
        if self.merged:
            return
        W0 = self._W0()
        exact = torch.promote_types(W0.dtype, torch.float32)
        total = W0.to(exact, copy=True)
        for part in self.slices:
            as_matrix(self.base_layer, total).index_add_(0, part.rows, part._delta_as_weight(exact))
        self._put(total)


class LoRASlice(LoRAPart):
    """The update of one slice: ΔW is (num_rows, in_features) and W0 those rows.

    Attributes:
        rows: (num_rows), the output features that are this slice's.
    """

    rows: Tensor

    def __init__(self, owner: LoRAFused, rows: Tensor, r: int, scaling: float, **options: Any) -> None:
        """Adapts `rows` of the owner's base layer; other arguments as of `LoRALayer`."""
        self._new_rows = (rows,)
        super().__init__(owner, r, scaling, **options)

    def _attach(self, base_layer: nn.Module) -> None:
        device = next(t.device for t in (*base_layer.parameters(), *base_layer.buffers()))
        self.register_buffer("rows", self._new_rows[0].to(device), persistent=False)
        del self._new_rows

    def _shape_in(self, base_layer: nn.Module) -> tuple[int, int] | None:
        shape = matrix_shape(base_layer)
        return None if shape is None else (len(self._new_rows[0]), shape[1])

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The base layer's bias at the slice's rows, or None."""
        bias = getattr(self.base_layer, "bias", None)
        return bias[self.rows] if isinstance(bias, Tensor) else None

    def weight_matrix(self) -> Tensor:
        """Returns the rows of W0 that are the slice's, (num_rows, in_features)."""
        return as_matrix(self.base_layer, self._owner._W0()).index_select(0, self.rows)

    @torch.no_grad()
    def whole_row_norms(self) -> Tensor:
        """Returns ‖W0‖ of each row of the whole projection, (out_features), in the type of A."""
        return as_matrix(self.base_layer, self._owner._W0()).to(self.lora_A.dtype).square().sum(1).sqrt()

    def _layout(self) -> Layout:
        whole = matrix_shape(self.base_layer)
        return Layout("slice", rows=self.rows.cpu(), num_rows=whole[0] if whole else 0, transposed=self.transposed)

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix


def parts_of(module: nn.Module, name: str, parent: nn.Module) -> Parts:
    """Returns name → rows of the slices that people know in a fused projection; empty where none are known.

    Args:
        module: The projection.
        name: What its parent calls it: c_attn, qkv_proj, gate_up_proj, query_key_value, Wqkv or Wi.
        parent: The module that splits its output; it knows the number of heads.

    How each family lays them out: GPT-2, Phi-3 and ModernBERT one after the other; GPT-NeoX, BLOOM and Falcon head
    by head, each head's query, key and value together (Falcon's later ones a group of queries with its key and value).
    """
    finder = _FUSED.get(name)
    shape = matrix_shape(module)
    if finder is None or shape is None or matrix_form(module) != "linear":
        return {}
    try:
        return finder(shape, parent)
    except (AttributeError, TypeError, RuntimeError):  # another family's module of the same name
        return {}


def rows_of(module: nn.Module, name: str, parent: nn.Module, part: str) -> Tensor:
    """Returns the rows of one slice, (num_rows) int64.

    Raises:
        LoRAError: There is no such slice.
    """
    parts = parts_of(module, name, parent)
    if part not in parts:
        raise LoRAError(f"`target_modules` (={name}.{part}) must be a slice of {name}; it has {', '.join(parts)}.")
    return parts[part]


def _in_a_row(**sizes: int) -> Parts:
    bounds = torch.tensor([0, *sizes.values()]).cumsum(0).tolist()
    return {name: torch.arange(a, b) for name, a, b in zip(sizes, bounds, bounds[1:], strict=False)}


def _by_head(num_rows: int, num_heads: int, queries: int = 1) -> Parts:
    """Each head's rows together: `queries` times a head's size of query, then key, then value."""
    rows = torch.arange(num_rows).view(num_heads, queries + 2, -1)
    return {"q": rows[:, :-2].flatten(), "k": rows[:, -2].flatten(), "v": rows[:, -1].flatten()}


def _c_attn(shape: tuple[int, int], _: nn.Module) -> Parts:
    out, width = shape
    if out == 2 * width:  # attention to another sequence: the query is a matrix of its own
        return _in_a_row(k=width, v=width)
    return _in_a_row(q=width, k=width, v=width) if out == 3 * width else {}


def _qkv_proj(shape: tuple[int, int], parent: Any) -> Parts:
    queries = parent.config.num_attention_heads * parent.head_dim
    keys, odd = divmod(shape[0] - queries, 2)
    return {} if odd or keys <= 0 else _in_a_row(q=queries, k=keys, v=keys)


def _query_key_value(shape: tuple[int, int], parent: Any) -> Parts:
    out = shape[0]
    num_heads = getattr(parent, "num_heads", None) or parent.config.num_attention_heads
    if getattr(parent, "new_decoder_architecture", False):
        return _by_head(out, parent.num_kv_heads, parent.num_heads // parent.num_kv_heads)
    if getattr(parent, "multi_query", False):
        size = out // (num_heads + 2)
        return _in_a_row(q=num_heads * size, k=size, v=size)
    return _by_head(out, num_heads)


def _equal(*names: str) -> Callable[[tuple[int, int], nn.Module], Parts]:
    def find(shape: tuple[int, int], _: nn.Module) -> Parts:
        size, odd = divmod(shape[0], len(names))
        return {} if odd else _in_a_row(**dict.fromkeys(names, size))

    return find


_FUSED: dict[str, Callable[[tuple[int, int], Any], Parts]] = {
    "c_attn": _c_attn,
    "qkv_proj": _qkv_proj,
    "gate_up_proj": _equal("gate", "up"),
    "query_key_value": _query_key_value,
    "Wqkv": _equal("q", "k", "v"),
    "Wi": _equal("input", "gate"),
}
FUSED_NAMES = frozenset(_FUSED)
"""What models call the projections whose slices are known."""
