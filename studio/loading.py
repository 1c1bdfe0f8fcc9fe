"""Weights read in another type than the file's: each page of the file leaves memory once its numbers are converted."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_MAPS = Path("/proc/self/maps")
_ASYNC_OFF = "HF_DEACTIVATE_ASYNC_LOAD"


@contextmanager
def lets_go_of_files() -> Iterator[None]:
    """Lets transformers, in a `with` block, load with the model and one tensor of its file in memory, not the file.

    Weights of the file's own type are its pages, mapped: nothing changes for them, nor elsewhere than on Linux.
    """
    if not _MAPS.exists():
        yield
        return
    before = os.environ.get(_ASYNC_OFF)
    os.environ[_ASYNC_OFF] = "1"  # in other threads nobody would see what is converted
    try:
        with _LettingGo():
            yield
    finally:
        if before is None:
            del os.environ[_ASYNC_OFF]
        else:
            os.environ[_ASYNC_OFF] = before


class _LettingGo(TorchDispatchMode):
    """Gives the pages of what was converted back: who reads them again finds them in the file."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            _let_go(args[0])
        return made


def _let_go(tensor: Tensor) -> None:
    """Gives back the whole pages of a tensor that lies in a safetensors file."""
    start = tensor.data_ptr()
    end = start + int(tensor.untyped_storage().nbytes()) - int(tensor.storage_offset()) * tensor.element_size()
    if not any(low <= start and end <= high for low, high in _files()):
        return
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    if (size := end // mmap.PAGESIZE * mmap.PAGESIZE - first) > 0:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)  # else they stay


def _files() -> Iterator[tuple[int, int]]:
    """Yields where safetensors files are mapped: (start, end)."""
    for line in _MAPS.read_text().splitlines():
        if line.endswith(".safetensors"):
            start, _, end = line.split(maxsplit=1)[0].partition("-")
            yield int(start, 16), int(end, 16)
