"""What training says while it goes on: frozen facts, in order, that can be kept as JSON."""

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from core.errors import LoRAError, quoted


@dataclass(frozen=True)
class Noted:
    """Something that a person may want to know: a phase of the work, or a warning.

    Attributes:
        message: One sentence.
    """

    message: str


@dataclass(frozen=True)
class Started:
    """Training is about to take its first step.

    Attributes:
        num_steps: How many steps will follow.
        num_trainable: Entries of all A and B.
        num_parameters: Entries of the whole model, A and B included; tied weights count once.
        device: Where it runs, as torch names it.
        precision: Type of the frozen weights, as torch names it.
        memory_source: What `memory_bytes` of the steps measures, in words.
    """

    num_steps: int
    num_trainable: int
    num_parameters: int
    device: str
    precision: str
    memory_source: str


@dataclass(frozen=True)
class Step:
    """One optimizer step is done.

    Attributes:
        step: Its number, from 1.
        loss: Mean over the trained tokens of the step, before the update, in nats per token; where labels are of rows,
            over those, in nats, or the squared error.
        learning_rate: The rate that this update used.
        grad_norm: Length of the whole gradient before clipping.
        num_tokens: Tokens that went through the model, padding not counted.
        num_trained_tokens: Tokens that the loss was taken over, or rows.
        step_seconds: Time that the step took, without the consumer's.
        memory_bytes: Memory in use at the end of the step (see `Started.memory_source`).
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_trained_tokens: int
    step_seconds: float
    memory_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens through the model per second of this step."""
        return self.num_tokens / self.step_seconds if self.step_seconds else 0.0


@dataclass(frozen=True)
class Evaluated:
    """The loss on held-out rows, after `step` steps (0: before the first).

    Attributes:
        loss: Mean over all trained tokens of those rows, in nats per token, or over the rows (see `Step`).
        num_trained_tokens: How many tokens, or rows, that is.
        evaluate_seconds: Time that it took.
        metrics: Name → score, where labels are of rows; NaN where it is not defined for what was predicted.
        metric: The one of them by which evaluations are compared; "" where that is the loss.
    """

    step: int
    loss: float
    num_trained_tokens: int
    evaluate_seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    metric: str = ""

    @property
    def to_minimize(self) -> float:
        """What the best evaluation has least of: the loss, or minus the score that decides, ∞ where it is undefined."""
        value = -self.metrics.get(self.metric, math.nan) if self.metric else self.loss
        return math.inf if self.metric and math.isnan(value) else value


@dataclass(frozen=True)
class SpectrumMeasured:
    """The singular values of each ΔW after `step`; comes just before that step's own event, so who has that has this.

    Attributes:
        sigma: Path → those of scaling · B·A, falling, to four digits; NaN where a factor is not finite.
    """

    step: int
    sigma: dict[str, list[float]]

    @property
    def effective_rank(self) -> dict[str, float]:
        """Path → exp of the entropy of p = sigma / Σ sigma; 0 for ΔW = 0, NaN where sigma is (see `Spectrum`)."""
        return {path: _effective_rank(sigma) for path, sigma in self.sigma.items()}


def _effective_rank(sigma: list[float]) -> float:
    total = math.fsum(sigma)
    shares = [s / total for s in sigma if s] if total else []
    return math.exp(-math.fsum(p * math.log(p) for p in shares)) if shares else 0.0


@dataclass(frozen=True)
class Checkpointed:
    """All that is needed to go on from `step` is on the disk.

    Attributes:
        checkpoint_seconds: Time that writing it took.
        checkpoint_bytes: Its size.
    """

    step: int
    checkpoint_seconds: float
    checkpoint_bytes: int


@dataclass(frozen=True)
class Resumed:
    """A run is taken up again after `step`, as if it had not been broken off."""

    step: int


@dataclass(frozen=True)
class Finished:
    """Training has ended by itself or was asked to stop; A and B are as of `step`.

    Attributes:
        reason: "done" when all steps were taken, "early" when the held-out loss rose (A and B are then those of its
            lowest), "stopped" or "paused" when somebody asked, "killed" when the asking was not waited for.
        peak_memory_bytes: The most memory in use so far (see `Started.memory_source`).
    """

    step: int
    reason: str
    peak_memory_bytes: int


@dataclass(frozen=True)
class Failed:
    """Training ended by an error.

    Attributes:
        message: What a person should read: cause and next step.
        cause: "memory", "disk", "data", "loss" (not finite), "gradient" (not finite, or exploded), "killed" (written by
            who finds it so), or "" for anything else.
        predicted_bytes: Where it is memory: what each part of it was to take, "weights" and so on, the largest first;
            and after them, by the words of its remedy, what all would take with that.
    """

    message: str
    cause: str = ""
    predicted_bytes: dict[str, int] = field(default_factory=dict)


Event = Noted | Started | Step | Evaluated | SpectrumMeasured | Checkpointed | Resumed | Finished | Failed

_KINDS: dict[str, type] = {kind.__name__: kind for kind in typing.get_args(Event)}


def to_record(event: Event) -> dict[str, Any]:
    """Returns `event` as plain values, its kind under "event"."""
    return {"event": type(event).__name__, **dataclasses.asdict(event)}


def from_record(record: dict[str, Any]) -> Event:
    """Returns the event that `to_record` made `record` from.

    Raises:
        LoRAError: The record is of no known kind or its fields do not fit.
    """
    values = dict(record)
    kind = values.pop("event", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise LoRAError(f"`event` (={quoted(kind)}) must be one of {', '.join(_KINDS)}.")
    try:
        event = _KINDS[kind](**values)
    except TypeError as error:
        raise LoRAError(f"The record of `{kind}` does not fit: {error}.") from error
    for f in dataclasses.fields(event):
        value = getattr(event, f.name)  # a field that an earlier release did not write has its default
        if not _fits(value, f.type):
            raise LoRAError(f"`{f.name}` (={quoted(value)}) of `{kind}` must be {_WORDS[f.type]}.")
    return event


_MAX_COUNT = 2**53  # what a float can hold, too, as every reader of JSON may make one of it
_WORDS: dict[Any, str] = {
    int: f"a whole number below {_MAX_COUNT}",
    float: "a number",
    str: "text of whole characters",
    dict[str, int]: "a table of text to whole numbers",
    dict[str, float]: "a table of text to numbers",
    dict[str, list[float]]: "a table of text to lists of numbers",
}


def _fits(value: Any, kind: Any) -> bool:
    if kind is int:
        return type(value) is int and abs(value) < _MAX_COUNT
    if kind is float:
        return type(value) is float or _fits(value, int)
    if kind == dict[str, int]:
        return isinstance(value, dict) and all(_fits(k, str) and _fits(v, int) for k, v in value.items())
    if kind == dict[str, float]:
        return isinstance(value, dict) and all(_fits(k, str) and _fits(v, float) for k, v in value.items())
    if kind == dict[str, list[float]]:
        return isinstance(value, dict) and all(_fits(k, str) and _are_numbers(v) for k, v in value.items())
    return isinstance(value, str) and (value.isascii() or value.encode(errors="ignore").decode() == value)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and ({*map(type, values)} <= {float} or all(_fits(v, float) for v in values))
