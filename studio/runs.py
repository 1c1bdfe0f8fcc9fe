"""A run is a folder; what state it is in is read from the folder, never stored a second time.

spec.json      what was asked for, frozen when the run is made
events.jsonl   what happened, one event a line, only ever appended to
adapter/       the adapter as of the last evaluation or the end
worker.log     what the worker printed
lock           held by the worker as long as it lives
stop           there when somebody asked the worker to save and end
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from core import (
    Evaluated,
    Event,
    Failed,
    Finished,
    LoRAConfig,
    LoRAError,
    Noted,
    Started,
    Step,
    TrainConfig,
    from_record,
    to_record,
)
from studio.data import DataSpec
from studio.workspace import Workspace


@dataclass(frozen=True)
class RunSpec:
    """All that a run is made from. The same spec gives the same run.

    Attributes:
        name: What people call it; any text.
        model: "starter", a Hub id, a folder or a `.gguf` file.
        data: Which rows, and how they become tokens.
        lora: What is adapted.
        train: How it is trained.
    """

    name: str = "Untitled"
    model: str = "starter"
    data: DataSpec = field(default_factory=DataSpec)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Builds a spec from plain values, as `spec.json` holds them; what is absent takes its default.

        Raises:
            LoRAError: A part does not exist or is out of range.
        """
        if not isinstance(values, dict):
            raise LoRAError(f"A spec must be a table with name, model, data, lora, train; not {type(values).__name__}.")
        unknown = set(values) - {"name", "model", "data", "lora", "train"}
        if unknown:
            raise LoRAError(f"A spec has no part {', '.join(sorted(unknown))}; it has name, model, data, lora, train.")
        for part in ("name", "model"):
            if part in values and not (isinstance(values[part], str) and values[part].strip()):
                raise LoRAError(f"`{part}` (={values[part]!r}) must be text.")
        parts = {"data": DataSpec, "lora": LoRAConfig, "train": TrainConfig}
        return cls(**{k: parts[k].from_dict(v) if k in parts else v for k, v in values.items()})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a spec from a JSON file.

        Raises:
            LoRAError: The file is missing, is no JSON or holds no spec.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise LoRAError(
                f"`SPEC` (={str(path)!r}) must be a JSON file ({error}); a run's own spec.json is an example."
            ) from error
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold."""
        return {
            "name": self.name,
            "model": self.model,
            "data": self.data.to_dict(),
            "lora": self.lora.to_dict(),
            "train": self.train.to_dict(),
        }


class EventLog:
    """What a run's `events.jsonl` says, read only as far as it is new.

    Attributes:
        steps, evaluations, notes: The events of each kind, in order.
        started, end: The event of that kind, or None. `end` is `Finished` or `Failed`.
        num_events: How many were read.
        last_time: When the last was written, in seconds since 1970.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._lock = threading.Lock()
        self.steps: list[Step] = []
        self.evaluations: list[Evaluated] = []
        self.notes: list[Noted] = []
        self.started: Started | None = None
        self.end: Finished | Failed | None = None
        self.num_events = 0
        self.last_time = 0.0

    def refresh(self) -> list[Event]:
        """Reads the complete lines that were added since; returns their events.

        Raises:
            LoRAError: A line is no event, with its place.
        """
        with self._lock:
            if not self._path.exists():
                return []
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]  # a line that is still being written waits
            events = []
            for line in new.splitlines():
                try:
                    record = json.loads(line)
                    self.last_time = float(record.pop("time") + 0)
                    events.append(from_record(record))
                except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                    raise LoRAError(
                        f"{self._path} is damaged at event {self.num_events + len(events) + 1}: {error}"
                    ) from error
            for event in events:
                self._take(event)
            self._offset += len(new)
            return events

    def _take(self, event: Event) -> None:
        self.num_events += 1
        if isinstance(event, Step):
            self.steps.append(event)
        elif isinstance(event, Evaluated):
            self.evaluations.append(event)
        elif isinstance(event, Noted):
            self.notes.append(event)
        elif isinstance(event, Started):
            self.started = event
        else:
            self.end = event


class Run:
    """One run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name
        self.log = EventLog(folder / "events.jsonl")
        self.adapter_folder = folder / "adapter"
        self.worker_log = folder / "worker.log"
        self._spec: RunSpec | None = None

    @property
    def spec(self) -> RunSpec:
        """The frozen spec.

        Raises:
            LoRAError: `spec.json` is missing or damaged.
        """
        if self._spec is None:
            self._spec = RunSpec.read(self.folder / "spec.json")
        return self._spec

    @property
    def created(self) -> datetime:
        """When the run was made, local time."""
        return datetime.fromtimestamp((self.folder / "spec.json").stat().st_mtime)

    @property
    def status(self) -> str:
        """One of running, finished, stopped, failed, interrupted.

        Running is what holds the lock. A worker that is gone without having said how it ended was interrupted.
        """
        running = self.is_running()  # asked first: an end that is written meanwhile is then seen below
        self.log.refresh()
        if running:
            return "running"
        if isinstance(self.log.end, Finished):
            return "finished" if self.log.end.reason == "done" else "stopped"
        return "failed" if isinstance(self.log.end, Failed) else "interrupted"

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter was saved."""
        return (self.adapter_folder / "adapter_config.json").exists()

    def is_running(self) -> bool:
        """Says whether a worker holds the lock."""
        try:
            fd = os.open(self.folder / "lock", os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Holds the run's lock; yields its file descriptor, which a child process may inherit to keep it.

        Raises:
            LoRAError: Somebody else holds it.
        """
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            for attempt in range(50):  # is_running() of another process holds it for an instant
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if attempt == 49:
                        raise LoRAError(f"Run {self.id} is running already; watch it, or stop it first.") from None
                    time.sleep(0.02)
            yield fd
        finally:
            os.close(fd)

    def ask_to_stop(self) -> None:
        """Asks the worker to save the adapter and end after the step at hand."""
        (self.folder / "stop").touch()

    @property
    def stop_asked(self) -> bool:
        """Whether somebody asked the worker to end."""
        return (self.folder / "stop").exists()

    def follow(self, poll_seconds: float = 0.2) -> Iterator[Event]:
        """Yields the events as they come, from the first, until the worker is gone."""
        while True:
            running = self.is_running()
            yield from self.log.refresh()
            if not running:
                return
            time.sleep(poll_seconds)

    def log_tail(self, num_lines: int = 20) -> str:
        """Returns the last lines that the worker printed."""
        try:
            with self.worker_log.open("rb") as file:
                file.seek(max(0, self.worker_log.stat().st_size - 20_000))
                text = file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-num_lines:])


class EventWriter:
    """Appends events to a run's log, each as one whole line.

    Raises:
        OSError: The disk is full, say.
    """

    def __init__(self, run: Run) -> None:
        self._fd = os.open(run.folder / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, event: Event) -> None:
        """Appends `event` with the time; a line is on the disk before the next is written for all but steps."""
        line = (json.dumps({"time": round(time.time(), 3), **to_record(event)}) + "\n").encode()
        before = os.fstat(self._fd).st_size
        if os.write(self._fd, line) < len(line):  # the disk is full: half a line would spoil the next one
            os.ftruncate(self._fd, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not isinstance(event, Step):
            os.fsync(self._fd)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)


class Runs:
    """All runs of a workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._known: dict[str, Run] = {}

    def create(self, spec: RunSpec) -> Run:
        """Makes a run's folder with the frozen spec; nothing is started.

        Raises:
            LoRAError: The folder cannot be written.
        """
        slug = re.sub(r"[^a-z0-9]+", "-", spec.name.lower()).strip("-")[:40] or "run"
        run_id = f"{datetime.now():%Y%m%d-%H%M%S}-{slug}-{secrets.token_hex(2)}"
        folder = self.workspace.runs / run_id
        try:
            folder.mkdir()
            temporary = folder / ".spec.json"
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(spec.to_dict(), file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(folder / "spec.json")
        except OSError as error:
            raise LoRAError(
                f"The run's folder {folder} could not be written ({error.strerror}); free some space, "
                "or choose another workspace."
            ) from error
        return self.get(run_id)

    def get(self, run_id: str) -> Run:
        """Returns the run of that id.

        Raises:
            LoRAError: There is none.
        """
        folder = self.workspace.runs / run_id
        if not re.fullmatch(r"[\w-]{1,120}", run_id) or not (folder / "spec.json").is_file():
            raise LoRAError(f"`run` (={run_id!r}) must be a run of this workspace; it may have been deleted.")
        if run_id not in self._known:
            self._known[run_id] = Run(folder)
        return self._known[run_id]

    def list(self) -> list[Run]:
        """Returns all runs, the newest first."""
        names = sorted((p.parent.name for p in self.workspace.runs.glob("*/spec.json")), reverse=True)
        return [self.get(name) for name in names if re.fullmatch(r"[\w-]{1,120}", name)]  # not one half deleted

    def running(self) -> Run | None:
        """Returns the run that is going on, or None."""
        return next((run for run in self.list() if run.is_running()), None)

    def delete(self, run: Run) -> None:
        """Removes a run's folder for good.

        Raises:
            LoRAError: The run is still going.
        """
        if run.is_running():
            raise LoRAError(f"Run {run.id} is still running; stop it before you delete it.")
        self._known.pop(run.id, None)
        # Renamed first: a deletion that is broken off leaves no half run in the list.
        gone = run.folder.with_name(f".deleted-{run.id}")
        run.folder.rename(gone)
        shutil.rmtree(gone)
