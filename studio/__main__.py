"""The `lora-studio` command: serve, train, demo, and what can be done with runs."""

import argparse
import dataclasses
import ipaddress
import json
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core import METHODS, Failed, LoRAError, gpus, resolve_device, settings
from studio import analysis, command_line, evaluate_command, home_commands
from studio.experiments import command as experiment_command
from studio.specs import PARTS
from studio.workspace import Workspace

if TYPE_CHECKING:
    from studio.doors import Account
    from studio.probe import Probe
    from studio.runs import Run
    from studio.specs import RunSpec


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
    _add_train(command)
    _commands_for_runs(of_run)
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


def _add_train(command: command_line.Add) -> None:
    train = command(
        "train",
        _train,
        "Train the run that a JSON file describes, and follow it.",
        more="It trains in a process of its own, which goes on when this terminal closes; if another run is going on, "
        "it waits for it. Ctrl-C saves and ends it.\n\n"
        "The least that SPEC may hold is {}: then the starter model learns starter:restaurants. Exit status 1: the run "
        "failed.",
        usage="SPEC [--SETTING VALUE ...] [--json] [--workspace DIR]",
        examples="""
            echo '{"model": "starter", "data": {"source": "starter:tickets"}}' > spec.json
            lora-studio train spec.json
            lora-studio train spec.json --r 4 --target-modules q_proj,v_proj --steps 100
            """,
    )
    train.add_argument("--json", action="store_true", help="print every event as one line of JSON")
    command_line.add_spec(train, PARTS, is_needed=True)
    plan = command(
        "plan",
        _plan,
        "Say what a run would take, LoRA beside full fine-tuning, and what makes it fit.",
        more="Computed from shapes, without loading a weight. The columns are GB (10⁹ bytes) on each device.",
        usage="[SPEC] [--SETTING VALUE ...] [--model MODEL] [--devices N] [--free BYTES] [--probe]",
        examples="""
            lora-studio plan                                 # the starter model with the default settings
            lora-studio plan --model ~/models/llama --r 16 --batch-size 8 --free 24e9
            lora-studio plan spec.json --probe
            """,
    )
    plan.add_argument("--json", action="store_true", help=command_line.JSON_HELP)
    plan.add_argument(
        "--model",
        help="starter, a folder (its config.json is enough), a .gguf file or a Hub id (default: that of SPEC, starter)",
    )
    plan.add_argument(
        "--devices", type=int, metavar="N", help="so many devices train together (default: those of --device)"
    )
    plan.add_argument("--free", type=float, metavar="BYTES", help="what each device has (default: what is free now)")
    plan.add_argument("--probe", action="store_true", help="also take a few real steps on the longest rows of the data")
    command_line.add_spec(plan, PARTS, is_needed=False)


def _commands_for_runs(add: command_line.Add) -> None:
    """Adds the commands that list and steer runs; all of them take --json."""
    queue = add(
        "queue",
        _queue,
        "List the runs that wait for their turn, or with SPEC add to them.",
        more="What waits is trained one after the other, with the page and this terminal closed, too. A sweep makes a "
        "run for each combination of its values.",
        usage="[SPEC] [--SETTING VALUE ...] [--sweep SETTING=VALUES] [--move RUN BY] [--cancel RUN] [--json]",
        of_run=False,
        examples="""
            lora-studio queue spec.json --sweep r=4,8 --sweep seed=1,2   # four runs
            lora-studio queue                                            # who waits
            lora-studio queue --move 20261126 -1                         # one place up
            lora-studio queue --cancel 20261126
            """,
    )
    queue.add_argument("--move", nargs=2, metavar=("RUN", "BY"), help="move a run BY places down, or up if negative")
    queue.add_argument("--cancel", metavar="RUN", help="take a run out of the queue")
    queue.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="SETTING=VALUES",
        help="a run for each value, r=4,8,16; given more than once, for each combination",
    )
    command_line.add_spec(queue, PARTS, is_needed=False)
    add(
        "runs",
        _runs,
        "List all runs, the newest first; of one that failed also what may help.",
        more="A line is its id, its state, its step and its name.",
        of_run=False,
        examples="""
            lora-studio runs
            lora-studio runs --json                          # with losses, and why a run failed
            """,
    )
    pause = add(
        "pause",
        _end,
        "Save everything and free the memory after the step at hand; resume goes on from there.",
        examples="lora-studio pause 20261126",
    )
    pause.set_defaults(reason="paused")
    stop = add(
        "stop",
        _end,
        "Save everything and end after the step at hand; resume could still go on from there.",
        examples="""
            lora-studio stop 20261126
            lora-studio stop 20261126 --now
            """,
    )
    stop.set_defaults(reason="stopped")
    stop.add_argument("--now", action="store_true", help="kill it; what came after its last checkpoint is lost")
    resume = add(
        "resume",
        _resume,
        "Go on from the last checkpoint, as if nothing had happened, and follow it.",
        more="After a pause, a stop, a crash or a kill. Exit status 1: the run failed.",
        examples="""
            lora-studio resume 20261126
            lora-studio resume 20261126 --further 100        # 100 steps more, as a run of its own
            lora-studio resume 20261126 --remedy 1           # with the first change that `runs` offers
            """,
    )
    resume.add_argument("--further", type=int, metavar="N", help="train N steps more than were asked for, as a new run")
    resume.add_argument(
        "--remedy", type=int, metavar="N", help="with the Nth change that `runs` offers a failed run, as a new run"
    )


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
