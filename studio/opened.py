"""What the Spectrum tab looks at: an adapter and what is known of it, wherever it comes from."""

from collections.abc import Hashable
from dataclasses import dataclass

from core import Adapter
from studio.runs import Run


@dataclass(frozen=True)
class Source:
    """Where an adapter is: in a run of the workspace, or in files.

    Attributes:
        run: The run's id; "" for files.
        step: Of a run: that of one of its checkpoints, or None for the adapter as it was last saved.
        path: Of files: a folder in PEFT's layout, or a file of loralib's.
        scaling: alpha / r of a loralib file, which does not say it.
        parts: The slices of fused projections that a loralib file has, which it does not name either.
        model: Of files: the base model, in any of the forms that `studio.models` takes; "" for the one that they name.
    """

    run: str = ""
    step: int | None = None
    path: str = ""
    scaling: float | None = None
    parts: tuple[str, ...] = ()
    model: str = ""


@dataclass(frozen=True)
class Opened:
    """An adapter to look at.

    Attributes:
        name: What people call it.
        adapter: The adapter itself.
        model: Its base model where the weights are at hand, in a form that `studio.models` takes; else None.
        run: The run that trained it, or None.
        key: Changes with the adapter's content: what is computed of it may be kept under this key.
    """

    name: str
    adapter: Adapter
    model: str | None
    run: Run | None
    key: Hashable
