"""What a run of a task with labels needs beyond one that writes: its labels, its head, and how it is scored."""

from dataclasses import replace
from typing import TYPE_CHECKING

from core import LoRAError, RowLabels
from studio import label_metrics, mapping, models, skeletons
from studio.specs import RunSpec
from studio.tables import read_table
from studio.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor, nn

    from studio.tables import Table


def settled(
    spec: RunSpec, workspace: Workspace, *, table: "Table | None" = None, tree: "nn.Module | None" = None
) -> RunSpec:
    """Returns a spec that says all of its task: the labels of its rows, and the head among what is trained in full.

    One whose task is causal stays as it is, and so does one that says all of it already.

    Args:
        spec: The run.
        workspace: Where models and uploads lie.
        table: Its rows, where they were read already.
        tree: The skeleton of its model with its head, where there is one already.

    Raises:
        LoRAError: The rows have no labels, the model has no head for them, or rows may be longer than its positions.
    """
    if not spec.data.is_labelled:
        return spec
    if spec.data.task == "classification" and not spec.data.labels:
        table = table or read_table(spec.data.source, workspace, spec.data.eval_source)
        mapping.check_spec(spec.data, table)
        labels = mapping.labels_of(table, spec.data.completion)
        spec = replace(spec, data=replace(spec.data, labels=labels))
    tree = tree or models.skeleton(spec.model, workspace, spec.head, needs_weights=False)
    most = skeletons.num_positions(tree)
    if most is not None and spec.train.max_length > most:
        raise LoRAError(
            f"`max_length` (={spec.train.max_length}) must be at most {most}, the positions that {spec.model} has."
        )
    names = models.head_names(spec.model, workspace, tree)
    added = tuple(name for name in names if name not in spec.lora.modules_to_save)
    return replace(spec, lora=replace(spec.lora, modules_to_save=(*spec.lora.modules_to_save, *added)))


def row_labels(spec: RunSpec) -> RowLabels | None:
    """Returns how a run is scored; None where its labels are of tokens."""

    def measure(logits: "Tensor", labels: "Tensor") -> dict[str, float]:
        return label_metrics.scores(logits.numpy(), labels.numpy())

    return RowLabels(measure, spec.data.score) if spec.data.is_labelled else None
