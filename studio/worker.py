"""One run in a process of its own: drains `core.train` into the run's folder.

python -m studio.worker RUN_FOLDER
"""

import argparse
import errno
import logging
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from core import (
    Adapter,
    Evaluated,
    Failed,
    Finished,
    LoRAError,
    Noted,
    Step,
    inject,
    peak_memory_bytes,
    resolve_device,
    resolve_dtype,
    train,
)
from studio import data, models
from studio.runs import EventWriter, Run
from studio.workspace import Workspace

log = logging.getLogger("studio.worker")


class _StopAskedError(Exception):
    """Somebody asked the worker to end before it had taken a step."""


def main(argv: list[str] | None = None) -> int:
    """Runs the run of a folder; returns the exit code: 0 finished or stopped, 1 failed."""
    parser = argparse.ArgumentParser(prog="python -m studio.worker", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="the run's folder, with its spec.json")
    parser.add_argument("--lock-fd", type=int, help="an inherited file descriptor that holds the run's lock")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    run = Run(args.folder.resolve())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: run.ask_to_stop())
    with run.locked() if args.lock_fd is None else nullcontext(args.lock_fd):
        writer = EventWriter(run)
        try:
            _work(run, writer)
        except _StopAskedError:
            writer.write(Finished(step=0, reason="stopped", peak_memory_bytes=0))
        except Exception as error:
            log.exception("The run failed.")
            try:
                writer.write(Failed(_explain(error, run)))
            except OSError:
                log.exception("That could not be written to the event log either.")
            return 1
        finally:
            writer.close()
    return 0


def _work(run: Run, writer: EventWriter) -> None:
    def note(message: str) -> None:
        log.info(message)
        writer.write(Noted(message))
        if run.stop_asked:
            raise _StopAskedError

    spec = run.spec
    workspace = Workspace(run.folder.parent.parent)
    device = resolve_device(spec.train.device)
    dtype = resolve_dtype(spec.train.precision, device)
    note("Reading the data")
    tokenizer = models.load_tokenizer(spec.model, workspace)
    prepared = data.prepare(
        spec.data, tokenizer, max_length=spec.train.max_length, seed=spec.train.seed, workspace=workspace
    )
    for sentence in prepared.report.sentences():
        note(sentence)
    note("Loading the model")
    model = models.load_model(spec.model, workspace, device=str(device), dtype=dtype, progress=note)
    model.config.use_cache = False  # no key-value cache in training
    injection = inject(model, spec.lora, seed=spec.train.seed)
    note(f"Training {injection.num_trainable:,} parameters in {len(injection.targets)} matrices")

    pad = tokenizer.pad_token_id
    batches = data.Batches(prepared.train, spec.train.batch_size, seed=spec.train.seed, pad_token_id=pad)
    evaluation = list(data.eval_batches(prepared.evaluation, spec.train.batch_size, pad)) or None

    def save() -> None:
        Adapter.from_model(model, base_model=spec.model).save(run.adapter_folder)

    for event in train(model, batches, spec.train, eval_batches=evaluation):
        if isinstance(event, Finished) or (isinstance(event, Evaluated) and event.step):
            save()  # before it is said: who reads "finished" finds the adapter
        writer.write(event)
        if isinstance(event, Evaluated):
            log.info("step %d: loss %.4f on held-out rows", event.step, event.loss)
        if isinstance(event, Step) and run.stop_asked:
            save()
            writer.write(Finished(event.step, "stopped", peak_memory_bytes(device)))
            log.info("Stopped after step %d; the adapter is saved.", event.step)
            return


def _explain(error: Exception, run: Run) -> str:
    """Returns what a person should read about `error`: the cause and the next step."""
    if isinstance(error, LoRAError):
        return str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error):
        train_config = run.spec.train
        return (
            f"Not enough memory for batch size {train_config.batch_size} × {train_config.max_length} tokens; "
            "halve the batch size (and double the accumulation), or shorten the longest row."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full; free some space on the disk of {run.folder.parent.parent} and start the run again."
    return f"An error that was not foreseen: {type(error).__name__}: {error} (the whole of it is in {run.worker_log})."


if __name__ == "__main__":
    sys.exit(main())
