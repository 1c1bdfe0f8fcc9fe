"""The command `lora-studio experiment`: starts one of the paper's experiments, follows it, tells what was found."""

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING

from core import LoRAError
from studio import command_line
from studio.experiments.base import SIZES, Asked
from studio.workspace import Workspace

if TYPE_CHECKING:
    from studio.experiments.conduct import Conduct

POLL_SECONDS = 0.5


def add_commands(command: command_line.Add) -> None:
    """Adds it, by the function that adds a command to the parser."""
    sub = command(
        "experiment",
        _experiment,
        "Run one of the paper's experiments piece by piece, and tell it beside the paper's numbers.",
        more="Without NAME it lists all nine. What was found is kept: the same command goes on where it was. "
        "Ctrl-C pauses it.",
        examples="""
            lora-studio experiment                           # which there are
            lora-studio experiment ranks --size tiny
            lora-studio experiment ranks --size tiny --show
            """,
    )
    sub.add_argument("name", metavar="NAME", nargs="?", help="labels, data-to-text, matrices, ranks, subspaces, …")
    sizes = "; ".join(f"{name}: {words}" for name, words in SIZES.items())
    sub.add_argument("--size", choices=list(SIZES), default="small", help=sizes)
    sub.add_argument("--model", default="", help="the base model (default: a starter)")
    sub.add_argument("--data", default="", help="a data set; for labels a folder of GLUE's (default: a starter's)")
    sub.add_argument("--show", action="store_true", help="tell what was found so far, and start nothing")
    sub.add_argument("--json", action="store_true", help="print what each piece found as JSON")


def _experiment(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio.experiments.conduct import Conduct, start
    from studio.experiments.registry import EXPERIMENTS

    if args.name is None:
        for e in EXPERIMENTS.values():
            print(f"{e.name:14} {e.paper:18} {e.question}")
        return 0
    conduct = Conduct(workspace, Asked(args.name, args.size, args.model, args.data))
    if not args.show and not conduct.is_running():
        start(workspace, conduct.wanted)
    try:
        problem = "" if args.show else _follow(conduct)
    except KeyboardInterrupt:
        conduct.cancel()
        print("Stopped; the same command goes on with it.", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(dict(conduct.records(conduct.pieces())), indent=2))
    else:
        print(conduct.markdown())
    if problem:
        raise LoRAError(problem)
    return 0


def _follow(conduct: "Conduct") -> str:
    """Prints what an experiment does until it has ended; returns why it did not end well, or nothing."""
    told = 0
    while True:
        is_over = not conduct.is_running()
        lines = conduct.lines()
        for line in lines[told:]:
            if "note" in line:
                place = f"{line['done'] + 1} of {line['of']}: " if "of" in line else ""
                print(f"{place}{line['note']} …", file=sys.stderr)
        told = len(lines)
        if is_over:
            return "" if conduct.status == "done" else (lines or [{}])[-1].get("problem", f"It was {conduct.status}.")
        time.sleep(POLL_SECONDS)
