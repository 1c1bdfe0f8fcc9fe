"""What the Spectrum tab looks at: any adapter, from a run, a checkpoint or files, and its base model where it is."""

import os
import shutil

import pytest
import torch

from core import Adapter, AdapterFileError, Checkpoint, Factors, LoRAConfig, LoRAError
from studio.opened import Source, read_matrix
from studio.specs import RunSpec
from studio.state import Studio
from studio.tabs.spectrum import chooser

PATH = "model.layers.0.self_attn.q_proj"


def adapter(size: float = 1.0, base_model: str | None = None) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 32, generator=generator), size * torch.randn(32, 2, generator=generator)
    return Adapter(LoRAConfig(r=2, target_modules=(PATH,)), {PATH: Factors(A, B, 1.0)}, base_model)


@pytest.fixture
def studio(workspace, tmp_path):
    return Studio(workspace, [tmp_path])


def test_a_checkpoint_of_a_run_is_opened_by_its_step(studio, write_run, tiny_folder):
    run = write_run((), RunSpec("Inns", str(tiny_folder)))
    adapter().save(run.adapter_folder)
    run.checkpoints.save(Checkpoint(10, 10, (), {}), run.adapter_folder)
    adapter(3.0).save(run.adapter_folder)
    last, early = (studio.opened(Source(run.id, step)) for step in (None, 10))
    assert (last.name, early.name) == ("Inns", "Inns, step 10")
    assert studio.spectra(last)[PATH][1].norm == pytest.approx(3 * studio.spectra(early)[PATH][1].norm)


def test_a_folder_is_opened_with_the_base_model_that_it_names_where_that_is_here(studio, tmp_path, tiny_folder):
    shutil.copytree(tiny_folder, tmp_path / "base")
    adapter(base_model=str(tmp_path / "base")).save(tmp_path / "mine")
    opened = studio.opened(Source(path=str(tmp_path / "mine")))
    assert (opened.name, opened.model) == ("mine", str(tmp_path / "base"))
    W = studio.weight(opened, PATH)
    assert torch.equal(W, read_matrix(str(tiny_folder), studio.workspace, PATH)) and W.shape == (32, 32)


@pytest.mark.parametrize("named", ["roberta-base", None, "/elsewhere/model"])
def test_nothing_is_fetched_or_opened_for_a_base_model_that_files_name(studio, tmp_path, named):
    adapter(base_model=named).save(tmp_path / "mine")
    opened = studio.opened(Source(path=str(tmp_path / "mine")))
    assert opened.model is None
    with pytest.raises(LoRAError, match="W must be at hand for this, and the base model"):
        studio.weight(opened, PATH)
    assert "only ΔW itself can be looked at" in chooser.about(opened)


def test_a_base_model_that_does_not_fit_is_refused(studio, tmp_path, tiny_folder):
    shutil.copytree(tiny_folder, tmp_path / "base")
    other = Adapter(LoRAConfig(r=1), {"model.layers.9.q_proj": Factors(torch.ones(1, 4), torch.ones(4, 1), 1.0)})
    other.save(tmp_path / "other")
    with pytest.raises(AdapterFileError, match=r"model.layers.9.q_proj does not exist"):
        studio.opened(Source(path=str(tmp_path / "other"), model=str(tmp_path / "base")))


def test_a_loralib_file_needs_its_scaling(studio, tmp_path):
    file = tmp_path / "old.bin"
    torch.save({f"{PATH}.lora_A": torch.ones(2, 32), f"{PATH}.lora_B": torch.ones(32, 2)}, file)
    with pytest.raises(AdapterFileError, match=r"`scaling` \(=None\) must be given for old.bin"):
        studio.opened(Source(path=str(file)))
    opened = studio.opened(Source(path=str(file), scaling=2.0))
    assert opened.adapter.factors[PATH].scaling == 2.0


def test_files_elsewhere_are_not_opened_from_the_page(workspace, tmp_path_factory):
    place = tmp_path_factory.mktemp("private")
    adapter().save(place)
    with pytest.raises(LoRAError, match=r"`adapter` \(=.*must lie in .* to be opened from the page"):
        Studio(workspace).opened(Source(path=str(place)))


def test_what_changed_on_disk_is_read_anew_and_what_did_not_is_kept(studio, tmp_path):
    adapter().save(tmp_path / "mine")
    source = Source(path=str(tmp_path / "mine"))
    first = studio.opened(source)
    assert studio.opened(source) is first and studio.spectra(first) is studio.spectra(first)
    adapter(2.0).save(tmp_path / "mine")
    os.utime(tmp_path / "mine" / "adapter_model.safetensors", ns=(1, 1))
    second = studio.opened(source)
    assert second.key != first.key
    assert studio.spectra(second)[PATH][1].norm == pytest.approx(2 * studio.spectra(first)[PATH][1].norm)


def test_the_form_says_what_is_opened_and_uploads_get_folders_of_their_own(tmp_path):
    assert chooser.parse(" a ", 2, "q, v", " starter ") == Source(
        path="a", scaling=2, parts=("q", "v"), model="starter"
    )
    with pytest.raises(LoRAError, match=r"`adapter` \(=''\) must be a folder or a file"):
        chooser.parse(" ", None, "", "")
    places = set()
    for _ in range(2):
        files = [tmp_path / name for name in ("adapter_config.json", "adapter_model.safetensors")]
        for file in files:
            file.write_text("x")
        places.add(chooser.keep_upload([str(file) for file in files], tmp_path / "kept"))
        assert not any(file.exists() for file in files)
    assert len(places) == 2 and all(len(list(place.iterdir())) == 2 for place in places)
    (tmp_path / "old.bin").write_text("x")
    assert chooser.keep_upload([str(tmp_path / "old.bin")], tmp_path / "kept").name == "old.bin"
