"""An adapter is taken home and brought in again, in a real browser."""

import shutil
import zipfile

import pytest
import torch

from core import Adapter, Finished, LoRAConfig, inject, lora_layers
from studio import models
from studio.runs import Runs
from studio.specs import RunSpec
from studio.workspace import Workspace
from tests.studio.ggufs import write_gguf

WAIT = 240_000  # milliseconds, on a busy machine


@pytest.fixture
def untrained(workspace_folder):
    """A run whose adapter still changes nothing, on a model that pages may open."""
    workspace = Workspace(workspace_folder)
    spec = RunSpec("Inns", str(write_gguf(workspace_folder / "tiny.gguf")), lora=LoRAConfig(target_modules=("q_proj",)))
    model = models.load_model(spec.model, workspace)
    inject(model, spec.lora)
    run = Runs(workspace).create(spec)
    (run.folder / "imported").write_text("elsewhere")
    Adapter.from_model(model, base_model=spec.model).save(run.adapter_folder)
    run.tell(Finished(0, "done", 0))
    return run


@pytest.mark.slow
def test_a_red_certificate_stops_an_export_until_a_tick_and_two_capsules_are_compared(
    untrained, server, browser, tmp_path
):
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.goto(f"{server.url}?run={untrained.id}")
    page.get_by_role("tab", name="Take home", exact=True).first.click(timeout=WAIT)
    page.wait_for_selector("#exports >> text=was not exported yet", timeout=WAIT)
    page.locator("#export-start").click()
    page.wait_for_selector("#exports >> text=The adapter changes nothing", timeout=WAIT)
    assert "✗ Not sound" in page.locator("#exports").inner_text()
    assert page.locator("#export-pack").is_disabled()

    page.locator("#export-force input").check()
    page.locator("#export-start").click()
    page.wait_for_selector("#exports >> text=written all the same", timeout=WAIT)
    page.locator("#export-pack:not([disabled])").click(timeout=WAIT)
    with page.expect_download(timeout=WAIT) as downloaded:
        page.locator("#export-links a").click(timeout=WAIT)
    downloaded.value.save_as(tmp_path / "adapter.zip")
    assert "certificate.json" in zipfile.ZipFile(tmp_path / "adapter.zip").namelist()

    model = models.load_model(untrained.spec.model, Workspace(server.workspace))
    Adapter.load(untrained.adapter_folder).apply(model)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.05)
    Adapter.from_model(model, base_model=untrained.spec.model).save(untrained.adapter_folder)  # now it is trained
    page.locator("#export-force input").uncheck()
    page.locator("#export-start").click()
    page.wait_for_selector("#exports >> text=✓ Sound", timeout=WAIT)

    page.locator("#capsule").click()
    with page.expect_download(timeout=WAIT) as downloaded:
        page.locator("#export-links a[download*=capsule]").click(timeout=WAIT)
    downloaded.value.save_as(tmp_path / "capsule.zip")
    shutil.copy(tmp_path / "capsule.zip", tmp_path / "other.zip")
    page.locator("#import-file input[type=file]").set_input_files([tmp_path / "capsule.zip", tmp_path / "other.zip"])
    page.wait_for_selector("#import-file >> text=other", timeout=WAIT)
    page.locator("#import").click()
    page.wait_for_selector("#import-said >> text=from their capsules", timeout=WAIT)
    assert len(Runs(Workspace(server.workspace)).list()) == 3
    page.locator("#compare-pair").click(timeout=WAIT)
    page.wait_for_selector("#compare-facts >> text=Cosine of the updates", timeout=WAIT)
    page.close()
