"""The queue, and the workers: each run trains in a process of its own, which outlives whoever started it.

A run starts at once where its device is free, else it waits for its turn. While any run waits, one more detached
process, `python -m studio.jobs WORKSPACE`, starts the next whenever a device becomes free; so a closed page, or a
closed studio, holds nothing up, nor does a run that failed.
"""

import argparse
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from core import Evaluated, Event, Failed, Finished, LoRAError, Noted, Resumed, Started, resolve_devices, to_record
from studio import label_metrics
from studio.runs import Run, Runs, is_held
from studio.specs import RunSpec
from studio.workspace import Workspace

_children: list[subprocess.Popen[bytes]] = []


def start(runs: Runs, spec: RunSpec) -> Run:
    """Makes a run of `spec` and starts its worker, detached, or queues it; returns at once.

    The worker inherits the run's lock, so the run is running, or queued, from the moment this returns.

    Raises:
        LoRAError: The folder cannot be written, or the device is not there.
    """
    devices_of(spec)
    if spec.data.is_labelled:
        from studio import tasks  # with all that reads models and rows

        spec = tasks.settled(spec, runs.workspace)
    run = runs.create(spec)
    enqueue(runs, run)
    return run


def resume(runs: Runs, run: Run) -> None:
    """Starts a run's worker again, from its last checkpoint, or puts the run first in the queue.

    Raises:
        LoRAError: It is going on, or has taken all its steps.
    """
    if run.status in ("running", "queued"):
        raise LoRAError(f"Run {run.id} is {run.status} already; there is nothing to resume.")
    if run.status == "finished":
        raise LoRAError(f"Run {run.id} has taken all its steps; train it further by some more.")
    run.forget_stop()
    enqueue(runs, run, first=True)


def further(runs: Runs, run: Run, num_steps: int) -> Run:
    """Starts a run that goes on where `run` ended, by so many steps; `run` stays as it is.

    The learning rate follows the schedule of all its steps, the new ones included.

    Raises:
        LoRAError: `run` goes on itself, has no checkpoint, or the number is below 1.
    """
    if run.status in ("running", "queued"):
        raise LoRAError(f"Run {run.id} must have ended to be trained further; it is {run.status}.")
    if num_steps < 1:
        raise LoRAError(f"`steps` (={num_steps}) must be at least 1.")
    steps = run.checkpoints.steps()
    if not steps:
        raise LoRAError(f"Run {run.id} must have a checkpoint to be trained further; it has none. Start it anew.")
    name = re.sub(r" \(\+\d+ steps\)$", "", run.spec.name)
    longer = replace(run.spec.train, steps=steps[-1] + num_steps)
    return start(runs, run.continued(replace(run.spec, name=f"{name} (+{num_steps} steps)", train=longer)))


def enqueue(runs: Runs, run: Run, *, first: bool = False) -> None:
    """Queues a run as the last, or the first, and starts whatever can start now."""
    with _one_at_a_time(runs):
        places = [place for other in runs.queued() if (place := other.place) is not None]
        run.place = (min(places) - 1 if first else max(places) + 1) if places else 0.0
        _go_on(runs)


def wake(runs: Runs) -> None:
    """Sees to it that the queue goes on, where the machine went down while runs waited."""
    with _one_at_a_time(runs):
        _go_on(runs)


def _go_on(runs: Runs) -> None:
    if _start_what_can(runs) and not is_held(runs.workspace.root / "queue.lock"):
        with (runs.workspace.root / "queue.log").open("ab") as log:
            _children.append(_detached(["studio.jobs", str(runs.workspace.root)], log))


def move(runs: Runs, run: Run, by: int) -> None:
    """Moves a queued run `by` places down the queue, up if negative; at most to its ends.

    Raises:
        LoRAError: It is not queued.
    """
    with _one_at_a_time(runs):
        waiting = runs.queued()
        if run not in waiting:
            raise LoRAError(f"Run {run.id} must be queued to be moved; it is {run.status}.")
        now = waiting.index(run)
        waiting.insert(max(0, min(len(waiting) - 1, now + by)), waiting.pop(now))
        for place, other in enumerate(waiting):
            other.place = float(place)


def cancel(runs: Runs, run: Run) -> None:
    """Takes a run out of the queue; it can be resumed. One that has started meanwhile goes on."""
    with _one_at_a_time(runs):
        if run.place is not None:
            _tell(run, Finished(run.log.steps[-1].step if run.log.steps else 0, "stopped", 0))
            run.place = None


def kill(run: Run, patience_seconds: float = 10.0) -> None:
    """Ends a run's worker and all that it started, at once, and says so in its log once their memory is free.

    What was done since the last checkpoint is lost. Nothing happens to a run that is not running.

    Raises:
        LoRAError: They could not be ended in time.
    """
    end, groups = time.monotonic() + patience_seconds, list[int]()
    while run.is_running() or any(map(_lives, groups)):
        groups = run.groups or groups  # at first none has signed yet, maybe
        for group in groups:
            with suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        if time.monotonic() > end:
            named = ", ".join(map(str, groups))
            raise LoRAError(f"Run {run.id} could not be ended; its process groups are {named}: end them by hand.")
        time.sleep(0.02)
    if groups:
        _tell(run, Finished(run.log.steps[-1].step if run.log.steps else 0, "killed", 0))


def _lives(group: int) -> bool:
    """Says whether a process of the group is left; one that only waits for its parent to ask for its end is not."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):  # it is gone; or its number is another's by now
        return False
    stats = [_stat_of(file) for file in Path("/proc").glob("[0-9]*/stat")]
    return not stats or any(of == str(group) and state not in "ZX" for state, of in stats)


def _stat_of(file: Path) -> tuple[str, str]:
    """Returns a process's state and its group, of Linux's file on it; "X" for one that has gone meanwhile."""
    try:
        state, _, group = file.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return "X", ""
    return state, group


def _tell(run: Run, end: Finished | Failed) -> None:
    with run.locked():
        run.tell(end)


def devices_of(spec: RunSpec) -> set[str]:
    """Returns the devices that a run of this spec takes for itself: cpu, mps, cuda:0.

    Raises:
        LoRAError: One is not there.
    """
    devices = resolve_devices(spec.train.device)
    return {f"cuda:{device.index or 0}" if device.type == "cuda" else str(device) for device in devices}


def run_queue(runs: Runs, poll_seconds: float = 2.0) -> None:
    """Starts queued runs as devices become free, until none waits; returns at once where another process does it."""
    fd = os.open(runs.workspace.root / "queue.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return
    while True:
        with _one_at_a_time(runs):
            if not _start_what_can(runs):
                os.close(fd)  # before others may queue again: they look whether this is held
                return
        time.sleep(poll_seconds)


def _start_what_can(runs: Runs) -> bool:
    """Starts the queued runs whose devices are free, in their order; says whether some still wait."""
    _children[:] = [child for child in _children if child.poll() is None]
    waiting = runs.queued()
    if not waiting:
        return False
    busy = {device for run in runs.list() if run.is_running() for device in devices_of(run.spec)}
    for run in waiting:
        try:
            devices = devices_of(run.spec)
            if not devices & busy:
                _spawn(run)
                busy |= devices
        except (LoRAError, OSError) as error:  # the others must not wait for it
            _tell(run, Failed(f"The run could not be started: {error}"))
            run.place = None
    return any(run.place is not None for run in waiting)


@contextmanager
def _one_at_a_time(runs: Runs) -> Iterator[None]:
    """Keeps others from starting or queueing a run between the question what is going on and the answer."""
    fd = os.open(runs.workspace.root / "starting.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _spawn(run: Run) -> None:
    with run.locked() as lock, run.worker_log.open("ab") as log:
        _children.append(_detached(["studio.worker", str(run.folder), "--lock-fd", str(lock)], log, lock))
        run.place = None


KEEPS_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
}
"""What tells glibc to give no memory back before the process ends: what a step has freed, the next finds again. Given
back, each page would have to be fetched anew, half as much again of a step's time. And what tells it to keep no lists
of small blocks apart: an aligned tensor leaves one at its side, which would keep the two from becoming one when both
are free, so that the place does not do for the next tensor of that size."""

ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", **KEEPS_MEMORY}
"""Of a process that trains. Waiting threads sleep instead of spinning: a step takes a fifth longer on an idle machine,
and not ten times as long beside a browser that wants the same cores."""


def _detached(module: list[str], log: IO[bytes], *fds: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", *module],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=fds,
        env={**ENVIRONMENT, **os.environ},
    )


def follow(run: Run, *, as_json: bool = False) -> int:
    """Prints a run's events as they come, until its worker is gone; returns the exit code for a shell.

    Ctrl-C asks the worker to save and end, and goes on following it; a run that still waits is taken out of the queue.

    Args:
        run: The run.
        as_json: One JSON object an event, instead of a line an evaluation.
    """
    if run.place is not None:
        print("Queued: it starts when its device is free. Ctrl-C takes it out of the queue.", file=sys.stderr)
    events = run.follow()
    asked = False
    while True:
        try:
            for event in events:
                line = json.dumps(to_record(event)) if as_json else as_line(event)
                if line is not None:
                    print(line, flush=True)
            break
        except KeyboardInterrupt:
            if asked:
                raise
            asked = True
            if run.place is not None:
                cancel(Runs(Workspace(run.workspace_root)), run)
                continue
            run.ask_to_stop()
            events = run.follow()  # the generator that was interrupted is spent; the log remembers its place
            print(
                "Stopping after this step; the adapter is saved. Ctrl-C again leaves without waiting.", file=sys.stderr
            )
    if run.status == "interrupted":
        print(f"lora-studio: the worker ended without a word; see {run.worker_log}.", file=sys.stderr)
    return 0 if run.status in ("finished", "stopped", "paused") else 1


def as_line(event: Event) -> str | None:
    """Returns what a terminal shows of an event, or None for what it leaves out."""
    if isinstance(event, Noted):
        return event.message
    if isinstance(event, Started):
        return f"{event.num_steps} steps on {event.device}, weights in {event.precision}"
    if isinstance(event, Resumed):
        return f"Taken up again after step {event.step}"
    if isinstance(event, Evaluated):
        scores = f"  {label_metrics.words(event.metrics)}" if event.metrics else ""
        return f"step {event.step:>5}  held-out loss {event.loss:.4f}  (over {event.num_trained_tokens:,}){scores}"
    if isinstance(event, Finished):
        return (
            f"{event.reason.capitalize()} after step {event.step}; peak memory {event.peak_memory_bytes / 1e9:.2f} GB"
        )
    return f"Failed: {event.message}" if isinstance(event, Failed) else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m studio.jobs", description=run_queue.__doc__)
    parser.add_argument("workspace", help="the folder whose queue is to be run")
    run_queue(Runs(Workspace(parser.parse_args().workspace)))
