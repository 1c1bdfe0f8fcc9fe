"""Rows of tokens in few large arrays: a million rows take five bytes a token and no object each."""

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Self, TypeVar, overload

from studio.rendering import IGNORED, Example

T = TypeVar("T")


class Packed(Sequence[T]):
    """Examples one after the other, cut to a length as they come; each is made anew when it is asked for."""

    def __init__(self, max_length: int) -> None:
        """Cuts rows to at most `max_length` tokens; whether any is left to train on is not asked."""
        self._max_length = max_length
        self._ids, self._ends = array("i"), array("q", [0])
        self._num_cut, self._rows = array("i"), array("q")
        self._places: Sequence[int] | None = None

    @abstractmethod
    def append(self, example: T) -> None:
        """Adds an uncut example."""

    @abstractmethod
    def _made(self, place: int, here: slice) -> T:
        """Returns the example of `place`, whose tokens are `here` in each array of tokens."""

    def _add(self, ids: Iterable[int], num_cut: int, row: int) -> None:
        self._ids.extend(ids)
        self._ends.append(len(self._ids))
        self._num_cut.append(num_cut)
        self._rows.append(row)

    def at(self, places: Iterable[int]) -> Self:
        """Returns those at `places`, which share this one's arrays."""
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._places = array("q", places)
        return view

    def __len__(self) -> int:
        return len(self._rows) if self._places is None else len(self._places)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if self._places is not None:
            place = self._places[place]
        elif not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self._rows)
        return self._made(place, slice(self._ends[place], self._ends[place + 1]))


class Examples(Packed[Example]):
    """Examples whose tokens are trained or not, cut at their end."""

    def __init__(self, max_length: int) -> None:
        super().__init__(max_length)
        self._is_trained = bytearray()

    def append(self, example: Example) -> None:
        """Adds an uncut example."""
        kept = slice(0, self._max_length)
        self._is_trained += bytes(label != IGNORED for label in example.labels[kept])
        self._add(example.input_ids[kept], max(0, len(example.input_ids) - self._max_length), example.row)

    def _made(self, place: int, here: slice) -> Example:
        ids = self._ids[here]
        labels = array("i", [IGNORED]) * len(ids)
        for i in compress(range(len(ids)), self._is_trained[here]):
            labels[i] = ids[i]
        return Example(ids, labels, self._num_cut[place], self._rows[place])
