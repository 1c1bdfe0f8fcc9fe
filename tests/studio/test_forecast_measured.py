"""The forecast of memory, within a tenth of the most that a process really took for the same settings."""

from pathlib import Path

import pytest

from core import memory_source, resolve_device
from studio.workspace import Workspace
from tests.benchmarks.bench_forecast import LARGE, QUICK, SMALL, Combination, row

MOST_ERROR = 0.10

pytestmark = pytest.mark.skipif(
    memory_source(resolve_device("cpu")) != "resident memory of the process", reason="reads Linux's /proc"
)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Workspace]:
    """Where models that are made lie, and a workspace in which what is measured once stays."""
    folder = tmp_path_factory.mktemp("forecast")
    return folder, Workspace(folder / "workspace")


def agrees(combination: Combination, places: tuple[Path, Workspace]) -> None:
    found = row(combination, *places)
    assert found.measured > found.loading  # so it is the step that is forecast
    assert abs(found.error) <= MOST_ERROR, f"{found.forecast:,} forecast, {found.measured:,} measured"


@pytest.mark.parametrize("combination", QUICK[:1], ids=lambda c: c.name)
def test_the_forecast_is_within_a_tenth_of_what_a_small_model_took(combination, places):
    agrees(combination, places)


@pytest.mark.slow
@pytest.mark.parametrize("combination", [*QUICK[1:], *SMALL, *LARGE], ids=lambda c: c.name)
def test_the_forecast_is_within_a_tenth_of_what_each_benchmark_model_took(combination, places):
    agrees(combination, places)
