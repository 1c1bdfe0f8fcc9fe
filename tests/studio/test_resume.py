"""A run that was broken off, in whatever way, goes on as if it had not been."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from core import (
    Adapter,
    Checkpoint,
    Checkpointed,
    Evaluated,
    Event,
    Finished,
    LoRAConfig,
    LoRAError,
    Resumed,
    Step,
    TrainConfig,
)
from studio import jobs, worker
from studio.event_log import EventWriter
from studio.runs import Run, Runs
from studio.specs import RunSpec
from studio.workspace import Workspace

TRAIN = TrainConfig(
    steps=9,
    batch_size=4,
    learning_rate=1e-2,
    eval_every=4,
    spectrum_every=2,
    warmup_steps=2,
    checkpoint_every=3,
    max_length=96,
    device="cpu",
    precision="fp32",
)


@pytest.fixture
def spec(tiny_folder, tiny_data) -> RunSpec:
    return RunSpec("Tiny", str(tiny_folder), tiny_data, LoRAConfig(r=2, dropout=0.2), TRAIN)


@pytest.fixture
def runs(workspace) -> Runs:
    return Runs(workspace)


@pytest.fixture(autouse=True)
def as_it_was():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    for child in jobs._children:
        child.wait()
    jobs._children.clear()


class _GoneError(BaseException):
    """The worker ends here, as if it had been killed: no handler of `Exception` sees it."""


def work(run: Run) -> int:
    run.forget_stop()
    return worker.main([str(run.folder)])


def break_off(run: Run, monkeypatch, when) -> None:
    """Runs the worker until `when(event)`, which it does not live to write."""
    write = EventWriter.write

    def die(self, event: Event) -> None:
        if when(event):
            raise _GoneError
        write(self, event)

    with monkeypatch.context() as patch, pytest.raises(_GoneError):
        patch.setattr(EventWriter, "write", die)
        work(run)


def told(run: Run) -> list[tuple]:
    """Steps, evaluations and spectra as they stand in the log, without time and memory."""
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_bytes().splitlines()]
    changing = ("time", "step_seconds", "evaluate_seconds", "memory_bytes")
    return [
        tuple(value for key, value in line.items() if key not in changing)
        for line in lines
        if line["event"] in ("Step", "Evaluated", "SpectrumMeasured")
    ]


def same_adapter(one: Run, other: Run) -> bool:
    a, b = (Adapter.load(run.adapter_folder).factors for run in (one, other))
    return all(torch.equal(a[path].A, b[path].A) and torch.equal(a[path].B, b[path].B) for path in a)


@pytest.fixture
def whole(runs, spec) -> Run:
    """The run without a break."""
    run = runs.create(spec)
    assert work(run) == 0
    return run


def at_step(number: int):
    return lambda event: isinstance(event, Step) and event.step == number


def at_evaluation(number: int):
    return lambda event: isinstance(event, Evaluated) and event.step == number


def at_checkpoint(number: int):
    return lambda event: isinstance(event, Checkpointed) and event.step == number


BREAKS = {
    "before any checkpoint": (at_step(3), 0),
    "after a checkpoint": (at_step(6), 4),
    "before an evaluation": (at_evaluation(8), 6),
    "once a checkpoint is written, before it is told": (at_checkpoint(6), 6),
    "before the end is told": (lambda event: isinstance(event, Finished), 9),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_run_that_was_killed_goes_on_and_says_the_same(name, runs, spec, whole, monkeypatch):
    when, resumed_after = BREAKS[name]
    run = runs.create(spec)
    break_off(run, monkeypatch, when)
    assert run.status == "interrupted"
    if name == list(BREAKS)[-1]:  # somebody looked meanwhile
        run.note_killed()
    last = run.log.steps[-1].step
    with (run.folder / "events.jsonl").open("ab") as file:
        file.write(b'{"time": 17, "event": "St')  # half a line, as a crash leaves it
    assert work(run) == 0
    assert run.status == "finished"
    assert told(run) == told(whole)
    assert same_adapter(run, whole)
    lines = (run.folder / "events.jsonl").read_bytes().splitlines()
    resumed = [json.loads(line)["step"] for line in lines if b'"Resumed"' in line]
    assert resumed == ([resumed_after] if resumed_after else [])
    notes = [note.message for note in run.log.notes if "killed" in note.message]
    assert notes == [f"The worker before was killed, or the machine went down, after step {last}"]


def test_a_run_may_break_off_again_and_again(runs, spec, whole, monkeypatch):
    run = runs.create(spec)
    for number in (2, 5, 5, 8):
        break_off(run, monkeypatch, at_step(number))
    work(run)
    assert told(run) == told(whole)
    assert same_adapter(run, whole)


def test_a_paused_run_has_saved_everything_and_goes_on(runs, spec, whole, monkeypatch):
    run = runs.create(spec)
    write = EventWriter.write

    def ask(self, event: Event) -> None:
        write(self, event)
        if at_step(5)(event):
            run.ask_to_stop("paused")

    with monkeypatch.context() as patch:
        patch.setattr(EventWriter, "write", ask)
        assert work(run) == 0
    assert (run.status, run.log.end.step, run.checkpoints.steps()[-1]) == ("paused", 5, 5)
    assert work(run) == 0
    assert not any("killed" in note.message for note in run.log.notes)
    assert told(run) == told(whole)
    assert same_adapter(run, whole)


def test_a_page_that_watched_the_break_sees_each_step_once(runs, spec, whole, monkeypatch):
    run = runs.create(spec)
    break_off(run, monkeypatch, at_step(6))
    assert run.status == "interrupted"
    assert [s.step for s in run.log.steps] == [1, 2, 3, 4, 5]
    break_off(run, monkeypatch, lambda event: isinstance(event, Resumed))  # the log is cut back, nothing is added
    run.log.refresh()
    assert [s.step for s in run.log.steps] == [1, 2, 3, 4]
    work(run)
    assert run.status == "finished"
    assert [s.step for s in run.log.steps] == list(range(1, 10))
    assert [e.step for e in run.log.evaluations] == [0, 4, 8, 9]


def test_the_last_two_checkpoints_and_the_best_are_kept(runs, spec, monkeypatch):
    run = runs.create(dataclasses.replace(spec, train=dataclasses.replace(TRAIN, eval_every=2, checkpoint_every=1)))
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr(sys.modules["core.train"], "_evaluate", lambda *of: Evaluated(of[3], next(losses), 9, 0.1))
    work(run)
    assert run.checkpoints.steps() == [2, 8, 9]
    assert all(Adapter.load(run.checkpoints.at(step)).num_parameters for step in (2, 8, 9))


@pytest.mark.parametrize("can_link", [True, False])
def test_a_checkpoint_s_adapter_is_that_of_its_step_and_written_once(can_link, runs, spec, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    written, save = [], Adapter.save
    monkeypatch.setattr(Adapter, "save", lambda self, folder: written.append(folder) or save(self, folder))
    if not can_link:  # as on a file system that has one name a file
        monkeypatch.setattr(os, "link", refuse)
    run = runs.create(spec)
    work(run)
    assert written == [run.adapter_folder] * 5  # steps 3 and 6 by number, 4, 8 and 9 by their evaluations
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours, kept = run.adapter_folder / name, run.checkpoints.at(9) / name
        assert ours.read_bytes() == kept.read_bytes() and ours.samefile(kept) == can_link
    for step in run.checkpoints.steps():
        trained = Checkpoint.load(run.checkpoints.at(step) / "training.safetensors").tensors
        factors = Adapter.load(run.checkpoints.at(step)).factors
        assert all(torch.equal(f.B, trained[f"{path}.lora_B"]) for path, f in factors.items())


def test_a_run_that_ends_early_gives_the_adapter_of_its_best_step(runs, spec, monkeypatch):
    train = dataclasses.replace(TRAIN, eval_every=1, checkpoint_every=0, patience=2)
    run = runs.create(dataclasses.replace(spec, train=train))
    losses = iter([3.0, 2.0, 1.0, 1.5, 1.4])
    monkeypatch.setattr(sys.modules["core.train"], "_evaluate", lambda *of: Evaluated(of[3], next(losses), 9, 0.1))
    assert work(run) == 0
    assert (run.status, run.log.end.reason, run.log.end.step) == ("finished", "early", 4)
    best, last = (Adapter.load(run.checkpoints.at(step)).factors for step in (2, 4))
    saved = Adapter.load(run.adapter_folder).factors
    assert all(torch.equal(saved[path].B, best[path].B) for path in best)
    assert not all(torch.equal(saved[path].B, last[path].B) for path in last)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 99, None], ids=["empty", "no file of tensors", "missing"])
def test_a_damaged_checkpoint_is_passed_over_and_said(damage, runs, spec, whole, monkeypatch):
    run = runs.create(spec)
    break_off(run, monkeypatch, at_step(8))
    newest = run.checkpoints.at(6) / "training.safetensors"
    newest.write_bytes(damage) if damage is not None else newest.unlink()
    work(run)
    assert told(run) == told(whole)
    assert same_adapter(run, whole)
    run.log.refresh()
    said = [note.message for note in run.log.notes if "cannot be used" in note.message]
    assert [m.startswith("The checkpoint of step 6 cannot be used: ") for m in said] == [True] * (damage is not None)
    assert run.checkpoints.steps()[-2:] == [8, 9]


def test_what_a_crash_left_half_written_is_taken_away(runs, spec, monkeypatch):
    run = runs.create(spec)
    break_off(run, monkeypatch, at_step(8))
    (run.checkpoints.folder / ".saving-x" / "00000007").mkdir(parents=True)
    shutil.copytree(run.checkpoints.at(6), run.checkpoints.folder / ".gone-3")
    assert run.checkpoints.steps() == [4, 6]
    work(run)
    assert [p.name for p in run.checkpoints.folder.iterdir() if p.name.startswith(".")] == []


def test_a_run_that_ended_trains_further_as_a_run_of_its_own(runs, spec, whole, monkeypatch):
    files = {p: p.read_bytes() for p in whole.folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(jobs, "_detached", lambda *_: subprocess.Popen(["true"]))
    further = jobs.further(runs, whole, 3)
    assert (further.spec.continues, further.spec.name) == (f"{whole.id}@9", "Tiny (+3 steps)")
    assert further.checkpoints.steps() == whole.checkpoints.steps()
    further.place = None
    assert (further.status, further.log.end.step) == ("paused", 9)
    work(further)
    further.log.refresh()
    assert told(further)[: len(told(whole))] == told(whole)
    assert [s.step for s in further.log.steps] == list(range(1, 13))
    assert not any("killed" in note.message for note in further.log.notes)
    assert further.status == "finished"
    assert all(p.read_bytes() == content for p, content in files.items())  # the first one is as it was


def test_a_run_that_took_all_its_steps_is_not_resumed(runs, whole):
    with pytest.raises(LoRAError, match="has taken all its steps; train it further by some more"):
        jobs.resume(runs, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, r"`steps` \(=0\) must be at least 1"),
        ({"running": True}, r"must have ended to be trained further; it is running"),
        ({"bare": True}, r"must have a checkpoint to be trained further; it has none"),
    ],
)
def test_what_cannot_be_trained_further_says_why(change, message, runs, whole, hold):
    if change.get("running"):
        hold(whole)
    if change.get("bare"):
        shutil.rmtree(whole.checkpoints.folder)
    with pytest.raises(LoRAError, match=message):
        jobs.further(runs, whole, change.get("num_steps", 3))
    assert runs.list() == [whole]


@pytest.mark.parametrize("step", [7, 10])
def test_a_checkpoint_that_is_gone_cannot_be_continued(step, runs, whole):
    spec = dataclasses.replace(whole.spec, continues=f"{whole.id}@{step}")
    with pytest.raises(
        LoRAError, match=rf"`continues` \(='{whole.id}@{step}'\) must name a checkpoint of that run; it"
    ):
        runs.create(spec)
    assert runs.list() == [whole]


# A full disk.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB of its own, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs more rights than this user has")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_pauses_the_run_and_costs_nothing(small_disk, spec, whole, monkeypatch):
    run = Runs(Workspace(small_disk)).create(spec)
    filler, write = small_disk / "filler", EventWriter.write

    def fill(self, event: Event) -> None:
        write(self, event)
        if at_checkpoint(4)(event):
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with monkeypatch.context() as patch:
        patch.setattr(EventWriter, "write", fill)
        assert work(run) == 1
    assert run.status == "paused", run.log_tail()
    assert run.log.end.cause == "disk"
    assert run.log.end.message.startswith("The disk is full, so the run is paused. Free some space")
    assert run.checkpoints.steps() == [3, 4]
    filler.unlink()
    assert work(run) == 0
    assert told(run) == told(whole)
    assert same_adapter(run, whole)


def test_a_write_that_finds_the_disk_full_pauses_the_run(runs, spec, monkeypatch):
    run = runs.create(spec)
    save = Checkpoint.save

    def refuse(self, path) -> None:
        if "00000006" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, path)

    monkeypatch.setattr(Checkpoint, "save", refuse)
    assert work(run) == 1
    assert (run.status, run.log.end.cause) == ("paused", "disk")
    assert run.checkpoints.steps() == [3, 4]
    assert not (run.folder / "reserve").exists()
