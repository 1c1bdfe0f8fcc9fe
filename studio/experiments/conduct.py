"""An experiment that goes on behind the page: its pieces one after another, each kept as soon as it is done.

Beside what all background work has, its folder holds `pieces/KEY.json`, what each piece found, and once all are done
`result.md` with its figure as `figure.svg` and `figure.png`. Interrupted, it goes on with the first piece that is not
there; a run that was broken off is resumed.
"""

import json
import re
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from core import Failed, LoRAError, quoted, read_json
from studio import background, jobs
from studio.experiments.base import Asked, Experiment, Found, Piece, Record, Result
from studio.experiments.runs import run_of
from studio.runs import Run, Runs
from studio.workspace import Workspace, write_whole

POLL_SECONDS = 0.5
_GOING = ("running", "queued")
_RESULT, _FIGURES = "result.md", ("figure.svg", "figure.png")


class Conduct(background.Background):
    """The folder of one experiment as it was asked for."""

    noun = "experiment"

    def __init__(self, workspace: Workspace, asked: Asked) -> None:
        super().__init__(workspace.root / "experiments" / asked.key)
        self.workspace, self.wanted = workspace, asked

    @classmethod
    def of(cls, folder: Path) -> "Conduct":
        """Returns that of a folder in which one was started."""
        return cls(Workspace(folder.parent.parent), Asked(**read_json(folder / "job.json")))

    @property
    def experiment(self) -> Experiment:
        """Which experiment it is."""
        return named(self.wanted.name)

    def pieces(self) -> list[Piece]:
        """Returns all its pieces.

        Raises:
            LoRAError: The model or the data cannot be read.
        """
        return self.experiment.pieces(self.wanted, self.workspace)

    def record(self, piece: Piece) -> Record | None:
        """Returns what a piece found; None while it is not done, was done with other settings, or cannot be read."""
        try:
            kept = read_json(self._file(piece))
        except (OSError, ValueError, RecursionError):
            return None
        found = kept.get("found") if isinstance(kept, dict) and kept.get("digest") == piece.digest else None
        if not isinstance(found, dict) or ("run" in found and not (self.workspace.runs / str(found["run"])).is_dir()):
            return None
        return found

    def records(self, pieces: list[Piece]) -> Mapping[str, Record]:
        """Returns key → what was found, of the pieces that are done."""
        found = ((piece.key, self.record(piece)) for piece in pieces)
        return {key: record for key, record in found if record is not None}

    def result(self) -> tuple[Result, int, int]:
        """Returns what was found so far, how many pieces are done, and how many there are."""
        pieces = self.pieces()
        records = self.records(pieces)
        return self.experiment.tell(self.wanted, records), len(records), len(pieces)

    def cancel(self, patience_seconds: float = 10.0) -> None:
        """Ends it, and has the run that it trains save itself and pause, too; started again, it goes on from there.

        Raises:
            LoRAError: It could not be ended in time, or the model or the data cannot be read any more.
        """
        super().cancel(patience_seconds)
        runs = Runs(self.workspace)
        for piece in self.pieces():
            run = run_of(runs, piece.spec) if piece.spec else None
            if run is not None and run.status == "queued":
                jobs.cancel(runs, run)
            elif run is not None and run.status == "running":
                run.ask_to_stop("paused")

    def clear(self) -> None:
        """Takes away what was told of an earlier time; what the pieces found is kept."""
        for name in (_RESULT, *_FIGURES):
            (self.folder / name).unlink(missing_ok=True)

    def go(self) -> Iterator[background.Line]:
        """Does what is not done yet, and says what it does.

        Raises:
            LoRAError: A run failed, or a piece could not be measured.
        """
        pieces = self.pieces()
        runs = Runs(self.workspace)
        (self.folder / "pieces").mkdir(parents=True, exist_ok=True)
        for place, piece in enumerate(pieces):
            if self.record(piece) is not None:
                continue
            yield {"note": piece.key, "done": place, "of": len(pieces)}
            run = (yield from _trained(piece, runs)) if piece.spec else None
            found = piece.measure(Found(self.workspace, run))
            write_whole(self._file(piece), json.dumps({"digest": piece.digest, "found": found}).encode())
        self._tell()

    def _tell(self) -> None:
        from studio.svg import save_figure  # which brings matplotlib

        result, *_ = self.result()
        if result.figure is not None:
            figure = result.figure()
            for name in _FIGURES:
                save_figure(figure, self.folder / name)
        write_whole(self.folder / _RESULT, self.markdown().encode())

    def markdown(self) -> str:
        """Returns what was found as Markdown, with what differs from the paper."""
        result, done, of = self.result()
        e = self.experiment
        unfinished = [f"{done} of {of} pieces are done."] if done < of else []
        findings = "\n".join(f"- {line}" for line in [*result.findings, *unfinished])
        figure = f"![{e.title}]({_FIGURES[0]})" if (self.folder / _FIGURES[0]).is_file() else ""
        parts = [f"## {e.title} ({e.paper})", e.question, *(t.markdown() for t in result.tables), findings, figure]
        return "\n\n".join([*filter(None, parts), f"What differs from the paper: {e.differs}"]) + "\n"

    def _file(self, piece: Piece) -> Path:
        return self.folder / "pieces" / (re.sub(r"[^\w.,=-]+", "_", piece.key) + ".json")


def _trained(piece: Piece, runs: Runs) -> Generator[background.Line, None, Run]:
    """Trains the run of a piece, or takes up or takes the one that is there; returns it."""
    assert piece.spec is not None
    run = run_of(runs, piece.spec) or jobs.start(runs, piece.spec)
    while run.status == "running" and run.stop_asked:  # this experiment was cancelled a moment ago
        time.sleep(POLL_SECONDS)
    if run.status not in (*_GOING, "finished"):
        jobs.resume(runs, run)
    while run.status in _GOING:
        time.sleep(POLL_SECONDS)
    run.note_killed()
    if run.status != "finished":
        end = run.log.end
        why = end.message if isinstance(end, Failed) else f"it is {run.status}"
        raise LoRAError(
            f"The run “{run.spec.name}” ({run.id}) did not finish: {why} Start the experiment again to go on."
        )
    yield {"note": f"{piece.key}: measuring", "run": run.id}
    return run


def named(name: str) -> Experiment:
    """Returns an experiment by its name.

    Raises:
        LoRAError: There is none.
    """
    from studio.experiments.registry import EXPERIMENTS

    if name not in EXPERIMENTS:
        raise LoRAError(f"`experiment` (={quoted(name)}) must be one of {', '.join(EXPERIMENTS)}.")
    return EXPERIMENTS[name]


def start(workspace: Workspace, asked: Asked) -> Conduct:
    """Starts an experiment, or goes on with it, in a process of its own; returns at once.

    Raises:
        LoRAError: It is going on already, or cannot be done.
    """
    conduct = Conduct(workspace, asked)
    conduct.pieces()  # what cannot be done is said here
    conduct.start("studio.experiments", asdict(asked))
    return conduct
