"""Causal attention for training: only the pairs of tokens that may see each other, and rows without padding.

softmax(scaling · Q·Kᵀ)·V, of which neither the scores nor the softmax outlive their block (Dao et al. 2022,
arXiv:2205.14135, without its tiles over the keys: a row of scores fits the cache of a CPU).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

BLOCK = 64
"""Queries at a time."""


class Segments:
    """Rows of different lengths that lie one after the other in one row, and must not see each other.

    Attributes:
        num_tokens: Of all together.
        longest: Tokens of the longest.
        bounds: (rows + 1) int32, where each begins, and the end.
    """

    def __init__(self, lengths: Tensor, device: torch.device | None = None) -> None:
        """Takes the rows' lengths, (rows) int64, each at least 1; on the CPU, so that no device is waited for.

        Args:
            lengths: Of the rows.
            device: Where the rows lie; None: beside `lengths`.
        """
        self.num_tokens, self.longest = int(lengths.sum()), int(lengths.max())
        places = torch.arange(self.longest, device=lengths.device)
        bounds = F.pad(lengths.cumsum(0), (1, 0))
        self._shape = (len(lengths), self.longest)
        # A place beyond a row's end is filled by another token: it comes later than all that could see it.
        filled = (bounds[:-1, None] + places).clamp_max_(self.num_tokens - 1).flatten()
        tokens = (places < lengths[:, None]).flatten().nonzero()[:, 0]
        self._filled, self._tokens = (t.to(device or t.device, non_blocking=True) for t in (filled, tokens))
        self.bounds = bounds.to(device or bounds.device, torch.int32, non_blocking=True)

    def apart(self, x: Tensor) -> Tensor:
        """Returns (1, heads, num_tokens, d) as (rows, heads, longest, d)."""
        return x[0].transpose(0, 1)[self._filled].unflatten(0, self._shape).transpose(1, 2)

    def together(self, x: Tensor) -> Tensor:
        """Returns (rows, heads, longest, d) as (1, heads, num_tokens, d)."""
        return x.transpose(1, 2).flatten(0, 1)[self._tokens].transpose(0, 1).unsqueeze(0)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float, segments: Segments | None = None) -> Tensor:
    """Returns each head's attention of every token to itself and those before it, like q.

    Args:
        q: (batch, heads, seq, d).
        k: (batch, key-value heads, seq, d); each serves heads / key-value heads of q's, one after the other.
        v: Like k.
        scaling: Factor on Q·Kᵀ.
        segments: Of a batch of one, the rows that lie in it.
    """
    if q.device.type == "cpu":
        return _CausalAttention.apply(q, k, v, scaling, segments)
    grouped = q.shape[1] != k.shape[1]
    if segments is not None and q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        rows = (x[0].transpose(0, 1) for x in (q, k, v))
        lengths = segments.bounds, segments.bounds, segments.longest, segments.longest
        o = varlen_attn(*rows, *lengths, scale=scaling, window_size=(-1, 0), enable_gqa=grouped)
        assert isinstance(o, Tensor)
        return o.transpose(0, 1).unsqueeze(0)
    parts = (q, k, v) if segments is None else (segments.apart(q), segments.apart(k), segments.apart(v))
    o = F.scaled_dot_product_attention(*parts, is_causal=True, scale=scaling, enable_gqa=grouped)
    return o if segments is None else segments.together(o)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, segments: Segments | None) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scaling, ctx.segments = scaling, segments
        heads = _Heads.of(q, k, v, segments)
        o = heads.empty()
        for block in heads.blocks(scaling):
            heads.put(o, block, torch.bmm(block.p, heads.v[:, : block.end]))
        return _whole(o.flatten(2, 3), segments)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        heads = _Heads.of(q, k, v, ctx.segments)
        do = (do if ctx.segments is None else _zero_filled(ctx.segments, do)).unflatten(1, heads.q.shape[1:3])
        dq, dk, dv = heads.empty(), torch.zeros_like(heads.k), torch.zeros_like(heads.v)
        for block in heads.blocks(ctx.scaling):
            own = heads.take(do, block)
            dv[:, : block.end].baddbmm_(block.p.mT, own)
            dp = torch.bmm(own, heads.v[:, : block.end].mT)
            ds = torch.ops.aten._softmax_backward_data(dp, block.p, -1, dp.dtype)
            heads.put(dq, block, torch.bmm(ds, heads.k[:, : block.end]).mul_(ctx.scaling))
            dk[:, : block.end].baddbmm_(ds.mT, block.q)
        shape = (heads.q.shape[0], -1, *heads.k.shape[1:])
        gradients = (dq.flatten(2, 3), dk.view(shape).transpose(1, 2), dv.view(shape).transpose(1, 2))
        return *(_whole(gradient, ctx.segments) for gradient in gradients), None, None


def _whole(x: Tensor, segments: Segments | None) -> Tensor:
    """Returns (rows, longest, heads, d) as (batch, heads, seq, d), laid out token by token as the model reads it."""
    x = x.transpose(1, 2)
    return x if segments is None else segments.together(x)


def _zero_filled(segments: Segments, x: Tensor) -> Tensor:
    apart = x.new_zeros(segments._shape[0] * segments._shape[1], x.shape[1], x.shape[3])
    apart[segments._tokens] = x[0].transpose(0, 1)
    return apart.unflatten(0, segments._shape).transpose(1, 2)


class _Block(NamedTuple):
    """Some queries, (batch · key-value heads, queries, d), already scaled, and their softmax over the keys so far."""

    begin: int
    end: int
    q: Tensor
    p: Tensor


class _Heads(NamedTuple):
    """q, (batch, key-value heads, group, seq, d); k and v, (batch · key-value heads, seq, d)."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> "_Heads":
        if segments is not None:
            q, k, v = segments.apart(q), segments.apart(k), segments.apart(v)
        num = k.shape[1]
        return cls(q.unflatten(1, (num, q.shape[1] // num)), k.flatten(0, 1), v.flatten(0, 1))

    def empty(self) -> Tensor:
        """Returns room for what is like q, (batch, seq, key-value heads, group, d)."""
        batch, heads, group, seq, d = self.q.shape
        return self.q.new_empty(batch, seq, heads, group, d)

    def take(self, x: Tensor, block: _Block) -> Tensor:
        """Returns a block's part of what is like q, (batch · key-value heads, queries · group, d)."""
        return x[:, :, :, block.begin : block.end].reshape(len(self.k), -1, x.shape[-1])

    def put(self, room: Tensor, block: _Block, part: Tensor) -> None:
        """Puts what is like `take`'s into what `empty` gave."""
        batch, heads, group, _, d = self.q.shape
        room[:, block.begin : block.end] = part.view(batch, heads, group, -1, d).permute(0, 3, 1, 2, 4)

    def blocks(self, scaling: float) -> Iterator[_Block]:
        """Yields the queries, a block at a time, with their softmax."""
        group, seq, d = self.q.shape[2:]
        exact = torch.promote_types(self.q.dtype, torch.float32)
        for begin in range(0, seq, BLOCK):
            end = min(seq, begin + BLOCK)
            size = end - begin
            q = self.q[:, :, :, begin:end].reshape(len(self.k), group * size, d) * scaling
            scores = torch.bmm(q, self.k[:, :end].mT)
            later = torch.full((size, size), float("-inf"), dtype=scores.dtype).triu_(1)
            scores.view(-1, group, size, end)[..., begin:].add_(later)
            yield _Block(begin, end, q, torch.softmax(scores, -1, dtype=exact).to(scores.dtype))
