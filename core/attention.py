"""Causal attention for training: only the pairs of tokens that may see each other, and rows without padding.

softmax(scaling · Q·Kᵀ)·V, of which neither the scores nor the softmax outlive their block (Dao et al. 2022,
arXiv:2205.14135, without its tiles over the keys: a row of scores fits the cache of a CPU).
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from core.rounds import growing_rounds

BLOCK = 64
"""Queries at a time."""


class SegmentsError(TypeError):
    """An attention does not take rows that lie in one row."""


class Segments:
    """Rows that lie in one row, each token once, and that do not see each other but where they are the same.

    A token depends on itself and on what comes before it. So where rows begin alike (a system prompt, one question with
    several answers), their beginning is there once, and passed once, for all of them.

    Attributes:
        firsts: (tokens) int64, where each token stands first, as row · longest + place.
        depths: (tokens) int64, its place in its rows.
        places: (rows, longest) int64, which token stands there; beyond a row's end, its last.
    """

    def __init__(self, ids: Tensor, lengths: Tensor, *, may_share: bool = True) -> None:
        """Takes rows as they lie beside each other; all on the CPU, so that no device is waited for.

        Args:
            ids: (rows, longest or more) int64, padded at the right.
            lengths: (rows) int64, each at least 1.
            may_share: Whether equal beginnings are the same; not if rows differ in more than their tokens.
        """
        longest = int(lengths.max())
        tokens: dict[tuple[int, int], int] = {}
        places, firsts, depths = [], [], []
        for row, (values, length) in enumerate(zip(ids.tolist(), lengths.tolist(), strict=True)):
            before = -1 if may_share else -1 - row
            path = []
            for place, value in enumerate(values[:length]):
                token = tokens.setdefault((before, value), len(firsts))
                if token == len(firsts):
                    firsts.append(row * longest + place)
                    depths.append(place)
                path.append(token)
                before = token
            places.append(path + [path[-1]] * (longest - length))
        self.firsts, self.depths, self.places = torch.tensor(firsts), torch.tensor(depths), torch.tensor(places)
        self._is_real = torch.arange(longest) < lengths[:, None]
        self._bounds = F.pad(lengths.cumsum(0), (1, 0)).int()

    def to(self, device: torch.device) -> "Segments":
        """Returns the same for a device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            setattr(moved, name, value.to(device, non_blocking=True))
        return moved

    @property
    def num_tokens(self) -> int:
        """Of all together, those that rows share once."""
        return len(self.firsts)

    @property
    def shares(self) -> bool:
        """Whether rows have a beginning in common."""
        return self.num_tokens < int(self._bounds[-1])

    def apart(self, x: Tensor) -> Tensor:
        """Returns (1, heads, num_tokens, d) as (rows, heads, longest, d)."""
        return x[0].transpose(0, 1)[self.places].transpose(1, 2)

    def together(self, x: Tensor) -> Tensor:
        """Returns (rows, heads, longest, d) as (1, heads, num_tokens, d): of a token that rows share, the first's."""
        return x.transpose(1, 2).flatten(0, 1)[self.firsts].transpose(0, 1).unsqueeze(0)

    def summed(self, x: Tensor) -> Tensor:
        """Returns the like, of a token that rows share the sum: the gradient of `apart`."""
        x = x.transpose(1, 2).flatten(0, 1)
        total = x.new_zeros(self.num_tokens, *x.shape[1:])
        return total.index_add_(0, self.places.flatten(), x).transpose(0, 1).unsqueeze(0)

    def first_alone(self, x: Tensor) -> Tensor:
        """Returns (1, heads, num_tokens, d) as (rows, heads, longest, d), 0 but in `firsts`: that of `together`."""
        apart = x.new_zeros(self.places.numel(), x.shape[1], x.shape[3])
        apart[self.firsts] = x[0].transpose(0, 1)
        return apart.unflatten(0, self.places.shape).transpose(1, 2)

    def attend_in_one_go(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Returns what `causal_attention` does, by the GPU's own code for rows of different lengths."""
        longest = self.places.shape[1]
        real = self._is_real.flatten().nonzero()[:, 0] if self.shares else None
        rows = [x[0].transpose(0, 1) for x in (q, k, v)]
        if real is not None:
            rows = [x[self.places.flatten()[real]] for x in rows]
        options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": q.shape[1] != k.shape[1]}
        o = varlen_attn(rows[0], rows[1], rows[2], self._bounds, self._bounds, longest, longest, **options)
        assert isinstance(o, Tensor)
        if real is not None:
            o = o[torch.searchsorted(real, self.firsts)]
        return o.transpose(0, 1).unsqueeze(0)


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
        return segments.attend_in_one_go(q, k, v, scaling)
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
        o = o.flatten(2, 3).transpose(1, 2)  # laid out token by token, as the model reads it
        return o if segments is None else segments.together(o)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        heads = _Heads.of(q, k, v, ctx.segments)
        do = (do if ctx.segments is None else ctx.segments.first_alone(do)).unflatten(1, heads.q.shape[1:3])
        dq, dk, dv = heads.empty(), torch.zeros_like(heads.k), torch.zeros_like(heads.v)
        for block in heads.blocks(ctx.scaling):
            own = heads.take(do, block)
            dv[:, : block.end].baddbmm_(block.p.mT, own)
            dp = torch.bmm(own, heads.v[:, : block.end].mT)
            ds = torch.ops.aten._softmax_backward_data(dp, block.p, -1, dp.dtype)
            heads.put(dq, block, torch.bmm(ds, heads.k[:, : block.end]).mul_(ctx.scaling))
            dk[:, : block.end].baddbmm_(ds.mT, block.q)
        shape = (heads.q.shape[0], -1, *heads.k.shape[1:])
        gradients = (dq.flatten(2, 3).transpose(1, 2), dk.view(shape), dv.view(shape))
        if ctx.segments is not None:
            gradients = (ctx.segments.summed(gradient) for gradient in gradients)
        return *gradients, None, None


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
        for begin, end in growing_rounds(seq, BLOCK):
            size = end - begin
            q = self.q[:, :, :, begin:end].reshape(len(self.k), group * size, d) * scaling
            scores = torch.bmm(q, self.k[:, :end].mT)
            later = torch.full((size, size), float("-inf"), dtype=scores.dtype).triu_(1)
            scores.view(-1, group, size, end)[..., begin:].add_(later)
            yield _Block(begin, end, q, torch.softmax(scores, -1, dtype=exact).to(scores.dtype))
