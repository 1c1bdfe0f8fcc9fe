"""The part of the Data tab that mends a row: what stands there as text, kept in the workspace once it can be used."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from core import LoRAError, TrainConfig
from studio import data, mends, theme
from studio.state import Studio
from studio.tables import mends_of
from studio.tabs import inspect
from studio.tabs.inspect import Look


@dataclass(frozen=True)
class Opened:
    """The row that is being mended: its place in a look's survey."""

    look: Look
    place: int


@dataclass(frozen=True)
class Editor:
    """The part's components.

    Attributes:
        opened: State with an `Opened`, or None.
        shown: What `show` fills: the state, the part itself and what stands in it.
        text: The row as text.
        save, undo, undo_all, close: The buttons.
        asked: What `ask` fills: a question, and the words of it.
        yes, no: Its answers.
    """

    opened: Any
    shown: list[Any]
    text: Any
    save: Any
    undo: Any
    undo_all: Any
    close: Any
    asked: list[Any]
    yes: Any
    no: Any


def draw() -> Editor:
    """Draws the part, hidden, where it is called."""
    with gr.Column(visible=False, elem_id="mend") as part:
        facts = gr.HTML(elem_id="mend-facts")
        text = gr.Textbox(
            label="The row, as JSON",
            info="Kept in the workspace; the file itself stays as it is.",
            lines=4,
            max_lines=16,
            elem_id="mend-text",
        )
        with gr.Row():
            save = gr.Button("Save the mended row", variant="primary", size="sm", elem_id="mend-save")
            undo = gr.Button("Undo this mend", size="sm", elem_id="mend-undo")
            undo_all = gr.Button("Undo all mends …", size="sm", variant="stop", elem_id="mend-undo-all")
            close = gr.Button("Close", size="sm", elem_id="mend-close")
        with gr.Group(visible=False) as question:
            words = gr.HTML(elem_id="mend-question")
            with gr.Row():
                yes = gr.Button("Undo them for good", size="sm", variant="stop", elem_id="mend-undo-yes")
                no = gr.Button("Keep them", size="sm", elem_id="mend-undo-no")
    opened = gr.State(None)
    shown = [opened, part, facts, text, undo, undo_all, question]
    return Editor(opened, shown, text, save, undo, undo_all, close, [question, words], yes, no)


def show(opened: Opened | None, longest: Any = None) -> list[Any]:
    """Returns what `Editor.shown` shows of a row, or that the part is hidden."""
    if opened is None:
        return [None, gr.Column(visible=False), *[gr.skip()] * 4, gr.Group(visible=False)]
    found, place = opened.look.survey, opened.place
    mended = found.mended()
    is_mended = place in mended
    reason = found.reason(place, TrainConfig(max_length=longest).max_length)
    lines = [f"Row {found.number(place):,}, {found.where(place)}{': mended' if is_mended else ''}", reason]
    if not inspect.is_automatic(found.spec, len(found.table.rows)):
        lines.append("So many rows are not looked at unasked: once it is mended, press Check all rows again.")
    return [
        opened,
        gr.Column(visible=True),
        theme.said([line for line in lines if line], "error" if reason else ""),
        mends.written(found.row(place)),
        gr.Button(visible=is_mended),
        gr.Button(f"Undo all {len(mended):,} mends …", visible=is_mended and len(mended) > 1),
        gr.Group(visible=False),
    ]


def ask_undo(opened: Opened) -> tuple[Any, str]:
    """Returns what `Editor.asked` shows before all mends are lost."""
    mended = opened.look.survey.mended()
    words = f"Undo all {len(mended):,} mends? What was written for these rows is lost; this cannot be undone."
    return gr.Group(visible=True), theme.said(words, "warn")


def save(studio: Studio, opened: Opened, text: str, longest: Any) -> None:
    """Keeps a mended row, if it can be trained on.

    Raises:
        LoRAError: It is no JSON object, or still cannot be used; nothing is kept then.
    """
    row, found = mends.parse(text), opened.look.survey
    max_length = TrainConfig(max_length=longest).max_length
    try:
        data.tokenize_row(row, found.spec, studio.tokenizer(opened.look.model), max_length)
    except data.RowError as error:
        raise LoRAError(f"The mended row still cannot be used: {error}.") from error
    home = _home(opened)
    was = mends.digest_of(found.in_file(opened.place))
    mends_of(home.source, studio.workspace).put(mends.Mend(home.part, home.place, was, row))


def undo(studio: Studio, opened: Opened) -> None:
    """Forgets what one row was mended to."""
    home = _home(opened)
    mends_of(home.source, studio.workspace).undo(home.part, home.place)


def undo_all(studio: Studio, opened: Opened) -> None:
    """Forgets what all rows of a look's sources were mended to."""
    found = opened.look.survey
    homes = (found.home(place) for place in found.mended().tolist())
    for source in {home.source for home in homes if home is not None}:
        mends_of(source, studio.workspace).undo_all()


def _home(opened: Opened) -> mends.Home:
    home = opened.look.survey.home(opened.place)
    assert home is not None  # every table that a page reads is of sources
    return home
