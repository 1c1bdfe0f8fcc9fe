"""One run in a process of its own: drains `core.train` into the run's folder.

python -m studio.worker RUN_FOLDER
torchrun --nproc-per-node N -m studio.worker RUN_FOLDER

Of several processes the first writes and decides; whichever meets an error first tells of it. Without torchrun, a run
whose setting names several devices starts it itself (see `studio.launcher`).
"""

import argparse
import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from core import (
    Adapter,
    Baseline,
    Checkpoint,
    Evaluated,
    Event,
    ExplodedGradientError,
    Failed,
    Finished,
    LoRAError,
    MemoryForecast,
    NonFiniteLossError,
    Noted,
    Resumed,
    Step,
    Training,
    World,
    forecast_memory,
    is_lost,
    is_of_memory,
    peak_memory_bytes,
    resolve_devices,
    train,
    trained_of,
)
from studio import data, label_metrics, launcher, models, setup, tasks
from studio.checkpoints import best, share_adapter
from studio.evaluation import Evaluator
from studio.event_log import EventWriter
from studio.remedies import for_memory
from studio.runs import KILLED, Run
from studio.specs import RunSpec
from studio.workspace import Workspace

log = logging.getLogger("studio.worker")


RESERVE_BYTES = 65_536
"""Room that a run keeps for its last words, should the disk be full."""


SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _StopAskedError(Exception):
    """Somebody asked the worker to end before it had taken a step."""


def main(argv: list[str] | None = None) -> int:
    """Runs the run of a folder, from its newest checkpoint if there is one.

    Returns:
        The exit code: 0 finished, stopped or paused, 1 failed.
    """
    parser = argparse.ArgumentParser(prog="python -m studio.worker", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="the run's folder, with its spec.json")
    parser.add_argument("--lock-fd", type=int, help="an inherited file descriptor that holds the run's lock")
    parser.add_argument("--launcher", type=int, help="the process that started this one among others, and has the lock")
    args = parser.parse_args(argv)
    rank = int(os.environ.get("RANK", 0))
    level = logging.WARNING if rank else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    run = Run(args.folder.resolve())
    with _lock(run, args, rank):
        if not launcher.is_launched() and (num_processes := launcher.num_processes(run)) > 1:
            run.sign()
            return launcher.launch(run, num_processes)
        world = World.join()
        for number in SIGNALS:
            signal.signal(number, lambda _number, _frame: run.ask_to_stop())
        if not int(os.environ.get("GROUP_RANK", 0)):  # those of other machines have other numbers
            run.sign()
        code = _run(run, world, args.launcher)
        if code == 0:
            world.leave()
        return code


def _lock(run: Run, args: argparse.Namespace, rank: int) -> AbstractContextManager[object]:
    """Holds the run's lock as long as the process lives, if no other process of the run does."""
    return nullcontext() if args.lock_fd is not None or args.launcher is not None or rank else run.locked()


class _Keeper:
    """Keeps what a run says and makes: the first of its processes writes, the others only go along."""

    def __init__(self, run: Run, writer: EventWriter | None, launcher: int | None) -> None:
        """Writes by `writer`, if there is one, as long as `launcher`, if there is one, lives and so holds the lock."""
        self._run, self._writer, self._launcher = run, writer, launcher

    def say(self, event: Event) -> None:
        if self._writer:
            if self._launcher not in (None, os.getppid()):
                sys.exit("The process that held the run's lock is gone.")
            self._writer.write(event)

    def adapter(self, make: Callable[[], Adapter | Baseline]) -> None:
        if self._writer:
            make().save(self._run.adapter_folder)

    def checkpoint(self, training: Training) -> None:
        """Saves where training stands, with the adapter that was saved last."""
        if self._writer:
            self.say(self._run.checkpoints.save(training.checkpoint(), self._run.adapter_folder))

    def adapter_of(self, step: int) -> None:
        """Makes the adapter of a step's checkpoint that of the run."""
        if self._writer:
            share_adapter(self._run.checkpoints.at(step), self._run.adapter_folder)


def _run(run: Run, world: World, launcher: int | None) -> int:
    writer, start = None, None
    told: list[str] = []  # of what was there before
    reserve = run.folder / "reserve"
    try:
        if world.is_first:
            reserve.write_bytes(bytes(RESERVE_BYTES))
            run.log.read()
            end = run.log.end
            if run.log.num_events and (end is None or (isinstance(end, Failed) and end.cause == "killed")):
                reached = run.log.steps[-1].step if run.log.steps else 0
                told.append(f"The worker before was killed, or the machine went down, after step {reached}")
            run.checkpoints.tidy()
            start = run.checkpoints.newest(told.append)
            is_evaluated = start is not None and any(step == start.step for step, _ in start.evaluations)
            run.log.cut_back(start.step if start else 0, is_evaluated=is_evaluated)
            writer = EventWriter(run.log)
        start = world.agree(start)
        keeper = _Keeper(run, writer, launcher)
        if start:
            keeper.say(Resumed(start.step))
        for message in told:
            keeper.say(Noted(message))
        _work(run, keeper, start, world)
    except _StopAskedError as asked:
        world.has_last_word()
        writer = writer or EventWriter(run.log)
        writer.write(Finished(start.step if start else 0, str(asked), 0))
    except Exception as error:
        if world.size > 1 and is_lost(error):
            for number in SIGNALS:  # torchrun now ends all that are left; nobody asked this run to stop
                signal.signal(number, signal.SIG_IGN)
            run.forget_stop()
        if not world.has_last_word():
            log.info("The run ended with another process, which says why.")
            return 0
        log.exception("The run failed.")
        try:
            reserve.unlink(missing_ok=True)
            writer = writer or EventWriter(run.log)
            writer.write(_explain(error, run))
        except OSError:
            log.exception("That could not be written to the event log either.")
        return 1
    finally:
        if world.is_first:
            reserve.unlink(missing_ok=True)
        if writer:
            writer.close()
    return 0


def _work(run: Run, keeper: _Keeper, start: Checkpoint | None, world: World) -> None:
    def note(message: str) -> None:
        log.info(message)
        keeper.say(Noted(message))
        if world.is_first and run.stop_asked:
            raise _StopAskedError(run.stop_asked)

    workspace = Workspace(run.workspace_root)
    spec = tasks.settled(run.spec, workspace)
    device = world.device(spec.train.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    prepared, pad = setup.rows_of(spec, workspace, world, note, is_begun=start is not None)
    for source in run.note_data(prepared.hashes) if world.is_first else ():
        note(f"{source} has changed since this run first read it; from here on it trains on other rows")
    begun = start.step if start else 0
    evaluator = Evaluator(run, workspace, world, begun) if spec.evaluation.is_on else None
    model, injection = setup.adapted_model(spec, workspace, world, device, note)
    together = f", in {world.size} processes" if world.size > 1 else ""
    if spec.train.shard_weights:
        together += " that share the frozen weights out among them" if world.size > 1 else ""
    where = f"in {len(injection.targets)} matrices" if injection.targets else f"by {spec.method.title}"
    note(f"Training {injection.num_trainable:,} parameters {where}{together}")

    num_rows = spec.train.batch_size * world.size
    if start and spec.continues:  # of a run that may have trained more matrices
        start, left_out = start.only(model)
        if left_out:
            note(f"The checkpoint also has {len(left_out)} tensors that this run does not train; they are left out")
    batches = data.Batches(prepared.train, num_rows, seed=spec.train.seed, pad_token_id=pad)
    evaluation = list(data.eval_batches(prepared.evaluation, num_rows, pad)) or None
    rest = batches.after(start.num_rows if start else 0)
    scored = tasks.row_labels(spec)
    training = train(model, rest, spec.train, eval_batches=evaluation, start=start, world=world, row_labels=scored)
    try:
        events = (_measured(event, training, model, evaluator) for event in training)
        _drain(run, keeper, training, events, lambda: trained_of(model, base_model=spec.model), world)
    except NonFiniteLossError as error:
        numbers = batches.rows(training.num_rows, error.batch)
        rows = tuple(sorted(numbers[row] for row in error.rows))
        raise NonFiniteLossError.of(error.what, error.step, rows=rows, among="the data", where=error.where) from error


def _measured(event: Event, training: Training, model: Any, evaluator: Evaluator | None) -> Event:
    """Returns an event, an evaluation with the task's metrics, by which it is then compared with others."""
    if evaluator is None or not isinstance(event, Evaluated):
        return event
    log.info("Generating answers to held-out prompts …")
    event = evaluator(model, event)
    training.evaluations[-1] = (event.step, event.to_minimize)
    return event


def _drain(
    run: Run,
    keeper: _Keeper,
    training: Training,
    events: Iterable[Event],
    adapter: Callable[[], Adapter | Baseline],
    world: World,
) -> None:
    """Writes what training says, and what it has made, until it ends or is asked to."""
    config, saved_time = run.spec.train, time.monotonic()
    adapter_step, checkpoint_step = 0, training.step  # at the start there is no adapter worth saving

    def save_adapter() -> None:
        nonlocal adapter_step
        if training.step > adapter_step:
            keeper.adapter(adapter)
            adapter_step = training.step

    def checkpoint() -> None:
        nonlocal checkpoint_step, saved_time
        if training.step > checkpoint_step:
            save_adapter()
            keeper.checkpoint(training)
            checkpoint_step, saved_time = training.step, time.monotonic()

    def is_due(event: Event) -> bool:
        if not isinstance(event, (Step, Evaluated)) or training.owes_evaluation:
            return False
        minutes = (time.monotonic() - saved_time) / 60
        return (
            (config.checkpoint_every > 0 and training.step % config.checkpoint_every == 0)
            or (config.checkpoint_minutes > 0 and minutes >= config.checkpoint_minutes)
            or (isinstance(event, Evaluated) and training.step == best(training.evaluations))
        )

    for event in events:
        # The adapter is there before its evaluation, or the end, is told: who reads "finished" finds it.
        if isinstance(event, Finished):
            save_adapter()
            checkpoint()
            if event.reason == "early" and (step := best(training.evaluations)) is not None:
                keeper.adapter_of(step)
        elif isinstance(event, Evaluated):
            save_adapter()
        keeper.say(event)
        if isinstance(event, Evaluated):
            scores = f", {label_metrics.words(event.metrics)}" if event.metrics else ""
            log.info("step %d: loss %.4f%s on held-out rows", event.step, event.loss, scores)
        reason, due = world.agree((run.stop_asked if isinstance(event, Step) else "", is_due(event)))
        if reason or due:
            checkpoint()
        if reason:
            peak = world.max(peak_memory_bytes(world.device(config.device)))
            keeper.say(Finished(training.step, reason, peak))
            log.info("%s after step %d; everything is saved.", reason.capitalize(), training.step)
            return


def _explain(error: Exception, run: Run) -> Failed:
    """Returns what a person should read about `error`: the cause and the next step."""
    if isinstance(error, ExplodedGradientError):
        return Failed(str(error), "gradient")
    if isinstance(error, NonFiniteLossError):
        return Failed(str(error), error.what)
    if _is_of_full_disk(error):
        return Failed(
            f"The disk is full, so the run is paused. Free some space on the disk of {run.workspace_root} and "
            "press Resume: it goes on from its last checkpoint.",
            "disk",
        )
    if is_lost(error):
        return Failed(KILLED.format("A worker process"), "killed")
    if isinstance(error, LoRAError):
        return Failed(str(error), "data" if isinstance(error, setup.DataError) else "")
    if is_of_memory(error):
        config = run.spec.train
        return Failed(
            f"Not enough memory for batch size {config.batch_size} × {config.max_length} tokens; "
            "halve the batch size (and double the accumulation), or shorten the longest row.",
            "memory",
            _predicted_bytes(run),
        )
    return Failed(
        f"An error that was not foreseen: {type(error).__name__}: {error} (the whole of it is in {run.worker_log})."
    )


def _predicted_bytes(run: Run) -> dict[str, int]:
    """Returns what the run was to take, part by part, and what it would with each remedy, by shapes alone."""

    def forecast(spec: RunSpec) -> MemoryForecast:
        devices = resolve_devices(spec.train.device)
        dtype, prepare = spec.weights_dtype(devices[0]), setup.preparation(spec)
        settings = {"method": spec.method, "prepare": prepare, "num_devices": len(devices)}
        return forecast_memory(skeleton, spec.lora, spec.train, dtype, per_row=spec.head.is_of_rows, **settings)

    try:
        workspace = Workspace(run.workspace_root)
        asked = tasks.settled(run.spec, workspace)
        skeleton = models.skeleton(asked.model, workspace, asked.head)
        terms = forecast(asked).terms
        predicted = dict(terms)
        for remedy in for_memory(asked):
            with suppress(LoRAError):  # the model has no such matrices
                if (total := forecast(remedy.spec).total) < sum(terms.values()):
                    predicted[remedy.label] = total
        return predicted
    except Exception:  # of a model that cannot be run on shapes: the failure itself must still be told
        log.exception("What it would have taken could not be predicted.")
        return {}


def _is_of_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        # safetensors says the number only in words.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error):
            return True
        error = error.__cause__
    return False


if __name__ == "__main__":
    exit_code = main()
    if launcher.is_launched():  # a thread of torch's own that is still at work when the interpreter ends would abort it
        logging.shutdown()
        os._exit(exit_code)
    sys.exit(exit_code)
