"""Overview: one number of every matrix, as a map of layers and matrices."""

from typing import Any

import gradio as gr

from core import Spectrum
from studio import theme
from studio.opened import Opened
from studio.tabs.spectrum.frame import Frame, show_figure

QUANTITIES = {
    "Effective rank": ("effective rank", lambda s: s.effective_rank),
    "Size ‖ΔW‖": ("‖ΔW‖_F", lambda s: s.norm),
    "Largest σ": ("σ₁", lambda s: float(s.sigma[0])),
    "Stable rank": ("stable rank", lambda s: s.stable_rank),
}


def overview(spectra: dict[str, Spectrum], quantity: str) -> str:
    """Returns the heat map layer × matrix of a quantity, as inline SVG."""
    from studio import figures  # matplotlib is not needed to serve the page

    unit, value = QUANTITIES[quantity]
    figure = figures.heat_figure({path: value(s) for path, s in spectra.items()}, title=quantity, unit=unit)
    return show_figure(figure, f"{quantity} by layer and matrix")


def summary(opened: Opened, spectra: dict[str, Spectrum]) -> str:
    """Returns HTML of the adapter as a whole."""
    mean = sum(s.effective_rank for s in spectra.values()) / len(spectra)
    loudest = max(spectra, key=lambda path: spectra[path].norm)
    return theme.facts(
        [
            ("Adapter", opened.name),
            ("Matrices", str(len(spectra))),
            ("r", _ranks(opened)),
            ("Effective rank, mean", f"{mean:.2f}"),
            ("Largest ‖ΔW‖ in", f"{loudest} ({spectra[loudest].norm:.3f})"),
        ]
    )


def _ranks(opened: Opened) -> str:
    ranks = sorted({factors.r for factors in opened.adapter.factors.values()})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def build(frame: Frame, tab: Any) -> None:
    """Draws the section in its `tab`."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            quantity = gr.Radio(list(QUANTITIES), value="Effective rank", label="Show by layer and matrix")
            heat = gr.HTML(elem_id="heat")
        with gr.Column(scale=5, min_width=320):
            gr.Markdown(
                "### The adapter as a whole\nHow many directions of its r it really uses, and where it is loud."
            )
            facts = gr.HTML(elem_id="spectrum-facts")

    def show(opened: Opened, kind: str) -> tuple[str, str]:
        spectra = {path: s for path, (_, s) in frame.studio.spectra(opened).items()}
        return summary(opened, spectra), overview(spectra, kind)

    frame.draws(tab, show, [quantity], [facts, heat], also=[quantity.change])
