"""The parts of a model that are passed one after another, and copies that have fewer of them."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the parts of a model that are passed one after another: the members of its outermost lists."""
    for group in block_lists(module):
        yield from group


def block_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Yields the outermost lists of a model."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from block_lists(child)


def with_first(model: nn.Module, lists: Iterable[nn.ModuleList], num: int) -> nn.Module:
    """Returns a copy of a model that has of some of its lists only the first `num` blocks."""
    lists = list(lists)
    copied: dict[int, Any] = {id(block): nn.Identity() for group in lists for block in group[num:]}
    few = copy.deepcopy(model, copied)
    for group in lists:
        del copied[id(group)][num:]
    return few
