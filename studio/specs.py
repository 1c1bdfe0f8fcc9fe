"""What a run is made from, as `spec.json` holds it."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from core import Config, LoRAConfig, LoRAError, MethodConfig, TrainConfig, quoted, read_json, resolve_dtype
from studio.data import DataSpec
from studio.generating import EvaluationSpec
from studio.heads import Head

if TYPE_CHECKING:
    import torch

MIN_ROW_LENGTH = 8

PARTS: dict[str, type[Config]] = {
    "lora": LoRAConfig,
    "method": MethodConfig,
    "train": TrainConfig,
    "evaluation": EvaluationSpec,
}
"""The parts of a spec whose settings have names of their own among all."""


@dataclass(frozen=True)
class RunSpec:
    """All that a run is made from. The same spec gives the same run.

    Attributes:
        name: What people call it; any text.
        model: "starter", "starter-encoder", a Hub id, a folder or a `.gguf` file.
        data: Which rows, and how they become tokens.
        lora: What is adapted.
        train: How it is trained.
        evaluation: Whether its answers are measured by a task, beside the loss.
        continues: The run, and the step of its checkpoint, that this one began with: "RUN@40"; "" for none.
        method: What is trained: LoRA, or what its paper compares it with.
    """

    name: str = "Untitled"
    model: str = "starter"
    data: DataSpec = field(default_factory=DataSpec)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    continues: str = ""
    method: MethodConfig = field(default_factory=MethodConfig)

    @property
    def head(self) -> Head:
        """The head that the model needs for the task."""
        return Head(self.data.task, self.data.labels)

    def must_write(self, what: str) -> None:
        """Refuses what only a model that writes can do.

        Raises:
            LoRAError: The task has labels; `what` is said to want a model that writes.
        """
        if self.data.is_labelled:
            raise LoRAError(
                f"`task` (={self.data.task!r}) must be causal for {what}: this run's model gives labels or "
                "numbers, and writes nothing."
            )

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Builds a spec from plain values, as `spec.json` holds them; what is absent takes its default.

        Raises:
            LoRAError: A part does not exist or is out of range.
        """
        names = ["name", "model", "data", *PARTS]
        if not isinstance(values, dict):
            raise LoRAError(f"A spec must be a table with {', '.join(names)}; not {type(values).__name__}.")
        unknown = set(values) - {*names, "continues"}
        if unknown:
            raise LoRAError(f"A spec has no part {', '.join(sorted(map(str, unknown)))}; it has {', '.join(names)}.")
        for part in ("name", "model"):
            if part in values and not (isinstance(values[part], str) and values[part].strip()):
                raise LoRAError(f"`{part}` (={quoted(values[part])}) must be text.")
        if not re.fullmatch(r"([\w-]+@\d{1,12})?", str(values.get("continues", ""))):
            raise LoRAError(f"`continues` (={quoted(values['continues'])}) must be RUN@STEP, as the studio writes it.")
        parts = {"data": DataSpec, **PARTS}
        return cls(**{k: parts[k].from_dict(v) if k in parts else v for k, v in values.items()})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a spec from a JSON file.

        Raises:
            LoRAError: The file is missing, is no JSON or holds no spec.
        """
        try:
            values = read_json(path)
        except (OSError, ValueError, RecursionError) as error:
            raise LoRAError(
                f"`SPEC` (={str(path)!r}) must be a JSON file ({error}); a run's own spec.json is an example."
            ) from error
        return cls.from_dict(values)

    @property
    def row_length(self) -> int:
        """How many tokens of its own a row may have; those that prefix tuning adds count in `max_length`, too.

        Raises:
            LoRAError: They leave too few.
        """
        length = self.train.max_length - self.method.num_special_tokens
        if length < MIN_ROW_LENGTH:
            raise LoRAError(
                f"`prefix_length` + `infix_length` (={self.method.num_special_tokens}) must leave a row at least "
                f"{MIN_ROW_LENGTH} of `max_length` (={self.train.max_length}) tokens."
            )
        return length

    def weights_dtype(self, device: "torch.device") -> "torch.dtype":
        """Returns the type of the model's weights; where they are trained themselves, "auto" is float32.

        Small updates would be lost to the rounding of bfloat16.
        """
        is_exact = self.method.trains_weights and self.train.precision == "auto"
        return resolve_dtype("fp32" if is_exact else self.train.precision, device)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold."""
        return {
            "name": self.name,
            "model": self.model,
            "data": self.data.to_dict(),
            "lora": self.lora.to_dict(),
            "method": self.method.to_dict(),
            "train": self.train.to_dict(),
            **({"evaluation": self.evaluation.to_dict()} if self.evaluation != EvaluationSpec() else {}),
            **({"continues": self.continues} if self.continues else {}),
        }
