"""What is trained, made ready: the rows as tokens, and the model loaded, adapted and on its device."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from core import Injection, LoRAError, World, apply_method
from studio import data, models
from studio.specs import RunSpec
from studio.workspace import Workspace


class DataError(LoRAError):
    """The rows cannot be trained on."""


class Rows(NamedTuple):
    """Rows as tokens.

    Attributes:
        prepared: The examples.
        pad_token_id: What shorter rows are filled up with.
    """

    prepared: data.Prepared
    pad_token_id: int | None


def rows_of(
    spec: RunSpec, workspace: Workspace, world: World, note: Callable[[str], None], *, is_begun: bool = False
) -> Rows:
    """Returns the rows that a run trains on; one that has begun had them checked, and skips what it skipped then.

    Raises:
        DataError: The rows cannot be trained on.
        LoRAError: The model has no tokenizer that can be read.
    """
    note("Reading the data")
    with world.first_alone():
        tokenizer = models.load_tokenizer(spec.model, workspace)
        try:
            rows = replace(spec.data, bad_rows="skip") if is_begun else spec.data
            settings = {"max_length": spec.row_length, "seed": spec.train.seed}
            prepared = data.prepare(rows, tokenizer, workspace=workspace, progress=note, **settings)
        except LoRAError as error:
            raise DataError(str(error)) from error
    for sentence in prepared.report.sentences():
        note(sentence)
    return Rows(prepared, tokenizer.pad_token_id)


def adapted_model(
    spec: RunSpec, workspace: Workspace, world: World, device: torch.device, note: Callable[[str], None]
) -> tuple[Any, Injection]:
    """Returns the model with its adapter, or ready for another method, on `device`, and what was done to it.

    Raises:
        LoRAError: The model cannot be loaded or adapted.
    """
    if spec.train.shard_weights and spec.method.method != "lora":
        raise LoRAError(
            f"`shard_weights` (=True) must be off for the method {spec.method.method}; only lora trains with split "
            "weights."
        )
    note("Loading the model")
    with world.first_alone():
        at_first = "cpu" if spec.train.shard_weights else str(device)  # it may be too large for the device
        options: dict[str, Any] = {"head": spec.head, "seed": spec.train.seed, "progress": note}
        dtype = spec.weights_dtype(device)
        model = models.load_model(spec.model, workspace, device=at_first, dtype=dtype, **options)
    preparation(spec)(model)
    injection = apply_method(model, spec.method, spec.lora, seed=spec.train.seed)
    if spec.train.shard_weights:
        world.shard(model, device)
    return model, injection


def preparation(spec: RunSpec) -> Callable[[Any], None]:
    """Returns what is done to a model before it is adapted."""

    def prepare(model: Any) -> None:
        # By paths: `tasks.settled` names the head so; what a person names beside it may be the end of many.
        paths = {path for path, _ in model.named_modules()}
        head = [name for name in spec.lora.modules_to_save if name in paths] if spec.head.is_of_rows else None
        models.prepare_to_train(model, activation_checkpointing=spec.train.activation_checkpointing, head=head)

    return prepare
