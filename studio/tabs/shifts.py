"""The part of the Chat tab that shows where an adapter changed the model's mind, also in a text of one's own."""

from typing import Any

import gradio as gr

from core import LoRAError
from studio import chat_page, data
from studio.chat import Engine
from studio.conversation import Reply, prompt
from studio.panes import Pane
from studio.state import Studio
from studio.tabs import panes
from studio.tabs.panes import LETTERS, NUM_INPUTS


def of_reply(engine: Engine, reply: Reply, tokenizer: Any) -> str:
    """Returns HTML of an answer, its tokens coloured by how far its pane is from the base."""
    return _scored(engine, reply.pane, list(reply.prompt_ids), list(reply.token_ids), tokenizer)


def _scored(engine: Engine, pane: Pane, before: list[int], ids: list[int], tokenizer: Any) -> str:
    unscored = ""
    if not before:  # the first token has nothing before it that could predict it
        before, ids = ids[:1], ids[1:]
        unscored = str(tokenizer.decode(before))
    shift = engine.shift(pane, before + ids, len(before))
    texts = data.token_texts(ids, tokenizer)
    return chat_page.coloured(shift, texts, lambda token: str(tokenizer.decode([token])), unscored)


def build(studio: Studio, run_id: Any, num: Any, inputs: list[Any]) -> None:
    """Draws the part; `num` is how many panes there are, `inputs` what they run."""
    with gr.Accordion("Score a text of your own", open=False, elem_id="score-part"), gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            question = gr.Textbox(
                label="Message before it", info="May be empty: then the text stands alone.", lines=1, max_lines=4
            )
            text = gr.Textbox(label="Text", lines=4, max_lines=12, elem_id="own-text")
            which = gr.Radio(list(LETTERS), value="B", label="Pane against the base", elem_id="score-pane")
            with gr.Row(elem_classes=["tight"]):
                score = gr.Button("Score", variant="primary", size="md", elem_id="score")
        with gr.Column(scale=6, min_width=300):
            result = gr.HTML(js_on_load=chat_page.JS, elem_id="scored")

    def scored(run: str, asked: str, words: str, letter: str, number: Any, *values: Any) -> str:
        if not run:
            raise LoRAError("`run` (=nothing) must be one with an adapter; train one first, or open one in Runs.")
        if not words:
            raise LoRAError("`Text` (=nothing) must not be empty; paste one.")
        place = LETTERS.index(letter)
        if place >= int(number):
            raise LoRAError(f"`Pane against the base` (={letter}) must be one that is shown; there are {number}.")
        pane = panes.parse(values[place * NUM_INPUTS : (place + 1) * NUM_INPUTS])
        return _html(studio, run, asked, words, pane)

    score.click(
        studio.guard(scored),
        [run_id, question, text, which, num, *inputs],
        result,
        show_progress="minimal",
        concurrency_limit=1,
        api_visibility="private",
    )


def _html(studio: Studio, run: str, asked: str, words: str, pane: Pane) -> str:
    there = studio.runs.get(run)
    tokenizer = studio.tokenizer(there.spec.model)
    begin = data.prompt_ids(prompt(there, asked), tokenizer, there.spec.data.template) if asked.strip() else []
    ids = data.text_ids(words, tokenizer)
    shift = _scored(studio.engine(there), pane, begin, ids, tokenizer)
    return f'<div class="talk">{shift}</div>{chat_page.legend()}'
