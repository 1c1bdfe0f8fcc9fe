"""Exports that go on behind the page: each is background work whose folder lies in its run's `exports`.

Beside what all background work has, `result/` is the folder or file that was made, once it is whole.
"""

import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from core import LoRAError, Noted
from studio import background, capsule
from studio.certificate import Report
from studio.checkpoints import share_file
from studio.export import CERTIFICATE_FILE, Choice, RefusedError, make
from studio.runs import Run, no_update
from studio.workspace import Workspace


class Job(background.Background):
    """One export's folder; its status may be refused, too: the certificate is red."""

    noun = "export"

    def __init__(self, run: Run, folder: Path) -> None:
        super().__init__(folder)
        self.run = run

    @property
    def choice(self) -> Choice:
        """What was asked for."""
        return Choice(**self.asked)

    @property
    def result(self) -> Path | None:
        """The folder or file that was made, or None."""
        found = [path for path in (self.folder / "result").glob("[!.]*") if not path.name.endswith(CERTIFICATE_FILE)]
        return found[0] if found and not self.is_running() else None

    @property
    def report(self) -> Report | None:
        """The certificate, as far as it was made."""
        found = [line["report"] for line in self.lines() if "report" in line]
        return Report.from_dict(found[-1]) if found else None

    def clear(self) -> None:
        """Takes away what was made, or half made."""
        shutil.rmtree(self.folder / "result", ignore_errors=True)


def jobs_of(run: Run) -> list[Job]:
    """Returns a run's exports, the newest first."""
    found = [file.parent for file in (run.folder / "exports").glob("*/job.json")]
    return [Job(run, folder) for folder in sorted(found, key=lambda f: (f / "job.json").stat().st_mtime, reverse=True)]


def start(run: Run, choice: Choice) -> Job:
    """Starts an export in a process of its own, in the place of an earlier one of the same kind; returns at once.

    Raises:
        LoRAError: One of the same kind is going on, the run has no adapter, or its folder cannot be written.
    """
    if not run.has_adapter:
        raise LoRAError(f"Run {run.id} has no adapter yet; it is saved at the first evaluation and at the end.")
    if not run.has_lora:
        raise LoRAError(no_update(run))
    job = Job(run, run.folder / "exports" / "-".join(filter(None, (choice.kind, choice.dtype))))
    job.start("studio.export_jobs", asdict(choice))
    return job


def pack(job: Job, downloads: Path) -> Path:
    """Returns what a browser can fetch of an export: its file, or its folder as a zip, made where it is not there.

    Raises:
        LoRAError: It is not done.
    """
    made = job.result
    if made is None or job.status != "done":
        raise LoRAError("This export is not done; there is nothing to download yet.")
    target = downloads / f"{job.run.id}-export-{job.folder.name}{made.suffix if made.is_file() else '.zip'}"
    if target.exists() and target.stat().st_mtime >= (job.folder / "progress.jsonl").stat().st_mtime:
        return target
    target.unlink(missing_ok=True)
    if made.is_file():
        share_file(made, target)
        os.utime(target)
        return target
    part = target.with_name(f".{target.name}")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as packed:  # weights hardly compress
        for file in sorted(made.iterdir()):
            packed.write(file, file.name)
    part.replace(target)
    return target


def _make(job: Job) -> Iterator[background.Line]:
    run, choice = job.run, job.choice
    short = re.sub(r"^\d{8}-\d{6}-", "", run.id)
    name = f"{short}.gguf" if choice.is_file else f"{short}-{choice.kind}"
    try:
        for said in make(run, Workspace(run.workspace_root), choice, job.folder / "result" / name):
            if isinstance(said, Noted):
                yield {"note": said.message}
            else:
                yield {"report": said.to_dict()}
                capsule.keep_certificate(run, said)
    except RefusedError as error:
        raise background.EndedError(str(error), "refused", {"report": error.report.to_dict()}) from error


def main(argv: list[str] | None = None) -> int:
    """Makes one export in this process."""
    return background.work(lambda folder: Job(Run(folder.parent.parent), folder), _make, argv)


if __name__ == "__main__":
    sys.exit(main())
