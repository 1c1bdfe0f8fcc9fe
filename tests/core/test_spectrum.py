import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from core import Factors, LoRAError, Spectrum, random_sigma, spectra, spectrum

SHAPES = [(40, 24, 4), (24, 40, 4), (16, 16, 16), (30, 20, 1), (1, 9, 1), (9, 1, 1), (5, 7, 9), (12, 6, 8)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(m, n, r, scaling=0.7, seed=0):
    return Factors(normal(r, n, seed=seed), normal(m, r, seed=seed + 1000), scaling)


def orthonormal(n, k, seed=0):
    return torch.linalg.qr(normal(n, k, seed=seed))[0]


def with_sigma(sigma, m=40, n=24, seed=0):
    """Factors whose ΔW has these singular values, in a basis at random."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    k = len(sigma)
    return Factors(orthonormal(n, k, seed=seed).T, orthonormal(m, k, seed=seed + 1) * sigma, 1.0)


def assert_orthonormal(Q):
    torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1], dtype=torch.float64), rtol=0, atol=1e-12)


# The decomposition.


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_sigma_is_that_of_the_dense_product_and_U_sigma_V_rebuilds_it(m, n, r):
    factors = gaussian(m, n, r)
    found = spectrum(factors)
    dense = 0.7 * factors.B @ factors.A
    k = min(m, n, r)
    assert found.sigma.shape == (k,) and found.U.shape == (m, k) and found.V.shape == (n, k)
    torch.testing.assert_close(found.sigma, torch.linalg.svdvals(dense)[:k], rtol=0, atol=1e-12 * found.sigma[0])
    torch.testing.assert_close(found.U * found.sigma @ found.V.T, dense, rtol=0, atol=1e-12 * found.sigma[0])
    assert_orthonormal(found.U)
    assert_orthonormal(found.V)
    assert found.norm == pytest.approx(torch.linalg.matrix_norm(dense).item(), rel=1e-13)
    assert (found.sigma.diff() <= 0).all()


def test_small_sigma_survive_factors_of_very_unequal_columns():
    """An eigenvalue problem of BᵀB·AAᵀ would lose them: its numbers are the squares."""
    expected = torch.logspace(0, -9, 7, dtype=torch.float64)
    factors = with_sigma(expected)
    G = torch.diag(torch.logspace(-3, 3, 7, dtype=torch.float64))
    skewed = Factors(torch.linalg.solve(G, factors.A), factors.B @ G, 1.0)
    torch.testing.assert_close(spectrum(skewed).sigma, expected, rtol=1e-5, atol=0)
    other_way = Factors(G @ factors.A, torch.linalg.solve(G, factors.B, left=False), 1.0)
    torch.testing.assert_close(spectrum(other_way).sigma, expected, rtol=1e-5, atol=0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(m=st.integers(2, 12), n=st.integers(2, 12), r=st.integers(1, 6), seed=st.integers(0, 99), c=st.floats(0.01, 100))
def test_sigma_does_not_see_how_delta_is_split_into_factors_and_scales_with_it(m, n, r, seed, c):
    factors = gaussian(m, n, r, seed=seed)
    sigma = spectrum(factors).sigma
    G = normal(r, r, seed=seed) + 4 * torch.eye(r, dtype=torch.float64)
    turned = Factors(orthonormal(r, r, seed) @ factors.A, factors.B @ orthonormal(r, r, seed).T, 0.7)
    split = Factors(torch.linalg.solve(G, factors.A), factors.B @ G, 0.7)
    rotated = Factors(factors.A @ orthonormal(n, n, seed), orthonormal(m, m, seed + 1) @ factors.B, 0.7)
    for same in (turned, split, rotated):
        torch.testing.assert_close(spectrum(same).sigma, sigma, rtol=0, atol=1e-10 * sigma[0].item())
    for louder in (dataclasses.replace(factors, scaling=0.7 * c), Factors(-c * factors.A, factors.B, 0.7)):
        torch.testing.assert_close(spectrum(louder).sigma, c * sigma, rtol=0, atol=1e-11 * c * sigma[0].item())


def test_no_tensor_larger_than_the_factors_is_made():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
            self.numel = max([self.numel, *(t.numel() for t in tensors)])
            return out

    with Largest() as largest:
        found = spectrum(gaussian(3000, 2000, 4))
        assert found.rank == 4 and found.norm > 0
    assert largest.numel == 3000 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_of_any_type_are_decomposed_in_float64(dtype):
    exact = gaussian(40, 24, 4)
    stored = Factors(exact.A.to(dtype), exact.B.to(dtype), 0.7)
    found = spectrum(stored)
    assert {found.sigma.dtype, found.U.dtype, found.V.dtype} == {torch.float64}
    assert torch.equal(found.sigma, spectrum(Factors(stored.A.double(), stored.B.double(), 0.7)).sigma)
    change = (found.sigma - spectrum(exact).sigma).abs() / spectrum(exact).sigma
    assert 0 < change.max() < torch.finfo(dtype).eps  # storing in bfloat16 costs a sigma less than one rounding
    assert found.rank == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half", ["A", "B"])
def test_factors_that_are_not_finite_are_refused(half, value):
    factors = gaussian(6, 5, 2)
    getattr(factors, half)[1, 1] = value
    with pytest.raises(LoRAError, match=r"`factors` must be finite; this adapter holds NaN or infinity.*diverged"):
        spectrum(factors)


# Rank in its three senses.


def test_equal_sigma_give_r_in_every_sense_and_one_sigma_gives_one():
    for k, sigma in ((5, 3.0), (1, 0.2)):
        found = spectrum(with_sigma([sigma] * k))
        assert found.rank == k
        assert found.effective_rank == pytest.approx(k, rel=1e-12)
        assert found.stable_rank == pytest.approx(k, rel=1e-12)


def test_ranks_are_those_of_their_formulas():
    found = spectrum(with_sigma([4.0, 2.0, 1.0, 1.0]))
    p = [0.5, 0.25, 0.125, 0.125]
    assert found.rank == 4
    assert found.effective_rank == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), rel=1e-12)
    assert found.stable_rank == pytest.approx((16 + 4 + 1 + 1) / 16, rel=1e-12)
    assert found.norm == pytest.approx(math.sqrt(22), rel=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sigma=st.lists(st.floats(1e-2, 1e2), min_size=1, max_size=8), scale=st.floats(1e-12, 1e12))
def test_stable_and_effective_rank_lie_between_one_and_rank_and_do_not_see_the_scale(sigma, scale):
    factors = with_sigma(sorted(sigma, reverse=True))
    found = spectrum(factors)
    assert found.stable_rank * (1 + 1e-12) >= 1 and found.stable_rank <= found.rank * (1 + 1e-12)
    assert found.effective_rank * (1 + 1e-12) >= 1 and found.effective_rank <= found.rank * (1 + 1e-12)
    assert found.rank == len(sigma)
    scaled = spectrum(dataclasses.replace(factors, scaling=scale))
    assert scaled.rank == found.rank
    assert scaled.effective_rank == pytest.approx(found.effective_rank, rel=1e-9)
    assert scaled.stable_rank == pytest.approx(found.stable_rank, rel=1e-9)


def test_rounding_in_float32_adds_no_rank():
    """Rank 2 in factors of r = 8: what float32 adds to A and B is below the threshold."""
    mix = normal(8, 2)
    A, B = mix @ normal(2, 300, seed=1), normal(500, 8, seed=2)
    assert spectrum(Factors(A, B, 1.0)).rank == 2
    stored = spectrum(Factors(A.float(), B.float(), 1.0))
    assert stored.rank == 2
    assert stored.sigma[2] > 1e3 * torch.finfo(torch.float64).eps * stored.sigma[0]  # float64's eps would see them


@pytest.mark.parametrize(("share", "rank"), [(1.5, 2), (0.5, 1)])
def test_rank_counts_sigma_above_eps_times_the_longer_side(share, rank):
    threshold = 40 * torch.finfo(torch.float32).eps
    assert spectrum(with_sigma([1.0, share * threshold], m=40, n=12)).rank == rank
    assert spectrum(with_sigma([1.0, share * threshold], m=12, n=40)).rank == rank


@pytest.mark.parametrize("zero", ["A", "B", "both", "scaling"])
def test_a_delta_of_zero_has_no_rank_no_norm_and_no_energy(zero):
    factors = gaussian(6, 5, 2)
    if zero in ("A", "both"):
        factors.A.zero_()
    if zero in ("B", "both"):
        factors.B.zero_()
    if zero == "scaling":
        factors = dataclasses.replace(factors, scaling=0.0)
    found = spectrum(factors)
    assert (found.rank, found.effective_rank, found.stable_rank, found.norm) == (0, 0.0, 0.0, 0.0)
    assert (found.energy(1), found.energy(2), found.rank_for_energy(0.5), found.rank_for_energy(1.0)) == (0, 0, 0, 0)
    assert random_sigma(factors).tolist() == [0.0, 0.0]


# Energy.


def test_energy_is_the_share_of_the_squares():
    found = spectrum(with_sigma([3.0, 2.0, 1.0]))
    assert [found.energy(k) for k in (0, 1, 2, 3, 9)] == pytest.approx([0, 9 / 14, 13 / 14, 1, 1], rel=1e-12)


@pytest.mark.parametrize(
    ("share", "expected"),
    [(1e-9, 1), (0.5, 1), (9 / 14 - 1e-6, 1), (9 / 14 + 1e-6, 2), (0.9, 2), (13 / 14 + 1e-6, 3), (1.0, 3)],
)
def test_rank_for_energy_is_the_fewest_directions_that_hold_it(share, expected):
    assert spectrum(with_sigma([3.0, 2.0, 1.0])).rank_for_energy(share) == expected


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), share=st.floats(0.01, 0.999))
def test_rank_for_energy_inverts_energy(seed, share):
    found = spectrum(gaussian(20, 30, 6, seed=seed))
    k = found.rank_for_energy(share)
    assert found.energy(k) >= share > found.energy(k - 1)
    assert [found.rank_for_energy(found.energy(k)) for k in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    assert found.rank_for_energy(1.0) == 6


@pytest.mark.parametrize("share", [0.0, -0.5, 1.0001, math.nan])
def test_a_share_of_energy_is_above_zero_and_at_most_one(share):
    with pytest.raises(LoRAError, match=r"`share` \(=.*\) must be above 0 and at most 1\."):
        spectrum(gaussian(5, 5, 2)).rank_for_energy(share)


# What chance gives.


def test_gaussian_factors_have_sigma_within_the_edges_of_theory():
    m, n, r = 300, 200, 8
    sigma = spectrum(gaussian(m, n, r, scaling=1.0)).sigma
    low, high = ((math.sqrt(m) + s * math.sqrt(r)) * (math.sqrt(n) + s * math.sqrt(r)) for s in (-1, 1))
    assert low < sigma[-1] and sigma[0] < high
    squares = [spectrum(gaussian(m, n, r, scaling=1.0, seed=seed)).norm ** 2 for seed in range(20)]
    assert sum(squares) / 20 == pytest.approx(m * n * r, rel=0.02)


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_random_sigma_has_the_norm_of_delta_and_the_shape_of_chance(m, n, r):
    k = min(m, n, r)
    steep = with_sigma([10.0**-i for i in range(k)], m, n)
    factors = Factors(*(torch.zeros(s, dtype=torch.float64) for s in ((r, n), (m, r))), 3.0)
    factors.A[:k], factors.B[:, :k] = steep.A, steep.B
    null = random_sigma(factors)
    assert null.shape == (k,) and (null.diff() <= 0).all()
    assert torch.linalg.vector_norm(null).item() == pytest.approx(spectrum(factors).norm, rel=1e-12)
    assert k == 1 or null[-1] / null[0] > spectrum(factors).sigma[-1] / spectrum(factors).sigma[0]


def test_random_sigma_repeats_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first = random_sigma(gaussian(20, 30, 4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(random_sigma(gaussian(20, 30, 4)), first)


def test_directions_are_computed_when_they_are_asked_for_and_once():
    found = spectrum(gaussian(20, 30, 4))
    assert "_directions" not in vars(found)
    assert found.U is found.U
    assert (found.U.shape, found.V.shape) == ((20, 4), (30, 4))


def test_a_spectrum_keeps_what_it_is_given():
    found = Spectrum(torch.tensor([2.0, 1.0]), gaussian(4, 3, 2))
    assert found.norm == pytest.approx(math.sqrt(5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.sigma = torch.ones(2)


def test_participation_ratio_counts_equal_directions_and_is_that_of_its_formula():
    assert spectrum(with_sigma([3.0] * 5)).participation_ratio == pytest.approx(5, rel=1e-12)
    assert spectrum(with_sigma([2.0, 1.0])).participation_ratio == pytest.approx(25 / 17, rel=1e-12)
    assert spectrum(Factors(normal(2, 5), torch.zeros(6, 2), 1.0)).participation_ratio == 0


def test_many_spectra_at_once_are_those_of_each_alone(monkeypatch):
    monkeypatch.setitem(spectra.__globals__, "BATCH_NUMEL", 4 * 64 * 3)  # three of the first shape at a time
    factors = {f"{i}.{j}": gaussian(m, n, r, seed=i) for i in range(5) for j, (m, n, r) in enumerate(SHAPES)}
    factors["zero"] = Factors(normal(4, 24), torch.zeros(40, 4), 1.0)
    factors["low"] = Factors(factors["0.0"].A.bfloat16(), factors["0.0"].B.bfloat16(), 3.0)
    found = spectra(factors)
    assert list(found) == list(factors)
    for path, f in factors.items():
        alone = spectrum(f)
        torch.testing.assert_close(found[path].sigma, alone.sigma, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found[path].U, alone.U, rtol=0, atol=1e-12)
    assert found["zero"].rank == 0 and spectra({}) == {}
    factors["4.0"].B[0, 0] = math.nan
    with pytest.raises(LoRAError, match="`factors` must be finite"):
        spectra(factors)


def test_a_spectrum_stays_as_it_was_when_its_factors_train_on():
    factors = gaussian(20, 30, 4)
    found, U = spectrum(factors), spectrum(factors).U
    factors.B.zero_()
    assert torch.equal(found.U, U)


def test_what_is_left_when_terms_cancel_is_no_direction():
    """An adapter less itself, and B·A − B0·A0 of one that started from W's own directions."""
    one = gaussian(40, 24, 4)
    both = Factors(torch.cat([one.A, one.A]), torch.cat([one.B, -one.B], 1), 1e5)
    assert spectrum(both).sigma.tolist() == [0.0] * 8
    moved = one.B + 1e-9 * normal(40, 4, seed=3)
    small = spectrum(Factors(torch.cat([one.A, one.A]), torch.cat([moved, -one.B], 1), 1.0))
    assert small.rank == 4 and small.sigma[4:].tolist() == [0.0] * 4
    exact = torch.linalg.svdvals((moved - one.B) @ one.A)[:4]
    torch.testing.assert_close(small.sigma[:4], exact, rtol=1e-4, atol=0)
