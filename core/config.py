"""The settings of an adapter and of its training, each declared once (see `core.declarations`)."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from core.declarations import Config, setting
from core.errors import quoted

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRAConfig(Config):
    """Which matrices get ΔW = scaling · B·A, and of what form.

    Where each setting comes from:

        r, alpha: Hu et al. 2021, arXiv:2106.09685, §4.1.
        dropout: The authors' code, loralib, which drops of x before A.
        target_modules: Hu et al. 2021, §4.2 and §7.1: the attention's query and value. All linear ones: Dettmers
            et al. 2023, arXiv:2305.14314, §4.
        exclude_modules, layers, rank_pattern, alpha_pattern: The peft library, where layers is layers_to_transform;
            that a rank may be each matrix's own is Zhang et al. 2023, arXiv:2303.10512.
        scaling: Hu et al. 2021, §4.1; rslora is Kalajdzievski 2023, arXiv:2312.03732.
        init: Hu et al. 2021, §4.1 (gaussian) and loralib (kaiming); pissa is Meng et al. 2024, arXiv:2404.02948;
            olora is Büyükakyüz 2024, arXiv:2406.01775.
        dora: Liu et al. 2024, arXiv:2402.09353.
        bias: loralib, of the same three words; biases alone are Ben Zaken et al. 2021, arXiv:2106.10199.
        modules_to_save: The peft library; loralib's examples train a classifier's head so.
    """

    r: int = setting(
        8,
        "Rank r",
        "How many directions ΔW may have. The paper finds 1 to 8 enough for most tasks; 8 to 64 is common. Too few, "
        "and it cannot learn the task; too many cost memory and seldom help.",
        minimum=1,
        why="LoRA paper, §7.2",
    )
    alpha: float = setting(
        16.0,
        "alpha",
        "ΔW = (alpha / r)·B·A: how loudly the adapter speaks. Usually r or 2r; it acts much like the learning rate: "
        "too small learns slowly, too large makes the loss jump.",
        above=0,
        why="LoRA paper, §4.1",
    )
    dropout: float = setting(
        0.0,
        "Dropout",
        "Share of the adapter's inputs dropped at random in training. 0 to 0.1; helps small data sets. Much more, and "
        "it learns too little.",
        minimum=0,
        below=1,
        why="LoRA paper, app. D",
    )
    target_modules: str | tuple[str, ...] = setting(
        ALL_LINEAR,
        "Target matrices",
        "Matrices to adapt: names (q_proj, v_proj), one regular expression over the full path, or all-linear. "
        "The paper adapts the attention's query and value. Fewer cost less memory, and may learn less.",
        why="LoRA paper, §7.1; QLoRA, arXiv:2305.14314",
    )
    exclude_modules: str | tuple[str, ...] = setting(
        (),
        "Except",
        "Matrices to leave alone among the targets: names, or one regular expression over the full path. Empty: none. "
        "A name that fits none of them is refused.",
        advanced=True,
    )
    layers: str = setting(
        "",
        "Only layers",
        "Which layers are adapted, from 0: 0-5, 8, 20- (20 and all after it). Empty: all. Fewer cost less, and may "
        "learn less.",
        advanced=True,
    )
    scaling: Literal["standard", "rslora"] = setting(
        "standard",
        "Scaling",
        "standard: alpha / r, as in the paper. rslora: alpha / √r, steadier at large r, but √r times as loud: with the "
        "same alpha, the loss may jump.",
        choices=("standard", "rslora"),
        advanced=True,
        why="LoRA paper, §4.1; rsLoRA, arXiv:2312.03732",
    )
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = setting(
        "kaiming",
        "Start of A and B",
        "kaiming: A uniform, B zero, as in the authors' code. gaussian: A normal with variance 1/r, nearer to the "
        "paper's text. pissa and olora: from W's own top directions; it takes longer to begin.",
        choices=("kaiming", "gaussian", "pissa", "olora"),
        advanced=True,
        why="LoRA paper, §4.1; PiSSA, arXiv:2404.02948; OLoRA, arXiv:2406.01775",
    )
    dora: bool = setting(
        False,
        "DoRA",
        "Also train the length of each row of W + ΔW. Slower; ΔW is then no longer of low rank.",
        advanced=True,
        why="DoRA, arXiv:2402.09353",
    )
    bias: Literal["none", "lora_only", "all"] = setting(
        "none",
        "Biases",
        "Biases to train, too: none, those of the adapted matrices (lora_only), or all of the model. Seldom needed.",
        choices=("none", "lora_only", "all"),
        advanced=True,
        why="BitFit, arXiv:2106.10199",
    )
    modules_to_save: tuple[str, ...] = setting(
        (),
        "Trained in full",
        "Modules that are trained whole and saved with the adapter, by name: a classifier head, say. Each makes the "
        "adapter larger by all of its size.",
        advanced=True,
    )
    rank_pattern: dict[str, int] = setting(
        {},
        "Rank by matrix",
        'Other ranks for some matrices, by name or regular expression: {"q_proj": 4}. Each from 1; the rest keep r.',
        advanced=True,
        why="AdaLoRA, arXiv:2303.10512",
    )
    alpha_pattern: dict[str, float] = setting(
        {},
        "alpha by matrix",
        'Other alphas for some matrices, by name or regular expression: {"q_proj": 8}. Each above 0; the rest keep '
        "alpha.",
        advanced=True,
    )

    def further_problems(self) -> list[str]:
        problems = []
        if not self.target_modules or (isinstance(self.target_modules, tuple) and "" in self.target_modules):
            problems.append(
                f"`target_modules` (={quoted(self.target_modules)}) must name at least one matrix; "
                f"for example q_proj, or {ALL_LINEAR}"
            )
        try:
            self.adapts_layer(0)
        except ValueError:
            problems.append(f"`layers` (={quoted(self.layers)}) must be numbers and ranges, such as 0-5, 8, 20-")
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, field):
                try:
                    re.compile(pattern)
                except re.error as error:
                    problems.append(f"`{field}[{pattern!r}]` must be a name or a valid regular expression ({error})")
        for name, value in self.rank_pattern.items():
            if value < 1:
                problems.append(f"`rank_pattern[{name!r}]` (={value!r}) must be at least 1")
        for name, value in self.alpha_pattern.items():
            if not 0 < value < float("inf"):
                problems.append(f"`alpha_pattern[{name!r}]` (={value!r}) must be above 0")
        return problems

    def adapts_layer(self, number: int) -> bool:
        """Says whether `layers` takes in the layer of that number; -1, of no layer, only if it is empty."""
        parts = [part.strip().partition("-") for part in self.layers.split(",") if self.layers.strip()]
        ranges = [
            (int(first), int(last) if last.strip() else math.inf if dash else int(first)) for first, dash, last in parts
        ]
        return not ranges or any(first <= number <= last for first, last in ranges)

    def scaling_for(self, r: int, alpha: float) -> float:
        """Returns the factor on B·A: alpha / r, or alpha / √r for rsLoRA."""
        return alpha / r if self.scaling == "standard" else alpha / r**0.5


@dataclass(frozen=True)
class TrainConfig(Config):
    """How the adapter is trained: AdamW on what the adapter's settings name, and on nothing else.

    Where the settings that are not every trainer's come from:

        learning_rate, schedule, warmup_steps, weight_decay: AdamW is Loshchilov and Hutter 2017, arXiv:1711.05101; a
            linear fall after a warm-up is Hu et al. 2021, arXiv:2106.09685, app. D.
        lora_plus_ratio: LoRA+, Hayou et al. 2024, arXiv:2402.12354.
        clip_norm: Pascanu et al. 2012, arXiv:1211.5063.
        activation_checkpointing: Chen et al. 2016, arXiv:1604.06174.
        patience: Prechelt 1998, Early Stopping – But When?
    """

    steps: int = setting(
        60,
        "Steps",
        "How many times the adapter is updated. 40 to 200 shows an effect. Too many, and it learns the rows by heart: "
        "the loss on held-out rows rises (overfitting).",
        minimum=1,
        maximum=10_000_000,
    )
    batch_size: int = setting(
        4,
        "Batch size",
        "Rows in one forward pass, of each device; usually 1 to 32. Larger is steadier and needs more memory.",
        minimum=1,
        maximum=100_000,
        why="LoRA paper, app. D",
    )
    accumulation: int = setting(
        1,
        "Accumulation",
        "Forward passes per update; usually 1 to 16. Rows per update = batch size × accumulation, at the memory of one "
        "batch, not in its time.",
        minimum=1,
        maximum=100_000,
        advanced=True,
    )
    learning_rate: float = setting(
        1e-3,
        "Learning rate",
        "Size of an update. LoRA likes about ten times that of full fine-tuning: 1e-4 to 2e-3. Too small learns "
        "slowly; too large, and the loss jumps or explodes.",
        above=0,
        maximum=10,
        why="LoRA paper, app. D",
    )
    lora_plus_ratio: float = setting(
        1.0,
        "LoRA+ ratio",
        "B's learning rate over A's. 1 is plain LoRA; its authors try 4 to 32. Too large, and the loss jumps.",
        above=0,
        maximum=1000,
        advanced=True,
        why="LoRA+, arXiv:2402.12354",
    )
    schedule: Literal["linear", "cosine", "constant"] = setting(
        "linear",
        "Schedule",
        "How the learning rate falls to zero after the warm-up. The paper uses linear. constant: it does not fall, and "
        "the end is less settled.",
        choices=("linear", "cosine", "constant"),
        advanced=True,
        why="LoRA paper, app. D",
    )
    warmup_steps: int = setting(
        5,
        "Warm-up steps",
        "Updates over which the learning rate rises from zero; 2 to 10 % of the steps in the paper. Without any, the "
        "first updates may be too large.",
        minimum=0,
        advanced=True,
        why="LoRA paper, app. D",
    )
    weight_decay: float = setting(
        0.0,
        "Weight decay",
        "Pull of A and B towards zero. 0 to 0.1. Too large, and they learn little.",
        minimum=0,
        maximum=10,
        advanced=True,
        why="LoRA paper, app. D; AdamW, arXiv:1711.05101",
    )
    clip_norm: float = setting(
        1.0,
        "Gradient clipping",
        "The gradient is shortened to this length when longer; usually 1. 0 turns it off: one odd batch may then undo "
        "much.",
        minimum=0,
        advanced=True,
        why="Gradient clipping, arXiv:1211.5063",
    )
    explosion_norm: float = setting(
        1e6,
        "Give up at gradient norm",
        "A gradient longer than this, before clipping, has exploded, and ends the run: clipping would only hide it. "
        "Too small ends runs that were well. 0: none is too long.",
        minimum=0,
        advanced=True,
    )
    max_length: int = setting(
        256,
        "Longest row (tokens)",
        "Longer rows are cut at the end, so too small loses answers; the paper has 64 to 2048. Memory and time grow "
        "with it.",
        minimum=8,
        maximum=10_000_000,
        why="LoRA paper, app. D",
    )
    activation_checkpointing: bool = setting(
        False,
        "Activation checkpointing",
        "Compute each layer twice instead of keeping what it gave: much less memory, about a third slower.",
        advanced=True,
        why="Sublinear memory, arXiv:1604.06174",
    )
    prefix_cache: Literal["off", "memory", "disk"] = setting(
        "off",
        "Keep the frozen layers' output",
        "Where only upper layers are adapted, each row passes the layers below once, and what they give is kept: "
        "tokens × hidden size × bytes per weight. Faster from the second epoch on, and at evaluations.",
        choices=("off", "memory", "disk"),
        advanced=True,
    )
    compile: bool = setting(
        False,
        "Compile",
        "Let torch.compile write code for each layer, in place of the studio's own. Takes minutes at the start; try it "
        "on long runs on a GPU.",
        advanced=True,
    )
    eval_every: int = setting(
        10,
        "Evaluate every (steps)",
        "How often the loss on held-out rows is measured; 10 to 500 is usual, 0 only at the end. Often takes time; "
        "seldom may miss the best step.",
        minimum=0,
        advanced=True,
    )
    spectrum_every: int = setting(
        5,
        "Measure the spectrum every (steps)",
        "How often the singular values of each ΔW are kept, to be looked at while it trains and after; 200 times a run "
        "at most. 0: never.",
        minimum=0,
        advanced=True,
    )
    patience: int = setting(
        0,
        "Stop early after (evaluations)",
        "Training ends when so many evaluations in a row were no better than the best before, and the best is kept. "
        "Usually 3 to 10; fewer may end at a chance rise. 0: it takes all steps.",
        minimum=0,
        advanced=True,
    )
    checkpoint_every: int = setting(
        100,
        "Checkpoint every (steps)",
        "How often everything is saved that a run needs to go on after a crash: often takes time, seldom loses more. "
        "0: by the clock alone.",
        minimum=0,
        advanced=True,
    )
    checkpoint_minutes: float = setting(
        5.0,
        "Checkpoint every (minutes)",
        "The most work that a crash can cost; usually 1 to 30. 0: by the steps alone.",
        minimum=0,
        advanced=True,
    )
    seed: int = setting(
        0,
        "Seed",
        "Same seed, same run: start of A, order of rows, dropout. Any whole number from 0; a second one shows what is "
        "chance.",
        minimum=0,
        maximum=2**31 - 1,
        advanced=True,
        why="LoRA paper, §7.2",
    )
    device: str = setting(
        "auto",
        "Device",
        "auto takes CUDA, then Apple's MPS, then the CPU. Or say cpu, cuda, cuda:1, mps; or several, as cuda:0,cuda:1: "
        "each then takes a batch of its own.",
        advanced=True,
    )
    shard_weights: bool = setting(
        False,
        "Split the weights",
        "With several devices: each keeps a part of the frozen weights and asks for the rest layer by layer (FSDP2). "
        "Slower; for models that do not fit one device.",
        advanced=True,
    )
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto",
        "Precision",
        "Of the frozen weights; A and B are always fp32. auto takes bf16 where the device computes it fast: half the "
        "memory, and coarser.",
        choices=("auto", "fp32", "bf16"),
        advanced=True,
    )

    def further_problems(self) -> list[str]:
        if self.warmup_steps > self.steps:
            return [f"`warmup_steps` (={self.warmup_steps}) must be at most `steps` (={self.steps})"]
        return []
