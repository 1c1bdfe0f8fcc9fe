"""Runs of experiments: their specs at each size, and what is read off them when they are over."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from core import LoRAConfig, LoRAError, MethodConfig, TrainConfig
from studio.data import guess_spec, read_table
from studio.experiments.base import Asked, Found, Record
from studio.generating import EvaluationSpec
from studio.runs import Run, Runs
from studio.specs import RunSpec
from studio.workspace import Workspace

QUERY_VALUE, ALL_FOUR = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")


class Scale(NamedTuple):
    """How much is trained.

    Attributes:
        steps, batch_size: Of each run.
        num_seeds: Runs of each kind that differ in their seed alone.
        max_rows: Rows to train on; 0 for all.
        max_eval_rows: Rows whose loss is measured.
        num_prompts: Answers that are measured.
        beams: With which they are searched.
    """

    steps: int
    batch_size: int
    num_seeds: int
    max_rows: int
    max_eval_rows: int
    num_prompts: int
    beams: int


SCALES: Mapping[str, Scale] = {
    "tiny": Scale(6, 2, 1, 24, 8, 4, 1),
    "small": Scale(120, 4, 2, 0, 64, 40, 1),
    "paper": Scale(26_290, 8, 3, 0, 4672, 547, 10),
}
"""The paper's: 5 epochs of E2E at batch 8, and all of its development set."""


def of_text(
    asked: Asked,
    workspace: Workspace,
    name: str,
    *,
    lora: LoRAConfig | None = None,
    method: MethodConfig | None = None,
    evaluation: EvaluationSpec | None = None,
    seed: int = 0,
    max_rows: int | None = None,
    rate: float = 1.0,
) -> RunSpec:
    """Returns a run of facts to text, as the paper's of GPT-2 on E2E (its Table 11), at the size that is asked for.

    Args:
        asked: The experiment.
        workspace: Where data sets lie.
        name: What the run is called.
        lora: What is adapted; None for the paper's r = 4, alpha = 32 on query and value.
        method: What is trained; None for LoRA.
        evaluation: Whether answers are measured.
        seed: Of the start, the split and the order of the rows.
        max_rows: Rows to train on; None for those of the size.
        rate: Of what LoRA's learning rate is, the method's.
    """
    scale = SCALES[asked.size]
    source = asked.data or "starter:restaurants"
    rows = guess_spec(read_table(source, workspace), source)
    most = scale.max_rows if max_rows is None else max_rows
    train = TrainConfig(
        steps=scale.steps,
        batch_size=scale.batch_size,
        learning_rate=rate * (2e-4 if asked.size == "paper" else 5e-4),
        warmup_steps=min(500, max(1, scale.steps // 10)),
        weight_decay=0.01,
        eval_every=max(1, scale.steps // 4),
        spectrum_every=0,
        seed=seed,
    )
    return RunSpec(
        name=f"{asked.name}, {asked.size}: {name} · seed {seed}",
        model=asked.model or "starter",
        data=replace(rows, max_rows=most, max_eval_rows=scale.max_eval_rows, bad_rows="skip"),
        lora=lora or LoRAConfig(r=4, alpha=32, target_modules=QUERY_VALUE),
        train=train,
        method=method or MethodConfig(),
        evaluation=evaluation or EvaluationSpec(),
    )


def run_of(runs: Runs, spec: RunSpec) -> Run | None:
    """Returns the run of this spec, whatever its name, one that finished before others; None where there is none.

    So what two experiments both need is trained once.
    """
    wanted = replace(spec, name="")
    found = [run for run in runs.list() if _unnamed(run) == wanted]
    return next((run for run in found if run.status == "finished"), found[0] if found else None)


def _unnamed(run: Run) -> RunSpec | None:
    try:
        return replace(run.spec, name="")
    except LoRAError:  # a damaged one, of which the list of runs says so
        return None


def held_out(found: Found) -> Record:
    """Returns the lowest held-out loss of a run, the loss at its end, the metrics of its best step, and what it cost.

    `seconds` and `memory` (bytes, the most) are of its steps; `r` is the rank where it trained LoRA.

    Raises:
        LoRAError: It measured none.
    """
    run = found.run
    assert run is not None
    log = run.log
    log.read()
    if not log.evaluations:
        raise LoRAError(f"Run {run.id} measured no held-out loss; give it rows to hold out.")
    best = min(log.evaluations, key=lambda e: e.to_minimize)
    steps = log.steps.columns()
    return {
        "r": run.spec.lora.r,
        "loss": min(e.loss for e in log.evaluations),
        "last_loss": log.evaluations[-1].loss,
        "base_loss": log.evaluations[0].loss if log.evaluations[0].step == 0 else None,
        "trainable": log.started.num_trainable if log.started else 0,
        "seconds": float(steps["step_seconds"].sum()) if len(log.steps) else 0.0,
        "memory": float(steps["memory_bytes"].max()) if len(log.steps) else 0.0,
        **dict(best.metrics),
    }
