"""The commands that look at adapters: spectrum, compare, truncate."""

import argparse
import csv
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from core import (
    Adapter,
    LoRAError,
    Spectrum,
    amplification,
    compare,
    intruder_dimensions,
    quoted,
    random_sigma,
    spectra,
    truncate,
    weight_svd,
)
from studio import command_line
from studio.workspace import Workspace

T = TypeVar("T")

ADAPTER_HELP = "an adapter: a run's id or how it begins, a folder of PEFT's, or a file of loralib's with --scaling"


@dataclass(frozen=True)
class Opened:
    """An adapter, and where it is from.

    Attributes:
        adapter: The adapter.
        model: The base model that it was trained on, if the studio trained it.
    """

    adapter: Adapter
    model: str | None

    @property
    def notes(self) -> list[str]:
        """What its figures do not say."""
        notes, extras = [], self.adapter.trained_in_full
        if self.adapter.magnitudes:
            notes.append("DoRA also trained the length of each row; the figures are of its low-rank part, B·A, alone.")
        if extras:
            notes.append(
                f"It also trained {len(extras)} parameters in full, which have no factors: {', '.join(extras)}."
            )
        return notes


def add_commands(command: command_line.Add) -> None:
    """Adds the commands that look at adapters."""

    def add(name: str, run: Callable[..., int], help: str, *adapters: str, **more: str) -> argparse.ArgumentParser:
        sub = command(name, run, help, **more)
        for one in adapters:
            sub.add_argument(one.lower(), metavar=one, help=ADAPTER_HELP)
        sub.add_argument("--scaling", type=float, metavar="X", help=command_line.SCALING_HELP)
        sub.add_argument("--parts", metavar="NAMES", help=command_line.PARTS_HELP)
        return sub

    _add_spectrum(add)
    _add_algebra(add)


def _add_spectrum(add: command_line.Add) -> None:
    spectrum = add(
        "spectrum",
        _spectrum,
        "Say what an adapter learned, matrix by matrix.",
        "ADAPTER",
        more="Ranks and sizes of each ΔW from its factors alone; and beside the base model's weights, if they are at "
        "hand, the paper's Table 7 with its level of chance.",
        examples="""
            lora-studio spectrum 20261126
            lora-studio spectrum 20261126 --figures figures
            lora-studio spectrum my-adapter --base ~/models/llama --csv
            """,
    )
    spectrum.add_argument(
        "--base", metavar="MODEL", help="the base model, for ΔW beside W (default: the one that the run was trained on)"
    )
    spectrum.add_argument(
        "--intruders",
        action="store_true",
        help="also count directions of W + ΔW that are none of W's; minutes at first, while W's SVDs are made",
    )
    form = spectrum.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help=command_line.JSON_HELP)
    form.add_argument("--csv", action="store_true", help="print CSV, a line a matrix")
    form.add_argument("--figures", metavar="DIR", type=Path, help="write figures as PNG into this folder instead")


def _add_algebra(add: command_line.Add) -> None:
    beside = add(
        "compare",
        _compare,
        "Say what two adapters of one model share, and what adding them would do.",
        "A",
        "B",
        more="φ is the paper's subspace similarity, from 0 to 1, beside that of random directions.",
        examples="""
            lora-studio compare 20261126-0911 20261126-1030
            lora-studio compare 20261126 my-adapter --rank 4
            """,
    )
    beside.add_argument("--rank", type=int, metavar="K", help="overlap of the K strongest directions (default: of all)")
    beside.add_argument("--json", action="store_true", help=command_line.JSON_HELP)
    shorter = add(
        "truncate",
        _truncate,
        "Write the nearest adapter of fewer directions, and say how far off it is.",
        "A",
        examples="""
            lora-studio truncate 20261126 smaller --rank 4
            lora-studio truncate 20261126 smaller --energy 0.9 --pooled
            """,
    )
    shorter.add_argument("out", metavar="OUT", type=Path, help="the folder to write, in PEFT's layout")
    wanted = shorter.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--rank", type=int, metavar="K", help="directions to keep in each matrix")
    wanted.add_argument("--energy", type=float, metavar="SHARE", help="share of each ‖ΔW‖² to keep, such as 0.9")
    wanted.add_argument(
        "--directions", type=int, metavar="N", help="directions to keep in all, where the strongest are"
    )
    shorter.add_argument(
        "--pooled", action="store_true", help="let matrices compete: --energy of the whole, --rank on average"
    )
    shorter.add_argument("--json", action="store_true", help=command_line.JSON_HELP)


def open_adapter(name: str, workspace: Workspace, *, scaling: float | None = None, parts: str | None = None) -> Opened:
    """Opens an adapter by what people call it: a run of the workspace, a folder of PEFT's, a file of loralib's.

    Raises:
        LoRAError: There is none, or it cannot be read.
    """
    if Path(name).exists():
        found = Adapter.load(name, scaling=scaling, parts=tuple(parts.split(",")) if parts else None)
        return Opened(found, None)
    if "/" in name or Path(name).suffix:
        raise LoRAError(f"`ADAPTER` (={quoted(name)}) must be a run, or a folder or file that exists.")
    from studio.runs import Runs

    run = Runs(workspace).find(name)
    if not run.has_adapter:
        raise LoRAError(f"Run {run.id} has no adapter yet; it is saved at the first evaluation and at the end.")
    return Opened(Adapter.load(run.adapter_folder), run.spec.model)


def told(items: Iterable[T], total: int, doing: str) -> Iterator[T]:
    """Yields the items; from the second second on, a line beside the output says how far it is."""
    last = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > 1:
            last = time.monotonic()
            print(f"{doing}: {number} of {total} …", file=sys.stderr, flush=True)


# What is found out


def rows_of(adapter: Adapter, found: Mapping[str, Spectrum]) -> dict[str, dict[str, Any]]:
    """Returns path → what is known of ΔW there from its factors alone, layer by layer."""
    return {
        path: {
            "out_features": f.shape[0],
            "in_features": f.shape[1],
            "r": f.r,
            "scaling": f.scaling,
            "norm": found[path].norm,
            "rank": found[path].rank,
            "effective_rank": found[path].effective_rank,
            "stable_rank": found[path].stable_rank,
            "participation_ratio": found[path].participation_ratio,
            "directions_for_90_percent": found[path].rank_for_energy(0.9),
            "sigma": found[path].sigma.tolist(),
        }
        for path, f in sorted(adapter.factors.items(), key=lambda item: in_order(item[0]))
    }


def in_order(path: str) -> list[tuple[int, str]]:
    """Returns a key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def beside_weights(
    adapter: Adapter, found: Mapping[str, Spectrum], base: str, workspace: Workspace, *, intruders: bool = False
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns path → how ΔW lies towards W there, and why it is not known of some.

    Raises:
        LoRAError: The adapter does not fit the model.
    """
    from studio import models
    from studio.opened import read_matrix

    model = models.skeleton(base, workspace)
    adapter.check_fit(model)
    rows, missing = {}, {}
    doing = f"Comparing with the weights of {base}" + ", singular vectors and all" * intruders
    for path, f in told(adapter.factors.items(), len(adapter.factors), doing):
        try:
            W = read_matrix(base, workspace, path, model)
            seen = amplification(found[path], W)
            size = seen.weight_norm if seen else float(W.double().norm())
            rows[path] = {"weight_norm": size, "relative_norm": found[path].norm / size if size else None}
            for name in ("r", "projected_norm", "null", "enrichment", "factor", "null_factor"):
                rows[path]["directions" if name == "r" else name] = None if seen is None else getattr(seen, name)
            if intruders and not adapter.magnitudes:
                svd = weight_svd(W, workspace.cache / "svd")
                strange = intruder_dimensions(f, svd, min(10, *W.shape))
                rows[path] |= {"intruders": strange.count, "intruder_energy": strange.energy_share}
                rows[path] |= {"max_cosine": strange.max_cosine.tolist(), "cosine_null": strange.null}
        except LoRAError as error:
            missing.setdefault(str(error), []).append(path)
    notes = [f"Of {len(paths)} matrices, such as {paths[0]}: {reason}" for reason, paths in missing.items()]
    if intruders and adapter.magnitudes:
        notes.append("W + ΔW is not what a DoRA layer computes with, so its intruders are not counted.")
    return rows, notes


# Printing


def _spectrum(args: argparse.Namespace, workspace: Workspace) -> int:
    opened = open_adapter(args.adapter, workspace, scaling=args.scaling, parts=args.parts)
    found = spectra(opened.adapter.factors)
    rows, notes = rows_of(opened.adapter, found), opened.notes
    base = args.base or opened.model
    if base:
        beside, missing = beside_weights(opened.adapter, found, base, workspace, intruders=args.intruders)
        rows = {path: row | beside.get(path, {}) for path, row in rows.items()}
        notes += missing
    elif args.intruders:
        raise LoRAError("`--intruders` needs the base model's weights; name the model by --base.")
    else:
        named = f", which says that it was made for {opened.adapter.base_model}" if opened.adapter.base_model else ""
        notes.append(f"ΔW is not compared with W: no base weights are at hand{named}. Name the model by --base.")
    if args.json:
        print(json.dumps({"base": base, "matrices": rows, "notes": notes}, indent=2))
        return 0
    if args.csv:
        columns = ["path", *dict.fromkeys(name for row in rows.values() for name in row)]
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({"path": path} | {k: _cell(v) for k, v in row.items()} for path, row in rows.items())
    elif args.figures is not None:
        for written in _draw(opened.adapter, found, rows, args.figures):
            print(written)
    else:
        _print_rows(rows, with_weights=any("weight_norm" in row for row in rows.values()))
    for note in notes:
        print(note, file=sys.stderr)
    return 0


def _cell(value: Any) -> Any:
    return " ".join(map(repr, value)) if isinstance(value, list) else value


def _print_rows(rows: Mapping[str, Mapping[str, Any]], *, with_weights: bool) -> None:
    columns = {"r": ("r", "d"), "rank": ("rank", "d"), "effective_rank": ("effective", ".2f")}
    columns |= {"directions_for_90_percent": ("for 90 %", "d"), "norm": ("‖ΔW‖", ".4g")}
    if with_weights:
        columns |= {"relative_norm": ("‖ΔW‖/‖W‖", ".4f"), "enrichment": ("enrichment", ".2f")}
        columns |= {"factor": ("factor", ".2f"), "null_factor": ("by chance", ".2f")}
    if any("intruders" in row for row in rows.values()):
        columns |= {"intruders": ("intruders", "d"), "intruder_energy": ("of energy", ".2f")}
    width = max(len("matrix"), *map(len, rows))
    print(f"{'matrix':<{width}}" + "".join(f"{title:>12}" for title, _ in columns.values()))
    for path, row in rows.items():
        values = ((row.get(name), form) for name, (_, form) in columns.items())
        print(f"{path:<{width}}" + "".join("–".rjust(12) if v is None else f"{v:>12{form}}" for v, form in values))
    if with_weights:
        print(
            "enrichment: how many times as much of W lies in ΔW's directions as in random ones; by chance it is 1.\n"
            "factor: ‖ΔW‖ / ‖Uᵀ·W·V‖, the paper's amplification; beside it that of a random ΔW of the same norm."
        )


def _draw(
    adapter: Adapter, found: Mapping[str, Spectrum], rows: Mapping[str, Mapping[str, Any]], folder: Path
) -> list[Path]:
    from studio import figures
    from studio.svg import save_figure

    maps = {"effective_rank": ("Effective rank of ΔW", "directions"), "norm": ("Size of ΔW", "‖ΔW‖_F")}
    maps |= {"relative_norm": ("Size of ΔW beside W", "‖ΔW‖ / ‖W‖"), "enrichment": ("Enrichment", "× chance")}
    drawn = {}
    for name, (title, unit) in maps.items():
        values = {path: row[name] for path, row in rows.items() if row.get(name) is not None}
        if values:
            drawn[name.replace("_", "-")] = figures.heat_figure(values, title=title, unit=unit)
    chance = {path: random_sigma(f).tolist() for path, f in adapter.factors.items()}
    sigma = {path: s.sigma.tolist() for path, s in found.items()}
    drawn["spectra"] = figures.profile_figure(sigma, title="σ of ΔW", chance=chance)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            written.append(folder / f"{name}.png")
            save_figure(figure, written[-1])
    except OSError as error:
        raise LoRAError(f"`--figures` (={str(folder)!r}) must be a folder that can be written ({error}).") from error
    return written


def _compare(args: argparse.Namespace, workspace: Workspace) -> int:
    if args.rank is not None and args.rank < 1:
        raise LoRAError(f"`--rank` (={args.rank}) must be at least 1.")
    first, second = (open_adapter(name, workspace, scaling=args.scaling, parts=args.parts) for name in (args.a, args.b))
    found = compare(first.adapter, second.adapter)
    rows: dict[str, dict[str, Any]] = {}
    for path, m in sorted(found.matrices.items(), key=lambda item: in_order(item[0])):
        rows[path] = _overlap_row(m.overlap) | {"ranks": m.ranks}
        i, j = (min(args.rank or rank, rank) - 1 for rank in m.ranks)
        for side in ("left", "right"):
            known = i >= 0 and j >= 0
            rows[path][f"phi_{side}"] = float(getattr(m, side)[i, j]) if known else None
            rows[path][f"phi_{side}_null"] = float(getattr(m, f"{side}_null")[i, j]) if known else None
            rows[path][f"{side}_angles"] = getattr(m, f"{side}_angles").tolist()
    notes = list(dict.fromkeys(first.notes + second.notes))
    together = _overlap_row(found.overlap)
    if args.json:
        said = {"together": together, "matrices": rows, "notes": notes}
        print(json.dumps(said | {"only_first": found.only_first, "only_second": found.only_second}, indent=2))
        return 0
    width = max(len("all together"), *map(len, rows), 0)
    titles = ("cosine", "norm ratio", "interference", "φ read", "chance", "φ written", "chance")
    print(f"{'matrix':<{width}}" + "".join(f"{title:>13}" for title in titles))
    names = ("cosine", "norm_ratio", "interference", "phi_right", "phi_right_null", "phi_left", "phi_left_null")
    for path, row in (*rows.items(), ("all together", together)):
        cells = (row.get(name) for name in names)
        print(f"{path:<{width}}" + "".join("–".rjust(13) if v is None else f"{v:>13.4f}" for v in cells))
    print(
        f"cosine: of random updates ±{found.overlap.null:.1e} over all together. interference: "
        "‖ΔW₁ + ΔW₂‖² / (‖ΔW₁‖² + ‖ΔW₂‖²) − 1; 0 when the sum keeps both as they were.\n"
        "φ: how much of the inputs that they read, and of the outputs that they write, is the same."
    )
    for name, only in ((args.a, found.only_first), (args.b, found.only_second)):
        if only:
            print(f"{len(only)} matrices are in {name} alone, such as {only[0]}.")
    for note in notes:
        print(note, file=sys.stderr)
    return 0


def _overlap_row(overlap: Any) -> dict[str, Any]:
    names = ("norms", "inner_product", "cosine", "null", "norm_ratio", "interference")
    return {"cosine_null" if name == "null" else name: getattr(overlap, name) for name in names}


def _truncate(args: argparse.Namespace, workspace: Workspace) -> int:
    if (args.out / "adapter_config.json").exists():
        raise LoRAError(f"`OUT` (={str(args.out)!r}) must not hold an adapter already; name another folder.")
    opened = open_adapter(args.a, workspace, scaling=args.scaling, parts=args.parts)
    wanted = {"rank": args.rank, "energy": args.energy, "directions": args.directions}
    cut = truncate(opened.adapter, **wanted, pooled=args.pooled)
    cut.adapter.save(args.out)
    before, after = opened.adapter.num_parameters, cut.adapter.num_parameters
    said = {"out": str(args.out), "ranks": cut.ranks, "errors": dict(cut.errors), "norm": cut.norm}
    said |= {"relative_error": cut.relative_error, "energy": cut.energy}
    if args.json:
        print(json.dumps(said | {"num_parameters": after, "num_parameters_before": before}, indent=2))
        return 0
    ranks = list(cut.ranks.values())
    print(
        f"{args.out}: {sum(ranks)} directions in {len(ranks)} matrices, {min(ranks)} to {max(ranks)} in each; "
        f"{after:,} parameters instead of {before:,}.\n"
        f"It holds {cut.energy:.4%} of ‖ΔW‖²; the error is {cut.relative_error:.4%} of ‖ΔW‖."
    )
    return 0
