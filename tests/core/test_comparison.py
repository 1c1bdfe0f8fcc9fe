"""Two adapters beside each other, against matrices multiplied out in float64."""

import math
from dataclasses import replace

import pytest
import torch

from core import (
    Adapter,
    Factors,
    Layout,
    LoRAConfig,
    LoRAError,
    Overlap,
    compare,
    inner_product,
    norm,
    principal_angles,
    spectrum,
    subspace_similarity,
    weighted_sum,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(m, n, r, seed, scaling=0.5, layout=Layout()):  # noqa: B008
    return Factors(normal(r, n, seed=seed), normal(m, r, seed=seed + 100), scaling, layout)


def adapter(**factors):
    return Adapter(LoRAConfig(), factors)


FIRST = adapter(a=gaussian(20, 12, 3, 1), b=gaussian(9, 15, 2, 2), c=gaussian(5, 5, 1, 3))
SECOND = adapter(a=gaussian(20, 12, 4, 4, 2.0), b=gaussian(9, 15, 2, 5), d=gaussian(5, 5, 1, 6))


def dense(f):
    return f.scaling * f.B.double() @ f.A.double()


def test_each_matrix_is_compared_as_the_dense_ones_are():
    found = compare(FIRST, SECOND)
    assert list(found.matrices) == ["a", "b"] and (found.only_first, found.only_second) == (("c",), ("d",))
    for path, m in found.matrices.items():
        f, g = FIRST.factors[path], SECOND.factors[path]
        X, Y = dense(f), dense(g)
        assert m.overlap.norms == pytest.approx((X.norm().item(), Y.norm().item()), rel=1e-12)
        assert m.overlap.cosine == pytest.approx((X * Y).sum().item() / (X.norm() * Y.norm()).item(), rel=1e-9)
        assert m.overlap.norm_ratio == pytest.approx((X.norm() / Y.norm()).item(), rel=1e-12)
        both = (X.square().sum() + Y.square().sum()).item()
        assert m.overlap.interference == pytest.approx((X + Y).square().sum().item() / both - 1, abs=1e-12)
        one, other = spectrum(f), spectrum(g)
        assert m.ranks == (one.rank, other.rank) == tuple(m.left.shape) == tuple(m.right_null.shape)
        torch.testing.assert_close(m.left, subspace_similarity(one.U, other.U))
        torch.testing.assert_close(m.right, subspace_similarity(one.V, other.V))
        torch.testing.assert_close(m.right_angles, principal_angles(one.V, other.V))
        torch.testing.assert_close(m.left_angles, principal_angles(one.U, other.U))
        assert m.left_null[-1, -1] == max(m.ranks) / f.shape[0] and m.right_null[0, 0] == 1 / f.shape[1]


def test_all_together_are_one_vector_in_which_what_is_missing_is_zero():
    found = compare(FIRST, SECOND).overlap
    assert found.norms == pytest.approx((norm(FIRST), norm(SECOND)), rel=1e-12)
    assert found.inner_product == pytest.approx(inner_product(FIRST, SECOND), rel=1e-12)
    assert found.size == 20 * 12 + 9 * 15 + 25 + 25
    total = norm(weighted_sum([FIRST, SECOND], [1, 1])) ** 2
    assert found.interference == pytest.approx(total / (norm(FIRST) ** 2 + norm(SECOND) ** 2) - 1, abs=1e-12)


@pytest.mark.parametrize(("weight", "cosine", "interference"), [(1.0, 1, 1), (-1.0, -1, -1), (2.0, 1, 0.8)])
def test_an_adapter_beside_a_multiple_of_itself(weight, cosine, interference):
    found = compare(FIRST, weighted_sum([FIRST], [weight]))
    assert found.overlap.cosine == pytest.approx(cosine, abs=1e-12)
    assert found.overlap.interference == pytest.approx(interference, abs=1e-12)
    for m in found.matrices.values():
        assert m.right[-1, -1].item() == pytest.approx(1, abs=1e-12) and m.right_angles.abs().max() < 1e-12


def test_updates_at_right_angles_do_not_interfere_and_may_read_the_same_inputs():
    U, V = torch.linalg.qr(normal(20, 4))[0], torch.linalg.qr(normal(12, 2))[0]
    one, other = Factors(V.T, U[:, :2], 1.0), Factors(V.T, U[:, 2:], 1.0)
    m = compare(adapter(a=one), adapter(a=other)).matrices["a"]
    assert m.overlap.cosine == pytest.approx(0, abs=1e-14) and m.overlap.interference == pytest.approx(0, abs=1e-14)
    assert m.right[-1, -1].item() == pytest.approx(1) and m.left.max() < 1e-12
    assert m.left_angles[0].item() == pytest.approx(math.pi / 2)


def test_chance_gives_the_null_as_the_root_mean_square_of_the_cosine():
    pairs = [compare(adapter(a=gaussian(12, 9, 2, s)), adapter(a=gaussian(12, 9, 3, s + 5000))) for s in range(300)]
    mean_square = sum(p.overlap.cosine**2 for p in pairs) / len(pairs)
    assert mean_square == pytest.approx(pairs[0].overlap.null ** 2, rel=0.3)
    assert pairs[0].overlap.null == pytest.approx(1 / math.sqrt(108))


def test_an_adapter_that_has_not_trained_shares_nothing():
    still = adapter(a=Factors(normal(3, 12), torch.zeros(20, 3), 1.0))
    found = compare(FIRST, still)
    m = found.matrices["a"]
    assert m.ranks == (3, 0) and m.left.numel() == m.right_angles.numel() == 0
    assert (m.overlap.cosine, m.overlap.norm_ratio, m.overlap.interference) == (None, None, 0.0)
    assert Overlap((0.0, 0.0), 0.0, 4).interference is None


def test_a_slice_is_compared_with_the_whole_of_which_it_is_a_part():
    q = gaussian(4, 5, 2, 1, layout=Layout("slice", rows=torch.arange(4), num_rows=8))
    k = gaussian(4, 5, 1, 2, 3.0, Layout("slice", rows=torch.arange(4, 8), num_rows=8))
    whole = gaussian(8, 5, 2, 3)
    found = compare(Adapter(LoRAConfig(), {"c.q": q, "c.k": k}), adapter(c=whole))
    joined = torch.cat([dense(q), dense(k)])
    assert list(found.matrices) == ["c"] and not found.only_first
    assert found.overlap.norms[0] == pytest.approx(joined.norm().item(), rel=1e-12)
    assert found.overlap.inner_product == pytest.approx((joined * dense(whole)).sum().item(), rel=1e-10)
    alone = compare(Adapter(LoRAConfig(), {"c.q": q, "c.k": k}), Adapter(LoRAConfig(), {"c.q": q}))
    assert list(alone.matrices) == ["c.q"] and alone.only_first == ("c.k",)


def test_what_does_not_fit_one_model_is_refused():
    with pytest.raises(LoRAError, match=r"must fit one model: a is \(20, 12\) and \(12, 20\)"):
        compare(FIRST, adapter(a=gaussian(12, 20, 2, 1)))
    with pytest.raises(LoRAError, match="must not hold one of DoRA's"):
        compare(FIRST, replace(SECOND, magnitudes={"a": torch.ones(20)}))
