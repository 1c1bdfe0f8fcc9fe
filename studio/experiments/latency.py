"""What adapters cost at inference: the paper's Table 1 and figure 5."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from core import LoRAConfig, MethodConfig, apply_method, merge, resolve_device, resolve_dtype
from studio import models
from studio.experiments.base import Asked, Experiment, Found, Piece, Record, Result, Table
from studio.workspace import Workspace, write_whole

if TYPE_CHECKING:
    from studio.figures.style import Plot

GPT2_MEDIUM = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 1024,
    "n_layer": 24,
    "n_head": 16,
    "n_positions": 1024,
    "vocab_size": 50257,
}
_SMALL = {**GPT2_MEDIUM, "n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 5000}

_PAPER_1 = {
    (32, 512, 6): (1449.4, 1482.0, 1492.2),
    (16, 256, 224): (338.0, 354.8, 366.3),
    (1, 128, 224): (19.8, 23.9, 25.8),
}
"""(batch, tokens, bottleneck) → milliseconds of full fine-tuning and LoRA, Adapter_L, Adapter_H on a GPU."""

_CELLS: Mapping[str, list[tuple[int, int, int]]] = {
    "tiny": [(1, 32, 16)],
    "small": [(1, 128, 224), (1, 128, 10), (1, 256, 100), (4, 128, 100), (8, 128, 224), (8, 256, 6)],
    "paper": [
        *_PAPER_1,
        *((batch, tokens, r) for r in (10, 100, 250) for tokens in (128, 256, 512) for batch in (1, 2, 4, 8, 16, 32)),
    ],
}
_VARIANTS = ("base", "LoRA merged", "LoRA unmerged", "Adapter_L", "Adapter_H")


def _pieces(asked: Asked, workspace: Workspace) -> list[Piece]:
    config = _SMALL if asked.size == "tiny" else GPT2_MEDIUM
    return [
        Piece(
            f"{batch} × {tokens}, bottleneck {r}",
            lambda found, cell=(batch, tokens, r): _measure(found, asked, config, cell),
            settings={"config": config, "model": asked.model},
        )
        for batch, tokens, r in _CELLS[asked.size]
    ]


def _model(found: Found, asked: Asked, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Returns the model that was named; else one of GPT-2's shape with random weights, on which no time depends."""
    if asked.model:
        return models.load_model(asked.model, found.workspace, device=device, dtype=dtype)
    folder = found.workspace.cache / f"shape-{config['n_embd']}-{config['n_layer']}"
    folder.mkdir(exist_ok=True)
    write_whole(folder / "config.json", json.dumps(dict(config)).encode())
    tree = models.skeleton(str(folder), found.workspace, needs_weights=False)
    model = tree.to_empty(device=device).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02, generator=generator)
    return model.eval()


def _measure(found: Found, asked: Asked, config: Mapping[str, Any], cell: tuple[int, int, int]) -> Record:
    batch, tokens, bottleneck = cell
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    lora = LoRAConfig(r=4, alpha=32, target_modules=("c_attn.q", "c_attn.v") if not asked.model else "all-linear")

    def adapted(change: Callable[[Any], object]) -> Any:
        model = _model(found, asked, config, dtype, device)
        change(model)
        return model.eval()

    def merged(model: Any) -> None:
        apply_method(model, MethodConfig(), lora)
        merge(model)

    made = {
        "base": _model(found, asked, config, dtype, device),
        "LoRA merged": adapted(merged),
        "LoRA unmerged": adapted(lambda model: apply_method(model, MethodConfig(), lora)),
        "Adapter_L": adapted(lambda m: apply_method(m, MethodConfig(method="adapter_l", bottleneck=bottleneck))),
        "Adapter_H": adapted(lambda m: apply_method(m, MethodConfig(method="adapter_h", bottleneck=bottleneck))),
    }
    ids = torch.randint(0, made["base"].config.vocab_size, (batch, tokens), device=device)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    rounds = max(5, min(100, 2000 // (batch * tokens)))
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, model in made.items():
                begin = time.perf_counter()
                model(input_ids=ids, use_cache=False)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn:  # the first warms up
                    seconds[name].append(time.perf_counter() - begin)
    base = seconds["base"]
    return {
        "rounds": rounds,
        "device": str(device),
        "ms": {name: 1e3 * statistics.median(found) for name, found in seconds.items()},
        "over": {
            name: statistics.median(one / other for one, other in zip(values, base, strict=True)) - 1
            for name, values in seconds.items()
        },
    }


def _tell(asked: Asked, records: Mapping[str, Record]) -> Result:
    rows = []
    for batch, tokens, r in _CELLS[asked.size]:
        found = records.get(f"{batch} × {tokens}, bottleneck {r}")
        cells = [f"{found['ms'][name]:.1f} ({found['over'][name]:+.1%})" if found else "" for name in _VARIANTS]
        rows.append([f"{batch} × {tokens}, bottleneck {r}", *cells])
    paper = [
        [
            f"{batch} × {tokens}, bottleneck {r}",
            f"{base}",
            f"{lin} ({lin / base - 1:+.1%})",
            f"{h} ({h / base - 1:+.1%})",
        ]
        for (batch, tokens, r), (base, lin, h) in _PAPER_1.items()
    ]
    tables = [
        Table("One forward pass, median milliseconds (over the base)", ["Batch × tokens", *_VARIANTS], rows),
        Table("The paper's Table 1, on a GPU", ["Batch × tokens", "Full, LoRA", "Adapter_L", "Adapter_H"], paper),
    ]
    findings = []
    if records:
        over = {name: [r["over"][name] for r in records.values()] for name in _VARIANTS}
        findings = [
            f"Merged, LoRA is within {max(map(abs, over['LoRA merged'])):.1%} of the base: no added latency.",
            f"Adapter_H adds {min(over['Adapter_H']):+.1%} to {max(over['Adapter_H']):+.1%}, Adapter_L "
            f"{min(over['Adapter_L']):+.1%} to {max(over['Adapter_L']):+.1%}; in the paper up to 30.3 % and 20.7 %, "
            "most "
            "where batches are small and sequences short.",
        ]

    def draw() -> "Plot":
        from studio.figures import bars_figure

        worst = {name: max(r["over"][name] for r in records.values()) * 100 for name in _VARIANTS[1:]}
        return bars_figure(worst, title="Most that is added to the base's time", unit="%")

    return Result(tables, findings, draw if records else None)


LATENCY = Experiment(
    "latency",
    "Why is there no latency?",
    "Table 1, figure 5",
    "What do adapter layers add to one forward pass, and what does LoRA add once it is merged?",
    "the processor at hand in place of a Quadro RTX8000; random weights in GPT-2 medium's shape, on which the time "
    "does "
    "not depend; alternating in one process, medians in place of means of 100.",
    _pieces,
    _tell,
)
