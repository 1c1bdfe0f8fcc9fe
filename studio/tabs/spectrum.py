"""Spectrum: what ΔW learned, by its singular values, and how it lies towards W."""

from typing import Any

import gradio as gr

from core import Amplification, Spectrum, amplification, matrix_at, random_sigma
from studio import models, theme
from studio.runs import Run
from studio.state import Studio

QUANTITIES = {
    "Effective rank": ("effective rank", lambda s: s.effective_rank),
    "Size ‖ΔW‖": ("‖ΔW‖_F", lambda s: s.norm),
    "Largest σ": ("σ₁", lambda s: float(s.sigma[0])),
    "Stable rank": ("stable rank", lambda s: s.stable_rank),
}


def overview(spectra: dict[str, Spectrum], quantity: str) -> str:
    """Returns the heat map layer × matrix of a quantity, as inline SVG."""
    from studio import figures, svg  # matplotlib is not needed to serve the page

    unit, value = QUANTITIES[quantity]
    figure = figures.heat_figure({path: value(s) for path, s in spectra.items()}, title=quantity, unit=unit)
    return _framed(svg.to_svg(figure, f"{quantity} by layer and matrix"))


def summary(run: Run, spectra: dict[str, Spectrum]) -> str:
    """Returns HTML of the adapter as a whole."""
    mean = sum(s.effective_rank for s in spectra.values()) / len(spectra)
    loudest = max(spectra, key=lambda path: spectra[path].norm)
    dora = "DoRA also trained the length of each row: here stands its low-rank part, B·A, alone."
    return theme.facts(
        [
            ("Run", run.spec.name),
            ("Matrices", str(len(spectra))),
            ("r asked for", str(run.spec.lora.r)),
            ("Effective rank, mean", f"{mean:.2f}"),
            ("Largest ‖ΔW‖ in", f"{loudest} ({spectra[loudest].norm:.3f})"),
        ]
    ) + (theme.said(dora, "warn") if run.spec.lora.dora else "")


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


def build(studio: Studio, run_id: Any, selected: Any) -> None:
    """Draws the tab for the run that `run_id` holds; `selected` is the event that the tab is opened."""
    empty = theme.said("No adapter yet. Train one, and this page shows what it learned.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            quantity = gr.Radio(list(QUANTITIES), value="Effective rank", label="Show by layer and matrix")
            heat = gr.HTML(elem_id="heat")
        with gr.Column(scale=5, min_width=320):
            gr.Markdown(
                "### The adapter as a whole\nHow many directions of its r it really uses, and where it is loud."
            )
            facts = gr.HTML(empty, elem_id="spectrum-facts")
            again = gr.Button("Read the adapter again", size="sm")
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            with gr.Row():
                module = gr.Dropdown([], label="One matrix", elem_id="module", min_width=260, scale=3)
                scale = gr.Radio(["linear", "log"], value="linear", label="σ axis", min_width=170, scale=1)
            bars = gr.HTML(elem_id="sigma")
        with gr.Column(scale=5, min_width=320):
            gr.Markdown("### Does ΔW amplify what W already has?\nThe paper's §7.3, for this matrix.")
            about = gr.HTML()
            table = gr.HTML(elem_id="table-7")

    def spectra_of(run: str) -> tuple[Run, dict[str, Spectrum]] | None:
        if not run:
            return None
        found = studio.runs.get(run)
        if not found.has_adapter:
            return None
        return found, {path: s for path, (_, s) in studio.spectra(found).items()}

    def show(run: str, kind: str, chosen: str | None) -> tuple[Any, ...]:
        found = spectra_of(run)
        if found is None:
            return empty, "", gr.Dropdown(choices=[], value=None)
        opened, spectra = found
        chosen = chosen if chosen in spectra else max(spectra, key=lambda path: spectra[path].norm)
        return summary(opened, spectra), overview(spectra, kind), gr.Dropdown(choices=list(spectra), value=chosen)

    def show_heat(run: str, kind: str) -> str:
        found = spectra_of(run)
        return overview(found[1], kind) if found else ""

    def show_bars(run: str, chosen: str | None, axis: str) -> tuple[str, str]:
        if spectra_of(run) is None or not chosen:
            return "", ""
        from studio import figures, svg

        factors, found = studio.spectra(studio.runs.get(run))[chosen]
        figure = figures.sigma_figure(
            found.sigma.tolist(), random_sigma(factors).tolist(), log=axis == "log", title=chosen
        )
        return _framed(svg.to_svg(figure, f"Singular values of ΔW in {chosen}")), matrix_facts(found)

    def show_table(run: str, chosen: str | None) -> str:
        if spectra_of(run) is None or not chosen:
            return ""
        opened = studio.runs.get(run)
        factors, found = studio.spectra(opened)[chosen]
        holder, as_matrix = matrix_at(studio.skeleton(opened.spec.model), chosen)
        weight = as_matrix(models.read_weight(opened.spec.model, studio.workspace, holder))
        r = found.rank or None
        return table_7(
            {
                "ΔW": amplification(factors, weight, r, "delta"),
                "W": amplification(factors, weight, r, "weight"),
                "random": amplification(factors, weight, r, "random"),
            }
        )

    private: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None}
    gr.on(
        [selected, run_id.change, again.click],
        studio.guard(show),
        [run_id, quantity, module],
        [facts, heat, module],
        **private,
    )
    quantity.change(studio.guard(show_heat), [run_id, quantity], heat, **private)
    changed = [module.change, again.click]
    gr.on([*changed, scale.change], studio.guard(show_bars), [run_id, module, scale], [bars, about], **private)
    gr.on(changed, studio.guard(show_table), [run_id, module], table, **private)


def _framed(svg: str) -> str:
    return f'<div class="figure">{svg}</div>'
