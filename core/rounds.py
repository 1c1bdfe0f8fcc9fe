"""Loops over pieces of a tensor. A forecast, which is of shapes alone, goes through each of them once."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_IS_ONCE = ContextVar("_IS_ONCE", default=False)


def rounds(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields where each piece begins and ends, `size` long but for the last."""
    for begin in range(0, length, size):
        yield begin, min(length, begin + size)
        if _IS_ONCE.get():
            return


def growing_rounds(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields the like where a piece works on all that is before it, too: once, it is the last."""
    for begin in range((length - 1) // size * size if _IS_ONCE.get() else 0, length, size):
        yield begin, min(length, begin + size)


def has_values() -> bool:
    """Says whether tensors have values, as they do anywhere but in a forecast."""
    return not _IS_ONCE.get()


@contextmanager
def once() -> Iterator[None]:
    """Lets every loop make the one round, in a `with` block, that holds the most."""
    token = _IS_ONCE.set(True)
    try:
        yield
    finally:
        _IS_ONCE.reset(token)
