import math

import pytest
import torch

from core import (
    Amplification,
    Factors,
    LoRAConfig,
    LoRAError,
    alignment,
    amplification,
    basis_of,
    inject,
    lora_layers,
    principal_angles,
    row_norms,
    similarity_null,
    spectrum,
    subspace_similarity,
    top_svd,
    weight_svd,
    weights,
)

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
    assert found.null_factor == pytest.approx(of_chance, rel=0.005)
    assert found.null_factor == pytest.approx(found.factor * found.enrichment, rel=1e-12)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_large_W_takes_the_randomized_path_to_the_same_top(monkeypatch, power):
    U, V = orthonormal(120, 100), orthonormal(100, 100, seed=1)
    sigma = torch.arange(1, 101, dtype=torch.float64) ** -power
    W = U * sigma @ V.T
    factors = gaussian(8, 120, 100)
    monkeypatch.setattr(weights, "EXACT_SVD_LIMIT", 100)
    exact = amplification(factors, W, 8, "weight")
    assert exact.projected_norm == pytest.approx(math.sqrt(sigma[:8].square().sum()), rel=1e-12)
    monkeypatch.setattr(weights, "EXACT_SVD_LIMIT", 99)
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


def test_the_null_of_phi_is_the_mean_over_random_subspaces():
    null = similarity_null(40, 3, 8)
    draws = torch.stack(
        [subspace_similarity(orthonormal(40, 3, 2 * s), orthonormal(40, 8, 2 * s + 1)) for s in range(400)]
    )
    torch.testing.assert_close(draws.mean(0), null, rtol=0.2, atol=0)
    assert null[2, 7].item() == 8 / 40 and null[0, 0].item() == 1 / 40
    assert similarity_null(768, 8, 64)[7, 63].item() == pytest.approx(0.0833, abs=5e-5)
    assert torch.equal(null, similarity_null(40, 8, 3).T)


def test_a_space_has_no_more_directions_than_dimensions():
    assert similarity_null(8, 8, 2)[7, 0].item() == 1
    with pytest.raises(LoRAError, match=r"`dim` \(=7\) must be at least the number of columns, 8"):
        similarity_null(7, 8, 2)


# Directions of an update.


def dense_basis(factors, basis):
    A, B = factors.A.double(), factors.B.double()
    X, side = {"A-right": (A, 2), "B-left": (B, 0), "delta-left": (B @ A, 0), "delta-right": (B @ A, 2)}[basis]
    return (
        torch.linalg.svd(X, full_matrices=False)[side].mT if side == 2 else torch.linalg.svd(X, full_matrices=False)[0]
    )


BASES = ["A-right", "B-left", "delta-left", "delta-right"]


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_basis_has_the_directions_of_the_dense_matrix_strongest_first(basis, dtype):
    exact = gaussian(4)
    factors = Factors(exact.A.to(dtype), exact.B.to(dtype), 0.5)
    U = basis_of(factors, basis)
    assert U.dtype == torch.float64 and U.shape == ((N, 4) if basis.endswith("right") else (M, 4))
    torch.testing.assert_close(U.T @ U, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    cosines = (U * dense_basis(factors, basis)[:, :4]).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_directions_of_A_are_not_those_of_delta_but_span_the_same():
    factors = gaussian(4)
    phi = subspace_similarity(basis_of(factors, "A-right"), basis_of(factors, "delta-right"))
    assert phi[0, 0] < 0.99
    assert phi[3, 3].item() == pytest.approx(1, abs=1e-12)


def test_null_directions_are_left_out():
    """QR of a zero gives e₁, e₂, … as if they were learned."""
    untrained = Factors(normal(4, N), torch.zeros(M, 4), 2.0)
    assert {b: basis_of(untrained, b).shape[1] for b in BASES} == {
        "A-right": 4,
        "B-left": 0,
        "delta-left": 0,
        "delta-right": 0,
    }
    factors = gaussian(4)
    factors.B[:, 3] = factors.B[:, 2]
    assert {b: basis_of(factors, b).shape[1] for b in BASES} == dict(zip(BASES, (4, 3, 3, 3), strict=True))
    assert subspace_similarity(basis_of(untrained, "B-left"), basis_of(factors, "B-left")).shape == (0, 3)


def test_directions_in_a_slice_s_unread_inputs_do_not_appear():
    factors = gaussian(3)
    factors.A[:, :10] = 0
    assert basis_of(factors, "delta-right")[:10].abs().max() < 1e-14


def test_one_seed_makes_A_of_two_ranks_look_alike_only_where_they_share_a_generator(build):
    """The trap: A of r = 2 drawn as the first rows of A of r = 8. Matrices here draw from generators of their own."""
    A = [torch.nn.init.kaiming_uniform_(torch.empty(r, N), generator=torch.Generator().manual_seed(0)) for r in (2, 8)]
    trapped = [basis_of(Factors(X, torch.zeros(M, len(X)), 1.0), "A-right") for X in A]
    assert subspace_similarity(*trapped)[1, 7].item() == pytest.approx(1, abs=1e-12)

    def A_right(r):
        model = build("llama")
        inject(model, LoRAConfig(r=r, target_modules=("q_proj",)), seed=0)
        return basis_of(next(iter(lora_layers(model).values())).factors, "A-right")

    assert subspace_similarity(A_right(2), A_right(8))[1, 7] < 2 * similarity_null(32, 2, 8)[1, 7]


def test_there_is_no_other_basis():
    with pytest.raises(
        LoRAError, match=r"`basis` \(='A-left'\) must be one of A-right, B-left, delta-left, delta-right"
    ):
        basis_of(gaussian(), "A-left")


# Principal angles.


@pytest.mark.parametrize("theta", [0.0, 1e-12, 1e-8, 1e-4, 0.3, math.pi / 4, 1.5, math.pi / 2])
def test_an_angle_is_found_whether_it_is_small_or_large(theta):
    Q = orthonormal(20, 6)
    U1 = Q[:, :3] @ orthonormal(3, 3, seed=1)
    turned = Q[:, :3].clone()
    turned[:, 0] = math.cos(theta) * Q[:, 0] + math.sin(theta) * Q[:, 4]
    angles = principal_angles(U1, turned @ orthonormal(3, 3, seed=2))
    assert angles[-1].item() == pytest.approx(theta, rel=1e-3, abs=2e-15)
    assert angles[:2].abs().max() < 1e-14 or theta == 0


def test_angles_rise_and_give_phi_and_do_not_see_the_order():
    U1, U2 = orthonormal(20, 5), orthonormal(20, 7, seed=1)
    angles = principal_angles(U1, U2)
    assert angles.shape == (5,) and (angles.diff() >= 0).all()
    torch.testing.assert_close(angles, principal_angles(U2, U1), rtol=1e-10, atol=1e-12)
    assert angles.cos().square().mean().item() == pytest.approx(subspace_similarity(U1, U2)[4, 6].item(), rel=1e-12)
    assert principal_angles(U1, U2[:, :0]).shape == (0,)
    with pytest.raises(LoRAError, match=r"`U2` \(=\(21, 3\)\) must have as many rows as `U1`"):
        principal_angles(U1, orthonormal(21, 3))


# Towards W.


@pytest.mark.parametrize("side", ["left", "right"])
def test_alignment_is_the_cosine_with_each_of_W_s_top_directions(W, side):
    factors = gaussian(4)
    U, _, Vh = torch.linalg.svd(factors.B @ factors.A)
    X, _, Yh = torch.linalg.svd(W)
    mine, its = (U[:, :4], X[:, :7]) if side == "left" else (Vh[:4].T, Yh[:7].T)
    found = alignment(factors, weight_svd(W), 7, side=side)
    torch.testing.assert_close(found.cosines, (mine.T @ its).abs(), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.similarity, subspace_similarity(mine, its), rtol=0, atol=1e-10)
    assert found.null[3, 6].item() == 7 / (M if side == "left" else N)
    top = alignment(spectrum(factors), top_svd(W, 7), side=side)
    assert top.cosines.shape == (4, 4)  # a tenth of 32
    torch.testing.assert_close(top.cosines, found.cosines[:, :4], rtol=0, atol=1e-10)


def test_a_delta_made_of_W_s_own_directions_is_aligned_with_them_and_zero_with_nothing(W):
    svd = weight_svd(W)
    own = Factors(svd.V[:, 2:4].T, svd.U[:, 2:4] * svd.sigma[2:4], 1.0)
    expected = torch.zeros(2, 5, dtype=torch.float64)
    expected[0, 2] = expected[1, 3] = 1
    torch.testing.assert_close(alignment(own, svd, 5).cosines, expected, rtol=0, atol=1e-12)
    nothing = alignment(Factors(normal(4, N), torch.zeros(M, 4), 1.0), svd, 5)
    assert nothing.cosines.shape == nothing.similarity.shape == nothing.null.shape == (0, 5)


def test_alignment_says_what_does_not_fit(W):
    with pytest.raises(LoRAError, match=r"`svd` \(=\(32, 48\)\) must be that of a weight of ΔW's shape, \(48, 32\)"):
        alignment(gaussian(), weight_svd(W.T))
    with pytest.raises(LoRAError, match=r"`q` \(=8\) must be from 1 to 7, the directions of W at hand"):
        alignment(gaussian(), top_svd(W, 7), 8)
    with pytest.raises(LoRAError, match=r"`side` \(='top'\) must be one of left, right"):
        alignment(gaussian(), top_svd(W, 7), side="top")


@pytest.mark.parametrize("scaling", [0.0, 0.5, 1e-6, 1e3])
def test_row_norms_of_the_sum_come_from_the_factors(W, scaling):
    factors = gaussian(4, scaling=scaling)
    expected = (W + scaling * factors.B @ factors.A).norm(dim=1)
    torch.testing.assert_close(row_norms(W, factors), expected, rtol=1e-12, atol=0)
    assert row_norms(W.bfloat16(), factors).dtype == torch.float64
    with pytest.raises(LoRAError, match=r"`W` \(=\(32, 48\)\) must have the shape of ΔW"):
        row_norms(W.T, factors)


def test_a_spectrum_serves_as_well_as_its_factors(W):
    factors = gaussian()
    for directions in DIRECTIONS:
        assert amplification(spectrum(factors), W, 2, directions) == amplification(factors, W, 2, directions)


@pytest.mark.parametrize("r", [4, 16])
def test_one_random_draw_strays_from_the_null_by_one_part_in_root_two_r(r):
    W = normal(64, 64)
    draws = [amplification(gaussian(r, 64, 64), W, r, "random", seed=seed).enrichment for seed in range(150)]
    spread = torch.tensor(draws).std().item()
    assert spread == pytest.approx(1 / (math.sqrt(2) * r), rel=0.25)
