"""Two processes, started by torchrun, take the steps that one takes on batches of all their rows."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core import Checkpoint, LoRAError, World, resolve_devices
from tests.core.together import CASES, broken_by

ROOT = Path(__file__).resolve().parents[2]
OF_A_PROCESS = ("step_seconds", "evaluate_seconds", "memory_bytes", "peak_memory_bytes")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    out = tmp_path_factory.mktemp("ranks")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "-m", "tests.core.together", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


def told(found: dict) -> list[dict]:
    """The records of the events, but for time and memory."""
    return [{k: v for k, v in record.items() if k not in OF_A_PROCESS} for record in found["records"]]


def _to_rounding(value: object) -> object:
    if isinstance(value, dict):  # singular values by path, to four digits; what cancels is rounding alone
        return {path: pytest.approx(sigma, rel=1e-3, abs=2e-3 * sigma[0]) for path, sigma in value.items()}
    return pytest.approx(value, rel=2e-5) if type(value) is float else value


def same_to_rounding(one: dict, other: dict) -> None:
    for a, b in zip(told(one), told(other), strict=True):
        assert a.keys() == b.keys()
        assert all(b[key] == _to_rounding(a[key]) for key in a)
    a, b = one["checkpoint"], other["checkpoint"]
    assert (a["step"], a["num_rows"], a["tensors"].keys()) == (b["step"], b["num_rows"], b["tensors"].keys())
    for name, tensor in a["tensors"].items():
        if not name.endswith("exp_avg_sq"):
            # As a whole: of an entry whose gradient is near zero, AdamW makes a step of rounding alone.
            assert (tensor - b["tensors"][name]).norm() <= 2e-4 * tensor.norm() + 1e-7, name


@pytest.mark.parametrize("name", [name for name in CASES if name != "dropout"])
def test_two_processes_take_the_steps_of_one_with_all_their_rows(name, ranks):
    alone = CASES[name].run(World())
    same_to_rounding(ranks[0]["cases"][name], alone)
    kinds = [record["event"] for record in alone["records"]]
    assert (kinds.count("Step"), kinds.count("Evaluated")) == (4, 3)
    assert alone["checkpoint"]["num_rows"] == sum(len(batch["labels"]) for batch in CASES[name].batches())


@pytest.mark.parametrize("name", CASES)
def test_all_processes_tell_the_same_and_end_with_the_same_weights(name, ranks):
    first, second = (rank["cases"][name] for rank in ranks)
    assert told(first) == told(second)
    a, b = (found["checkpoint"]["tensors"] for found in (first, second))
    assert all(torch.equal(a[key], b[key]) for key in a)
    memory = [[r["memory_bytes"] for r in found["records"] if r["event"] == "Step"] for found in (first, second)]
    assert memory[0] == memory[1]  # the most of any


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.shard])
def test_of_split_weights_each_process_has_only_its_part(name, ranks):
    whole = CASES[name].run(World())["num_here"]
    parts = [rank["cases"][name]["num_here"] for rank in ranks]
    assert sum(parts) == whole and max(parts) < 0.6 * whole


def test_processes_drop_out_differently(ranks):
    """Both have the same row: with one dropout for both, each loss would be that of the row alone."""
    case = CASES["dropout"]
    row = dataclasses.replace(case, make=lambda seed: {key: value[:1] for key, value in case.make(seed).items()})
    together, alone = (
        [record["loss"] for record in found["records"] if record["event"] == "Step"]
        for found in (ranks[0]["cases"]["dropout"], row.run(World()))
    )
    assert together[0] == pytest.approx(alone[0], rel=1e-5)  # B is zero still
    assert all(a != pytest.approx(b, rel=1e-4) for a, b in zip(together[1:], alone[1:], strict=True))


@pytest.mark.parametrize("shard", [False, True])
def test_a_loss_that_one_process_meets_is_told_alike_by_all(shard, ranks):
    """By rows of the whole batch; where weights lie in parts nobody can look for the layer alone."""
    first, second = (rank["broken"][shard] for rank in ranks)
    assert first == second == broken_by(World(), shard=shard)
    assert (first["batch"], first["rows"], first["where"]) == (1, (3,), "up.base_layer")


@pytest.mark.parametrize(
    ("name", "of"), [("accumulation", "half"), ("weights in parts, accumulation, pissa, dora", "split half")]
)
def test_one_process_goes_on_from_the_checkpoint_of_two(name, of, ranks):
    case, half = CASES[name], ranks[0][of]
    assert half["checkpoint"]["step"] == 2
    rest = case.run(World(), start=Checkpoint(**half["checkpoint"]))
    whole = {"records": half["records"] + rest["records"][1:], "checkpoint": rest["checkpoint"]}
    same_to_rounding(whole, case.run(World()))


# Which device.


@pytest.fixture
def machine(monkeypatch):
    """machine(gpus, place, num_here): torch reports so many GPUs, and torchrun that process on this machine."""

    def pretend(gpus: int, place: int = 0, num_here: int = 1) -> World:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setenv("LOCAL_RANK", str(place))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_here))
        return World(place, num_here)

    return pretend


@pytest.mark.parametrize(
    ("names", "gpus", "devices"),
    [
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("cuda:2, cuda:0", 3, ["cuda:2", "cuda:0"]),
        ("auto", 0, ["cpu", "cpu", "cpu"]),
        ("cpu", 2, ["cpu", "cpu"]),
        ("cpu,cpu", 2, ["cpu", "cpu"]),
    ],
)
def test_each_process_has_a_device_of_its_own(names, gpus, devices, machine):
    assert [str(machine(gpus, i, len(devices)).device(names)) for i in range(len(devices))] == devices


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cuda:0,cuda:1", r"`device` \(='cuda:0,cuda:1'\) must name a device for each of the 3 processes"),
        ("cuda:1", r"`device` \(='cuda:1'\) must name a device for each of the 3 processes"),
        ("cuda", r"`device` \(='cuda:2'\) must be one that this machine has"),
    ],
)
def test_more_processes_than_devices_are_refused(names, message, machine):
    with pytest.raises(LoRAError, match=message):
        machine(2, 2, 3).device(names)


@pytest.mark.parametrize("names", ["cuda:0,cuda:0", "cpu,cuda:0", "cuda,cuda:1", "auto,cuda:1"])
def test_several_devices_are_different_gpus_or_all_the_cpu(names, machine):
    machine(2)
    with pytest.raises(LoRAError, match=rf"`device` \(='{names}'\) must name different GPUs, as in cuda:0,cuda:1"):
        resolve_devices(names)
