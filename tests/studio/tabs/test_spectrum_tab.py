"""The Spectrum tab: what adapters hold becomes text, plots and tables."""

import math

import pytest
import torch

from core import (
    Adapter,
    Factors,
    LoRAConfig,
    amplification,
    random_sigma,
    spectrum,
)
from studio.opened import Opened, Source
from studio.specs import RunSpec
from studio.tabs.spectrum import matrix, overview
from tests.studio.tabs.pages import HOSTILE, Read


def factors(size: float = 1.0, r: int = 2) -> Factors:
    generator = torch.Generator().manual_seed(0)
    return Factors(torch.randn(r, 6, generator=generator), size * torch.randn(8, r, generator=generator), 0.5)


W = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def table_7(found: Factors, r: int | None = None) -> str:
    names = {"ΔW": "delta", "W": "weight", "random": "random"}
    return matrix.table_7({title: amplification(found, W, r, kind) for title, kind in names.items()})


def test_table_7_holds_the_numbers_of_a_dense_computation():
    delta = factors().delta_weight().double()
    U, _, Vh = torch.linalg.svd(delta)
    projected = float(torch.linalg.matrix_norm(U[:, :2].T @ W.double() @ Vh[:2].T))
    delta_norm, weight_norm = (float(torch.linalg.matrix_norm(M.double())) for M in (delta, W))
    own = float(torch.linalg.vector_norm(torch.linalg.svdvals(W.double())[:2]))
    null = 2 * weight_norm / math.sqrt(8 * 6)
    read = Read(table_7(factors()))
    assert read.text[:9] == ["This matrix", "GPT-3, r = 4 (paper)", "U, V from", *2 * ["ΔW", "W", "random"]]
    rows = {read.text[i]: read.text[i + 1 : i + 7] for i in range(9, 37, 7)}
    assert rows["‖Uᵀ W V‖"][:2] == [f"{projected:.3f}", f"{own:.3f}"]
    assert rows["chance level"][:3] == [f"{null:.3f}"] * 3
    assert rows["enrichment (× chance)"][:2] == [f"{projected / null:.2f}", f"{own / null:.2f}"]
    assert rows["‖ΔW‖ / ‖Uᵀ W V‖"][:2] == [f"{delta_norm / projected:.2f}", f"{delta_norm / own:.2f}"]
    # The paper's own, of which its text names 21.5 and science since then the level of chance.
    assert rows["‖Uᵀ W V‖"][3:] == ["0.32", "21.67", "0.02"] and rows["chance level"][3:] == ["0.02"] * 3
    assert float(rows["‖ΔW‖ / ‖Uᵀ W V‖"][3]) == pytest.approx(21.5, rel=0.01)
    said = " ".join(read.text[37:])
    assert f"‖W‖ = {weight_norm:.3f}, ‖ΔW‖ = {delta_norm:.3f}; the top r = 2 directions" in said
    assert f"amplifies its directions by {delta_norm / projected:.2f}" in said


def test_table_7_of_an_update_that_is_zero_says_so():
    read = Read(table_7(factors(0.0)))
    assert read.text == ["ΔW is zero here: B has not moved, so there are no directions to follow."]


def test_the_overview_is_one_picture_in_which_paths_stay_text():
    paths = ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.0.<script>x</script>"]
    spectra = {path: spectrum(factors(i)) for i, path in enumerate(paths)}
    both = {path: (factors(i), s) for i, (path, s) in enumerate(spectra.items())}
    for title, quantity in overview.QUANTITIES.items():
        values = {path: None if quantity.needs_weight else quantity.value(s) for path, s in spectra.items()}
        values[paths[0]] = 1.0
        note = overview.chance_note(both, quantity)
        read = Read(overview.overview(title, values, note, {path: f for path, (f, _) in both.items()}, "1").page())
        assert read.tags[:3] == ["div", "div", "svg"] and read.tags.count("svg") == 1
        assert "script" not in read.tags
        assert title in " ".join(read.text) and note in " ".join(read.text)


def test_the_chance_of_a_quantity_is_that_of_gaussian_factors_of_the_same_norm():
    f = factors(3.0)
    sigma = random_sigma(f)
    for title, level in {"Largest σ": float(sigma[0]), "Stable rank": float((sigma / sigma[0]).square().sum())}.items():
        assert overview.chance_note({"a": (f, spectrum(f))}, overview.QUANTITIES[title]) == f"chance: {level:.3g}"
    nothing = factors(0.0)
    assert overview.chance_note({"a": (nothing, spectrum(nothing))}, overview.QUANTITIES["Stable rank"]) == ""


def test_the_quantities_are_those_of_the_spectrum():
    found = spectrum(factors())
    sigma = torch.linalg.svdvals(factors().delta_weight().double())[:2]
    values = {title: q.value(found) for title, q in overview.QUANTITIES.items() if not q.needs_weight}
    assert values["Size ‖ΔW‖"] == pytest.approx(float(sigma.square().sum().sqrt()))
    assert values["Largest σ"] == pytest.approx(float(sigma[0]))
    assert values["Stable rank"] == pytest.approx(float((sigma / sigma[0]).square().sum()))
    p = sigma / sigma.sum()
    assert values["Effective rank"] == pytest.approx(float((-(p * p.log()).sum()).exp()))


def test_the_summary_names_the_adapter_and_the_matrix_that_moved_most(write_run):
    run = write_run(spec=RunSpec(name=HOSTILE, lora=LoRAConfig(r=5)))
    pair = {"a": Factors(torch.zeros(5, 6), torch.zeros(8, 5), 1.0)}
    opened = Opened(Source(run.id), run.spec.name, Adapter(run.spec.lora, pair), None, run, 0)
    summary = overview.summary(opened, {"a": spectrum(factors(1.0)), "b": spectrum(factors(3.0))})
    facts = Read(summary.partition("</dl>")[0]).facts
    assert (facts["Adapter"], facts["Matrices"], facts["r"]) == (HOSTILE, "2", "5")
    assert Read(summary).text[-1] == f"Largest ‖ΔW‖, {float(factors(3.0).delta_weight().norm()):.3f}, in b."


def test_one_matrix_s_facts():
    found = spectrum(factors())
    shape, r, rank, effective, stable, most = Read(matrix.matrix_facts(found)).facts.values()
    assert (shape, r, rank) == ("8 × 6", "2", "2")
    assert (effective, stable) == (f"{found.effective_rank:.2f}", f"{found.stable_rank:.2f}")
    assert most.split()[0] == str(found.rank_for_energy(0.9))
    _, _, rank, effective, stable, most = Read(matrix.matrix_facts(spectrum(factors(0.0)))).facts.values()
    assert (rank, effective, stable, most.split()[0]) == ("0", "0.00", "0.00", "0")
