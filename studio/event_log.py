"""A run's `events.jsonl`, written, read as far as it is new, and cut back; its steps are kept as columns of numbers."""

import dataclasses
import errno
import fcntl
import itertools
import json
import operator
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import orjson

from core import (
    Checkpointed,
    Evaluated,
    Event,
    Failed,
    Finished,
    LoRAError,
    Noted,
    Resumed,
    SpectrumMeasured,
    Started,
    Step,
    from_record,
    to_record,
)
from studio.spectra import Spectra
from studio.workspace import write_whole

_CHUNK_BYTES, _MAX_LINE_BYTES = 8_000_000, 4_000_000  # a spectrum of many experts' matrices is long

Values = tuple[Any, ...]
"""The fields of a step, in their order."""

_FIELDS: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Step)}
_KEYS = {"event", *_FIELDS}
_TYPES = tuple(_FIELDS.values())
_values = operator.itemgetter(*_FIELDS)
_counts = operator.itemgetter(*(name for name, kind in _FIELDS.items() if kind is int))


def step_values(record: dict[str, Any]) -> Values:
    """Returns the fields of the step that `record` says.

    Raises:
        LoRAError: As `core.from_record`.
    """
    if record.keys() == _KEYS:
        values, counts = _values(record), _counts(record)
        if tuple(map(type, values)) == _TYPES and min(counts) > -(2**53) and max(counts) < 2**53:
            return values  # as `EventWriter` writes it: the long way takes ten times as long
    return dataclasses.astuple(from_record(record))


class Steps(Sequence[Step]):
    """The steps of a run, kept as columns of numbers: 64 bytes a step; reads like a list of `Step`."""

    def __init__(self) -> None:
        self._held = np.empty((len(_FIELDS), 64))
        self._length = 0

    def extend(self, rows: Sequence[Values]) -> None:
        """Appends steps, each given by `step_values`."""
        if not rows:
            return
        end = self._length + len(rows)
        if end > self._held.shape[1]:
            larger = np.empty((len(_FIELDS), 2 * end))
            larger[:, : self._length] = self._held[:, : self._length]
            self._held = larger
        self._held[:, self._length : end] = np.array(rows).T
        self._length = end  # last: another thread that reads meanwhile sees whole steps

    def columns(self) -> dict[str, np.ndarray]:
        """Returns field → its values, (num_steps,), all of the same steps; not to be written to."""
        length = self._length  # first, as `extend` sets it last
        return dict(zip(_FIELDS, self._held[:, :length], strict=True))

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> list[Step]: ...
    def __getitem__(self, index: int | slice) -> Step | list[Step]:
        places = range(self._length)[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        values = self._held[:, places].tolist()
        return Step(*(kind(value) for kind, value in zip(_TYPES, values, strict=True)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class EventLog:
    """What a run's `events.jsonl` says, read only as far as it is new.

    Attributes:
        path: The file.
        steps, evaluations, notes: The events of each kind, in order; steps as columns, too.
        spectra: What was measured of ΔW, as arrays.
        started, end: The last event of that kind, or None. `end` is `Finished` or `Failed`.
        checkpoint: The last `Checkpointed`, or None.
        num_events: How many were read.
        last_time: When the last was written, in seconds since 1970.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._offset = 0
        self._last_line = b""
        self.steps = Steps()
        self.evaluations: list[Evaluated] = []
        self.notes: list[Noted] = []
        self.spectra = Spectra()
        self.started: Started | None = None
        self.checkpoint: Checkpointed | None = None
        self.end: Finished | Failed | None = None
        self.num_events = 0
        self.last_time = 0.0

    def refresh(self) -> list[Event]:
        """Reads the complete lines that were added since; returns their events.

        Raises:
            LoRAError: A line is no event, with its place.
        """
        with self._lock:
            new = itertools.chain.from_iterable(self._new_events())
            return [Step(*event) if isinstance(event, tuple) else event for event in new]

    def read(self) -> None:
        """Reads the complete lines that were added since, as `refresh`, without making an object of each step."""
        with self._lock:
            for _ in self._new_events():
                pass

    def _new_events(self) -> Iterator[list[Event | Values]]:
        """Takes in what is new, piece by piece; yields the events of each, steps as their values."""
        while lines := self._read_lines():
            new = []
            written = self.last_time
            for line in lines.splitlines():
                written, event = self._parse(line, self.num_events + len(new) + 1)
                new.append(event)
            self.steps.extend([event for event in new if isinstance(event, tuple)])
            for event in new:
                self._take(event)
            self.last_time = written
            self._offset += len(lines)
            self._last_line = lines[lines.rfind(b"\n", 0, -1) + 1 :]
            yield new

    def _parse(self, line: bytes, number: int) -> tuple[float, "Event | Values"]:
        """Returns when an event was written, and the event, a step as its values; `number` is that of the line."""
        try:
            if len(line) > _MAX_LINE_BYTES:
                raise ValueError(f"it is longer than {_MAX_LINE_BYTES:,} bytes")
            record = _load(line)
            written = float(record.pop("time") + 0)
            return written, step_values(record) if record.get("event") == "Step" else from_record(record)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
            raise LoRAError(
                f"{self.path} is damaged at event {number}: {error}; mend that line, or delete the run."
            ) from error

    def cut_back(self, step: int, *, is_evaluated: bool) -> None:
        """Takes out its end and what came after `step`, as it will come again, and what a crash left torn.

        For the holder of the run's lock. The file is replaced whole, so that a reader sees it before or after.

        Args:
            step: That of the checkpoint that the run is taken up from; 0 for the start.
            is_evaluated: Whether the evaluation after that step was made, and stays.

        Raises:
            LoRAError: A line is no event, with its place.
        """
        if not self.path.exists():
            return
        kept = []
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            _, event = self._parse(line, number)
            if isinstance(event, tuple) and event[0] > step:
                break
            if isinstance(event, SpectrumMeasured) and event.step > step:
                break
            if isinstance(event, Evaluated) and (event.step > step or (event.step == step and not is_evaluated)):
                break
            if not isinstance(event, Finished | Failed):
                kept.append(line)
        write_whole(self.path, b"".join(kept))

    def _read_lines(self) -> bytes:
        """Returns some complete lines that follow, or nothing; one that is still being written waits."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._last_line))
                if file.read(len(self._last_line)) != self._last_line:  # the run was taken up from an earlier step
                    self._forget()
                    file.seek(0)
                new = file.read(_CHUNK_BYTES)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise LoRAError(
                f"{self.path} cannot be read ({error.strerror}); make it readable, or delete the run."
            ) from error
        # A line that is too long is handed on as it is: waiting for its end would read it again at every look.
        return new[: new.rfind(b"\n") + 1] or (new if len(new) > _MAX_LINE_BYTES else b"")

    def _take(self, event: Event | Values) -> None:
        self.num_events += 1
        if isinstance(event, tuple):
            return
        if isinstance(event, Evaluated):
            self.evaluations.append(event)
        elif isinstance(event, SpectrumMeasured):
            self.spectra.append(event)
        elif isinstance(event, Noted):
            self.notes.append(event)
        elif isinstance(event, Started):
            self.started = event
        elif isinstance(event, Checkpointed):
            self.checkpoint = event
        elif isinstance(event, Finished | Failed):
            self.end = event
        elif isinstance(event, Resumed):
            self.end = None


def _load(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:  # it has none of JSON's ways around: NaN, which a diverged loss is
        return json.loads(line.decode())


class EventWriter:
    """Appends events to a run's log, each as one whole line; for the holder of the run's lock.

    Raises:
        OSError: The disk is full, say.
    """

    def __init__(self, log: EventLog) -> None:
        """Opens the file of `log`, which need not exist."""
        self._fd = os.open(log.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        # Half a line that a crash left would spoil the next one; that of a writer at work is not half for long.
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        size = os.fstat(self._fd).st_size
        tail = os.pread(self._fd, _MAX_LINE_BYTES, max(0, size - _MAX_LINE_BYTES))
        if not tail.endswith(b"\n"):
            os.ftruncate(self._fd, size - len(tail) + tail.rfind(b"\n") + 1)
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def write(self, event: Event) -> None:
        """Appends `event` with the time; it is on the disk before the next is written, but for steps and spectra."""
        line = (json.dumps({"time": round(time.time(), 3), **to_record(event)}) + "\n").encode()
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            before = os.fstat(self._fd).st_size
            if os.write(self._fd, line) < len(line):  # the disk is full: half a line would spoil the next one
                os.ftruncate(self._fd, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        if not isinstance(event, Step | SpectrumMeasured):
            os.fsync(self._fd)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)
