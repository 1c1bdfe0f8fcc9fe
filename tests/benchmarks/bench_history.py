"""What a long run and a long history cost the page: python -m tests.benchmarks.bench_history [--steps N] [--runs N]

Builds both on disk, and prints how long a look takes beside the most that it may take; the exit code says how many of
them take longer. Nothing trains meanwhile.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from core import (
    Adapter,
    Evaluated,
    Event,
    Factors,
    Finished,
    LoRAConfig,
    Noted,
    Started,
    Step,
    TrainConfig,
    to_record,
)
from studio import app
from studio.event_log import EventLog, EventWriter
from studio.runs import Run, Runs
from studio.specs import RunSpec
from studio.state import Studio
from studio.tabs import runs as runs_tab
from studio.workspace import Workspace
from tests.studio.page.pages import question

NUM_POLLS, STEPS_BETWEEN = 40, 5
OPENING_SECONDS, POLL_SECONDS = 1.0, 0.05


def said(first: int, last: int, draw: random.Random, eval_every: int = 10) -> Iterator[Event]:
    """Yields what a run says from step `first` to `last`; the loss falls, with noise and a rare spike."""
    for step in range(first, last + 1):
        falling = 1 + 2 * math.exp(-step / 40)
        loss = falling + 0.2 * draw.random() + 9 * (draw.random() < 1e-3)
        yield Step(step, loss, 1e-3 / step, draw.random(), 900, 400, 0.2 + draw.random(), 10**9 + step)
        if step % eval_every == 0:
            yield Evaluated(step, falling, 2_000, 1.5)


def write(run: Run, *events: Event) -> None:
    """Writes a run's log in one go; `EventWriter`, whose form this is, waits for the disk at many a line."""
    lines = (json.dumps({"time": 1.8e9 + i, **to_record(event)}) + "\n" for i, event in enumerate(events))
    (run.folder / "events.jsonl").write_text("".join(lines))
    (run.folder / "lock").touch()


def build(workspace: Workspace, num_steps: int, num_runs: int) -> Run:
    """Fills the workspace with runs that have ended; returns one more, of `num_steps` so far."""
    runs, draw = Runs(workspace), random.Random(0)
    begin = Noted("Reading the data"), Started(num_steps, 10_000, 10**8, "cpu", "float32", "memory of this process")
    adapter = Adapter(LoRAConfig(r=1), {"model.q_proj": Factors(torch.ones(1, 64), torch.ones(64, 1), 16.0)})
    for i in range(num_runs):
        steps = draw.randint(60, 200)
        run = runs.create(RunSpec(name=f"Run {i}", train=TrainConfig(steps=steps)))
        write(run, *begin, *said(1, steps, draw), Finished(steps, "done", 2 * 10**9))
        if i % 5 == 0:
            adapter.save(run.adapter_folder)
    run = runs.create(RunSpec(name="Long", train=TrainConfig(steps=2 * num_steps)))
    write(run, *begin, *said(1, num_steps, draw, eval_every=1_000))
    return run


def seconds(work: Callable[[], object]) -> float:
    """Returns how long `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def poll(studio: Studio, run: Run, num_steps: int) -> Iterator[tuple[float, float]]:
    """Yields what each look of a page takes that shows `run`, to which steps are added between two looks.

    The time that passes, and this process's own, which other processes on the machine do not lengthen.
    """
    writer, draw = EventWriter(run.log), random.Random(1)
    for i in range(NUM_POLLS):
        first = num_steps + 1 + i * STEPS_BETWEEN
        for event in said(first, first + STEPS_BETWEEN - 1, draw, eval_every=1_000):
            writer.write(event)
        begin = time.process_time()
        passed = seconds(lambda: app.news(studio, question(run.id)))
        yield passed, time.process_time() - begin
    writer.close()


def opened(folder: Path) -> list[list[float]]:
    """Returns how long Runs takes to open in a process of its own, twice, and of that its own time; without imports."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_history", "--open", str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


_too_slow: list[str] = []


def show(what: str, took: float, limit: float | None = None, *, must_hold: bool = True) -> None:
    if limit and must_hold and took > limit:
        _too_slow.append(what)
    print(f"{what:<58}{took * 1e3:>9,.1f} ms" + (f"   at most {limit * 1e3:,.0f} ms" if limit else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, help="steps of the long run")
    parser.add_argument("--runs", type=int, default=1_000, help="runs in the history")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        studio = Studio(Workspace(args.open))
        took = []
        for _ in range(2):
            begin = time.process_time()
            passed = seconds(lambda: runs_tab.listed(studio))
            took.append((passed, time.process_time() - begin))
        print(json.dumps(took))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(folder)
        long = build(workspace, args.steps, args.runs)
        print(f"{args.runs:,} runs that have ended, and one of {args.steps:,} steps that is going on")
        with long.locked():
            show("the long run's log, first read", seconds(lambda: EventLog(long.folder / "events.jsonl").read()))
            first, second = opened(workspace.root)
            show("Runs, opened for the first time ever", first[0])
            show("Runs, opened again", second[0], OPENING_SECONDS)
            passed, own = zip(*(opened(workspace.root)[0] for _ in range(3)), strict=True)
            show("Runs, opened by a new server (median)", statistics.median(passed), OPENING_SECONDS, must_hold=False)
            show("of that, this process's own time (least)", min(own), OPENING_SECONDS)  # others only lengthen it
            first, *looks = poll(Studio(workspace), long, args.steps)
            passed, own = zip(*looks, strict=True)
            show("a page's first look at the long run", first[0])
            more = f"a look after {STEPS_BETWEEN} more steps (median)"
            show(more, statistics.median(passed), POLL_SECONDS, must_hold=False)  # others may take the cores meanwhile
            show("of that, this process's own time (median)", statistics.median(own), POLL_SECONDS)
            show("the slowest of them", max(passed), POLL_SECONDS, must_hold=False)
        opened(workspace.root)
        show("Runs, opened by a new server once all have ended", opened(workspace.root)[0][0], OPENING_SECONDS)
    if _too_slow:
        print("Too slow: " + "; ".join(_too_slow))
    return len(_too_slow)


if __name__ == "__main__":
    sys.exit(main())
