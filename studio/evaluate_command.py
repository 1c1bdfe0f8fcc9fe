"""The command that generates and measures the answers of a run's adapter: evaluate."""

import argparse
import json
import sys

from core import LoRAError, settings
from studio import command_line
from studio.generating import EvaluationSpec
from studio.metrics import TASKS, Difference, Result
from studio.runs import Runs
from studio.workspace import Workspace

_FLAGS = {"evaluation_task": "task", "evaluation_prompts": "prompts"}
"""Settings whose flags are shorter here, where all is evaluation."""


def add_command(add: command_line.Add) -> None:
    """Adds it, by the function that adds a command of a run to the parser."""
    command = add(
        "evaluate",
        _evaluate,
        "Generate answers to a run's held-out prompts, and measure them by a task.",
        more="Prints each metric with the range of 95 % of bootstrap samples, and where the answers are kept. "
        "Needs: pip install lora-studio[eval]",
        examples="""
            lora-studio evaluate 20261126 --task data_to_text
            lora-studio evaluate 20261126 --beams 10 --no-repeat 4 --length-penalty 0.9   # the paper's search
            lora-studio evaluate 20261126 --against 20261125
            """,
    )
    for s in settings(EvaluationSpec):
        if s.name == "evaluation_at":  # it is now
            continue
        value = "{" + ",".join(TASKS) + "}" if s.name == "evaluation_task" else command_line.metavar(s)
        flag = "--" + _FLAGS.get(s.name, s.name).replace("_", "-")
        told = command_line.escaped(f"{s.told} (default: the run's)")
        command.add_argument(flag, dest=s.name, metavar=value, help=told)
    command.add_argument(
        "--against",
        metavar="OTHER",
        help="also say how far it scores above another run's answers to the same prompts",
    )


def _evaluate(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio import evaluation

    runs = Runs(workspace)
    run = runs.find(args.run_id)
    other = runs.find(args.against) if args.against else None
    given = {s.name: s.parse(text) for s in settings(EvaluationSpec) if (text := getattr(args, s.name, None))}
    spec = EvaluationSpec.from_dict(run.spec.evaluation.to_dict() | given)
    if not spec.is_on:
        raise LoRAError(f"`--task` must be given for a run that has none: {', '.join(TASKS)}.")
    kept = evaluation.of_run(run, workspace, spec, lambda message: print(f"{message} …", file=sys.stderr))
    differences = evaluation.compare(run, other) if other else []
    if args.json:
        found = kept.to_dict() | ({"against": other.id} if other else {})
        print(json.dumps(found | ({"differences": [d._asdict() for d in differences]} if other else {}), indent=2))
        return 0
    print("\n".join(lines_of(kept.results)))
    if other:
        print("\n".join(["", f"Above {other.id}:", *lines_of(differences)]))
    print(f"Answers: {evaluation.answers_file(run, kept.step)}")
    return 0


def lines_of(results: "tuple[Result, ...] | list[Difference]") -> list[str]:
    """Returns lines for people: the metric, its value, and between what 95 % of bootstrap samples lie."""
    return [
        f"{r.metric:<14}{r.value:>10.4f}   95 % {r.low:.4f} … {r.high:.4f}   "
        + (f"n {r.num}" if isinstance(r, Result) else f"p {r.p:.3f}")
        for r in results
    ]
