"""How the commands of `lora-studio` are declared: what each says of itself, examples, and the settings as flags."""

import argparse
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core import Config, Setting, settings

PROGRAM = "lora-studio"

Add = Callable[..., argparse.ArgumentParser]
"""Adds a command: its name, what runs it, what it does in one sentence, and as keywords `examples` and `more`."""

EXIT = {
    0: "done",
    1: "the run failed, or the certificate is red",
    2: "the words or files given cannot be used",
    130: "interrupted by Ctrl-C",
}
"""What a command's exit status says."""

JSON_HELP = "print JSON instead of lines for people"
RUN_HELP = "a run's id, or how it begins; `lora-studio runs` lists them"
SCALING_HELP = "alpha / r of a loralib file, which does not say it"
PARTS_HELP = "slices of fused projections that a loralib file has, in their order: q,v for its GPT-2"

_FIRST = f"""\
begin with:
  {PROGRAM}           the page, in your browser
  {PROGRAM} demo      the same journey in this terminal, in a few minutes

`{PROGRAM} COMMAND --help` tells more of each, with examples.

exit status:
{chr(10).join(f"  {code:<5}{meaning}" for code, meaning in EXIT.items())}
"""

_PART_TITLES = {
    "lora": "settings of the adapter",
    "method": "settings of the method, LoRA or what its paper compares it with",
    "train": "settings of the training",
    "evaluation": "settings of how answers are measured",
}


def root(description: str) -> tuple[argparse.ArgumentParser, Add]:
    """Returns the parser of all, and what adds a command to it."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=_wrapped(description),
        epilog=_FIRST,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def add(
        name: str, run: Callable[..., int], help: str, *, examples: str, more: str = "", usage: str | None = None
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description="\n\n".join(map(_wrapped, [help, *filter(None, more.split("\n\n"))])),
            epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=_wrapped(f"{PROGRAM} {name} {usage}", indent=8) if usage else None,
        )
        sub.set_defaults(run=run)
        sub.add_argument(
            "--workspace",
            metavar="DIR",
            help="folder for runs, uploads and caches (default: $LORA_STUDIO_HOME, else ~/lora-studio)",
        )
        return sub

    return parser, add


def of_runs(add: Add) -> Add:
    """Returns what adds a command of a run, `RUN`, or of all with `of_run` unset; each takes --json."""

    def add_one(*declared: Any, of_run: bool = True, **more: Any) -> argparse.ArgumentParser:
        sub = add(*declared, **more)
        sub.add_argument("--json", action="store_true", help=JSON_HELP)
        if of_run:
            sub.add_argument("run_id", metavar="RUN", help=RUN_HELP)
        return sub

    return add_one


def add_spec(parser: argparse.ArgumentParser, parts: Mapping[str, type[Config]], *, is_needed: bool) -> None:
    """Adds SPEC, and a flag for each setting of `parts`, whose value goes before that of SPEC."""
    parser.add_argument(
        "spec",
        metavar="SPEC",
        type=Path,
        nargs=None if is_needed else "?",
        help="a JSON file that describes a run, as its own spec.json does; what it leaves out is as by default, and "
        "settings given as flags go before it",
    )
    for part, config in parts.items():
        group = parser.add_argument_group(f"{_PART_TITLES[part]} (`{part}` in SPEC)")
        for s in settings(config):
            told = escaped(f"{s.told} (default: {_plain(s.default)})")
            group.add_argument(f"--{s.name.replace('_', '-')}", metavar=metavar(s), help=told)


def metavar(s: Setting) -> str:
    """Returns what stands for a setting's value."""
    if s.choices:
        return "{" + ",".join(s.choices) + "}"
    if isinstance(s.default, dict):
        return "JSON"
    return {int: "N", float: "X", bool: "{true,false}", str: "WORD"}.get(s.type, "NAMES")


def escaped(told: str) -> str:
    """Returns help in which argparse has nothing to fill in."""
    return told.replace("%", "%%")


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value not in ("", (), {}) else "empty"


def _wrapped(text: str, indent: int = 0) -> str:
    return textwrap.fill(text, 72 if indent else 79, subsequent_indent=" " * indent, break_on_hyphens=False)
