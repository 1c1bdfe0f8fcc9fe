"""Proof that a merge kept the function: the merged model beside the unmerged one, and both beside the base.

W0 + ΔW computes what W0 and ΔW compute apart (Hu et al. 2021, arXiv:2106.09685, §4.1), up to the rounding of the sum to
the weight's type. A merge that did nothing, took another scaling, or left a matrix out does not; logits alone can hide
that where ΔW is small beside the rounding, so the weights are looked at, too.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.errors import LoRAError, listed
from core.inject import merged_copy, strength, trained_in_full
from core.layers import LoRALayer
from core.targets import lora_layers, matrix_at

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""By the weights' type, how far merged and unmerged logits may lie apart, relative to the norm of the unmerged ones."""


@dataclass(frozen=True)
class Certificate:
    """What a merge did to the model's function.

    Attributes:
        dtype: Type of the merged weights, as torch names it.
        num_rows: Rows of tokens that went through the models.
        num_tokens: In all of them.
        max_logit_difference: Largest |merged − unmerged| of all logits.
        logit_error: ‖merged − unmerged‖ / ‖unmerged‖ over all logits.
        bound: What `logit_error` must not exceed.
        mean_kl: KL(unmerged ‖ merged) of the next token, in nats, mean over all tokens.
        top1_agreement: Share of tokens after which both find the same next token likeliest.
        effect: ‖unmerged − base‖ / ‖base‖ over all logits: what the adapter does.
        merged_effect: ‖merged − base‖ / ‖base‖: what the merged model does.
        num_matrices: How many the adapter changes.
        wrong_matrices: Those that are not W0 + ΔW up to the rounding of their type, and parameters trained in full that
            are not there.
        is_restored: Whether unmerging gives every W0 back bit for bit; None where nothing was merged here.
    """

    dtype: str
    num_rows: int
    num_tokens: int
    max_logit_difference: float
    logit_error: float
    bound: float
    mean_kl: float
    top1_agreement: float
    effect: float
    merged_effect: float
    num_matrices: int
    wrong_matrices: tuple[str, ...]
    is_restored: bool | None

    @property
    def problems(self) -> tuple[str, ...]:
        """What speaks against the merge, a sentence each; none where all is well."""
        found = []
        if self.effect == 0.0:
            found.append("The adapter changes nothing: its logits are those of the base. Was it trained?")
        elif self.merged_effect == 0.0:
            found.append("The merge did nothing: the merged logits are those of the base.")
        if self.wrong_matrices:
            found.append(
                f"{len(self.wrong_matrices)} of {self.num_matrices} matrices are not W₀ + ΔW: "
                f"{listed(list(self.wrong_matrices))}."
            )
        if not self.logit_error <= self.bound:  # NaN is no agreement
            found.append(
                f"Merged and unmerged logits differ by {self.logit_error:.2g} of their norm; "
                f"in {self.dtype} at most {self.bound:g} is rounding."
            )
        if self.is_restored is False:
            found.append("Unmerging did not give every W₀ back bit for bit.")
        return tuple(found)


def certify(model: nn.Module, rows: Iterable[Tensor], *, merged: nn.Module | None = None) -> Certificate:
    """Returns what merging does to `model`'s function, tried on `rows` of tokens.

    Args:
        model: Adapted and unmerged; it is left as it is, but each matrix is merged and unmerged once.
        rows: Token ids, (seq) each, on any device; each goes through alone.
        merged: The model to compare, such as one that was exported and opened again, without LoRA layers; by default
            one that is merged here.

    Raises:
        LoRAError: `model` is not adapted or is merged, or there are no rows.
    """
    layers = lora_layers(model)
    if not layers or any(layer.merged for layer in layers.values()):
        raise LoRAError("`model` must be adapted and unmerged to be certified; call inject, or unmerge(model).")
    rows = list(rows)
    if not rows or not all(row.dim() == 1 and len(row) for row in rows):
        raise LoRAError("`rows` must hold at least one row of token ids, (seq) each; give some text of the task.")
    twin = merged_copy(model) if merged is None else merged
    wrong = _wrong_matrices(model, layers, twin)
    restored = all(map(_is_restored, layers.values())) if merged is None else None
    sums = _Sums()
    for row in rows:
        ids = row[None]
        unmerged = _logits(model, ids)
        with strength(model, 0.0):
            base = _logits(model, ids)
        sums.add(base, unmerged, _logits(twin, ids))
    dtype = next(p.dtype for p in twin.parameters() if p.is_floating_point())
    return Certificate(
        dtype=str(dtype).removeprefix("torch."),
        num_rows=len(rows),
        num_tokens=sums.num_tokens,
        max_logit_difference=sums.largest,
        logit_error=math.sqrt(sums.error / sums.unmerged) if sums.unmerged else 0.0,
        bound=BOUNDS.get(dtype, BOUNDS[torch.bfloat16]),
        mean_kl=sums.kl / sums.num_tokens,
        top1_agreement=sums.agreed / sums.num_tokens,
        effect=math.sqrt(sums.effect / sums.base) if sums.base else 0.0,
        merged_effect=math.sqrt(sums.merged_effect / sums.base) if sums.base else 0.0,
        num_matrices=len(layers),
        wrong_matrices=wrong,
        is_restored=restored,
    )


class _Sums:
    """Over all logits so far, in float64."""

    def __init__(self) -> None:
        self.error = self.unmerged = self.base = self.effect = self.merged_effect = self.kl = self.largest = 0.0
        self.num_tokens = self.agreed = 0

    def add(self, base: Tensor, unmerged: Tensor, merged: Tensor) -> None:
        """Adds the logits, (seq, vocabulary), of one row."""
        difference = (merged - unmerged).abs()
        self.largest = max(self.largest, float(difference.max()))
        self.error += _square(difference)
        self.unmerged, self.base = self.unmerged + _square(unmerged), self.base + _square(base)
        self.effect += _square(unmerged - base)
        self.merged_effect += _square(merged - base)
        p, q = (torch.log_softmax(logits.double(), -1) for logits in (unmerged, merged))
        self.kl += float((p.exp() * (p - q)).sum())
        self.agreed += int((unmerged.argmax(-1) == merged.argmax(-1)).sum())
        self.num_tokens += len(base)


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


@torch.inference_mode()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns (seq, vocabulary), or (1, labels) of a classifier, in float32 or better, on the CPU."""
    output = model(input_ids=ids.to(next(model.parameters()).device))
    logits = getattr(output, "logits", output)[0].cpu()
    return logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def _wrong_matrices(model: nn.Module, layers: dict[str, LoRALayer], merged: nn.Module) -> tuple[str, ...]:
    wrong = [path for path, layer in layers.items() if not _is_sum(layer, _matrix(merged, path))]
    there = dict(merged.named_parameters(remove_duplicate=False))
    for name, trained in trained_in_full(model).items():
        found = there.get(name)
        if found is None or not torch.equal(found.cpu(), trained.detach().to(found.dtype).cpu()):
            wrong.append(name)
    return tuple(wrong)


def _matrix(model: nn.Module, path: str) -> Tensor | None:
    try:
        holder, take = matrix_at(model, path)
        above, _, name = holder.rpartition(".")
        found = getattr(model.get_submodule(above), name)
    except (LoRAError, AttributeError):
        return None
    return take(found if isinstance(found, Tensor) else found.weight).detach()


def _is_sum(layer: LoRALayer, found: Tensor | None) -> bool:
    """Says whether a merged matrix is W0 + strength · ΔW, up to the rounding of its type."""
    wanted = layer.weight_matrix()
    if found is None or found.shape != wanted.shape or not found.is_floating_point():
        return False
    exact = torch.promote_types(wanted.dtype, torch.float32)
    wanted = wanted.to(exact) + layer.strength * layer.delta_weight().to(exact)
    error = (found.to(wanted) - wanted).abs_()
    # One rounding of the sum to its type, and those of the sum itself; entries near zero are sums of larger ones.
    allowed = (
        wanted.abs().mul_(torch.finfo(found.dtype).eps).add_(4 * torch.finfo(exact).eps * float(wanted.abs().max()))
    )
    return bool((error <= allowed).all())


def _is_restored(layer: LoRALayer) -> bool:
    """Says whether the layer, merged and unmerged, has the very W0 back that it had."""
    before = layer.weight_matrix().clone()
    layer.merge()
    layer.unmerge()
    return torch.equal(before, layer.weight_matrix())
