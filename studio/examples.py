"""Rows of tokens in few large arrays: a million rows take five bytes a token and no object each."""

from array import array
from collections.abc import Iterable, Sequence
from itertools import compress

from studio.rendering import IGNORED, Example


class Examples(Sequence[Example]):
    """Examples one after the other, cut to a length as they come; each is made anew when it is asked for."""

    def __init__(self, max_length: int) -> None:
        """Cuts rows at the end to at most `max_length` tokens; whether any is left to train on is not asked."""
        self._max_length = max_length
        self._ids, self._is_trained, self._ends = array("i"), bytearray(), array("q", [0])
        self._num_cut, self._rows = array("i"), array("q")
        self._places: Sequence[int] | None = None

    def append(self, example: Example) -> None:
        """Adds an uncut example."""
        kept = slice(0, self._max_length)
        self._ids.extend(example.input_ids[kept])
        self._is_trained += bytes(label != IGNORED for label in example.labels[kept])
        self._ends.append(len(self._ids))
        self._num_cut.append(max(0, len(example.input_ids) - self._max_length))
        self._rows.append(example.row)

    def at(self, places: Iterable[int]) -> "Examples":
        """Returns those at `places`, which share this one's arrays."""
        view = object.__new__(Examples)
        view.__dict__.update(self.__dict__)
        view._places = array("q", places)
        return view

    def __len__(self) -> int:
        return len(self._rows) if self._places is None else len(self._places)

    def __getitem__(self, place):  # type: ignore[no-untyped-def, override]
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if self._places is not None:
            place = self._places[place]
        elif not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self._rows)
        begin, end = self._ends[place], self._ends[place + 1]
        ids = self._ids[begin:end]
        labels = array("i", [IGNORED]) * (end - begin)
        for i in compress(range(end - begin), self._is_trained[begin:end]):
            labels[i] = ids[i]
        return Example(ids, labels, self._num_cut[place], self._rows[place])
