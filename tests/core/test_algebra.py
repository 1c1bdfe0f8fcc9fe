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
    Layout,
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
        U, V = (torch.linalg.qr(torch.randn(f.r, f.r, generator=generator, dtype=torch.float64))[0] for _ in "UV")
        G = U @ torch.empty(f.r, dtype=torch.float64).uniform_(0.2, 5, generator=generator).diag() @ V
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


@quick
@given(adapters(), st.integers(1, 9))
def test_pooled_truncation_is_the_nearest_of_all_with_as_many_directions(adapter, directions):
    """Nearest over the block-diagonal matrix of all ΔW together, whose SVD is theirs."""
    cut = truncate(adapter, directions=directions)
    whole = torch.block_diag(*[dense(adapter, path) for path in adapter.factors])
    sigma = torch.linalg.svdvals(whole)
    assert sum(cut.ranks.values()) == min(directions, sum(len(spectrum(f).sigma) for f in adapter.factors.values()))
    least = float(torch.linalg.vector_norm(sigma[directions:]))
    assert math.hypot(*cut.errors.values()) == pytest.approx(least, rel=1e-6, abs=1e-9)
    for path in adapter.factors:
        error = dense(adapter, path) - dense(cut.adapter, path)
        assert float(error.norm()) == pytest.approx(cut.errors[path], rel=1e-4, abs=1e-5)
    uniform = truncate(adapter, rank=1)
    assert truncate(adapter, rank=1, pooled=True).relative_error <= uniform.relative_error + 1e-9
    assert set(cut.adapter.factors) == {path for path, r in cut.ranks.items() if r}


@quick
@given(adapters(), st.floats(0.05, 1))
def test_pooled_truncation_by_energy_keeps_that_share_of_the_whole_with_the_fewest(adapter, energy):
    cut = truncate(adapter, energy=energy, pooled=True)
    kept = sum(cut.ranks.values())
    assert cut.energy >= energy * (1 - 1e-9)
    assert kept <= sum(truncate(adapter, energy=energy).ranks.values())
    if norm(adapter) and kept > 1:
        assert truncate(adapter, directions=kept - 1).energy < energy


@quick
@given(adapters(), st.data())
def test_chosen_directions_are_kept_and_the_rest_stays(adapter, data):
    path = data.draw(st.sampled_from(list(adapter.factors)))
    found = spectrum(adapter.factors[path])
    num = len(found.sigma)
    chosen = data.draw(st.lists(st.integers(0, num - 1), unique=True, min_size=len(adapter.factors) == 1))
    cut = truncate(adapter, keep={path: chosen})
    expected = found.U[:, chosen] * found.sigma[chosen] @ found.V[:, chosen].T
    torch.testing.assert_close(dense(cut.adapter, path), expected, rtol=1e-4, atol=1e-5)
    lost = [s for i, s in enumerate(found.sigma.tolist()) if i not in chosen]
    assert cut.errors[path] == pytest.approx(math.hypot(*lost), rel=1e-9)
    for other in adapter.factors.keys() - {path}:
        assert cut.adapter.factors[other] is adapter.factors[other] and cut.errors[other] == 0
    assert cut.ranks[path] == len(chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_of_a_half_precision_adapter_counts_the_rounding_of_its_new_factors(dtype):
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((4, 30), (40, 4)))
    adapter = Adapter(LoRAConfig(), {"a": Factors(A, B, 0.5)})
    cut = truncate(adapter, rank=4)
    (new,) = cut.adapter.factors.values()
    assert new.A.dtype == dtype
    true = (0.5 * B.double() @ A.double() - new.B.double() @ new.A.double()).norm().item()
    assert cut.errors["a"] == pytest.approx(true, rel=1e-9) and 1e-4 < cut.relative_error < 1e-2


def test_pooling_an_adapter_that_is_zero_leaves_one_direction():
    zero = Adapter(LoRAConfig(), {"a": Factors(torch.ones(2, 5), torch.zeros(7, 2), 1.0), "b": ZERO_B})
    cut = truncate(zero, energy=0.9, pooled=True)
    assert sum(cut.ranks.values()) == 1 and (cut.relative_error, cut.energy) == (0.0, 1.0)


ZERO_B = Factors(torch.ones(2, 9), torch.zeros(4, 2), 1.0)


# Far below, the sum's factors are numbers that float32 holds with fewer digits, or not at all.
weights = st.floats(-3, 3).filter(lambda weight: weight == 0 or abs(weight) > 1e-6)


@quick
@given(adapters(), adapters(), adapters(), weights, weights)
def test_adapters_are_vectors(first, second, third, u, v):
    """The product is symmetric and linear, and the norm is its own; sums may be taken in any order."""
    size = norm(first) * norm(third) * abs(u) + norm(second) * norm(third) * abs(v) + 1e-9
    total = weighted_sum([first, second], [u, v])
    parts = u * inner_product(first, third) + v * inner_product(second, third)
    assert inner_product(total, third) == pytest.approx(parts, rel=1e-5, abs=1e-5 * size)
    assert inner_product(first, second) == pytest.approx(inner_product(second, first), rel=1e-12, abs=1e-12)
    assert inner_product(first, first) == pytest.approx(norm(first) ** 2, rel=1e-9, abs=1e-12)
    assert abs(inner_product(first, second)) <= norm(first) * norm(second) * (1 + 1e-9) + 1e-12
    assert distance(first, third) <= distance(first, second) + distance(second, third) + 1e-9
    assert equal(total, weighted_sum([second, first], [v, u]), tolerance=1e-5)
    assert norm(difference(first, first)) <= 1e-6 * norm(first)


def fused(paths, seed):
    """An adapter of a projection with rows 0-3 of its q and 4-7 of its k, and of the whole."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path in paths:
        rows = {"c.q": torch.arange(4), "c.k": torch.arange(4, 8)}.get(path)
        layout = Layout() if rows is None else Layout("slice", rows=rows, num_rows=8)
        A = torch.randn(2, 5, generator=generator)
        B = torch.randn(8 if rows is None else 4, 2, generator=generator)
        factors[path] = Factors(A, B, 0.5 + seed, layout)
    return Adapter(LoRAConfig(), factors)


def whole_of(adapter):
    delta = torch.zeros(8, 5, dtype=torch.float64)
    for f in adapter.factors.values():
        rows = slice(None) if f.layout.rows is None else f.layout.rows
        delta[rows] += f.scaling * f.B.double() @ f.A.double()
    return delta


SLICED = st.lists(st.sampled_from(["c", "c.q", "c.k"]), min_size=1, unique=True)


@quick
@given(SLICED, SLICED, st.floats(-2, 2), st.floats(-2, 2))
def test_slices_are_parts_of_their_projection_where_another_has_it_whole(one, other, u, v):
    first, second = fused(one, 1), fused(other, 2)
    mine, yours = whole_of(first), whole_of(second)
    total = weighted_sum([first, second], [u, v])
    torch.testing.assert_close(whole_of(total), u * mine + v * yours, rtol=1e-5, atol=1e-5)
    assert not ("c" in total.factors and len(total.factors) > 1)
    assert inner_product(first, second) == pytest.approx(float((mine * yours).sum()), rel=1e-9, abs=1e-9)
    assert distance(first, second) == pytest.approx(float((mine - yours).norm()), rel=1e-9, abs=1e-9)


def test_an_adapter_of_slices_equals_what_peft_makes_of_it(build, perturb, tmp_path):
    from safetensors.torch import load_file, save_file

    from core import inject

    model = build("gpt2")
    inject(model, LoRAConfig(r=2, target_modules=("c_attn.q", "c_attn.v"), alpha_pattern={"v": 5}))
    adapter = Adapter.from_model(perturb(model))
    adapter.save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file)  # without our notes, as PEFT saves it again
    theirs = Adapter.load(tmp_path)
    assert set(theirs.factors) == {path.rpartition(".")[0] for path in adapter.factors}
    assert equal(adapter, theirs) and not equal(adapter, weighted_sum([theirs], [1.001]))


def test_what_is_trained_in_full_must_be_equal_too():
    head = {"head.weight": torch.ones(2)}
    first = replace(ONE, trained_in_full=head)
    assert equal(first, replace(ONE, trained_in_full={"head.weight": torch.ones(2)}))
    assert not equal(first, ONE)
    assert not equal(first, replace(ONE, trained_in_full={"head.weight": torch.tensor([1.0, 1.001])}))
    assert not equal(first, replace(ONE, trained_in_full={"head.weight": torch.ones(1)}))


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
SLICE_F = Factors(torch.ones(1, 5), torch.ones(4, 1), 1.0, Layout("slice", rows=torch.arange(4), num_rows=8))
SLICE = Adapter(LoRAConfig(), {"c.q": SLICE_F})
OTHER_ROWS = Layout("slice", rows=torch.arange(0, 8, 2), num_rows=8)
DORA = replace(ONE, magnitudes={"a": torch.ones(7)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weighted_sum([ONE], [1.0, 2.0]), r"`weights` \(=2 numbers\) must be as many as `adapters`"),
        (lambda: weighted_sum([], []), r"`weights` \(=0 numbers\)"),
        (lambda: weighted_sum([ONE], [math.nan]), r"`weights` .* must be finite numbers"),
        (lambda: weighted_sum([ONE, WIDE], [1, 1]), r"must fit one model: a is \(7, 5\) and \(7, 6\)"),
        (
            lambda: distance(SLICE, replace(SLICE, factors={"c.q": replace(SLICE_F, layout=OTHER_ROWS)})),
            r"must fit one model: c\.q is of other rows in each",
        ),
        (
            lambda: weighted_sum([replace(ONE, trained_in_full=dict.fromkeys("abcde", torch.ones(1)))], [1]),
            "some have a, b, c, d, e trained in full",
        ),
        (lambda: distance(ONE, WIDE), r"must fit one model"),
        (lambda: inner_product(ONE, DORA), r"must not hold one of DoRA's"),
        (
            lambda: weighted_sum([replace(ONE, trained_in_full={"h": torch.ones(1)})], [1]),
            r"some have h trained in full",
        ),
        (lambda: truncate(ONE), r"One of `rank` \(=None\), `energy` .*, `keep` \(=None\) must be given, and not more"),
        (
            lambda: truncate(ONE, rank=1, energy=0.5),
            r"`rank` \(=1\), `energy` \(=0.5\), .* must be given, and not more",
        ),
        (lambda: truncate(ONE, directions=0), r"`directions` \(=0\) must be at least 1"),
        (lambda: truncate(ONE, keep={}, pooled=True), r"`pooled` \(=True\) must come with `rank` or `energy`"),
        (lambda: truncate(ONE, keep={"a": [1], "b": []}), r"b is no matrix of the adapter; a has directions 0 to 0"),
        (lambda: truncate(ONE, keep={"a": [0, 0]}), r"a has directions 0 to 0, each once, not \[0, 0\]"),
        (lambda: truncate(ONE, keep={"a": []}), r"`keep` must name directions of the adapter: nothing is kept"),
        (lambda: truncate(ONE, energy=1.5, pooled=True), r"`share` \(=1.5\) must be above 0 and at most 1"),
        (lambda: truncate(ONE, rank=0), r"`rank` \(=0\) must be at least 1"),
        (lambda: truncate(ONE, energy=1.5), r"`share` \(=1.5\) must be above 0 and at most 1"),
        (lambda: DORA.with_factors(ONE.factors), r"must not be one of DoRA's"),
        (lambda: ONE.with_factors({}), r"`factors` must hold at least one matrix"),
        (lambda: truncate(DORA, rank=1), r"DoRA's: its ΔW is not of low rank"),
    ],
)
def test_what_cannot_be_added_or_cut_is_refused(call, message):
    with pytest.raises(LoRAError, match=message):
        call()
