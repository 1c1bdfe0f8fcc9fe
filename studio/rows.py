"""Rows as sequences: those of a file of JSON lines stay on the disk until they are asked for."""

import json
import os
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import orjson

Row = dict[str, Any]

CHUNK_BYTES = 1 << 24
OBJECT = 'an object like {"prompt": "…", "completion": "…"}'


class BadRow(Row):
    """A row that could not be read: it has no fields.

    Attributes:
        reason: File, line and what is wrong there.
        text: What stands there, as JSON where its fields are known; bytes that are no text are \ufffd in it.
    """

    def __init__(self, reason: str, text: bytes | str = "") -> None:
        super().__init__()
        self.reason = reason
        self.text = text if isinstance(text, str) else text.decode(errors="replace")


class JSONLines(Sequence[Row]):
    """The rows of a file of JSON objects, one a line, UTF-8; lines of white space are none.

    Only where each line begins is kept, eight bytes a row. A line that is no object gives a `BadRow`.
    """

    def __init__(self, path: Path) -> None:
        """Looks for the lines.

        Raises:
            OSError: The file cannot be read.
        """
        self._name, self._file = path.name, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        starts = array("q", [3 if os.pread(self._file, 3, 0) == b"\xef\xbb\xbf" else 0])
        size = 0
        while block := os.read(self._file, CHUNK_BYTES):
            at = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (size + 1)
            starts.frombytes(at.astype(np.int64).tobytes())
            size += len(block)
        bounds = np.append(np.asarray(starts), size + 1 if starts[-1] <= size else starts[-1])
        # Few lines are short enough to be blank; each of those is looked at.
        short = np.flatnonzero(np.diff(bounds) <= 8)
        blank = [i for i in short.tolist() if not self._read(bounds[i], bounds[i + 1]).strip()]
        self._lines = np.delete(np.arange(1, len(bounds)), blank) if blank else np.arange(1, len(bounds))
        self._begins, self._ends = bounds[self._lines - 1], bounds[self._lines]

    def _read(self, begin: int, end: int) -> bytes:
        return os.pread(self._file, int(end) - int(begin), int(begin))

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, place):  # type: ignore[no-untyped-def, override]
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return parse_object(self.text(place), self._name, self.line(place))

    def text(self, place: int) -> bytes:
        """Returns a row's line as it stands in the file."""
        return self._read(self._begins[place], self._ends[place]).strip()

    def line(self, place: int) -> int:
        """Returns the number of a row's line, from 1."""
        return int(self._lines[place])


def parse_object(line: bytes | str, name: str, number: int) -> Row:
    """Returns the row that a line of JSON holds, or a `BadRow` that says what is wrong with it."""
    try:
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:  # stricter than needed: NaN, half characters, long numbers
            text = line if isinstance(line, str) else line.decode()
            value = json.loads(text)
    except UnicodeDecodeError as error:
        return BadRow(f"`{name}`, line {number}: byte {error.start + 1} of the line is not UTF-8", line)
    except json.JSONDecodeError as error:
        return BadRow(f"`{name}`, line {number}: is not valid JSON ({error.msg}, column {error.colno})", line)
    except RecursionError:
        return BadRow(f"`{name}`, line {number}: is not valid JSON (nested too deeply)", line)
    except ValueError:
        return BadRow(f"`{name}`, line {number}: is not valid JSON (a number that is too long)", line)
    if not isinstance(value, dict):
        return BadRow(f"`{name}`, line {number}: must be {OBJECT}, not {kind_of(value)}", line)
    return value


def kind_of(value: Any) -> str:
    """Returns what JSON calls a value that is no object."""
    return {list: "a list", str: "text", bool: "true or false", type(None): "null"}.get(type(value), "a number")


class Chain(Sequence[Row]):
    """The rows of several files, one after the other, in which some columns' objects are columns of their own."""

    def __init__(self, parts: Sequence[tuple[str, Sequence[Row]]], unfolded: Sequence[str] = ()) -> None:
        """Joins parts, each with its file's name; `unfolded` are the columns of objects."""
        self._parts, self._unfolded = list(parts), tuple(unfolded)
        self._source, self._part, self._mended = "", "", dict[int, Row]()
        self._ends = list(accumulate(len(rows) for _, rows in self._parts))

    def unfold(self, columns: Sequence[str]) -> "Chain":
        """Returns the same rows with the objects of `columns` as columns of their own: `instances.output`."""
        return Chain(self._parts, (*self._unfolded, *columns))

    def mend(self, source: str, part: str, mended: Mapping[int, Row]) -> "Chain":
        """Returns the rows of one source with some of them mended: place → what is read there."""
        chain = Chain(self._parts, self._unfolded)
        chain._source, chain._part, chain._mended = source, part, dict(mended)
        return chain

    def home(self, place: int) -> tuple[str, str, int]:
        """Returns the source that a row comes from, and which of its rows, as it was told by `mend`."""
        part, inner = self._find(place)
        rows = self._parts[part][1]
        return (self._source, self._part, place) if self._source or not isinstance(rows, Chain) else rows.home(inner)

    def in_file(self, place: int) -> Row:
        """Returns a row as it stands in its file, mended or not."""
        part, inner = self._find(place)
        rows = self._parts[part][1]
        row = rows.in_file(inner) if isinstance(rows, Chain) else rows[inner]
        for column in self._unfolded:
            if column in row:
                row = _spread(row, column)
        return row

    def mended(self) -> list[int]:
        """Returns the places of the rows that are mended, in order."""
        inner = (
            end - len(rows) + place
            for (_, rows), end in zip(self._parts, self._ends, strict=True)
            if isinstance(rows, Chain)
            for place in rows.mended()
        )
        return sorted({*self._mended, *inner})

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _find(self, place: int) -> tuple[int, int]:
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        part = bisect_right(self._ends, place % len(self))
        return part, place % len(self) - (self._ends[part - 1] if part else 0)

    def __getitem__(self, place):  # type: ignore[no-untyped-def, override]
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        part, inner = self._find(place)
        if (mended := self._mended.get(place % len(self))) is not None:
            return mended
        row = self._parts[part][1][inner]
        for column in self._unfolded:
            if column in row:
                row = _spread(row, column)
        return row

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def where(self, place: int) -> str:
        """Returns the file that a row stands in, and its line or its number there."""
        part, place = self._find(place)
        name, rows = self._parts[part]
        if isinstance(rows, Chain):
            return rows.where(place)
        return f"{name}, line {rows.line(place)}" if isinstance(rows, JSONLines) else f"{name}, row {place + 1:,}"


def only_object(value: Any) -> Row | None:
    """Returns the object that a field holds, alone or in a list; None where it holds none."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, dict) else None


def _spread(row: Row, column: str) -> Row:
    spread = {}
    for name, value in row.items():
        if name == column:
            spread |= {f"{column}.{k}": v for k, v in (only_object(value) or {}).items()}
        else:
            spread[name] = value
    return spread
