"""What each of the paper's models costs to train, with LoRA and in full, from its config alone."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core import LoRAConfig, TrainConfig
from studio.data import DataSpec
from studio.experiments.base import Asked, Experiment, Found, Piece, Record, Result, Table
from studio.planner import Planner
from studio.specs import RunSpec
from studio.workspace import Workspace, write_whole

if TYPE_CHECKING:
    from studio.figures.style import Plot


def _roberta(width: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "roberta",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    }


def _gpt(width: int, layers: int, heads: int, positions: int = 1024) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": positions,
        "vocab_size": 50257,
    }


_DEBERTA = {
    "model_type": "deberta-v2",
    "hidden_size": 1536,
    "num_hidden_layers": 48,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
    "vocab_size": 128100,
    "max_position_embeddings": 512,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "conv_kernel_size": 3,
    "conv_act": "gelu",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
_LARGEST = "GPT-3 175B"
_SLICES = ("c_attn.q", "c_attn.v")

_MODELS: Mapping[str, tuple[dict[str, Any], tuple[str, ...], int, int, int, float]] = {
    "RoBERTa base": (_roberta(768, 12), ("query", "value"), 8, 16, 512, 0.3e6),
    "RoBERTa large": (_roberta(1024, 24), ("query", "value"), 8, 4, 128, 0.8e6),
    "DeBERTa XXL": (_DEBERTA, ("query_proj", "value_proj"), 16, 8, 128, 4.7e6),
    "GPT-2 medium": (_gpt(1024, 24, 16), _SLICES, 4, 8, 512, 0.35e6),
    "GPT-2 large": (_gpt(1280, 36, 20), _SLICES, 4, 8, 512, 0.77e6),
    _LARGEST: (_gpt(12288, 96, 96, 2048), _SLICES, 4, 1, 2048, 18.9e6),
}
"""Name → config, matrices, r, rows and tokens of a batch, and how many parameters the paper says LoRA trains."""


def _pieces(asked: Asked, workspace: Workspace) -> list[Piece]:
    names = [name for name in _MODELS if asked.size != "tiny" or name == "RoBERTa base"]
    return [
        Piece(
            name,
            lambda found, name=name: _cost(name, found),
            settings={"config": _MODELS[name][0], "spec": _spec(name, name).to_dict()},
        )
        for name in names
    ]


def _spec(name: str, model: str) -> RunSpec:
    """Returns the run whose cost is told, of the model in a folder."""
    config, targets, r, batch, tokens, _ = _MODELS[name]
    is_encoder = "hidden_size" in config
    return RunSpec(
        name=name,
        model=model,
        data=DataSpec(task="classification", labels=("no", "yes")) if is_encoder else DataSpec(),
        lora=LoRAConfig(r=r, alpha=r, target_modules=targets),
        train=TrainConfig(
            batch_size=batch,
            max_length=tokens,
            precision="bf16" if name == _LARGEST else "fp32",
            activation_checkpointing=name == _LARGEST,
            device="cpu",
        ),
    )


def _cost(name: str, found: Found) -> Record:
    folder = found.workspace.cache / "shapes" / name.replace(" ", "-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.json", json.dumps(_MODELS[name][0]).encode())
    spec = _spec(name, str(folder))
    planned = Planner(str(folder), found.workspace, head=spec.head).plan(spec, num_devices=1, free_bytes=0)
    return {
        "parameters": planned.num_parameters,
        "trained": planned.num_trained,
        "adapter_bytes": planned.adapter_bytes,
        "lora_bytes": planned.lora.total,
        "full_bytes": planned.full.total,
        "weight_bytes": planned.num_parameters * (2 if name == _LARGEST else 4),
    }


def _tell(asked: Asked, records: Mapping[str, Record]) -> Result:
    rows = []
    for name, (_, _, r, batch, tokens, paper) in _MODELS.items():
        if name not in records:
            continue
        c = records[name]
        rows.append(
            [
                f"{name}, r = {r}",
                f"{c['parameters'] / 1e6:,.0f} M",
                f"{c['trained']:,}",
                f"{paper / 1e6:.2f} M",
                f"{_bytes(c['adapter_bytes'])}, 1 : {c['weight_bytes'] / c['adapter_bytes']:,.0f}",
                f"{batch} × {tokens}",
                _bytes(c["lora_bytes"]),
                _bytes(c["full_bytes"]),
                f"{c['full_bytes'] / c['lora_bytes']:.1f} ×",
            ]
        )
    head = ["Model", "Parameters", "Trained", "Paper", "Checkpoint", "Batch", "LoRA: memory", "Full", "Full / LoRA"]
    findings = [
        "Each token costs 6 operations a parameter in full (2 forward, 4 backward) and 4 with LoRA, which needs no "
        "gradient of the weights: at most 1.5 times the throughput; the paper saw 43.1 against 32.5 tokens a second, "
        "1.33."
    ]
    if _LARGEST in records:
        c = records[_LARGEST]
        findings.append(
            f"GPT-3 175B: {_bytes(c['full_bytes'])} in full and {_bytes(c['lora_bytes'])} with LoRA, of which the "
            f"weights are {_bytes(c['weight_bytes'])} (16 bits); the paper says 1.2 TB and 350 GB. With A and B in "
            f"16 bits, too, the checkpoint is {2 * c['weight_bytes'] / c['adapter_bytes']:,.0f} times smaller than "
            "the model; the paper says about 10,000."
        )

    def draw() -> "Plot":
        from studio.figures import bars_figure

        ratios = {
            name: records[name]["full_bytes"] / records[name]["lora_bytes"] for name in _MODELS if name in records
        }
        return bars_figure(ratios, title="Memory in full over that with LoRA", unit="×")

    return Result([Table("What training costs, by shapes alone", head, rows)], findings, draw if records else None)


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e3:,.0f} kB"


COSTS = Experiment(
    "costs",
    "What does it cost to train?",
    "Tables 2 to 4, §4.2",
    "Trained parameters, checkpoint and memory of every model that the paper names, with LoRA and in full.",
    "a forecast from shapes in place of a measurement; Adam's moments in 32 bits, and gradients of all weights held at "
    "once in full fine-tuning; GPT-3 with activation checkpointing.",
    _pieces,
    _tell,
)
