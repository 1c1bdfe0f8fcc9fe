"""The same training step by ours, by PEFT, by loralib, and in full: one model each, of the same weights."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core import LoRAConfig, TrainConfig, inject, lora_layers, train
from studio.models import prepare_to_train

Batch = Mapping[str, Tensor]
LEARNING_RATE = 1e-3


class Stepper:
    """Takes a training step when it is called; the loss of each is kept."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.losses: list[float] = []
        self._batches, self._place = batches, 0

    def next_batch(self) -> Batch:
        batch = self._batches[self._place % len(self._batches)]
        self._place += 1
        return batch


class Ours(Stepper):
    """`core.train`, a step at a time, as the studio's worker runs it."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], lora: LoRAConfig, **settings: Any) -> None:
        super().__init__(batches)
        checkpointing = settings.get("activation_checkpointing", False)
        prepare_to_train(model, activation_checkpointing=checkpointing)
        inject(model, lora)
        config = TrainConfig(
            steps=10_000,
            warmup_steps=0,
            schedule="constant",
            learning_rate=LEARNING_RATE,
            clip_norm=1.0,
            **settings,
        )
        self.model = model
        self.events = train(model, self._endless(), config)
        next(self.events)

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def __call__(self) -> None:
        self.losses.append(next(self.events).loss)


class Loop(Stepper):
    """The loop that people write: the model's own loss, clipping, AdamW."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], *, fused: bool = True) -> None:
        super().__init__(batches)
        self.model = model.train()
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=LEARNING_RATE, weight_decay=0.0, fused=fused or None)
        self._device = self._trained[0].device

    def __call__(self) -> None:
        batch = {key: value.to(self._device) for key, value in self.next_batch().items()}
        loss = self.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())


def peft_model(model: nn.Module, lora: LoRAConfig, *, task: str | None = "CAUSAL_LM") -> nn.Module:
    """Returns the model adapted by the PEFT library."""
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type=task
    )
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return get_peft_model(model, settings)


def loralib_model(model: nn.Module, lora: LoRAConfig) -> nn.Module:
    """Returns the model with the authors' layers in the places of its linear ones, as their README says."""
    import loralib

    targets = lora.target_modules
    for path, module in list(model.named_modules()):
        name = path.rpartition(".")[2]
        if (
            isinstance(module, nn.Linear)
            and module is not model.get_output_embeddings()
            and (targets == "all-linear" or name in targets)
        ):
            has_bias = module.bias is not None
            layer = loralib.Linear(
                module.in_features,
                module.out_features,
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                merge_weights=False,
                bias=has_bias,
            )
            layer.weight = module.weight
            if has_bias:
                layer.bias = module.bias
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, name, layer.to(module.weight.device, module.weight.dtype))  # it multiplies no others
    loralib.mark_only_lora_as_trainable(model)
    model.config.use_cache = False
    return model


def start_alike(ours: nn.Module, theirs: nn.Module) -> None:
    """Copies our A into a model of theirs, so that the losses can be compared."""
    layers = lora_layers(ours)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_A" in name:
                path = name.partition(".lora_A")[0].removeprefix("base_model.model.")
                p.copy_(layers[path].lora_A)


def copies(model: nn.Module, number: int) -> Iterable[nn.Module]:
    """Returns models of the same weights, in memory of their own."""
    return (copy.deepcopy(model) for _ in range(number))
