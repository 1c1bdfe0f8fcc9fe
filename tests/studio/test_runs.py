"""Runs: a frozen spec, a log read as it grows, a state that is read from the folder, and ids that lead nowhere else."""

import dataclasses
import fcntl
import json
import math
import os
import re
import subprocess
import sys
import threading
from datetime import datetime, timedelta

import pytest

from core import Evaluated, Failed, Finished, LoRAConfig, LoRAError, Noted, Started, Step, TrainConfig, to_record
from studio import runs as runs_module
from studio.data import DataSpec
from studio.event_log import EventLog, EventWriter
from studio.runs import Run, Runs
from studio.specs import RunSpec

STARTED = Started(9, 384, 10_000, "cpu", "float32", "resident memory of the process")
EVALUATED = Evaluated(2, 0.75, 512, 0.25)
DONE, STOPPED = Finished(9, "done", 1 << 30), Finished(4, "stopped", 1 << 30)
SPEC = RunSpec(
    name="Inns «é» 日本",
    model="owner/name",
    data=DataSpec(source="rows.csv", layout="text", text="t"),
    lora=LoRAConfig(r=3, target_modules=("q_proj", "v_proj"), rank_pattern={"q_proj": 2}),
    train=TrainConfig(steps=7, learning_rate=2e-4, schedule="cosine"),
)


def step(number: int, loss: float = 1.5) -> Step:
    return Step(number, loss, 1e-3, 0.5, num_tokens=120, num_trained_tokens=80, step_seconds=0.5, memory_bytes=1 << 20)


def line(event) -> bytes:
    return json.dumps({"time": 1.0, **to_record(event)}).encode() + b"\n"


@pytest.fixture
def log(tmp_path) -> EventLog:
    return EventLog(tmp_path / "events.jsonl")


@pytest.fixture
def say(tmp_path):
    """Appends bytes to the file that `log` reads."""

    def append(data: bytes) -> None:
        with (tmp_path / "events.jsonl").open("ab") as file:
            file.write(data)

    return append


# The spec


def test_a_spec_goes_through_json_and_comes_back_equal():
    assert RunSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC


def test_a_spec_of_nothing_is_the_default_and_its_parts_fill_up():
    assert RunSpec.from_dict({}) == RunSpec()
    assert RunSpec.from_dict({"lora": {"r": 2}}) == RunSpec(lora=LoRAConfig(r=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"A spec must be a table with name, model, data, lora, method, train, evaluation; not list\."),
        ("r=8", r"A spec must be a table .*; not str\."),
        (None, r"A spec must be a table .*; not NoneType\."),
        (
            {"peft": {}, "Lora": {}},
            r"A spec has no part Lora, peft; it has name, model, data, lora, method, train, evaluation\.",
        ),
        ({"name": ""}, r"`name` \(=''\) must be text\."),
        ({"name": " \n"}, r"`name` \(=' \\n'\) must be text\."),
        ({"model": 3}, r"`model` \(=3\) must be text\."),
        ({"model": None}, r"`model` \(=None\) must be text\."),
        ({"lora": []}, r"LoRAConfig must be given as a table of settings, not \[\]\."),
        ({"data": None}, r"DataSpec must be given as a table of settings, not None\."),
        ({"train": {"epochs": 3}}, r"TrainConfig has no setting 'epochs'; it has steps, "),
        ({"lora": {"r": 0}}, r"`r` \(=0\) must be at least 1\."),
    ],
)
def test_a_wrong_spec_is_refused_in_one_sentence(values, message):
    with pytest.raises(LoRAError, match=message):
        RunSpec.from_dict(values)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"{}]"],
    ids=["missing", "empty", "torn", "not UTF-8", "nested too deeply", "more than JSON"],
)
def test_a_spec_file_that_is_no_json_is_refused_by_name(content, tmp_path):
    path = tmp_path / "spec.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoRAError, match=rf"`SPEC` \(={str(path)!r}\) must be a JSON file \(.+\); a run's own spec"):
        RunSpec.read(path)


def test_a_folder_is_refused_as_spec(tmp_path):
    with pytest.raises(LoRAError, match="must be a JSON file .*directory"):
        RunSpec.read(tmp_path)


def test_the_spec_is_frozen_on_disk(workspace):
    ranks = {"q_proj": 2}
    run = Runs(workspace).create(RunSpec(lora=LoRAConfig(rank_pattern=ranks)))
    before = (run.folder / "spec.json").read_bytes()
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.spec.name = "Other"
    ranks["q_proj"] = 5
    run.spec.to_dict()["train"]["steps"] = 1_000
    assert (run.folder / "spec.json").read_bytes() == before
    assert Run(run.folder).spec == RunSpec(lora=LoRAConfig(rank_pattern={"q_proj": 2}))


# The log


def test_a_log_that_does_not_exist_yet_is_empty(log):
    assert (log.refresh(), log.num_events, log.end) == ([], 0, None)


def test_only_what_is_new_is_read(log, say):
    say(line(Noted("Reading")) + line(STARTED))
    assert log.refresh() == [Noted("Reading"), STARTED]
    assert log.refresh() == []
    say(line(step(1)) + line(EVALUATED))
    assert log.refresh() == [step(1), EVALUATED]
    say(line(DONE))
    assert log.refresh() == [DONE]
    assert (log.notes, log.started, log.steps, log.evaluations, log.end, log.num_events) == (
        [Noted("Reading")],
        STARTED,
        [step(1)],
        [EVALUATED],
        DONE,
        5,
    )


def test_a_torn_last_line_waits_until_it_is_whole(log, say):
    whole = line(step(2))
    say(line(step(1)) + whole[:20])
    assert log.refresh() == [step(1)]
    say(whole[20:-1])
    assert log.refresh() == []
    say(whole[-1:])
    assert log.refresh() == [step(2)]
    assert log.steps == [step(1), step(2)]


@pytest.mark.parametrize(
    "damage",
    [
        b"{\n",
        b"\x00\x00\x00\n",
        b"\xff\n",
        b"null\n",
        b'"text"\n',
        b"[" * 100_000 + b"\n",
        b'{"event": "Noted", "message": "no time"}\n',
        b'{"time": 1, "event": "Exploded"}\n',
        b'{"time": 1, "event": "Noted"}\n',
        b"[1]\n",
        pytest.param(
            b'{"time": "noon", "event": "Noted", "message": "x"}\n',
        ),
    ],
    ids=lambda b: b[:24].decode("latin-1").strip(),
)
def test_a_damaged_line_is_named_by_file_and_number(damage, log, say, tmp_path):
    say(line(step(1)))
    log.refresh()
    say(line(step(2)) + damage)
    with pytest.raises(LoRAError, match=rf"{re.escape(str(tmp_path / 'events.jsonl'))} is damaged at event 3: "):
        log.refresh()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_survives_writing_and_reading(loss, write_run):
    run = write_run([step(1, loss)])
    (found,) = run.log.refresh()
    assert repr(found.loss) == repr(loss)


def test_the_writer_stamps_events_with_the_time(write_run, monkeypatch):
    monkeypatch.setattr(runs_module.time, "time", lambda: 1234.56789)
    run = write_run([Noted("x")])
    assert run.log.refresh() == [Noted("x")]
    assert run.log.last_time == 1234.568


def test_lines_of_two_writers_at_once_stay_whole(workspace):
    run = Runs(workspace).create(RunSpec())

    def write(first: int) -> None:
        writer = EventWriter(run.log)
        for i in range(first, first + 400):
            writer.write(step(i))
        writer.close()

    writers = [threading.Thread(target=write, args=(first,)) for first in (0, 400)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert sorted(event.step for event in run.log.refresh()) == list(range(800))


def test_a_writer_that_is_opened_cuts_off_no_line_that_another_writes_meanwhile(workspace, monkeypatch):
    run = Runs(workspace).create(RunSpec())
    first, read = EventWriter(run.log), os.pread
    other = threading.Thread(target=first.write, args=(step(0),))

    def read_as_the_other_writes(*place):
        found = read(*place)
        other.start()
        other.join(0.1)  # it waits until the look is over; were it not to, its line would be there by now
        return found

    monkeypatch.setattr(os, "pread", read_as_the_other_writes)
    EventWriter(run.log).close()
    other.join()
    assert [event.step for event in run.log.refresh()] == [0]


FILL_THE_DISK = """
import resource, sys
from pathlib import Path
from core import Finished, Noted
from studio.event_log import EventWriter
from studio.runs import Run
run = Run(Path(sys.argv[1]))
writer = EventWriter(run.log)
writer.write(Noted("first"))
size = (run.folder / "events.jsonl").stat().st_size
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
try:
    writer.write(Noted("this one finds room for ten bytes only"))
except OSError:
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
writer.write(Finished(1, "stopped", 0))
"""


def test_a_line_that_a_full_disk_cut_short_damages_no_other(workspace):
    run = Runs(workspace).create(RunSpec())
    subprocess.run([sys.executable, "-c", FILL_THE_DISK, run.folder], check=True)
    events = run.log.refresh()
    assert events[0] == Noted("first")
    assert events[-1] == Finished(1, "stopped", 0)


# The state


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([], "interrupted"),
        ([Noted("Reading"), STARTED, step(1)], "interrupted"),
        ([STARTED, step(1), DONE], "finished"),
        ([STARTED, step(1), STOPPED], "stopped"),
        ([Noted("Reading"), Failed("No row.")], "failed"),
    ],
)
def test_without_a_worker_the_state_is_what_the_log_ends_with(events, status, write_run):
    assert write_run(events).status == status


def test_the_time_left_is_what_the_last_steps_took_less_what_has_passed(write_run, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("studio.runs.time.time", lambda: now[0])
    slow = [dataclasses.replace(step(i), step_seconds=100.0) for i in range(1, 11)]
    run = write_run([*slow, *(step(i) for i in range(11, 31))], RunSpec(train=TrainConfig(steps=60)))
    run.log.refresh()
    assert run.seconds_left() == pytest.approx(30 * 0.5)
    now[0] += 0.2
    assert run.seconds_left() == pytest.approx(30 * 0.5 - 0.2)
    now[0] += 100  # a step that hangs does not eat up the others' time
    assert run.seconds_left() == pytest.approx(29 * 0.5)
    now[0] -= 500  # the clock was put back
    assert run.seconds_left() == pytest.approx(30 * 0.5)


@pytest.mark.parametrize("events", [[], [STARTED, step(1)], [STARTED, DONE]])
def test_a_run_whose_lock_is_held_is_running_whatever_its_log_says(events, write_run, hold):
    run = write_run(events)
    hold(run)
    assert run.is_running()
    assert run.status == Run(run.folder).status == "running"


HOLD_THE_LOCK = """
import sys
from pathlib import Path
from studio.runs import Run
with Run(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_worker_leaves_no_lock_behind(write_run):
    run = write_run([STARTED, step(1)])
    worker = subprocess.Popen(
        [sys.executable, "-c", HOLD_THE_LOCK, run.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with worker:
        assert worker.stdout.readline() == b"held\n"
        assert run.status == "running"
        with pytest.raises(LoRAError, match="is running already"), run.locked():
            pass
        worker.kill()
    assert run.status == "interrupted"
    with run.locked():
        assert run.status == "running"


def test_that_a_worker_was_killed_is_noted_once_by_whoever_finds_it(write_run, hold):
    run, untouched, ended = write_run([STARTED, step(1)]), write_run([]), write_run([STARTED, DONE])
    before = untouched.folder / "events.jsonl", (ended.folder / "events.jsonl").read_bytes()
    for one in (run, untouched, ended):
        for _ in range(2):
            one.note_killed()
    assert [type(e) for e in Run(run.folder).log.refresh()] == [Started, Step, Failed]
    assert (run.status, run.log.end.cause) == ("interrupted", "killed")
    assert before == (before[0], ended.log.path.read_bytes()) and not before[0].read_bytes()
    going = write_run([STARTED, step(1)])
    hold(going)
    going.note_killed()
    assert (going.status, going.log.end) == ("running", None)


def test_who_follows_a_worker_that_is_killed_is_told(write_run):
    run = write_run([STARTED, step(1)])
    assert [getattr(event, "cause", "") for event in run.follow()] == ["", "", "killed"]


def test_a_lock_can_be_held_once_and_is_free_afterwards(write_run):
    run = write_run()
    again = pytest.raises(LoRAError, match=rf"Run {run.id} is running already; watch it, or stop it first\.")
    with run.locked(), again, Run(run.folder).locked():
        pass
    assert not run.is_running()
    with pytest.raises(ZeroDivisionError), run.locked():
        _ = 1 / 0
    assert not run.is_running()


def test_a_child_that_inherits_the_lock_keeps_the_run_running(write_run):
    run = write_run()
    with run.locked() as lock:
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with child:
        assert run.is_running()
    assert not run.is_running()


def test_asking_for_the_state_does_not_hinder_a_worker_from_starting(write_run):
    run = write_run()
    asked = os.open(run.folder / "lock", os.O_RDONLY | os.O_CREAT)
    fcntl.flock(asked, fcntl.LOCK_SH)  # what another process's is_running() does, for longer
    threading.Timer(0.1, os.close, [asked]).start()
    with run.locked():
        assert run.status == "running"


def test_asking_to_stop_is_seen_by_everyone(write_run):
    run = write_run()
    assert not run.stop_asked
    run.ask_to_stop()
    run.ask_to_stop()
    assert Run(run.folder).stop_asked


def test_follow_yields_all_events_and_ends_when_the_worker_is_gone(write_run):
    run = write_run([Noted("Reading")])
    seen = []
    with run.locked():
        following = run.follow(poll_seconds=0.001)
        seen.append(next(following))
        writer = EventWriter(run.log)
        writer.write(STARTED)
        seen.append(next(following))
        writer.write(step(1))
        writer.write(DONE)
        writer.close()
    seen += following
    assert seen == [Noted("Reading"), STARTED, step(1), DONE]


@pytest.mark.parametrize(
    ("printed", "tail"),
    [
        (b"", ""),
        (b"one\ntwo", "one\ntwo"),
        (b"".join(b"line %d\n" % i for i in range(9_000)), "\n".join(f"line {i}" for i in range(8_980, 9_000))),
        (b"caf\xe9 \xff\nnext\n", "caf� �\nnext"),
    ],
    ids=["empty", "short", "long", "not UTF-8"],
)
def test_the_log_s_tail_is_its_last_lines_in_any_encoding(printed, tail, write_run):
    run = write_run()
    assert run.log_tail() == ""
    run.worker_log.write_bytes(printed)
    assert run.log_tail() == tail


def test_an_adapter_counts_once_both_its_files_are_there(write_run):
    run = write_run()
    run.adapter_folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert not run.has_adapter
        (run.adapter_folder / name).write_text("{}")
    assert run.has_adapter


# All runs


def test_a_new_run_s_folder_holds_its_spec_and_nothing_half_written(workspace):
    run = Runs(workspace).create(SPEC)
    assert run.folder.parent == workspace.runs
    assert [p.name for p in run.folder.iterdir()] == ["spec.json"]
    assert run.spec == SPEC
    assert run.id == run.folder.name
    assert abs(run.created - datetime.now()) < timedelta(minutes=1)


@pytest.mark.parametrize("name", ["../../etc/passwd", "日本", "a/b\x00c", "x" * 500, "CON: <b>"])
def test_any_name_makes_a_folder_of_harmless_letters(name, workspace):
    runs = Runs(workspace)
    run = runs.create(RunSpec(name=name))
    assert re.fullmatch(r"[0-9]{8}-[0-9]{6}-[a-z0-9-]{1,40}-[0-9a-f]{4}", run.id)
    assert Runs(workspace).get(run.id).spec.name == name


@pytest.mark.parametrize("spec", [RunSpec(name="\ud800"), RunSpec(data=DataSpec(instruction="Say \udfff"))])
def test_half_of_a_character_is_refused_before_a_folder_is_made(spec, workspace):
    with pytest.raises(LoRAError, match=r"must be of whole characters; correct the end of '.*\\ud"):
        Runs(workspace).create(spec)
    assert list(workspace.runs.iterdir()) == []


def test_runs_are_listed_with_the_newest_first(workspace, monkeypatch):
    class Clock(datetime):
        hour_now = 9

        @classmethod
        def now(cls, tz=None):
            return cls(2024, 1, 2, cls.hour_now)

    monkeypatch.setattr(runs_module, "datetime", Clock)
    runs = Runs(workspace)
    made = []
    for Clock.hour_now, name in ((9, "b"), (10, "z"), (23, "a")):
        made.insert(0, runs.create(RunSpec(name=name)))
    assert runs.list() == made  # the same objects, so that their logs are read once
    assert [run.id for run in Runs(workspace).list()] == [run.id for run in made]


def test_what_is_no_run_is_not_listed(workspace):
    runs = Runs(workspace)
    run = runs.create(RunSpec())
    (workspace.runs / "notes.txt").write_text("x")
    (workspace.runs / "empty").mkdir()
    assert runs.list() == [run]


@pytest.mark.parametrize("name", [".deleted-20240102-090000-x-1234", "my run (copy)"])
def test_a_folder_with_another_name_does_not_break_the_list(name, workspace):
    runs = Runs(workspace)
    run, other = runs.create(RunSpec(name="kept")), runs.create(RunSpec(name="other"))
    other.folder.rename(workspace.runs / name)
    assert [r.id for r in Runs(workspace).list()] == [run.id]


@pytest.mark.parametrize(
    "run_id",
    [
        *("../x", "a/b", "", "\x00", ".", "..", "no-such-run", "/etc", "run\n", "{id}/", "../runs/{id}"),
        pytest.param(
            "x" * 300,
            id="too long for a file name",
        ),
    ],
)
def test_an_id_that_is_no_run_of_the_workspace_is_refused(run_id, workspace):
    runs = Runs(workspace)
    run_id = run_id.format(id=runs.create(RunSpec()).id)
    (workspace.root / "x").mkdir()
    (workspace.root / "x" / "spec.json").write_text("{}")
    with pytest.raises(
        LoRAError, match=rf"`run` \(={re.escape(repr(run_id))}\) must be a run of this workspace; it may"
    ):
        runs.get(run_id)


def test_the_running_one_is_found(workspace, hold):
    runs = Runs(workspace)
    runs.create(RunSpec(name="a"))
    assert runs.running() is None
    busy = runs.create(RunSpec(name="b"))
    hold(busy)
    assert runs.running() is busy


def test_a_running_run_is_not_deleted_and_a_finished_one_is(workspace, hold, write_run):
    runs = Runs(workspace)
    busy, done = write_run([STARTED]), write_run([STARTED, DONE])
    hold(busy)
    with pytest.raises(LoRAError, match=rf"Run {busy.id} is still running; stop it before you delete it\."):
        runs.delete(runs.get(busy.id))
    assert busy.log.refresh() == [STARTED]
    runs.delete(runs.get(done.id))
    assert os.listdir(workspace.runs) == [busy.id]
    with pytest.raises(LoRAError, match="it may have been deleted"):
        runs.get(done.id)


def test_a_folder_that_cannot_be_written_is_named_with_what_to_do(workspace):
    workspace.runs.rmdir()
    workspace.runs.write_text("a file in the way")
    with pytest.raises(
        LoRAError,
        match=rf"The run's folder {re.escape(str(workspace.runs))}/\S+ could not be written \(Not a directory\); free",
    ):
        Runs(workspace).create(RunSpec())
