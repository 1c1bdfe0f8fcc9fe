"""The guided first run: what each starter teaches, the run that is made of it, and what is said while it goes."""

import html
import types

import gradio as gr
import pytest

from core import Evaluated, Failed, Finished
from studio.checkpoints import ADAPTER_FILES
from studio.model_files import STARTER
from studio.tabs import guide
from tests.studio.page.pages import STARTED, STEP, build, handler

each = pytest.mark.parametrize("source", [s.source for s in guide.starters()])


def test_sets_of_labels_which_the_starter_cannot_write_are_not_offered():
    assert [s.name for s in guide.starters()] == ["lighthouse", "restaurants", "tickets"]


@each
def test_what_a_set_teaches_is_said_with_one_of_its_rows(source, studio):
    (starter,) = (s for s in guide.starters() if s.source == source)
    said = guide.about(source, studio)
    assert html.escape(starter.change) in said
    assert said.count('class="asked"') == said.count('class="said-by"') == 1


@each
def test_the_run_of_a_set_can_be_started_and_trains_the_starter_in_a_minute_s_steps(source, studio):
    spec = guide.spec_of(source, studio)
    studio.check(spec)
    assert spec.model == STARTER and spec.train.steps * spec.train.batch_size <= 200
    assert spec.data.max_eval_rows * 3 <= 40  # measured at its start, its middle and its end


def test_the_loss_is_told_from_before_to_after_and_a_failure_with_its_reason(write_run):
    ended = [STARTED, Evaluated(0, 3.21, 90, 0.1), STEP, Evaluated(1, 2.1, 90, 0.1)]
    run = write_run([*ended, Finished(1, "done", 0)])
    run.adapter_folder.mkdir()
    for name in ADAPTER_FILES:
        (run.adapter_folder / name).touch()
    assert "the loss went from 3.21 to 2.10" in guide.progress(run)
    failed = write_run([STARTED, Failed("There is <no> room.")])
    assert "There is &lt;no&gt; room." in guide.progress(failed)


def test_a_workspace_without_a_run_opens_at_the_guide_and_one_with_a_run_does_not(studio, write_run):
    def selected():
        return handler(build(studio), "opened", "asked-tab")(types.SimpleNamespace(query_params={}))[1]

    assert selected() == "start"
    write_run([STARTED])
    assert selected() == gr.skip()


@pytest.mark.parametrize("name", ["answer_both", "show_changes"])
def test_a_step_that_needs_the_run_asks_for_it(studio, name):
    called = handler(build(studio), name)
    with pytest.raises(gr.Error, match="must be trained first"):
        next(iter(called(*[""] * (2 if name == "answer_both" else 1))))
