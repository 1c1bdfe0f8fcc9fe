"""Do ranks and seeds share directions, and does ΔW amplify what W has: the paper's figures 3 and 4, and its Table 7."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from core import Adapter, Factors, LoRAConfig, amplification, basis_of, subspace_similarity
from studio.comparing import panels, start
from studio.experiments.base import Asked, Experiment, Found, Piece, Record, Result, Table
from studio.experiments.runs import QUERY_VALUE, of_text
from studio.opened import read_matrix
from studio.runs import Run, Runs
from studio.workspace import Workspace

if TYPE_CHECKING:
    from studio.figures.style import Plot

_LOW, _HIGH = 8, 64
_KINDS = ("q_proj", "v_proj")


def _trained(asked: Asked, workspace: Workspace, r: int, seed: int) -> Piece:
    """Returns the piece that trains query and value with one rank and seed, and says where its adapter is."""
    lora = LoRAConfig(r=r, alpha=8 * r, target_modules=QUERY_VALUE)
    spec = of_text(asked, workspace, f"W_q, W_v r {r}", lora=lora, seed=seed)
    return Piece(f"r {r}, seed {seed}", _where, spec)


def _where(found: Found) -> Record:
    assert found.run is not None
    return {"run": found.run.id}


def _middle(adapter: Adapter, kind: str) -> str:
    """Returns the path of that matrix in the middle layer, as the paper takes layer 48 of 96."""
    paths = [path for path in adapter.factors if path.endswith(kind)]
    return sorted(paths, key=lambda path: int(re.findall(r"\d+", path)[0]))[len(paths) // 2]


def _subspaces(asked: Asked, workspace: Workspace) -> list[Piece]:
    trained = [_trained(asked, workspace, r, seed) for r, seed in ((_LOW, 0), (_HIGH, 1), (_HIGH, 2))]
    settings = {"of": [piece.digest for piece in trained]}
    return [*trained, Piece("similarity", lambda found: _similarity(trained, found), settings=settings)]


def _run_of(piece: Piece, workspace: Workspace) -> Run:
    return next(run for run in Runs(workspace).list() if run.spec == piece.spec)


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
            "first": [_first(low.factors[p], high.factors[p]) for p in low.factors if p.endswith(kind)],
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
    found = records.get("similarity")
    head = ["", "W_q", "W_v", "Chance", "Paper, layer 48"]
    if found is None:
        return Result([Table("Directions in common", head, [])])
    q, v = (found[kind] for kind in _KINDS)

    def phi(what: str, panel: str, i: int, j: int) -> list[str]:
        return [f"{np.array(each[what][panel])[i - 1, j - 1]:.3f}" for each in (q, v)]

    least = min(np.array(q["seeds"]["trained"]).shape[0], 64)
    rows = [
        [
            f"φ(1, 1) of A, r = {_LOW} against {_HIGH}, after training",
            *phi("ranks", "trained", 1, 1),
            *phi("ranks", "chance", 1, 1)[:1],
            "> 0.5",
        ],
        ["the same before training", *phi("ranks", "step 0", 1, 1), "", ""],
        [
            f"φ(8, 64) of A, r = {_LOW} against {_HIGH}",
            *phi("ranks", "trained", _LOW, _HIGH),
            *phi("ranks", "chance", _LOW, _HIGH)[:1],
            "fig. 3",
        ],
        [
            f"φ({least}, {least}) of A, two seeds of r = {_HIGH}",
            *phi("seeds", "trained", least, least),
            *phi("seeds", "chance", least, least)[:1],
            "fig. 4",
        ],
        [
            "φ(1, 1) of ΔW's right directions, median over layers",
            *(f"{np.median(each['first']):.3f}" for each in (q, v)),
            "",
            "",
        ],
    ]
    one = float(np.array(q["ranks"]["trained"])[0, 0])
    seeds = {kind: float(np.array(found[kind]["seeds"]["trained"])[least - 1, least - 1]) for kind in _KINDS}
    findings = [
        f"The top direction of A at r = {_LOW} lies in the one at r = {_HIGH} to {one:.2f} in W_q"
        + (
            ": as in the paper, above a half." if one > 0.5 else "; the paper has above a half after its full training."
        ),
        f"Two seeds share {seeds['q_proj']:.3f} of W_q's subspace and {seeds['v_proj']:.3f} of W_v's; the paper "
        "finds more in "
        "W_q than in W_v.",
    ]

    def draw() -> "Plot":
        from studio.figures import similarity_figure

        tables = {f"{name[2:] if 0 else name}": np.array(table) for name, table in q["ranks"].items()}
        tables |= {f"seeds: {name}": np.array(table) for name, table in q["seeds"].items()}
        return similarity_figure(
            tables, first=f"r = {_LOW}, or a seed", second=f"r = {_HIGH}, or another", title=f"φ of A, {q['path']}"
        )

    return Result([Table("Directions in common", head, rows)], findings, draw)


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
        for path in (p for p in adapter.factors if p.endswith("q_proj")):
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
    found = records.get("table 7")
    if found is None:
        return Result([Table("Table 7", head, [])])
    rows, findings = [], []
    for r, (delta, weight, random, norm, factor) in _PAPER_7.items():
        of_layers = [c for c in found[r].values() if "delta" in c]
        middle = found[r][found[f"middle {r}"]]
        if "delta" in middle:
            d = middle["delta"]
            values = [middle[k]["projected"] for k in ("delta", "weight", "random")]
            rows.append(
                [
                    f"r = {r}, {found[f'middle {r}']}",
                    *(f"{v:.3f}" for v in values),
                    f"{d['delta']:.3f}",
                    f"{d['factor']:.2f}",
                    f"{d['enrichment']:.2f}",
                ]
            )
        rows.append(
            [
                f"paper: r = {r}, W_q of layer 48",
                f"{delta}",
                f"{weight}",
                f"{random}",
                f"{norm}",
                f"{factor}",
                f"{delta / random:.1f}",
            ]
        )
        if of_layers:
            median = float(np.median([c["delta"]["enrichment"] for c in of_layers]))
            high = sum(c["delta"]["enrichment"] > c["random"]["enrichment"] for c in of_layers)
            findings.append(
                f"r = {r}: over all layers the median enrichment is {median:.2f}; ΔW's directions hold more of W "
                "than random "
                f"ones in {high} of {len(of_layers)}. A random ΔW of the same norm would have a factor of "
                f"{np.median([c['delta']['null_factor'] for c in of_layers]):.2f} (median)."
            )

    def draw() -> "Plot":
        from studio.figures import lines_figure

        lines = {f"r = {r}": [c["delta"]["enrichment"] for c in found[r].values() if "delta" in c] for r in _PAPER_7}
        number = min(map(len, lines.values()))
        return lines_figure(
            range(number),
            {k: v[:number] for k, v in lines.items()},
            title="Enrichment of W_q in ΔW's directions",
            x_label="layer",
            y_label="× chance",
            level=(1.0, "chance"),
        )

    return Result([Table("Table 7, for the query of the middle layer", head, rows)], findings, draw)


_DIFFERS = (
    "a model of 135 M parameters after hundreds of steps in place of GPT-3 after its full training; facts to text; "
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
