"""Train: settings and Start, what a run is doing, live, and what can be done with it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
import numpy as np

from core import LoRAError, MethodConfig, TrainConfig, gpus, settings
from studio import ends, jobs, label_metrics, links, live, theme, zoom
from studio.checkpoints import best
from studio.event_log import EventLog
from studio.forms import Form
from studio.generating import EvaluationSpec
from studio.live import duration
from studio.palette import ADAPTED, ADAPTED_SOFT, BASE, CHANCE
from studio.remedies import remedies
from studio.runs import Run, Runs
from studio.tabs import forecast

ACTIONS = ("resume", "pause", "stop", "kill", "earlier", "later", "further")
"""What can be done with a run, in the order of the buttons."""

MOST_REMEDIES = 5


@dataclass(frozen=True)
class TrainTab:
    """The tab's parts that others read.

    Attributes:
        start: The button.
        name: Of the run to start.
        sweep: The lines of a sweep.
        form: The training settings.
        method: What is trained: LoRA, or what its paper compares it with.
        evaluation: What is measured of the answers.
        actions: Name → button, for the run that is shown.
        remedies: Buttons for what may help a run that failed.
        num_further: How many steps to train further.
        gpus: The choice of several GPUs.
        forecast: What a run will take before it is begun.
    """

    start: Any
    name: Any
    sweep: Any
    form: Form
    method: Form
    evaluation: Form
    actions: dict[str, Any]
    remedies: list[Any]
    num_further: Any
    gpus: Any
    forecast: forecast.Part

    @property
    def device(self) -> Any:
        """The widget of the device, which the choice of GPUs fills."""
        return self.form.widgets[self.form.names.index("device")]

    @property
    def controls(self) -> list[Any]:
        """The components that `controls` draws anew."""
        return [*self.actions.values(), self.num_further, *self.remedies]


def controls(run: Run | None) -> list[Any]:
    """Returns the buttons and the number as they are for a run, in the order of `TrainTab.controls`."""
    try:
        possible, helpful = (actions(run), remedies(run)) if run else ({}, [])
    except LoRAError:  # damaged files: said where the run is shown
        possible, helpful = {}, []
    buttons = []
    for name in ACTIONS:
        words, can_be_pressed = possible.get(name, ("", False))
        buttons.append(gr.Button(words, visible=name in possible, interactive=can_be_pressed))
    shown = []
    for remedy in helpful[:MOST_REMEDIES]:
        size = f" · about {remedy.predicted_bytes / 1e9:.2f} GB" if remedy.predicted_bytes else ""
        shown.append(gr.Button(f"{remedy.label}, and go on{size}", visible=True))
    shown += [gr.Button(visible=False)] * (MOST_REMEDIES - len(shown))
    return [*buttons, gr.Number(visible="further" in possible), *shown]


def actions(run: Run) -> dict[str, tuple[str, bool]]:
    """Returns what can be done with a run now: name → the button's words, and whether it can be pressed."""
    status, asked = run.status, run.stop_asked
    if status == "running":
        if not asked:
            return {"pause": ("Pause", True), "stop": ("Stop and save", True)}
        words = "Pausing after this step …" if asked == "paused" else "Stopping after this step …"
        return {"stop": (words, False), "kill": ("Kill it now", True)}
    if status == "queued":
        return {
            "stop": ("Take out of the queue", True),
            "earlier": ("Move up", True),
            "later": ("Move down", True),
        }
    possible = {}
    if status != "finished":
        possible["resume"] = ("Resume", True)
    if run.checkpoints.steps():
        possible["further"] = ("Train further", True)
    return possible


def act(runs: Runs, name: str, run: Run, num_further: Any) -> Run:
    """Does one of the `actions`; returns the run to show.

    Raises:
        LoRAError: It cannot be done any more, or the number is none.
    """
    if name == "resume":
        jobs.resume(runs, run)
    elif name == "pause":
        run.ask_to_stop("paused")
    elif name == "stop" and run.status == "queued":
        jobs.cancel(runs, run)
    elif name == "stop":
        run.ask_to_stop()
    elif name == "kill":
        jobs.kill(run)
    elif name == "further":
        return jobs.further(runs, run, TrainConfig(steps=num_further, warmup_steps=0).steps)
    else:
        jobs.move(runs, run, {"earlier": -1, "later": 1}[name])
    return run


def view(run: Run | None, steps: object = "") -> dict[str, str]:
    """Returns what the tab shows of a run: HTML by the id of the element that it belongs in.

    Args:
        run: The run; None before there is one.
        steps: Which of its steps the charts show; see `zoom.read`.
    """
    if run is None:
        words = "No run yet. Pick a model and data, then press Start training: its loss, memory and speed appear here."
        shown = theme.said(words) + links.ways(model="Pick a model", data="Pick data")
        return {"status": shown, "charts": "", "worker-log": ""}
    try:
        shown, drawn = status_view(run, run.status), charts(run.log, steps)
    except LoRAError as error:  # damaged files: said here at every look, not as an alarm
        shown, drawn = theme.said(str(error), "error"), ""
    return {"status": shown, "charts": drawn, "worker-log": escape(run.log_tail())}


def _tokens_per_second(steps: dict[str, np.ndarray]) -> np.ndarray:
    seconds = steps["step_seconds"]
    return np.divide(steps["num_tokens"], seconds, out=np.zeros_like(seconds), where=seconds != 0)


SMALL: dict[str, Callable[[dict[str, np.ndarray]], np.ndarray]] = {
    "Learning rate": lambda steps: steps["learning_rate"],
    "Gradient norm": lambda steps: steps["grad_norm"],
    "Memory (GB)": lambda steps: steps["memory_bytes"] / 1e9,
    "Tokens per second": _tokens_per_second,
}


SCORE_COLORS = (ADAPTED, BASE, CHANCE)
"""Of the scores in one chart; the first is the one that decides."""

SPECTRUM = ("σ₁ of ΔW, mean over matrices", "Effective rank of ΔW, mean")
"""What `Spectra.means` gives, in its order."""


def losses(log: EventLog, shown: live.Range | None = None) -> str:
    """Returns HTML of a chart of the loss, of the rows that are trained on and of those held out."""
    steps, last = log.steps.columns(), log.evaluations[-1] if log.evaluations else None
    curves = [
        *live.with_mean(live.Curve("training", ADAPTED_SOFT, np.stack([steps["step"], steps["loss"]], axis=1))),
        live.Curve("held-out rows", ADAPTED, [(e.step, e.loss) for e in log.evaluations], dots=True, thickness=2),
    ]
    is_of_rows = last is not None and bool(last.metrics)
    unit = "" if last is not None and "pearson" in last.metrics else " (nats)" if is_of_rows else " (nats per token)"
    return live.chart(f"Loss{unit}", curves, height=260, empty="It appears after the first step.", shown=shown)


def charts(log: EventLog, asked: object = "") -> str:
    """Returns HTML of the loss and, below it, the four small charts, and two of ΔW where it was measured.

    Args:
        log: Of the run.
        asked: Which of its steps are shown; see `zoom.read`.
    """
    steps = log.steps.columns()
    shown = zoom.read(asked, steps["step"])

    def small_chart(title: str, curves: list[live.Curve]) -> str:
        return live.chart(title, curves, height=110, shown=shown)

    def points(values: np.ndarray) -> np.ndarray:
        return np.stack([steps["step"], values], axis=1)

    last = log.evaluations[-1] if log.evaluations else None
    drawn = losses(log, shown)
    if last is not None and last.metrics:
        scores = [
            live.Curve(label_metrics.TITLES.get(name, name), color, _scores(log, name), dots=True, thickness=2)
            for name, color in zip(_first(last.metric, last.metrics), SCORE_COLORS, strict=False)
        ]
        drawn += small_chart("Scores on held-out rows", scores)
    small = [small_chart(title, [live.Curve("", ADAPTED, points(value(steps)))]) for title, value in SMALL.items()]
    measured, means = log.spectra.steps, log.spectra.means()
    for place, title in enumerate(SPECTRUM) if len(measured) else ():
        values = np.stack([measured[: len(means)], means[: len(measured), place]], axis=1)
        small.append(small_chart(title, [live.Curve("", ADAPTED, values)]))
    chooser = zoom.bar(asked, shown) if len(steps["step"]) > 1 else ""
    return f'{chooser}<div class="charts">{drawn}{"".join(small)}</div>'


def _first(name: str, names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda other: other != name)


def _scores(log: EventLog, name: str) -> list[tuple[float, float]]:
    return [(e.step, e.metrics.get(name, math.nan)) for e in log.evaluations]


def status_view(run: Run, status: str) -> str:
    """Returns HTML of a run's state: progress, time left, the losses, or why it ended."""
    log, spec = run.log, run.spec
    step, steps = (log.steps[-1].step if log.steps else 0), spec.train.steps
    parts = [f'<div class="studio-head"><strong>{escape(spec.name)}</strong> {theme.chip(status)}</div>']
    parts.append(theme.bar(step, steps, "Training progress"))
    pairs = [("Step", f"{step} of {steps}")]
    if spec.method.method != "lora":
        pairs.append(("Method", spec.method.title))
    if status == "running" and log.steps:
        pairs.append(("Time left", duration(run.seconds_left())))
    if log.steps:
        pairs.append(("Training loss", f"{log.steps[-1].loss:.3f}"))
    if log.evaluations:
        first, last = log.evaluations[0].loss, log.evaluations[-1].loss
        pairs.append(("Held-out loss", f"{first:.3f} → {last:.3f}" if len(log.evaluations) > 1 else f"{first:.3f}"))
        pairs += [
            (label_metrics.TITLES.get(name, name), _from_to(_scores(log, name)))
            for name in _first(log.evaluations[-1].metric, log.evaluations[-1].metrics)
        ]
        lowest = best([(e.step, e.to_minimize) for e in log.evaluations])
        if lowest is not None:
            by = label_metrics.TITLES.get(log.evaluations[-1].metric, "")
            pairs.append((f"Best {by} at step" if by else "Best at step", str(lowest)))
    if log.checkpoint:
        pairs.append(("Last checkpoint", f"step {log.checkpoint.step}"))
    if log.started:
        pairs.append(("Runs on", f"{log.started.device}, weights {log.started.precision}"))
        pairs.append(("Memory shown", log.started.memory_source))
    parts.append(theme.facts(pairs))
    sentences, kind = ends.words(run, status)
    return "".join(parts) + (theme.said(sentences, kind) if sentences else "") + ends.ways(run, status)


def _from_to(scores: list[tuple[float, float]]) -> str:
    values = [label_metrics.number(value) for _, value in (scores[0], scores[-1])]
    return " → ".join(values if len(scores) > 1 else values[:1])


def build() -> TrainTab:
    """Draws the tab; `app` wires it, as Start needs the other tabs' settings."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            gr.Markdown("## Settings")
            name = gr.Textbox(value="My first adapter", label="Name of the run", max_lines=1, elem_id="run-name")
            method = Form(MethodConfig)
            form = Form(
                TrainConfig, [s.name for s in settings(TrainConfig) if s.name != "max_length"]
            )  # stands in Data
            with gr.Accordion("Measure answers by a task", open=False, elem_id="measure-answers"):
                evaluation = Form(EvaluationSpec)
            with gr.Accordion("Sweep", open=False):
                sweep = gr.Textbox(
                    label="Settings to vary",
                    info="One a line, such as r = 4, 8, 16. Each combination becomes a run, and they train in turn.",
                    placeholder="r = 4, 8, 16\nlearning_rate = 1e-4, 1e-3",
                    lines=3,
                    elem_id="sweep",
                )
            chosen = gr.CheckboxGroup(
                [],
                label="GPUs",
                info="Each takes a batch of its own. None chosen: the device under More.",
                visible=False,
                elem_id="gpus",
            )
            part = forecast.draw()
            start = gr.Button("Start training", variant="primary", elem_id="start")
            gr.HTML(ends.BOX)
        with gr.Column(scale=7, min_width=320):
            gr.HTML('<div id="status"></div>')
            with gr.Row(elem_id="remedies"):
                helpful = [
                    gr.Button(visible=False, size="sm", min_width=140, elem_id=f"remedy-{place}")
                    for place in range(MOST_REMEDIES)
                ]
            with gr.Row(elem_id="actions"):
                buttons = {
                    action: gr.Button(
                        visible=False,
                        size="sm",
                        min_width=110,
                        elem_id=action,
                        variant="primary" if action == "resume" else "stop" if action == "kill" else "secondary",
                    )
                    for action in ACTIONS
                }
                number = gr.Number(
                    20, label="Steps more", precision=0, visible=False, min_width=110, elem_id="num-further"
                )
            gr.HTML('<div id="charts"></div>')
            with gr.Accordion("Worker's log", open=False):
                gr.HTML('<pre id="worker-log"></pre>')
    return TrainTab(start, name, sweep, form, method, evaluation, buttons, helpful, number, chosen, part)


def gpu_choices() -> Any:
    """Returns the choice of GPUs with the memory that is free on each now; unseen where there is none to make."""
    found = gpus()
    choices = [
        (f"{g.device} · {g.title} · {_gb(g.free_bytes)} of {_gb(g.total_bytes)} GB free", g.device) for g in found
    ]
    return gr.CheckboxGroup(choices=choices, visible=len(found) > 1)


def device_of(chosen: list[str]) -> str:
    """Returns the setting that names the chosen GPUs."""
    return ",".join(sorted(chosen, key=lambda name: int(name.partition(":")[2]))) or "auto"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"
