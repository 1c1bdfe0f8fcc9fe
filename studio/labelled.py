"""Rows with a label as tokens: one text or two, as the tokenizer puts them, and what the model should give."""

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from studio.examples import Packed
from studio.mapping import Labelled, RowError
from studio.rendering import MAX_CHARACTERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

FIRST, SECOND, MARK = 0, 1, 2
"""What a token is of: the first text, the second, or neither, as the marks that the tokenizer adds."""


class LabelledExample(NamedTuple):
    """A row as tokens.

    Attributes:
        input_ids: (seq,) what the model sees.
        parts: (seq,) `FIRST`, `SECOND` or `MARK` of each token.
        types: (seq,) token_type_ids, where the model wants them; else empty.
        label: The number of its label, or its value.
        is_value: Whether it is a value.
        num_cut: How many tokens were cut away.
        row: Its number in the data set, from 1; 0 where it is of none.
    """

    input_ids: "array[int]"
    parts: bytes
    types: bytes
    label: float
    is_value: bool = False
    num_cut: int = 0
    row: int = 0


def tokenize_labelled(rows: Sequence[Labelled], tokenizer: "Tokenizer") -> list[LabelledExample | RowError]:
    """Returns the tokens of rows, uncut, or why a row has none; the tokenizer is asked once for all of a kind."""
    found: list[LabelledExample | RowError | None] = [None] * len(rows)
    between = "" if _separates(tokenizer) else "\n"
    for num_texts in (1, 2):
        places = []
        for place, row in enumerate(rows):
            length = sum(map(len, row.texts))
            if length > MAX_CHARACTERS:
                words = f"it has {length:,} characters; at most {MAX_CHARACTERS:,} are read; split it"
                found[place] = RowError(words)
            elif len(row.texts) == num_texts:
                places.append(place)
        if not places:
            continue
        texts = [[rows[place].texts[i] for place in places] for i in range(num_texts)]
        texts[1:] = [[between + text for text in second] for second in texts[1:]]
        encoded = tokenizer(*texts, verbose=False, return_attention_mask=False)  # type: ignore[arg-type]
        types = encoded.get("token_type_ids", [()] * len(places))
        for i, place in enumerate(places):
            ids = array("i", encoded["input_ids"][i])
            parts = bytes(MARK if part is None else part for part in encoded.sequence_ids(i))
            found[place] = LabelledExample(ids, parts, bytes(types[i]), rows[place].label, rows[place].is_value)
            if not len(ids):
                found[place] = RowError("it has no token")
    return found  # type: ignore[return-value]


def _separates(tokenizer: "Tokenizer") -> bool:
    """Says whether a tokenizer puts a mark of its own between two texts; those of decoders do not."""
    parts = tokenizer(["x"], ["y"]).sequence_ids(0)
    return None in parts[parts.index(0) : parts.index(1)]


def cut_labelled(example: LabelledExample, max_length: int) -> LabelledExample:
    """Returns an example cut to at most `max_length` tokens: from the end of the longer text, then of both alike.

    The marks stay. That is how transformers' tokenizers cut pairs, as "longest_first".
    """
    num_over = len(example.input_ids) - max_length
    if num_over <= 0:
        return example
    counts = [example.parts.count(part) for part in (FIRST, SECOND)]
    room = max(0, sum(counts) - num_over)
    shorter, longer = sorted(counts)
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room // 2 + room % 2
    left = [shorter, longer] if counts[FIRST] <= counts[SECOND] else [longer, shorter]
    kept = []
    for place, part in enumerate(example.parts):
        if part != MARK:
            left[part] -= 1
        if part == MARK or left[part] >= 0:
            kept.append(place)
    return example._replace(
        input_ids=array("i", (example.input_ids[place] for place in kept)),
        parts=bytes(example.parts[place] for place in kept),
        types=bytes(example.types[place] for place in kept) if example.types else b"",
        num_cut=len(example.input_ids) - len(kept),
    )


class LabelledExamples(Packed[LabelledExample]):
    """Rows with a label each, of one task and one tokenizer; a token takes six bytes."""

    def __init__(self, max_length: int) -> None:
        super().__init__(max_length)
        self._parts, self._types, self._labels = bytearray(), bytearray(), array("d")
        self._is_value = False

    def append(self, example: LabelledExample) -> None:
        """Adds an uncut example."""
        self._is_value = example.is_value
        kept = cut_labelled(example, self._max_length)
        self._parts += kept.parts
        self._types += kept.types
        self._labels.append(kept.label)
        self._add(kept.input_ids, kept.num_cut, kept.row)

    def _made(self, place: int, here: slice) -> LabelledExample:
        parts, types = bytes(self._parts[here]), bytes(self._types[here])
        about = self._labels[place], self._is_value, self._num_cut[place], self._rows[place]
        return LabelledExample(self._ids[here], parts, types, *about)
