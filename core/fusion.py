"""The kernels in the places of a model's own code, for as long as it is trained.

Which code is replaced is decided by what it computes: a module of another library takes part if, on small random
weights, it gives what the kernel gives. All else runs as it is, and the model is as it was afterwards.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from core import kernels
from core.layers import LoRALinear
from core.matrices import is_conv1d

_MLPS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("", "c_fc", "c_proj"), ("", "fc1", "fc2"))
"""What a gated MLP calls its gate, up and down, and one without a gate its two matrices."""

_EPS = ("variance_epsilon", "eps", "epsilon")


class Fusion:
    """Lets an adapted model, in a `with` block, compute by the kernels what they can: linear layers, norms, MLPs.

    Values and gradients are the same but for rounding. Nothing else of the model changes, and a forward pass under
    autocast, or one that is being compiled, is the model's own.
    """

    def __init__(self, model: nn.Module) -> None:
        """Looks for what the kernels can do in `model`; nothing changes yet."""
        judged: dict[Any, Any] = {}
        kernels_of = ((module, _kernel(module, judged)) for module in model.modules())
        self._forwards = [
            (module, _unless_told_otherwise(module.forward, kernel)) for module, kernel in kernels_of if kernel
        ]
        self._swapped: list[nn.Module] = []

    def __enter__(self) -> Self:
        if not self._swapped:
            for module, forward in self._forwards:
                if "forward" not in vars(module):
                    object.__setattr__(module, "forward", forward)
                    self._swapped.append(module)
        return self

    def __exit__(self, *_: object) -> None:
        for module in self._swapped:
            object.__delattr__(module, "forward")
        self._swapped = []


def _unless_told_otherwise(own: Callable[..., Any], kernel: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            x = args[0]
            if isinstance(x, Tensor) and x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
                found = kernel(x)
                if found is not None:
                    return found
        return own(*args, **kwargs)

    return forward


def _kernel(module: nn.Module, judged: dict[Any, Any]) -> Callable[[Tensor], Tensor | None] | None:
    """Returns what may stand in the place of a module's forward pass; None where nothing may."""
    if isinstance(module, LoRALinear) or type(module) is nn.Linear or is_conv1d(module):
        return lambda x: None if (layer := linear_of(module)) is None else kernels.linear(x, layer)
    if type(module) is nn.LayerNorm:
        return lambda x: _layer_norm(module, x)
    if [name for name, _ in module.named_parameters(recurse=False)] == ["weight"]:
        return _rms_norm(module, judged)
    return _mlp(module, judged)


def linear_of(module: nn.Module) -> kernels.Linear | None:
    """Returns a linear layer, adapted or not, as the kernels take it; None where it is more than that.

    More than that are those whose base is trained, quantized or hooked, DoRA's, and those that "pissa" started.
    """
    base: Any = module.base_layer if isinstance(module, LoRALinear) else module
    weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    is_transposed = is_conv1d(base)
    if not isinstance(weight, Tensor) or not (type(base) is nn.Linear or is_transposed):
        return None
    if weight.requires_grad or not weight.is_floating_point() or (bias is not None and bias.requires_grad):
        return None
    W = weight.T if is_transposed else weight
    if not isinstance(module, LoRALinear):
        return kernels.Linear(W, bias)
    if module.magnitude is not None or module.lora_A0 is not None or base._forward_hooks or base._forward_pre_hooks:
        return None
    if module.merged or module.strength == 0.0:
        return kernels.Linear(W, bias)
    dropout = kernels.Dropout.draw(module.dropout.p if module.training else 0.0)
    return kernels.Linear(W, bias, module.lora_A, module.lora_B, module.strength * module.scaling, dropout)


def _layer_norm(module: Any, x: Tensor) -> Tensor | None:
    parameters = [p for p in (module.weight, module.bias) if p is not None]
    if module.weight is None or len(module.normalized_shape) != 1 or any(p.requires_grad for p in parameters):
        return None
    return kernels.layer_norm(x, module.weight, module.bias, module.eps)


def _rms_norm(module: Any, judged: dict[Any, Any]) -> Callable[[Tensor], Tensor | None] | None:
    eps = next((getattr(module, name) for name in _EPS if isinstance(getattr(module, name, None), float)), None)
    if module.weight.dim() != 1 or eps is None:
        return None
    key = type(module), eps
    if key not in judged:
        judged[key] = _agree(_twin(module, parameters={"weight": (8,)}), 8, lambda t, x: _normed(t, x, eps))
    return (lambda x: _normed(module, x, eps)) if judged[key] else None


def _normed(module: Any, x: Tensor, eps: float) -> Tensor | None:
    return None if module.weight.requires_grad else kernels.rms_norm(x, module.weight, eps)


def _mlp(module: Any, judged: dict[Any, Any]) -> Callable[[Tensor], Tensor | None] | None:
    children = dict(module.named_children())
    names = next((n for n in _MLPS if all(not name or name in children for name in n)), None)
    if names is None or any(p > 0 for child in children.values() for p in _dropouts(child)):
        return None
    own = {name for name in names if name}
    if not all(isinstance(children[n], (nn.Linear, LoRALinear)) or is_conv1d(children[n]) for n in own):
        return None
    acts = [type(child) for name, child in children.items() if name not in own]
    key = type(module), names, *acts, *(f for f in vars(module).values() if callable(f))
    if key not in judged:
        judged[key] = next((a for a in kernels.ACTIVATIONS if _agree(*_small_mlp(module, names, a))), None)
    activation = judged[key]
    return None if activation is None else lambda x: _through(module, x, names, activation)


def _dropouts(child: nn.Module) -> Iterator[float]:
    return (m.p for m in child.modules() if isinstance(m, nn.Dropout) and not isinstance(child, LoRALinear))


def _through(module: Any, x: Tensor, names: tuple[str, ...], activation: kernels.Activation) -> Tensor | None:
    children = [getattr(module, name) if name else None for name in names]
    if any(child is not None and (child._forward_hooks or child._forward_pre_hooks) for child in children):
        return None
    layers = [None if child is None else linear_of(child) for child in children]
    if any(layer is None for layer, child in zip(layers, children, strict=True) if child is not None):
        return None
    gate, up, down = layers
    assert up is not None and down is not None
    return kernels.mlp(x, gate, up, down, activation)


def _small_mlp(module: Any, names: tuple[str, ...], activation: kernels.Activation) -> tuple[Any, ...]:
    """Returns arguments of `_agree` for a module's code with small matrices instead of its own."""
    sizes = {names[0]: (8, 12), names[1]: (8, 12), names[2]: (12, 8)}
    with torch.random.fork_rng(devices=[]):
        layers = {name: nn.Linear(*sizes[name]).requires_grad_(False) for name in names if name}
    twin = _twin(module, modules={**dict(module.named_children()), **layers})
    return twin, 8, lambda t, x: _through(t, x, names, activation)


def _twin(
    module: nn.Module, *, parameters: dict[str, tuple[int, ...]] | None = None, modules: dict[str, Any] | None = None
) -> nn.Module:
    """Returns a module of the same code, with other parameters, of these shapes, and other children."""
    twin = copy.copy(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = {
            name: nn.Parameter(torch.rand(shape), requires_grad=False) for name, shape in (parameters or {}).items()
        }
    vars(twin).update(_parameters=drawn, _modules=dict(modules or {}))
    return twin


def _agree(twin: nn.Module, width: int, kernel: Callable[[Any, Tensor], Tensor | None]) -> bool:
    """Says whether a module's code and a kernel give the same for a random x, (3, width)."""
    x = torch.linspace(-3, 3, 3 * width).view(3, width).sin_() * 3
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            own, ours = twin(x), kernel(twin, x)
        except Exception:  # code that wants more than x, or does something else: it is left alone
            return False
    return (
        isinstance(own, Tensor)
        and ours is not None
        and own.shape == ours.shape
        and torch.allclose(own, ours, 1e-5, 1e-6)
    )
