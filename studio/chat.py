"""Base, adapted and merged model side by side: each pane generates with what it says it runs."""

import inspect
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core import Adapter, LoRAError, lora_layers, merged_copy, strength

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
    """A base model with at most one adapter on it, and its merged twin, made when first asked for.

    The three share all weights that the adapter does not change.
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
        self._twin: nn.Module | None = None
        self._lock = threading.Lock()  # one forward at a time: strength is set on shared layers
        self._end = end_token_ids
        self._is_cpu_shared = is_cpu_shared
        self._num_threads = torch.get_num_threads()
        if adapter is not None:
            adapter.apply(model)
            model.eval()

    def answer(self, pane: str, prompt_ids: list[int], settings: ChatSettings) -> Iterator[Answer]:
        """Yields the growing answer of one pane, a token at a time; the last has `done` set.

        Raises:
            LoRAError: The pane does not exist or needs an adapter, or the prompt is empty.
        """
        if pane not in PANES:
            raise LoRAError(f"`pane` (={pane!r}) must be one of {', '.join(PANES)}.")
        if not prompt_ids:
            raise LoRAError("`prompt_ids` must hold at least one token; write a message first.")
        return self._generate(pane, prompt_ids, settings)

    def answer_all(
        self, panes: tuple[str, ...], prompt_ids: list[int], settings: ChatSettings
    ) -> Iterator[dict[str, Answer]]:
        """Yields all panes' growing answers, in step: each has one token more than the time before."""
        going = {pane: self.answer(pane, prompt_ids, settings) for pane in panes}
        answers: dict[str, Answer] = {}
        while going:
            for pane in list(going):
                answers[pane] = next(going[pane])
                if answers[pane].done:
                    del going[pane]
            yield dict(answers)

    def logits(self, pane: str, token_ids: Tensor) -> Tensor:
        """Returns the logits of one pane, (batch, seq, vocabulary), for (batch, seq) token ids."""
        model, level = self._of(pane)
        with self._lock, torch.inference_mode(), strength(model, level):
            return model(input_ids=token_ids).logits

    def _generate(self, pane: str, prompt_ids: list[int], settings: ChatSettings) -> Iterator[Answer]:
        begin = time.perf_counter()
        model, level = self._of(pane)
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(settings.seed)
        token = torch.tensor([prompt_ids], device=device)
        room = getattr(model.config, "max_position_embeddings", None) or math.inf
        if len(prompt_ids) >= room:
            raise LoRAError(f"The prompt (={len(prompt_ids)} tokens) must be shorter than the model's context, {room}.")
        num_threads = 1 if self._is_cpu_shared() else self._num_threads
        # Renamed in transformers 5.24.
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        cache = None
        said: list[int] = []
        computing, first_seconds = 0.0, 0.0
        while True:
            started = time.perf_counter()
            with self._lock, torch.inference_mode(), strength(model, level):
                torch.set_num_threads(num_threads)  # of this thread, which may be another each time
                output = model(input_ids=token, use_cache=True, **{name: cache})
                engine = describe(model, self._model)
                chosen = choose(output.logits[0, -1], settings, generator)
            cache = output[name]
            if not said:
                first_seconds = time.perf_counter() - begin
            else:
                computing += time.perf_counter() - started
            rate = len(said) / computing if computing else 0.0
            ended = chosen in self._end
            if not ended:
                said.append(chosen)
            done = ended or len(said) >= settings.max_new_tokens or len(prompt_ids) + len(said) >= room
            yield Answer(tuple(said), done, first_seconds, rate, engine)
            if done:
                return
            token = torch.tensor([[chosen]], device=device)

    def _of(self, pane: str) -> tuple[nn.Module, float]:
        """Returns the model that a pane runs and the strength at which."""
        if pane == "base":
            return self._model, 0.0
        if not lora_layers(self._model):
            raise LoRAError(
                f"`pane` (={pane!r}) must have an adapter to run; open a run that has one, or ask the base."
            )
        if pane == "adapter":
            return self._model, 1.0
        with self._lock:
            if self._twin is None:
                self._twin = merged_copy(self._model)
        return self._twin, 1.0


def describe(model: nn.Module, base: nn.Module) -> str:
    """Returns what `model` computes at this moment, read from its layers and weights.

    Args:
        model: The model that generates.
        base: The model whose weights it shares; itself, or the one that it is a merged copy of.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    layers = list(lora_layers(model).values())
    if not layers:
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
