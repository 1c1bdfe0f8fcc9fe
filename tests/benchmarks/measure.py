"""How the benchmarks measure: in one process, variants in turn, medians and ratios, and peak memory."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Row:
    """One figure of a workload.

    Attributes:
        workload: Its letter.
        what: What was measured.
        values: Name of the variant → median.
        unit: Of the values.
        ratio: The figure that the target is about.
        target: In words, "" where there is none.
        note: What else there is to say.
    """

    workload: str
    what: str
    values: Mapping[str, float]
    unit: str
    ratio: float | None = None
    target: str = ""
    note: str = ""
    series: Mapping[str, list[float]] = field(default_factory=dict)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternating(
    variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, *, warmup: int = 1
) -> dict[str, list[float]]:
    """Returns variant → seconds of each of `rounds` calls, taken in turn: what slows the machine slows all."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(-warmup, rounds):
        for name, work in variants.items():
            synchronize(device)
            begin = time.perf_counter()
            work()
            synchronize(device)
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Returns variant → median."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """Returns the median over the rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Returns how far what torch has allocated on `device` rises while `work` runs above what was there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    results = seen.profiler.kineto_results  # type: ignore[union-attr]
    return max(accumulate((event.nbytes() for event in results.events() if event.name() == "[memory]"), initial=0))


def resident_bytes(work: Callable[[], object]) -> int:
    """Returns how far the process' resident memory rises while `work` runs: with what the C library does not reuse."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed must not be found again and not be counted
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM falls to VmRSS
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
