"""Where the methods take hold of a model: by the names of its parts and where they stand, whatever its code."""

import re
from collections.abc import Iterable

from torch import nn

from core.blocks import block_lists
from core.errors import LoRAError, listed
from core.method import MethodConfig

_ATTENTION = r"(self_attn|attn|attention|self_attention)\.(o_proj|out_proj|c_proj|dense|Wo|out_lin|output\.dense)"
_MLP = r"((mlp|ffn)\.)?(down_proj|c_proj|fc2|fc_out|w2|lin2|dense_4h_to_h|Wo|output\.dense)"


def layers_of(model: nn.Module, method: MethodConfig) -> list[str]:
    """Returns the paths of the layers of a model that has one stack of them.

    Raises:
        LoRAError: It has none, or several, as encoder and decoder.
    """
    stacks = list(block_lists(model))
    if len(stacks) != 1:
        raise LoRAError(
            f"`method` (={method.method!r}) must be used on a model with one stack of layers; this one has "
            f"{len(stacks)}. Choose lora."
        )
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(layer)] for layer in stacks[0]]


def projections(model: nn.Module, method: MethodConfig) -> list[tuple[str, str]]:
    """Returns for each layer the paths of the matrices with which its attention and its MLP end.

    Raises:
        LoRAError: Some layer has no such matrix, or several: experts, say.
    """
    found, problems = [], []
    for path in layers_of(model, method):
        inside = dict(model.get_submodule(path).named_modules())
        ends = [[f"{path}.{name}" for name in inside if re.fullmatch(rule, name)] for rule in (_ATTENTION, _MLP)]
        if all(len(each) == 1 for each in ends):
            found.append((ends[0][0], ends[1][0]))
        else:
            problems.append(f"{path} has {len(ends[0])} ends of attention and {len(ends[1])} of an MLP")
    if problems:
        raise LoRAError(
            f"`method` (={method.method!r}) must find one matrix at the end of each attention and one of each MLP, by "
            f"names such as o_proj and down_proj: {listed(problems)}. Choose lora, or another model."
        )
    return found


def head_of(model: nn.Module) -> list[str]:
    """Returns the names of the parts of a model beside that which holds its layers: its head, on top of it.

    Raises:
        LoRAError: There is none, or it shares its weight with the embedding.
    """
    parts = dict(model.named_children())
    has_layers = {name: bool(list(block_lists(part))) for name, part in parts.items()}
    heads = [n for n, part in parts.items() if not has_layers[n] and next(part.parameters(), None) is not None]
    if not any(has_layers.values()) or not heads:
        raise LoRAError(
            f"`method` (='head') must find a head beside the layers; this model's parts are "
            f"{', '.join(parts) or 'none'}. Name it by modules_to_save."
        )
    below = {id(p) for name, part in parts.items() if name not in heads for p in part.parameters()}
    tied = [name for name in heads if any(id(p) in below for p in parts[name].parameters())]
    if tied:
        raise LoRAError(
            f"`method` (='head') must not train {', '.join(tied)}, which shares its weight with the embedding: all of "
            "that would be trained, too. Choose last_layers, or a model whose head is its own."
        )
    return heads


def biases_of(model: nn.Module) -> list[str]:
    """Returns the names of all biases.

    Raises:
        LoRAError: There are none.
    """
    names = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not names:
        raise LoRAError(
            "`method` (='bitfit') must be used on a model that has biases; this one has none, as Llama's kind. "
            "Choose another method, or another model."
        )
    return names


def embedding_of(model: nn.Module, method: MethodConfig) -> str:
    """Returns the path of the embedding of tokens in a model that predicts tokens.

    Raises:
        LoRAError: The model says of none that it is that, or predicts no tokens.
    """
    path = _said(model, "get_input_embeddings", nn.Embedding)
    if path is None or _said(model, "get_output_embeddings", nn.Module) is None:
        raise LoRAError(
            f"`method` (={method.method!r}) must be used on a causal language model, as in the paper, which says "
            "which embedding its tokens have, and which head. Choose another method."
        )
    return path


def _said(model: nn.Module, question: str, kind: type[nn.Module]) -> str | None:
    """Returns the path of what a model answers to a question of transformers', None where it is not of that kind."""
    ask = getattr(model, question, None)
    try:
        answer = ask() if callable(ask) else None
    except NotImplementedError:  # how a family that has no such module answers
        answer = None
    if not isinstance(answer, kind):
        return None
    return next((path for path, module in model.named_modules() if module is answer), None)


def inside(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Returns the names of all parameters of the modules at these paths."""
    return [f"{path}.{name}" for path in paths for name, _ in model.get_submodule(path).named_parameters()]
