"""Data sets for training: a spec becomes rows of tokens to train on and to hold out, and those become batches.

The way of a row: `readers` (one file), `tables` (any source), `mapping` (columns get a meaning), `rendering` (marked
text and its tokens), and here. All that other modules need has its name here.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from core.errors import LoRAError
from studio.mapping import (
    DataSpec,
    RowError,
    check_spec,
    guess_spec,
    prompt_messages,
    reference,
    to_messages,
)
from studio.readers import Row
from studio.rendering import IGNORED, Example, Piece, marked_tokens, prompt_ids, render, tokenize_row
from studio.tables import Starter, Table, list_starters, read_table, save_upload
from studio.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = [
    "Batches",
    "DataSpec",
    "Example",
    "Piece",
    "PrepareReport",
    "Prepared",
    "Row",
    "RowError",
    "Starter",
    "Table",
    "check_spec",
    "eval_batches",
    "guess_spec",
    "list_starters",
    "marked_tokens",
    "prepare",
    "prompt_ids",
    "prompt_messages",
    "read_table",
    "reference",
    "render",
    "save_upload",
    "to_messages",
    "tokenize_row",
]


@dataclass(frozen=True)
class PrepareReport:
    """What became of the rows.

    num_rows = num_train + num_evaluation + len(skipped) + num_unused. Token counts are over train and evaluation rows.

    Attributes:
        num_rows: All rows of the data set, its own evaluation rows included.
        num_train: Rows to train on.
        num_evaluation: Rows held out.
        num_unused: Rows left out by `max_rows` and `max_eval_rows`.
        num_cut_rows: Kept rows that were longer than `max_length`.
        num_cut_tokens: Tokens cut from them.
        skipped: (row number from 1, reason) of each row that could not be used.
        num_tokens: Tokens that the model sees.
        num_trained_tokens: Those of them that count in the loss.
        notes: What was odd about the data set itself.
    """

    num_rows: int
    num_train: int
    num_evaluation: int
    num_unused: int
    num_cut_rows: int
    num_cut_tokens: int
    skipped: tuple[tuple[int, str], ...]
    num_tokens: int
    num_trained_tokens: int
    notes: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """Returns the report as a few lines for people."""
        lines = [
            f"{_rows(self.num_rows)}: {self.num_train:,} to train on, {self.num_evaluation:,} held out"
            + (f", {len(self.skipped):,} skipped" if self.skipped else "")
            + (f", {self.num_unused:,} left out by the limits on rows" if self.num_unused else "")
            + ".",
            f"{self.num_tokens:,} tokens, of which {self.num_trained_tokens:,} are trained on.",
        ]
        if self.num_cut_rows:
            were = "was" if self.num_cut_rows == 1 else "were"
            lines.append(
                f"{self.num_cut_tokens:,} tokens were cut from the ends of {_rows(self.num_cut_rows)} that "
                f"{were} too long."
            )
        if self.skipped:
            lines.append(f"Skipped: {_some(self.skipped)}.")
        return lines + list(self.notes)


class Prepared(NamedTuple):
    """A data set ready to train on.

    Attributes:
        train: Rows to train on.
        evaluation: Rows held out; may be empty.
        report: What became of all rows.
    """

    train: list[Example]
    evaluation: list[Example]
    report: PrepareReport


def prepare(
    spec: DataSpec,
    tokenizer: "Tokenizer",
    *,
    max_length: int,
    seed: int,
    workspace: Workspace,
    progress: Callable[[str], None] | None = None,
) -> Prepared:
    """Returns the rows that `spec` names as tokens, and some of them held out for evaluation.

    Rows with the same prompt are all trained on or all held out, where that can be done. The same seed gives the same
    rows.

    Args:
        spec: Which rows, and how they become tokens.
        tokenizer: The model's.
        max_length: Longer rows are cut at the end to so many tokens.
        seed: Of the draw of rows.
        workspace: Where uploads lie.
        progress: Told how far it is, every two seconds.

    Raises:
        LoRAError: The source cannot be read, a column is missing, the template does not fit, or no row can be used.
    """
    table = read_table(spec.source, workspace)
    check_spec(spec, table)
    draw = random.Random(f"rows {seed}")
    reader = _RowReader(spec, tokenizer, max_length, progress)
    train = reader.read(table.rows, _draw(len(table.rows), spec.max_rows, draw))
    if table.eval_rows:
        positions = _draw(len(table.eval_rows), spec.max_eval_rows, draw)
        evaluation = reader.read(table.eval_rows, positions, "of the data set's own evaluation rows: ")
    else:
        size = min(max(1, round(len(train) * spec.eval_fraction)), spec.max_eval_rows)
        held_out = _hold_out([key for key, _ in train], size, draw) if spec.eval_fraction and len(train) > 1 else set()
        evaluation = [train[i] for i in sorted(held_out)]
        train = [pair for i, pair in enumerate(train) if i not in held_out]
    if not train:
        raise LoRAError(
            f"No row of {table.name} can be trained on ({_some(reader.skipped)}); "
            "choose other columns, or mend the rows."
        )
    kept = [example for _, example in train + evaluation]
    num_rows = len(table.rows) + len(table.eval_rows)
    report = PrepareReport(
        num_rows=num_rows,
        num_train=len(train),
        num_evaluation=len(evaluation),
        num_unused=num_rows - len(kept) - len(reader.skipped),
        num_cut_rows=sum(e.num_cut > 0 for e in kept),
        num_cut_tokens=sum(e.num_cut for e in kept),
        skipped=tuple(reader.skipped),
        num_tokens=sum(len(e.input_ids) for e in kept),
        num_trained_tokens=sum(len(e.labels) - e.labels.count(IGNORED) for e in kept),
        notes=table.problems,
    )
    return Prepared([example for _, example in train], [example for _, example in evaluation], report)


class Batches:
    """Endless batches of right-padded rows, shuffled anew each epoch; the last of an epoch may be smaller.

    Epoch e has the order that (seed, e) draws: what follows on so many rows depends on neither run nor process.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int, pad_token_id: int | None) -> None:
        """Raises LoRAError where there is nothing to draw from."""
        if not examples:
            raise LoRAError("`examples` (=0 rows) must hold at least one row; choose a data set with rows to train on.")
        if batch_size < 1:
            raise LoRAError(f"`batch_size` (={batch_size}) must be at least 1.")
        self._examples, self._batch_size, self._seed, self._pad = examples, batch_size, seed, pad_token_id

    def __iter__(self) -> Iterator[dict[str, "Tensor"]]:
        """Yields the first batch, the second and so on, without end."""
        return self.after(0)

    def after(self, num_rows: int) -> Iterator[dict[str, "Tensor"]]:
        """Yields the batches that follow on the first `num_rows` rows, as `eval_batches` gives them, without end."""
        return (_collate(chosen, self._pad) for chosen in self._chosen_after(num_rows))

    def rows(self, num_rows: int, place: int) -> list[int]:
        """Returns the numbers in the data set, from 1, of the rows of batch `place`, from 0, of `after(num_rows)`."""
        return [example.row for example in next(itertools.islice(self._chosen_after(num_rows), place, None))]

    def _chosen_after(self, num_rows: int) -> Iterator[list[Example]]:
        first, begin = divmod(num_rows, len(self._examples))
        for epoch in itertools.count(first):
            order = list(range(len(self._examples)))
            random.Random(f"epoch {self._seed} {epoch}").shuffle(order)
            for place in range(begin, len(order), self._batch_size):
                yield [self._examples[i] for i in order[place : place + self._batch_size]]
            begin = 0


def eval_batches(
    examples: Sequence[Example], batch_size: int, pad_token_id: int | None
) -> Iterator[dict[str, "Tensor"]]:
    """Yields every example once, those of like length together.

    A batch has input_ids, attention_mask and labels, int64, (batch, seq), padded at the right to its longest row.
    """
    ordered = sorted(examples, key=lambda e: len(e.input_ids))
    for begin in range(0, len(ordered), batch_size):
        yield _collate(ordered[begin : begin + batch_size], pad_token_id)


def _collate(examples: Sequence[Example], pad_token_id: int | None) -> dict[str, "Tensor"]:
    import torch

    shape = (len(examples), max(len(e.input_ids) for e in examples))
    # Padding is masked and never trained on, so any id does for a tokenizer that has none.
    input_ids = torch.full(shape, pad_token_id or 0)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for i, example in enumerate(examples):
        num_tokens = len(example.input_ids)
        input_ids[i, :num_tokens] = torch.tensor(example.input_ids)
        attention_mask[i, :num_tokens] = 1
        labels[i, :num_tokens] = torch.tensor(example.labels)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class _RowReader:
    """Turns rows into examples, and remembers those that it skipped."""

    def __init__(
        self, spec: DataSpec, tokenizer: "Tokenizer", max_length: int, progress: Callable[[str], None] | None
    ) -> None:
        self.skipped: list[tuple[int, str]] = []
        self._spec, self._tokenizer, self._max_length = spec, tokenizer, max_length
        self._progress = progress or (lambda message: None)
        self._told = time.monotonic()

    def read(self, rows: list[Row], positions: Sequence[int], where: str = "") -> list[tuple[str, Example]]:
        """Returns (prompt, example) of the rows at `positions` that can be used."""
        found = []
        for done, position in enumerate(positions):
            if time.monotonic() - self._told > 2:
                self._told = time.monotonic()
                self._progress(f"Reading the data: {done:,} of {len(positions):,} rows")
            row = rows[position]
            try:
                example = tokenize_row(row, self._spec, self._tokenizer, self._max_length)
                found.append((_prompt_of(row, self._spec), example._replace(row=position + 1)))
            except RowError as error:
                self.skipped.append((position + 1, f"{where}{error}"))
        return found


def _prompt_of(row: Row, spec: DataSpec) -> str:
    content = to_messages(row, spec)
    return content if isinstance(content, str) else next(m["content"] for m in content if m["role"] == "user")


def _draw(num_rows: int, limit: int, draw: random.Random) -> Sequence[int]:
    """Returns which rows to take, in their order: all, or as many as `limit`, where that is not 0."""
    return sorted(draw.sample(range(num_rows), limit)) if 0 < limit < num_rows else range(num_rows)


def _hold_out(keys: Sequence[str], size: int, draw: random.Random) -> set[int]:
    """Returns up to `size` positions, at least one; equal keys together unless each key has more than `size`."""
    groups: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    order = list(groups.values())
    draw.shuffle(order)
    held_out: set[int] = set()
    for group in order:
        if len(held_out) + len(group) <= size:
            held_out.update(group)
    return held_out or set(draw.sample(range(len(keys)), size))


def _rows(number: int) -> str:
    return f"{number:,} row" + ("" if number == 1 else "s")


def _some(skipped: Sequence[tuple[int, str]]) -> str:
    shown = "; ".join(f"row {number}: {reason}" for number, reason in skipped[:3])
    return shown + (f"; and {len(skipped) - 3:,} more" if len(skipped) > 3 else "")
