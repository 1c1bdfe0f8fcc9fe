"""Which matrices of a model are adapted: what there is, what the settings choose, and what that costs."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from core.config import ALL_LINEAR, LoRAConfig
from core.errors import LoRAError, TargetError, listed
from core.experts import is_transposed, stacks_of
from core.fused import parts_of, rows_of
from core.layers import LoRALayer
from core.matrices import as_matrix, matrix_form, matrix_shape
from core.method import MethodConfig
from core.wrapper import Wrapper

FORMS = ("linear", "slice", "embedding", "convolution", "expert")


@dataclass(frozen=True)
class Target:
    """One matrix that will be adapted.

    Attributes:
        path: Name of its module in the model; of a slice, that of its fused projection and its own: attn.c_attn.q;
            of an expert, that of the stack and its number: mlp.experts.down_proj.3.
        out_features, in_features: Its shape as a map from in to out.
        r: Its rank.
        scaling: Its factor on B·A.
        dora: Whether it has a magnitude, of out_features entries.
    """

    path: str
    out_features: int
    in_features: int
    r: int
    scaling: float
    dora: bool = False

    @property
    def num_trainable(self) -> int:
        """Entries of A and B, r · (in_features + out_features), and of DoRA's magnitude."""
        return self.r * (self.in_features + self.out_features) + self.dora * self.out_features


@dataclass(frozen=True)
class Injection:
    """What `inject` did, or would do, to a model.

    Attributes:
        config: The settings that were asked for.
        targets: The matrices that are adapted, in the model's order.
        by_pattern: For each pattern of `target_modules`, the paths that it matched.
        unmatched: Paths of matrices that could be adapted and are not; a fused projection stands for its slices,
            and a stack for its experts.
        num_parameters: Entries of the base model; tied weights count once.
        trained_in_full: Name → entries of each parameter that is trained as it is: biases, and `modules_to_save`.
        method: How it is trained; of another than LoRA there are no targets.
        added: Name → shape of each parameter that such a method puts into the model.
    """

    config: LoRAConfig
    targets: tuple[Target, ...]
    by_pattern: dict[str, tuple[str, ...]]
    unmatched: tuple[str, ...]
    num_parameters: int
    trained_in_full: dict[str, int] = field(default_factory=dict)
    method: MethodConfig = MethodConfig()
    added: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def num_trainable(self) -> int:
        """Entries of all A and B, and of all that is trained beside them or instead."""
        own = (*self.trained_in_full.values(), *map(math.prod, self.added.values()))
        return sum(t.num_trainable for t in self.targets) + sum(own)

    @property
    def num_in_all(self) -> int:
        """Entries of the adapted model; LoRA trains copies of what it trains in full, the other methods no copies."""
        in_place = 0 if self.method.method == "lora" else sum(self.trained_in_full.values())
        return self.num_parameters + self.num_trainable - in_place

    @property
    def trainable_share(self) -> float:
        """Trainable entries over the entries of the adapted model."""
        return self.num_trainable / self.num_in_all

    @property
    def adapter_bytes(self) -> int:
        """Bytes of what is trained as saved, in float32."""
        return 4 * self.num_trainable


def adaptable(model: nn.Module, forms: Iterable[str] = FORMS) -> dict[str, tuple[int, int]]:
    """Returns path → (out_features, in_features) of every matrix that LoRA can adapt here.

    Works on a model of the meta device, too: no weight is read. A layer that is adapted already
    counts by its own path. A module that stands in several places counts once, by its first path;
    one that is the whole model has no place to put a wrapper in and does not count.

    Args:
        model: Any model.
        forms: Which kinds: "linear", "slice" (of a fused projection, which stands there whole, too),
            "embedding", "convolution", "expert" (out of a stack that is one parameter).
    """
    forms = set(forms)
    found: dict[str, tuple[int, int]] = {}
    modules = dict(model.named_modules())
    inside = tuple(f"{path}." for path, module in modules.items() if isinstance(module, Wrapper))
    for path, module in modules.items():
        if not path or path.startswith(inside):
            continue
        base_layer = module.base_layer if isinstance(module, Wrapper) else module
        form, shape = matrix_form(base_layer), matrix_shape(base_layer)
        if form is None or shape is None:
            if "expert" in forms:
                for name, shape in stacks_of(base_layer).items():
                    num_experts = len(base_layer.get_parameter(name))
                    found |= {f"{path}.{name}.{index}": shape for index in range(num_experts)}
            continue
        if form in forms:
            found[path] = shape
        if "slice" in forms and form == "linear":
            above, _, name = path.rpartition(".")
            for part, rows in parts_of(base_layer, name, modules[above]).items():
                found[f"{path}.{part}"] = (len(rows), shape[1])
    return found


def wholes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns path → (out_features, in_features) of what is adapted as one or in parts, but not the parts.

    A fused projection stands there without its slices, a stack without its experts, in the shape of one of them.
    """
    found = adaptable(model, ("linear", "embedding", "convolution", "expert"))
    experts = adaptable(model, ("expert",))
    return {path.rpartition(".")[0] if path in experts else path: shape for path, shape in found.items()}


def plan(model: nn.Module, config: LoRAConfig) -> Injection:
    """Returns what `inject` would do, changing nothing.

    `target_modules` may be a list of names (`q_proj`, `self_attn.q_proj`, `c_attn.q`, or a whole
    path: a name fits at the end of a path, at a dot), one regular expression over the whole path, or
    "all-linear": every linear matrix but the output head and what `modules_to_save` trains whole.
    Embeddings and convolutions are taken by name or expression. An expression that fits a fused
    projection takes it whole, not its slices. What fits a stack of experts takes all of them.

    Raises:
        TargetError: A pattern matches nothing.
        LoRAError: A rank is larger than its matrix, a fused projection is named whole and in slices, or experts
            are asked for with DoRA.
    """
    shapes, whole = adaptable(model), wholes(model)
    names = _names(model, shapes)
    by_pattern = _chosen(model, config, names, whole)
    chosen = {path for paths in by_pattern.values() for path in paths}
    experts = [path for path in chosen if names[path]]
    if config.dora and experts:
        raise LoRAError(
            f"`dora` (=True) must be False for experts that lie in one parameter, as {min(experts)} does; "
            "take them out by exclude_modules."
        )
    targets = []
    for path, (out_features, in_features) in shapes.items():
        if path in chosen:
            r = int(_by_pattern(config.rank_pattern, path, names[path], config.r))
            alpha = _by_pattern(config.alpha_pattern, path, names[path], config.alpha)
            targets.append(Target(path, out_features, in_features, r, config.scaling_for(r, alpha), config.dora))
    too_large = [t for t in targets if t.r > min(t.out_features, t.in_features)]
    if too_large:
        names = listed((f"{t.path} ({t.out_features} × {t.in_features})" for t in too_large), ", ")
        limit = min(min(t.out_features, t.in_features) for t in too_large)
        raise LoRAError(
            f"`r` (={max(t.r for t in too_large)}) must be at most {limit} to fit {names}; "
            "choose a smaller r, or give these matrices their own by rank_pattern."
        )
    touched = chosen | {_whole(path, whole) for path in chosen}
    unmatched = tuple(path for path in whole if path not in touched)
    extras = _trained_in_full(model, config, chosen, whole)
    return Injection(config, tuple(targets), by_pattern, unmatched, count_parameters(model), extras)


def chosen_ranks(model: nn.Module, config: LoRAConfig) -> dict[str, int]:
    """Returns path → r of each matrix that `config` chooses, in the model's order, whether or not r fits it.

    Raises:
        TargetError: A pattern matches nothing.
        LoRAError: A fused projection is named whole and in slices.
    """
    names = _names(model, adaptable(model))
    chosen = {path for paths in _chosen(model, config, names, wholes(model)).values() for path in paths}
    return {
        path: int(_by_pattern(config.rank_pattern, path, stack, config.r))
        for path, stack in names.items()
        if path in chosen
    }


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Returns path → LoRA layer, in the model's order; slices of fused projections by their own paths."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALayer)}


def matrix_at(model: nn.Module, path: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Returns where the matrix of an adapted path lies: the module that holds its weight, and how to get it from there.

    Args:
        model: Any model, also one of the meta device.
        path: Of a matrix as `adaptable` names it; a slice's rows are taken out of its fused projection, an
            expert out of its stack.

    Returns:
        The path of the module, or of the stack, and a function from its weight as stored to the matrix,
        (out_features, in_features).

    Raises:
        LoRAError: There is no such matrix.
    """
    modules = dict(model.named_modules())
    if path in modules:
        module = modules[path]
        return path, lambda weight: as_matrix(module, weight)
    whole, _, part = path.rpartition(".")
    above, _, name = whole.rpartition(".")
    if above in modules and name in stacks_of(modules[above]) and path in adaptable(model, ("expert",)):
        transposed = is_transposed(modules[above])
        return whole, lambda weight: weight[int(part)].T if transposed else weight[int(part)]
    if whole not in modules:
        raise LoRAError(f"`path` (={path!r}) must be that of a matrix of this model; adaptable(model) lists them.")
    module = modules[whole]
    rows = rows_of(module, name, modules[above], part)
    return whole, lambda weight: as_matrix(module, weight)[rows]


def count_parameters(model: nn.Module) -> int:
    """Returns the entries of all weights; tied ones count once, what the adapter added does not count."""
    added = {id(p) for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B, layer.magnitude)}
    extras = model.__dict__.get("_lora_extras", {}).values()
    originals = {id(e.original): e.original for e in extras}
    added |= {id(e.trained) for e in extras}
    base = {id(p): p for p in model.parameters() if id(p) not in added} | originals
    return sum(p.numel() for p in base.values())


def _names(model: nn.Module, shapes: Iterable[str]) -> dict[str, str | None]:
    """Returns path → the name of its stack, by which an expert goes, too; None of another matrix."""
    return dict.fromkeys(shapes) | {path: path.rpartition(".")[0] for path in adaptable(model, ("expert",))}


def _whole(path: str, wholes: Iterable[str]) -> str:
    """Returns the path of the fused projection or stack that a slice or expert is of; another path as it is."""
    above = path.rpartition(".")[0]
    return above if path not in wholes and above in wholes else path


def _chosen(
    model: nn.Module, config: LoRAConfig, names: dict[str, str | None], wholes: dict[str, tuple[int, int]]
) -> dict[str, tuple[str, ...]]:
    """Returns pattern → matched paths, without the excluded ones; raises when a pattern matches nothing.

    Args:
        model, config: What `plan` is asked about.
        names: Path of each matrix → the path of its stack, if it is an expert's.
        wholes: As of `wholes`.
    """
    if config.target_modules == ALL_LINEAR:
        head = _output_head_path(model)
        linear = adaptable(model, ("linear", "expert"))
        whole = tuple(f"{path}." for path in _modules_named(model, config.modules_to_save))
        by_pattern = {ALL_LINEAR: tuple(p for p in linear if p != head and not f"{p}.".startswith(whole))}
        if not by_pattern[ALL_LINEAR]:
            raise _matches_nothing("target_modules", [ALL_LINEAR], {})
    else:
        by_pattern = _match("target_modules", config.target_modules, names)
    chosen = {path for matched in by_pattern.values() for path in matched}
    doubled = sorted({path for path in chosen if _whole(path, wholes) in chosen and path not in wholes})
    if doubled and not isinstance(config.target_modules, str):
        raise LoRAError(
            f"`target_modules` (={', '.join(config.target_modules)}) must name a fused projection whole or its slices, "
            f"not both; {doubled[0]} is named twice."
        )
    dropped = set(doubled)
    if config.exclude_modules:
        excluded = _match("exclude_modules", config.exclude_modules, {p: names[p] for p in names if p in chosen})
        dropped |= {path for matched in excluded.values() for path in matched}
    dropped |= {path for path in chosen if not config.adapts_layer(_layer(path))}
    kept = {pattern: tuple(p for p in matched if p not in dropped) for pattern, matched in by_pattern.items()}
    if not any(kept.values()):
        raise TargetError(
            f"`target_modules` (={', '.join(kept)}) must leave at least one matrix to adapt; "
            "`exclude_modules` and `layers` take all of them out."
        )
    return kept


def _modules_named(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Returns the paths of the modules that have one of the names, which fit at the end of a path, at a dot."""
    names = tuple(names)
    ends = tuple(f".{name}" for name in names)
    return [path for path, _ in model.named_modules() if path in names or (ends and path.endswith(ends))]


def _layer(path: str) -> int:
    """Returns the first number in a path, its layer; -1 without one."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)


def _match(setting: str, patterns: str | Iterable[str], names: dict[str, str | None]) -> dict[str, tuple[str, ...]]:
    """Returns pattern → matched paths; raises when a pattern matches nothing."""
    if isinstance(patterns, str):
        try:
            expression = re.compile(patterns)
        except re.error as error:
            raise TargetError(
                f"`{setting}` (={patterns!r}) must be a valid regular expression ({error}); "
                "to give names instead, use a list."
            ) from error
        fits: dict[str, Callable[[str], object]] = {patterns: expression.fullmatch}
    else:
        fits = {name: partial(_ends_with, name) for name in patterns}
    by_pattern = {
        pattern: tuple(path for path, stack in names.items() if fit(path) or (stack and fit(stack)))
        for pattern, fit in fits.items()
    }
    empty = [pattern for pattern, matched in by_pattern.items() if not matched]
    if empty:
        raise _matches_nothing(setting, empty, names)
    return by_pattern


def _ends_with(name: str, path: str) -> bool:
    """Says whether `name` fits at the end of a path, at a dot."""
    return path == name or path.endswith("." + name)


def _matches_nothing(setting: str, patterns: list[str], names: dict[str, str | None]) -> TargetError:
    words = ", ".join(sorted({(stack or path).rpartition(".")[2] for path, stack in names.items()})) or "none"
    return TargetError(f"`{setting}` (={', '.join(patterns)}) must match at least one matrix; this model has {words}.")


def _trained_in_full(
    model: nn.Module, config: LoRAConfig, chosen: set[str], wholes: dict[str, tuple[int, int]]
) -> dict[str, int]:
    """Returns name → entries of the biases and modules to train as they are."""
    found: dict[str, int] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    touched = {_whole(path, wholes) for path in chosen}
    if config.bias != "none":
        for name, p in parameters.items():
            path, _, attribute = name.rpartition(".")
            if attribute == "bias" and (config.bias == "all" or path in touched):
                found[name] = p.numel()
    for wanted in config.modules_to_save:
        paths = _modules_named(model, [wanted])
        inside = [path for path in touched if any((path + ".").startswith(some + ".") for some in paths)]
        if inside:
            raise LoRAError(
                f"`modules_to_save` (={wanted}) must not hold a matrix that is adapted as well, as {inside[0]} is; "
                "take it out of target_modules by exclude_modules."
            )
    return found | saved_parameters(model, config.modules_to_save)


def saved_parameters(model: nn.Module, modules_to_save: Iterable[str]) -> dict[str, int]:
    """Returns name → entries of the parameters of modules that are trained whole.

    Raises:
        TargetError: A name fits no module with weights.
    """
    found: dict[str, int] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for wanted in modules_to_save:
        paths = _modules_named(model, [wanted])
        names = [name for name in parameters if any(name.startswith(path + ".") for path in paths)]
        if not names:
            children = ", ".join(name for name, _ in model.named_children())
            raise TargetError(
                f"`modules_to_save` (={wanted}) must match a module with weights; this model's parts are {children}."
            )
        found |= {name: parameters[name].numel() for name in names}
    return found


def _output_head_path(model: nn.Module) -> str | None:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return next((path for path, module in model.named_modules() if module is head), None) if head is not None else None


def _by_pattern(patterns: dict[str, int] | dict[str, float], path: str, stack: str | None, default: float) -> float:
    """Returns the value of the first pattern that fits the end of `path`, or of its stack's, at a dot."""
    for pattern, value in patterns.items():
        if any(fits_end(pattern, name) for name in (path, stack) if name):
            return value
    return default


def fits_end(pattern: str, path: str) -> bool:
    """Says whether a name of `rank_pattern` or `alpha_pattern` is of a path: it fits its end, at a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None
