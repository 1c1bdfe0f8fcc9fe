"""Each kernel beside the plain code: values and gradients in float64, and what it keeps for its backward pass."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from core import kernels
from core.kernels import ACTIVATIONS, Dropout, Linear, linear_cross_entropy

F64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def learned(*shape):
    return torch.randn(*shape, **F64).requires_grad_()


def layer(out, width, *, r=2, bias=True, dropout=None, scale=0.7):
    """A frozen matrix with A and B beside it."""
    adapted = (learned(r, width), learned(out, r)) if r else (None, None)
    return Linear(torch.randn(out, width, **F64), torch.randn(out, **F64) if bias else None, *adapted, scale, dropout)


def plain(x, linear, dropped=lambda x: x):
    """The same by the book."""
    h = F.linear(x, linear.W, linear.bias)
    return h if linear.A is None else h + linear.scale * F.linear(F.linear(dropped(x), linear.A), linear.B)


def factors(*layers):
    return [t for linear in layers for t in (linear.A, linear.B) if t is not None]


def same(found, expected, inputs):
    """Asserts that two tensors and their gradients by `inputs` are the same to rounding in float64."""
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    of = [t for t in inputs if t.requires_grad]
    for mine, theirs in zip(
        torch.autograd.grad((found * weight).sum(), of), torch.autograd.grad((expected * weight).sum(), of), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def kept(work):
    """Returns the tensors that autograd keeps from running `work`, weights and factors included, each storage once."""
    found = {}
    with saved_tensors_hooks(lambda t: found.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        result = work()
    assert result.requires_grad
    return list(found.values())


# The linear layer.


@pytest.mark.parametrize("r", [0, 1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x_learns", [True, False])
def test_a_linear_layer_has_the_plain_values_and_gradients(r, bias, x_learns):
    x = torch.randn(2, 5, 4, **F64).requires_grad_(x_learns)
    linear = layer(6, 4, r=r, bias=bias)
    found = kernels.linear(x, linear)
    if r or x_learns:
        same(found, plain(x, linear), [x, *factors(linear)])
    else:
        assert not found.requires_grad


def test_a_linear_layer_passes_gradcheck():
    x, linear = learned(3, 4), layer(6, 4)
    A, B = factors(linear)
    assert torch.autograd.gradcheck(lambda x, A, B: kernels.linear(x, linear._replace(A=A, B=B)), (x, A, B))


def test_a_transposed_weight_is_a_view_as_good():
    x, W = learned(3, 4), torch.randn(4, 6, **F64)
    linear = layer(6, 4)._replace(W=W.T)
    same(kernels.linear(x, linear), plain(x, linear), [x, *factors(linear)])


def test_a_linear_layer_keeps_x_alone_of_the_activations():
    x, linear = torch.randn(50, 4, **F64), layer(60, 4)
    large = [t for t in kept(lambda: kernels.linear(x, linear)) if 50 in t.shape and t.shape[-1] > linear.A.shape[0]]
    assert len(large) == 1
    assert large[0].data_ptr() == x.data_ptr()
    assert len([t for t in kept(lambda: plain(x, linear)) if 50 in t.shape]) >= 2


def test_a_layer_that_is_not_adapted_keeps_no_activation():
    x, linear = learned(50, 4), layer(60, 4, r=0)
    assert not [t for t in kept(lambda: kernels.linear(x, linear)) if 50 in t.shape]


def test_of_an_input_that_learns_nothing_no_gradient_is_formed(monkeypatch):
    x, linear = torch.randn(50, 4, **F64), layer(60, 4)
    product, shapes = kernels.product, []

    def watched(x, W, bias=None):
        shapes.append((tuple(x.shape), tuple(W.shape)))
        return product(x, W, bias)

    monkeypatch.setattr(kernels, "product", watched)
    kernels.linear(x, linear).sum().backward()
    assert ((50, 60), (4, 60)) not in shapes
    kernels.linear(x.requires_grad_(), linear).sum().backward()
    assert ((50, 60), (4, 60)) in shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_of_another_type_trains_float32_factors(dtype):
    x, linear = torch.randn(7, 4, dtype=dtype), layer(6, 4)
    linear = linear._replace(
        W=linear.W.to(dtype),
        bias=linear.bias.to(dtype),
        A=linear.A.detach().float().requires_grad_(),
        B=linear.B.detach().float().requires_grad_(),
    )
    found = kernels.linear(x, linear)
    found.sum().backward()
    assert found.dtype == dtype
    assert linear.A.grad.dtype == linear.B.grad.dtype == torch.float32
    wide = linear._replace(W=linear.W.float(), bias=linear.bias.float())
    expected = torch.autograd.grad(plain(x.float(), wide).sum(), factors(linear))
    for mine, theirs in zip((linear.A.grad, linear.B.grad), expected, strict=True):
        assert torch.linalg.vector_norm(mine - theirs) < (0.02 if dtype == torch.bfloat16 else 1e-5) * theirs.norm()


def test_float32_products_are_as_exact_as_torch_s_own():
    x, W, bias = torch.randn(64, 300), torch.randn(200, 300), torch.randn(200)
    exact = F.linear(x.double(), W.double(), bias.double())
    own = (F.linear(x, W, bias) - exact).norm()
    assert (kernels.product(x, W, bias) - exact).norm() <= 2 * own
    assert (kernels.product(x, W.T.contiguous().T, bias) - exact).norm() <= 2 * own


# Dropout.


def test_dropout_is_the_same_whenever_it_is_asked_for_and_another_for_another_seed():
    dropout, x = Dropout.draw(0.3), torch.randn(40, 33)
    other = Dropout.draw(0.3)
    assert dropout is not None
    assert other is not None
    assert torch.equal(dropout(x), dropout(x))
    assert not torch.equal(dropout(x), other(x))
    assert Dropout.draw(0.0) is None


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    kept_ = Dropout(p, 3)(torch.ones(400, 500))
    assert abs((kept_ == 0).float().mean().item() - p) < 0.01
    assert abs(kept_.mean().item() - 1) < 0.02
    assert len(kept_.unique()) == 2


def test_dropout_of_everything_leaves_nothing():
    assert not Dropout(1.0, 3)(torch.ones(4, 5)).any()


def test_dropout_drops_each_number_for_itself():
    dropped = (Dropout(0.5, 3)(torch.ones(1000, 64)) == 0).float()
    assert (dropped.mean(0) - 0.5).abs().max() < 0.1
    pairs = (dropped.T @ dropped / 1000).fill_diagonal_(0.25)
    assert (pairs - 0.25).abs().max() < 0.1


def test_dropout_of_more_numbers_than_the_tape_has_reads_it_several_times_from_other_places():
    kept_ = Dropout(0.5, 3).kept(torch.ones(2, kernels.TAPE))
    pieces = kept_.view(4, -1)
    assert (kept_.mean() - 0.5).abs() < 0.01
    assert all(not torch.equal(pieces[i], pieces[j]) for i in range(4) for j in range(i))


def test_a_dropout_that_was_forecast_first_is_a_real_one_afterwards():
    dropout = Dropout(0.123, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):  # as forecast_memory
        assert dropout.kept(torch.ones(40, 50)).shape == (40, 50)
    assert (dropout.kept(torch.ones(40, 50)) == 0).float().mean().item() == pytest.approx(0.123, abs=0.05)


@pytest.mark.parametrize("x_learns", [True, False])
def test_a_linear_layer_with_dropout_has_the_plain_gradients(x_learns):
    x, dropout = torch.randn(6, 4, **F64).requires_grad_(x_learns), Dropout(0.4, 11)
    linear = layer(5, 4, dropout=dropout)
    mask = dropout(torch.ones(6, 4, **F64))
    assert 0 < (mask == 0).sum() < mask.numel()
    same(kernels.linear(x, linear), plain(x, linear, lambda x: x * mask), [x, *factors(linear)])


# The MLP.


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("which", ["all", "up", "down", "none"])
def test_an_mlp_has_the_plain_values_and_gradients(activation, is_gated, which):
    x = learned(2, 5, 4)
    r = {"all": (2, 3, 1), "up": (0, 2, 0), "down": (0, 0, 2), "none": (0, 0, 0)}[which]
    gate, up, down = layer(6, 4, r=r[0]), layer(6, 4, r=r[1], bias=False), layer(4, 6, r=r[2])
    act = ACTIVATIONS[activation]
    found = kernels.mlp(x, gate if is_gated else None, up, down, act)
    h = act.forward(plain(x, gate)) * plain(x, up) if is_gated else act.forward(plain(x, up))
    same(found, plain(h, down), [x, *factors(*([gate] if is_gated else []), up, down)])


def test_an_mlp_passes_gradcheck():
    x, gate, up, down = learned(3, 4), layer(5, 4), layer(5, 4), layer(4, 5)

    def run(x, *f):
        layers = [linear._replace(A=f[2 * i], B=f[2 * i + 1]) for i, linear in enumerate((gate, up, down))]
        return kernels.mlp(x, *layers, ACTIVATIONS[0])

    assert torch.autograd.gradcheck(run, (x, *factors(gate, up, down)))


def test_an_mlp_with_dropout_has_the_plain_gradients():
    x, drops = learned(6, 4), [Dropout(0.4, seed) for seed in (1, 2, 3)]
    masks = [d(torch.ones(6, n, **F64)) for d, n in zip(drops, (4, 4, 5), strict=True)]
    gate, up, down = layer(5, 4, dropout=drops[0]), layer(5, 4, dropout=drops[1]), layer(4, 5, dropout=drops[2])
    h = F.silu(plain(x, gate, lambda x: x * masks[0])) * plain(x, up, lambda x: x * masks[1])
    expected = plain(h, down, lambda h: h * masks[2])
    same(kernels.mlp(x, gate, up, down, ACTIVATIONS[0]), expected, [x, *factors(gate, up, down)])


def test_a_gated_mlp_keeps_its_input_and_what_gate_and_up_give():
    x, gate, up, down = learned(50, 4), layer(60, 4), layer(60, 4), layer(4, 60)
    large = [t for t in kept(lambda: kernels.mlp(x, gate, up, down, ACTIVATIONS[0])) if t.shape[0] == 50]
    assert sorted(t.shape[-1] for t in large if t.shape[-1] > 2) == [4, 60, 60]


# Norms, and what follows from them.


@pytest.mark.parametrize("x_learns", [True, False])
def test_a_root_mean_square_norm_has_the_plain_values_and_gradients(x_learns):
    x, weight = torch.randn(2, 5, 8, **F64).requires_grad_(x_learns), torch.randn(8, **F64)
    expected = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    found = kernels.rms_norm(x, weight, 1e-6)
    if x_learns:
        same(found, expected, [x])
        assert torch.autograd.gradcheck(lambda x: kernels.rms_norm(x, weight, 1e-6), (x,))
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_norm_has_the_plain_values_and_gradients(bias):
    x, weight, b = learned(2, 5, 8), torch.randn(8, **F64), torch.randn(8, **F64) if bias else None
    same(kernels.layer_norm(x, weight, b, 1e-5), F.layer_norm(x, (8,), weight, b, 1e-5), [x])
    assert torch.autograd.gradcheck(lambda x: kernels.layer_norm(x, weight, b, 1e-5), (x,))


NORMS = {
    "rms": lambda x, w: kernels.rms_norm(x, w, 1e-6),
    "layer": lambda x, w: kernels.layer_norm(x, w, None, 1e-6),
}
PLAIN_NORMS = {
    "rms": lambda x, w: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * w,
    "layer": lambda x, w: F.layer_norm(x, x.shape[-1:], w, None, 1e-6),
}


@pytest.mark.parametrize("norm", NORMS)
def test_matrices_that_read_one_norm_have_the_plain_gradients_and_keep_its_output_not(norm):
    x, weight = learned(50, 4), torch.randn(4, **F64)
    q, k, gate, up, down = layer(7, 4), layer(9, 4), layer(60, 4), layer(60, 4), layer(4, 60)

    def run():
        y = NORMS[norm](x, weight)
        z = NORMS[norm](y, weight)
        return torch.cat(
            [kernels.linear(y, q), kernels.linear(y, k), kernels.mlp(z, gate, up, down, ACTIVATIONS[0])], 1
        )

    y = PLAIN_NORMS[norm](x, weight)
    z = PLAIN_NORMS[norm](y, weight)
    h = F.silu(plain(z, gate)) * plain(z, up)
    expected = torch.cat([plain(y, q), plain(y, k), plain(h, down)], 1)
    inputs = [x, *factors(q, k, gate, up, down)]
    same(run(), expected, inputs)
    of_width_four = [t for t in kept(run) if t.shape == (50, 4)]
    assert {t.data_ptr() for t in of_width_four} == {x.data_ptr(), *(t.data_ptr() for t in of_width_four[1:])}
    assert len(of_width_four) == 2  # x and y, of which the norms themselves are made; z is made again


def test_gradients_can_be_taken_twice_through_a_norm():
    x, weight, q = learned(5, 4), torch.randn(4, **F64), layer(7, 4)
    total = kernels.linear(kernels.rms_norm(x, weight, 1e-6), q).sum()
    first = torch.autograd.grad(total, [x, *factors(q)], retain_graph=True)
    second = torch.autograd.grad(total, [x, *factors(q)])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# The loss.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 50])
@pytest.mark.parametrize("logits_at_once", [1, 23 * 20, 2**23])
def test_the_loss_has_the_plain_values_and_gradients_in_chunks_of_any_size(monkeypatch, bias, num_rows, logits_at_once):
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", logits_at_once)
    hidden, W, b = learned(num_rows, 8), 3 * torch.randn(23, 8, **F64), torch.randn(23, **F64) if bias else None
    targets = torch.randint(0, 23, (num_rows,))
    expected = F.cross_entropy(F.linear(hidden, W, b), targets, reduction="none")
    same(linear_cross_entropy(hidden, W, b, targets), expected, [hidden])


def test_the_loss_passes_gradcheck():
    hidden, W, targets = learned(5, 4), torch.randn(7, 4, **F64), torch.randint(0, 7, (5,))
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, W, None, targets), (hidden,))


def test_the_loss_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", 16 * 4000)
    hidden, W, targets = learned(640, 4), torch.randn(4000, 4, **F64), torch.randint(0, 4000, (640,))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, W, None, targets).sum().backward()
    assert 0 < max(e.cpu_memory_usage for e in profile.events()) < 640 * 4000 * 8 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_is_exact_for_logits_far_from_zero(dtype):
    hidden = (50 * torch.randn(40, 8)).to(dtype).requires_grad_()
    W, targets = torch.randn(23, 8).to(dtype), torch.randint(0, 23, (40,))
    losses = linear_cross_entropy(hidden, W, None, targets)
    expected = F.cross_entropy(F.linear(hidden, W).float(), targets, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-3)
    (mine,) = torch.autograd.grad(losses.sum(), hidden)
    (theirs,) = torch.autograd.grad(expected.sum(), hidden)
    assert mine.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert (mine - theirs).float().norm() < tolerance * theirs.float().norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_row_spoils_its_own_loss_alone(value):
    hidden = torch.randn(40, 8)
    hidden[7, 3] = value
    losses = linear_cross_entropy(hidden, torch.randn(23, 8), None, torch.randint(0, 23, (40,)))
    assert torch.isfinite(losses).logical_not().nonzero().flatten().tolist() == [7]
