"""The page as a whole: it is built over any workspace, and errors are sentences."""

import html
import inspect
import types

import gradio as gr
import pytest
from gradio.helpers import special_args

from core import (
    Adapter,
    LoRAError,
)
from studio import watch
from studio.opened import Source
from studio.tabs import learn
from tests.studio.page.pages import build, events, handler, look, update


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


def test_the_run_that_is_chosen_is_shown_before_other_tabs_follow_it(page):
    """Gradio asks the listeners of an event one after another."""
    (run,) = (number for number, block in page.blocks.items() if block.elem_id == "run")
    first = next(event for event in page.fns.values() if (run, "change") in event.targets)
    assert "head" in [block.elem_id for block in first.outputs] and not first.queue


def test_of_the_spectrum_s_sections_only_the_one_that_is_seen_is_drawn_anew(page):
    turns = events(page, "take_turns")
    for seen, numbers in (("overview", [1, 0]), ("matrix", [0, 1]), ("compare", [1, 1]), ("nowhere", [0, 0])):
        told = [event.fn(seen, *[7] * len(event.outputs)) for event in turns]
        assert [values.count(8) for values in told] == numbers
    looked_at = {target for event in turns for target in event.targets}
    told = {event.fn.__name__ for event in page.fns.values() if looked_at & set(event.targets)}
    assert not told & {"show_bars", "show_weight", "show_course"}, "they are drawn when it is their turn"


def test_a_section_is_drawn_by_its_turn_alone_which_comes_when_it_is_opened_or_what_is_looked_at_changes(page, trained):
    """So a page that is opened at a matrix draws it once, though a section is opened and a matrix chosen."""
    (matrix,) = (b for b in page.blocks.values() if isinstance(b, gr.Tab) and b.id == "matrix")
    (opening,) = (event for event in page.fns.values() if (matrix._id, "select") in event.targets)
    assert opening.fn("overview", 4) == ["matrix", 5]
    assert opening.fn("matrix", 4) == [gr.skip()] * 2, "the page's address has opened it"
    (bars,) = events(page, "show_bars")
    assert (opening.outputs[1]._id, "change") in bars.targets and opening.queue
    view = (Source(trained.id), None, next(iter(Adapter.load(trained.adapter_folder).factors)))
    assert list(bars.fn(view, "linear", "overview")) == [[gr.skip()] * 2], "another section is seen"
    ((drawn, _),) = bars.fn(view, "linear", "matrix")
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
    assert names == {"take_kind", "show_columns", "take_turns", "open_section", "<lambda>"}, (
        "these only show, hide and count"
    )


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
