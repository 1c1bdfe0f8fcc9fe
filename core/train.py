"""Training as a generator of events: AdamW on A and B, nothing else moves."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import TrainConfig
from core.devices import memory_bytes, memory_source, peak_memory_bytes
from core.errors import LoRAError, NonFiniteLossError
from core.events import Evaluated, Event, Finished, Started, Step
from core.targets import count_parameters, lora_layers

IGNORED = -100
"""The label of a token that is not trained, as in torch's cross-entropy."""

Batch = Mapping[str, Tensor]


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    eval_batches: Iterable[Batch] | None = None,
) -> Iterator[Event]:
    """Trains the adapter of `model` and yields what happens: `Started`, then `Step` and `Evaluated`, then `Finished`.

    The loss of a step is the mean over all its trained tokens, also across accumulated batches, so
    that accumulation changes memory and not the result. The consumer may stop at any event; A and
    B are then as of the last step yielded.

    Args:
        model: An adapted model (see `inject`) on its device. Called as `model(input_ids=…,
            attention_mask=…)`; gives logits (batch, seq, vocabulary), or an object that has them.
        batches: Dicts of `input_ids`, `attention_mask`, `labels`, each (batch, seq) int64; a label
            of -100 is not trained. At least `steps × accumulation` of them.
        config: The settings; `batch_size` and `max_length` are the batches' own affair.
        eval_batches: Held-out batches, iterated anew at each evaluation: before the first step,
            every `eval_every` steps and after the last.

    Raises:
        LoRAError: The model is not adapted or is merged, the batches run out, or one holds no trained token.
        NonFiniteLossError: The loss became NaN or infinite.
    """
    layers = lora_layers(model)
    if not layers:
        raise LoRAError("`model` must be adapted before it is trained; call inject(model, LoRAConfig()) first.")
    if any(layer.merged for layer in layers.values()):
        raise LoRAError("`model` must not be merged while it is trained; call unmerge(model) first.")
    groups = _parameter_groups(model, config)
    parameters = [p for group in groups for p in group["params"]]
    first = next(iter(layers.values()))
    device, dtype = first.lora_A.device, first.weight.dtype
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=device.type in ("cpu", "cuda")
    )
    num_trainable = sum(p.numel() for p in parameters)
    if eval_batches is not None and iter(eval_batches) is eval_batches:
        raise LoRAError("`eval_batches` must be iterable anew for each evaluation; give a list instead of an iterator.")
    yield Started(
        num_steps=config.steps,
        num_trainable=num_trainable,
        num_parameters=count_parameters(model) + num_trainable,
        device=str(device),
        precision=str(dtype).removeprefix("torch."),
        memory_source=memory_source(device),
    )
    if eval_batches is not None:
        yield evaluate(model, eval_batches, step=0)
    stream = iter(batches)
    try:
        for step in range(1, config.steps + 1):
            micro_batches = [_on(device, b) for b in islice(stream, config.accumulation)]
            if len(micro_batches) < config.accumulation:
                raise LoRAError(
                    f"`batches` must give steps × accumulation (={config.steps * config.accumulation}) batches; "
                    f"they ran out in step {step}."
                )
            yield _step(model, optimizer, micro_batches, config, step)
            if eval_batches is not None and _evaluates_after(step, config):
                yield evaluate(model, eval_batches, step=step)
        yield Finished(step=config.steps, reason="done", peak_memory_bytes=peak_memory_bytes(device))
    finally:
        model.eval()  # also when the consumer stops early: dropout must not stay on


def _parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Returns what is trained, B apart where LoRA+ gives it another rate (arXiv:2402.12354)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.lora_plus_ratio == 1.0:
        return [{"params": trained, "ratio": 1.0}]
    B = {id(layer.lora_B) for layer in lora_layers(model).values()}
    return [
        {"params": [p for p in trained if id(p) not in B], "ratio": 1.0},
        {"params": [p for p in trained if id(p) in B], "ratio": config.lora_plus_ratio},
    ]


def _evaluates_after(step: int, config: TrainConfig) -> bool:
    return step == config.steps or (config.eval_every > 0 and step % config.eval_every == 0)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[dict[str, Tensor]],
    config: TrainConfig,
    step: int,
) -> Step:
    """Takes one optimizer step and returns what happened."""
    begin = time.perf_counter()
    model.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    with _seeded(parameters[0].device, config.seed, step):
        loss = _backward(model, micro_batches, step)
    grad_norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf).item()
    if not math.isfinite(grad_norm):
        raise NonFiniteLossError(_non_finite("gradient", step))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(
        step=step,
        loss=loss,
        learning_rate=rate,
        grad_norm=grad_norm,
        num_tokens=sum(_num_tokens(b) for b in micro_batches),
        num_trained_tokens=sum(_num_trained(b["labels"]) for b in micro_batches),
        step_seconds=time.perf_counter() - begin,
        memory_bytes=memory_bytes(parameters[0].device),
    )


@contextmanager
def _seeded(device: torch.device, seed: int, step: int) -> Iterator[None]:
    """Seeds dropout for one step and gives the caller's random state back after it.

    So a step's dropout depends on the seed and the step alone, not on what else draws numbers or
    where training was taken up again.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed * 1_000_003 + step)
        yield


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], *, step: int = 0) -> Evaluated:
    """Returns the mean loss over all trained tokens of `batches`; leaves the model in eval mode.

    Raises:
        LoRAError: No batch holds a trained token.
    """
    begin = time.perf_counter()
    model.eval()
    device = next(model.parameters()).device
    total, num_trained = 0.0, 0
    for batch in batches:
        batch = _on(device, batch)
        total += token_losses(model, batch).sum().item()
        num_trained += _num_trained(batch["labels"])
    if not num_trained:
        raise LoRAError("`batches` (for evaluation) must hold at least one trained token; all labels are -100.")
    return Evaluated(step, total / num_trained, num_trained, time.perf_counter() - begin)


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the cross-entropy of each trained token of `batch`, (num_trained_tokens), float32, in nats.

    Token t + 1 is predicted from the tokens up to t. Only positions that predict a trained token
    go through the output head: its logits are the largest tensor of a step.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    targets = batch["labels"][:, 1:]
    trained = targets != IGNORED
    with _head_sees_only(model, trained) as selected:
        output = model(**inputs)
    logits = getattr(output, "logits", output)
    logits = logits[0] if selected else logits[:, :-1][trained]
    return F.cross_entropy(logits.float(), targets[trained], reduction="none")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Returns the rate of `step` (from 1): a linear rise over the warm-up, then the schedule's fall.

    The fall ends one step after the last, so that every step moves the weights.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - 1 - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate


def _backward(model: nn.Module, micro_batches: list[dict[str, Tensor]], step: int) -> float:
    """Adds the gradient of the step's mean loss to the parameters; returns that loss."""
    num_trained = sum(_num_trained(b["labels"]) for b in micro_batches)
    if not num_trained:
        raise LoRAError(f"The batch of step {step} must hold at least one trained token; all its labels are -100.")
    total = 0.0
    for batch in micro_batches:
        if not _num_trained(batch["labels"]):
            continue
        loss = token_losses(model, batch).sum() / num_trained
        loss.backward()
        total += loss.item()
    if not math.isfinite(total):
        raise NonFiniteLossError(_non_finite("loss", step))
    return total


def _non_finite(what: str, step: int) -> str:
    return (
        f"The {what} of step {step} is not a finite number; "
        "try a smaller learning rate, a longer warm-up, or precision fp32."
    )


@contextmanager
def _head_sees_only(model: nn.Module, trained: Tensor) -> Iterator[bool]:
    """Lets the output head see only positions whose next token is trained; yields whether it could.

    The head is asked from the model by `get_output_embeddings()`; a model that does not have it
    gives all its logits.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if not isinstance(head, nn.Module):
        yield False
        return

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]  # (batch, seq, hidden) -> (1, num_trained_tokens, hidden)
        return (hidden[:, :-1][trained].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield True
    finally:
        handle.remove()


def _on(device: torch.device, batch: Batch) -> dict[str, Tensor]:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _num_tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()


def _num_trained(labels: Tensor) -> int:
    return int((labels[:, 1:] != IGNORED).sum())
