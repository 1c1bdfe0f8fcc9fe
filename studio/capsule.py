"""A capsule: one zip with all that a run is, but for its rows and its checkpoints; and runs made from one again.

A capsule comes from anywhere, so nothing in it is believed: names, sizes and digests are checked before a byte is
written, what is JSON is read as what it should be, weights are safetensors. One that fails anywhere is refused whole.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from core import LoRAError, load_trained, quoted
from studio.certificate import Report
from studio.event_log import EventLog
from studio.export import CERTIFICATE_FILE
from studio.runs import Run, Runs
from studio.specs import RunSpec
from studio.workspace import write_whole

FORM = 1
"""Of capsules; raise it when an older studio could not read a newer one."""

MANIFEST = "capsule.json"
MAX_FILES, MAX_BYTES, MAX_JSON_BYTES = 10_000, 4_000_000_000, 200_000_000
_PARTS = re.compile(
    r"spec\.json|data\.json|events\.jsonl|certificate\.json|imported|votes\.jsonl"
    r"|adapter/adapter_(config\.json|model\.safetensors)"
    r"|(transcripts|spectra)/[\w-][\w.-]{0,120}\.(json|jsonl|md)"
)
_NEEDED = ("spec.json", "events.jsonl")
_LIBRARIES = ("torch", "transformers", "numpy", "safetensors", "lora-studio")

UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
"""What reading a damaged zip raises; RuntimeError where a part is encrypted or packed in a way that is not known."""


def write(run: Run, file: Path) -> Path:
    """Writes a run's capsule, whole or not at all; returns its path.

    Raises:
        LoRAError: The run is going on, or the file cannot be written.
    """
    if run.is_running():
        raise LoRAError(f"Run {run.id} must have ended to be put into a capsule; it is running.")
    file = file.expanduser().absolute()
    files = [path for path in sorted(run.folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    named = {path.relative_to(run.folder).as_posix(): path for path in files}
    parts = {name: path for name, path in named.items() if _PARTS.fullmatch(name)}
    manifest = {
        "form": FORM,
        "run": run.id,
        "seed": run.spec.train.seed,
        "data": run.data_hashes,
        "versions": _versions(),
        "files": {name: _digest_of(path) for name, path in parts.items()},
    }
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}-", delete=False) as raw:
            try:
                with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as packed:
                    packed.writestr(MANIFEST, json.dumps(manifest, indent=2))
                    for name, path in parts.items():
                        how = zipfile.ZIP_STORED if path.suffix == ".safetensors" else zipfile.ZIP_DEFLATED
                        packed.write(path, name, how)  # weights hardly compress
                raw.flush()
                os.fsync(raw.fileno())
                Path(raw.name).replace(file)
            except BaseException:
                Path(raw.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise LoRAError(
            f"`FILE` (={str(file)!r}) could not be written ({error.strerror}); free some space, or name another."
        ) from error
    return file


def read(file: Path) -> dict[str, Any]:
    """Returns a capsule's manifest, after a look at every name and size in it.

    Raises:
        LoRAError: It is no capsule, or something in it is not as a capsule's.
    """
    try:
        with zipfile.ZipFile(file) as packed:
            return _checked(packed, file)
    except (OSError, *UNREADABLE) as error:
        raise _refusal(file, str(error) or type(error).__name__) from error


def restore(runs: Runs, file: Path, check: Callable[[RunSpec], None] = lambda spec: None) -> Run:
    """Makes a run of a capsule, under its own id where that is free; returns it.

    Args:
        runs: Where it is listed then.
        file: The capsule.
        check: Raises where a run of this spec may not be here.

    Raises:
        LoRAError: It is no capsule, is damaged or is not to be trusted; nothing is restored then.
    """
    target = runs.workspace.runs
    scratch = Path(tempfile.mkdtemp(prefix=".restoring-", dir=target))
    try:
        with zipfile.ZipFile(file) as packed:
            manifest = _checked(packed, file)
            for name in manifest["files"]:
                _unpack(packed, name, scratch / name, manifest["files"][name], file)
        _verify(scratch, file)
        check(RunSpec.read(scratch / "spec.json"))
        run_id = manifest["run"]
        while (target / run_id).exists():
            run_id = f"{manifest['run'][:110]}-{secrets.token_hex(2)}"
        for path in (*scratch.rglob("*"), scratch):
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        scratch.chmod(0o755)
        scratch.rename(target / run_id)
        return runs.get(run_id)
    except (OSError, *UNREADABLE) as error:
        raise _refusal(file, str(error) or type(error).__name__) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _checked(packed: zipfile.ZipFile, file: Path) -> dict[str, Any]:
    """Returns the manifest of a zip whose parts all have a capsule's names and sizes, and are plain files."""
    infos = packed.infolist()
    names = [info.filename for info in infos]
    problems = []
    if len(infos) > MAX_FILES:
        raise _refusal(file, f"it has {len(infos):,} parts, more than {MAX_FILES:,}")
    if MANIFEST not in names:
        raise _refusal(file, f"it has no {MANIFEST}")
    for info in infos:
        mode = info.external_attr >> 16
        is_weights = info.filename.endswith(".safetensors")
        if info.filename != MANIFEST and not _PARTS.fullmatch(info.filename):
            problems.append(f"{quoted(info.filename)} is no part of one")
        elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):  # not every writer says what it is
            problems.append(f"{info.filename} is no plain file")
        elif info.flag_bits & 1:
            problems.append(f"{info.filename} is encrypted")
        elif not is_weights and info.file_size > MAX_JSON_BYTES:
            problems.append(f"{info.filename} has {info.file_size:,} bytes, more than {MAX_JSON_BYTES:,}")
    if len(set(names)) < len(names):
        problems.append("a part is there twice")
    if sum(info.file_size for info in infos) > MAX_BYTES:
        problems.append(f"it unpacks to more than {MAX_BYTES:,} bytes")
    if problems:
        raise _refusal(file, "; ".join(problems[:5]))
    try:
        manifest = json.loads(packed.read(MANIFEST))
        files = manifest["files"]
        is_sound = (
            manifest["form"] == FORM
            and re.fullmatch(r"[\w-]{1,120}", manifest["run"]) is not None
            and files.keys() == set(names) - {MANIFEST}
            and all(isinstance(digest, str) for digest in files.values())
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _refusal(file, f"its {MANIFEST} is damaged") from error
    if not is_sound:
        raise _refusal(file, f"its {MANIFEST} is of another form, or does not name its parts")
    if missing := [name for name in _NEEDED if name not in files]:
        raise _refusal(file, f"it has no {', '.join(missing)}")
    return manifest


def _unpack(packed: zipfile.ZipFile, name: str, path: Path, digest: str, file: Path) -> None:
    """Writes one part, no more bytes than its head says, and compares its digest."""
    path.parent.mkdir(exist_ok=True)
    size, found = packed.getinfo(name).file_size, hashlib.sha256()
    with packed.open(name) as source, path.open("wb") as target:
        while chunk := source.read(2**20):
            size -= len(chunk)
            if size < 0:
                raise _refusal(file, f"{name} is longer than it says")
            found.update(chunk)
            target.write(chunk)
    if found.hexdigest() != digest:
        raise _refusal(file, f"{name} is not what {MANIFEST} says it is")


def _verify(folder: Path, file: Path) -> None:
    """Reads every part as what it should be.

    Raises:
        LoRAError: One is something else.
    """
    try:
        RunSpec.read(folder / "spec.json")
        EventLog(folder / "events.jsonl").read()
        if (folder / "adapter").is_dir():
            load_trained(folder / "adapter")
        if (folder / CERTIFICATE_FILE).is_file():
            Report.from_dict(orjson.loads((folder / CERTIFICATE_FILE).read_bytes()))
        for path in folder.rglob("*.json"):
            if not isinstance(json.loads(path.read_bytes()), dict | list):
                raise LoRAError(f"{path.name} is no table")
        hashes = folder / "data.json"
        if hashes.is_file() and not all(isinstance(v, str) for v in json.loads(hashes.read_bytes()).values()):
            raise LoRAError("data.json is no table of digests")
    except (LoRAError, ValueError, AttributeError, RecursionError) as error:
        words = str(error).replace(f"{folder}/", "")
        raise _refusal(file, words.rstrip(".")) from error


def keep_certificate(run: Run, report: Report) -> None:
    """Keeps a certificate with its run, where capsules and pages find it."""
    write_whole(run.folder / CERTIFICATE_FILE, json.dumps(report.to_dict(), indent=2, ensure_ascii=False).encode())


def certificate_of(run: Run) -> Report | None:
    """Returns the last certificate that was made of a run's adapter; None where there is none that can be read."""
    try:
        return Report.from_dict(orjson.loads((run.folder / CERTIFICATE_FILE).read_bytes()))
    except (OSError, ValueError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refusal(file: Path, why: str) -> LoRAError:
    return LoRAError(
        f"`FILE` (={file.name!r}) must be a capsule as `lora-studio capsule` writes it; it is refused: {why}. "
        "Nothing was restored."
    )
