"""The `lora-studio` command: serve, train, demo."""

import argparse
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from core import LoRAConfig, LoRAError, TrainConfig, settings
from studio.workspace import Workspace


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0 fine, 1 the run failed, 2 unusable arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words.insert(0, "serve")
    args = _parser().parse_args(words)
    try:
        workspace = Workspace(args.workspace) if args.workspace else Workspace.default()
        return args.run(args, workspace)
    except LoRAError as error:
        print(f"lora-studio: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-studio",
        description="Fine-tune a language model with LoRA in the browser, and see what the update learned. "
        "Without a command it serves the page.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument(
            "--workspace",
            metavar="DIR",
            help="folder for runs, uploads and caches (default: $LORA_STUDIO_HOME, else ~/lora-studio)",
        )
        return sub

    serve = command("serve", _serve, "Serve the studio's page on this machine.")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)"
    )
    serve.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    serve.add_argument("--no-browser", action="store_true", help="do not open a browser")
    serve.add_argument("--run-id", metavar="RUN", help="open the page at this run")
    train = command("train", _train, "Train one run in a process of its own, and follow it.")
    train.add_argument("spec", metavar="SPEC", type=Path, help="a JSON file like the spec.json of a run")
    train.add_argument("--json", action="store_true", help="print every event as one line of JSON")
    for config in (LoRAConfig, TrainConfig):
        group = train.add_argument_group(f"settings that go before those of SPEC ({config.__name__})")
        for s in settings(config):
            metavar = "{" + ",".join(s.choices) + "}" if s.choices else "X"
            group.add_argument(f"--{s.name.replace('_', '-')}", metavar=metavar, help=s.help.replace("%", "%%"))
    demo = command("demo", _demo, "Train the starter model on a starter data set and show what changed.")
    demo.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    demo.add_argument(
        "--model", default="starter", help="a Hub id, a folder or a .gguf file (default: the starter model)"
    )
    demo.add_argument(
        "--data",
        default="starter:restaurants",
        help="starter:NAME, a data file, or hub:owner/name (default: %(default)s)",
    )
    return parser


def _serve(args: argparse.Namespace, workspace: Workspace) -> int:
    if not 0 < args.port < 65536:
        raise LoRAError(f"`--port` (={args.port}) must be from 1 to 65535.")
    try:
        family, *_, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise LoRAError(f"`--host` (={args.host!r}) must be an address of this machine, such as 127.0.0.1.") from error
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
    from studio.app import launch
    from studio.state import Studio

    query = f"?run={args.run_id}" if args.run_id else ""
    host = "localhost" if args.host == "127.0.0.1" else f"[{args.host}]" if ":" in args.host else args.host
    url = f"http://{host}:{args.port}/{query}"
    launch(Studio(workspace), host=args.host, port=args.port, url=url, browser=not args.no_browser)
    return 0


def _train(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio import jobs
    from studio.runs import Runs, RunSpec

    spec = RunSpec.read(args.spec).to_dict()
    for part, config in (("lora", LoRAConfig), ("train", TrainConfig)):
        given = [(s, getattr(args, s.name)) for s in settings(config)]
        spec[part] |= {s.name: s.parse(text) for s, text in given if text is not None}
    run = jobs.start(Runs(workspace), RunSpec.from_dict(spec))
    return jobs.follow(run, as_json=args.json)


def _demo(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio.demo import demo

    return demo(workspace, model=args.model, source=args.data, steps=args.steps)


if __name__ == "__main__":
    sys.exit(main())
