"""Starts a run's worker once for each of its devices, by torchrun, and tells the end that they do not live to tell."""

import logging
import os
import signal
import time

from torch.distributed import is_torchelastic_launched
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from core import Failed, LoRAError, resolve_devices
from studio.runs import KILLED, Run

log = logging.getLogger("studio.launcher")

is_launched = is_torchelastic_launched


def num_processes(run: Run) -> int:
    """Returns how many processes the run's setting asks for; 1 where it cannot be read, which the worker then says."""
    try:
        return len(resolve_devices(run.spec.train.device))
    except LoRAError:
        return 1


def launch(run: Run, num_processes: int) -> int:
    """Runs so many workers to their end, as torchrun does on one machine; for the holder of the run's lock.

    Returns:
        The exit code: 0 finished, stopped or paused, 1 failed.
    """
    began = time.time()
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    os.environ |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    worker = ["-m", "studio.worker", str(run.folder), "--launcher", str(os.getpid())]
    failure, told = None, Failed(f"The run ended without a word; see {run.worker_log}.")
    try:
        torchrun.run(torchrun.parse_args(["--standalone", "--nproc-per-node", str(num_processes), *worker]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        log.error("Worker process %d ended first, with exit code %d.", rank + 1, failure.exitcode)
        if failure.exitcode == -signal.SIGKILL:
            told = Failed(KILLED.format(f"Worker process {rank + 1} of {num_processes}"), "killed")
    except SignalException as error:
        log.error("%s", error)
    run.log.read()
    if run.log.end is None or run.log.last_time < began:
        run.tell(told)
    return int(failure is not None)
