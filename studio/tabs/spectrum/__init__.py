"""Spectrum: what an adapter's ΔW learned, in sections of which each is a file of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio import links
from studio.runs import Run
from studio.state import Studio
from studio.tabs.spectrum import chooser, compare, intruding, matrix, operating, overview, past, reading
from studio.tabs.spectrum.frame import JS, PRIVATE, Frame

__all__ = ["JS", "Pair", "SpectrumTab", "build"]


@dataclass(frozen=True)
class Pair:
    """How another tab shows two runs in the section Compare.

    Attributes:
        outputs: What an event sets.
        show: show(first, second) returns what it sets them to, once the first is the run that is looked at.
    """

    outputs: list[Any]
    show: Callable[[Run, Run], list[Any]]


@dataclass(frozen=True)
class SpectrumTab:
    """The tab's parts that others use.

    Attributes:
        sections: The `gr.Tabs` of the sections.
        pair: How another tab shows two runs.
        outputs: What an event sets that opens one view.
        open: open(run, section, module) returns what it sets them to; "" is what would be shown anyway.
    """

    sections: Any
    pair: Pair
    outputs: list[Any]
    open: Callable[[str, str, str], list[Any]]


def build(studio: Studio, run_id: Any, head: Any) -> SpectrumTab:
    """Draws the tab for the run that `run_id` holds; `head` is the page's, with `links.JS` and `JS`."""
    seen = links.event(head, "see_spectrum")
    source, chosen, view, files, of_run, shown = chooser.build(studio, run_id, seen)
    with gr.Column(visible=False) as body, gr.Tabs(elem_id="sections") as sections:
        frame = Frame(studio, source, chosen, view, files, head, sections)
        with gr.Tab("Overview", id="overview") as tab:
            overview.build(frame, tab)
        with gr.Tab("One matrix", id="matrix") as tab:
            matrix.build(frame, tab)
        with gr.Tab("Time machine", id="past") as tab:
            past.build(frame, tab)
        with gr.Tab("Reads and writes", id="reading") as tab:
            reading.build(frame, tab)
        with gr.Tab("Compare", id="compare") as tab:
            other = compare.build(frame, tab)
        with gr.Tab("Rank surgery", id="operating") as tab:
            operating.build(frame, tab)
        with gr.Tab("Intruders", id="intruders") as tab:
            intruding.build(frame, tab)
    frame.follow()
    is_open: dict[str, Any] = {"queue": False, "show_progress": "hidden", **PRIVATE}
    source.change(lambda place: gr.Column(visible=place is not None), source, body, **is_open)
    pair = Pair([sections, other], lambda a, b: [gr.Tabs(selected="compare"), compare.choice(studio, a, b)])

    def open_at(run: str, name: str, module: str) -> list[Any]:
        return [*of_run(run, module), gr.Tabs(selected=name) if name else gr.skip()]

    return SpectrumTab(sections, pair, [*shown, sections], open_at)
