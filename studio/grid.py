"""A model's matrices as a grid, layer × matrix, and a choice of its cells as the shortest settings that make it.

The settings are the one truth: the grid is drawn from what they choose, and what is clicked in it becomes settings.
"""

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from core import ALL_LINEAR, LoRAConfig, LoRAError, adaptable, chosen_ranks, fits_end, quoted
from studio.matrices import split_path

NOTHING = "`target_modules` (=nothing) must name at least one matrix; click some in the Model tab's grid."
"""What is said while no matrix is chosen."""

Ranks = Mapping[str, int]
"""Path → r of each matrix that is adapted, as of `core.chosen_ranks`; experts one by one."""


@dataclass(frozen=True)
class Cell:
    """One matrix of one layer, or all experts of one stack.

    Attributes:
        path: Its path in the model; of experts, that of their stack.
        stack, layer: Where it stands: model.layers, 3; of what is in no layer, empty and -1.
        column: Its name inside the layer, or its path.
        shape: (out_features, in_features), of an expert.
        num_experts: How many matrices it is; 0 of what is no stack.
        whole: Of a slice, the path of the fused projection that it is a part of.
    """

    path: str
    stack: str
    layer: int
    column: str
    shape: tuple[int, int]
    num_experts: int = 0
    whole: str | None = None

    @property
    def paths(self) -> list[str]:
        """The paths of its matrices."""
        return [f"{self.path}.{index}" for index in range(self.num_experts)] if self.num_experts else [self.path]


def cells(model: nn.Module) -> list[Cell]:
    """Returns the cells of a model's grid, in the model's order; works on the meta device."""
    experts, slices = adaptable(model, ["expert"]), adaptable(model, ["slice"])
    found: dict[str, Cell] = {}
    counts: defaultdict[str, int] = defaultdict(int)
    for path, shape in adaptable(model).items():
        above = path.rpartition(".")[0]
        name = above if path in experts else path
        counts[name] += path in experts
        if name not in found:
            found[name] = Cell(name, *split_path(name), shape, whole=above if path in slices else None)
    return [dataclasses.replace(cell, num_experts=counts[cell.path]) for cell in found.values()]


def layout(grid: list[Cell], model: str) -> str:
    """Returns JSON of what the page draws: the cells, and the name of the model."""
    places = {cell.path: place for place, cell in enumerate(grid)}
    rows = [
        [c.path, c.stack, c.layer, c.column, *c.shape, c.num_experts, -1 if c.whole is None else places[c.whole]]
        for c in grid
    ]
    return json.dumps({"model": model, "cells": rows})


def state(grid: list[Cell], model: str, ranks: Ranks, r: int, dora: bool = False) -> str:
    """Returns JSON of which cells are adapted, as `read_state` takes it.

    `on` has one letter a cell: 0 no, 1 yes, p only some experts, which `some` lists by the cell's number; `own` is
    cell's number → r where it is not the `r` of all. A stack whose experts differ shows the largest.
    """
    on, own, some = "", {}, {}
    for place, cell in enumerate(grid):
        taken = [index for index, path in enumerate(cell.paths) if path in ranks]
        on += "0" if not taken else "1" if len(taken) == len(cell.paths) else "p"
        if on[-1] == "p":
            some[str(place)] = taken
        if taken and (its := max(ranks[cell.paths[index]] for index in taken)) != r:
            own[str(place)] = its
    return json.dumps({"model": model, "on": on, "own": own, "some": some, "r": r, "dora": dora})


def read_state(grid: list[Cell], text: str, r: int) -> Ranks:
    """Returns the choice that the page's `text` says; `r` is that of the cells without one of their own.

    Raises:
        LoRAError: It is not of this grid.
    """
    try:
        said = json.loads(text)
        own = {int(place): int(value) for place, value in said["own"].items()}
        some = {int(place): [int(index) for index in kept] for place, kept in said["some"].items()}
        if len(said["on"]) != len(grid) or not set(said["on"]) <= set("01p"):
            raise ValueError("as many letters as cells")
        ranks: dict[str, int] = {}
        for place, (cell, letter) in enumerate(zip(grid, said["on"], strict=True)):
            taken = cell.paths if letter == "1" else [cell.paths[i] for i in some[place]] if letter == "p" else []
            ranks |= dict.fromkeys(taken, own.get(place, r))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise LoRAError(f"`grid` (={quoted(text)}) must be a choice in the grid that is shown; reload.") from error
    return {
        path: value for cell in grid for path in cell.paths if (value := ranks.get(path)) and cell.whole not in ranks
    }


def full_columns(grid: list[Cell], ranks: Ranks) -> list[str]:
    """Returns the columns all of whose matrices are adapted."""
    lacking = {cell.column for cell in grid if any(path not in ranks for path in cell.paths)}
    return [column for column in dict.fromkeys(cell.column for cell in grid) if column not in lacking]


def settings_for(model: nn.Module, grid: list[Cell], ranks: Ranks, config: LoRAConfig) -> LoRAConfig:
    """Returns `config` with the shortest settings found that choose exactly these matrices with these ranks.

    Tried are all-linear, names, and an expression, with `layers` and `exclude_modules` where they help; the
    expression can say every choice. What `config` says already stays as it is.

    Raises:
        LoRAError: No matrix is chosen.
    """
    if not ranks:
        raise LoRAError(NOTHING)
    wanted = set(ranks)
    kept = [config, *sorted(_choices(grid, wanted, config), key=_length)]
    found = next(one for one in kept if set(_ranks(model, one)) == wanted)
    if _ranks(model, found) == dict(ranks):
        return found
    found = dataclasses.replace(found, rank_pattern=_rank_pattern(grid, ranks, config.r))
    wrong = {path: ranks[path] for path, r in _ranks(model, found).items() if r != ranks[path]}
    if wrong:  # a path that is the end of another one
        first = {re.escape(path): wrong[path] for path in sorted(wrong, key=len, reverse=True)}
        found = dataclasses.replace(found, rank_pattern=first | found.rank_pattern)
    return found


def _ranks(model: nn.Module, config: LoRAConfig) -> dict[str, int]:
    try:
        return chosen_ranks(model, config)
    except LoRAError:  # it would choose nothing, or name a fused projection and its slices
        return {}


def _length(config: LoRAConfig) -> int:
    target, exclude = config.target_modules, config.exclude_modules
    texts = [t if isinstance(t, str) else ", ".join(t) for t in (target, exclude)]
    return sum(map(len, texts)) + len(config.layers)


def _choices(grid: list[Cell], wanted: set[str], config: LoRAConfig) -> Iterator[LoRAConfig]:
    plain = dataclasses.replace(config, exclude_modules=(), layers="")
    touched = [cell for cell in grid if any(path in wanted for path in cell.paths)]
    columns = tuple(dict.fromkeys(cell.column for cell in touched))
    layers = _as_ranges({cell.layer for cell in touched})
    for targets in (ALL_LINEAR, columns):
        yield dataclasses.replace(plain, target_modules=targets)
        if all(cell.layer >= 0 for cell in touched):
            yield dataclasses.replace(plain, target_modules=targets, layers=layers)
        taken = set(_columns_of(grid, targets))
        left = tuple(cell.path for cell in grid if cell.column in taken and not wanted & set(cell.paths))
        if left and all(re.fullmatch(r"[\w.]+", path) for path in left):
            yield dataclasses.replace(plain, target_modules=targets, exclude_modules=left)
    yield dataclasses.replace(plain, target_modules=_expression(grid, wanted))


def _columns_of(grid: list[Cell], targets: str | tuple[str, ...]) -> Iterable[str]:
    if not isinstance(targets, str):
        return targets
    return [cell.column for cell in grid if cell.layer >= 0 and cell.whole is None]


def _as_ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _one_of(words: Iterable[str]) -> str:
    words = list(words)
    return words[0] if len(words) == 1 else f"(?:{'|'.join(words)})"


def _expression(grid: list[Cell], wanted: set[str]) -> str:
    """Returns a regular expression that fits these paths and no other: layers × columns, as far as they go together."""
    full = [cell for cell in grid if all(path in wanted for path in cell.paths)]
    parts = _blocks(grid, full)
    for cell in grid:
        taken = [str(index) for index, path in enumerate(cell.paths) if path in wanted]
        if 0 < len(taken) < len(cell.paths):
            parts.append(rf"{re.escape(cell.path)}\.{_one_of(taken)}")
    return "|".join(parts)


def _blocks(grid: list[Cell], chosen: list[Cell]) -> list[str]:
    """Returns expressions for whole cells, columns of the same layers together."""
    everywhere, here = defaultdict(set), defaultdict(set)
    for found, among in ((everywhere, grid), (here, chosen)):
        for cell in among:
            found[cell.stack, cell.column].add(cell.layer)
    together: dict[tuple[str, str], list[str]] = {}
    parts = []
    for (stack, column), layers in here.items():
        if layers == {-1}:
            parts.append(re.escape(column))
            continue
        is_all = layers == everywhere[stack, column]
        number = r"\d+" if is_all and len(layers) > 1 else _one_of(map(str, sorted(layers)))
        together.setdefault((stack, number), []).append(re.escape(column))
    for (stack, number), columns in together.items():
        above = re.escape(stack) + r"\." if stack else ""
        parts.append(rf"{above}{number}\.{_one_of(columns)}")
    return parts


def _rank_pattern(grid: list[Cell], ranks: Ranks, r: int) -> dict[str, int]:
    """Returns the ranks that are not `r`, by name where a whole column has one, by expression elsewhere."""
    of_cell = {
        cell.path: max(ranks[p] for p in cell.paths if p in ranks) for cell in grid if ranks.keys() & set(cell.paths)
    }
    of_column: defaultdict[str, set[int]] = defaultdict(set)
    for cell in grid:
        if cell.path in of_cell:
            of_column[cell.column].add(of_cell[cell.path])
    found: dict[str, int] = {}
    for value in sorted(set(of_cell.values()) - {r}):
        chosen = [cell for cell in grid if of_cell.get(cell.path) == value]
        found |= {cell.column: value for cell in chosen if of_column[cell.column] == {value}}
        rest = [cell for cell in chosen if of_column[cell.column] != {value}]
        found |= dict.fromkeys(_blocks(grid, rest), value)
    return found


def unused_ranks(config: LoRAConfig, ranks: Ranks) -> list[str]:
    """Returns the names in `rank_pattern` that fit no adapted matrix."""
    names = {name for path in ranks for name in (path, path.rpartition(".")[0])}
    return [key for key in config.rank_pattern if not any(fits_end(key, name) for name in names)]
