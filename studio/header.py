"""The header's line: device and free memory, the model in memory, what is training, and what waits."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from core import device_memory, gpus, resolve_device
from studio import jobs, theme
from studio.live import duration
from studio.runs import Run
from studio.specs import RunSpec


def line(going: Run | None, statuses: Iterable[str], loaded: str | None) -> str:
    """Returns HTML of the line.

    Args:
        going: The run that is going on, the newest where there are several.
        statuses: The status of each run.
        loaded: The model that is held in memory to chat with, if one is.
    """
    known = [*statuses]
    others, waiting = known.count("running") - 1, known.count("queued")
    pieces = [_devices(going), _model(going, loaded), _training(going)]
    pieces += [f"{others} more training"] if others > 0 else []
    pieces += [f"{waiting} waiting"] if waiting else []
    return "".join(f"<div>{piece}</div>" for piece in pieces)


def share(going: Run) -> int:
    """Returns how far a run is, in per cent."""
    return round(100 * _step(going) / going.spec.train.steps)


def _step(going: Run) -> int:
    return going.log.steps[-1].step if going.log.steps else 0


def _devices(going: Run | None) -> str:
    """Returns where training goes on, or would, with the memory that is free there."""
    names = sorted(jobs.devices_of(going.spec if going else RunSpec()))
    found = {gpu.device: gpu for gpu in gpus()} if names[0].startswith("cuda") else {}
    words = []
    for name in names:
        gpu = found.get(name)
        free, total = (gpu.free_bytes, gpu.total_bytes) if gpu else device_memory(resolve_device(name))
        title = f"{gpu.title} ({name})" if gpu else name.upper()
        words.append(f"{title}: {free / 1e9:.1f} of {total / 1e9:.1f} GB free" if total else title)
    return escape(", ".join(words))


def _model(going: Run | None, loaded: str | None) -> str:
    uses = {"training": going.spec.model if going else None, "chat": loaded}
    models = [model for model in dict.fromkeys(uses.values()) if model]
    words = [f"{Path(m).name} ({' and '.join(use for use, of in uses.items() if of == m)})" for m in models]
    return escape(f"Model: {', '.join(words)}" if words else "No model in memory")


def _training(going: Run | None) -> str:
    if going is None:
        return "Nothing is training"
    step, steps = _step(going), going.spec.train.steps
    words = f"Training “{going.spec.name}”, step {step} of {steps}"
    words += f", {duration(going.seconds_left())} left" if going.log.steps else ", starting"
    return theme.bar(step, steps, "Training progress") + escape(words)
