"""Where the C library puts tensors on a CPU, and what lies free between them when a step needs the most."""

import bisect

SPARE_BYTES = 96
"""What glibc wants of a free block beyond an aligned request's size: the alignment of torch's tensors, 64, and 32 for
the smallest block that it can cut off. So a freed tensor's place alone does not do for one of the same size."""


class Heap:
    """A heap as glibc keeps one that gives nothing back: the smallest free block that does, else more at its end.

    Free neighbours become one block at once, as where glibc keeps no lists of small blocks (`studio.jobs`).

    Attributes:
        peak_bytes: How far it has reached.
    """

    def __init__(self) -> None:
        self.peak_bytes = self._end = 0
        self._free: list[tuple[int, int]] = []  # (bytes, start), sorted
        self._starts: dict[int, int] = {}  # of a free block: start → end
        self._ends: dict[int, int] = {}  # end → start

    def take(self, num_bytes: int) -> tuple[int, int]:
        """Returns (start, end) of a place for a tensor."""
        size = -(-(num_bytes + 8) // 16) * 16
        found = bisect.bisect_left(self._free, (size + SPARE_BYTES, 0))
        if found == len(self._free):
            start, self._end = self._end, self._end + size
            self.peak_bytes = max(self.peak_bytes, self._end)
        else:
            length, start = self._free[found]
            self._forget(start, start + length)
            self.give(start + size, start + length)
        return start, start + size

    def give(self, start: int, end: int) -> None:
        """Takes a place back."""
        if (before := self._ends.get(start)) is not None:
            self._forget(before, start)
            start = before
        if (after := self._starts.get(end)) is not None:
            self._forget(end, after)
            end = after
        if end == self._end:
            self._end = start
        else:
            self._starts[start], self._ends[end] = end, start
            bisect.insort(self._free, (end - start, start))

    def _forget(self, start: int, end: int) -> None:
        del self._starts[start], self._ends[end]
        del self._free[bisect.bisect_left(self._free, (end - start, start))]
