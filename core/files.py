"""Adapters on disk: PEFT's folder, written and read, and loralib's file, read. Nothing here can run code of a file."""

import json
import math
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.config import LoRAConfig
from core.declarations import read_json
from core.errors import AdapterFileError, LoRAError, listed, quoted
from core.matrices import Factors, Layout
from core.packing import PLACES, experts_apart, grouped, join_experts, join_magnitudes, join_slices, slices_apart

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNDERSTOOD = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("bias", "init_lora_weights", "base_model_name_or_path", "use_dora", "modules_to_save", "target_parameters"),
}
# PEFT's fields that do not change what saved factors mean: the files' keys already say which matrices they are of.
_WITHOUT_EFFECT = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "revision", "inference_mode", "fan_in_fan_out"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core"),
    *("loftq_config", "qalora_group_size", "runtime_config"),
}


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
        tensors |= {_PREFIX + key: tensor.contiguous() for key, tensor in _tensors_of(place, f).items()}
    for path, magnitude in magnitudes.items():
        size = (1, -1, *(1 for _ in joined[path].layout.kernel[1:])) if joined[path].layout.kernel else (-1,)
        tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = magnitude.view(size).contiguous()
    for name, tensor in contents.trained_in_full.items():
        path, _, attribute = name.rpartition(".")
        tensors[f"{_PREFIX}{path}.base_layer.{attribute}" if path in joined else _PREFIX + name] = tensor.contiguous()
    notes = {"lora_config": contents.config.to_dict(), "lora_slices": slices, "lora_experts": experts}
    metadata = {"format": "pt"} | {name: json.dumps(note) for name, note in notes.items()}
    settings = _peft_config(contents, joined)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            save_file(tensors, Path(scratch) / WEIGHTS_FILE, metadata=metadata)
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
        A, B = A.view(f.r, *f.layout.kernel), B.view(*B.shape, *(1 for _ in f.layout.kernel[1:]))
    return {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}


def _peft_config(contents: Contents, joined: Mapping[str, Factors]) -> dict[str, Any]:
    config = contents.config
    power = 1.0 if config.scaling == "standard" else 0.5
    ranks = {path: f.r // (f.layout.num_experts or 1) for path, f in joined.items()}
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
        AdapterFileError: A file is missing or damaged, or the adapter is of a kind that is not LoRA's.
    """
    settings = _read_config(folder / CONFIG_FILE)
    tensors, metadata = _read_tensors(folder / WEIGHTS_FILE)
    pairs, magnitudes, extras = _sort(tensors, folder / WEIGHTS_FILE)
    _check_company(settings, pairs, magnitudes, extras, folder)
    try:
        noted = json.loads(metadata.get("lora_experts") or "{}")
        stacks = {note["under"]: stack for stack, note in noted.items()} or _stacks_of_peft(settings, pairs)
        if "lora_config" in metadata:
            config = LoRAConfig.from_dict(json.loads(metadata["lora_config"]))
        else:
            config = _config_from_peft(settings, tuple(pairs))
        factors: dict[str, Factors] = {}
        for key, (A, B, layout) in pairs.items():
            path = stacks.get(key, key)
            alpha = _alpha_for(settings, path)
            if not 0 < alpha < math.inf:
                raise ValueError(f"`lora_alpha` of {path} (={alpha}) must be above 0")
            if layout.form == "linear" and settings.get("fan_in_fan_out"):
                layout = replace(layout, transposed=True)
            r = _rank_for(settings, path) if key in stacks else A.shape[0]
            f = Factors(A, B, alpha / r ** (0.5 if settings.get("use_rslora") else 1), layout)
            factors |= experts_apart(path, f, r, noted.get(path)) if key in stacks else {path: f}
        row_norms: dict[str, Tensor] = {}
        for whole, parts in json.loads(metadata.get("lora_slices") or "{}").items():
            slices = slices_apart(whole, factors.pop(whole), parts)
            factors |= slices
            if whole in magnitudes:
                row_norms[whole] = magnitudes.pop(whole)
                magnitudes |= {path: row_norms[whole][f.layout.rows] for path, f in slices.items()}
        if "lora_config" not in metadata and settings.get("target_parameters"):
            config = replace(config, target_modules=tuple(grouped(factors, "expert")))
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
        raise AdapterFileError(
            f"{folder / CONFIG_FILE} does not hold a LoRA config: {error}. Save it again."
        ) from error
    return Contents(config, factors, settings.get("base_model_name_or_path"), magnitudes, extras, row_norms)


def _check_company(
    settings: Mapping[str, Any],
    pairs: Mapping[str, Any],
    magnitudes: Mapping[str, Tensor],
    extras: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Raises when what stands beside A and B is not what the settings say."""
    wanted = settings.get("modules_to_save") or []
    problems = [f"{path} has no lora_magnitude_vector" for path in pairs if settings.get("use_dora")]
    problems = [problem for problem in problems if problem.split()[0] not in magnitudes]
    for name, tensor in extras.items():
        path, _, attribute = name.rpartition(".")
        named = any(path == one or path.endswith("." + one) or f".{one}." in f".{path}." for one in wanted)
        if not named and not (attribute == "bias" and settings.get("bias", "none") != "none"):
            problems.append(f"{name} {tuple(tensor.shape)} is no lora_A or lora_B matrix, nor named by modules_to_save")
    if problems:
        raise AdapterFileError(f"{folder / WEIGHTS_FILE} does not hold what {CONFIG_FILE} says: {listed(problems)}.")


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


def read_loralib(path: Path, scaling: float | None) -> Contents:
    """Reads one file of microsoft/LoRA's: `….lora_A` (r, in), `….lora_B` (out, r), and parameters trained in full.

    Raises:
        AdapterFileError: The file is damaged, holds code or no LoRA factors, or `scaling` is missing.
    """
    if path.suffix == ".safetensors":
        tensors, _ = _read_tensors(path)
    else:
        _check_size(path)
        try:
            with warnings.catch_warnings(action="ignore"):  # of torch's on how the file was pickled
                tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged pickle sets off in its reader
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise AdapterFileError(
                f"{path} cannot be read as tensors alone: it is damaged, or holds more than data and is not opened "
                f"({first}). Ask its maker for safetensors."
            ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise AdapterFileError(f"{path} must hold a table of tensors, as loralib saves one; it holds something else.")
    pairs, _, extras = _sort(dict(tensors), path)
    if scaling is None:
        raise AdapterFileError(
            f"`scaling` (=None) must be given for {path.name}: loralib's files do not say alpha. It is alpha / r; "
            f"r is {next(iter(pairs.values()))[0].shape[0]} here, and loralib's own examples take alpha = 2r, so 2."
        )
    if not 0 < scaling < math.inf:
        raise AdapterFileError(f"`scaling` (={scaling}) must be above 0.")
    factors = {path_: Factors(A, B, scaling, layout) for path_, (A, B, layout) in pairs.items()}
    return Contents(config_for(factors, extras), factors, None, {}, extras)


def _check_size(path: Path) -> None:
    """Refuses a zip file that holds more than its size, which torch would unpack to any size."""
    try:
        with zipfile.ZipFile(path) as packed:
            num_bytes = sum(part.file_size for part in packed.infolist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return  # torch says better what it is
    if num_bytes > path.stat().st_size:
        raise AdapterFileError(
            f"{path} must hold its tensors as torch.save writes them; here they are packed and would take "
            f"{num_bytes:,} bytes. Load and save the file where it was made."
        )


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
    try:
        settings = read_json(path)
    except FileNotFoundError as error:
        raise AdapterFileError(
            f"`folder` (={str(path.parent)!r}) must be an adapter folder; it has no {CONFIG_FILE}."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not readable JSON: {error}. Fetch or save it again.") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        raise AdapterFileError(f"`peft_type` (={kind!r}) in {path} must be 'LORA'; other kinds cannot be read.")
    # What is not known by name may change what the factors mean, so it is refused rather than passed over.
    unsupported = [k for k, value in settings.items() if value and k not in _UNDERSTOOD | _WITHOUT_EFFECT]
    start = settings.get("init_lora_weights", True)
    if start not in (True, False, "gaussian"):
        raise AdapterFileError(
            f"The adapter in {path.parent} was started by init_lora_weights={start!r}, so its factors are not the "
            "update; save it in PEFT with path_initial_model_for_weight_conversion, which writes the true one."
        )
    for name, kind, words in (("modules_to_save", list, "a list of names"), ("base_model_name_or_path", str, "text")):
        value = settings.get(name)
        if value is not None and not (isinstance(value, kind) and all(isinstance(part, str) for part in value)):
            raise AdapterFileError(f"`{name}` (={quoted(value)}) in {path} must be {words}; correct it.")
    if unsupported:
        words = ", ".join(f"{k}={quoted(settings[k])}" for k in unsupported)
        version = f" (of PEFT {settings['peft_version']})" if settings.get("peft_version") else ""
        raise AdapterFileError(
            f"The adapter in {path.parent}{version} uses {words}, which cannot be read; save it without."
        )
    return settings


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except FileNotFoundError as error:
        raise AdapterFileError(
            f"`folder` (={str(path.parent)!r}) must be an adapter folder; it has no {WEIGHTS_FILE}. "
            "Pickled weights (.bin) are not opened, as they can run code."
        ) from error
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} is damaged or no safetensors file: {error}. Fetch or save it again.") from error


Pair = tuple[Tensor, Tensor, Layout]


def _sort(tensors: dict[str, Tensor], file: Path) -> tuple[dict[str, Pair], dict[str, Tensor], dict[str, Tensor]]:
    """Returns path → (A, B, layout), path → magnitude, and what was trained in full; raises with every misfit."""
    halves: dict[str, dict[str, Tensor]] = {}
    magnitudes: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    problems = []
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            problems.append(f"{key} holds NaN, infinity or whole numbers")
            continue
        name = key.removeprefix(_PREFIX).replace(".modules_to_save.", ".")
        path, _, half = name.removesuffix(".weight").rpartition(".")
        if half in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            halves.setdefault(path, {})[half] = tensor.float()
        elif half == "lora_magnitude_vector":
            magnitudes[path] = tensor.float().flatten()
        elif "lora_" in name:
            problems.append(f"{key} {tuple(tensor.shape)} is no lora_A or lora_B matrix")
        elif ".original_module." not in name:  # a copy of the base that PEFT leaves in
            extras[re.sub(r"(\.base_layer)+\.", ".", name)] = tensor
    pairs: dict[str, Pair] = {}
    for path, half in halves.items():
        pair = _pair(path, half)
        if isinstance(pair, str):
            problems.append(pair)
        else:
            pairs[path] = pair
    for path, magnitude in magnitudes.items():
        if path not in halves or (path in pairs and len(magnitude) != pairs[path][1].shape[0]):
            problems.append(f"{path}: the magnitude, {len(magnitude)} numbers, fits no B")
    if problems or not pairs:
        words = listed(problems) or "it holds no lora_A and lora_B"
        raise AdapterFileError(f"{file} does not hold a LoRA adapter: {words}.")
    # PEFT saves an adapted embedding's whole base beside its factors.
    return pairs, magnitudes, {n: t for n, t in extras.items() if n.removesuffix(".weight") not in pairs}


def _pair(path: str, half: dict[str, Tensor]) -> Pair | str:
    """Returns A (r, in), B (out, r) and their layout, or what is wrong with them."""
    kind = "lora_embedding_" if any("embedding" in name for name in half) else "lora_"
    if set(half) != {kind + "A", kind + "B"}:
        return f"{path} has {' and '.join(sorted(half))} without its partner"
    A, B = half[kind + "A"], half[kind + "B"]
    shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
    if A.dim() < 2 or A.dim() != B.dim() or not A.numel() or not B.numel():
        return f"{path}: {shapes} are no matrices or kernels"
    layout = Layout("embedding") if kind == "lora_embedding_" else Layout()
    if A.dim() > 2:
        if B[0, 0].numel() != 1:
            return f"{path}: {shapes} are no kernels of PEFT's layout, whose B is 1 × 1"
        layout = Layout("convolution", kernel=tuple(A.shape[1:]))
        A, B = A.flatten(1), B.flatten(1)
    return (A, B, layout) if A.shape[0] == B.shape[1] else f"{path}: {shapes} differ in r"


def _alpha_for(settings: Mapping[str, Any], path: str) -> float:
    return float(_by_pattern(settings.get("alpha_pattern"), path, settings["lora_alpha"]))


def _rank_for(settings: Mapping[str, Any], path: str) -> int:
    return int(_by_pattern(settings.get("rank_pattern"), path, settings["r"]))


def _by_pattern(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    return next((v for pattern, v in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", path)), default)


def _config_from_peft(settings: dict[str, Any], paths: tuple[str, ...]) -> LoRAConfig:
    targets = settings.get("target_modules") or paths
    config = LoRAConfig(
        r=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        scaling="rslora" if settings.get("use_rslora") else "standard",
        init="gaussian" if settings.get("init_lora_weights") == "gaussian" else "kaiming",
        dora=bool(settings.get("use_dora")),
        bias=settings.get("bias") or "none",
        modules_to_save=tuple(settings.get("modules_to_save") or ()),
    )
    return replace(
        config,
        rank_pattern=dict(settings.get("rank_pattern") or {}),
        alpha_pattern=dict(settings.get("alpha_pattern") or {}),
    )
