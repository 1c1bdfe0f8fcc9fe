"""A run in several processes: real ones, on the CPU, started by torchrun or by the studio."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from core import Adapter, Failed, Finished, LoRAConfig, TrainConfig
from studio import evaluation, jobs, worker
from studio.generating import EvaluationSpec
from studio.runs import Run, Runs
from studio.specs import RunSpec
from tests.studio.test_queue import holds_memory

TRAIN = TrainConfig(
    steps=6,
    batch_size=2,
    learning_rate=1e-2,
    eval_every=3,
    warmup_steps=1,
    max_length=96,
    checkpoint_every=2,
    device="cpu,cpu",
    precision="fp32",
)
FOREVER = dataclasses.replace(TRAIN, steps=1_000_000, eval_every=0, checkpoint_every=10)


@pytest.fixture
def spec(tiny_folder, tiny_data) -> RunSpec:
    return RunSpec("Tiny", str(tiny_folder), tiny_data, LoRAConfig(r=2), TRAIN)


@pytest.fixture
def runs(workspace, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = Runs(workspace)
    yield runs
    for run in runs.list():
        jobs.kill(run)
    for child in jobs._children:
        child.wait()
    jobs._children.clear()


@pytest.fixture
def alone():
    """alone(run): takes the run to its end in this process."""
    before = {number: signal.getsignal(number) for number in worker.SIGNALS}
    yield lambda run: worker.main([str(run.folder)])
    for number, handler in before.items():
        signal.signal(number, handler)


def torchrun(run: Run, num_processes: int, *program: str) -> "subprocess.Popen[bytes]":
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    with run.worker_log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", *launch, *(program or ("-m", "studio.worker")), str(run.folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )


def wait_until(condition, run: Run, seconds: float = 180.0) -> float:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + seconds, run.log_tail(60)
        time.sleep(0.02)
    return time.monotonic() - begin


def steps(run: Run) -> list[tuple]:
    run.log.read()
    return [(s.step, s.num_tokens, s.num_trained_tokens) for s in run.log.steps]


def losses(run: Run) -> list[float]:
    run.log.read()
    return [e.loss for e in (*run.log.steps, *run.log.evaluations)]


def kinds(run: Run) -> list[str]:
    return [json.loads(line)["event"] for line in (run.folder / "events.jsonl").read_bytes().splitlines()]


def with_train(spec: RunSpec, **changes) -> RunSpec:
    return dataclasses.replace(spec, train=dataclasses.replace(spec.train, **changes))


def processes_of(run: Run) -> list[int]:
    """The launcher and the processes that train, as they signed the lock."""
    return [int(number) for number in (run.folder / "lock").read_text().split()]


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def reap() -> None:
    for child in jobs._children:
        child.wait()


@pytest.mark.slow
def test_two_processes_make_the_run_that_one_makes_with_the_doubled_batch(runs, spec, alone):
    asked = EvaluationSpec(evaluation_task="exact", evaluation_at="each", evaluation_prompts=3, longest_answer=6)
    spec = dataclasses.replace(spec, evaluation=asked)
    run, whole = runs.create(spec), runs.create(with_train(spec, device="cpu", batch_size=4))
    jobs.enqueue(runs, run)
    assert alone(whole) == 0
    wait_until(lambda: run.status != "running", run)
    assert run.status == "finished", run.log_tail(60)
    assert steps(run) == steps(whole)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)
    assert kinds(run).count("Started") == kinds(run).count("Finished") == 1
    assert [kind for kind in kinds(run) if kind != "Noted"] == [kind for kind in kinds(whole) if kind != "Noted"]
    assert run.checkpoints.steps() == whole.checkpoints.steps()
    assert (
        [e.metrics for e in run.log.evaluations]
        == [e.metrics for e in whole.log.evaluations]
        == [{"Exact match": 0}] * 3
    )
    first, second = (evaluation.answers_file(r, 0).read_text() for r in (run, whole))
    assert first == second and first.count("\n") == 2  # each process has asked some of them
    a, b = (Adapter.load(r.adapter_folder).factors for r in (run, whole))
    for path in a:
        torch.testing.assert_close(a[path].B @ a[path].A, b[path].B @ b[path].A, rtol=1e-2, atol=1e-4)


def test_processes_with_a_part_of_the_weights_each_make_the_same_run_and_one_process_goes_on(runs, spec, alone):
    """FSDP2 over gloo: one log, checkpoints that know nothing of parts, and a killed process that ends it."""
    run = runs.create(with_train(spec, shard_weights=True, steps=60, eval_every=20))
    jobs.enqueue(runs, run)
    kill_one(run, 1)
    assert any("share the frozen weights out" in note.message for note in run.log.notes)
    again = runs.create(run.continued(with_train(spec, device="cpu", batch_size=4, steps=60, eval_every=20)))
    step = again.checkpoints.steps()[-1]
    assert alone(again) == 0
    whole = runs.create(with_train(spec, device="cpu", batch_size=4, steps=60, eval_every=20))
    assert alone(whole) == 0
    assert 0 < step < 60 and steps(again) == steps(whole)
    assert losses(again) == pytest.approx(losses(whole), rel=1e-3)


def test_a_run_goes_on_in_any_number_of_processes_and_takes_every_row_once(runs, spec, alone, tmp_path):
    """Two processes, by torchrun itself, are paused; one goes on where they stopped in the order of the rows."""
    rows = [{"facts": f"Inn {i}", "text": "x" * (2 * i + 1)} for i in range(24)]  # told apart by their tokens
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, source=str(tmp_path / "rows.jsonl")))
    run = runs.create(with_train(spec, device="cpu", steps=80, eval_every=0))
    child = torchrun(run, 2)
    wait_until(lambda: len(steps(run)) >= 3, run)
    run.ask_to_stop("paused")
    assert child.wait(30) == 0, run.log_tail(60)
    assert run.status == "paused"
    step = run.log.end.step
    assert run.checkpoints.steps()[-1] == step
    assert len(processes_of(run)) == 2
    assert not any(map(is_there, processes_of(run)))
    run.forget_stop()
    assert alone(run) == 0
    assert run.status == "finished"
    taken = steps(run)
    assert [number for number, *_ in taken] == list(range(1, 81))
    whole = runs.create(with_train(spec, device="cpu", batch_size=4, steps=step, eval_every=0))
    assert alone(whole) == 0
    assert taken[:step] == steps(whole)
    after = runs.create(with_train(spec, device="cpu", batch_size=2, steps=80, eval_every=0))
    assert alone(after) == 0
    epochs, rest = divmod(step, 6)  # an epoch's 22 rows are 6 batches of four rows, or 11 of two
    expected = steps(after)[11 * epochs + 2 * rest :]
    assert len(expected) > 20
    assert [n for _, *n in taken[step:]][: len(expected)] == [n for _, *n in expected]


def kill_one(run: Run, place: int) -> None:
    """Kills one of the launcher's processes once there is a checkpoint, and checks how the run ends."""
    wait_until(lambda: run.checkpoints.steps(), run)
    processes = processes_of(run)
    os.kill(processes[1 + place], signal.SIGKILL)
    assert wait_until(lambda: not run.is_running(), run) < 10
    assert run.status == "interrupted"
    assert isinstance(run.log.end, Failed) and run.log.end.cause == "killed"
    assert run.log.end.message.startswith(
        (f"Worker process {place + 1} of 2 was killed", "A worker process was killed")
    )
    assert kinds(run).count("Failed") == 1
    reap()
    assert not any(map(is_there, processes)) and not run.stop_asked


def test_a_killed_process_ends_the_run_with_its_cause(runs, spec):
    run = runs.create(with_train(spec, **vars(FOREVER)))
    jobs.enqueue(runs, run)
    kill_one(run, 1)


@pytest.mark.slow
def test_a_run_whose_first_process_was_killed_goes_on_and_ends_with_its_launcher(runs, spec):
    run = runs.create(with_train(spec, **vars(FOREVER)))
    jobs.enqueue(runs, run)
    kill_one(run, 0)
    step = run.checkpoints.steps()[-1]
    jobs.resume(runs, run)
    wait_until(lambda: run.log.read() or (run.log.end is None and run.log.steps[-1].step > step + 1), run)
    launcher, *workers = processes_of(run)
    os.kill(launcher, signal.SIGKILL)  # nobody holds the lock now: nothing may be written any more
    reap()
    assert wait_until(lambda: not any(map(is_there, workers)), run) < 10
    assert (run.status, run.log.end) == ("interrupted", None)
    run.note_killed()
    assert (run.status, run.log.end.cause) == ("interrupted", "killed")


@pytest.mark.slow
def test_a_run_in_several_processes_is_not_begun_twice_and_all_of_it_can_be_killed(runs, spec):
    run = runs.create(with_train(spec, **vars(FOREVER)))
    jobs.enqueue(runs, run)
    wait_until(lambda: run.checkpoints.steps(), run)
    assert torchrun(run, 2).wait(60) == 1
    assert "is running already" in run.log_tail(200)
    assert (run.status, run.log.end, run.stop_asked) == ("running", None, "")
    groups = run.groups
    begun = time.monotonic()
    jobs.kill(run)
    assert time.monotonic() - begun < 5, "a launcher that nobody has asked for its end yet is not waited for"
    assert len(groups) == 3 and not any(map(holds_memory, groups))
    reap()
    assert (run.status, run.log.end.reason) == ("stopped", "killed")


@pytest.mark.slow
def test_an_error_of_one_process_is_told_once_by_that_one(runs, spec, tmp_path):
    """The memory of the second process does not do; the first meets only that the other is gone."""
    run = runs.create(with_train(spec, device="cpu"))
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys\nfrom studio import worker\n"
        "def fail(*args, **options):\n    raise MemoryError\n"
        "if os.environ['RANK'] == '1':\n    worker.inject = fail\n"
        "sys.exit(worker.main(sys.argv[1:]))\n"
    )
    assert torchrun(run, 2, str(script)).wait(60) == 1
    assert (run.status, run.log.end.cause) == ("failed", "memory")
    assert run.log.end.message.startswith("Not enough memory for batch size 2")
    assert kinds(run).count("Failed") == 1


def test_a_stop_that_was_asked_before_the_first_step_ends_all(runs, spec):
    run = runs.create(spec)
    run.ask_to_stop()
    jobs.enqueue(runs, run)
    wait_until(lambda: not run.is_running(), run)
    assert (run.status, run.log.end) == ("stopped", Finished(0, "stopped", 0))


def test_a_run_holds_all_its_devices_and_waits_for_each(runs, spec, hold, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(jobs, "_detached", lambda *_: subprocess.Popen(["true"]))
    hold(runs.create(with_train(spec, device="cuda:0,cuda:1")))
    for device in ("cuda:1,cuda:2", "cuda", "cuda:2,cuda:3"):
        jobs.enqueue(runs, runs.create(with_train(spec, device=device)))
    assert [run.spec.train.device for run in runs.queued()] == ["cuda:1,cuda:2", "cuda"]
