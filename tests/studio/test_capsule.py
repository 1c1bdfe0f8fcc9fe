"""Capsules and imports: what goes out comes back as it was, and what is hostile or does not fit is refused whole."""

import json
import shutil
import stat
import zipfile

import pytest
import torch

from core import Adapter, Evaluated, Finished, LoRAConfig, LoRAError, inject, lora_layers
from studio import capsule, certificate, imports, models
from studio.certificate import Report
from studio.event_log import EventWriter
from studio.runs import Runs
from studio.specs import RunSpec
from studio.state import Studio
from studio.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def run(tiny_folder, tiny_data, workspace):
    """A run that has ended, with an adapter, a certificate and votes."""
    spec = RunSpec("Inns", str(tiny_folder), tiny_data, LoRAConfig(r=2, alpha=4, target_modules=("q_proj",)))
    found = Runs(workspace).create(spec)
    writer = EventWriter(found.log)
    for event in (Evaluated(0, 3.5, 90, 0.1), Evaluated(4, 2.5, 90, 0.1), Finished(4, "done", 1)):
        writer.write(event)
    writer.close()
    model = models.load_model(spec.model, workspace)
    inject(model, spec.lora)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.05)
    Adapter.from_model(model, base_model=spec.model).save(found.adapter_folder)
    found.note_data({spec.data.source: "ab" * 32})
    capsule.keep_certificate(found, certificate.of_run(found, workspace))
    (found.folder / "votes.jsonl").write_text('{"winner": "base"}\n')
    (found.folder / "worker.log").write_text("of this machine")
    return found


@pytest.fixture(scope="module")
def file(run, tmp_path_factory):
    return capsule.write(run, tmp_path_factory.mktemp("capsule") / "inns.zip")


def packed(path, parts):
    with zipfile.ZipFile(path, "w") as made:
        for name, content in parts.items():
            made.writestr(name, content)
    return path


def parts_of(file):
    with zipfile.ZipFile(file) as read:
        return {name: read.read(name) for name in read.namelist()}


def changed(file, path, **parts):
    """Writes the capsule anew with parts that its manifest knows."""
    import hashlib

    known = parts_of(file)
    manifest = json.loads(known.pop(capsule.MANIFEST))
    known |= {name.replace("__", "/").replace("_json", ".json"): content for name, content in parts.items()}
    manifest["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in known.items()}
    return packed(path, {capsule.MANIFEST: json.dumps(manifest), **known})


def test_a_run_comes_back_on_another_machine_as_it_was(run, file, tmp_path):
    there = Runs(Workspace(tmp_path / "there"))
    back = capsule.restore(there, file)
    assert (back.id, back.spec, back.status) == (run.id, run.spec, "finished")
    back.log.read()
    assert [e.loss for e in back.log.evaluations] == [3.5, 2.5]
    assert back.data_hashes == run.data_hashes != {}
    assert capsule.certificate_of(back) == capsule.certificate_of(run) is not None
    assert (back.folder / "votes.jsonl").read_text() == (run.folder / "votes.jsonl").read_text()
    assert not (back.folder / "worker.log").exists()
    for path, f in Adapter.load(run.adapter_folder).factors.items():
        assert torch.equal(Adapter.load(back.adapter_folder).factors[path].B, f.B)
    manifest = json.loads(parts_of(file)[capsule.MANIFEST])
    assert manifest["seed"] == run.spec.train.seed and "torch" in manifest["versions"]


def test_one_that_is_there_already_gets_an_id_of_its_own(run, file, workspace):
    back = capsule.restore(Runs(workspace), file)
    assert back.id.startswith(f"{run.id}-") and run.folder.exists()


def test_a_certificate_says_the_same_after_json(run, workspace):
    report = capsule.certificate_of(run)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.problems == () and report.num_prompts == len(certificate.PROMPTS)
    assert report.num_evaluation > 0
    for words in (certificate.card(report), certificate.plain(report), certificate.markdown(report)):
        assert "ound" in words and "float32" in words
    broken = {**report.to_dict(), "merges": [{**report.to_dict()["merges"][0], "logit_error": "nan"}]}
    read = Report.from_dict(json.loads(json.dumps(broken)))
    assert "differ by nan" in read.problems[0] and "Not sound" in certificate.card(read)
    with pytest.raises(LoRAError, match="A certificate must be a table"):
        Report.from_dict({"merges": 3})


HOSTILE = {
    "a way out": lambda parts: {**parts, "../../evil.json": b"{}"},
    "an absolute place": lambda parts: {**parts, "/tmp/evil.json": b"{}"},
    "a pickle": lambda parts: {**parts, "adapter/adapter_model.bin": b"\x80\x04"},
    "a checkpoint": lambda parts: {**parts, "checkpoints/00000001/training.safetensors": b""},
    "no manifest": lambda parts: {k: v for k, v in parts.items() if k != capsule.MANIFEST},
    "no table": lambda parts: {**parts, capsule.MANIFEST: b"[]"},
    "another form": lambda parts: {**parts, capsule.MANIFEST: b'{"form": 99, "run": "a", "files": {}}'},
    "other bytes": lambda parts: {**parts, "events.jsonl": b""},
}
WORDS = {
    "a way out": r"'\.\./\.\./evil\.json' is no part of one",
    "an absolute place": "evil.json' is no part of one",
    "a pickle": "adapter_model.bin' is no part of one",
    "a checkpoint": "training.safetensors' is no part of one",
    "no manifest": "it has no capsule.json",
    "no table": "its capsule.json is damaged",
    "another form": "of another form, or does not name its parts",
    "other bytes": "events.jsonl is not what capsule.json says it is",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_capsule_is_refused_whole(file, tmp_path, kind):
    bad = packed(tmp_path / "bad.zip", HOSTILE[kind](parts_of(file)))
    there = Runs(Workspace(tmp_path / "there"))
    with pytest.raises(LoRAError, match=f"must be a capsule.*it is refused: .*{WORDS[kind]}.*Nothing was restored"):
        capsule.restore(there, bad)
    assert list(there.workspace.runs.iterdir()) == []
    assert not (tmp_path / "evil.json").exists()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"spec_json": b'{"lora": {"r": -1}}'}, "`r`"),
        ({"adapter__adapter_config_json": b'{"peft_type": "LOHA"}'}, "must be 'LORA'"),
        ({"certificate_json": b'{"merges": 1}'}, "A certificate must be"),
        ({"data_json": b"[1]"}, "list"),
    ],
)
def test_a_part_that_is_something_else_is_refused(file, tmp_path, parts, words):
    there = Runs(Workspace(tmp_path / "there"))
    with pytest.raises(LoRAError, match=f"it is refused: .*{words}"):
        capsule.restore(there, changed(file, tmp_path / "bad.zip", **parts))
    assert list(there.workspace.runs.iterdir()) == []


def test_links_bombs_and_broken_zips_are_refused(file, tmp_path, monkeypatch):
    there = Runs(Workspace(tmp_path / "there"))
    parts = parts_of(file)
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as made:
        for name, content in parts.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK if name == "data.json" else stat.S_IFREG) << 16
            made.writestr(info, content)
    (tmp_path / "cut.zip").write_bytes(file.read_bytes()[:-200])
    for name, words in (("link.zip", "data.json is no plain file"), ("cut.zip", "not a zip file")):
        with pytest.raises(LoRAError, match=words):
            capsule.restore(there, tmp_path / name)
    monkeypatch.setattr(capsule, "MAX_BYTES", 1000)
    with pytest.raises(LoRAError, match="it unpacks to more than 1,000 bytes"):
        capsule.restore(there, file)
    monkeypatch.setattr(capsule, "MAX_FILES", 2)
    with pytest.raises(LoRAError, match="it has 8 parts, more than 2"):
        capsule.restore(there, file)
    assert list(there.workspace.runs.iterdir()) == []


def test_a_run_that_goes_on_makes_no_capsule(run, hold, tmp_path):
    hold(run)
    with pytest.raises(LoRAError, match="must have ended to be put into a capsule"):
        capsule.write(run, tmp_path / "a.zip")


def test_a_page_restores_no_run_of_places_that_it_may_not_open(run, file, tmp_path):
    there = Studio(Workspace(tmp_path / "there"))
    with pytest.raises(LoRAError, match="must lie in .* to be opened from the page"):
        capsule.restore(there.runs, file, there.check_places)
    assert there.runs.list() == []


@pytest.mark.parametrize("form", ["folder", "zip", "zip of a folder"])
def test_an_adapter_of_peft_becomes_a_run(run, workspace, tmp_path, form):
    source = tmp_path / "inn-adapter"
    shutil.copytree(run.adapter_folder, source)
    if form != "folder":
        root = tmp_path if form == "zip of a folder" else source
        base = "inn-adapter" if form == "zip of a folder" else "."
        source = shutil.make_archive(str(tmp_path / "packed"), "zip", root, base)
    back = imports.take(Runs(workspace), type(tmp_path)(source), run.spec.model)
    assert (back.status, back.is_imported) == ("finished", True)
    assert back.spec.lora.r == 2
    for path, f in Adapter.load(run.adapter_folder).factors.items():
        assert torch.equal(Adapter.load(back.adapter_folder).factors[path].B, f.B)
    report = certificate.of_run(back, workspace)
    assert report.problems == () and report.num_evaluation == 0 and "imported" in report.note


def test_a_file_of_loralib_becomes_a_run(run, workspace, tmp_path):
    factors = Adapter.load(run.adapter_folder).factors
    tensors = {f"{path}.lora_{half}": x for path, f in factors.items() for half, x in (("A", f.A), ("B", f.B))}
    torch.save(tensors, tmp_path / "lora.pt")
    with pytest.raises(LoRAError, match="`scaling`"):
        imports.take(Runs(workspace), tmp_path / "lora.pt", run.spec.model)
    back = imports.take(Runs(workspace), tmp_path / "lora.pt", run.spec.model, scaling=2.0)
    assert {f.scaling for f in Adapter.load(back.adapter_folder).factors.values()} == {2.0}


def test_an_adapter_that_does_not_fit_is_not_listed(run, workspace, tmp_path):
    known = len(Runs(workspace).list())
    adapter = Adapter.load(run.adapter_folder)
    path, f = next(iter(adapter.factors.items()))
    wide = type(f)(torch.zeros(2, 99), f.B, f.scaling)
    type(adapter)(
        adapter.config, {path: wide, "model.layers.9.mlp.up_proj": type(f)(f.A.clone(), f.B.clone(), f.scaling)}
    ).save(tmp_path / "wide")
    with pytest.raises(LoRAError, match="must fit the model: .* 32 × 32 in the model and 32 × 99 .*does not exist"):
        imports.take(Runs(workspace), tmp_path / "wide", run.spec.model)
    assert len(Runs(workspace).list()) == known


def test_what_cannot_be_imported_is_refused(run, file, workspace, tmp_path):
    runs = Runs(workspace)
    (tmp_path / "cut.zip").write_bytes(file.read_bytes()[:-200])
    packed(tmp_path / "none.zip", {"README.md": b""})
    with zipfile.ZipFile(tmp_path / "spoilt.zip", "w", zipfile.ZIP_DEFLATED) as spoilt:
        for path in run.adapter_folder.iterdir():
            spoilt.write(path, path.name)
        begin = spoilt.getinfo("adapter_config.json").header_offset + 30 + len("adapter_config.json")
    content = bytearray((tmp_path / "spoilt.zip").read_bytes())
    content[begin : begin + 40] = b"\xff" * 40  # no stream that can be unpacked
    (tmp_path / "spoilt.zip").write_bytes(content)
    for name, words in (
        ("nowhere", "must be a folder or file that exists"),
        ("cut.zip", "must be a whole zip file"),
        ("spoilt.zip", "must be a whole zip file"),
        ("none.zip", "must be a zip with one adapter_model.safetensors; it has 0"),
    ):
        with pytest.raises(LoRAError, match=words):
            imports.take(runs, tmp_path / name, run.spec.model)
