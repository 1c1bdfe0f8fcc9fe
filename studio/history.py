"""What lists show of runs that are over, kept so that it need not be made again."""

import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core import read_json
from studio.workspace import write_whole

if TYPE_CHECKING:
    from studio.runs import Run

log = logging.getLogger("studio")

V = TypeVar("V")

_FORM = 3  # raise it when what lists show of a run is made otherwise


class Shown:
    """What lists show of runs that are over, kept by the state of the run's files, for later servers on the disk, too.

    A run that is going on is looked at anew each time.
    """

    def __init__(self, file: Path) -> None:
        """Reads what an earlier server kept in `file`."""
        self._file = file
        self._lock = threading.Lock()
        self._kept: dict[str, Any] = {}
        try:
            held = read_json(file)
            self._kept = held["kept"] if held["form"] == _FORM else {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it can be made again
            pass

    def each(self, runs: Sequence["Run"], make: Callable[["Run"], V]) -> list[V]:
        """Returns `make(run)` of each run; `make` gives what JSON can hold, and goes by the run's own files alone."""
        kept = self._kept
        over: dict[str, Any] = {}
        values = []
        for run in runs:
            state, old = _state(run), kept.get(run.id)
            if run.is_running():
                values.append(make(run))
            else:
                over[run.id] = old if old and old[0] == state else [state, make(run)]
                values.append(over[run.id][1])
        if over != kept:
            self._keep(over)
        return values

    def _keep(self, over: dict[str, Any]) -> None:
        with self._lock:
            self._kept = over
            try:
                write_whole(self._file, json.dumps({"form": _FORM, "kept": self._kept}).encode())
            except OSError as error:
                log.warning("%s could not be written (%s); the next server reads all runs anew.", self._file, error)


def _state(run: "Run") -> list[int]:
    """Returns what is another list of numbers once one of the run's files has changed."""
    state = []
    for path in (run.folder, run.spec_file, run.log.path):
        try:
            held = path.stat()
        except OSError:  # it is not there, or cannot be read, which `make` says
            state += [0, 0]
        else:
            state += [held.st_mtime_ns, held.st_size]
    return state
