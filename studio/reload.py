"""What was exported, opened again in a process of its own, which knows no more of it than what stands on the disk.

python -m studio.reload < task.json

PEFT opens a copy, too, where it is installed: in a process that runs `PEFT_PROGRAM` and nothing of this project. The
product itself never imports PEFT: what it writes must not depend on the library that checks it, nor on whether it is
there.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core import Adapter, LoRAError, lora_layers
from studio import gguf_export, gguf_families, models
from studio.certificate import logits_of
from studio.heads import CAUSAL, Head
from studio.workspace import Workspace

FACTOR_ERRORS = {"f32": 1e-5, "f16": 2e-3, "bf16": 2e-2, "q8_0": 2e-2}
"""By a GGUF file's type, how far ΔW may lie from what it was, relative to its norm."""

PEFT_PROGRAM = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
task = json.load(sys.stdin)
options = {"dtype": getattr(torch, task["dtype"]), "local_files_only": True, "use_safetensors": True}
if task["head"]["task"] == "causal":
    base = AutoModelForCausalLM.from_pretrained(task["model"], **options)
else:
    options |= {"num_labels": len(task["head"]["labels"]) or 1, "ignore_mismatched_sizes": True}
    base = AutoModelForSequenceClassification.from_pretrained(task["model"], **options)
model = PeftModel.from_pretrained(base, task["path"]).eval()
with torch.inference_mode():
    found = {str(i): model(input_ids=torch.tensor([ids])).logits[0].float() for i, ids in enumerate(task["rows"])}
found = {i: logits.reshape(-1, logits.shape[-1]) for i, logits in found.items()}
save_file(found, task["out"])
"""


@dataclass(frozen=True)
class Task:
    """What is to be opened, and what is asked of it.

    Attributes:
        kind: "adapter", "merged", "gguf-adapter" or "gguf"; "peft" is an adapter that PEFT opens.
        path: What was exported.
        model: The base, as the run names it; for PEFT the folder with its files.
        workspace: Where the base's cache lies.
        adapter: The run's own adapter, to compare with.
        dtype: Type of the weights, as torch names it.
        gguf_type: Of a GGUF file, as it is named there.
        rows: Token ids of each row.
        out: Where the logits go, as safetensors.
        head: The fields of the model's `Head`.
        seed: By which a head that the base was not saved with is drawn.
    """

    kind: str
    path: str
    model: str
    workspace: str
    adapter: str
    dtype: str
    gguf_type: str
    rows: list[list[int]]
    out: str
    head: dict[str, Any] = field(default_factory=lambda: asdict(CAUSAL))
    seed: int = 0


@dataclass(frozen=True)
class Opened:
    """What was found.

    Attributes:
        logits: (seq, vocabulary) of each row.
        digests: Name → digest of each parameter of a merged model.
        num_tensors: How many tensors of an adapter were compared.
        wrong: Those of them that are not the run's.
    """

    logits: list[Tensor]
    digests: dict[str, str]
    num_tensors: int
    wrong: tuple[str, ...]


def reopen(task: Task, started: Callable[[subprocess.Popen[str]], None]) -> Opened:
    """Opens an export in a process of its own, and returns what that found.

    Args:
        task: What to open.
        started: Told of the process, which can be killed while this waits.

    Raises:
        LoRAError: The export cannot be opened, or the process was killed.
    """
    command = ["-c", PEFT_PROGRAM] if task.kind == "peft" else ["-m", "studio.reload"]
    with tempfile.TemporaryFile("w+") as log:  # whatever libraries print, nobody waits for it to be read
        process = subprocess.Popen(
            [sys.executable, "-P", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **({"HF_HUB_OFFLINE": "1"} if task.kind == "peft" else {})},
        )
        started(process)
        said, _ = process.communicate(json.dumps(asdict(task)))
        log.seek(0)
        tail = log.read()[-2000:].strip().splitlines()
    found = json.loads(said.splitlines()[-1]) if said.strip() and task.kind != "peft" else {}
    if "problem" in found or process.returncode != 0:
        why = found.get("problem") or (tail[-1] if tail else f"code {process.returncode}")
        raise LoRAError(f"What was exported could not be opened again: {why}")
    logits = load_file(task.out)
    digests, wrong = found.get("digests", {}), tuple(found.get("wrong", ()))
    return Opened([logits[str(i)] for i in range(len(logits))], digests, found.get("num_tensors", 0), wrong)


def peft_version() -> str | None:
    """Returns the version of PEFT where it is installed; it is looked up, not imported."""
    return importlib.metadata.version("peft") if importlib.util.find_spec("peft") else None


def main() -> int:
    """Does the task that stands on standard input, and prints what was found as one line of JSON."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no line of ours
    task = Task(**json.load(sys.stdin))
    try:
        found = _open(task)
    except LoRAError as error:
        found = {"problem": str(error)}
    print(json.dumps(found), file=out, flush=True)
    return 0


def _open(task: Task) -> dict[str, object]:
    rows = [torch.tensor(ids) for ids in task.rows]
    dtype, head = getattr(torch, task.dtype), Head(task.head["task"], tuple(task.head["labels"]))
    if task.kind == "gguf":
        tree: Any = models.skeleton(task.model, Workspace(task.workspace))
        if not gguf_families.Naming.of(tree.config).is_read_by_transformers:
            return _open_by_names(task, rows)
    if task.kind in ("merged", "gguf"):
        with tempfile.TemporaryDirectory(dir=Path(task.out).parent) as scratch:  # a GGUF file is converted, once
            model = models.load_model(task.path, Workspace(scratch), dtype=dtype, head=head)
            digests = {name: gguf_export.digest(p) for name, p in model.named_parameters()}
            _save(task, logits_of(model, rows))
        return {"digests": digests}
    model = models.load_model(task.model, Workspace(task.workspace), dtype=dtype, head=head, seed=task.seed)
    wanted = Adapter.load(task.adapter)
    if task.kind == "adapter":
        found = Adapter.load(task.path)
        found.apply(model)
        wrong = [
            path
            for path, f in wanted.factors.items()
            if path not in found.factors
            or not torch.equal(found.factors[path].A, f.A)
            or not torch.equal(found.factors[path].B, f.B)
            or found.factors[path].scaling != f.scaling
        ]
        wrong += [path for path in found.factors if path not in wanted.factors]
        _save(task, logits_of(model, rows))
        return {"wrong": wrong, "num_tensors": 2 * len(lora_layers(model))}
    expected = gguf_export.wholes(wanted.factors)
    held = gguf_export.read_adapter(Path(task.path), model.config, wanted.factors)
    wrong = []
    with torch.no_grad():
        for path, f in held.items():
            delta = f.scaling * f.B @ f.A
            true = expected[path].scaling * expected[path].B.float() @ expected[path].A.float()
            if not (delta - true).norm() <= FACTOR_ERRORS[task.gguf_type] * true.norm():
                wrong.append(path)
            weight = model.get_submodule(path).weight  # (out, in), but for embeddings and GPT-2's Conv1D
            weight += (delta.T if f.layout.form == "embedding" or f.layout.transposed else delta).to(weight)
    _save(task, logits_of(model, rows))
    return {"wrong": wrong, "num_tensors": 2 * len(held)}


def _open_by_names(task: Task, rows: list[Tensor]) -> dict[str, object]:
    """Reads a GGUF file that transformers does not read, or not all of, into the place of its base's weights."""
    model = models.load_model(task.model, Workspace(task.workspace), dtype=getattr(torch, task.dtype))
    gguf_export.read_merged(Path(task.path), model)
    _save(task, logits_of(model, rows))
    return {"digests": {name: gguf_export.digest(p) for name, p in model.named_parameters()}}


def _save(task: Task, logits: Sequence[Tensor]) -> None:
    save_file({str(i): row.contiguous() for i, row in enumerate(logits)}, task.out)


if __name__ == "__main__":
    sys.exit(main())
