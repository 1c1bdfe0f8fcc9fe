"""Where training stands, as one file: enough to go on as if it had never been broken off."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import CheckpointError, listed
from core.targets import lora_layers

Moments = Mapping[nn.Parameter, Mapping[str, Tensor]]
"""AdamW's state of each parameter: "step", "exp_avg" and "exp_avg_sq", these two like the parameter."""

_FORMAT = "lora-studio checkpoint 2"


@dataclass(frozen=True)
class Checkpoint:
    """Training as of one step; dropout and the order of the rows follow from the seed and the step.

    Attributes:
        step: The optimizer steps that were taken.
        num_rows: The rows that these took, by all processes; where the next batch begins, however large it is.
        evaluations: (step, `Evaluated.to_minimize`) of those so far; they decide when to stop early.
        tensors: What is trained, by its name in the model; "NAME/exp_avg" and so on are AdamW's of it.
    """

    step: int
    num_rows: int
    evaluations: tuple[tuple[int, float], ...]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        moments: Moments,
        step: int,
        num_rows: int,
        evaluations: list[tuple[int, float]],
    ) -> Self:
        """Takes a copy, on the CPU, of all that training moves, and of what "pissa" started from."""
        tensors = {}
        for name, p in _trained(model).items():
            tensors |= {f"{name}/{key}": value for key, value in moments.get(p, {}).items()}
            tensors[name] = p
        tensors |= _starts(model)
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        return cls(step, num_rows, tuple(evaluations), copies)

    def only(self, model: nn.Module) -> tuple[Self, list[str]]:
        """Returns what it holds of the tensors that `model` trains, and the names of the others.

        So training can go on with fewer matrices; what the others had learned is lost to it.
        """
        own = {*_trained(model), *_starts(model)}
        others = [name for name in self.tensors if "/" not in name and name not in own]
        kept = {name: tensor for name, tensor in self.tensors.items() if name.partition("/")[0] not in others}
        return replace(self, tensors=kept), others

    def restore(self, model: nn.Module) -> Moments:
        """Puts everything back into a model that was adapted by the same settings; returns AdamW's moments.

        Raises:
            CheckpointError: The model trains other matrices, or of other shapes; both are left as they were.
        """
        trained = _trained(model)
        places = {**trained, **_starts(model)}
        own = {name: t for name, t in self.tensors.items() if "/" not in name}
        problems = [f"{name} is not in the checkpoint" for name in places if name not in own]
        problems += [f"{name} is not trained" for name in own if name not in places]
        problems += [
            f"{name} is {tuple(places[name].shape)}, not {tuple(t.shape)}"
            for name, t in own.items()
            if name in places and places[name].shape != t.shape
        ]
        if problems:
            raise CheckpointError(
                f"The checkpoint of step {self.step} must fit the model: {listed(problems)}. "
                "Take the model and the targets that it was made with."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                places[name].copy_(tensor)
        moments: dict[nn.Parameter, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            name, _, moment = key.partition("/")
            if moment:
                moments.setdefault(trained[name], {})[moment] = tensor
        return moments

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all.

        Raises:
            CheckpointError: It could not be written; what stood there is as it was.
        """
        path = Path(path)
        numbers = {"step": str(self.step), "num_rows": str(self.num_rows)}
        about = {"format": _FORMAT, **numbers, "evaluations": json.dumps(self.evaluations)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as scratch:
                whole = Path(scratch) / path.name
                save_file(dict(self.tensors), whole, metadata=about)
                with whole.open("rb") as file:
                    os.fsync(file.fileno())
                whole.rename(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"`path` (={str(path)!r}) could not be written: {error}. Free some space.") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote; nothing in it can run.

        Raises:
            CheckpointError: The file is missing, damaged, or no checkpoint.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise CheckpointError(
                        f"{path} must be a checkpoint of training; its format is {about.get('format')}."
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            evaluations = tuple((int(step), float(loss)) for step, loss in json.loads(about["evaluations"]))
            return cls(int(about["step"]), int(about["num_rows"]), evaluations, tensors)
        except CheckpointError:
            raise
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged or no checkpoint: {error}. Take an earlier one.") from error


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _starts(model: nn.Module) -> dict[str, Tensor]:
    """Returns what "pissa" and "olora" started from, by name: frozen, but part of the function."""
    layers = lora_layers(model).items()
    starts = {f"{path}.lora_{half}0": getattr(layer, f"lora_{half}0") for path, layer in layers for half in "AB"}
    return {name: start for name, start in starts.items() if start is not None}
