"""Singular values from Gram matrices, beside those of a dense float64 ΔW."""

import math
import sys
from typing import Any

import pytest
import torch

from core import Factors, LoRAConfig, SpectrumMeasured, Step, TrainConfig, inject, settings, spectrum, train
from core.grams import quick_sigma
from core.train import MOST_SPECTRA, spectrum_measured


def drawn(out, r, width, *, scaling=2.0, seed=0, dtype=torch.float32) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(r, width, generator=generator).to(dtype),
        torch.randn(out, r, generator=generator).to(dtype),
        scaling,
    )


MIXED = [
    drawn(40, 8, 30),
    drawn(40, 8, 30, seed=1, scaling=0.5),
    drawn(30, 8, 40, seed=2),
    drawn(12, 3, 50, seed=3),
    drawn(3, 8, 40, seed=4),  # r above the rows that it has
    drawn(40, 8, 30, seed=5, dtype=torch.bfloat16),
]


def test_sigma_of_matrices_of_all_shapes_at_once_are_those_of_each_dense_update():
    for f, sigma in zip(MIXED, quick_sigma(MIXED), strict=True):
        dense = f.scaling * f.B.double() @ f.A.double()
        expected = torch.linalg.svdvals(dense)[: min(f.r, *f.shape)]
        assert sigma.shape == expected.shape
        assert torch.allclose(sigma, expected, rtol=1e-9, atol=1e-7 * float(expected[0]))


def test_sigma_stay_exact_to_a_millionth_of_the_largest_where_they_span_far():
    f = drawn(200, 6, 150)
    f = Factors(f.A * torch.logspace(0, -2, 6)[:, None], f.B * torch.logspace(0, -2, 6), 1.0)
    (sigma,), exact = quick_sigma([f]), spectrum(f).sigma
    assert float((sigma - exact).abs().max()) < 1e-6 * float(exact[0])
    assert exact[-1] < 1e-3 * exact[0]


@pytest.mark.parametrize("side", ["A", "B"])
def test_an_update_that_has_not_begun_has_no_sigma(side):
    f = drawn(20, 4, 10)
    f = Factors(f.A * (side != "A"), f.B * (side != "B"), 1.0)
    assert quick_sigma([f])[0].tolist() == [0.0] * 4


def test_a_factor_that_is_not_finite_spoils_its_own_sigma_alone():
    bad = drawn(20, 4, 10)
    bad.B[3, 2] = math.inf
    spoiled, sound = quick_sigma([bad, drawn(20, 4, 10, seed=1)])
    assert spoiled.isnan().all()
    assert torch.allclose(sound, spectrum(drawn(20, 4, 10, seed=1)).sigma)


def test_no_factors_have_no_sigma():
    assert quick_sigma([]) == []


def config(**values: Any) -> TrainConfig:
    usual: dict[str, Any] = {"steps": 7, "warmup_steps": 0, "learning_rate": 0.01, "spectrum_every": 3}
    return TrainConfig(**(usual | values))


@pytest.fixture
def training(build, make_batch):
    def make(lora: dict[str, Any] | None = None, **values: Any):
        model, usual = build("llama"), {"r": 3}
        inject(model, LoRAConfig(**(usual | (lora or {}))))
        batches = [make_batch((3, 6), seed=step) for step in range(7)]
        return model, train(model, batches, config(**values))

    return make


def measured_after(events) -> list[int]:
    return [event.step for event in events if isinstance(event, SpectrumMeasured)]


def test_the_spectrum_is_measured_every_so_many_steps_and_after_the_last(training):
    assert measured_after(training()[1]) == [3, 6, 7]
    assert measured_after(training(spectrum_every=0)[1]) == []
    assert measured_after(training(spectrum_every=50)[1]) == [7]


def test_a_long_run_measures_so_often_at_most(monkeypatch, training):
    monkeypatch.setattr(sys.modules["core.train"], "MOST_SPECTRA", 2)  # `core.train` is the function
    assert measured_after(training(spectrum_every=1)[1]) == [4, 7]
    assert MOST_SPECTRA == 200  # which the setting's help says
    assert "200 times" in next(s.help for s in settings(TrainConfig) if s.name == "spectrum_every")


@pytest.mark.parametrize("lora", [{}, {"init": "pissa"}, {"dora": True}], ids=str)
def test_what_is_measured_is_the_spectrum_of_the_factors_and_comes_before_its_step(lora, training):
    model, events = training(lora)
    last = None
    for event in events:
        if isinstance(event, SpectrumMeasured):
            last = event
            layers = {path: m for path, m in model.named_modules() if hasattr(m, "lora_A")}
            assert event.sigma.keys() == layers.keys()
            for path, layer in layers.items():
                exact = spectrum(layer.factors)
                assert event.sigma[path] == pytest.approx(exact.sigma.tolist(), rel=6e-4, abs=1e-6 * exact.norm)
                assert event.effective_rank[path] == pytest.approx(exact.effective_rank, rel=1e-3)
        elif isinstance(event, Step) and last is not None and event.step % 3 == 0:
            assert last.step == event.step
    assert last is not None


def test_measuring_changes_nothing_of_a_training(training):
    def losses(every):
        return [event.loss for event in training(spectrum_every=every)[1] if isinstance(event, Step)]

    assert losses(1) == losses(0)


def test_of_an_update_that_has_not_begun_the_effective_rank_is_zero(training):
    model, _ = training()
    event = spectrum_measured(model, 0)
    assert {*event.effective_rank.values()} == {0.0}
    assert math.isnan(SpectrumMeasured(1, {"a": [math.nan, math.nan]}).effective_rank["a"])
