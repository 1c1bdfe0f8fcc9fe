"""The Runs tab: what runs hold becomes rows and text."""

import html
import math
import re
import shlex

import pytest

from core import (
    Evaluated,
    Failed,
    LoRAConfig,
    TrainConfig,
)
from studio import __main__ as cli
from studio import jobs
from studio.data import DataSpec
from studio.runs import Run
from studio.specs import RunSpec
from studio.tabs import runs as runs_tab
from tests.studio.tabs.pages import HOSTILE, STARTED, Read, step


def test_a_row_tells_what_was_trained_and_how_it_went(write_run):
    spec = RunSpec(
        name=HOSTILE,
        model="owner/name",
        data=DataSpec(source="/data/my rows.csv"),
        lora=LoRAConfig(r=3),
        train=TrainConfig(steps=8),
    )
    run = write_run(
        [STARTED, Evaluated(0, 3.0, 9, 0.1), step(1, 3.0), step(2, 1.0), Evaluated(2, 2.0, 9, 0.1), Failed("No.")], spec
    )
    row = runs_tab.row(run)
    assert len(row) == len(runs_tab.HEADER)
    cells = dict(zip(runs_tab.HEADER, row, strict=True))
    assert cells.pop("Made") == f"{run.created:%Y-%m-%d %H:%M}"
    assert cells == {
        "Name": HOSTILE,
        "Status": "failed",
        "Model": "name",
        "Data": "my rows.csv",
        "Method": "LoRA",
        "r": "3",
        "Steps": "2 / 8",
        "Held-out loss": "3.000 → 2.000",
        "Score": "",
        "Training loss": "█▁",
    }


@pytest.mark.parametrize(
    ("source", "name"),
    [("starter:restaurants", "restaurants"), ("hub:owner/name", "name"), ("hub:owner/name:train", "name:train")],
)
def test_a_row_names_the_data_shortly(source, name, write_run):
    row = runs_tab.row(write_run(spec=RunSpec(data=DataSpec(source=source))))
    assert row[runs_tab.HEADER.index("Data")] == name
    assert row[runs_tab.HEADER.index("Steps")] == "0 / 60" and row[2:5] == ["", "", ""]


@pytest.fixture(params=["events", "spec", "spec is gone"])
def damaged(request, write_run) -> Run:
    """A run whose files somebody spoiled."""
    run = write_run([STARTED, step(1)])
    if request.param == "events":
        (run.folder / "events.jsonl").write_text("{\n")
    elif request.param == "spec":
        (run.folder / "spec.json").write_text('{"lora": {"r": 0}}')
    else:
        (run.folder / "spec.json").unlink()
    return Run(run.folder)


def test_a_damaged_run_says_so_in_its_row_and_in_the_list(damaged):
    row = runs_tab.row(damaged)
    assert len(row) == len(runs_tab.HEADER)
    assert row[:2] == [damaged.id, "damaged"]
    assert any(word in row[4] for word in ("is damaged at event 1", "must be at least 1", "must be a JSON file"))
    assert runs_tab.label(damaged) == f"{damaged.id} · damaged"


def test_a_run_is_called_by_name_state_and_time(write_run):
    run = write_run([STARTED], RunSpec(name="Inns"))
    assert runs_tab.label(run) == f"Inns · interrupted · {run.created:%d %b %H:%M}"


def test_the_details_hold_all_settings_that_matter_as_text(write_run):
    spec = RunSpec(
        lora=LoRAConfig(r=3, alpha=6, dropout=0.05, target_modules=("q_proj", HOSTILE)),
        train=TrainConfig(steps=7, batch_size=3, accumulation=2, learning_rate=2e-4, seed=5),
    )
    facts = Read(runs_tab.details(write_run(spec=spec))).facts
    assert facts["Target matrices"] == f"q_proj, {HOSTILE}"
    assert facts["r, alpha, dropout"] == "3, 6, 0.05"
    assert facts["Steps × batch"] == "7 × 6"
    assert facts["Learning rate"] == "0.0002, linear"
    assert (facts["Model"], facts["Data"], facts["Seed"]) == ("starter", "starter:restaurants", "5")
    assert "Begins with" not in facts


def test_the_command_shown_makes_the_same_run(write_run, monkeypatch):
    rows = DataSpec(prompt="mr", completion="text")  # a run names its columns: where none is named, the command guesses
    run = write_run(spec=RunSpec("Two words", data=rows, lora=LoRAConfig(r=3), train=TrainConfig(seed=5)))
    words = shlex.split(html.unescape(re.search("<code>(.*)</code>", runs_tab.details(run))[1]))
    asked = []
    monkeypatch.setattr(jobs, "start", lambda runs, spec: asked.append((runs.workspace.root, spec)))
    monkeypatch.setattr(jobs, "follow", lambda run, as_json: 0)
    assert words[0] == "lora-studio" and cli.main(words[1:]) == 0
    assert asked == [(run.folder.parent.parent, run.spec)]


def test_details_say_what_a_run_begins_with(write_run):
    run = write_run([STARTED, step(1)])
    run._spec = RunSpec(continues="20260101-000000-x-abcd@40")
    assert Read(runs_tab.details(run)).facts["Begins with"] == "20260101-000000-x-abcd@40"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([math.nan, math.inf], ""),
        ([2.0], "▁"),
        ([3.0, 3.0, 3.0], "▁▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([7.0, math.nan, 0.0], "█▁"),
    ],
)
def test_a_sparkline_rises_and_falls_as_its_values(values, line):
    drawn_line = runs_tab.sparkline(values)
    assert drawn_line == (drawn_line if line is None else line)
    assert set(drawn_line) <= set(runs_tab.BLOCKS)


@pytest.mark.parametrize("length", [16, 17, 100, 10_001])
def test_a_sparkline_is_at_most_so_wide_and_keeps_the_trend(length):
    line = runs_tab.sparkline([-i for i in range(length)], width=16)
    assert len(line) == 16
    assert line == "".join(sorted(line, reverse=True)) and line[0] == "█" and line[-1] == "▁"
