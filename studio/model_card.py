"""The README of what is taken home: what it is, how it was made, how sound it is, and how to load it."""

import json
from pathlib import Path

import numpy as np

from core import Adapter, spectrum
from studio import certificate, label_metrics, models
from studio.certificate import Report
from studio.runs import Run

_TOP = 5


def model_card(run: Run, info: models.ModelInfo, adapter: Adapter, report: Report, *, merged: bool) -> str:
    """Returns Markdown, with the head that the Hugging Face Hub reads."""
    run.log.read()
    base = _base(run, info)
    head = {"library_name": "transformers" if merged else "peft", "base_model": base, "tags": ["lora"]}
    if info.licence:
        head["license"] = info.licence
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in head.items()) + "---",
        f"# {_line(run.spec.name)}",
        f"A LoRA adapter{', merged into its base model' if merged else ''} ({_line(base)}); made with LoRA Studio.",
        "## Load it",
        _how_to_load(run, info, merged=merged),
        "## How it was trained",
        _training(run),
        "## What the update is",
        _spectrum(adapter),
        "## Certificate",
        certificate.markdown(report),
    ]
    return "\n\n".join(parts) + "\n"


def _base(run: Run, info: models.ModelInfo) -> str:
    """Returns a name of the base that means something on another machine."""
    return run.spec.model if info.kind == "hub" else info.name


def _how_to_load(run: Run, info: models.ModelInfo, *, merged: bool) -> str:
    head = run.spec.head
    kind = "AutoModelForSequenceClassification" if head.is_of_rows else "AutoModelForCausalLM"
    if merged:
        lines = [f"from transformers import {kind}", "", f'model = {kind}.from_pretrained("THIS FOLDER")']
    else:
        lines = ["from peft import PeftModel", f"from transformers import {kind}", ""]
        name = json.dumps(run.spec.model) if info.kind == "hub" else f'"FOLDER OF {_line(info.name)}"'
        count = f", num_labels={len(head.labels) or 1}" if head.is_of_rows else ""
        lines += [f"base = {kind}.from_pretrained({name}{count})"]
        lines += ['model = PeftModel.from_pretrained(base, "THIS FOLDER")']
    words = ["```python", *lines, "```"]
    if not merged:
        words += ["", "In LoRA Studio: `lora-studio import THIS_FOLDER --model MODEL`, or drop it on the page."]
    if head.labels:
        named = ", ".join(f"{number} {_line(label)}" for number, label in enumerate(head.labels))
        words += ["", f"Its labels: {named}."]
    return "\n".join(words)


def _training(run: Run) -> str:
    if run.is_imported:
        return "It was not trained here: it was imported."
    lora, train, log = run.spec.lora, run.spec.train, run.log
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    rows = [
        ("r, alpha, dropout", f"{lora.r}, {lora.alpha:g}, {lora.dropout:g}"),
        ("target matrices", targets),
        ("steps × batch", f"{train.steps} × {train.batch_size * train.accumulation}"),
        ("learning rate", f"{train.learning_rate:g}, {train.schedule}"),
        ("seed", str(train.seed)),
    ]
    losses = [f"{e.loss:.4f} (step {e.step})" for e in log.evaluations]
    if losses:
        rows.append(("held-out loss", " → ".join(dict.fromkeys((losses[0], losses[-1])))))
    if log.evaluations and log.evaluations[-1].metrics:
        rows.append(("held-out rows", label_metrics.words(log.evaluations[-1].metrics)))
    if len(log.steps):
        rows.append(("training loss", f"{log.steps[0].loss:.4f} → {log.steps[-1].loss:.4f}"))
    for source, digest in run.data_hashes.items():
        rows.append((f"data: {Path(source).name}", f"SHA-256 {digest}"))
    return _table(("setting", "value"), rows)


def _spectrum(adapter: Adapter) -> str:
    found = {path: spectrum(f) for path, f in adapter.factors.items()}
    largest = sorted(found, key=lambda path: -float(found[path].sigma[0]))[:_TOP]
    ranks = [float(s.effective_rank) for s in found.values()]
    words = (
        f"ΔW of {len(found)} matrices, {adapter.num_parameters:,} parameters; the effective rank is "
        f"{np.mean(ranks):.2f} on average ({min(ranks):.2f} to {max(ranks):.2f}). The largest:"
    )
    rows = [(path, f"{found[path].sigma[0]:.4g}", f"{found[path].effective_rank:.2f}") for path in largest]
    return words + "\n\n" + _table(("matrix", "σ₁", "effective rank"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _line(text: str) -> str:
    """Returns text that stays one line of Markdown and brings no markup along."""
    return " ".join(text.split()).replace("<", "&lt;").replace("`", "'")
