"""Which run a page shows, what it is told of it, and how one is started and stopped."""

import dataclasses
import html
import types

import gradio as gr
import pytest

from core import (
    LoRAConfig,
    TrainConfig,
)
from studio import jobs, watch
from studio.event_log import EventWriter
from studio.specs import RunSpec
from studio.tabs import train
from tests.studio.page.pages import STARTED, STEP, events, handler, look, update


def test_a_page_opens_at_the_run_asked_for_else_at_the_running_else_at_the_newest(page, write_run, hold):
    def opened(**query) -> str | None:
        return update(handler(page, "opened", "run")(types.SimpleNamespace(query_params=query))[0])["value"]

    assert opened() is None
    runs = sorted((write_run([STARTED]) for _ in range(3)), key=lambda run: run.id)
    assert opened() == runs[2].id
    hold(runs[0])
    assert opened() == runs[0].id
    assert opened(run=runs[1].id) == runs[1].id
    with pytest.warns(UserWarning, match="`run` \\(=&#x27;../x&#x27;\\) must be a run of this workspace"):
        assert opened(run="../x") == runs[0].id


def test_a_page_learns_what_is_new_and_when_the_list_or_the_button_has_to_turn(page, studio, write_run, hold):
    run = write_run([STARTED])
    news = look(page, run.id)
    assert "interrupted" in news["parts"]["status"] and news["parts"]["worker-log"] == ""
    writer = EventWriter(run.log)
    writer.write(STEP)
    writer.close()
    later = look(page, run.id)
    assert "training 1.5" in later["parts"]["charts"] and later["turn"] == news["turn"]
    hold(run)
    running = look(page, run.id)
    assert running["turn"] != news["turn"]
    run.ask_to_stop()
    assert look(page, run.id)["turn"] != running["turn"]


def test_charts_are_looked_at_each_second_while_a_run_goes_on(page, write_run, hold):
    run = write_run([dataclasses.replace(STARTED, device="cuda:0")])
    often, seldom = 1000 * watch.LOOK_SECONDS, 1000 * watch.LOOK_SECONDS_ELSEWHERE
    assert look(page, run.id)["every"] == seldom == 2000
    hold(run)
    assert look(page, run.id)["every"] == often == 1000
    assert look(page, run.id, page="another")["every"] == often, "they do not draw where it trains"
    assert look(page, run.id, train=False)["every"] == seldom


def test_pages_share_the_looks_while_the_cpu_they_would_draw_on_trains(page, write_run, hold, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    run = write_run([STARTED])
    hold(run)
    assert [look(page, run.id, page=name)["every"] for name in "abbcde"] == [1000, 2000, 2000, 3000, 4000, 5000]
    assert look(page, run.id, page="e", hidden=True)["every"] == 4000
    now[0] += 10
    assert look(page, run.id, page="a", train=False)["every"] == 8000
    now[0] += 10
    assert look(page, run.id, page="a")["every"] == 1000, "the others were shut"


def test_a_page_is_told_again_only_what_is_new(page, write_run):
    run = write_run([STARTED])
    news = look(page, run.id)
    assert set(news["parts"]) == {"head-line", "status", "charts", "worker-log"}
    assert set(look(page, run.id, marks=news["marks"])["parts"]) <= {"head-line"}, "the free memory"
    writer = EventWriter(run.log)
    writer.write(STEP)
    writer.close()
    later = look(page, run.id, marks=news["marks"])
    assert {"status", "charts"} <= set(later["parts"]) and "worker-log" not in later["parts"]
    assert set(look(page, run.id, marks=news["marks"] | {"worker-log": ""})["parts"]) >= {"worker-log"}


def test_a_page_is_drawn_the_steps_that_it_asks_for(page, write_run):
    run = write_run([STARTED, *(dataclasses.replace(STEP, step=number) for number in range(1, 41))])
    assert 'data-steps="10 20"' in look(page, run.id, steps=[10, 20])["parts"]["charts"]


def test_a_page_that_shows_another_tab_is_told_no_more_than_the_head(page, write_run):
    run = write_run([STARTED, STEP])
    news = look(page, run.id, train=False)
    assert set(news["parts"]) == {"head-line"}
    assert news["turn"] == look(page, run.id)["turn"]


def test_a_page_whose_run_was_deleted_turns_to_the_newest(page, studio, write_run):
    first, second = sorted((write_run([STARTED]) for _ in range(2)), key=lambda run: run.id)
    before = look(page, second.id)
    studio.runs.delete(studio.runs.get(second.id))
    after = look(page, second.id)
    assert "No run yet" in after["parts"]["status"] and after["turn"] != before["turn"]
    assert update(handler(page, "turned")(second.id))["value"] == first.id
    controls = handler(page, "controls")(first.id)  # that Train, if it is open, asks for then
    assert [update(c) for c in controls] == [update(c) for c in train.controls(first)]


def test_a_new_list_of_runs_never_changes_which_run_a_page_shows_or_is_about_to_open(page, write_run):
    runs = [write_run([STARTED]) for _ in range(2)]
    for run in (None, runs[0].id, runs[1].id):
        chosen = handler(page, "turned")(run)
        assert "value" not in update(chosen)
        assert {run_id for _, run_id in update(chosen)["choices"]} == {run.id for run in runs}


@pytest.fixture
def begin(page, tiny_folder, tiny_data, monkeypatch):
    """begin(**changes): presses Start with all tabs as they open, on the tiny model; returns the spec that was started.

    Changes go by the components' ids, an underscore for a dash.
    """
    started = []

    def start(runs, spec):
        started.append(runs.create(spec))
        return started[-1]

    monkeypatch.setattr(jobs, "start", start)
    (event,) = events(page, "begin")
    states = {"starter": str(tiny_folder), "": tiny_data.source, None: None}

    def press(**changes) -> RunSpec:
        changes = {"column_prompt": "facts", "column_completion": "text"} | changes
        names = [(c.elem_id or "").removeprefix("setting-").replace("-", "_") for c in event.inputs]
        assert changes.keys() <= set(names)
        values = [states[c.value] if isinstance(c, gr.State) else c.value for c in event.inputs]
        chosen = event.fn(*(changes.get(name, value) for name, value in zip(names, values, strict=True)))
        assert update(chosen)["value"] == started[-1].id
        return started[-1].spec

    return press


def test_start_makes_a_run_of_what_all_tabs_say(begin, tiny_folder, tiny_data):
    untouched = begin()
    assert untouched == RunSpec(
        name="My first adapter",
        model=str(tiny_folder),
        data=dataclasses.replace(tiny_data, instruction=""),
        lora=LoRAConfig(),
        train=TrainConfig(),
    )
    changed = begin(
        run_name="  ",
        r=4,
        dropout=0.1,
        preset="My own choice",
        matrices=["self_attn.q_proj"],
        instruction="Describe it.",
        eval_fraction=0.25,
        max_length=99,
        steps=7,
        seed=3,
        schedule="cosine",
    )
    assert changed == RunSpec(
        name="Untitled",
        model=str(tiny_folder),
        data=dataclasses.replace(tiny_data, eval_fraction=0.25),
        lora=LoRAConfig(r=4, dropout=0.1, target_modules=("self_attn.q_proj",)),
        train=TrainConfig(steps=7, seed=3, schedule="cosine", max_length=99),
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"r": 17}, "`r` (=17) must be at most 16 to fit"),
        ({"r": None}, "`r` (=None) must be a whole number."),
        ({"max_length": None}, "`max_length` (=None) must be a whole number."),
        ({"steps": 0, "warmup_steps": 0}, "`steps` (=0) must be at least 1 and at most 10000000."),
        ({"column_prompt": "question"}, "`prompt` (='question') must be a column of inns.jsonl; it has"),
        ({"preset": "My own choice", "matrices": []}, "`target_modules` (=nothing) must name at least one matrix"),
        ({"rank_pattern": "{"}, "`rank_pattern` (='{') must be a table like"),
    ],
)
def test_start_refuses_what_cannot_be_before_a_run_is_made(changes, sentence, begin, workspace):
    with pytest.raises(gr.Error) as shown:
        begin(**changes)
    assert html.unescape(shown.value.message).startswith(sentence)
    assert list(workspace.runs.iterdir()) == []


@pytest.mark.parametrize(("name", "reason"), [("stop", "stopped"), ("pause", "paused")])
def test_stop_and_pause_ask_the_run_that_is_shown(name, reason, page, write_run, hold):
    shown, other = write_run([STARTED]), write_run([STARTED])
    hold(shown)
    values = handler(page, name)(shown.id, 20)
    assert update(values[0])["value"] == shown.id
    assert (shown.stop_asked, other.stop_asked) == (reason, "")
    with pytest.raises(gr.Error, match="must be chosen; start one first"):
        handler(page, name)(None, 20)


def test_a_copy_of_a_run_is_trained_with_what_was_changed(page, write_run, tiny_folder, tiny_data, monkeypatch):
    run = write_run(spec=RunSpec("Inns", str(tiny_folder), tiny_data, LoRAConfig(r=3)))
    started = []
    monkeypatch.setattr(jobs, "start", lambda runs, spec: started.append(spec) or run)
    handler(page, "copy")(run.id, "r = 4, 8\n\nsteps = 9")
    assert [(s.name, s.lora.r, s.train.steps) for s in started] == [
        ("Inns · r 4, steps 9", 4, 9),
        ("Inns · r 8, steps 9", 8, 9),
    ]
    plain = [dataclasses.replace(s, name="Inns", lora=run.spec.lora, train=run.spec.train) for s in started]
    assert plain == [run.spec] * 2
    handler(page, "copy")(run.id, None)
    assert started[-1] == run.spec
    for lines, sentence in (("r = 4, 0", "`r` (=0) must be"), ("r = 4, 99", "`r` (=99) must be at most")):
        with pytest.raises(gr.Error) as shown:  # the second one is wrong: not even the first is started
            handler(page, "copy")(run.id, lines)
        assert html.unescape(shown.value.message).startswith(sentence)
    assert len(started) == 3
