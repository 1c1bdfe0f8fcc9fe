"""What the Spectrum tab looks at: an adapter and what is known of it, wherever it comes from."""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor, nn

from core import Adapter, matrix_at
from studio import models
from studio.runs import Run
from studio.workspace import Workspace


@dataclass(frozen=True)
class Source:
    """Where an adapter is: in a run of the workspace, or in files.

    Attributes:
        run: The run's id; "" for files.
        step: Of a run: that of one of its checkpoints, or None for the adapter as it was last saved.
        path: Of files: a folder in PEFT's layout, or a file of loralib's.
        scaling: alpha / r of a loralib file, which does not say it.
        parts: The slices of fused projections that a loralib file has, which it does not name either.
        model: Of files: the base model, in any of the forms that `studio.models` takes; "" for the one that they name.
    """

    run: str = ""
    step: int | None = None
    path: str = ""
    scaling: float | None = None
    parts: tuple[str, ...] = ()
    model: str = ""


@dataclass(frozen=True)
class Opened:
    """An adapter to look at.

    Attributes:
        source: Where it is.
        name: What people call it.
        adapter: The adapter itself.
        model: Its base model where the weights are at hand, in a form that `studio.models` takes; else None.
        run: The run that trained it, or None.
        key: Changes with the adapter's content: what is computed of it may be kept under this key.
    """

    source: Source
    name: str
    adapter: Adapter
    model: str | None
    run: Run | None
    key: Hashable


def read_matrix(model: str, workspace: Workspace, path: str, skeleton: nn.Module | None = None) -> Tensor:
    """Returns W of one matrix of a base model, (out_features, in_features), in the type stored; read alone.

    Args:
        model: The base model, in any of the forms that `studio.models` takes.
        workspace: Where its cache lies.
        path: The matrix, as an adapter names it.
        skeleton: The model's tree of modules, where it is there already.

    Raises:
        LoRAError: There is no such matrix, or it is kept in a form that cannot be read alone.
    """
    tree = models.skeleton(model, workspace) if skeleton is None else skeleton
    holder, as_matrix = matrix_at(tree, path)
    return as_matrix(models.read_weight(model, workspace, holder))
