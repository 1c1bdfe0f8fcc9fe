"""Which device, which precision, and how much memory is in use there."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from core.errors import LoRAError


def resolve_device(name: str) -> torch.device:
    """Returns the device for a setting: "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        LoRAError: The name is no device, or that device is not there.
    """
    present = ["cpu"]
    if torch.cuda.is_available():
        present = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *present]
    if torch.backends.mps.is_available():
        present = [*present[:-1], "mps", "cpu"]
    if name == "auto":
        return torch.device(present[0])
    if name not in present:
        raise LoRAError(f"`device` (={name!r}) must be one that this machine has: auto, {', '.join(present)}.")
    return torch.device(name)


def resolve_devices(names: str) -> tuple[torch.device, ...]:
    """Returns the devices for a setting that may name several, with commas: "cuda:0,cuda:1", one process for each.

    Raises:
        LoRAError: One is not there, a GPU is named twice, or they are not of one kind.
    """
    devices = tuple(resolve_device(name.strip()) for name in names.split(","))
    if len(devices) > 1:
        is_cpu = all(device.type == "cpu" for device in devices)
        are_gpus = all(device.type == "cuda" and device.index is not None for device in devices)
        if not is_cpu and not (are_gpus and len(set(devices)) == len(devices)):
            raise LoRAError(f"`device` (={names!r}) must name different GPUs, as in cuda:0,cuda:1; or cpu,cpu.")
    return devices


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine, and what of its memory nobody has taken.

    Attributes:
        device: Its name as a setting: cuda:0.
        title: What its maker calls it.
        free_bytes, total_bytes: Of its memory, by all processes.
    """

    device: str
    title: str
    free_bytes: int
    total_bytes: int


def gpus() -> list[Gpu]:
    """Returns the CUDA devices that this process may use, and how much of each is free now."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [Gpu(f"cuda:{i}", torch.cuda.get_device_name(i), *torch.cuda.mem_get_info(i)) for i in range(count)]


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Returns the type of the frozen weights; "auto" takes bf16 where `device` multiplies it fast.

    Raises:
        LoRAError: `precision` is none of auto, fp32, bf16.
    """
    if precision == "auto":
        return torch.bfloat16 if _fast_bfloat16(device) else torch.float32
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if precision not in dtypes:
        raise LoRAError(f"`precision` (={precision!r}) must be one of auto, {', '.join(dtypes)}.")
    return dtypes[precision]


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        flags = Path("/proc/cpuinfo")
        words = flags.read_text(errors="replace").split() if flags.exists() else []
        return "amx_bf16" in words or "avx512_bf16" in words
    return False


def memory_source(device: torch.device) -> str:
    """Returns in words what `memory_bytes` and `peak_memory_bytes` measure on `device`."""
    if device.type == "cuda":
        return "allocated by torch on the GPU"
    if device.type == "mps":
        return "allocated by torch on MPS"
    if _proc_status() is not None:
        return "resident memory of the process"
    return "not measured on Windows" if sys.platform == "win32" else "peak resident memory of the process"


def memory_bytes(device: torch.device) -> int:
    """Returns the memory in use now (see `memory_source`)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return _process_bytes("VmRSS")


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory that was in use so far (see `memory_source`); on MPS, that of now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return _process_bytes("VmHWM")


def device_memory(device: torch.device) -> tuple[int, int]:
    """Returns (free_bytes, total_bytes) of a device's memory, all processes counted; (0, 0) where nothing says.

    On Linux what the CPU may take is bounded by the group that the process is in, a container's for one.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return max(0, total - torch.mps.driver_allocated_memory()), total
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return _memory_of_system()
    known = {name: 1024 * int(size.split()[0]) for name, _, size in (line.partition(":") for line in lines)}
    free, total = known["MemAvailable"], known["MemTotal"]
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no group, or "max"
        return free, total
    return min(free, max(0, limit - used)), min(total, limit)


def _memory_of_system() -> tuple[int, int]:
    if sys.platform == "win32":
        return 0, 0
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0, 0
    return 0, total


FRAMEWORK_BYTES = {"cpu": 750_000_000, "cuda": 600_000_000, "mps": 300_000_000}
"""What the libraries take before there is a model, where nobody has measured it: on a CPU the resident memory of a
process with torch and transformers, on CUDA the context, the kernels' code and cuBLAS's workspaces."""


def framework_bytes(device: torch.device) -> int:
    """Returns what the libraries take of `device` before there is a model, to be asked by a process that has none.

    On a CPU it is this process's memory now; elsewhere it is not measured, and is a constant.
    """
    return (memory_bytes(device) if device.type == "cpu" else 0) or FRAMEWORK_BYTES[device.type]


def is_of_memory(error: BaseException) -> bool:
    """Says whether `error` means that a device's memory was not enough."""
    # Torch's allocator for the CPU has no type for it, and other words on Windows.
    words = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(part in str(error) for part in words)


def _proc_status() -> str | None:
    try:
        return Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return None


def _process_bytes(field: str) -> int:
    status = _proc_status()
    if status is not None:
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))
    if sys.platform == "win32":
        return 0
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
