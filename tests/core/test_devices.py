from pathlib import Path

import pytest
import torch

from core import LoRAError, devices, memory_bytes, memory_source, peak_memory_bytes, resolve_device, resolve_dtype

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=number of GPUs, mps=bool): makes torch report these."""

    def pretend(cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(0, False, "cpu"), (2, False, "cuda"), (0, True, "mps"), (1, True, "cuda")],
)
def test_auto_takes_cuda_then_mps_then_the_cpu(machine, cuda, mps, expected):
    machine(cuda=cuda, mps=mps)
    assert resolve_device("auto") == torch.device(expected)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_a_device_that_is_there_is_taken_by_its_name(machine, name):
    machine(cuda=2)
    assert resolve_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["cuda:2", "mps", "gpu", "", "CPU", "meta"])
def test_a_device_that_is_not_there_is_refused_and_those_there_are_named(machine, name):
    machine(cuda=2)
    with pytest.raises(LoRAError, match=rf"`device` \(='{name}'\) must be one .*: auto, cuda, cuda:0, cuda:1, cpu\."):
        resolve_device(name)


def test_precision_is_taken_as_said(machine):
    machine()
    assert resolve_dtype("fp32", CPU) == torch.float32
    assert resolve_dtype("bf16", CPU) == torch.bfloat16


@pytest.mark.parametrize("precision", ["fp16", "", "float32"])
def test_an_unknown_precision_is_refused(precision):
    with pytest.raises(LoRAError, match=rf"`precision` \(='{precision}'\) must be one of auto, fp32, bf16\."):
        resolve_dtype(precision, CPU)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu sse avx2", torch.float32),
        ("flags : avx512f avx512_bf16", torch.bfloat16),
        ("flags : amx_bf16 amx_tile", torch.bfloat16),
        ("flags : avx512_bf16x", torch.float32),
    ],
)
def test_auto_takes_bf16_on_a_cpu_that_multiplies_it(monkeypatch, flags, expected):
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: flags)
    assert resolve_dtype("auto", CPU) == expected


def test_auto_takes_fp32_where_the_cpu_says_nothing(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", MPS) == torch.float32


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_bf16_on_a_gpu_only_if_it_is_not_emulated(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert resolve_dtype("auto", CUDA) == expected


def test_memory_of_the_process_grows_with_what_it_holds():
    before = memory_bytes(CPU)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = memory_bytes(CPU)
    assert after - before > 0.9 * held.numel()
    assert peak_memory_bytes(CPU) >= after


def test_memory_on_a_gpu_is_what_torch_allocated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 9)
    assert (memory_bytes(CUDA), peak_memory_bytes(CUDA)) == (5, 7)
    assert (memory_bytes(MPS), peak_memory_bytes(MPS)) == (9, 9)
    assert memory_source(CUDA) == "allocated by torch on the GPU"
    assert memory_source(MPS) == "allocated by torch on MPS"


@pytest.mark.skipif(devices._proc_status() is None, reason="reads Linux's /proc")
def test_memory_source_says_which_figure_it_is(monkeypatch):
    assert memory_source(CPU) == "resident memory of the process"
    exact = peak_memory_bytes(CPU)
    monkeypatch.setattr(devices, "_proc_status", lambda: None)
    assert memory_source(CPU) == "peak resident memory of the process"
    # Two ways to one number, but getrusage also counts the parent's peak from before the exec.
    assert peak_memory_bytes(CPU) > 0.9 * exact
    monkeypatch.setattr(devices.sys, "platform", "win32")
    assert memory_source(CPU) == "not measured on Windows"
    assert memory_bytes(CPU) == 0
