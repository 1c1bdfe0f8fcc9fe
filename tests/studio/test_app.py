"""The page as a whole: it is built over any workspace, its parts are wired to each other, and errors are sentences."""

import asyncio
import csv
import dataclasses
import html
import inspect
import io
import json
import os
import re
import shutil
import types
import zipfile
from pathlib import Path

import gradio as gr
import pytest
import torch
from gradio.helpers import special_args

from core import (
    Adapter,
    LoRAConfig,
    LoRAError,
    SpectrumMeasured,
    Started,
    Step,
    TrainConfig,
    amplification,
    inject,
    lora_layers,
    plan,
)
from studio import app, capsule, jobs, models, watch
from studio.conversation import Conversation, prompt
from studio.data import DataSpec, prompt_ids
from studio.event_log import EventWriter
from studio.opened import Source
from studio.runs import Run
from studio.specs import RunSpec
from studio.state import Studio
from studio.tabs import chat as chat_tab
from studio.tabs import prompt_list, train
from studio.workspace import Workspace

STARTED = Started(60, 384, 10_000, "cpu", "float32", "resident memory of the process")
STEP = Step(1, 1.5, 1e-3, 0.25, num_tokens=120, num_trained_tokens=80, step_seconds=0.5, memory_bytes=2 * 10**9)


def build(studio: Studio) -> gr.Blocks:
    async def built() -> gr.Blocks:  # outside of a running loop, gr.Blocks leaves one behind that nobody closes
        return app.build(studio)

    return asyncio.run(built())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Studio, gr.Blocks]:
    studio = Studio(Workspace(tmp_path_factory.mktemp("empty")))
    return studio, build(studio)


@pytest.fixture
def studio(built, workspace, tmp_path_factory) -> Studio:
    """As after a start with an empty workspace and --allow-path; the page, which takes long to build, is built once."""
    built[0].__init__(workspace, [tmp_path_factory.getbasetemp()])
    return built[0]


@pytest.fixture
def page(built, studio) -> gr.Blocks:
    return built[1]


def events(page: gr.Blocks, name: str) -> list:
    found = [event for event in page.fns.values() if getattr(event.fn, "__name__", None) == name]
    assert found, name
    return found


def handler(page: gr.Blocks, name: str, elem_id: str | None = None):
    """The handler of that name; where there are several, the one that fills the component of that id."""
    (only,) = {e.fn for e in events(page, name) if elem_id is None or elem_id in [o.elem_id for o in e.outputs]}
    return only


def look(page: gr.Blocks, run: str, *, train: bool = True) -> dict:
    """What an open page is told when it asks."""
    (head,) = (b for b in page.blocks.values() if b.elem_id == "head")
    return head.look({"run": run, "train": train})


def update(component) -> dict:
    """What a component that a handler returns changes on the page."""
    return component._constructor_args[0]


@pytest.fixture
def damage(write_run):
    """Spoils a run; called before the page is built."""

    def spoil(what: str) -> Run:
        run = write_run([STARTED], RunSpec(name="Zebra"))
        (run.folder / what).write_text("{\n")
        return run

    return spoil


# Building


def test_the_page_has_the_tabs_in_order_and_the_head(page):
    pages = next(b for b in page.blocks.values() if isinstance(b, gr.Tabs))
    titles = [b.label for b in pages.children if isinstance(b, gr.Tab)]
    assert titles == ["Model", "Data", "Train", "Spectrum", "Chat", "Runs", "Take home"]
    ids = [b.elem_id for b in page.blocks.values() if b.elem_id]
    assert len(ids) == len(set(ids))
    assert {"head", "run", "start", "stop", "preview", "tokens", "heat", "runs-table"} <= set(ids)


@pytest.mark.parametrize("what", ["events.jsonl", "spec.json"])
def test_a_damaged_run_hinders_neither_the_page_nor_its_lists(what, damage, studio):
    damaged = damage(what)
    page = build(studio)
    chosen = handler(page, "opened", "run")(types.SimpleNamespace(query_params={}))
    assert update(chosen)["choices"] == [(f"{damaged.id} · damaged", damaged.id)]
    table, ids = handler(page, "fill")()
    assert table["data"][0][:2] == [damaged.id, "damaged"] and ids == [damaged.id]
    assert "nothing is training" in app.head_line(studio.runs.running())


@pytest.mark.parametrize("what", ["events.jsonl", "spec.json"])
def test_a_page_that_shows_a_damaged_run_does_not_complain_at_every_tick(what, damage, studio):
    run = damage(what)
    page = build(studio)
    news = look(page, run.id)
    assert 'class="said error"' in news["parts"]["status"] and "damaged" in news["turn"]
    assert look(page, run.id) == news
    handler(page, "turned")(run.id)


def test_gradio_s_queue_still_looks_too_often_by_itself(page):
    assert page._queue.sleep_when_free < watch.QUEUE_SECONDS


def test_nothing_of_the_page_is_open_to_other_programs_by_name(page):
    assert {event.api_visibility for event in page.fns.values()} == {"private"}


def test_tables_show_text_and_no_markup(page):
    tables = [b for b in page.blocks.values() if isinstance(b, gr.Dataframe)]
    assert {t.elem_id for t in tables} == {"found", "list-answers", "preview", "runs-table"}
    assert all(t.datatype == "str" and not t.interactive for t in tables)


# Guarded handlers


def test_every_handler_that_reads_anything_is_guarded(page):
    names = {event.fn.__name__ for event in page.fns.values() if event.fn and not hasattr(event.fn, "__wrapped__")}
    assert names == {"take_kind", "show_columns", "<lambda>"}, "these only show and hide"


def fail(error: Exception):
    def handler():
        raise error

    return handler


def test_a_foreseen_error_is_shown_as_it_stands_but_never_as_markup(studio):
    message = "`x` (='<b>&') must be \"2\"."
    with pytest.raises(gr.Error) as shown:
        studio.guard(fail(LoRAError(message)))()
    assert html.unescape(shown.value.message) == message
    assert "<" not in shown.value.message
    assert shown.value.print_exception is False


def test_any_other_error_is_one_sentence_and_its_traceback_in_the_log(studio, caplog):
    with pytest.raises(gr.Error) as shown:
        studio.guard(fail(KeyError("<secret>")))()
    assert shown.value.message == (
        f"Something went wrong that was not foreseen (KeyError); see {html.escape(str(studio.log_file))}."
    )
    (record,) = caplog.records
    assert record.name == "studio" and record.exc_info[0] is KeyError
    assert "Traceback (most recent call last):" in caplog.text and "<secret>" in caplog.text


def test_an_error_made_for_the_page_goes_through_as_it_is(studio, caplog):
    error = gr.Error("<b>said</b>")
    with pytest.raises(gr.Error) as shown:
        studio.guard(fail(error))()
    assert shown.value is error and not caplog.records


def test_a_stream_is_guarded_and_what_came_before_the_error_is_kept(studio):
    def stream(number):
        yield number
        yield number + 1
        raise LoRAError("<no more>")

    guarded = studio.guard(stream)
    assert inspect.isgeneratorfunction(guarded)
    seen = []
    with pytest.raises(gr.Error, match="&lt;no more&gt;"):
        for number in guarded(1):
            seen.append(number)
    assert seen == [1, 2]


def test_a_guarded_handler_gives_back_what_it_did_and_still_gets_gradio_s_request(studio):
    def asked(name: str, request: gr.Request) -> tuple:
        return name, request

    guarded = studio.guard(asked)
    request = types.SimpleNamespace()
    inputs, *_ = special_args(guarded, inputs=["x"], request=request)
    assert guarded(*inputs) == ("x", request)


# The header and the run that is shown


def test_a_page_opens_at_the_run_asked_for_else_at_the_running_else_at_the_newest(page, write_run, hold):
    def opened(**query) -> str | None:
        return update(handler(page, "opened", "run")(types.SimpleNamespace(query_params=query)))["value"]

    assert opened() is None
    runs = sorted((write_run([STARTED]) for _ in range(3)), key=lambda run: run.id)
    assert opened() == runs[2].id
    hold(runs[0])
    assert opened() == runs[0].id
    assert opened(run=runs[1].id) == runs[1].id
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


def test_pages_look_less_often_while_the_cpu_they_would_draw_on_trains(page, write_run, hold):
    run = write_run([STARTED])
    assert look(page, run.id)["every"] == 1000 * watch.LOOK_SECONDS
    hold(run)
    assert look(page, run.id)["every"] == 1000 * watch.LOOK_SECONDS_ON_CPU > 1000 * watch.LOOK_SECONDS
    on_a_gpu = write_run([dataclasses.replace(STARTED, device="cuda:0")])
    page_of_its_own = write_run([])
    assert on_a_gpu.id != page_of_its_own.id and look(page, on_a_gpu.id)["every"] > 2000, "another run still trains"


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
    chosen, *controls = handler(page, "turned")(second.id)
    assert update(chosen)["value"] == first.id
    assert [update(c) for c in controls] == [update(c) for c in train.controls(first)]


def test_a_new_list_of_runs_never_changes_which_run_a_page_shows_or_is_about_to_open(page, write_run):
    runs = [write_run([STARTED]) for _ in range(2)]
    for run in (None, runs[0].id, runs[1].id):
        chosen, *_ = handler(page, "turned")(run)
        assert "value" not in update(chosen)
        assert {run_id for _, run_id in update(chosen)["choices"]} == {run.id for run in runs}


def test_the_head_tells_what_is_training_as_text(studio, write_run, hold):
    run = write_run([STARTED, STEP], RunSpec(name="<b>Inns</b>", train=TrainConfig(steps=9)))
    assert "nothing is training" in app.head_line(studio.runs.running())
    hold(run)
    assert "training “&lt;b&gt;Inns&lt;/b&gt;”, step 1 of 9" in app.head_line(studio.runs.running())


# Start and stop


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


# A run with an adapter, in Spectrum, Chat and Runs


@pytest.fixture
def trained(write_run, studio, tiny_folder, tiny_data) -> Run:
    model = models.load_model(str(tiny_folder), studio.workspace)
    config = LoRAConfig(r=2, target_modules=("q_proj", "down_proj"))
    inject(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=generator))
    spec = RunSpec("Inns", str(tiny_folder), tiny_data, config, TrainConfig(device="cpu", precision="fp32"))
    run = write_run([STARTED, STEP], spec)
    Adapter.from_model(model, base_model=spec.model).save(run.adapter_folder)
    return run


def test_the_spectrum_tab_shows_the_adapter_s_own_numbers(page, trained, studio, tiny_folder):
    adapter = Adapter.load(trained.adapter_folder)
    loudest = max(adapter.factors, key=lambda path: float(adapter.factors[path].delta_weight().norm()))
    place, said, module = handler(page, "follow")(trained.id, None, None)
    assert place == studio.place_of(Source(trained.id)) and "Looking at “Inns”" in said
    assert (update(module)["choices"], update(module)["value"]) == (list(adapter.factors), loudest)
    view = handler(page, "see")(place, loudest)
    facts, heat, *_ = list(handler(page, "show", "heat")(place, "Size ‖ΔW‖"))[-1]
    assert loudest in facts and "<svg" in heat
    ((bars, about),) = handler(page, "show_bars")(view, "log")
    assert "<svg" in bars and "Effective rank" in about
    weight = models.load_model(str(tiny_folder), studio.workspace).get_submodule(loudest).weight
    expected = amplification(adapter.factors[loudest], weight.detach())
    (table, *_), (_, aligned, noise) = handler(page, "show_weight")(view)
    assert f"<td>{expected.projected_norm:.3f}</td>" in table
    assert "<svg" in aligned and "edge of noise" in noise


def test_the_spectrum_tab_without_an_adapter_says_what_to_do(page, write_run):
    for run in ("", write_run([STARTED]).id):
        place, said, _ = handler(page, "follow")(run, None, None)
        assert place is None and "Train one" in said and handler(page, "see")(None, "x") is None


def test_rank_surgery_counts_saves_and_asks_what_is_left_of_the_adapter(page, trained, studio):
    view = (*studio.place_of(Source(trained.id)), next(iter(Adapter.load(trained.adapter_folder).factors)))
    cut = ("rank", 1, 90, False, [])
    assert "4 of 8" in next(handler(page, "show_cut")(view, *cut))
    assert "adapters/less" in handler(page, "keep")(view, "less", *cut)
    less = Adapter.load(studio.workspace.root / "adapters" / "less")
    assert {f.r for f in less.factors.values()} == {1} and less.base_model == trained.spec.model
    *_, (before, after) = handler(page, "both")(view, "name[Inn 3]", *cut)
    assert before and after and before != after
    with pytest.raises(gr.Error, match="at least one curve"):
        next(handler(page, "measure_many")(view, []))


def test_the_time_machine_goes_back_to_a_checkpoint_and_says_where_there_is_none(page, trained, studio):
    path = next(iter(Adapter.load(trained.adapter_folder).factors))
    place = studio.place_of(Source(trained.id))
    said, *_ = next(handler(page, "show_course")((*place, path)))
    assert "was not measured" in said
    writer = EventWriter(trained.log)
    for number in (1, 2):
        writer.write(SpectrumMeasured(number, {path: [0.5 * number, 0.25]}))
    writer.close()
    shutil.copytree(trained.adapter_folder, trained.checkpoints.at(2))
    (trained.checkpoints.at(2) / "training.safetensors").touch()
    said, plot, _, last = next(handler(page, "show_course")((*place, path)))
    assert said == "" and "<svg" in plot and last == 1
    facts, bars, _ = next(handler(page, "show_step")((*place, path), 0))
    assert "steps with all factors: 2" in facts and "After step 1" in bars
    with pytest.raises(gr.Error, match="Step 1 has no checkpoint any more"):
        list(handler(page, "answer_then")(place, 0, "name[Inn 3]"))
    loading, *_, answer = handler(page, "answer_then")(place, 1, "name[Inn 3]")
    assert "step 2" in loading and answer


def test_what_needs_w_says_how_far_it_is_and_then_shows_it(page, trained, studio, monkeypatch):
    place = studio.place_of(Source(trained.id))
    *_, (_, heat, problem, cancel) = handler(page, "show", "heat")(place, "Enrichment")
    assert "chance: 1" in heat and problem == "" and update(cancel)["visible"] is False
    monkeypatch.setattr(studio, "weight", lambda *_: (_ for _ in ()).throw(LoRAError("W is in pieces.")))
    studio._kept.clear()
    *_, (_, heat, problem, _) = handler(page, "show", "heat")(place, "Size beside W")
    assert "No value is a finite number" in heat and "W is in pieces." in problem


def test_directions_are_shown_in_words_where_they_have_some(page, trained, studio):
    place = studio.place_of(Source(trained.id))
    ((reads, writes),) = handler(page, "show_words")((*place, "model.layers.0.self_attn.q_proj"), 2)
    assert reads.count("<h5>") == 2 and "not the residual stream" in writes


def test_a_cell_of_the_map_opens_its_matrix(page):
    path, sections = handler(page, "open_matrix", "sections")(gr.EventData(None, {"name": "model.x"}))
    assert path == "model.x" and update(sections)["selected"] == "matrix"


def test_two_runs_are_compared_and_their_seeds_told(page, trained, studio):
    folder = trained.folder.with_name("20990101-000000-twin-0000")
    shutil.copytree(trained.folder, folder)
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps(spec | {"name": "Twin", "train": spec["train"] | {"seed": 7}}))
    place = studio.place_of(Source(trained.id))
    ((others,),) = [[o] for o in handler(page, "list_others")(place, (), None)]
    word = f"run:{folder.name}"
    assert word in [value for _, value in update(others)["choices"]]
    view = (*place, next(iter(Adapter.load(folder / "adapter").factors)))
    ((told, phi, seeds, heat),) = handler(page, "compare")(view, (), word, "A-right", "Cosine")
    assert "Twin" in told and "1.000" in told, "the same adapter under another name"
    assert "step 0" in phi and "Their seeds differ (0, 7)" in seeds and "<svg" in heat
    with pytest.raises(gr.Error, match=r"`basis` \(=&#x27;C&#x27;\) must be one of"):
        list(handler(page, "compare")(view, (), word, "C", "Cosine"))
    with pytest.raises(gr.Error, match=r"`other` \(=&#x27;file:3&#x27;\) must be one of the adapters listed"):
        list(handler(page, "compare")(view, (), "file:3", "A-right", "Cosine"))
    ((alone, *_),) = handler(page, "compare")(view, (), None, "A-right", "Cosine")
    assert "Nothing to compare with yet" in alone


def test_intruders_are_shown_with_the_level_of_chance(page, trained, studio):
    path = "model.layers.0.self_attn.q_proj"
    *_, (facts, picture) = handler(page, "show_intruders")((*studio.place_of(Source(trained.id)), path), 6, 0.9)
    assert "of 6" in facts and "by chance" in facts and "<svg" in picture


@pytest.mark.slow
def test_damping_is_measured_in_a_process_apart(page, trained, studio):
    view = (*studio.place_of(Source(trained.id)), "model.layers.0.self_attn.q_proj")
    said = list(handler(page, "weigh")(view, 6, 0.95, "the matrix chosen above", 0.5, None))
    going, picture, points, measure, cancel = said[-1]
    assert sorted(points["measured"]) == [0.5, 1.0] and "<svg" in picture and "held-out rows" in going
    assert update(measure)["interactive"] and not update(cancel)["interactive"]
    ((none, *_),) = list(handler(page, "weigh")(view, 6, 0.05, "the matrix chosen above", 0.5, points))[-1:]
    assert "nothing can be damped" in none


def test_pictures_are_handed_out_and_what_is_gone_is_said(page, trained, studio):
    view = (*studio.place_of(Source(trained.id)), "model.layers.0.self_attn.q_proj")
    ((bars, _),) = handler(page, "show_bars")(view, "log")
    (place,) = (b for b in page.blocks.values() if b.elem_id == "sigma")
    key = re.search(r'data-key="(\w+)"', bars)[1]
    assert place.hand_out({"key": key, "kind": "svg"})["mime"] == "image/svg+xml"
    assert "older one" in place.hand_out({"key": "none", "kind": "svg"})["problem"]


def pane_values(*kinds: str, run: str, **fields) -> list:
    """What the panes' widgets hold."""
    mine = {"adapter": run, "strength": 1, "rank": 1, "step": None, "plus": run, "plus_strength": 1} | fields
    return [value for kind in (*kinds, *["Base"] * (4 - len(kinds))) for value in (kind, *mine.values())]


def send(page, run: str, text: str, *kinds: str, past=None, blind=False, live=None, heat=0.0, length=6, **fields):
    """What the page shows while all panes answer: the last picture, by name, and how many there were."""
    past = Conversation() if past is None else past
    values = pane_values(*kinds, run=run, **fields)
    given = [run, past, text, live or chat_tab.Live(), blind, True, len(kinds), None, heat, 0.95, length, 0, *values]
    pictures = list(handler(page, "answer", "talk-a")(*given))
    names = ("past", "order", "ballot", "message", "notes")
    last = dict(zip(names, pictures[-1][:5], strict=True))
    for start, name in ((5, "heads"), (9, "talks"), (13, "engines")):
        last[name] = pictures[-1][start : start + 4]
    return last, pictures


def words(html_text: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", html_text))


def test_chat_streams_to_all_panes_what_the_engine_says(page, trained, studio, tiny_folder):
    shown, pictures = send(page, trained.id, "name[Inn 3]", "Base", "Adapter", "Merged")
    assert "Loading the model …" in pictures[0][13]
    model = models.load_model(str(tiny_folder), studio.workspace)
    tokenizer = studio.tokenizer(str(tiny_folder))
    ids = torch.tensor([prompt_ids(prompt(trained, "name[Inn 3]"), tokenizer)])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, eos_token_id=None
        )
    base, adapter, merged = (reply.text for reply in shown["past"].turns[0].replies)
    assert base == tokenizer.decode(out[0, ids.shape[1] :])
    assert adapter == merged not in ("", base)
    assert base in words(shown["talks"][0]) and "name[Inn 3]" in words(shown["talks"][0])
    assert [line.split(" ·")[0].split(">")[1] for line in shown["engines"][:3]] == [
        "adapter off (strength 0)",
        f"{trained.id} unmerged on 4 matrices, strength 1",
        "W₀ + ΔW in 4 matrices, no LoRA layer",
    ]
    assert "tok k" not in shown["talks"][0]
    for talk in shown["talks"][1:3]:
        coloured = re.findall(r'<span class="tok k\d" tabindex="0" data-mind="[^"]*">([^<]*)</span>', talk)
        assert html.unescape("".join(coloured)) == adapter, "each token is coloured"
    assert shown["notes"] == "", "the template's end token stops this model"


def test_a_conversation_goes_on_in_each_pane_with_its_own_answers(page, trained, studio):
    first, _ = send(page, trained.id, "name[Inn 3]", "Base", "Adapter")
    second, _ = send(page, trained.id, "And <b>more</b>?", "Base", "Adapter", past=first["past"])
    tokenizer = studio.tokenizer(trained.spec.model)
    for place in (0, 1):
        seen = tokenizer.decode(second["past"].turns[1].replies[place].prompt_ids)
        assert "Describe it.\n\nname[Inn 3]<|im_end|>" in seen, "the first message is put as the rows were"
        assert f"{first['past'].turns[0].replies[place].text}<|im_end|>" in seen
        assert seen.endswith("And <b>more</b>?<|im_end|>\n<|im_start|>assistant\n")
    assert "And &lt;b&gt;more&lt;/b&gt;?" in second["talks"][0] and "<b>more" not in second["talks"][0]


def test_to_stop_keeps_what_was_said(page, trained):
    live = chat_tab.Live()
    given = [trained.id, Conversation(), "Hi", live, False, False, 2, None, 0.0, 0.95, 60, 0]
    going = handler(page, "answer", "talk-a")(*given, *pane_values("Base", "Adapter", run=trained.id))
    next(going), next(going)
    live.is_stopped = True
    *_, last = going
    assert 1 <= len(last[0].turns[0].replies[0].token_ids) < 60
    assert last[0].turns[0].replies[0].text in words(last[9])


def test_the_last_message_can_be_edited_and_asked_again(page, trained):
    shown, _ = send(page, trained.id, "name[Inn 3]", "Base", "Adapter")
    values = [2, *pane_values("Base", "Adapter", run=trained.id)]
    before, text, *_ = handler(page, "take_back")(shown["past"], *values)
    assert (before.turns, text) == ((), "name[Inn 3]")
    assert handler(page, "ask_again")(shown["past"], 4) == [before, "name[Inn 3]", 5]
    with pytest.raises(gr.Error, match="There is no message yet to take back; write one and send it"):
        handler(page, "take_back")(before, *values)


def test_a_blind_test_shows_neither_names_nor_engines_until_the_vote_and_counts_it_for_the_right_pane(page, trained):
    for _ in range(8):
        shown, pictures = send(page, trained.id, "name[Inn 3]", "Base", "Adapter", "Merged", blind=True)
        told = words(" ".join(str(part) for picture in pictures for part in picture[5:]))
        assert not any(word in told for word in ("Base", "Adapter", "Merged", "unmerged", "float32", "strength"))
        texts = [reply.text for reply in shown["past"].turns[0].replies]
        for column, place in enumerate(shown["order"]):
            assert texts[place] in words(shown["talks"][column])
        if shown["order"] != [0, 1, 2]:
            break
    vote = events(page, "cast")[1].fn  # the second answer is best
    order, ballot, tally, *rest = vote(trained.id, shown["past"], shown["order"])
    assert order == [] and update(ballot)["visible"] is False
    (kept,) = [json.loads(line) for line in (trained.folder / "votes.jsonl").read_text().splitlines()]
    assert kept["best"] == shown["order"][1] and kept["answers"] == texts
    assert [pane["adapter"] for pane in kept["panes"]] == ["", trained.id, trained.id]
    assert "1 of 1" in words(tally) and "21% – 100%" in words(tally)
    assert "voted best" in rest[1] and "ABC"[shown["order"][1]] in words(rest[1])
    assert "float32" in rest[4]


def test_a_transcript_is_saved_as_json_and_markdown_and_kept_with_its_run(page, trained, tmp_path):
    shown, _ = send(page, trained.id, "Is *this* <b>bold</b>?", "Base", "Adapter")
    as_json, as_text = (json.loads(event.fn(trained.id, shown["past"])) for event in events(page, "write"))
    record = json.loads(as_json["text"])
    replies = shown["past"].turns[0].replies
    assert (record["run"], record["turns"][0]["message"]) == (trained.id, "Is *this* <b>bold</b>?")
    assert [a["text"] for a in record["turns"][0]["answers"]] == [reply.text for reply in replies]
    assert record["turns"][0]["answers"][1]["fingerprint"] == replies[1].fingerprint
    assert r"> Is \*this\* \<b\>bold\</b\>?" in as_text["text"] and "### B: Base + adapter" in as_text["text"]
    (earlier,) = (trained.folder / "transcripts").glob("*.json")
    earlier.rename(earlier.with_name(f"20260101-000000-{earlier.name.rpartition('-')[2]}"))
    events(page, "write")[0].fn(trained.id, shown["past"])  # the same, some time later
    with zipfile.ZipFile(capsule.write(trained, tmp_path / "capsule.zip")) as packed:
        kept = {name: packed.read(name).decode() for name in packed.namelist() if name.startswith("transcripts/")}
    assert sorted(kept.values()) == sorted([as_json["text"], as_text["text"]])
    with pytest.raises(gr.Error, match="There is nothing to save yet; send a message first"):
        events(page, "write")[0].fn(trained.id, Conversation())
    shutil.rmtree(trained.folder / "transcripts")
    (trained.folder / "transcripts").touch()
    with pytest.raises(gr.Error, match="The transcript could not be kept in"):
        events(page, "write")[0].fn(trained.id, shown["past"])
    (trained.folder / "transcripts").unlink()


def test_a_text_of_one_s_own_is_scored_by_a_pane_and_the_base(page, trained):
    values = pane_values("Base", "Adapter", run=trained.id)
    scored = handler(page, "scored")(trained.id, "name[Inn 3]", "Inn 3 has <b> stars.", "B", 2, *values)
    assert "Inn 3 has <b> stars." in words(scored) and "<b>" not in scored
    alone = handler(page, "scored")(trained.id, "", "Inn 3 has 3 stars.", "B", 2, *values)
    assert words(alone).startswith("Inn 3 has 3 stars.")
    for text, letter, sentence in (("", "B", "`Text` (=nothing) must not be empty"), ("x", "D", "must be one that is")):
        with pytest.raises(gr.Error) as shown:
            handler(page, "scored")(trained.id, "", text, letter, 2, *values)
        assert sentence in html.unescape(shown.value.message)


def test_a_list_of_prompts_is_asked_of_all_panes_and_measured(page, trained, tmp_path):
    values = [0.0, 0.95, 6, 0, *pane_values("Base", "Adapter", run=trained.id)]
    asked = handler(page, "asked")
    *_, (summary, view, kept) = asked(trained.id, prompt_list.Going(), prompt_list.WHERE[0], None, 2, 2, *values)
    titles, rows, _ = kept
    assert titles == ["A: Base", "B: Base + adapter"] and len(rows) == 2
    assert rows[0][1].startswith("Inn "), "the reference of the row that was held out"
    assert "ROUGE-L" in words(summary) and update(view)["value"]["data"][0][:2] == rows[0][:2]
    file = json.loads(handler(page, "csv")(trained.id, kept))
    first, *others = csv.reader(io.StringIO(file["text"]))
    assert first[:4] == ["prompt", "reference", *titles] and [row[:4] for row in others] == rows
    path = tmp_path / "mine.jsonl"
    path.write_text('name[Inn 3]\n\n{"prompt": "Hi", "reference": "Ho"}\n')
    *_, (_, _, kept) = asked(trained.id, prompt_list.Going(), prompt_list.WHERE[1], str(path), 9, 2, *values)
    assert [row[:2] for row in kept[1]] == [["name[Inn 3]", ""], ["Hi", "Ho"]]
    stopped = prompt_list.Going()
    going = asked(trained.id, stopped, prompt_list.WHERE[1], str(path), 9, 2, *values)
    next(going), next(going)
    stopped.is_stopped = True
    *_, (summary, _, _) = going
    assert re.search(r"Cancelled after [01] of 2 prompts\.", words(summary))


def test_a_list_without_prompts_or_answers_says_what_is_missing(page, trained):
    values = [0.0, 0.95, 6, 0, *pane_values("Base", run=trained.id)]
    for run, sentence in ((trained.id, "`Prompts` (=nothing) must be a file"), ("", "`run` (=nothing) must be one")):
        with pytest.raises(gr.Error) as shown:
            list(handler(page, "asked")(run, prompt_list.Going(), prompt_list.WHERE[1], None, 2, 2, *values))
        assert html.unescape(shown.value.message).startswith(sentence)
    with pytest.raises(gr.Error, match="There are no answers yet; ask all panes first"):
        handler(page, "csv")(trained.id, [])


@pytest.mark.parametrize(
    ("run", "text", "kinds", "fields", "sentence"),
    [
        ("", "Hi", ["Base"], {}, "`run` (=nothing) must be one with an adapter; train one first, or open one in Runs."),
        (None, " ", ["Base"], {}, "`Message` (=nothing) must not be empty; write one, or take an example."),
        (None, "", ["Base"], {}, "`Message` (=nothing) must not be empty; write one, or take an example."),
        (None, "Hi", ["Adapter"], {"adapter": None}, "`Adapter of` (=nothing) must name a run, for a pane that runs"),
        (None, "Hi", ["Sum of two"], {"plus": None}, "`Plus the adapter of` (=nothing) must be chosen for a pane that"),
        (None, "Hi", ["Checkpoint"], {}, "`Checkpoint of step` (=nothing) must be chosen for a pane that runs"),
        (None, "Hi", ["Checkpoint"], {"step": 7}, "`step` (=7) must be that of a checkpoint of “Inns”; it has none."),
    ],
)
def test_chat_refuses_what_it_cannot_answer(run, text, kinds, fields, sentence, page, trained):
    run = trained.id if run is None else run
    with pytest.raises(gr.Error) as shown:
        send(page, run, text, *kinds, **fields)
    assert html.unescape(shown.value.message).startswith(sentence)


def test_chat_with_a_run_that_has_no_adapter_yet_says_when_it_will(page, write_run, trained):
    run = write_run([STARTED], dataclasses.replace(trained.spec, name="Early"))
    with pytest.raises(
        gr.Error, match="“Early” has no adapter yet; it is saved at the first evaluation and at the end"
    ):
        send(page, run.id, "Hi", "Adapter")
    send(page, run.id, "Hi", "Base")
    other = write_run([STARTED], dataclasses.replace(trained.spec, model="starter"))
    with pytest.raises(gr.Error, match="must be of a run on .*; it is on starter"):
        send(page, trained.id, "Hi", "Adapter", adapter=other.id)


def test_the_panes_offer_the_adapters_on_the_same_base_and_keep_what_was_chosen(page, trained, write_run):
    write_run([STARTED], dataclasses.replace(trained.spec, model="starter"))
    second = write_run([STARTED], dataclasses.replace(trained.spec, name="Second"))
    shutil.copytree(trained.adapter_folder, second.adapter_folder)
    for name, chosen in (("opened", second.id), ("switched", trained.id)):
        *_, adapter, plus = handler(page, name, "tally")(trained.id, *pane_values("Base", run=second.id))
        assert {i for _, i in update(adapter)["choices"]} == {trained.id, second.id}
        assert update(adapter)["value"] == update(plus)["value"] == chosen


def test_the_adapter_s_zip_holds_what_peft_reads_and_follows_the_adapter(trained, workspace, tmp_path):
    from studio.tabs.runs import pack

    file = pack(trained, tmp_path)
    with zipfile.ZipFile(file) as packed:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert packed.read(name) == (trained.adapter_folder / name).read_bytes()
    (tmp_path / Path(file).name).write_bytes(b"old")
    os.utime(file, (0, 0))
    assert zipfile.is_zipfile(pack(trained, tmp_path))


def test_deleting_asks_first_then_shows_the_next_run(page, trained, write_run, hold):
    other = write_run([STARTED], RunSpec(name="Other"))
    question, words = handler(page, "ask")(trained.id)
    assert update(question)["visible"] is True and "Delete “Inns”" in words and trained.folder.exists()
    hidden, chosen, table, ids = handler(page, "remove")(trained.id)
    assert update(hidden)["visible"] is False and update(chosen)["value"] == other.id
    assert ids == [other.id] and [row[0] for row in table["data"]] == ["Other"]
    assert not trained.folder.exists()
    hold(other)
    with pytest.raises(gr.Error, match="is still running; stop it before you delete it"):
        handler(page, "remove")(other.id)


def test_an_adapter_that_was_trained_on_is_read_anew(studio, trained):
    before = studio.spectra(studio.opened(Source(trained.id)))
    assert studio.spectra(studio.opened(Source(trained.id))) is before
    shutil.copytree(trained.adapter_folder, trained.folder / "copy")
    adapter = Adapter.load(trained.folder / "copy")
    louder = {p: dataclasses.replace(f, B=2 * f.B) for p, f in adapter.factors.items()}
    dataclasses.replace(adapter, factors=louder).save(trained.adapter_folder)
    after = studio.spectra(studio.opened(Source(trained.id)))
    path = next(iter(louder))
    assert after[path][1].norm == pytest.approx(2 * before[path][1].norm)


# Data and Model


def test_a_file_is_read_guessed_and_previewed(page, tmp_path, tiny_folder):
    path = tmp_path / "quiz.csv"
    path.write_text("number,question,answer\n" + "".join(f"{i},Why {i}?,Because <{i}>.\n" for i in range(24)))
    source, summary, note, task, labels, layout, *rest = events(page, "read")[0].fn(str(path), str(tiny_folder))
    assert (source, layout["value"]) == (str(path), "pair")
    assert (note, task, labels["visible"]) == ("", "causal", False)
    assert "24 rows, columns number, question, answer." in summary
    assert [c["value"] for c in rest[:5]] == ["question", "(none)", "answer", "(none)", "(none)"]
    assert rest[-1]["headers"] == ["number", "question", "answer"]
    assert rest[-1]["data"][1] == ["1", "Why 1?", "Because <1>."] and len(rest[-1]["data"]) == 20


def test_a_file_that_cannot_be_read_is_one_sentence(page, tmp_path, tiny_folder):
    (tmp_path / "empty.csv").write_text("")
    read = events(page, "read")[0].fn
    with pytest.raises(gr.Error, match=r"`empty\.csv` is empty \(0 bytes\)"):
        read(str(tmp_path / "empty.csv"), str(tiny_folder))


@pytest.fixture
def row_values(page, tiny_folder, tiny_data):
    """What the inputs of `show_row` hold, by place, when the tiny data set is chosen."""
    event = events(page, "show_row")[0]
    values = [c.value for c in event.inputs]
    names = [c.elem_id or type(c).__name__ for c in event.inputs]
    values[0], values[names.index("State", 1)] = str(tiny_folder), tiny_data.source
    values[names.index("column-prompt")], values[names.index("column-completion")] = "facts", "text"
    return dict(zip([f"{i} {name}" for i, name in enumerate(names)], values, strict=True))


def test_a_row_is_shown_as_the_model_sees_it_with_the_trained_tokens_marked(page, row_values):
    marked, facts = handler(page, "show_row")(*row_values.values())
    assert "".join(text for text, _ in marked) == (
        "<|im_start|>user\nname[Inn 0], stars[0]<|im_end|>\n<|im_start|>assistant\nInn 0 has 0 stars.<|im_end|>\n"
    )
    trained = [text for text, mark in marked if mark == "trained"]
    assert "".join(trained) == "Inn 0 has 0 stars.<|im_end|>"
    assert f"{len(marked)} tokens, {len(trained)} of them trained." in facts


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"setting-max_length": 8}, "its answer begins at token"),
        ({"setting-max_length": None}, "`max_length` (=None) must be a whole number."),
        ({"column-completion": "answer"}, "`completion` (='answer') must be a column of inns.jsonl"),
    ],
)
def test_a_row_that_cannot_be_shown_is_said_in_its_place(changes, sentence, page, row_values):
    for name, value in changes.items():
        (key,) = [k for k in row_values if k.endswith(f" {name}")]
        row_values[key] = value
    marked, words = handler(page, "show_row")(*row_values.values())
    assert marked is None and 'class="said error"' in words and sentence in html.unescape(words)


@pytest.fixture
def survey(page, row_values):
    """survey(name=value): looks at all rows; returns id -> what each component shows at the end."""
    (event,) = {e.fn: e for e in events(page, "survey")}.values()

    def press(**changes) -> dict:
        by_name = {key.partition(" ")[2]: value for key, value in row_values.items()}
        values = [
            changes.get((c.elem_id or "").replace("-", "_"), by_name.get(c.elem_id or "", c.value))
            for c in event.inputs
        ]
        values[0], values[3] = row_values["0 State"], next(v for k, v in row_values.items() if k.endswith("3 State"))
        *_, last = event.fn(*values)
        return {c.elem_id or "look": value for c, value in zip(event.outputs, last, strict=True)}

    return press


def test_checking_all_rows_with_an_emptied_length_names_it(survey):
    with pytest.raises(gr.Error, match="max_length"):
        survey(setting_max_length=None)


def test_checking_all_rows_reports_them_and_draws_their_lengths(survey):
    shown = survey()
    assert "24 rows: 22 to train on, 2 held out." in shown["verdict"]
    assert "<svg" in shown["lengths"] and "24 rows, median" in shown["lengths"]
    assert "&lt;|im_end|&gt;: 24 of 24" in shown["cut-facts"]
    assert update(shown["checks"])["visible"] is False, "nothing was found"


def test_a_check_s_rows_are_listed_with_their_place_in_the_file_and_why(survey):
    found = update(survey(setting_max_length=10)["checks"])["choices"]
    assert [title for _, title in found][0] == "Answer begins beyond the cut-off"
    shown = survey(setting_max_length=10, checks="Answer begins beyond the cut-off")
    assert "24 rows of inns.jsonl cannot be used" in shown["verdict"] or "No row of inns.jsonl" in shown["verdict"]
    first = update(shown["found"])["value"]["data"][0]
    assert first[:2] == ["1", "inns.jsonl, line 1"]
    assert first[2].startswith("its answer begins at token")


def test_a_look_at_a_model_offers_the_matrices_that_it_has(page, studio, tiny_folder):
    look_at = events(page, "look_at")[0].fn
    model, facts, preset, names, pattern, cells = look_at("Folder", f"  {tiny_folder} ")
    assert model == str(tiny_folder) and "2 × 32" in facts
    assert pattern == "", "a pattern for another model does not stay"
    drawn = json.loads(update(cells)["layout"])
    assert drawn["model"] == model and len(drawn["cells"]) == 16
    titles = update(preset)["choices"]
    assert titles == ["Query and value (the paper)", "All attention", "All linear", "My own choice"]
    offered = update(names)["choices"]
    assert ("self_attn.k_proj · 16 × 32 · 2×", "self_attn.k_proj") in offered
    take = handler(page, "take_preset")
    skeleton = studio.skeleton(model)
    for title, count in (("Query and value (the paper)", 4), ("All attention", 8), ("All linear", 14)):
        chosen, *cleared = take(model, title)
        assert cleared == ["", "", ""], "a preset goes before a pattern, exceptions and layers"
        assert len(plan(skeleton, LoRAConfig(target_modules=tuple(chosen))).targets) == count
        assert set(chosen) <= {name for _, name in offered}
    with pytest.raises(gr.Error, match="`Folder` must not be empty; write one, or take the starter"):
        look_at("Folder", " ")
    with pytest.raises(gr.Error, match=r"`model` \(=.*/no/such"):
        look_at("Folder", "/no/such")


def test_reading_from_the_hub_without_a_name_says_how_it_looks(page):
    (press,) = [
        e.fn for e in page.fns.values() if [c.label for c in e.inputs][:1] == ["Hub id"] and len(e.outputs) > 10
    ]
    with pytest.raises(gr.Error, match="must look like hub:owner/name"):
        press("", "starter")


def test_data_specs_of_the_page_begin_as_declared(page):
    (event,) = events(page, "begin")
    by_id = {c.elem_id: c.value for c in event.inputs if c.elem_id}
    for name in ("template", "train_on", "eval_fraction", "max_eval_rows"):
        assert by_id[f"setting-{name}"] == getattr(DataSpec(), name)
