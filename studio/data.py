"""Data sets for training: a spec becomes rows of tokens to train on and to hold out, and those become batches.

The way of a row: `readers` (one file), `tables` (any source), `mapping` (columns get a meaning), `rendering` (marked
text and its tokens), and here. All that other modules need has its name here.
"""

import itertools
import random
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from core.errors import LoRAError
from studio.checks import Check, checks
from studio.examples import Examples
from studio.labelled import LabelledExample, LabelledExamples
from studio.mapping import (
    DataSpec,
    RowError,
    check_spec,
    guess_spec,
    prompt_messages,
    reference,
    to_messages,
)
from studio.rendering import (
    IGNORED,
    Example,
    Piece,
    end_tokens,
    marked_tokens,
    prompt_ids,
    render,
    text_ids,
    token_texts,
    tokenize_row,
)
from studio.rows import Row
from studio.survey import ENDED, Split, Survey
from studio.tables import Starter, Table, fingerprint, list_starters, read_table, save_upload
from studio.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = [
    "ENDED",
    "IGNORED",
    "Batches",
    "Check",
    "DataSpec",
    "Example",
    "Piece",
    "PrepareReport",
    "Prepared",
    "Row",
    "RowError",
    "Split",
    "Starter",
    "Survey",
    "Table",
    "blocked",
    "check_spec",
    "checks",
    "end_tokens",
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
    "report_of",
    "save_upload",
    "text_ids",
    "to_messages",
    "token_texts",
    "tokenize_row",
]


AnyExample = Example | LabelledExample
"""A row as tokens, of the tokens that are trained or with its label."""

LENGTHS_ALIKE = 50
"""Of rows with a label, which are padded, so many batches are drawn at once, and rows of like length put together."""


@dataclass(frozen=True)
class PrepareReport:
    """What became of the rows.

    num_rows = num_train + num_evaluation + len(skipped) + num_unused; num_mended are of the first two. Token
    counts are over train and evaluation rows.

    Attributes:
        num_rows: All rows of the data set, its own evaluation rows included.
        num_train: Rows to train on.
        num_evaluation: Rows held out.
        num_mended: Rows of both that are as a person mended them.
        num_unused: Rows left out by `max_rows` and `max_eval_rows`.
        num_cut_rows: Kept rows that were longer than `max_length`.
        num_cut_tokens: Tokens cut from them.
        skipped: (row number from 1, reason) of each row that could not be used.
        num_tokens: Tokens that the model sees.
        num_trained_tokens: Those of them that count in the loss; of rows with a label, the labels.
        notes: What was odd about the data set itself.
        is_labelled: Whether each row has one label.
    """

    num_rows: int
    num_train: int
    num_evaluation: int
    num_mended: int
    num_unused: int
    num_cut_rows: int
    num_cut_tokens: int
    skipped: tuple[tuple[int, str], ...]
    num_tokens: int
    num_trained_tokens: int
    notes: tuple[str, ...] = ()
    is_labelled: bool = False

    def sentences(self) -> list[str]:
        """Returns the report as a few lines for people."""
        lines = [
            f"{_rows(self.num_rows)}: {self.num_train:,} to train on, {self.num_evaluation:,} held out"
            + (f" ({self.num_mended:,} of them mended)" if self.num_mended else "")
            + (f", {len(self.skipped):,} skipped" if self.skipped else "")
            + (f", {self.num_unused:,} left out by the limits on rows" if self.num_unused else "")
            + ".",
            f"{self.num_tokens:,} tokens, and one label a row."
            if self.is_labelled
            else f"{self.num_tokens:,} tokens, of which {self.num_trained_tokens:,} are trained on.",
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
        hashes: Source -> SHA-256 of its bytes, or of a Hub set's rows.
    """

    train: Sequence[AnyExample]
    evaluation: Sequence[AnyExample]
    report: PrepareReport
    hashes: dict[str, str]


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
    table = read_table(spec.source, workspace, spec.eval_source)
    examples: Any = LabelledExamples(max_length) if spec.is_labelled else Examples(max_length)
    place_of = array("q")

    def keep(place: int, example: AnyExample) -> None:
        place_of.append(place)
        examples.append(example)

    survey = Survey(table, spec, tokenizer, seed, keep)
    told, tell = time.monotonic(), progress or (lambda message: None)
    for done in survey.read():
        if time.monotonic() - told > 2:
            told = time.monotonic()
            tell(f"Reading the data: {done:,} of {survey.num_taken:,} rows")
    split = survey.split(max_length)
    report = report_of(survey, split, max_length)
    if reason := blocked(survey, report, checks(survey, split, max_length)):
        raise LoRAError(reason)
    kept = np.asarray(place_of)
    train, evaluation = (examples.at(np.searchsorted(kept, part)) for part in (split.train, split.evaluation))
    hashes = fingerprint(spec.source, workspace, table)
    if spec.eval_source:
        hashes |= fingerprint(spec.eval_source, workspace, table)
    return Prepared(train, evaluation, report, hashes)


def blocked(survey: Survey, report: PrepareReport, found: Sequence[Check]) -> str:
    """Returns why training on a survey's rows would be wasted, as one sentence; "" where nothing stops it."""
    name = survey.table.name
    if not report.num_train:
        return f"No row of {name} can be trained on ({_some(report.skipped)}); choose other columns, or mend the rows."
    if report.skipped and survey.spec.bad_rows == "stop":
        return (
            f"{_rows(len(report.skipped))} of {name} cannot be used ({_some(report.skipped)}); mend them, or choose "
            "`bad_rows` (='stop') = skip to train on the others."
        )
    return " ".join(f"{check.title}: {_rows(len(check.places))}. {check.advice}" for check in found if check.stops)


def report_of(survey: Survey, split: Split, max_length: int) -> PrepareReport:
    """Returns what becomes of a survey's rows when they are cut to `max_length`."""
    kept = np.concatenate([split.train, split.evaluation])
    lengths = np.asarray(survey.num_tokens)[kept]
    over = np.maximum(0, lengths - max_length)
    num_rows = len(survey.table.rows) + len(survey.table.eval_rows)
    own = "of the data set's own evaluation rows: "
    return PrepareReport(
        num_rows=num_rows,
        num_train=len(split.train),
        num_evaluation=len(split.evaluation),
        num_mended=len(np.intersect1d(survey.mended(), kept)),
        num_unused=num_rows - survey.num_taken,
        num_cut_rows=int((over > 0).sum()),
        num_cut_tokens=int(over.sum()),
        skipped=tuple(
            (survey.number(i), (own if i >= survey.num_first else "") + survey.reason(i, max_length))
            for i in split.skipped.tolist()
        ),
        num_tokens=int((lengths - over).sum()),
        num_trained_tokens=survey.num_trained(kept, max_length),
        notes=survey.table.problems,
        is_labelled=survey.spec.is_labelled,
    )


class Batches:
    """Endless batches of right-padded rows, shuffled anew each epoch; the last of an epoch may be smaller.

    Epoch e has the order that (seed, e) draws: what follows on so many rows depends on neither run nor process. Rows
    with a label stand beside rows of like length.
    """

    def __init__(self, examples: Sequence[AnyExample], batch_size: int, seed: int, pad_token_id: int | None) -> None:
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

    def _chosen_after(self, num_rows: int) -> Iterator[list[Any]]:
        first, begin = divmod(num_rows, len(self._examples))
        for epoch in itertools.count(first):
            order = list(range(len(self._examples)))
            chance = random.Random(f"epoch {self._seed} {epoch}")
            chance.shuffle(order)
            if isinstance(self._examples[0], LabelledExample):
                order = self._by_length(order, chance)
            for place in range(begin, len(order), self._batch_size):
                yield [self._examples[i] for i in order[place : place + self._batch_size]]
            begin = 0

    def _by_length(self, order: list[int], chance: random.Random) -> list[int]:
        """Returns the same rows, of each few batches those of like length together, and the batches in any order."""
        size = self._batch_size
        ordered: list[int] = []
        for begin in range(0, len(order), size * LENGTHS_ALIKE):
            ordered += sorted(
                order[begin : begin + size * LENGTHS_ALIKE], key=lambda i: len(self._examples[i].input_ids)
            )
        whole = len(ordered) - len(ordered) % size
        batches = [ordered[begin : begin + size] for begin in range(0, whole, size)]
        chance.shuffle(batches)
        return [i for batch in batches for i in batch] + ordered[whole:]


def eval_batches(
    examples: Sequence[AnyExample], batch_size: int, pad_token_id: int | None
) -> Iterator[dict[str, "Tensor"]]:
    """Yields every example once, those of like length together.

    A batch has input_ids, attention_mask and labels, int64, (batch, seq), padded at the right to its longest row;
    of rows with a label, labels are (batch), float32 where they are values, and token_type_ids are there where the
    model wants them.
    """
    ordered = sorted(examples, key=lambda e: len(e.input_ids))
    for begin in range(0, len(ordered), batch_size):
        yield _collate(ordered[begin : begin + batch_size], pad_token_id)


def _collate(examples: Sequence[Any], pad_token_id: int | None) -> dict[str, "Tensor"]:
    import torch

    shape = (len(examples), max(len(e.input_ids) for e in examples))
    # Padding is masked and never trained on, so any id does for a tokenizer that has none.
    input_ids = torch.full(shape, pad_token_id or 0)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for i, example in enumerate(examples):
        num_tokens = len(example.input_ids)
        input_ids[i, :num_tokens] = torch.tensor(example.input_ids)
        attention_mask[i, :num_tokens] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if isinstance(examples[0], LabelledExample):
        return batch | _labels_of(examples, shape)
    labels = torch.full(shape, IGNORED)
    for i, example in enumerate(examples):
        labels[i, : len(example.labels)] = torch.tensor(example.labels)
    return batch | {"labels": labels}


def _labels_of(examples: Sequence[LabelledExample], shape: tuple[int, int]) -> dict[str, "Tensor"]:
    import torch

    labels = torch.tensor([e.label for e in examples])
    batch = {"labels": labels if examples[0].is_value else labels.long()}
    if examples[0].types:
        batch["token_type_ids"] = types = torch.zeros(shape, dtype=torch.int64)
        for i, example in enumerate(examples):
            types[i, : len(example.types)] = torch.tensor(list(example.types))
    return batch


def _rows(number: int) -> str:
    return f"{number:,} row" + ("" if number == 1 else "s")


def _some(skipped: Sequence[tuple[int, str]]) -> str:
    shown = "; ".join(f"row {number}: {reason}" for number, reason in skipped[:3])
    return shown + (f"; and {len(skipped) - 3:,} more" if len(skipped) > 3 else "")
