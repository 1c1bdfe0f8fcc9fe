"""The Train tab: how a run goes, and what can be done with it."""

import math
import re

import gradio as gr
import pytest
import torch

from core import (
    Evaluated,
    Failed,
    Finished,
    LoRAError,
    MethodConfig,
    Noted,
    TrainConfig,
    resolve_devices,
)
from studio.data import DataSpec
from studio.runs import Run
from studio.specs import RunSpec
from studio.tabs import train as train_tab
from tests.studio.page.pages import update
from tests.studio.tabs.pages import HOSTILE, STARTED, Read, drawn, step


def test_the_view_of_no_run_says_what_to_do():
    shown = train_tab.view(None)
    assert "press Start training" in shown["status"] and "<svg" not in shown["status"]
    assert shown["worker-log"] == shown["charts"] == ""
    assert not any(update(control)["visible"] for control in train_tab.controls(None))


def test_the_tab_has_a_place_for_each_part_of_the_view():
    tab = drawn(train_tab.build)
    assert set(tab.form.names) == set(TrainConfig().to_dict()) - {"max_length"}

    def within(block) -> list:
        return [block, *(one for child in getattr(block, "children", []) for one in within(child))]

    around = tab.form.widgets[0].parent.parent.parent.parent
    places = [block.value or "" for block in within(around) if isinstance(block, gr.HTML)]
    assert all(any(f'id="{name}"' in place for place in places) for name in train_tab.view(None))


def test_a_running_run_shows_progress_time_left_and_all_charts(write_run, hold, monkeypatch):
    monkeypatch.setattr("studio.runs.time.time", lambda: 1000.0)
    evaluated = [Evaluated(0, 3.25, 9, 0.1), Evaluated(2, 2.75, 9, 0.1)]
    run = write_run(
        [Noted("Reading"), STARTED, evaluated[0], step(1, 3.0), step(2, 2.5), evaluated[1]],
        RunSpec(name=HOSTILE, train=TrainConfig(steps=8)),
    )
    run.worker_log.write_text("12:00:00 step 2\n")
    hold(run)
    shown = train_tab.view(run)
    read = Read(shown["status"])
    text = read.text
    assert text[:2] == [HOSTILE, " "] and text[2] == "running"
    facts = dict(zip(text[3:17:2], text[4:17:2], strict=True))
    assert facts == {
        "Step": "2 of 8",
        "Time left": "3 s",
        "Training loss": "2.500",
        "Held-out loss": "3.250 → 2.750",
        "Best at step": "2",
        "Runs on": "cpu, weights bfloat16",
        "Memory shown": "resident memory of the process",
    }
    assert 'aria-valuenow="2" aria-valuemax="8"' in shown["status"] and "width:25.0%" in shown["status"]
    assert Read(shown["charts"]).pictures == [
        "Loss (nats per token): training 2.5, held-out rows 2.75",
        "Learning rate: 0.001",
        "Gradient norm: 0.25",
        "Memory (GB): 2",
        "Tokens per second: 240",
    ]
    assert shown["worker-log"] == "12:00:00 step 2"


KILLED = "The worker ended without a word (killed, or the machine went down)."


@pytest.mark.parametrize(
    ("events", "status", "words"),
    [
        ([], "interrupted", f"{KILLED} Resume starts it from the beginning."),
        ([STARTED, step(1)], "interrupted", f"{KILLED} Resume starts it from the beginning."),
        (
            [STARTED, step(1), Failed("Worker process 2 of 2 was killed. The run can be resumed.", "killed")],
            "interrupted",
            "Worker process 2 of 2 was killed. Resume starts it from the beginning.",
        ),
        (
            [STARTED, step(1), Finished(1, "paused", 0)],
            "paused",
            "Everything is saved and its memory is free. Resume goes on after step 1.",
        ),
        (
            [STARTED, Evaluated(0, 3.0, 9, 0.1), Evaluated(2, 1.0, 9, 0.1), Evaluated(4, 2.0, 9, 0.1)]
            + [Finished(4, "early", 0)],
            "finished",
            "Ended early: the held-out loss rose. The adapter saved is that of step 2.",
        ),
        ([Failed("The disk is full.", "disk")], "paused", "The disk is full."),
        (
            [STARTED, step(1), Finished(1, "killed", 0)],
            "stopped",
            "It was killed: all of its processes are gone, and their memory is free. "
            "Resume starts it from the beginning.",
        ),
        ([Failed(f"`x` (={HOSTILE}) must be 2.")], "failed", f"`x` (={HOSTILE}) must be 2."),
        ([STARTED, step(1), Failed("No room.")], "failed", "No room."),
        (
            [STARTED, step(1), Finished(60, "done", 0)],
            "finished",
            "The adapter is saved.",
        ),
        (
            [STARTED, step(1), Finished(1, "stopped", 0)],
            "stopped",
            "The adapter is saved.",
        ),
    ],
)
def test_a_run_that_has_ended_says_how(events, status, words, write_run):
    run = write_run(events)
    run.adapter_folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run.adapter_folder / name).write_text("{}")
    read = Read(train_tab.view(run)["status"])
    assert read.text[2] == status and words in read.text
    assert "img" not in read.tags
    assert "Time left" not in read.text


@pytest.mark.parametrize(
    ("events", "words"),
    [([], "Starting the worker …"), ([Noted("Reading"), Noted("Loading the model")], "Loading the model …")],
)
def test_before_the_first_step_the_worker_s_last_word_is_shown(events, words, write_run, hold):
    run = write_run(events)
    hold(run)
    assert words in Read(train_tab.view(run)["status"]).text


def test_a_run_stopped_before_its_first_step_does_not_claim_an_adapter(write_run):
    assert "The adapter is saved" not in train_tab.view(write_run([Finished(0, "stopped", 0)]))["status"]


@pytest.mark.parametrize(
    ("changes", "ways"),
    [
        ({}, ["spectrum", "chat", "home"]),
        ({"method": MethodConfig("bitfit")}, ["chat"]),
        ({"data": DataSpec("starter:reviews", task="classification", text="text", labels=("a", "b"))}, None),
    ],
)
def test_a_run_that_is_over_shows_the_way_to_what_it_is_good_for(changes, ways, write_run, hold):
    run = write_run([STARTED, step(1), Finished(60, "done", 0)], RunSpec(**changes))

    def shown() -> list[str]:
        return re.findall(r'data-tab="(\w+)"', train_tab.view(run)["status"])

    assert shown() == [], "nothing was saved"
    run.adapter_folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run.adapter_folder / name).write_text("{}")
    assert shown() == (ways or ["spectrum", "chat", "home"])
    words = "Try it on texts" if ways is None else "Chat with it"
    assert words in train_tab.view(run)["status"]
    hold(run)
    assert shown() == [], "it may still change"


def buttons(run: Run) -> dict[str, tuple[str, bool]]:
    """Name → words, and whether it can be pressed, of the buttons that are shown."""
    shown = zip(train_tab.ACTIONS, map(update, train_tab.controls(run)), strict=False)
    return {name: (b["value"], b["interactive"]) for name, b in shown if b["visible"]}


def test_a_running_run_can_be_paused_or_stopped_and_once_asked_killed(write_run, hold):
    run = write_run([STARTED, step(1)])
    hold(run)
    assert buttons(run) == {"pause": ("Pause", True), "stop": ("Stop and save", True)}
    run.ask_to_stop()
    assert buttons(run) == {"stop": ("Stopping after this step …", False), "kill": ("Kill it now", True)}
    run.ask_to_stop("paused")
    assert buttons(run)["stop"] == ("Pausing after this step …", False)


@pytest.mark.parametrize(
    ("end", "has_checkpoint", "possible"),
    [
        (None, False, {"resume"}),
        (None, True, {"resume", "further"}),
        (Finished(1, "paused", 0), True, {"resume", "further"}),
        (Finished(1, "stopped", 0), True, {"resume", "further"}),
        (Failed("No room.", "memory"), False, {"resume"}),
        (Finished(60, "done", 0), True, {"further"}),
        (Finished(60, "done", 0), False, set()),
    ],
)
def test_a_run_that_has_ended_can_go_on_from_where_it_is(end, has_checkpoint, possible, write_run):
    run = write_run([STARTED, step(1), *([end] if end else [])])
    if has_checkpoint:
        run.checkpoints.at(1).mkdir(parents=True)
        (run.checkpoints.at(1) / "training.safetensors").touch()
    assert set(buttons(run)) == possible
    number = update(train_tab.controls(run)[len(train_tab.ACTIONS)])
    assert number["visible"] == ("further" in possible)


def test_a_queued_run_can_be_moved_and_taken_out(write_run):
    run = write_run([])
    run.place = 1.0
    assert buttons(run) == {
        "stop": ("Take out of the queue", True),
        "earlier": ("Move up", True),
        "later": ("Move down", True),
    }
    assert Read(train_tab.view(run)["status"]).text[2] == "queued"


def test_what_may_help_a_run_that_failed_is_a_button_each(write_run):
    run = write_run([STARTED, step(1), Failed("Not enough memory.", "memory")])
    shown = [update(c) for c in train_tab.controls(run)[len(train_tab.ACTIONS) + 1 :]]
    assert [b["value"] for b in shown if b["visible"]] == [
        "Batch size 2, accumulation 2, and go on",
        "Activation checkpointing (slower), and go on",
        "Rows of at most 128 tokens, and go on",
        "Query and value alone, and go on",
    ]
    assert len(train_tab.controls(run)) == len(train_tab.controls(None))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_several_gpus_are_a_choice_with_the_free_memory_of_each(count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (i * 10**9, 8 * 10**9))
    shown = update(train_tab.gpu_choices())
    assert shown["visible"] == (count > 1)
    assert [words for words, _ in shown["choices"]] == [f"cuda:{i} · Card · {i}.0 of 8.0 GB free" for i in range(count)]
    if count:
        assert resolve_devices(train_tab.device_of([name for _, name in shown["choices"]])) == tuple(
            torch.device(f"cuda:{i}") for i in range(count)
        )
    assert train_tab.device_of([]) == "auto" and train_tab.device_of(["cuda:10", "cuda:2"]) == "cuda:2,cuda:10"


def test_a_number_of_further_steps_that_is_none_is_refused(write_run, studio):
    run = write_run([STARTED, step(1), Finished(1, "stopped", 0)])
    with pytest.raises(LoRAError, match=r"`steps` \(=None\) must be a whole number"):
        train_tab.act(studio.runs, "further", run, None)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 0 min"),
        (7505, "2 h 5 min"),
        (90_000, "25 h 0 min"),
        (math.nan, "unknown"),
        (math.inf, "unknown"),
    ],
)
def test_a_length_of_time_in_words(seconds, words):
    assert train_tab.duration(seconds) == words
