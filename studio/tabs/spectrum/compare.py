"""Compare: two adapters of one model, their directions matrix by matrix, and what happens when both are added."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import gradio as gr
from torch import Tensor

from core import Comparison, LoRAError, MatrixComparison
from studio import comparing, theme
from studio.comparing import Basis
from studio.opened import Opened, Source
from studio.pictures import Picture, loading, recipe
from studio.runs import Run
from studio.state import Studio
from studio.tabs.spectrum.frame import PRIVATE, Frame

BASES = {
    "A, what it reads (the paper)": "A-right",
    "B, what it writes": "B-left",
    "ΔW, what it reads": "delta-right",
    "ΔW, what it writes": "delta-left",
}


def _corner(phi: Tensor) -> float | None:
    """Returns φ(k, k), k the smaller number of directions."""
    k = min(phi.shape)
    return float(phi[k - 1, k - 1]) if k else None


Value = Callable[[MatrixComparison], float | None]

QUANTITIES: dict[str, tuple[str, str, Value, Value | None, str]] = {
    "Overlap, reads": (
        "φ(k, k)",
        "phi(m.right)",
        lambda m: _corner(m.right),
        lambda m: _corner(m.right_null),
        "φ(k, k) = ‖V₁ᵀ·V₂‖_F² / k of what the two ΔW read, k the smaller of their ranks",
    ),
    "Overlap, writes": (
        "φ(k, k)",
        "phi(m.left)",
        lambda m: _corner(m.left),
        lambda m: _corner(m.left_null),
        "φ(k, k) = ‖U₁ᵀ·U₂‖_F² / k of what the two ΔW write, k the smaller of their ranks",
    ),
    "Size, first to second": (
        "‖ΔW₁‖ / ‖ΔW₂‖",
        "m.overlap.norm_ratio",
        lambda m: m.overlap.norm_ratio,
        None,
        "‖ΔW₁‖_F / ‖ΔW₂‖_F",
    ),
    "Cosine": (
        "cosine of ΔW₁ and ΔW₂",
        "m.overlap.cosine",
        lambda m: m.overlap.cosine,
        lambda m: m.overlap.null,
        "⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖) = s₁·s₂·Σ (B₁ᵀB₂) ⊙ (A₁A₂ᵀ) / …",
    ),
    "Interference": (
        "interference",
        "m.overlap.interference",
        lambda m: m.overlap.interference,
        lambda m: 0.0,
        "‖ΔW₁ + ΔW₂‖² / (‖ΔW₁‖² + ‖ΔW₂‖²) − 1: 0 leaves each as it was, above they overshoot, below they cancel",
    ),
}
"""Title → its unit; how it is written, of a comparison `m`; its value; the same for chance; its definition."""


def choices(studio: Studio, opened: Opened, files: tuple[Source, ...]) -> list[tuple[str, str]]:
    """Returns what an adapter can be compared with: title → a word that `source_of` knows."""
    found = []
    own = opened.source
    if opened.run is not None:
        steps = [step for step in opened.run.checkpoints.steps() if step != own.step]
        found += [(f"This run at step {step}", f"run:{opened.run.id}@{step}") for step in steps]
    runs = [run for run in studio.runs.list() if run.has_lora and run.id != own.run]
    found += [(f"{run.spec.name} · {run.created:%d %b %H:%M}", f"run:{run.id}") for run in runs]
    found += [(Path(one.path).name, f"file:{place}") for place, one in enumerate(files) if one != own]
    return found


def choice(studio: Studio, first: Run, second: Run) -> Any:
    """Returns the choice of the second adapter with a run chosen that stands beside another."""
    found = choices(studio, studio.opened(Source(first.id)), ())
    return gr.Dropdown(choices=found, value=f"run:{second.id}")


def source_of(word: str, files: tuple[Source, ...]) -> Source:
    """Returns the source that a word of `choices` means.

    Raises:
        LoRAError: There is none.
    """
    kind, _, rest = word.partition(":")
    if kind == "file" and rest.isdigit() and int(rest) < len(files):
        return files[int(rest)]
    run, _, step = rest.partition("@")
    if kind != "run" or (step and not step.isdigit()):
        raise LoRAError(f"`other` (={word!r}) must be one of the adapters listed; choose another one.")
    return Source(run, int(step) if step else None)


def facts(first: Opened, second: Opened, found: Comparison) -> str:
    """Returns HTML of two adapters as wholes, and of their sum."""
    whole = found.overlap
    one, two = whole.norms
    both = math.sqrt(max(0.0, one**2 + two**2 + 2 * whole.inner_product))
    lone = len(found.only_first) + len(found.only_second)

    def number(value: float | None, chance: str) -> str:
        return "–" if value is None else f"{value:.3f} (chance: {chance})"

    return theme.facts(
        [
            ("First", first.name),
            ("Second", second.name),
            ("Matrices in common", f"{len(found.matrices)}" + (f", {lone} in one alone" if lone else "")),
            ("‖ΔW‖, first and second", f"{one:.3f}, {two:.3f}"),
            ("Cosine of the updates", number(whole.cosine, f"±{whole.null:.1g}")),
            ("‖ΔW‖ of the sum", f"{both:.3f} (unrelated: {math.hypot(one, two):.3f})"),
            ("Interference if added", number(whole.interference, "0")),
        ]
    )


def told_of_seeds(first: Opened, second: Opened) -> str:
    """Returns a sentence on what the two started from."""
    if first.run is None or second.run is None:
        return "Where one of them began is not in its files, so there is no panel of step 0."
    a, b = first.run.spec, second.run.spec
    if first.run.id == second.run.id:
        return "Both are of one run: they began with the same A."
    if a.train.seed != b.train.seed:
        return f"Their seeds differ ({a.train.seed}, {b.train.seed}), so what they share was learned."
    if a.lora.r == b.lora.r:
        return f"Both have seed {a.train.seed} and r {a.lora.r}: they began with the same A, so look at step 0, too."
    return f"Both have seed {a.train.seed}; A is drawn anew for each r, so they began unrelated (see step 0)."


def twin(studio: Studio, run: Run | None) -> Run | None:
    """Returns a run like `run` but for its seed, if the workspace has one with an adapter."""
    if run is None:
        return None
    own = run.spec.to_dict()

    def key(values: dict[str, Any]) -> Any:
        train = {name: value for name, value in values["train"].items() if name != "seed"}
        return values["model"], values["data"], values["lora"], values["method"], train

    others = (other for other in studio.runs.list() if other.id != run.id and other.has_lora)
    return next(
        (o for o in others if o.spec.train.seed != run.spec.train.seed and key(o.spec.to_dict()) == key(own)), None
    )


def phi_picture(studio: Studio, first: Opened, second: Opened, path: str, basis: Basis) -> Picture:
    """Returns φ(i, j) of one matrix in two adapters beside step 0, another seed, and chance.

    The two must share that matrix.
    """
    from studio import figures

    f, g = first.adapter.factors[path], second.adapter.factors[path]
    starts = tuple(o.run and comparing.start(o.run.spec, path, o.adapter.factors[path]) for o in (first, second))
    panels = dict(comparing.panels(f, g, basis, (starts[0], starts[1])))
    lines = [f"starts = {_start_code(first, 'first')}, {_start_code(second, 'second')}"]
    lines += [f"panels = dict(comparing.panels(first.factors[path], second.factors[path], {basis!r}, starts))"]
    seeded = twin(studio, first.run)
    if seeded is not None and (second.run is None or seeded.id != second.run.id):
        other = studio.opened(Source(seeded.id))
        panels["other seed"] = comparing.panels(f, other.adapter.factors[path], basis)["trained"]
        lines += [
            loading(other, "other"),
            f"panels['other seed'] = comparing.panels(first.factors[path], other.factors[path], {basis!r})['trained']",
        ]
    dim = f.shape[1] if basis.endswith("right") else f.shape[0]
    r1, r2 = panels["trained"].shape
    named = f"figures.similarity_figure(panels, first={first.name!r}, second={second.name!r}, title=path)"
    code = recipe(
        first,
        studio.workspace,
        loading(second, "second"),
        "from studio import comparing, figures",
        "from studio.specs import RunSpec",
        "",
        "",
        f"path = {path!r}",
        *lines,
        f"figure = {named}",
        "figure",
        name="first",
    )
    cells = [
        (name, i + 1, j + 1, v)
        for name, t in panels.items()
        for i, row in enumerate(t.tolist())
        for j, v in enumerate(row)
    ]
    return Picture(
        f"Subspace similarity in {path}",
        figures.similarity_figure(panels, first=first.name, second=second.name, title=path),
        numbers=dict(zip(("panel", "i", "j", "φ"), zip(*cells, strict=True), strict=True)) if cells else {},
        maths=(
            f"U₁, {dim} × {r1}, and U₂, {dim} × {r2}: the directions of the two in this basis, the strongest first\n"
            "φ(i, j) = ‖U₁[:, :i]ᵀ·U₂[:, :j]‖_F² / min(i, j) (Hu et al. 2021, eq. 4): 1 if one space holds the other\n"
            f"chance: max(i, j) / {dim}, the mean over random subspaces\n"
            "step 0: A as the seed draws it, before training; B is zero then"
        ),
        notebook=code,
    )


def _start_code(opened: Opened, name: str) -> str:
    if opened.run is None:
        return "None"
    spec = f"RunSpec.read(workspace.root / 'runs/{opened.run.id}/spec.json')"
    return f"comparing.start({spec}, path, {name}.factors[path])"


def map_picture(studio: Studio, first: Opened, second: Opened, title: str, found: Comparison) -> Picture:
    """Returns one of `QUANTITIES` by layer and matrix."""
    from studio import figures

    unit, written, value, chance, maths = QUANTITIES[title]
    values = {path: value(m) for path, m in found.matrices.items()}
    levels = [v for m in found.matrices.values() if chance is not None and (v := chance(m)) is not None]
    note = ""
    if levels:
        low, high = f"{min(levels):.2g}", f"{max(levels):.2g}"
        note = f"chance: {low}" if low == high else f"chance: {low} to {high}"
    code = recipe(
        first,
        studio.workspace,
        loading(second, "second"),
        "from core import compare",
        "from studio import figures",
        "",
        "",
        "def phi(table):",
        "    k = min(table.shape)",
        "    return float(table[k - 1, k - 1]) if k else None",
        "",
        "",
        f"values = {{path: {written} for path, m in compare(first, second).matrices.items()}}",
        f"figure = figures.heat_figure(values, title={title!r}, unit={unit!r}, note={note!r})",
        "figure",
        name="first",
    )
    path, m = next(iter(found.matrices.items()))
    shape = first.adapter.factors[path].shape if path in first.adapter.factors else ()
    shapes = f"ranks {m.ranks[0]} and {m.ranks[1]}, {' × '.join(map(str, shape))} in {path}"
    return Picture(
        f"{title}, {first.name} and {second.name}",
        figures.heat_figure(values, title=title, unit=unit, note=note),
        numbers={"matrix": list(values), title: [math.nan if v is None else v for v in values.values()]},
        maths=f"{maths}\n{shapes}; ΔW is never formed: all follows from the factors, O((out + in)·r²)",
        notebook=code,
    )


def build(frame: Frame, tab: Any) -> Any:
    """Draws the section in its `tab`; returns the choice of the second adapter."""
    studio = frame.studio
    with gr.Row(equal_height=True):
        other = gr.Dropdown([], label="Compare with", elem_id="other", min_width=280, scale=3)
        basis = gr.Dropdown(
            list(BASES.items()), value="A-right", label="Directions of", filterable=False, min_width=240, scale=2
        )
    told = gr.HTML(elem_id="compare-facts")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            gr.Markdown("## Do they share directions?\nThe paper's figures 3 and 4, for the matrix chosen above.")
            phi = frame.picture("phi")
            seeds = gr.HTML()
        with gr.Column(min_width=320):
            gr.Markdown("## Where are they near, and where would they clash?")
            quantity = gr.Radio(list(QUANTITIES), value="Overlap, reads", label="Show by layer and matrix")
            heat = frame.picture("compare-heat")

    def list_others(opened: Opened, files: tuple[Source, ...], chosen: str | None) -> Any:
        found = choices(studio, opened, files)
        words = [word for _, word in found]
        return gr.Dropdown(choices=found, value=chosen if chosen in words else next(iter(words), None))

    def compare(opened: Opened, path: str, files: Any, word: str | None, kind: Basis, title: str) -> list[Any]:
        if not word:
            words = "Nothing to compare with yet: train a second run, with another seed or r, or open files above."
            return [theme.said(words), "", "", ""]
        if kind not in get_args(Basis):
            raise LoRAError(f"`basis` (={kind!r}) must be one of {', '.join(BASES.values())}.")
        second = studio.opened(source_of(word, files))
        found = studio.comparison(opened, second)
        both = opened.adapter.factors, second.adapter.factors
        is_shared = all(path in factors for factors in both) and both[0][path].shape == both[1][path].shape
        alone = f"Only one of the two has {path}, or in another shape; choose another matrix."
        lines = [told_of_seeds(opened, second)]
        if twin(studio, opened.run) is None:
            lines.append("No run here differs from the first in nothing but its seed, so there is no panel of that.")
        return [
            facts(opened, second, found),
            frame.put(phi_picture(studio, opened, second, path, kind)) if is_shared else theme.said(alone, "warn"),
            theme.said(lines),
            frame.put(map_picture(studio, opened, second, title, found)) if found.matrices else "",
        ]

    frame.draws(tab, list_others, [frame.files, other], [other], show_progress="hidden")
    chosen = [frame.files, other, basis, quantity]
    changed = [other.change, basis.change, quantity.change]
    frame.draws(tab, compare, chosen, [told, phi, seeds, heat], by_matrix=True, also=changed)

    def open_matrix(event: gr.EventData) -> str:
        return event.name

    heat.pointed(studio.guard(open_matrix), None, frame.matrix, show_progress="hidden", queue=False, **PRIVATE)
    return other
