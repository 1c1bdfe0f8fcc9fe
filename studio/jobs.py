"""Starting workers: each run trains in a process of its own, which outlives whoever started it."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from core import Evaluated, Event, Failed, Finished, LoRAError, Noted, Started, to_record
from studio.runs import Run, Runs, RunSpec

_children: list[subprocess.Popen[bytes]] = []


def start(runs: Runs, spec: RunSpec) -> Run:
    """Makes a run of `spec` and starts its worker, detached; returns at once.

    The worker inherits the run's lock, so the run is running from the moment this returns.

    Raises:
        LoRAError: Another run is going on, or the folder cannot be written.
    """
    _children[:] = [child for child in _children if child.poll() is None]
    with _one_at_a_time(runs):
        busy = runs.running()
        if busy is not None:
            raise LoRAError(f"“{busy.spec.name}” is still training on this machine; wait for it, or stop it first.")
        return _spawn(runs.create(spec))


@contextmanager
def _one_at_a_time(runs: Runs) -> Iterator[None]:
    """Keeps others from starting a run between the question whether one is going on and its start."""
    fd = os.open(runs.workspace.root / "starting.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _spawn(run: Run) -> Run:
    with run.locked() as lock, run.worker_log.open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "studio.worker", str(run.folder), "--lock-fd", str(lock)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
            # Waiting threads sleep instead of spinning: a step takes a fifth longer on an idle machine, and not ten
            # times as long beside a browser that wants the same cores.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )
    _children.append(child)
    return run


def follow(run: Run, *, as_json: bool = False) -> int:
    """Prints a run's events as they come, until its worker is gone; returns the exit code for a shell.

    Ctrl-C asks the worker to save and end, and goes on following it.

    Args:
        run: The run.
        as_json: One JSON object an event, instead of a line an evaluation.
    """
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
            run.ask_to_stop()
            events = run.follow()  # the generator that was interrupted is spent; the log remembers its place
            print(
                "Stopping after this step; the adapter is saved. Ctrl-C again leaves without waiting.", file=sys.stderr
            )
    if run.status == "interrupted":
        print(f"lora-studio: the worker ended without a word; see {run.worker_log}.", file=sys.stderr)
    return 0 if run.status in ("finished", "stopped") else 1


def as_line(event: Event) -> str | None:
    """Returns what a terminal shows of an event, or None for what it leaves out."""
    if isinstance(event, Noted):
        return event.message
    if isinstance(event, Started):
        return f"{event.num_steps} steps on {event.device}, weights in {event.precision}"
    if isinstance(event, Evaluated):
        return f"step {event.step:>5}  held-out loss {event.loss:.4f}  ({event.num_trained_tokens} tokens)"
    if isinstance(event, Finished):
        return (
            f"{event.reason.capitalize()} after step {event.step}; peak memory {event.peak_memory_bytes / 1e9:.2f} GB"
        )
    return f"Failed: {event.message}" if isinstance(event, Failed) else None
