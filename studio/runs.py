"""A run is a folder; what state it is in is read from the folder, never stored a second time.

spec.json      what was asked for, frozen when the run is made
events.jsonl   what happened, one event a line; only appended to, and cut back to a checkpoint when taken up from it
checkpoints/   all that is needed to go on, as of some steps (see `studio.checkpoints`)
adapter/       the adapter as of the last evaluation or the end
worker.log     what the worker printed
lock           held by the worker as long as it lives; holds the numbers of its process groups
stop           there when somebody asked the worker to end: holds "stopped" or "paused"
data.json      SHA-256 of each source of its rows, as of the first start
queued         there while the run waits for its turn: holds its place in the queue
imported       there when the adapter came from elsewhere: says from what
evaluations/   answers to held-out prompts, and what they scored (see `studio.evaluation`)
exports/       what was made of the adapter to take home (see `studio.export`)
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from core import Event, Failed, Finished, LoRAError, quoted, read_json
from studio.checkpoints import ADAPTER_FILES, Checkpoints, share_file
from studio.event_log import EventLog, EventWriter
from studio.specs import RunSpec
from studio.workspace import Workspace, write_whole

KILLED = (
    "{} was killed, or the machine went down; the system may have done it for want of memory. The run can be resumed."
)

_ID = re.compile(r"[\w-]{1,120}")


def is_held(lock: Path) -> bool:
    """Says whether a process holds a lock file."""
    try:
        fd = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


class Run:
    """One run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name
        self.workspace_root = folder.parent.parent
        self.spec_file = folder / "spec.json"
        self.log = EventLog(folder / "events.jsonl")
        self.adapter_folder = folder / "adapter"
        self.worker_log = folder / "worker.log"
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self._lock_file = folder / "lock"
        self._spec: RunSpec | None = None

    @property
    def spec(self) -> RunSpec:
        """The frozen spec.

        Raises:
            LoRAError: `spec.json` is missing or damaged.
        """
        if self._spec is None:
            self._spec = RunSpec.read(self.spec_file)
        return self._spec

    @property
    def created(self) -> datetime:
        """When the run was made, local time."""
        return datetime.fromtimestamp(self.spec_file.stat().st_mtime)

    @property
    def status(self) -> str:
        """One of queued, running, finished, stopped, paused, failed, interrupted.

        Running is what holds the lock. A worker that is gone without having said how it ended was interrupted, also
        once somebody has found and noted it. A full disk only pauses: nothing is wrong with the run.
        """
        running = self.is_running()  # asked first: an end that is written meanwhile is then seen below
        queued = self.place is not None
        self.log.read()
        end = self.log.end
        if running or queued:
            return "running" if running else "queued"
        if isinstance(end, Finished):
            return {"done": "finished", "early": "finished", "killed": "stopped"}.get(end.reason, end.reason)
        if isinstance(end, Failed):
            return {"disk": "paused", "killed": "interrupted"}.get(end.cause, "failed")
        return "interrupted"

    @property
    def place(self) -> float | None:
        """Its place in the queue, lower ones first; None when it does not wait there."""
        try:
            return float((self.folder / "queued").read_text())
        except (FileNotFoundError, ValueError):
            return None

    @place.setter
    def place(self, value: float | None) -> None:
        file = self.folder / "queued"
        if value is None:
            file.unlink(missing_ok=True)
        else:
            write_whole(file, repr(value).encode())

    def note_data(self, hashes: dict[str, str]) -> list[str]:
        """Returns the sources that are not what they were when the run first read them; the first time none is.

        Raises:
            OSError: What they are cannot be written.
        """
        known = self.data_hashes
        if not (self.folder / "data.json").exists():
            write_whole(self.folder / "data.json", json.dumps(hashes, indent=2).encode())
            return []
        return [source for source, digest in hashes.items() if known.get(source, digest) != digest]

    @property
    def data_hashes(self) -> dict[str, str]:
        """Source of rows → SHA-256 when the run first read it; empty where nothing is known."""
        try:
            known = read_json(self.folder / "data.json")
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter was saved."""
        return all((self.adapter_folder / name).is_file() for name in ADAPTER_FILES)

    @property
    def has_lora(self) -> bool:
        """Whether an adapter was saved and is LoRA's, so that there is a ΔW to look at, to merge and to take home.

        Raises:
            LoRAError: `spec.json` is damaged.
        """
        return self.has_adapter and self.spec.method.method == "lora"

    @property
    def is_imported(self) -> bool:
        """Whether the adapter came from elsewhere, so that nothing is known of its training."""
        return (self.folder / "imported").is_file()

    def is_running(self) -> bool:
        """Says whether a worker holds the lock."""
        return is_held(self._lock_file)

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Holds the run's lock; yields its file descriptor, which a child process may inherit to keep it.

        Raises:
            LoRAError: Somebody else holds it.
        """
        fd = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            for attempt in range(50):  # is_running() of another process holds it for an instant
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if attempt == 49:
                        raise LoRAError(f"Run {self.id} is running already; watch it, or stop it first.") from None
                    time.sleep(0.02)
            os.ftruncate(fd, 0)  # the last worker's numbers
            yield fd
        finally:
            os.close(fd)

    def sign(self) -> None:
        """Adds the group of this process, one of the run's, to its `groups`."""
        fd = os.open(self._lock_file, os.O_WRONLY | os.O_APPEND)
        os.write(fd, f"{os.getpgrp()} ".encode())
        os.close(fd)

    def ask_to_stop(self, reason: str = "stopped") -> None:
        """Asks the worker to save everything and end after the step at hand.

        Args:
            reason: What its `Finished` will say: "stopped", or "paused".
        """
        write_whole(self.folder / "stop", reason.encode())

    @property
    def stop_asked(self) -> str:
        """Why somebody asked the worker to end, "stopped" or "paused"; "" if nobody did."""
        try:
            return (self.folder / "stop").read_text() or "stopped"
        except FileNotFoundError:
            return ""

    def forget_stop(self) -> None:
        """Takes a request to end back."""
        (self.folder / "stop").unlink(missing_ok=True)

    @property
    def groups(self) -> list[int]:
        """The process groups of those that `sign` the lock: the worker's, or one for each process that trains."""
        return [int(number) for number in self._lock_file.read_text().split()]

    def tell(self, end: Finished | Failed) -> None:
        """Writes how the run ended, for the holder of its lock, where no worker does it."""
        writer = EventWriter(self.log)
        writer.write(end)
        writer.close()

    def seconds_left(self) -> float:
        """Returns the time that the steps still to come will take, as the last ones did; there must be some."""
        recent = self.log.steps[-20:]
        mean = sum(step.step_seconds for step in recent) / len(recent)
        since = max(0.0, time.time() - self.log.last_time)
        return max(0.0, (self.spec.train.steps - recent[-1].step) * mean - min(since, mean))

    def note_killed(self) -> None:
        """Writes into the log of a worker that is gone without a word that it was killed; else does nothing."""
        with suppress(LoRAError, OSError):  # it is damaged, which others say; it goes on again, or the disk is full
            self.log.read()
            if not self.log.num_events or self.log.end is not None or self.is_running():
                return
            with self.locked():
                self.log.read()
                if self.log.end is not None:
                    return
                self.tell(Failed(KILLED.format("The worker"), "killed"))

    def continued(self, spec: RunSpec) -> RunSpec:
        """Returns `spec` as one that begins with this run's newest checkpoint; as it is where there is none."""
        steps = self.checkpoints.steps()
        return replace(spec, continues=f"{self.id}@{steps[-1]}") if steps else spec

    def follow(self, poll_seconds: float = 0.2) -> Iterator[Event]:
        """Yields the events as they come, from the first, until the worker is gone; a queued run is waited for."""
        while True:
            running = self.is_running() or self.place is not None
            yield from self.log.refresh()
            if not running:
                self.note_killed()
                yield from self.log.refresh()
                return
            time.sleep(poll_seconds)

    def log_tail(self, num_lines: int = 20) -> str:
        """Returns the last lines that the worker printed."""
        try:
            with self.worker_log.open("rb") as file:
                file.seek(max(0, self.worker_log.stat().st_size - 20_000))
                text = file.read(20_000).decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            return f"{self.worker_log} cannot be read ({error.strerror})."
        return "\n".join(text.splitlines()[-num_lines:])


def no_update(run: Run) -> str:
    """Returns why a run that was trained by another method than LoRA has nothing to show, merge or take home."""
    return (
        f"“{run.spec.name}” was trained by {run.spec.method.title}, which has no ΔW = scaling · B·A: no spectrum, no "
        "merging and no export. Chat with it, or take a run of LoRA."
    )


class Runs:
    """All runs of a workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._known: dict[str, Run] = {}

    def create(self, spec: RunSpec) -> Run:
        """Makes a run's folder with the frozen spec; nothing is started.

        One that continues another begins with that one's checkpoint, and its history up to there.

        Raises:
            LoRAError: The spec holds half of a character, the folder cannot be written, or what it continues is gone.
        """
        parent, _, step = spec.continues.partition("@")
        if parent and int(step) not in self.get(parent).checkpoints.steps():
            steps = ", ".join(map(str, self.get(parent).checkpoints.steps())) or "none"
            raise LoRAError(f"`continues` (={spec.continues!r}) must name a checkpoint of that run; it has {steps}.")
        try:
            text = json.dumps(spec.to_dict(), indent=2, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            words = quoted(error.object[max(0, error.start - 20) : error.end])
            raise LoRAError(f"The run's settings must be of whole characters; correct the end of {words}.") from error
        slug = re.sub(r"[^a-z0-9]+", "-", spec.name.lower()).strip("-")[:40] or "run"
        run_id = f"{datetime.now():%Y%m%d-%H%M%S}-{slug}-{secrets.token_hex(2)}"
        folder = self.workspace.runs / run_id
        try:
            folder.mkdir()
            if parent:
                self._begin_with(self.get(parent), int(step), Run(folder))
            write_whole(folder / "spec.json", text)
        except OSError as error:
            raise LoRAError(
                f"The run's folder {folder} could not be written ({error.strerror}); free some space, "
                "or choose another workspace."
            ) from error
        return self.get(run_id)

    def _begin_with(self, parent: Run, step: int, run: Run) -> None:
        for kept in parent.checkpoints.steps():
            if kept <= step:
                shutil.copytree(parent.checkpoints.at(kept), run.checkpoints.at(kept), copy_function=share_file)
        shutil.copyfile(parent.log.path, run.log.path)
        run.log.cut_back(step, is_evaluated=True)
        run.tell(Finished(step, "paused", 0))

    def get(self, run_id: str) -> Run:
        """Returns the run of that id.

        Raises:
            LoRAError: There is none.
        """
        folder = self.workspace.runs / run_id
        if not _ID.fullmatch(run_id) or not (folder / "spec.json").is_file():
            raise LoRAError(f"`run` (={run_id!r}) must be a run of this workspace; it may have been deleted.")
        if run_id not in self._known:
            self._known[run_id] = Run(folder)
        return self._known[run_id]

    def find(self, beginning: str) -> Run:
        """Returns the run whose id is, or begins like, `beginning`.

        Raises:
            LoRAError: There is none, or more than one.
        """
        found = [run for run in self.list() if run.id.startswith(beginning)]
        exact = [run for run in found if run.id == beginning]
        if len(exact or found) != 1:
            raise LoRAError(
                f"`RUN` (={beginning!r}) must be, or begin like, the id of one run, not of {len(found)}; "
                "`lora-studio runs` lists them."
            )
        return (exact or found)[0]

    def list(self) -> list[Run]:
        """Returns all runs, the newest first."""
        names = {entry.name for entry in os.scandir(self.workspace.runs) if _ID.fullmatch(entry.name)}
        for name in names - self._known.keys():
            if (self.workspace.runs / name / "spec.json").is_file():  # not one half made
                self._known[name] = Run(self.workspace.runs / name)
        known = dict(self._known)  # one of them may be deleted meanwhile
        return [known[name] for name in sorted(names & known.keys(), reverse=True)]

    def running(self) -> Run | None:
        """Returns the run that is going on, or None."""
        return next((run for run in self.list() if run.is_running()), None)

    def queued(self) -> "list[Run]":
        """Returns the runs that wait for their turn, the next one first."""
        places = [(place, run.id, run) for run in self.list() if (place := run.place) is not None]
        return [run for _, _, run in sorted(places, key=lambda found: found[:2])]

    def delete(self, run: Run) -> None:
        """Removes a run's folder for good.

        Raises:
            LoRAError: The run, or an export of it, is still going.
        """
        if run.is_running():
            raise LoRAError(f"Run {run.id} is still running; stop it before you delete it.")
        if any(map(is_held, run.folder.glob("exports/*/lock"))):
            raise LoRAError(f"Run {run.id} is still being exported; cancel that before you delete it.")
        self._known.pop(run.id, None)
        # Renamed first: a deletion that is broken off leaves no half run in the list.
        gone = run.folder.with_name(f".deleted-{run.id}")
        run.folder.rename(gone)
        shutil.rmtree(gone)
