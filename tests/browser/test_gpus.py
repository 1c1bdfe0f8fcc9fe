"""The choice of several GPUs, in a real browser; torch reports three, as this machine need not have one."""

import pytest

from studio.runs import Runs
from studio.workspace import Workspace

WAIT = 240_000  # milliseconds, on a busy machine
THREE_GPUS = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 3
torch.cuda.get_device_name = lambda i: f"GPU {i}"
torch.cuda.mem_get_info = lambda i: (i * 10**9, 8 * 10**9)
"""


@pytest.mark.slow
def test_ticked_gpus_become_the_device_of_the_run(server_after, workspace_folder, browser):
    server = server_after(THREE_GPUS)
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.goto(f"{server.url}?tab=model")
    page.wait_for_selector("text=134,515,008", timeout=WAIT)
    page.get_by_role("tab", name="Train", exact=True).first.click()
    ticks = page.locator("#gpus input")
    ticks.nth(2).wait_for(timeout=WAIT)
    said = page.locator("#gpus label").all_inner_texts()
    assert [f"cuda:{i} · GPU {i} · {i}.0 of 8.0 GB free" in words for i, words in enumerate(said)] == [True] * 3

    def device_is(name):
        page.wait_for_function(
            "name => [...document.querySelectorAll('#setting-device :is(input, textarea)')].some(e => e.value == name)",
            arg=name,
            timeout=WAIT,
        )

    page.get_by_role("button", name="More").last.click()
    ticks.nth(2).check()
    device_is("cuda:2")
    ticks.nth(0).check()
    device_is("cuda:0,cuda:2")
    page.locator("#start").click()
    page.wait_for_function("document.querySelector('#status').innerText.includes('My first adapter')", timeout=WAIT)
    (run,) = Runs(Workspace(workspace_folder)).list()
    assert run.spec.train.device == "cuda:0,cuda:2"
    page.wait_for_selector("#status >> text=must be one that this machine has", timeout=WAIT)  # the worker looks itself
    ticks.nth(0).uncheck()
    ticks.nth(2).uncheck()
    device_is("auto")
    context.close()
