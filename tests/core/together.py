"""What several processes train, and one for comparison: torchrun … -m tests.core.together OUT."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from core import (
    Checkpoint,
    LoRAConfig,
    NonFiniteLossError,
    Step,
    TrainConfig,
    World,
    inject,
    lora_layers,
    to_record,
    train,
)
from tests.core.conftest import VOCABULARY, Plain, _gpt2, _llama, _mixtral

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


def _checkpointed_mixtral(**changes: Any) -> Any:
    model = _mixtral(**changes)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


@dataclasses.dataclass
class Case:
    """A training; its last batches have a row fewer than there are processes, or none that is trained."""

    lora: LoRAConfig = dataclasses.field(default_factory=lambda: LoRAConfig(r=3))
    train: TrainConfig = TRAIN
    model: Callable[..., Any] = _llama
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: tuple[tuple[int, ...], ...] = ((9, 1, 4, 2), (1, 7, 3), (5,), (2, 2))
    make: Callable[[int], dict[str, torch.Tensor]] | None = None
    shard: bool = False

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
        if self.shard:
            world.shard(model, torch.device("cpu"))
        weights = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters() if not p.requires_grad]
        num_here = sum(p.numel() for p in weights)
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
        return {"records": records, "checkpoint": vars(end), "num_here": num_here}


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
    "weights in parts": Case(shard=True, rows=((9, 1, 4), (2, 5), (3, 1), (2, 2))),
    "weights in parts, accumulation, pissa, dora": Case(
        LoRAConfig(r=3, init="pissa", dora=True, target_modules=("q_proj", "down_proj", "embed_tokens")),
        dataclasses.replace(TRAIN, accumulation=2),
        rows=((9, 1, 4), (2, 5), (3, 1), (0, 0)),
        shard=True,
    ),
    "weights in parts, experts, activation checkpointing": Case(
        LoRAConfig(r=2, target_modules=("experts.down_proj", "q_proj")),
        model=_checkpointed_mixtral,
        changes={"num_local_experts": 6, "num_experts_per_tok": 1},
        rows=((1, 2), (3,)),
        shard=True,
    ),
    "weights in parts, slices, and a norm in full": Case(
        LoRAConfig(r=2, target_modules=("c_attn.q", "c_attn.v"), modules_to_save=("ln_f",)),
        model=_gpt2,
        shard=True,
    ),
}


def broken_by(world: World, *, shard: bool) -> dict[str, Any]:
    """Returns what is said of a loss that one row of the second batch, of the second process, spoils."""

    class Spoiled(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(16, 16)])

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            h = self.layers[0](self.embed(input_ids))
            h = self.up(torch.where((input_ids[:, :1] == 0)[..., None], torch.nan, h))
            return self.head(self.down(h))

    batches = [batch(seed, (4, 4, 4, 4)) for seed in range(2)]
    for number, one in enumerate(batches):
        one["input_ids"][:, 0] = 1
        one["input_ids"][3, 0] = 1 - number
    case = Case(LoRAConfig(r=2), dataclasses.replace(TRAIN, accumulation=2, eval_every=0), Spoiled, shard=shard)
    case.make = batches.__getitem__
    case.train = dataclasses.replace(case.train, steps=1)
    try:
        case.run(world)
    except NonFiniteLossError as error:
        return {"message": str(error), **vars(error)}
    return {}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    world = World.join()
    found = {name: case.run(world) for name, case in CASES.items()}
    half = CASES["accumulation"].run(world, stop_after=2)
    split_half = CASES["weights in parts, accumulation, pissa, dora"].run(world, stop_after=2)
    broken = {shard: broken_by(world, shard=shard) for shard in (False, True)}
    torch.save({"cases": found, "half": half, "split half": split_half, "broken": broken}, out / f"{world.rank}.pt")
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
