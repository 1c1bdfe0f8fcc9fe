"""Measured losses of adapters: on the held-out rows of a run, and on general text that has nothing to do with them.

It takes a process of its own, so that it can be cancelled and its memory is free afterwards. What was measured once is
kept in the workspace's cache, by what the adapter holds and what it was measured on.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from core import Adapter, Factors, LoRAError, Noted, TrainConfig, World, read_json, resolve_devices
from studio.apart import Apart, answer
from studio.data import DataSpec
from studio.runs import Run
from studio.specs import RunSpec
from studio.tables import split_source
from studio.workspace import ASSETS, Workspace, write_whole

GENERAL_TEXT = ASSETS / "data" / "general" / "text.txt"
"""Neutral English, a paragraph a row, written for this project."""

MOST_ROWS = 200
"""Of more held-out rows than this, so many are taken, evenly spread."""

_FORM = 1  # raise it when what is measured changes


@dataclass(frozen=True)
class Bench:
    """What adapters are measured on.

    Attributes:
        model: The base model, as `studio.models` takes it.
        data: Whose held-out rows; None for general text alone.
        train: Of these settings the longest row, the seed of the split, batch size, device and precision.
    """

    model: str
    data: DataSpec | None = None
    train: TrainConfig = TrainConfig()

    @classmethod
    def of(cls, run: Run) -> Self:
        """Returns that of a run: its model, rows and settings.

        Raises:
            LoRAError: Its model writes nothing, so that text has no loss.
        """
        run.spec.must_write("losses of text")
        return cls(run.spec.model, run.spec.data, run.spec.train)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold."""
        data = self.data and self.data.to_dict()
        return {"model": self.model, "data": data, "train": self.train.to_dict()}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Returns what `to_dict` made `values` from."""
        data = values["data"] and DataSpec.from_dict(values["data"])
        return cls(values["model"], data, TrainConfig.from_dict(values["train"]))

    def digest(self, workspace: Workspace) -> str:
        """Returns what changes with all that a loss depends on but the adapter: settings, rows, general text."""
        used = {name: getattr(self.train, name) for name in ("max_length", "seed", "device", "precision")}
        sources = () if self.data is None else split_source(self.data.source) + split_source(self.data.eval_source)
        places = [path for source in sources for path in (Path(source), workspace.uploads / source)]
        files = [(path.stat().st_mtime_ns, path.stat().st_size) for path in places if path.is_file()]
        told = [_FORM, self.to_dict() | {"train": used}, files, GENERAL_TEXT.read_text(encoding="utf-8")]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Measured:
    """The losses of one adapter, each a mean over tokens, in nats.

    Attributes:
        name: What the asker calls it.
        task_loss: On the held-out rows; None where there are none.
        general_loss: On the general text.
        num_rows: How many held-out rows that were.
        num_general_tokens: How many tokens of general text.
    """

    name: str
    task_loss: float | None
    general_loss: float
    num_rows: int
    num_general_tokens: int


def digest(adapter: Adapter | None) -> str:
    """Returns what is the same for adapters of the same content; "base" for no adapter."""
    if adapter is None:
        return "base"
    found = hashlib.sha256()

    def add(name: str, held: Factors | Any) -> None:
        tensors = (held.A, held.B) if isinstance(held, Factors) else (held,)
        scaling = held.scaling if isinstance(held, Factors) else 1.0
        found.update(json.dumps([name, scaling, [list(t.shape) for t in tensors]]).encode())
        for tensor in tensors:
            found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())

    for kind in (adapter.factors, adapter.magnitudes, adapter.trained_in_full):
        for name in sorted(kind):
            add(name, kind[name])
    return found.hexdigest()[:24]


class Measuring(Iterator[Noted | Measured]):
    """A measuring that goes on: yields what it does, and each adapter's losses once they are known.

    What was measured before comes first, at once. Closed, or forgotten, its process ends; what it had found is kept.
    """

    def __init__(self, workspace: Workspace, bench: Bench, adapters: Mapping[str, Adapter | None]) -> None:
        """Starts it, if anything is left to measure.

        Args:
            workspace: Where models and uploads lie, and where results are kept.
            bench: What the adapters are measured on.
            adapters: Name → adapter, None for the base model alone.
        """
        self._folder = workspace.cache / "measured" / bench.digest(workspace)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._digests = {name: digest(adapter) for name, adapter in adapters.items()}
        self._known = [m for name in adapters if (m := self._kept(name)) is not None]
        left = {name: adapters[name] for name in adapters.keys() - {m.name for m in self._known}}
        self._apart: Apart | None = None
        if not left:
            return
        self._scratch = tempfile.TemporaryDirectory(dir=workspace.cache, prefix="measuring-")
        places: list[tuple[str, str | None]] = []
        for place, name in enumerate(name for name in adapters if name in left):
            adapter = left[name]
            folder = None if adapter is None else Path(self._scratch.name) / str(place)
            if adapter is not None and folder is not None:
                adapter.save(folder)
            places.append((name, folder and str(folder)))
        asked = {"bench": bench.to_dict(), "adapters": places}
        self._apart = Apart("measuring", "studio.measuring", asked, str(workspace.root))

    def __next__(self) -> Noted | Measured:
        """Raises: LoRAError: It cannot be done, or was ended from elsewhere."""
        if self._known:
            return self._known.pop(0)
        if self._apart is None:
            raise StopIteration
        try:
            said = next(self._apart)
        except (StopIteration, LoRAError):
            self.close()
            raise
        if "note" in said:
            return Noted(said["note"])
        write_whole(self._folder / f"{self._digests[said['name']]}.json", json.dumps(said).encode())
        return Measured(**said)

    def close(self) -> None:
        """Ends its process."""
        if self._apart is not None:
            self._apart.close()
            self._scratch.cleanup()

    def __del__(self) -> None:
        if hasattr(self, "_apart"):
            self.close()

    def _kept(self, name: str) -> Measured | None:
        try:
            return Measured(**(read_json(self._folder / f"{self._digests[name]}.json") | {"name": name}))
        except (OSError, ValueError, TypeError):  # not there, or damaged: it can be measured again
            return None


def measure(workspace: Workspace, bench: Bench, adapters: Mapping[str, Path | None]) -> Iterator[Noted | Measured]:
    """Measures adapters, given by their folders, in this process; see `Measuring`.

    Raises:
        LoRAError: The model or the rows cannot be read, or an adapter does not fit.
    """
    from core import eject, evaluate, resolve_dtype
    from studio import data, models, setup

    device = resolve_devices(bench.train.device)[0]
    yield Noted("Reading the data")
    tokenizer = models.load_tokenizer(bench.model, workspace)
    rows, num_rows = [], 0
    if bench.data is not None:
        spec = RunSpec(model=bench.model, data=bench.data, train=bench.train)
        held_out = setup.rows_of(spec, workspace, World(), lambda _: None, is_begun=True).prepared.evaluation
        stride = max(1, -(-len(held_out) // MOST_ROWS))
        chosen = [held_out[place] for place in range(0, len(held_out), stride)]
        num_rows = len(chosen)
        rows = list(data.eval_batches(chosen, bench.train.batch_size, tokenizer.pad_token_id))
    paragraphs = GENERAL_TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    ids = [array("i", tokenizer(text)["input_ids"][: bench.train.max_length]) for text in paragraphs]
    examples = [data.Example(row, array("i", [data.IGNORED, *row[1:]]), 0) for row in ids]
    general = list(data.eval_batches(examples, bench.train.batch_size, tokenizer.pad_token_id))
    yield Noted("Loading the model")
    dtype = resolve_dtype(bench.train.precision, device)
    model = models.load_model(bench.model, workspace, device=str(device), dtype=dtype)
    for place, (name, folder) in enumerate(adapters.items(), 1):
        yield Noted(f"Measuring {place} of {len(adapters)}: {name}")
        if folder is None:
            eject(model)
        else:
            Adapter.load(folder).apply(model)
        task = evaluate(model, rows).loss if rows else None
        elsewhere = evaluate(model, general)
        yield Measured(name, task, elsewhere.loss, num_rows, elsewhere.num_trained_tokens)


def main(argv: list[str] | None = None) -> int:
    """Measures what stands on standard input, and prints what `measure` yields as lines of JSON."""
    parser = argparse.ArgumentParser(prog="python -m studio.measuring", description=main.__doc__)
    parser.add_argument("workspace", type=Path)
    args = parser.parse_args(argv)

    def work(asked: Any) -> Iterator[dict[str, Any]]:
        folders = {name: folder and Path(folder) for name, folder in asked["adapters"]}
        for found in measure(Workspace(args.workspace), Bench.from_dict(asked["bench"]), folders):
            yield {"note": found.message} if isinstance(found, Noted) else asdict(found)

    return answer(work, "Not enough memory to load the model beside what else is running; end that, or try again.")


if __name__ == "__main__":
    sys.exit(main())
