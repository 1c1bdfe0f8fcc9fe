"""Intruder dimensions and what takes them out, against W + ΔW multiplied out in float64."""

import math
from dataclasses import replace

import pytest
import torch

from core import Factors, LoRAError, damp, intruder_dimensions, intruders, shrink, spectrum, top_svd, weight_svd


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(n, k, seed=0):
    return torch.linalg.qr(normal(n, k, seed=seed))[0]


def weight(m, n, power=0.7):
    p = min(m, n)
    return orthonormal(m, p, 1) * torch.arange(1, p + 1).double() ** -power @ orthonormal(n, p, 2).T


def update(m, n, r=4, size=0.5, scaling=0.5):
    f = Factors(normal(r, n, seed=3), normal(m, r, seed=4), scaling)
    return Factors(f.A, f.B * (size / spectrum(f).sigma[0]), scaling)


def dense(f):
    return f.scaling * f.B.double() @ f.A.double()


@pytest.mark.parametrize("is_iterated", [True, False])
@pytest.mark.parametrize(("m", "n"), [(70, 70), (90, 60), (60, 90), (62, 60)])
@pytest.mark.parametrize(("power", "size"), [(0.7, 0.05), (0.7, 0.5), (0.0, 0.5), (2.0, 3.0)])
def test_directions_are_those_of_the_dense_sum(monkeypatch, m, n, power, size, is_iterated):
    monkeypatch.setattr(intruders, "DENSE_LIMIT", 0 if is_iterated else 1000)
    monkeypatch.setattr(intruders, "_SPARE", 2)
    W = weight(m, n, power) + 0.01 * normal(m, n, seed=8)
    factors, svd = update(m, n, size=size), weight_svd(W)
    if is_iterated:
        monkeypatch.setattr(intruders._DiagonalPlusLowRank, "_dense", lambda *_: pytest.fail("not by iteration"))
    found = intruder_dimensions(factors, svd, 5, 0.6)
    U, sigma, Vh = torch.linalg.svd(W + dense(factors), full_matrices=False)
    torch.testing.assert_close(found.sigma, sigma[:5], rtol=0, atol=1e-13 * sigma[0].item())
    expected = (U[:, :5].T @ svd.U).abs()
    torch.testing.assert_close(found.cosines, expected, rtol=0, atol=1e-9)
    assert found.cosines.shape == (5, min(m, n)) and found.U.shape == (m, 5) and found.V.shape == (n, 5)
    for one, other in ((found.U, U[:, :5]), (found.V, Vh[:5].T)):
        torch.testing.assert_close((one * other).sum(0).abs(), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-10)
    is_intruder = expected.max(1).values < 0.6
    assert torch.equal(found.is_intruder, is_intruder) and found.count == int(is_intruder.sum())
    energy = sigma[:5][is_intruder].square().sum() / sigma[:5].square().sum()
    assert found.energy_share == pytest.approx(energy.item(), abs=1e-12)


def test_a_new_direction_is_an_intruder_and_W_s_own_made_stronger_is_none():
    W = weight(60, 40)
    svd = weight_svd(W)
    u, v = normal(60, 1, seed=5), normal(40, 1, seed=6)
    new = Factors(v.T / v.norm(), 3 * u / u.norm(), 1.0)
    found = intruder_dimensions(new, svd)
    assert found.indices == (0,)
    assert found.sigma[0] == pytest.approx(3.0, rel=0.1)
    assert found.energy_share > 0.7
    own = Factors(svd.V[:, 4:5].T, svd.U[:, 4:5], 3.0)
    stronger = intruder_dimensions(own, svd)
    assert (stronger.count, stronger.energy_share) == (0, 0.0)
    assert stronger.max_cosine.min() > 1 - 1e-9
    assert stronger.sigma[0].item() == pytest.approx(3.0 + svd.sigma[4].item(), rel=1e-12)


def test_an_update_outside_of_what_W_writes_has_no_cosine_at_all():
    """W is 60 × 40, so that 20 directions of its outputs are none of its own."""
    svd = weight_svd(weight(60, 40))
    u = normal(60, 1, seed=5)
    u -= svd.U @ (svd.U.T @ u)
    far = Factors(svd.V[:, -1:].T, 5 * u / u.norm(), 1.0)
    found = intruder_dimensions(far, svd)
    assert found.max_cosine[0].item() == pytest.approx(svd.sigma[-1].item() / 5, rel=1e-2)
    assert found.max_cosine[0] < found.null / 10


def test_an_untrained_update_has_no_intruders():
    svd = weight_svd(weight(30, 50))
    found = intruder_dimensions(Factors(normal(4, 50), torch.zeros(30, 4), 2.0), svd)
    torch.testing.assert_close(found.sigma, svd.sigma[:10], rtol=1e-12, atol=0)
    assert found.count == 0 and found.max_cosine.min() > 1 - 1e-9


def test_a_random_direction_is_about_as_near_to_W_as_the_null_says_and_would_count_as_an_intruder():
    svd = weight_svd(weight(200, 200))
    nulls = (orthonormal(200, 100, 9).T @ svd.U).abs().max(1).values
    null = intruder_dimensions(update(200, 200), svd).null
    assert null == pytest.approx(math.sqrt(2 * math.log(200) / 200))
    assert nulls.mean().item() == pytest.approx(null, rel=0.15) and nulls.max() < 0.5


def test_a_sum_of_lower_rank_than_k_has_so_many_directions():
    W = weight(12, 10)
    W = W - W @ torch.ones(10, 1).double() @ torch.ones(1, 10).double() / 10  # rank 9
    assert len(intruder_dimensions(update(12, 10, 1, 0.0), weight_svd(W), 10).sigma) == 9
    nothing = intruder_dimensions(update(12, 10, 1, 0.0), weight_svd(torch.zeros(12, 10)), 10)
    assert (len(nothing.sigma), nothing.count, nothing.energy_share) == (0, 0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_low_precision_are_taken_as_they_stand(dtype):
    exact = update(40, 30)
    stored = Factors(exact.A.to(dtype), exact.B.to(dtype), 0.5)
    svd = weight_svd(weight(40, 30).to(dtype))
    wide = intruder_dimensions(Factors(stored.A.double(), stored.B.double(), 0.5), svd)
    assert torch.equal(intruder_dimensions(stored, svd).cosines, wide.cosines)
    assert damp(stored, wide, 0.5).A.dtype == torch.float32


# What takes them out.


@pytest.mark.parametrize("strength", [0.0, 0.7, 1.0, -1.0])
@pytest.mark.parametrize("which", [None, (0,), (2, 0)])
def test_a_damped_update_is_the_dense_one_less_its_intruders(strength, which):
    W, factors = weight(40, 30), update(40, 30, size=2.0)
    found = intruder_dimensions(factors, weight_svd(W))
    assert found.count >= 2
    less = damp(factors, found, strength, which)
    U, sigma, Vh = torch.linalg.svd(W + dense(factors))
    chosen = list(found.indices if which is None else which)
    expected = dense(factors) + (strength - 1) * U[:, chosen] * sigma[chosen] @ Vh[chosen]
    torch.testing.assert_close(dense(less), expected, rtol=0, atol=1e-11)
    assert less.r == factors.r + len(chosen) and less.layout is factors.layout


def test_damping_to_nothing_takes_the_directions_out_of_the_sum():
    W, factors = weight(40, 30), update(40, 30, size=2.0)
    svd = weight_svd(W)
    found = intruder_dimensions(factors, svd)
    after = torch.linalg.svdvals(W + dense(damp(factors, found, 0.0)))
    left = torch.linalg.svdvals(W + dense(factors)).tolist()
    left = [s for i, s in enumerate(left) if i not in found.indices]
    torch.testing.assert_close(after[: len(left)].tolist(), left, rtol=0, atol=1e-11)


def test_without_intruders_nothing_changes():
    factors = update(40, 30, size=0.001)
    found = intruder_dimensions(factors, weight_svd(weight(40, 30)))
    assert found.count == 0 and damp(factors, found, 0.5) is factors
    silent = replace(factors, scaling=0.0)
    torch.testing.assert_close(
        dense(damp(silent, found, 0.5, (0,))), -0.5 * found.sigma[0] * found.U[:, :1] @ found.V[:, :1].T
    )


def test_the_control_has_the_same_norm_and_directions_as_before():
    factors = update(40, 30, size=2.0)
    less = damp(factors, intruder_dimensions(factors, weight_svd(weight(40, 30))), 0.3)
    control = shrink(factors, less)
    assert spectrum(control).norm == pytest.approx(spectrum(less).norm, rel=1e-12)
    assert spectrum(control).norm < spectrum(factors).norm
    assert torch.equal(control.B, factors.B) and torch.equal(control.A, factors.A)
    zero = replace(factors, scaling=0.0)
    assert shrink(zero, less) is zero


SVD = weight_svd(weight(40, 30))
FOUND = intruder_dimensions(update(40, 30), SVD)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: intruder_dimensions(update(30, 40), SVD), r"`svd` \(=\(40, 30\)\) must be .*ΔW's shape, \(30, 40\)"),
        (lambda: intruder_dimensions(update(40, 30), top_svd(weight(40, 30), 20)), r"`svd` \(=20 .* must be whole, 30"),
        (lambda: intruder_dimensions(update(40, 30), SVD, 31), r"`k` \(=31\) must be from 1 to 30"),
        (lambda: intruder_dimensions(update(40, 30), SVD, 0), r"`k` \(=0\) must be from 1"),
        (lambda: intruder_dimensions(update(40, 30), SVD, 10, 0.0), r"`threshold` \(=0.0\) must be above 0"),
        (lambda: intruder_dimensions(update(40, 30), SVD, 10, math.nan), r"`threshold` \(=nan\) must be above 0"),
        (lambda: damp(update(40, 30), FOUND, math.inf), r"`strength` \(=inf\) must be a finite number"),
        (lambda: damp(update(30, 40), FOUND, 0.5), r"`intruders` must be those of a weight of .*\(30, 40\)"),
        (lambda: damp(update(40, 30), FOUND, 0.5, (10,)), r"`which` \(=\[10\]\) must be different places from 0 to 9"),
        (lambda: damp(update(40, 30), FOUND, 0.5, (1, 1)), r"`which` \(=\[1, 1\]\) must be different places"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(LoRAError, match=message):
        call()
