"""What may help a run that failed: changes of its settings, each one click, that go on from its last checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from core import Failed
from studio.matrices import QUERY_AND_VALUE
from studio.runs import Run
from studio.specs import RunSpec

SHORTEST = 64
"""Tokens below which a row is not cut to save memory."""


@dataclass(frozen=True)
class Remedy:
    """A change to try.

    Attributes:
        label: What it changes, for a button.
        spec: The run that it makes.
        predicted_bytes: What it would take, where the failure was for memory and could be predicted.
    """

    label: str
    spec: RunSpec
    predicted_bytes: int | None = None


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

    def changed(label: str, **values: Any) -> Remedy:
        return Remedy(label, replace(spec, train=replace(train, **values)))

    if train.batch_size > 1:
        half = train.batch_size // 2
        accumulation = -(-train.batch_size * train.accumulation // half)
        yield changed(f"Batch size {half}, accumulation {accumulation}", batch_size=half, accumulation=accumulation)
    if not train.activation_checkpointing:
        yield changed("Activation checkpointing (slower)", activation_checkpointing=True)
    if "," in train.device and not train.shard_weights:
        yield changed("Weights split among the devices (slower)", shard_weights=True)
    if train.max_length // 2 >= SHORTEST:
        yield changed(f"Rows of at most {train.max_length // 2} tokens", max_length=train.max_length // 2)
    if spec.lora.target_modules != QUERY_AND_VALUE:
        fewer = replace(spec.lora, target_modules=QUERY_AND_VALUE)
        yield Remedy("Query and value alone", replace(spec, lora=fewer))


def for_numbers(spec: RunSpec) -> Iterator[Remedy]:
    """Yields what may keep the loss finite."""
    train = spec.train
    rate = train.learning_rate / 3
    yield Remedy(f"Learning rate {rate:.2g}", replace(spec, train=replace(train, learning_rate=rate)))
    if train.precision != "fp32":
        yield Remedy("Precision fp32", replace(spec, train=replace(train, precision="fp32")))
