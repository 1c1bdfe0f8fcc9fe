"""Experts as targets of their own: `mlp.experts.down_proj.3` is the fourth matrix of one stack.

A mixture of experts keeps each of its matrices in a stack, one parameter of (num_experts, …, …) on a module whose code
is the family's own. So the update is put where that code reads: during the forward pass a tensor stands in the
parameter's place that gives products with W0 + ΔW while the two stay apart.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from core.errors import LoRAError
from core.layers import LoRAPart
from core.matrices import Layout, matrix_form
from core.wrapper import Wrapper

# The grouped product wants rows of 16 bytes, eight numbers of the smallest type.
_RANKS_AT_ONCE = 8


class LoRAExperts(Wrapper):
    """A frozen module of experts with low-rank updates of some of its matrices, each a `LoRAExpert` by its own name."""

    def __init__(self, base_layer: nn.Module) -> None:
        """Takes a module of experts in; `add` puts the matrices on it."""
        super().__init__()
        self.base_layer = base_layer
        self.base_layer.requires_grad_(False)

    def add(self, stack: str, index: int, r: int, scaling: float, **options: Any) -> None:
        """Adapts expert `index` of the parameter `stack`; other arguments as of `LoRALayer`."""
        found = next((s for s in self.stacks if s.weight_name == stack), None) or LoRAStack(self, stack)
        setattr(self, stack, found)  # add_module would take the base layer's parameter for one of its own
        found.add(index, r, scaling, **options)

    @property
    def stacks(self) -> list["LoRAStack"]:
        """The stacks with adapted experts, in the order in which they were added."""
        return [module for module in self.children() if isinstance(module, LoRAStack)]

    @property
    def merged(self) -> bool:
        """Whether all stacks hold W0 + ΔW."""
        return all(stack.merged for stack in self.stacks)

    def unmerge(self) -> None:
        """Unmerges all stacks."""
        for stack in self.stacks:
            stack.unmerge()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the base module does, with W0 + strength · ΔW in the place of W0."""
        sums = {stack.weight_name: stack.sum() for stack in self.stacks if stack.is_active}
        # An instance's own attribute is found before a parameter, which itself stays where it is.
        own = vars(self.base_layer)
        own.update(sums)
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            for name in sums:
                del own[name]


class LoRAStack(Wrapper):
    """The adapted experts of one stack, which are merged together."""

    def __init__(self, owner: LoRAExperts, name: str) -> None:
        """Starts without any, for the parameter `name` of the owner's base layer."""
        super().__init__()
        object.__setattr__(self, "_owner", owner)  # not a child: the stack is one of the owner's
        self.weight_name = name

    def add(self, index: int, r: int, scaling: float, **options: Any) -> None:
        """Adapts expert `index`; other arguments as of `LoRALayer`."""
        self.add_module(str(index), LoRAExpert(self, index, r, scaling, **options))

    @property
    def base_layer(self) -> nn.Module:  # type: ignore[override]
        """The module of experts."""
        return self._owner.base_layer

    @property
    def experts(self) -> list["LoRAExpert"]:
        """The adapted experts, in the order in which they were added."""
        return [module for module in self.children() if isinstance(module, LoRAExpert)]

    @property
    def is_active(self) -> bool:
        """Whether the forward pass has something to add to the base weight."""
        return not self.merged and any(expert.strength != 0.0 for expert in self.experts)

    def sum(self) -> "StackSum":
        """Returns W0 + strength · ΔW as a tensor like W0, not multiplied out."""
        experts = [expert for expert in self.experts if expert.strength != 0.0]
        updates = [self._update({e.index: (e.lora_A, e.lora_B) for e in experts})]
        starts = {e.index: (e.lora_A0, e.lora_B0) for e in experts if e.lora_A0 is not None and e.lora_B0 is not None}
        updates += [self._update(starts)] if starts else []
        return StackSum(self._W0(), updates, experts[0].dropout)

    @torch.no_grad()
    def merge(self) -> None:
        """Merges all experts of the stack at once, as `LoRALayer.merge` does one matrix."""
        if self.merged:
            return
        total = self._W0().clone()
        exact = torch.promote_types(total.dtype, torch.float32)
        for expert in self.experts:  # one by one: the stack is large
            total[expert.index] = (total[expert.index].to(exact) + expert._delta_as_weight(exact)).to(total.dtype)
        self._put(total)

    def _W0(self) -> Tensor:
        original = self._unmerged[0] if self.merged else self.base_layer.get_parameter(self.weight_name)
        assert isinstance(original, nn.Parameter)
        return original.detach()

    def _update(self, factors: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Returns left and right, (num_experts, …, r) and (num_experts, r, …): each expert's ΔW as its weight lies."""
        experts = {e.index: e for e in self.experts if e.index in factors}
        r = max(e.r for e in experts.values())
        r += -r % _RANKS_AT_ONCE
        first = next(iter(experts.values()))
        none = first.lora_A.new_zeros(r, first.in_features), first.lora_A.new_zeros(first.out_features, r)
        numbers = range(len(self._W0()))
        pairs = [factors.get(index, none) for index in numbers]
        A = torch.stack([A if len(A) == r else F.pad(A, (0, 0, 0, r - len(A))) for A, _ in pairs])
        B = torch.stack([B if B.shape[1] == r else F.pad(B, (0, r - B.shape[1])) for _, B in pairs])
        scales = [experts[i].strength * experts[i].scaling if i in experts else 0.0 for i in numbers]
        B = B * B.new_tensor(scales)[:, None, None]
        return (A.mT, B.mT) if is_transposed(self.base_layer) else (B, A)


class LoRAExpert(LoRAPart):
    """The update of one expert's matrix.

    Attributes:
        index: Its place in the stack.
    """

    form: ClassVar[str] = "expert"

    def __init__(self, owner: LoRAStack, index: int, r: int, scaling: float, **options: Any) -> None:
        """Adapts one matrix of the owner's stack; other arguments as of `LoRALayer`."""
        self.index = index
        self.weight_name = owner.weight_name
        super().__init__(owner, r, scaling, **options)

    @property
    def transposed(self) -> bool:
        """Whether the matrix lies as (in, out)."""
        return is_transposed(self.base_layer)

    def weight_matrix(self) -> Tensor:
        """Returns the expert's W0, (out_features, in_features)."""
        return self._as_weight(self._owner._W0()[self.index])

    def _shape_in(self, base_layer: nn.Module) -> tuple[int, int] | None:
        return stacks_of(base_layer).get(self.weight_name)

    def _layout(self) -> Layout:
        place = [name for name, _ in self.base_layer.named_parameters(recurse=False)].index(self.weight_name)
        return Layout("expert", num_experts=len(self.weight), place=place)


class StackSum(Tensor):
    """W0 + ΔW of a stack, or of some of its experts, as a tensor whose products keep the two apart.

    Reading experts by number, turning their matrices, and the products by which experts are computed with give
    W0·x + left·(right·x), so that ΔW is not formed and a small one is not lost in a W0 of few bits. For anything else
    it is the dense sum. It never is a leaf of autograd: gradients flow to what left and right are made of.

    Attributes:
        base: W0 as it lies.
        updates: (left, right) of ΔW; of a second pair, the start that ΔW is counted from.
        dropout: On x, before it meets the update.
        kept: The dense sum, once its memory was asked for.
    """

    base: Tensor
    kept: Tensor
    updates: list[tuple[Tensor, Tensor]]
    dropout: nn.Dropout

    @staticmethod
    def __new__(cls, base: Tensor, updates: list[tuple[Tensor, Tensor]], dropout: nn.Dropout) -> "StackSum":
        """Stands for base + updates."""
        # Without memory of its own: code that reads past torch's functions fails, and does not take W0 for the sum.
        self = torch.empty_like(base, device="meta").as_subclass(cls)
        self.base, self.updates, self.dropout = base, updates, dropout
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Does `func` on the parts where that is the same, and on the dense sum where it is not."""
        kwargs = kwargs or {}
        operands: Any = (*args, None)
        first, second = operands[:2]
        if func in _FACTS or (func.__name__ == "__get__" and func not in _NUMBERS):
            return func(first.base, *args[1:], **kwargs)
        if func is Tensor.data_ptr:  # a kernel is about to read memory by itself: the sum has to outlive this call
            first.kept = first.dense()
            return first.kept.data_ptr()
        if func is Tensor.__getitem__ and _are_numbers(second):
            return first._of_parts(lambda part: part[second])
        if _turns_the_matrix(func, args):
            turned = first._of_parts(lambda part: part.mT)
            turned.updates = [(right, left) for left, right in turned.updates]
            return turned
        if isinstance(first, cls) != isinstance(second, cls):
            if func is F.linear and isinstance(second, cls):
                h = F.linear(first, second.base, *args[2:], **kwargs)
                return second._added(h, first, F.linear, left_first=False)
            if func in _PRODUCTS and isinstance(first, cls):
                return first._added(func(first.base, second), second, lambda x, W: func(W, x), left_first=False)
            if func in _PRODUCTS or _is_grouped(func, kwargs):
                return second._added(func(first, second.base, **kwargs), first, lambda x, W: func(x, W, **kwargs))
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs))
        return func(*args, **kwargs)

    def dense(self) -> Tensor:
        """Returns the sum, multiplied out."""
        if self.dropout.training and self.dropout.p:
            raise LoRAError(
                f"`dropout` (={self.dropout.p}) must be 0 for experts whose code does more with its weights than "
                "multiply by them; set it to 0, or take the experts out by exclude_modules."
            )
        exact = torch.promote_types(self.base.dtype, torch.float32)
        return (self.base.to(exact) + self._over(lambda left, right: left.to(exact) @ right.to(exact))).to(self.base)

    def _of_parts(self, change: Callable[[Tensor], Tensor]) -> "StackSum":
        updates = [(change(left), change(right)) for left, right in self.updates]
        return StackSum(change(self.base), updates, self.dropout)

    def _added(
        self, h: Tensor, x: Tensor, times: Callable[[Tensor, Tensor], Tensor], *, left_first: bool = True
    ) -> Tensor:
        """Returns h, the product of W0 with x, plus that of the update, by left and then right or the other way."""
        x = self.dropout(x)

        def product(left: Tensor, right: Tensor) -> Tensor:
            one, other = (left, right) if left_first else (right, left)
            return times(times(x, one.to(x.dtype)), other.to(x.dtype))

        return h + self._over(product).to(h.dtype)

    def _over(self, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Returns the product of the update; of two pairs, by the same operations, so that equal ones give zero."""
        found, *start = [product(left, right) for left, right in self.updates]
        return found - start[0] if start else found


def _getters(*names: str) -> set[Any]:
    """Returns what torch hands to `__torch_function__` where one of these attributes is read."""
    return {getattr(Tensor, name).__get__ for name in names}


# What may be asked of W0 as well, as are all attributes but those that hold its numbers.
_FACTS = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point}
_NUMBERS = _getters("T", "H", "mT", "mH", "data", "real", "imag")
_TURNS, _TURNS_OF_MATRICES = _getters("mT"), {*_getters("T"), Tensor.t, torch.t}
_EXCHANGES = {Tensor.transpose, torch.transpose}
_PRODUCTS = {torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__}


def stacks_of(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns name → (out_features, in_features) of one expert's matrix, of the parameters that are stacks of experts.

    They are the three-dimensional ones of a module with `num_experts`, that many matrices each.
    """
    num_experts = getattr(module, "num_experts", None)
    if not isinstance(num_experts, int) or matrix_form(module) is not None:
        return {}
    found = {}
    for name, p in module.named_parameters(recurse=False):
        # What is stored in eight bits is scaled by the module's own code, so that it is no W0 by itself.
        if p.dim() == 3 and len(p) == num_experts and p.is_floating_point() and p.element_size() > 1:
            found[name] = tuple(reversed(p.shape[1:])) if is_transposed(module) else tuple(p.shape[1:])
    return found


def is_transposed(module: nn.Module) -> bool:
    """Says whether a module of experts keeps its matrices as (in, out); transformers marks those that do."""
    return bool(getattr(module, "is_transposed", False))


def _are_numbers(index: Any) -> bool:
    return isinstance(index, int) or (isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64))


def _is_grouped(func: Any, kwargs: dict[str, Any]) -> bool:
    """Says whether `func` multiplies each group of rows with a matrix of its own, and does nothing else."""
    name = getattr(func, "__name__", "")  # transformers has one of its own, for devices and types that torch's refuses
    known = name in ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
    return known and {k for k, value in kwargs.items() if value is not None} == {"offs"}


def _turns_the_matrix(func: Any, args: Any) -> bool:
    """Says whether `func` exchanges the last two dimensions of its first argument, and does nothing else."""
    if func in _EXCHANGES:
        num_dims = args[0].base.dim()
        return {d % num_dims for d in args[1:]} == {num_dims - 2, num_dims - 1}
    return func in _TURNS or (func in _TURNS_OF_MATRICES and args[0].base.dim() == 2)
