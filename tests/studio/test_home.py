"""The page and the commands that take a run home, and exports that go on behind them."""

import dataclasses
import fcntl
import json
import os
import zipfile

import pytest
import torch

from core import (
    Adapter,
    Evaluated,
    Finished,
    LoRAConfig,
    LoRAError,
    MethodConfig,
    Step,
    TrainConfig,
    inject,
    lora_layers,
)
from studio import __main__ as cli
from studio import (
    background,
    beside,
    capsule,
    certificate,
    export,
    export_jobs,
    gguf_export,
    model_card,
    models,
    reload,
)
from studio.certificate import Report
from studio.export import Choice
from studio.runs import Runs
from studio.specs import RunSpec
from studio.state import Studio
from studio.tabs import home


@pytest.fixture
def run(write_run, tiny_folder, tiny_data, workspace, tmp_path, monkeypatch):
    """A run with an adapter, of a model that lies in the workspace."""
    (workspace.root / "tiny").symlink_to(tiny_folder)
    monkeypatch.setenv("LORA_STUDIO_HOME", str(workspace.root))
    lora = LoRAConfig(r=2, alpha=4, target_modules=("q_proj",))
    found = write_run([Finished(4, "done", 1)], RunSpec("<b>Inns</b>", str(tiny_folder), tiny_data, lora))
    model = models.load_model(found.spec.model, workspace)
    inject(model, lora)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.05)
    Adapter.from_model(model, base_model=found.spec.model).save(found.adapter_folder)
    return found


@pytest.fixture
def studio(workspace, tiny_folder, rows_file):
    return Studio(workspace, [tiny_folder, rows_file.parent])


@pytest.fixture
def quick(monkeypatch):
    """Exports are not opened again: that they are, and what then stops them, has tests of its own."""
    monkeypatch.setattr(export._Making, "_ways_back", lambda self: [])


def job_of(run, choice) -> export_jobs.Job:
    """The folder of an export, as `start` leaves it, whose process has not begun."""
    folder = run.folder / "exports" / choice.kind
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"kind": choice.kind, "dtype": choice.dtype, "force": choice.force}))
    return export_jobs.Job(run, folder)


def test_an_export_behind_the_page_says_how_it_goes_and_can_be_fetched(run, workspace):
    job = job_of(run, Choice("gguf-adapter", "f16"))
    assert job.status == "interrupted" and "Broken off" in home.view(run)
    assert export_jobs.main([str(job.folder)]) == 0
    assert (job.status, job.report.problems) == ("done", ())
    assert [line["note"] for line in job.lines() if "note" in line][0] == "Loading the model"
    assert capsule.certificate_of(run) == job.report
    page = home.view(run)
    assert "✓ Sound" in page and str(job.result) in page and "Adapter, GGUF" in page
    file = export_jobs.pack(job, workspace.downloads)
    assert file.read_bytes() == job.result.read_bytes() and file.suffix == ".gguf"
    assert f'href="gradio_api/file={file}"' in home.link(file)


def test_a_folder_is_fetched_as_a_zip(run, workspace, quick):
    job = job_of(run, Choice("adapter"))
    export_jobs.main([str(job.folder)])
    with zipfile.ZipFile(export_jobs.pack(job, workspace.downloads)) as packed:
        names = set(packed.namelist())
    assert names == {"README.md", "certificate.json", "adapter_config.json", "adapter_model.safetensors"}


def test_a_red_certificate_is_shown_with_its_reason_and_nothing_is_handed_out(run, workspace, quick):
    adapter = Adapter.load(run.adapter_folder)
    still = {path: type(f)(f.A, 0 * f.B, f.scaling) for path, f in adapter.factors.items()}
    type(adapter)(adapter.config, still, adapter.base_model).save(run.adapter_folder)
    job = job_of(run, Choice("adapter"))
    export_jobs.main([str(job.folder)])
    page = home.view(run)
    assert job.status == "refused" and job.result is None
    assert "✗ Not sound" in page and "The adapter changes nothing" in page and "<b>Inns" not in page
    with pytest.raises(LoRAError, match="This export is not done"):
        export_jobs.pack(job, workspace.downloads)
    (job.folder / "job.json").write_text('{"kind": "adapter", "dtype": "", "force": true}')
    (job.folder / "progress.jsonl").unlink()
    export_jobs.main([str(job.folder)])
    assert job.status == "done" and "written all the same" in home.view(run)


def test_an_export_in_a_process_of_its_own_can_be_cancelled_and_started_again(run, workspace):
    job = export_jobs.start(run, Choice("merged", "float32"))
    assert job.status == "running" and "running" in home.view(run)
    with pytest.raises(LoRAError, match="This export is going on already"):
        export_jobs.start(run, Choice("merged", "float32"))
    with pytest.raises(LoRAError, match="is still being exported; cancel that before you delete it"):
        Runs(workspace).delete(run)
    job.cancel()
    assert job.status == "cancelled" and not (job.folder / "result").exists()
    assert "Cancelled" in home.view(run)
    again = export_jobs.start(run, Choice("merged", "float32"))
    assert again.status == "running"
    again.cancel()
    for child in background._children:
        child.wait()


def test_one_whose_process_cannot_be_found_says_so(run):
    job = job_of(run, Choice("adapter"))
    fd = os.open(job.folder / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(LoRAError, match="could not be ended; end its processes by hand"):
        job.cancel(patience_seconds=0.05)
    os.close(fd)


def test_a_failure_is_said_in_the_export(run, quick):
    (run.adapter_folder / "adapter_config.json").write_text("{}")
    job = job_of(run, Choice("adapter"))
    export_jobs.main([str(job.folder)])
    assert job.status == "failed" and "must be &#x27;LORA&#x27;" in home.view(run)


def test_without_a_run_or_an_adapter_the_page_says_what_to_do(write_run):
    assert "Train one, or bring one in" in home.view(None)
    empty = write_run()
    assert "no adapter yet" in home.view(empty)
    with pytest.raises(LoRAError, match="has no adapter yet"):
        export_jobs.start(empty, Choice("adapter"))


def test_what_is_dropped_on_the_page_becomes_a_run(run, studio, tmp_path):
    files = [str(run.adapter_folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    (back,), words = home.bring_in(studio, files, run.spec.model, "", "")
    assert back.is_imported and "matrices fit" in words
    (restored,), words = home.bring_in(studio, [str(capsule.write(run, tmp_path / "inns.zip"))], "starter", "", "")
    assert restored.spec == run.spec and "from its capsule" in words
    count = len(studio.runs.list())
    two, words = home.bring_in(studio, [str(tmp_path / "inns.zip")] * 2, "starter", "", "")
    assert [one.spec for one in two] == [run.spec] * 2 and two[0].id != two[1].id and "from their capsules" in words
    assert len(studio.runs.list()) == count + 2


def test_of_two_capsules_one_of_which_is_damaged_none_is_restored(run, studio, tmp_path):
    whole = capsule.write(run, tmp_path / "inns.zip")
    with zipfile.ZipFile(whole) as packed, zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        for name in packed.namelist():
            other.writestr(name, packed.read(name) if name != "spec.json" else b"{}")
    before = len(studio.runs.list())
    with pytest.raises(LoRAError, match=r"spec\.json is not what capsule\.json says it is. Nothing was restored"):
        home.bring_in(studio, [str(whole), str(tmp_path / "other.zip")], "starter", "", "")
    assert len(studio.runs.list()) == before


def test_two_runs_beside_each_other_say_what_differs_and_how_it_went(write_run):
    def made(name, **settings):
        spec = RunSpec(name, lora=LoRAConfig(r=settings.pop("r", 8), alpha=16), train=TrainConfig(**settings))
        return write_run([Step(1, 3.0, 1e-3, 0.5, 9, 9, 0.5, 9), Evaluated(1, settings["seed"] / 8, 9, 0.5)], spec)

    first, second = made("<b>One", seed=1, learning_rate=3e-4), made("Two", seed=2, learning_rate=3e-4, r=4)
    assert beside.differences(first, second) == [("r", "8", "4"), ("seed", "1", "2")]
    assert beside.differences(first, first) == []
    in_full = write_run([], dataclasses.replace(first.spec, method=MethodConfig(method="full")))
    assert beside.differences(first, in_full) == [("method", "lora", "full")]
    page = beside.view(first, second)
    assert "0.1250</td><td>0.2500" in page and "learning_rate" not in page
    assert "&lt;b&gt;One (1)" in page and "<b>One" not in page
    assert "held-out (2) <b>0.25" in page


@pytest.mark.parametrize(
    ("paths", "model", "words"),
    [
        ([], "starter", r"`file` \(=nothing\) must be dropped first"),
        (["a.bin", "b.bin"], "starter", "Of several files, they must be"),
        (["a.bin"], "/etc", "must lie in .* to be opened from the page"),
        (["a.bin"], "starter", "must be a folder or file that exists"),
    ],
)
def test_what_cannot_be_brought_in_is_said(studio, tmp_path, paths, model, words):
    with pytest.raises(LoRAError, match=words):
        home.bring_in(studio, [str(tmp_path / path) for path in paths], model, "", "")


def test_a_scaling_that_is_no_number_is_said(run, studio):
    with pytest.raises(LoRAError, match=r"`alpha / r` \(='two'\) must be a number"):
        home.bring_in(studio, [str(run.adapter_folder / "adapter_config.json")], run.spec.model, "two", "")


@pytest.fixture
def command(run, capsys):
    """command(*words): runs them in this process; returns exit code, out and err."""

    def call(*words):
        code = cli.main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_the_commands_take_a_run_home_and_bring_it_back(run, command, tmp_path, quick, workspace):
    code, out, err = command("export", run.id, tmp_path / "adapter")
    assert code == 0 and "Sound: Adapter, a PEFT folder" in out and "Loading the model …" in err
    code, out, _ = command("certificate", run.id, "--json")
    assert code == 0 and Report.from_dict(json.loads(out)) == capsule.certificate_of(run)
    assert command("capsule", run.id, tmp_path / "inns.zip")[:2] == (0, f"Written: {tmp_path / 'inns.zip'}\n")
    code, out, _ = command("restore", tmp_path / "inns.zip", "--json")
    assert code == 0 and json.loads(out)["id"].startswith(run.id)
    code, out, _ = command("import", tmp_path / "adapter", "--model", run.spec.model, "--name", "Mine")
    assert code == 0 and out.endswith(": Mine\n")
    assert len(Runs(workspace).list()) == 3
    code, _, err = command("import", tmp_path / "inns.zip")
    assert code == 2 and "it is a capsule: lora-studio restore it" in err
    code, _, err = command("export", run.id, tmp_path / "adapter")
    assert code == 2 and "must not exist" in err


def test_places_that_cannot_be_written_are_said(run, workspace, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LoRAError, match="`OUT` .* could not be written"):
        list(export.make(run, workspace, Choice("adapter"), tmp_path / "file" / "out"))
    with pytest.raises(LoRAError, match="`FILE` .* could not be written"):
        capsule.write(run, tmp_path / "nowhere" / "a.zip")
    (run.folder / "exports").touch()
    with pytest.raises(LoRAError, match="exports.* could not be written"):
        export_jobs.start(run, Choice("adapter"))


def test_what_gguf_has_no_name_for_is_said(run, workspace, tmp_path):
    config = models.load_model(run.spec.model, workspace).config
    with pytest.raises(LoRAError, match="`model.nonsense` must have a name in GGUF"):
        gguf_export.Naming.of(config).name("model.nonsense")
    adapter = Adapter.load(run.adapter_folder)
    gguf_export.write_adapter(tmp_path / "a.gguf", adapter, config, "f32", "a")
    some = dict(list(adapter.factors.items())[:1])
    with pytest.raises(LoRAError, match="must hold the adapter's matrices and no others"):
        gguf_export.read_adapter(tmp_path / "a.gguf", config, some)


def test_an_export_that_cannot_be_opened_again_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(reload, "PEFT_PROGRAM", "raise SystemExit('it is broken')")
    task = reload.Task("peft", "", "", "", "", "float32", "", [], str(tmp_path / "out"))
    with pytest.raises(LoRAError, match="could not be opened again: it is broken"):
        reload.reopen(task, lambda process: None)


def test_an_adapter_that_peft_cannot_open_is_red_and_may_be_written_all_the_same(run, workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(reload, "PEFT_PROGRAM", "raise SystemExit('it is too old')")
    monkeypatch.setattr(export._Making, "_ways_back", lambda self: ["peft"])
    with pytest.raises(LoRAError, match="PEFT .* cannot open it: .*it is too old"):
        list(export.make(run, workspace, Choice("adapter"), tmp_path / "out"))
    *_, report = export.make(run, workspace, Choice("adapter", force=True), tmp_path / "out")
    assert report.is_forced
    assert Report.from_dict(json.loads((tmp_path / "out" / "certificate.json").read_text())).problems == report.problems


def test_large_models_are_compared_in_their_own_type(run, workspace):
    info = dataclasses.replace(models.describe(run.spec.model, workspace), dtype="bfloat16")
    large = dataclasses.replace(info, num_parameters=7 * 10**9)
    assert [certificate.reference_dtype(one) for one in (info, large)] == [torch.float32, torch.bfloat16]
    assert certificate.own_dtype(dataclasses.replace(info, dtype="Q4_1")) == torch.bfloat16


def test_a_model_card_brings_no_markup_along(run, workspace):
    report = Report(run.id, "x", 0, 0, "", ())
    info = models.describe(run.spec.model, workspace)
    adapter = Adapter.load(run.adapter_folder)
    text = model_card.model_card(run, info, adapter, report, merged=True)
    assert "# &lt;b>Inns&lt;/b>" in text and "AutoModelForCausalLM.from_pretrained" in text
    (run.folder / "imported").touch()
    assert "it was imported" in model_card.model_card(run, info, adapter, report, merged=False)
