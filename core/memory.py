"""Memory before it is needed: a training step on tensors that have shapes and no values."""

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.config import LoRAConfig, TrainConfig
from core.distributed import blocks
from core.fusion import Fusion
from core.inject import inject
from core.losses import Way, losses_at, of_head
from core.rounds import once


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes that training takes at its peak, by what they are for; what the framework itself takes is not in it.

    Attributes:
        weights: The frozen weights.
        adapter: A, B and what else is trained, float32.
        gradients: Of what is trained.
        moments: AdamW's two of what is trained.
        activations: What the forward pass keeps for the backward pass, the logits, and what comes and goes.
    """

    weights: int
    adapter: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.terms.values())

    @property
    def terms(self) -> dict[str, int]:
        """Term → bytes, the largest first."""
        terms = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return dict(sorted(terms.items(), key=lambda item: -item[1]))


def forecast_memory(
    model: nn.Module,
    lora: LoRAConfig,
    train: TrainConfig,
    dtype: torch.dtype,
    *,
    prepare: Callable[[Any], object] = lambda model: None,
    num_devices: int = 1,
) -> MemoryForecast:
    """Returns what a step of `train.batch_size` rows of `train.max_length` tokens will take, every token trained.

    The step is taken, forward and backward, by the same code as on the CPU, on tensors
    without values; each tensor counts from when it is made until it is gone. So it holds for any model.

    Args:
        model: A causal language model on the meta device, not adapted; it stays as it is.
        lora: What is adapted.
        train: Of it, the shape of a batch.
        dtype: Of the frozen weights.
        prepare: What else is to be done to the model before it is trained, such as activation checkpointing.
        num_devices: How many devices train together; of each is what the forecast tells.
    """
    model = copy.deepcopy(model).to(dtype)
    prepare(model)
    inject(model, lora)
    fusion = Fusion(model)  # what it tries out has values
    with FakeTensorMode(allow_non_fake_inputs=True), fusion, once():
        model.to_empty(device="cpu")
        getattr(model, "tie_weights", lambda: None)()  # to_empty gave each its own
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = {id(p): p for p in (*model.parameters(), *model.buffers()) if not p.requires_grad}
        ids = torch.zeros(train.batch_size, train.max_length, dtype=torch.int64)
        logits, seen = of_head(model, {"input_ids": ids[:1, :2]})
        way = Way(skips_head=seen is logits)
        positions = torch.arange(ids.numel()).view(ids.shape)[:, :-1].flatten()
        live = _Live()
        with live:
            losses_at(model, {"input_ids": ids}, positions, ids[:, 1:].flatten(), way).sum().backward()
    adapter = sum(_bytes(p) for p in trained)
    return MemoryForecast(
        weights=_weights_bytes(model, frozen, num_devices if train.shard_weights else 1),
        adapter=adapter,
        gradients=adapter,
        moments=2 * adapter,
        activations=max(0, live.peak_bytes - live.bytes),  # at the end only the gradients are left
    )


def _weights_bytes(model: nn.Module, frozen: dict[int, Tensor], num_parts: int) -> int:
    """Returns what a device holds of the frozen weights: of split ones its part, and what it has asked for.

    That is what lies outside of the blocks, and two blocks: the one at work, and the next on its way.
    """
    whole = sum(_bytes(p) for p in frozen.values())
    if num_parts == 1:
        return whole
    sizes = sorted(sum(_bytes(p) for p in block.parameters() if id(p) in frozen) for block in blocks(model))
    return min(whole, -(-whole // num_parts) + whole - sum(sizes) + sum(sizes[-2:]))


class _Live(TorchDispatchMode):
    """Counts the bytes of the memory that tensors made inside it hold.

    Attributes:
        bytes: Now.
        peak_bytes: At most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak_bytes = 0
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
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
