"""Overview: one number of every matrix, as a map of layers and matrices."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from core import Amplification, Factors, LoRAError, Spectrum, random_sigma
from studio import theme
from studio.opened import Opened
from studio.pictures import Picture, recipe
from studio.state import Studio
from studio.tabs.spectrum.frame import PRIVATE, Frame

_FACTORED = """B is {out} × {r}, A is {r} × {width}, scaling {scaling:g}; ΔW = scaling · B·A is never formed
B = Q_B·R_B and Aᵀ = Q_A·R_A, by QR; σ = svd(scaling · R_B·R_Aᵀ), {r} × {r}"""


@dataclass(frozen=True)
class Quantity:
    """A number that every matrix has.

    Attributes:
        unit: For the colour bar.
        code: How it is written, of a spectrum `s` or an amplification `a`.
        value: The same as a function.
        maths: Its definition.
        needs_weight: Whether it is one of an amplification.
        chance: Words for its level of chance; "spectrum" where that is the number of a random spectrum.
    """

    unit: str
    code: str
    value: Callable[[Any], float | None]
    maths: str
    needs_weight: bool = False
    chance: str = ""


QUANTITIES = {
    "Effective rank": Quantity(
        "effective rank",
        "s.effective_rank",
        lambda s: s.effective_rank,
        "effective rank = exp(−Σ p·ln p) with p = σ / Σσ (Roy and Vetterli 2007)",
        chance="spectrum",
    ),
    "Size ‖ΔW‖": Quantity("‖ΔW‖_F", "s.norm", lambda s: s.norm, "‖ΔW‖_F = √Σσ²"),
    "Largest σ": Quantity(
        "σ₁", "float(s.sigma[0])", lambda s: float(s.sigma[0]), "σ₁ = max ‖ΔW·x‖ over ‖x‖ = 1", chance="spectrum"
    ),
    "Stable rank": Quantity(
        "stable rank", "s.stable_rank", lambda s: s.stable_rank, "stable rank = ‖ΔW‖_F² / σ₁²", chance="spectrum"
    ),
    "Size beside W": Quantity(
        "‖ΔW‖_F / ‖W‖_F",
        "a.delta_norm / a.weight_norm",
        lambda a: a.delta_norm / a.weight_norm if a.weight_norm else None,
        "‖ΔW‖_F / ‖W‖_F",
        needs_weight=True,
    ),
    "Enrichment": Quantity(
        "‖UᵀWV‖ over chance",
        "a.enrichment",
        lambda a: a.enrichment,
        "‖Uᵀ·W·V‖_F with ΔW's own U, V, over its level of chance, r·‖W‖_F / √(out·in):\n"
        "above 1, ΔW's directions are W's own, too; near 1, they are new to it",
        needs_weight=True,
        chance="chance: 1",
    ),
}


def chance_note(spectra: Mapping[str, tuple[Factors, Spectrum]], quantity: Quantity) -> str:
    """Returns words for the level of chance of a quantity; "" where it has none.

    That of a spectrum is the same number of Gaussian factors with the same shapes and ‖ΔW‖.
    """
    if quantity.chance != "spectrum":
        return quantity.chance
    shapes = {(f.shape, f.r): f for f, s in spectra.values() if s.norm}
    units = {}
    for key, f in shapes.items():
        sigma = random_sigma(f)
        units[key] = sigma / sigma.norm()
    levels = [quantity.value(Spectrum(units[f.shape, f.r] * s.norm, f)) for f, s in spectra.values() if s.norm]
    known = [level for level in levels if level is not None]
    if not known:
        return ""
    low, high = f"{min(known):.3g}", f"{max(known):.3g}"
    return f"chance: {low}" if low == high else f"chance: {low} to {high}"


def overview(
    title: str, values: Mapping[str, float | None], note: str, factors: Mapping[str, Factors], code: str
) -> Picture:
    """Returns the heat map layer × matrix of a quantity.

    Args:
        title: Of `QUANTITIES`.
        values: Path → the quantity there.
        note: Words for the level of chance.
        factors: Path → factors.
        code: What makes the map anew.
    """
    from studio import figures

    quantity = QUANTITIES[title]
    figure = figures.heat_figure(values, title=title, unit=quantity.unit, note=note)
    path = max(values, key=lambda path: values[path] or 0)
    f = factors[path]
    shapes = {"out": f.shape[0], "width": f.shape[1], "r": f.r, "scaling": f.scaling}
    maths = f"{quantity.maths}\n\nIn {path}:\n{_FACTORED.format(**shapes)}"
    numbers = {"matrix": list(values), quantity.unit: [float("nan") if v is None else v for v in values.values()]}
    return Picture(f"{title} by layer and matrix", figure, numbers=numbers, maths=maths, notebook=code)


def code_of(opened: Opened, studio: Studio, title: str, note: str) -> str:
    """Returns what makes the map of a quantity anew."""
    quantity = QUANTITIES[title]
    if quantity.needs_weight:
        lines = [
            "from core import amplification",
            "from studio import figures",
            "from studio.opened import read_matrix",
            "",
            "",
            "values = {}",
            "for path, factors in adapter.factors.items():",
            f"    a = amplification(factors, read_matrix({opened.model!r}, workspace, path))",
            f"    values[path] = None if a is None else {quantity.code}",
        ]
    else:
        lines = [
            "from core import spectra",
            "from studio import figures",
            "",
            "",
            f"values = {{path: {quantity.code} for path, s in spectra(adapter.factors).items()}}",
        ]
    named = f"title={title!r}, unit={quantity.unit!r}, note={note!r}"
    return recipe(opened, studio.workspace, *lines, f"figure = figures.heat_figure(values, {named})", "figure")


def summary(opened: Opened, spectra: Mapping[str, Spectrum]) -> str:
    """Returns HTML of the adapter as a whole."""
    mean = sum(s.effective_rank for s in spectra.values()) / len(spectra)
    loudest = max(spectra, key=lambda path: spectra[path].norm)
    return theme.facts(
        [
            ("Adapter", opened.name),
            ("Matrices", str(len(spectra))),
            ("r", _ranks(opened)),
            ("Effective rank, mean", f"{mean:.2f}"),
        ]
    ) + theme.said(f"Largest ‖ΔW‖, {spectra[loudest].norm:.3f}, in {loudest}.")


def _ranks(opened: Opened) -> str:
    ranks = sorted({factors.r for factors in opened.adapter.factors.values()})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def build(frame: Frame, tab: Any) -> None:
    """Draws the section in its `tab`."""
    studio = frame.studio
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            quantity = gr.Radio(list(QUANTITIES), value="Effective rank", label="Show by layer and matrix")
            heat = frame.picture("heat")
        with gr.Column(scale=5, min_width=320):
            gr.Markdown(
                "## The adapter as a whole\nHow many directions of its r it really uses, and where it is loud. "
                "A click on a cell opens that matrix."
            )
            facts = gr.HTML(elem_id="spectrum-facts")
            going = gr.HTML(elem_id="overview-progress")
            cancel = gr.Button("Cancel", size="sm", visible=False)

    def show(opened: Opened, title: str) -> Iterator[list[Any]]:
        spectra = studio.spectra(opened)
        factors = {path: f for path, (f, _) in spectra.items()}
        told = summary(opened, {path: s for path, (_, s) in spectra.items()})
        quantity = QUANTITIES[title]
        problem = ""
        if quantity.needs_weight:
            yield [told, "", theme.progress(0, len(factors), "matrices"), gr.Button(visible=True)]
            found: Mapping[str, Amplification | LoRAError | None] = {}
            for found in studio.amplifications(opened):
                if len(found) % 8 == 0:
                    yield [told, gr.skip(), theme.progress(len(found), len(factors), "matrices"), gr.skip()]
            values = {p: quantity.value(a) if isinstance(a, Amplification) else None for p, a in found.items()}
            errors = [str(a) for a in found.values() if isinstance(a, LoRAError)]
            problem = theme.said(f"{len(errors)} without a value: {errors[0]}", "warn") if errors else ""
        else:
            values = {path: quantity.value(s) for path, (_, s) in spectra.items()}
        note = chance_note(spectra, quantity)
        picture = overview(title, values, note, factors, code_of(opened, studio, title, note))
        yield [told, frame.put(picture), problem, gr.Button(visible=False)]

    def open_matrix(event: gr.EventData) -> Any:
        return event.name, gr.Tabs(selected="matrix")

    outputs = [facts, heat, going, cancel]
    drawing = frame.draws(tab, show, [quantity], outputs, also=[quantity.change], show_progress="hidden")
    cancel.click(
        lambda: ("", gr.Button(visible=False)), None, [going, cancel], cancels=[drawing], queue=False, **PRIVATE
    )
    heat.pointed(
        studio.guard(open_matrix), None, [frame.matrix, frame.sections], show_progress="hidden", queue=False, **PRIVATE
    )
