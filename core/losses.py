"""The loss of a language model on the tokens that are trained: of nothing else are logits made, and of no padding.

Where the model allows it, a batch goes through it as one row without padding or repetition, and the loss is taken
from the hidden states without holding the logits. Whether it does is tried out on the model itself, on a few tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from core.attention import Segments, SegmentsError
from core.baselines.parts import special_tokens_of
from core.blocks import block_lists, with_first
from core.fusion import Fusion, linear_of
from core.kernels import linear_cross_entropy
from core.prefix import Prefix
from core.rows import IGNORED, row_logits, row_losses

Batch = Mapping[str, Tensor]


class Way(NamedTuple):
    """How a batch goes through a model.

    Attributes:
        packs: As one row, its rows one after the other, each seeing itself alone, and what they have in common at
            their beginnings once; for a model whose attention takes `segments` (see `core.attention`). Of dropout, the
            rows draw what they have in common together.
        skips_head: Up to the output head, whose logits are made and used piece by piece.
    """

    packs: bool = False
    skips_head: bool = False


class Losses(nn.Module):
    """`token_losses` of a model, by the fastest way that gives the same, or `row_losses`; a module, which DDP can wrap.

    Attributes:
        model: The model.
        fusion: To be entered for as long as a loss is computed and its gradient taken.
        way: How; the plain one until `choose` was called.
        prefix: The frozen layers that a row passes once; None where each batch goes through all.
    """

    def __init__(self, model: nn.Module, prefix: str = "off", *, per_row: bool = False) -> None:
        """Takes an adapted model.

        Args:
            model: The model.
            prefix: Whether what the layers below the first adapted one give is kept: "off", "memory" or "disk".
            per_row: Whether labels are of rows, which go through the model as they come.
        """
        super().__init__()
        self.model, self.fusion, self.way, self.per_row = model, Fusion(model), Way(), per_row
        self.prefix: Prefix | None = None
        self._wants_prefix = prefix

    def forward(self, batch: Batch) -> Tensor:
        """Returns what `token_losses` does, or `row_losses`."""
        if self.per_row:
            return row_losses(row_logits(self.model, batch), batch["labels"])
        try:
            return token_losses(self.model, batch, self.way, self.prefix)
        except SegmentsError:  # of rows longer than those tried: what they may see ends somewhere
            self.way = self.way._replace(packs=False)
            return token_losses(self.model, batch, self.way, self.prefix)

    @torch.no_grad()
    def choose(self) -> None:
        """Tries on a few tokens what the model allows, in eval mode, in which it is left."""
        self.model.eval()
        if self.per_row:
            return
        ids = torch.tensor([[1, 0, 1, 1, 0], [1, 0, 0, 1, 0], [0, 1, 1, 0, 0]])  # the first two begin alike
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}
        small = _shallow(self.model)
        self.way = (self if small is None else Losses(small))._agreeing(batch)
        if self._wants_prefix != "off":
            self._try_prefix(batch)

    def _agreeing(self, batch: Batch) -> Way:
        """Returns the fastest way that gives for `batch` what the plain one does."""
        with self.fusion:
            expected = self._tried(batch, Way())
            if expected is None:  # the model wants other things than a decoder does
                return Way()
            ways = [Way(packs, True) for packs in (True, False) if _gives_its_head_s_logits(self.model, batch)]
            agreeing = (way for way in (*ways, Way(packs=True)) if self._agrees(self._tried(batch, way), expected))
            return next(agreeing, Way())

    def _try_prefix(self, batch: Batch) -> None:
        with self.fusion:
            expected = self._tried(batch, self.way)
            prefix = Prefix(self.model, on_disk=self._wants_prefix == "disk")
            agrees = prefix.num_layers > 0 and self._agrees(self._tried(batch, self.way, prefix), expected)
            device = next(self.model.parameters()).device
            if agrees and prefix.is_constant(batch["input_ids"][0].to(device)):
                self.prefix = prefix
            else:
                prefix.close()

    def close(self) -> None:
        """Frees what was kept of the rows."""
        if self.prefix is not None:
            self.prefix.close()
            self.prefix = None

    def _tried(self, batch: Batch, way: Way, prefix: Prefix | None = None) -> Tensor | None:
        try:
            return token_losses(self.model, batch, way, prefix)
        except (TypeError, ValueError, RuntimeError, LookupError):  # the model's code takes no such arguments
            return None

    def _agrees(self, found: Tensor | None, expected: Tensor | None) -> bool:
        if found is None or expected is None:
            return False
        parameters = list(self.model.parameters())
        dtype = next((p.dtype for p in parameters if not p.requires_grad), parameters[0].dtype)
        return torch.allclose(found, expected, rtol=1e-4 if dtype == torch.float32 else 3e-2, atol=1e-5)


def _shallow(model: nn.Module) -> nn.Module | None:
    """Returns a copy of a model in float32 with the first two of its blocks; None where none is needed, or to be had.

    Two ways that differ only in rounding come out of many blocks in half precision farther apart than a fault would be.
    """
    parameters = list(model.parameters())
    is_exact = all(p.dtype == torch.float32 for p in parameters)
    if is_exact or any(not p.is_floating_point() or isinstance(p, DTensor) for p in parameters):
        return None
    return with_first(model, block_lists(model), 2).float()


def token_losses(
    model: nn.Module,
    batch: Batch,
    way: Way = Way(),  # noqa: B008 (it is immutable)
    prefix: Prefix | None = None,
) -> Tensor:
    """Returns the cross-entropy of each trained token of `batch`, (num_trained_tokens), float32, in nats.

    Token t + 1 is predicted from the tokens up to t. Only positions that predict a trained token
    go through the output head: its logits are the largest tensor of a step.

    A batch that lies on the CPU is prepared there, so that a GPU is never waited for. Tokens that the model was given
    by prefix tuning are put into the rows here.
    """
    device = next(model.parameters()).device
    special = special_tokens_of(model)
    batch = batch if special is None else special.within(batch)
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"][:, 1:]
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    targets = labels[rows, columns]
    lengths = _lengths(inputs)
    seq = batch["labels"].shape[1]
    positions = rows * seq + columns
    segments = _segments(inputs, lengths) if way.packs and lengths is not None else None
    hidden = None
    if prefix is not None and lengths is not None:
        kept = prefix.of([row[:n].cpu() for row, n in zip(inputs["input_ids"], lengths, strict=True)], device)
        hidden = torch.stack([F.pad(h, (0, 0, 0, seq - len(h))) for h in kept])
    if segments is not None:
        positions = segments.places[rows, columns]
        inputs = {key: _together(value, segments) for key, value in inputs.items()}
        inputs |= {"position_ids": segments.depths[None], "segments": segments}
        hidden = None if hidden is None else _together(hidden, segments.to(device))
    inputs = {key: _to(value, device) for key, value in inputs.items()}
    positions, targets = _to(positions, device), _to(targets, device)
    with nullcontext() if prefix is None or hidden is None else prefix.skipped(hidden):
        return losses_at(model, inputs, positions, targets, way)


def losses_at(model: nn.Module, inputs: Mapping[str, Any], positions: Tensor, targets: Tensor, way: Way) -> Tensor:
    """Returns the cross-entropy of what a model predicts at some positions, (positions), float32, in nats.

    Args:
        model: The model.
        inputs: What it is called with, on its device.
        positions: (positions) int64, of all rows as one.
        targets: (positions) int64, the tokens that come next.
        way: Of it, whether the head is skipped.
    """
    with _at_head(model, positions, skips=way.skips_head) as head:
        output = model(**inputs)
    found = getattr(output, "logits", output).flatten(0, 1)
    found = found if head is not None else found[positions]
    if way.skips_head and head is not None and (layer := linear_of(head)) is not None:
        return linear_cross_entropy(found, layer.W, layer.bias, targets)
    return F.cross_entropy(found.float(), targets, reduction="none")


def _to(value: Any, device: torch.device) -> Any:
    """Returns a tensor, or segments, on `device`; a GPU fetches it from pinned memory while the CPU goes on."""
    if isinstance(value, Segments):
        return value.to(device)
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def _lengths(inputs: Batch) -> Tensor | None:
    """Returns the rows' lengths; None where nobody says them, or padding stands anywhere but at the right."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or not bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return None
    lengths = mask.sum(1)
    return lengths if bool(lengths.all()) else None


def _segments(inputs: Batch, lengths: Tensor) -> Segments | None:
    """Returns how the rows lie one after the other; None where that leaves out nothing."""
    ids = inputs["input_ids"].cpu()
    segments = Segments(ids, lengths.cpu(), may_share=inputs.keys() <= {"input_ids", "attention_mask"})
    return segments if segments.num_tokens < ids.numel() else None


def _together(value: Tensor, segments: Segments) -> Tensor:
    """Returns (rows, seq, …) as (1, num_tokens, …)."""
    rows, longest = segments.places.shape
    return value[:rows, :longest].flatten(0, 1)[segments.firsts].unsqueeze(0)


def _head_of(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return head if isinstance(head, nn.Module) else None


@contextmanager
def _at_head(model: nn.Module, positions: Tensor, *, skips: bool) -> Iterator[nn.Module | None]:
    """Lets the output head see only these positions, of all rows as one, or gives them as they are; yields the head.

    The head is asked from the model by `get_output_embeddings()`; a model that does not have it
    gives all its logits.
    """
    head: Any = _head_of(model)
    if head is None:
        yield None
        return

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]  # (batch, seq, hidden) -> (1, num_trained_tokens, hidden)
        return (hidden.flatten(0, 1)[positions].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    own = vars(head).get("forward")
    try:
        if skips:
            head.forward = lambda hidden: hidden
        yield head
    finally:
        handle.remove()
        if own is not None:
            head.forward = own
        elif skips:
            del head.forward


def _gives_its_head_s_logits(model: nn.Module, batch: Batch) -> bool:
    """Says whether the model's logits are its head's own, not scaled nor capped, and the head is plain and frozen."""
    device = next(model.parameters()).device
    given, seen = of_head(model, {key: value.to(device) for key, value in batch.items() if key != "labels"})
    return seen is not None and seen.shape == given.shape and bool(torch.equal(seen.float(), given.float()))


def of_head(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Returns a model's logits, and what its head gave; None where the head is none that `skips_head` can skip."""
    head = _head_of(model)
    is_plain = head is not None and linear_of(head) is not None and not hasattr(head, "lora_A")
    seen: list[Any] = []
    handle = head.register_forward_hook(lambda _, __, output: seen.append(output)) if head is not None else None
    try:
        output = model(**inputs)
    finally:
        if handle is not None:
            handle.remove()
    return getattr(output, "logits", output), seen[0] if is_plain and len(seen) == 1 else None
