"""The paper's experiments, in the Runs tab: what each asks, how far it is, and what it found."""

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from studio import markup, theme
from studio.data import DataSpec
from studio.experiments.base import SIZES, Asked, Experiment, Result, Table
from studio.experiments.conduct import Conduct, named, start
from studio.experiments.registry import EXPERIMENTS
from studio.model_files import STARTER
from studio.specs import RunSpec
from studio.state import Studio
from studio.workspace import write_whole

LOOK_SECONDS = 2.0
_FIRST = next(iter(EXPERIMENTS))
_SOURCE = "starter:restaurants"
_ENDS = {
    "done": "",
    "cancelled": "Cancelled: the run that was being trained is saved. “Go on” takes it up from there.",
    "interrupted": "Broken off: the machine or the process went down. “Go on” does what is not done.",
    "failed": "Failed. “Go on” does what is not done.",
}


@dataclass(frozen=True)
class View:
    """What is seen of an experiment.

    Attributes:
        about: HTML of its question and how far it is.
        result: HTML of what it found so far.
        status: That of its process; "" where it was never started.
        markdown: The result as a file; "" where nothing is done.
    """

    about: str
    result: str
    status: str
    markdown: str = ""


def look(conduct: Conduct) -> View:
    """Returns what is seen of an experiment as it was asked for.

    Raises:
        LoRAError: The model or the data cannot be read.
    """
    status = conduct.status if (conduct.folder / "job.json").is_file() else ""
    result, done, of = conduct.result()
    lines = [question(conduct.experiment)]
    if status == "running":
        notes = [line["note"] for line in conduct.lines() if "note" in line]
        lines.append(theme.progress(done, of, "pieces are done"))
        lines.append(f'<p class="sub-line">{escape(notes[-1] if notes else "Starting")} …</p>')
    elif 0 < done < of or status not in ("", "done"):
        problem = [line["problem"] for line in conduct.lines()[-1:] if "problem" in line]
        words = [*filter(None, [_ENDS.get(status, "")]), *problem, f"{done} of {of} pieces are done."]
        lines.append(theme.said(words, {"done": "good", "failed": "error"}.get(status, "warn")))
    if not done:
        empty = f"Nothing was measured yet: it has {of} pieces, each kept as soon as it is done. " + (
            "Press Start; the page may be closed meanwhile."
            if status != "running"
            else "The first is being worked on, and is listed here when it is done."
        )
        return View("".join(lines), theme.said(empty), status)
    return View("".join(lines), told(conduct.experiment, result), status, conduct.markdown())


def mark(conduct: Conduct) -> tuple[str, str, int]:
    """Returns what changes whenever there is something else to be seen: cheap, where `look` is not."""
    return conduct.wanted.key, conduct.status, len(conduct.lines())


def question(experiment: Experiment) -> str:
    """Returns HTML of what an experiment asks, and where the paper has it."""
    place = f"The paper's {experiment.paper[0].lower()}{experiment.paper[1:]}"
    return f'<p class="asks">{escape(experiment.question)} <span class="sub-line">{escape(place)}</span></p>'


def told(experiment: Experiment, result: Result) -> str:
    """Returns HTML of what was found: findings, figure, tables, and what differs from the paper."""
    from studio.svg import to_svg  # which brings matplotlib: it is not needed to serve the page

    parts = [theme.said(list(result.findings))] if result.findings else []
    if result.figure is not None:
        parts.append(f'<div class="figure">{to_svg(result.figure(), experiment.title)}</div>')
    parts += [table(each) for each in result.tables if each.rows]
    differs = experiment.differs[0].upper() + experiment.differs[1:]
    return "".join([*parts, f'<p class="sub-line">What differs from the paper: {escape(differs)}</p>'])


def table(shown: Table) -> str:
    """Returns a table as HTML."""

    def row(cells: Any, tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(row(cells, "td") for cells in shown.rows)
    return f"<h3>{escape(shown.title)}</h3>{markup.table(row(shown.head, 'th'), body)}"


def build(studio: Studio) -> None:
    """Draws the section."""
    with gr.Accordion("The paper's experiments", open=False, elem_id="experiments") as section, gr.Row():
        with gr.Column(scale=4, min_width=300):
            offered = [(f"{e.title} ({e.paper})", e.name) for e in EXPERIMENTS.values()]
            name = gr.Dropdown(offered, value=_FIRST, label="Experiment", filterable=False, elem_id="experiment")
            sizes = [(f"{size}: {words}", size) for size, words in SIZES.items()]
            size = gr.Radio(sizes, value="small", label="Size", elem_id="experiment-size", elem_classes="stacked")
            with gr.Accordion("Another model or data", open=False):
                model = gr.Textbox("", label="Model", info="Empty for the experiment's own.", max_lines=1)
                info = "A data set; for labels a folder of GLUE's. Empty for the starter's."
                data = gr.Textbox("", label="Data", info=info, max_lines=1)
            with gr.Row(elem_classes="tight"):
                begin = gr.Button("Start", variant="primary", elem_id="experiment-start")
                cancel = gr.Button("Cancel", interactive=False, elem_id="experiment-cancel")
                file = gr.DownloadButton("Result (Markdown)", interactive=False, elem_id="experiment-file")
        with gr.Column(scale=7, min_width=300):
            about = gr.HTML(elem_id="experiment-about")
            result = gr.HTML(elem_id="experiment-result")
    timer = gr.Timer(LOOK_SECONDS, active=False)
    seen = gr.State(())

    def of(*asked: str) -> Conduct:
        wanted = Asked(*(one.strip() for one in asked))  # type: ignore[arg-type]
        named(wanted.name)
        studio.check_places(RunSpec(model=wanted.model or STARTER, data=DataSpec(source=wanted.data or _SOURCE)))
        return Conduct(studio.workspace, wanted)

    def turn(chosen: str) -> tuple[str, str]:
        return question(named(chosen)), ""  # at once: what it found may take seconds to read

    def show(*asked: str) -> tuple[Any, ...]:
        conduct = of(*asked)
        view = look(conduct)
        made = studio.workspace.downloads / f"experiment-{conduct.wanted.key}.md"
        if view.markdown:
            write_whole(made, view.markdown.encode())
        running = view.status == "running"
        return (
            view.about,
            view.result,
            gr.Button("Start" if view.status in ("", "done") else "Go on", interactive=not running),
            gr.Button(interactive=running),
            gr.DownloadButton(value=str(made) if view.markdown else None, interactive=bool(view.markdown)),
            gr.Timer(active=running),
            mark(conduct),
        )

    def watch(before: tuple[str, str, int], *asked: str) -> Any:
        return gr.skip() if mark(of(*asked)) == tuple(before) else show(*asked)

    def started(*asked: str) -> tuple[Any, ...]:
        conduct = of(*asked)
        start(studio.workspace, conduct.wanted)
        return show(*asked)

    def ended(*asked: str) -> tuple[Any, ...]:
        of(*asked).cancel()
        return show(*asked)

    inputs, outputs = [name, size, model, data], [about, result, begin, cancel, file, timer, seen]
    private: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}
    last: dict[str, Any] = {"trigger_mode": "always_last"}
    changed = [section.expand, name.change, size.change, model.submit, data.submit, model.blur, data.blur]
    first = gr.on(changed, studio.guard(turn), name, [about, result], queue=False, **last, **private)
    shown = first.then(studio.guard(show), inputs, outputs, **private)
    # A slow one may end after one that was chosen later: what is shown is made that of the choice.
    shown.then(studio.guard(watch), [seen, *inputs], outputs, **private)
    timer.tick(studio.guard(watch), [seen, *inputs], outputs, **private)
    slow: dict[str, Any] = private | {"show_progress": "minimal"}
    begin.click(studio.guard(started), inputs, outputs, **slow)
    cancel.click(studio.guard(ended), inputs, outputs, **private)
