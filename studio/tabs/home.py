"""Take home: a run's adapter for other tools, checked before it is written; and adapters and runs brought in."""

import shutil
import tempfile
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from core import LoRAError, quoted
from studio import beside, capsule, certificate, export, export_jobs, imports, links, markup, theme
from studio.checkpoints import ADAPTER_FILES
from studio.export import DTYPES, KINDS, Choice
from studio.export_jobs import Job
from studio.model_files import STARTER
from studio.runs import Run, no_update
from studio.state import Studio

LOOK_SECONDS = 1.5
OWN = "As it is"

_ENDS = {
    "done": "Done",
    "refused": "Stopped: the certificate is red",
    "failed": "Failed",
    "cancelled": "Cancelled",
    "interrupted": "Broken off: the machine or the process went down. Export again; it starts anew.",
}


def view(run: Run | None) -> str:
    """Returns HTML of a run's exports: the newest in full, and the last certificate where nothing was exported."""
    if run is None:
        return theme.said("No run is chosen. Train one, or bring one in below.") + links.ways(train="Train one")
    if not run.has_adapter:
        return theme.said("This run has no adapter yet; it is saved at the first evaluation and at the end.")
    if not run.has_lora:
        return theme.said(no_update(run))
    jobs = export_jobs.jobs_of(run)
    if not jobs:
        report = capsule.certificate_of(run)
        words = theme.said(f"“{run.spec.name}” was not exported yet.")
        return words + (certificate.card(report) if report else "")
    return newest(jobs[0]) + others(jobs[1:])


def newest(job: Job) -> str:
    """Returns HTML of an export: what it does or how it ended, and its certificate."""
    status, lines = job.status, job.lines()
    notes = [line["note"] for line in lines if "note" in line]
    title = f"<strong>{escape(_name(job))}</strong> "
    if status == "running":
        steps = "".join(f"<li>{escape(note)}</li>" for note in notes[:-1])
        now = f'<li aria-current="step"><b>{escape(notes[-1] if notes else "Starting")} …</b></li>'
        return f'{title}{theme.chip("running")}<ol class="steps">{steps}{now}</ol>'
    made = job.result
    words = [_ENDS[status]]
    if status == "done" and made is not None:
        words = [f"Done: {made} ({_words(_size(made))})"]
    words += [line["problem"] for line in lines[-1:] if "problem" in line and status != "refused"]
    kind = "good" if status == "done" else "error" if status in ("refused", "failed") else "warn"
    report = job.report
    return title + theme.said(words, kind) + (certificate.card(report) if report else "")


def others(jobs: list[Job]) -> str:
    """Returns HTML of earlier exports, a line each."""
    if not jobs:
        return ""
    lines = "".join(
        f"<tr><td>{escape(_name(job))}</td><td>{escape(_ENDS.get(job.status, job.status).partition(':')[0])}</td></tr>"
        for job in jobs
    )
    return markup.table("<tr><th>Other exports of this run</th><th>State</th></tr>", lines)


def link(file: Path) -> str:
    """Returns HTML of a link that hands out a file of the workspace's downloads."""
    words = f"{file.name} ({_words(file.stat().st_size)})"
    place = f"gradio_api/file={quote(str(file))}"
    return f'<p class="download"><a href="{escape(place)}" download="{escape(file.name)}">↓ {escape(words)}</a></p>'


def bring_in(studio: Studio, paths: list[str], model: str, scaling: str, parts: str) -> tuple[list[Run], str]:
    """Makes runs of what was dropped; returns them, and what to say.

    Raises:
        LoRAError: It is nothing that can be brought in, does not fit the base, or names places that pages may not open.
    """
    if not paths:
        raise LoRAError("`file` (=nothing) must be dropped first: a capsule, a PEFT adapter, or loralib's file.")
    files = [Path(path) for path in paths]
    if all(map(imports.is_capsule, files)):
        restored = _restored(studio, files)
        names = " and ".join(f"“{run.spec.name}”" for run in restored)
        its = "its capsule, with its losses and its adapter" if len(restored) == 1 else "their capsules"
        return restored, f"Restored {names} from {its}."
    studio.check_model(model)
    slices = tuple(part.strip() for part in parts.split(",")) if parts.strip() else None
    with tempfile.TemporaryDirectory() as scratch:
        source = files[0]
        if {file.name for file in files} == set(ADAPTER_FILES):
            source = Path(scratch) / "Adapter"
            source.mkdir()
            for file in files:
                shutil.copyfile(file, source / file.name)
        elif len(files) > 1:
            raise LoRAError(f"Of several files, they must be {' and '.join(ADAPTER_FILES)}; drop one thing at a time.")
        run = imports.take(studio.runs, source, model, scaling=_number(scaling), parts=slices)
    return [run], f"Brought in “{run.spec.name}”: its matrices fit {model}. It was not trained here."


def build(
    studio: Studio,
    run_id: Any,
    seen: Any,
    choices: Any,
    elsewhere: list[Any],
    show_pair: Callable[[Run, Run], list[Any]],
) -> None:
    """Draws the tab.

    Args:
        studio: What is served.
        run_id: The header's list of runs.
        seen: The event at which it is drawn.
        choices: Returns what the list offers with a run chosen.
        elsewhere: The tabs, and what shows two adapters beside each other there.
        show_pair: Returns what the latter are set to.
    """
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            gr.Markdown(
                "## Take it home\nThe run in the header, for other tools; opened again before it counts as done."
            )
            kinds = [(words, key) for key, words in KINDS.items()]
            kind = gr.Radio(kinds, value="adapter", label="As", elem_id="export-kind", elem_classes="stacked")
            dtype = gr.Dropdown(
                [OWN],
                value=OWN,
                label="Type of the weights",
                interactive=False,
                filterable=False,
                elem_id="export-dtype",
            )
            force = gr.Checkbox(False, label="Write it even if the certificate is red", elem_id="export-force")
            with gr.Row(elem_classes="tight"):
                begin = gr.Button("Export", variant="primary", elem_id="export-start")
                cancel = gr.Button("Cancel", interactive=False, elem_id="export-cancel")
                ready = gr.Button("Prepare download", interactive=False, elem_id="export-pack")
            gr.Markdown(
                "A capsule is one file with settings, losses, certificate, adapter, saved transcripts and votes; drop "
                "it below, or elsewhere."
            )
            with gr.Row(elem_classes="tight"):
                whole = gr.Button("Make a capsule", elem_id="capsule")
            links = gr.HTML(elem_id="export-links")
        with gr.Column(scale=6, min_width=320):
            shown = gr.HTML(elem_id="exports")
    timer = gr.Timer(LOOK_SECONDS, active=False)
    gr.Markdown("## Bring one in\nIt is checked before it is listed. Drop two capsules to compare them.")
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            dropped = gr.File(
                file_count="multiple",
                label="A capsule, a PEFT adapter (zip, or its two files), or loralib's file",
                elem_id="import-file",
            )
        with gr.Column(scale=6, min_width=320):
            model = gr.Textbox(
                STARTER, label="Base model", info="Of an adapter; a capsule names its own.", elem_id="import-model"
            )
            with gr.Row():
                info = "Of loralib's files, which do not name it."
                scaling = gr.Textbox("", label="alpha / r", info=info)
                parts = gr.Textbox("", label="Slices", info="Of fused projections there: q, v in GPT-2.")
            with gr.Row(elem_classes="tight"):
                take = gr.Button("Bring it in", variant="primary", elem_id="import")
            said = gr.HTML(elem_id="import-said")
    pair = gr.State(())
    with gr.Column(visible=False) as both:
        with gr.Row(elem_classes="tight"):
            compare = gr.Button("Compare what they learned", variant="primary", elem_id="compare-pair")
        compared = gr.HTML(elem_id="pair")

    def state(run: str | None) -> tuple[Any, ...]:
        found = studio.runs.get(run) if run else None
        jobs = export_jobs.jobs_of(found) if found else []
        status = jobs[0].status if jobs else ""
        return (
            view(found),
            gr.Button(interactive=bool(found and found.has_lora and status != "running")),
            gr.Button(interactive=status == "running"),
            gr.Button(interactive=status == "done"),
            gr.Timer(active=status == "running"),
        )

    def show(run: str | None) -> tuple[Any, ...]:
        return *state(run), ""

    def types(chosen: str) -> Any:
        return gr.Dropdown([OWN, *DTYPES[chosen]], value=OWN, interactive=bool(DTYPES[chosen]))

    def start(run: str | None, chosen: str, wanted: str, forced: bool) -> tuple[Any, ...]:
        found = _chosen(studio, run)
        studio.check_model(found.spec.model)
        choice = Choice(chosen, "" if wanted == OWN else wanted, bool(forced))
        export.check(found, studio.workspace, choice)
        export_jobs.start(found, choice)
        return *state(run), ""

    def end_export(run: str | None) -> tuple[Any, ...]:
        for job in export_jobs.jobs_of(_chosen(studio, run))[:1]:
            job.cancel()
        return state(run)

    def pack(run: str | None) -> str:
        return link(export_jobs.pack(export_jobs.jobs_of(_chosen(studio, run))[0], studio.workspace.downloads))

    def make_capsule(run: str | None) -> str:
        found = _chosen(studio, run)
        return link(capsule.write(found, studio.workspace.downloads / f"{found.id}-capsule.zip"))

    def accept(paths: list[str] | None, base: str, factor: str, slices: str) -> tuple[Any, ...]:
        runs, words = bring_in(studio, paths or [], base.strip(), factor or "", slices or "")
        two = runs[:2] if len(runs) > 1 else []
        return (
            theme.said(words, "good"),
            choices(studio, runs[0]),
            None,
            [run.id for run in two],
            gr.Column(visible=bool(two)),
            gr.Button(visible=all(run.has_adapter for run in two)),
            beside.view(*two) if two else "",
        )

    def compare_pair(ids: list[str]) -> list[Any]:
        first, second = (studio.runs.get(one) for one in ids)
        return [choices(studio, first), gr.Tabs(selected="spectrum"), *show_pair(first, second)]

    # The tab may be opened before the list of runs is there: its coming must not be passed over.
    last: dict[str, Any] = {"trigger_mode": "always_last"}
    private: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}
    outputs = [shown, begin, cancel, ready, timer]
    gr.on(seen, studio.guard(show), run_id, [*outputs, links], **last, **private)
    timer.tick(studio.guard(state), run_id, outputs, **private)
    kind.change(studio.guard(types), kind, dtype, **private)
    begin.click(studio.guard(start), [run_id, kind, dtype, force], [*outputs, links], **private)
    cancel.click(studio.guard(end_export), run_id, outputs, **private)
    slow: dict[str, Any] = private | {"show_progress": "minimal"}
    ready.click(studio.guard(pack), run_id, links, **slow)
    whole.click(studio.guard(make_capsule), run_id, links, **slow)
    take.click(
        studio.guard(accept),
        [dropped, model, scaling, parts],
        [said, run_id, dropped, pair, both, compare, compared],
        **slow,
    )
    compare.click(studio.guard(compare_pair), pair, [run_id, *elsewhere], **slow)


def _restored(studio: Studio, files: list[Path]) -> list[Run]:
    """Returns runs made from capsules: of all, or, where one is refused, of none."""
    made: list[Run] = []
    try:
        for file in files:
            made.append(capsule.restore(studio.runs, file, studio.check_places))
    except LoRAError:
        for run in made:
            studio.runs.delete(run)
        raise
    return made


def _chosen(studio: Studio, run: str | None) -> Run:
    if not run:
        raise LoRAError("`run` (=nothing) must be chosen; choose one in the header.")
    return studio.runs.get(run)


def _name(job: Job) -> str:
    return KINDS[job.choice.kind] + (f" · {job.choice.dtype}" if job.choice.dtype else "")


def _number(text: str) -> float | None:
    try:
        return float(text) if text.strip() else None
    except ValueError:
        raise LoRAError(f"`alpha / r` (={quoted(text)}) must be a number, such as 2.") from None


def _words(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _size(made: Path) -> int:
    return made.stat().st_size if made.is_file() else sum(file.stat().st_size for file in made.iterdir())
