"""The spectra of a run as arrays, beside the events that they came from."""

import math

import numpy as np
import pytest

from core import SpectrumMeasured
from studio.event_log import EventLog, EventWriter
from studio.spectra import Spectra
from studio.tabs.train import SPECTRUM, charts

EVENTS = [
    SpectrumMeasured(5, {"q": [0.5, 0.25, 0.0], "v": [2.0]}),
    SpectrumMeasured(10, {"q": [0.75, 0.5, 0.125], "v": [0.0]}),
    SpectrumMeasured(12, {"v": [1.0, 1.0]}),  # a run that went on with fewer matrices
]


@pytest.fixture
def spectra() -> Spectra:
    made = Spectra()
    for event in EVENTS:
        made.append(event)
    return made


def test_each_matrix_s_sigma_are_those_of_the_events(spectra):
    assert spectra.steps.tolist() == [5, 10, 12] and spectra.paths == ("v",)
    assert np.array_equal(spectra.sigma("q"), [[0.5, 0.25, 0], [0.75, 0.5, 0.125], [np.nan] * 3], equal_nan=True)
    assert np.array_equal(spectra.sigma("v"), [[2, np.nan], [0, np.nan], [1, 1]], equal_nan=True)
    assert spectra.sigma("k").shape == (3, 0)


def test_effective_ranks_and_means_are_those_of_the_events(spectra):
    for place, event in enumerate(EVENTS):
        for path, rank in event.effective_rank.items():
            assert spectra.effective_rank(path)[place] == pytest.approx(rank)
        largest = [sigma[0] for sigma in event.sigma.values()]
        assert spectra.means()[place] == pytest.approx([np.mean(largest), np.mean([*event.effective_rank.values()])])
    assert math.isnan(spectra.effective_rank("q")[2])


def test_what_is_not_finite_stays_so_and_spoils_no_other_matrix():
    made = Spectra()
    made.append(SpectrumMeasured(1, {"q": [math.nan, math.nan], "v": [3.0]}))
    assert math.isnan(made.effective_rank("q")[0]) and made.effective_rank("v")[0] == 1
    assert np.isnan(made.means()).all()


@pytest.mark.parametrize("sigma", [{}, {"q": []}])
def test_an_event_without_numbers_is_left_out(sigma):
    made = Spectra()
    made.append(SpectrumMeasured(1, sigma))
    assert len(made) == 0 and made.means().shape == (0, 2) and made.paths == ()


def test_the_log_keeps_them_and_the_train_tab_draws_them(tmp_path, spectra):
    log = EventLog(tmp_path / "events.jsonl")
    writer = EventWriter(log)
    for event in EVENTS:
        writer.write(event)
    writer.close()
    assert not any(title in charts(log) for title in SPECTRUM)
    log.read()
    assert np.array_equal(log.spectra.means(), spectra.means())
    assert all(title in charts(log) for title in SPECTRUM)
    log.cut_back(11, is_evaluated=True)
    log.read()
    assert log.spectra.steps.tolist() == [5, 10]


def test_half_a_spectrum_that_a_crash_left_is_taken_out_whatever_its_length(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    long = SpectrumMeasured(5, {f"layer {i}": [0.1234] * 64 for i in range(3000)})
    for _ in range(2):
        writer = EventWriter(log)
        writer.write(long)
        writer.close()
        with log.path.open("rb+") as file:
            file.truncate(log.path.stat().st_size - 9)
        assert log.path.stat().st_size > 1_500_000
    writer = EventWriter(log)
    writer.write(long)
    writer.close()
    log.read()
    assert log.spectra.steps.tolist() == [5]
