"""Train: settings, Start and Stop, and what a run is doing, live."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
import pandas as pd

from core import Failed, LoRAError, TrainConfig, settings
from studio import theme
from studio.forms import Form
from studio.palette import ADAPTED, ADAPTED_SOFT
from studio.runs import Run

MAX_POINTS = 400
STOP, STOPPING = "Stop and save", "Stopping after this step …"
LOSS_COLORS = {"training": ADAPTED_SOFT, "held-out rows": ADAPTED}


@dataclass(frozen=True)
class TrainTab:
    """The tab's parts that others read.

    Attributes:
        outputs: The components that `view` fills.
        start, stop: The buttons.
        form: The training settings.
    """

    outputs: list[Any]
    start: Any
    stop: Any
    name: Any
    form: Form


def view(run: Run | None) -> list[Any]:
    """Returns what the tab's `outputs` show of a run."""
    if run is None:
        empty = theme.said("No run yet. Pick a model and data, then press Start training; the loss appears here.")
        return [empty, *(None for _ in ("loss", *SMALL)), "", gr.Button(STOP, interactive=False)]
    try:
        status, log, _ = run.status, run.log, run.spec
    except LoRAError as error:  # damaged files: said here at every look, not as an alarm
        words = theme.said(str(error), "error")
        return [words, *(None for _ in ("loss", *SMALL)), run.log_tail(), gr.Button(STOP, interactive=False)]
    train_rows = [(s.step, s.loss, "training") for s in log.steps]
    eval_rows = [(e.step, e.loss, "held-out rows") for e in log.evaluations]
    loss = frame(thin(train_rows) + eval_rows, "loss")
    small = [frame(thin([(s.step, value(s)) for s in log.steps]), column) for column, (_, value) in SMALL.items()]
    stopping = status == "running" and run.stop_asked
    stop = gr.Button(STOPPING if stopping else STOP, interactive=status == "running" and not stopping)
    return [status_view(run, status), loss, *small, run.log_tail(), stop]


SMALL: dict[str, tuple[str, Callable[[Any], float]]] = {
    "learning rate": ("Learning rate", lambda s: s.learning_rate),
    "gradient norm": ("Gradient norm", lambda s: s.grad_norm),
    "GB": ("Memory (GB)", lambda s: s.memory_bytes / 1e9),
    "tokens/s": ("Tokens per second", lambda s: s.tokens_per_second),
}


def frame(rows: list[tuple[Any, ...]], column: str) -> pd.DataFrame | None:
    """Returns rows of (step, value) or (step, value, series) for a plot; non-finite values are left out.

    None where there is nothing to plot: from an empty table a plot learns wrong types for good.
    """
    kept = [r for r in rows if math.isfinite(r[1])]
    if not kept:
        return None
    return pd.DataFrame(kept, columns=["step", column, "series"] if column == "loss" else ["step", column])


def thin(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Returns at most `MAX_POINTS` rows: of each stretch the lowest and the highest, so that spikes stay."""
    if len(rows) <= MAX_POINTS:
        return rows
    stretch = math.ceil(2 * len(rows) / MAX_POINTS)
    kept = []
    for start in range(0, len(rows), stretch):
        part = [row for row in rows[start : start + stretch] if math.isfinite(row[1])]
        if not part:
            continue
        ends = {min(part, key=lambda r: r[1]), max(part, key=lambda r: r[1])}
        kept += sorted(ends, key=lambda r: r[0])
    return kept


def status_view(run: Run, status: str) -> str:
    """Returns HTML of a run's state: progress, time left, the losses, or why it ended."""
    log, spec = run.log, run.spec
    step, steps = (log.steps[-1].step if log.steps else 0), spec.train.steps
    parts = [f'<div class="studio-head"><strong>{escape(spec.name)}</strong> {theme.chip(status)}</div>']
    parts.append(
        f'<div class="progress" role="progressbar" aria-valuenow="{step}" aria-valuemax="{steps}" '
        f'aria-label="Training progress"><span style="width:{100 * step / steps:.1f}%"></span></div>'
    )
    pairs = [("Step", f"{step} of {steps}")]
    if status == "running" and log.steps:
        pairs.append(("Time left", duration(seconds_left(run))))
    if log.steps:
        pairs.append(("Training loss", f"{log.steps[-1].loss:.3f}"))
    if log.evaluations:
        first, last = log.evaluations[0].loss, log.evaluations[-1].loss
        pairs.append(("Held-out loss", f"{first:.3f} → {last:.3f}" if len(log.evaluations) > 1 else f"{first:.3f}"))
    if log.started:
        pairs.append(("Runs on", f"{log.started.device}, weights {log.started.precision}"))
        pairs.append(("Memory shown", log.started.memory_source))
    parts.append(theme.facts(pairs))
    if isinstance(log.end, Failed):
        parts.append(theme.said(log.end.message, "error"))
    elif status == "interrupted":
        parts.append(theme.said("The worker ended without a word (killed, or the machine went down).", "warn"))
    elif status == "running" and not log.steps:
        parts.append(theme.said((log.notes[-1].message if log.notes else "Starting the worker") + " …"))
    elif status in ("finished", "stopped") and run.has_adapter:
        parts.append(theme.said("The adapter is saved. Look at its spectrum, or chat with it."))
    return "".join(parts)


def seconds_left(run: Run) -> float:
    """Returns the time that the steps still to come will take, as the last ones did."""
    recent = run.log.steps[-20:]
    mean = sum(s.step_seconds for s in recent) / len(recent)
    since = max(0.0, time.time() - run.log.last_time)
    return max(0.0, (run.spec.train.steps - recent[-1].step) * mean - min(since, mean))


def duration(seconds: float) -> str:
    """Returns a length of time in words: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _small_plot(column: str) -> Any:
    return gr.LinePlot(
        x="step",
        y=column,
        title=SMALL[column][0],
        height=170,
        x_title="step",
        x_axis_format="~g",
        y_title=" ",
        min_width=260,
        show_label=False,
        buttons=[],
    )


def build() -> TrainTab:
    """Draws the tab; `app` wires it, as Start needs the other tabs' settings."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            gr.Markdown("### Settings")
            name = gr.Textbox(value="My first adapter", label="Name of the run", max_lines=1, elem_id="run-name")
            form = Form(
                TrainConfig, [s.name for s in settings(TrainConfig) if s.name != "max_length"]
            )  # stands in Data
            with gr.Row():
                start = gr.Button("Start training", variant="primary", elem_id="start")
                stop = gr.Button(STOP, interactive=False, elem_id="stop")
        with gr.Column(scale=7, min_width=320):
            status = gr.HTML(elem_id="status")
            loss = gr.LinePlot(
                x="step",
                y="loss",
                color="series",
                color_map=LOSS_COLORS,
                title="Loss (nats per token)",
                height=300,
                x_title="step",
                x_axis_format="~g",
                y_title=" ",
                color_title=" ",
                elem_id="loss-plot",
                show_label=False,
                buttons=[],
            )
            small = []
            for pair in (list(SMALL)[:2], list(SMALL)[2:]):
                with gr.Row():
                    small += [_small_plot(column) for column in pair]
            with gr.Accordion("Worker's log", open=False):
                tail = gr.Textbox(lines=10, max_lines=10, show_label=False, interactive=False, autoscroll=True)
    return TrainTab([status, loss, *small, tail, stop], start, stop, name, form)
