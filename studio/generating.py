"""Answers for evaluation: how they are generated, in batches, by greedy or beam search."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core import Config, LoRAError, setting
from studio.metrics import TASKS

ROWS = 32
"""Rows that go through the model at once, the beams of all prompts together."""


@dataclass(frozen=True)
class EvaluationSpec(Config):
    """Whether answers are generated and measured beside the held-out loss, and how."""

    evaluation_task: str = setting(
        "none",
        "Measure answers",
        "Generates answers to held-out prompts and measures them. data_to_text: BLEU, NIST, METEOR, ROUGE-L, CIDEr. "
        "text_to_sql: logical form. summary: ROUGE-1, 2 and L. exact: the very words.",
        choices=("none", *TASKS),
        why="LoRA paper, §5.4; LoRA paper, §5.5",
    )
    evaluation_at: str = setting(
        "end",
        "When",
        "end: after the last step; the best step goes by the loss. each: at each evaluation; the best step, and an "
        "early stop, then go by the task's first metric.",
        choices=("end", "each"),
    )
    evaluation_prompts: int = setting(
        50,
        "Prompts",
        "The first so many distinct prompts of the held-out rows; of rows with one prompt, all completions are its "
        "references. Usually 50 to 500: fewer are rough, more take longer.",
        minimum=1,
        maximum=100_000,
    )
    longest_answer: int = setting(
        96,
        "Longest answer",
        "In tokens; usually 32 to 256. Too short cuts answers off; longer takes more time.",
        minimum=1,
        maximum=100_000,
    )
    beams: int = setting(
        1,
        "Beams",
        "1 takes the likeliest token each time; the paper searches with 10. More take longer.",
        minimum=1,
        maximum=64,
        why="LoRA paper, app. D",
    )
    length_penalty: float = setting(
        1.0,
        "Length penalty",
        "A beam's log-probability is divided by its length to this power: above 1 favours long answers. The paper has "
        "0.9 for E2E, 0.8 for WebNLG and DART.",
        minimum=-10,
        maximum=10,
        advanced=True,
        why="LoRA paper, app. D",
    )
    no_repeat: int = setting(
        0,
        "No repeats of",
        "No run of so many tokens comes twice in an answer; the paper has 4. Too small forbids common words; 0 allows "
        "any.",
        minimum=0,
        maximum=100,
        advanced=True,
        why="LoRA paper, app. D",
    )

    @property
    def is_on(self) -> bool:
        """Whether anything is to be measured."""
        return self.evaluation_task != "none"


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    spec: EvaluationSpec,
    *,
    end_token_ids: Sequence[int],
    pad_token_id: int,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[dict[int, list[int]]]:
    """Yields, batch by batch, place in `prompts` → the answer's tokens, without the end token.

    Nothing is drawn at random: the same model gives the same answers. What had not ended when it was stopped is left
    out. Prompts of like length share a batch.

    Args:
        model: Of transformers, adapted or not; in eval mode.
        prompts: Token ids.
        spec: How far and how.
        end_token_ids: Tokens that end an answer.
        pad_token_id: What shorter prompts are filled up with.
        is_stopped: Asked after each token.

    Raises:
        LoRAError: A prompt leaves no room for an answer in the model's context.
    """
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    size = max(1, ROWS // spec.beams)
    for begin in range(0, len(order), size):
        places = order[begin : begin + size]
        width = max(len(prompts[place]) for place in places)
        padded = [(width - len(prompts[place])) * [pad_token_id] + prompts[place] for place in places]
        mask = [(width - len(prompts[place])) * [0] + len(prompts[place]) * [1] for place in places]
        device = next(model.parameters()).device
        found = model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=_config(model, spec, _room(model, width, spec), end_token_ids, pad_token_id),
            logits_processor=[_NoRepeat(spec.no_repeat, width)] if spec.no_repeat else [],
            stopping_criteria=[lambda ids, _, **rest: torch.full((len(ids),), is_stopped(), device=ids.device)],
        )
        if is_stopped():
            return
        ends = set(end_token_ids)
        answers = [ids[width:] for ids in found.tolist()]
        yield {
            place: answer[: next((i for i, token in enumerate(answer) if token in ends), len(answer))]
            for place, answer in zip(places, answers, strict=True)
        }


def _room(model: Any, width: int, spec: EvaluationSpec) -> int:
    """Returns how long an answer to a prompt of `width` tokens may become."""
    room = getattr(model.config, "max_position_embeddings", None) or width + spec.longest_answer
    if width >= room:
        raise LoRAError(f"A held-out prompt (={width:,} tokens) must be shorter than the model's context of {room:,}.")
    return min(spec.longest_answer, room - width)


def _config(model: Any, spec: EvaluationSpec, num_new: int, end_token_ids: Sequence[int], pad_token_id: int) -> Any:
    """Returns how transformers is to search; what a model's own settings would draw or forbid counts for nothing."""
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    beams: dict[str, Any] = {"length_penalty": spec.length_penalty, "early_stopping": False} if spec.beams > 1 else {}
    return type(model.generation_config)(
        max_new_tokens=num_new,
        do_sample=False,
        num_beams=spec.beams,
        use_cache=True,
        eos_token_id=sorted(end_token_ids),
        pad_token_id=pad_token_id,
        **plain,
        **beams,
    )


class _NoRepeat:
    """Forbids a token that would end a run of `n` that the answer has already; the prompt's runs may be said again.

    transformers' own counts the prompt's, too, and so would keep an answer from a name of the prompt.
    """

    def __init__(self, n: int, width: int) -> None:
        self._n, self._width = n, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = input_ids[:, self._width :]
        num_runs = said.shape[1] - self._n + 1
        if num_runs < 1:
            return scores
        runs = said.unfold(1, self._n, 1)  # (rows, num_runs, n)
        last = said[:, said.shape[1] - self._n + 1 :]
        rows, places = (runs[..., :-1] == last[:, None]).all(-1).nonzero(as_tuple=True)
        scores = scores.clone()
        scores[rows, runs[rows, places, -1]] = -torch.inf
        return scores
