"""Memory before it is needed: a training step on tensors that have shapes and no values."""

import copy
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.baselines.methods import apply_method
from core.blocks import block_lists, blocks, with_first
from core.config import LoRAConfig, TrainConfig
from core.errors import LoRAError
from core.fusion import Fusion
from core.heap import Heap
from core.losses import Way, losses_at, of_head
from core.matrices import is_conv1d
from core.method import MethodConfig
from core.rounds import once
from core.rows import row_logits


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes that training takes at its peak on one device, by what they are for.

    Attributes:
        weights: The model's: frozen beside LoRA, trained in full fine-tuning.
        adapter: A, B and what else is trained beside the frozen weights, float32; nothing in full fine-tuning.
        gradients: Of what is trained, in its type; with several devices also the buckets in which DDP sends them.
        moments: AdamW's two of what is trained.
        activations: What the forward pass keeps for the backward pass, the logits, and what comes and goes.
        holes: What lies free between tensors when the heap reaches furthest; on a CPU, where it is asked for.
        choosing: What the copy in float32 on which the fastest way is chosen before the first step takes beyond that
            step's own; 0 but for a small batch of a large vocabulary in half precision.
        framework: What the libraries take without a model; 0 unless the caller knows (see `replace`).
    """

    weights: int
    adapter: int
    gradients: int
    moments: int
    activations: int
    holes: int = 0
    choosing: int = 0
    framework: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.terms.values())

    @property
    def terms(self) -> dict[str, int]:
        """Term → bytes, the largest first; without those of the last three that are nothing."""
        terms = {name: getattr(self, name) for name in self.__dataclass_fields__}
        terms = {name: size for name, size in terms.items() if size or name not in ("holes", "choosing", "framework")}
        return dict(sorted(terms.items(), key=lambda item: -item[1]))


def forecast_memory(
    model: nn.Module,
    lora: LoRAConfig | None,
    train: TrainConfig,
    dtype: torch.dtype,
    *,
    method: MethodConfig | None = None,
    prepare: Callable[[Any], object] = lambda model: None,
    num_devices: int = 1,
    base_bits: int | None = None,
    moments_dtype: torch.dtype = torch.float32,
    on_heap: bool = False,
    per_row: bool = False,
) -> MemoryForecast:
    """Returns what a step of `train.batch_size` rows of `train.max_length` tokens will take, every token trained.

    The step is taken, forward and backward, by the same code as on the CPU, on tensors
    without values; each tensor counts from when it is made until it is gone. So it holds for any model. Of blocks that
    are alike only a few are passed: each one more keeps the same bytes. That the peak grows by just what a block keeps
    is checked, and where it does not, all blocks are passed.

    Full fine-tuning is taken to train every weight in `dtype`, with gradients of that type and no copy in float32, by
    the model's own code, whose logits are held.

    Args:
        model: A causal language model on the meta device, not adapted; it stays as it is.
        lora: What is adapted; None for full fine-tuning, which trains every weight and nothing else.
        train: Of it, the shape of a batch.
        dtype: Of the model's weights.
        method: What is trained instead of LoRA's matrices; special tokens count in `train.max_length`.
        prepare: What else is to be done to the model before it is trained, such as activation checkpointing.
        num_devices: How many devices train together; of each is what the forecast tells.
        base_bits: 4 or 8 where the linear layers of the frozen base lie so (NF4 in blocks of 64 with a float32 scale
            each; int8 with a float32 scale a row), and each is widened to `dtype` while it is used.
        moments_dtype: Of AdamW's two moments.
        on_heap: Whether tensors lie on the C library's heap, as on a CPU, whose holes count then.
        per_row: Whether a batch has one label a row, as of `train(…, row_labels=…)`.
    """
    if base_bits not in (None, 4, 8) or (base_bits and lora is None):
        raise LoRAError(f"`base_bits` (={base_bits}) must be 4, 8 or None, and None in full fine-tuning.")
    model = copy.deepcopy(model).to(dtype)
    getattr(model, "tie_weights", lambda: None)()  # on its way to the meta device each may have got its own
    prepare(model)
    if lora is None or (method and method.method == "full"):
        lora = None
        model.requires_grad_(True)
    else:
        apply_method(model, method or MethodConfig(), lora)
    whole = {id(p): p for p in (*model.parameters(), *model.buffers())}.values()
    trained = [p for p in whole if p.requires_grad]
    sizes = {id(p): _bytes(p) for p in whole if lora is None or not p.requires_grad}
    widened = _quantize(model, sizes, base_bits) if base_bits else 0
    num_parts = num_devices if train.shard_weights else 1
    own_parts = num_parts if lora is None else 1  # an adapter is whole on each device
    gradients = sum(_bytes(p) for p in trained)
    in_buckets = gradients if num_devices > 1 and own_parts == 1 else 0
    moments = 2 * moments_dtype.itemsize * sum(p.numel() for p in trained)
    activations, reach = _activations(model, train, on_heap=on_heap, per_row=per_row)
    holes = max(0, reach - activations)
    is_tried = lora is not None and not per_row
    choosing = _choosing(model) if is_tried else 0  # over before there are gradients and moments
    return MemoryForecast(
        weights=_weights_bytes(model, sizes, num_parts),
        adapter=0 if lora is None else gradients,
        gradients=-(-gradients // own_parts) + in_buckets,
        moments=-(-moments // own_parts),
        activations=activations + widened,
        holes=holes,
        choosing=max(0, choosing - gradients - moments - activations - widened - holes),
    )


def _weights_bytes(model: nn.Module, sizes: dict[int, int], num_parts: int) -> int:
    """Returns what a device holds of the model's weights: of split ones its part, and what it has asked for.

    That is what lies outside of the blocks, and two blocks: the one at work, and the next on its way.
    """
    whole = sum(sizes.values())
    if num_parts == 1:
        return whole
    inside = sorted(sum(sizes.get(id(p), 0) for p in block.parameters()) for block in blocks(model))
    return min(whole, -(-whole // num_parts) + whole - sum(inside) + sum(inside[-2:]))


def _quantize(model: nn.Module, sizes: dict[int, int], bits: int) -> int:
    """Sets the sizes of the blocks' linear layers to those in so many bits; returns what the largest is widened to."""
    widened = [0]
    for module in (module for block in blocks(model) for module in block.modules()):
        if not (type(module) is nn.Linear or is_conv1d(module)) or id(module.weight) not in sizes:
            continue
        weight: Any = module.weight
        scales = -(-weight.numel() // 64) if bits == 4 else max(1, weight.shape[is_conv1d(module)])
        sizes[id(weight)] = weight.numel() * bits // 8 + 4 * scales
        widened.append(_bytes(weight))
    return max(widened)


def _choosing(model: nn.Module) -> int:
    """Returns what `Losses.choose` takes before the first step: a copy of few blocks, each tensor widened in turn."""
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return 0
    few = list(with_first(model, block_lists(model), 2).parameters())
    held = peak = sum(_bytes(p) for p in few)
    for p in few:
        if p.dtype != torch.float32:
            peak = max(peak, held + 4 * p.numel())
            held += 4 * p.numel() - _bytes(p)
    return max(peak, held)


def _activations(model: nn.Module, train: TrainConfig, *, on_heap: bool, per_row: bool) -> tuple[int, int]:
    """Returns the peak of a step's activations, from as few of the model's blocks as tell it, and the heap's reach."""
    found = _alike(model)
    if found is not None:
        members, start, period = found
        num = len(members)
        for times in (1, 3):
            few = start + (num - start) % period + times * period
            if few + period >= num:
                break
            try:
                (kept, peak, reach), (kept_more, peak_more, reach_more) = (
                    _step(with_first(model, [members], n), train, heap=on_heap, per_row=per_row)
                    for n in (few, few + period)
                )
            except (IndexError, KeyError, ValueError, AttributeError):  # it wants all of its blocks
                break
            if peak_more - peak == kept_more - kept:
                more = (num - few) // period
                return peak + more * (peak_more - peak), reach + more * (reach_more - reach)
    return _step(copy.deepcopy(model), train, heap=on_heap, per_row=per_row)[1:]


def _step(model: Any, train: TrainConfig, *, heap: bool, per_row: bool) -> tuple[int, int, int]:
    """Takes a step without values with a model, which it uses up.

    Returns:
        The bytes that are kept for the backward pass, the most that were held, and how far a heap of them reached.
    """
    fusion = Fusion(model)  # what it tries out has values
    with FakeTensorMode(allow_non_fake_inputs=True), fusion, once():
        model.to_empty(device="cpu")
        getattr(model, "tie_weights", lambda: None)()  # to_empty gave each its own
        model.train()
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p)  # there from the start, as in training
        ids = torch.zeros(train.batch_size, train.max_length, dtype=torch.int64)
        loss_of = _row_loss if per_row else _token_loss(model, ids)
        live = _Live(Heap() if heap else None)
        with live:
            loss = loss_of(model, ids)
            kept = live.bytes
            loss.backward()
    return kept, live.peak_bytes, live.heap.peak_bytes if live.heap else 0


def _token_loss(model: Any, ids: Tensor) -> Callable[[Any, Tensor], Tensor]:
    """Returns what gives the loss of all tokens, by the way that `Losses` would choose."""
    with torch.no_grad():
        logits, seen = of_head(model, {"input_ids": ids[:1, :2]})
    way = Way(skips_head=seen is logits)
    positions = torch.arange(ids.numel()).view(ids.shape)[:, :-1].flatten()
    targets = ids[:, 1:].flatten()
    return lambda model, ids: losses_at(model, {"input_ids": ids}, positions, targets, way).sum()


def _row_loss(model: Any, ids: Tensor) -> Tensor:
    # As `row_losses`, which chooses among the rows by their labels: here there are no values to choose by.
    logits = row_logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return F.cross_entropy(logits, torch.zeros(len(ids), dtype=torch.int64))


def _alike(model: nn.Module) -> tuple[nn.ModuleList, int, int] | None:
    """Returns the list of a model's blocks, from which on they repeat, and how many make a period; None if none do."""
    members = max(block_lists(model), key=len, default=nn.ModuleList())
    if len(members) < 4:
        return None
    said = [_signature(block) for block in members]

    def start_of(period: int) -> int:
        return next((i + 1 for i in range(len(said) - period - 1, -1, -1) if said[i] != said[i + period]), 0)

    period = min(range(1, 1 + len(said) // 2), key=lambda p: start_of(p) + 2 * p)
    return members, start_of(period), period


def _signature(block: nn.Module) -> tuple[Any, ...]:
    """Returns what a block's memory depends on: the code of its modules, their plain settings, and their tensors."""
    said: list[Any] = []
    for path, module in block.named_modules():
        plain = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, (int, float, str, type(None))) and not _NUMBER.search(name)
        }
        said += [path, type(module), tuple(sorted(plain.items()))]
    tensors = (*block.named_parameters(), *block.named_buffers())
    return *said, *((name, p.shape, p.dtype, p.requires_grad) for name, p in tensors)


_NUMBER = re.compile(r"idx|index|layer_id|layer_number")
"""What a block calls its own number."""


class _Live(TorchDispatchMode):
    """Counts the bytes of the memory that tensors made inside it hold.

    Attributes:
        bytes: Now.
        peak_bytes: At most so far.
        heap: Where they would lie, where that is asked for.
    """

    def __init__(self, heap: Heap | None) -> None:
        super().__init__()
        self.bytes = self.peak_bytes = 0
        self.heap = heap
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # what was there before does not count
            if isinstance(tensor, Tensor):
                self._know(tensor, counts=False)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._know(tensor, counts=True)
        return made

    def _know(self, tensor: Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0
        self._known.add(key)
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._gone, key, size, self.heap.take(size) if self.heap and size else None)

    def _gone(self, key: int, size: int, place: tuple[int, int] | None) -> None:
        self._known.discard(key)
        self.bytes -= size
        if self.heap and place:
            self.heap.give(*place)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
