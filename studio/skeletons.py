"""A model's tree of modules from its config, with the head that a task needs."""

import copy
import hashlib
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from core import LoRAError
from studio.heads import CAUSAL, Head
from studio.model_files import one_line

BUILDING = threading.RLock()
"""Held while transformers builds a model: it sets the process's default dtype and patches torch.nn.init."""

_POSITIONS = ("position_embeddings", "wpe")


def build(model: str, config: Any, head: Head | None = None) -> nn.Module:
    """Returns the tree on the meta device; `head` None gives the model its own (see `own_head`).

    Raises:
        LoRAError: The family has no such head, or transformers cannot build from the config.
    """
    head = head or own_head(config)
    config = with_head(model, copy.deepcopy(config), head)
    try:
        with BUILDING, torch.device("meta"):
            return auto_class(head).from_config(config, trust_remote_code=False)
    except Exception as error:  # each family checks its config in its own way
        raise bad_config(model, error) from error


def auto_class(head: Head) -> Any:
    """Returns transformers' class that finds the model of a family with such a head."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if head.is_of_rows else AutoModelForCausalLM


def with_head(model: str, config: Any, head: Head) -> Any:
    """Returns `config`, changed where the head needs it: the labels, their names, a padding token.

    Raises:
        LoRAError: The family has no such head, or a classifier has fewer than two labels.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if not head.is_of_rows:
        if not can_write(config):
            named = ", ".join(config.architectures or []) or config.model_type
            raise LoRAError(
                f"`model` (={model!r}) must be a language model that writes on from a text (…ForCausalLM or "
                f"…LMHeadModel) for the task causal; this one is {named}. With rows that have labels, choose the task "
                "classification or regression in the Data tab."
            )
        return config
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or config.is_encoder_decoder:
        raise LoRAError(
            f"`task` (={head.task!r}) must be causal for {model!r}: transformers has no head for labels in its family "
            f"({config.model_type})."
        )
    if head.task == "classification" and len(head.labels) < 2:
        raise LoRAError(
            f"`labels` (={', '.join(head.labels)!r}) must name at least two for the task classification; the rows' "
            "label column has them."
        )
    config.num_labels = len(head.labels) or 1
    if head.labels:
        config.id2label = dict(enumerate(head.labels))
        config.label2id = {name: number for number, name in enumerate(head.labels)}
    config.problem_type = "regression" if head.task == "regression" else "single_label_classification"
    text = config.get_text_config()
    if text.pad_token_id is None:  # without one, a decoder's head does not find where a row ends
        ends = text.eos_token_id
        text.pad_token_id = (ends[0] if isinstance(ends, list) else ends) or 0
    return config


def can_write(config: Any) -> bool:
    """Says whether a model writes on from a text, by its family and by what its config says that it is."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    named = config.architectures or []
    is_named = not named or any("CausalLM" in name or "LMHead" in name for name in named)
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder and is_named


def has_labels(config: Any) -> bool:
    """Says whether a model was saved with a head for labels."""
    return any("ForSequenceClassification" in name for name in config.architectures or [])


def own_head(config: Any) -> Head:
    """Returns the head that a model has by itself: one that writes, or its labels; an encoder without any gets two."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if can_write(config) or type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return CAUSAL
    if not has_labels(config):
        return Head("classification", ("0", "1"))
    labels = tuple(str(name) for _, name in sorted(config.id2label.items()))
    return Head("classification", labels) if len(labels) > 1 else Head("regression")


def has_head(config: Any, head: Head) -> bool:
    """Says whether a model was saved with this very head, so that its weights can begin with what it has learnt."""
    return has_labels(config) and own_head(config) == head


def head_modules(model: nn.Module) -> list[str]:
    """Returns the names of what a model with a head for labels has around its base, and which has weights."""
    base = getattr(model, "base_model", None)
    return [name for name, child in model.named_children() if child is not base and len([*child.parameters()])]


def num_positions(model: nn.Module) -> int | None:
    """Returns how many tokens a row may have where positions are learnt ones, else None."""
    for name, module in model.named_modules():
        if name.endswith(_POSITIONS) and isinstance(module, nn.Embedding):
            # RoBERTa counts from the padding's number on.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


@torch.no_grad()
def draw(model: Any, names: Iterable[str], seed: int) -> None:
    """Gives the modules of these names their start: weights normal, of the config's standard deviation, biases zero.

    It depends on the seed and the parameter's name alone, so that a run that is taken up begins with the same.
    """
    names = tuple(f"{name}." for name in names)
    spread = getattr(model.config, "initializer_range", 0.02)
    for name, p in model.named_parameters():
        if not name.startswith(names):
            continue
        if p.dim() < 2:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        chance = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        p.copy_(torch.randn(p.shape, generator=chance) * spread)


def bad_config(model: str, error: Exception) -> LoRAError:
    """Returns the refusal of a config that transformers cannot build from."""
    return LoRAError(
        f"`model` (={model!r}) must hold a config.json that transformers can build from; it refuses it "
        f"({one_line(error)}). Fetch the file again."
    )
