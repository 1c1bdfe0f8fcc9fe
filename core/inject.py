"""Finding the matrices to adapt in a whole model, wrapping them, and giving them back."""

import copy
import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from core.config import ALL_LINEAR, LoRAConfig
from core.errors import LoRAError, TargetError
from core.layers import LoRALinear, matrix_shape


@dataclass(frozen=True)
class Target:
    """One matrix that will be adapted.

    Attributes:
        path: Name of its module in the model.
        out_features, in_features: Its shape as a map from in to out.
        r: Its rank.
        scaling: Its factor on B·A.
    """

    path: str
    out_features: int
    in_features: int
    r: int
    scaling: float

    @property
    def num_trainable(self) -> int:
        """Entries of A and B: r · (in_features + out_features)."""
        return self.r * (self.in_features + self.out_features)


@dataclass(frozen=True)
class Injection:
    """What `inject` did, or would do, to a model.

    Attributes:
        config: The settings that were asked for.
        targets: The matrices that are adapted, in the model's order.
        by_pattern: For each pattern of `target_modules`, the paths that it matched.
        unmatched: Paths of matrices that could be adapted and are not.
        num_parameters: Entries of the base model; tied weights count once.
    """

    config: LoRAConfig
    targets: tuple[Target, ...]
    by_pattern: dict[str, tuple[str, ...]]
    unmatched: tuple[str, ...]
    num_parameters: int

    @property
    def num_trainable(self) -> int:
        """Entries of all A and B."""
        return sum(t.num_trainable for t in self.targets)

    @property
    def trainable_share(self) -> float:
        """Trainable entries over the entries of the adapted model."""
        return self.num_trainable / (self.num_parameters + self.num_trainable)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of A and B as saved, in float32."""
        return 4 * self.num_trainable


def adaptable(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns path → (out_features, in_features) of every matrix that LoRA can adapt here.

    Works on a model of the meta device, too: no weight is read. A layer that is adapted already
    counts by its own path. A module that stands in several places counts once, by its first path;
    one that is the whole model has no place to put a wrapper in and does not count.
    """
    wrapped = tuple(f"{path}." for path in lora_layers(model))
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            found[path] = (module.out_features, module.in_features)
        elif path and (shape := matrix_shape(module)) is not None and not path.startswith(wrapped):
            found[path] = shape
    return found


def plan(model: nn.Module, config: LoRAConfig) -> Injection:
    """Returns what `inject` would do, changing nothing.

    `target_modules` may be a list of names (`q_proj`, `self_attn.q_proj`, or a whole path: a name
    fits at the end of a path, at a dot), one regular expression over the whole path, or
    "all-linear": every matrix but the output head.

    Raises:
        TargetError: A pattern matches nothing.
        LoRAError: A rank is larger than its matrix.
    """
    shapes = adaptable(model)
    by_pattern = _match(model, config.target_modules, list(shapes))
    chosen = {path for paths in by_pattern.values() for path in paths}
    targets = []
    for path, (out_features, in_features) in shapes.items():
        if path in chosen:
            r = int(_by_pattern(config.rank_pattern, path, config.r))
            alpha = _by_pattern(config.alpha_pattern, path, config.alpha)
            targets.append(Target(path, out_features, in_features, r, config.scaling_for(r, alpha)))
    too_large = [t for t in targets if t.r > min(t.out_features, t.in_features)]
    if too_large:
        names = ", ".join(f"{t.path} ({t.out_features} × {t.in_features})" for t in too_large[:3])
        more = f" and {len(too_large) - 3} more" if len(too_large) > 3 else ""
        limit = min(min(t.out_features, t.in_features) for t in too_large)
        raise LoRAError(
            f"`r` (={max(t.r for t in too_large)}) must be at most {limit} to fit {names}{more}; "
            "choose a smaller r, or give these matrices their own by rank_pattern."
        )
    unmatched = tuple(path for path in shapes if path not in chosen)
    return Injection(config, tuple(targets), by_pattern, unmatched, count_parameters(model))


def inject(model: nn.Module, config: LoRAConfig, *, seed: int = 0) -> Injection:
    """Freezes `model` and puts a LoRA layer around every target; returns what was done.

    Each matrix draws its A from a generator of its own, seeded by `seed`, its path and its r. So
    one matrix's start does not depend on which others are adapted, and two adapters of different
    r share no rows of A by accident, which would inflate their subspace similarity.

    Raises:
        TargetError: A pattern matches nothing.
        LoRAError: A rank is larger than its matrix, or the model is adapted already.
    """
    injection = plan(model, config)
    wrap(model, injection, seed=seed)
    return injection


def wrap(model: nn.Module, injection: Injection, *, seed: int = 0) -> None:
    """Carries `injection` out on `model`; `inject` for targets that are already known."""
    if lora_layers(model):
        raise LoRAError("`model` must not be adapted already; call eject(model) first.")
    config = injection.config
    object.__setattr__(model, "_lora_before", {name: p.requires_grad for name, p in model.named_parameters()})
    object.__setattr__(model, "_lora_injection", injection)
    model.requires_grad_(False)
    places = _places(model)
    for t in injection.targets:
        base_layer = model.get_submodule(t.path)
        layer = LoRALinear(
            base_layer,
            t.r,
            t.scaling,
            dropout=config.dropout,
            init=config.init,
            generator=torch.Generator().manual_seed(_seed_of(seed, t.path, t.r)),
        )
        layer.train(model.training)
        for path in places[base_layer]:
            model.set_submodule(path, layer)


def eject(model: nn.Module, *, keep_merged: bool = False) -> None:
    """Takes the LoRA layers out again: the base layers come back as the same objects.

    Args:
        model: An adapted model; one without LoRA layers is left as it is.
        keep_merged: Leave W0 + ΔW in merged layers, to save the model as an ordinary one.
            Otherwise they are unmerged first.
    """
    layers = lora_layers(model)
    places = _places(model)
    for layer in layers.values():
        if not keep_merged:
            layer.unmerge()
        for path in places[layer]:
            model.set_submodule(path, layer.base_layer)
    if layers:
        before = model.__dict__.pop("_lora_before", {})
        model.__dict__.pop("_lora_injection", None)
        for name, p in model.named_parameters():
            p.requires_grad_(before.get(name, p.requires_grad))


def injection_of(model: nn.Module) -> Injection:
    """Returns what `inject` reported for this model.

    Raises:
        LoRAError: The model is not adapted.
    """
    injection = model.__dict__.get("_lora_injection")
    if injection is None:
        raise LoRAError("`model` must be adapted; call inject(model, LoRAConfig()) or Adapter.apply(model) first.")
    return injection


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Returns path → LoRA layer, in the model's order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def merge(model: nn.Module) -> None:
    """Merges every LoRA layer; if one fails, those already merged are unmerged again."""
    done = []
    try:
        for layer in lora_layers(model).values():
            if not layer.merged:
                layer.merge()
                done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Gives every base layer its own weight back, bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def merged_copy(model: nn.Module) -> nn.Module:
    """Returns a model without LoRA layers that computes what `model` does, merged at its present strengths.

    It shares every weight that the adapter does not change, so it costs only the adapted matrices'
    memory. `model` stays as it is, adapted and unmerged.

    Raises:
        LoRAError: The model is not adapted, or is merged itself.
    """
    layers = lora_layers(model)
    if not layers or any(layer.merged for layer in layers.values()):
        raise LoRAError("`model` must be adapted and unmerged to be copied merged; call inject, or unmerge(model).")
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    twin.__dict__.pop("_lora_before")  # the weights are shared: the original decides what is trained
    merge(twin)
    eject(twin, keep_merged=True)
    return twin


@contextmanager
def strength(model: nn.Module, value: float) -> Iterator[None]:
    """Sets the strength of every LoRA layer inside a `with` block: 0 gives the base model.

    Raises:
        LoRAError: A layer is merged.
    """
    layers = list(lora_layers(model).values())
    before = [layer.strength for layer in layers]
    try:
        for layer in layers:
            layer.strength = value
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.strength = old


def count_parameters(model: nn.Module) -> int:
    """Returns the entries of all weights; tied ones count once, A and B do not count."""
    adapter = {id(p) for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    return sum(p.numel() for p in model.parameters() if id(p) not in adapter)


def _places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Returns module → all its paths; most have one."""
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)
    return places


def _match(model: nn.Module, patterns: str | Iterable[str], paths: list[str]) -> dict[str, tuple[str, ...]]:
    """Returns pattern → matched paths; raises when a pattern matches nothing."""
    if patterns == ALL_LINEAR:
        head = _output_head_path(model)
        by_pattern = {ALL_LINEAR: tuple(p for p in paths if p != head)}
    elif isinstance(patterns, str):
        try:
            expression = re.compile(patterns)
        except re.error as error:
            raise TargetError(
                f"`target_modules` (={patterns!r}) must be a valid regular expression ({error}); "
                "to give names instead, use a list."
            ) from error
        by_pattern = {patterns: tuple(p for p in paths if expression.fullmatch(p))}
    else:
        by_pattern = {name: tuple(p for p in paths if p == name or p.endswith("." + name)) for name in patterns}
    empty = [pattern for pattern, matched in by_pattern.items() if not matched]
    if empty:
        names = ", ".join(sorted({p.rpartition(".")[2] for p in paths})) or "none"
        raise TargetError(
            f"`target_modules` (={', '.join(empty)}) must match at least one matrix; this model has {names}."
        )
    return by_pattern


def _output_head_path(model: nn.Module) -> str | None:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return next((path for path, module in model.named_modules() if module is head), None) if head is not None else None


def _by_pattern(patterns: dict[str, int] | dict[str, float], path: str, default: float) -> float:
    """Returns the value of the first pattern that fits the end of `path`, at a dot."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    return default


def _seed_of(seed: int, path: str, r: int) -> int:
    digest = hashlib.sha256(f"{seed}/{path}/{r}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
