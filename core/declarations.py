"""How a setting is declared: once, and that feeds checks, command-line help and forms."""

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from core.errors import LoRAError, quoted

MAX_JSON_BYTES = 100_000_000
"""The most that a JSON file of settings may hold; the longest that are known, indices of weights, have a tenth."""

Number = int | float


@dataclass(frozen=True)
class Setting:
    """What is known of one field of a config: enough to check it, explain it and draw it.

    Attributes:
        name: The field's name.
        type: The field's annotation.
        default: The value that a config has when nothing is said.
        label: A short title for people.
        help: Two or three short plain sentences: what it does, its usual range, what a wrong value does.
        minimum, maximum: Inclusive bounds, or None.
        above, below: Exclusive bounds, or None.
        choices: The allowed values, or None; a table of value → title where people call them otherwise.
        advanced: True where a form should tuck it away.
        only: Of the config's first setting, the choices under which this one means something; empty for all.
        why: Where a paper speaks of it, one place or more with semicolons between them: "LoRA paper, §7.2", of Hu et
            al. 2021, its "LoRA paper, app. D", or the name of another with its number, "DoRA, arXiv:2402.09353".
    """

    name: str
    type: Any
    default: Any
    label: str
    help: str
    minimum: Number | None = None
    maximum: Number | None = None
    above: Number | None = None
    below: Number | None = None
    choices: Collection[str] | None = None
    advanced: bool = False
    only: tuple[str, ...] = ()
    why: str = ""

    @property
    def told(self) -> str:
        """`help` where links are none, the source in brackets after it."""
        return f"{self.help} ({self.why})" if self.why else self.help

    def problem(self, value: Any) -> str | None:
        """Returns why `value` is not allowed, as one sentence, or None."""
        if not _has_type(value, self.type):
            return f"`{self.name}` (={quoted(value)}) must be {_type_words(self.type)}"
        if self.choices is not None and value not in self.choices:
            return f"`{self.name}` (={quoted(value)}) must be one of {', '.join(self.choices)}"
        if isinstance(value, (int, float)):
            # Written as "not (inside)" so that NaN is outside.
            inside = (
                (self.minimum is None or value >= self.minimum)
                and (self.maximum is None or value <= self.maximum)
                and (self.above is None or value > self.above)
                and (self.below is None or value < self.below)
                and abs(value) != float("inf")
                and value == value
            )
            if not inside:
                return f"`{self.name}` (={quoted(value)}) must be {self._range_words()}"
        return None

    def parse(self, text: str) -> Any:
        """Returns the value that `text`, of a form or a command line, says; whether it is allowed is not checked.

        Tables are JSON, lists are names with commas between them.

        Raises:
            LoRAError: A table is no JSON, or a number is none.
        """
        text = text.strip()
        if isinstance(self.default, dict):
            try:
                return json.loads(text or "{}")
            except (ValueError, RecursionError) as error:
                raise LoRAError(
                    f'`{self.name}` (={quoted(text)}) must be a table like {{"q_proj": 4}}, written as JSON; {error}.'
                ) from error
        if self.type in (int, float):
            try:
                return float(text)
            except ValueError as error:
                raise LoRAError(f"`{self.name}` (={quoted(text)}) must be {_type_words(self.type)}.") from error
        if self.type is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        if isinstance(self.default, tuple) and re.fullmatch(r"[\w.]*", text):
            return (text,) if text else ()
        if self.type is not str and self.choices is None and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", text):
            return tuple(re.split(r"\s*,\s*", text))  # names; anything else is one expression
        return text

    def _range_words(self) -> str:
        words = []
        if self.minimum is not None:
            words.append(f"at least {self.minimum}")
        if self.above is not None:
            words.append(f"above {self.above}")
        if self.maximum is not None:
            words.append(f"at most {self.maximum}")
        if self.below is not None:
            words.append(f"below {self.below}")
        return " and ".join(words) or "a finite number"


def setting(default: Any, label: str, help: str, **bounds: Any) -> Any:
    """Declares a config field; `bounds` are the optional attributes of `Setting`."""
    meta = {"label": label, "help": help, **bounds}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


class Config:
    """Base of all config dataclasses: validates itself, and goes to and from plain dicts.

    Raises:
        LoRAError: On construction, with every field that is out of range in one message.
    """

    def __post_init__(self) -> None:
        for s in settings(type(self)):
            value = getattr(self, s.name)
            # JSON and forms give lists and whole-number floats; take both as what they mean.
            if isinstance(value, list):
                object.__setattr__(self, s.name, tuple(value))
            elif isinstance(value, dict):
                object.__setattr__(self, s.name, dict(value))  # the caller may change theirs
            elif s.type is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, s.name, float(value) if abs(value) < 2**1023 else math.inf)
            elif s.type is int and isinstance(value, float) and value.is_integer():
                object.__setattr__(self, s.name, int(value))
        problems = [p for s in settings(type(self)) if (p := s.problem(getattr(self, s.name)))]
        problems += self.further_problems() if not problems else []
        if problems:
            raise LoRAError("; ".join(problems) + ".")

    def further_problems(self) -> list[str]:
        """Returns what is wrong between fields that are each fine alone."""
        return []

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds the config from plain values; absent fields take their defaults.

        Raises:
            LoRAError: A field does not exist, or a value is out of range.
        """
        if not isinstance(values, Mapping):
            raise LoRAError(f"{cls.__name__} must be given as a table of settings, not {quoted(values)}.")
        known = [s.name for s in settings(cls)]
        unknown = [k for k in values if k not in known]
        if unknown:
            raise LoRAError(
                f"{cls.__name__} has no setting {', '.join(map(quoted, unknown))}; it has {', '.join(known)}."
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values that JSON can hold."""
        values = {s.name: getattr(self, s.name) for s in settings(type(self))}
        plain = {tuple: list, dict: dict}
        return {k: plain[type(v)](v) if type(v) in plain else v for k, v in values.items()}


def read_json(path: Path) -> Any:
    """Returns what a JSON file of settings holds.

    Raises:
        OSError: It cannot be read.
        ValueError, RecursionError: It holds no JSON, half of a character, or more than `MAX_JSON_BYTES`.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(f"it is longer than {MAX_JSON_BYTES:,} bytes")
    value = json.loads(raw.decode())
    if rb"\u" in raw:  # the escape can spell half of a character, which no page can be sent
        json.dumps(value, ensure_ascii=False).encode()
    return value


def settings(cls: type) -> list[Setting]:
    """Returns the declared settings of a config class, in order."""
    return list(_declared(cls))


@functools.cache
def _declared(cls: type) -> tuple[Setting, ...]:
    types_by_name = typing.get_type_hints(cls)
    found = []
    for f in dataclasses.fields(cls):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        found.append(Setting(name=f.name, type=types_by_name[f.name], default=default, **f.metadata))
    return tuple(found)


def _has_type(value: Any, annotation: Any) -> bool:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return True  # `choices` checks it, with a better message
    if origin in (types.UnionType, typing.Union):
        return any(_has_type(value, a) for a in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_has_type(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _has_type(k, args[0]) and _has_type(v, args[1]) for k, v in value.items()
        )
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _type_words(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_words(a) for a in args)
    if origin is tuple:
        return "a list of names"
    if origin is dict:
        return "a table of name to number"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}.get(
        annotation, str(annotation)
    )
