"""Measures ours beside PEFT, loralib and the bare products: python -m tests.benchmarks [a b c …] [--out DIR]

Workloads: a real rows · b full rows · c encoder · d inference · e switching adapters · f spectrum · g growth · h full
fine-tuning. All variants of one run in this process, in turn; figures are medians, ratios are medians of each round's.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path

import torch

from core import resolve_device, resolve_dtype
from studio.jobs import KEEPS_MEMORY
from studio.workspace import Workspace
from tests.benchmarks.measure import Row
from tests.benchmarks.workloads import WORKLOADS, Bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", choices=[*WORKLOADS, []], help="which; all by default")
    parser.add_argument("--device", default="auto", help="cpu, cuda, …")
    parser.add_argument("--precisions", help="fp32,bf16 (default: fp32, and bf16 where the device is fast at it)")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each variant (default: %(default)s)")
    parser.add_argument("--rows", default="", metavar="FILE", help="a data file for workload a; else a starter set")
    parser.add_argument("--out", type=Path, help="folder for the table, the plot and the figures as JSON")
    args = parser.parse_args()
    if not KEEPS_MEMORY.items() <= os.environ.items():  # all of them as a worker runs
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **KEEPS_MEMORY})
    device = resolve_device(args.device)
    fast = resolve_dtype("auto", device) == torch.bfloat16
    precisions = args.precisions.split(",") if args.precisions else ["fp32", "bf16"] if fast else ["fp32"]
    bench = Bench(device, precisions, args.rounds, args.rows, Workspace.default())
    print(f"{machine(device)} · torch {torch.__version__} · {torch.get_num_threads()} threads · {args.rounds} rounds\n")
    print("| | what | ratio | goal | medians | |\n|---|---|---|---|---|---|")
    rows = []
    for letter in args.workloads or WORKLOADS:
        for row in WORKLOADS[letter](bench):
            rows.append(row)
            print(line(row), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        records = [dataclasses.asdict(row) for row in rows]
        (args.out / "figures.json").write_text(json.dumps({"machine": machine(device), "rows": records}, indent=1))
        (args.out / "table.md").write_text("\n".join(map(line, rows)) + "\n")
        plot(rows, args.out / "ratios.png", machine(device))


def machine(device: torch.device) -> str:
    """Returns what ran it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [entry.partition(":")[2].strip() for entry in lines if entry.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def line(row: Row) -> str:
    """Returns a row of the table."""
    values = " · ".join(f"{name} {value:,.4g}" for name, value in row.values.items())
    figure = "" if row.ratio is None else f"{row.ratio:,.3g}"
    return f"| {row.workload} | {row.what} | {figure} | {row.target} | {values} {row.unit} | {row.note} |"


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Draws each figure that has a goal beside it."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.ratio and row.target]
    if not shown:
        return
    figure = Figure(figsize=(9, 0.45 * len(shown) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(reversed(shown)):
        goal = float("".join(c for c in row.target.partition("±")[0] if c.isdigit() or c == "."))
        assert row.ratio is not None
        axes.plot([goal, row.ratio], [place, place], color="0.7", zorder=1)
        axes.scatter([goal], [place], marker="|", s=160, color="0.3", zorder=2, label="goal" if place == 0 else None)
        axes.scatter([row.ratio], [place], color="#2563eb", zorder=3, label="measured" if place == 0 else None)
        axes.annotate(
            f"{row.ratio:,.3g}", (row.ratio, place), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7
        )
    labels = [f"{row.workload}  {row.what}  ({row.target})" for row in reversed(shown)]
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("ratio, or ms for the switch")
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
