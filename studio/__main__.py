"""The `lora-studio` command: serve, train, demo, and what can be done with runs."""

import argparse
import dataclasses
import ipaddress
import json
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from core import METHODS, Failed, LoRAError, gpus, resolve_device, settings
from studio import analysis, evaluate_command, home_commands
from studio.experiments import command as experiment_command
from studio.specs import PARTS
from studio.workspace import Workspace

if TYPE_CHECKING:
    from studio.doors import Account
    from studio.probe import Probe
    from studio.runs import Run
    from studio.specs import RunSpec


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
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine only); any other asks for a password",
    )
    serve.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    serve.add_argument("--user", metavar="NAME", help="name to sign in with (default: studio)")
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
    train = command("train", _train, "Train one run in a process of its own, and follow it.")
    train.add_argument("--json", action="store_true", help="print every event as one line of JSON")
    _add_spec(train)
    plan = command("plan", _plan, "Say what a run would take, beside full fine-tuning, and what makes it fit.")
    plan.add_argument("--json", action="store_true", help="print JSON instead of lines for people")
    plan.add_argument("--model", help="starter, a folder (its config.json is enough), a .gguf file or a Hub id")
    plan.add_argument(
        "--devices", type=int, metavar="N", help="so many devices train together (default: those of --device)"
    )
    plan.add_argument("--free", type=float, metavar="BYTES", help="what each device has (default: what is free now)")
    plan.add_argument("--probe", action="store_true", help="also take a few real steps on the longest rows of the data")
    _add_spec(plan, nargs="?")
    commands_for_runs(command)
    analysis.add_commands(command)
    experiment_command.add_commands(command)
    home_commands.add_commands(of_runs(command))
    evaluate_command.add_command(of_runs(command))
    api = command("serve-api", _serve_api, "Serve adapters to OpenAI's clients, on this machine only.")
    api.add_argument(
        "adapters", metavar="ADAPTER", nargs="+", help="a run's id, or how it begins, or a folder; NAME=… names it"
    )
    api.add_argument("--base", metavar="MODEL", help="the base model (default: the one that the adapters name)")
    api.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    devices = command("devices", _devices, "List the GPUs of this machine, and how much memory is free on each.")
    devices.add_argument("--json", action="store_true", help="print JSON instead of lines for people")
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


def _add_spec(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("spec", metavar="SPEC", type=Path, nargs=nargs, help="a JSON file like the spec.json of a run")
    for config in PARTS.values():
        group = parser.add_argument_group(f"settings that go before those of SPEC ({config.__name__})")
        for s in settings(config):
            metavar = "{" + ",".join(s.choices) + "}" if s.choices else "X"
            group.add_argument(f"--{s.name.replace('_', '-')}", metavar=metavar, help=s.told.replace("%", "%%"))


def of_runs(command: Callable[..., argparse.ArgumentParser]) -> Callable[..., argparse.ArgumentParser]:
    """Returns what adds a command of a run, `RUN`, or of all with `of_run` unset; each takes --json."""

    def add(name: str, run: Callable[..., int], help: str, *, of_run: bool = True) -> argparse.ArgumentParser:
        sub = command(name, run, help)
        sub.add_argument("--json", action="store_true", help="print JSON instead of lines for people")
        if of_run:
            sub.add_argument("run_id", metavar="RUN", help="a run's id, or how it begins")
        return sub

    return add


def commands_for_runs(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the commands that list and steer runs; all of them take --json."""
    add = of_runs(command)
    add("runs", _runs, "List all runs, the newest first.", of_run=False)
    pause = add("pause", _end, "Save everything and free the memory after the step at hand; resume goes on from there.")
    pause.set_defaults(reason="paused")
    stop = add("stop", _end, "Save everything and end after the step at hand.")
    stop.set_defaults(reason="stopped")
    stop.add_argument("--now", action="store_true", help="kill it; what came after its last checkpoint is lost")
    resume = add("resume", _resume, "Go on from the last checkpoint, as if nothing had happened, and follow it.")
    resume.add_argument("--further", type=int, metavar="N", help="train N steps more than were asked for, as a new run")
    resume.add_argument(
        "--remedy", type=int, metavar="N", help="with the Nth change that `runs` offers a failed run, as a new run"
    )
    queue = add("queue", _queue, "List the runs that wait, or with SPEC add to them; a sweep adds many.", of_run=False)
    queue.add_argument("--move", nargs=2, metavar=("RUN", "BY"), help="move a run BY places down, or up if negative")
    queue.add_argument("--cancel", metavar="RUN", help="take a run out of the queue")
    queue.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="SETTING=VALUES",
        help="a run for each value, r=4,8,16; given more than once, for each combination",
    )
    _add_spec(queue, nargs="?")


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


def _train(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio import jobs
    from studio.runs import Runs

    return jobs.follow(jobs.start(Runs(workspace), _spec(args)), as_json=args.json)


def _spec(args: argparse.Namespace) -> "RunSpec":
    """Returns the spec of SPEC with the settings of the command line."""
    from studio.specs import RunSpec

    spec = (RunSpec.read(args.spec) if args.spec is not None else RunSpec()).to_dict()
    for part, config in PARTS.items():
        given = [(s, getattr(args, s.name)) for s in settings(config)]
        spec[part] = spec.get(part, {}) | {s.name: s.parse(text) for s, text in given if text is not None}
    return RunSpec.from_dict(spec)


def _print_runs(listed: "list[Run]", *, as_json: bool) -> int:
    from studio.remedies import remedies

    rows = []
    for run in listed:
        try:
            run.note_killed()
            log, status = run.log, run.status
            step = log.steps[-1].step if log.steps else 0
            last = log.evaluations[-1] if log.evaluations else None
            row = {"id": run.id, "name": run.spec.name, "status": status, "step": step, "steps": run.spec.train.steps}
            row |= {"held_out_loss": last and last.loss, **({"metrics": last.metrics} if last and last.metrics else {})}
            row |= {"adapter": str(run.adapter_folder) if run.has_adapter else None}
            if isinstance(log.end, Failed):
                row["failed"] = dataclasses.asdict(log.end) | {"remedies": [r.label for r in remedies(run)]}
            rows.append(row)
        except LoRAError as error:
            rows.append({"id": run.id, "name": "", "status": "damaged", "problem": str(error)})
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        done = f"{row['step']} of {row['steps']}" if "step" in row else row["problem"]
        print(f"{row['id']:<45}  {row['status']:<11}  {done:<14}  {row['name']}")
        for number, label in enumerate(row.get("failed", {}).get("remedies", []), 1):
            size = row["failed"]["predicted_bytes"].get(label)
            print(f"    --remedy {number}: {label}" + (f", about {size / 1e9:.2f} GB" if size else ""))
    return 0


def _runs(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio.runs import Runs

    return _print_runs(Runs(workspace).list(), as_json=args.json)


def _end(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio import jobs
    from studio.runs import Runs

    runs = Runs(workspace)
    run = runs.find(args.run_id)
    if run.status == "queued":
        jobs.cancel(runs, run)
    elif run.status != "running":
        raise LoRAError(f"Run {run.id} must be running or queued to be ended; it is {run.status}.")
    elif getattr(args, "now", False):
        jobs.kill(run)
    else:
        run.ask_to_stop(args.reason)
        for _ in run.follow():
            pass
    return _print_runs([run], as_json=args.json)


def _resume(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio import jobs
    from studio.remedies import remedies
    from studio.runs import Runs

    runs = Runs(workspace)
    run = runs.find(args.run_id)
    if args.remedy is not None:
        offered = remedies(run)
        if args.further is not None or not 1 <= args.remedy <= len(offered):
            raise LoRAError(
                f"`--remedy` (={args.remedy}) must be, without --further, one of the {len(offered)} that "
                f"`lora-studio runs` offers run {run.id}."
            )
        run = jobs.start(runs, offered[args.remedy - 1].spec)
    elif args.further is not None:
        run = jobs.further(runs, run, args.further)
    else:
        jobs.resume(runs, run)
    return jobs.follow(run, as_json=args.json)


def _queue(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio import jobs, sweeps
    from studio.runs import Runs

    runs = Runs(workspace)
    if args.spec is not None:
        specs = sweeps.grid(_spec(args), sweeps.parse(args.sweep))
        return _print_runs([jobs.start(runs, spec) for spec in specs], as_json=args.json)
    if args.sweep:
        raise LoRAError("`--sweep` must come with the SPEC whose settings it varies.")
    if args.move:
        beginning, by = args.move
        if not re.fullmatch(r"[+-]?\d{1,9}", by):
            raise LoRAError(f"`--move` (={by!r}) must be given a whole number of places, such as -1.")
        jobs.move(runs, runs.find(beginning), int(by))
    if args.cancel:
        jobs.cancel(runs, runs.find(args.cancel))
    return _print_runs(runs.queued(), as_json=args.json)


def _plan(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio import tasks
    from studio.planner import Planner

    spec = _spec(args)
    spec = tasks.settled(dataclasses.replace(spec, model=args.model or spec.model), workspace)
    planner = Planner(spec.model, workspace, head=spec.head if spec.head.is_of_rows else None)
    free = None if args.free is None else int(args.free)
    made = planner.plan(spec, num_devices=args.devices, free_bytes=free)
    offered = []
    if made.fits is False:
        offered = [r for r in planner.fit(spec, made.free_bytes, num_devices=args.devices) if r is not None]
    probe = _probe(spec, workspace) if args.probe else None
    if args.json:
        proposals = [{"label": r.label, "bytes": r.predicted_bytes, "cost": r.cost} for r in offered]
        found = {"fits": made.fits, "proposals": proposals, "probe": probe and dataclasses.asdict(probe)}
        print(json.dumps(dataclasses.asdict(made) | found, indent=2))
        return 0
    size = made.adapter_bytes / 1e6
    print(f"Trained: {made.num_trained:,} of {made.num_parameters:,} parameters; the adapter takes {size:.1f} MB.")
    print(f"{'GB on each device':<18}{METHODS[made.method]:>18}{'full':>12}")
    for name, size in made.lora.terms.items():
        print(f"{name:<18}{size / 1e9:>18.2f}{getattr(made.full, name) / 1e9:>12.2f}")
    print(f"{'total':<18}{made.lora.total / 1e9:>18.2f}{made.full.total / 1e9:>12.2f}")
    if made.fits is not None:
        print(
            f"{'It fits' if made.fits else 'It does not fit'}: {made.free_bytes / 1e9:.2f} GB are free, {made.device}."
        )
    for r in offered:
        print(f"  {r.label}: {(r.predicted_bytes or 0) / 1e9:.2f} GB; {r.cost}")
    if probe:
        print(
            f"Tried on {probe.device}, {probe.num_rows} rows of up to {probe.num_tokens} tokens: "
            f"{probe.peak_bytes / 1e9:.2f} GB at most, {probe.batch_seconds:.2f} s a batch, "
            f"about {probe.total_seconds:,.0f} s for the run."
        )
    return 0


def _probe(spec: "RunSpec", workspace: Workspace) -> "Probe":
    """Returns what a probe finds; what it does meanwhile is told beside the output."""
    from studio import probe

    probing = probe.Probing(spec, workspace)
    try:
        for said in probing:
            if isinstance(said, probe.Probe):
                return said
            print(f"{said.message} …", file=sys.stderr)
    finally:
        probing.close()
    raise LoRAError("The probe ended without a result; try again.")


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
