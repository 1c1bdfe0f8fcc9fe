"""An adapter as a thing of its own: settings and factors, without a model; read and written in PEFT's layout."""

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from core.config import LoRAConfig
from core.errors import AdapterFileError, LoRAError
from core.inject import Injection, Target, adaptable, count_parameters, eject, injection_of, lora_layers, wrap
from core.layers import Factors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNDERSTOOD = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("bias", "init_lora_weights", "base_model_name_or_path"),
}
# PEFT's fields that do not change what saved factors mean: the files' keys already say which matrices they are of.
_WITHOUT_EFFECT = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "revision", "inference_mode", "fan_in_fan_out"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core"),
    *("loftq_config", "qalora_group_size", "runtime_config"),
}


@dataclass(frozen=True)
class Adapter:
    """All A and B of a model, with the settings that made them.

    Attributes:
        config: The settings.
        factors: Path of the adapted module → its factors.
        base_model: What the base model was called when the adapter was made, if known.
    """

    config: LoRAConfig
    factors: Mapping[str, Factors]
    base_model: str | None = None

    @property
    def num_parameters(self) -> int:
        """Entries of all A and B."""
        return sum(f.A.numel() + f.B.numel() for f in self.factors.values())

    @classmethod
    def from_model(cls, model: nn.Module, *, base_model: str | None = None) -> Self:
        """Takes a copy of the factors out of an adapted model; the model stays as it is.

        Raises:
            LoRAError: The model is not adapted.
        """
        config = injection_of(model).config
        factors = {
            path: Factors(f.A.to("cpu", copy=True), f.B.to("cpu", copy=True), f.scaling)
            for path, layer in lora_layers(model).items()
            for f in [layer.factors]
        }
        return cls(config, factors, base_model)

    def apply(self, model: nn.Module) -> Injection:
        """Puts the adapter on `model`, which is adapted afterwards as by `inject`; an earlier adapter is ejected.

        Raises:
            AdapterFileError: A matrix of the adapter is not in the model or has another shape; the
                model is left as it was.
        """
        shapes = adaptable(model)
        problems = []
        for path, f in self.factors.items():
            if path not in shapes:
                problems.append(f"{path} does not exist or cannot be adapted")
            elif shapes[path] != f.shape:
                problems.append(f"{path} is {_by(shapes[path])} in the model and {_by(f.shape)} in the adapter")
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise AdapterFileError(
                f"The adapter (made for {self.base_model or 'a model not named'}) must fit the model: "
                f"{'; '.join(problems[:5])}{more}. Load the base model that it was trained on."
            )
        eject(model)
        ordered = {path: self.factors[path] for path in shapes if path in self.factors}
        targets = tuple(Target(path, *f.shape, f.r, f.scaling) for path, f in ordered.items())
        unmatched = tuple(path for path in shapes if path not in self.factors)
        injection = Injection(
            self.config, targets, {"adapter": tuple(self.factors)}, unmatched, count_parameters(model)
        )
        wrap(model, injection)
        with torch.no_grad():
            for path, layer in lora_layers(model).items():
                layer.lora_A.copy_(self.factors[path].A)
                layer.lora_B.copy_(self.factors[path].B)
        return injection

    def save(self, folder: str | Path) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors`, as the PEFT library lays them out.

        Each file is whole or as it was before; other files in the folder are left alone.

        Raises:
            AdapterFileError: The folder cannot be written.
        """
        folder = Path(folder)
        tensors = {}
        for path, f in self.factors.items():
            tensors[f"{_PREFIX}{path}.lora_A.weight"] = f.A.contiguous()
            tensors[f"{_PREFIX}{path}.lora_B.weight"] = f.B.contiguous()
        metadata = {"format": "pt", "lora_config": json.dumps(self.config.to_dict())}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
                save_file(tensors, Path(scratch) / WEIGHTS_FILE, metadata=metadata)
                config = json.dumps(self._peft_config(), indent=2)
                (Path(scratch) / CONFIG_FILE).write_text(config, encoding="utf-8")
                for name in (WEIGHTS_FILE, CONFIG_FILE):
                    with (Path(scratch) / name).open("rb") as file:
                        os.fsync(file.fileno())
                for name in (WEIGHTS_FILE, CONFIG_FILE):
                    os.replace(Path(scratch) / name, folder / name)  # noqa: PTH105 (Path.replace is the same call)
        except (OSError, SafetensorError) as error:
            raise AdapterFileError(
                f"`folder` (={str(folder)!r}) could not be written: {error}. Free some space or name another folder."
            ) from error

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads an adapter folder, written by `save` or by the PEFT library.

        Raises:
            AdapterFileError: A file is missing or damaged, or the adapter is of a kind that is not LoRA's plain form.
        """
        folder = Path(folder)
        settings = _read_config(folder / CONFIG_FILE)
        tensors, metadata = _read_tensors(folder / WEIGHTS_FILE)
        pairs = _pair_up(tensors, folder)
        try:
            if "lora_config" in metadata:
                config = LoRAConfig.from_dict(json.loads(metadata["lora_config"]))
            else:
                config = _config_from_peft(settings, tuple(pairs))
            factors = {}
            for path, (A, B) in pairs.items():
                alpha = _alpha_for(settings, path)
                if not 0 < alpha < math.inf:
                    raise ValueError(f"`lora_alpha` of {path} (={alpha}) must be above 0")
                scaling = alpha / A.shape[0] ** (0.5 if settings.get("use_rslora") else 1)
                factors[path] = Factors(A, B, scaling)
        except (LoRAError, KeyError, TypeError, ValueError, AttributeError, RecursionError, re.error) as error:
            raise AdapterFileError(f"{folder / CONFIG_FILE} does not hold a LoRA config: {error}") from error
        return cls(config, factors, settings.get("base_model_name_or_path"))

    def _peft_config(self) -> dict[str, Any]:
        power = 1.0 if self.config.scaling == "standard" else 0.5
        ranks = {path: f.r for path, f in self.factors.items() if f.r != self.config.r}
        alphas = {path: f.scaling * f.r**power for path, f in self.factors.items()}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "inference_mode": True,
            "r": self.config.r,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "use_rslora": self.config.scaling == "rslora",
            "init_lora_weights": True if self.config.init == "kaiming" else "gaussian",
            "bias": "none",
            "fan_in_fan_out": False,
            # Whole paths: PEFT fits a name at the end of a path, so these fit exactly one matrix each.
            "target_modules": list(self.factors),
            "rank_pattern": {_exactly(p): r for p, r in ranks.items()},
            "alpha_pattern": {_exactly(p): a for p, a in alphas.items() if a != self.config.alpha},
        }


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]}"


def _exactly(path: str) -> str:
    return "^" + path.replace(".", r"\.")


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
    unsupported += ["bias"] if settings.get("bias", "none") != "none" else []
    unsupported += [] if settings.get("init_lora_weights", True) in (True, False, "gaussian") else ["init_lora_weights"]
    if unsupported:
        words = ", ".join(f"{k}={settings[k]!r}" for k in unsupported)
        raise AdapterFileError(f"The adapter in {path.parent} uses {words}, which cannot be read; save it without.")
    return settings


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
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


def _pair_up(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns path → (A, B); raises with every key that has no partner, no place or a bad shape."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        path, dot, half = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if half not in ("lora_A", "lora_B") or not dot or tensor.dim() != 2:
            problems.append(f"{key} {tuple(tensor.shape)} is no lora_A or lora_B matrix")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{key} holds NaN or infinity")
        else:
            halves.setdefault(path, {})[half] = tensor.float()
    pairs = {}
    for path, half in halves.items():
        if len(half) < 2:
            problems.append(f"{path} has {next(iter(half))} without its partner")
        elif half["lora_A"].shape[0] != half["lora_B"].shape[1]:
            problems.append(f"{path}: A {tuple(half['lora_A'].shape)} and B {tuple(half['lora_B'].shape)} differ in r")
        else:
            pairs[path] = (half["lora_A"], half["lora_B"])
    if problems or not pairs:
        words = "; ".join(problems[:5]) or "it holds no lora_A and lora_B"
        raise AdapterFileError(f"{folder / WEIGHTS_FILE} does not hold a LoRA adapter: {words}.")
    return pairs


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
    )
    return replace(
        config,
        rank_pattern=dict(settings.get("rank_pattern") or {}),
        alpha_pattern=dict(settings.get("alpha_pattern") or {}),
    )
