"""Several processes that train one model together, started by torchrun, each on a device of its own: torch's DDP.

All go through the same batches, and each takes its own rows of every batch, so that N processes take the steps that
one would with batches of all their rows. Where the frozen weights do not fit one device, FSDP2 leaves each a part of
them. What the processes ask each other besides goes from CPU to CPU, by gloo.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Self, TypeVar, cast

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from core.blocks import blocks
from core.devices import resolve_device, resolve_devices
from core.errors import LoRAError

_PATIENCE = timedelta(hours=6)
"""How long processes wait for one another: the first may fetch a model. One that is gone is noticed at once."""

T = TypeVar("T")


class World:
    """The processes that train one model; `World()` is a process alone.

    Attributes:
        rank: The number of this process, from 0.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        """Takes the numbers as they are; `join` asks torchrun for them."""
        self.rank, self.size, self._store = rank, size, store

    @classmethod
    def join(cls) -> Self:
        """Returns the world that torchrun started this process for, once all are there; else that of one alone."""
        if not dist.is_torchelastic_launched():
            return cls()
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        return cls(rank, size, store)

    def leave(self) -> None:
        """Ends what `join` began."""
        if self._store is not None:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and decides."""
        return self.rank == 0

    @property
    def rows(self) -> slice:
        """Which rows of a batch this process takes."""
        return slice(self.rank, None, self.size)

    @property
    def seed(self) -> int:
        """What this process adds to a seed, so that no two drop out the same; 0 for the first."""
        return self.rank * 2_654_435_761  # 2³² / φ: on a CPU the lower 32 bits of a seed alone count

    def wrap(self, module: nn.Module) -> nn.Module:
        """Returns `module` so that a backward pass through it leaves each process the mean of all their gradients.

        What is trained becomes that of the first process; what is frozen is taken to be the same everywhere.
        """
        if self.size == 1:
            return module
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        frozen = [name for name, tensor in tensors.items() if not tensor.requires_grad]
        for name in frozen:
            if name.endswith(("lora_A0", "lora_B0")):  # what "pissa" starts from is computed, not read
                dist.broadcast(tensors[name], 0)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
        # The rows of a process may not reach every layer.
        return DistributedDataParallel(module, find_unused_parameters=True)

    def shard(self, module: nn.Module, device: torch.device) -> None:
        """Moves an adapted model to `device` so that of each frozen weight every process keeps only a part there.

        Block by block they ask each other for the rest when it is used, and forget it again: torch's FSDP2. What is
        trained stays whole in each, so that `wrap`, checkpoints and adapters are what they are without this. Never is
        more than one block moved at a time, so the model may come from the CPU's memory and be too large for `device`.

        Args:
            module: An adapted model.
            device: That of this process.
        """
        from torch.distributed.device_mesh import DeviceMesh  # a second to import, and most never need it
        from torch.distributed.fsdp import fully_shard

        whole = {p for p in module.parameters() if p.requires_grad or not p.is_floating_point()}
        for parameter in whole:
            parameter.data = parameter.data.to(device)
        if self.size == 1:
            module.to(device)
            return
        # A group apart: which gradients are averaged when depends on the rows, what is asked for when does not.
        mesh = DeviceMesh.from_group(cast(dist.ProcessGroup, dist.new_group(timeout=_PATIENCE)), device.type)
        for part in (*blocks(module), module):
            fully_shard(part, mesh=mesh, ignored_params=whole)

    def gather(self, value: T) -> list[T]:
        """Returns what each gives, in the order of their ranks."""
        if self.size == 1:
            return [value]
        said: list[T | None] = [None] * self.size
        dist.all_gather_object(said, value)
        return said  # type: ignore[return-value]

    def apart(self, module: nn.Module) -> AbstractContextManager[object]:
        """Keeps gradients from being averaged in a pass through what `wrap` gave; the next pass averages them, too."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def agree(self, value: T) -> T:
        """Returns what the first process gives."""
        if self.size == 1:
            return value
        said: list[T] = [value]
        dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        return said[0]

    def sum(self, value: float) -> float:
        """Returns the sum of what all give."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def max(self, value: int) -> int:
        """Returns the largest of what all give."""
        return int(self._reduced(value, dist.ReduceOp.MAX))

    def _reduced(self, value: float, op: dist.ReduceOp.RedOpType) -> float:
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total, op)
        return total.item()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Lets the first process do what stands in the block before the others do: fetch a file that they then have."""
        if not self.is_first:
            self.agree(None)
        yield
        if self.is_first:
            self.agree(None)

    def has_last_word(self) -> bool:
        """Says whether no other process asked this before, so that an end is told once."""
        return self._store is None or self._store.add("last word", 1) == 1

    def device(self, names: str) -> torch.device:
        """Returns the device of this process for a setting (see `resolve_devices`); "auto" and "cuda" take all GPUs.

        Raises:
            LoRAError: A device is not there, or there are more processes than devices.
        """
        devices = resolve_devices(names)
        place, num_here = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        if len(devices) == 1 and devices[0] == torch.device("cuda"):
            return resolve_device(f"cuda:{place}")
        if len(devices) == 1 and devices[0].type == "cpu":
            return devices[0]
        if len(devices) < num_here:
            raise LoRAError(
                f"`device` (={names!r}) must name a device for each of the {num_here} processes of this machine; "
                "start fewer, or say auto."
            )
        return devices[place]


def is_lost(error: BaseException) -> bool:
    """Says whether `error` means that another process is gone: it was killed, or ended by an error of its own."""
    words = ("gloo/transport", "remote process exited")  # gloo's and NCCL's; neither has a type for it
    return isinstance(error, dist.DistNetworkError) or any(part in str(error) for part in words)
