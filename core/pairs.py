"""The tensors of an adapter's file, sorted into pairs of A and B and what stands beside them; or what is wrong."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.declarations import read_json
from core.errors import AdapterFileError, listed
from core.matrices import Layout
from core.packing import groups_apart

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before every path."""
NO_PAIRS = "it holds no lora_A and lora_B"


@dataclass(frozen=True)
class Pair:
    """A, (r, in_features), and B, (out_features, r), as matrices; `file_r` is the r that the file has them with."""

    A: Tensor
    B: Tensor
    layout: Layout
    file_r: int


@dataclass(frozen=True)
class Sorted:
    """The tensors of a file: path → pair, path → magnitude, name → what was trained in full; and what is wrong."""

    pairs: Mapping[str, Pair]
    magnitudes: Mapping[str, Tensor]
    extras: Mapping[str, Tensor]
    problems: list[str]


def sort_tensors(tensors: Mapping[str, Tensor]) -> Sorted:
    """Returns the tensors by what they are, and all that is wrong with them."""
    halves: dict[str, dict[str, Tensor]] = {}
    magnitudes: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    problems = []
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            problems.append(f"{key} holds NaN, infinity or whole numbers")
        name = key.removeprefix(PREFIX).replace(".modules_to_save.", ".")
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
        if path not in halves or (path in pairs and len(magnitude) != pairs[path].B.shape[0]):
            problems.append(f"{path}: the magnitude, {len(magnitude)} numbers, fits no B")
    if not halves:
        problems.append(NO_PAIRS)
    # PEFT saves an adapted embedding's whole base beside its factors.
    extras = {name: t for name, t in extras.items() if name.removesuffix(".weight") not in pairs}
    return Sorted(pairs, magnitudes, extras, problems)


def not_lora(file: Path, problems: Iterable[str]) -> str:
    """Returns the sentence that says all that is wrong with the tensors of a file."""
    return f"{file} does not hold a LoRA adapter: {listed(problems)}."


def _pair(path: str, half: dict[str, Tensor]) -> Pair | str:
    """Returns A and B as matrices, or what is wrong with them."""
    kind = "lora_embedding_" if any("embedding" in name for name in half) else "lora_"
    if set(half) != {kind + "A", kind + "B"}:
        return f"{path} has {' and '.join(sorted(half))} without its partner"
    A, B = half[kind + "A"], half[kind + "B"]
    shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
    if A.dim() < 2 or A.dim() != B.dim() or not A.numel() or not B.numel():
        return f"{path}: {shapes} are no matrices or kernels"
    layout, file_r = Layout("embedding") if kind == "lora_embedding_" else Layout(), A.shape[0]
    if A.dim() > 2:
        if B[0, 0].numel() != 1:
            return f"{path}: {shapes} are no kernels of PEFT's layout, whose B is 1 × 1"
        groups, B = max(1, file_r // B.shape[1]), B.flatten(1)
        if groups > 1 and file_r == groups * B.shape[1]:
            apart = groups_apart(A, B, groups)
            if apart is None:
                return (
                    f"{path}: {shapes} of {groups} groups read inputs of other groups, "
                    "which no kernel of such a convolution can do"
                )
            A, B = apart
        layout = Layout("convolution", kernel=tuple(A.shape[1:]), groups=groups)
        A = A.flatten(1)
    return Pair(A, B, layout, file_r) if A.shape[0] == B.shape[1] else f"{path}: {shapes} differ in r"


def read_settings(path: Path) -> Any:
    """Returns what the JSON file of an adapter's folder holds.

    Raises:
        AdapterFileError: It is missing, or no JSON.
    """
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise AdapterFileError(
            f"`folder` (={str(path.parent)!r}) must be an adapter folder; it has no {CONFIG_FILE}."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not readable JSON: {error}. Fetch or save it again.") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a safetensors file, and its notes.

    Raises:
        AdapterFileError: It is missing or damaged.
    """
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
