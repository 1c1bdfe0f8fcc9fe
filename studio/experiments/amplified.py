"""Do ranks and seeds share directions, and does ΔW amplify what W has: the paper's figures 3 and 4, and its Table 7."""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from core import Adapter, Factors, LoRAConfig, LoRAError, amplification, basis_of, subspace_similarity
from studio.comparing import panels, start
from studio.experiments.base import Asked, Experiment, Found, Piece, Record, Result, Table, as_paper
from studio.experiments.runs import QUERY_VALUE, of_text, run_of
from studio.opened import read_matrix
from studio.runs import Run, Runs
from studio.workspace import Workspace

if TYPE_CHECKING:
    from studio.figures.style import Plot

_LOW, _HIGH = 8, 64
_KINDS = ("q_proj", "v_proj")
_FROM_CHANCE = 0.02
"""What two seeds share is told apart from chance from here on."""


def _trained(asked: Asked, workspace: Workspace, r: int, seed: int) -> Piece:
    """Returns the piece that trains query and value with one rank and seed, and says where its adapter is."""
    lora = LoRAConfig(r=r, alpha=8 * r, target_modules=QUERY_VALUE)
    spec = of_text(asked, workspace, f"W_q, W_v r {r}", lora=lora, seed=seed)
    return Piece(f"r {r}, seed {seed}", _where, spec)


def _where(found: Found) -> Record:
    assert found.run is not None
    return {"run": found.run.id}


def _layers(paths: Iterable[str], kind: str) -> list[str]:
    """Returns the paths of that matrix, from the first layer to the last."""
    found = [path for path in paths if path.endswith(kind)]
    return sorted(found, key=lambda path: int(re.findall(r"\d+", path)[0]))


def _middle(adapter: Adapter, kind: str) -> str:
    """Returns the path of that matrix in the middle layer, as the paper takes layer 48 of 96."""
    paths = _layers(adapter.factors, kind)
    return paths[len(paths) // 2]


def _subspaces(asked: Asked, workspace: Workspace) -> list[Piece]:
    trained = [_trained(asked, workspace, r, seed) for r, seed in ((_LOW, 0), (_HIGH, 1), (_HIGH, 2))]
    settings = {"of": [piece.digest for piece in trained]}
    return [*trained, Piece("similarity", lambda found: _similarity(trained, found), settings=settings)]


def _run_of(piece: Piece, workspace: Workspace) -> Run:
    assert piece.spec is not None
    run = run_of(Runs(workspace), piece.spec)
    if run is None:
        raise LoRAError(f"The run “{piece.spec.name}” was deleted; start the experiment again to train it anew.")
    return run


def _similarity(trained: list[Piece], found: Found) -> Record:
    runs = [_run_of(piece, found.workspace) for piece in trained]
    low, high, other = (Adapter.load(run.adapter_folder) for run in runs)
    told: Record = {}
    for kind in _KINDS:
        path = _middle(low, kind)
        pair = panels(low.factors[path], high.factors[path], "A-right", _starts(runs[:2], path, low, high))
        seeds = panels(high.factors[path], other.factors[path], "A-right", _starts(runs[1:], path, high, other))
        told[kind] = {
            "path": path,
            "ranks": {name: table.tolist() for name, table in pair.items()},
            "seeds": {name: table.tolist() for name, table in seeds.items()},
            "first": [_first(low.factors[path], high.factors[path]) for path in _layers(low.factors, kind)],
        }
    return told


def _starts(runs: list[Run], path: str, *adapters: Adapter) -> tuple[Factors | None, Factors | None]:
    one, other = (start(run.spec, path, a.factors[path]) for run, a in zip(runs, adapters, strict=True))
    return one, other


def _first(one: Factors, other: Factors) -> float:
    """Returns φ(1, 1) of ΔW's right directions: how far both have the same strongest one."""
    U1, U2 = basis_of(one, "delta-right"), basis_of(other, "delta-right")
    return float(subspace_similarity(U1[:, :1], U2[:, :1])[0, 0]) if U1.shape[1] and U2.shape[1] else 0.0


def _tell_subspaces(asked: Asked, records: Mapping[str, Record]) -> Result:
    head = ["", "W_q", "W_v", "Chance", "Paper, layer 48"]
    if "similarity" not in records:
        return Result([Table("Directions in common", head, [])])
    q, v = (records["similarity"][kind] for kind in _KINDS)
    few, many = len(q["ranks"]["trained"]), min(np.shape(q["seeds"]["trained"]))

    def phi(of: Record, what: str, panel: str, i: int, j: int) -> float:
        return float(np.array(of[what][panel])[i - 1, j - 1])

    def row(words: str, what: str, panel: str, i: int, j: int, paper: str) -> list[str]:
        chance = f"{phi(q, what, 'chance', i, j):.3f}"
        return [f"φ({i}, {j}) of A, {words}", *(f"{phi(of, what, panel, i, j):.3f}" for of in (q, v)), chance, paper]

    ranks, seeds = f"r = {_LOW} against {_HIGH}", f"two seeds of r = {_HIGH}"
    rows = [row(f"{ranks}, after training", "ranks", "trained", 1, 1, "> 0.5")]
    if "step 0" in q["ranks"]:
        rows.append(row("the same before training", "ranks", "step 0", 1, 1, ""))
    rows.append(row(ranks, "ranks", "trained", few, many, "fig. 3"))
    rows.append(row(seeds, "seeds", "trained", many, many, "fig. 4"))
    medians = [f"{np.median(of['first']):.3f}" for of in (q, v)]
    rows.append(["φ(1, 1) of ΔW's right directions, median over layers", *medians, "", ""])
    one = phi(q, "ranks", "trained", 1, 1)
    of_q, of_v = (phi(of, "seeds", "trained", many, many) for of in (q, v))
    by_chance = phi(q, "seeds", "chance", many, many)
    if max(of_q, of_v) - by_chance < _FROM_CHANCE:
        told = f"no more than chance, {by_chance:.3f}; the paper finds more in W_q than in W_v."
    else:
        more = ": W_q's more" if of_q > of_v else ""
        told = f"where chance is {by_chance:.3f}{more}"
        told += as_paper(of_q > of_v, "the paper finds more in W_q than in W_v")
    findings = [
        f"W_q's top direction of A at r = {_LOW} and the one at r = {_HIGH} have φ(1, 1) = {one:.2f}"
        + as_paper(one > 0.5, "the paper has above a half after its full training"),
        f"Two seeds share {of_q:.3f} of W_q's subspace and {of_v:.3f} of W_v's, {told}",
    ]

    def draw() -> "Plot":
        from studio.figures import similarity_figure

        panels = dict(q["ranks"]) | {f"seeds W_{letter}": of["seeds"]["trained"] for letter, of in (("q", q), ("v", v))}
        panels["by chance"] = q["seeds"]["chance"]
        title = f"φ of A: W_q at ranks {_LOW} and {_HIGH}; two seeds of {_HIGH}"
        return similarity_figure(panels, first="the one", second="the other", title=title)

    return Result([Table(f"Directions in common, {q['path']} and {v['path']}", head, rows)], findings, draw)


def _amplified(asked: Asked, workspace: Workspace) -> list[Piece]:
    trained = [_trained(asked, workspace, r, seed) for r, seed in ((4, 0), (_HIGH, 1))]
    settings = {"of": [piece.digest for piece in trained]}
    return [*trained, Piece("table 7", lambda found: _table_7(trained, found), settings=settings)]


def _table_7(trained: list[Piece], found: Found) -> Record:
    told: Record = {}
    for piece, r in zip(trained, (4, _HIGH), strict=True):
        run = _run_of(piece, found.workspace)
        adapter = Adapter.load(run.adapter_folder)
        told[str(r)] = {}
        for path in _layers(adapter.factors, "q_proj"):
            W = read_matrix(run.spec.model, found.workspace, path)
            columns = {d: amplification(adapter.factors[path], W, directions=d) for d in ("delta", "weight", "random")}
            told[str(r)][path] = {
                direction: {
                    "projected": a.projected_norm,
                    "factor": a.factor,
                    "enrichment": a.enrichment,
                    "delta": a.delta_norm,
                    "weight": a.weight_norm,
                    "null_factor": a.null_factor,
                }
                for direction, a in columns.items()
                if a is not None
            }
        told[f"middle {r}"] = _middle(adapter, "q_proj")
    return told


_PAPER_7 = {"4": (0.32, 21.67, 0.02, 6.91, 21.5), "64": (1.90, 37.71, 0.33, 3.57, 1.9)}


def _tell_amplified(asked: Asked, records: Mapping[str, Record]) -> Result:
    head = ["", "‖UᵀWV‖: ΔW", "W", "random", "‖ΔW‖", "Factor", "Enrichment"]
    title = "Table 7, for the query of the middle layer"
    found = records.get("table 7")
    if found is None:
        return Result([Table(title, head, [])])
    rows, findings, lines = [], [], dict[str, list[float]]()
    for r, (delta, weight, random, norm, factor) in _PAPER_7.items():
        name = found[f"middle {r}"]
        if middle := found[r][name]:
            projected = [f"{middle[directions]['projected']:.3f}" for directions in ("delta", "weight", "random")]
            d = middle["delta"]
            rows.append(
                [f"r = {r}, {name}", *projected, f"{d['delta']:.3f}", f"{d['factor']:.2f}", f"{d['enrichment']:.2f}"]
            )
        paper = map(str, (delta, weight, random, norm, factor))
        rows.append([f"paper: r = {r}, W_q of layer 48", *paper, f"{delta / random:.1f}"])
        if layers := [columns for columns in found[r].values() if columns]:
            lines[f"r = {r}"] = [columns["delta"]["enrichment"] for columns in layers]
            findings.append(_enriched(r, layers))

    def draw() -> "Plot":
        from studio.figures import lines_figure

        number = min(map(len, lines.values()))
        return lines_figure(
            range(number),
            {name: values[:number] for name, values in lines.items()},
            title="W_q in ΔW's directions",
            x_label="layer",
            y_label="enrichment, × chance",
            level=(1.0, "chance"),
        )

    return Result([Table(title, head, rows)], findings, draw if lines else None)


def _enriched(r: str, layers: list[Record]) -> str:
    median = np.median([columns["delta"]["enrichment"] for columns in layers])
    null = np.median([columns["delta"]["null_factor"] for columns in layers])
    factor = np.median([columns["delta"]["factor"] for columns in layers])
    more = sum(columns["delta"]["enrichment"] > columns["random"]["enrichment"] for columns in layers)
    delta, _, random, *_ = _PAPER_7[r]
    return (
        f"r = {r}: ΔW's directions hold more of W than random ones in {more} of {len(layers)} layers, at the median "
        f"{median:.2f} times chance (the paper's layer: {delta / random:.1f}). The median factor is {factor:.2f}; "
        f"of a random ΔW of the same norm it would be {null:.2f}."
    )


_DIFFERS = (
    "the starter of 135 M parameters in place of GPT-3 after its full training; facts to text; "
    "different seeds for different ranks, since with one seed the rows of the smaller A are those of the larger one."
)

SUBSPACES = Experiment(
    "subspaces",
    "Do ranks and seeds find the same directions?",
    "Figures 3 and 4",
    "How much of the directions of r = 8 lies in those of r = 64, and how much do two seeds share?",
    _DIFFERS,
    _subspaces,
    _tell_subspaces,
)
AMPLIFICATION = Experiment(
    "amplification",
    "Does ΔW amplify what W already has?",
    "Table 7",
    "How much of W lies in ΔW's directions, beside W's own and random ones?",
    _DIFFERS,
    _amplified,
    _tell_amplified,
)
