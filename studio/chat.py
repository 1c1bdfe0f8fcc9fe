"""Panes side by side: base, adapters at any strength, merged; each generates with what it says it runs."""

import copy
import dataclasses
import inspect
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from core import (
    Adapter,
    AdapterBank,
    Baseline,
    LoRAError,
    merged_copy,
    special_tokens_of,
    strength,
    truncate,
    weighted_sum,
)
from studio.answers import Answer, describe, signs_of
from studio.panes import Pane, Source, of_lora, only_as_it_is
from studio.sampling import ChatSettings, choose
from studio.shift import MAX_SCORED, Shift, compare

MAX_PANES = 4
KEPT_ADAPTERS, KEPT_MODELS = 16, 4
"""How many adapters stay in the bank, and how many models beside it, after those that run now."""


@dataclass
class _Held:
    """An adapter that the engine has: as it was found, as it is run, and whether it lies in the bank."""

    found: Adapter | Baseline
    adapter: Adapter | Baseline
    is_banked: bool


@dataclass
class _Group:
    """Panes that run on one model, a row of its batch each, and what has come of them.

    Attributes:
        model: The engine's own, with the bank; else one for this pane alone.
        places: Of the panes among all.
        panes: What each runs now: a strength may change between two tokens.
        engines: What computed the last token of each.
    """

    model: nn.Module
    places: list[int]
    panes: list[Pane]
    engines: list[str] = field(default_factory=list)

    def keep(self, rows: list[int]) -> None:
        self.places = [self.places[row] for row in rows]
        self.panes = [self.panes[row] for row in rows]


class Engine:
    """A base model, and beside it what panes ask for: adapters, sums of them, merged twins.

    All unmerged panes are rows of one batch, each with its own update (`AdapterBank`): a token of all costs one pass
    over the weights. What a bank does not take has a model of its own, as has each merged pane. All share every
    weight that they do not change.

    Attributes:
        end_token_ids: Tokens that end an answer.
    """

    def __init__(
        self,
        model: nn.Module,
        find: Callable[[str, int], Adapter | Baseline],
        end_token_ids: frozenset[int],
        *,
        is_cpu_shared: Callable[[], bool] = lambda: False,
    ) -> None:
        """Takes a model.

        Args:
            model: The base model, which the engine owns from here on.
            find: Returns the adapter of that name, or what another method trained, at the step of a checkpoint or, for
                0, as it was saved last; the same object as long as it has not changed.
            end_token_ids: Tokens that end an answer.
            is_cpu_shared: Asked at each answer: whether something else, a training say, is busy on the
                same cores. Then one thread is used. Two programs whose threads wait for each other on
                too few cores slow each other down tenfold.
        """
        self._model = model.eval()
        self._plain = sharing(model)  # what others are made from; the bank never stands in it
        self._find = find
        self._bank: AdapterBank | None = None
        self._held: dict[Source, _Held] = {}
        self._models: dict[tuple[Any, ...], nn.Module] = {}
        self._lock = threading.RLock()  # one forward at a time: what runs is set on shared layers
        self.end_token_ids = end_token_ids
        self._is_cpu_shared = is_cpu_shared
        self._num_threads = torch.get_num_threads()
        names = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # renamed in transformers 5.24
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        self._takes_positions = "position_ids" in names

    @property
    def room(self) -> float:
        """The longest context in tokens; infinite where the model names none."""
        config: Any = self._model.config
        return getattr(config, "max_position_embeddings", None) or math.inf

    def answer(self, pane: Pane, prompt_ids: list[int], settings: ChatSettings) -> Iterator[Answer]:
        """Returns an iterator of the growing answer of one pane, a token at a time; the last has `done` set.

        Raises:
            LoRAError: As of `answer_all`.
        """
        return (answers[0] for answers in self.answer_all([pane], [prompt_ids], settings))

    def answer_all(
        self,
        panes: Sequence[Pane],
        prompts: Sequence[list[int]],
        settings: ChatSettings,
        strengths: Callable[[], Sequence[float]] | None = None,
    ) -> Iterator[list[Answer]]:
        """Returns an iterator of all panes' growing answers, in step: each has one token more than the time before.

        Each draws from its own random numbers, of the same seed, and so says what it would say alone, but for
        logits so near each other that it matters how a batch of several is rounded.

        Args:
            panes: What is asked.
            prompts: What each pane is asked; of whatever lengths.
            settings: How tokens are chosen.
            strengths: Asked before each token: the strength of each pane from there on. A merged one keeps its own.

        Raises:
            LoRAError: There are no panes or too many, a prompt is empty or longer than the context, or an adapter
                cannot be run as it is asked.
        """
        if not 1 <= len(panes) <= MAX_PANES:
            raise LoRAError(f"`panes` (={len(panes)} of them) must be from 1 to {MAX_PANES}.")
        for ids in prompts:
            self._check_length(len(ids))
        begin = time.perf_counter()
        first: dict[int, Tensor] = {}
        groups = self._groups(panes)
        return self._in_step(
            panes, first, [self._generate(group, prompts, settings, strengths, first, begin) for group in groups]
        )

    def _in_step(
        self, panes: Sequence[Pane], first: dict[int, Tensor], going: list[Iterator[dict[int, Answer]]]
    ) -> Iterator[list[Answer]]:
        answers: dict[int, Answer] = {}
        signs: dict[int, tuple[str, tuple[int, ...]]] = {}
        for parts in zip_longest(*going, fillvalue={}):
            for part in parts:
                answers |= part
            signs = signs or signs_of(panes, first, self._dtype)
            for place, (fingerprint, same_as) in signs.items():
                answers[place] = dataclasses.replace(answers[place], fingerprint=fingerprint, same_as=same_as)
            yield [answers[place] for place in range(len(panes))]

    def logits(self, pane: Pane, token_ids: Tensor) -> Tensor:
        """Returns the logits of one pane, (batch, seq, vocabulary), for (batch, seq) token ids."""
        self._check_length(token_ids.shape[-1])
        (group,) = self._groups([pane])
        special = special_tokens_of(group.model)
        if special is not None:
            rows = [[*special.around([]), *row] for row in token_ids.tolist()]
            token_ids = torch.tensor(rows, device=token_ids.device)
        output, _ = self._forward(group, self._num_threads, input_ids=token_ids)
        return output.logits if special is None else output.logits[:, len(special.around([])) :]

    def shift(self, pane: Pane, token_ids: list[int], num_before: int, top: int = 5) -> Shift:
        """Scores tokens by a pane and by the base.

        Args:
            pane: What is compared with the base.
            token_ids: The text, with all that stands before it.
            num_before: How many tokens stand before the first that is scored, at least one: nothing predicts that.
            top: How many of the likeliest tokens are told.

        Raises:
            LoRAError: The text is empty or too long, or the pane cannot be run.
        """
        self._check_length(len(token_ids))
        num = len(token_ids) - max(1, num_before)
        if not 0 < num <= MAX_SCORED:
            raise LoRAError(f"The text (={num} tokens) must have from 1 to {MAX_SCORED} tokens to be scored.")
        keep = {"logits_to_keep": num + 1} if self._last_only else {}
        found: dict[int, Tensor] = {}
        before, scored = token_ids[:-num], token_ids[-num:]
        for group in self._groups([pane, Pane()]):
            special = special_tokens_of(group.model)
            row = [*(before if special is None else special.around(before)), *scored]
            ids = torch.tensor([row] * len(group.places), device=self._device)
            output, _ = self._forward(group, self._num_threads, input_ids=ids, **keep)
            found |= dict(zip(group.places, output.logits[:, -num - 1 : -1], strict=True))
        return compare(found[0], found[1], token_ids[-num:], top)

    @property
    def _dtype(self) -> torch.dtype:
        return next(p.dtype for p in self._model.parameters() if p.is_floating_point())

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _generate(
        self,
        group: _Group,
        prompts: Sequence[list[int]],
        settings: ChatSettings,
        strengths: Callable[[], Sequence[float]] | None,
        first: dict[int, Tensor],
        begin: float,
    ) -> Iterator[dict[int, Answer]]:
        """Yields the answers of panes that run on one model, those that have ended left out, a token at a time."""
        num_threads = 1 if self._is_cpu_shared() else self._num_threads
        special = special_tokens_of(group.model)
        asked = [prompts[place] if special is None else special.around(prompts[place]) for place in group.places]
        for ids in asked:
            self._check_length(len(ids))
        inputs = self._padded(asked)
        lengths = {place: len(ids) for place, ids in zip(group.places, asked, strict=True)}
        generators = {place: torch.Generator().manual_seed(settings.seed) for place in group.places}
        said: dict[int, tuple[int, ...]] = dict.fromkeys(group.places, ())
        num_steps, computing, first_seconds = 0, 0.0, 0.0
        while group.places:
            started = time.perf_counter()
            if strengths is not None:
                group.panes = _at(group, strengths())
            output, engines = self._forward(group, num_threads, use_cache=True, **self._last_only, **inputs)
            cache, last = output[self._cache_name], output.logits[:, -1]
            if not num_steps:
                first |= dict(zip(group.places, last.float().cpu(), strict=True))
            chosen = [choose(row, settings, generators[at]) for at, row in zip(group.places, last, strict=True)]
            if num_steps:
                computing += time.perf_counter() - started
            else:
                first_seconds = time.perf_counter() - begin
            rate = num_steps / computing if computing else 0.0
            num_steps += 1
            answers = {}
            for place, token, engine in zip(group.places, chosen, engines, strict=True):
                ended = token in self.end_token_ids
                said[place] += () if ended else (token,)
                done = ended or num_steps >= settings.max_new_tokens or lengths[place] + num_steps >= self.room
                answers[place] = Answer(said[place], done, first_seconds, rate, engine)
            yield answers
            going = [row for row, place in enumerate(group.places) if not answers[place].done]
            rows = torch.tensor(going, dtype=torch.long, device=self._device)
            if 0 < len(going) < len(group.places):
                cache.reorder_cache(rows)  # every kind of cache can drop rows so
            group.keep(going)
            inputs = self._next(inputs, rows, [chosen[row] for row in going]) | {self._cache_name: cache}

    def _padded(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Returns a model's inputs for prompts of whatever lengths, the shorter ones padded at the left."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self._device)
        if all(len(p) == width for p in prompts):
            return {"input_ids": ids}
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        places = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if self._takes_positions else {}
        return {"input_ids": ids, "attention_mask": mask, **places}

    def _next(self, inputs: dict[str, Any], rows: Tensor, tokens: list[int]) -> dict[str, Any]:
        """Returns the inputs of the next step for the rows that go on, each with its new token."""
        ids = {"input_ids": torch.tensor(tokens, device=self._device)[:, None]}
        if "attention_mask" not in inputs:
            return ids
        mask = inputs["attention_mask"][rows]
        ids["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        if "position_ids" in inputs:
            ids["position_ids"] = inputs["position_ids"][rows][:, -1:] + 1
        return ids

    def _forward(self, group: _Group, num_threads: int, **inputs: Any) -> tuple[Any, list[str]]:
        """Returns the output of a group's model, a row for each pane (or all for one), and what computed each."""
        model, pane = group.model, group.panes[0]
        with self._lock, torch.inference_mode():
            torch.set_num_threads(num_threads)  # of this thread, which may be another each time
            bank = None
            if model is self._model:
                rows = [self._row(pane) for pane in group.panes]
                bank = self._bank
                if bank is not None:
                    bank.use(*rows)
            # To look for layers takes milliseconds: only where some can be.
            is_switched = bank is None and len(pane.sources) == 1 and not pane.merged
            held = self._held[pane.sources[0]].adapter if is_switched else None
            if isinstance(held, Baseline) and pane.strength != 1.0:
                raise only_as_it_is(held, f"run at strength {pane.strength:g}")
            with strength(model, pane.strength) if is_switched else nullcontext():
                output = model(**inputs)
                if not (pane.merged and group.engines):  # a merged model stays what it is from token to token
                    group.engines = [describe(model, self._model, bank, row) for row in range(len(group.panes))]
                return output, group.engines

    def _row(self, pane: Pane) -> str | None | dict[str, float]:
        """Returns what a row of the bank runs for a pane; an adapter that had to make room comes back."""
        for source in pane.sources:
            if self._bank is None or source.label not in self._bank.names:
                self._place(source, self._held[source].adapter)
        terms = {source.label: value for source, value in pane.terms.items()}
        if len(terms) == 1 and 1.0 in terms.values():
            return next(iter(terms))
        return terms or None

    def _groups(self, panes: Sequence[Pane]) -> list[_Group]:
        """Returns the panes by the model that runs them: all that the bank takes together, the others each alone."""
        with self._lock:
            wanted = {source for pane in panes for source in pane.sources}
            for source in wanted:
                self._open(source, wanted)
            together = [
                i for i, p in enumerate(panes) if not p.merged and all(self._held[s].is_banked for s in p.sources)
            ]
            groups = [_Group(self._model, together, [panes[i] for i in together])] if together else []
            others = [i for i in range(len(panes)) if i not in together]
            return groups + [_Group(self._own_model(panes[i]), [i], [panes[i]]) for i in others]

    def _open(self, source: Source, wanted: set[Source]) -> None:
        """Finds an adapter and puts it in the bank, if it is not there as it is now."""
        found = self._find(source.adapter, source.step)
        held = self._held.pop(source, None)
        if held is None or held.found is not found:
            if held is not None:  # it has changed; what was made of it is forgotten
                self._models.clear()
                self._take_out(source)
            if source.rank and isinstance(found, Baseline):
                raise only_as_it_is(found, f"cut to rank {source.rank}")
            adapter = truncate(found, rank=source.rank).adapter if source.rank else found  # type: ignore[arg-type]
            held = _Held(found, adapter, self._place(source, adapter))
        self._held[source] = held  # the last one used stands last
        for old in [s for s in self._held if s not in wanted][: max(0, len(self._held) - KEPT_ADAPTERS)]:
            self._take_out(old)

    def _take_out(self, source: Source) -> None:
        if self._bank is not None and source.label in self._bank.names:
            self._bank.remove(source.label)

    def _place(self, source: Source, adapter: Adapter | Baseline) -> bool:
        """Puts an adapter in the bank; says whether rows can run it."""
        if isinstance(adapter, Baseline):
            adapter.check_fit(self._plain)
            return False
        try:
            if self._bank is None:
                self._bank = AdapterBank(self._model, {source.label: adapter})
            else:
                self._bank.add(source.label, adapter)
        except LoRAError:
            adapter.check_fit(self._plain)  # raises if it is not of this model
            return False  # convolutions, experts, parameters trained in full
        self._bank.use(None, source.label)
        try:  # some layers do not get (rows, seq, …): OPT's MLP has all rows in one, GPT-2's positions are one for all
            with torch.inference_mode():
                self._model(input_ids=torch.zeros(2, 3, dtype=torch.long, device=self._device))
        except LoRAError:
            self._bank.remove(source.label)
            return False
        return True

    def _own_model(self, pane: Pane) -> nn.Module:
        """Returns the model of a pane that is merged, or that the bank does not take."""
        sources = pane.sources
        alone = len(sources) == 1
        key = (pane.merged, *(pane.terms.items() if pane.merged or not alone else sources))
        model = self._models.pop(key, None)
        if model is None:
            adapters = [self._held[s].adapter for s in sources]
            model = sharing(self._plain)
            made = adapters[0] if alone else weighted_sum(of_lora(adapters), [pane.terms.get(s, 0.0) for s in sources])
            if pane.merged and isinstance(made, Baseline):
                raise only_as_it_is(made, "merged")
            made.apply(model)
            if pane.merged:
                with strength(model, pane.strength if alone else 1.0):
                    model = merged_copy(model)
        self._models[key] = model.eval()
        for old in list(self._models)[:-KEPT_MODELS]:
            del self._models[old]
        return model

    def _check_length(self, num_tokens: int) -> None:
        if not num_tokens:
            raise LoRAError("`prompt_ids` must hold at least one token; write a message first.")
        if num_tokens >= self.room:
            raise LoRAError(
                f"The prompt (={num_tokens} tokens) must be shorter than the model's context, {self.room}; "
                "shorten it, or begin a new conversation."
            )


def sharing(model: nn.Module) -> nn.Module:
    """Returns the same modules anew, with the same weights."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def _at(group: _Group, strengths: Sequence[float]) -> list[Pane]:
    """Returns the panes at the strengths of now; a merged one keeps its own."""
    return [
        dataclasses.replace(pane, strength=strengths[place])
        if pane.adapter and not pane.merged and pane.strength != strengths[place]
        else pane
        for place, pane in zip(group.places, group.panes, strict=True)
    ]
