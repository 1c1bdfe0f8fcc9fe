"""The part of the Data tab that looks at all rows: lengths and cut-off, what is wrong, and the rows behind it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np

from core import LoRAError, TrainConfig
from studio import data, lengths, theme
from studio.forms import Form
from studio.rows import BadRow
from studio.state import Studio
from studio.survey import Survey

AUTOMATIC_ROWS = 20_000
"""Up to so many rows are looked at unasked; more when the button is pressed."""

LISTED_ROWS = 50
TEXT_LIMIT = 200
HEADER = ["Row", "Where", "What it says"]

_MOVE = """
const range = () => element.querySelector('input');
let rest;
element.addEventListener('input', () => {
    const line = document.querySelector('#lengths .cut');
    if (line) {
        line.style.left = `${100 * range().value / range().max}%`;
        line.firstChild.textContent = Number(range().value).toLocaleString('en');
    }
    clearTimeout(rest);
    rest = setTimeout(() => trigger('input', {cut: Number(range().value)}), 200);
});
"""
FOLLOW = """(value) => {
    const range = document.querySelector('#cut-off input');
    if (range && document.activeElement !== range) range.value = value;
}"""
"""The line follows the thumb at once; the numbers follow when it rests and the server has counted."""


@dataclass(frozen=True)
class Look:
    """What a page knows of its rows.

    Attributes:
        model: The base model whose tokenizer was asked.
        survey: The rows as far as they were read.
        is_done: Whether that is all of them.
    """

    model: str
    survey: Survey
    is_done: bool = False


@dataclass(frozen=True)
class Inspection:
    """The part's components that others read or fill.

    Attributes:
        look: State with a `Look`, or None.
        max_length: The training setting that stands here, where its effect is seen.
        check: The button that looks at all rows.
        shown: What `show` fills.
        cut: The thumb of the cut-off.
        chosen: The choice of a check.
        rows: The rows behind it.
        progress: How far the look is.
        cancel: The button that ends it.
    """

    look: Any
    max_length: Any
    check: Any
    shown: list[Any]
    cut: Any
    chosen: Any
    rows: Any
    progress: Any
    cancel: Any


def is_automatic(spec: data.DataSpec, num_rows: int) -> bool:
    """Whether so many rows are looked at without a press of the button."""
    return num_rows <= AUTOMATIC_ROWS or 0 < spec.max_rows <= AUTOMATIC_ROWS


def verify(look: Look | None, model: str, rows: data.DataSpec, max_length: int) -> None:
    """Refuses rows that would waste a run, where they were looked at; the worker asks the same of all.

    Raises:
        LoRAError: With the reason.
    """
    if look is None or not look.is_done or (look.model, look.survey.spec) != (model, rows):
        return
    split = look.survey.split(max_length)
    report = data.report_of(look.survey, split, max_length)
    if reason := data.blocked(look.survey, report, data.checks(look.survey, split, max_length)):
        raise LoRAError(f"{reason} The Data tab lists them.")


def draw() -> Inspection:
    """Draws the part where it is called; `wire` makes it answer."""
    gr.Markdown("## All rows, before a step is taken")
    progress = gr.HTML(elem_id="survey-progress")
    with gr.Row():
        check = gr.Button("Check all rows", size="sm", elem_id="check-rows")
        cancel = gr.Button("Cancel", size="sm", visible=False, elem_id="cancel-check")
    verdict = gr.HTML(elem_id="verdict")
    histogram = gr.HTML(elem_id="lengths")
    cut = gr.HTML(
        512,
        html_template='<input type="range" min="1" max="${top}" value="${value}" aria-label="Cut-off, in tokens">',
        js_on_load=_MOVE,
        top=1024,
        elem_id="cut-off",
        visible="hidden",
    )
    numbers = gr.HTML(elem_id="cut-facts")
    (max_length,) = Form(TrainConfig, ["max_length"]).widgets
    chosen = gr.Radio([], label="What was found", visible=False, elem_id="checks", elem_classes=["stacked"])
    advice = gr.HTML(elem_id="advice")
    rows = gr.Dataframe(
        headers=HEADER,
        column_widths=["15%", "30%", "55%"],
        interactive=False,
        wrap=True,
        max_height=360,
        show_label=False,
        visible=False,
        elem_id="found",
    )
    shown = [verdict, histogram, cut, numbers, chosen, advice, rows]
    return Inspection(gr.State(None), max_length, check, shown, cut, chosen, rows, progress, cancel)


def survey(studio: Studio, model: str, spec: data.DataSpec) -> Iterator[Look]:
    """Looks at all rows, until it is stopped, and says after each batch how far it is.

    Raises:
        LoRAError: The rows cannot be read, or the template does not fit.
    """
    found = Survey(studio.table(spec.source, spec.eval_source), spec, studio.tokenizer(model), seed=0)
    yield Look(model, found)
    for done in found.read():
        yield Look(model, found, is_done=done == found.num_taken)
    if found.is_stopped:
        yield Look(model, found)


def going(found: Survey) -> str:
    """Returns HTML of how far a look is."""
    return theme.progress(found.num_read, found.num_taken, "rows")


def show(look: Look | None, longest: Any, chosen: str | None) -> list[Any]:
    """Returns what `Inspection.shown` shows of a look with rows cut to `longest` tokens."""
    if look is None or not look.survey.num_read:
        hidden = gr.HTML(visible="hidden")
        return ["", "", hidden, "", gr.Radio(visible=False), "", gr.Dataframe(visible=False)]
    max_length, found = TrainConfig(max_length=longest).max_length, look.survey
    split = found.split(max_length)
    report, asked = data.report_of(found, split, max_length), data.checks(found, split, max_length)
    titles = [c.title for c in asked if len(c.places)]
    asked.sort(key=lambda c: (not c.stops, -len(c.places)))
    chosen = chosen if chosen in titles else None
    choices = [(_line(c), c.title) for c in asked if len(c.places)]
    top = lengths.right_end(found.num_tokens)
    return [
        _verdict(look, report, asked),
        lengths.histogram(found.num_tokens, max_length),
        gr.HTML(value=min(max_length, top), top=top, visible=True),
        _cut_facts(found, max_length),
        gr.Radio(choices=choices, value=chosen, visible=bool(choices)),
        *list_rows(found, asked, max_length, chosen),
    ]


def list_rows(found: Survey, asked: list[data.Check], max_length: int, chosen: str | None) -> list[Any]:
    """Returns what the chosen check means, and the first rows behind it."""
    check = next((c for c in asked if c.title == chosen), None)
    if check is None:
        return ["", gr.Dataframe(visible=False)]
    rows = []
    for place in check.places[:LISTED_ROWS].tolist():
        reason = found.reason(place, max_length)
        row = found.row(place)
        text = " · ".join(str(value) for value in row.values() if value not in (None, ""))
        text = row.text if isinstance(row, BadRow) else text
        text = text.encode(errors="replace").decode()
        text = text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT - 1] + "…"
        rows.append([*_name(found, place), f"{reason}\n{text}" if reason else text])
    words = f"{check.advice} Press a row to mend it" + (" anew or to undo that." if not check.warns else ".")
    if len(check.places) > LISTED_ROWS:
        words += f" The first {LISTED_ROWS} of {len(check.places):,} rows:"
    return [
        theme.said(words, "error" if check.stops else "warn" if check.warns else ""),
        gr.Dataframe({"headers": HEADER, "data": rows}, visible=True),
    ]


def pressed(look: Look, longest: Any, chosen: str, row: list[Any]) -> int | None:
    """Returns the place of a row of the list, whatever the order that the person gave it."""
    found, max_length = look.survey, TrainConfig(max_length=longest).max_length
    asked = data.checks(found, found.split(max_length), max_length)
    places = next((c.places for c in asked if c.title == chosen), np.empty(0, np.int64))[:LISTED_ROWS].tolist()
    return next((place for place in places if _name(found, place) == row[:2]), None)


def _name(found: Survey, place: int) -> list[str]:
    return [f"{found.number(place):,}", found.where(place)]


def _line(check: data.Check) -> str:
    return f"{'Stops the run: ' if check.stops else ''}{check.title} · {len(check.places):,}"


def _verdict(look: Look, report: data.PrepareReport, asked: list[data.Check]) -> str:
    """Returns HTML of whether these rows can be trained on, and of how many there are of each kind."""
    found = look.survey
    lines = [] if look.is_done else ["Not all rows were looked at; this is what the first ones say."]
    reason = data.blocked(found, report, asked) if look.is_done else ""
    if reason:
        lines.append(reason)
    if look.is_done:
        lines += report.sentences()[:2]
    clean = [c.title.lower() for c in asked if c.warns and not len(c.places) and not c.advice.startswith("Labels")]
    lines += [c.advice for c in asked if c.advice.startswith("Labels")]
    if clean:
        lines.append(f"None of: {', '.join(clean)}.")
    warns = any(len(c.places) for c in asked if c.warns)
    return theme.said(lines, "error" if reason else "warn" if warns else "good")


def _cut_facts(found: Survey, max_length: int) -> str:
    size = TrainConfig().batch_size
    what = lengths.cut(found.num_tokens, max_length, size)
    with_padding = what.num_tokens + what.num_padding
    last = np.asarray(found.last)
    usable = last >= 0
    ended = int((usable & (last < max_length) & ((np.asarray(found.flags) & data.ENDED) > 0)).sum())
    end = f"{found.end or 'none'}: " if found.end else "no end token: "
    cut = [
        ("Rows cut", f"{what.num_cut:,} of {what.num_rows:,}"),
        ("Tokens lost", _share(what.num_lost, what.num_lost + what.num_tokens)),
    ]
    if found.spec.is_labelled:  # no end is trained, and padding is saved by putting rows of like length together
        return theme.facts(cut)
    return theme.facts(
        [
            *cut,
            (f"Padding saved, batches of {size}", _share(what.num_padding, with_padding)),
            ("End token trained", f"{end}{ended:,} of {what.num_rows:,}"),
        ]
    )


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if part else "0"
