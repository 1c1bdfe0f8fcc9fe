"""The Chat tab: how messages are put, and what panes say of themselves."""

import dataclasses

import pytest

from core import (
    LoRAError,
)
from studio import data, models
from studio.answers import Answer
from studio.conversation import prompt
from studio.data import DataSpec
from studio.specs import RunSpec
from studio.tables import list_starters
from studio.tabs import chat as chat_tab


@pytest.fixture
def tokenizer(tiny_folder, workspace):
    return models.load_tokenizer(str(tiny_folder), workspace)


PAIR = DataSpec(prompt="q", completion="a", context="c", instruction="Describe it.")


ROW = {"q": "name[Inn 3]", "c": "", "a": "Inn 3 has 3 stars."}


TALK = DataSpec(layout="messages", messages="m")


TURNS = {"m": [{"role": "user", "content": "name[Inn 3]"}, {"role": "assistant", "content": "Inn 3."}]}


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize(
    ("spec", "row"),
    [
        (PAIR, ROW),
        (dataclasses.replace(PAIR, instruction=""), ROW),
        (TALK, TURNS),
        (dataclasses.replace(TALK, instruction="Be short."), TURNS),
    ],
    ids=["pair with instruction", "pair", "conversation", "conversation with instruction"],
)
def test_a_message_is_put_as_training_put_its_rows(spec, row, template, write_run, tokenizer):
    spec = dataclasses.replace(spec, template=template)
    run = write_run(spec=RunSpec(data=spec))
    example = data.tokenize_row(row, spec, tokenizer, 1_000)
    begin = next(i for i, label in enumerate(example.labels) if label != -100)
    asked = prompt(run, "  name[Inn 3]\n")
    assert data.prompt_ids(asked, tokenizer, template) == example.input_ids[:begin].tolist()


def test_a_model_trained_on_text_is_asked_to_go_on_with_the_message(write_run, tokenizer):
    spec = DataSpec(layout="text", text="t")
    asked = prompt(write_run(spec=RunSpec(data=spec)), "Inn 3 has ")
    assert asked == "Inn 3 has "
    ids = data.tokenize_row({"t": asked}, spec, tokenizer, 1_000).input_ids.tolist()
    assert [*data.prompt_ids(asked, tokenizer), tokenizer.eos_token_id] == ids


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_message_is_refused(text, write_run):
    with pytest.raises(LoRAError, match=r"`Message` \(=nothing\) must not be empty; write one, or take an example\."):
        prompt(write_run(), text)


@pytest.mark.parametrize("starter", list_starters(), ids=lambda s: s.name)
def test_a_run_on_a_starter_set_offers_that_set_s_examples_and_they_can_be_asked(starter, write_run):
    spec = DataSpec.from_dict({"source": starter.source, **starter.mapping})
    run = write_run(spec=RunSpec(data=spec))
    examples = chat_tab.examples_for(run)
    assert examples == [str(e) for e in starter.examples] and len(examples) >= 3
    for example in examples:
        (turn,) = prompt(run, example)
        assert turn["role"] == "user" and turn["content"].endswith(example)


def test_other_runs_have_no_examples(write_run, tiny_data):
    assert chat_tab.examples_for(None) == []
    assert chat_tab.examples_for(write_run(spec=RunSpec(data=tiny_data))) == []


def test_a_pane_s_line_tells_engine_speed_length_and_fingerprint():
    answer = Answer((1, 2, 3), False, 0.256, 12.34, "adapter off (strength 0) · float32", "0123abcd")
    assert chat_tab.engine_line(answer) == (
        '<div class="engine-line">adapter off (strength 0) · float32\n'
        "12.3 tokens/s · first token 0.26 s · 3 tokens\nfirst logits 0123abcd</div>"
    )
    assert "\n… · first token" in chat_tab.engine_line(dataclasses.replace(answer, tokens_per_second=0.0))
    assert chat_tab.engine_line(None, "Not <b>asked") == '<div class="engine-line">Not &lt;b&gt;asked</div>'


def test_panes_that_should_differ_and_do_not_are_told_in_words():
    answer = Answer((1,), False, 0.2, 0.0, "x", "0123abcd", same_as=(0, 2))
    words = chat_tab.engine_line(answer, kinds=["Base", "Adapter", "Merged"])
    assert "Same first logits as A (Base) and C (Merged), from which it should differ" in words
    assert "A comparison of the two shows nothing" in words
