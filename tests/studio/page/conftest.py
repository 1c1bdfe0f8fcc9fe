"""The page, built once, over a workspace that is empty for each test; and a run with an adapter."""

import gradio as gr
import pytest
import torch

from core import (
    Adapter,
    LoRAConfig,
    TrainConfig,
    inject,
    lora_layers,
)
from studio import models
from studio.runs import Run
from studio.specs import RunSpec
from studio.state import Studio
from studio.workspace import Workspace
from tests.studio.page.pages import STARTED, STEP, build


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> tuple[Studio, gr.Blocks]:
    studio = Studio(Workspace(tmp_path_factory.mktemp("empty")))
    return studio, build(studio)


@pytest.fixture
def studio(built, workspace, tmp_path_factory) -> Studio:
    """As after a start with an empty workspace and --allow-path; the page, which takes long to build, is built once."""
    built[0].__init__(workspace, [tmp_path_factory.getbasetemp()])
    return built[0]


@pytest.fixture
def page(built, studio) -> gr.Blocks:
    return built[1]


@pytest.fixture
def damage(write_run):
    """Spoils a run; called before the page is built."""

    def spoil(what: str) -> Run:
        run = write_run([STARTED], RunSpec(name="Zebra"))
        (run.folder / what).write_text("{\n")
        return run

    return spoil


@pytest.fixture
def trained(write_run, studio, tiny_folder, tiny_data) -> Run:
    model = models.load_model(str(tiny_folder), studio.workspace)
    config = LoRAConfig(r=2, target_modules=("q_proj", "down_proj"))
    inject(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=generator))
    spec = RunSpec("Inns", str(tiny_folder), tiny_data, config, TrainConfig(device="cpu", precision="fp32"))
    run = write_run([STARTED, STEP], spec)
    Adapter.from_model(model, base_model=spec.model).save(run.adapter_folder)
    return run
