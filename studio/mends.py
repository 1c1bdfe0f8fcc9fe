"""Rows mended by hand: kept in the workspace, never in the file itself, and read in place of the rows they mend."""

import hashlib
import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from core.errors import LoRAError
from studio.rows import BadRow, Row
from studio.workspace import Workspace, write_whole

_writing = threading.Lock()


@dataclass(frozen=True)
class Home:
    """Where a row comes from.

    Attributes:
        source: The starter set, the file or the Hub set, as `read_table` wants it named.
        part: Which of its rows: rows or eval_rows.
        place: Which of these, from 0.
    """

    source: str
    part: str
    place: int


@dataclass(frozen=True)
class Mend:
    """One row that was mended.

    Attributes:
        part, place: Where it stands, as of `Home`.
        was: SHA-256 of what stands there in the file: a mend fits no other row.
        row: What is read in its place.
    """

    part: str
    place: int
    was: str
    row: Row


class Mends:
    """The mended rows of one source, in a file of JSON lines in the workspace.

    Attributes:
        path: The file; absent where nothing is mended.
    """

    def __init__(self, source: str | Path, workspace: Workspace) -> None:
        """Takes note of the place; a file is named by its whole path, so that every way to name it means the same."""
        name = str(source.resolve()) if isinstance(source, Path) else source
        digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()
        self.path = workspace.root / "mended" / f"{digest[:32]}.jsonl"

    def content(self) -> bytes:
        """Returns the bytes of the file; none where there is no file."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    def list(self) -> list[Mend]:
        """Returns all mends.

        Raises:
            LoRAError: The file is damaged.
        """
        try:
            return [Mend(**json.loads(line)) for line in self.content().splitlines()]
        except (ValueError, TypeError) as error:
            raise LoRAError(
                f"`{self.path}` must hold the rows that were mended, one a line, and is damaged ({error}); "
                "move it away to read the data set as it is in its file."
            ) from error

    def put(self, mend: Mend) -> None:
        """Keeps a mend, in place of one of the same row.

        Raises:
            LoRAError: It cannot be written.
        """
        self._write(mend.part, mend.place, [mend])

    def undo(self, part: str, place: int) -> None:
        """Forgets the mend of one row.

        Raises:
            LoRAError: It cannot be written.
        """
        self._write(part, place, [])

    def undo_all(self) -> None:
        """Forgets all mends."""
        with _writing:
            self.path.unlink(missing_ok=True)

    def _write(self, part: str, place: int, new: "list[Mend]") -> None:
        with _writing:
            kept = [mend for mend in self.list() if (mend.part, mend.place) != (part, place)]
            lines = [json.dumps(asdict(mend), ensure_ascii=False) + "\n" for mend in (*kept, *new)]
            try:
                self.path.parent.mkdir(exist_ok=True)
                write_whole(self.path, "".join(lines).encode())
            except OSError as error:
                raise LoRAError(
                    f"`{self.path}` must be written to keep a mended row ({error.strerror}); free some space and "
                    "save it again."
                ) from error


def digest_of(row: Row) -> str:
    """Returns the SHA-256 of what stands in a file as a row, whether it can be read or not."""
    text = row.text if isinstance(row, BadRow) else json.dumps(row, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def parse(text: str) -> Row:
    """Returns the row that a person wrote as JSON.

    Raises:
        LoRAError: It is none.
    """
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise LoRAError(
            f"The mended row must be valid JSON ({error.msg}, line {error.lineno}, column {error.colno}); "
            "correct that place."
        ) from error
    except (ValueError, RecursionError) as error:  # half a character, a number too long, or nested too deeply
        raise LoRAError(f"The mended row must be valid JSON ({error}); correct it.") from error
    if not isinstance(row, dict):
        raise LoRAError('The mended row must be an object like {"prompt": "…", "completion": "…"}; write it so.')
    return row


def written(row: Row) -> str:
    """Returns a row as text to mend: its JSON, or what stands in the file where that is none."""
    text = row.text if isinstance(row, BadRow) else json.dumps(row, ensure_ascii=False, indent=1, default=str)
    return text.encode(errors="replace").decode()
