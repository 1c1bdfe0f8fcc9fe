"""Conversations: what follows from them, and where an answer ends."""

import dataclasses

import pytest

from core import LoRAError
from studio import data, models
from studio.conversation import HISTORY_LIMIT, Conversation, Reply, Turn, unstopped
from studio.panes import Pane
from studio.specs import RunSpec

TALK = Conversation("Be brief.", (Turn("One", (Reply(Pane(), "1a"), Reply(Pane("r"), "1b"))),))


@pytest.fixture
def run(write_run, tiny_folder, tiny_data):
    return write_run(spec=RunSpec("Inns", str(tiny_folder), tiny_data))


@pytest.fixture
def tokenizer(tiny_folder, workspace):
    return models.load_tokenizer(str(tiny_folder), workspace)


def test_each_pane_sees_the_system_prompt_and_its_own_answers(run):
    for place, answer in enumerate(("1a", "1b")):
        assert TALK.messages(run, " Two ", place) == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Describe it.\n\nOne"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "Two"},
        ]
    assert TALK.messages(run, "Two", 2)[2]["content"] == "…", "a pane that was not there has said something unknown"


def test_a_model_of_text_goes_on_with_all_that_was_said(write_run):
    run = write_run(spec=RunSpec(data=data.DataSpec(layout="text", text="t")))
    assert TALK.messages(run, " Two", 1) == "One1b Two"


def test_an_empty_message_and_one_too_many_are_refused(run):
    with pytest.raises(LoRAError, match="`Message` .* must not be empty"):
        TALK.messages(run, " ", 0)
    with pytest.raises(LoRAError, match="A conversation has at most 50 turns; begin a new one"):
        Conversation("", TALK.turns * HISTORY_LIMIT).messages(run, "Two", 0)


def test_a_template_whose_end_does_not_stop_the_model_is_told(run, tokenizer, write_run):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert unstopped(run, tokenizer, frozenset({end})) == ""
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    words = unstopped(run, tokenizer, frozenset({other}))
    assert "ends an answer with '<|im_end|>', which does not stop this model (what does: <|endoftext|>)" in words
    text = write_run(spec=dataclasses.replace(run.spec, data=data.DataSpec(layout="text", text="t")))
    assert unstopped(text, tokenizer, frozenset({other})) == ""
