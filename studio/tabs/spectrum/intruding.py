"""Intruders: strong directions of W + ΔW that are none of W's, and what damping them does to two losses."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import gradio as gr

from core import Adapter, Intruders, LoRAError, Noted, damp, shrink
from studio import theme
from studio.forms import info
from studio.measuring import Bench, Measured, Measuring
from studio.opened import Opened
from studio.pictures import Picture, recipe
from studio.state import Studio
from studio.tabs.spectrum.frame import PRIVATE, Frame

PANELS = ("held-out rows", "general text")
_PAPER = "Intruder dimensions, arXiv:2410.21228"

SCOPES = ("the matrix chosen above", "all matrices")


def facts(found: Intruders) -> str:
    """Returns HTML of one matrix's intruders."""
    highest = found.max_cosine
    return theme.facts(
        [
            ("Intruders", f"{found.count} of {len(found.sigma)}"),
            ("Their share of Σσ²", f"{found.energy_share:.1%}"),
            ("Lowest largest |cos|", f"{float(highest.min()):.2f}" if len(highest) else "–"),
            ("|cos| by chance", f"{found.null:.2f}"),
        ]
    )


def cosine_picture(studio: Studio, opened: Opened, path: str, found: Intruders) -> Picture:
    """Returns the cosines of the strongest directions of W + ΔW with W's own."""
    from studio import figures

    out, width = opened.adapter.factors[path].shape
    k, p = found.cosines.shape
    code = recipe(
        opened,
        studio.workspace,
        "from core import intruder_dimensions, weight_svd",
        "from studio import figures",
        "from studio.opened import read_matrix",
        "",
        "",
        f"path = {path!r}",
        f"svd = weight_svd(read_matrix({opened.model!r}, workspace, path), workspace.cache / 'svd')",
        f"found = intruder_dimensions(adapter.factors[path], svd, k={k}, threshold={found.threshold})",
        "figure = figures.intruder_figure(found.cosines, found.sigma, found.threshold, found.null, title=path)",
        "figure",
    )
    return Picture(
        f"Intruders in {path}",
        figures.intruder_figure(found.cosines, found.sigma, found.threshold, found.null, title=path),
        numbers={
            "direction": range(1, k + 1),
            "σ of W + ΔW": found.sigma,
            "largest |cos|": found.max_cosine,
            "intruder": found.is_intruder,
        },
        maths=(
            f"W + ΔW = Σ σ_i·y_i·z_iᵀ, {out} × {width}: its strongest {k}, exactly, from W's own SVD and the factors\n"
            f"|cos(y_i, x_j)| with all {p} left directions x_j of W; intruder: max_j |cos| < {found.threshold:g}\n"
            f"chance: √(2·ln p / out) = √(2·ln {p} / {out}) = {found.null:.3f}, about the largest |cos| of a random y\n"
            "The bulk of W is nearly degenerate, so for large k its own directions mix and count as intruders, too.\n"
            "Shuttleworth et al. 2024, arXiv:2410.21228"
        ),
        notebook=code,
    )


def damped(adapter: Adapter, found: Mapping[str, Intruders], strength: float) -> tuple[Adapter, Adapter]:
    """Returns the adapter with its intruders damped, and with the same matrices shrunk to the same norms instead.

    Args:
        adapter: The adapter.
        found: Path → its intruders.
        strength: What is left of them: 1 changes nothing.
    """
    less = {path: damp(adapter.factors[path], one, strength) for path, one in found.items()}
    control = {path: shrink(adapter.factors[path], f) for path, f in less.items()}
    return (
        replace(adapter, factors={**adapter.factors, **less}),
        replace(adapter, factors={**adapter.factors, **control}),
    )


def loss_picture(studio: Studio, opened: Opened, points: Mapping[str, Any], told: str) -> Picture:
    """Returns the losses measured so far."""
    from studio import figures

    measured: Mapping[float, tuple[Measured, Measured]] = points["measured"]
    base: Measured | None = points["base"]

    def of(one: Measured | None, panel: str) -> float | None:
        return None if one is None else one.task_loss if panel == PANELS[0] else one.general_loss

    losses = {
        panel: {at: (of(a, panel), of(b, panel)) for at, (a, b) in measured.items() if of(a, panel) is not None}
        for panel in PANELS
    }
    levels = {panel: of(base, panel) for panel in PANELS}
    columns: dict[str, Any] = {"λ": sorted(measured)}
    for panel in PANELS:
        for i, name in enumerate(("damped", "control")):
            values = [of(measured[at][i], panel) for at in sorted(measured)]
            columns[f"{panel}, {name}"] = [math.nan if v is None else v for v in values]
    code = recipe(
        opened,
        studio.workspace,
        "from studio import figures",
        "",
        "",
        f"losses = {losses!r}  # as measured",
        f"figure = figures.damping_figure(losses, {levels!r})",
        "figure",
    )
    return Picture(
        "Loss while intruders are damped",
        figures.damping_figure(losses, levels),
        numbers=columns,
        maths=(
            "damped: ΔW + (λ − 1)·Σ σ_i·y_i·z_iᵀ over the intruders; λ = 1 is the adapter as it is, 0 takes them out\n"
            "control: c·ΔW with c so that ‖c·ΔW‖_F is the same, matrix by matrix\n"
            f"loss: mean over the trained tokens, in nats; {told}"
        ),
        notebook=code,
    )


def build(frame: Frame, tab: Any) -> None:
    """Draws the section in its `tab`."""
    studio = frame.studio
    gr.Markdown(
        "## Strong directions that W did not have\n"
        "A direction of W + ΔW that is near none of W's own is an *intruder*; the paper that found them links them to "
        "forgetting, another finds no more than the size of ΔW behind it. So look at the control, too."
    )
    with gr.Row():
        k = gr.Slider(
            2,
            64,
            value=10,
            step=1,
            label="k, strongest directions of W + ΔW",
            info=info("10 in the paper. Among many more, noise looks like an intruder.", _PAPER),
            elem_id="intruder-k",
            min_width=260,
        )
        threshold = gr.Slider(
            0.05,
            0.95,
            value=0.5,
            step=0.05,
            label="Threshold of |cos|, below which one is an intruder",
            info=info("Usually 0.5. Higher finds more of them, near 1 all; lower may find none.", _PAPER),
            min_width=260,
        )
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            about = gr.HTML(elem_id="intruder-facts")
            cosines = frame.picture("intruders")
        with gr.Column(min_width=320):
            gr.Markdown("## What do they cost?")
            scope = gr.Radio(SCOPES, value=SCOPES[0], label="Damp the intruders of")
            strength = gr.Slider(
                0,
                1,
                value=0.5,
                step=0.05,
                label="λ, what is left of them",
                info="1: as trained, 0: taken out. Too little may cost the task, too.",
                elem_id="strength",
            )
            with gr.Row():
                measure = gr.Button("Measure", variant="primary", elem_id="measure-damped")
                cancel = gr.Button("Cancel", interactive=False, elem_id="cancel-damped")
            going = gr.HTML(elem_id="damping-progress")
            losses = frame.picture("damping")
            points = gr.State(None)

    def show_intruders(opened: Opened, path: str, most: int, least: float) -> Iterator[list[str]]:
        yield [theme.said("Decomposing W …"), ""]
        try:
            (known,) = studio.intruders(opened, int(most), [path])
            found = known[path]
        except LoRAError as error:
            found = error
        if isinstance(found, LoRAError):
            yield [theme.said(str(found), "warn"), ""]
            return
        found = replace(found, threshold=float(least))
        yield [facts(found), frame.put(cosine_picture(studio, opened, path, found))]

    def weigh(view: Any, most: int, least: float, where: str, at: float, known: Any) -> Iterator[list[Any]]:
        if view is None:
            raise LoRAError("`adapter` (=nothing) must be opened first.")
        opened, path = studio.opened(view[0]), view[2]
        on = gr.Button(interactive=True), gr.Button(interactive=False)
        off = on[1], on[0]
        if opened.model is None:
            raise LoRAError("The base model must be at hand to measure a loss; name it where the adapter is opened.")
        paths = list(opened.adapter.factors) if where == SCOPES[1] else [path]
        held: Mapping[str, Intruders | LoRAError] = {}
        for held in studio.intruders(opened, int(most), paths):
            num = sum(one in held for one in paths)
            yield [theme.progress(num, len(paths), "matrices looked at"), gr.skip(), gr.skip(), *off]
        found = {p: replace(one, threshold=float(least)) for p in paths if isinstance(one := held[p], Intruders)}
        found = {p: one for p, one in found.items() if one.count}
        if not found:
            words = f"There are no intruders below {least:g} among the strongest {most}, so nothing can be damped."
            yield [theme.said(words), gr.skip(), gr.skip(), *on]
            return
        key = (opened.key, int(most), float(least), where, path if where == SCOPES[0] else "")
        known = known if known is not None and known["key"] == key else {"key": key, "base": None, "measured": {}}
        less, control = damped(opened.adapter, found, at)
        bench = Bench.of(opened.run) if opened.run is not None else Bench(opened.model)
        asked = {"base model": None, "as it is": opened.adapter, "damped": less, "shrunk": control}
        got: dict[str, Measured] = {}
        for said in Measuring(studio.workspace, bench, asked):
            if isinstance(said, Noted):
                yield [theme.said(said.message), gr.skip(), gr.skip(), *off]
            else:
                got[said.name] = said
        measured = {**known["measured"], at: (got["damped"], got["shrunk"]), 1.0: (got["as it is"],) * 2}
        known = {**known, "base": got["base model"], "measured": measured}
        rows = f"{got['damped'].num_rows} held-out rows" if got["damped"].num_rows else "no held-out rows"
        told = f"{rows}, {got['damped'].num_general_tokens:,} tokens of general text"
        num = sum(one.count for one in found.values())
        words = f"λ = {at:g} on {num} intruders of {len(found)} matrices; {told}. Each measurement adds a point."
        yield [theme.said(words), frame.put(loss_picture(studio, opened, known, told)), known, *on]

    frame.draws(
        tab,
        show_intruders,
        [k, threshold],
        [about, cosines],
        by_matrix=True,
        also=[k.release, threshold.release],
        show_progress="hidden",
    )
    outputs = [going, losses, points, measure, cancel]
    inputs = [frame.view, k, threshold, scope, strength, points]
    begun = measure.click(studio.guard(weigh), inputs, outputs, show_progress="hidden", **PRIVATE)

    def end() -> list[Any]:
        return ["", gr.Button(interactive=True), gr.Button(interactive=False)]

    cancel.click(studio.guard(end), None, [going, measure, cancel], cancels=begun, queue=False, **PRIVATE)
    begun.failure(studio.guard(end), None, [going, measure, cancel], queue=False, show_progress="hidden", **PRIVATE)
