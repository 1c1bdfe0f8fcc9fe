"""The whole journey without a browser: train, look at the spectrum, compare answers before and after."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from core import Adapter, LoRAConfig, TrainConfig, random_sigma, spectra
from studio import data, figures, jobs, models
from studio.chat import Engine
from studio.panes import Pane
from studio.runs import Run, Runs
from studio.sampling import ChatSettings
from studio.specs import RunSpec
from studio.svg import save_figure
from studio.tables import read_table
from studio.workspace import Workspace

NUM_ANSWERS = 3
MAX_NEW_TOKENS = 96
MAX_EVAL_ROWS = 16
"""So few that measuring takes no longer than training."""


def demo(workspace: Workspace, *, model: str, source: str, steps: int) -> int:
    """Trains, prints losses and three answers before and after, writes figures; returns the exit code.

    Raises:
        LoRAError: The model or the data cannot be used.
    """
    tokenizer = models.load_tokenizer(model, workspace)
    table = read_table(source, workspace)
    rows = data.guess_spec(table, source, has_chat_template=bool(getattr(tokenizer, "chat_template", None)))
    settings = TrainConfig(steps=steps, batch_size=8, warmup_steps=min(5, steps), eval_every=max(1, steps // 4))
    spec = RunSpec(f"Demo: {table.name}", model, replace(rows, max_eval_rows=MAX_EVAL_ROWS), LoRAConfig(r=8), settings)
    runs = Runs(workspace)
    run = jobs.start(runs, spec)
    print(f"Run {run.id} in {run.folder}", flush=True)
    if jobs.follow(run):
        return 1
    if not table.eval_rows:
        print("\nThe data set keeps no rows apart; those below may be among the trained ones.")
    by_prompt = {str(data.prompt_messages(row, rows)): row for row in reversed(table.eval_rows or table.rows)}
    _show_answers(run, workspace, list(by_prompt.values())[: -NUM_ANSWERS - 1 : -1], tokenizer)
    written = _write_figures(run)
    print("\nWritten:")
    for path in (run.adapter_folder, *written):
        print(f"  {path}")
    print(f"\nOpen it in the studio:\n  lora-studio serve --workspace {workspace.root} --run-id {run.id}")
    return 0


def _show_answers(run: Run, workspace: Workspace, rows: list[data.Row], tokenizer: Any) -> None:
    spec = run.spec
    model = models.load_model(spec.model, workspace)
    adapter = Adapter.load(run.adapter_folder)
    engine = Engine(model, lambda name, step: adapter, frozenset(models.end_token_ids(model, tokenizer)))
    settings = ChatSettings(max_new_tokens=MAX_NEW_TOKENS)
    for row in rows:
        prompt = data.prompt_messages(row, spec.data)
        ids = data.prompt_ids(prompt, tokenizer, spec.data.template)
        *_, (base, adapted) = engine.answer_all([Pane(), Pane(run.id)], [ids, ids], settings)
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        print(f"\nPrompt    {question}")
        print(f"Base      {tokenizer.decode(base.token_ids).strip()}")
        print(f"Adapter   {tokenizer.decode(adapted.token_ids).strip()}")
        print(f"Reference {data.reference(row, spec.data)}", flush=True)


def _write_figures(run: Run) -> list[Path]:
    adapter = Adapter.load(run.adapter_folder)
    found = spectra(adapter.factors)
    log = run.log
    drawn = {
        "loss": figures.loss_figure(
            [s.step for s in log.steps],
            [s.loss for s in log.steps],
            [e.step for e in log.evaluations],
            [e.loss for e in log.evaluations],
        ),
        "effective-rank": figures.heat_figure(
            {path: s.effective_rank for path, s in found.items()}, title="Effective rank of ΔW", unit="directions"
        ),
        "spectra": figures.profile_figure(
            {path: s.sigma.tolist() for path, s in found.items()},
            title="σ of ΔW",
            chance={path: random_sigma(f).tolist() for path, f in adapter.factors.items()},
        ),
    }
    folder = run.folder / "figures"
    folder.mkdir(exist_ok=True)
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"{name}.png")
        save_figure(figure, paths[-1])
    return paths
