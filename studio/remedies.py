"""What may help a run that failed, or one that would not fit: changes of its settings, each one click."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from core import Failed, LoRAError, resolve_devices, resolve_dtype
from studio.matrices import QUERY_AND_VALUE
from studio.runs import Run
from studio.specs import RunSpec

SHORTEST = 64
"""Tokens below which a row is not cut to save memory."""


@dataclass(frozen=True)
class Remedy:
    """A change to try.

    Attributes:
        setting: What it changes, by name.
        label: The same for a button.
        spec: The run that it makes.
        predicted_bytes: What it would take, where that could be predicted.
        relative_time: Of a step, about: that of the unchanged run is 1.
        trains_less: Whether it leaves out a part of what would be trained.
        cost: Both in words.
    """

    setting: str
    label: str
    spec: RunSpec
    predicted_bytes: int | None = None
    relative_time: float = 1.0
    trains_less: bool = False
    cost: str = ""


def remedies(run: Run) -> list[Remedy]:
    """Returns what may help, the mildest first; nothing for a run that did not fail or only needs to be resumed."""
    run.log.read()
    end = run.log.end
    made = {"memory": for_memory, "loss": for_numbers, "gradient": for_numbers}
    if not isinstance(end, Failed) or end.cause not in made:
        return []
    found = [
        replace(remedy, spec=run.continued(remedy.spec), predicted_bytes=end.predicted_bytes.get(remedy.label))
        for remedy in made[end.cause](run.spec)
    ]
    # What could be predicted of others and not of this one cannot be done, or is of no help.
    return [remedy for remedy in found if not end.predicted_bytes or remedy.predicted_bytes]


def for_memory(spec: RunSpec) -> Iterator[Remedy]:
    """Yields what takes less memory and trains the same, then what trains a little less."""
    train = spec.train

    def changed(label: str, time: float, cost: str, *, trains_less: bool = False, **values: Any) -> Remedy:
        altered = replace(spec, train=replace(train, **values))
        return Remedy(next(iter(values)), label, altered, relative_time=time, trains_less=trains_less, cost=cost)

    if train.batch_size > 1:
        half = train.batch_size // 2
        accumulation = -(-train.batch_size * train.accumulation // half)
        label = f"Batch size {half}, accumulation {accumulation}"
        yield changed(label, 1.05, "about as fast", batch_size=half, accumulation=accumulation)
    if train.precision != "bf16" and (slower := _time_in_bf16(spec)) is not None:
        cost = "about twice as fast; weights rounded" if slower < 1 else "slower: this device has no fast bf16"
        yield changed("Precision bf16", slower, cost, precision="bf16")
    if not train.activation_checkpointing:
        yield changed("Activation checkpointing (slower)", 4 / 3, "about a third slower", activation_checkpointing=True)
    if "," in train.device and not train.shard_weights:
        cost = "slower: the devices ask each other for weights"
        yield changed("Weights split among the devices (slower)", 1.5, cost, shard_weights=True)
    if (length := train.max_length // 2) >= SHORTEST:
        cost = "faster; longer rows are cut"
        yield changed(f"Rows of at most {length} tokens", 0.5, cost, trains_less=True, max_length=length)
    if spec.method.method == "lora" and spec.lora.target_modules != QUERY_AND_VALUE:
        fewer = replace(spec, lora=replace(spec.lora, target_modules=QUERY_AND_VALUE))
        cost = "a little faster; fewer matrices learn"
        label = "Query and value alone"
        yield Remedy("target_modules", label, fewer, relative_time=0.9, trains_less=True, cost=cost)


def _time_in_bf16(spec: RunSpec) -> float | None:
    """Returns about how long a step takes in bf16 against one in float32; None where it is in bf16 already."""
    import torch

    try:
        device = resolve_devices(spec.train.device)[0]
    except LoRAError:  # it is not there
        return None
    if spec.weights_dtype(device) == torch.bfloat16:
        return None
    return 0.5 if resolve_dtype("auto", device) == torch.bfloat16 else 3.0


def for_numbers(spec: RunSpec) -> Iterator[Remedy]:
    """Yields what may keep the loss finite."""
    train = spec.train
    rate = train.learning_rate / 3
    slower = replace(spec, train=replace(train, learning_rate=rate))
    yield Remedy("learning_rate", f"Learning rate {rate:.2g}", slower)
    if train.precision != "fp32":
        yield Remedy("precision", "Precision fp32", replace(spec, train=replace(train, precision="fp32")))
