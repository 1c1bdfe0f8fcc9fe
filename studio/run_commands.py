"""The commands that make, forecast and steer runs: train, plan, queue, runs, pause, stop, resume."""

import argparse
import dataclasses
import json
import re
import sys
from typing import TYPE_CHECKING

from core import METHODS, Failed, LoRAError, settings
from studio import command_line
from studio.specs import PARTS
from studio.workspace import Workspace

if TYPE_CHECKING:
    from studio.probe import Probe
    from studio.runs import Run
    from studio.specs import RunSpec


def add_commands(command: command_line.Add) -> None:
    """Adds them, by the function that adds a command to the parser."""
    _add_train(command)
    _add_plan(command)
    of_run = command_line.of_runs(command)
    _add_queue(of_run)
    _add_steering(of_run)


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


def _add_plan(command: command_line.Add) -> None:
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


def _add_queue(add: command_line.Add) -> None:
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


def _add_steering(add: command_line.Add) -> None:
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


def _train(args: argparse.Namespace, workspace: Workspace) -> int:
    from studio import jobs
    from studio.runs import Runs

    return jobs.follow(jobs.start(Runs(workspace), _with_columns(spec_of(args), workspace)), as_json=args.json)


def spec_of(args: argparse.Namespace) -> "RunSpec":
    """Returns the spec of SPEC with the settings of the command line."""
    from studio.specs import RunSpec

    spec = (RunSpec.read(args.spec) if args.spec is not None else RunSpec()).to_dict()
    for part, config in PARTS.items():
        given = [(s, getattr(args, s.name)) for s in settings(config)]
        spec[part] = spec.get(part, {}) | {s.name: s.parse(text) for s, text in given if text is not None}
    return RunSpec.from_dict(spec)


def _with_columns(spec: "RunSpec", workspace: Workspace) -> "RunSpec":
    """Returns a spec whose data names no column with those that its rows seem to have, as the page takes them.

    Raises:
        LoRAError: The rows cannot be read.
    """
    from studio.data import DataSpec, guess_spec, read_table

    rows = spec.data
    if rows.prompt or rows.completion or rows.messages or rows.text:
        return spec
    guessed = guess_spec(read_table(rows.source, workspace, rows.eval_source), rows.source, task=rows.task).to_dict()
    given = {name: value for name, value in rows.to_dict().items() if value != DataSpec().to_dict()[name]}
    return dataclasses.replace(spec, data=DataSpec.from_dict(guessed | given))


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
        specs = sweeps.grid(_with_columns(spec_of(args), workspace), sweeps.parse(args.sweep))
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

    spec = spec_of(args)
    spec = tasks.settled(dataclasses.replace(spec, model=args.model or spec.model), workspace)
    planner = Planner(spec.model, workspace, head=spec.head if spec.head.is_of_rows else None)
    free = None if args.free is None else int(args.free)
    made = planner.plan(spec, num_devices=args.devices, free_bytes=free)
    offered = []
    if made.fits is False:
        offered = [r for r in planner.fit(spec, made.free_bytes, num_devices=args.devices) if r is not None]
    probe = _probe(_with_columns(spec, workspace), workspace) if args.probe else None
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
