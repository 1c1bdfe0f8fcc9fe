"""The one family of errors that this project raises on purpose."""

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any, Self

_MAX_MESSAGE, _MAX_VALUE = 20_000, 200


class LoRAError(ValueError):
    """Says what is wrong and what to do about it, in one message meant for the user.

    Form: `` `name` (=value) must …; what exists, or what to do ``. Whatever a message quotes, it is one line that a
    terminal and a page can show: what cannot be printed stands there as Python writes it in a string.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in cut(message, _MAX_MESSAGE)))


class TargetError(LoRAError):
    """Some pattern of `target_modules` matches nothing that LoRA can adapt."""


class AdapterFileError(LoRAError):
    """An adapter's files are missing, damaged or do not fit the model."""

    @classmethod
    def of_misfits(cls, what: str, base_model: str | None, problems: Iterable[str]) -> Self:
        """Returns the error that says how `what`, made for `base_model`, does not fit the model at hand."""
        return cls(
            f"{what} (made for {base_model or 'a model not named'}) must fit the model: {listed(problems)}. "
            "Load the base model that it was trained on."
        )


class NonFiniteLossError(LoRAError):
    """The loss or its gradient became NaN or infinite.

    Attributes:
        what: "loss" or "gradient".
        step: The step that could not be taken; the weights are as of the one before.
        batch: Place of the batch within the step, from 0.
        rows: Places in that batch of the rows whose loss is not finite; of a gradient none.
        where: The first module that gives, or the first parameter that holds, what is not finite; "" if none was found.
    """

    what: str = "loss"
    step: int = 0
    batch: int = 0
    rows: tuple[int, ...] = ()
    where: str = ""

    @classmethod
    def of(
        cls, what: str, step: int, *, batch: int = 0, rows: tuple[int, ...] = (), where: str = "", among: str = ""
    ) -> Self:
        """Returns the error that says its attributes in one sentence; `among` is what the rows are counted in."""
        places = f" in row {', '.join(map(str, rows))} of {among or f'batch {batch} (from 0)'}" if rows else ""
        first = f", first in {where}" if where else ""
        error = cls(
            f"The {what} of step {step} is not a finite number{places}{first}; "
            "try a smaller learning rate, a longer warm-up, or precision fp32."
        )
        error.what, error.step, error.batch, error.rows, error.where = what, step, batch, rows, where
        return error


class ExplodedGradientError(LoRAError):
    """The gradient of a step, which was not taken, is finite and far too long."""


class CheckpointError(LoRAError):
    """A checkpoint is missing, damaged, does not fit the model, or could not be written."""


def listed(problems: Iterable[str], separator: str = "; ") -> str:
    """Returns all problems in one row; those that differ in a number of the path that they begin with, as one.

    So "layers.0.up is small; layers.1.up is small; layers.3.up is small" becomes "layers.0-1,3.up is small".
    """
    rows = [(*problem.partition(" ")[0].split("."), problem.partition(" ")[2]) for problem in problems]
    for place in range(max(map(len, rows), default=0) - 1):
        alike: dict[tuple[str, ...], list[str]] = {}
        for row in rows:
            is_number = place < len(row) - 1 and re.fullmatch("0|[1-9][0-9]*", row[place])
            rest = (*row[:place], "", *row[place + 1 :]) if is_number else row
            alike.setdefault(rest, []).append(row[place] if is_number else "")
        rows = [(*row[:place], _runs(n), *row[place + 1 :]) if n[0] else row for row, n in alike.items()]
    return separator.join(" ".join(filter(None, (".".join(row[:-1]), row[-1]))) for row in rows)


def _runs(numbers: list[str]) -> str:
    """Returns whole numbers as ranges: 0-2,5."""
    found = sorted({int(number) for number in numbers})
    runs = [[n for _, n in run] for _, run in groupby(enumerate(found), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def quoted(value: Any) -> str:
    """Returns `value` as a message quotes it: as Python writes it, the end of a long one cut off."""
    try:
        return cut(repr(value), _MAX_VALUE)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply"


def cut(text: str, limit: int) -> str:
    """Returns `text`, its end cut off where it is longer than `limit`."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
