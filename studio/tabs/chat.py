"""Chat: the same prompt and seed to base, adapted and merged model, side by side."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from core import LoRAError
from studio import asking, data
from studio.chat import PANES, Answer, ChatSettings
from studio.runs import Run
from studio.state import Studio
from studio.tables import list_starters

TITLES = {"base": "Base", "adapter": "Base + adapter", "merged": "Merged"}


def engine_line(answer: Answer | None, words: str = "") -> str:
    """Returns what a pane's engine says of itself, as plain text."""
    if answer is None:
        return words
    speed = f"{answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else "…"
    return f"{answer.engine}\n{speed} · first token {answer.first_token_seconds:.2f} s · {len(answer.token_ids)} tokens"


def examples_for(run: Run | None) -> list[str]:
    """Returns prompts to try with a run: those of its starter set, if it was trained on one."""
    starters = {s.source: s for s in list_starters()}
    found = starters.get(run.spec.data.source) if run else None
    return [str(e) for e in found.examples] if found else []


def prompt(run: Run, text: str) -> list[dict[str, str]] | str:
    """Returns what the model is asked for `text`, put as the run's training rows were.

    Raises:
        LoRAError: The text is empty.
    """
    return asking.question(run.spec.data, text)


def build(studio: Studio, run_id: Any, selected: Any) -> None:
    """Draws the tab for the run that `run_id` holds."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=7, min_width=320):
            message = gr.Textbox(label="Message", lines=2, max_lines=6, elem_id="message", autofocus=False)
            examples = gr.Dropdown([], label="Examples that the adapter has not seen", value=None, elem_id="examples")
        with gr.Column(scale=4, min_width=320):
            panes = gr.CheckboxGroup([(TITLES[p], p) for p in PANES], value=list(PANES), label="Panes", elem_id="panes")
            with gr.Row():
                send = gr.Button("Send to all", variant="primary", elem_id="send")
                stop = gr.Button("Stop", elem_id="chat-stop")
            with gr.Accordion("Sampling", open=False):
                with gr.Row():
                    temperature = gr.Slider(
                        0, 2, value=0, step=0.05, label="Temperature", info="0: the likeliest token."
                    )
                    top_p = gr.Slider(0.05, 1, value=0.95, step=0.05, label="Top p", info="Used above temperature 0.")
                with gr.Row():
                    longest = gr.Slider(8, 512, value=96, step=8, label="Longest answer (tokens)")
                    seed = gr.Number(value=0, precision=0, label="Seed", info="The same for all panes.")
    columns, boxes, engines = [], [], []
    with gr.Row(equal_height=False):
        for pane in PANES:
            with gr.Column(min_width=280) as column:
                boxes.append(
                    gr.Textbox(
                        label=TITLES[pane],
                        lines=9,
                        max_lines=18,
                        interactive=False,
                        elem_id=f"pane-{pane}",
                        elem_classes=[f"pane-{pane}"],
                        buttons=["copy"],
                        placeholder="The answer comes here.",
                    )
                )
                engines.append(
                    gr.Textbox(
                        show_label=False,
                        container=False,
                        lines=2,
                        max_lines=3,
                        interactive=False,
                        placeholder="And here what it was computed with, and how fast.",
                        elem_id=f"engine-{pane}",
                        elem_classes=["engine"],
                    )
                )
            columns.append(column)

    def opened(run: str) -> tuple[Any, ...]:
        found = examples_for(studio.runs.get(run) if run else None)
        first = found[0] if found else None
        return gr.Dropdown(choices=found, value=first, visible=bool(found)), first or gr.skip()

    def answer(run: str, text: str, chosen: list[str], *sampling: Any) -> Iterator[list[Any]]:
        if not run:
            raise LoRAError("`run` (=nothing) must be one with an adapter; train one first, or open one in Runs.")
        wanted = tuple(p for p in PANES if p in chosen)
        if not wanted:
            raise LoRAError("`Panes` (=nothing) must hold at least one; tick base, adapter or merged.")
        opened_run = studio.runs.get(run)
        tokenizer = studio.tokenizer(opened_run.spec.model)
        ids = data.prompt_ids(prompt(opened_run, text), tokenizer, opened_run.spec.data.template)
        heat, p, length, number = sampling
        settings = ChatSettings(int(length), float(heat), float(p), int(number or 0))
        yield [*("" for _ in PANES), *("Loading the model …" if p in wanted else "Not asked" for p in PANES)]
        engine = studio.engine(opened_run)
        for answers in engine.answer_all(wanted, ids, settings):
            texts = [tokenizer.decode(answers[p].token_ids) if p in answers else "" for p in PANES]
            lines = [engine_line(answers.get(p), "Not asked" if p not in wanted else "…") for p in PANES]
            yield [*texts, *lines]

    private: dict[str, Any] = {"api_visibility": "private"}
    gr.on(
        [selected, run_id.change],
        studio.guard(opened),
        run_id,
        [examples, message],
        show_progress="hidden",
        concurrency_limit=None,
        **private,
    )
    examples.input(lambda e: e, examples, message, queue=False, show_progress="hidden", **private)
    panes.change(
        lambda chosen: [gr.Column(visible=p in chosen) for p in PANES],
        panes,
        columns,
        queue=False,
        show_progress="hidden",
        **private,
    )
    going = gr.on(
        [send.click, message.submit],
        studio.guard(answer),
        [run_id, message, panes, temperature, top_p, longest, seed],
        [*boxes, *engines],
        show_progress="hidden",
        concurrency_limit=1,
        **private,
    )
    stop.click(lambda: None, None, None, cancels=[going], queue=False, **private)
