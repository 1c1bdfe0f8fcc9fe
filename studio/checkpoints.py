"""A run's checkpoints: folders, each whole or not there, of which the last two and the best are kept.

checkpoints/00000040/training.safetensors    all that training needs to go on from step 40
checkpoints/00000040/adapter_….…             the adapter of step 40, as PEFT lays it out
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from core import Checkpoint, Checkpointed, CheckpointError

TRAINING_FILE = "training.safetensors"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
KEPT = 2


class Checkpoints:
    """The checkpoints below one folder, which need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Returns the steps of which there is a checkpoint, in order."""
        return sorted(int(path.parent.name) for path in self.folder.glob(f"[0-9]*/{TRAINING_FILE}"))

    def at(self, step: int) -> Path:
        """Returns the folder of a step's checkpoint, which need not exist."""
        return self.folder / f"{step:08d}"

    def newest(self, note: Callable[[str], None]) -> Checkpoint | None:
        """Returns the newest checkpoint that can be read, or None; `note` hears of each that cannot."""
        for step in reversed(self.steps()):
            try:
                return Checkpoint.load(self.at(step) / TRAINING_FILE)
            except CheckpointError as error:
                note(f"The checkpoint of step {step} cannot be used: {error}")
        return None

    def save(self, checkpoint: Checkpoint, adapter: Path) -> Checkpointed:
        """Writes a checkpoint, then forgets those that are neither of the last two nor the best.

        Args:
            checkpoint: What training needs to go on.
            adapter: The folder with the adapter of the same step, whose files it shares.

        Raises:
            CheckpointError: It could not be written; the earlier ones are as they were.
            OSError: The same.
        """
        begin = time.perf_counter()
        self.folder.mkdir(exist_ok=True)
        place = self.at(checkpoint.step)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".saving-") as scratch:
            whole = Path(scratch) / place.name
            checkpoint.save(whole / TRAINING_FILE)
            share_adapter(adapter, whole)
            size = sum(file.stat().st_size for file in whole.iterdir())
            if place.exists():  # of the same step, before a break: the same, or damaged
                shutil.rmtree(place)
            whole.rename(place)
        self._sync()
        kept = {*self.steps()[-KEPT:], checkpoint.step, best(checkpoint.evaluations)}
        for step in self.steps():
            if step not in kept:
                self.remove(step)
        return Checkpointed(checkpoint.step, time.perf_counter() - begin, size)

    def tidy(self) -> None:
        """Takes away what a crash left half written or half removed; for the holder of the run's lock."""
        for left in self.folder.glob(".*"):
            shutil.rmtree(left)

    def remove(self, step: int) -> None:
        """Forgets one; it is gone from the list before its files are."""
        gone = self.folder / f".gone-{step}"
        self.at(step).rename(gone)
        shutil.rmtree(gone)

    def _sync(self) -> None:
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def share_adapter(source: Path, target: Path) -> None:
    """Puts an adapter's files into another folder, each in the place of what is there, without a copy where possible.

    None of them is ever written to: a new one takes its place.

    Raises:
        OSError: The target cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as scratch:
        for name in ADAPTER_FILES:
            share_file(source / name, Path(scratch) / name)
        for name in ADAPTER_FILES:
            (Path(scratch) / name).replace(target / name)


def share_file(source: str | Path, target: str | Path) -> None:
    """Makes `target` the same file as `source`, or a copy where a file system has no second name for one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def best(evaluations: Iterable[tuple[int, float]]) -> int | None:
    """Returns the step after which the held-out loss was lowest; the start, before any training, does not count."""
    trained = [(loss, step) for step, loss in evaluations if step]
    return min(trained)[1] if trained else None
