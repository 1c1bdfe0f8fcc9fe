"""One matrix: its singular values, how ΔW lies towards W, and W's own spectrum."""

import math
from collections.abc import Iterator
from typing import Any

import gradio as gr

from core import (
    Amplification,
    Factors,
    LoRAError,
    Spectrum,
    WeightSpectrum,
    WeightSVD,
    alignment,
    amplification,
    random_sigma,
)
from studio import markup, theme
from studio.links import View
from studio.opened import Opened
from studio.pictures import Picture, recipe
from studio.state import Studio
from studio.tabs.spectrum.frame import Frame

PAPER = {"‖UᵀWV‖": (0.32, 21.67, 0.02), "r": 4, "dim": 12288, "W": 61.95, "ΔW": 6.91}
"""Hu et al. 2021, Table 7: GPT-3's W_q of layer 48, r = 4; U, V from ΔW, from W, and random."""


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


def sigma_picture(opened: Opened, studio: Studio, path: str, *, log: bool) -> Picture:
    """Returns the singular values of one ΔW beside chance, and their energy."""
    from studio import figures

    f, found = studio.spectra(opened)[path]
    chance = random_sigma(f)
    out, width = f.shape
    energy = [found.energy(k) for k in range(1, len(found.sigma) + 1)]
    maths = (
        f"B = Q_B·R_B, {out} × {f.r}, and Aᵀ = Q_A·R_A, {width} × {f.r}, by QR\n"
        f"σ = svd(scaling · R_B·R_Aᵀ), {f.r} × {f.r}, scaling {f.scaling:g}; ΔW, {out} × {width}, is never formed\n"
        "energy(k) = Σ_{i ≤ k} σ_i² / Σ σ²\n"
        f"chance: σ of Gaussian B, {out} × {f.r}, and A, {f.r} × {width}, scaled to the same ‖ΔW‖_F = {found.norm:.4g}"
    )
    code = recipe(
        opened,
        studio.workspace,
        "from core import random_sigma, spectrum",
        "from studio import figures",
        "",
        "",
        f"path = {path!r}",
        "factors = adapter.factors[path]",
        "sigma, chance = spectrum(factors).sigma, random_sigma(factors)",
        f"figure = figures.sigma_figure(sigma, chance, log={log}, title=path)",
        "figure",
    )
    return Picture(
        f"Singular values of ΔW in {path}",
        figures.sigma_figure(found.sigma, chance, log=log, title=path),
        numbers={"direction": range(1, len(energy) + 1), "σ": found.sigma, "chance": chance, "energy": energy},
        maths=maths,
        notebook=code,
    )


def table_7(columns: dict[str, Amplification | None]) -> str:
    """Returns HTML of the paper's Table 7 for one matrix, with the level of chance, and GPT-3's beside it."""
    known = [a for a in columns.values() if a is not None]
    if not known:
        return theme.said("ΔW is zero here: B has not moved, so there are no directions to follow.", "warn")
    one = known[0]
    null = PAPER["r"] * PAPER["W"] / PAPER["dim"]

    def cell(value: float | None, digits: int = 3) -> str:
        return f"<td>{'–' if value is None else f'{value:,.{digits}f}'}</td>"

    def row(title: str, cells: list[float | None], paper: list[float], digits: int = 3) -> str:
        both = [cell(value, digits) for value in cells] + [cell(value, 2) for value in paper]
        return f"<tr><th scope='row'>{title}</th>{''.join(both)}</tr>"

    sources = list(columns)
    head = "".join(f"<th scope='col'>{title}</th>" for title in (*sources, *sources))
    here, theirs = list(columns.values()), PAPER["‖UᵀWV‖"]
    body = (
        row("‖Uᵀ W V‖", [a and a.projected_norm for a in here], list(theirs))
        + row("chance level", [a and a.null for a in here], [null] * 3)
        + row("enrichment (× chance)", [a and a.enrichment for a in here], [x / null for x in theirs], 2)
        + row("‖ΔW‖ / ‖Uᵀ W V‖", [a and a.factor for a in here], [PAPER["ΔW"] / x for x in theirs], 2)
    )
    delta = columns["ΔW"]
    words = [f"‖W‖ = {one.weight_norm:.3f}, ‖ΔW‖ = {one.delta_norm:.3f}; the top r = {one.r} directions on each side."]
    if delta is not None and delta.factor is not None and delta.enrichment is not None:
        words.append(
            f"ΔW amplifies its directions by {delta.factor:.2f} (a random ΔW of its size: {delta.null_factor:.2f}); "
            f"they hold {delta.enrichment:.2f} times as much of W as random ones would. Well above 1: W had them "
            "already, only weakly. Near 1: they are new to W."
        )
    groups = (
        f'<tr><td></td><th scope="colgroup" colspan="{len(sources)}">This matrix</th>'
        '<th scope="colgroup" colspan="3">GPT-3, r = 4 (paper)</th></tr>'
    )
    return markup.table(f'{groups}<tr><th scope="col">U, V from</th>{head}</tr>', body) + theme.said(words)


def table_picture(opened: Opened, studio: Studio, path: str) -> Picture:
    """Returns Table 7 of one matrix."""
    f, found = studio.spectra(opened)[path]
    W = studio.weight(opened, path)
    r = found.rank or None
    columns = {
        "ΔW": amplification(found, W, r, "delta"),
        "W": amplification(found, W, r, "weight"),
        "random": amplification(found, W, r, "random"),
    }
    known = {title: a for title, a in columns.items() if a is not None}
    code = recipe(
        opened,
        studio.workspace,
        "from core import amplification",
        "from studio.opened import read_matrix",
        "",
        "",
        f"path = {path!r}",
        f"W = read_matrix({opened.model!r}, workspace, path)",
        'for kind in ("delta", "weight", "random"):',
        "    a = amplification(adapter.factors[path], W, directions=kind)",
        '    print(kind, "ΔW = 0" if a is None else (a.projected_norm, a.null, a.enrichment, a.factor))',
    )
    return Picture(
        f"Table 7 of {path}",
        html=table_7(columns),
        numbers={
            "U, V from": list(known),
            "‖UᵀWV‖": [a.projected_norm for a in known.values()],
            "chance": [a.null for a in known.values()],
            "enrichment": [a.enrichment or math.nan for a in known.values()],
            "‖ΔW‖ / ‖UᵀWV‖": [a.factor or math.nan for a in known.values()],
        },
        maths=_table_maths(f, found),
        notebook=code,
    )


def _table_maths(f: Factors, found: Spectrum) -> str:
    (out, width), r = f.shape, found.rank
    return (
        f"U, {out} × {r}, and V, {width} × {r}: the top r = {r} left and right directions of ΔW, of W, or random\n"
        f"‖Uᵀ·(W·V)‖_F with W {out} × {width}: O(out·in·r)\n"
        f"chance: √E‖UᵀWV‖_F² over random U, V = r·‖W‖_F / √(out·in) = {r}·‖W‖_F / √({out}·{width})\n"
        "enrichment = ‖UᵀWV‖_F / chance; amplification = ‖ΔW‖_F / ‖UᵀWV‖_F (Hu et al. 2021, §7.3)"
    )


def alignment_picture(opened: Opened, studio: Studio, path: str, svd: WeightSVD) -> Picture:
    """Returns how ΔW's directions lie towards W's strongest tenth."""
    from studio import figures

    _, found = studio.spectra(opened)[path]
    right, left = (alignment(found, svd, side=side) for side in ("right", "left"))
    out, width = svd.shape
    q = right.cosines.shape[1]
    sides = {"What they read": (right.cosines, width), "What they write": (left.cosines, out)}
    shares = {
        f"{name}, first {i}": right_or_left.cosines.square()[:i].sum(0).cumsum(0) / i
        for name, right_or_left in (("reads", right), ("writes", left))
        for i in sorted({1, min(4, found.rank), found.rank})
        if i
    }
    code = recipe(
        opened,
        studio.workspace,
        "from core import alignment, weight_svd",
        "from studio import figures",
        "from studio.opened import read_matrix",
        "",
        "",
        f"path = {path!r}",
        f"svd = weight_svd(read_matrix({opened.model!r}, workspace, path), workspace.cache / 'svd')",
        'right, left = (alignment(adapter.factors[path], svd, side=side) for side in ("right", "left"))',
        f"sides = {{'What they read': (right.cosines, {width}), 'What they write': (left.cosines, {out})}}",
        "figure = figures.alignment_figure(sides)",
        "figure",
    )
    return Picture(
        f"Alignment of ΔW and W in {path}",
        figures.alignment_figure(sides),
        numbers={"j": range(1, q + 1), **shares, "chance, reads": [j / width for j in range(1, q + 1)]}
        if shares
        else {},
        maths=(
            f"C = |V_ΔWᵀ·V_W|, {found.rank} × {q}: cosines between ΔW's directions and W's strongest {q}, a tenth\n"
            "share(i, j) = (1/i) Σ_{a ≤ i} Σ_{b ≤ j} C_ab²: how much of the first i lies in W's first j\n"
            f"chance: j / dim, dim = {width} where they read and {out} where they write (figure 8 of the paper: i = 4)"
        ),
        notebook=code,
    )


def weight_picture(opened: Opened, studio: Studio, path: str, found: WeightSpectrum) -> Picture:
    """Returns the singular values of W beside those of noise."""
    from studio import figures

    out, width = found.shape
    code = recipe(
        opened,
        studio.workspace,
        "from core import weight_spectrum",
        "from studio import figures",
        "from studio.opened import read_matrix",
        "",
        "",
        f"found = weight_spectrum(read_matrix({opened.model!r}, workspace, {path!r}))",
        "figure = figures.weight_figure(found.sigma, found.shape)",
        "figure",
    )
    return Picture(
        f"Singular values of W in {path}",
        figures.weight_figure(found.sigma, found.shape),
        numbers={"direction": range(1, len(found.sigma) + 1), "σ of W": found.sigma},
        maths=(
            f"σ = svd(W), W {out} × {width}\n"
            f"edge of noise: s·(√out + √in) = {found.edge:.4g} with s = ‖W‖_F / √(out·in), ‖W‖_F = {found.norm:.4g} "
            "(Marchenko and Pastur 1967)\n"
            "noise: quantiles of the density √((σ₊² − σ²)(σ² − σ₋²)) / σ, σ± = s·|√out ± √in|"
        ),
        notebook=code,
    )


def build(frame: Frame, tab: Any) -> None:
    """Draws the section in its `tab`."""
    studio = frame.studio
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            scale = gr.Radio(["linear", "log"], value="linear", label="σ axis", min_width=170)
            bars = frame.picture("sigma")
        with gr.Column(scale=5, min_width=320):
            gr.Markdown("## Does ΔW amplify what W already has?\nThe paper's §7.3, for this matrix.")
            about = gr.HTML()
            table = frame.picture("table-7")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            gr.Markdown("## Does ΔW follow W's strongest directions?")
            aligned = frame.picture("alignment")
        with gr.Column(min_width=320):
            gr.Markdown("## How much of W is more than noise?")
            weight = frame.picture("weight-spectrum")

    def show_bars(opened: Opened, path: str, axis: str) -> tuple[str, str]:
        found = studio.spectra(opened)[path][1]
        link = View(opened.run.id, "spectrum", module=path).link() if opened.run else ""
        return frame.put(sigma_picture(opened, studio, path, log=axis == "log")), matrix_facts(found) + link

    def show_weight(opened: Opened, path: str) -> Iterator[list[Any]]:
        try:
            yield [frame.put(table_picture(opened, studio, path)), theme.said("Decomposing W …"), ""]
            svd = studio.weight_svd(opened, path)
        except LoRAError as error:
            yield [theme.said(str(error), "warn"), "", ""]
            return
        found = WeightSpectrum(svd.sigma, svd.shape)
        yield [
            gr.skip(),
            frame.put(alignment_picture(opened, studio, path, svd)),
            frame.put(weight_picture(opened, studio, path, found)),
        ]

    frame.draws(tab, show_bars, [scale], [bars, about], by_matrix=True, also=[scale.change])
    frame.draws(tab, show_weight, [], [table, aligned, weight], by_matrix=True, show_progress="hidden")
