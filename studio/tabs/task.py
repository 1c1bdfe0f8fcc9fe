"""The part of the Data tab that says what the model does with a row: write, give it a label, or a number."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from core import LoRAError
from studio import data, mapping, theme
from studio.forms import Form
from studio.label_metrics import OF_TASK
from studio.labelled import SECOND, cut_labelled, tokenize_labelled
from studio.mapping import RowError, to_labelled
from studio.rows import Row
from studio.state import Studio

NONE = "(none)"
COLUMNS = ("prompt", "context", "completion", "messages", "text")
COLUMNS_OF = {"pair": ("prompt", "context", "completion"), "messages": ("messages",), "text": ("text",)}
TITLES = {name: f"{name.capitalize()} column" for name in COLUMNS}
TITLES_LABELLED = {"prompt": "Text column", "context": "Second text column", "completion": "Label column"}
TASKS = {"Write an answer": "causal", "Choose a label": "classification", "Give a number": "regression"}
TO_WRITE = ("instruction", "template", "train_on")
"""Settings that mean something only to a model that writes."""

SECOND_TEXT = "second text"
ENCODER = (
    "{} is an encoder: it writes nothing, and gives labels or numbers. Choose a data set with a label column, such as "
    "the starter set Topics."
)


@dataclass(frozen=True)
class Part:
    """The part's components.

    Attributes:
        task: The choice.
        labels: The names of the labels, in the order of the model's logits.
        note: HTML of what stands against it.
    """

    task: Any
    labels: Any
    note: Any


def draw() -> Part:
    """Draws the part where it is called."""
    task = gr.Radio(list(TASKS.items()), value="causal", label="What the model does with a row", elem_id="task")
    note = gr.HTML(elem_id="task-note", padding=False)
    labels = gr.Dropdown(
        [],
        value=[],
        multiselect=True,
        allow_custom_value=True,
        label="Labels",
        info="Read from the rows, in the order of the model's answers.",
        visible=False,
        elem_id="labels",
    )
    return Part(task, labels, note)


def settings_of(task: str, labels: list[str] | None) -> dict[str, Any]:
    """Returns the settings of a `DataSpec` that the part says."""
    return {"task": task, "labels": tuple(labels or ()) if task == "classification" else ()}


def guess(studio: Studio, model: str, source: str) -> data.DataSpec:
    """Returns a spec that fits a data set and a model."""
    info = studio.info(model)
    options: dict[str, Any] = {"has_chat_template": info.has_chat_template, "can_write": info.can_write}
    return data.guess_spec(studio.table(source), source, **options)


def shown(studio: Studio, model: str, form: Form, spec: data.DataSpec, choices: list[str] | None = None) -> list[Any]:
    """Returns what the note, the part, the layout, the columns and the form show of a spec.

    Args:
        studio: What is served.
        model: The base model.
        form: The tab's.
        spec: What is to be shown.
        choices: The columns that there are, where they are others than before.
    """
    info = studio.info(model)
    note = "" if info.can_write or spec.is_labelled else theme.said(ENCODER.format(info.name), "warn")
    names = TITLES | TITLES_LABELLED if spec.is_labelled else TITLES
    new: dict[str, Any] = {"choices": choices} if choices else {}
    columns = [
        gr.update(value=getattr(spec, name) or NONE, label=names[name], visible=name in COLUMNS_OF[spec.layout], **new)
        for name in COLUMNS
    ]
    hidden = TO_WRITE if spec.is_labelled else ("metric",)
    scores: dict[str, Any] = {"choices": ["auto", *OF_TASK.get(spec.task, ())]}
    widgets = [
        gr.update(value=value, visible=name not in hidden, **(scores if name == "metric" else {}))
        for name, value in zip(form.names, form.shown(spec), strict=True)
    ]
    labels = list(spec.labels)
    return [
        note,
        spec.task,
        gr.update(choices=labels, value=labels, visible=spec.task == "classification"),
        gr.update(value=spec.layout, visible=not spec.is_labelled),
        *columns,
        *widgets,
    ]


def take(studio: Studio, model: str, form: Form, values: list[Any]) -> list[Any]:
    """Returns what `shown` shows once another task is chosen; columns that were chosen stay.

    Raises:
        LoRAError: No data set was read, or the label column has no labels.
    """
    source, wanted, _, layout, *rest = values
    if not source:
        raise LoRAError("`source` (=nothing) must name a data set; choose one in the Data tab.")
    table = studio.table(source)
    plain = data.guess_spec(table, source, has_chat_template=studio.info(model).has_chat_template)
    chosen = {name: column for name, column in zip(COLUMNS, rest, strict=False) if column not in (NONE, None)}
    kept = dict.fromkeys(COLUMNS, "") | chosen if layout == "pair" and "completion" in chosen else {}
    spec = data.DataSpec.from_dict(plain.to_dict() | kept | ({"layout": "pair"} if kept else {}))
    if wanted == "causal":
        return shown(studio, model, form, spec)
    if spec.completion not in table.columns:
        raise LoRAError("`completion` (=nothing) must be a column with labels; this data set has none that is known.")
    found = mapping.with_task(spec, table, wanted)
    if found.task != wanted:
        mapping.labels_of(table, spec.completion)  # which says why there are none
    return shown(studio, model, form, found)


def follow(studio: Studio, model: str, form: Form, values: list[Any]) -> list[Any]:
    """Returns what `shown` shows once another model is chosen: one that writes nothing asks for labels."""
    source, task, *_ = values
    if not source or studio.info(model).can_write == (task == "causal") or task != "causal":
        return ["", *[gr.skip()] * (3 + len(COLUMNS) + len(form.widgets))]
    return shown(studio, model, form, guess(studio, model, source))


def relabelled(studio: Studio, values: list[Any]) -> Any:
    """Returns the labels of another label column.

    Raises:
        LoRAError: It has none.
    """
    source, task, _, _, *rest = values
    column = dict(zip(COLUMNS, rest, strict=False))["completion"]
    if not source or task != "classification" or column in (NONE, None):
        return gr.skip()
    found = list(mapping.labels_of(studio.table(source), column))
    return gr.Dropdown(choices=found, value=found)


def row_view(row: Row, spec: data.DataSpec, tokenizer: Any, max_length: int) -> tuple[list[Any], str]:
    """Returns the tokens of a row with a label, those of a second text marked, and HTML of what it should become.

    Raises:
        RowError: The row lacks what it should hold.
    """
    held = to_labelled(row, spec)
    (found,) = tokenize_labelled([held], tokenizer)
    if isinstance(found, RowError):
        raise found
    example = cut_labelled(found, max_length)
    marked: list[Any] = []
    place = 0
    for text, number in data.token_texts(list(example.input_ids), tokenizer):
        marked.append((text, SECOND_TEXT if example.parts[place] == SECOND else None))
        place += number
    label = f"{held.label:g}" if held.is_value else spec.labels[int(held.label)]
    words = f"{len(example.input_ids)} tokens. {'Number' if held.is_value else 'Label'}: {label}."
    words += f" {example.num_cut} more were cut off at {max_length}." if example.num_cut else ""
    words += " The second text is coloured." if len(held.texts) > 1 else ""
    return marked, theme.said(words)
