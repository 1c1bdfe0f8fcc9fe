"""What a method has learned, without a model: kept in a folder like an adapter's, and put on a base again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from core.adapter import Adapter
from core.baselines.methods import apply_method, plan_method
from core.config import LoRAConfig
from core.errors import AdapterFileError, LoRAError, listed
from core.files import METHOD_KEY, write_both
from core.inject import injection_of
from core.method import MethodConfig
from core.pairs import CONFIG_FILE, WEIGHTS_FILE, read_settings, read_tensors
from core.targets import Injection


@dataclass(frozen=True)
class Baseline:
    """What was trained by another method than LoRA.

    Attributes:
        method: The method.
        tensors: All that was trained, by its name in the model that `apply_method` gave.
        base_model: What the base model was called, if known.
        modules_to_save: What was trained whole besides.
    """

    method: MethodConfig
    tensors: Mapping[str, Tensor]
    base_model: str | None = None
    modules_to_save: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Entries of all that was trained."""
        return sum(t.numel() for t in self.tensors.values())

    @classmethod
    def from_model(cls, model: nn.Module, *, base_model: str | None = None) -> Self:
        """Takes a copy of what was trained out of a model; the model stays as it is.

        Raises:
            LoRAError: The model was not made ready by a method other than LoRA.
        """
        injection = injection_of(model)
        if injection.method.method == "lora":
            raise LoRAError("`model` must be trained by another method than lora here; use Adapter.from_model(model).")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        copies = {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}
        return cls(injection.method, copies, base_model, injection.config.modules_to_save)

    def check_fit(self, model: nn.Module, *, base_model: str | None = None) -> Injection:
        """Returns what `apply` would do to `model`, which is left as it is.

        Raises:
            AdapterFileError: As of `apply`.
            LoRAError: The method cannot be used on this model.
        """
        injection = plan_method(model, self.method, LoRAConfig(modules_to_save=self.modules_to_save))
        own = {name: tuple(p.shape) for name, p in model.named_parameters() if name in injection.trained_in_full}
        wanted = own | injection.added
        found = {_plain(name): tuple(t.shape) for name, t in self.tensors.items()}
        problems = [f"{name} is not in the file" for name in wanted if name not in found]
        problems += [f"{name} is not trained by {self.method.method} here" for name in found if name not in wanted]
        problems += [
            f"{name} is {wanted[name]} in the model and {shape} in the file"
            for name, shape in found.items()
            if wanted.get(name, shape) != shape
        ]
        if base_model is not None and self.base_model not in (None, base_model):
            problems.insert(0, f"this model is {base_model}")
        if problems:
            raise AdapterFileError.of_misfits(f"What {self.method.method} trained", self.base_model, problems)
        return injection

    def apply(self, model: nn.Module, *, base_model: str | None = None) -> Injection:
        """Makes `model` what it was after training; its own parameters are replaced, not written to.

        Args:
            model: The base model, not adapted.
            base_model: What it is called; what was trained on another one is then refused.

        Raises:
            AdapterFileError: The parameters are not those of the model, or it names another base model.
            LoRAError: The method cannot be used on this model, or the model is adapted already.
        """
        self.check_fit(model, base_model=base_model)
        requires = {p: p.requires_grad for p in model.parameters()}
        injection = apply_method(model, self.method, LoRAConfig(modules_to_save=self.modules_to_save))
        names: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        for name, p in list(model.named_parameters()):
            if name in self.tensors:
                new = nn.Parameter(self.tensors[name].to(p.device, p.dtype, copy=True))
                for place in names[id(p)]:  # also where a weight is tied to it
                    path, _, attribute = place.rpartition(".")
                    model.get_submodule(path).register_parameter(attribute, new)
                p.requires_grad_(requires.get(p, True))  # another model may share it
        return injection

    def save(self, folder: str | Path) -> None:
        """Writes two files of the names that an adapter's have, each whole or as it was before.

        Raises:
            AdapterFileError: The folder cannot be written.
        """
        settings = {
            METHOD_KEY: self.method.method,
            "method": self.method.to_dict(),
            "modules_to_save": list(self.modules_to_save),
            "base_model_name_or_path": self.base_model,
        }
        tensors = {name: t.contiguous() for name, t in self.tensors.items()}
        write_both(Path(folder), tensors, {"format": "pt"}, settings)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; nothing in it can run.

        Raises:
            AdapterFileError: A file is missing or damaged, or the folder holds something else.
        """
        place = Path(folder) / CONFIG_FILE
        settings = read_settings(place)
        if not isinstance(settings, dict) or METHOD_KEY not in settings:
            raise AdapterFileError(f"{place} must name a method other than lora; read a LoRA adapter by Adapter.load.")
        try:
            method = MethodConfig.from_dict(settings["method"])
            saved: Any = settings.get("modules_to_save") or []
            named: Any = settings.get("base_model_name_or_path")
            if not all(isinstance(name, str) for name in (*saved, named or "")) or method.method == "lora":
                raise LoRAError("modules_to_save or base_model_name_or_path are no text, or the method is lora")
        except (LoRAError, KeyError, TypeError) as error:
            raise AdapterFileError(f"{place} does not hold a method's settings: {error}. Save it again.") from error
        tensors, _ = read_tensors(Path(folder) / WEIGHTS_FILE)
        wrong = [n for n, t in tensors.items() if not t.is_floating_point() or not torch.isfinite(t).all()]
        if wrong:
            raise AdapterFileError(
                f"{Path(folder) / WEIGHTS_FILE} must hold finite numbers: {listed(f'{n} does not' for n in wrong)}."
            )
        return cls(method, tensors, named, tuple(saved))


def trained_of(model: nn.Module, *, base_model: str | None = None) -> Adapter | Baseline:
    """Returns what was trained in a model, by whatever method.

    Raises:
        LoRAError: The model is not adapted.
    """
    kind = Adapter if injection_of(model).method.method == "lora" else Baseline
    return kind.from_model(model, base_model=base_model)


def load_trained(folder: str | Path) -> Adapter | Baseline:
    """Reads what was trained by whatever method, as `save` of either wrote it.

    Raises:
        AdapterFileError: As of `Adapter.load` and `Baseline.load`.
    """
    settings = read_settings(Path(folder) / CONFIG_FILE)
    is_other = isinstance(settings, dict) and METHOD_KEY in settings
    return Baseline.load(folder) if is_other else Adapter.load(folder)


def _plain(name: str) -> str:
    """Returns the name that a parameter has before anything stands in another's place."""
    return name.replace(".base_layer.", ".")
