"""One pass over a data set's rows: what is measured of each is kept as numbers, so that no question reads them again.

The page looks at what it finds, and the worker trains on it: both ask the same pass.
"""

import random
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from studio.labelled import LabelledExample, tokenize_labelled
from studio.mapping import DataSpec, Labelled, Message, RowError, RowFault, check_spec, to_labelled, to_messages
from studio.mends import Home
from studio.rendering import IGNORED, Example, Piece, beyond, end_tokens, render, tokenize_pieces
from studio.rows import Row
from studio.tables import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

BATCH = 512
"""Rows that the tokenizer is asked for at once."""

MAX_LABELS = 20
"""Distinct completions up to which they are taken for labels."""

REPLACED, GARBLED, SPECIAL, FOREIGN, HOLLOW, ENDED = (1 << bit for bit in range(6))
"""What a row may have: characters lost in decoding, or read in a wrong encoding; a special token of the tokenizer, or
another model's, as text; a message without words; an end token that is trained."""

# UTF-8 that was read as Latin-1 or Windows-1252: "Ã©" for é, "â€™" for ’.
_GARBLED = re.compile("[\u00c2\u00c3][\u0080-\u00bf\u0152-\u017e\u2018-\u2122]|\u00e2\u20ac[\u0080-\u2122]")
_FOREIGN = re.compile(
    r"<\|(?:im_start|im_end|user|assistant|system|start_header_id|eot_id|end)\|>|<(?:start|end)_of_turn>"
    r"|\[/?INST\]|<</?SYS>>|^### (?:Instruction|Response):",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Split:
    """Which of a survey's rows are trained on and which are held out, as places in its arrays.

    Attributes:
        train: (num_train,) places.
        evaluation: (num_evaluation,) places.
        skipped: (num_skipped,) places of rows that cannot be used at this cut-off.
    """

    train: np.ndarray
    evaluation: np.ndarray
    skipped: np.ndarray


class Survey:
    """The rows that a spec takes of a table, measured. A row's place is its index in the arrays.

    Attributes:
        table: The rows themselves.
        spec: Which are taken, and how they become tokens.
        num_first: How many of the taken rows are of the table's `rows`; those after them are of its `eval_rows`.
        num_tokens: (num_taken,) length before any cut; 0 where a row cannot be used.
        first, last: (num_taken,) where the first and the last trained token stand, from 0; -1 where there is none. Of
            rows with a label both are 0: it is always trained.
        flags: (num_taken,) `REPLACED` and so on.
        labels: Completion -> rows, where there are few of them; else None.
        end: The end token that answers have, as text; "" where none has been seen.
        is_stopped: Set by who wants `read` to end after the batch at hand.
    """

    def __init__(
        self,
        table: Table,
        spec: DataSpec,
        tokenizer: "Tokenizer",
        seed: int,
        keep: Callable[[int, Any], None] | None = None,
    ) -> None:
        """Takes note of what is to be read; `read` reads it.

        Args:
            table: Where the rows are.
            spec: Which, and what they mean.
            tokenizer: The model's.
            seed: Of the draw of rows.
            keep: Given each row's place and its uncut tokens, an `Example` or a `LabelledExample`.

        Raises:
            LoRAError: A column is missing.
        """
        check_spec(spec, table)
        self.table, self.spec = table, spec
        self._tokenizer, self._keep = tokenizer, keep or (lambda place, example: None)
        draw = random.Random(f"rows {seed}")
        first = _draw(len(table.rows), spec.max_rows, draw)
        second = _draw(len(table.eval_rows), spec.max_eval_rows, draw) if table.eval_rows else ()
        self._chance = draw.getstate()
        self._numbers = np.concatenate([np.asarray(part, np.int64) for part in (first, second)])
        self.num_first, self.num_taken = len(first), len(first) + len(second)
        self.num_tokens, self.first, self.last, self.flags = (array("i") for _ in range(4))
        self._reason = array("i")
        self._reasons: dict[tuple[RowFault, str], int] = {}
        self._prompt, self._row = array("q"), array("q")
        self.is_stopped = False
        self.labels: Counter[str] | None = Counter() if spec.layout == "pair" else None
        self._gaps: dict[int, array[int]] = {}  # of conversations: what is not trained between the first and the last
        self._ends, self.end = end_tokens(tokenizer), ""
        marks = sorted((t for t in self._ends.values() if len(t) > 2), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None

    @property
    def num_read(self) -> int:
        """How many rows are measured so far."""
        return len(self.flags)

    def read(self) -> Iterator[int]:
        """Reads what is left, until it is stopped, and yields after each batch how many rows are read.

        Raises:
            LoRAError: The template does not fit the tokenizer or the rows.
        """
        self.is_stopped = False
        while self.num_read < self.num_taken and not self.is_stopped:
            self._read_batch(self._numbers[self.num_read : self.num_read + BATCH].tolist())
            yield self.num_read

    def _read_batch(self, numbers: list[int]) -> None:
        start = self.num_read
        rendered: list[Any] = []
        for offset, number in enumerate(numbers):
            rows = self.table.rows if start + offset < self.num_first else self.table.eval_rows
            rendered.append(self._measure(rows[number]))
        tokenize: Any = tokenize_labelled if self.spec.is_labelled else tokenize_pieces
        tokens = iter(tokenize([r for r in rendered if not isinstance(r, RowError)], self._tokenizer))
        for offset, found in enumerate(rendered):
            self._add(start + offset, found if isinstance(found, RowError) else next(tokens))

    def _measure(self, row: Row) -> list[Piece] | Labelled | RowError:
        """Returns the rendered row, or its texts and label, or what is wrong with it; notes what needs its text."""
        flags, prompt, whole = 0, 0, 0
        try:
            content = to_messages(row, self.spec)
            rendered = self._rendered(row)
            flags, prompt = self._flags(content), hash(prompt_of(content))
            whole = hash(rendered if isinstance(rendered, Labelled) else "".join(piece.text for piece in rendered))
            if self.labels is not None:
                self.labels[content[-1]["content"]] += 1  # type: ignore[index]
                most = max(MAX_LABELS, len(self.spec.labels))
                self.labels = self.labels if len(self.labels) <= most else None
            return rendered
        except RowError as error:
            return error
        finally:
            self.flags.append(flags)
            self._prompt.append(prompt)
            self._row.append(whole)

    def _rendered(self, row: Row) -> list[Piece] | Labelled:
        return to_labelled(row, self.spec) if self.spec.is_labelled else render(row, self.spec, self._tokenizer)

    def _flags(self, content: list[Message] | str) -> int:
        texts = [content] if isinstance(content, str) else [m["content"] for m in content]
        flags = HOLLOW if any(not text.strip() for text in texts) else 0
        for text in texts:
            flags |= REPLACED if "\ufffd" in text else 0
            flags |= GARBLED if not text.isascii() and _GARBLED.search(text) else 0
            if "<" in text or "[" in text or "###" in text:
                flags |= FOREIGN if _FOREIGN.search(text) else 0
                flags |= SPECIAL if self._marks and self._marks.search(text) else 0
        return flags

    def _add(self, place: int, found: Example | LabelledExample | RowError) -> None:
        if isinstance(found, RowError):
            self._reason.append(self._reasons.setdefault((found.kind, str(found)), len(self._reasons)))
            for numbers, none in ((self.num_tokens, 0), (self.first, -1), (self.last, -1)):
                numbers.append(none)
            return
        if isinstance(found, LabelledExample):
            self._reason.append(-1)
            self.num_tokens.append(len(found.input_ids))
            self.first.append(0)
            self.last.append(0)
            self._keep(place, found._replace(row=self.number(place)))
            return
        trained = [i for i, label in enumerate(found.labels) if label != IGNORED]
        end = self._ends.get(found.labels[trained[-1]])
        if end is not None:
            self.flags[place] |= ENDED
            self.end = self.end or end
        if len(trained) <= trained[-1] - trained[0]:
            gaps = set(range(trained[0], trained[-1])).difference(trained)
            self._gaps[place] = array("i", sorted(gaps))
        self._reason.append(-1)
        self.num_tokens.append(len(found.input_ids))
        self.first.append(trained[0])
        self.last.append(trained[-1])
        self._keep(place, found._replace(row=self.number(place)))

    def number(self, place: int) -> int:
        """Returns a row's number among those that its source has of its kind, from 1."""
        return int(self._numbers[place]) + 1

    def where(self, place: int) -> str:
        """Returns the file that a row stands in, and its line or its number there."""
        return self.table.where(int(self._numbers[place]), place >= self.num_first)

    def home(self, place: int) -> Home | None:
        """Returns where a row comes from; None where it is of no source."""
        return self.table.home(int(self._numbers[place]), place >= self.num_first)

    def in_file(self, place: int) -> Row:
        """Returns a row as it stands in its file, mended or not."""
        return self.table.in_file(int(self._numbers[place]), place >= self.num_first)

    def mended(self) -> np.ndarray:
        """Returns the places of rows that were mended by hand, of those that are read."""
        first, second = (self.table.mended(is_held_out) for is_held_out in (False, True))
        found = np.isin(self._numbers[: self.num_first], first), np.isin(self._numbers[self.num_first :], second)
        return np.flatnonzero(np.concatenate(found)[: self.num_read])

    def row(self, place: int) -> Row:
        """Returns a row itself."""
        return (self.table.rows if place < self.num_first else self.table.eval_rows)[int(self._numbers[place])]

    def label(self, place: int) -> str:
        """Returns the answer of a row that can be used."""
        return to_messages(self.row(place), self.spec)[-1]["content"]  # type: ignore[index]

    def reason(self, place: int, max_length: int) -> str:
        """Returns why a row cannot be used at this cut-off; "" where it can."""
        code = self._reason[place]
        if code >= 0:
            return next(reason for (_, reason), number in self._reasons.items() if number == code)
        return beyond(self.first[place], max_length) if self.first[place] >= max_length else ""

    def unusable(self, kind: RowFault) -> np.ndarray:
        """Returns the places of rows that no cut-off makes usable, for a reason of this kind."""
        wanted = [code for (of, _), code in self._reasons.items() if of == kind]
        return np.flatnonzero(np.isin(np.asarray(self._reason), wanted))

    def flagged(self, flag: int) -> np.ndarray:
        """Returns the places of rows that have a flag."""
        return np.flatnonzero(np.asarray(self.flags) & flag)

    def num_trained(self, places: np.ndarray, max_length: int) -> int:
        """Returns how many tokens of the rows at `places` are trained, if they are cut to `max_length`."""
        ends = np.minimum(np.asarray(self.last)[places] + 1, max_length)
        total = int((ends - np.asarray(self.first)[places]).sum())
        for place in set(places.tolist()) & self._gaps.keys():
            gaps = np.asarray(self._gaps[place])
            total -= int((gaps < max_length).sum())
        return total

    def repeated(self) -> np.ndarray:
        """Returns the places of rows that say word for word what a row before them in the same part says."""
        rows, usable = np.asarray(self._row), np.asarray(self.num_tokens) > 0
        found = []
        for part in (slice(0, self.num_first), slice(self.num_first, None)):
            places = np.flatnonzero(usable[part])
            first = np.unique(rows[part][places], return_index=True)[1]
            found.append(np.delete(places, first) + (part.start or 0))
        return np.concatenate(found)

    def shared(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Returns the held-out places whose whole row, and those whose prompt alone, is also trained on."""
        whole, prompt = (
            np.isin(np.asarray(keys)[split.evaluation], np.asarray(keys)[split.train])
            for keys in (self._row, self._prompt)
        )
        return split.evaluation[whole], split.evaluation[prompt & ~whole]

    def split(self, max_length: int) -> Split:
        """Returns which rows are trained on and which are held out, if rows are cut to `max_length`.

        Rows with the same prompt are all trained on or all held out, where that can be done.
        """
        first, spec = np.asarray(self.first), self.spec
        is_usable = (first >= 0) & (first < max_length)
        places = np.flatnonzero(is_usable)
        train, evaluation = places[places < self.num_first], places[places >= self.num_first]
        if not self.table.eval_rows and spec.eval_fraction and len(train) > 1:
            size = min(max(1, round(len(train) * spec.eval_fraction)), spec.max_eval_rows)
            chance = random.Random()
            chance.setstate(self._chance)
            is_held_out = _hold_out(np.asarray(self._prompt)[train], size, chance)
            train, evaluation = train[~is_held_out], train[is_held_out]
        return Split(train, evaluation, np.flatnonzero(~is_usable))


def prompt_of(content: list[Message] | str) -> str:
    """Returns what tells rows apart that must not be on both sides: the first thing asked, or the whole text."""
    return content if isinstance(content, str) else next(m["content"] for m in content if m["role"] == "user")


def _draw(num_rows: int, limit: int, draw: random.Random) -> Sequence[int]:
    """Returns which rows to take, in their order: all, or as many as `limit`, where that is not 0."""
    return sorted(draw.sample(range(num_rows), limit)) if 0 < limit < num_rows else range(num_rows)


def _hold_out(keys: np.ndarray, size: int, draw: random.Random) -> np.ndarray:
    """Returns which of `keys` are held out, (num_keys,) bool: up to `size` of them, at least one.

    Equal keys are together unless each key has more than `size`.
    """
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    sizes = np.bincount(group).tolist()
    order = np.argsort(first).tolist()  # as the groups appear
    draw.shuffle(order)
    chosen, num_chosen = [], 0
    for number in order:
        if num_chosen + sizes[number] <= size:
            chosen.append(number)
            num_chosen += sizes[number]
        if num_chosen == size:
            break
    if chosen:
        return np.isin(group, chosen)
    held_out = np.zeros(len(keys), bool)
    held_out[draw.sample(range(len(keys)), size)] = True
    return held_out
