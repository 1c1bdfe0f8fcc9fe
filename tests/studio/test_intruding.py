"""The Intruders section: what is damped is what was found, with a control of the same size."""

import pytest
import torch

from core import Adapter, Factors, LoRAConfig, equal, intruder_dimensions, spectrum, weight_svd
from studio.measuring import Measured
from studio.opened import Opened, Source
from studio.state import Studio
from studio.tabs.spectrum import intruding


@pytest.fixture
def found():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    A, B = torch.randn(2, 30, generator=generator), torch.randn(40, 2, generator=generator)
    adapter = Adapter(LoRAConfig(r=2, target_modules=("a", "b")), {"a": Factors(A, B, 2.0), "b": Factors(A, B, 0.5)})
    intruders = intruder_dimensions(adapter.factors["a"], weight_svd(W), k=6, threshold=0.6)
    assert 0 < intruders.count < 6
    return W, adapter, intruders


def test_damping_takes_the_intruders_out_of_w_plus_delta_and_shrinks_the_control_alike(found):
    W, adapter, intruders = found
    less, control = intruding.damped(adapter, {"a": intruders}, 0.25)
    moved = W + less.factors["a"].delta_weight().double()
    for i in intruders.indices:
        left = intruders.U[:, i] @ moved @ intruders.V[:, i]
        assert float(left) == pytest.approx(0.25 * float(intruders.sigma[i]), rel=1e-5)
    assert spectrum(control.factors["a"]).norm == pytest.approx(spectrum(less.factors["a"]).norm, rel=1e-6)
    assert less.factors["b"] is adapter.factors["b"] is control.factors["b"], "other matrices stay"


def test_a_damped_adapter_can_be_saved_for_the_process_that_measures_it(found, tmp_path):
    _, adapter, intruders = found
    less, _ = intruding.damped(adapter, {"a": intruders}, 0.5)
    less.save(tmp_path / "less")
    assert equal(Adapter.load(tmp_path / "less"), less)
    same, control = intruding.damped(adapter, {"a": intruders}, 1.0)
    assert equal(same, adapter) and equal(control, adapter), "λ = 1 changes nothing"


def test_the_facts_are_those_of_the_intruders(found):
    html = intruding.facts(found[2])
    assert (
        f"{found[2].count} of 6" in html and f"{found[2].energy_share:.1%}" in html and f"{found[2].null:.2f}" in html
    )


def test_losses_that_were_not_measured_leave_a_gap(workspace, found):
    opened = Opened(Source(path="x"), "x", found[1], "starter", None, 0)
    points = {
        "base": Measured("base model", None, 3.0, 0, 700),
        "measured": {0.5: (Measured("damped", None, 3.5, 0, 700), Measured("shrunk", None, 3.25, 0, 700))},
    }
    picture = intruding.loss_picture(Studio(workspace), opened, points, "no held-out rows")
    assert [axes.get_title(loc="left") for axes in picture.figure.axes] == ["general text"]
    assert picture.csv().splitlines()[1] == "0.5,,,3.5,3.25"
