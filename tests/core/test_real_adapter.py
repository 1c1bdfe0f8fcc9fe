"""What a real, trained adapter learned, against dense matrices: the authors' own for RoBERTa base on MNLI."""

from pathlib import Path

import pytest
import torch

from core import (
    Adapter,
    basis_of,
    compare,
    intruder_dimensions,
    principal_angles,
    spectra,
    subspace_similarity,
    truncate,
    weight_svd,
)

FILE = Path(__file__).parents[3] / "shared" / "data" / "adapters" / "roberta_base_lora_mnli.bin"
QUERY = "roberta.encoder.layer.{}.attention.self.query"


@pytest.fixture(scope="module")
def adapter():
    if not FILE.is_file():
        pytest.skip("the authors' adapter is not here: roberta_base_lora_mnli.bin of github.com/microsoft/LoRA")
    return Adapter.load(FILE, scaling=2.0)  # what its script trained with; the file does not say it


def dense(f):
    return f.scaling * f.B.double() @ f.A.double()


def test_its_spectra_are_those_of_the_dense_matrices(adapter):
    found = spectra(adapter.factors)
    for layer in (0, 6, 11):
        f, s = adapter.factors[QUERY.format(layer)], found[QUERY.format(layer)]
        U, sigma, Vh = torch.linalg.svd(dense(f))
        torch.testing.assert_close(s.sigma, sigma[:8], rtol=0, atol=1e-12 * sigma[0].item())
        for one, other in ((s.U, U[:, :8]), (s.V, Vh[:8].T)):
            torch.testing.assert_close(
                (one * other).sum(0).abs(), torch.ones(8, dtype=torch.float64), atol=1e-9, rtol=0
            )
        assert sigma[8] < 1e-12 * sigma[0] and s.rank == 8


def test_its_last_query_is_nearly_of_rank_one_and_the_others_are_not(adapter):
    found = spectra(adapter.factors)
    last = found[QUERY.format(11)]
    assert last.rank == 8 and last.effective_rank < 1.6 and last.stable_rank < 1.05 and last.participation_ratio < 1.1
    assert last.energy(1) > 0.95 and last.rank_for_energy(0.9) == 1
    assert min(s.effective_rank for path, s in found.items() if path != QUERY.format(11)) > 2.4
    # So its energy, pooled, costs fewer directions than matrix by matrix.
    pooled, uniform = truncate(adapter, energy=0.9, pooled=True), truncate(adapter, energy=0.9)
    assert sum(pooled.ranks.values()) < sum(uniform.ranks.values()) and pooled.energy >= 0.9


@pytest.mark.parametrize(("layer", "phi"), [(0, 0.994), (6, 0.405), (11, 1.000)])
def test_directions_of_A_are_not_those_of_delta_until_all_are_taken(adapter, layer, phi):
    f = adapter.factors[QUERY.format(layer)]
    found = subspace_similarity(basis_of(f, "A-right"), basis_of(f, "delta-right"))
    assert found[0, 0].item() == pytest.approx(phi, abs=1e-3)
    assert found[7, 7].item() == pytest.approx(1, abs=1e-12)
    assert principal_angles(basis_of(f, "B-left"), basis_of(f, "delta-left")).max() < 1e-7


def test_storing_it_in_bfloat16_turns_no_direction_much_and_forming_it_there_makes_new_ones(adapter):
    from dataclasses import replace

    f = adapter.factors[QUERY.format(0)]
    low = adapter.with_factors({QUERY.format(0): replace(f, A=f.A.bfloat16(), B=f.B.bfloat16())})
    beside = compare(adapter, low).matrices[QUERY.format(0)]
    assert beside.overlap.cosine > 0.9999 and beside.right[-1, -1] > 0.9999 and beside.ranks == (8, 8)
    formed = torch.linalg.svdvals(dense(f).bfloat16().double())
    assert (formed > 1e-5 * formed[0]).sum() > 300


def test_intruders_in_a_weight_of_its_size_are_those_of_the_dense_sum(adapter):
    f = adapter.factors[QUERY.format(9)]
    generator = torch.Generator().manual_seed(0)
    W = 0.04 * torch.randn(768, 768, generator=generator, dtype=torch.float64)  # about the norm of RoBERTa's
    svd = weight_svd(W)
    found = intruder_dimensions(f, svd)
    U, sigma, _ = torch.linalg.svd(W + dense(f))
    torch.testing.assert_close(found.sigma, sigma[:10], rtol=1e-12, atol=0)
    torch.testing.assert_close(found.max_cosine, (U[:, :10].T @ svd.U).abs().max(1).values, rtol=0, atol=1e-8)
    assert 0 < found.count <= 10 and found.null == pytest.approx(0.1315, abs=1e-3)
