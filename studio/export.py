"""Taking an adapter home: as a PEFT folder, merged into its base, and both as GGUF for llama.cpp.

Whatever is written is checked before it stands where it was wanted: what merging does to the function first, then the
files, opened again in another process (see `studio.reload`). It is written into a folder beside its place, brought to
the disk, and renamed; one that was broken off leaves nothing but that folder, which the next attempt clears.
"""

import copy
import fcntl
import json
import math
import os
import shutil
import subprocess
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from core import Adapter, LoRAError, Noted, certify, merged_copy, quoted
from studio import certificate, gguf_export, model_card, models, reload
from studio.certificate import Report
from studio.checkpoints import share_adapter
from studio.gguf_families import Naming
from studio.model_files import TOKENIZER_FILES
from studio.runs import Run
from studio.workspace import Workspace, write_whole

KINDS = {
    "adapter": "Adapter, a PEFT folder",
    "merged": "Merged model, a Hugging Face folder",
    "gguf-adapter": "Adapter, GGUF for llama.cpp",
    "gguf": "Merged model, GGUF for llama.cpp",
}
FLOATS = ("float32", "float16", "bfloat16")
DTYPES = {"adapter": (), "merged": FLOATS, "gguf-adapter": tuple(gguf_export.TYPES), "gguf": tuple(gguf_export.TYPES)}
"""By kind, the types that the weights can take, in the words of who will read them."""

SHARD_SIZE = "5GB"
"""A merged model's weights are cut into files of at most so much."""

CERTIFICATE_FILE = "certificate.json"

_AS_TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
# Eight bits and a step for each 32 entries hold a model's function about as well as bfloat16 does.
_RELOAD_BOUNDS = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1, "q8_0": 0.1}
_COPIED = (
    *(*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)


class RefusedError(LoRAError):
    """The certificate is red, and nobody said to write all the same.

    Attributes:
        report: The certificate.
    """

    report: Report

    @classmethod
    def of(cls, report: Report) -> Self:
        """Returns the error that says what is wrong in one sentence each."""
        error = cls(
            f"Nothing was written, as the certificate is red. {' '.join(report.problems)} "
            "To write all the same, say so: --force, or “Write it even if the certificate is red” on the page."
        )
        error.report = report
        return error


@dataclass(frozen=True)
class Choice:
    """What is wanted.

    Attributes:
        kind: One of `KINDS`.
        dtype: One of `DTYPES[kind]`; "" takes the base's own, or for an adapter its own.
        force: Whether it is written though the certificate is red.
    """

    kind: str
    dtype: str = ""
    force: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise LoRAError(f"`--as` (={quoted(self.kind)}) must be one of {', '.join(KINDS)}.")
        if self.dtype and self.dtype not in DTYPES[self.kind]:
            known = ", ".join(DTYPES[self.kind]) or "left out: it keeps its own type"
            raise LoRAError(f"`--dtype` (={quoted(self.dtype)}) must, for {self.kind}, be one of: {known}.")

    @property
    def is_file(self) -> bool:
        """Whether it becomes one file; else a folder."""
        return self.kind.startswith("gguf")

    def settled(self, info: models.ModelInfo) -> Self:
        """Returns the choice with its type named."""
        own = str(certificate.own_dtype(info)).removeprefix("torch.")
        short = {long: short for short, long in _AS_TORCH.items()}
        default = {"adapter": "float32", "merged": own, "gguf-adapter": "f32", "gguf": short[own]}[self.kind]
        return self if self.dtype or not DTYPES[self.kind] else replace(self, dtype=default)


def make(run: Run, workspace: Workspace, choice: Choice, out: Path) -> Generator[Noted | Report, None, None]:
    """Writes an export; yields what is being done, then the certificate. Closed before its end, it leaves nothing.

    Args:
        run: Whose adapter, as it was last saved.
        workspace: Where the base's cache lies.
        choice: As what.
        out: The folder or file to write, which must not exist.

    Raises:
        RefusedError: The certificate is red and `choice.force` is not set.
        LoRAError: The run has no adapter, `out` cannot be written, or the kind cannot hold this adapter.
    """
    out = out.expanduser().absolute()
    if choice.is_file:
        run.spec.must_write(f"{KINDS[choice.kind]}, which has no head for labels")
    if choice.is_file and out.suffix != ".gguf":
        raise LoRAError(f"`OUT` (={str(out)!r}) must end with .gguf.")
    if out.exists():
        raise LoRAError(f"`OUT` (={str(out)!r}) must not exist; name another place, or remove it.")
    check(run, workspace, choice)
    try:
        with _work_folder(out) as work:
            yield from _Making(run, workspace, choice, out, work).steps()
    except OSError as error:
        raise LoRAError(
            f"`OUT` (={str(out)!r}) could not be written ({error.strerror or error}); free some space, or name "
            "another place."
        ) from error


def check(run: Run, workspace: Workspace, choice: Choice) -> None:
    """Says what stands against an export and can be known before its work begins, which takes minutes.

    Raises:
        LoRAError: There is no adapter yet, or llama.cpp has no way to read what is asked for.
    """
    if not run.has_adapter:
        raise LoRAError(f"Run {run.id} has no adapter yet; it is saved at the first evaluation and at the end.")
    if not choice.is_file:
        return
    tree: Any = models.skeleton(run.spec.model, workspace)
    if choice.kind == "gguf-adapter":
        gguf_export.refuse(Adapter.load(run.adapter_folder), Naming.of(tree.config))
        return
    tokenizer = models.load_tokenizer(run.spec.model, workspace)
    gguf_export.check_merged(tree, tokenizer, models.files_of(run.spec.model, workspace)[1])


class _Making:
    """One export that goes on."""

    def __init__(self, run: Run, workspace: Workspace, choice: Choice, out: Path, work: Path) -> None:
        self.run, self.workspace, self.out, self.work = run, workspace, out, work
        self.info = models.describe(run.spec.model, workspace)
        self.choice = choice.settled(self.info)
        self.payload, self.adapter = work / "made" / out.name, work / "adapter"
        self.reference = certificate.reference_dtype(self.info)
        self._reopening: subprocess.Popen[str] | None = None

    def steps(self) -> Iterator[Noted | Report]:
        try:
            yield from self._steps()
        finally:
            if self._reopening is not None and self._reopening.poll() is None:
                self._reopening.kill()
                self._reopening.wait()

    def _steps(self) -> Iterator[Noted | Report]:
        # A run that goes on may save another meanwhile. It lies in a folder of its own, as transformers, with PEFT
        # installed, would apply it to a model beside it without a word.
        self.adapter.mkdir()
        share_adapter(self.run.adapter_folder, self.adapter)
        adapter = Adapter.load(self.adapter)
        yield Noted("Loading the model")
        spec = self.run.spec
        options: dict[str, Any] = {"head": spec.head, "seed": spec.train.seed, "dtype": self.reference}
        model = models.load_model(spec.model, self.workspace, **options)
        adapter.apply(model)
        yield Noted("Reading the rows to try it on")
        rows = certificate.rows_of(self.run, self.workspace, lambda message: None)
        yield Noted("Comparing merged and unmerged")
        merged = merged_copy(model)
        merges = [certificate.certify_merge(model, rows, merged)]
        written = merged
        other = self._other_dtype()
        if other != self.reference:
            yield Noted(f"Comparing them in {str(other).removeprefix('torch.')}")
            if self.choice.kind == "merged":
                written = copy.deepcopy(merged).to(other)
                merges.append(certify(model, rows.ids, merged=written))
            else:
                merges.append(certificate.certify_in(other, model, adapter, rows))
        words = KINDS[self.choice.kind] + (f", {self.choice.dtype}" if self.choice.dtype else "")
        num_prompts = len(rows.ids) - rows.num_evaluation
        report = Report(self.run.id, words, num_prompts, rows.num_evaluation, rows.note, tuple(merges))
        self._stop_if_red(report)
        unmerged = certificate.logits_of(model, rows.ids)
        yield Noted("Writing the files")
        meant = self._write(adapter, written)
        del model, merged, written  # what opens the files again needs room for its own
        for kind in self._ways_back():
            yield Noted("Opening it again by PEFT" if kind == "peft" else "Opening it again, in a process of its own")
            report = replace(report, reloads=(*report.reloads, self._reopened(kind, rows, unmerged, meant)))
        report = replace(report, is_forced=bool(report.problems) and self.choice.force)
        self._stop_if_red(report)
        yield Noted("Bringing it to the disk")
        self._settle(adapter, report)
        yield report

    def _other_dtype(self) -> torch.dtype:
        """Returns the second type in which merged and unmerged are compared: what is written, else the base's own."""
        target = _AS_TORCH.get(self.choice.dtype, self.choice.dtype)
        if self.choice.kind in ("merged", "gguf") and target in FLOATS:
            return getattr(torch, target)
        return certificate.own_dtype(self.info)

    def _stop_if_red(self, report: Report) -> None:
        if report.problems and not self.choice.force:
            raise RefusedError.of(report)

    def _write(self, adapter: Adapter, merged: Any) -> dict[str, str]:
        """Writes the payload; returns digests of the parameters that are to be read back."""
        kind, dtype = self.choice.kind, self.choice.dtype
        self.payload.parent.mkdir()
        folder, base = models.files_of(self.run.spec.model, self.workspace)
        if kind == "adapter":
            adapter.save(self.payload)
            return {}
        if kind == "gguf-adapter":
            gguf_export.write_adapter(self.payload, adapter, merged.config, dtype, self.run.spec.name)
            return {}
        if kind == "gguf":
            touched = {f"{path}.weight" for path in gguf_export.wholes(adapter.factors)} | set(adapter.trained_in_full)
            tokenizer = models.load_tokenizer(self.run.spec.model, self.workspace)
            return gguf_export.write_merged(self.payload, merged, touched.__contains__, tokenizer, base, dtype)
        merged.config.name_or_path = ""
        merged.save_pretrained(self.payload, max_shard_size=SHARD_SIZE)
        for name in _COPIED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, self.payload / name)
        return {name: gguf_export.digest(p) for name, p in merged.named_parameters()}

    def _ways_back(self) -> list[str]:
        kind = self.choice.kind
        return [kind, "peft"] if kind == "adapter" and reload.peft_version() else [kind]

    def _reopened(
        self, kind: str, rows: certificate.Rows, unmerged: list[torch.Tensor], meant: dict[str, str]
    ) -> certificate.Reload:
        dtype = self.choice.dtype
        stored = _AS_TORCH.get(dtype, dtype) or str(self.reference).removeprefix("torch.")
        # GGUF's types are unpacked to float32, and an adapter computes in the type of its base.
        computed = stored if kind == "merged" else "float32" if kind == "gguf" else str(self.reference)[6:]
        base = self.run.spec.model
        if kind == "peft":
            base = str(models.files_of(base, self.workspace)[0])
        task = reload.Task(
            kind=kind,
            path=str(self.payload),
            model=base,
            workspace=str(self.workspace.root),
            adapter=str(self.adapter),
            dtype=computed,
            gguf_type=dtype,
            rows=[row.tolist() for row in rows.ids],
            out=str(self.work / f"logits-{kind}.safetensors"),
            head=asdict(self.run.spec.head),
            seed=self.run.spec.train.seed,
        )
        by = f"PEFT {reload.peft_version()}" if kind == "peft" else "LoRA Studio"
        bound = _RELOAD_BOUNDS.get(stored, _RELOAD_BOUNDS["bfloat16"])
        try:
            opened = reload.reopen(task, self._note_process)
        except LoRAError as error:
            if kind != "peft":
                raise
            nan = math.nan  # a PEFT that is too old for the adapter, say: whoever knows that may write it all the same
            return certificate.Reload(by, stored, nan, nan, bound, nan, nan, 0, problem=str(error))
        wrong = opened.wrong + tuple(
            name for name in sorted(meant.keys() | opened.digests.keys()) if meant.get(name) != opened.digests.get(name)
        )
        found = certificate.compare(
            by, stored, bound, unmerged, opened.logits, num_tensors=len(meant) or opened.num_tensors, wrong=wrong
        )
        Path(task.out).unlink()
        return found

    def _note_process(self, process: "subprocess.Popen[str]") -> None:
        self._reopening = process

    def _settle(self, adapter: Adapter, report: Report) -> None:
        """Puts certificate and model card beside the weights, all of it on the disk, and then where it was wanted."""
        words = json.dumps(report.to_dict(), indent=2, ensure_ascii=False).encode()
        if self.choice.is_file:
            write_whole(self.out.with_name(f"{self.out.stem}.{CERTIFICATE_FILE}"), words)
        else:
            (self.payload / CERTIFICATE_FILE).write_bytes(words)
            text = model_card.model_card(self.run, self.info, adapter, report, merged=self.choice.kind == "merged")
            (self.payload / "README.md").write_text(text, encoding="utf-8")
        for file in [self.payload] if self.choice.is_file else sorted(self.payload.iterdir()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if self.out.exists():  # somebody else was faster
            raise LoRAError(f"`OUT` (={str(self.out)!r}) must not exist; name another place, or remove it.")
        self.payload.rename(self.out)


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside `out` that nobody else writes to, and removes it at the end.

    Raises:
        LoRAError: Another process is writing there.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.part")
    work.mkdir(exist_ok=True)
    lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LoRAError(f"`OUT` (={str(out)!r}) is being written by another process already.") from None
        for left in work.iterdir():  # by one that was killed
            if left.name != "lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)
