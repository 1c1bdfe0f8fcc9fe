"""Work in a process apart: a module of ours gets JSON, says lines of JSON, and may be ended at any time.

So what takes long, or all of a machine's memory, can be cancelled, and what it held is free then.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from core import LoRAError, is_of_memory
from studio.jobs import ENVIRONMENT


class Apart(Iterator[dict[str, Any]]):
    """A process that goes on: yields the lines that it says. Closed, or forgotten, it ends."""

    def __init__(self, what: str, module: str, asked: Any, *arguments: str) -> None:
        """Starts it.

        Args:
            what: What messages call it, such as "probe".
            module: What it runs; `answer` says how.
            asked: What it reads from its standard input, as JSON.
            arguments: Of its command line.
        """
        self._what = what
        self._log = tempfile.TemporaryFile("w+")  # whatever libraries print, nobody waits for it to be read
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
            env={**ENVIRONMENT, **os.environ},
        )
        with suppress(OSError):  # it ended at once, and says why
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(asked))
            self._process.stdin.close()
        self._is_closed = False

    def __next__(self) -> dict[str, Any]:
        """Raises: LoRAError: It cannot be done, or was ended from elsewhere."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "problem" in said:
                self.close()
                raise LoRAError(said["problem"])
            return said
        code = self._process.wait()
        if self._is_closed:
            raise LoRAError(f"The {self._what} was cancelled.")
        if code == 0:
            raise StopIteration
        if code == -signal.SIGKILL:
            raise LoRAError(
                f"The {self._what} was killed, most likely by the system for want of memory: it does not fit."
            )
        self._log.seek(0)
        tail = self._log.read()[-2000:].strip().splitlines()
        raise LoRAError(
            f"The {self._what} ended by an error that was not foreseen: {tail[-1] if tail else f'code {code}'}"
        )

    @property
    def is_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def close(self) -> None:
        """Ends the process and all that it started; what it held is free then."""
        self._is_closed = True
        if self._process.poll() is None:
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._log.close()


def answer(work: Callable[[Any], Iterable[dict[str, Any]]], out_of_memory: str) -> int:
    """Does `work` for the JSON on standard input and prints what it yields; returns the process's exit code.

    A `LoRAError` is said as a line, too, and so is that memory was lacking, by the sentence `out_of_memory`.
    """
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no line of ours

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    try:
        for line in work(json.load(sys.stdin)):
            say(line)
    except LoRAError as error:
        say({"problem": str(error)})
    except Exception as error:
        if not is_of_memory(error):
            raise
        say({"problem": out_of_memory})
    return 0
