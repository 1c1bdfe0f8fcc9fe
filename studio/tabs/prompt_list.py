"""The part of the Chat tab that asks all panes a list of prompts."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from core import LoRAError
from studio import chat_page, data, markup, prompts, theme
from studio.runs import Run
from studio.sampling import ChatSettings
from studio.state import Studio
from studio.tabs import panes
from studio.tabs.panes import LETTERS, NUM_INPUTS

WHERE = ("Rows that the run held out", "My own file")
CELL_LIMIT = 300
SHOW_SECONDS = 0.5


@dataclass
class Going:
    """A list that is being asked: it ends after the prompt at hand once it is stopped."""

    is_stopped: bool = False


def build(studio: Studio, run_id: Any, num: Any, sampling: list[Any], inputs: list[Any], file: Any) -> None:
    """Draws the part.

    Args:
        studio: What is served.
        run_id: Holds the run.
        num: How many panes there are.
        sampling: Temperature, top p, longest answer, seed.
        inputs: What the panes run.
        file: Takes what the browser is to save.
    """
    going, table = gr.State(Going()), gr.State([])
    with gr.Accordion("Ask a list of prompts", open=False, elem_id="list-part"):
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                where = gr.Radio(list(WHERE), value=WHERE[0], label="Prompts", elem_id="list-from")
                upload = gr.File(
                    label='Text, one prompt a line; or JSON lines with "prompt" and perhaps "reference"',
                    visible=False,
                    height=120,
                    elem_id="list-file",
                )
            with gr.Column(scale=5, min_width=300):
                limit = gr.Slider(1, 200, value=10, step=1, label="The first so many", elem_id="list-limit")
                with gr.Row(elem_classes=["tight"]):
                    ask = gr.Button("Ask all panes", variant="primary", size="md", elem_id="list-ask")
                    cancel = gr.Button("Cancel", size="md", elem_id="list-cancel")
                    save = gr.Button("Download as CSV", size="md", elem_id="list-csv")
        progress = gr.HTML(elem_id="list-progress")
        view = gr.Dataframe(
            interactive=False, wrap=True, max_height=480, show_label=False, visible=False, elem_id="list-answers"
        )

    def asked(
        run: str, now: Going, kind: str, path: str | None, most: Any, number: Any, *values: Any
    ) -> Iterator[list[Any]]:
        if not run:
            raise LoRAError("`run` (=nothing) must be one with an adapter; train one first, or open one in Runs.")
        heat, p, length, seed, *rest = values
        there = studio.runs.get(run)
        chosen = [panes.parse(rest[i * NUM_INPUTS : (i + 1) * NUM_INPUTS]) for i in range(int(number))]
        titles = [f"{LETTERS[i]}: {pane.title(run)}" for i, pane in enumerate(chosen)]
        settings = ChatSettings(int(length), float(heat), float(p), int(seed or 0))
        now.is_stopped = False
        yield ["Reading the prompts …", gr.skip(), []]
        tokenizer = studio.tokenizer(there.spec.model)
        cases = yield from _read(studio, there, kind, path, int(most), now)
        if cases is None:
            yield [theme.said("Cancelled before all rows were read; none was asked.", "warn"), gr.skip(), []]
            return
        yield ["Loading the model …", gr.skip(), []]
        engine = studio.engine(there)
        rows: list[list[Any]] = []
        found: list[list[dict[str, float]]] = [[] for _ in chosen]
        shown_at = 0.0
        for case in cases:
            ids = data.prompt_ids(case.content, tokenizer, there.spec.data.template)
            last = []
            for answers in engine.answer_all(chosen, [ids] * len(chosen), settings):
                last = answers
                if now.is_stopped:
                    break
                if time.monotonic() - shown_at > SHOW_SECONDS:
                    shown_at = time.monotonic()
                    yield [_progress(len(rows), len(cases)), gr.skip(), gr.skip()]
            if now.is_stopped:
                break
            texts = [str(tokenizer.decode(one.token_ids)) for one in last]
            for pane_scores, text in zip(found, texts, strict=True):
                pane_scores.append(prompts.scores(text, case.references))
            rows.append([case.text, "\n".join(case.references), *texts])
            yield [_progress(len(rows), len(cases)), _view(titles, rows), [titles, rows, found]]
        words = f"Cancelled after {len(rows)} of {len(cases)} prompts." if now.is_stopped else ""
        yield [_summary(titles, found, words), _view(titles, rows), [titles, rows, found]]

    def csv(run: str, kept: list[Any]) -> str:
        if not kept or not kept[1]:
            raise LoRAError("There are no answers yet; ask all panes first.")
        titles, rows, found = kept
        metrics = list(prompts.METRICS)
        header = ["prompt", "reference", *titles, *(f"{m}, {t}" for t in titles for m in metrics)]
        lines = [
            [*row, *(pane_scores[n].get(m, "") for pane_scores in found for m in metrics)] for n, row in enumerate(rows)
        ]
        return chat_page.file(f"{run}-prompts.csv", "text/csv", prompts.to_csv(header, lines))

    def halt(now: Going) -> None:
        now.is_stopped = True

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    where.change(lambda kind: gr.File(visible=kind == WHERE[1]), where, upload, queue=False, **quiet)
    ask.click(
        studio.guard(asked),
        [run_id, going, where, upload, limit, num, *sampling, *inputs],
        [progress, view, table],
        concurrency_limit=1,
        **quiet,
    )
    cancel.click(studio.guard(halt), going, None, queue=False, **quiet)
    saved = save.click(studio.guard(csv), [run_id, table], file, queue=False, **quiet)
    saved.success(None, file, None, js=chat_page.DOWNLOAD, api_visibility="private")


def _read(
    studio: Studio, run: Run, kind: str, path: str | None, most: int, now: Going
) -> Generator[list[Any], None, list[prompts.Case] | None]:
    """Yields how far the reading of the prompts is; returns them, or None once it was stopped."""
    if kind == WHERE[1]:
        if not path:
            raise LoRAError("`Prompts` (=nothing) must be a file; choose one, or take the rows that the run held out.")
        return prompts.from_file(Path(path), run, most)
    spec = run.spec
    table = studio.table(spec.data.source, spec.data.eval_source)
    survey = prompts.survey_of(spec, table, studio.tokenizer(spec.model))
    told = time.monotonic()
    for num_read in survey.read():
        if now.is_stopped:
            return None
        if time.monotonic() - told > SHOW_SECONDS:
            told = time.monotonic()
            yield [theme.progress(num_read, survey.num_taken, "rows read"), gr.skip(), []]
    return prompts.held_out(spec, survey, most)


def _view(titles: list[str], rows: list[list[Any]]) -> Any:
    cut = [[_cell(value) for value in row] for row in rows]
    headers = ["Prompt", "Reference", *titles]
    widths: list[str | int] = [f"{100 / len(headers):.1f}%"] * len(headers)
    return gr.Dataframe({"headers": headers, "data": cut}, column_widths=widths, visible=True)


def _cell(text: str) -> str:
    text = text.encode(errors="replace").decode()
    return text if len(text) <= CELL_LIMIT else text[: CELL_LIMIT - 1] + "…"


def _progress(done: int, total: int) -> str:
    return theme.progress(done, total, "prompts")


def _summary(titles: list[str], found: list[list[dict[str, float]]], words: str) -> str:
    """Returns HTML of the metrics' means, where there were references."""
    lines = theme.said(words, "warn") if words else ""
    rows = ""
    for title, pane_scores in zip(titles, found, strict=True):
        if means := prompts.means(pane_scores):
            cells = "".join(f"<td>{means[name]:.3f}</td>" for name in prompts.METRICS)
            rows += f"<tr><td>{escape(title)}</td>{cells}</tr>"
    if not rows:
        return lines
    heads = "".join(f"<th>{name}</th>" for name in ("Mean over the prompts", *prompts.METRICS))
    return lines + markup.table(f"<tr>{heads}</tr>", rows)
