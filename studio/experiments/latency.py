"""What adapters cost at inference: the paper's Table 1 and figure 5."""

import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from core import LoRAConfig, MethodConfig, apply_method, merge, resolve_device, resolve_dtype
from studio import models
from studio.experiments.base import Asked, Experiment, Found, Piece, Record, Result, Table, as_paper
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


class _Cell(NamedTuple):
    """What goes through at once, and the bottlenecks of Adapter_L and of Adapter_H, which has two in each layer."""

    batch: int
    tokens: int
    r_l: int
    r_h: int

    @property
    def name(self) -> str:
        return f"{self.batch} × {self.tokens}, bottleneck {' and '.join(map(str, dict.fromkeys(self[2:])))}"


_PAPER_1 = {
    _Cell(32, 512, 8, 5): ("0.5 M", 1449.4, 1482.0, 1492.2),
    _Cell(16, 256, 224, 112): ("11 M", 338.0, 354.8, 366.3),
    _Cell(1, 128, 224, 112): ("11 M", 19.8, 23.9, 25.8),
}
"""Cell → parameters of the adapters; milliseconds of full fine-tuning and LoRA, Adapter_L, Adapter_H on a GPU."""

_GRID = [
    _Cell(batch, tokens, r, r) for r in (10, 100, 250) for tokens in (128, 256, 512) for batch in (1, 2, 4, 8, 16, 32)
]
"""The paper's figure 5."""

_SOME = ((1, 128, 10), (1, 256, 100), (4, 128, 100), (8, 128, 250), (8, 256, 10))
_CELLS: Mapping[str, list[_Cell]] = {
    "tiny": [_Cell(1, 32, 16, 8)],
    "small": [_Cell(1, 128, 224, 112), *(_Cell(batch, tokens, r, r) for batch, tokens, r in _SOME)],
    "paper": [*_PAPER_1, *_GRID],
}
_VARIANTS = ("base", "LoRA merged", "LoRA unmerged", "Adapter_L", "Adapter_H")
_NOISE = 0.05


def _pieces(asked: Asked, workspace: Workspace) -> list[Piece]:
    config = _SMALL if asked.size == "tiny" else GPT2_MEDIUM
    made = []
    for cell in _CELLS[asked.size]:
        rounds = 100 if asked.size == "paper" else max(5, min(100, 2000 // (cell.batch * cell.tokens)))
        device = str(resolve_device("auto"))
        settings = {"name": asked.model, "config": config, "cell": cell, "rounds": rounds, "device_name": device}
        made.append(Piece(cell.name, lambda found, kept=settings: _measure(found, **kept), settings=settings))
    return made


def _model(found: Found, name: str, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Returns the model that was named; else one of GPT-2's shape with random weights, on which no time depends."""
    if name:
        return models.load_model(name, found.workspace, device=device, dtype=dtype)
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


def _variants(base: Any, cell: _Cell, targets: Any) -> dict[str, Any]:
    """Returns the model by its name in the table, the base's weights shared by all but the merged one."""
    shared = [*base.parameters(), *base.buffers()]

    def adapted(change: Callable[[Any], object]) -> Any:
        model = copy.deepcopy(base, {id(tensor): tensor for tensor in shared})
        change(model)
        return model.eval()

    lora = LoRAConfig(r=4, alpha=32, target_modules=targets)
    merged = copy.deepcopy(base)
    apply_method(merged, MethodConfig(), lora)
    merge(merged)
    lin, houlsby = MethodConfig("adapter_l", bottleneck=cell.r_l), MethodConfig("adapter_h", bottleneck=cell.r_h)
    made = (
        base,
        merged.eval(),
        adapted(lambda model: apply_method(model, MethodConfig(), lora)),
        adapted(lambda model: apply_method(model, lin)),
        adapted(lambda model: apply_method(model, houlsby)),
    )
    return dict(zip(_VARIANTS, made, strict=True))


def _measure(found: Found, name: str, config: Mapping[str, Any], cell: _Cell, rounds: int, device_name: str) -> Record:
    """Times all variants in turn; the time over the base is the median over rounds of that within a round."""
    device = resolve_device(device_name)
    base = _model(found, name, config, resolve_dtype("auto", device), device)
    made = _variants(base, cell, "all-linear" if name else ("c_attn.q", "c_attn.v"))
    ids = torch.randint(0, base.config.vocab_size, (cell.batch, cell.tokens), device=device)
    seconds: dict[str, list[float]] = {variant: [] for variant in made}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for variant, model in made.items():
                begin = time.perf_counter()
                model(input_ids=ids, use_cache=False)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn:  # the first warms up
                    seconds[variant].append(time.perf_counter() - begin)
    over = {
        variant: statistics.median(one / other for one, other in zip(times, seconds["base"], strict=True)) - 1
        for variant, times in seconds.items()
    }
    return {"ms": {variant: 1e3 * statistics.median(times) for variant, times in seconds.items()}, "over": over}


def _tell(asked: Asked, records: Mapping[str, Record]) -> Result:
    rows = []
    for cell in _CELLS[asked.size]:
        found = records.get(cell.name)
        cells = [f"{found['ms'][name]:.1f} ({found['over'][name]:+.1%})" if found else "" for name in _VARIANTS]
        cells[0] = cells[0].partition(" ")[0]
        rows.append([cell.name, *cells])
    paper = [
        [f"{c.batch} × {c.tokens}, {size}", f"{base}", f"{lin} ({lin / base - 1:+.1%})", f"{h} ({h / base - 1:+.1%})"]
        for c, (size, base, lin, h) in _PAPER_1.items()
    ]
    tables = [
        Table("One forward pass, median milliseconds (over the base)", ["Batch × tokens", *_VARIANTS], rows),
        Table(
            "The paper's Table 1, on a GPU", ["Batch × tokens, trained", "Full, LoRA", "Adapter_L", "Adapter_H"], paper
        ),
    ]
    if not records:
        return Result(tables)
    over = {name: [record["over"][name] for record in records.values()] for name in _VARIANTS}
    merged = max(map(abs, over["LoRA merged"]))
    findings = [
        f"Merged, LoRA's time is within {merged:.1%} of the base's"
        + as_paper(merged < _NOISE, "it is the same matrices, so another thing took the machine: measure again"),
        *(
            f"{name} adds {min(over[name]):+.1%} to {max(over[name]):+.1%}; in the paper {paper}, the more the fewer "
            "rows and tokens are in a batch."
            for name, paper in (("Adapter_L", "2.2 % to 20.7 %"), ("Adapter_H", "3.0 % to 30.3 %"))
        ),
    ]

    def draw() -> "Plot":
        from studio.figures import bars_figure

        worst = {name: max(over[name]) * 100 for name in _VARIANTS[1:]}
        return bars_figure(worst, title="Most that is added to the base's time", unit="%")

    return Result(tables, findings, draw)


LATENCY = Experiment(
    "latency",
    "Why is there no latency?",
    "Table 1, figure 5",
    "What do adapter layers add to one forward pass, and what does LoRA add once it is merged?",
    "the device at hand in place of a Quadro RTX8000; random weights in GPT-2 medium's shape, on which the time does "
    "not depend; alternating in one process, and medians in place of means.",
    _pieces,
    _tell,
)
