"""What looking at an adapter costs: python -m tests.benchmarks.bench_analysis [--cache DIR] [--repeats N]

Of all 210 linear matrices of the starter model at r = 16: sigma and ranks, Table 7's rows of ΔW and of chance, and
intruder dimensions with W's SVD at hand (the first time it is made, which takes minutes); and sigma of the 560 matrices
of a model of 70 B. The weights are real, the factors random. Prints medians beside the most that each may take; the
exit code says how many take longer. What counts is the processor's time on one thread, so that what else the machine
does is not held against it.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from core import Factors, adaptable, amplification, intruder_dimensions, matrix_at, spectra, weight_svd
from studio import models
from studio.workspace import Workspace

R = 16
LAYER_70B = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]


def gaussian(out: int, width: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Factors:
    """Returns factors of an update at random."""
    A, B = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((R, width), (out, R)))
    return Factors(A, B, 2.0)


def ranks_of(factors: dict[str, Factors]) -> None:
    """Does what a table of an adapter needs."""
    for found in spectra(factors).values():
        _ = found.rank, found.effective_rank, found.stable_rank, found.norm, found.rank_for_energy(0.9)


def table_7(factors: dict[str, Factors], weights: dict[str, torch.Tensor]) -> None:
    """Computes the rows of ΔW and of chance for each matrix."""
    found = spectra(factors)
    for path, W in weights.items():
        for directions in ("delta", "random"):
            amplification(found[path], W, None, directions)


def intruders(factors: dict[str, Factors], weights: dict[str, torch.Tensor], cache: Path) -> None:
    """Finds the intruders of each matrix, with W's SVD from the cache."""
    for path, W in weights.items():
        _ = intruder_dimensions(factors[path], weight_svd(W, cache)).count


def median_seconds(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Returns the medians of the processor's time that `work` takes, and of the clock's."""
    taken = []
    for _ in range(repeats):
        begin = time.process_time(), time.perf_counter()
        work()
        taken.append((time.process_time() - begin[0], time.perf_counter() - begin[1]))
    own, clock = zip(*taken, strict=True)
    return statistics.median(own), statistics.median(clock)


def main() -> int:
    """Measures, prints, and returns how many figures miss their limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="where W's SVDs are kept (default: in the workspace)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    workspace = Workspace.default()
    cache = args.cache or workspace.cache / "svd"
    generator = torch.Generator().manual_seed(0)
    model = models.skeleton("starter", workspace)
    shapes = {path: shape for path, shape in adaptable(model).items() if ".layers." in path}
    weights = {}
    for path in shapes:
        holder, as_matrix = matrix_at(model, path)
        weights[path] = as_matrix(models.read_weight("starter", workspace, holder))
    factors = {}
    for path, shape in shapes.items():
        f = gaussian(*shape, generator)
        size = 0.1 * float(weights[path].float().norm()) / float(f.delta_weight().norm())
        factors[path] = Factors(f.A, f.B * size, f.scaling)
    for number, (path, W) in enumerate(weights.items(), 1):
        weight_svd(W, cache)
        print(f"SVD of W: {number} of {len(weights)} ({path}) …", end="\r", file=sys.stderr, flush=True)
    large = {
        f"{i}.{j}": gaussian(*shape, generator, torch.bfloat16) for i in range(80) for j, shape in enumerate(LAYER_70B)
    }
    work: dict[str, tuple[float, Callable[[], object]]] = {
        f"sigma and ranks, {len(factors)} matrices of the starter model": (0.5, lambda: ranks_of(factors)),
        f"Table 7: ΔW and chance, {len(factors)} matrices": (3.0, lambda: table_7(factors, weights)),
        f"intruders, {len(factors)} matrices, SVDs on disk": (10.0, lambda: intruders(factors, weights, cache)),
        f"sigma and ranks, {len(large)} matrices of a 70 B model": (20.0, lambda: ranks_of(large)),
    }
    print(f"\none thread, r = {R}, load {os.getloadavg()[0]:.1f}")
    missed = 0
    for title, (limit, one) in work.items():
        own, clock = median_seconds(one, args.repeats)
        missed += own > limit
        print(f"{title:<55} {own:7.2f} s  (by the clock {clock:.2f}; at most {limit:g})", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
