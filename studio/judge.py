"""What a model with a head for labels gives for a text, with and without an adapter."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from core import Adapter, Baseline, LoRAError, eject, merged_copy, row_logits, strength
from studio.answers import describe
from studio.chat import sharing
from studio.data import DataSpec
from studio.labelled import cut_labelled, tokenize_labelled
from studio.mapping import Labelled, RowError, texts_of
from studio.panes import Pane, only_as_it_is


@dataclass(frozen=True)
class Verdict:
    """What one pane gives.

    Attributes:
        logits: (num_labels), or the one value of a regressor.
        engine: What was really computed with, in words.
        num_tokens: Of the text as the model saw it.
        num_cut: Tokens that were cut away.
        seconds: Time that it took.
    """

    logits: tuple[float, ...]
    engine: str
    num_tokens: int
    num_cut: int
    seconds: float

    @property
    def probabilities(self) -> list[float]:
        """softmax(logits)."""
        return torch.tensor(self.logits, dtype=torch.float64).softmax(0).tolist()


class Judge:
    """A model with a head for labels, and the adapters that are put on it one after another."""

    def __init__(self, model: Any, tokenizer: Any, adapter_of: Callable[[str, int], Adapter | Baseline]) -> None:
        """Takes a base model, its tokenizer, and what returns the adapter of a run at a step (0: as saved last)."""
        self._model, self._tokenizer, self._adapter_of = model, tokenizer, adapter_of
        self._adapter: Adapter | Baseline | None = None
        self._adapted = model
        self._lock = threading.Lock()

    def answer(
        self, panes: Sequence[Pane], first: str, second: str, spec: DataSpec, max_length: int
    ) -> Iterator[Verdict]:
        """Yields what each pane gives for a text, or two, as training gave them to the model.

        Raises:
            LoRAError: There is no text, a run has no such adapter, or a pane asks for what this cannot do.
        """
        if not first.strip():
            raise LoRAError("`text` (='') must not be empty; write one, or take one of the held-out rows.")
        (found,) = tokenize_labelled([Labelled(texts_of(first, second, spec), 0.0)], self._tokenizer)
        if isinstance(found, RowError):
            raise found
        example = cut_labelled(found, max_length)
        inputs = {"input_ids": torch.tensor([list(example.input_ids)])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if example.types:
            inputs["token_type_ids"] = torch.tensor([list(example.types)])
        for pane in panes:
            with self._lock, torch.inference_mode(False), torch.no_grad():
                begin = time.perf_counter()
                with self._running(pane) as (model, engine):
                    logits = tuple(row_logits(model, inputs)[0].tolist())
                seconds = time.perf_counter() - begin
            yield Verdict(logits, engine, len(example.input_ids), example.num_cut, seconds)

    @contextmanager
    def _running(self, pane: Pane) -> Iterator[tuple[Any, str]]:
        """Yields the model as a pane has it, and what it is in words."""
        if pane.rank or pane.plus:
            raise LoRAError("`pane` must be the base or one whole adapter where a model gives labels.")
        if not pane.adapter:
            if not isinstance(self._adapter, Adapter):
                yield self._model, describe(self._model, self._model)
                return
            with strength(self._model, 0.0):  # the base's own head with it
                yield self._model, describe(self._model, self._model)
            return
        adapter = self._adapter_of(pane.adapter, pane.step)
        if isinstance(adapter, Baseline) and (pane.merged or pane.strength != 1.0):
            raise only_as_it_is(adapter, "merged" if pane.merged else f"at strength {pane.strength:g}")
        if adapter is not self._adapter:
            if isinstance(self._adapter, Adapter):
                eject(self._model)
            self._adapter = None
            self._adapted = sharing(self._model) if isinstance(adapter, Baseline) else self._model
            adapter.apply(self._adapted)
            self._adapted.eval()
            self._adapter = adapter
        if isinstance(adapter, Baseline):
            yield self._adapted, describe(self._adapted, self._model)
            return
        with strength(self._model, pane.strength):
            if pane.merged:
                merged = merged_copy(self._model)
                yield merged, describe(merged, self._model)
            else:
                yield self._model, describe(self._model, self._model)
