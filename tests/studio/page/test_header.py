"""The header's line says what goes on, as it is now."""

import re

import torch

from core import MethodConfig, TrainConfig
from studio import header
from studio.event_log import EventWriter
from studio.specs import RunSpec
from tests.studio.page.pages import STARTED, STEP, look


def line(page, run) -> str:
    return look(page, run.id, train=False)["parts"]["head-line"]


def test_the_line_says_where_training_would_go_on_and_what_is_free_there(page, write_run):
    shown = line(page, write_run([STARTED]))
    free, total = map(float, re.search(r"([\d.]+) of ([\d.]+) GB free", shown).groups())
    assert 0 <= free <= total > 0
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert shown.startswith("<div>CPU: ")
    assert "No model in memory" in shown and "Nothing is training" in shown and "waiting" not in shown


def test_the_line_tells_the_run_that_goes_on_as_text_with_its_progress_and_the_time_left(page, write_run, hold):
    run = write_run([STARTED], RunSpec(name="<b>Inns</b>", model="/models/tiny.gguf", train=TrainConfig(steps=9)))
    assert "Nothing is training" in line(page, run)
    hold(run)
    assert "Training “&lt;b&gt;Inns&lt;/b&gt;”, step 0 of 9, starting" in line(page, run)
    writer = EventWriter(run.log)
    writer.write(STEP)  # half a second, so that eight more take four
    writer.close()
    shown = line(page, run)
    assert re.search(r"step 1 of 9, [34] s left", shown)
    assert 'aria-valuenow="1" aria-valuemax="9"' in shown
    assert "Model: tiny.gguf (training)" in shown and "/models" not in shown


def test_the_line_counts_what_else_trains_and_what_waits(page, write_run, hold):
    running = [write_run([STARTED, STEP], RunSpec(name=name)) for name in ("One", "Two")]
    for run in running:
        hold(run)
    queued = write_run()
    queued.place = 1.0
    assert "<div>1 more training</div><div>1 waiting</div>" in line(page, queued)
    queued.place = None
    assert "waiting" not in line(page, queued)


def test_the_line_names_the_model_that_answers_and_the_one_that_is_trained(page, studio, trained, write_run, hold):
    engine = studio.engine(trained)
    assert engine is not None
    name = trained.spec.model.rpartition("/")[2]
    assert f"Model: {name} (chat)" in line(page, trained)
    hold(trained)
    assert f"Model: {name} (training and chat)" in line(page, trained)
    other = RunSpec("Others", "elsewhere/other", method=MethodConfig())
    assert "Model: other (training), " in header.line(write_run([], other), ["running"], trained.spec.model)
