"""Data: which rows, how they become what the model sees, and which tokens it is trained on."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from core import LoRAError, TrainConfig
from studio import data, mapping, theme
from studio.forms import Form
from studio.palette import ADAPTED, BASE
from studio.state import Studio
from studio.tables import Table, list_starters, save_upload
from studio.tabs import inspect, mend, task
from studio.tabs.inspect import verify as verify
from studio.tabs.task import COLUMNS, COLUMNS_OF, NONE

WHERE = ("Starter set", "My own file", "Hugging Face Hub")
DEFAULT_STARTER = "starter:restaurants"
PREVIEW_ROWS = 20
CELL_LIMIT = 160
PROGRESS_SECONDS = 0.3


@dataclass(frozen=True)
class DataTab:
    """The tab's parts that others read.

    Attributes:
        inputs: The components whose values `parse` takes.
        form: The data settings.
        max_length: The training setting that stands here, where its effect is seen.
        look: State with what is known of all rows; see `verify`.
    """

    inputs: list[Any]
    form: Form
    max_length: Any
    look: Any


def parse(form: Form, values: list[Any]) -> data.DataSpec:
    """Returns the data settings that the tab's `inputs` say.

    Raises:
        LoRAError: No data set was read, or a setting is out of range.
    """
    source, wanted, labels, layout, *rest = values
    columns, settings = rest[: len(COLUMNS)], rest[len(COLUMNS) :]
    if not source:
        raise LoRAError("`source` (=nothing) must name a data set; choose one in the Data tab.")
    named = {name: "" if column in (NONE, None) else column for name, column in zip(COLUMNS, columns, strict=True)}
    return data.DataSpec.from_dict(
        {"source": source, **task.settings_of(wanted, labels), "layout": layout, **named, **form.values(settings)}
    )


def task_of(values: list[Any]) -> dict[str, Any]:
    """Returns what the tab's `inputs` say of the head that the model needs, whatever else is chosen."""
    _, wanted, labels, *_ = values
    return task.settings_of(wanted, labels or ["0", "1"])


def preview(table: Table) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the first rows as text, long cells cut."""
    rows = [[_cell(row.get(column)) for column in table.columns] for row in table.rows[:PREVIEW_ROWS]]
    return list(table.columns), rows


def _cell(value: Any) -> str:
    # Half a surrogate pair, which JSON can hold, cannot be sent to a page.
    text = "" if value is None else str(value).encode(errors="replace").decode()
    return text if len(text) <= CELL_LIMIT else text[: CELL_LIMIT - 1] + "…"


def build(studio: Studio, page: gr.Blocks, model: gr.State) -> DataTab:
    """Draws the tab on `page`; `model` holds the base model's name, whose tokenizer and template are used."""
    starters = list_starters()
    source = gr.State("")
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            gr.Markdown("## Data set\nRows that show the model what to answer.")
            kind = gr.Radio(list(WHERE), value=WHERE[0], label="Where from", elem_id="data-kind")
            starter = gr.Radio(
                [(f"{s.title}: {s.change}", s.source) for s in starters],
                value=DEFAULT_STARTER,
                label="Starter set",
                elem_id="starter-set",
                elem_classes=["stacked"],
            )
            upload = gr.File(
                label="JSONL, JSON, CSV, TSV, Parquet or text; one or several",
                file_count="multiple",
                visible=False,
                elem_id="upload",
                height=140,
            )
            with gr.Group(visible=False) as hub:
                hub_id = gr.Textbox(
                    label="Hub id", info="owner/name or owner/name:split. Needs the network.", max_lines=1
                )
                hub_read = gr.Button("Read this data set", variant="primary")
            summary = gr.HTML(elem_id="data-summary")
            gr.Markdown("## What the columns mean")
            asked = task.draw()
            layout = gr.Radio(
                [("Prompt and completion", "pair"), ("Conversation", "messages"), ("Plain text", "text")],
                value="pair",
                label="A row is",
            )
            with gr.Row():
                columns = [
                    gr.Dropdown(
                        [NONE],
                        value=NONE,
                        label=task.TITLES[name],
                        min_width=140,
                        visible=name in COLUMNS_OF["pair"],
                        elem_id=f"column-{name}",
                    )
                    for name in COLUMNS
                ]
            form = Form(
                data.DataSpec,
                [
                    *task.TO_WRITE,
                    "metric",
                    "bad_rows",
                    "eval_fraction",
                    "eval_source",
                    "max_eval_rows",
                    "max_rows",
                ],
            )
        with gr.Column(scale=6, min_width=320):
            gr.Markdown("## As the model sees it\nOrange tokens are trained; the others are only read.")
            row_number = gr.Slider(1, 2, value=1, step=1, label="Row")
            tokens = gr.HighlightedText(
                label="One row, token by token",
                color_map={"trained": ADAPTED, task.SECOND_TEXT: BASE},
                show_legend=False,
                show_inline_category=False,
                combine_adjacent=False,
                elem_id="tokens",
            )
            row_facts = gr.HTML()
            part = inspect.draw()
            max_length = part.max_length
            editor = mend.draw()
            gr.Markdown("## First rows as they are in the file")
            table_view = gr.Dataframe(
                interactive=False, wrap=True, max_height=420, label="Rows", show_label=False, elem_id="preview"
            )

    inputs = [source, asked.task, asked.labels, layout, *columns, *form.widgets]
    of_task = [asked.note, *inputs[1:]]
    form.widgets[form.names.index("metric")].visible = False  # until the task has scores

    def read(wanted: str, chosen_model: str) -> tuple[Any, ...]:
        table = studio.table(wanted)
        spec = task.guess(studio, chosen_model, wanted)
        recognised = f"Recognised: {mapping.format_of(table, spec)}. Change it below if that is wrong."
        header, rows = preview(table)
        counts = f"{len(table.rows):,} rows" + (
            f" and {len(table.eval_rows):,} to evaluate on" if table.eval_rows else ""
        )
        choices = [NONE, *table.columns]
        return (
            wanted,
            theme.said([f"{table.name}: {counts}, columns {', '.join(table.columns)}.", recognised, *table.problems]),
            *task.shown(studio, chosen_model, form, spec, choices),
            gr.Slider(maximum=max(2, min(len(table.rows), 500)), value=1),
            {"headers": header, "data": rows},
        )

    def read_upload(files: list[str], chosen_model: str) -> tuple[Any, ...]:
        saved = []
        for path in map(Path, files):
            try:
                saved.append(str(save_upload(path, path.name, studio.workspace)))
            finally:
                path.unlink(missing_ok=True)  # Gradio's own copy
        return read("; ".join(saved), chosen_model)

    @studio.guard
    def show_row(chosen_model: str, longest: Any, number: int, *values: Any) -> tuple[Any, str]:
        try:
            spec = parse(form, list(values))
            longest = TrainConfig(max_length=longest).max_length
            table = studio.table(spec.source, spec.eval_source)
            data.check_spec(spec, table)
            tokenizer = studio.tokenizer(chosen_model)
            row = table.rows[min(int(number), len(table.rows)) - 1]
            if spec.is_labelled:
                return task.row_view(row, spec, tokenizer, longest)
            example = data.tokenize_row(row, spec, tokenizer, longest)
        except LoRAError as error:  # said where the row would stand: the form is still being filled in
            return None, theme.said(str(error), "error")
        trained = sum(label != -100 for label in example.labels)
        marked = [(text, "trained" if is_on else None) for text, is_on in data.marked_tokens(example, tokenizer)]
        words = f"{len(example.input_ids)} tokens, {trained} of them trained."
        end = data.end_tokens(tokenizer).get(next(i for i in reversed(example.labels) if i != data.IGNORED))
        if example.num_cut:
            words += f" {example.num_cut} more were cut off at {longest}."
        words += f" End token: {f'trained, {end}' if end else 'not trained'}."
        return marked, theme.said(words, "" if end else "warn")

    def survey(chosen_model: str, longest: Any, chosen: str | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        spec = parse(form, list(values))
        longest = TrainConfig(max_length=longest).max_length
        shown: list[Any] = [gr.skip()] * len(part.shown)
        told = 0.0
        for look in inspect.survey(studio, chosen_model, spec):
            if look.is_done or look.survey.is_stopped:
                words = "" if look.is_done else theme.said("Cancelled. Check all rows begins anew.", "warn")
                yield look, words, gr.Button(visible=False), *inspect.show(look, longest, chosen)
            elif time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                yield look, inspect.going(look.survey), gr.Button(visible=True), *shown

    def survey_unasked(chosen_model: str, longest: Any, chosen: str | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        try:
            spec = parse(form, list(values))
            num_rows = len(studio.table(spec.source, spec.eval_source).rows)
            if inspect.is_automatic(spec, num_rows):
                yield from survey(chosen_model, longest, chosen, *values)
                return
            words = theme.said(f"{num_rows:,} rows: press Check all rows to look at them.")
        except LoRAError as error:  # said where the numbers would stand: the form is still being filled in
            words = theme.said(str(error), "error")
        _, *rest = inspect.show(None, longest, None)
        yield None, "", gr.Button(visible=False), words, *rest

    def show(look: Any, longest: Any, chosen: str | None) -> list[Any]:
        try:
            shown = inspect.show(look, longest, chosen)
            shown[part.shown.index(part.cut)] = gr.skip()  # drawn anew it would slip from under the hand that moves it
            return shown
        except LoRAError as error:
            _, *rest = inspect.show(None, longest, None)
            return [theme.said(str(error), "error"), *rest]

    def cancel(look: Any) -> None:
        if look is not None:
            look.survey.is_stopped = True  # it ends after the batch at hand, and says so

    def open_row(look: Any, longest: Any, chosen: str | None, event: gr.SelectData) -> list[Any]:
        place = inspect.pressed(look, longest, chosen or "", event.row_value)
        return mend.show(None if place is None else mend.Opened(look, place), longest)

    def save_mend(opened: Any, text: str, longest: Any) -> list[Any]:
        mend.save(studio, opened, text, longest)
        return mend.show(None)

    def undo_mend(opened: Any) -> list[Any]:
        mend.undo(studio, opened)
        return mend.show(None)

    def undo_mends(opened: Any) -> list[Any]:
        mend.undo_all(studio, opened)
        return mend.show(None)

    def move(longest: Any, event: gr.EventData) -> Any:
        return max(1, int(event.cut))

    def show_columns(kind_of_row: str) -> list[Any]:
        return [gr.Dropdown(visible=name in COLUMNS_OF[kind_of_row]) for name in COLUMNS]

    def take_task(chosen_model: str, *values: Any) -> list[Any]:
        return task.take(studio, chosen_model, form, list(values))

    def follow_model(chosen_model: str, *values: Any) -> list[Any]:
        return task.follow(studio, chosen_model, form, list(values))

    def relabel(*values: Any) -> Any:
        return task.relabelled(studio, list(values))

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    loud: dict[str, Any] = {"api_visibility": "private", "show_progress_on": summary}
    read_outputs = [source, summary, *of_task, row_number, table_view]
    kind.change(
        lambda chosen: [gr.update(visible=chosen == k) for k in WHERE],
        kind,
        [starter, upload, hub],
        queue=False,
        **quiet,
    )
    was_read = [
        starter.input(studio.guard(read), [starter, model], read_outputs, trigger_mode="always_last", **loud),
        upload.upload(studio.guard(read_upload), [upload, model], read_outputs, **loud),
        gr.on(
            [hub_read.click, hub_id.submit],
            studio.guard(lambda text, m: read(f"hub:{text.strip()}", m)),
            [hub_id, model],
            read_outputs,
            **loud,
        ),
        page.load(studio.guard(read), [starter, model], read_outputs, **quiet),
    ]
    layout.change(show_columns, layout, columns, queue=False, **quiet)
    row_inputs = [model, max_length, row_number, *inputs]
    asking: dict[str, Any] = {"trigger_mode": "always_last", **quiet}
    retasked = [
        asked.task.input(studio.guard(take_task), [model, *inputs], of_task, **asking),
        model.change(studio.guard(follow_model), [model, *inputs], of_task, **asking),
        columns[COLUMNS.index("completion")].input(studio.guard(relabel), inputs, asked.labels, **asking),
    ]
    for event in (*was_read, *retasked):
        event.success(show_row, row_inputs, [tokens, row_facts], **quiet)
    others = [widget for name, widget in zip(COLUMNS, columns, strict=True) if name != "completion"]
    typed = [asked.labels, layout, *others, *form.widgets]  # what changes more than itself is seen to above
    edited = [max_length.change, row_number.input, *(widget.input for widget in typed)]
    gr.on(edited, show_row, row_inputs, [tokens, row_facts], trigger_mode="always_last", **quiet)

    survey_inputs = [model, max_length, part.chosen, *inputs]
    survey_outputs = [part.look, part.progress, part.cancel, *part.shown]
    last: dict[str, Any] = {"trigger_mode": "always_last", **quiet}
    closed = lambda: mend.show(None)  # noqa: E731
    changed = [widget.input for widget in typed]
    for event in (*was_read, *retasked):
        event.success(closed, None, editor.shown, **quiet)  # before rows can be opened: asked last, it would shut one
        event.success(studio.guard(survey_unasked), survey_inputs, survey_outputs, **last)
    gr.on(changed, studio.guard(survey_unasked), survey_inputs, survey_outputs, **last)
    part.check.click(studio.guard(survey), survey_inputs, survey_outputs, **last)
    seen = [part.look, max_length, part.chosen]
    part.cancel.click(studio.guard(cancel), part.look, None, queue=False, **quiet)
    part.cut.input(studio.guard(move), max_length, max_length, queue=False, **last)
    max_length.change(None, max_length, None, js=inspect.FOLLOW, api_visibility="private")
    max_length.change(studio.guard(show), seen, part.shown, queue=False, **last)
    part.chosen.input(studio.guard(show), seen, part.shown, queue=False, **last)

    part.rows.select(studio.guard(open_row), seen, editor.shown, **quiet)
    editor.undo_all.click(studio.guard(mend.ask_undo), editor.opened, editor.asked, **quiet)
    editor.no.click(lambda: gr.Group(visible=False), None, editor.asked[0], queue=False, **quiet)
    gr.on([editor.close.click, *changed], closed, None, editor.shown, queue=False, **quiet)
    for event in (
        editor.save.click(studio.guard(save_mend), [editor.opened, editor.text, max_length], editor.shown, **quiet),
        editor.undo.click(studio.guard(undo_mend), editor.opened, editor.shown, **quiet),
        editor.yes.click(studio.guard(undo_mends), editor.opened, editor.shown, **quiet),
    ):
        event.success(show_row, row_inputs, [tokens, row_facts], **quiet)
        event.success(studio.guard(survey_unasked), survey_inputs, survey_outputs, **last)
    return DataTab(inputs, form, max_length, part.look)
