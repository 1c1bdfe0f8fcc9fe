"""Base, adapted and merged model side by side: each pane generates with what it says it runs."""

import copy
import inspect
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from core import Adapter, AdapterBank, LoRAError, lora_layers, merged_copy, strength

PANES = ("base", "adapter", "merged")


@dataclass(frozen=True)
class ChatSettings:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the likeliest token; above, the logits are divided by it and a token is drawn.
        top_p: Only the likeliest tokens that together have this probability are drawn from.
        seed: Of the draw; the same for every pane.
    """

    max_new_tokens: int = 96
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise LoRAError(f"`max_new_tokens` (={self.max_new_tokens}) must be at least 1.")
        if not 0 <= self.temperature <= 5:
            raise LoRAError(f"`temperature` (={self.temperature}) must be from 0 to 5.")
        if not 0 <= self.seed < 2**63:
            raise LoRAError(f"`seed` (={self.seed}) must be at least 0 and below 2⁶³.")
        if not 0 < self.top_p <= 1:
            raise LoRAError(f"`top_p` (={self.top_p}) must be above 0 and at most 1.")


@dataclass(frozen=True)
class Answer:
    """What a pane has said so far.

    Attributes:
        token_ids: The new tokens, without the end token.
        done: Whether the answer has ended.
        first_token_seconds: From the question to the first token.
        tokens_per_second: After the first token; 0 before there are two.
        engine: What really computed the last token, read from the model itself.
    """

    token_ids: tuple[int, ...]
    done: bool
    first_token_seconds: float
    tokens_per_second: float
    engine: str


class Engine:
    """A base model, at most one adapter beside it, and their merged twin, made when first asked for.

    Base and adapter are rows of one batch, each with its own update (`AdapterBank`): a token of both costs one pass
    over the weights. What a bank does not take runs one forward a pane, the adapter switched by `strength`.
    The twin is a model of its own. All share every weight that the adapter does not change.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter | None,
        end_token_ids: frozenset[int],
        *,
        is_cpu_shared: Callable[[], bool] = lambda: False,
    ) -> None:
        """Puts `adapter` on `model`.

        Args:
            model: The base model, which the engine owns from here on.
            adapter: What the panes "adapter" and "merged" run; without one only "base" can be asked.
            end_token_ids: Tokens that end an answer.
            is_cpu_shared: Asked at each answer: whether something else, a training say, is busy on the
                same cores. Then one thread is used. Two programs whose threads wait for each other on
                too few cores slow each other down tenfold.

        Raises:
            AdapterFileError: The adapter does not fit the model.
        """
        self._model = model.eval()
        self._bank: AdapterBank | None = None
        self._adapted: nn.Module | None = None  # what the twin is a copy of
        self._twin: nn.Module | None = None
        self._lock = threading.Lock()  # one forward at a time: what runs is set on shared layers
        self._end = end_token_ids
        self._is_cpu_shared = is_cpu_shared
        self._num_threads = torch.get_num_threads()
        if adapter is not None:
            shell = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
            self._bank = _bank_of(model, adapter)
            self._adapted = model if self._bank is None else shell
            adapter.apply(self._adapted)
            self._adapted.eval()

    def answer(self, pane: str, prompt_ids: list[int], settings: ChatSettings) -> Iterator[Answer]:
        """Yields the growing answer of one pane, a token at a time; the last has `done` set.

        Raises:
            LoRAError: The pane does not exist or needs an adapter, or the prompt is empty.
        """
        self._check((pane,), prompt_ids)
        return (answers[pane] for answers in self._generate((pane,), prompt_ids, settings))

    def answer_all(
        self, panes: tuple[str, ...], prompt_ids: list[int], settings: ChatSettings
    ) -> Iterator[dict[str, Answer]]:
        """Yields all panes' growing answers, in step: each has one token more than the time before.

        Each draws from its own random numbers, of the same seed, and so says what it would say alone, but for
        logits so near each other that it matters how a batch of two is rounded.
        """
        self._check(panes, prompt_ids)
        unmerged = [pane for pane in PANES if pane in panes and pane != "merged"]
        groups = [unmerged] if self._bank is not None and unmerged else [[pane] for pane in unmerged]
        groups += [["merged"]] if "merged" in panes else []
        answers: dict[str, Answer] = {}
        for parts in zip_longest(*(self._generate(group, prompt_ids, settings) for group in groups), fillvalue={}):
            for part in parts:
                answers |= part
            yield dict(answers)

    def logits(self, pane: str, token_ids: Tensor) -> Tensor:
        """Returns the logits of one pane, (batch, seq, vocabulary), for (batch, seq) token ids."""
        self._check((pane,), token_ids)
        output, _ = self._forward((pane,), torch.get_num_threads(), input_ids=token_ids)
        return output.logits

    def _generate(
        self, panes: Sequence[str], prompt_ids: list[int], settings: ChatSettings
    ) -> Iterator[dict[str, Answer]]:
        """Yields the answers of panes that run on one model, those that have ended left out, a token at a time."""
        begin = time.perf_counter()
        model = self._model_of(panes)
        device = next(model.parameters()).device
        room = getattr(model.config, "max_position_embeddings", None) or math.inf
        if len(prompt_ids) >= room:
            raise LoRAError(f"The prompt (={len(prompt_ids)} tokens) must be shorter than the model's context, {room}.")
        num_threads = 1 if self._is_cpu_shared() else self._num_threads
        # Renamed in transformers 5.24.
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        cache = None
        tokens = torch.tensor([prompt_ids] * len(panes), device=device)
        generators = {pane: torch.Generator().manual_seed(settings.seed) for pane in panes}
        said: dict[str, tuple[int, ...]] = dict.fromkeys(panes, ())
        num_steps, computing, first_seconds = 0, 0.0, 0.0
        while panes:
            started = time.perf_counter()
            inputs = {"input_ids": tokens, "use_cache": True, name: cache}
            output, engines = self._forward(panes, num_threads, **inputs)
            cache = output[name]
            last = output.logits[:, -1]
            chosen = [choose(row, settings, generators[pane]) for pane, row in zip(panes, last, strict=True)]
            if num_steps:
                computing += time.perf_counter() - started
            else:
                first_seconds = time.perf_counter() - begin
            rate = num_steps / computing if computing else 0.0
            num_steps += 1
            answers = {}
            for pane, token, engine in zip(panes, chosen, engines, strict=True):
                ended = token in self._end
                said[pane] += () if ended else (token,)
                done = ended or num_steps >= settings.max_new_tokens or len(prompt_ids) + num_steps >= room
                answers[pane] = Answer(said[pane], done, first_seconds, rate, engine)
            yield answers
            going = [row for row, pane in enumerate(panes) if not answers[pane].done]
            if 0 < len(going) < len(panes):
                cache.reorder_cache(torch.tensor(going, device=device))  # every kind of cache can drop rows so
            panes = [panes[row] for row in going]
            tokens = torch.tensor([[chosen[row]] for row in going], device=device)

    def _forward(self, panes: Sequence[str], num_threads: int, **inputs: Any) -> tuple[Any, list[str]]:
        """Returns the output of the model that `panes` run, a row for each (or all for one), and what computed each."""
        model = self._model_of(panes)
        bank = self._bank if model is self._model else None
        with self._lock, torch.inference_mode(), strength(model, 0.0 if panes[0] == "base" else 1.0):
            torch.set_num_threads(num_threads)  # of this thread, which may be another each time
            if bank is not None:
                bank.use(*(None if pane == "base" else pane for pane in panes))
            output = model(**inputs)
            return output, [describe(model, self._model, bank, row) for row in range(len(panes))]

    def _model_of(self, panes: Sequence[str]) -> nn.Module:
        if panes[0] != "merged":
            return self._model
        with self._lock:
            if self._twin is None:
                assert self._adapted is not None  # as _check saw
                self._twin = merged_copy(self._adapted)
        return self._twin

    def _check(self, panes: Sequence[str], prompt_ids: Sized) -> None:
        for pane in panes:
            if pane not in PANES:
                raise LoRAError(f"`pane` (={pane!r}) must be one of {', '.join(PANES)}.")
            if pane != "base" and self._adapted is None:
                raise LoRAError(
                    f"`pane` (={pane!r}) must have an adapter to run; open a run that has one, or ask the base."
                )
        if not len(prompt_ids):
            raise LoRAError("`prompt_ids` must hold at least one token; write a message first.")


def _bank_of(model: nn.Module, adapter: Adapter) -> AdapterBank | None:
    """Returns a bank on `model` whose rows may differ, or None, and the model as it was, where there can be none."""
    try:
        bank = AdapterBank(model, {"adapter": adapter})
    except LoRAError:  # convolutions, experts, parameters trained in full
        return None
    bank.use(None, "adapter")
    try:  # some layers do not get (rows, seq, …): OPT's MLP has all rows in one, GPT-2's positions are one for all
        with torch.inference_mode():
            model(input_ids=torch.zeros(2, 3, dtype=torch.long, device=next(model.parameters()).device))
    except LoRAError:
        bank.eject()
        return None
    return bank


def describe(model: nn.Module, base: nn.Module, bank: AdapterBank | None = None, row: int = 0) -> str:
    """Returns what `model` computes at this moment, read from its layers and weights.

    Args:
        model: The model that generates.
        base: The model whose weights it shares; itself, or the one that it is a merged copy of.
        bank: The adapters that rows of `model` choose among.
        row: Which row of the bank's.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    layers = list(lora_layers(model).values())
    if bank is not None:
        chosen = bank.rows[row]
        levels = {chosen: 1.0} if isinstance(chosen, str) else chosen or {}
        running = [
            f"{name} unmerged on {bank.num_matrices(name)} matrices, strength {level:g}"
            for name, level in levels.items()
            if level
        ]
        state = " and ".join(running) or "adapter off (strength 0)"
    elif not layers:
        shared = {id(p) for p in base.parameters()}
        num_changed = sum(id(p) not in shared for p in model.parameters())
        state = f"W₀ + ΔW in {num_changed} matrices, no LoRA layer" if num_changed else "no adapter"
    elif any(layer.merged for layer in layers):
        state = f"{sum(layer.merged for layer in layers)} of {len(layers)} LoRA layers merged"
    elif all(layer.strength == 0.0 for layer in layers):
        state = "adapter off (strength 0)"
    else:
        levels = " and ".join(f"{level:g}" for level in sorted({layer.strength for layer in layers}))
        state = f"adapter unmerged on {len(layers)} matrices, strength {levels}"
    return f"{state} · {dtype}"


def choose(logits: Tensor, settings: ChatSettings, generator: torch.Generator) -> int:
    """Returns the next token for logits, (vocabulary)."""
    if settings.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float().cpu() / settings.temperature, dim=-1)
    ordered, ids = probabilities.sort(descending=True)
    # A token stays when those before it do not yet hold top_p; so at least one stays.
    ordered[ordered.cumsum(0) - ordered >= settings.top_p] = 0.0
    return int(ids[torch.multinomial(ordered, 1, generator=generator)])
