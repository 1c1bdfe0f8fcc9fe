"""Runs: what was trained, how it went, and what can be done with it."""

import math
import shlex
import zipfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from core import LoRAError, MethodConfig, settings
from studio import beside, evaluation, label_metrics, links, markup, theme
from studio.event_log import EventLog
from studio.generating import EvaluationSpec
from studio.metrics import TASKS
from studio.runs import Run
from studio.specs import RunSpec
from studio.state import Studio

HEADER = [
    "Name",
    "Status",
    "Held-out loss",
    "Training loss",
    "Score",
    "Steps",
    "Made",
    "Model",
    "Data",
    "Method",
    "r",
]
"""What tells runs apart first: on a narrow page the rest is scrolled to."""

BLOCKS = "▁▂▃▄▅▆▇█"
MOST_STEPS = 12
"""Steps of which a table shows what was measured."""


def row(run: Run) -> list[str]:
    """Returns a run as a row of the table; a run whose files are damaged says so in its row."""
    try:
        status, spec, log = run.status, run.spec, run.log
    except LoRAError as error:
        return [run.id, "damaged", "", "", str(error), *[""] * (len(HEADER) - 5)]
    done = log.steps[-1].step if log.steps else 0
    losses = [e.loss for e in log.evaluations]
    return [
        spec.name,
        status,
        f"{losses[0]:.3f} → {losses[-1]:.3f}" if len(losses) > 1 else "",
        sparkline(log.steps.columns()["loss"]),
        score(log),
        f"{done} / {spec.train.steps}",
        f"{run.created:%Y-%m-%d %H:%M}",
        Path(spec.model).name,
        Path(spec.data.source).name.removeprefix("starter:"),
        spec.method.title,
        str(spec.lora.r) if spec.method.method == "lora" else "",
    ]


def score(log: EventLog) -> str:
    """Returns the score that decides, before training and now; "" where there is none."""
    told = [e for e in log.evaluations if e.metric]
    if not told:
        return ""
    values = [label_metrics.number(e.metrics.get(e.metric, math.nan)) for e in (told[0], told[-1])]
    return f"{label_metrics.TITLES.get(told[-1].metric, told[-1].metric)} {' → '.join(dict.fromkeys(values))}"


def listed(studio: Studio) -> tuple[list[list[str]], list[Run]]:
    """Returns the table's rows and the run of each, the newest first."""
    runs = studio.runs.list()
    return [line[1:] for line in studio.shown.each(runs, labelled_row)], runs


def choices(studio: Studio, runs: list[Run]) -> list[tuple[str, str]]:
    """Returns how each of `runs` is called, and its id."""
    return [(line[0], run.id) for line, run in zip(studio.shown.each(runs, labelled_row), runs, strict=True)]


def picker(studio: Studio, run: Run) -> Any:
    """Returns the header's list of runs, with one of them chosen."""
    return gr.Dropdown(choices=choices(studio, studio.runs.list()), value=run.id)


def labelled_row(run: Run) -> list[str]:
    """Returns all that lists show of a run: its label and its row."""
    return [label(run), *row(run)]


def sparkline(values: Sequence[float] | np.ndarray, width: int = 8) -> str:
    """Returns a row of block characters that rise and fall as `values` do, each the mean of a stretch."""
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return ""
    width = min(width, len(finite))
    edges = [i * len(finite) // width for i in range(width + 1)]
    means = [float(finite[a:b].mean()) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((m - low) / span * (len(BLOCKS) - 1))] for m in means)


def details(run: Run) -> str:
    """Returns HTML of a run's settings."""
    spec = run.spec
    return (
        theme.facts(
            [
                ("Id", run.id),
                ("Model", spec.model),
                ("Data", spec.data.source),
                *([("Task", ", ".join((spec.data.task, *spec.data.labels)))] if spec.data.is_labelled else []),
                *_method(spec),
                ("Steps × batch", f"{spec.train.steps} × {spec.train.batch_size * spec.train.accumulation}"),
                ("Learning rate", f"{spec.train.learning_rate:g}, {spec.train.schedule}"),
                ("Seed", str(spec.train.seed)),
                *([("Begins with", spec.continues)] if spec.continues else []),
            ]
        )
        + links.View(run.id, "runs").link()
        + theme.command("Train the same again", command(run))
        + measured(run)
    )


def measured(run: Run) -> str:
    """Returns HTML of what the run's answers scored, a table for each way to measure, and what to type to do it."""
    try:
        found = evaluation.kept(run)
    except LoRAError as error:
        return theme.said(str(error), "error")
    alike: dict[EvaluationSpec, list[evaluation.Kept]] = {}
    for kept in reversed(found):
        alike.setdefault(kept.spec, []).append(kept)
    tables = "".join(_table(spec, of_spec) for spec, of_spec in alike.items())
    if not run.has_adapter or run.spec.data.is_labelled:
        return tables
    task = run.spec.evaluation.evaluation_task if run.spec.evaluation.is_on else "data_to_text"
    words = ["lora-studio", "evaluate", run.id, "--task", task, "--workspace", str(run.workspace_root)]
    return tables + theme.command("Measure its answers", shlex.join(words))


def _table(spec: EvaluationSpec, found: list[evaluation.Kept]) -> str:
    """Returns HTML of what was measured in one way, the latest step first."""
    metrics = [result.metric for result in found[0].results]
    heads = "".join(f"<th>{escape(words)}</th>" for words in ("After step", *metrics))
    rows = ""
    for kept in found[:MOST_STEPS]:
        cells = "".join(f"<td>{r.value:.4f}<small>{r.low:.3f} … {r.high:.3f}</small></td>" for r in kept.results)
        rows += f"<tr><td>{kept.step}</td>{cells}</tr>"
    search = f"{spec.beams} beams" if spec.beams > 1 else "the likeliest token each time"
    words = (
        f"{TASKS[spec.evaluation_task].label}: {found[0].results[0].num} prompts, {search}, answers of up to "
        f"{spec.longest_answer} tokens. Below each value its 95 % interval, by a bootstrap over the prompts."
    )
    if len(found) > MOST_STEPS:
        words += f" {len(found) - MOST_STEPS} earlier steps are in the run's folder."
    table = markup.table(f"<tr>{heads}</tr>", rows)
    return f'<div class="measured"><p class="sub-line">{escape(words)}</p>{table}</div>'


def _method(spec: RunSpec) -> list[tuple[str, str]]:
    """Returns what of a model a run trains, as pairs of words."""
    method, targets = spec.method, spec.lora.target_modules
    if method.method != "lora":
        own = [f"{s.label} {getattr(method, s.name)}" for s in settings(MethodConfig) if method.method in s.only]
        return [("Method", ", ".join([method.title, *own]))]
    return [
        ("Target matrices", targets if isinstance(targets, str) else ", ".join(targets)),
        ("r, alpha, dropout", f"{spec.lora.r}, {spec.lora.alpha:g}, {spec.lora.dropout:g}"),
    ]


def command(run: Run) -> str:
    """Returns what to type to train the same run again."""
    return shlex.join(["lora-studio", "train", str(run.spec_file), "--workspace", str(run.workspace_root)])


def pack(run: Run, folder: Path) -> str:
    """Writes the run's adapter as a zip file into `folder`, if it is not there already; returns its path."""
    saved = (run.adapter_folder / "adapter_model.safetensors").stat().st_mtime_ns
    file = _packed(run.id, folder)
    if not file.exists() or file.stat().st_mtime_ns < saved:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:  # weights hardly compress
            for part in sorted(run.adapter_folder.iterdir()):
                if not part.is_symlink():  # a run's own files only
                    packed.write(part, part.name)
    return str(file)


def _packed(run_id: str, folder: Path) -> Path:
    return folder / f"{run_id}-adapter.zip"


def build(studio: Studio, run_id: Any, seen: Any, tabs: Any) -> None:
    """Draws the tab, at the event `seen` anew; opening a run sets `run_id` and goes to another of `tabs`."""
    gr.Markdown("## All runs\nA click on a row chooses that run, here and in the header.")
    table = gr.Dataframe(
        headers=HEADER, interactive=False, show_label=False, elem_id="runs-table", max_height=460, wrap=False
    )
    ids = gr.State([])
    chosen = gr.HTML(elem_id="run-details")
    with gr.Row(elem_classes="tight"):
        to_train = gr.Button("Open in Train", size="md")
        to_spectrum = gr.Button("Open in Spectrum", size="md")
        to_chat = gr.Button("Open in Chat", size="md")
        to_home = gr.Button("Take home", size="md")
        download = gr.DownloadButton("Download adapter (zip)", size="md", elem_id="download")
        delete = gr.Button("Delete …", variant="stop", size="md", elem_id="delete")
    with gr.Accordion("Compare with another run", open=False, elem_id="beside-part"):
        other = gr.Dropdown([], label="Run beside the chosen one", elem_id="beside-run")
        compared = gr.HTML(elem_id="beside")
    with gr.Accordion("Train a copy", open=False):
        changes = gr.Textbox(
            label="Settings to change in the copy",
            info="One a line, such as learning_rate = 3e-4. More than one value, and each becomes a run of its own.",
            placeholder="learning_rate = 3e-4\nr = 4, 8",
            lines=2,
            elem_id="changes",
        )
        copied = gr.Button("Train the copy", elem_id="copy")
    with gr.Group(visible=False) as question:
        asked = gr.HTML()
        with gr.Row():
            yes = gr.Button("Delete for good", variant="stop", elem_id="delete-yes")
            no = gr.Button("Keep it", elem_id="delete-no")

    def fill() -> tuple[Any, ...]:
        rows, runs = listed(studio)
        return {"headers": HEADER, "data": rows}, [run.id for run in runs]

    def show(run: str, second: str | None) -> tuple[Any, ...]:
        rest = [one for one in studio.runs.list() if one.id != run]
        second = second if second in [one.id for one in rest] else None
        others = gr.Dropdown(choices=choices(studio, rest), value=second)
        if not run:
            words = "No run yet. Each that is trained is listed here, with its settings, its losses and its adapter."
            told = theme.said(words) + links.ways(train="Train one")
            return told, gr.DownloadButton(interactive=False), others, ""
        found = studio.runs.get(run)
        # Packed before the click: the button hands out what it holds when it is pressed.
        file = pack(found, studio.workspace.downloads) if found.has_adapter else None
        button = gr.DownloadButton(value=file, interactive=file is not None)
        return details(found), button, others, set_beside(run, second)

    def set_beside(run: str, chosen: str | None) -> str:
        if not run or not chosen or run == chosen:
            return ""
        return beside.view(studio.runs.get(run), studio.runs.get(chosen))

    def choose(known: list[str], event: gr.SelectData) -> str:
        return known[event.index[0]]

    def ask(run: str) -> tuple[Any, ...]:
        if not run:
            raise LoRAError("`run` (=nothing) must be chosen; click one in the table.")
        found = studio.runs.get(run)
        words = f"Delete “{found.spec.name}” with its adapter, log and losses? This cannot be undone."
        return gr.Group(visible=True), theme.said(words, "warn")

    def copy(run: str, lines: str) -> tuple[Any, ...]:
        if not run:
            raise LoRAError("`run` (=nothing) must be chosen; click one in the table.")
        started = studio.start(studio.runs.get(run).spec, lines)
        return picker(studio, started), gr.Tabs(selected="train")

    def remove(run: str) -> tuple[Any, ...]:
        studio.runs.delete(studio.runs.get(run))
        for file in studio.workspace.downloads.glob(f"{run}-*"):
            file.unlink(missing_ok=True)
        left = choices(studio, studio.runs.list())
        return gr.Group(visible=False), gr.Dropdown(choices=left, value=left[0][1] if left else None), *fill()

    private: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}
    last: dict[str, Any] = {"trigger_mode": "always_last"}
    gr.on(seen, studio.guard(fill), None, [table, ids], **last, **private)
    gr.on(seen, studio.guard(show), [run_id, other], [chosen, download, other, compared], **last, **private)
    other.input(studio.guard(set_beside), [run_id, other], compared, **last, **private)
    table.select(studio.guard(choose), ids, run_id, **private)
    for button, tab in ((to_train, "train"), (to_spectrum, "spectrum"), (to_chat, "chat"), (to_home, "home")):
        button.click(lambda tab=tab: gr.Tabs(selected=tab), None, tabs, queue=False, **private)
    copied.click(studio.guard(copy), [run_id, changes], [run_id, tabs], **private)
    delete.click(studio.guard(ask), run_id, [question, asked], **private)
    no.click(lambda: gr.Group(visible=False), None, question, queue=False, **private)
    yes.click(studio.guard(remove), run_id, [question, run_id, table, ids], **private)


def label(run: Run) -> str:
    """Returns how a run is called in a list."""
    try:
        return f"{run.spec.name} · {run.status} · {run.created:%d %b %H:%M}"
    except LoRAError:
        return f"{run.id} · damaged"
