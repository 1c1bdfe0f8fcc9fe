import math

import pytest
import torch

from core import Amplification, Factors, LoRAConfig, LoRAError, amplification, geometry, inject, lora_layers
from core.geometry import subspace_similarity

M, N = 48, 32
DIRECTIONS = ["delta", "weight", "random"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(n, k, seed=0):
    return torch.linalg.qr(normal(n, k, seed=seed))[0]


def gaussian(r=4, m=M, n=N, scaling=0.5, seed=0):
    return Factors(normal(r, n, seed=seed + 1), normal(m, r, seed=seed + 2), scaling)


@pytest.fixture
def W():
    return normal(M, N, seed=9)


# Amplification.


@pytest.mark.parametrize("r", [1, 2, 4, None])
def test_amplification_is_that_of_the_dense_matrices(W, r):
    factors = gaussian()
    found = amplification(factors, W, r)
    dense = 0.5 * factors.B @ factors.A
    U, _, Vh = torch.linalg.svd(dense)
    k = r or 4
    assert found.r == k
    assert found.delta_norm == pytest.approx(dense.norm().item(), rel=1e-12)
    assert found.weight_norm == pytest.approx(W.norm().item(), rel=1e-12)
    assert found.projected_norm == pytest.approx((U[:, :k].T @ W @ Vh[:k].T).norm().item(), rel=1e-10)
    assert found.null == pytest.approx(k * W.norm().item() / math.sqrt(M * N), rel=1e-12)
    assert found.factor == pytest.approx(found.delta_norm / found.projected_norm, rel=1e-12)
    assert found.enrichment == pytest.approx(found.projected_norm / found.null, rel=1e-12)


@pytest.mark.parametrize("k", [1, 4, N])
@pytest.mark.parametrize("c", [0.01, 1.0, 21.5])
def test_a_delta_that_is_c_times_the_top_of_W_amplifies_by_exactly_c(W, c, k):
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    factors = Factors(Vh[:k], U[:, :k] * sigma[:k], c)
    found = amplification(factors, W)
    assert found.r == k
    assert found.factor == pytest.approx(c, rel=1e-12)
    top = amplification(factors, W, k, "weight")
    assert found.projected_norm == pytest.approx(top.projected_norm, rel=1e-12)


@pytest.mark.parametrize("r", [1, 3, N])
def test_the_top_directions_of_W_hold_the_root_of_its_first_squares(W, r):
    sigma = torch.linalg.svdvals(W)
    top = amplification(gaussian(), W, r, "weight")
    assert top.projected_norm == pytest.approx(math.sqrt(sigma[:r].square().sum()), rel=1e-12)
    assert top.projected_norm >= amplification(gaussian(N), W, r).projected_norm
    assert top.projected_norm <= top.weight_norm * (1 + 1e-12)


@pytest.mark.parametrize("r", [1, 4])
def test_random_directions_have_the_null_as_their_root_mean_square(W, r):
    found = [amplification(gaussian(), W, r, "random", seed=seed) for seed in range(400)]
    mean_square = sum(a.projected_norm**2 for a in found) / len(found)
    # One relative standard deviation of the mean of r² squared normals, 400 times over, is √2 / (r·20).
    assert mean_square == pytest.approx(found[0].null ** 2, rel=4 * math.sqrt(2) / (r * 20))
    assert len({a.projected_norm for a in found}) == 400
    assert sum(a.enrichment**2 for a in found) / len(found) == pytest.approx(mean_square / found[0].null ** 2)


def test_random_directions_come_from_their_seed_and_leave_the_global_generator_alone(W):
    state = torch.get_rng_state()
    one, again, other = (amplification(gaussian(), W, 3, "random", seed=s) for s in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_all_directions_of_a_square_matrix_project_to_all_of_it():
    W = normal(8, 8)
    for directions in DIRECTIONS:
        found = amplification(gaussian(8, 8, 8), W, 8, directions)
        assert found.projected_norm == pytest.approx(found.weight_norm, rel=1e-12)
        assert found.enrichment == pytest.approx(1.0, rel=1e-12)


def test_r_is_by_default_the_rank_that_delta_has(W):
    factors = gaussian(4)
    factors.B[:, 3] = factors.B[:, 2]
    factors.A[3] = factors.A[2]
    assert {amplification(factors, W, None, d).r for d in DIRECTIONS} == {3}


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_a_delta_of_zero_amplifies_nothing(W, directions):
    factors = Factors(normal(4, N), torch.zeros(M, 4), 2.0)
    assert amplification(factors, W, None, directions) is None
    assert amplification(factors, W, 2, directions) is None


def test_a_W_that_has_nothing_there_has_no_factor():
    U, V = orthonormal(M, 4), orthonormal(N, 4)
    W = torch.zeros(M, N, dtype=torch.float64)
    W[0, 0] = 1.0
    factors = Factors(torch.eye(N, dtype=torch.float64)[1:3], torch.eye(M, dtype=torch.float64)[:, 1:3], 1.0)
    found = amplification(factors, W)
    assert (found.projected_norm, found.factor, found.enrichment) == (0.0, None, 0.0)
    assert amplification(Factors(V.T, U, 1.0), U @ V.T).factor == pytest.approx(1.0)


def test_a_W_of_zero_has_an_enrichment_that_can_be_shown():
    found = amplification(gaussian(), torch.zeros(M, N))
    assert found.enrichment is None or math.isfinite(found.enrichment)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_and_factors_of_any_type_are_taken_in_float64(W, dtype):
    exact = gaussian()
    W, factors = W.to(dtype), Factors(exact.A.to(dtype), exact.B.to(dtype), 0.5)
    for directions in DIRECTIONS:
        found = amplification(factors, W, 3, directions)
        wide = amplification(Factors(factors.A.double(), factors.B.double(), 0.5), W.double(), 3, directions)
        assert found == wide


@pytest.mark.parametrize("shape", [(N, M), (M, N + 1), (M * N,)])
def test_W_must_have_the_shape_of_delta(shape):
    with pytest.raises(LoRAError, match=r"`W` \(=\(.*\)\) must have the shape of ΔW, \(48, 32\) = \(out_features, in_"):
        amplification(gaussian(), torch.ones(shape))


def test_a_Conv1D_weight_fits_only_when_transposed(build, perturb):
    model = build("gpt2")
    inject(model, LoRAConfig(r=2, target_modules=("c_attn",)))
    perturb(model)
    layer = next(iter(lora_layers(model).values()))
    with pytest.raises(LoRAError, match=r"`W` \(=\(32, 96\)\) must have the shape of ΔW, \(96, 32\)"):
        amplification(layer.factors, layer.weight)
    assert amplification(layer.factors, layer.weight.T).r == 2


@pytest.mark.parametrize(
    ("r", "directions", "limit"), [(5, "delta", 4), (0, "delta", 4), (-1, "random", N), (N + 1, "weight", N)]
)
def test_r_must_be_a_number_of_directions_that_there_are(W, r, directions, limit):
    with pytest.raises(LoRAError, match=rf"`r` \(={r}\) must be from 1 to {limit}, the rank at hand"):
        amplification(gaussian(4), W, r, directions)
    amplification(gaussian(4), W, limit, directions)


# The paper's own figures.


@pytest.mark.parametrize(
    ("r", "delta_norm", "projected", "null", "factor", "enrichment", "of_chance"),
    [(4, 6.91, 0.32, 0.0202, 21.6, 15.9, 342.7), (64, 3.57, 1.90, 0.3227, 1.88, 5.9, 11.1)],
)
def test_table_7_of_the_paper(r, delta_norm, projected, null, factor, enrichment, of_chance):
    """GPT-3's W_q, 12288 × 12288; the paper prints 0.02 and 0.33 for its random directions, from one draw each."""
    W = normal(80, 70)
    small = amplification(gaussian(r, 80, 70), W, r)
    null_here = small.null / small.weight_norm * math.sqrt(80 * 70) * 61.95 / 12288
    assert round(null_here, 4) == null
    found = Amplification(r, delta_norm, 61.95, projected, null_here)
    assert found.factor == pytest.approx(factor, rel=0.005)
    assert found.enrichment == pytest.approx(enrichment, rel=0.005)
    # A random ΔW of the same norm would have amplified more than the trained one.
    assert Amplification(r, delta_norm, 61.95, null_here, null_here).factor == pytest.approx(of_chance, rel=0.005)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_large_W_takes_the_randomized_path_to_the_same_top(monkeypatch, power):
    U, V = orthonormal(120, 100), orthonormal(100, 100, seed=1)
    sigma = torch.arange(1, 101, dtype=torch.float64) ** -power
    W = U * sigma @ V.T
    factors = gaussian(8, 120, 100)
    monkeypatch.setattr(geometry, "EXACT_SVD_LIMIT", 100)
    exact = amplification(factors, W, 8, "weight")
    assert exact.projected_norm == pytest.approx(math.sqrt(sigma[:8].square().sum()), rel=1e-12)
    monkeypatch.setattr(geometry, "EXACT_SVD_LIMIT", 99)
    state = torch.get_rng_state()
    found = [amplification(factors, W, 8, "weight") for _ in range(2)]
    assert found[0] == found[1] != exact
    assert torch.equal(torch.get_rng_state(), state)
    assert found[0].projected_norm == pytest.approx(exact.projected_norm, rel=1e-3)


# Subspace similarity.


def test_phi_is_the_normalized_overlap_of_every_pair_of_leading_columns():
    U1, U2 = orthonormal(20, 5), orthonormal(20, 7, seed=1)
    phi = subspace_similarity(U1, U2)
    assert phi.shape == (5, 7) and phi.dtype == torch.float64
    for i in range(1, 6):
        for j in range(1, 8):
            overlap = (U1[:, :i].T @ U2[:, :j]).norm().item() ** 2
            assert phi[i - 1, j - 1].item() == pytest.approx(overlap / min(i, j), rel=1e-10)
    assert (phi >= 0).all() and (phi <= 1).all()


def test_phi_of_a_subspace_with_itself_is_one_and_with_its_complement_zero():
    U = orthonormal(12, 12)
    same = subspace_similarity(U[:, :5], U[:, :5])
    torch.testing.assert_close(same, torch.ones(5, 5, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert subspace_similarity(U[:, :5], U[:, 5:]).abs().max() < 1e-24


def test_phi_of_two_bases_of_one_subspace_is_one_only_for_all_of_it():
    U = orthonormal(12, 4)
    phi = subspace_similarity(U, U @ orthonormal(4, 4, seed=1))
    assert phi[3, 3].item() == pytest.approx(1.0, abs=1e-12)
    assert phi[0, 0].item() < 0.999
    assert torch.allclose(phi[3], torch.ones(4, dtype=torch.float64))


def test_phi_is_symmetric_and_does_not_see_signs():
    U1, U2 = orthonormal(20, 5), orthonormal(20, 7, seed=1)
    signs = torch.tensor([1, -1, -1, 1, -1], dtype=torch.float64)
    torch.testing.assert_close(subspace_similarity(U1, U2), subspace_similarity(U2, U1).T)
    torch.testing.assert_close(subspace_similarity(U1, U2), subspace_similarity(U1 * signs, U2))


def test_the_overlap_itself_never_falls_as_columns_are_added():
    phi = subspace_similarity(orthonormal(20, 5), orthonormal(20, 7, seed=1))
    i, j = torch.arange(1, 6)[:, None], torch.arange(1, 8)[None, :]
    overlap = phi * torch.minimum(i, j)
    assert (overlap.diff(dim=0) >= 0).all() and (overlap.diff(dim=1) >= 0).all()


def test_phi_is_one_minus_the_projection_metric_over_its_size():
    """The paper's appendix G has the factor 1/p outside; this is the form that holds."""
    U1, U2 = orthonormal(20, 5), orthonormal(20, 7, seed=1)
    cosines = torch.linalg.svdvals(U1.T @ U2)
    metric = 5 - cosines.square().sum()
    assert subspace_similarity(U1, U2)[4, 6].item() == pytest.approx(1 - metric.item() / 5, rel=1e-12)


def test_chance_gives_the_larger_share_of_the_dimension():
    d, i, j = 40, 3, 8
    phis = torch.stack(
        [subspace_similarity(orthonormal(d, i, 2 * s), orthonormal(d, j, 2 * s + 1)) for s in range(300)]
    )
    assert phis[:, i - 1, j - 1].mean().item() == pytest.approx(j / d, rel=0.05)
    assert phis[:, 0, 0].mean().item() == pytest.approx(1 / d, rel=0.3)


def test_phi_takes_low_precision_and_another_number_of_columns():
    U1, U2 = orthonormal(20, 5), orthonormal(20, 1, seed=1)
    phi = subspace_similarity(U1.float(), U2.bfloat16())
    assert phi.dtype == torch.float64
    torch.testing.assert_close(phi, subspace_similarity(U1, U2), rtol=0.02, atol=0.01)


def test_subspaces_of_different_spaces_have_no_similarity():
    with pytest.raises(LoRAError, match=r"`U2` \(=\(21, 3\)\) must have as many rows as `U1` \(=\(20, 5\)\)"):
        subspace_similarity(orthonormal(20, 5), orthonormal(21, 3))
