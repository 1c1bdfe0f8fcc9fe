"""Work that goes on behind the page in a process of its own, which outlives the page and the studio.

Its folder says all about it:
job.json         what was asked for
progress.jsonl   what is being done, a line each, and how it ended
lock             held by its process as long as it lives; holds the number of its process group
worker.log       what its process printed
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from core import LoRAError, is_of_memory, read_json
from studio.jobs import ENVIRONMENT
from studio.runs import is_held
from studio.workspace import write_whole

Line = dict[str, Any]
"""One line of progress.jsonl: `note` is what is being done, `end` how it ended, `problem` why not well."""

_children: list[subprocess.Popen[bytes]] = []


class EndedError(LoRAError):
    """The work ended in a way of its own.

    Attributes:
        end: What its status is from now on.
        line: What else is said of it.
    """

    def __init__(self, problem: str, end: str, line: Line) -> None:
        super().__init__(problem)
        self.end, self.line = end, line


class Background:
    """The folder of one piece of work.

    Attributes:
        folder: Where it lies.
        noun: What people call it: "export".
    """

    noun = "work"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def asked(self) -> Line:
        """What was asked for."""
        return read_json(self.folder / "job.json")

    def is_running(self) -> bool:
        """Says whether its process lives."""
        return is_held(self.folder / "lock")

    def lines(self) -> list[Line]:
        """Returns what its process said so far."""
        try:
            text = (self.folder / "progress.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    @property
    def status(self) -> str:
        """One of running, done, refused, failed, cancelled, interrupted."""
        running = self.is_running()  # asked first: an end that is written meanwhile is then seen below
        last = (self.lines() or [{}])[-1]
        return "running" if running else last.get("end", "interrupted")

    def say(self, line: Line) -> None:
        """Adds a line to what its process said."""
        with (self.folder / "progress.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cancel(self, patience_seconds: float = 10.0) -> None:
        """Ends it at once.

        Raises:
            LoRAError: Its processes could not be ended in time.
        """
        end, was_running = time.monotonic() + patience_seconds, False
        while self.is_running():
            was_running = True
            with suppress(OSError, ValueError):  # it has just gone, or has not said its number yet
                os.killpg(int((self.folder / "lock").read_text()), signal.SIGKILL)
            if time.monotonic() > end:
                raise LoRAError(f"The {self.noun} in {self.folder} could not be ended; end its processes by hand.")
            time.sleep(0.02)
        if was_running:
            self.clear()
            self.say({"end": "cancelled"})

    def clear(self) -> None:
        """Takes away what must not be left of work that was ended, or is to begin anew."""

    def start(self, module: str, asked: Line) -> None:
        """Starts `python -m module FOLDER` in a process of its own, in the place of an earlier one; returns at once.

        Raises:
            LoRAError: It is going on, or its folder cannot be written.
        """
        _children[:] = [child for child in _children if child.poll() is None]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise LoRAError(f"This {self.noun} is going on already; watch it, or cancel it first.") from None
                self.clear()
                (self.folder / "progress.jsonl").unlink(missing_ok=True)
                write_whole(self.folder / "job.json", json.dumps(asked).encode())
                with (self.folder / "worker.log").open("wb") as log:
                    child = subprocess.Popen(
                        [sys.executable, "-P", "-m", module, str(self.folder), "--lock-fd", str(lock)],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        pass_fds=(lock,),
                        env={**ENVIRONMENT, **os.environ},
                    )
                os.ftruncate(lock, 0)
                os.pwrite(lock, str(child.pid).encode(), 0)
                _children.append(child)
            finally:
                os.close(lock)  # its process holds it from now on
        except OSError as error:
            raise LoRAError(f"{self.folder} could not be written ({error.strerror}); free some space.") from error


def work(of: Callable[[Path], Background], do: Callable[[Any], Iterator[Line]], argv: list[str] | None = None) -> int:
    """Does one piece of work in the process that `Background.start` made: writes its lines, and how it ended.

    Args:
        of: Makes the work of its folder.
        do: Does it, and yields what is to be said meanwhile.
        argv: The arguments; None for the process's own.
    """
    parser = argparse.ArgumentParser(description=work.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lock-fd", type=int, help="the lock, which whoever started this process holds")
    job = of(parser.parse_args(argv).folder)
    try:
        for line in do(job):
            job.say(line)
    except EndedError as error:
        job.say({"end": error.end, "problem": str(error), **error.line})
    except LoRAError as error:
        job.say({"end": "failed", "problem": str(error)})
    except Exception as error:
        words = "not enough memory" if is_of_memory(error) else f"an error that was not foreseen; see {job.folder}"
        job.say({"end": "failed", "problem": f"The {job.noun} ended by {words}."})
        raise
    else:
        job.say({"end": "done"})
    return 0
