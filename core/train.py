"""Training as a generator of events: AdamW on A and B, or what else a method trains; nothing else moves."""

import math
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice

import torch
from torch import Tensor, nn

from core.blocks import blocks
from core.checkpoint import Checkpoint
from core.config import TrainConfig
from core.devices import memory_bytes, memory_source, peak_memory_bytes
from core.distributed import World
from core.errors import ExplodedGradientError, LoRAError, NonFiniteLossError
from core.events import Evaluated, Event, Finished, SpectrumMeasured, Started, Step
from core.flat import Flat
from core.grams import quick_sigma
from core.inject import injection_of, method_of
from core.losses import Batch, Losses
from core.matrices import Factors
from core.nonfinite import first_in_forward, first_in_gradients, first_in_weights, longest_in_gradients
from core.rows import RowLabels, is_trained, row_logits, row_losses, untrained
from core.targets import lora_layers

_ALONE = World()

MOST_SPECTRA = 200
"""So often at most is the spectrum measured in a run, that its log stays small however long it trains."""


class Training(Iterator[Event]):
    """Training that goes on while its events are asked for: `train` makes one.

    Attributes:
        step: The optimizer steps taken so far.
        num_rows: The rows that they took, by all processes.
        evaluations: (step, `Evaluated.to_minimize`) of each evaluation so far.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        config: TrainConfig,
        eval_batches: Iterable[Batch] | None,
        start: Checkpoint | None,
        world: World,
        row_labels: RowLabels | None,
    ) -> None:
        """Takes what `train` is given; nothing happens before the first event is asked for."""
        self._model, self._batches, self._config, self._eval_batches = model, batches, config, eval_batches
        self._start, self._world, self._row_labels = start, world, row_labels
        self._optimizer: torch.optim.Optimizer | None = None
        self._flats: list[Flat] = []
        self.step = start.step if start else 0
        self.num_rows = start.num_rows if start else 0
        self.evaluations = list(start.evaluations) if start else []
        self._events = self._run()

    def __next__(self) -> Event:
        return next(self._events)

    @property
    def owes_evaluation(self) -> bool:
        """Whether the next event is an evaluation: it is due after this step, and was not made yet."""
        is_due = self._eval_batches is not None and _evaluates_after(self.step, self._config)
        return is_due and all(step != self.step for step, _ in self.evaluations)

    def close(self) -> None:
        """Ends training where it stands; the model is left in eval mode."""
        self._events.close()

    def checkpoint(self) -> Checkpoint:
        """Returns training as of the last event, to be taken up by `train(…, start=…)`.

        After a `SpectrumMeasured`, that is of a step whose own event would be missing: take it one event later.

        Raises:
            LoRAError: Training has not begun.
        """
        if self._optimizer is None:
            raise LoRAError("`train` must have given its first event before a checkpoint can be taken; call next().")
        moments = {p: of for flat in self._flats for p, of in flat.moments(self._optimizer).items()}
        return Checkpoint.of(self._model, moments, self.step, self.num_rows, self.evaluations)

    def _run(self) -> Generator[Event]:
        model, config, world = self._model, self._config, self._world
        self._check()
        prefix = "off" if config.shard_weights and world.size > 1 else config.prefix_cache
        losses = Losses(model, prefix, per_row=self._row_labels is not None)
        losses.choose()
        losses_of = world.wrap(losses)
        num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        device, dtype = _device_and_dtype(model)
        moments = self._start.restore(model) if self._start is not None else {}
        flattened = _flattened(model, config)
        self._flats = [flat for flat, _ in flattened]
        optimizer = torch.optim.AdamW(
            [{"params": [flat.values], "ratio": ratio} for flat, ratio in flattened],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        for flat in self._flats:
            flat.set_moments(optimizer, moments)
        self._start, moments = None, {}  # their memory is free again
        self._optimizer = optimizer
        yield Started(
            num_steps=config.steps,
            num_trainable=num_trainable,
            num_parameters=injection_of(model).num_in_all,
            device=str(device),
            precision=str(dtype).removeprefix("torch."),
            memory_source=memory_source(device),
        )
        stream, has_updates = iter(self._batches), bool(lora_layers(model))
        if config.compile:
            for block in blocks(model):
                block.compile(dynamic=True)
        try:
            while True:
                if self.owes_evaluation:
                    evaluated = _evaluate(losses, self._eval_batches or (), world, self.step, self._row_labels)
                    self.evaluations.append((self.step, evaluated.to_minimize))
                    yield evaluated
                if self.step >= config.steps or self._has_turned():
                    reason = "done" if self.step >= config.steps else "early"
                    yield Finished(self.step, reason, world.max(peak_memory_bytes(device)))
                    return
                micro_batches = list(islice(stream, config.accumulation))
                if len(micro_batches) < config.accumulation:
                    raise LoRAError(
                        f"`batches` must give steps × accumulation (={config.steps * config.accumulation}) batches; "
                        f"they ran out in step {self.step + 1}."
                    )
                with losses.fusion:
                    taken = _step(model, losses_of, optimizer, micro_batches, config, self.step + 1, world)
                self.step += 1
                self.num_rows += sum(len(b["labels"]) for b in micro_batches)
                if _measures_after(self.step, config) and has_updates:
                    yield spectrum_measured(model, self.step)
                yield taken
        finally:
            model.eval()  # also when the consumer stops early: dropout must not stay on
            losses.close()
            for flat in self._flats:
                flat.release()
            if config.compile:
                for block in blocks(model):
                    block._compiled_call_impl = None

    def _check(self) -> None:
        if method_of(self._model) is None:
            raise LoRAError("`model` must be adapted before it is trained; call inject(model, LoRAConfig()) first.")
        if any(layer.merged for layer in lora_layers(self._model).values()):
            raise LoRAError("`model` must not be merged while it is trained; call unmerge(model) first.")
        if self._eval_batches is not None and iter(self._eval_batches) is self._eval_batches:
            raise LoRAError(
                "`eval_batches` must be iterable anew for each evaluation; give a list instead of an iterator."
            )

    def _has_turned(self) -> bool:
        """Says whether the last `patience` evaluations all were no better than the best before them."""
        patience = self._config.patience
        values = [value for _, value in self.evaluations]
        return 0 < patience < len(values) and min(values[-patience:]) >= min(values[:-patience])


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    eval_batches: Iterable[Batch] | None = None,
    start: Checkpoint | None = None,
    world: World = _ALONE,
    row_labels: RowLabels | None = None,
) -> Training:
    """Trains a model and yields what happens: `Started`, then `Step` and `Evaluated`, then `Finished`.

    The loss of a step is the mean over all its trained tokens, also across accumulated batches, so
    that accumulation changes memory and not the result. The consumer may stop at any event; what is
    trained is then as of the last step yielded. Taken up from a checkpoint, every later event is what it would have
    been without the break, bit for bit on a CPU: a step depends on the weights, the moments, its batches, and its
    number, by which the learning rate is set and dropout is seeded.

    Args:
        model: An adapted model (see `inject`, `apply_method`) on its device. Called as `model(input_ids=…,
            attention_mask=…)`; gives logits (batch, seq, vocabulary), or an object that has them.
        batches: Dicts of `input_ids`, `attention_mask`, `labels`, each (batch, seq) int64; a label
            of -100 is not trained. As many as the steps to come × accumulation; with `start`, the first is that
            of step `start.step` + 1.
        config: The settings; `batch_size` and `max_length` are the batches' own affair.
        eval_batches: Held-out batches, iterated anew at each evaluation: before the first step,
            every `eval_every` steps and after the last.
        start: Where to go on; None trains from the beginning.
        world: The processes that train together. Each calls this with the same arguments, takes its own rows of every
            batch, and yields the same events, which are of all rows (but for the times).
        row_labels: Where labels are of rows, (batch), what they are and how they are scored. The model then gives
            logits (batch, num_labels), and is called with all that a batch has beside `labels`.

    Raises:
        LoRAError: The model is not adapted or is merged, the batches run out, or one holds no trained token.
        CheckpointError: `start` does not fit the model.
        NonFiniteLossError: The loss became NaN or infinite.
        ExplodedGradientError: The gradient became longer than `explosion_norm`.
    """
    return Training(model, batches, config, eval_batches, start, world, row_labels)


def _device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Returns where a model is trained, and the type of its frozen weights; where none are frozen, of all."""
    layer = next(iter(lora_layers(model).values()), None)
    if layer is not None:
        return layer.lora_A.device, layer.weight.dtype
    trained = next(p for p in model.parameters() if p.requires_grad)
    frozen = (p for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    return trained.device, next(frozen, trained).dtype


def _flattened(model: nn.Module, config: TrainConfig) -> list[tuple[Flat, float]]:
    """Returns what is trained and the ratio of its learning rate: B apart where LoRA+ gives it another one.

    Source: Hayou et al. 2024, arXiv:2402.12354.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    B = {id(layer.lora_B) for layer in lora_layers(model).values()}
    alike: dict[tuple[float, torch.dtype], list[nn.Parameter]] = {}
    for p in trained:
        ratio = config.lora_plus_ratio if id(p) in B else 1.0
        alike.setdefault((ratio, p.dtype), []).append(p)
    return [(Flat(parameters), ratio) for (ratio, _), parameters in alike.items()]


def spectrum_measured(model: nn.Module, step: int) -> SpectrumMeasured:
    """Returns the singular values of each ΔW of an adapted model as they stand; of DoRA, those of its B·A."""
    layers = lora_layers(model)
    sigmas = quick_sigma([Factors(*layer.pair, layer.scaling) for layer in layers.values()])
    found = [[float(f"{value:.4g}") for value in sigma.tolist()] for sigma in sigmas]
    return SpectrumMeasured(step, dict(zip(layers, found, strict=True)))


def _measures_after(step: int, config: TrainConfig) -> bool:
    every = max(config.spectrum_every, -(-config.steps // MOST_SPECTRA))
    return config.spectrum_every > 0 and (step % every == 0 or step == config.steps)


def _evaluates_after(step: int, config: TrainConfig) -> bool:
    return step in (0, config.steps) or (config.eval_every > 0 and step % config.eval_every == 0)


def _step(
    model: nn.Module,
    losses_of: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    config: TrainConfig,
    step: int,
    world: World,
) -> Step:
    """Takes one optimizer step and returns what happened."""
    begin = time.perf_counter()
    model.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    with _seeded(parameters[0].device, config.seed, step + world.seed):
        loss = _backward(model, losses_of, micro_batches, step, world)
    total_norm = nn.utils.get_total_norm([p.grad for p in parameters])
    grad_norm = total_norm.item()
    if not math.isfinite(grad_norm):
        raise NonFiniteLossError.of("gradient", step, where=first_in_gradients(model))
    if 0 < config.explosion_norm < grad_norm:
        raise ExplodedGradientError(
            f"The gradient of step {step} has exploded: its length is {grad_norm:.3g}, and `explosion_norm` "
            f"(={config.explosion_norm:g}) is the most; it is longest in {longest_in_gradients(model)}. "
            "Try a smaller learning rate, or a longer warm-up."
        )
    nn.utils.clip_grads_with_norm_(parameters, config.clip_norm or math.inf, total_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return Step(
        step=step,
        loss=loss,
        learning_rate=rate,
        grad_norm=grad_norm,
        num_tokens=sum(_num_tokens(b) for b in micro_batches),
        num_trained_tokens=sum(_num_trained(b["labels"]) for b in micro_batches),
        step_seconds=time.perf_counter() - begin,
        memory_bytes=world.max(memory_bytes(parameters[0].device)),
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


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World = _ALONE,
    *,
    step: int = 0,
    row_labels: RowLabels | None = None,
) -> Evaluated:
    """Returns the mean loss over all trained tokens of `batches`; leaves the model in eval mode.

    Of several processes, each measures its own rows of every batch. With `row_labels`, as of `train`, the mean is over
    the rows, and they are scored.

    Raises:
        LoRAError: No batch holds a trained token.
    """
    losses = Losses(model, per_row=row_labels is not None)
    losses.choose()
    return _evaluate(losses, batches, world, step, row_labels)


@torch.no_grad()
def _evaluate(
    losses: Losses, batches: Iterable[Batch], world: World, step: int, row_labels: RowLabels | None
) -> Evaluated:
    begin = time.perf_counter()
    losses.model.eval()
    total, num_trained = 0.0, 0
    found: list[tuple[Tensor, Tensor]] = []  # logits and labels of this process's rows
    with losses.fusion:
        for batch in batches:
            own = _own(batch, world)
            if row_labels is None:
                total += losses(own).sum().item()
            else:
                logits, trained = row_logits(losses.model, own), is_trained(own["labels"])
                total += row_losses(logits, own["labels"]).sum().item()
                found.append((logits.cpu()[trained], own["labels"][trained]))
            num_trained += _num_trained(batch["labels"])
    total = world.sum(total)
    if not num_trained:
        raise LoRAError("`batches` (for evaluation) must hold at least one trained token; all labels are -100.")
    metrics: dict[str, float] = {}
    if row_labels is not None:
        found = [pair for pairs in world.gather(found) for pair in pairs]
        logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        metrics = dict(row_labels.measure(logits, labels))
    metric = row_labels.metric if row_labels is not None else ""
    return Evaluated(step, total / num_trained, num_trained, time.perf_counter() - begin, metrics, metric)


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


def _backward(model: nn.Module, losses_of: nn.Module, micro_batches: list[Batch], step: int, world: World) -> float:
    """Adds the gradient of the step's mean loss to the parameters; returns that loss."""
    counts = [_num_trained(b["labels"]) for b in micro_batches]
    places = [place for place, count in enumerate(counts) if count]
    if not places:
        raise LoRAError(f"The batch of step {step} must hold at least one trained token; all its labels are -100.")
    total = 0.0
    suspect: tuple[Batch, Tensor, int] | None = None
    for place in places:
        own = _own(micro_batches[place], world)
        with world.apart(losses_of) if place != places[-1] else nullcontext():
            losses = losses_of(own)
            loss = losses.sum() / sum(counts)
            (loss * world.size).backward()  # of this, the mean over the processes is taken
        if math.isfinite(total):
            total += loss.item()
            suspect = own, losses.detach(), place
    total = world.sum(total)
    if suspect and not math.isfinite(total):
        raise _non_finite(model, *suspect, step, world)
    return total


def _non_finite(
    model: nn.Module, own: Batch, losses: Tensor, place: int, step: int, world: World
) -> NonFiniteLossError:
    """Returns the error that says which rows and which layer are to blame; all processes look, and find the same."""
    trained = is_trained(own["labels"])
    stand = range(world.rank, world.size * len(trained), world.size)  # where those of `own` stand in the batch
    blamed = {stand[i] for i in trained.nonzero()[:, 0][~torch.isfinite(losses).cpu()].tolist()}
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in own.items() if key != "labels"}
    where = first_in_forward(model, inputs)  # in any case: where weights lie in parts, none can pass alone
    found = world.gather((place, blamed, first_in_weights(model) or where))
    place, _, where = min((of for of in found if of[1]), key=lambda of: of[0], default=found[0])
    rows = sorted(set().union(*(rows for batch, rows, _ in found if batch == place)))
    return NonFiniteLossError.of("loss", step, batch=place, rows=tuple(rows), where=where)


def _own(batch: Batch, world: World) -> dict[str, Tensor]:
    """Returns the rows of `batch` that this process takes.

    Where there are more processes than rows, one that is left over takes a row of which it trains nothing: all go
    through the model equally often, as they wait for each other there.
    """
    own = {key: value[world.rows] for key, value in batch.items()}
    if not len(own["labels"]):
        own = {key: value[:1] for key, value in batch.items()}
        own["labels"] = untrained(own["labels"])
    return own


def _num_tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()


def _num_trained(labels: Tensor) -> int:
    return int(is_trained(labels).sum())
