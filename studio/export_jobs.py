"""Exports that go on behind the page: each in a process of its own, which outlives the page and the studio.

An export is a folder in its run's `exports`, named after what is made:
job.json         what was asked for
progress.jsonl   what is being done, a line each, and how it ended
lock             held by its process as long as it lives; holds the number of its process group
result/          the folder or file itself, once it is whole
"""

import argparse
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core import LoRAError, Noted, is_of_memory, read_json
from studio import capsule
from studio.certificate import Report
from studio.checkpoints import share_file
from studio.export import CERTIFICATE_FILE, Choice, RefusedError, make
from studio.jobs import ENVIRONMENT
from studio.runs import Run, is_held, no_update
from studio.workspace import Workspace, write_whole

_children: list[subprocess.Popen[bytes]] = []


class Job:
    """One export's folder."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder

    @property
    def choice(self) -> Choice:
        """What was asked for."""
        return Choice(**read_json(self.folder / "job.json"))

    @property
    def result(self) -> Path | None:
        """The folder or file that was made, or None."""
        found = [path for path in (self.folder / "result").glob("[!.]*") if not path.name.endswith(CERTIFICATE_FILE)]
        return found[0] if found and not self.is_running() else None

    def is_running(self) -> bool:
        """Says whether its process lives."""
        return is_held(self.folder / "lock")

    def lines(self) -> list[dict[str, Any]]:
        """Returns what its process said so far."""
        try:
            text = (self.folder / "progress.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    @property
    def status(self) -> str:
        """One of running, done, refused (the certificate is red), failed, cancelled, interrupted."""
        running = self.is_running()  # asked first: an end that is written meanwhile is then seen below
        last = (self.lines() or [{}])[-1]
        return "running" if running else last.get("end", "interrupted")

    @property
    def report(self) -> Report | None:
        """The certificate, as far as it was made."""
        found = [line["report"] for line in self.lines() if "report" in line]
        return Report.from_dict(found[-1]) if found else None

    def cancel(self, patience_seconds: float = 10.0) -> None:
        """Ends it at once; it leaves nothing that counts as whole.

        Raises:
            LoRAError: Its processes could not be ended in time.
        """
        end, was_running = time.monotonic() + patience_seconds, False
        while self.is_running():
            was_running = True
            with suppress(OSError, ValueError):  # it has just gone, or has not said its number yet
                os.killpg(int((self.folder / "lock").read_text()), signal.SIGKILL)
            if time.monotonic() > end:
                raise LoRAError(f"The export in {self.folder} could not be ended; end its processes by hand.")
            time.sleep(0.02)
        if was_running:
            shutil.rmtree(self.folder / "result", ignore_errors=True)  # what it had half written
            _say(self.folder, {"end": "cancelled"})


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
    folder = run.folder / "exports" / "-".join(filter(None, (choice.kind, choice.dtype)))
    _children[:] = [child for child in _children if child.poll() is None]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LoRAError("This export is going on already; watch it, or cancel it first.") from None
            shutil.rmtree(folder / "result", ignore_errors=True)
            (folder / "progress.jsonl").unlink(missing_ok=True)
            write_whole(folder / "job.json", json.dumps(asdict(choice)).encode())
            with (folder / "worker.log").open("wb") as log:
                child = subprocess.Popen(
                    [sys.executable, "-P", "-m", "studio.export_jobs", str(folder), "--lock-fd", str(lock)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(lock,),
                    env={**ENVIRONMENT, **os.environ},
                )
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(child.pid).encode(), 0)
            _children.append(child)
        finally:
            os.close(lock)  # its process holds it from now on
    except OSError as error:
        raise LoRAError(f"{folder} could not be written ({error.strerror}); free some space.") from error
    return Job(run, folder)


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


def _say(folder: Path, line: dict[str, Any]) -> None:
    with (folder / "progress.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Makes one export and writes how it goes; the lock stays with this process until it ends."""
    parser = argparse.ArgumentParser(prog="python -m studio.export_jobs", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lock-fd", type=int, help="the lock, which whoever started this process holds")
    args = parser.parse_args(argv)
    run = Run(args.folder.parent.parent)
    job = Job(run, args.folder)
    try:
        choice = job.choice
        short = re.sub(r"^\d{8}-\d{6}-", "", run.id)
        name = f"{short}.gguf" if choice.is_file else f"{short}-{choice.kind}"
        for said in make(run, Workspace(run.workspace_root), choice, args.folder / "result" / name):
            if isinstance(said, Noted):
                _say(args.folder, {"note": said.message})
            else:
                _say(args.folder, {"report": said.to_dict()})
                capsule.keep_certificate(run, said)
    except RefusedError as error:
        _say(args.folder, {"end": "refused", "problem": str(error), "report": error.report.to_dict()})
    except LoRAError as error:
        _say(args.folder, {"end": "failed", "problem": str(error)})
    except Exception as error:
        words = "not enough memory" if is_of_memory(error) else f"an error that was not foreseen; see {args.folder}"
        _say(args.folder, {"end": "failed", "problem": f"The export ended by {words}."})
        raise
    else:
        _say(args.folder, {"end": "done"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
