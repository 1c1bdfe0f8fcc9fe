"""The commands that take a run home and bring one in: export, certificate, capsule, restore, import."""

import argparse
import json
import sys
from pathlib import Path

from core import LoRAError, Noted
from studio import command_line
from studio.runs import Run, Runs
from studio.workspace import Workspace


def add_commands(add: command_line.Add) -> None:
    """Adds them, by the function that adds a command of a run to the parser."""
    _add_export(add)
    _add_capsules(add)


def _add_export(add: command_line.Add) -> None:
    add(
        "certificate",
        _certificate,
        "Try what merging does to a run's adapter, and write it down with the run.",
        more="Compares merged with unmerged: logits, KL, every matrix, and whether W0 comes back bit for bit. Exit "
        "status 1: the certificate is red; it says why.",
        examples="lora-studio certificate 20261126",
    )
    export = add(
        "export",
        _export,
        "Write a run's adapter, or the merged model, for other tools.",
        more="What was written is opened again before it counts. A red certificate stops it, with exit status 2.",
        examples="""
            lora-studio export 20261126 my-adapter
            lora-studio export 20261126 my-model --as merged --dtype bfloat16
            lora-studio export 20261126 my-model.gguf --as gguf --dtype q8_0
            """,
    )
    export.add_argument("out", metavar="OUT", type=Path, help="the folder, or the .gguf file, to write")
    export.add_argument(
        "--as",
        dest="kind",
        metavar="KIND",
        default="adapter",
        help="adapter: a PEFT folder. merged: a Hugging Face folder. gguf-adapter, gguf: for llama.cpp "
        "(default: %(default)s)",
    )
    export.add_argument(
        "--dtype",
        default="",
        metavar="TYPE",
        help="of the weights. merged: float32, float16, bfloat16; gguf: f32, f16, bf16, q8_0 (default: the base's own)",
    )
    export.add_argument("--force", action="store_true", help="write it even if the certificate is red")


def _add_capsules(add: command_line.Add) -> None:
    pack = add(
        "capsule",
        _capsule,
        "Put all that a run is, without its rows, into one zip.",
        examples="lora-studio capsule 20261126 run.zip",
    )
    pack.add_argument("file", metavar="FILE", type=Path, help="the zip to write")
    restore = add(
        "restore",
        _restore,
        "Make a run from a capsule, the zip that `capsule` wrote.",
        of_run=False,
        examples="lora-studio restore run.zip",
    )
    restore.add_argument("file", metavar="FILE", type=Path, help="the capsule")
    take = add(
        "import",
        _import,
        "List an adapter from elsewhere as a run, once it fits its base model.",
        of_run=False,
        examples="""
            lora-studio import my-adapter --model ~/models/llama
            lora-studio import gpt2_lora.bin --model ~/models/gpt2 --scaling 8 --parts q,v
            """,
    )
    take.add_argument("path", metavar="PATH", type=Path, help="a PEFT folder, a zip of one, or loralib's file")
    take.add_argument(
        "--model",
        default="starter",
        help="its base: starter, a folder, a .gguf file or a Hub id (default: %(default)s)",
    )
    take.add_argument("--name", default="", help="what to call it (default: after the file)")
    take.add_argument("--scaling", type=float, metavar="X", help=command_line.SCALING_HELP)
    take.add_argument("--parts", metavar="NAMES", help=command_line.PARTS_HELP)


def _export(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio import export

    run = Runs(workspace).find(args.run_id)
    making = export.make(run, workspace, export.Choice(args.kind, args.dtype, args.force), args.out)
    try:
        for said in making:
            if isinstance(said, Noted):
                print(f"{said.message} …", file=sys.stderr)
            else:
                _show(said, as_json=args.json)
    finally:
        making.close()
    return 0


def _certificate(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio import capsule, certificate

    run = Runs(workspace).find(args.run_id)
    print("Comparing merged and unmerged …", file=sys.stderr)
    report = certificate.of_run(run, workspace)
    capsule.keep_certificate(run, report)
    _show(report, as_json=args.json)
    return 1 if report.problems else 0


def _show(report: "object", *, as_json: bool) -> None:
    from studio import certificate

    assert isinstance(report, certificate.Report)
    print(json.dumps(report.to_dict(), indent=2) if as_json else certificate.plain(report))


def _capsule(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio import capsule

    file = capsule.write(Runs(workspace).find(args.run_id), args.file)
    print(json.dumps({"file": str(file)}) if args.json else f"Written: {file}")
    return 0


def _restore(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio import capsule

    return _listed(capsule.restore(Runs(workspace), args.file.expanduser()), "Restored", as_json=args.json)


def _import(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio import imports

    runs = Runs(workspace)
    if imports.is_capsule(args.path):
        raise LoRAError(f"`PATH` (={str(args.path)!r}) must be an adapter; it is a capsule: lora-studio restore it.")
    parts = tuple(args.parts.split(",")) if args.parts else None
    run = imports.take(runs, args.path, args.model, name=args.name, scaling=args.scaling, parts=parts)
    return _listed(run, "Imported", as_json=args.json)


def _listed(run: Run, verb: str, *, as_json: bool) -> int:
    print(json.dumps({"id": run.id, "name": run.spec.name}) if as_json else f"{verb} as {run.id}: {run.spec.name}")
    return 0
