"""A probe: what training takes, tried out before it is begun, by a few steps on the longest batch of a run's rows.

It goes through what a run's worker goes through, in a process of its own that leaves nothing behind: no run, no
adapter. The page and the command line start it, and may end it at any time.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core import (
    LoRAConfig,
    LoRAError,
    Noted,
    Step,
    TrainConfig,
    World,
    framework_bytes,
    inject,
    peak_memory_bytes,
    resolve_devices,
    train,
)
from studio.apart import Apart, answer
from studio.specs import RunSpec
from studio.workspace import Workspace

NUM_STEPS = 3
"""So many are taken; the first, which is slower, gives no time."""


@dataclass(frozen=True)
class Probe:
    """What a few steps on the longest batch really took, on one device.

    Attributes:
        device: On which.
        num_rows: Of the batch.
        num_tokens: Of its longest row.
        framework_bytes: What the libraries took before there was a model and they had anything to do.
        loading_bytes: The peak until the model was loaded and adapted.
        peak_bytes: The peak of all, the libraries and the loading included.
        batch_seconds: Of one batch, forward and backward.
        total_seconds: All the steps of the run at that pace; evaluations and shorter rows are not taken into account.
    """

    device: str
    num_rows: int
    num_tokens: int
    framework_bytes: int
    loading_bytes: int
    peak_bytes: int
    batch_seconds: float
    total_seconds: float


class Probing(Iterator[Noted | Probe]):
    """A probe that goes on: yields what it does, then what it found. Closed, or forgotten, its process ends."""

    def __init__(self, spec: RunSpec, workspace: Workspace, *, full_rows: bool = False) -> None:
        """Starts it.

        Args:
            spec: The run that is thought of.
            workspace: Where the model's cache and uploads lie.
            full_rows: Take rows of `max_length` random tokens instead of the data's longest.
        """
        options = ["--full-rows"] if full_rows else []
        self._apart = Apart("probe", "studio.probe", spec.to_dict(), str(workspace.root), *options)

    def __next__(self) -> Noted | Probe:
        """Raises: LoRAError: It cannot be done, or was ended from elsewhere."""
        said = next(self._apart)
        return Noted(said["note"]) if "note" in said else Probe(**said)

    @property
    def is_ended(self) -> bool:
        """Whether its process is gone."""
        return self._apart.is_ended

    def close(self) -> None:
        """Ends its process and all that it started; what it held is free then."""
        self._apart.close()


def measure(spec: RunSpec, workspace: Workspace, *, full_rows: bool = False) -> Iterator[Noted | Probe]:
    """Takes the steps in this process; see `Probing`."""
    import torch

    from studio import data, models, setup, tasks

    spec = tasks.settled(spec, workspace)
    devices = resolve_devices(spec.train.device)
    device, world = devices[0], World()
    if len(devices) > 1 and spec.train.shard_weights:
        raise LoRAError("`shard_weights` (=True) must be off to probe: one device alone is probed, with all weights.")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    models.import_libraries()
    own = framework_bytes(device)
    notes: list[Noted] = []

    def note(message: str) -> None:
        notes.append(Noted(message))

    config = replace(
        spec.train, steps=NUM_STEPS, warmup_steps=0, accumulation=1, eval_every=0, patience=0, prefix_cache="off"
    )
    if full_rows:
        batch = None
    else:
        yield Noted("Reading the data")
        prepared, pad = setup.rows_of(spec, workspace, world, note)
        longest = sorted(prepared.train, key=lambda e: len(e.input_ids))[-config.batch_size :]
        (batch,) = data.eval_batches(longest, config.batch_size, pad)
    yield Noted("Loading the model")
    model, _ = setup.adapted_model(spec, workspace, world, device, note)
    if batch is None:
        shape = (config.batch_size, spec.row_length)
        ids = torch.randint(0, model.config.get_text_config().vocab_size, shape)
        number = torch.float32 if spec.data.task == "regression" else torch.int64
        labels = torch.zeros(len(ids), dtype=number) if spec.head.is_of_rows else ids
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    loading = peak_memory_bytes(device)
    seconds = []
    for event in train(model, iter([batch] * NUM_STEPS), config, row_labels=tasks.row_labels(spec)):
        if isinstance(event, Step):
            seconds.append(event.step_seconds)
            yield Noted(f"Step {event.step} of {NUM_STEPS}")
    best = min(seconds[1:])
    outside = own if device.type == "cuda" else 0  # what torch counts there is its own alone
    yield Probe(
        device=str(device),
        num_rows=len(batch["labels"]),
        num_tokens=batch["input_ids"].shape[1],
        framework_bytes=own,
        loading_bytes=loading + outside,
        peak_bytes=peak_memory_bytes(device) + outside,
        batch_seconds=best,
        total_seconds=best * spec.train.accumulation * spec.train.steps,
    )


def _framework(dtype: str) -> int:
    """Returns what the libraries take of a CPU once they have trained, in bytes: all but a model of 1 MB or so."""
    import torch

    from studio import models, setup  # noqa: F401

    device = torch.device("cpu")
    model = models.small(getattr(torch, dtype))
    inject(model, LoRAConfig(r=4))
    ids = torch.randint(0, model.config.vocab_size, (2, 64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for _ in train(model, iter([batch] * NUM_STEPS), TrainConfig(steps=NUM_STEPS, warmup_steps=0)):
        pass
    return framework_bytes(device)


def main(argv: list[str] | None = None) -> int:
    """Probes the spec that stands on standard input, and prints what `measure` yields as lines of JSON."""
    parser = argparse.ArgumentParser(prog="python -m studio.probe", description=main.__doc__)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--full-rows", action="store_true", help="rows of max_length random tokens")
    parser.add_argument("--framework", metavar="DTYPE", help="print what the libraries take, and nothing else")
    args = parser.parse_args(argv)
    if args.framework:
        sys.stdout.write(f"{_framework(args.framework)}\n")
        return 0

    def work(asked: Any) -> Iterator[dict[str, Any]]:
        spec = RunSpec.from_dict(asked)
        for found in measure(spec, Workspace(args.workspace), full_rows=args.full_rows):
            yield {"note": found.message} if isinstance(found, Noted) else dataclasses.asdict(found)

    return answer(work, "Not enough memory: it does not fit this device. “Fit it for me” says what may help.")


if __name__ == "__main__":
    sys.exit(main())
