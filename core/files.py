"""Adapters on disk: PEFT's folder, written and read. Nothing here can run code of a file."""

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from core.config import LoRAConfig
from core.errors import AdapterFileError, LoRAError, listed, quoted
from core.matrices import Factors
from core.packing import (
    PLACES,
    experts_apart,
    grouped,
    join_experts,
    join_groups,
    join_magnitudes,
    join_slices,
    slices_apart,
)
from core.pairs import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    Sorted,
    not_lora,
    read_settings,
    read_tensors,
    sort_tensors,
)

METHOD_KEY = "lora_studio_method"
"""Stands in the settings of what another method than LoRA has learned (`core.baselines`)."""
_UNDERSTOOD = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("bias", "init_lora_weights", "base_model_name_or_path", "use_dora", "modules_to_save", "target_parameters"),
}
# PEFT's fields that do not change what saved factors mean: the files' keys already say which matrices they are of.
_WITHOUT_EFFECT = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "revision", "inference_mode", "fan_in_fan_out"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core"),
    *("loftq_config", "qalora_group_size", "runtime_config", "eva_config"),
}
# These start B·A at zero and leave W0 as it is, so that the factors of the file are the update.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Contents:
    """What a file holds; the attributes are those of `core.adapter.Adapter`."""

    config: LoRAConfig
    factors: Mapping[str, Factors]
    base_model: str | None
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    trained_in_full: Mapping[str, Tensor] = field(default_factory=dict)
    row_norms: Mapping[str, Tensor] = field(default_factory=dict)


# Writing


def write(folder: Path, contents: Contents) -> None:
    """Writes PEFT's two files, each whole or not at all.

    Raises:
        AdapterFileError: The folder cannot be written.
    """
    whole, slices = join_slices(contents.factors)
    joined, experts = join_experts(whole)
    magnitudes = join_magnitudes(contents.factors, contents.magnitudes, contents.row_norms)
    tensors: dict[str, Tensor] = {}
    for path, f in joined.items():
        place = experts[path]["under"] if path in experts else path
        tensors |= {PREFIX + key: tensor.contiguous() for key, tensor in _tensors_of(place, f).items()}
    for path, magnitude in magnitudes.items():
        size = (1, -1, *(1 for _ in joined[path].layout.kernel[1:])) if joined[path].layout.kernel else (-1,)
        tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = magnitude.view(size).contiguous()
    for name, tensor in contents.trained_in_full.items():
        path, _, attribute = name.rpartition(".")
        tensors[f"{PREFIX}{path}.base_layer.{attribute}" if path in joined else PREFIX + name] = tensor.contiguous()
    notes = {"lora_config": contents.config.to_dict(), "lora_slices": slices, "lora_experts": experts}
    metadata = {"format": "pt"} | {name: json.dumps(note) for name, note in notes.items()}
    write_both(folder, tensors, metadata, _peft_config(contents, joined))


def write_both(
    folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], settings: Mapping[str, Any]
) -> None:
    """Writes the tensors and the settings, each file whole or not at all.

    Raises:
        AdapterFileError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            save_file(dict(tensors), Path(scratch) / WEIGHTS_FILE, metadata=dict(metadata))
            (Path(scratch) / CONFIG_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                with (Path(scratch) / name).open("rb") as file:
                    os.fsync(file.fileno())
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                os.replace(Path(scratch) / name, folder / name)  # noqa: PTH105 (Path.replace is the same call)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(
            f"`folder` (={str(folder)!r}) could not be written: {error}. Free some space or name another folder."
        ) from error


def _tensors_of(path: str, f: Factors) -> dict[str, Tensor]:
    """Returns PEFT's key, without its prefix → tensor, for one matrix."""
    if f.layout.form == "embedding":
        return {f"{path}.lora_embedding_A": f.A, f"{path}.lora_embedding_B": f.B}
    A, B = f.A, f.B
    if f.layout.form == "convolution":
        A, B = join_groups(f), B.view(*B.shape, *(1 for _ in f.layout.kernel[1:]))
    return {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}


def _peft_config(contents: Contents, joined: Mapping[str, Factors]) -> dict[str, Any]:
    config = contents.config
    power = 1.0 if config.scaling == "standard" else 0.5
    ranks = {path: f.r * f.layout.groups // (f.layout.num_experts or 1) for path, f in joined.items()}
    alphas = {path: f.scaling * ranks[path] ** power for path, f in joined.items()}
    stacks = [path for path, f in joined.items() if f.layout.form == "expert"]
    full = [name for name in contents.trained_in_full if not name.endswith(".bias") or config.bias == "none"]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": contents.base_model,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0 if stacks else config.dropout,  # PEFT has none for stacks; it is for training only
        "use_rslora": config.scaling == "rslora",
        "use_dora": bool(contents.magnitudes),
        # The true update starts at nothing, whatever training started from.
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "bias": config.bias,
        "fan_in_fan_out": any(f.layout.transposed for f in joined.values()),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in full}) or None,
        # Whole paths: PEFT fits a name at the end of a path, so these fit exactly one matrix each.
        "target_modules": [path for path in joined if path not in stacks],
        "target_parameters": stacks or None,
        "rank_pattern": {_exactly(p): r for p, r in ranks.items() if r != config.r},
        "alpha_pattern": {_exactly(p): a for p, a in alphas.items() if a != config.alpha},
    }


def _exactly(path: str) -> str:
    return "^" + path.replace(".", r"\.")


# Reading


def read(folder: Path) -> Contents:
    """Reads PEFT's two files.

    Raises:
        AdapterFileError: A file is missing or damaged, or the adapter is of a kind that is not LoRA's; all
            that is wrong in both files comes in one message.
    """
    settings = _read_config(folder / CONFIG_FILE)
    tensors, metadata = read_tensors(folder / WEIGHTS_FILE)
    sentences = _config_problems(settings, folder)
    found = sort_tensors(tensors)
    if found.problems:
        sentences.append(not_lora(folder / WEIGHTS_FILE, found.problems))
    contents: Contents | None = None
    cause: Exception | None = None
    try:
        noted = json.loads(metadata.get("lora_experts") or "{}")
        stacks = {note["under"]: stack for stack, note in noted.items()} or _stacks_of_peft(settings, found.pairs)
        if "lora_config" in metadata:
            config = LoRAConfig.from_dict(json.loads(metadata["lora_config"]))
        else:
            config = _config_from_peft(settings, tuple(found.pairs), tuple(found.extras))
        strangers = _strangers(settings, found, stacks)
        if strangers:
            sentences.append(f"{folder / WEIGHTS_FILE} does not hold what {CONFIG_FILE} says: {listed(strangers)}.")
        alphas = {key: _alpha_for(settings, stacks.get(key, key)) for key in found.pairs}
        wrong = [f"{key} has a `lora_alpha` of {a}" for key, a in alphas.items() if not 0 < a < math.inf]
        if wrong:
            raise ValueError(f"{listed(wrong)}; it must be above 0")
        if not sentences:
            contents = _contents(settings, metadata, found, stacks, alphas, config)
    except (
        LoRAError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        re.error,
    ) as error:
        words = str(error).removesuffix(".")
        sentences.append(f"{folder / CONFIG_FILE} does not hold a LoRA config: {words}. Save it again.")
        cause = error
    if contents is None:
        raise AdapterFileError(" ".join(sentences)) from cause
    return contents


def _contents(
    settings: Mapping[str, Any],
    metadata: Mapping[str, str],
    found: Sorted,
    stacks: Mapping[str, str],
    alphas: Mapping[str, float],
    config: LoRAConfig,
) -> Contents:
    """Returns the pairs of two files that fit each other as factors, slices and experts apart again."""
    noted = json.loads(metadata.get("lora_experts") or "{}")
    factors: dict[str, Factors] = {}
    for key, pair in found.pairs.items():
        path = stacks.get(key, key)
        r = _rank_for(settings, path) if key in stacks else pair.file_r
        layout = pair.layout
        if layout.form == "linear" and settings.get("fan_in_fan_out"):
            layout = replace(layout, transposed=True)
        f = Factors(pair.A, pair.B, alphas[key] / r ** (0.5 if settings.get("use_rslora") else 1), layout)
        factors |= experts_apart(path, f, r, noted.get(path)) if key in stacks else {path: f}
    magnitudes = dict(found.magnitudes)
    row_norms: dict[str, Tensor] = {}
    for whole, parts in json.loads(metadata.get("lora_slices") or "{}").items():
        slices = slices_apart(whole, factors.pop(whole), parts)
        factors |= slices
        if whole in magnitudes:
            row_norms[whole] = magnitudes.pop(whole)
            magnitudes |= {path: row_norms[whole][f.layout.rows] for path, f in slices.items()}
    if "lora_config" not in metadata and settings.get("target_parameters"):
        config = replace(config, target_modules=tuple(grouped(factors, "expert")))
    base_model = settings.get("base_model_name_or_path")
    return Contents(config, factors, base_model, magnitudes, found.extras, row_norms)


def _strangers(settings: Mapping[str, Any], found: Sorted, stacks: Mapping[str, str]) -> list[str]:
    """Returns what in the file of weights is not as the settings say."""
    wanted = settings.get("modules_to_save") or []
    problems = []
    for path, pair in found.pairs.items():
        r = _rank_for(settings, path)
        if path not in stacks and r != pair.file_r:
            problems.append(f"{path} has an r of {pair.file_r}, not {r}")
        if settings.get("use_dora") and path not in found.magnitudes:
            problems.append(f"{path} has no lora_magnitude_vector")
    for name, tensor in found.extras.items():
        path, _, attribute = name.rpartition(".")
        # PEFT takes a name at the end of a path, also of a part of a word: norm is input_layernorm, too.
        named = any(path.endswith(one) or f"{one}." in path for one in wanted)
        if not named and not (attribute == "bias" and settings.get("bias", "none") != "none"):
            problems.append(f"{name} {tuple(tensor.shape)} is no lora_A or lora_B matrix, nor named by modules_to_save")
    return problems


def _stacks_of_peft(settings: Mapping[str, Any], pairs: Mapping[str, Any]) -> dict[str, str]:
    """Returns key of A and B → path of the stack of experts that they are of, going by `target_parameters`.

    Raises:
        ValueError: The names do not tell which stack is which.
    """
    parameters, targets = settings.get("target_parameters") or (), settings.get("target_modules") or ()

    def fits(path: str, name: str) -> bool:
        return path == name or path.endswith("." + name)

    keys: dict[str, list[str]] = {}
    for key in pairs if parameters else ():
        module = re.sub(r"(\.base_layer)+$", "", key)
        linear = re.fullmatch(targets, module) if isinstance(targets, str) else any(fits(module, t) for t in targets)
        if key != module or not linear:
            keys.setdefault(module, []).append(key)
    found: dict[str, str] = {}
    for module, of_module in keys.items():
        split = [name.rpartition(".") for name in parameters]
        # A bare name is any module's; one with the module's own goes before it.
        names = {name for above, _, name in split if above and fits(module, above)} or {n for a, _, n in split if not a}
        if len(names) != len(of_module) or (len(names) > 1 and names - PLACES.keys()):
            raise ValueError(
                f"`target_parameters` (={', '.join(parameters)}) must tell which of {module}'s parameters "
                f"{', '.join(of_module)} are of"
            )
        inner_first = sorted(of_module, key=len, reverse=True)
        by_place = sorted(names, key=lambda name: PLACES.get(name, 0))
        found |= {key: f"{module}.{name}" for key, name in zip(inner_first, by_place, strict=True)}
    return found


def config_for(factors: Mapping[str, Factors], trained_in_full: Mapping[str, Tensor] | None = None) -> LoRAConfig:
    """Returns the settings that say of some factors which matrices they are of, and their r and alpha."""
    first = max(factors.values(), key=lambda f: f.r)
    others = {path: f for path, f in factors.items() if (f.r, f.scaling) != (first.r, first.scaling)}
    return LoRAConfig(
        r=first.r,
        alpha=first.scaling * first.r,
        target_modules=tuple(factors),
        rank_pattern={_exactly(path): f.r for path, f in others.items()},
        alpha_pattern={_exactly(path): f.scaling * f.r for path, f in others.items()},
        modules_to_save=tuple(sorted({name.rpartition(".")[0] for name in trained_in_full or ()})),
    )


def _read_config(path: Path) -> dict[str, Any]:
    settings = read_settings(path)
    if isinstance(settings, dict) and METHOD_KEY in settings:
        raise AdapterFileError(
            f"The folder {path.parent} must hold a LoRA adapter; what it holds was trained by another method, "
            f"{quoted(settings[METHOD_KEY])}, and has no A and B: no spectrum, no strength, nothing to merge, add or "
            "export. Take a run of the method lora for that; a pane of Chat runs this one as it was trained."
        )
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        raise AdapterFileError(f"`peft_type` (={kind!r}) in {path} must be 'LORA'; other kinds cannot be read.")
    return settings


def _config_problems(settings: dict[str, Any], folder: Path) -> list[str]:
    """Returns why the settings cannot be read, in whole sentences; a setting that is no table of names is taken out."""
    sentences = []
    start = settings.get("init_lora_weights", True)
    if start not in _STARTS:
        sentences.append(
            f"The adapter in {folder} was started by init_lora_weights={quoted(start)}, so its factors are not the "
            "update; save it in PEFT with path_initial_model_for_weight_conversion, which writes the true one."
        )
    for name, kind, words in (("modules_to_save", list, "a list of names"), ("base_model_name_or_path", str, "text")):
        value = settings.get(name)
        if value is not None and not (isinstance(value, kind) and all(isinstance(part, str) for part in value)):
            sentences.append(f"`{name}` (={quoted(value)}) in {folder / CONFIG_FILE} must be {words}; correct it.")
            settings[name] = None
    # What is not known by name may change what the factors mean, so it is refused rather than passed over.
    unsupported = [k for k, value in settings.items() if value and k not in _UNDERSTOOD | _WITHOUT_EFFECT]
    if unsupported:
        words = ", ".join(f"{k}={quoted(settings[k])}" for k in unsupported)
        version = f" (of PEFT {settings['peft_version']})" if settings.get("peft_version") else ""
        sentences.append(f"The adapter in {folder}{version} uses {words}, which cannot be read; save it without.")
    return sentences


def _alpha_for(settings: Mapping[str, Any], path: str) -> float:
    return float(_by_pattern(settings.get("alpha_pattern"), path, settings["lora_alpha"]))


def _rank_for(settings: Mapping[str, Any], path: str) -> int:
    return int(_by_pattern(settings.get("rank_pattern"), path, settings["r"]))


def _by_pattern(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    return next((v for pattern, v in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", path)), default)


def _config_from_peft(settings: dict[str, Any], paths: tuple[str, ...], extras: tuple[str, ...]) -> LoRAConfig:
    targets = settings.get("target_modules") or paths
    excluded = settings.get("exclude_modules") or ()
    layers = settings.get("layers_to_transform")
    layers = [] if layers is None else [layers] if isinstance(layers, int) else layers
    # A name of PEFT's may take in more than one here does: then each is said by its path.
    saved = tuple(settings.get("modules_to_save") or ())
    modules = {
        name.rpartition(".")[0]
        for name in extras
        if not name.endswith(".bias") or name.rpartition(".")[0] + ".weight" in extras
    }
    if not all(any(f".{one}." in f".{module}." for one in saved) for module in modules):
        saved = tuple(sorted(modules))
    config = LoRAConfig(
        r=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        scaling="rslora" if settings.get("use_rslora") else "standard",
        init="gaussian" if settings.get("init_lora_weights") == "gaussian" else "kaiming",
        dora=bool(settings.get("use_dora")),
        bias=settings.get("bias") or "none",
        modules_to_save=saved,
        exclude_modules=excluded if isinstance(excluded, str) else tuple(excluded),
        layers=",".join(str(int(layer)) for layer in layers),
    )
    return replace(
        config,
        rank_pattern=dict(settings.get("rank_pattern") or {}),
        alpha_pattern=dict(settings.get("alpha_pattern") or {}),
    )
