"""Long runs and many of them: kept small, kept true, and looked at again only where something has changed."""

import dataclasses
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import Evaluated, Finished, LoRAError, Noted, Started, Step, from_record, to_record
from studio import app, live
from studio.event_log import EventLog, EventWriter, Steps, step_values
from studio.history import Shown
from studio.runs import Run
from studio.state import Studio
from studio.tabs import runs as runs_tab
from studio.tabs import train as train_tab
from tests.studio.page.pages import question

ROOT = Path(__file__).parents[2]
STARTED = Started(9, 1, 10, "cpu", "float32", "memory")
DONE = Finished(1, "done", 10**9)


def step(number: int, loss: float = 2.5) -> Step:
    return Step(number, loss, 1e-3, 1.0, 64, 32, 0.5, 10**9)


def record(event: Step, **changes) -> dict:
    return json.loads(json.dumps(to_record(event))) | changes


# Steps


@settings(deadline=None)
@given(st.lists(st.integers(0, 90), max_size=6), st.data())
def test_steps_read_like_the_list_of_them(sizes, data):
    expected, steps = [], Steps()
    for size in sizes:
        new = [step(len(expected) + i, loss=i / 7) for i in range(size)]
        steps.extend([step_values(record(event)) for event in new])
        expected += new
    assert steps == expected and expected == steps and list(steps) == expected
    assert len(steps) == len(expected) and bool(steps) == bool(expected)
    cut = data.draw(st.slices(len(expected)))
    assert steps[cut] == expected[cut]
    for index in range(-len(expected), len(expected)):
        assert steps[index] == expected[index]
    with pytest.raises(IndexError):
        steps[len(expected)]
    assert {name: values.tolist() for name, values in steps.columns().items()} == {
        field.name: [getattr(event, field.name) for event in expected] for field in dataclasses.fields(Step)
    }


def test_steps_have_the_types_that_they_were_said_with():
    steps = Steps()
    steps.extend([step_values(record(step(2**53 - 1)))])
    assert [type(value) for value in dataclasses.astuple(steps[0])] == [f.type for f in dataclasses.fields(Step)]
    assert steps[0].step == 2**53 - 1


def test_columns_stay_as_they_were_taken_while_steps_are_added():
    steps = Steps()
    steps.extend([step_values(record(step(i))) for i in range(50)])
    taken = steps.columns()
    for i in range(50, 5_000):
        steps.extend([step_values(record(step(i)))])
    assert taken["step"].tolist() == list(range(50))
    assert steps.columns()["step"].tolist() == list(range(5_000))


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss": math.nan}, {"loss": -math.inf}, {"loss": -1.5}, {"learning_rate": 0}, {"grad_norm": 10**12}],
    ids=str,
)
def test_the_short_way_to_a_step_gives_what_the_long_way_gives(changes):
    assert repr(Step(*step_values(record(step(3), **changes)))) == repr(from_record(record(step(3), **changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "1"},
        {"step": 1.0},
        {"step": True},
        {"loss": None},
        {"memory_bytes": 2**53},
        {"step": -(2**53)},
        {"more": 1},
    ],
    ids=str,
)
def test_the_short_way_to_a_step_refuses_what_the_long_way_refuses(changes):
    with pytest.raises(LoRAError) as short:
        step_values(record(step(3), **changes))
    with pytest.raises(LoRAError) as long:
        from_record(record(step(3), **changes))
    assert str(short.value) == str(long.value)


# A long log


@pytest.fixture
def long_log(tmp_path) -> EventLog:
    """100,000 steps with one spike up, one down, and one loss that is no number."""
    losses = dict.fromkeys(range(1, 100_001), 2.0) | {33_333: 99.0, 44_444: 0.25, 55_555: math.nan}
    lines = (json.dumps({"time": float(n)} | to_record(step(n, loss))) + "\n" for n, loss in losses.items())
    (tmp_path / "events.jsonl").write_text("".join(lines))
    return EventLog(tmp_path / "events.jsonl")


def test_a_long_log_is_read_in_pieces_whole_and_its_chart_keeps_the_spikes(long_log):
    assert long_log.path.stat().st_size > 2 * 8_000_000
    long_log.read()
    assert (len(long_log.steps), long_log.num_events, long_log.last_time) == (100_000, 100_000, 100_000.0)
    assert long_log.steps.columns()["step"].tolist() == list(range(1, 100_001))
    assert math.isnan(long_log.steps[55_554].loss)
    spoken = train_tab.charts(long_log)
    heights = [
        float(place.split()[1]) for path in spoken.split(' d="')[1:] for place in path.split('"')[0].split("L")[1:]
    ]
    assert min(heights) < 7 and max(heights) > 93, "the spikes reach the frame's top and bottom"
    assert len(spoken) < 60_000
    with long_log.path.open("a") as file:
        file.write(json.dumps({"time": 1.0} | to_record(step(100_001, 98.0))) + "\n")
    assert long_log.refresh() == [step(100_001, 98.0)]


def thin_by_hand(points):
    """What `live.thin` says that it does, point by point."""
    if len(points) <= live.MAX_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / (live.MAX_POINTS - 1))
    kept = []
    for start in range(0, len(points) - 1, stretch):
        part = [p for p in points[start : min(start + stretch, len(points) - 1)] if abs(p[1]) < 1e300]
        if part:
            kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept[: live.MAX_POINTS - 1], points[-1]]


@settings(deadline=None)
@given(st.integers(1, 2_000), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 1.0]))
def test_a_series_is_thinned_as_point_by_point(length, seed, share):
    draw = np.random.default_rng(seed)
    values = np.where(
        draw.random(length) < share, draw.choice([math.nan, math.inf, -math.inf], length), draw.normal(size=length)
    )
    points = [(float(i), float(v)) for i, v in enumerate(values)]
    assert repr(live.thin(points)) == repr(thin_by_hand(points))
    assert repr(live.thin(np.array(points))) == repr(live.thin(points))


# What lists show


class Counted:
    """Says what is asked of it, as `labelled_row` makes it, and counts."""

    def __init__(self) -> None:
        self.asked = []

    def __call__(self, run: Run) -> list[str]:
        self.asked.append(run.id)
        return runs_tab.labelled_row(run)


@pytest.fixture
def shown(tmp_path) -> Shown:
    return Shown(tmp_path / "history.json")


def say(run: Run, *events) -> None:
    writer = EventWriter(run.log)
    for event in events:
        writer.write(event)
    writer.close()


CHANGES = {
    "an event": lambda run: say(run, Evaluated(1, 2.0, 32, 0.1)),
    "another spec": lambda run: run.spec_file.write_text('{"name": "Other"}'),
    "a mark": lambda run: run.ask_to_stop(),
    "no log": lambda run: run.log.path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_run_that_is_over_is_looked_at_once_and_again_when_its_files_change(change, shown, write_run):
    run, other, make = write_run([STARTED, step(1), DONE]), write_run([STARTED]), Counted()
    first = shown.each([run, other], make)
    assert first == [runs_tab.labelled_row(run), runs_tab.labelled_row(other)]
    assert shown.each([run, other], make) == first and make.asked == [run.id, other.id]
    change(run)
    again = Run(run.folder)
    assert shown.each([again, other], make) == [runs_tab.labelled_row(again), first[1]]
    assert make.asked == [run.id, other.id, run.id]


def test_a_run_that_is_going_on_is_looked_at_every_time_and_once_more_when_it_is_over(shown, write_run, hold):
    run, make = write_run([STARTED]), Counted()
    with run.locked():
        for number in (1, 2):
            say(run, step(number))
            (line,) = shown.each([run], make)
            assert "running" in line and f"{number} / 60" in line
    for _ in range(2):
        (line,) = shown.each([run], make)
        assert "interrupted" in line
    assert make.asked == [run.id] * 3


def test_another_server_finds_what_was_shown_and_nothing_of_what_was_deleted(shown, write_run, tmp_path):
    kept, deleted = write_run([STARTED, DONE]), write_run([STARTED])
    before = shown.each([kept, deleted], Counted())
    again, make = Shown(tmp_path / "history.json"), Counted()
    assert again.each([kept, deleted], make) == before and make.asked == []
    again.each([kept], make)
    assert list(json.loads((tmp_path / "history.json").read_text())["kept"]) == [kept.id]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"form": 1}', b"\xff"])
def test_a_file_that_cannot_be_used_is_made_again(content, shown, write_run, tmp_path):
    run = write_run([STARTED])
    (tmp_path / "history.json").write_bytes(content)
    assert Shown(tmp_path / "history.json").each([run], runs_tab.labelled_row) == [runs_tab.labelled_row(run)]
    make = Counted()
    Shown(tmp_path / "history.json").each([run], make)
    assert make.asked == []


def test_what_another_release_kept_in_another_form_is_not_shown(shown, write_run, tmp_path):
    run, file = write_run([STARTED]), tmp_path / "history.json"
    (line,) = shown.each([run], lambda run: ["as it was made then"])
    assert Shown(file).each([run], runs_tab.labelled_row) == [line]
    held = json.loads(file.read_text())
    file.write_text(json.dumps(held | {"form": held["form"] - 1}))
    assert Shown(file).each([run], runs_tab.labelled_row) == [runs_tab.labelled_row(run)]


def test_where_nothing_can_be_kept_the_list_is_shown_and_the_log_says_why(write_run, tmp_path, caplog):
    run = write_run([STARTED])
    with caplog.at_level(logging.WARNING, "studio"):
        assert Shown(tmp_path / "none" / "history.json").each([run], runs_tab.labelled_row)
    assert "history.json could not be written" in caplog.text


def test_a_new_server_opens_runs_and_a_page_without_reading_the_logs_of_what_is_over(workspace, write_run, monkeypatch):
    for _ in range(5):
        write_run([Noted("Reading"), STARTED, step(1), DONE])
    going = write_run([STARTED, step(1)])
    read, logs = EventLog.read, []
    monkeypatch.setattr(EventLog, "read", lambda log: (logs.append(log.path), read(log))[1])
    rows, runs = runs_tab.listed(Studio(workspace))
    assert set(logs) == {run.log.path for run in runs} and len(runs) == 6
    logs.clear()
    with going.locked():
        server = Studio(workspace)
        again, _ = runs_tab.listed(server)
        news = app.news(server, question(going.id))
    assert set(logs) == {going.log.path}
    changed = [run.id for run, old, new in zip(runs, rows, again, strict=True) if old != new]
    assert changed == [going.id]
    assert "step 1 of 60" in news["parts"]["head-line"][0]


def test_a_copy_of_a_workspace_shows_its_own_runs(shown, write_run, tmp_path):
    run = write_run([STARTED, step(1)])
    shown.each([run], runs_tab.labelled_row)
    copy = Run(shutil.copytree(run.folder, tmp_path / "copy" / run.id))
    say(copy, DONE)
    os.utime(copy.log.path, ns=(run.log.path.stat().st_mtime_ns,) * 2)
    assert "finished" in shown.each([copy], runs_tab.labelled_row)[0]


@pytest.mark.slow
def test_a_long_run_and_a_long_history_are_shown_within_their_bounds():
    """A run of 100,000 steps, and 1,000 runs: a look takes 50 ms of the server, and Runs opens within a second."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_history"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("1,000 runs that have ended, and one of 100,000 steps")
    assert done.stdout.count(" ms   at most") >= 6
