"""The journey without a browser, with the real starter model on real rows."""

import json
import re
import subprocess
import sys

import pytest

from core import Adapter
from studio.runs import Runs
from studio.workspace import Workspace

STEPS = 8


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "studio", "demo", "--steps", str(STEPS), "--workspace", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_the_demo_lowers_the_held_out_loss_and_prints_it(demo):
    losses = [float(x) for x in re.findall(r"held-out loss ([\d.]+)", demo[1])]
    assert len(losses) >= 3
    assert losses[-1] < losses[0] - 0.5


def test_the_demo_shows_three_answers_before_and_after_that_differ(demo):
    before = re.findall(r"^Base +(.+)$", demo[1], flags=re.M)
    after = re.findall(r"^Adapter +(.+)$", demo[1], flags=re.M)
    assert len(before) == len(after) == 3
    assert all(b != a for b, a in zip(before, after, strict=True))
    assert len(set(re.findall(r"^Prompt +(.+?)^Base", demo[1], flags=re.M | re.S))) == 3


def test_the_demo_leaves_an_adapter_and_figures_and_says_how_to_open_them(demo):
    folder, printed = demo
    (run,) = Runs(Workspace(folder)).list()
    assert run.status == "finished"
    assert Adapter.load(run.adapter_folder).num_parameters == 2_442_240
    assert {p.name for p in (run.folder / "figures").iterdir()} == {"loss.png", "effective-rank.png", "spectra.png"}
    assert f"lora-studio serve --workspace {folder} --run-id {run.id}" in printed


@pytest.mark.slow
def test_the_same_spec_gives_the_same_losses_again_through_the_train_command(demo):
    folder, _ = demo
    (run,) = Runs(Workspace(folder)).list()
    command = [
        sys.executable,
        "-m",
        "studio",
        "train",
        str(run.folder / "spec.json"),
        "--json",
        "--workspace",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    run.log.refresh()
    assert [e["loss"] for e in events if e["event"] == "Step"] == [s.loss for s in run.log.steps]
    assert [e["step"] for e in events if e["event"] == "Step"] == list(range(1, STEPS + 1))
