"""All rows before a step: what is found has its rows, counts add up, and the page and the worker ask the same."""

import dataclasses
import json
import resource
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import LoRAError
from studio import lengths
from studio.data import DataSpec, Survey, checks, prepare, read_table, render, tokenize_row
from studio.mapping import format_of, guess_spec
from studio.models import load_tokenizer
from studio.rendering import Example, tokenize_pieces
from studio.rows import BadRow, Chain
from studio.runs import Runs
from studio.specs import RunSpec
from studio.tables import Table, fingerprint
from studio.workspace import Workspace

PAIR = DataSpec(prompt="q", completion="a")


@pytest.fixture(scope="module")
def tokenizer(tiny_folder, tmp_path_factory):
    return load_tokenizer(str(tiny_folder), Workspace(tmp_path_factory.mktemp("models")))


def survey_of(rows, tokenizer, eval_rows=(), **spec) -> Survey:
    columns = tuple(dict.fromkeys(name for row in [*rows, *eval_rows] for name in row))
    found = Survey(Table("t", columns, rows, list(eval_rows)), dataclasses.replace(PAIR, **spec), tokenizer, seed=0)
    assert list(found.read())[-1] == len(rows) + len(eval_rows)
    return found


def found_in(found: Survey, max_length: int = 200) -> dict[str, list[int]]:
    asked = checks(found, found.split(max_length), max_length)
    return {c.title: c.places.tolist() for c in asked if len(c.places)}


GOOD = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(20)]
FOUND = {
    "nothing": ([], {}),
    "a bad row": ([BadRow("`x.jsonl`, line 3: is not valid JSON")], {"Rows that cannot be read": [20]}),
    "an empty field": ([{"q": "x", "a": " "}], {"Empty fields": [20]}),
    "bytes": ([{"q": "x", "a": b"y"}], {"Nothing to train on": [20]}),
    "the same row twice": ([GOOD[3], GOOD[3]], {"Exact duplicates": [20, 21]}),
    "a lost character": ([{"q": "caf\ufffd", "a": "x"}], {"Characters lost in decoding": [20]}),
    "mojibake": ([{"q": "é".encode().decode("latin-1"), "a": "x"}], {"Characters read in a wrong encoding": [20]}),
    "mojibake of a quote": (
        [{"q": "it’s".encode().decode("cp1252"), "a": "x"}],
        {"Characters read in a wrong encoding": [20]},
    ),
    "a real accent": ([{"q": "Ça, naïve café, Ångström: “quoted” – it’s", "a": "x"}], {}),
    "a special token": ([{"q": "say <|im_end|> now", "a": "x"}], {"Special tokens in the text": [20]}),
    "another model's template": ([{"q": "[INST] hi [/INST]", "a": "x"}], {"Text that has a template already": [20]}),
    "brackets": ([{"q": "name[x], 1 < 2, # title", "a": "x"}], {}),
}


@pytest.mark.parametrize(("more", "expected"), FOUND.values(), ids=FOUND)
def test_each_problem_is_found_at_its_rows_and_nowhere_else(more, expected, tokenizer):
    assert found_in(survey_of(GOOD + more, tokenizer)) == expected


def test_the_cut_off_decides_which_answers_are_cut_or_beyond(tokenizer):
    rows = [{"q": "x", "a": "y " * n} for n in (1, 40, 80)]
    found = survey_of(rows, tokenizer, eval_fraction=0)
    first, length = found.first[0], list(found.num_tokens)
    assert found_in(found, max(length)) == {}
    assert found_in(found, length[2] - 2) == {"Answers cut off": [2]}
    assert found_in(found, length[2] - 1) == {}, "what the template puts after the end token is not the answer"
    assert found_in(found, first)["Answer begins beyond the cut-off"] == [0, 1, 2]


def test_what_stands_on_both_sides_is_found(tokenizer):
    held_out = [GOOD[0], {"q": GOOD[1]["q"], "a": "another"}, {"q": "new", "a": "new"}]
    assert found_in(survey_of(GOOD, tokenizer, held_out)) == {
        "Same row in training and evaluation": [20],
        "Same prompt in training and evaluation": [21],
    }


def test_held_out_rows_that_are_all_trained_on_stop_a_run_and_fewer_do_not(tmp_path, tokenizer, workspace):
    for name, rows in (("train", GOOD), ("leaked", GOOD[:3]), ("partly", [*GOOD[:3], {"q": "new", "a": "new"}])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    spec = dataclasses.replace(PAIR, source=str(tmp_path / "train.json"))
    settings = {"max_length": 100, "seed": 0, "workspace": workspace}
    leaked = dataclasses.replace(spec, eval_source=str(tmp_path / "leaked.json"))
    with pytest.raises(LoRAError, match=r"Same row in training and evaluation: 3 rows\. All that is held out is also"):
        prepare(leaked, tokenizer, **settings)
    assert len(prepare(dataclasses.replace(leaked, eval_source=""), tokenizer, **settings).evaluation) == 2
    partly = dataclasses.replace(spec, eval_source=str(tmp_path / "partly.json"))
    assert len(prepare(partly, tokenizer, **settings).evaluation) == 4


def test_why_a_row_cannot_be_used_is_not_told_by_the_words_of_the_reason():
    template = "{% for m in messages %}{% if loop.index == 2 %}{{ raise_exception('`x`, line 1: `a` is empty') }}"
    tokenizer = byte_tokenizer(template + "{% endif %}{{ m.content }}<e>{% endfor %}")
    assert found_in(survey_of(GOOD[:1], tokenizer)) == {"Nothing to train on": [0]}


def test_labels_out_of_balance_are_told_with_their_shares(tokenizer):
    rows = [{"q": f"row {i}", "a": "yes" if i % 20 else "no"} for i in range(100)]
    found = survey_of(rows, tokenizer)
    assert found_in(found)["Labels out of balance"] == list(range(0, 100, 20))
    balanced = survey_of([{"q": f"row {i}", "a": "yes" if i % 2 else "no"} for i in range(100)], tokenizer)
    asked = checks(balanced, balanced.split(200), 200)
    assert asked[-1].advice == "Labels: 'no' 50%, 'yes' 50%."
    assert not len(asked[-1].places)


TEMPLATES = {
    "ChatML": ("{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<e>\n{% endfor %}", "<s>assistant\n"),
    "Llama 3": (
        "{{ bos_token }}{% for m in messages %}<h>{{ m.role }}</h>\n\n{{ m.content }}<e>{% endfor %}",
        "<h>assistant</h>\n\n",
    ),
    "Gemma": (
        "{{ bos_token }}{% for m in messages %}<s>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content }}<e>\n{% endfor %}",
        "<s>model\n",
    ),
    "Mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}<e>{% endif %}{% endfor %}",
        "",
    ),
}
GOLDEN = {
    "ChatML": [("<s>user\nsky<e>\n<s>assistant\n", False), ("Blue.<e>", True), ("\n", False)],
    "Llama 3": [("<b><h>user</h>\n\nsky<e><h>assistant</h>\n\n", False), ("Blue.<e>", True)],
    "Gemma": [("<b><s>user\nsky<e>\n<s>model\n", False), ("Blue.<e>", True), ("\n", False)],
    "Mistral": [("<b>[INST] sky [/INST]", False), (" Blue.<e>", True)],
    "plain": [("sky\n", False), ("Blue.<e>", True)],
}


def byte_tokenizer(template):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = ["<b>", "<e>", "<s>", "<h>", "</h>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(["sky Blue."], trainer)
    extra = {"additional_special_tokens": marks[2:]}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<b>", eos_token="<e>", chat_template=template, **extra
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_a_row_is_rendered_as_its_template_says_and_its_end_token_is_trained(name):
    body, ask = TEMPLATES.get(name, ("", ""))
    tokenizer = byte_tokenizer(body + "{% if add_generation_prompt %}" + ask + "{% endif %}")
    spec = dataclasses.replace(PAIR, template="plain" if name == "plain" else "chat")
    row = {"q": "sky", "a": "Blue."}
    assert render(row, spec, tokenizer) == GOLDEN[name]
    found = Survey(Table("t", ("q", "a"), [row]), spec, tokenizer, seed=0)
    list(found.read())
    assert (found.end, found_in(found)) == ("<e>", {})


def test_an_answer_without_an_end_token_is_found():
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    found = survey_of(GOOD[:2], tokenizer)
    assert found_in(found) == {"Answers without a trained end token": [0, 1]}
    assert found.end == ""


def test_many_rows_at_once_have_the_ids_of_each_alone(tokenizer):
    rows = [{"q": f"q {i} é \U0001f642\n", "a": f" a {i}\n\n"} for i in range(40)]
    together = tokenize_pieces([render(row, PAIR, tokenizer) for row in rows], tokenizer)
    for row, example in zip(rows, together, strict=True):
        assert isinstance(example, Example)
        pieces = render(row, PAIR, tokenizer)
        alone = [i for p in pieces for i in tokenizer.encode(p.text, add_special_tokens=False)]
        assert list(example.input_ids) == alone
        assert example == tokenize_row(row, PAIR, tokenizer, 10_000)


FORMATS = [
    ({"instruction": "x", "input": "i", "output": "y"}, "instruction / input / output"),
    ({"prompt": "x", "completion": "y"}, "prompt / completion"),
    ({"messages": [{"role": "user", "content": "x"}]}, "chat messages (role, content) in messages"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "ShareGPT conversations (from, value) in conversations"),
    ({"text": "x"}, "plain text in text"),
    ({"sentence1": "x", "sentence2": "y", "label": 1}, "text pairs with a label (sentence1, sentence2, label)"),
    ({"premise": "x", "hypothesis": "y", "label": 1}, "text pairs with a label (premise, hypothesis, label)"),
    ({"question": "x", "sentence": "y", "label": "entailment"}, "text pairs with a label (question, sentence, label)"),
    ({"Quality": 1, "#1 String": "x", "#2 String": "y"}, "text pairs with a label (#1 String, #2 String, Quality)"),
]


@pytest.mark.parametrize(("row", "expected"), FORMATS, ids=[f[1] for f in FORMATS])
def test_a_format_is_recognised_and_said(row, expected):
    table = Table("t", tuple(row), [row])
    assert format_of(table, guess_spec(table, "x")) == expected


LINE = st.sampled_from(
    ['{"q": "x", "a": "y"}', '{"q": "x", "a": ""}', '{"q": "x"', "[1]", "", "  ", '{"q": "é", "a": NaN}', "3", "null"]
)


@settings(max_examples=80, deadline=None)
@given(lines=st.lists(LINE, min_size=1, max_size=12), end=st.sampled_from(["", "\n", "\r\n"]))
def test_no_row_is_dropped_silently(lines, end, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    (folder / "x.jsonl").write_text('{"q": "first", "a": "row"}\n' + "\n".join(lines) + end, encoding="utf-8")
    wanted = [i for i, line in enumerate(["first", *lines], start=1) if line.strip()]
    table = read_table(str(folder / "x.jsonl"), Workspace(folder / "home"))
    assert [table.where(i, False) for i in range(len(table.rows))] == [f"x.jsonl, line {n}" for n in wanted]
    spec = dataclasses.replace(PAIR, source=str(folder / "x.jsonl"), bad_rows="skip")
    report = prepare(spec, tokenizer, max_length=100, seed=0, workspace=Workspace(folder / "home")).report
    assert report.num_rows == len(wanted)
    assert report.num_rows == report.num_train + report.num_evaluation + len(report.skipped) + report.num_unused
    bad = [n for n, row in enumerate(table.rows, start=1) if isinstance(row, BadRow) or not row.get("a")]
    assert [number for number, _ in report.skipped] == bad


def test_a_bad_row_stops_a_run_with_its_line_until_it_is_to_be_skipped(tmp_path, tokenizer, workspace):
    path = tmp_path / "x.jsonl"
    path.write_text('{"q": "a", "a": "b"}\n{"q": "c", "a": "d"}\n{"q": \n')
    spec = dataclasses.replace(PAIR, source=str(path))
    with pytest.raises(LoRAError, match=r"1 row of x\.jsonl cannot be used .*line 3.*choose `bad_rows`.* = skip"):
        prepare(spec, tokenizer, max_length=100, seed=0, workspace=workspace)
    ready = prepare(dataclasses.replace(spec, bad_rows="skip"), tokenizer, max_length=100, seed=0, workspace=workspace)
    assert (len(ready.train), len(ready.evaluation), ready.report.skipped[0][0]) == (1, 1, 3)


def test_several_files_are_one_set_and_an_evaluation_file_is_held_out(tmp_path, tokenizer, workspace):
    for name, rows in (("one", GOOD[:8]), ("two", GOOD[8:15]), ("own", GOOD[15:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"{tmp_path / 'one.jsonl'}; {tmp_path / 'two.jsonl'}"
    table = read_table(source, workspace, str(tmp_path / "own.jsonl"))
    assert table.rows == GOOD[:15] and table.eval_rows == GOOD[15:]
    assert table.where(8, False) == "two.jsonl, line 1" and table.where(0, True) == "own.jsonl, line 1"
    spec = dataclasses.replace(PAIR, source=source, eval_source=str(tmp_path / "own.jsonl"))
    ready = prepare(spec, tokenizer, max_length=100, seed=0, workspace=workspace)
    assert (len(ready.train), len(ready.evaluation)) == (15, 5)
    assert len(ready.hashes) == 3


def test_a_file_that_changed_since_the_run_began_is_noticed(tmp_path, workspace):
    path = tmp_path / "x.jsonl"
    path.write_text('{"q": "a", "a": "b"}\n')
    run = Runs(workspace).create(RunSpec())

    def look() -> list[str]:
        return run.note_data(fingerprint(str(path), workspace, read_table(str(path), workspace)))

    assert look() == look() == []
    path.write_text('{"q": "a", "a": "c"}\n')
    assert look() == [str(path)]


def test_a_chain_gives_the_rows_of_its_parts():
    chain = Chain([("a", [{"n": 0}]), ("b", []), ("c", [{"n": 1}, {"n": 2}])])
    assert [row["n"] for row in chain] == [0, 1, 2] and chain[-1] == {"n": 2} and chain[1:] == [{"n": 1}, {"n": 2}]
    assert [chain.where(i) for i in range(3)] == ["a, row 1", "c, row 1", "c, row 2"]
    with pytest.raises(IndexError):
        chain[3]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.integers(0, 300), min_size=1, max_size=50),
    max_length=st.integers(1, 320),
    size=st.integers(1, 9),
)
def test_what_a_cut_takes_adds_up(rows, max_length, size):
    what = lengths.cut(rows, max_length, size)
    assert what.num_tokens + what.num_lost == sum(rows)
    assert what.num_cut == sum(n > max_length for n in rows)
    assert what.num_rows == sum(n > 0 for n in rows)
    assert 0 <= what.num_padding <= what.num_rows * max_length - what.num_tokens or what.num_padding == 0
    if size == 1 or len({min(n, max_length) for n in rows if n}) <= 1:
        assert what.num_padding == 0
    assert "NaN" not in lengths.histogram(rows, max_length)


@pytest.mark.slow
def test_a_million_rows_stay_usable(tmp_path, tokenizer, workspace):
    path = tmp_path / "million.jsonl"
    with path.open("w") as file:
        for i in range(1_000_000):
            words = f"the {i * 7919 % 99991} small steps of row {i} go on and on " * (1 + i % 3)
            file.write(json.dumps({"prompt": f"Say what row {i} says.", "completion": words}) + "\n")
    assert 120e6 < path.stat().st_size < 250e6
    begin = time.perf_counter()
    table = read_table(str(path), workspace)
    shown = table.rows[:20]
    preview_seconds = time.perf_counter() - begin
    spec = dataclasses.replace(guess_spec(table, str(path)), template="plain")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    ready = prepare(spec, tokenizer, max_length=128, seed=0, workspace=workspace)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"\npreview {preview_seconds:.2f} s; {1e6 / seconds:,.0f} rows/s; {(peak - before) / 1e6:.2f} GB more")
    assert len(shown) == 20
    assert len(ready.train) + len(ready.evaluation) == 1_000_000
    assert peak - before < 1.5e6  # kilobytes


def test_a_look_that_is_stopped_ends_after_the_batch_at_hand_and_says_what_it_has_read(tokenizer, monkeypatch):
    monkeypatch.setattr("studio.survey.BATCH", 8)
    found = Survey(Table("t", ("q", "a"), GOOD, []), PAIR, tokenizer, seed=0)
    reading = found.read()
    assert next(reading) == 8
    found.is_stopped = True
    assert list(reading) == [] and found.num_read == 8
    assert list(found.read()) == [16, 20], "it can go on"
