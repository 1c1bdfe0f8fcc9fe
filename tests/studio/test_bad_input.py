"""Files that broke, and files made to break: each ends in one sentence, in time and in bounds, and none is lost."""

import gzip
import hashlib
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import core
from core import Adapter, Failed, LoRAConfig, LoRAError, Noted, Started, Step, inject
from studio import __main__ as cli
from studio import app, data, models, readers
from studio.data import DataSpec
from studio.event_log import EventWriter
from studio.runs import Run
from studio.specs import RunSpec
from studio.state import Studio
from studio.tabs import runs as runs_tab
from studio.tabs import train as train_tab
from studio.workspace import Workspace
from tests.studio.ggufs import write_gguf
from tests.studio.page.pages import question

SECONDS = 30
SPARE_BYTES = 2 * 2**30
HUGE = 10**15
LONG = 50_000_000
DEEP = 100_000
STARTED = Started(9, 1, 10, "cpu", "float32", "memory")
STEP = Step(1, 2.5, 1e-3, 1.0, 64, 32, 0.5, 10**9)
KILLED = Failed("It was killed.", "killed")  # noted already: who looks at it has nothing to write
EVENTS = [Noted("Reading"), STARTED, KILLED, STEP]


@contextmanager
def bounded() -> Iterator[None]:
    """Stops what takes longer than `SECONDS`, and refuses it memory beyond `SPARE_BYTES`."""

    def stop(_number, _frame):
        raise TimeoutError(f"it took more than {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + SPARE_BYTES, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def as_it_lies(path: Path) -> dict[str, Any]:
    """Everything at and under `path`: kind, size, time, and of files that are really there the content."""
    found = {}
    for place in [path, *sorted(path.rglob("*"))]:
        status = place.lstat()
        held = place.is_file() and status.st_blocks * 512 >= min(status.st_size, 1)
        content = hashlib.sha256(place.read_bytes()).hexdigest() if held and status.st_size < 10**9 else None
        found[str(place)] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


# How the product opens each kind


def open_data(path: Path, studio: Studio, model: str) -> None:
    table = studio.table(str(path))
    spec = data.guess_spec(table, str(path))
    data.prepare(spec, studio.tokenizer(model), max_length=64, seed=0, workspace=studio.workspace)


def open_adapter(path: Path, studio: Studio, model: str) -> None:
    Adapter.load(path, scaling=None if path.is_dir() else 2.0).apply(studio.skeleton(model))


def open_plan(path: Path, studio: Studio, model: str) -> None:
    studio.check(RunSpec.read(path))


def open_run(path: Path, studio: Studio, model: str) -> None:
    """Looks at a run as every page does, which must go on beside it; then asks for its state."""
    other = studio.runs.create(RunSpec(name="Beside it"))
    run = Run(path)
    try:
        for shown in (train_tab.view(run), app.news(studio, question(run.id))):
            json.dumps(shown, ensure_ascii=False).encode()
        assert runs_tab.row(other)[1] == "interrupted"
        row = runs_tab.row(run)
        assert len(row) == len(runs_tab.HEADER)
        status, _ = run.status, run.spec
    except LoRAError as error:
        assert row[:2] == [run.id, "damaged"] and row[4] == str(error)
        assert runs_tab.label(run) == f"{run.id} · damaged"
        assert escape(str(error)) in train_tab.view(run)["status"]
        raise
    assert status == "interrupted"


def open_model(path: Path, studio: Studio, model: str) -> None:
    spec = DataSpec("starter:restaurants", prompt="mr", completion="text", max_rows=3, max_eval_rows=1)
    data.prepare(spec, studio.tokenizer(str(path)), max_length=256, seed=0, workspace=studio.workspace)
    models.describe(str(path), studio.workspace)
    models.read_weight(str(path), studio.workspace, "model.layers.0.self_attn.q_proj")
    models.load_model(str(path), studio.workspace)


def open_gguf(path: Path, studio: Studio, model: str) -> None:
    models.describe(str(path), studio.workspace)
    models.load_tokenizer(str(path), studio.workspace)


OPEN: dict[str, Callable[[Path, Studio, str], Any]] = {
    "rows.csv": open_data,
    "rows.tsv": open_data,
    "rows.json": open_data,
    "rows.jsonl": open_data,
    "rows.parquet": open_data,
    "rows.txt": open_data,
    "adapter": open_adapter,
    "lora.bin": open_adapter,
    "old.bin": open_adapter,
    "lora.safetensors": open_adapter,
    "spec.json": lambda path, studio, model: RunSpec.read(path),
    "plan.json": open_plan,
    "run": open_run,
    "model": open_model,
    "tiny.gguf": open_gguf,
}


# A good one of each kind


@pytest.fixture(scope="session")
def made(tmp_path_factory, tiny_folder) -> Path:
    """A folder with a real, good one of each kind."""
    folder = tmp_path_factory.mktemp("good")
    rows = [{"prompt": f"How many is {i}?", "completion": f"It is {i}."} for i in range(30)]
    for name, separator in (("rows.csv", ","), ("rows.tsv", "\t")):
        lines = [separator.join(rows[0]), *(separator.join(row.values()) for row in rows)]
        (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.txt").write_text("\n\n".join(row["completion"] for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")

    studio = Studio(Workspace(folder / "workspace"), allowed=[Path(os.sep)])
    model = models.load_model(str(tiny_folder), studio.workspace)
    inject(model, LoRAConfig(r=2, target_modules=("q_proj", "v_proj")))
    adapter = Adapter.from_model(model)
    adapter.save(folder / "adapter")
    tensors = {f"{path}.lora_{half}": getattr(f, half) for path, f in adapter.factors.items() for half in "AB"}
    torch.save(tensors, folder / "lora.bin")
    torch.save(tensors, folder / "old.bin", _use_new_zipfile_serialization=False)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "lora.safetensors")

    rows_of = DataSpec("starter:restaurants", prompt="mr", completion="text")
    run = studio.runs.create(RunSpec("Run", str(tiny_folder), rows_of))
    for name in ("spec.json", "plan.json"):
        shutil.copy(run.folder / "spec.json", folder / name)
    writer = EventWriter(run.log)
    for event in EVENTS:
        writer.write(event)
    writer.close()
    shutil.copytree(folder / "adapter", run.adapter_folder)
    run.folder.rename(folder / "run")
    shutil.copytree(tiny_folder, folder / "model")
    write_gguf(folder / "tiny.gguf")
    return folder


@pytest.fixture
def studio(workspace) -> Studio:
    return Studio(workspace, allowed=[Path(os.sep)])


@pytest.fixture
def given(made, studio, tmp_path) -> Callable[[str], Path]:
    """given(kind): a copy of the good one, which may be spoiled; a run lies in the workspace."""

    def give(kind: str) -> Path:
        place = (studio.workspace.runs if kind == "run" else tmp_path) / kind
        return Path((shutil.copytree if (made / kind).is_dir() else shutil.copy)(made / kind, place))

    return give


@pytest.mark.parametrize("kind", OPEN)
def test_the_good_one_of_each_kind_opens_within_the_same_bounds(kind, given, studio, tiny_folder):
    path = given(kind)
    before = as_it_lies(path)
    with bounded():
        OPEN[kind](path, studio, str(tiny_folder))
    assert as_it_lies(path) == before


# Ways to spoil it: each is called with the path of a good one


Spoil = Callable[[Path], Any]


def content(*parts: Any, of: str = "") -> Spoil:
    """Other content for the file, or for the file `of` in the folder; text as UTF-8."""
    raw = b"".join(part if isinstance(part, bytes) else str(part).encode() for part in parts)
    return lambda path: (path / of).write_bytes(raw)


def cut(share: float, of: str = "") -> Spoil:
    return lambda path: os.truncate(path / of, int((path / of).stat().st_size * share))


def patched(old: bytes, new: bytes, of: str = "") -> Spoil:
    """`old` is replaced by `new` where it first stands."""

    def spoil(path: Path) -> None:
        raw = (path / of).read_bytes()
        assert old in raw
        (path / of).write_bytes(raw.replace(old, new, 1))

    return spoil


def sparse(num_bytes: int, of: str = "") -> Spoil:
    """A file of zeros that takes no room on the disk."""

    def spoil(path: Path) -> None:
        (path / of).write_bytes(b"")
        os.truncate(path / of, num_bytes)

    return spoil


def a_folder(of: str = "") -> Spoil:
    return lambda path: ((path / of).unlink(), (path / of).mkdir())


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def packed(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


def encoded(encoding: str, of: str = "") -> Spoil:
    return lambda path: (path / of).write_bytes((path / of).read_text().encode(encoding))


def values(of: str = "", **changes: Any) -> Spoil:
    """Other values in a JSON file."""

    def spoil(path: Path) -> None:
        old = json.loads((path / of).read_text())
        (path / of).write_text(json.dumps(old | changes))

    return spoil


def table(**columns: Any) -> Spoil:
    return lambda path: pq.write_table(pa.table(columns), path)


def bomb(path: Path) -> None:
    """A Parquet file of some kilobytes that unpacks to more than is allowed."""
    long = pa.table({"text": ["x" * 100_000_000]})
    with pq.ParquetWriter(
        path, long.schema, compression="zstd", use_dictionary=False, write_statistics=False
    ) as writer:
        for _ in range(readers.MAX_UNPACKED_BYTES // 100_000_000 + 1):
            writer.write_table(long)
    assert path.stat().st_size < 1_000_000


def event(**changes: Any) -> Spoil:
    """One more line in a run's log: a step, changed."""

    def spoil(path: Path) -> None:
        with (path / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": 1.0} | core.to_record(STEP) | changes) + "\n")

    return spoil


def line(*parts: Any) -> Spoil:
    """One more line in a run's log, as it is."""

    def spoil(path: Path) -> None:
        with (path / "events.jsonl").open("ab") as file:
            file.write(b"".join(part if isinstance(part, bytes) else part.encode() for part in parts))

    return spoil


def tensors(of: str, change: Callable[[dict[str, torch.Tensor]], Any], **metadata: Any) -> Spoil:
    """Other tensors or metadata in a safetensors file."""

    def spoil(path: Path) -> None:
        held = load_file(path / of)
        change(held)
        save_file(held, path / of, {"format": "pt", **{k: json.dumps(v) for k, v in metadata.items()}})

    return spoil


def safetensors_header(of: str = "", **header: Any) -> Spoil:
    """A safetensors file whose head says `header`, with 32 bytes after it."""
    raw = json.dumps(header).encode()
    return content(struct.pack("<Q", len(raw)), raw, bytes(32), of=of)


def packed_zeros(path: Path) -> None:
    """A file that torch can read, in which many zeros are packed into few bytes."""
    torch.save({"x.lora_A": torch.zeros(2, 10_000_000), "x.lora_B": torch.zeros(3, 2)}, path)
    with zipfile.ZipFile(path) as old:
        parts = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, held in parts.items():
            new.writestr(name, held)
    assert path.stat().st_size < 1_000_000


def as_gguf(*pairs: bytes, num_tensors: int = 0, num_pairs: int | None = None) -> Spoil:
    head = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, len(pairs) if num_pairs is None else num_pairs)
    return content(head, *pairs)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


ARCHITECTURE = pair("general.architecture", 8, struct.pack("<Q", 5) + b"llama")


def gguf_number(key: str, value: int) -> Spoil:
    """Another value for a uint32 at the head of the GGUF file."""

    def spoil(path: Path) -> None:
        raw = path.read_bytes()
        at = raw.index(key.encode()) + len(key) + 4
        path.write_bytes(raw[:at] + struct.pack("<I", value) + raw[at + 4 :])

    return spoil


class Case(NamedTuple):
    """Attributes: what is spoiled, how, and a pattern of the sentence that it ends in."""

    kind: str
    spoil: Spoil
    message: str


# Data files, and what stands in their rows
CASES = {
    "packed rows": Case("rows.jsonl", packed, r"`rows\.jsonl` is not a text file \(a zero byte at byte \d+\); save it"),
    "UTF-16 without a mark": Case("rows.csv", encoded("utf-16-le"), r"is not a text file .*save it as .* in UTF-8"),
    "EBCDIC": Case("rows.csv", encoded("cp500"), r"`rows\.csv`, line 1: byte \d+ is not UTF-8; save it as UTF-8"),
    "a spreadsheet called CSV": Case("rows.csv", content(b"PK\x03\x04\x14\0\x06\0"), "is not a text file"),
    "rows cut within a character": Case(
        "rows.txt", content("日本".encode()[:-1]), r"`rows\.txt`, line 1, field `text`: byte 4 is not UTF-8"
    ),
    "rows cut": Case("rows.json", cut(0.7), r"`rows\.json`, line 1: is not valid JSON \(.*\); correct that place"),
    "no columns": Case("rows.jsonl", content("{}\n" * 9), r"`rows\.jsonl` has no columns; give each row"),
    "no columns in Parquet": Case(
        "rows.parquet",
        lambda path: pq.write_table(pa.Table.from_pylist([{}] * 9), path),
        r"`rows\.parquet` has no (rows|columns); ",
    ),
    "100,000 columns": Case(
        "rows.csv",
        content(",".join(f"c{i}" for i in range(100_000)), "\n", "," * 99_999),
        r"`rows\.csv` has 100,000 columns; keep at most [\d,]+, the ones to train on",
    ),
    "100,000 columns in one row": Case(
        "rows.json",
        content(json.dumps([{f"c{i}": i for i in range(100_000)}])),
        r"`rows\.json` has 100,000 columns; keep at most",
    ),
    "a column for each row": Case(
        "rows.jsonl",
        content("".join(f'{{"c{i}": {{"a": 1}}}}\n' for i in range(100_000))),
        r"`rows\.jsonl` has [\d,]+ columns; keep at most",
    ),
    "a column named by half a character": Case(
        "rows.jsonl",
        content('{"\\ud800": "x", "b": "y"}\n'),
        r"`rows\.jsonl` has a column named '\\ud800', which holds half of a character; rename it",
    ),
    "a column named to spoil a terminal": Case(
        "rows.jsonl",
        content('{"\\u001b[2J\\na\\u0000": "", "b": ""}\n'),
        r"No row of rows\.jsonl .*row 1: `\\x1b\[2J\\na\\x00` is empty\); choose other columns",
    ),
    "text of 50 MB in one line": Case(
        "rows.txt",
        content("x" * LONG),
        r"No row .* \(row 1: it has 50,000,\d+ characters; at most [\d,]+ are read; split it",
    ),
    "an answer of 50 MB": Case(
        "rows.jsonl",
        content('{"prompt": "a", "completion": "', "a b " * (LONG // 4), '"}\n'),
        "No row .*row 1: it has 50,000,",
    ),
    "50 MB in one line, cut": Case(
        "rows.jsonl",
        content('{"prompt": "a", "completion": "', "a" * LONG),
        r"`rows\.jsonl`, line 1: is not valid JSON \(Unterminated string.*1 of 1 lines is like this",
    ),
    "50 MB in one field": Case("rows.csv", content("a,b\n1,", "x" * LONG, "\n"), r"line 2: .*larger than field limit"),
    "50 MB of brackets": Case("rows.json", content("[" * LONG), r"`rows\.json` is nested too deeply; make each row"),
    "an object of brackets": Case(
        "rows.jsonl", content('{"a": ', "[" * DEEP, "]" * DEEP, "}\n"), r"line 1: .*\(nested too deeply\)"
    ),
    "a conversation of brackets": Case(
        "rows.jsonl",
        content(json.dumps({"messages": "[" * DEEP}), "\n", json.dumps({"messages": []}), "\n"),
        r"No row .*row 1: .*`messages` is not valid JSON",
    ),
    "a role that is a list": Case(
        "rows.jsonl",
        content('{"messages": [{"role": ["user"], "content": "x"}]}\n'),
        r"row 1: message 1 of `messages` has the role \"\['user'\]\"; it must be system",
    ),
    "a role of 50 MB": Case(
        "rows.jsonl",
        content('{"messages": [{"role": "', "x" * LONG, '", "content": "x"}]}\n'),
        r"row 1: message 1 of `messages` has the role 'x{40}'; it must be",
    ),
    "a number of 5,000 digits": Case("rows.json", content('[{"a": -', "9" * 5000, "}]"), "a number that is too long"),
    "a pipe": Case("rows.txt", a_pipe, r"`source` .* must be a file, not a folder or a device"),
    "Parquet cut in half": Case("rows.parquet", cut(0.5), r"`rows\.parquet` is not a Parquet file that can be read"),
    "a Parquet foot of 2 GB": Case(
        "rows.parquet",
        lambda path: path.write_bytes(path.read_bytes()[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1"),
        r"`rows\.parquet` is not a Parquet file that can be read \(.*\); write it again",
    ),
    "Parquet of zeros": Case("rows.parquet", sparse(10_000_000), "is not a Parquet file that can be read"),
    "Parquet that unpacks to 1 GB": Case(
        "rows.parquet", bomb, r"`rows\.parquet` must be at most 1 GB unpacked; keep a part"
    ),
    "a time zone that is none": Case(
        "rows.parquet",
        table(a=pa.array([1] * 9, pa.timestamp("us", tz="Mars/Olympus"))),
        r"`rows\.parquet` is not a Parquet file that can be read \(.*Mars/Olympus",
    ),
    "a year beyond all": Case(
        "rows.parquet", table(a=pa.array([2**62] * 9, pa.timestamp("us"))), r"not a Parquet file that can be read \("
    ),
    "words that are no text": Case(
        "rows.parquet",
        table(a=pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())),
        r"not a Parquet file that can be read \(.*utf-8",
    ),
}
# Adapters
CASES |= {
    "a safetensors head of 10^15 bytes": Case(
        "adapter",
        content(struct.pack("<Q", HUGE), bytes(32), of="adapter_model.safetensors"),
        r"adapter_model\.safetensors is damaged or no safetensors file",
    ),
    "a tensor of 10^15 numbers": Case(
        "adapter",
        safetensors_header(
            "adapter_model.safetensors", a={"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}
        ),
        "is damaged or no safetensors file",
    ),
    "a shape whose product overflows": Case(
        "lora.safetensors",
        safetensors_header(a={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 32]}),
        r"lora\.safetensors is damaged or no safetensors file",
    ),
    "a head of brackets": Case(
        "lora.safetensors", content(struct.pack("<Q", DEEP), "[" * DEEP), "is damaged or no safetensors file"
    ),
    "settings of 10 GB": Case(
        "adapter", sparse(10**10, "adapter_config.json"), r"adapter_config\.json is not readable JSON: .*longer than"
    ),
    "settings in UTF-16": Case("adapter", encoded("utf-16", "adapter_config.json"), "is not readable JSON"),
    "settings cut": Case("adapter", cut(0.5, "adapter_config.json"), "is not readable JSON"),
    "an alpha of 400 digits": Case(
        "adapter", values("adapter_config.json", lora_alpha=10**400), r"does not hold a LoRA config: .*too large"
    ),
    "a number where names belong": Case(
        "adapter",
        lambda path: (
            values("adapter_config.json", modules_to_save=[1])(path),
            tensors("adapter_model.safetensors", lambda t: t.update({"base_model.model.x": torch.ones(2)}))(path),
        ),
        r"`modules_to_save` \(=\[1\]\) in .*adapter_config\.json must be a list of names",
    ),
    "a base model that is no name": Case(
        "adapter",
        values("adapter_config.json", base_model_name_or_path={"a": 1}),
        r"`base_model_name_or_path` \(=\{'a': 1\}\) in .* must be text",
    ),
    "a slice of 10^15 rows": Case(
        "adapter",
        tensors(
            "adapter_model.safetensors",
            lambda t: None,
            lora_slices={"model.layers.0.self_attn.q_proj": [{"name": "q", "r": 2, "scaling": 1, "rows": [[0, HUGE]]}]},
        ),
        r"does not hold a LoRA config: .*rows \[\[0, 1000000000000000\]\]",
    ),
    "slices of brackets": Case(
        "adapter",
        lambda path: save_file(
            load_file(path / "adapter_model.safetensors"),
            path / "adapter_model.safetensors",
            {"lora_slices": "[" * DEEP},
        ),
        "does not hold a LoRA config: .*recursion",
    ),
    "weights of whole numbers": Case(
        "adapter",
        tensors("adapter_model.safetensors", lambda t: t.update({k: v.to(torch.int64) for k, v in t.items()})),
        r"does not hold a LoRA adapter: .*holds NaN, infinity or whole numbers; .*layers\.0-1\.self_attn\.v_proj",
    ),
    "a matrix named to spoil a terminal": Case(
        "adapter",
        tensors("adapter_model.safetensors", lambda t: t.update({"a\n\x1b[2J.lora_A.weight": torch.ones(2, 3)})),
        r"a\\n\\x1b\[2J has lora_A without its partner",
    ),
    "a matrix outside of the model": Case(
        "lora.safetensors",
        lambda path: save_file({"../../x.lora_A": torch.ones(2, 3), "../../x.lora_B": torch.ones(3, 2)}, path),
        r"must fit the model: \.\./\.\./x does not exist or cannot be adapted\. Load the base model",
    ),
    "a loralib file cut": Case("lora.bin", cut(0.6), r"lora\.bin cannot be read as tensors alone: it is damaged, or"),
    "an old loralib file cut": Case("old.bin", cut(0.6), r"old\.bin cannot be read as tensors alone: it is damaged"),
    "an old loralib file cut in a number": Case("old.bin", cut(0.02), "cannot be read as tensors alone"),
    "an old loralib file of 10^15 numbers": Case(
        "old.bin",
        patched(b"K@N", b"\x8a\x07" + HUGE.to_bytes(7, "little") + b"N"),
        "cannot be read as tensors alone: it is damaged",
    ),
    "a loralib file that unpacks to hundreds of times its size": Case(
        "lora.bin", packed_zeros, r"lora\.bin must hold its tensors as torch\.save writes them; .* packed"
    ),
    "a loralib file of zeros": Case("lora.bin", sparse(10**10), "cannot be read as tensors alone: it is damaged"),
}
# Specs
CASES |= {
    "a spec of zeros": Case("spec.json", sparse(10**10), r"`SPEC` .* must be a JSON file \(.*longer than"),
    "a spec that never ends": Case(
        "spec.json", lambda path: (path.unlink(), path.symlink_to("/dev/zero")), r"must be a JSON file \(.*longer than"
    ),
    "a spec cut": Case("spec.json", cut(0.5), r"`SPEC` .* must be a JSON file \(.*\); a run's own spec\.json is an"),
    "a spec in UTF-16": Case("spec.json", encoded("utf-16"), r"must be a JSON file \(.*utf-8.*\)"),
    "a spec with a zero byte": Case(
        "spec.json", patched(b'"Run"', b'"R\0n"'), r"must be a JSON file \(Invalid control"
    ),
    "a spec of brackets": Case("spec.json", content('{"lora": ', "[" * DEEP), "must be a JSON file .*recursion"),
    "a spec whose name is half a character": Case(
        "spec.json", values(name="\ud800"), r"must be a JSON file \(.*surrogates not allowed"
    ),
    "a spec with a number of 5,000 digits": Case(
        "spec.json", content('{"train": {"steps": ', "9" * 5000, "}}"), r"must be a JSON file \(.*digits"
    ),
    "a model name of 1 MB": Case("spec.json", values(model=["x" * 900_000]), r"`model` \(=\['x+…\) must be text\."),
    "a setting of 1 MB": Case(
        "spec.json", values(train={"steps": "x" * 900_000}), r"`steps` \(='x+…\) must be a whole"
    ),
    "a setting named by 1 MB": Case(
        "spec.json", values(lora={"x" * 900_000: 1}), r"LoRAConfig has no setting 'x+…; it"
    ),
    "steps without number": Case(
        "spec.json", values(train={"steps": 1e999}), r"`steps` \(=inf\) must be a whole number"
    ),
    "steps beyond all": Case("spec.json", values(train={"steps": 10**300}), r"`steps` \(=10+…\) must be .*at most"),
    "a batch beyond all": Case("spec.json", values(train={"batch_size": HUGE}), r"`batch_size` .* must be .*at most"),
    "an alpha beyond all": Case("spec.json", values(lora={"alpha": 10**400}), r"`alpha` \(=inf\) must be above 0"),
    "an r beyond all": Case("plan.json", values(lora={"r": HUGE}), r"`r` \(=1000000000000000\) must be at most"),
    "a learning rate that is no number": Case(
        "spec.json", values(train={"learning_rate": float("nan")}), r"`learning_rate` \(=nan\) must be above 0"
    ),
    "targets that are no expression": Case(
        "plan.json", values(lora={"target_modules": "(q_proj"}), r"`target_modules` .*\(q_proj"
    ),
    "a rank for no expression": Case(
        "spec.json", values(lora={"rank_pattern": {"(": 4}}), r"`rank_pattern\['\('\]` must be a name or a valid"
    ),
    "a data set with a zero byte": Case(
        "plan.json", values(data={"source": "a\0.jsonl"}), r"`source` \(='a\\x00\.jsonl'\) must lie in /"
    ),
    "a data set that never ends": Case(
        "plan.json", values(data={"source": "/dev/zero"}), r"must be a file, not a folder or a device"
    ),
    "a model with a zero byte": Case("plan.json", values(model="a\0b"), r"`model` \(='a\\x00b'\) must lie in /"),
}
# Event logs
CASES |= {
    "a log of another format": Case("run", content(bytes(range(256)), "\n", of="events.jsonl"), "damaged at event 1: "),
    "a log in UTF-16": Case("run", encoded("utf-16", "events.jsonl"), "events.jsonl is damaged at event 1: "),
    "a log with a zero byte": Case("run", patched(b"Reading", b"Read\0ng", "events.jsonl"), "damaged at event 1: "),
    "a log of zeros": Case("run", sparse(10**10, "events.jsonl"), "damaged at event 1: .*longer than"),
    "a log that is a folder": Case("run", a_folder("events.jsonl"), r"events\.jsonl cannot be read \(Is a directory"),
    "a step that is text": Case(
        "run", event(step="1"), r"damaged at event 5: `step` \(='1'\) of `Step` must be a whole"
    ),
    "a loss that is null": Case("run", event(loss=None), r"event 5: `loss` \(=None\) of `Step` must be a number"),
    "a loss that is true": Case("run", event(loss=True), r"event 5: `loss` \(=True\) of `Step` must be a number"),
    "a step of 400 digits": Case("run", event(step=10**400), r"event 5: `step` \(=10+…\) of `Step` must be .*below"),
    "tokens beyond all": Case("run", event(num_tokens=10**19), r"event 5: `num_tokens` .* must be .*below"),
    "a time of 400 digits": Case("run", event(time=10**400), r"damaged at event 5: .*too large"),
    "a step without its loss": Case(
        "run", line('{"time": 1, "event": "Step", "step": 2}\n'), r"event 5: The record of `Step` does not fit: .*loss"
    ),
    "a message that is a list": Case(
        "run",
        line('{"time": 1, "event": "Failed", "message": ["x"]}\n'),
        r"`message` \(=\['x'\]\) of `Failed` must be text",
    ),
    "a message of half a character": Case(
        "run", line('{"time": 1, "event": "Failed", "message": "\\ud800"}\n'), r"`message` .* of `Failed` must be text"
    ),
    "a device that is a table": Case(
        "run", line(json.dumps({"time": 1} | core.to_record(STARTED) | {"device": {}}), "\n"), r"`device` \(=\{\}\)"
    ),
    "an event whose name is a list": Case("run", line('{"time": 1, "event": ["Step"]}\n'), r"`event` \(=\['Step'\]\)"),
    "an event of 50 MB": Case(
        "run",
        line('{"time": 1, "event": "Noted", "message": "', "x" * LONG, '"}\n'),
        "damaged at event 5: .*longer than",
    ),
    "half an event of 50 MB": Case(
        "run", line('{"time": 1, "event": "Noted", "message": "', "x" * LONG), "damaged at event 5: .*longer than"
    ),
    "a run's spec of zeros": Case("run", sparse(10**10, "spec.json"), r"must be a JSON file \(.*longer than"),
    "a run's name of half a character": Case(
        "run", values("spec.json", name="\udfff"), r"must be a JSON file \(.*surrogates not allowed"
    ),
}
# Models
CASES |= {
    "a model's settings of brackets": Case(
        "model",
        content("[" * DEEP, of="config.json"),
        r"must hold a readable config\.json; it is damaged \(.*recursion",
    ),
    "a model's settings of 10 GB": Case(
        "model", sparse(10**10, "config.json"), r"readable config\.json; it is damaged \(.*longer than"
    ),
    "a model's settings in UTF-16": Case("model", encoded("utf-16", "config.json"), r"readable config\.json"),
    "a family that is a list": Case("model", values("config.json", model_type=["llama"]), r"family .*\['llama'\]"),
    "classes that are a number": Case(
        "model", values("config.json", architectures=[5]), r"`model` .* must hold a config\.json that transformers can"
    ),
    "10^9 layers": Case(
        "model",
        values("config.json", num_hidden_layers=10**9),
        r"num_hidden_layers \(=1000000000\) in its config\.json",
    ),
    "10^15 words": Case("model", values("config.json", vocab_size=HUGE), r"`model` .* must hold weights that fit"),
    "a width of 10^15": Case(
        "model", values("config.json", hidden_size=HUGE), r"`model` .* must hold weights that fit"
    ),
    "no heads": Case("model", values("config.json", num_attention_heads=0), r"must hold a config\.json that"),
    "a model's safetensors head of 10^15 bytes": Case(
        "model", content(struct.pack("<Q", HUGE), bytes(32), of="model.safetensors"), r"readable model\.safetensors"
    ),
    "a model's safetensors cut": Case(
        "model", cut(0.5, of="model.safetensors"), r"must hold a readable model\.safetensors"
    ),
    "an index that leads elsewhere": Case(
        "model",
        lambda path: (
            (path / "model.safetensors").rename(path / "a.safetensors"),
            content('{"weight_map": {"x": "../../etc/passwd"}}', of="model.safetensors.index.json")(path),
        ),
        r"must name files beside its model\.safetensors\.index\.json, and no others; '\.\./\.\./etc/passwd' is none",
    ),
    "an index of numbers": Case(
        "model",
        lambda path: (
            (path / "model.safetensors").rename(path / "a.safetensors"),
            content('{"weight_map": {"x": [1]}}', of="model.safetensors.index.json")(path),
        ),
        r"must name files beside its model\.safetensors\.index\.json, and no others; \[1\] is none",
    ),
    "a tokenizer of brackets": Case("model", content("[" * DEEP, of="tokenizer.json"), "must hold a tokenizer that"),
    "a tokenizer cut": Case("model", cut(0.5, of="tokenizer.json"), "must hold a tokenizer that transformers reads"),
    "a template that is no template": Case(
        "model", content("{% for", of="chat_template.jinja"), "the model's chat template refuses it"
    ),
    "a template that counts to 10^15": Case(
        "model",
        content("{% for i in range(10**15) %}x{% endfor %}", of="chat_template.jinja"),
        "the model's chat template refuses it",
    ),
    "a template that divides by zero": Case(
        "model", content("{{ 1 / 0 }}", of="chat_template.jinja"), "the model's chat template refuses it"
    ),
    "a GGUF head of 10^15 pairs": Case("tiny.gguf", as_gguf(num_pairs=HUGE), r"must be a whole GGUF file"),
    "a GGUF head of 10^15 tensors": Case("tiny.gguf", as_gguf(ARCHITECTURE, num_tensors=HUGE), "must be a whole GGUF"),
    "a GGUF text of 10^15 bytes": Case(
        "tiny.gguf", as_gguf(ARCHITECTURE, pair("a", 8, struct.pack("<Q", HUGE))), "its head is cut off within a"
    ),
    "a GGUF list of 10^15 numbers": Case(
        "tiny.gguf", as_gguf(ARCHITECTURE, pair("a", 9, struct.pack("<IQ", 10, HUGE))), "its head is cut off within a"
    ),
    "GGUF lists in lists": Case(
        "tiny.gguf", as_gguf(pair("a", 9, struct.pack("<IQ", 9, 1) * DEEP)), "must be a whole GGUF file .*recursion"
    ),
    "10^9 layers in GGUF": Case("tiny.gguf", gguf_number("llama.block_count", 10**9), r"block_count \(=1000000000\)"),
    "no width in GGUF": Case("tiny.gguf", gguf_number("llama.embedding_length", 0), "`model` .* must "),
    "GGUF of the other byte order": Case(
        "tiny.gguf", patched(b"GGUF\3\0\0\0", b"GGUF\0\0\0\3"), "does not begin as GGUF of version 2 or 3"
    ),
    "GGUF cut": Case("tiny.gguf", cut(0.9), r"must be a whole GGUF file .*Fetch it again"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_file_ends_in_one_sentence_and_stays_as_it_is(name, given, studio, tiny_folder):
    kind, spoil, message = CASES[name]
    path = given(kind)
    spoil(path)
    before = as_it_lies(path)
    with bounded(), pytest.raises(LoRAError, match=message) as caught:
        OPEN[kind](path, studio, str(tiny_folder))
    said = str(caught.value)
    assert said.isprintable() and len(said) <= 2_000
    assert said.endswith((".", "?", "-U transformers"))
    assert as_it_lies(path) == before
    assert not list(studio.workspace.cache.rglob(".converting-*"))


def test_there_are_sixty_cases_and_more():
    assert len(CASES) >= 60


REFUSED = [name for name, case in CASES.items() if case.kind == "spec.json"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_spec_on_the_command_line_ends_with_2_and_one_line(name, given, tmp_path, capsys):
    path = given("spec.json")
    CASES[name].spoil(path)
    with bounded():
        code = cli.main(["train", str(path), "--workspace", str(tmp_path / "home")])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("lora-studio: ") and err.endswith("\n") and err[:-1].isprintable()
    assert list((tmp_path / "home" / "runs").iterdir()) == []


def test_the_command_itself_shows_no_traceback(given):
    path = given("spec.json")
    path.write_bytes(b"{" * DEEP)
    done = subprocess.run([sys.executable, "-m", "studio", "train", path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lora-studio: `SPEC` (=") and done.stderr.count("\n") == 1
