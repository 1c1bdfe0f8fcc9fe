"""LoRA against the other methods: on labels (Table 2), on text (Table 3), and with few rows (the appendix)."""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from core import LoRAConfig, LoRAError, MethodConfig, TrainConfig, quoted
from studio import tasks
from studio.data import DataSpec, guess_spec, read_table
from studio.experiments.base import Asked, Experiment, Piece, Record, Result, Table, as_paper, by_seed, spread
from studio.experiments.runs import SCALES, Scale, held_out, of_text
from studio.generating import EvaluationSpec
from studio.specs import RunSpec
from studio.workspace import Workspace

if TYPE_CHECKING:
    from studio.figures.style import Plot

_LORA = "LoRA"
_OF_LABELS: Mapping[str, tuple[MethodConfig, float]] = {
    _LORA: (MethodConfig(), 1.0),
    "Full fine-tuning": (MethodConfig(method="full"), 0.1),
    "BitFit": (MethodConfig(method="bitfit"), 2.0),
    "Adapter_H": (MethodConfig(method="adapter_h", bottleneck=8), 1.0),
    "Adapter_P": (MethodConfig(method="adapter_p", bottleneck=16), 1.0),
    "Head only": (MethodConfig(method="head"), 2.0),
}
"""Method → what is trained, and its learning rate over LoRA's."""

_OF_TEXT: Mapping[str, tuple[MethodConfig, float]] = {
    _LORA: (MethodConfig(), 1.0),
    "Full fine-tuning": (MethodConfig(method="full"), 0.1),
    "Last two layers": (MethodConfig(method="last_layers", num_layers=2), 0.2),
    "Adapter_L": (MethodConfig(method="adapter_l", bottleneck=6), 2.0),
    "Adapter_H": (MethodConfig(method="adapter_h", bottleneck=6), 2.0),
    "PreLayer": (MethodConfig(method="prefix_layer"), 4.0),
}

_TASKS: Mapping[str, tuple[str, str]] = {
    "RTE": ("accuracy", "Accuracy"),
    "MRPC": ("accuracy", "Accuracy"),
    "CoLA": ("matthews", "Matthews"),
}
"""GLUE's set → the score that Table 2 has of it."""

_COLUMNS = {"CoLA": {"layout": "pair", "prompt": "col4", "context": "", "completion": "col2"}}
"""GLUE's set whose file names no columns → where its sentence and its label stand."""

_PAPER_2 = {
    _LORA: {"RTE": 86.6, "MRPC": 89.7, "CoLA": 63.4},
    "Full fine-tuning": {"RTE": 78.7, "MRPC": 90.2, "CoLA": 63.6},
    "BitFit": {"RTE": 81.5, "MRPC": 92.7, "CoLA": 62.0},
}
"""RoBERTa base."""

_PAPER_3 = {
    "Full fine-tuning": ("354.92 M", 68.2, 8.62, 46.2, 71.0, 2.47),
    "Adapter_L": ("0.37 M", 66.3, 8.41, 45.0, 69.8, 2.40),
    "Adapter_H": ("11.09 M", 67.3, 8.50, 46.0, 70.7, 2.44),
    "Last two layers": ("25.19 M", 68.1, 8.59, 46.0, 70.8, 2.41),
    "PreLayer": ("0.35 M", 69.7, 8.81, 46.1, 71.4, 2.49),
    _LORA: ("0.35 M", 70.4, 8.85, 46.8, 71.8, 2.53),
}
"""GPT-2 medium on E2E: trained parameters, BLEU, NIST, METEOR, ROUGE-L, CIDEr."""

_LABEL_STEPS = {"tiny": 4, "small": 150, "paper": 6000}
_LABEL_RATES = {"tiny": 5e-4, "small": 2e-3, "paper": 5e-4}
"""LoRA's learning rate: with the paper's own, a few hundred steps leave all answers at the commonest label."""


def _label_sets(asked: Asked, workspace: Workspace) -> dict[str, tuple[str, str]]:
    """Returns set → its rows to train on and to measure on: GLUE's where a folder is given, else the starter's."""
    if asked.data:
        folder = Path(asked.data)
        sets = {name: (folder / name / "train.tsv", folder / name / "dev.tsv") for name in _TASKS}
        there = {name: (str(a), str(b)) for name, (a, b) in sets.items() if a.is_file() and b.is_file()}
        if not there:
            raise LoRAError(
                f"`data` (={quoted(asked.data)}) must be a folder of GLUE's, with RTE/train.tsv and RTE/dev.tsv, or "
                "MRPC's, or CoLA's."
            )
        return dict(list(there.items())[: 1 if asked.size == "tiny" else None])
    return {"Topics": ("starter:topics", "")}  # which brings rows of its own to measure on


def _of_labels(asked: Asked, workspace: Workspace) -> list[Piece]:
    made, steps = [], _LABEL_STEPS[asked.size]
    seeds = {"tiny": 1, "small": 3, "paper": 5}[asked.size]
    for task, (train, dev) in _label_sets(asked, workspace).items():
        rows = guess_spec(read_table(train, workspace, dev), train)
        score = _TASKS.get(task, ("accuracy", ""))[0]
        rows = replace(
            rows,
            source=train,
            eval_source=dev,
            task="classification",
            metric=score,
            max_eval_rows=1_100,
            bad_rows="skip",
            **_COLUMNS.get(task, {}) if asked.data else {},
        )
        said: RunSpec | None = None  # with the labels and the head, which starting a run adds: to find that run again
        for method, (config, rate) in _OF_LABELS.items():
            for seed in range(seeds):
                spec = _label_run(
                    asked, f"{task}, {method}", rows, config, _LABEL_RATES[asked.size] * rate, steps, seed
                )
                said = said or tasks.settled(spec, workspace)
                made.append(
                    Piece(f"{task}, {method} · seed {seed}", held_out, replace(spec, data=said.data, lora=said.lora))
                )
    return made


def _label_run(
    asked: Asked, name: str, rows: DataSpec, method: MethodConfig, rate: float, steps: int, seed: int
) -> RunSpec:
    return RunSpec(
        name=f"{asked.name}, {asked.size}: {name} · seed {seed}",
        model=asked.model or "starter-encoder",
        data=rows,
        lora=LoRAConfig(r=8, alpha=16, target_modules=("query", "value")),
        train=TrainConfig(
            steps=steps,
            batch_size=16,
            learning_rate=rate,
            warmup_steps=max(1, steps * 6 // 100),
            max_length=128,
            eval_every=max(1, steps // 3),
            spectrum_every=0,
            seed=seed,
        ),
        method=method,
    )


def _told_apart(scores: Mapping[str, list[float]]) -> bool:
    """Returns whether a method's mean is two standard deviations of its seeds above that of the head alone."""
    alone = scores["Head only"]
    return any(
        statistics.fmean(found) - statistics.fmean(alone)
        > 2 * max(statistics.stdev(of) if len(of) > 1 else 0.0 for of in (found, alone))
        for found in scores.values()
    )


def _tell_labels(asked: Asked, records: Mapping[str, Record]) -> Result:
    tasks = list(dict.fromkeys(key.split(", ")[0] for key in records))
    rows, means, scores = [], {}, {task: dict[str, list[float]]() for task in tasks}
    for method in _OF_LABELS:
        row, trained = [method, ""], []
        for task in tasks:
            score = _TASKS.get(task, ("accuracy", ""))[0]
            found = [100 * v for v in by_seed(records, f"{task}, {method}", score)]
            trained += by_seed(records, f"{task}, {method}", "trainable")
            paper = _PAPER_2.get(method, {}).get(task)
            row += [spread(found, 1), "" if paper is None else f"{paper}"]
            if found:
                scores[task][method] = found
                means.setdefault(method, []).append(statistics.fmean(found))
        row[1] = f"{trained[0]:,.0f}" if trained else ""
        rows.append(row)
    head = ["Method", "Trained"]
    for task in tasks:
        head += [f"{task}, {(_TASKS.get(task) or ('', 'Accuracy'))[1]} (%)", "Paper"]
    total = {method: sum(v) / len(v) for method, v in means.items() if len(v) == len(tasks)}
    findings = []
    if len(total) == len(_OF_LABELS):
        order = sorted(total, key=total.__getitem__, reverse=True)
        gap = total[_LORA] - total["Full fine-tuning"]
        findings = [
            "From the best mean to the worst: " + ", ".join(f"{name} {total[name]:.1f}" for name in order) + ".",
            f"LoRA is {gap:+.1f} points from full fine-tuning"
            + as_paper(gap >= 0, "in the paper's mean over GLUE it is 0.8 ahead (RoBERTa base)"),
        ]
        if alike := [task for task, of_task in scores.items() if not _told_apart(of_task)]:
            findings.append(
                f"On {' and '.join(alike)} no method is two standard deviations above the head alone: "
                "nothing there tells them apart."
            )

    def draw() -> "Plot":
        from studio.figures import bars_figure

        return bars_figure(total, title="Methods on labels", unit="mean score, %")

    return Result(
        [Table("Best evaluation, mean ± standard deviation over seeds", head, rows)], findings, draw if total else None
    )


def _measured(scale: Scale) -> EvaluationSpec:
    """Returns how answers are measured, in both experiments on text: they share the runs with all rows."""
    return EvaluationSpec(
        evaluation_task="data_to_text",
        evaluation_prompts=scale.num_prompts,
        beams=scale.beams,
        no_repeat=4 if scale.beams > 1 else 0,
        length_penalty=0.9 if scale.beams > 1 else 1.0,
        longest_answer=64,
    )


def _of_text(asked: Asked, workspace: Workspace) -> list[Piece]:
    evaluation = _measured(SCALES[asked.size])
    return [
        Piece(method, held_out, of_text(asked, workspace, method, method=config, evaluation=evaluation, rate=rate))
        for method, (config, rate) in _OF_TEXT.items()
    ]


def _tell_text(asked: Asked, records: Mapping[str, Record]) -> Result:
    scores = {"BLEU": 100, "NIST": 1, "METEOR": 100, "ROUGE-L": 100, "CIDEr": 1}  # those of 100 are shares with us
    rows, bleu = [], {}
    for method, (count, *paper) in _PAPER_3.items():
        found = records.get(method)
        row = [method, "", ""] + [""] * len(scores)
        if found:
            row = [method, f"{found['trainable']:,}", f"{found['loss']:.4f}"]
            row += [f"{times * found[name]:.2f}" if name in found else "" for name, times in scores.items()]
            if "BLEU" in found:
                bleu[method] = 100 * found["BLEU"]
        rows += [row, ["", f"paper: {count}", "", *map(str, paper)]]
    losses = {m: r["loss"] for m, r in records.items()}
    findings = []
    if len(losses) == len(_OF_TEXT):
        order = sorted(losses, key=losses.__getitem__)
        findings = [
            "From the lowest held-out loss to the highest: " + ", ".join(f"{m} {losses[m]:.4f}" for m in order) + "."
        ]
    if len(bleu) == len(_OF_TEXT):
        best = max(bleu, key=bleu.__getitem__)
        findings.append(f"Highest BLEU: {best}, {bleu[best]:.1f}" + as_paper(best == _LORA, "the paper's is LoRA's"))

    def draw() -> "Plot":
        from studio.figures import bars_figure

        unit = "BLEU" if bleu else "held-out loss, nats a token"
        return bars_figure(bleu or losses, title="Methods on text", unit=unit)

    head = ["Method", "Trained", "Held-out loss", *scores]
    return Result([Table("Facts to text", head, rows)], findings, draw if losses else None)


_FEW = {"tiny": (8, 24), "small": (50, 0), "paper": (100, 1_000, 10_000, 0)}
_OF_FEW = (_LORA, "Full fine-tuning", "PreLayer")


def _of_few(asked: Asked, workspace: Workspace) -> list[Piece]:
    made, evaluation = [], _measured(SCALES[asked.size])
    for method in _OF_FEW:
        config, rate = _OF_TEXT[method]
        for number in _FEW[asked.size]:
            name = f"{method}, {_rows(number)}"
            spec = of_text(asked, workspace, name, method=config, evaluation=evaluation, rate=rate, max_rows=number)
            made.append(Piece(name, held_out, spec))
    return made


def _rows(number: int) -> str:
    return f"{number} rows" if number else "all rows"


def _tell_few(asked: Asked, records: Mapping[str, Record]) -> Result:
    numbers = _FEW[asked.size]
    found = {m: [records.get(f"{m}, {_rows(n)}") for n in numbers] for m in _OF_FEW}
    rows = [[m, *(f"{record['loss']:.4f}" if record else "" for record in line)] for m, line in found.items()]
    whole = {m: [record["loss"] for record in line if record] for m, line in found.items() if all(line)}
    findings = []
    if len(whole) == len(_OF_FEW):
        lora, full, prefix = (whole[method][0] for method in _OF_FEW)
        findings = [
            f"With {_rows(numbers[0])} LoRA's loss is {lora:.4f}, full fine-tuning's {full:.4f}, PreLayer's "
            f"{prefix:.4f}: LoRA {'is' if lora < min(full, prefix) else 'is not'} ahead of both. In the paper it is, "
            "with 100 rows of MNLI: 63.8 % against 60.2 % and 48.3 %."
        ]

    def draw() -> "Plot":
        from studio.figures import lines_figure

        ticks = [_rows(n) for n in numbers]
        return lines_figure(
            range(len(numbers)), whole, title="Few rows", x_label="rows", y_label="held-out loss", names=ticks
        )

    table = Table("Lowest held-out loss, nats a token", ["Method", *map(_rows, numbers)], rows)
    return Result([table], findings, draw if whole else None)


LABELS = Experiment(
    "labels",
    "LoRA against other methods, on labels",
    "Table 2",
    "Does LoRA reach full fine-tuning on sentence tasks, and how do BitFit, adapters and the head alone do?",
    "the starter's encoder of 23 M parameters in place of RoBERTa; below the paper's size some steps in place of tens "
    "of epochs; the starter set of topics where no folder of GLUE's is given; the learning rate of each method "
    "is one fixed multiple of LoRA's.",
    _of_labels,
    _tell_labels,
)
DATA_TO_TEXT = Experiment(
    "data-to-text",
    "LoRA against other methods, on text",
    "Table 3",
    "Which method writes the best sentences from facts, for how many trained parameters?",
    "the starter of 135 M parameters in place of GPT-2 medium; below the paper's size at most hundreds of steps in "
    "place of 26,290, and greedy search; METEOR without its tables of synonyms and paraphrases.",
    _of_text,
    _tell_text,
)
LOW_DATA = Experiment(
    "low-data",
    "How few rows are enough?",
    "Table 16",
    "How do LoRA, full fine-tuning and prefix tuning compare with few rows?",
    "facts to text and the held-out loss in place of MNLI's accuracy; the same number of steps whatever the rows.",
    _of_few,
    _tell_few,
)
