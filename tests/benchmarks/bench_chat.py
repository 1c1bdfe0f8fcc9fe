"""What the chat engine costs, on the starter model: panes together over one, merged over base, a switch, a first token.

Kinds alternate, so that what else the machine does falls on all alike; the ratios are of each round, and their median
is told. Run: python -m tests.benchmarks.bench_chat [--rounds N] [--tokens N]
"""

import argparse
import statistics
import tempfile
import time

import torch

from core import Adapter, AdapterBank, LoRAConfig, inject, lora_layers
from studio import models
from studio.chat import Engine
from studio.panes import Pane
from studio.sampling import ChatSettings
from studio.workspace import Workspace

PROMPT_TOKENS = 32


def adapter_of(workspace: Workspace) -> Adapter:
    """One of all linear layers, r = 8, whose B is small and not 0."""
    model = models.load_model("starter", workspace)
    inject(model, LoRAConfig(r=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(0.01 * torch.randn(layer.lora_B.shape, generator=generator))
    return Adapter.from_model(model)


def token_seconds(engine: Engine, panes: list[Pane], prompt: list[int], num_tokens: int) -> tuple[float, float]:
    """Returns the time to the first token, and the median time of the others."""
    times = [time.perf_counter()]
    for _ in engine.answer_all(panes, [prompt] * len(panes), ChatSettings(num_tokens)):
        times.append(time.perf_counter())
    between = [b - a for a, b in zip(times[1:], times[2:], strict=False)]
    return times[1] - times[0], statistics.median(between)


def switch_seconds(adapter: Adapter, workspace: Workspace, num: int = 200) -> float:
    bank = AdapterBank(models.load_model("starter", workspace), {"a": adapter, "b": adapter})
    times = []
    for i in range(num):
        begin = time.perf_counter()
        bank.use("ab"[i % 2])
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(folder)
        adapter = adapter_of(workspace)
        engine = Engine(models.load_model("starter", workspace), lambda name, step: adapter, frozenset())
        prompt = torch.randint(100, 40_000, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
        four = [Pane(), Pane("a"), Pane("b", strength=0.5), Pane("a", rank=4)]
        kinds = {"base": four[:1], "one adapter": four[1:2], "four": four, "merged": [Pane("a", merged=True)]}
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for number in range(args.rounds + 1):
            for kind, panes in kinds.items():
                measured = token_seconds(engine, panes, prompt, args.tokens)
                if number:  # the first round loads and merges
                    found[kind].append(measured)
        switch = switch_seconds(adapter, workspace)
    for kind, rounds in found.items():
        first, each = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{kind:12} first token {first:.3f} s, then {1 / each:.1f} tokens/s a pane")

    def ratio(one: str, other: str) -> float:
        return statistics.median(a[1] / b[1] for a, b in zip(found[one], found[other], strict=True))

    def whole(one: str, other: str) -> float:
        total = {k: [f + (args.tokens - 1) * e for f, e in found[k]] for k in (one, other)}
        return statistics.median(a / b for a, b in zip(total[one], total[other], strict=True))

    print(f"four panes over one, a token:       {ratio('four', 'one adapter'):.2f}  (≤ 1.6)")
    print(f"four panes over one, whole answers: {whole('four', 'one adapter'):.2f}  (≤ 1.6)")
    print(f"merged over base, a token:          {ratio('merged', 'base'):.3f}  (0.98 … 1.02)")
    print(f"switch of the adapter:              {1000 * switch:.3f} ms  (≤ 1)")


if __name__ == "__main__":
    main()
