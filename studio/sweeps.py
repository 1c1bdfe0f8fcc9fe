"""Sweeps: one spec and a grid of settings become many runs with one name."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from core import LoRAError, settings
from studio.specs import PARTS, RunSpec

MOST = 200
"""Runs that one sweep may make: more is more likely a slip of the hand than a wish."""


def changed(spec: RunSpec, values: dict[str, str]) -> RunSpec:
    """Returns `spec` with other values of some settings, each as text as on the command line.

    Raises:
        LoRAError: A setting does not exist, or a value is out of range.
    """
    parts = {part: getattr(spec, part).to_dict() for part in PARTS}
    homes = {s.name: (part, s) for part, config in PARTS.items() for s in settings(config)}
    for name, text in values.items():
        if name not in homes:
            raise LoRAError(f"`{name}` (={text!r}) must be a setting; there are {', '.join(homes)}.")
        part, setting = homes[name]
        parts[part][name] = setting.parse(text)
    made: dict[str, Any] = {part: PARTS[part].from_dict(values) for part, values in parts.items()}
    return replace(spec, **made)


def parse(lines: Sequence[str]) -> dict[str, list[str]]:
    """Returns setting → the values to try, from lines such as `r = 4, 8, 16` or `target_modules = q, v; all-linear`.

    Values have commas between them, or semicolons where a value has commas of its own.

    Raises:
        LoRAError: A line is of another form, or names a setting twice.
    """
    grid: dict[str, list[str]] = {}
    for line in (line.strip() for line in lines):
        if not line:
            continue
        name, sign, text = (part.strip() for part in line.partition("="))
        values = [value.strip() for value in text.split(";" if ";" in text else ",") if value.strip()]
        if not sign or not values or name in grid:
            raise LoRAError(f"`sweep` (={line!r}) must be a setting and its values, once each: r = 4, 8, 16.")
        grid[name] = values
    return grid


def grid(spec: RunSpec, values: dict[str, list[str]]) -> list[RunSpec]:
    """Returns a spec for each combination of values, the last setting changing first; `spec` alone for no values.

    Each keeps the name, and says after it what is its own.

    Raises:
        LoRAError: A setting or a value is wrong, or the combinations are too many.
    """
    combinations = list(itertools.islice(itertools.product(*values.values()), MOST + 1))
    if len(combinations) > MOST:
        raise LoRAError(f"`sweep` (={' × '.join(str(len(v)) for v in values.values())}) must make at most {MOST} runs.")
    made = []
    for chosen in combinations:
        own = dict(zip(values, chosen, strict=True))
        words = ", ".join(f"{name} {value}" for name, value in own.items())
        made.append(changed(replace(spec, name=f"{spec.name} · {words}") if own else spec, own))
    return made
