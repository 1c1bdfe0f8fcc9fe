"""The arithmetic of a training step by hand: each function keeps for its backward pass only what it cannot do without.

All are autograd functions with the values and the gradients of the plain code, beside which they are tested. The
weights of the base are frozen, so no gradient of theirs is formed.
"""

import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from core.rounds import has_values, rounds

_IS_ONEDNN_FASTER = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
)


def product(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x·Wᵀ + bias, (rows, out), for x (rows, in) and W (out, in), out of autograd's sight.

    float32 on a CPU with AVX-512 goes to oneDNN: of the same precision, and twice as fast as torch's own choice, MKL,
    where MKL leaves AVX-512 alone, as it does on processors that are not Intel's. With AVX2 MKL is the faster.
    """
    if _IS_ONEDNN_FASTER and x.dtype == torch.float32 and x.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    return F.linear(x, W, bias)


TAPE = 2**22
"""How many random numbers are drawn for a dropout, once."""


class Dropout(NamedTuple):
    """A dropout that is made again from its seed when it is needed again, instead of being kept.

    Which numbers stay is read from a tape that is drawn once in a process and is the same in all; the seed says where
    the reading begins. So a dropout costs one multiplication.

    Attributes:
        p: Share of x dropped.
        seed: Of this draw.
    """

    p: float
    seed: int

    @classmethod
    def draw(cls, p: float) -> "Dropout | None":
        """Returns one seeded by torch's own generator of the CPU; None where nothing is dropped."""
        if not p:
            return None
        return cls(p, int(torch.empty((), dtype=torch.int64).random_()) if has_values() else 0)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns x with a share of it dropped and the rest scaled up, as `F.dropout` does; a new tensor."""
        return (x * self.kept(x)).mul_(self.gain)

    @property
    def gain(self) -> float:
        """By how much the rest is scaled up."""
        return 1 / (1 - self.p) if self.p < 1 else 0.0

    def kept(self, x: Tensor) -> Tensor:
        """Returns like x 1 for each number that stays and 0 for the others; often a view, not to be written to."""
        tape, longest = _tape(self.p, x.dtype, x.device), TAPE // 2
        begins = random.Random(self.seed)
        pieces = []
        for done in range(0, x.numel(), longest):
            begin = begins.randrange(TAPE - longest)
            pieces.append(tape[begin : begin + min(longest, x.numel() - done)])
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(x.shape)


@lru_cache(maxsize=4)
def _tape(p: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns (TAPE) numbers, 0 with probability p and else 1; real ones, also where others have none."""
    with unset_fake_temporarily(), torch.inference_mode(False):
        drawn = torch.rand(TAPE, generator=torch.Generator().manual_seed(0)) >= p
        return drawn.to(device, dtype)


class Linear(NamedTuple):
    """A frozen matrix, and what is learned beside it: h = W·x + b + scale · B·A·dropout(x).

    Attributes:
        W: (out_features, in_features), as any view of the weight.
        bias: (out_features), or None.
        A: (r, in_features), or None where the matrix is not adapted.
        B: (out_features, r), or None.
        scale: strength · scaling.
        dropout: On what A sees.
    """

    W: Tensor
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    dropout: Dropout | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns h, (rows, out_features), and A·dropout(x), (rows, r), for x (rows, in_features)."""
        h = product(x, self.W, self.bias)
        if self.A is None or self.B is None:
            return h, None
        seen = x if self.dropout is None else x * self.dropout.kept(x)
        low = product(seen, self.A.to(x.dtype))
        return h.addmm_(low, self.B.to(x.dtype).T, alpha=self._scale), low

    def backward(self, dh: Tensor, x: Tensor | None, low: Tensor | None, *, needs_dx: bool) -> "Gradients":
        """Returns the gradients of x, A and B for that of h; x may be None where A is."""
        dx = product(dh, self.W.T) if needs_dx else None
        if self.A is None or self.B is None or x is None or low is None:
            return Gradients(dx, None, None)
        # Of Bᵀ, which is small, a copy: matrices whose rows lie together are multiplied faster.
        dlow = product(dh, self.B.to(dh.dtype).T.contiguous()).mul_(self._scale)
        kept = None if self.dropout is None else self.dropout.kept(x)
        dA = product(dlow.T, (x if kept is None else x * kept).T).to(self.A.dtype)
        dB = product(low.T, dh.T).T.to(self.B.dtype).mul_(self._scale)
        if dx is not None:
            A = self.A.to(dh.dtype)
            dx = dx.addmm_(dlow, A) if kept is None else dx.addcmul_(dlow @ A, kept)
        return Gradients(dx, dA, dB)

    @property
    def _scale(self) -> float:
        """Of B·A·x for what dropout leaves of x."""
        return self.scale if self.dropout is None else self.scale * self.dropout.gain


class Gradients(NamedTuple):
    """Of the loss, by x, A and B."""

    x: Tensor | None
    A: Tensor | None
    B: Tensor | None


class Recipe:
    """How a tensor that the backward pass needs is made of what is kept anyway.

    What a normalization gives is read by several matrices, and follows from what the normalization itself keeps. So
    the first of them to come in the backward pass makes it again, and it goes when the normalization's turn comes.
    """

    def __init__(self, make: Callable[..., Tensor]) -> None:
        """Takes the function that makes it; of which tensors stands on the tensor that it made, as they are kept."""
        self._make, self._made = make, None

    def mark(self, y: Tensor, *ingredients: Tensor | None) -> Tensor:
        """Returns y, which says from now on what it is made of."""
        vars(y)["_recipe"] = self, ingredients
        return y

    @classmethod
    def of(cls, x: Tensor) -> "tuple[Recipe, tuple[Tensor | None, ...]]":
        """Returns how x is made, and of what; of itself, if it does not say."""
        return getattr(x, "_recipe", None) or (_AS_IT_IS, (x,))

    def rows(self, *ingredients: Tensor | None) -> Tensor:
        """Returns what is made of them, as (rows, features)."""
        made = self._make(*ingredients) if self._made is None else self._made
        self._made = None if self is _AS_IT_IS else made
        return made.reshape(-1, made.shape[-1])

    def forget(self) -> None:
        """Frees what was made."""
        self._made = None


_AS_IT_IS = Recipe(lambda x: x)


def linear(x: Tensor, layer: Linear) -> Tensor:
    """Returns h, (…, out_features), for x (…, in_features); of the activations x alone is kept, where A needs it."""
    return _Linear.apply(x, *layer)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Any) -> Tensor:
        layer = Linear(*parts)
        h, low = layer.forward(x.reshape(-1, x.shape[-1]))
        ctx.x, ingredients = Recipe.of(x) if layer.A is not None else (None, ())
        ctx.save_for_backward(layer.W, layer.A, layer.B, low, *ingredients)
        ctx.rest, ctx.shape = parts[4:], x.shape
        return h.view(*x.shape[:-1], h.shape[-1])

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Any:  # type: ignore[override]
        W, A, B, low, *ingredients = ctx.saved_tensors
        x = None if ctx.x is None else ctx.x.rows(*ingredients)
        layer = Linear(W, None, A, B, *ctx.rest)
        found = layer.backward(dh.reshape(-1, dh.shape[-1]), x, low, needs_dx=ctx.needs_input_grad[0])
        return None if found.x is None else found.x.view(ctx.shape), None, None, found.A, found.B, None, None


class Activation(NamedTuple):
    """A function of one number, and its gradient: backward(dh, x) for that of h = forward(x)."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = (
    Activation(F.silu, torch.ops.aten.silu_backward),
    Activation(F.gelu, torch.ops.aten.gelu_backward),
    Activation(
        lambda x: F.gelu(x, approximate="tanh"), lambda dh, x: torch.ops.aten.gelu_backward(dh, x, approximate="tanh")
    ),
    Activation(F.relu, lambda dh, x: torch.ops.aten.threshold_backward(dh, x, 0)),
)


def mlp(x: Tensor, gate: Linear | None, up: Linear, down: Linear, activation: Activation) -> Tensor:
    """Returns down(activation(gate(x)) · up(x)), or down(activation(up(x))) without a gate; like x.

    Of the activations x and what gate and up give are kept; the rest is made again.
    """
    return _MLP.apply(x, activation, gate is not None, *(gate or Linear(up.W)), *up, *down)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation, is_gated: bool, *parts: Any) -> Tensor:
        gate, up, down = _layers(parts)
        rows = x.reshape(-1, x.shape[-1])
        g, gate_low = gate.forward(rows) if is_gated else (None, None)
        u, up_low = up.forward(rows)
        h = activation.forward(u) if g is None else activation.forward(g).mul_(u)
        y, down_low = down.forward(h)
        tensors = [tensor for layer in (gate, up, down) for tensor in (layer.W, layer.A, layer.B)]
        ctx.x, ingredients = Recipe.of(x)
        ctx.save_for_backward(g, u, gate_low, up_low, down_low, *tensors, *ingredients)
        ctx.shape, ctx.activation = x.shape, activation
        ctx.rest = [layer[4:] for layer in (gate, up, down)]
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        g, u, gate_low, up_low, down_low, *tensors = ctx.saved_tensors
        gate, up, down = (Linear(tensors[3 * i], None, *tensors[3 * i + 1 : 3 * i + 3], *ctx.rest[i]) for i in range(3))
        activation, x, needs_dx = ctx.activation, ctx.x.rows(*tensors[9:]), ctx.needs_input_grad[0]
        active = activation.forward(u if g is None else g)
        found = down.backward(
            dy.reshape(-1, dy.shape[-1]), active if g is None else active * u, down_low, needs_dx=True
        )
        dh = found.x
        assert dh is not None
        of_gate = Gradients(None, None, None)
        if g is not None:
            dg = activation.backward(dh * u, g)
            of_gate, du = gate.backward(dg, x, gate_low, needs_dx=needs_dx), active.mul_(dh)
        else:
            du = activation.backward(dh, u)
        of_up = up.backward(du, x, up_low, needs_dx=needs_dx)
        dx = of_up.x
        if dx is not None:
            dx = (dx if of_gate.x is None else dx.add_(of_gate.x)).view(ctx.shape)
        factors = (
            gradient for each in (of_gate, of_up, found) for gradient in (None, None, each.A, each.B, None, None)
        )
        return dx, None, None, *factors


def _layers(parts: tuple[Any, ...]) -> Iterator[Linear]:
    width = len(Linear._fields)
    return (Linear(*parts[i : i + width]) for i in range(0, len(parts), width))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / √(mean(x²) + eps) · weight, like x (…, features); x alone is kept. `weight` is frozen."""
    recipe = Recipe(_scaled)
    y, rate = _RMSNorm.apply(x, weight, eps, recipe)
    return recipe.mark(y, x, rate, weight)


def _scaled(x: Tensor, rate: Tensor, weight: Tensor) -> Tensor:
    return (x * rate).to(x.dtype).mul_(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, recipe: Recipe) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_exact(x))
        rate = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rate)
        ctx.mark_non_differentiable(rate)
        ctx.y = recipe
        return _scaled(x, rate, weight), rate

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:  # type: ignore[override]
        x, weight, rate = ctx.saved_tensors
        ctx.y.forget()
        g = dy * weight
        along = torch.linalg.vecdot(g, x).unsqueeze(-1).to(rate.dtype)
        back = (along * rate.pow(3)).div_(-x.shape[-1]).to(x.dtype)
        return g.mul_(rate.to(g.dtype)).addcmul_(x, back), None, None, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Returns what `F.layer_norm` does over the last dimension, like x; x alone is kept. `weight`, `bias`: frozen."""
    recipe = Recipe(lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, eps))
    return recipe.mark(_LayerNorm.apply(x, weight, bias, eps, recipe), x, weight, bias)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, recipe: Recipe) -> Tensor:
        y, mean, rate = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rate)
        ctx.y = recipe
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias, mean, rate = ctx.saved_tensors
        ctx.y.forget()
        backward = torch.ops.aten.native_layer_norm_backward
        dx = backward(dy, x, x.shape[-1:], mean, rate, weight, bias, (True, False, False))[0]
        return dx, None, None, None, None


def _exact(x: Tensor) -> torch.dtype:
    """Returns the type in which sums over x are taken."""
    return torch.promote_types(x.dtype, torch.float32)


LOGITS_AT_ONCE, ROWS_AT_ONCE = 2**23, 16
"""Of the output head: how many logits are held, and how many rows of them are worked on while they are in the cache."""


def linear_cross_entropy(hidden: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of each row, (rows), float32 or better, without holding all logits hidden·Wᵀ + bias.

    The gradient by `hidden` is made in the forward pass, chunk by chunk, while the logits are there; so they are
    computed once, and only a tensor like `hidden` is kept.

    Args:
        hidden: (rows, features).
        W: (vocabulary, features), frozen; as any view of the weight.
        bias: (vocabulary) or None, frozen.
        targets: (rows) int64.
    """
    return _LinearCrossEntropy.apply(hidden, W, bias, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = hidden.new_empty(len(hidden), dtype=_exact(hidden))
        size = max(ROWS_AT_ONCE, LOGITS_AT_ONCE // len(W))
        for begin, end in rounds(len(hidden), size):
            rows = slice(begin, end)
            logits = product(hidden[rows], W, bias)
            losses[rows] = _losses_and_gradient(logits, targets[rows])
            if gradient is not None:
                gradient[rows] = product(logits, W.T)
            del logits  # before the next are there
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> Any:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * dlosses[:, None].to(gradient.dtype), None, None, None


def _losses_and_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of each row, and puts its gradient, softmax − 1 at the target, in the logits' place."""
    losses = logits.new_empty(len(logits), dtype=_exact(logits))
    # On a CPU a few rows at a time stay in its cache from the first pass to the last.
    size = ROWS_AT_ONCE if logits.device.type == "cpu" else len(logits)
    for begin, end in rounds(len(logits), size):
        few, at = logits[begin:end], targets[begin:end, None]
        # log Σ exp(z) = max z − log max p, where p is no less than 1 / vocabulary.
        highest, target = few.amax(1).to(losses.dtype), few.gather(1, at)[:, 0].to(losses.dtype)
        p = torch.softmax(few, 1, dtype=losses.dtype)
        losses[begin:end] = highest - p.amax(1).log_() - target
        few.copy_(p.scatter_add_(1, at, p.new_full(at.shape, -1.0)))
    return losses
