"""Adapters from elsewhere: a PEFT folder or a zip of one, a file of loralib's, or a capsule.

One is read and held against the base that is to carry it before it is listed; then it is a run like others, whose
training nothing is known of.
"""

import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from core import Adapter, Finished, LoRAError, Noted, quoted
from studio import capsule, models
from studio.checkpoints import ADAPTER_FILES
from studio.data import DataSpec
from studio.event_log import EventWriter
from studio.runs import Run, Runs
from studio.specs import RunSpec
from studio.workspace import write_whole


def is_capsule(path: Path) -> bool:
    """Says whether a file is a zip that calls itself a capsule."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as packed:
        return capsule.MANIFEST in packed.namelist()


def take(
    runs: Runs,
    path: Path,
    model: str,
    *,
    name: str = "",
    scaling: float | None = None,
    parts: Sequence[str] | None = None,
) -> Run:
    """Makes a run of an adapter from elsewhere; returns it.

    Args:
        runs: Where it is listed then.
        path: A PEFT folder, a zip of one, or a file of loralib's.
        model: The base that is to carry it.
        name: What people call it; by default after the file.
        scaling: alpha / r of a loralib file, which does not say it.
        parts: The slices of fused projections that a loralib file has, which it does not name either.

    Raises:
        LoRAError: It cannot be read, or does not fit the base; all misfits in one message. Nothing is listed then.
    """
    path = path.expanduser()
    with _folder_of(path) as source:
        adapter = Adapter.load(source, scaling=scaling, parts=parts)
    adapter.check_fit(models.skeleton(model, runs.workspace))
    spec = RunSpec(name.strip() or path.stem or "Imported", model, DataSpec(), adapter.config)
    run = runs.create(spec)
    try:
        replace(adapter, base_model=model).save(run.adapter_folder)
        named = f"; it says that it was made for {quoted(adapter.base_model)}" if adapter.base_model else ""
        write_whole(run.folder / "imported", path.name.encode())
        writer = EventWriter(run.log)
        writer.write(Noted(f"Imported from {path.name}{named}. It was not trained here."))
        writer.write(Finished(0, "done", 0))
        writer.close()
    except BaseException:
        with suppress(LoRAError, OSError):
            runs.delete(run)
        raise
    return run


@contextmanager
def _folder_of(path: Path) -> Iterator[Path]:
    """Yields what `Adapter.load` reads: the path itself, or a folder with the two files of a zip.

    Raises:
        LoRAError: There is nothing of that name, or the zip holds no PEFT adapter.
    """
    if not path.exists():
        raise LoRAError(f"`PATH` (={str(path)!r}) must be a folder or file that exists.")
    if path.suffix != ".zip":
        yield path
        return
    scratch = Path(tempfile.mkdtemp(prefix="lora-studio-import-"))
    try:
        with zipfile.ZipFile(path) as packed:
            for name in ADAPTER_FILES:
                found = [info for info in packed.infolist() if info.filename.rpartition("/")[2] == name]
                if len(found) != 1:
                    raise LoRAError(f"`PATH` (={path.name!r}) must be a zip with one {name}; it has {len(found)}.")
                if found[0].file_size > capsule.MAX_BYTES:
                    raise LoRAError(f"`PATH` (={path.name!r}) must unpack to at most {capsule.MAX_BYTES:,} bytes.")
                # Under its own name, whatever path the zip gives it: what lies elsewhere in the zip is left there.
                with packed.open(found[0]) as source, (scratch / name).open("wb") as target:
                    shutil.copyfileobj(source, target)  # no more than the size that it says: zipfile ends there
        yield scratch
    except capsule.UNREADABLE as error:
        raise LoRAError(f"`PATH` (={path.name!r}) must be a whole zip file ({error}); fetch it again.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
