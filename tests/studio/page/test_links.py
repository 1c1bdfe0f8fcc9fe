"""A link opens the view that it names; what it names and is not there, the page says, and opens all the same."""

import html
import re
import types
import warnings
from urllib.parse import parse_qsl

import gradio as gr
import pytest

from core import Adapter
from studio.links import GO, View, ways
from studio.opened import Source
from studio.tabs import home, panes, runs, train
from tests.studio.page.pages import STARTED, events, handler, update

PARTS = ("run", "tab", "source", "said", "module", "sections")


@pytest.fixture
def opened(page):
    """opened(**query): what an address sets, by `PARTS` and without what it leaves as it is; what the page says."""

    def open_at(**query) -> tuple[dict, list[str]]:
        (event,) = (e for e in events(page, "opened") if len(e.outputs) == len(PARTS))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            values = event.fn(types.SimpleNamespace(query_params=query))
        told = {name: value for name, value in zip(PARTS, values, strict=True) if value != gr.skip()}
        return told, [html.unescape(str(one.message)) for one in said]

    return open_at


def query_of(shown: str) -> dict[str, str]:
    (address,) = re.findall(r'<a href="\?([^"]*)">', shown)
    return dict(parse_qsl(html.unescape(address), strict_parsing=True))


def test_the_link_beside_a_matrix_opens_that_matrix(opened, page, studio, trained):
    place = studio.place_of(Source(trained.id))
    *_, loudest = sorted(studio.spectra(studio.opened(place[0])).items(), key=lambda item: item[1][1].norm)
    quiet = next(path for path in Adapter.load(trained.adapter_folder).factors if path != loudest[0])
    ((_, about),) = handler(page, "show_bars")((*place, quiet), "linear")
    told, said = opened(**query_of(about))
    assert said == []
    assert update(told["run"])["value"] == trained.id
    assert (told["tab"], update(told["sections"])["selected"]) == ("spectrum", "matrix")
    assert told["source"] == place
    assert update(told["module"])["value"] == quiet
    # The run of the header is new to the page after that, and must not turn it to another matrix.
    followed = handler(page, "follow")(trained.id, "", place, quiet)
    assert followed[:2] == (trained.id, place) and update(followed[3])["value"] == quiet
    assert update(handler(page, "follow")(trained.id, "", None, quiet)[3])["value"] == loudest[0]


def test_the_link_of_runs_opens_that_run_there(opened, write_run):
    first, _ = (write_run([STARTED]) for _ in range(2))
    told, said = opened(**query_of(runs.details(first)))
    assert (update(told["run"])["value"], told["tab"]) == (first.id, "runs")
    assert said == [] and not told.keys() - {"run", "tab"}


def test_an_address_without_a_view_leaves_the_page_as_it_is(opened, trained):
    told, said = opened(run=trained.id)
    assert told.keys() == {"run"} and said == []


def test_a_view_of_a_section_opens_it_at_the_largest_matrix(opened, trained):
    told, _ = opened(run=trained.id, tab="spectrum", section="compare")
    assert update(told["sections"])["selected"] == "compare"
    assert update(told["module"])["value"]


@pytest.mark.parametrize(
    ("query", "sentence", "tab"),
    [
        ({"run": "<b>"}, "`run` (='<b>') must be a run of this workspace; it may have been deleted.", None),
        ({"run": "gone", "tab": "chat", "module": "x"}, "`run` (='gone') must be a run of this workspace", "chat"),
        ({"run": "ID", "module": "<b>"}, "`module` (='<b>') must be one of the 4 matrices of “Inns”", "spectrum"),
        ({"module": "x"}, "`module` (='x') must come with the run that it is of, as run=….", None),
        ({"run": "ID", "tab": "<b>"}, "`tab` (='<b>') must be one of start, model, data, train, spectrum, chat,", None),
        ({"tab": "runs", "section": "x"}, "`section` (='x') must be one of overview, matrix, past,", "runs"),
    ],
)
def test_what_is_not_there_is_said_once_and_the_page_still_opens(query, sentence, tab, opened, trained):
    told, said = opened(**{name: trained.id if value == "ID" else value for name, value in query.items()})
    assert len(said) == 1 and said[0].startswith(sentence)
    assert update(told["run"])["value"] == trained.id
    assert (told.get("tab")) == tab


def test_a_matrix_of_a_run_without_an_adapter_is_said_not_to_be_there(opened, write_run):
    told, said = opened(run=write_run([STARTED]).id, module="x")
    assert len(said) == 1 and "has no adapter yet" in said[0]
    assert told["source"] is None and "No adapter yet" in told["said"]


def test_a_damaged_adapter_leaves_the_rest_of_the_page(opened, trained):
    (trained.adapter_folder / "adapter_model.safetensors").write_bytes(b"{")
    told, said = opened(run=trained.id, tab="spectrum")
    assert len(said) == 1 and update(told["run"])["value"] == trained.id


def test_a_link_keeps_marks_that_an_address_would_take_for_its_own():
    view = View("a", "spectrum", module="x&tab=chat <b>\"'")
    shown = view.link()
    assert query_of(shown) == {"run": "a", "tab": "spectrum", "module": view.module} and "<b>" not in shown


def test_every_button_to_a_tab_leads_to_one_that_there_is(page, studio, write_run):
    """Each part that has nothing to show yet has one, and Train once its run is over."""
    empty = write_run([STARTED])
    shown = [
        train.view(None)["status"],
        handler(page, "follow")("", "", None, None)[2],
        handler(page, "follow")(empty.id, "", None, None)[2],
        handler(page, "show", "download")("", None)[0],
        home.view(None),
        handler(page, "offer")(None, "", *["Base", *[None] * (panes.NUM_INPUTS - 1)] * 4)[1],
        handler(page, "offer")(empty.id, empty.id, *[None] * 40)[1],
    ]
    found = [re.findall(r'data-tab="(\w+)"', one) for one in shown]
    assert all(found)
    (tabs,) = (b for b in page.blocks.values() if isinstance(b, gr.Tabs) and b.elem_id != "sections")
    assert {tab for of_one in found for tab in of_one} <= {tab.id for tab in tabs.children}
    (went,) = (event for event in page.fns.values() if event.js == GO)
    assert went.fn is None and [o.elem_id for o in went.outputs] == ["tabs", "run"], "the page need not ask for it"


def test_words_on_a_button_to_a_tab_stay_words():
    assert ways(chat="<b>") == '<div class="ways"><button type="button" data-tab="chat">&lt;b&gt;</button></div>'
    assert 'data-tab="train" data-run="&lt;b&gt;"' in ways("<b>", train="See it")
