"""Which adapter the Spectrum tab looks at, and which matrix of it: the run of the header, or one from files."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from core import LoRAError
from studio import links, theme
from studio.opened import Opened, Source
from studio.runs import no_update
from studio.state import Studio
from studio.tabs.spectrum.frame import PRIVATE

UPLOADS = "adapters"
"""The folder among the uploads that takes uploaded adapters, each in a folder of its own."""


def parse(path: str, scaling: Any, parts: str, model: str) -> Source:
    """Returns the source that the form describes.

    Raises:
        LoRAError: No place is named.
    """
    if not path.strip():
        raise LoRAError("`adapter` (='') must be a folder or a file; name one, or upload its files.")
    names = tuple(part.strip() for part in parts.split(",") if part.strip())
    return Source(path=path.strip(), scaling=scaling or None, parts=names, model=model.strip())


def keep_upload(files: list[str], folder: Path) -> Path:
    """Moves what a browser sent into a folder of its own; returns the file, or the folder of several.

    Args:
        files: The files where the server put them.
        folder: Where such folders lie.
    """
    folder.mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="adapter-", dir=folder))
    kept = [Path(shutil.move(file, place / Path(file).name)) for file in files]
    return kept[0] if len(kept) == 1 else place


def about(opened: Opened) -> str:
    """Returns HTML of what is looked at."""
    adapter = opened.adapter
    words = [f"Looking at “{opened.name}”: {len(adapter.factors)} matrices, {adapter.num_parameters:,} parameters."]
    if opened.model is None:
        named = f"{adapter.base_model} is not here" if adapter.base_model else "the files do not name it"
        words.append(f"Without its base model ({named}) only ΔW itself can be looked at; name the model to see W.")
    if adapter.magnitudes:
        words.append("DoRA also trained the length of each row: what follows is its low-rank part, B·A, alone.")
    return theme.said(words, "warn" if len(words) > 1 else "")


def build(studio: Studio, run_id: Any, seen: Any) -> tuple[Any, Any, Any, Any, Callable[..., Any], list[Any]]:
    """Draws the choices.

    Returns:
        `source`, `matrix`, `view` and `files` of `Frame`; a function that returns how a run, and a matrix of it, is
        shown; and the components that show it.
    """
    source, view, files, shown_of = gr.State(None), gr.State(None), gr.State(()), gr.State("")
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=280):
            said = gr.HTML(elem_id="looking-at")
            again = gr.Button("Read the adapter again", size="sm", elem_id="read-again")
        with gr.Column(scale=4, min_width=280):
            matrix = gr.Dropdown([], label="Matrix", elem_id="module")
    with gr.Accordion("Open another adapter …", open=False, elem_id="open-adapter") as form:
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                path = gr.Textbox(
                    label="Folder or file",
                    info="A folder in PEFT's layout, or one file of loralib's; in the workspace or an allowed folder.",
                    elem_id="adapter-path",
                )
                upload = gr.File(
                    label="or upload its files, all at once",
                    file_count="multiple",
                    type="filepath",
                    height=150,
                    elem_id="adapter-upload",
                )
            with gr.Column(scale=2, min_width=300):
                model = gr.Textbox(
                    label="Base model, to see W as well", info="Empty: the one that the files name, if it is here."
                )
                scaling = gr.Number(None, label="scaling = alpha / r", info="For loralib's files, which do not say it.")
                parts = gr.Textbox(label="Slices", info="For loralib's fused projections: q, v in GPT-2.")
        with gr.Row():
            open_it = gr.Button("Open", variant="primary", elem_id="open-files")
            back = gr.Button("Back to the run above")

    def of_run(run: str | None, module: str | None = None) -> Any:
        if not run or not studio.runs.get(run).has_adapter:
            words = (
                "No adapter yet. Train one, and here is what it learned: how many directions ΔW uses, where, and which."
            )
            return None, theme.said(words) + links.ways(train="Train one"), gr.skip()
        if not studio.runs.get(run).has_lora:
            return None, theme.said(no_update(studio.runs.get(run))), gr.skip()
        return look(Source(run), module)

    def look(wanted: Source, chosen: str | None) -> Any:
        place = studio.place_of(wanted)
        opened = studio.opened(wanted)
        spectra = studio.spectra(opened)
        chosen = chosen if chosen in spectra else max(spectra, key=lambda path: spectra[path][1].norm)
        return place, about(opened), gr.Dropdown(choices=list(spectra), value=chosen)

    def follow(run: str | None, before: str | None, place: Any, chosen: str | None) -> Any:
        if place is not None and (run == before or place[0].run == run):
            return run, *look(place[0], chosen)  # the tab is seen again, or the page was opened at a matrix of this run
        return run, *of_run(run)

    def read_again(run: str | None, place: Any, chosen: str | None) -> Any:
        return of_run(run) if place is None else look(place[0], chosen)

    def open_files(known: tuple[Source, ...], *values: Any) -> Any:
        wanted = parse(*values)
        return [*look(wanted, None), (*(one for one in known if one != wanted), wanted), gr.Accordion(open=False)]

    def see(place: Any, chosen: str | None) -> Any:
        return None if place is None or not chosen else (*place, chosen)

    def take(files: list[str]) -> str:
        return str(keep_upload(files, studio.workspace.uploads / UPLOADS))

    shown = [source, said, matrix]
    hidden = {"show_progress": "hidden", **PRIVATE}
    last = {"trigger_mode": "always_last", **hidden}
    gr.on(seen, studio.guard(follow), [run_id, shown_of, source, matrix], [shown_of, *shown], **last)
    again.click(studio.guard(read_again), [run_id, source, matrix], shown, **hidden)
    upload.upload(studio.guard(take), upload, path, **hidden)
    given = [files, path, scaling, parts, model]
    open_it.click(studio.guard(open_files), given, [*shown, files, form], **hidden)
    back.click(studio.guard(of_run), run_id, shown, **hidden)
    # Through the queue: of a State that is set past it no page is told.
    gr.on([source.change, matrix.change], studio.guard(see), [source, matrix], view, **hidden)
    return source, matrix, view, files, of_run, shown
