"""Settings: each is declared once, and that declaration feeds checks, command-line help and forms."""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from core.errors import LoRAError

ALL_LINEAR = "all-linear"

Number = int | float


@dataclass(frozen=True)
class Setting:
    """What is known of one field of a config: enough to check it, explain it and draw it.

    Attributes:
        name: The field's name.
        type: The field's annotation.
        default: The value that a config has when nothing is said.
        label: A short title for people.
        help: One or two plain sentences: what it does, its usual range.
        minimum, maximum: Inclusive bounds, or None.
        above, below: Exclusive bounds, or None.
        choices: The allowed values, or None.
        advanced: True where a form should tuck it away.
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
    choices: tuple[str, ...] | None = None
    advanced: bool = False

    def problem(self, value: Any) -> str | None:
        """Returns why `value` is not allowed, as one sentence, or None."""
        if not _has_type(value, self.type):
            return f"`{self.name}` (={value!r}) must be {_type_words(self.type)}"
        if self.choices is not None and value not in self.choices:
            return f"`{self.name}` (={value!r}) must be one of {', '.join(self.choices)}"
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
                return f"`{self.name}` (={value!r}) must be {self._range_words()}"
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
                    f'`{self.name}` (={text!r}) must be a table like {{"q_proj": 4}}, written as JSON; {error}.'
                ) from error
        if self.type in (int, float):
            try:
                return float(text)
            except ValueError as error:
                raise LoRAError(f"`{self.name}` (={text!r}) must be {_type_words(self.type)}.") from error
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
            raise LoRAError(f"{cls.__name__} must be given as a table of settings, not {values!r}.")
        known = [s.name for s in settings(cls)]
        unknown = [k for k in values if k not in known]
        if unknown:
            raise LoRAError(
                f"{cls.__name__} has no setting {', '.join(map(repr, unknown))}; it has {', '.join(known)}."
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values that JSON can hold."""
        values = {s.name: getattr(self, s.name) for s in settings(type(self))}
        plain = {tuple: list, dict: dict}
        return {k: plain[type(v)](v) if type(v) in plain else v for k, v in values.items()}


def settings(cls: type) -> list[Setting]:
    """Returns the declared settings of a config class, in order."""
    types_by_name = typing.get_type_hints(cls)
    found = []
    for f in dataclasses.fields(cls):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        found.append(Setting(name=f.name, type=types_by_name[f.name], default=default, **f.metadata))
    return found


@dataclass(frozen=True)
class LoRAConfig(Config):
    """Which matrices get ΔW = scaling · B·A, and of what form.

    Source: Hu et al. 2021, arXiv:2106.09685, §4.1 (the method) and §4.2 (which matrices).
    """

    r: int = setting(
        8,
        "Rank r",
        "How many directions ΔW may have. The paper finds 1 to 8 enough for most tasks; 8 to 64 is common.",
        minimum=1,
    )
    alpha: float = setting(
        16.0,
        "alpha",
        "ΔW = (alpha / r)·B·A: how loudly the adapter speaks. Usually r or 2r; it acts much like the learning rate.",
        above=0,
    )
    dropout: float = setting(
        0.0,
        "Dropout",
        "Share of the adapter's inputs dropped at random in training. 0 to 0.1; helps small data sets.",
        minimum=0,
        below=1,
    )
    target_modules: str | tuple[str, ...] = setting(
        ALL_LINEAR,
        "Target matrices",
        "Matrices to adapt: names (q_proj, v_proj), one regular expression over the full path, or all-linear. "
        "The paper adapts the attention's query and value.",
    )
    exclude_modules: str | tuple[str, ...] = setting(
        (),
        "Except",
        "Matrices to leave alone among the targets: names, or one regular expression over the full path.",
        advanced=True,
    )
    layers: str = setting(
        "",
        "Only layers",
        "Which layers are adapted, from 0: 0-5, 8, 20- (20 and all after it). Empty: all.",
        advanced=True,
    )
    scaling: Literal["standard", "rslora"] = setting(
        "standard",
        "Scaling",
        "standard: alpha / r, as in the paper. rslora: alpha / √r, steadier at large r (arXiv:2312.03732).",
        choices=("standard", "rslora"),
        advanced=True,
    )
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = setting(
        "kaiming",
        "Start of A and B",
        "kaiming: A uniform, B zero, as in the authors' code. gaussian: A normal with variance 1/r, nearer to the "
        "paper's text. pissa (arXiv:2404.02948) and olora (arXiv:2406.01775): from W's own top directions.",
        choices=("kaiming", "gaussian", "pissa", "olora"),
        advanced=True,
    )
    dora: bool = setting(
        False,
        "DoRA",
        "Also train the length of each row of W + ΔW (arXiv:2402.09353). Slower; ΔW is then no longer of low rank.",
        advanced=True,
    )
    bias: Literal["none", "lora_only", "all"] = setting(
        "none",
        "Biases",
        "Biases to train, too: none, those of the adapted matrices (lora_only), or all of the model.",
        choices=("none", "lora_only", "all"),
        advanced=True,
    )
    modules_to_save: tuple[str, ...] = setting(
        (),
        "Trained in full",
        "Modules that are trained whole and saved with the adapter, by name: a classifier head, say.",
        advanced=True,
    )
    rank_pattern: dict[str, int] = setting(
        {},
        "Rank by matrix",
        'Other ranks for some matrices, by name or regular expression: {"q_proj": 4}.',
        advanced=True,
    )
    alpha_pattern: dict[str, float] = setting(
        {},
        "alpha by matrix",
        'Other alphas for some matrices, by name or regular expression: {"q_proj": 8}.',
        advanced=True,
    )

    def further_problems(self) -> list[str]:
        problems = []
        if not self.target_modules or (isinstance(self.target_modules, tuple) and "" in self.target_modules):
            problems.append(
                f"`target_modules` (={self.target_modules!r}) must name at least one matrix; "
                f"for example q_proj, or {ALL_LINEAR}"
            )
        try:
            self.adapts_layer(0)
        except ValueError:
            problems.append(f"`layers` (={self.layers!r}) must be numbers and ranges, such as 0-5, 8, 20-")
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, field):
                try:
                    re.compile(pattern)
                except re.error as error:
                    problems.append(f"`{field}[{pattern!r}]` must be a name or a valid regular expression ({error})")
        for name, value in self.rank_pattern.items():
            if value < 1:
                problems.append(f"`rank_pattern[{name!r}]` (={value!r}) must be at least 1")
        for name, value in self.alpha_pattern.items():
            if not 0 < value < float("inf"):
                problems.append(f"`alpha_pattern[{name!r}]` (={value!r}) must be above 0")
        return problems

    def adapts_layer(self, number: int) -> bool:
        """Says whether `layers` takes in the layer of that number; -1, of no layer, only if it is empty."""
        parts = [part.strip().partition("-") for part in self.layers.split(",") if self.layers.strip()]
        ranges = [
            (int(first), int(last) if last.strip() else math.inf if dash else int(first)) for first, dash, last in parts
        ]
        return not ranges or any(first <= number <= last for first, last in ranges)

    def scaling_for(self, r: int, alpha: float) -> float:
        """Returns the factor on B·A: alpha / r, or alpha / √r for rsLoRA."""
        return alpha / r if self.scaling == "standard" else alpha / r**0.5


@dataclass(frozen=True)
class TrainConfig(Config):
    """How the adapter is trained: AdamW on A and B only."""

    steps: int = setting(60, "Steps", "How many times the adapter is updated. 40 to 200 shows an effect.", minimum=1)
    batch_size: int = setting(
        4, "Batch size", "Rows in one forward pass. Larger is steadier and needs more memory.", minimum=1
    )
    accumulation: int = setting(
        1,
        "Accumulation",
        "Forward passes per update. Rows per update = batch size × accumulation, at the memory of one batch.",
        minimum=1,
        advanced=True,
    )
    learning_rate: float = setting(
        1e-3,
        "Learning rate",
        "Size of an update. LoRA likes about ten times that of full fine-tuning: 1e-4 to 2e-3.",
        above=0,
        maximum=10,
    )
    lora_plus_ratio: float = setting(
        1.0,
        "LoRA+ ratio",
        "B's learning rate over A's (arXiv:2402.12354). 1 is plain LoRA; its authors try 4 to 32.",
        above=0,
        maximum=1000,
        advanced=True,
    )
    schedule: Literal["linear", "cosine", "constant"] = setting(
        "linear",
        "Schedule",
        "How the learning rate falls to zero after the warm-up. The paper uses linear.",
        choices=("linear", "cosine", "constant"),
        advanced=True,
    )
    warmup_steps: int = setting(
        5, "Warm-up steps", "Updates over which the learning rate rises from zero.", minimum=0, advanced=True
    )
    weight_decay: float = setting(
        0.0, "Weight decay", "Pull of A and B towards zero. 0 to 0.1.", minimum=0, maximum=10, advanced=True
    )
    clip_norm: float = setting(
        1.0,
        "Gradient clipping",
        "The gradient is shortened to this length when longer. 0 turns it off.",
        minimum=0,
        advanced=True,
    )
    max_length: int = setting(
        256,
        "Longest row (tokens)",
        "Longer rows are cut at the end. Memory and time grow with it.",
        minimum=8,
    )
    eval_every: int = setting(
        10,
        "Evaluate every (steps)",
        "How often the loss on held-out rows is measured; 0 only at the end.",
        minimum=0,
        advanced=True,
    )
    seed: int = setting(
        0,
        "Seed",
        "Same seed, same run: start of A, order of rows, dropout.",
        minimum=0,
        maximum=2**31 - 1,
        advanced=True,
    )
    device: str = setting(
        "auto",
        "Device",
        "auto takes CUDA, then Apple's MPS, then the CPU. Or say cpu, cuda, cuda:1, mps.",
        advanced=True,
    )
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto",
        "Precision",
        "Of the frozen weights; A and B are always fp32. auto takes bf16 where the device computes it fast.",
        choices=("auto", "fp32", "bf16"),
        advanced=True,
    )

    def further_problems(self) -> list[str]:
        if self.warmup_steps > self.steps:
            return [f"`warmup_steps` (={self.warmup_steps}) must be at most `steps` (={self.steps})"]
        return []


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
