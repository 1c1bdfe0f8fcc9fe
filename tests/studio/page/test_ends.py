"""A page is told of each run that ended while it was open, once, in words that fit how it ended."""

import re

import gradio as gr
import pytest

from core import Evaluated, Failed, Finished, TrainConfig
from studio.checkpoints import ADAPTER_FILES
from studio.event_log import EventWriter
from studio.specs import RunSpec
from tests.studio.page.pages import STARTED, STEP, look

DONE = Finished(1, "done", 0)
TRIED = [Evaluated(0, 3.5, 9, 60.0), STEP, Evaluated(1, 2.25, 9, 139.5)]


def say(run, *events) -> None:
    writer = EventWriter(run.log)
    for event in events:
        writer.write(event)
    writer.close()


@pytest.fixture
def ended(page, write_run):
    """ended(*events, **spec): what a page is told that saw a run go on which then said these events and was gone."""

    def end(*events, **spec) -> list[dict]:
        run = write_run([], RunSpec(**spec))
        with run.locked():
            seen = look(page, run.id, going=[])
        assert seen["going"] == [run.id] and seen["ended"] == []
        say(run, *events)
        return look(page, run.id, going=seen["going"])["ended"]

    return end


def test_an_end_is_told_to_each_page_that_saw_the_run_go_on_and_once(page, write_run):
    earlier, run = write_run([STARTED, STEP, DONE]), write_run([STARTED, STEP])
    with run.locked():
        pages = [look(page, earlier.id, train=is_open) for is_open in (True, False)]
    say(run, DONE)
    for seen in pages:
        told = look(page, earlier.id, going=seen["going"])
        assert [end["run"] for end in told["ended"]] == [run.id] and told["going"] == []
        assert look(page, earlier.id, going=told["going"])["ended"] == []
    assert look(page, run.id)["ended"] == [], "a page that is opened later has nothing to tell"


def test_a_run_that_waits_goes_on_and_is_told_of_when_it_ended_between_two_looks(page, write_run):
    run = write_run()
    run.place = 0.0
    seen = look(page, run.id)
    assert seen["going"] == [run.id] and seen["share"] is None
    say(run, STARTED, STEP, DONE)
    run.place = None
    assert len(look(page, run.id, going=seen["going"])["ended"]) == 1


def test_a_page_learns_how_far_the_run_is_for_its_title(page, write_run):
    run = write_run([STARTED, STEP], RunSpec(train=TrainConfig(steps=8)))
    with run.locked():
        assert look(page, run.id, train=False)["share"] == 12
    assert look(page, run.id, train=False)["share"] is None


FULL = Failed("The disk is full; free some space.", "disk")


@pytest.mark.parametrize(
    ("events", "title", "body", "is_good"),
    [
        (
            [STARTED, *TRIED, DONE],
            "has finished",
            "Lowest held-out loss 2.250, at step 1. Trained for 3 min 20 s.",
            True,
        ),
        ([STARTED, STEP, DONE], "has finished", "Last training loss 1.500. Trained for 0 s.", True),
        ([STARTED, *TRIED, Finished(1, "stopped", 0)], "was stopped", "Lowest held-out loss 2.250, at step 1.", True),
        ([STARTED, *TRIED, Finished(1, "early", 0)], "has finished", "Ended early: the held-out loss rose.", True),
        ([STARTED, STEP, Finished(1, "killed", 0)], "was stopped", "It was killed: all of its processes", False),
        ([STARTED, STEP, Failed("The loss is nan; lower it.")], "failed", "The loss is nan; lower it.", False),
        ([STARTED, STEP, FULL], "is paused", FULL.message, False),
        ([STARTED, STEP], "was interrupted", "The worker was killed, or the machine", False),
    ],
)
def test_how_it_ended_is_said_with_what_came_of_it(events, title, body, is_good, ended):
    (told,) = ended(*events, name="Inns")
    assert told["title"] == f"“Inns” {title}" and told["body"].startswith(body)
    assert told["is_good"] is is_good
    assert f'data-tab="train" data-run="{told["run"]}"' in told["html"], "there is no adapter: Train says what happened"


def test_where_scores_decide_the_best_is_said(ended):
    scored = [Evaluated(step, 1.0, 9, 0.1, {"accuracy": score}, "accuracy") for step, score in ((1, 0.75), (2, 0.5))]
    (told,) = ended(STARTED, STEP, *scored, DONE)
    assert told["body"].startswith("Best Accuracy 0.750, at step 1.")


@pytest.mark.parametrize(
    "events", [[STARTED, STEP, Finished(1, "paused", 0)], [Finished(0, "stopped", 0)]], ids=["paused", "unqueued"]
)
def test_what_somebody_did_by_hand_is_no_news(events, ended):
    assert ended(*events) == []


def test_what_is_damaged_or_deleted_is_told_elsewhere(page, studio, write_run):
    damaged, deleted = write_run([STARTED]), write_run([STARTED])
    with damaged.log.path.open("ab") as file:
        file.write(b"{\n")
    studio.runs.delete(studio.runs.get(deleted.id))
    assert look(page, "", going=[damaged.id, deleted.id])["ended"] == []


def test_names_and_reasons_stay_text_and_long_ones_are_cut(ended):
    (told,) = ended(STARTED, Failed("<i>No</i>\nroom. " * 40), name="<b>Inns</b>")
    assert told["title"] == "“<b>Inns</b>” failed"
    assert "<b>Inns" not in told["html"] and "<i>" not in told["html"]
    assert told["body"].startswith("<i>No</i> room. <i>No") and told["body"].endswith(" …") and len(told["body"]) < 230


def test_the_ways_on_from_a_finished_run_choose_it_whichever_is_shown(page, write_run):
    run = write_run([STARTED, STEP, DONE])
    run.adapter_folder.mkdir()
    for name in ADAPTER_FILES:
        (run.adapter_folder / name).touch()
    (told,) = look(page, "another", going=[run.id])["ended"]
    found = re.findall(r'data-tab="(\w+)" data-run="([^"]+)"', told["html"])
    assert found == [("spectrum", run.id), ("chat", run.id), ("home", run.id)]
    (tabs,) = (b for b in page.blocks.values() if isinstance(b, gr.Tabs) and b.elem_id == "tabs")
    assert {tab for tab, _ in found} <= {tab.id for tab in tabs.children}
