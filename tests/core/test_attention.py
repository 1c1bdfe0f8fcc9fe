"""Causal attention beside torch's own, whole and in segments."""

import pytest
import torch
from torch.nn import functional as F

from core import Segments, attention, causal_attention


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def heads(batch, num, seq, d=8):
    return torch.randn(batch, num, seq, d, dtype=torch.float64).requires_grad_()


def apart(lengths):
    """Rows that have nothing in common."""
    ids = torch.arange(len(lengths))[:, None].expand(-1, max(lengths))
    return Segments(ids, torch.tensor(lengths))


def expected(q, k, v, scaling, mask=None):
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    allowed = causal if mask is None else causal & mask
    return F.scaled_dot_product_attention(q, k, v, allowed, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])


def same(found, wanted, inputs):
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(wanted)
    mine = torch.autograd.grad((found * weight).sum(), inputs)
    theirs = torch.autograd.grad((wanted * weight).sum(), inputs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("seq", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("num_heads", [(4, 4), (6, 2), (4, 1)])
def test_attention_has_torch_s_values_and_gradients(seq, num_heads):
    q, k, v = (heads(2, n, seq) for n in (num_heads[0], num_heads[1], num_heads[1]))
    same(causal_attention(q, k, v, 0.3), expected(q, k, v, 0.3), [q, k, v])


def test_attention_passes_gradcheck(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 2)
    q, k, v = heads(1, 4, 5, 3), heads(1, 2, 5, 3), heads(1, 2, 5, 3)
    assert torch.autograd.gradcheck(lambda *qkv: causal_attention(*qkv, 0.7), (q, k, v))


def test_heads_that_lie_token_by_token_are_read_as_they_lie():
    q, k, v = (torch.randn(2, 70, n, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for n in (4, 2, 2))
    same(causal_attention(q, k, v, 0.3), expected(q, k, v, 0.3), [q, k, v])


@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 4], [70, 2, 65], [1, 1, 1]])
@pytest.mark.parametrize("num_heads", [(4, 4), (6, 2)])
def test_segments_see_themselves_alone(lengths, num_heads):
    of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    q, k, v = (heads(1, n, sum(lengths)) for n in (num_heads[0], num_heads[1], num_heads[1]))
    found = causal_attention(q, k, v, 0.3, apart(lengths))
    same(found, expected(q, k, v, 0.3, of[:, None] == of), [q, k, v])


def test_rows_that_begin_alike_share_their_beginning():
    ids = torch.tensor([[5, 6, 7, 8, 0], [5, 6, 9, 0, 0], [5, 6, 7, 8, 9], [1, 6, 7, 0, 0]])
    segments = Segments(ids, torch.tensor([4, 3, 5, 3]))
    assert segments.shares
    assert segments.depths.tolist() == [0, 1, 2, 3, 2, 4, 0, 1, 2]
    assert segments.places.tolist() == [[0, 1, 2, 3, 3], [0, 1, 4, 4, 4], [0, 1, 2, 3, 5], [6, 7, 8, 8, 8]]
    assert ids.flatten()[segments.firsts].tolist() == [5, 6, 7, 8, 9, 9, 1, 6, 7]
    q, k, v = (heads(1, n, 9) for n in (4, 2, 2))
    seen = torch.zeros(9, 9, dtype=torch.bool)
    for path in segments.places.tolist():
        for place, token in enumerate(path):
            seen[token, path[: place + 1]] = True
    wanted = F.scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True)
    same(causal_attention(q, k, v, 0.3, segments), wanted, [q, k, v])
    assert not Segments(ids, torch.tensor([4, 3, 5, 3]), may_share=False).shares


def test_segments_that_saw_each_other_would_be_noticed():
    lengths = [3, 4]
    q, k, v = (heads(1, 2, 7) for _ in range(3))
    found = causal_attention(q, k, v, 0.3, apart(lengths))
    assert (found - expected(q, k, v, 0.3))[:, :, 3:].abs().max() > 0.1


def test_what_comes_later_has_no_influence_nor_gradient():
    q, k, v = (heads(1, 2, 100) for _ in range(3))
    causal_attention(q, k, v, 0.3)[:, :, 40].sum().backward()
    for t in (q, k, v):
        assert not t.grad[:, :, 41:].any()
    assert k.grad[:, :, :41].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_no_worse_than_torch_s(dtype):
    q, k, v = (heads(2, 4, 100).detach() for _ in range(3))
    exact = expected(q, k, v, 0.3)
    mine = causal_attention(q.to(dtype), k.to(dtype), v.to(dtype), 0.3)
    theirs = expected(q.to(dtype), k.to(dtype), v.to(dtype), 0.3)
    assert mine.dtype == dtype
    assert (mine - exact).norm() <= 2 * (theirs - exact).norm()


def test_no_scores_of_all_pairs_outlive_their_block():
    q, k, v = (heads(1, 2, 1000) for _ in range(3))
    with torch.profiler.profile(profile_memory=True) as profile:
        causal_attention(q, k, v, 0.3).sum().backward()
    assert 0 < max(e.cpu_memory_usage for e in profile.events()) < 2 * 1000 * 1000 * 8 / 4


@pytest.mark.parametrize("shape", [(1, 7), (3, 4)])
def test_apart_and_together_are_each_other_s_opposite(shape):
    lengths = torch.tensor([shape[1]] * shape[0])
    x = torch.randn(1, 2, int(lengths.sum()), 3)
    segments = apart(lengths.tolist())
    assert torch.equal(segments.together(segments.apart(x)), x)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_segments_have_the_same_values_and_gradients(dtype):
    ids = torch.tensor([[5, 6, 7, 8, 0], [5, 6, 9, 0, 0], [1, 6, 7, 0, 0]])
    segments = Segments(ids, torch.tensor([4, 3, 3]))
    q, k, v = (heads(1, n, segments.num_tokens, 64) for n in (4, 2, 2))
    wanted = causal_attention(q, k, v, 0.1, segments)
    wanted.square().sum().backward()
    there = [x.detach().to("cuda", dtype).requires_grad_() for x in (q, k, v)]
    found = causal_attention(*there, 0.1, segments.to(torch.device("cuda")))
    found.square().sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    assert (found.cpu() - wanted).norm() < tolerance * wanted.norm()
    for mine, theirs in zip(there, (q, k, v), strict=True):
        assert (mine.grad.cpu() - theirs.grad).norm() < tolerance * theirs.grad.norm()
