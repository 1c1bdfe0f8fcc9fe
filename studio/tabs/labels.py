"""The Chat tab of a run whose model gives labels: a text, or two, and what base and adapter make of it."""

from typing import Any

import gradio as gr

from core import LoRAError
from studio import chat_page, label_page, mapping, models, theme
from studio.judge import Verdict
from studio.panes import HIGHEST, LOWEST, Pane
from studio.rows import BadRow
from studio.runs import Run
from studio.state import Studio
from studio.survey import Survey
from studio.tabs.panes import choices

EXAMPLES = 8
MOST_ROWS = 20_000
"""Of larger data sets no held-out rows are looked for: which they are takes a pass over all of them."""

MERGED = "Merged into W₀"
EMPTY = '<div class="labels-note">Its labels come here.</div>'
UNTRAINED = (
    "This base has no head for these labels: the one it is shown with is as it was drawn at the start, so that its "
    "probabilities say nothing. What the adapter changed is head and ΔW together."
)

Example = tuple[str, str, str]
"""A held-out row: its first text, its second or "", and its label."""


def examples_of(studio: Studio, run: Run) -> list[Example]:
    """Returns some rows that the run was not trained on; none where they would take long to find."""
    spec = run.spec
    try:
        table = studio.table(spec.data.source, spec.data.eval_source)
    except LoRAError:  # the file is gone; a text can still be written
        return []
    if len(table.rows) > MOST_ROWS:
        return []
    rows: list[Any] = [row for row in table.eval_rows[:EXAMPLES] if not isinstance(row, BadRow)]
    if not rows:
        found = Survey(table, spec.data, studio.tokenizer(spec.model), spec.train.seed)
        for _ in found.read():
            pass
        rows = [found.row(place) for place in found.split(spec.train.max_length).evaluation[:EXAMPLES].tolist()]
    told = []
    for row in rows:
        try:
            held = mapping.to_labelled(row, spec.data)
        except mapping.RowError:
            continue
        label = f"{held.label:g}" if held.is_value else spec.data.labels[int(held.label)]
        second = str(row.get(spec.data.context) or "") if spec.data.context else ""
        told.append((str(row[spec.data.prompt]), second, label))
    return told


def title_of(example: Example) -> str:
    """Returns how a held-out row is called in the list."""
    text = " / ".join(part for part in example[:2] if part)
    return f"{example[2]} · {text[:90]}{'…' if len(text) > 90 else ''}"


def asked(run: Run, strength: float, beside: str) -> list[tuple[str, str, Pane]]:
    """Returns title, note and pane of each of the three."""
    own = Pane(run.id, strength=float(strength))
    note = f"strength {strength:g}" if strength != 1 else ""
    third = (
        (MERGED, note, Pane(run.id, strength=float(strength), merged=True))
        if beside in ("", MERGED)
        else ("Another adapter", beside, Pane(beside))
    )
    return [("Base", "", Pane()), ("Adapter", note, own), third]


def build(studio: Studio, run_id: Any, opened: Any, talk: Any) -> None:
    """Draws the part, which stands in the place of `talk`, the chat, for a run whose model gives labels.

    It is drawn anew at the event `opened`, for another run than before.
    """
    held, truth, shown_of = gr.State([]), gr.State(("", "", "")), gr.State("")
    with gr.Column(visible=False, elem_id="label-view") as view:
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=320):
                first = gr.Textbox(label="Text", lines=2, max_lines=8, elem_id="label-text")
                second = gr.Textbox(label="Second text", lines=2, max_lines=8, elem_id="label-second")
                rows = gr.Dropdown([], label="Held-out rows, with their labels", value=None, elem_id="label-rows")
                with gr.Row(elem_classes=["tight"]):
                    ask = gr.Button("What does it say?", variant="primary", size="md", elem_id="label-ask")
            with gr.Column(scale=4, min_width=320):
                strength = gr.Slider(
                    LOWEST,
                    HIGHEST,
                    value=1,
                    step=0.05,
                    label="Strength",
                    info="0: the base and its head, 1: as trained. Moves ΔW and the head together.",
                    elem_id="label-strength",
                )
                beside = gr.Dropdown(
                    [MERGED], value=MERGED, label="Third pane", filterable=False, elem_id="label-beside"
                )
        note = gr.HTML(elem_id="label-note", padding=False)
        with gr.Row(equal_height=False):
            heads, bars, engines = [], [], []
            for place, letter in enumerate("ABC"):
                with gr.Column(min_width=270, elem_classes=["pane-card"], elem_id=f"label-pane-{letter.lower()}"):
                    title, kind = ("Base", "base") if not place else ("Adapter" if place == 1 else MERGED, "")
                    heads.append(gr.HTML(chat_page.head(letter, title, kind=kind), padding=False))
                    bars.append(gr.HTML(EMPTY, padding=False, elem_id=f"label-bars-{letter.lower()}"))
                    engines.append(gr.HTML("", padding=False))
        gr.HTML(label_page.legend(), padding=False)
    picture = [*heads, *bars, *engines]

    def others(there: Run) -> list[tuple[str, str]]:
        return [(MERGED, MERGED), *((name, one) for name, one in choices(studio, there) if one != there.id)]

    def show(run: str | None, before: str | None) -> list[Any]:
        """Returns which of chat and labels is seen, and what the run offers to ask."""
        there = studio.runs.get(run) if run else None
        is_labelled = there is not None and there.spec.data.is_labelled
        if run == before:  # but there may be more runs
            more = gr.Dropdown(choices=others(there)) if there is not None and is_labelled else gr.skip()
            return [*[gr.skip()] * 8, more, *[gr.skip()] * (1 + len(picture))]
        seen = [run, gr.Column(visible=not is_labelled), gr.Column(visible=is_labelled)]
        if there is None or not is_labelled:
            return [*seen, *[gr.skip()] * (7 + len(picture))]
        found = examples_of(studio, there)
        text = found[0] if found else ("", "", "")
        has_own = models.has_head(there.spec.model, studio.workspace, there.spec.head)
        return [
            *seen,
            text[0],
            gr.Textbox(value=text[1], visible=bool(there.spec.data.context)),
            gr.Dropdown(
                choices=[(title_of(e), i) for i, e in enumerate(found)], value=0 if found else None, visible=bool(found)
            ),
            found,
            text,
            gr.Dropdown(choices=others(there), value=MERGED),
            "" if has_own else theme.said(UNTRAINED),
            *drawn(there, 1.0, MERGED, [], ""),
        ]

    def drawn(run: Run, level: float, third: str, verdicts: list[Verdict], known: str) -> list[Any]:
        labels = run.spec.data.labels
        titles, shown, lines = [], [], []
        for place, (title, words, pane) in enumerate(asked(run, level, third)):
            titles.append(chat_page.head("ABC"[place], title, words, "" if pane.adapter else "base"))
            if place >= len(verdicts):
                shown.append(EMPTY)
                lines.append("")
                continue
            base = verdicts[0] if place else None
            options: dict[str, Any] = {"base": base, "truth": known, "is_base": not place}
            shown.append(label_page.bars(labels, verdicts[place], **options))
            lines.append(label_page.engine_line(verdicts[place]))
        return [*titles, *shown, *lines]

    def answer(run: str | None, one: str, two: str, level: float, third: str, known: Any) -> list[Any]:
        if not run:
            raise LoRAError("`run` (=nothing) must be one with an adapter; train one first, or open one in Runs.")
        there = studio.runs.get(run)
        panes = [pane for _, _, pane in asked(there, level, third)]
        two = two if there.spec.data.context else ""
        judge = studio.judge(there)
        verdicts = list(judge.answer(panes, one, two or "", there.spec.data, there.spec.train.max_length))
        told = known[2] if (one, two or "") == tuple(known[:2]) else ""
        return drawn(there, level, third, verdicts, told)

    def take(found: list[Any], place: int | None) -> list[Any]:
        if place is None or place >= len(found):
            return [gr.skip()] * 3
        return [found[place][0], found[place][1], found[place]]

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on(
        opened,
        studio.guard(show),
        [run_id, shown_of],
        [shown_of, talk, view, first, second, rows, held, truth, beside, note, *picture],
        trigger_mode="always_last",
        concurrency_limit=None,
        **quiet,
    )
    inputs = [run_id, first, second, strength, beside, truth]
    going: dict[str, Any] = {"concurrency_limit": 1, "trigger_mode": "always_last", **quiet}
    gr.on([ask.click, first.submit, second.submit], studio.guard(answer), inputs, picture, **going)
    gr.on([strength.release, beside.input], studio.guard(answer), inputs, picture, **going)
    chosen = rows.input(studio.guard(take), [held, rows], [first, second, truth], queue=False, **quiet)
    chosen.then(studio.guard(answer), inputs, picture, **going)
