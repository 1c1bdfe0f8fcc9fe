"""Train: settings, Start and Stop, and what a run is doing, live."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from core import Failed, LoRAError, Step, TrainConfig, settings
from studio import live, theme
from studio.forms import Form
from studio.palette import ADAPTED, ADAPTED_SOFT
from studio.runs import EventLog, Run

STOP, STOPPING = "Stop and save", "Stopping after this step …"


@dataclass(frozen=True)
class TrainTab:
    """The tab's parts that others read.

    Attributes:
        start, stop: The buttons.
        form: The training settings.
    """

    start: Any
    stop: Any
    name: Any
    form: Form


def view(run: Run | None) -> dict[str, str]:
    """Returns what the tab shows of a run: HTML by the id of the element that it belongs in."""
    if run is None:
        words = theme.said("No run yet. Pick a model and data, then press Start training; the loss appears here.")
        return {"status": words, "worker-log": ""}
    try:
        shown = status_view(run, run.status) + charts(run.log)
    except LoRAError as error:  # damaged files: said here at every look, not as an alarm
        shown = theme.said(str(error), "error")
    return {"status": shown, "worker-log": escape(run.log_tail())}


def stop_button(run: Run | None) -> Any:
    """Returns the Stop button as it is for a run."""
    try:
        running = run is not None and run.status == "running"
    except LoRAError:
        running = False
    stopping = running and run is not None and run.stop_asked
    return gr.Button(STOPPING if stopping else STOP, interactive=running and not stopping)


SMALL: dict[str, Callable[[Step], float]] = {
    "Learning rate": lambda s: s.learning_rate,
    "Gradient norm": lambda s: s.grad_norm,
    "Memory (GB)": lambda s: s.memory_bytes / 1e9,
    "Tokens per second": lambda s: s.tokens_per_second,
}


def charts(log: EventLog) -> str:
    """Returns HTML of the loss and, below it, the four small charts."""
    losses = [
        live.Curve("training", ADAPTED_SOFT, [(s.step, s.loss) for s in log.steps]),
        live.Curve("held-out rows", ADAPTED, [(e.step, e.loss) for e in log.evaluations], dots=True, thickness=2),
    ]
    drawn = live.chart("Loss (nats per token)", losses, height=260, empty="It appears after the first step.")
    small = [
        live.chart(title, [live.Curve("", ADAPTED, [(s.step, value(s)) for s in log.steps])], height=110)
        for title, value in SMALL.items()
    ]
    return f'<div class="charts">{drawn}{"".join(small)}</div>'


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
            gr.HTML('<div id="status"></div>')
            with gr.Accordion("Worker's log", open=False):
                gr.HTML('<pre id="worker-log"></pre>')
    return TrainTab(start, stop, name, form)
