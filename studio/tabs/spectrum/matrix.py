"""One matrix: its singular values, and how ΔW lies towards W."""

from typing import Any

import gradio as gr

from core import Amplification, Spectrum, amplification, random_sigma
from studio import theme
from studio.opened import Opened
from studio.tabs.spectrum.frame import Frame, show_figure


def matrix_facts(found: Spectrum) -> str:
    """Returns HTML of one matrix's figures."""
    return theme.facts(
        [
            ("Shape of ΔW", f"{found.U.shape[0]} × {found.V.shape[0]}"),
            ("r", str(len(found.sigma))),
            ("Rank", str(found.rank)),
            ("Effective rank", f"{found.effective_rank:.2f}"),
            ("Stable rank", f"{found.stable_rank:.2f}"),
            ("Directions with 90 % of ‖ΔW‖²", str(found.rank_for_energy(0.9))),
        ]
    )


def table_7(columns: dict[str, Amplification | None]) -> str:
    """Returns HTML of the paper's Table 7 for one matrix, with the level of chance beside it."""
    known = [a for a in columns.values() if a is not None]
    if not known:
        return theme.said("ΔW is zero here: B has not moved, so there are no directions to follow.", "warn")
    one = known[0]

    def row(title: str, cells: list[str]) -> str:
        return f"<tr><th scope='row'>{title}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"

    def cell(value: float | None, digits: int = 3) -> str:
        return "–" if value is None else f"{value:,.{digits}f}"

    head = "".join(f"<th scope='col'>{title}</th>" for title in columns)
    body = (
        row("‖Uᵀ W V‖", [cell(a and a.projected_norm) for a in columns.values()])
        + row("chance level", [cell(a and a.null) for a in columns.values()])
        + row("enrichment (× chance)", [cell(a and a.enrichment, 2) for a in columns.values()])
        + row("‖ΔW‖ / ‖Uᵀ W V‖", [cell(a and a.factor, 2) for a in columns.values()])
    )
    delta = columns["ΔW"]
    words = [f"‖W‖ = {one.weight_norm:.3f}, ‖ΔW‖ = {one.delta_norm:.3f}; the top r = {one.r} directions on each side."]
    if delta is not None and delta.factor is not None and delta.enrichment is not None:
        words.append(
            f"ΔW amplifies its directions by {delta.factor:.2f}; they hold {delta.enrichment:.2f} times as much of W "
            "as random ones would. Well above 1: W had them already, only weakly. Near 1: they are new to W."
        )
    words.append("Paper, GPT-3, r = 4: ΔW 0.32, W 21.67, random 0.02; amplification 21.5, enrichment 15.9 (Table 7).")
    return (
        f'<div class="scroll-x"><table class="plain"><thead><tr><th scope="col">U, V from</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{theme.said(words)}"
    )


def build(frame: Frame, tab: Any) -> None:
    """Draws the section in its `tab`."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            scale = gr.Radio(["linear", "log"], value="linear", label="σ axis", min_width=170)
            bars = gr.HTML(elem_id="sigma")
        with gr.Column(scale=5, min_width=320):
            gr.Markdown("### Does ΔW amplify what W already has?\nThe paper's §7.3, for this matrix.")
            about = gr.HTML()
            table = gr.HTML(elem_id="table-7")

    def show_bars(opened: Opened, path: str, axis: str) -> tuple[str, str]:
        from studio import figures

        factors, found = frame.studio.spectra(opened)[path]
        figure = figures.sigma_figure(
            found.sigma.tolist(), random_sigma(factors).tolist(), log=axis == "log", title=path
        )
        return show_figure(figure, f"Singular values of ΔW in {path}"), matrix_facts(found)

    def show_table(opened: Opened, path: str) -> str:
        factors, found = frame.studio.spectra(opened)[path]
        weight = frame.studio.weight(opened, path)
        r = found.rank or None
        return table_7(
            {
                "ΔW": amplification(factors, weight, r, "delta"),
                "W": amplification(factors, weight, r, "weight"),
                "random": amplification(factors, weight, r, "random"),
            }
        )

    frame.draws(tab, show_bars, [scale], [bars, about], by_matrix=True, also=[scale.change])
    frame.draws(tab, show_table, [], [table], by_matrix=True)
