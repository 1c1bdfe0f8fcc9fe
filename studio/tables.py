"""Reading data sets: starter sets, files and Hub sets become rows of named columns."""

import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.errors import LoRAError
from studio.mends import Home, Mends, digest_of
from studio.readers import EVAL_NAMES, TRAIN_NAMES, check_file, names_of, read_rows
from studio.rows import BadRow, Chain, Row, only_object
from studio.workspace import ASSETS, Workspace

MAX_HUB_ROWS = 50_000
MAX_COLUMNS = 1_000
HEAD_ROWS = 10_000  # of each file, by which columns are known
STARTERS = ASSETS / "data"


@dataclass(frozen=True)
class Table:
    """A data set as it was read, before any column is given a meaning.

    Attributes:
        name: A short name for people.
        columns: All column names, in order of first appearance. A row may lack some of them.
        rows: The rows to train on, as they were mended; what could not be read is a `BadRow`.
        eval_rows: Rows that the source itself keeps for evaluation; may be empty.
        problems: What was odd but readable, one sentence each.
    """

    name: str
    columns: tuple[str, ...]
    rows: Sequence[Row]
    eval_rows: Sequence[Row] = field(default_factory=list)
    problems: tuple[str, ...] = ()

    def where(self, place: int, is_held_out: bool) -> str:
        """Returns the file that a row stands in, and its line or its number there; "" where it is of no file."""
        rows = self.eval_rows if is_held_out else self.rows
        return rows.where(place) if isinstance(rows, Chain) else ""

    def home(self, place: int, is_held_out: bool) -> Home | None:
        """Returns where a row comes from; None where it is of no source."""
        rows = self.eval_rows if is_held_out else self.rows
        return Home(*rows.home(place)) if isinstance(rows, Chain) else None

    def in_file(self, place: int, is_held_out: bool) -> Row:
        """Returns a row as it stands in its file, mended or not."""
        rows = self.eval_rows if is_held_out else self.rows
        return rows.in_file(place) if isinstance(rows, Chain) else rows[place]

    def mended(self, is_held_out: bool) -> list[int]:
        """Returns the places of the rows that are mended."""
        rows = self.eval_rows if is_held_out else self.rows
        return rows.mended() if isinstance(rows, Chain) else []


@dataclass(frozen=True)
class Starter:
    """A data set that comes with the studio.

    Attributes:
        name: What stands after `starter:`.
        title: A title for people.
        change: What training on it should visibly change.
        mapping: The settings of a `DataSpec` that fit it.
        examples: Prompts to try before and after.
        task: What is learned from it; see `DataSpec`.
    """

    name: str
    title: str
    change: str
    mapping: dict[str, str]
    examples: list[Any]
    task: str = "causal"

    @property
    def source(self) -> str:
        """The data set as `read_table` wants it named."""
        return f"starter:{self.name}"


def list_starters() -> list[Starter]:
    """Returns the data sets that come with the studio, by name."""
    found = []
    for path in sorted(STARTERS.glob("*/about.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        mapping = {k: about[k] for k in ("layout", "prompt", "completion", "messages", "instruction") if about.get(k)}
        examples, task = about.get("examples", []), about.get("task", "causal")
        found.append(Starter(path.parent.name, about["title"], about["change"], mapping, examples, task))
    return found


def read_table(source: str | Path, workspace: Workspace, eval_source: str = "") -> Table:
    """Returns the rows of starter sets, files or Hub sets.

    Args:
        source: `starter:NAME`; a path to a JSONL, JSON, CSV, TSV, Parquet or text file (a bare name is also looked
            for among the uploads); or `hub:owner/name`, optionally with `/config` and `:split` after it. Several have
            a semicolon between them; their rows stand one after the other.
        workspace: Where uploads and the Hub's cache lie.
        eval_source: The like, whose rows are held out in place of those that `source` itself keeps.

    Raises:
        LoRAError: A source does not exist or cannot be read; names file, line or row, and what to do.
    """
    parts = [_read(one, workspace) for one in split_source(source)]
    table = parts[0] if len(parts) == 1 else _join(parts)
    if not eval_source:
        return table
    own = [_read(one, workspace) for one in split_source(eval_source)]
    held_out = _join([replace(part, eval_rows=[]) for part in own])
    problems = tuple(dict.fromkeys((*table.problems, *held_out.problems)))
    return replace(table, eval_rows=held_out.rows, problems=problems)


def fingerprint(source: str, workspace: Workspace, table: Table) -> dict[str, str]:
    """Returns source -> SHA-256 of each part of `source`: of a file's bytes; of a Hub set's rows, as JSON.

    What is mended of it counts too.

    Args:
        source: As `read_table` takes it.
        workspace: Where uploads lie.
        table: What was read from it; a Hub set is not fetched again.

    Raises:
        LoRAError: A file is gone.
    """
    found = {}
    for one in split_source(source):
        kind, _, rest = one.partition(":")
        digest = hashlib.sha256()
        if kind == "hub":
            for row in itertools.chain(table.rows, table.eval_rows):
                digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        else:
            parts = sorted((STARTERS / rest).glob("*.jsonl")) if kind == "starter" else [locate(one, workspace)]
            for path in parts:
                check_file(path)
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
        digest.update(mends_of(one, workspace).content())
        found[one] = digest.hexdigest()
    return found


def mends_of(source: str, workspace: Workspace) -> Mends:
    """Returns what is mended of one source."""
    is_file = source.partition(":")[0] not in ("starter", "hub")
    return Mends(locate(source, workspace) if is_file else source, workspace)


def split_source(source: str | Path) -> list[str]:
    """Returns the sources that one text names, with semicolons between them."""
    text = str(source)
    with suppress(OSError, ValueError):
        if Path(text).is_file():
            return [text]
    return [part.strip() for part in text.split(";") if part.strip()] or [text]


def _join(parts: Sequence[Table]) -> Table:
    rows, eval_rows = (
        Chain([(part.name, getattr(part, which)) for part in parts if getattr(part, which)])
        for which in ("rows", "eval_rows")
    )
    columns = tuple(dict.fromkeys(itertools.chain.from_iterable(part.columns for part in parts)))
    problems = tuple(itertools.chain.from_iterable(part.problems for part in parts))
    lacking = [part.name for part in parts if set(part.columns) != set(columns)]
    if lacking:
        problems += (f"The files differ in their columns; {names_of(lacking)} lacks some of {names_of(columns)}.",)
    name = parts[0].name if len(parts) == 1 else f"{parts[0].name} and {len(parts) - 1} more"
    return Table(name, columns, rows, eval_rows, problems)


def _read(source: str, workspace: Workspace) -> Table:
    table = _read_unmended(source, workspace)
    mends = mends_of(source, workspace).list()
    chosen, num_stale = {}, len(mends)
    for part in ("rows", "eval_rows"):
        chain: Chain = getattr(table, part)
        here = [mend for mend in mends if mend.part == part and mend.place < len(chain)]
        fitting = {mend.place: mend.row for mend in here if digest_of(chain.in_file(mend.place)) == mend.was}
        chosen[part], num_stale = chain.mend(source, part, fitting), num_stale - len(fitting)
    problems = table.problems
    if num_stale:
        rows = "1 mended row fits" if num_stale == 1 else f"{num_stale:,} mended rows fit"
        problems += (f"{rows} no row of {table.name} any more, for the file has changed; the file's own are read.",)
    return replace(table, problems=problems, **chosen)


def _read_unmended(source: str, workspace: Workspace) -> Table:
    kind, _, rest = source.partition(":")
    if kind == "starter":
        return _read_starter(rest)
    if kind == "hub":
        return _read_hub(rest, workspace)
    path = locate(source, workspace)
    notes: list[str] = []
    rows, eval_rows = read_rows(path, notes)
    return _table(path.name, rows, eval_rows, notes)


def locate(source: str | Path, workspace: Workspace) -> Path:
    """Returns the path that a source names; a bare name is also looked for among the uploads."""
    try:
        path = Path(source).expanduser()
        uploaded = workspace.uploads / path
        return uploaded if path.name == str(path) and not path.exists() and uploaded.exists() else path
    except (OSError, RuntimeError) as error:  # a name too long, a home that does not exist
        raise LoRAError(f"`source` (={str(source)[:200]!r}) must be a file that exists; check the path.") from error


def save_upload(path: Path, name: str, workspace: Workspace) -> Path:
    """Returns the place of a copy of `path` among the workspace's uploads.

    Args:
        path: The file to copy.
        name: What its owner calls it; only a harmless form of the last part of it is used.
        workspace: Where the copy goes. A name that is taken gets a number.

    Raises:
        LoRAError: `path` is a link, not a file, or over the limit, or the disk is full.
    """
    if path.is_symlink():
        raise LoRAError(f"`{path.name}` must be a file of its own, not a link; choose the file that it points to.")
    check_file(path)
    target = _reserve(workspace.uploads, _harmless(name))
    scratch: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=workspace.uploads, prefix=".", suffix=".part", delete=False) as copy:
            scratch = Path(copy.name)
            with path.open("rb") as file:
                shutil.copyfileobj(file, copy)
            copy.flush()
            os.fsync(copy.fileno())
        scratch.replace(target)
    except OSError as error:
        target.unlink(missing_ok=True)
        if scratch:
            scratch.unlink(missing_ok=True)
        raise LoRAError(
            f"`{name}` must be copied to {workspace.uploads} ({error.strerror}); free some space and choose it again."
        ) from error
    return target


def _harmless(name: str) -> str:
    """Returns a file name without folders, leading dots or odd characters, of at most 60 characters."""
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name))[-1]
    last = re.sub(r"[^\w.()-]+", "_", last).lstrip("._")
    if re.fullmatch(r"(?i)con|prn|aux|nul|com\d|lpt\d", last.partition(".")[0]):  # devices of Windows, in any folder
        last = f"data_{last}"
    stem, dot, ending = last.rpartition(".")
    if not dot:
        stem, ending = last, ""
    # 60 characters are at most 240 bytes of UTF-8; file systems allow 255.
    return (stem[: 60 - len(ending[:10]) - 1] or "data") + dot + ending[:10]


def _reserve(folder: Path, name: str) -> Path:
    path, number = folder / name, 1
    stem, ending = path.stem, path.suffix
    while True:
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            number += 1
            path = folder / f"{stem}-{number}{ending}"
        except OSError as error:
            raise LoRAError(
                f"`{name}` must be copied to {folder} ({error.strerror}); free some space and choose it again."
            ) from error


def _read_starter(name: str) -> Table:
    names = [s.name for s in list_starters()]
    if name not in names:
        raise LoRAError(f"`source` (='starter:{name}') must be a starter data set; there are {', '.join(names)}.")
    (train, _), (evaluation, _) = (read_rows(STARTERS / name / f"{part}.jsonl", []) for part in ("train", "eval"))
    return _table(name, train, evaluation, [])


def _read_hub(rest: str, workspace: Workspace) -> Table:
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([\w.-]+))?(?::([\w.-]+))?", rest)
    if match is None:
        raise LoRAError(
            f"`source` (='hub:{rest}') must look like hub:owner/name, hub:owner/name:split "
            "or hub:owner/name/config:split."
        )
    name, config, split = match.groups()
    _check_hub(name)
    import datasets

    try:
        # Streamed, so that a set of any size starts at once and takes no disk. Repositories' scripts are never run:
        # `datasets` 4 and later has no way to.
        splits = datasets.load_dataset(name, config, streaming=True, cache_dir=str(workspace.cache / "datasets"))
        chosen = split or next((s for s in TRAIN_NAMES if s in splits), next(iter(splits)))
        if chosen not in splits:
            raise LoRAError(f"`source` (='hub:{rest}') must name a split of {name}; it has {names_of(splits)}.")
        held_out = None if split else next((s for s in EVAL_NAMES if s in splits and s != chosen), None)
        rows = list(itertools.islice(splits[chosen], MAX_HUB_ROWS + 1))
        eval_rows = list(itertools.islice(splits[held_out], MAX_HUB_ROWS)) if held_out else []
    except LoRAError:
        raise
    except Exception as error:  # whatever a repository's files can set off in its readers
        words = " ".join(str(error).split())[:300]
        raise LoRAError(
            f"`source` (='hub:{rest}') cannot be read ({words}); choose another set, or upload the file itself."
        ) from error
    notes = [f"Only the first {MAX_HUB_ROWS:,} rows of {name} were read."] if len(rows) > MAX_HUB_ROWS else []
    return _table(name, rows[:MAX_HUB_ROWS], eval_rows, notes)


def _check_hub(name: str) -> None:
    """Asks the Hub once for `name`: `datasets` itself would retry for half a minute without a network."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=10)
    except RepositoryNotFoundError as error:
        raise LoRAError(
            f"`source` (='hub:{name}') must be a data set on the Hub that you may read; "
            "check the name, or log in with `hf auth login`."
        ) from error
    except Exception as error:  # every way in which a network can be absent
        names = ", ".join(s.source for s in list_starters())
        raise LoRAError(
            f"`source` (='hub:{name}') needs the Hub, which does not answer ({type(error).__name__}); "
            f"choose a starter data set ({names}) or a file of your own."
        ) from error


def _table(name: str, rows: Sequence[Row], eval_rows: Sequence[Row], notes: list[str]) -> Table:
    if not len(rows):
        raise LoRAError(f"`{name}` has no rows; choose a file with at least one row below the header.")
    head = [*rows[:HEAD_ROWS], *eval_rows[:HEAD_ROWS]]
    good = [row for row in head if not isinstance(row, BadRow)]
    if not good:
        first = next(row for row in head if isinstance(row, BadRow))
        are = "is" if len(head) == 1 else "are"
        raise LoRAError(f"{first.reason}; {len(head)} of {len(head)} lines {are} like this; correct or remove them.")
    columns = tuple(dict.fromkeys(itertools.chain.from_iterable(good)))
    _check_columns(name, columns)
    unfolded = _of_objects(columns, good)
    train, held_out = (Chain([(name, part)] if len(part) else [], unfolded) for part in (rows, eval_rows))
    if unfolded:
        shown = Chain([(name, good)], unfolded)
        columns = tuple(dict.fromkeys(itertools.chain.from_iterable(shown)))
        for column in unfolded:
            parts = [c for c in columns if c.startswith(f"{column}.")]
            notes.append(f"Column {column} holds objects; its parts are {names_of(parts)}.")
    for column in columns:
        if column.encode(errors="ignore").decode() != column:  # no page can be sent it
            raise LoRAError(f"`{name}` has a column named {column!r}, which holds half of a character; rename it.")
    return Table(name, columns, train, held_out, tuple(notes))


def _check_columns(name: str, columns: Sequence[str]) -> None:
    if not columns:
        raise LoRAError(f"`{name}` has no columns; give each row a prompt and a completion, or a text.")
    if len(columns) > MAX_COLUMNS:
        raise LoRAError(
            f"`{name}` has {len(columns):,} columns; keep at most {MAX_COLUMNS:,}, the ones to train on among them."
        )


def _of_objects(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Returns the columns that hold objects, or lists of one, and nothing else."""
    found = []
    for column in columns:
        inner = [only_object(row[column]) for row in rows if row.get(column) is not None]
        keys = dict.fromkeys(itertools.chain.from_iterable(i for i in inner if i))
        if inner and None not in inner and len(keys) <= 20 and not {"role", "from"} & keys.keys():
            found.append(column)
    return found
