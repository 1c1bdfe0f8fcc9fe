"""The forecast of memory beside what a process really took: a table of forecast, measured, error.

Each combination of a model and settings is trained for three steps in a process of its own, by the code that a run's
worker trains with. Measured is the peak of the process's resident memory, which holds the libraries, too.
"""

import argparse
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core import MemoryForecast
from studio.planner import Planner
from studio.probe import Probe, Probing
from studio.specs import RunSpec
from studio.workspace import Workspace

QV = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Combination:
    """A model and settings.

    Attributes:
        model: "starter", or a name in `MODELS`.
        lora, train: What differs from the defaults.
    """

    model: str
    lora: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What is told of it in the table."""
        train = {"batch_size": 4, "max_length": 256, "precision": "fp32"} | self.train
        words = [self.model, train["precision"], f"{train['batch_size']} × {train['max_length']}"]
        words += ["checkpointing"] if train.get("activation_checkpointing") else []
        return ", ".join([*words, *(f"{key} {value}" for key, value in self.lora.items())])


_SMALL = {"max_position_embeddings": 2048}
_LLAMA = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"vocab_size": 8000, "num_key_value_heads": 4, **_LLAMA, **_SMALL}),
    "qwen": (
        "qwen2",
        {"vocab_size": 60_000, "num_key_value_heads": 2, "tie_word_embeddings": True, **_LLAMA, **_SMALL},
    ),
    "gemma": ("gemma2", {"vocab_size": 50_000, "num_key_value_heads": 4, "head_dim": 64, **_LLAMA, **_SMALL}),
    "gpt2": ("gpt2", {"n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 20_000, "n_positions": 2048}),
}
"""Family and config of models with random weights: the shapes of Llama, Qwen, Gemma 2 and GPT-2."""

SMALL = [
    Combination("llama"),
    Combination("llama", train={"precision": "bf16"}),
    Combination("llama", train={"activation_checkpointing": True}),
    Combination("llama", train={"precision": "bf16", "activation_checkpointing": True, "batch_size": 8}),
    Combination("llama", train={"batch_size": 1, "max_length": 1024}),
    Combination("llama", lora={"target_modules": QV, "r": 64}),
    Combination("llama", lora={"layers": "4-", "dropout": 0.1}),
    Combination("qwen"),
    Combination("qwen", train={"precision": "bf16", "batch_size": 2}),
    Combination("gemma", train={"batch_size": 2}),
    Combination("gemma", train={"precision": "bf16", "batch_size": 2, "activation_checkpointing": True}),
    Combination("gpt2"),
    Combination("gpt2", lora={"target_modules": ["c_attn.q", "c_attn.v"]}, train={"precision": "bf16"}),
    Combination("gpt2", lora={"dora": True}, train={"batch_size": 2}),
]
"""What takes seconds each."""

QUICK = [
    Combination("llama", train={"batch_size": 1, "max_length": 128}),
    Combination("gpt2", train={"batch_size": 2, "max_length": 64, "precision": "bf16"}),
]
"""What the tests always take."""

_STARTER_SHAPES = [(4, 256), (8, 128), (2, 1024)]
LARGE = [
    Combination(
        "starter",
        train={"precision": precision, "batch_size": rows, "max_length": length}
        | ({"activation_checkpointing": True} if checkpointing else {}),
    )
    for precision in ("fp32", "bf16")
    for checkpointing in (False, True)
    for rows, length in _STARTER_SHAPES
]
LARGE += [Combination("starter", lora={"target_modules": QV, "r": 4}, train={"precision": p}) for p in ("fp32", "bf16")]
"""The starter model: a minute or so each."""


def spec_of(combination: Combination, folder: Path) -> RunSpec:
    """Returns the run; models that are made lie in `folder`."""
    model = combination.model
    train = {"batch_size": 4, "max_length": 256, "precision": "fp32", "device": "cpu"} | combination.train
    if model != "starter":
        model = str(made(model, folder))
    return RunSpec.from_dict({"model": model, "lora": combination.lora, "train": train})


def made(name: str, folder: Path) -> Path:
    """Returns the folder of one of `MODELS`, with random weights and a tokenizer of nothing."""
    place = folder / name
    if not place.is_dir():
        from tokenizers import Tokenizer, models
        from transformers import AutoConfig, AutoModelForCausalLM

        family, values = MODELS[name]
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values)).save_pretrained(place)
        Tokenizer(models.BPE()).save(str(place / "tokenizer.json"))
    return place


@dataclass(frozen=True)
class Row:
    """What was forecast of a combination, and what it took.

    Attributes:
        name: Of the combination.
        forecast, measured: Of the process, in bytes.
        loading: The measured peak until the model was there.
        terms: Of the forecast.
    """

    name: str
    forecast: int
    measured: int
    loading: int
    terms: MemoryForecast

    @property
    def error(self) -> float:
        """The forecast over the measured, less 1."""
        return self.forecast / self.measured - 1


def row(combination: Combination, folder: Path, workspace: Workspace) -> Row:
    """Forecasts and measures one."""
    spec = spec_of(combination, folder)
    *_, found = Probing(spec, workspace, full_rows=True)
    assert isinstance(found, Probe)
    forecast = Planner(spec.model, workspace).forecast(spec)
    return Row(combination.name, forecast.total, found.peak_bytes, found.loading_bytes, forecast)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="leave the starter model out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("| model, setting | forecast MB | measured MB | error | until loaded MB | of the forecast |")
        print("|---|---|---|---|---|---|")
        for combination in SMALL if args.small else SMALL + LARGE:
            r = row(combination, Path(folder), Workspace(folder))
            terms = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in r.terms.terms.items() if size > 5e5)
            sizes = f"{r.forecast / 1e6:.0f} | {r.measured / 1e6:.0f} | {r.error:+.1%} | {r.loading / 1e6:.0f}"
            print(f"| {r.name} | {sizes} | {terms} |", flush=True)


if __name__ == "__main__":
    main()
