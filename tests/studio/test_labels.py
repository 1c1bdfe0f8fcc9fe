"""What a model with a head for labels says of a text, and how the page shows tasks with labels."""

import asyncio
import dataclasses
import json
import re

import gradio as gr
import pytest
import torch

from core import (
    Adapter,
    Evaluated,
    Finished,
    LoRAConfig,
    LoRAError,
    MethodConfig,
    Started,
    Step,
    TrainConfig,
    apply_method,
    inject,
    lora_layers,
    trained_of,
)
from core import trained_in_full as in_full
from studio import label_page, models, tasks
from studio.data import DataSpec
from studio.forms import Form
from studio.judge import Verdict
from studio.panes import Pane
from studio.runs import Run, Runs
from studio.specs import RunSpec
from studio.state import Studio
from studio.tabs import labels as labels_tab
from studio.tabs import panes as panes_tab
from studio.tabs import runs as runs_tab
from studio.tabs import task as task_part
from studio.tabs import train as train_tab
from studio.workspace import Workspace
from tests.studio.labelled_models import save_encoder, save_rows

COLUMNS = {"prompt": "sentence1", "context": "sentence2", "completion": "label"}


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Studio:
    return Studio(Workspace(tmp_path_factory.mktemp("home")), [tmp_path_factory.getbasetemp()])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return str(save_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return str(save_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl"))


@pytest.fixture(scope="module")
def run(studio, encoder, source) -> Run:
    rows = DataSpec(source=source, task="classification", bad_rows="skip", **COLUMNS)
    lora = LoRAConfig(r=2, target_modules=("query", "value"))
    spec = tasks.settled(RunSpec("Yes or no", encoder, rows, lora, TrainConfig(max_length=16)), studio.workspace)
    model = models.load_model(encoder, studio.workspace, head=spec.head)
    inject(model, spec.lora)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.3)
        for p in in_full(model).values():
            p.add_(torch.randn_like(p))
    made = Runs(studio.workspace).create(spec)
    made.tell(Finished(1, "done", 0))
    Adapter.from_model(model, base_model=spec.model).save(made.adapter_folder)
    return made


def test_panes_are_the_base_the_adapter_at_its_strength_and_the_merged_model(studio, run):
    spec, texts = run.spec, ("the soup is good", "it is fine")
    panes = [Pane(), Pane(run.id), Pane(run.id, merged=True), Pane(run.id, strength=0.0), Pane(run.id, strength=0.5)]
    found = list(studio.judge(run).answer(panes, *texts, spec.data, 16))
    tokens = studio.tokenizer(spec.model)(*texts, return_tensors="pt")
    model = models.load_model(spec.model, studio.workspace, head=spec.head)
    with torch.no_grad():
        base = model(**tokens).logits[0].tolist()
        Adapter.load(run.adapter_folder).apply(model)
        adapted = model(**tokens).logits[0].tolist()
    assert found[0].logits == pytest.approx(base, abs=1e-5)
    assert found[1].logits == pytest.approx(adapted, abs=1e-5)
    assert found[2].logits == pytest.approx(adapted, abs=1e-4)
    assert found[3].logits == pytest.approx(base, abs=1e-5)
    assert found[4].logits not in (found[0].logits, found[1].logits)
    assert sum(found[1].probabilities) == pytest.approx(1)
    assert found[1].num_tokens == tokens["input_ids"].shape[1]
    words = [verdict.engine for verdict in found]
    assert "strength 1" in words[1] and "no LoRA layer" in words[2] and "strength 0" in words[3]
    again = list(studio.judge(run).answer([Pane()], *texts, spec.data, 16))
    assert again[0].logits == pytest.approx(base, abs=1e-6)


def test_what_another_method_trained_is_a_pane_as_it_is_beside_lora_and_the_base(studio, run):
    spec = dataclasses.replace(run.spec, method=MethodConfig(method="bitfit"))
    model = models.load_model(spec.model, studio.workspace, head=spec.head)
    base = model(**studio.tokenizer(spec.model)("it is fine", return_tensors="pt")).logits[0].tolist()
    apply_method(model, spec.method, spec.lora)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * p.requires_grad)
        trained = model(**studio.tokenizer(spec.model)("it is fine", return_tensors="pt")).logits[0].tolist()
    other = Runs(studio.workspace).create(spec)
    other.tell(Finished(1, "done", 0))
    trained_of(model, base_model=spec.model).save(other.adapter_folder)
    judge = studio.judge(run)
    panes = [Pane(run.id), Pane(other.id), Pane(), Pane(run.id), Pane(other.id)]
    lora, ours, plain, again, ours_again = list(judge.answer(panes, "it is fine", "", spec.data, 16))
    assert ours.logits == pytest.approx(trained, abs=1e-5) == ours_again.logits
    assert plain.logits == pytest.approx(base, abs=1e-5)
    assert lora.logits == again.logits not in (ours.logits, plain.logits)
    for pane, why in ((Pane(other.id, merged=True), "merged"), (Pane(other.id, strength=0.5), "at strength 0.5")):
        with pytest.raises(LoRAError, match=f"must not be {why}: it has no ΔW"):
            list(judge.answer([pane], "it is fine", "", spec.data, 16))


def test_what_a_judge_cannot_do_is_said_in_words(studio, run):
    judge = studio.judge(run)
    with pytest.raises(LoRAError, match="`text` .=''. must not be empty"):
        list(judge.answer([Pane()], " ", "", run.spec.data, 16))
    with pytest.raises(LoRAError, match="`pane` must be the base or one whole adapter"):
        list(judge.answer([Pane(run.id, rank=1)], "the soup", "", run.spec.data, 16))
    with pytest.raises(LoRAError, match="`task` .='classification'. must be causal for a chat"):
        studio.engine(run)


def test_bars_are_as_long_as_the_probabilities_and_nothing_of_the_data_is_markup():
    verdict = Verdict((0.0, 1.0), "no adapter", 5, 0, 0.001)
    drawn = label_page.bars(["<b>no", "yes"], verdict, truth="yes")
    share = verdict.probabilities[1]
    assert f"width:{100 * share:.2f}%" in drawn
    assert f"{100 * share:.1f}\N{NO-BREAK SPACE}%" in drawn
    assert "<b>no" not in drawn and "&lt;b&gt;no" in drawn
    assert "yes ✓" in drawn
    moved = label_page.bars(["no", "yes"], verdict, base=Verdict((0.0, 0.0), "", 5, 0, 0.0))
    assert f"{100 * (share - 0.5):+.1f} points" in moved
    number = label_page.bars([], Verdict((2.5,), "", 5, 0, 0.0), base=Verdict((2.0,), "", 5, 0, 0.0), truth="3")
    assert "2.500" in number and "+0.500 from the base" in number and "In the data: 3" in number


def test_of_many_labels_the_likeliest_are_shown_and_the_others_counted():
    many = [f"label{i}" for i in range(20)]
    drawn = label_page.bars(many, Verdict(tuple(float(i) for i in range(20)), "", 5, 0, 0.0))
    assert re.findall(r"label\d+", drawn.partition("</span>")[0])[-1] == "label19"
    assert "and 8 less likely ones" in drawn


def test_held_out_rows_are_offered_with_their_labels(studio, run):
    found = labels_tab.examples_of(studio, run)
    assert 0 < len(found) <= labels_tab.EXAMPLES
    assert all(label in ("no", "yes") and text.startswith("the ") for text, _, label in found)
    assert labels_tab.title_of(("a" * 200, "", "yes")).startswith("yes · aaa")
    gone = dataclasses.replace(run.spec, data=dataclasses.replace(run.spec.data, source="/nowhere.jsonl"))
    lost = Runs(studio.workspace).create(gone)
    assert labels_tab.examples_of(studio, lost) == []


def test_chat_panes_offer_only_adapters_of_the_same_head(studio, run, encoder):
    other = Runs(studio.workspace).create(dataclasses.replace(run.spec, data=DataSpec(task="regression", **COLUMNS)))
    run_ids = [one for _, one in panes_tab.choices(studio, run)]
    assert run.id in run_ids
    assert run.id not in [one for _, one in panes_tab.choices(studio, other)]


# The Data tab's choice of a task


@pytest.fixture(scope="module")
def form() -> Form:
    async def drawn() -> Form:  # outside of a running loop, gr.Blocks leaves one behind that nobody closes
        with gr.Blocks(analytics_enabled=False):
            return Form(DataSpec, [*task_part.TO_WRITE, "metric", "bad_rows"])

    return asyncio.run(drawn())


def values_of(source: str, task: str, **columns: str) -> list[object]:
    named = [columns.get(name, task_part.NONE) for name in task_part.COLUMNS]
    return [source, task, [], "pair", *named]


def test_an_encoder_asks_for_labels_and_a_chosen_task_keeps_the_columns(studio, encoder, source, form):
    _, task, labels, layout, *_ = task_part.follow(studio, encoder, form, values_of(source, "causal"))
    assert (task, labels["value"], layout["visible"]) == ("classification", ["no", "yes"], False)
    chosen = values_of(source, "classification", prompt="sentence2", completion="label")
    _, task, labels, _, prompt, context, completion, *_ = task_part.take(studio, encoder, form, chosen)
    assert (task, labels["value"]) == ("classification", ["no", "yes"])
    assert (prompt["value"], context["value"], completion["value"]) == ("sentence2", task_part.NONE, "label")
    assert (prompt["label"], completion["label"]) == ("Text column", "Label column")


def test_an_encoder_with_rows_without_labels_is_told_so(studio, encoder, form):
    note, task, *_ = task_part.follow(studio, encoder, form, values_of("starter:lighthouse", "causal"))
    assert task == "causal"
    assert "is an encoder: it writes nothing" in note


def test_columns_without_labels_are_refused(studio, encoder, source, form):
    with pytest.raises(LoRAError, match="`completion` .='mr'. must have 2 to 200 different labels .* more than 200"):
        task_part.relabelled(studio, values_of("starter:restaurants", "classification", completion="mr"))
    with pytest.raises(LoRAError, match="`completion` .=nothing. must be a column with labels"):
        task_part.take(studio, encoder, form, values_of("starter:lighthouse", "classification"))
    with pytest.raises(LoRAError, match="`source` .=nothing. must name a data set"):
        task_part.take(studio, encoder, form, values_of("", "classification"))


def test_a_row_is_shown_with_its_second_text_marked_and_its_label(studio, run):
    row = {"sentence1": "the soup is good", "sentence2": "it is fine", "label": "yes"}
    marked, said = task_part.row_view(row, run.spec.data, studio.tokenizer(run.spec.model), 16)
    second = [text.strip() for text, kind in marked if kind == task_part.SECOND_TEXT]
    assert second == ["it", "is", "fine"]
    assert "Label: yes." in said


# Runs


def test_scores_are_charted_live_and_listed_with_the_run(write_run):
    spec = RunSpec("Scored", data=DataSpec(task="classification", labels=("no", "yes"), metric="f1", **COLUMNS))
    first, last = ({"accuracy": 0.5, "f1": 0.25, "matthews": 0.0}, {"accuracy": 0.75, "f1": 0.875, "matthews": 0.5})
    told = write_run(
        [
            Started(2, 10, 100, "cpu", "float32", "resident"),
            Evaluated(0, 0.7, 8, 0.1, first, "f1"),
            Step(1, 0.6, 1e-3, 0.5, 20, 4, 0.1, 1000),
            Evaluated(1, 0.8, 8, 0.1, last, "f1"),  # the loss has risen, the score, too
            Evaluated(2, 0.5, 8, 0.1, first, "f1"),
        ],
        spec,
    )
    told.log.read()
    drawn = train_tab.charts(told.log)
    assert "Scores on held-out rows" in drawn
    assert drawn.index("F1") < drawn.index("Accuracy") < drawn.index("Matthews")
    assert "Loss (nats)" in drawn
    words = train_tab.status_view(told, told.status)
    assert "0.250 → 0.250" in words and "Best F1 at step" in words
    assert re.search(r"Best F1 at step</dt><dd>1<", words)
    cells = dict(zip(runs_tab.HEADER, runs_tab.row(told), strict=True))
    assert cells["Score"] == "F1 0.250"
    assert "classification, no, yes" in runs_tab.details(told)
    json.dumps(runs_tab.row(told))
