"""Sums, distances and recompression of adapters, against matrices multiplied out in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core import (
    Adapter,
    Factors,
    LoRAConfig,
    LoRAError,
    difference,
    distance,
    equal,
    inner_product,
    norm,
    spectrum,
    truncate,
    weighted_sum,
)

SHAPES = {"a": (7, 5), "b": (4, 9), "c": (6, 6)}
quick = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def adapters(draw, paths=("a", "b", "c")):
    chosen = draw(st.lists(st.sampled_from(paths), min_size=1, unique=True))
    factors = {}
    for path in chosen:
        out, width = SHAPES[path]
        r = draw(st.integers(1, 4))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        A, B = torch.randn(r, width, generator=generator), torch.randn(out, r, generator=generator)
        factors[path] = Factors(A, B * draw(st.sampled_from([0.0, 1e-3, 1.0])), draw(st.floats(0.1, 4)))
    return Adapter(LoRAConfig(), factors)


def dense(adapter, path):
    if path not in adapter.factors:
        return torch.zeros(SHAPES[path], dtype=torch.float64)
    f = adapter.factors[path]
    return f.scaling * f.B.double() @ f.A.double()


def size(values):
    return math.sqrt(sum(float(v.square().sum()) for v in values))


@quick
@given(adapters(), adapters(), st.floats(-3, 3), st.floats(-3, 3))
def test_a_weighted_sum_is_that_of_the_matrices(first, second, u, v):
    total = weighted_sum([first, second], [u, v])
    for path in SHAPES:
        torch.testing.assert_close(
            dense(total, path), u * dense(first, path) + v * dense(second, path), rtol=1e-5, atol=1e-5
        )


@quick
@given(adapters(), adapters())
def test_products_norms_and_distances_are_those_of_the_matrices(first, second):
    mine = {path: dense(first, path) for path in SHAPES}
    yours = {path: dense(second, path) for path in SHAPES}
    assert inner_product(first, second) == pytest.approx(
        sum(float((mine[p] * yours[p]).sum()) for p in SHAPES), rel=1e-9, abs=1e-9
    )
    assert norm(first) == pytest.approx(size(mine.values()), rel=1e-9, abs=1e-12)
    assert distance(first, second) == pytest.approx(size([mine[p] - yours[p] for p in SHAPES]), rel=1e-9, abs=1e-9)
    assert distance(first, second) == pytest.approx(norm(difference(first, second)), rel=1e-5, abs=1e-6)


@quick
@given(adapters(), st.integers(0, 2**31))
def test_an_adapter_equals_itself_in_any_basis_and_no_other(adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    turned = {}
    for path, f in adapter.factors.items():
        G = torch.linalg.qr(torch.randn(f.r, f.r, generator=generator, dtype=torch.float64))[0] * 3
        A, B = torch.linalg.inv(G) @ f.A.double(), f.B.double() @ G
        turned[path] = Factors(A.float(), B.float(), f.scaling)
    other = replace(adapter, factors=turned)
    assert equal(adapter, other, tolerance=1e-5)
    if norm(adapter):
        assert not equal(adapter, weighted_sum([adapter], [1.01]), tolerance=1e-3)


@quick
@given(adapters(), st.integers(1, 4))
def test_truncation_keeps_the_best_rank_k_and_states_its_error(adapter, rank):
    cut = truncate(adapter, rank=rank)
    for path, f in adapter.factors.items():
        whole, part = dense(adapter, path), dense(cut.adapter, path)
        U, sigma, Vh = torch.linalg.svd(whole)
        best = U[:, :rank] @ sigma[:rank].diag() @ Vh[:rank]
        torch.testing.assert_close(part, best, rtol=1e-4, atol=1e-5)
        assert cut.errors[path] == pytest.approx(float(torch.linalg.vector_norm(sigma[rank:])), rel=1e-6, abs=1e-9)
        assert cut.adapter.factors[path].r <= min(rank, f.r)
    assert cut.relative_error * cut.norm == pytest.approx(distance(adapter, cut.adapter), rel=1e-2, abs=1e-5)


@quick
@given(adapters(), st.floats(0.05, 1))
def test_truncation_by_energy_keeps_that_share_with_the_fewest_directions(adapter, energy):
    cut = truncate(adapter, energy=energy)
    for path, f in adapter.factors.items():
        found = spectrum(f)
        if found.rank:
            assert cut.adapter.factors[path].r == found.rank_for_energy(energy)
            kept = spectrum(cut.adapter.factors[path]).norm ** 2
            assert kept >= energy * found.norm**2 * (1 - 1e-5)


def test_a_sum_of_adapters_of_one_model_is_applied_saved_and_loaded(build, perturb, tokens, logits, tmp_path):
    from core import inject, lora_layers

    made = []
    for seed, targets in ((1, ("q_proj", "v_proj")), (2, ("v_proj", "up_proj"))):
        model = build("llama")
        inject(model, LoRAConfig(r=2, alpha=3 + seed, target_modules=targets))
        made.append(Adapter.from_model(perturb(model, seed)))
    total = weighted_sum(made, [0.5, 2.0])
    total.save(tmp_path)
    model, expected = build("llama").double(), build("llama").double()
    Adapter.load(tmp_path).apply(model)
    assert {layer.r for layer in lora_layers(model).values()} == {2, 4}
    with torch.no_grad():
        for adapter, weight in zip(made, [0.5, 2.0], strict=True):
            for path, f in adapter.factors.items():
                expected.get_submodule(path).weight += weight * f.scaling * f.B.double() @ f.A.double()
    torch.testing.assert_close(logits(model.double(), tokens), logits(expected, tokens), rtol=1e-5, atol=1e-5)


ONE = Adapter(LoRAConfig(), {"a": Factors(torch.ones(1, 5), torch.ones(7, 1), 1.0)})
WIDE = Adapter(LoRAConfig(), {"a": Factors(torch.ones(1, 6), torch.ones(7, 1), 1.0)})
DORA = replace(ONE, magnitudes={"a": torch.ones(7)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weighted_sum([ONE], [1.0, 2.0]), r"`weights` \(=2 numbers\) must be as many as `adapters`"),
        (lambda: weighted_sum([], []), r"`weights` \(=0 numbers\)"),
        (lambda: weighted_sum([ONE], [math.nan]), r"`weights` .* must be finite numbers"),
        (lambda: weighted_sum([ONE, WIDE], [1, 1]), r"must fit one model: a is \(7, 5\) and \(7, 6\)"),
        (lambda: distance(ONE, WIDE), r"must fit one model"),
        (lambda: inner_product(ONE, DORA), r"must not hold one of DoRA's"),
        (lambda: weighted_sum([replace(ONE, trained_in_full={"h": torch.ones(1)})], [1]), r"one has h trained in full"),
        (lambda: truncate(ONE), r"`rank` \(=None\) or `energy` \(=None\) must be given"),
        (lambda: truncate(ONE, rank=1, energy=0.5), r"must be given, and not both"),
        (lambda: truncate(ONE, rank=0), r"`rank` \(=0\) must be at least 1"),
        (lambda: truncate(ONE, energy=1.5), r"`share` \(=1.5\) must be above 0 and at most 1"),
        (lambda: truncate(DORA, rank=1), r"DoRA's: its ΔW is not of low rank"),
    ],
)
def test_what_cannot_be_added_or_cut_is_refused(call, message):
    with pytest.raises(LoRAError, match=message):
        call()
