"""Compare: two adapters of one model, their directions matrix by matrix, and what happens when both are added."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from core import LoRAError
from studio import comparing, theme
from studio.comparing import Basis, Pair
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
QUANTITIES: dict[str, tuple[str, Callable[[Pair], float | None], Callable[[Pair], float | None] | None, str]] = {
    "Overlap φ": (
        "overlap",
        lambda p: p.overlap,
        lambda p: p.overlap_null,
        "φ(k, k) = ‖U₁ᵀ·U₂‖_F² / k, k the smaller number of directions",
    ),
    "Size, second to first": ("ratio", lambda p: p.ratio, None, "‖ΔW₂‖_F / ‖ΔW₁‖_F"),
    "Cosine of the updates": ("cosine", lambda p: p.cosine, lambda p: 0.0, "⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖_F · ‖ΔW₂‖_F)"),
    "Interference": (
        "interference",
        lambda p: p.interference,
        lambda p: p.interference_null,
        "‖ΔW₂·V₁‖_F / ‖ΔW₁‖_F, V₁ the right directions of ΔW₁: what the second adds where the first reads",
    ),
}
"""Title → the attribute of a `Pair`, its value, the same for random directions, and its definition."""


def choices(studio: Studio, opened: Opened, files: tuple[Source, ...]) -> list[tuple[str, str]]:
    """Returns what an adapter can be compared with: title → a word that `source_of` knows."""
    found = []
    own = opened.source
    if opened.run is not None:
        steps = [step for step in opened.run.checkpoints.steps() if step != own.step]
        found += [(f"This run at step {step}", f"run:{opened.run.id}@{step}") for step in steps]
    runs = [run for run in studio.runs.list() if run.has_adapter and run.id != own.run]
    found += [(f"{run.spec.name} · {run.created:%d %b %H:%M}", f"run:{run.id}") for run in runs]
    found += [(Path(one.path).name, f"file:{place}") for place, one in enumerate(files) if one != own]
    return found


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


def facts(first: Opened, second: Opened, pairs: Mapping[str, Pair]) -> str:
    """Returns HTML of two adapters as wholes, and of their sum."""
    one, two = (math.hypot(*(getattr(p, name) for p in pairs.values())) for name in ("first_norm", "second_norm"))
    inner = sum(p.inner for p in pairs.values())
    both, apart = math.sqrt(max(0.0, one**2 + two**2 + 2 * inner)), math.hypot(one, two)
    heard = math.hypot(*((p.interference or 0) * p.first_norm for p in pairs.values()))
    null = math.hypot(*((p.interference_null or 0) * p.first_norm for p in pairs.values()))
    numbers = [
        ("First", first.name),
        ("Second", second.name),
        ("Matrices in common", f"{len(pairs)}"),
        ("‖ΔW‖, first and second", f"{one:.3f}, {two:.3f}"),
        ("Cosine of the updates", f"{inner / (one * two):.3f}" if one * two else "–"),
        ("‖ΔW‖ of the sum", f"{both:.3f} (unrelated: {apart:.3f})"),
        ("Interference", f"{heard / one:.3f} (chance: {null / one:.3f})" if one else "–"),
    ]
    return theme.facts(numbers)


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
        return values["model"], values["data"], values["lora"], train

    others = (other for other in studio.runs.list() if other.id != run.id and other.has_adapter)
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


def map_picture(
    studio: Studio, first: Opened, second: Opened, basis: Basis, title: str, pairs: Mapping[str, Pair]
) -> Picture:
    """Returns one of `QUANTITIES` by layer and matrix."""
    from studio import figures

    name, value, chance, maths = QUANTITIES[title]
    values = {path: value(p) for path, p in pairs.items()}
    levels = [v for p in pairs.values() if chance is not None and (v := chance(p)) is not None]
    note = ""
    if levels:
        low, high = f"{min(levels):.3g}", f"{max(levels):.3g}"
        note = f"chance: {low}" if low == high else f"chance: {low} to {high}"
    code = recipe(
        first,
        studio.workspace,
        loading(second, "second"),
        "from studio import comparing, figures",
        "",
        "",
        f"pairs = comparing.pairs(first, second, {basis!r})",
        f"values = {{path: pair.{name} for path, pair in pairs.items()}}",
        f"figure = figures.heat_figure(values, title={title!r}, unit={name!r}, note={note!r})",
        "figure",
        name="first",
    )
    f = first.adapter.factors[next(iter(pairs))]
    g = second.adapter.factors[next(iter(pairs))]
    shapes = f"ΔW₁ = s₁·B₁·A₁ of r = {f.r} and ΔW₂ of r = {g.r}, {f.shape[0]} × {f.shape[1]} in the first matrix"
    return Picture(
        f"{title} of {first.name} and {second.name}",
        figures.heat_figure(values, title=title, unit=name, note=note),
        numbers={"matrix": list(values), name: [math.nan if v is None else v for v in values.values()]},
        maths=f"{maths}\n{shapes}; neither is formed: all follows from the factors, O((out + in)·r²)",
        notebook=code,
    )


def build(frame: Frame, tab: Any) -> None:
    """Draws the section in its `tab`."""
    studio = frame.studio
    with gr.Row(equal_height=True):
        other = gr.Dropdown([], label="Compare with", elem_id="other", min_width=280, scale=3)
        basis = gr.Dropdown(list(BASES.items()), value="A-right", label="Directions of", min_width=240, scale=2)
    told = gr.HTML(elem_id="compare-facts")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            gr.Markdown("### Do they share directions?\nThe paper's figures 3 and 4, for the matrix chosen above.")
            phi = frame.picture("phi")
            seeds = gr.HTML()
        with gr.Column(min_width=320):
            gr.Markdown("### Where are they near, and where would they clash?")
            quantity = gr.Radio(list(QUANTITIES), value="Overlap φ", label="Show by layer and matrix")
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
        pairs = studio.pairs(opened, second, kind)
        picture = map_picture(studio, opened, second, kind, title, pairs)
        alone = f"Only one of the two has {path}, or in another shape; choose another matrix."
        lines = [told_of_seeds(opened, second)]
        if twin(studio, opened.run) is None:
            lines.append("No run here differs from the first in nothing but its seed, so there is no panel of that.")
        return [
            facts(opened, second, pairs),
            frame.put(phi_picture(studio, opened, second, path, kind)) if path in pairs else theme.said(alone, "warn"),
            theme.said(lines),
            frame.put(picture),
        ]

    frame.draws(tab, list_others, [frame.files, other], [other], show_progress="hidden")
    chosen = [frame.files, other, basis, quantity]
    changed = [other.change, basis.change, quantity.change]
    frame.draws(tab, compare, chosen, [told, phi, seeds, heat], by_matrix=True, also=changed)

    def open_matrix(event: gr.EventData) -> str:
        return event.name

    heat.pointed(open_matrix, None, frame.matrix, show_progress="hidden", queue=False, **PRIVATE)
