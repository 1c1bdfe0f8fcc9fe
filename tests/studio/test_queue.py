"""The queue: runs wait for their device, in an order that can be changed, and none holds up the next."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from core import LoRAConfig, LoRAError, Step, TrainConfig
from studio import jobs
from studio.runs import Run, Runs, is_held
from studio.specs import RunSpec

QUICK = TrainConfig(steps=2, eval_every=0, warmup_steps=0, max_length=64, device="cpu", precision="fp32")
FOREVER = dataclasses.replace(QUICK, steps=1_000_000)


@pytest.fixture
def spec(tiny_folder, tiny_data) -> RunSpec:
    return RunSpec("Tiny", str(tiny_folder), tiny_data, LoRAConfig(r=2), QUICK)


@pytest.fixture
def runs(workspace):
    runs = Runs(workspace)
    yield runs
    for run in runs.queued():
        run.place = None
    for child in jobs._children:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        child.wait()
    jobs._children.clear()
    for run in runs.list():  # what a queue's process started
        jobs.kill(run)


@pytest.fixture
def idle(monkeypatch):
    """No process is started: what waits stays."""
    monkeypatch.setattr(jobs, "_detached", lambda module, log, *fds: subprocess.Popen(["true"]))


def wait_until(condition, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def holds_memory(process: int) -> bool:
    """Whether it lives: one that has ended and was not asked for its end is still listed, without memory."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "VmRSS" in status.read_text()


def names(runs: Runs) -> list[str]:
    return [run.spec.name for run in runs.queued()]


def queue_three(runs: Runs, spec: RunSpec, hold) -> list[Run]:
    hold(runs.create(dataclasses.replace(spec, name="on the device")))
    return [jobs.start(runs, dataclasses.replace(spec, name=name)) for name in "abc"]


def test_where_the_device_is_free_a_run_starts_at_once_else_it_waits(runs, spec, hold, idle):
    first = runs.create(spec)
    with first.locked():
        second = jobs.start(runs, dataclasses.replace(spec, name="second"))
        assert (first.status, second.status) == ("running", "queued")
        assert names(runs) == ["second"]


def test_the_order_is_that_of_the_requests_until_it_is_changed(runs, spec, hold, idle):
    a, b, c = queue_three(runs, spec, hold)
    assert names(runs) == ["a", "b", "c"]
    jobs.move(runs, c, -1)
    assert names(runs) == ["a", "c", "b"]
    jobs.move(runs, a, 1)
    assert names(runs) == ["c", "a", "b"]
    jobs.move(runs, b, -99)
    assert names(runs) == ["b", "c", "a"]
    jobs.move(runs, b, 99)
    assert names(runs) == ["c", "a", "b"]
    with pytest.raises(LoRAError, match="must be queued to be moved; it is stopped"):
        jobs.cancel(runs, a)
        jobs.move(runs, a, 1)
    assert names(runs) == ["c", "b"]


def test_a_run_that_was_cancelled_can_be_resumed_and_comes_first(runs, spec, hold, idle):
    a, b, c = queue_three(runs, spec, hold)
    jobs.cancel(runs, b)
    assert (b.status, b.log.end.step) == ("stopped", 0)
    jobs.resume(runs, b)
    assert names(runs) == ["b", "a", "c"]
    assert not b.stop_asked


@pytest.mark.parametrize(("state", "message"), [("queued", "is queued already"), ("running", "is running already")])
def test_what_goes_on_is_not_resumed(state, message, runs, spec, hold, idle):
    a, *_ = queue_three(runs, spec, hold)
    if state == "running":
        a.place = None
        hold(a)
    with pytest.raises(LoRAError, match=message):
        jobs.resume(runs, a)


def test_a_queue_that_nobody_runs_any_more_goes_on_when_it_is_woken(runs, spec, idle):
    run = runs.create(spec)
    run.place = 3.0
    assert run.status == "queued"
    jobs.wake(runs)
    assert run.place is None
    assert len(jobs._children) == 1


def test_a_killed_worker_is_not_waited_for_because_nobody_asked_for_its_end(runs, spec):
    """It is a child of the studio, which asks when it starts the next one."""
    run = jobs.start(runs, dataclasses.replace(spec, train=FOREVER))
    wait_until(lambda: run.groups)
    (group,), (child,) = run.groups, jobs._children
    assert holds_memory(group)
    begun = time.monotonic()
    jobs.kill(run)
    assert time.monotonic() - begun < 5 and child.returncode is None
    assert not holds_memory(group)
    assert (run.status, run.log.end.reason) == ("stopped", "killed")
    jobs.kill(run)  # nothing is there to be killed
    assert [e.reason for e in run.log.refresh()] == []


def test_a_deleted_run_is_out_of_the_queue(runs, spec, hold, idle):
    a, *_ = queue_three(runs, spec, hold)
    runs.delete(a)
    assert names(runs) == ["b", "c"]


def test_a_damaged_place_counts_as_none(runs, spec, hold, idle):
    a, *_ = queue_three(runs, spec, hold)
    (a.folder / "queued").write_text("soon")
    assert names(runs) == ["b", "c"]


def test_of_two_starts_at_once_one_waits(runs, workspace, spec, monkeypatch):
    """The lock that a start holds is that of another process's queue, too."""
    together, what_can = threading.Barrier(2), jobs._start_what_can
    monkeypatch.setattr(jobs, "_detached", lambda module, log, *fds: subprocess.Popen(["sleep", "60"], pass_fds=fds))

    def meet(of: Runs) -> bool:
        with contextlib.suppress(threading.BrokenBarrierError):  # the other one is to wait outside
            together.wait(1)
        return what_can(of)

    monkeypatch.setattr(jobs, "_start_what_can", meet)
    threads = [threading.Thread(target=lambda: jobs.start(Runs(workspace), spec)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(run.status for run in runs.list()) == ["queued", "running"]


def test_the_queue_goes_on_by_itself_past_a_run_that_fails_and_past_a_killed_one(runs, spec, tmp_path):
    """Real workers: one is killed, one fails, one does its work; whoever asked for them is gone meanwhile."""
    specs = {
        "killed": dataclasses.replace(spec, train=FOREVER),
        "fails": dataclasses.replace(spec, model="/no/such/folder"),
        "works": spec,
    }
    for name, one in specs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(dataclasses.replace(one, name=name).to_dict()))
    script = (
        "import sys; from pathlib import Path; from studio import jobs; from studio.runs import Runs, RunSpec;"
        "from studio.workspace import Workspace; runs = Runs(Workspace(sys.argv[1]));"
        "[jobs.start(runs, RunSpec.read(Path(p))) for p in sys.argv[2:]]"
    )
    files = [str(tmp_path / f"{name}.json") for name in specs]
    subprocess.run([sys.executable, "-c", script, str(runs.workspace.root), *files], check=True)
    by_name = {run.spec.name: run for run in runs.list()}
    assert [by_name[name].status for name in specs] == ["running", "queued", "queued"]
    wait_until(lambda: any(isinstance(event, Step) for event in by_name["killed"].log.refresh()))
    (group,) = by_name["killed"].groups
    assert holds_memory(group)
    jobs.kill(by_name["killed"])
    assert not by_name["killed"].is_running()
    assert not holds_memory(group)
    wait_until(lambda: by_name["works"].status == "finished")
    assert [by_name[name].status for name in specs] == ["stopped", "failed", "finished"]
    assert by_name["killed"].log.end.reason == "killed"
    wait_until(lambda: not is_held(runs.workspace.root / "queue.lock"))  # it ends when nothing waits
