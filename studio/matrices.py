"""The names of a model's matrices as people know them: by layer and by kind."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_QUERY = {"q_proj", "query", "q", "q_lin", "query_proj"}
_VALUE = {"v_proj", "value", "v", "v_lin", "value_proj"}

QUERY_AND_VALUE = rf"(?:.*\.)?(?:{'|'.join(sorted(_QUERY | _VALUE))})"
"""The query and value of any model as a pattern for `target_modules`."""


def layer_and_matrix(path: str) -> tuple[int, str]:
    """Returns where a module stands: its layer, and the name of its matrix inside the layer.

    The layer is the first component of `path` that is a number, the name what follows it: of
    model.layers.3.mlp.up_proj they are (3, mlp.up_proj). Without such a number, or with nothing after it, (-1, path).
    """
    _, layer, matrix = split_path(path)
    return layer, matrix


def split_path(path: str) -> tuple[str, int, str]:
    """Returns what `layer_and_matrix` does, and before it the name of the stack of layers: model.layers, or empty."""
    parts = path.split(".")
    for place, part in enumerate(parts[:-1]):
        if re.fullmatch("[0-9]{1,9}", part):
            return ".".join(parts[:place]), int(part), ".".join(parts[place + 1 :])
    return "", -1, path


@dataclass(frozen=True)
class MatrixKind:
    """All matrices of one name, over the layers; of experts, those of one stack.

    Attributes:
        name: The name inside a layer.
        shape: (out_features, in_features) of the first.
        num_layers: How many layers have it.
        form: "linear", "slice" of a fused projection, "expert" out of a stack, "embedding" or "convolution".
        num_experts: How many matrices a layer's stack of experts has at most; 1 of what is no stack.
    """

    name: str
    shape: tuple[int, int]
    num_layers: int
    form: str = "linear"
    num_experts: int = 1

    @property
    def is_attention(self) -> bool:
        """Whether it belongs to attention, going by its name."""
        return any(word in self.name.lower() for word in ("attn", "attention")) or self.leaf in _QUERY | _VALUE

    @property
    def leaf(self) -> str:
        """The last part of the name: q_proj."""
        return self.name.rpartition(".")[2]


def kinds(shapes: Mapping[str, tuple[int, int]], form: str = "linear") -> list[MatrixKind]:
    """Returns the kinds of matrices among path → shape, all of one form, in the model's order."""
    found: dict[str, tuple[tuple[int, int], Counter[str]]] = {}
    for path, shape in shapes.items():
        # An expert's number is the last part of its path.
        whole = path.rpartition(".")[0] if form == "expert" else path
        found.setdefault(layer_and_matrix(whole)[1], (shape, Counter()))[1][whole] += 1
    return [MatrixKind(name, shape, len(wholes), form, max(wholes.values())) for name, (shape, wholes) in found.items()]


def presets(found: Iterable[MatrixKind]) -> dict[str, list[str]]:
    """Returns the usual choices of matrices for a model: title → names. Those that it cannot make are absent.

    Query and value may be slices of a fused projection; the other choices take it whole.
    """
    found = list(found)
    query_value = [k.name for k in found if k.leaf in _QUERY | _VALUE]
    linear = [k for k in found if k.form in ("linear", "expert")]
    linear = [k for k in linear if k.num_layers > 1] or linear
    choices = {
        "Query and value (the paper)": query_value,
        "All attention": [k.name for k in linear if k.is_attention],
    }
    return {**{title: names for title, names in choices.items() if names}, "All linear": [k.name for k in linear]}
