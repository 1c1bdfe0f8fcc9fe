"""The `lora-studio` command: the parser of all its words, and serve, serve-api, devices and demo."""

import argparse
import dataclasses
import ipaddress
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core import LoRAError, gpus, resolve_device
from studio import analysis, command_line, evaluate_command, home_commands, run_commands
from studio.experiments import command as experiment_command
from studio.workspace import Workspace

if TYPE_CHECKING:
    from studio.doors import Account


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code, one of `command_line.EXIT`."""
    args = _parser().parse_args(_with_command(sys.argv[1:] if argv is None else argv))
    try:
        workspace = Workspace(args.workspace) if args.workspace else Workspace.default()
        return args.run(args, workspace)
    except LoRAError as error:
        print(f"lora-studio: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _with_command(words: Sequence[str]) -> list[str]:
    """Returns the words of the command line; without a command the page is served."""
    is_served = not words or (words[0].startswith("-") and words[0] not in ("-h", "--help"))
    return ["serve", *words] if is_served else list(words)


def _parser() -> argparse.ArgumentParser:
    parser, command = command_line.root(
        "Fine-tune a language model with LoRA in the browser, and see what the update learned. Without a command it "
        "serves the page. Nothing is asked of any other machine unless you name a Hub model or data set."
    )
    of_run = command_line.of_runs(command)
    _add_serve(command)
    demo = command(
        "demo",
        _demo,
        "Make the whole journey in the terminal: train the starter model on a starter data set, show what changed.",
        more="Prints the held-out losses and three answers before and after, and writes the adapter and its figures.",
        examples="""
            lora-studio demo                                 # a few minutes on two cores
            lora-studio demo --data starter:tickets --steps 80
            """,
    )
    demo.add_argument("--steps", type=int, default=40, metavar="N", help="optimizer steps (default: %(default)s)")
    demo.add_argument(
        "--model",
        default="starter",
        help="starter, a folder, a .gguf file or a Hub id (default: starter, SmolLM2-135M-Instruct)",
    )
    demo.add_argument(
        "--data",
        default="starter:restaurants",
        help="starter:NAME, a data file, or hub:owner/name (default: %(default)s)",
    )
    run_commands.add_commands(command)
    analysis.add_commands(command)
    evaluate_command.add_command(of_run)
    experiment_command.add_commands(command)
    home_commands.add_commands(of_run)
    api = command(
        "serve-api",
        _serve_api,
        "Serve adapters to OpenAI's clients, each by its name as the model, on this machine only.",
        more="The clients' base_url is http://localhost:PORT/v1; any API key will do. The base model is served, too.",
        examples="""
            lora-studio serve-api 20261126
            lora-studio serve-api waiter=20261126 keeper=my-adapter --port 8001
            """,
    )
    api.add_argument(
        "adapters",
        metavar="ADAPTER",
        nargs="+",
        help="a run's id, or how it begins, or a folder with an adapter; NAME=… before it says what clients call it",
    )
    api.add_argument("--base", metavar="MODEL", help="the base model (default: the one that the adapters name)")
    api.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    devices = command(
        "devices",
        _devices,
        "List the GPUs of this machine, and how much memory is free on each.",
        more="Their names are what the setting --device takes.",
        examples="lora-studio devices",
    )
    devices.add_argument("--json", action="store_true", help=command_line.JSON_HELP)
    return parser


def _add_serve(command: command_line.Add) -> None:
    serve = command(
        "serve",
        _serve,
        "Serve the studio's page on this machine, and open a browser at it.",
        more="Ctrl-C ends the page, not a training: runs go on in processes of their own.",
        examples="""
            lora-studio                                      # the word serve may be left out
            lora-studio --port 8080 --no-browser
            lora-studio --host 0.0.0.0 --user ada --password-file password.txt
            """,
    )
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine only); any other asks for a password",
    )
    serve.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    serve.add_argument("--user", metavar="NAME", help="name to sign in with, and ask for it (default: studio)")
    serve.add_argument(
        "--password-file",
        metavar="FILE",
        type=Path,
        help="text file with the password (default: $LORA_STUDIO_PASSWORD, else one is made and printed)",
    )
    serve.add_argument(
        "--allow-path",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="folder, besides the workspace, whose models the page may open; may be given again",
    )
    serve.add_argument("--no-browser", action="store_true", help="do not open a browser")
    serve.add_argument("--run-id", metavar="RUN", help="open the page at this run")


def _serve(args: argparse.Namespace, workspace: Workspace) -> int:
    if not 0 < args.port < 65536:
        raise LoRAError(f"`--port` (={args.port}) must be from 1 to 65535.")
    for folder in args.allow_path:
        if not folder.is_dir():
            raise LoRAError(f"`--allow-path` (={str(folder)!r}) must be a folder that exists.")
    try:
        found = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LoRAError(f"`--host` (={args.host!r}) must be an address of this machine, such as 127.0.0.1.") from error
    family, *_, address = found[0]
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise LoRAError(
                f"`--port` (={args.port}) must be free on {args.host} ({error.strerror}); "
                f"is the studio running already? Else try --port {args.port % 65535 + 1}."
            ) from error
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["GRADIO_TEMP_DIR"] = str(workspace.incoming)
    from studio import doors
    from studio.app import launch
    from studio.state import Studio

    is_local = all(ipaddress.ip_address(place[0]).is_loopback for *_, place in found)
    is_asked = args.user is not None or args.password_file is not None or doors.PASSWORD_VARIABLE in os.environ
    account = doors.Account.of(args.user, args.password_file) if is_asked or not is_local else None
    os.environ.pop(doors.PASSWORD_VARIABLE, None)  # no worker needs it

    query = f"?run={args.run_id}" if args.run_id else ""
    host = "localhost" if args.host == "127.0.0.1" else f"[{args.host}]" if ":" in args.host else args.host
    url = f"http://{host}:{args.port}/{query}"
    launch(
        Studio(workspace, args.allow_path),
        host=args.host,
        port=args.port,
        url=url,
        browser=not args.no_browser,
        account=account,
        notes=_notes(account, is_local),
    )
    return 0


def _serve_api(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio import offer
    from studio.runs import Runs

    runs = Runs(workspace)
    offer.serve(offer.offer(args.adapters, args.base, runs.find), workspace, port=args.port)
    return 0


def _notes(account: "Account | None", is_local: bool) -> list[str]:
    """Returns what the operator should know about who can come in."""
    notes = []
    if account is not None:
        password = f"{account.password} (made for this start, shown only here)" if account.is_generated else "as given"
        notes.append(f"Sign in as {account.name}; password: {password}.")
    if not is_local:
        notes.append(
            "Other machines can reach this page. The connection is not encrypted: whoever can listen in reads the "
            "password and all else; keep to a network that you trust, or put a proxy with TLS before it."
        )
    return notes


def _devices(args: argparse.Namespace, workspace: Workspace) -> int:
    found = gpus()
    if args.json:
        print(json.dumps([dataclasses.asdict(gpu) for gpu in found], indent=2))
        return 0
    for gpu in found:
        free, total = gpu.free_bytes / 1e9, gpu.total_bytes / 1e9
        print(f"{gpu.device:<8}  {free:>6.1f} of {total:.1f} GB free  {gpu.title}")
    if not found:
        print(f"No GPU that torch can use; training runs on: {resolve_device('auto')}")
    return 0


def _demo(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio.demo import demo

    return demo(workspace, model=args.model, source=args.data, steps=args.steps)


if __name__ == "__main__":
    sys.exit(main())
