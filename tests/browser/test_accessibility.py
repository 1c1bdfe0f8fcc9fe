"""Nobody is kept out by anything that can be unfolded, at any width, light and dark, as far as axe-core finds it."""

import pytest
import torch

from core import Adapter, Finished, LoRAConfig, Started, Step, TrainConfig, inject, lora_layers
from studio import models
from studio.event_log import EventWriter
from studio.runs import Runs
from studio.specs import RunSpec
from studio.workspace import Workspace
from tests.browser.axe import barriers
from tests.studio.ggufs import write_gguf

WAIT = 240_000  # milliseconds, on a busy machine
TABS = ("start", "model", "data", "train", "chat", "runs", "home")
SECTIONS = ("overview", "matrix", "past", "reading", "compare", "operating", "intruders")

OPEN_ALL = """() => {
    const folded = [...document.querySelectorAll('button.label-wrap:not(.open)')];
    for (const button of folded.filter((one) => one.offsetParent)) button.click();
    for (const details of document.querySelectorAll('details')) details.open = true;
}"""
"""Opens every accordion and every part that is folded."""


@pytest.fixture(scope="module")
def runs(workspace_folder):
    """Two finished runs of a tiny model that differ, and one that goes on, as long as the module does."""
    workspace = Workspace(workspace_folder)
    targets = ("q_proj", "down_proj")
    spec = RunSpec(
        "Inns",
        str(write_gguf(workspace_folder / "tiny.gguf")),
        lora=LoRAConfig(r=2, target_modules=targets),
        train=TrainConfig(steps=3, warmup_steps=0, device="cpu"),
    )
    made = []
    for seed in range(3):
        model = models.load_model(spec.model, workspace)
        inject(model, spec.lora)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=generator))
        made.append(run := Runs(workspace).create(spec))
        Adapter.from_model(model, base_model=spec.model).save(run.adapter_folder)
        writer = EventWriter(run.log)
        writer.write(Started(3, 384, 10_000, "cpu", "float32", "resident memory of the process"))
        for step in (1, 2):
            writer.write(Step(step, 2.0 / step, 1e-3, 0.25, 120, 80, step_seconds=60.0, memory_bytes=2 * 10**9))
        if seed < 2:
            writer.write(Finished(2, "done", 2 * 10**9))
        writer.close()
    with made[-1].locked():
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("width", [1440, 390])
def test_nothing_that_can_be_unfolded_keeps_anybody_out(runs, server, browser, width):
    context = browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce")
    found = {}
    for view in (*(f"tab={tab}" for tab in TABS), *(f"tab=spectrum&section={section}" for section in SECTIONS)):
        page = context.new_page()
        run = runs[2 if view == "tab=train" else 0]
        page.goto(f"{server.url}?run={run.id}&{view}")
        page.wait_for_function("document.querySelector('#head-line')?.innerText.includes('free')", timeout=WAIT)
        for _ in range(2):  # what is unfolded may hold more to unfold
            page.wait_for_timeout(3000)
            page.evaluate(OPEN_ALL)
        if view == "tab=model":
            assert r".+\.layers\.[01]\..+q_proj" in page.locator("#pattern").inner_text()
        for is_dark in (False, True):
            page.evaluate("is => document.body.classList.toggle('dark', is)", is_dark)
            if stay := barriers(page):
                found[view, width, "dark" if is_dark else "light"] = stay
        page.close()
    context.close()
    assert found == {}
