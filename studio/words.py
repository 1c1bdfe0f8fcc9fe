"""Directions of ΔW in words: which tokens what it reads lies towards, and which tokens what it writes speaks for.

A matrix that reads the residual stream has its right directions in the space of the embeddings; of one that writes to
it the left directions are logits, once they have passed the final norm and the unembedding (the "logit lens"). Inner
dimensions, of a head or an MLP, have no words.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core import Factors, LoRAError
from studio import models
from studio.rendering import end_tokens
from studio.workspace import Workspace

_READS = {"q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin", "query_proj", "key_proj"}
_READS |= {"value_proj", "qkv_proj", "qkv", "query_key_value", "Wqkv", "W_pack", "c_attn", "gate_proj", "up_proj"}
_READS |= {"gate_up_proj", "c_fc", "fc1", "fc_in", "w1", "w3", "dense_h_to_4h", "lin1"}
_WRITES = {"o_proj", "out_proj", "c_proj", "down_proj", "fc2", "fc_out", "w2", "dense_4h_to_h", "lin2", "out_lin"}

_CHUNK = 8192  # tokens at a time: a vocabulary in float32 may be larger than the model
_NUM_RANDOM = 16


@dataclass(frozen=True)
class Vocabulary:
    """A vector for each token, and what is taken off before a direction is held against them.

    Attributes:
        vectors: (vocab_size, dim), as the model stores them.
        mean: (dim), of all tokens; what all logits share changes nothing. Zero where tokens are read.
        lengths: (vocab_size), the lengths of the vectors less `mean`.
    """

    vectors: Tensor
    mean: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, vectors: Tensor, *, centred: bool) -> "Vocabulary":
        """Measures the vectors; those of logits are centred."""
        mean = torch.zeros(vectors.shape[1])
        if centred:
            mean = torch.stack([part.float().sum(0) for part in vectors.split(_CHUNK)]).sum(0) / len(vectors)
        lengths = [torch.linalg.vector_norm(part.float() - mean, dim=1) for part in vectors.split(_CHUNK)]
        return cls(vectors, mean, torch.cat(lengths).clamp_min(1e-12))

    def cosines(self, directions: Tensor) -> Tensor:
        """Returns the cosine of each token's vector with each of the directions, (dim, k): (vocab_size, k)."""
        unit = directions.float() / torch.linalg.vector_norm(directions.float(), dim=0).clamp_min(1e-12)
        found = [part.float() @ unit for part in self.vectors.split(_CHUNK)]
        return (torch.cat(found) - self.mean @ unit) / self.lengths[:, None]

    def chance(self) -> float:
        """Returns the largest cosine that a random direction has with any token: the median over some."""
        generator = torch.Generator().manual_seed(0)
        found = self.cosines(torch.randn(self.vectors.shape[1], _NUM_RANDOM, generator=generator))
        return float(found.max(0).values.median())


def reason_against(tree: nn.Module, path: str, factors: Factors, side: str) -> str:
    """Returns why the directions of one side of a matrix have no words; "" where they have.

    Args:
        tree: The base model's modules.
        path: The matrix.
        factors: Its ΔW.
        side: "reads" or "writes".
    """
    out, width = factors.shape
    size = width if side == "reads" else out
    names = _leaves(path, factors)
    known, other = (_READS, _WRITES) if side == "reads" else (_WRITES, _READS)
    if factors.layout.form not in ("linear", "slice", "expert"):
        return f"This is no linear layer ({factors.layout.form}), so the {size:,} numbers that it {side} are no stream."
    if names & other and not names & known:
        inner = "of its heads or inner activations"
        return f"It {side} {size:,} numbers {inner}, not the residual stream: they have no words."
    if not names & known:
        return f"It is not known by its name whether it {side} the residual stream, so words might mislead."
    layer = _embeddings(tree, side)
    if layer is None:
        return "The model has no embeddings that words could be taken from."
    if layer[1] != size:
        return f"It {side} {size:,} numbers, and the model's embeddings have {layer[1]:,}: they have no words."
    return ""


def vocabulary(tree: nn.Module, model: str, workspace: Workspace, side: str) -> Vocabulary:
    """Returns the vectors of all tokens: as they are read (embeddings), or written (unembedding).

    Raises:
        LoRAError: The model has none, or they cannot be read.
    """
    layer = _embeddings(tree, side)
    if layer is None:
        raise LoRAError(f"`model` (={model!r}) must have embeddings for its directions to have words.")
    return Vocabulary.of(models.read_weight(model, workspace, layer[0]), centred=side == "writes")


@torch.no_grad()
def through_final_norm(tree: nn.Module, model: str, workspace: Workspace, directions: Tensor) -> Tensor:
    """Returns what the model's final norm makes of directions, (dim, k), beyond what it makes of nothing.

    Raises:
        LoRAError: Its weights cannot be read.
    """
    path = _final_norm(tree)
    if path is None:
        return directions
    norm = copy.deepcopy(tree.get_submodule(path)).to_empty(device="cpu").float()
    for name, p in norm.named_parameters():
        p.copy_(models.read_weight(model, workspace, path if name == "weight" else f"{path}.{name}"))
    rows = directions.float().T * math.sqrt(directions.shape[0])  # of the size at which a norm leaves them
    return (norm(rows) - norm(torch.zeros_like(rows))).T


def shown(tokenizer: Any, token_id: int) -> tuple[str, str]:
    """Returns a token as text in which all that cannot be seen is visible, and its kind: "", "special" or "bytes"."""
    special = end_tokens(tokenizer)
    if token_id in special:
        return special[token_id], "special"
    text = str(tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if not text or "�" in text:  # part of a letter
        raw = tokenizer.convert_ids_to_tokens(token_id)
        return _visible(str(raw) if raw is not None else f"#{token_id}"), "bytes"
    return _visible(text), ""


def _visible(text: str) -> str:
    marks = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(marks.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


def _leaves(path: str, factors: Factors) -> set[str]:
    parts = path.split(".")
    if factors.layout.form in ("slice", "expert"):
        return set(parts[-2:])
    return {parts[-1]}


def _embeddings(tree: Any, side: str) -> tuple[str, int] | None:
    """Returns the path and the width of the embeddings, or of the unembedding."""
    get = getattr(tree, "get_input_embeddings" if side == "reads" else "get_output_embeddings", None)
    layer = get() if get is not None else None
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return next((name, weight.shape[1]) for name, module in tree.named_modules() if module is layer)


def _final_norm(tree: Any) -> str | None:
    """Returns the path of the norm after all blocks: the last child of the base model that is one."""
    base = getattr(tree, "base_model", tree)
    norms = [child for child in base.children() if "norm" in type(child).__name__.lower() and [*child.parameters()]]
    return next((name for name, module in tree.named_modules() if norms and module is norms[-1]), None)
