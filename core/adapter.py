"""An adapter as a thing of its own: settings, factors and what was trained beside them, without a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from core import files, loralib
from core.config import LoRAConfig
from core.errors import AdapterFileError, LoRAError
from core.fused import LoRASlice, rows_of
from core.inject import eject, injection_of, trained_in_full, wrap
from core.matrices import Factors
from core.targets import Injection, Target, adaptable, count_parameters, lora_layers, wholes
from core.wrapper import Wrapper


@dataclass(frozen=True)
class Adapter:
    """All A and B of a model, with the settings that made them.

    Attributes:
        config: The settings.
        factors: Path of the adapted matrix → its factors.
        base_model: What the base model was called when the adapter was made, if known.
        magnitudes: Path → DoRA's lengths of the rows of W0 + ΔW, (out_features); of plain LoRA none.
        trained_in_full: Name → parameter that was trained as it is: biases, a classifier head.
        row_norms: Path of a fused projection with DoRA on its slices → the lengths of W0's rows, (out_features): PEFT's
            files have a magnitude for every row.
    """

    config: LoRAConfig
    factors: Mapping[str, Factors]
    base_model: str | None = None
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    trained_in_full: Mapping[str, Tensor] = field(default_factory=dict)
    row_norms: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """Entries of all A and B, and of what was trained beside them."""
        pairs = sum(f.A.numel() + f.B.numel() for f in self.factors.values())
        return pairs + sum(t.numel() for t in (*self.magnitudes.values(), *self.trained_in_full.values()))

    def with_factors(self, factors: Mapping[str, Factors]) -> Self:
        """Returns the adapter with other factors, and settings that say so; what it trained in full is kept.

        Raises:
            LoRAError: It is one of DoRA's, whose magnitudes go with its own factors, or no matrix is left.
        """
        if self.magnitudes:
            raise LoRAError("`adapter` must not be one of DoRA's: its ΔW is not of low rank.")
        if not factors:
            raise LoRAError("`factors` must hold at least one matrix.")
        return replace(self, config=files.config_for(factors, self.trained_in_full), factors=dict(factors))

    @classmethod
    def from_model(cls, model: nn.Module, *, base_model: str | None = None) -> Self:
        """Takes a copy of the adapter out of an adapted model; the model stays as it is.

        Where training started from W0's own directions ("pissa", "olora"), the factors are those of the
        true update, B·A − B0·A0, of rank 2r: it fits the base model as it is, here and everywhere.

        Raises:
            LoRAError: The model is not adapted, or by another method.
        """
        injection = injection_of(model)
        if injection.method.method != "lora":
            raise LoRAError(
                f"`model` must be adapted by lora to have an adapter; {injection.method.method} has none: "
                "use Baseline.from_model(model)."
            )
        config, layers = injection.config, lora_layers(model)
        factors = {
            path: Factors(f.A.to("cpu", copy=True), f.B.to("cpu", copy=True), f.scaling, f.layout)
            for path, layer in layers.items()
            for f in [layer.factors]
        }
        magnitudes = {
            path: layer.magnitude.detach().to("cpu", copy=True)
            for path, layer in layers.items()
            if layer.magnitude is not None
        }
        extras = {name: p.detach().to("cpu", copy=True) for name, p in trained_in_full(model).items()}
        slices = {path.rpartition(".")[0]: layers[path] for path in magnitudes if isinstance(layers[path], LoRASlice)}
        row_norms = {whole: part.whole_row_norms().to("cpu") for whole, part in slices.items()}
        return cls(config, factors, base_model, magnitudes, extras, row_norms)

    def apply(self, model: nn.Module, *, base_model: str | None = None) -> Injection:
        """Puts the adapter on `model`, which is adapted afterwards as by `inject`; an earlier adapter is ejected.

        Args:
            model: The base model.
            base_model: What it is called; an adapter that names another one is then refused.

        Raises:
            AdapterFileError: A matrix or parameter of the adapter is not in the model or has another
                shape, or the adapter names another base model; the model is left as it was.
        """
        self.check_fit(model, base_model=base_model)
        shapes = adaptable(model)
        factors = self._factors_in(model)
        eject(model)
        ordered = {path: factors[path] for path in shapes if path in factors}
        targets = tuple(Target(path, *f.shape, f.r, f.scaling, path in self.magnitudes) for path, f in ordered.items())
        # What a slice or an expert is a part of counts as adapted.
        touched = {path.rpartition(".")[0] for path in self.factors} | set(self.factors)
        unmatched = tuple(path for path in wholes(model) if path not in touched)
        extras = {name: tensor.numel() for name, tensor in self.trained_in_full.items()}
        by_pattern = {"adapter": tuple(self.factors)}
        injection = Injection(self.config, targets, by_pattern, unmatched, count_parameters(model), extras)
        wrap(model, injection, draw=False)
        for path, layer in lora_layers(model).items():
            layer.set_factors(factors[path], self.magnitudes.get(path))
        with torch.no_grad():
            for name, p in trained_in_full(model).items():
                p.copy_(self.trained_in_full[name])
        return injection

    def check_fit(self, model: nn.Module, *, base_model: str | None = None) -> None:
        """Raises unless the adapter can be put on `model`, which is left as it is.

        Raises:
            AdapterFileError: As of `apply`; all misfits in one message.
        """
        problems = self._misfits(model, adaptable(model), self._factors_in(model))
        if base_model is not None and self.base_model not in (None, base_model):
            problems.insert(0, f"this model is {base_model}")
        if problems:
            raise AdapterFileError.of_misfits("The adapter", self.base_model, problems)

    def _factors_in(self, model: nn.Module) -> dict[str, Factors]:
        modules = dict(model.named_modules())
        return {path: _as_here(f, modules.get(path)) for path, f in self.factors.items()}

    def _misfits(
        self, model: nn.Module, shapes: Mapping[str, tuple[int, int]], factors: Mapping[str, Factors]
    ) -> list[str]:
        problems = []
        for path, f in factors.items():
            whole = path.rpartition(".")[0]
            if path not in shapes:
                problems.append(f"{path} does not exist or cannot be adapted")
            elif shapes[path] != f.shape:
                problems.append(f"{path} is {_by(shapes[path])} in the model and {_by(f.shape)} in the adapter")
            elif f.layout.rows is not None and not _has_rows(model, path, f.layout.rows):
                problems.append(f"{path} is of other rows in the model than in the adapter")
            elif f.layout.form == "slice" and whole in factors:
                problems.append(f"{path} is adapted and {whole} as well, of which it is a part")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        # Of an adapted model, a base layer's own parameters go by the path that the base layer had.
        parameters = {name.replace(".base_layer.", "."): p for name, p in parameters.items()}
        for name, tensor in self.trained_in_full.items():
            if name not in parameters:
                problems.append(f"{name} does not exist")
            elif parameters[name].shape != tensor.shape:
                shape = tuple(parameters[name].shape)
                problems.append(f"{name} is {_by(shape)} in the model and {_by(tuple(tensor.shape))} in the adapter")
        return problems

    def save(self, folder: str | Path) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors`, as the PEFT library lays them out.

        Each file is whole or as it was before; other files in the folder are left alone. Slices of a fused
        projection become one block-diagonal update of the whole: the same function, for PEFT, too.

        Raises:
            AdapterFileError: The folder cannot be written.
        """
        files.write(Path(folder), files.Contents(**{f.name: getattr(self, f.name) for f in fields(self)}))

    @classmethod
    def load(cls, path: str | Path, *, scaling: float | None = None, parts: Sequence[str] | None = None) -> Self:
        """Reads an adapter folder, written by `save` or by the PEFT library, or one file of loralib's.

        Args:
            path: A folder, or loralib's file: pickled (.bin, .pt, .pth, .ckpt; read by a loader that runs no code) or
                safetensors.
            scaling: alpha / r of a loralib file, which does not say it.
            parts: Which slices of fused projections a loralib file has, ("q", "v"), which it does not say either.

        Raises:
            AdapterFileError: A file is missing or damaged, the adapter is of a kind that is not LoRA's, or `scaling`
                or `parts` is missing.
        """
        is_loralib = Path(path).is_file()
        read = loralib.read_loralib(Path(path), scaling, parts) if is_loralib else files.read(Path(path))
        return cls(**{f.name: getattr(read, f.name) for f in fields(cls)})


def _as_here(f: Factors, module: nn.Module | None) -> Factors:
    """Returns the factors as those of the module's matrix, where loralib has another form for such a layer."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 3:
        return f
    return loralib.as_convolution(f, weight.shape) or f


def _has_rows(model: nn.Module, path: str, rows: Tensor) -> bool:
    """Says whether the slice of that path is these rows of its projection."""
    whole, _, part = path.rpartition(".")
    above, _, name = whole.rpartition(".")
    module = model.get_submodule(whole)
    base_layer = module.base_layer if isinstance(module, Wrapper) else module
    return torch.equal(rows_of(base_layer, name, model.get_submodule(above), part), rows.cpu())


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
