"""Adapters on disk: PEFT's folder, written and read, and loralib's file, read. Nothing here can run code of a file."""

import json
import math
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.config import LoRAConfig
from core.errors import AdapterFileError, LoRAError
from core.matrices import Factors, Layout

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNDERSTOOD = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("bias", "init_lora_weights", "base_model_name_or_path", "use_dora", "modules_to_save"),
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


# Writing


def write(folder: Path, contents: Contents) -> None:
    """Writes PEFT's two files, each whole or not at all.

    Raises:
        AdapterFileError: The folder cannot be written.
    """
    joined, magnitudes, slices = _join_slices(contents)
    tensors: dict[str, Tensor] = {}
    for path, f in joined.items():
        tensors |= {_PREFIX + key: tensor.contiguous() for key, tensor in _tensors_of(path, f).items()}
    for path, magnitude in magnitudes.items():
        size = (1, -1, *(1 for _ in joined[path].layout.kernel[1:])) if joined[path].layout.kernel else (-1,)
        tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = magnitude.view(size).contiguous()
    for name, tensor in contents.trained_in_full.items():
        path, _, attribute = name.rpartition(".")
        tensors[f"{_PREFIX}{path}.base_layer.{attribute}" if path in joined else _PREFIX + name] = tensor.contiguous()
    metadata = {"format": "pt", "lora_config": json.dumps(contents.config.to_dict()), "lora_slices": json.dumps(slices)}
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


def _join_slices(contents: Contents) -> tuple[dict[str, Factors], dict[str, Tensor], dict[str, Any]]:
    """Returns factors and magnitudes with the slices of each projection as one, and how to take them apart again.

    The A of all slices lie on each other, their B stand block by block in the rows that are theirs.
    """
    joined: dict[str, Factors] = {}
    magnitudes: dict[str, Tensor] = {}
    slices: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    for path, f in contents.factors.items():
        groups.setdefault(path.rpartition(".")[0] if f.layout.form == "slice" else path, []).append(path)
    for whole, paths in groups.items():
        parts = [contents.factors[path] for path in paths]
        if parts[0].layout.form != "slice":
            joined[whole] = parts[0]
            magnitudes |= {path: contents.magnitudes[path] for path in paths if path in contents.magnitudes}
            continue
        if any(path in contents.magnitudes for path in paths):
            raise AdapterFileError(
                f"`dora` (=True) on slices of {whole} cannot be written: PEFT's layout has one magnitude for all rows. "
                "Adapt the projection whole."
            )
        scaling, num_rows = parts[0].scaling, parts[0].layout.num_rows
        B = torch.zeros(num_rows, sum(f.r for f in parts))
        column = 0
        for f in parts:
            factor = f.scaling / scaling
            B[f.layout.rows, column : column + f.r] = f.B if factor == 1 else f.B * factor
            column += f.r
        layout = Layout(transposed=parts[0].layout.transposed)
        joined[whole] = Factors(torch.cat([f.A for f in parts]), B, scaling, layout)
        slices[whole] = [
            {"name": path.rpartition(".")[2], "r": f.r, "scaling": f.scaling, "rows": _runs(f.layout.rows)}
            for path, f in zip(paths, parts, strict=True)
        ]
    return joined, magnitudes, slices


def _runs(rows: Tensor | None) -> list[list[int]]:
    """Returns rising numbers as runs [first, last + 1]."""
    numbers = [] if rows is None else rows.tolist()
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] = number + 1
        else:
            runs.append([number, number + 1])
    return runs


def _peft_config(contents: Contents, joined: Mapping[str, Factors]) -> dict[str, Any]:
    config = contents.config
    power = 1.0 if config.scaling == "standard" else 0.5
    ranks = {path: f.r for path, f in joined.items() if f.r != config.r}
    alphas = {path: f.scaling * f.r**power for path, f in joined.items()}
    full = [name for name in contents.trained_in_full if not name.endswith(".bias") or config.bias == "none"]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": contents.base_model,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.scaling == "rslora",
        "use_dora": bool(contents.magnitudes),
        # The true update starts at nothing, whatever training started from.
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "bias": config.bias,
        "fan_in_fan_out": any(f.layout.transposed for f in joined.values()),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in full}) or None,
        # Whole paths: PEFT fits a name at the end of a path, so these fit exactly one matrix each.
        "target_modules": list(joined),
        "rank_pattern": {_exactly(p): r for p, r in ranks.items()},
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
        if "lora_config" in metadata:
            config = LoRAConfig.from_dict(json.loads(metadata["lora_config"]))
        else:
            config = _config_from_peft(settings, tuple(pairs))
        factors: dict[str, Factors] = {}
        for path, (A, B, layout) in pairs.items():
            alpha = _alpha_for(settings, path)
            if not 0 < alpha < math.inf:
                raise ValueError(f"`lora_alpha` of {path} (={alpha}) must be above 0")
            if layout.form == "linear" and settings.get("fan_in_fan_out"):
                layout = replace(layout, transposed=True)
            scaling = alpha / A.shape[0] ** (0.5 if settings.get("use_rslora") else 1)
            factors[path] = Factors(A, B, scaling, layout)
        for whole, parts in json.loads(metadata.get("lora_slices") or "{}").items():
            factors |= _take_apart(whole, factors.pop(whole), parts)
    except (LoRAError, KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, re.error) as error:
        raise AdapterFileError(f"{folder / CONFIG_FILE} does not hold a LoRA config: {error}") from error
    return Contents(config, factors, settings.get("base_model_name_or_path"), magnitudes, extras)


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
        raise AdapterFileError(
            f"{folder / WEIGHTS_FILE} does not hold what {CONFIG_FILE} says: {'; '.join(problems[:5])}."
        )


def _take_apart(whole: str, joined: Factors, parts: list[dict[str, Any]]) -> dict[str, Factors]:
    found, column = {}, 0
    for part in parts:
        r, scaling = int(part["r"]), float(part["scaling"])
        rows = torch.cat([torch.arange(a, b) for a, b in part["rows"]])
        columns = slice(column, column + r)
        B = joined.B[rows, columns]
        factor = scaling / joined.scaling
        layout = Layout("slice", rows=rows, num_rows=joined.B.shape[0], transposed=joined.layout.transposed)
        found[f"{whole}.{part['name']}"] = Factors(joined.A[columns], B if factor == 1 else B / factor, scaling, layout)
        column += r
    return found


def read_loralib(path: Path, scaling: float | None) -> Contents:
    """Reads one file of microsoft/LoRA's: `….lora_A` (r, in), `….lora_B` (out, r), and parameters trained in full.

    Raises:
        AdapterFileError: The file is damaged, holds code or no LoRA factors, or `scaling` is missing.
    """
    if path.suffix == ".safetensors":
        tensors, _ = _read_tensors(path)
    else:
        try:
            with warnings.catch_warnings(action="ignore"):  # of torch's on how the file was pickled
                tensors = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
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
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterFileError(
            f"`folder` (={str(path.parent)!r}) must be an adapter folder; it has no {CONFIG_FILE}."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not readable JSON: {error}.") from error
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
    if unsupported:
        words = ", ".join(f"{k}={settings[k]!r}" for k in unsupported)
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
        raise AdapterFileError(f"{path} is damaged or no safetensors file: {error}.") from error


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
            extras[name.replace(".base_layer.", ".")] = tensor
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
        words = "; ".join(problems[:5]) or "it holds no lora_A and lora_B"
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterFileError(f"{file} does not hold a LoRA adapter: {words}{more}.")
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


def _alpha_for(settings: dict[str, Any], path: str) -> float:
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(alpha)
    return float(settings["lora_alpha"])


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
