"""Start: from nothing to a chat with an adapter of one's own, one step at a time; every step stands in a tab, too."""

import time
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr

from core import LoRAConfig, LoRAError, TrainConfig
from studio import chat_page, data, ends, figures, links, live, theme
from studio.conversation import Conversation
from studio.model_files import STARTER
from studio.opened import Source
from studio.panes import Pane
from studio.runs import Run
from studio.sampling import ChatSettings
from studio.specs import RunSpec
from studio.state import Studio
from studio.svg import to_svg
from studio.tables import Starter, list_starters
from studio.tabs import runs, train

STEPS, BATCH_SIZE, MAX_EVAL_ROWS = 40, 4, 12
"""About a minute on two cores: enough to change how the starter answers."""

SHOW_SECONDS = 0.5

CSS = """
#guide { max-width: 62rem; }
#guide .stepper-container { padding-inline: 1.5rem; }
#guide-about .talk { max-width: 46rem; margin-top: .75rem; }
#guide-seen svg { margin-top: .75rem; max-width: 100%; }
"""


def starters() -> list[Starter]:
    """Returns the starter sets whose rows are texts, as the starter model writes."""
    return [s for s in list_starters() if s.task == "causal"]


def _starter(source: str) -> Starter:
    return next(starter for starter in starters() if starter.source == source)


def spec_of(source: str, studio: Studio) -> RunSpec:
    """Returns the short run that teaches the starter model a starter set."""
    starter = _starter(source)
    rows = data.guess_spec(studio.table(source), source, has_chat_template=True)
    settings = TrainConfig(
        steps=STEPS, batch_size=BATCH_SIZE, learning_rate=1e-3, warmup_steps=4, eval_every=STEPS // 2, spectrum_every=5
    )
    rows = replace(rows, max_eval_rows=MAX_EVAL_ROWS)
    return RunSpec(f"First run: {starter.title.partition(':')[0]}", STARTER, rows, LoRAConfig(r=8, alpha=16), settings)


def about(source: str, studio: Studio) -> str:
    """Returns HTML of what a starter set teaches, and of one of its rows."""
    starter = _starter(source)
    table = studio.table(source)
    rows = data.guess_spec(table, source, has_chat_template=True)
    row = table.rows[0]
    prompt = data.prompt_messages(row, rows)
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    row_in_words = f"One of its {len(table.rows):,} rows: what is asked, and the answer to learn."
    shown = chat_page.talk((), 0, str(asked), chat_page.said(data.reference(row, rows)))
    return theme.said([starter.change, row_in_words]) + shown


def progress(run: Run) -> str:
    """Returns HTML of how far the run is, its loss, and at its end what that means."""
    log = run.log
    log.read()
    status = run.status
    if status in ends.GOING and not log.steps:
        words = "It waits for the run that is going on." if status == "queued" else "Loading the model …"
        return theme.said(words)
    steps, step = run.spec.train.steps, log.steps[-1].step if log.steps else 0
    left = f"step {step} of {steps}" + (f", {live.duration(run.seconds_left())} left" if status in ends.GOING else "")
    drawn = theme.bar(step, steps, "Training progress") + f'<div class="sub-line">{escape(left)}</div>'
    drawn += train.losses(log)
    if status in ends.GOING:
        return drawn
    if not run.has_adapter or len(log.evaluations) < 2:
        return drawn + train.status_view(run, status)
    first, last = log.evaluations[0].loss, log.evaluations[-1].loss
    return drawn + theme.said(
        f"Done. On {MAX_EVAL_ROWS} rows that it was not trained on, the loss went from {first:.2f} to {last:.2f}: "
        f"what it learned holds beyond its rows. {log.started.num_trainable if log.started else 0:,} numbers were "
        "trained, in two thin matrices beside each of the model's own."
    )


def build(studio: Studio, run_id: Any, tabs: Any) -> None:
    """Draws the tab; a run that is started here is chosen in the page's header, too."""
    known = starters()
    mine = gr.State("")
    gr.Markdown(
        "## From nothing to your own adapter, in about three minutes\n"
        "Everything is on this machine: nothing is downloaded, and nothing leaves it."
    )
    with gr.Walkthrough(selected=1, elem_id="guide") as guide:
        with gr.Step("Choose", id=1):
            source = gr.Radio(
                [(s.title, s.source) for s in known],
                value=known[0].source,
                label="What shall SmolLM2-135M-Instruct learn?",
                info="A small language model. It answers like a chatty assistant until it is taught otherwise.",
                elem_id="guide-source",
            )
            described = gr.HTML(about(known[0].source, studio), elem_id="guide-about")
            with gr.Row(elem_classes=["tight"]):
                to_train = gr.Button("Next: train it", variant="primary", elem_id="guide-to-train")
                skip = gr.Button("Skip: I know my way", elem_id="guide-skip")
        with gr.Step("Train", id=2):
            gr.Markdown(
                f"**{STEPS} steps of {BATCH_SIZE} rows.** The model's own weights stay as they are; beside each of its "
                "matrices W, LoRA trains a thin pair B, A of rank 8, so that W + 2·B·A gives the new answers."
            )
            with gr.Row(elem_classes=["tight"]):
                start = gr.Button("Train: about a minute", variant="primary", elem_id="guide-train")
                stop = gr.Button("Stop and keep what it learned", visible=False, elem_id="guide-stop")
                to_talk = gr.Button("Next: talk to it", variant="primary", visible=False, elem_id="guide-to-talk")
            gr.HTML(ends.BOX)
            told = gr.HTML(elem_id="guide-progress")
        with gr.Step("Talk", id=3):
            message = gr.Textbox(label="Ask both", lines=2, max_lines=6, elem_id="guide-message")
            with gr.Row(elem_classes=["tight"]):
                ask = gr.Button("Ask the base and the adapter", variant="primary", elem_id="guide-ask")
                another = gr.Button("Another example", elem_id="guide-another")
                to_see = gr.Button("Next: see what changed", elem_id="guide-to-see")
            with gr.Row(equal_height=False):
                with gr.Column(min_width=300, elem_classes=["pane-card"]):
                    base = gr.HTML(elem_id="guide-base")
                with gr.Column(min_width=300, elem_classes=["pane-card"]):
                    adapted = gr.HTML(elem_id="guide-adapted")
        with gr.Step("Look", id=4):
            seen = gr.HTML(elem_id="guide-seen")
            with gr.Row(elem_classes=["tight"]):
                anew = gr.Button("Begin again", size="sm", elem_id="guide-anew")

    def teach(source: str) -> Iterator[list[Any]]:
        run = studio.start(spec_of(source, studio))
        yield [run.id, runs.picker(studio, run), gr.Button(interactive=False), gr.Button(visible=True), gr.skip(), ""]
        same: list[Any] = [gr.skip()] * 5
        while (status := run.status) in ends.GOING:
            yield [*same, progress(run)]
            time.sleep(SHOW_SECONDS)
        run.note_killed()
        has_adapter = status == "finished" or run.has_adapter
        yield [
            gr.skip(),
            gr.skip(),
            gr.Button("Train once more", interactive=True, variant="secondary"),
            gr.Button(visible=False),
            gr.Button(visible=has_adapter),
            progress(run),
        ]

    def end_teaching(run: str) -> None:
        if run:
            studio.runs.get(run).ask_to_stop()

    def trained(run: str) -> Run:
        if not run:
            raise LoRAError("`run` (=nothing) must be trained first; go back to the step before.")
        return studio.runs.get(run)

    def next_example(source: str, now: str = "") -> str:
        starter = _starter(source)
        after = starter.examples.index(now) + 1 if now in starter.examples else 0
        return str(starter.examples[after % len(starter.examples)])

    def answer_both(run: str, text: str) -> Iterator[list[str]]:
        there = trained(run)
        panes = [Pane(), Pane(there.id)]

        def shown(answers: list[str]) -> list[str]:
            heads = [("A", "Base", "as it came", "base"), ("B", "Adapter", "what you trained", "")]
            return [chat_page.head(*h) + chat_page.talk((), 0, text, a) for h, a in zip(heads, answers, strict=True)]

        yield shown([theme.said("Loading the model …")] * 2)
        tokenizer, engine = studio.tokenizer(there.spec.model), studio.engine(there)
        ids = data.prompt_ids(Conversation().messages(there, text, 0), tokenizer, there.spec.data.template)
        shown_at, answers = 0.0, []
        for answers in engine.answer_all(panes, [ids, ids], ChatSettings(max_new_tokens=96)):
            if time.monotonic() - shown_at > SHOW_SECONDS / 2:
                shown_at = time.monotonic()
                yield shown([chat_page.said(tokenizer.decode(a.token_ids)) for a in answers])
        yield shown([chat_page.said(tokenizer.decode(a.token_ids)) for a in answers])

    def show_changes(run: str) -> str:
        found = studio.spectra(studio.opened(Source(trained(run).id)))
        values = {path: spectrum.norm for path, (_, spectrum) in found.items()}
        loudest = max(values, key=values.__getitem__)
        figure = figures.heat_figure(values, title="‖ΔW‖: how much each matrix was changed", unit="Frobenius norm")
        _, spectrum = found[loudest]
        words = (
            f"Each cell is one of the model's matrices. {loudest} changed most. Its update may use 8 directions; by "
            f"its spectrum it uses about {spectrum.effective_rank:.1f} of them. To see that is what this studio is for."
        )
        further = {"spectrum": "Look at the spectrum", "chat": "Chat with it", "home": "Take it home"}
        return (
            theme.said(words)
            + to_svg(figure, "How much each matrix was changed, by layer")
            + links.ways(**further, data="Teach it rows of my own")
        )

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}

    def go(button: Any, step: int) -> Any:
        return button.click(lambda: gr.Walkthrough(selected=step), None, guide, queue=False, **quiet)

    source.change(studio.guard(lambda s: about(s, studio)), source, described, queue=False, **quiet)
    go(to_train, 2)
    skip.click(lambda: gr.Tabs(selected="model"), None, tabs, queue=False, **quiet)
    start.click(studio.guard(teach), source, [mine, run_id, start, stop, to_talk, told], **quiet)
    stop.click(studio.guard(end_teaching), mine, None, queue=False, **quiet)
    go(to_talk, 3).then(studio.guard(next_example), source, message, queue=False, **quiet)
    gr.on([ask.click, message.submit], studio.guard(answer_both), [mine, message], [base, adapted], **quiet)
    another.click(studio.guard(next_example), [source, message], message, queue=False, **quiet)
    go(to_see, 4).then(studio.guard(show_changes), mine, seen, **quiet)
    go(anew, 1)
