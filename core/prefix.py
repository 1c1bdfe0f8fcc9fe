"""The frozen layers below the first adapted one, passed once a row: what they gave is kept, and read again.

They give for a row of tokens the same each time it comes, in every epoch and evaluation. A row goes through them alone,
so that what is kept depends on the row and not on its company, and a run that is taken up again computes the same.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core.blocks import blocks


class _ReachedError(Exception):
    """The rows have come to the first adapted layer."""


class Prefix:
    """The layers of a model below the first in which anything is trained.

    Attributes:
        num_layers: How many; where it is 0 there is nothing to keep.
    """

    def __init__(self, model: nn.Module, *, on_disk: bool = False) -> None:
        """Looks for them in `model`.

        Args:
            model: An adapted model.
            on_disk: Keep what they give in a temporary file instead of memory.
        """
        self._model, self._blocks = model, list(blocks(model))
        trained = (any(p.requires_grad for p in block.parameters()) for block in self._blocks)
        self.num_layers = next((place for place, learns in enumerate(trained) if learns), 0)
        self._kept: dict[bytes, Tensor] = {}
        self._file = tempfile.TemporaryFile() if on_disk and self.num_layers else None
        self._places: dict[bytes, tuple[int, torch.Size, torch.dtype]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept."""
        in_memory = sum(t.numel() * t.element_size() for t in self._kept.values())
        return in_memory + sum(shape.numel() * dtype.itemsize for _, shape, dtype in self._places.values())

    def of(self, rows: list[Tensor], device: torch.device) -> list[Tensor]:
        """Returns for each row of token ids, (tokens) int64 on the CPU, what reaches the first adapted layer.

        That is (tokens, features), on `device`.
        """
        keys = [row.numpy().tobytes() for row in rows]
        for key, row in zip(keys, rows, strict=True):
            if key not in self._kept and key not in self._places:
                with torch.no_grad():
                    self._keep(key, self._reached(row.to(device)).cpu())
        return [self._read(key).to(device, non_blocking=True) for key in keys]

    def close(self) -> None:
        """Frees what was kept."""
        self._kept, self._places = {}, {}
        if self._file is not None:
            self._file.close()

    @contextmanager
    def skipped(self, hidden: Tensor) -> Iterator[None]:
        """Lets the model, in a `with` block, take `hidden`, like what its layers take, for what they would give."""
        with _standing_in(self._blocks[: self.num_layers], lambda *_, **__: hidden):
            yield

    def is_constant(self, ids: Tensor) -> bool:
        """Says whether a row, (tokens) int64, gives the same each time: nothing is trained on the way, or dropped."""
        with torch.enable_grad():
            still, moving = self._reached(ids, training=False), self._reached(ids, training=True)
        return not still.requires_grad and torch.equal(still, moving)

    def _reached(self, ids: Tensor, *, training: bool = False) -> Tensor:
        """Returns what reaches the first adapted layer of a row, (tokens, features)."""
        reached: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            reached.append(args[0] if args else kwargs["hidden_states"])
            raise _ReachedError

        before = self._model.training
        self._model.train(training)
        try:
            with _standing_in(self._blocks[self.num_layers : self.num_layers + 1], stop):
                self._model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]))
        except _ReachedError:
            pass
        finally:
            self._model.train(before)
        return reached[0][0]

    def _keep(self, key: bytes, hidden: Tensor) -> None:
        if self._file is None:
            self._kept[key] = hidden
            return
        place = self._file.seek(0, 2)
        self._file.write(hidden.contiguous().view(torch.uint8).numpy().tobytes())
        self._places[key] = place, hidden.shape, hidden.dtype

    def _read(self, key: bytes) -> Tensor:
        if self._file is None:
            return self._kept[key]
        place, shape, dtype = self._places[key]
        self._file.seek(place)
        read = bytearray(self._file.read(shape.numel() * dtype.itemsize))
        return torch.frombuffer(read, dtype=dtype).view(shape)


@contextmanager
def _standing_in(modules: list[nn.Module], forward: Any) -> Iterator[None]:
    """Puts `forward` in the place of the modules' own, in a `with` block."""
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                object.__delattr__(module, "forward")
            else:
                object.__setattr__(module, "forward", own)
