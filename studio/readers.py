"""Reading one data file: JSONL, JSON, CSV, TSV, Parquet or text becomes rows; every fault names file and line."""

import csv
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import LoRAError
from studio.rows import OBJECT, BadRow, JSONLines, Row, kind_of, parse_object

MAX_BYTES = 200_000_000
MAX_LINES_BYTES = 20_000_000_000  # of JSON lines, which stay on the disk
MAX_UNPACKED_BYTES = 1_000_000_000
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "valid", "val", "dev", "eval", "test")
LINES = (".jsonl", ".ndjson")
PROSE = (".txt", ".text", ".md")
KINDS = ".jsonl, .json, .csv, .tsv, .parquet or .txt"


def read_rows(path: Path, notes: list[str]) -> tuple[Sequence[Row], Sequence[Row]]:
    """Returns the rows of one file, and those that it keeps for evaluation; its ending says how to read it.

    Args:
        path: The file.
        notes: Takes one sentence for each thing that is odd but readable.

    Raises:
        LoRAError: The file cannot be read; names file, line or row, and what to do.
    """
    check_file(path)
    ending = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(4)
    if ending == ".parquet" or head == b"PAR1":
        return _read_parquet(path), []
    if ending in LINES and head[:2] not in (b"\xff\xfe", b"\xfe\xff") and _first_letter(path) not in ("[", ""):
        return JSONLines(path), []
    readers = {".csv": _read_csv, ".tsv": _read_tsv, ".tab": _read_tsv} | dict.fromkeys(PROSE, _read_text)
    text = _decode(path, errors="surrogateescape" if ending in readers else "strict")
    if ending in readers:
        return readers[ending](path, text, notes), []
    if ending in (".json", ".jsonl", ".ndjson") or text.lstrip()[:1] in ("{", "["):
        return _read_json(path, text, ending)
    raise LoRAError(f"`{path.name}` must end in {KINDS}; save it in one of these forms and choose it again.")


def check_file(path: Path) -> None:
    """Checks what can be known of a file without reading it.

    Raises:
        LoRAError: It does not exist, is not a plain file, is empty, over the limit, or may not be read.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise LoRAError(
            f"`source` (={str(path)!r}) must be a file that exists; check the path, or say starter:NAME or "
            "hub:owner/name."
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise LoRAError(f"`source` (={str(path)!r}) must be a file, not a folder or a device; name one file in it.")
    limit = MAX_LINES_BYTES if path.suffix.lower() in LINES else MAX_BYTES
    if status.st_size > limit:
        raise LoRAError(
            f"`{path.name}` ({status.st_size / 1e6:,.0f} MB) must be at most {limit / 1e6:,.0f} MB; "
            "save it as JSONL, which stays on the disk, or keep a part of its rows, which is plenty for a LoRA."
        )
    if status.st_size == 0:
        raise LoRAError(f"`{path.name}` is empty (0 bytes); choose a file with rows in it.")
    if not os.access(path, os.R_OK):
        raise LoRAError(f"`{path.name}` must be readable; change its permissions or copy it elsewhere.")


def _first_letter(path: Path) -> str:
    """Returns what a text file begins with, white space aside; "" where its first 64 kB say nothing or are no text."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    start = head.decode("utf-8-sig", errors="replace").lstrip()[:1]
    return "" if b"\0" in head else start


def _decode(path: Path, errors: str) -> str:
    """Returns a file's text; with `errors` surrogateescape, bytes that are not UTF-8 are in it as half characters."""
    raw = path.read_bytes()
    encoding = "utf-8-sig"
    for mark, name in ((b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if raw.startswith(mark):
            encoding = name
            break
    if encoding == "utf-8-sig" and (at := raw.find(b"\0")) >= 0:
        raise LoRAError(
            f"`{path.name}` is not a text file (a zero byte at byte {at + 1}); save it as {KINDS} in UTF-8."
        )
    try:
        text = raw.decode(encoding, errors if encoding == "utf-8-sig" else "strict")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        shown = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
        raise LoRAError(
            f"`{path.name}`, line {line}: byte {error.start + 1} is not {shown}; save it as UTF-8 and choose it again."
        ) from error
    if not text.strip():
        raise LoRAError(f"`{path.name}` is empty (only white space); choose a file with rows in it.")
    return text


def _read_json(path: Path, text: str, ending: str) -> tuple[list[Row], list[Row]]:
    if ending in (".jsonl", ".ndjson") and not text.lstrip().startswith("["):
        return _read_json_lines(path, text), []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        # Many a `.json` holds one object a line, and a `.jsonl` may hold rows that are lists: say it line by line.
        if error.msg == "Extra data" or ending in (".jsonl", ".ndjson"):
            return _read_json_lines(path, text), []
        raise LoRAError(
            f"`{path.name}`, line {error.lineno}: is not valid JSON ({error.msg}, column {error.colno}); "
            "correct that place."
        ) from error
    except RecursionError as error:
        raise LoRAError(f"`{path.name}` is nested too deeply; make each row a flat object.") from error
    except ValueError as error:
        raise LoRAError(f"`{path.name}` holds a number that is too long; write it as text in quotes.") from error
    if isinstance(value, dict):
        lists = {k: v for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
        main = next((k for k in (*TRAIN_NAMES, "data", "rows", "examples") if k in lists), None)
        if main is None and len(lists) == 1:
            main = next(iter(lists))
        if main is None:
            raise LoRAError(
                f'`{path.name}` must hold a list of rows, or {{"data": [rows]}}; it holds one object with '
                f"{names_of(value)}."
            )
        held_out = next((lists[k] for k in EVAL_NAMES if k in lists), []) if main in TRAIN_NAMES else []
        return _objects(path, lists[main]), _objects(path, held_out)
    return _objects(path, value if isinstance(value, list) else [value]), []


def _read_json_lines(path: Path, text: str) -> list[Row]:
    # Not splitlines(): JSON text may hold U+2028 and its like.
    lines = enumerate(text.split("\n"), start=1)
    return [parse_object(line, path.name, number) for number, line in lines if line.strip()]


def _objects(path: Path, values: list[Any]) -> list[Row]:
    return [
        value
        if isinstance(value, dict)
        else BadRow(
            f"`{path.name}`, row {i}: must be {OBJECT}, not {kind_of(value)}",
            json.dumps(value),
        )
        for i, value in enumerate(values, start=1)
    ]


def _read_csv(path: Path, text: str, notes: list[str]) -> list[Row]:
    first = text.lstrip("\r\n").splitlines()[0]
    delimiter = next((d for d in ",;\t" if d in first), ",")
    return _cells_to_rows(path, text, _quoted_cells(path, text, delimiter), delimiter, notes)


def _quoted_cells(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records, line = [], 1
    try:
        for cells in reader:
            if cells:
                records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise LoRAError(
            f"`{path.name}`, line {line}: its quotes do not match ({error}); close each quote, and write a quote "
            "inside a field twice."
        ) from error
    return records


def _read_tsv(path: Path, text: str, notes: list[str]) -> list[Row]:
    # Tab-separated sets such as GLUE's use quotes as mere text, so quotes mean nothing here, unless the rows fit the
    # header only when they do.
    lines = ((number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), start=1))
    records = [(number, line.split("\t")) for number, line in lines if line]
    header = [name.strip() for name in records[0][1]]
    # A header names each column differently; a first row that does not is data (GLUE's CoLA).
    if "" in header[1:] or len(set(header)) < len(header):
        records.insert(0, (0, [f"col{i}" for i in range(1, len(header) + 1)]))
        notes.append(f"`{path.name}` has no header; its columns are called col1 to col{len(header)}.")
    try:
        return _cells_to_rows(path, text, records, "\t", notes)
    except LoRAError as unquoted:
        try:
            return _cells_to_rows(path, text, _quoted_cells(path, text, "\t"), "\t", notes)
        except LoRAError:
            raise unquoted from None


def _cells_to_rows(
    path: Path, text: str, records: list[tuple[int, list[str]]], delimiter: str, notes: list[str]
) -> list[Row]:
    bad_bytes = _BadBytes(path, text)
    line, header = records[0]
    if spoilt := bad_bytes.first_of(header):
        raise LoRAError(f"`{path.name}`, line {spoilt.line}: {spoilt}; save it as UTF-8 and choose it again.")
    header = _checked_header(path, line, header)
    long = [number for number, cells in records if len(cells) > len(header)]
    if 2 * len(long) >= len(records) - 1 > 0 and long:
        cells = next(c for number, c in records if number == long[0])
        raise LoRAError(
            f"`{path.name}`, line {long[0]}: has {len(cells)} fields, but the header has {len(header)} "
            f"({len(long)} of {len(records) - 1} rows are like this); put fields that hold a separator in quotes."
        )
    short = [number for number, cells in records if len(cells) < len(header)]
    if short:
        notes.append(
            f"`{path.name}`, line {short[0]}: has fewer fields than the header ({len(short)} of {len(records) - 1} "
            "rows are like this); the missing ones are empty."
        )
    rows: list[Row] = []
    for number, cells in records[1:]:
        spoilt, surplus = bad_bytes.first_of(cells), cells[len(header) :]
        row = dict(zip(header, cells + [""] * (len(header) - len(cells)), strict=False))
        if surplus:  # most likely of a field without quotes that holds the separator
            row[header[-1]] = delimiter.join([row[header[-1]], *surplus])
            reason = f"line {number}: has {len(cells)} fields, but the header has {len(header)}"
            rows.append(BadRow(f"`{path.name}`, {reason}", _as_json(row)))
        elif spoilt:
            reason = f"line {spoilt.line}, field `{header[spoilt.cell]}`: {spoilt}"
            rows.append(BadRow(f"`{path.name}`, {reason}", _as_json(row)))
        else:
            rows.append(row)
    notes += bad_bytes.notes()
    return rows


def _checked_header(path: Path, line: int, cells: list[str]) -> list[str]:
    header = [name.strip() for name in cells]
    # What pandas writes for its index.
    if header[0] == "" and len(header) > 1:
        header[0] = "index"
    seen: set[str] = set()
    for i, name in enumerate(header):
        if not name:
            raise LoRAError(
                f"`{path.name}`, line {line}: column {i + 1} of the header has no name; name it or remove it."
            )
        if name in seen:
            raise LoRAError(f"`{path.name}`, line {line}: the header has two columns {name!r}; rename one of them.")
        seen.add(name)
    return header


def _read_text(path: Path, text: str, notes: list[str]) -> list[Row]:
    """Returns the paragraphs between blank lines, or the lines where there is no blank line."""
    bad_bytes = _BadBytes(path, text)
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
    parts = re.split(r"\n(?:[ \t]*\n)+", text)
    if len(parts) == 1:
        parts = text.split("\n")
    rows: list[Row] = []
    for part in parts:
        row = {"text": part.rstrip()}
        if spoilt := bad_bytes.first_of([part]):
            rows.append(BadRow(f"`{path.name}`, line {spoilt.line}, field `text`: {spoilt}", _as_json(row)))
        elif row["text"]:
            rows.append(row)
    notes += bad_bytes.notes()
    return rows


class _BadByte(NamedTuple):
    """A byte that is not UTF-8: which of the cells asked for holds it, from 0, and its line and byte, from 1."""

    cell: int
    line: int
    byte: int

    def __str__(self) -> str:
        return f"byte {self.byte} is not UTF-8"


class _BadBytes:
    """The bytes of a file that are not UTF-8; in its text they are half characters, and its cells hold all of them."""

    def __init__(self, path: Path, text: str) -> None:
        self._name, self._places = path.name, _places_of_bad_bytes(path, text)
        self._are_any, self._num_rows = _HALF.search(text) is not None, 0

    def first_of(self, cells: Sequence[str]) -> _BadByte | None:
        """Returns the first in these cells, which are asked for in the order in which they stand in the file."""
        if not self._are_any:
            return None
        found = [_BadByte(i, *next(self._places)) for i, cell in enumerate(cells) for _ in _HALF.findall(cell)]
        self._num_rows += bool(found)
        return found[0] if found else None

    def notes(self) -> list[str]:
        """Returns a sentence on them, where there are any."""
        rows = f"{self._num_rows:,} row" + ("" if self._num_rows == 1 else "s")
        words = f"`{self._name}` has bytes that are not UTF-8 in {rows}; "
        return [words + "if all of it has another encoding, save it as UTF-8."] if self._num_rows else []


_HALF = re.compile("[\udc80-\udcff]")
_LINE_END = re.compile("\r\n?|\n")


def _places_of_bad_bytes(path: Path, text: str) -> Iterator[tuple[int, int]]:
    line, byte, begin = 1, 0, 0
    for found in _HALF.finditer(text):
        # A mark at the beginning of the file is not in its text.
        byte = byte or path.stat().st_size - len(text.encode(errors="surrogateescape")) + 1
        between = text[begin : found.start()]
        line, byte = line + len(_LINE_END.findall(between)), byte + len(between.encode(errors="surrogateescape"))
        yield line, byte
        begin = found.start()


def _as_json(row: Any) -> str:
    text = json.dumps(row, ensure_ascii=False)
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    rows: list[Row] = []
    num_bytes = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise LoRAError(f"`{path.name}` has two columns of one name among {names_of(names)}; rename one.")
            parts = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
            if sum(part.total_byte_size for part in parts) > MAX_UNPACKED_BYTES:
                raise _too_large(path)
            # In small batches: a few bytes of Parquet can stand for gigabytes of repeated text, which count only once
            # in Arrow's dictionaries.
            for batch in file.iter_batches(batch_size=256):
                new = batch.to_pylist()
                texts = sum(len(v) for row in new for v in row.values() if isinstance(v, (str, bytes)))
                num_bytes += max(texts, batch.nbytes)
                if num_bytes > MAX_UNPACKED_BYTES:
                    raise _too_large(path)
                rows += new
    except LoRAError:
        raise
    # KeyError: a time zone that does not exist.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        words = " ".join(str(error).split())[:200]
        raise LoRAError(f"`{path.name}` is not a Parquet file that can be read ({words}); write it again.") from error
    return rows


def _too_large(path: Path) -> LoRAError:
    return LoRAError(
        f"`{path.name}` must be at most {MAX_UNPACKED_BYTES / 1e9:g} GB unpacked; keep a part of its rows, which is "
        "plenty for a LoRA."
    )


def names_of(names: Iterable[Any]) -> str:
    """Returns names as one phrase for a message, shortened where they are many or long."""
    listed = [str(name)[:60] for name in names]
    return ", ".join(listed[:20]) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "")
