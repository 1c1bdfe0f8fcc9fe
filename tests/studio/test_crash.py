"""Workers that are killed at random moments lose nothing: every loss is that of the run that nobody disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from core import Adapter, Checkpoint, LoRAConfig, TrainConfig
from studio.checkpoints import TRAINING_FILE
from studio.runs import Run, Runs
from studio.specs import RunSpec


@pytest.fixture
def spec(tiny_folder, tiny_data, steps) -> RunSpec:
    train = TrainConfig(
        steps=steps,
        batch_size=2,
        learning_rate=5e-3,
        eval_every=10,
        checkpoint_every=1,  # so that many a kill falls into one
        max_length=64,
        device="cpu",
        precision="fp32",
    )
    return RunSpec("Tiny", str(tiny_folder), tiny_data, LoRAConfig(r=2, dropout=0.1), train)


def start(run: Run) -> "subprocess.Popen[bytes]":
    with run.worker_log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "studio.worker", str(run.folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def steps_and_evaluations(run: Run) -> list[tuple]:
    """As they stand in the log, without time and memory; a line that is torn or is no JSON is an error."""
    content = (run.folder / "events.jsonl").read_bytes()
    assert content.endswith(b"\n")
    changing = ("time", "step_seconds", "evaluate_seconds", "memory_bytes")
    lines = [json.loads(line) for line in content.splitlines()]
    return [
        tuple(value for key, value in line.items() if key not in changing)
        for line in lines
        if line["event"] in ("Step", "Evaluated")
    ]


def check_files(run: Run) -> None:
    """Every checkpoint and every adapter that is there under its own name is whole."""
    for step in run.checkpoints.steps():
        assert Checkpoint.load(run.checkpoints.at(step) / TRAINING_FILE).step == step
        assert Adapter.load(run.checkpoints.at(step)).factors
    if run.has_adapter:
        assert Adapter.load(run.adapter_folder).factors


def wait_for_a_step(run: Run, since: float, child: "subprocess.Popen[bytes]") -> None:
    """Waits until this worker, not one before it, has told of a step."""
    log, deadline = run.folder / "events.jsonl", time.monotonic() + 90
    while child.poll() is None:
        lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
        whole = [line for line in lines[-3:] if line.endswith(b"\n") and b'"Step"' in line]
        if any(json.loads(line)["time"] > since for line in whole):
            return
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(("num_kills", "steps"), [(2, 60), pytest.param(60, 200, marks=pytest.mark.slow)])
def test_kills_at_random_moments_cost_nothing(num_kills, steps, workspace, spec):
    runs = Runs(workspace)
    whole = runs.create(spec)
    assert start(whole).wait() == 0
    expected, adapter = steps_and_evaluations(whole), Adapter.load(whole.adapter_folder).factors
    assert len(expected) == steps + steps // 10 + 1

    def check_end(run: Run) -> None:
        assert run.status == "finished"
        assert steps_and_evaluations(run) == expected
        end = Adapter.load(run.adapter_folder).factors
        assert all(torch.equal(end[path].A, f.A) and torch.equal(end[path].B, f.B) for path, f in adapter.items())

    rng = random.Random(num_kills)
    counts = {"starting": 0, "training": 0, "writing a checkpoint": 0, "runs": 1}
    run = runs.create(spec)
    for kill in range(num_kills):
        since = time.time()
        child = start(run)
        if kill % 6 == 5:  # while it starts: nothing, or the log that is being cut back
            time.sleep(rng.uniform(0.0, 6.0))
            counts["starting"] += 1
        else:
            wait_for_a_step(run, since, child)
            time.sleep(rng.uniform(0.0, 0.3))
            counts["training"] += 1
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        counts["writing a checkpoint"] += any(run.checkpoints.folder.glob(".*"))
        check_files(run)
        assert run.status in ("interrupted", "finished")
        if run.status == "finished":
            check_end(run)
            run = runs.create(spec)
            counts["runs"] += 1
    assert start(run).wait() == 0
    check_end(run)
    if num_kills >= 50:
        assert min(counts["starting"], counts["training"], counts["writing a checkpoint"]) >= 10
    print(f"{num_kills} kills: {counts}")
