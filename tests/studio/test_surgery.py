"""Rank surgery and the time machine: what they keep and say, beside dense matrices and the run's own log."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from core import (
    Adapter,
    Evaluated,
    Factors,
    LoRAConfig,
    LoRAError,
    SpectrumMeasured,
    Started,
    Step,
    TrainConfig,
    inject,
    spectrum,
    truncate,
)
from studio import models, surgery
from studio.data import DataSpec
from studio.measuring import Bench, Measured, Measuring
from studio.opened import Opened, Source
from studio.state import Studio
from studio.surgery import CHANCE, CURVES, POOLED, STRONGEST, Cut
from studio.tabs.spectrum import operating, past

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


@pytest.fixture
def adapter() -> Adapter:
    generator = torch.Generator().manual_seed(0)
    factors = {
        path: Factors(torch.randn(4, 12, generator=generator), size * torch.randn(10, 4, generator=generator), 2.0)
        for path, size in zip(PATHS, (0.1, 1.0), strict=True)
    }
    return Adapter(LoRAConfig(r=4, target_modules=("q_proj",)), factors, "starter")


@pytest.fixture
def opened(adapter) -> Opened:
    return Opened(Source(path="x"), "Inns", adapter, None, None, 0)


def dense(adapter: Adapter, path: str) -> torch.Tensor:
    f = adapter.factors[path]
    return f.scaling * f.B.double() @ f.A.double()


@pytest.mark.parametrize(
    "cut",
    [
        Cut("rank", 2),
        Cut("energy", energy=0.6),
        Cut("rank", 1, pooled=True),
        Cut("chosen", path=PATHS[0], chosen=(0, 3)),
    ],
    ids=lambda cut: cut.title,
)
def test_what_a_cut_says_is_kept_is_so_of_the_dense_matrices(cut, adapter, opened):
    made = cut.of(adapter)
    error = whole = 0.0
    for path in PATHS:
        left = dense(made.adapter, path) if path in made.adapter.factors else torch.zeros(10, 12)
        error += float((dense(adapter, path) - left).square().sum())
        whole += float(dense(adapter, path).square().sum())
    assert made.relative_error == pytest.approx(math.sqrt(error / whole), rel=1e-5)
    said = operating.cut_facts(opened, made, cut)
    assert f"{100 * (1 - error / whole):.2f} %" in said
    assert f"{sum(made.ranks.values())} of 8" in said
    assert surgery.num_bytes(made.adapter) == 4 * 22 * sum(made.ranks.values())


def test_a_matrix_that_loses_all_its_directions_is_said(adapter, opened):
    made = Cut("rank", 1, pooled=True).of(adapter)  # two directions, both of the loud matrix
    assert PATHS[0] not in made.adapter.factors
    assert "1 matrices keep nothing" in operating.cut_facts(opened, made, Cut("rank", 1, pooled=True))


def test_the_form_says_a_cut():
    assert operating.parse("q", "rank", 3, 90, True, None) == Cut("rank", 3, 0.9, True, "q")
    assert operating.parse("q", "chosen", 3, 90, True, [2, 0]) == Cut("chosen", 3, 0.9, False, "q", (0, 2))
    assert Cut("chosen", path="q", chosen=(0, 2)).title == "directions 1, 3 of q"


def test_curves_stop_below_the_whole_and_chance_keeps_random_directions(adapter):
    found = {path: spectrum(f) for path, f in adapter.factors.items()}
    assert surgery.curve_ranks(found) == [1, 2, 3]
    for kind in CURVES:
        made = surgery.curve(adapter, kind, [1, 3])
        assert made.keys() == {1, 3}
    strongest, pooled = (surgery.curve(adapter, kind, [2])[2] for kind in (STRONGEST, POOLED))
    assert torch.equal(strongest.factors[PATHS[0]].A, truncate(adapter, rank=2).adapter.factors[PATHS[0]].A)
    assert sum(f.r for f in pooled.factors.values()) == 4 and pooled.factors[PATHS[1]].r > 2
    few, more = surgery.curve(adapter, CHANCE, [1, 2]).values()
    for path in PATHS:
        sigma = spectrum(few.factors[path]).sigma[0]
        assert float((spectrum(more.factors[path]).sigma - sigma).abs().min()) < 1e-5 * float(sigma)  # nested
        assert {1, 2} == {few.factors[path].r, more.factors[path].r}


def test_a_saved_adapter_lies_in_a_folder_of_its_own_and_none_is_overwritten(adapter, workspace):
    less = Cut("rank", 2).of(adapter).adapter
    folder = surgery.save(less, " Inns, rank 2 ", workspace)
    assert folder == workspace.root / "adapters" / "Inns-rank-2"
    read = Adapter.load(folder)
    assert all(torch.allclose(dense(read, path), dense(less, path), atol=1e-6) for path in PATHS)
    before = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(LoRAError, match="`Name` .* is taken by .*Inns-rank-2; choose another one"):
        surgery.save(adapter, "Inns rank 2", workspace)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == ["Inns-rank-2"]
    for name in ("", "../..", " -"):
        with pytest.raises(LoRAError, match="`Name` .* must hold a letter or a digit"):
            surgery.save(adapter, name, workspace)


def test_a_folder_that_cannot_be_written_is_said(adapter, workspace):
    (workspace.root / "adapters").write_text("a file")
    with pytest.raises(LoRAError, match="could not be written .* free some space"):
        surgery.save(adapter, "x", workspace)


def test_measured_losses_become_curves_that_end_at_the_base_and_the_whole():
    def of(task, general):
        return Measured("x", task, general, 5, 70)

    found = {
        (operating.BASE, 0): of(3.0, 2.0),
        (operating.FULL, 4): of(1.0, 2.5),
        (STRONGEST, 1): of(1.5, 2.25),
        (CHANCE, 1): of(2.5, 2.1),
    }
    picture = operating.loss_picture(found, 4)
    lines = {line.get_label(): line for line in picture.figure.axes[0].lines}
    assert lines[STRONGEST].get_xdata().tolist() == [0, 1, 4]
    assert lines[STRONGEST].get_ydata().tolist() == [3.0, 1.5, 1.0]
    assert lines[CHANCE].get_ydata().tolist() == [3.0, 2.5, 1.0]
    assert {"base model", "whole adapter"} == {text.get_text() for text in picture.figure.axes[0].texts}
    assert POOLED not in lines
    assert "general text" in picture.figure.axes[1].get_ylabel()
    without_rows = {key: replace(m, task_loss=None, num_rows=0) for key, m in found.items()}
    assert len(operating.loss_picture(without_rows, 4).figure.axes) == 1
    assert "–" in operating.measured_facts({"base model": replace(of(1, 2), task_loss=None)})
    assert "Nothing is measured" in operating.loss_picture({}, 4).page()


def test_without_its_base_model_nothing_can_be_measured(opened):
    with pytest.raises(LoRAError, match="The base model must be at hand to measure a loss"):
        operating.bench_of(opened)
    assert operating.bench_of(replace(opened, model="starter")).data is None


@pytest.mark.slow
def test_a_cut_of_an_adapter_on_the_starter_model_is_measured(workspace):
    model = models.load_model("starter", workspace)
    inject(model, LoRAConfig(r=2, target_modules=("q_proj", "v_proj"), layers="26-"))
    generator = torch.Generator().manual_seed(0)
    whole = Adapter.from_model(model, base_model="starter")
    factors = {
        path: replace(f, B=0.1 * torch.randn(f.B.shape, generator=generator)) for path, f in whole.factors.items()
    }
    whole = replace(whole, factors=factors)
    rows = DataSpec(source="starter:tickets", layout="pair", prompt="request", completion="ticket")
    bench = Bench("starter", rows, TrainConfig(max_length=96, device="cpu", precision="fp32"))
    asked = {"base": None, "whole": whole, "k = 2": truncate(whole, rank=2).adapter, "k = 1": Cut().of(whole).adapter}
    found = {m.name: m for m in Measuring(workspace, bench, asked) if isinstance(m, Measured)}
    assert found["k = 2"].task_loss == pytest.approx(found["whole"].task_loss, abs=1e-4)
    assert found["k = 2"].general_loss == pytest.approx(found["whole"].general_loss, abs=1e-4)
    assert abs(found["k = 1"].task_loss - found["whole"].task_loss) > 1e-3
    assert found["base"].num_rows == 44
    assert 2 < found["base"].general_loss < 4.5  # plain English, to a model that was trained on it


# The time machine.


@pytest.fixture
def studio(workspace) -> Studio:
    return Studio(workspace)


@pytest.fixture
def run(write_run, adapter):
    def step(number: int) -> Step:
        return Step(number, 2.0 / number, 1e-3, 0.5, 9, 5, 0.1, 1)

    events = [Started(6, 1, 1, "cpu", "float32", "memory"), Evaluated(0, 3.0, 5, 0.1)]
    for number in range(1, 7):
        if number in (2, 4):
            events.append(SpectrumMeasured(number, {path: [0.5 * number, 0.25] for path in PATHS}))
        events.append(step(number))
    made = write_run([*events, Evaluated(4, 1.5, 5, 0.1)])
    adapter.save(made.adapter_folder)
    adapter.save(made.checkpoints.at(6))
    (made.checkpoints.at(6) / "training.safetensors").write_bytes(b"")
    return made


def test_stops_are_the_measured_steps_and_those_of_checkpoints(run, studio, adapter):
    assert past.stops_of(run) == [2, 4, 6]
    assert past.sigma_at(run, PATHS[0], 4, studio).tolist() == [2.0, 0.25]
    exact = spectrum(adapter.factors[PATHS[0]]).sigma.numpy()
    assert past.sigma_at(run, PATHS[0], 6, studio) == pytest.approx(exact)
    assert past.sigma_at(run, "nowhere", 6, studio) is None and past.sigma_at(run, PATHS[0], 5, studio) is None


def test_a_step_s_facts_are_the_log_s_and_say_whether_it_can_be_asked(run):
    past.stops_of(run)
    said = past.facts_at(run, PATHS[0], 4, np.array([2.0, 0.25]))
    for word in ("0.5000", "1.5000", "2.016", "only the singular values were kept; steps with all factors: 6"):
        assert word in said
    assert "can be asked below" in past.facts_at(run, PATHS[0], 6, None)


def test_the_marks_stand_where_the_charts_have_their_steps(run, studio):
    opened = studio.opened(Source(run.id))
    past.stops_of(run)
    picture, marks = past.course(opened, run, PATHS[0], studio)
    assert [m[0] for m in marks] == [2, 4, 6]
    steps = {round(step, 3): x for step, x, _, _ in marks}
    assert steps[4] == pytest.approx((steps[2] + steps[6]) / 2, abs=0.02)
    width, height = (72 * size for size in picture.figure.get_size_inches())
    assert 0 < steps[2] < steps[6] <= width and 0 < marks[0][2] < marks[0][3] < height
    lines = {line.get_label(): line for line in picture.figure.axes[1].lines}
    assert lines["σ₁ and the others"].get_ydata().tolist() == [1.0, 2.0]
    ratio = lines["σ₁ of chance, same ‖ΔW‖"].get_ydata() / np.hypot([1.0, 2.0], 0.25)
    assert ratio[0] == pytest.approx(ratio[1]) and 0.5 < ratio[0] < 1  # the same share of ‖ΔW‖ at each step
    assert json.loads(json.dumps(marks)) == marks
    assert {type(number) for mark in marks for number in mark} == {int, float}  # as the page's JSON needs them


def test_effective_rank_of_numbers_is_that_of_the_spectrum(adapter):
    found = spectrum(adapter.factors[PATHS[0]])
    assert past.effective_rank_of(found.sigma.numpy()) == pytest.approx(found.effective_rank)
    assert past.effective_rank_of(np.zeros(3)) == 0
