"""The methods behind one call: what each trains in a model, what it puts there, and what that costs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from core.baselines.parts import Bottleneck, Prefixed, SpecialTokens, WithAdapter, WithPrefix
from core.baselines.places import biases_of, embedding_of, head_of, inside, layers_of, projections
from core.config import LoRAConfig
from core.errors import LoRAError
from core.inject import inject, method_of, places_of, replace, seed_of
from core.matrices import matrix_shape
from core.method import MethodConfig
from core.targets import Injection, count_parameters, plan, saved_parameters

_Make = Callable[[nn.Module, str | None, torch.Generator | None], nn.Module]
"""Returns what stands in a module's place, for a device (None: that of the module), with a source of numbers."""


@dataclass
class _Change:
    """What a method does to a model.

    Attributes:
        own: Names of the model's own parameters that are trained, as they are.
        places: Path → what is put in the place of the module there.
        special_tokens: What rows get besides their own tokens.
    """

    own: Iterable[str] = ()
    places: dict[str, _Make] = field(default_factory=dict)
    special_tokens: SpecialTokens | None = None


def plan_method(model: nn.Module, method: MethodConfig, lora: LoRAConfig | None = None) -> Injection:
    """Returns what `apply_method` would do, changing nothing; works on the meta device, too.

    Raises:
        LoRAError: The method cannot be used on this model, or LoRA's settings do not fit it.
    """
    lora = lora or LoRAConfig()
    return plan(model, lora) if method.method == "lora" else _planned(model, method, lora, _change(model, method))


def apply_method(model: nn.Module, method: MethodConfig, lora: LoRAConfig | None = None, *, seed: int = 0) -> Injection:
    """Makes `model` ready to be trained by a method, as `inject` does for LoRA; returns what was done.

    Whatever the method, the modules of `lora.modules_to_save` are trained whole besides: a classifier's head. Of its
    other settings the methods use none, but for LoRA itself. The model's own parameters are trained where they
    stand, without a copy: what they were comes back by loading the model again.

    Adapter layers start as nothing: the model gives what it gave, bit for bit. Prefixes change what it gives from
    the start, as they are tokens that the rest can see.

    Args:
        model: The base model.
        method: What is trained.
        lora: LoRA's settings.
        seed: Of what is drawn at random.

    Raises:
        LoRAError: The method cannot be used on this model, or the model is adapted already.
    """
    lora = lora or LoRAConfig()
    if method.method == "lora":
        return inject(model, lora, seed=seed)
    if method_of(model) is not None:
        raise LoRAError("`model` must not be adapted already; load it again, or call eject(model) first.")
    change = _change(model, method)
    injection = _planned(model, method, lora, change)
    own = [model.get_parameter(name) for name in injection.trained_in_full]
    model.requires_grad_(False)
    places = places_of(model)
    for path, make in change.places.items():
        module = model.get_submodule(path)
        generator = torch.Generator().manual_seed(seed_of(seed, path, 0))
        replace(model, places[module], make(module, None, generator).train(module.training))
    for p in own:
        p.requires_grad_(True)
    object.__setattr__(model, "_lora_injection", injection)
    object.__setattr__(model, "_lora_special_tokens", change.special_tokens)
    return injection


def _planned(model: nn.Module, method: MethodConfig, lora: LoRAConfig, change: _Change) -> Injection:
    named = dict(model.named_parameters(remove_duplicate=False))
    wanted = {id(named[name]) for name in (*change.own, *saved_parameters(model, lora.modules_to_save))}
    own = {name: p.numel() for name, p in model.named_parameters() if id(p) in wanted}
    added = {}
    for path, make in change.places.items():
        module = model.get_submodule(path)
        before = {id(p) for p in module.parameters()}
        made = make(module, "meta", None).named_parameters()
        added |= {f"{path}.{name}": tuple(p.shape) for name, p in made if id(p) not in before}
    return Injection(lora, (), {}, (), count_parameters(model), own, method, added)


def _change(model: nn.Module, method: MethodConfig) -> _Change:
    match method.method:
        case "full":
            return _Change(name for name, _ in model.named_parameters())
        case "bitfit":
            return _Change(biases_of(model))
        case "head":
            return _Change(inside(model, head_of(model)))
        case "last_layers":
            layers = layers_of(model, method)
            if method.num_layers > len(layers):
                raise LoRAError(f"`num_layers` (={method.num_layers}) must be at most {len(layers)}, the model's own.")
            return _Change(inside(model, layers[-method.num_layers :]))
        case "adapter_h" | "adapter_l" | "adapter_p":
            return _Change(places=_adapters(model, method))
        case _:
            return _prefixes(model, method)


def _adapters(model: nn.Module, method: MethodConfig) -> dict[str, _Make]:
    """Returns where adapters come, and how they are made.

    Adapter_H: after attention and after the MLP, each before the residual connection; GELU, as in its authors' code.
    Adapter_P: after the MLP alone, ReLU; in an encoder its authors also pass the layer's own norm before and after.
    Adapter_L: after the whole layer, a LayerNorm first; ReLU.
    """
    activation = "gelu" if method.method == "adapter_h" else "relu"
    has_norm = method.method == "adapter_l"
    places: dict[str, _Make] = {}

    def maker(d: int) -> _Make:
        def make(module: nn.Module, device: str | None, generator: torch.Generator | None) -> nn.Module:
            where = device or next(t.device for t in (*module.parameters(), *module.buffers()))
            options = {"activation": activation, "has_norm": has_norm, "device": where, "generator": generator}
            return WithAdapter(module, Bottleneck(d, method.bottleneck, **options))

        return make

    for layer, (attention, mlp) in zip(layers_of(model, method), projections(model, method), strict=True):
        ends = {"adapter_h": [attention, mlp], "adapter_p": [mlp]}.get(method.method, [mlp])
        for path in ends:
            shape = matrix_shape(model.get_submodule(path))
            assert shape is not None
            places[layer if has_norm else path] = maker(shape[0])
    return places


def _prefixes(model: nn.Module, method: MethodConfig) -> _Change:
    path, layers = embedding_of(model, method), layers_of(model, method)
    embedding = model.get_submodule(path)
    assert isinstance(embedding, nn.Embedding)
    number = len(layers) if method.method == "prefix_layer" else 1
    tokens = SpecialTokens(embedding.num_embeddings, method.prefix_length, method.infix_length)

    def embed(module: nn.Module, device: str | None, generator: torch.Generator | None) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        return WithPrefix(module, number, method.num_special_tokens, device=device, generator=generator)

    def of_layer(place: int) -> _Make:
        def make(module: nn.Module, device: str | None, generator: torch.Generator | None) -> nn.Module:
            owner = model.get_submodule(path)  # by then, or on the way to a plan, in its place
            return Prefixed(module, owner, place)  # type: ignore[arg-type]

        return make

    later = {layers[place]: of_layer(place) for place in range(1, number)}
    return _Change(places={path: embed, **later}, special_tokens=tokens)
