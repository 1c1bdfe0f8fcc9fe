"""Wrapping the matrices to adapt in a whole model, merging them, and giving everything back."""

import copy
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from core.config import LoRAConfig
from core.errors import LoRAError
from core.experts import LoRAExperts, stacks_of
from core.fused import LoRAFused, rows_of
from core.layers import adapted_layer
from core.method import MethodConfig
from core.targets import Injection, lora_layers, plan
from core.wrapper import Wrapper

Holder = TypeVar("Holder", LoRAExperts, LoRAFused)


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


@dataclass
class _Extra:
    """A parameter that is trained as it is: its place, what stood there, and what is trained."""

    module: nn.Module
    attribute: str
    original: nn.Parameter
    trained: nn.Parameter

    def put(self, parameter: nn.Parameter) -> None:
        self.module.register_parameter(self.attribute, parameter)


def wrap(model: nn.Module, injection: Injection, *, seed: int = 0, draw: bool = True) -> None:
    """Carries `injection` out on `model`; `inject` for targets that are already known.

    With `draw` False A and B are about to be set, so that no time goes into their start.

    What is trained in full is a copy: the parameters that stood there come back with `eject`, and those of
    another module that shares them do not move.
    """
    if lora_layers(model):
        raise LoRAError("`model` must not be adapted already; call eject(model) first.")
    if (other := method_of(model)) is not None:
        raise LoRAError(f"`model` must not be made ready for {other.method} already; load it again.")
    config = injection.config
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    extras = {}
    for name in injection.trained_in_full:
        path, _, attribute = name.rpartition(".")
        module, original = model.get_submodule(path), model.get_parameter(name)
        extras[name] = _Extra(module, attribute, original, nn.Parameter(original.detach().clone()))
    model.requires_grad_(False)
    places = places_of(model)
    for t in injection.targets:
        generator = torch.Generator().manual_seed(seed_of(seed, t.path, t.r))
        init = config.init if draw else "kaiming"
        options = {"dropout": config.dropout, "init": init, "dora": t.dora and draw, "generator": generator}
        module = _submodule(model, t.path)
        if module is not None:
            layer: nn.Module = adapted_layer(module, t.r, t.scaling, **options)
            replace(model, places[module], layer)
            continue
        path, _, part = t.path.rpartition(".")
        above, _, name = path.rpartition(".")
        parent = model.get_submodule(above)
        if isinstance(parent, LoRAExperts) or name in stacks_of(parent):
            experts = _wrapped(model, parent, LoRAExperts, places)
            experts.add(name, int(part), t.r, t.scaling, **options)
        else:
            fused = _wrapped(model, model.get_submodule(path), LoRAFused, places)
            fused.add(part, rows_of(fused.base_layer, name, parent, part), t.r, t.scaling, **options)
    for extra in extras.values():
        extra.put(extra.trained)
    object.__setattr__(model, "_lora_before", before)
    object.__setattr__(model, "_lora_injection", injection)
    object.__setattr__(model, "_lora_extras", extras)
    for layer in (m for m in model.modules() if isinstance(m, Wrapper)):
        layer.train(model.training)


def eject(model: nn.Module, *, keep_merged: bool = False) -> None:
    """Takes the LoRA layers out again: the base layers and parameters come back as the same objects.

    Args:
        model: An adapted model; one without LoRA layers is left as it is.
        keep_merged: Leave W0 + ΔW in merged layers and what was trained in full, to save the model as an
            ordinary one. Otherwise they are unmerged first.
    """
    wrappers = [m for m in model.modules() if isinstance(m, Wrapper) and "base_layer" in dict(m.named_children())]
    places = places_of(model)
    for layer in wrappers:
        if not keep_merged:
            layer.unmerge()
        replace(model, places[layer], layer.base_layer)
    if wrappers:
        before = model.__dict__.pop("_lora_before", {})
        model.__dict__.pop("_lora_injection", None)
        for extra in model.__dict__.pop("_lora_extras", {}).values():
            if not keep_merged:
                extra.put(extra.original)
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


def method_of(model: nn.Module) -> MethodConfig | None:
    """Returns how a model is adapted, to be trained or as it was trained; None of one that is not."""
    injection = model.__dict__.get("_lora_injection")
    return injection.method if injection is not None else None


def trained_in_full(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns name → parameter of all that is trained as it is: biases, and `modules_to_save`."""
    return {name: extra.trained for name, extra in model.__dict__.get("_lora_extras", {}).items()}


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
    originals = [extra.original for extra in model.__dict__.get("_lora_extras", {}).values()]
    shared = {id(t): t for t in (*model.parameters(), *model.buffers(), *originals)}
    twin = copy.deepcopy(model, shared)
    twin.__dict__.pop("_lora_before")  # the weights are shared: the original decides what is trained
    merge(twin)
    eject(twin, keep_merged=True)
    return twin


@contextmanager
def strength(model: nn.Module, value: float) -> Iterator[None]:
    """Sets the strength of the whole adapter inside a `with` block: 0 gives the base model.

    What is trained in full moves from what it was, at 0, to what it is now, at 1, and on.

    Raises:
        LoRAError: A layer is merged.
    """
    layers = list(lora_layers(model).values())
    extras = list(model.__dict__.get("_lora_extras", {}).values())
    before = [layer.strength for layer in layers]
    try:
        for layer in layers:
            layer.strength = value
        for extra in extras:
            extra.put(_between(extra, value))
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.strength = old
        for extra in extras:
            extra.put(extra.trained)


def _between(extra: _Extra, value: float) -> nn.Parameter:
    if value in (0.0, 1.0):
        return extra.trained if value else extra.original
    with torch.no_grad():
        return nn.Parameter(torch.lerp(extra.original, extra.trained, value), requires_grad=False)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    """Returns the module of that path, None where a slice or an expert has it."""
    module: nn.Module = model
    for name in path.split("."):
        found = module._modules.get(name)
        if found is None:
            return None
        module = found
    return module


def replace(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """Puts `module` at all these paths."""
    for path in paths:
        model.set_submodule(path, module)


def _wrapped(model: nn.Module, module: nn.Module, kind: type[Holder], places: dict[nn.Module, list[str]]) -> Holder:
    """Returns the wrapper that holds the parts of `module`, after putting one in its place if need be."""
    if isinstance(module, kind):
        return module
    wrapper = kind(module)
    replace(model, places[module], wrapper)
    return wrapper


def places_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Returns module → all its paths; most have one."""
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)
    return places


def seed_of(seed: int, path: str, r: int) -> int:
    """Returns the seed of what is drawn for one place of a model."""
    digest = hashlib.sha256(f"{seed}/{path}/{r}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
