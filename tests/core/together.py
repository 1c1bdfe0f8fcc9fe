"""What several processes train, and one for comparison: torchrun … -m tests.core.together OUT."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core import Checkpoint, LoRAConfig, Step, TrainConfig, World, inject, lora_layers, to_record, train
from tests.core.conftest import VOCABULARY, Plain, _llama, _mixtral

TRAIN = TrainConfig(steps=4, warmup_steps=0, learning_rate=0.01, eval_every=2, clip_norm=0.1)


def batch(seed: int, num_trained: tuple[int, ...], length: int = 10) -> dict[str, torch.Tensor]:
    """One row for each number of trained tokens, at its end."""
    ids = torch.randint(0, VOCABULARY, (len(num_trained), length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row, number in enumerate(num_trained):
        labels[row, : length - number] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def twice_the_same(seed: int) -> dict[str, torch.Tensor]:
    return {key: value.expand(2, -1) for key, value in batch(seed, (9,)).items()}


class Fickle(Plain):
    """A model of which only rows that begin with an even token pass one layer, and none another."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.idle = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        h = self.embed(input_ids)
        even = (input_ids[:, 0] % 2 == 0).nonzero()[:, 0]
        return self.head(h.index_add(0, even, self.even(h[even])) if len(even) else h)


@dataclasses.dataclass
class Case:
    """A training; its last batches have a row fewer than there are processes, or none that is trained."""

    lora: LoRAConfig = dataclasses.field(default_factory=lambda: LoRAConfig(r=3))
    train: TrainConfig = TRAIN
    model: Callable[..., Any] = _llama
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: tuple[tuple[int, ...], ...] = ((9, 1, 4, 2), (1, 7, 3), (5,), (2, 2))
    make: Callable[[int], dict[str, torch.Tensor]] | None = None

    def batches(self) -> list[dict[str, torch.Tensor]]:
        count = self.train.steps * self.train.accumulation
        make = self.make or (lambda seed: batch(seed, self.rows[seed % len(self.rows)]))
        return [make(seed) for seed in range(count)]

    def run(self, world: World, start: Checkpoint | None = None, stop_after: int | None = None) -> dict[str, Any]:
        """Returns the records of the events, and the checkpoint at the end or after a step."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.model(**self.changes)
        inject(model, self.lora, seed=world.rank)  # what is trained, and its start, is that of the first
        for layer in lora_layers(model).values():
            if world.rank and layer.lora_A0 is not None:
                layer.lora_A0.zero_()
        first = start.step * self.train.accumulation if start else 0
        held_out = [batch(99, (3, 9, 1)), batch(98, (4,))]
        training = train(model, self.batches()[first:], self.train, eval_batches=held_out, start=start, world=world)
        records = []
        for event in training:
            records.append(to_record(event))
            if isinstance(event, Step) and event.step == stop_after:
                break
        end = training.checkpoint()
        training.close()
        return {"records": records, "checkpoint": vars(end)}


CASES = {
    "rows of different lengths": Case(),
    "accumulation": Case(train=dataclasses.replace(TRAIN, accumulation=2), rows=((9, 1, 4), (2, 5), (3, 1), (0, 0))),
    "pissa, dora and LoRA+": Case(
        LoRAConfig(r=3, init="pissa", dora=True), dataclasses.replace(TRAIN, lora_plus_ratio=4.0)
    ),
    "layers that few rows pass": Case(
        LoRAConfig(r=2, target_modules=("even", "idle", "embed")),
        dataclasses.replace(TRAIN, accumulation=2, weight_decay=0.1),
        Fickle,
        rows=((1, 2), (3,)),
    ),
    "experts that few tokens reach": Case(
        LoRAConfig(r=2, target_modules=("experts.down_proj", "q_proj")),
        dataclasses.replace(TRAIN, accumulation=2),
        _mixtral,
        {"num_local_experts": 6, "num_experts_per_tok": 1},
        ((1, 2), (3,)),
    ),
    "dropout": Case(LoRAConfig(r=3, dropout=0.5), make=twice_the_same),
}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    world = World.join()
    found = {name: case.run(world) for name, case in CASES.items()}
    half = CASES["accumulation"].run(world, stop_after=2)
    torch.save({"cases": found, "half": half}, out / f"{world.rank}.pt")
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
