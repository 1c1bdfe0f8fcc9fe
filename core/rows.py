"""Training on one label a row: the losses and the scores of a sequence classifier or regressor.

The loss is what transformers' *ForSequenceClassification take: cross-entropy of the label, or the squared error where
the label is a number.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
"""The label of a token, or of a row, that is not trained, as in torch's cross-entropy; NaN where labels are numbers."""


@dataclass(frozen=True)
class RowLabels:
    """Says that a batch has one label a row, (batch), and how a model is scored on held-out rows.

    Labels are int64 from 0, of a model that gives logits (batch, num_labels), or float32, of one that gives (batch, 1).

    Attributes:
        measure: From logits (num_rows, num_labels) and labels (num_rows) of all held-out rows, on the CPU, name →
            score.
        metric: The score by which evaluations are compared, the larger the better; "" compares their losses.
    """

    measure: Callable[[Tensor, Tensor], Mapping[str, float]]
    metric: str = ""


def is_trained(labels: Tensor) -> Tensor:
    """Returns where a loss is taken, bool: (batch, seq − 1) for labels of tokens, (batch) for labels of rows."""
    if labels.dim() == 2:
        return labels[:, 1:] != IGNORED
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED


def untrained(labels: Tensor) -> Tensor:
    """Returns labels like these of which none is trained."""
    return torch.full_like(labels, math.nan if labels.is_floating_point() else IGNORED)


def row_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns the logits of a batch's rows, (batch, num_labels), float32, on the model's device."""
    device = next(model.parameters()).device
    inputs = {key: value.to(device, non_blocking=True) for key, value in batch.items() if key != "labels"}
    output = model(**inputs)
    return getattr(output, "logits", output).float()


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of each row that has a label, (num_trained), float32.

    That is −log softmax(logits)[label], in nats, or (logit − label)² where labels are numbers.
    """
    labels = labels.to(logits.device, non_blocking=True)
    trained = is_trained(labels)
    if labels.is_floating_point():
        return F.mse_loss(logits[trained].squeeze(-1), labels[trained].float(), reduction="none")
    return F.cross_entropy(logits[trained], labels[trained], reduction="none")
