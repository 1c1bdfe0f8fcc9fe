import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from core import Factors, LoRAError, LoRALinear
from core.matrices import is_conv1d, matrix_shape

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["linear", "conv1d"]
OUT, IN, R = 20, 24, 3


def base(kind="linear", bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT, bias=bias) if kind == "linear" else Conv1D(OUT, IN)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer.to(dtype)


def adapted(kind="linear", dtype=torch.float32, trained=True, **options):
    options = {"scaling": 0.7, "generator": torch.Generator().manual_seed(3)} | options
    layer = LoRALinear(base(kind, options.pop("bias", True), dtype), options.pop("r", R), **options)
    if trained:
        nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(4))
    return layer


def dense(layer):
    """W0 as a map from in to out, and strength · scaling · B·A, multiplied out in float64."""
    W = layer.weight.detach().double()
    delta = layer.strength * layer.scaling * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())
    return (W.T if layer.transposed else W), delta


def x_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_layer_equals_its_base_bit_for_bit(kind, dtype, training):
    layer = adapted(kind, dtype, trained=False, dropout=0.5).train(training)
    x = x_of(5, 7, IN, dtype=dtype)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("shape", [(IN,), (6, IN), (2, 3, IN), (0, IN)])
@pytest.mark.parametrize("strength", [1.0, 0.25, -2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_x_times_W0_plus_delta(kind, strength, shape):
    layer = adapted(kind).double()
    layer.strength = strength
    W, delta = dense(layer)
    x = x_of(*shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ (W + delta).T + layer.bias, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    share=st.floats(0, 1),
    scaling=st.floats(0.01, 100),
    strength=st.floats(-3, 3),
)
def test_forward_and_merge_agree_with_the_dense_sum_for_any_shape(shape, share, scaling, strength):
    r = 1 + round(share * (min(shape) - 1))
    layer = LoRALinear(nn.Linear(shape[1], shape[0]), r, scaling).double()
    nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(4))
    layer.strength = strength
    W, delta = dense(layer)
    x = x_of(4, shape[1], dtype=torch.float64)
    expected = x @ (W + delta).T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-10)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("strength", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_sum_and_reach_only_A_and_B(kind, strength):
    layer = adapted(kind).double()
    layer.strength = strength
    x = x_of(6, IN, dtype=torch.float64).requires_grad_()
    layer(x).square().sum().backward()
    W, _ = dense(layer)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    twin = x.detach().clone().requires_grad_()
    (twin @ (W + strength * layer.scaling * B @ A).T + layer.bias).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, A.grad, rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(layer.lora_B.grad, B.grad, rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-11, atol=1e-10)
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_the_first_gradient_is_zero_on_A_and_not_on_B():
    layer = adapted(trained=False)
    layer(x_of(6, IN)).square().sum().backward()
    assert layer.lora_A.grad.count_nonzero() == 0
    assert layer.lora_B.grad.count_nonzero() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_A_and_B_are_float32_whatever_the_base_and_the_output_is_of_the_inputs_type(dtype):
    layer = adapted(dtype=dtype)
    y = layer(x_of(6, IN, dtype=dtype))
    y.float().sum().backward()
    assert y.dtype == layer.weight.dtype == dtype
    assert {layer.lora_A.dtype, layer.lora_B.dtype, layer.lora_A.grad.dtype, layer.lora_B.grad.dtype} == {torch.float32}
    assert layer.delta_weight().dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_delta_weight_is_scaling_times_B_times_A_out_by_in_for_both_layouts(kind):
    layer = adapted(kind)
    layer.strength = 3.0  # is not in ΔW
    expected = 0.7 * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(layer.delta_weight().double(), expected, rtol=1e-6, atol=1e-6)
    assert not layer.delta_weight().requires_grad
    factors = layer.factors
    assert (factors.r, factors.shape, factors.scaling) == (R, (OUT, IN), 0.7)
    assert not factors.A.requires_grad and not factors.B.requires_grad
    assert torch.linalg.matrix_rank(layer.delta_weight()) == R


def test_factors_multiply_out_to_delta_weight():
    factors = Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0], [5.0]]), 0.5)
    assert torch.equal(factors.delta_weight(), torch.tensor([[1.5, 3.0], [2.0, 4.0], [2.5, 5.0]]))
    assert (factors.r, factors.shape) == (1, (3, 2))


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_keeps_the_function_up_to_the_rounding_of_the_type(kind, dtype, strength):
    layer = adapted(kind, dtype)
    layer.strength = strength
    W, delta = dense(layer)
    x = x_of(16, IN, dtype=dtype)
    before = layer(x)
    layer.merge()
    # Every rounding on either way is at most eps of the sum of what is added up without signs.
    size = x.double().abs() @ (W.abs() + delta.abs()).T + layer.bias.double().abs()
    eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps  # A and B are float32
    exact = x.double() @ (W + delta).T + layer.bias.double()
    assert ((layer(x).double() - exact).abs() <= 4 * eps * size).all()
    assert ((before.double() - exact).abs() <= 4 * eps * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weight_is_the_exact_sum_rounded_once(kind, dtype):
    layer = adapted(kind, dtype)
    W, delta = dense(layer)
    layer.merge()
    merged, _ = dense(layer)
    half_ulp = torch.finfo(dtype).eps / 2
    float32 = torch.finfo(torch.float32).eps * 8 * (W.abs() + delta.abs())  # the sum itself is taken there
    assert ((merged - (W + delta)).abs() <= half_ulp * (W + delta).abs() + float32).all()
    assert layer.weight.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_unmerge_is_bit_exact_after_twenty_round_trips(kind, dtype):
    layer = adapted(kind, dtype)
    original, bits = layer.weight, layer.weight.clone()
    for i in range(20):
        layer.strength = 1 + 10.0 * i
        layer.merge()
        assert not torch.equal(layer.weight, bits)
        layer.unmerge()
        assert layer.weight is original
        assert torch.equal(layer.weight, bits)


def test_unmerge_is_bit_exact_after_A_and_B_changed_while_merged():
    layer = adapted(dtype=torch.bfloat16)
    bits = layer.weight.clone()
    layer.merge()
    with torch.no_grad():
        layer.lora_A.fill_(100.0)
        layer.lora_B.fill_(1e6)
    layer.unmerge()
    assert torch.equal(layer.weight, bits)


def test_merging_twice_adds_delta_once_and_unmerging_twice_is_harmless():
    layer = adapted()
    bits = layer.weight.clone()
    layer.unmerge()
    assert torch.equal(layer.weight, bits) and not layer.merged
    layer.merge()
    once = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, once) and layer.merged
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.weight, bits) and not layer.merged


@pytest.mark.parametrize("merged", [False, True])
def test_train_eval_and_forward_never_merge_nor_unmerge(merged):
    layer = adapted()
    if merged:
        layer.merge()
    weight = layer.weight
    for act in (layer.train, layer.eval, lambda: layer(x_of(2, IN)), lambda: layer.train(False), layer.state_dict):
        act()
        assert layer.merged is merged
        assert layer.weight is weight


@pytest.mark.parametrize("merged", [False, True])
def test_state_dict_holds_the_base_and_A_and_B_only(merged):
    layer = adapted()
    if merged:
        layer.merge()
    assert set(layer.state_dict()) == {"base_layer.weight", "base_layer.bias", "lora_A", "lora_B"}
    assert len(list(layer.parameters())) == 4
    assert not layer.weight.requires_grad


def test_unmerge_after_a_move_gives_W0_in_the_new_type():
    layer = adapted()
    bits = layer.weight.clone()
    layer.merge()
    layer.to(torch.float64)
    layer.unmerge()
    assert layer.weight.dtype == torch.float64
    assert torch.equal(layer.weight, bits.double())


def test_a_copy_of_a_merged_layer_unmerges_alone():
    layer = adapted()
    bits = layer.weight.clone()
    layer.merge()
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert torch.equal(twin.weight, bits)
    assert layer.merged and not torch.equal(layer.weight, bits)
    layer.unmerge()
    assert torch.equal(layer.weight, bits)
    assert layer.weight is not twin.weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strength_zero_is_the_base_bit_for_bit(kind, dtype):
    layer = adapted(kind, dtype)
    x = x_of(5, IN, dtype=dtype)
    assert not torch.equal(layer(x), layer.base_layer(x))
    layer.strength = 0
    assert torch.equal(layer(x), layer.base_layer(x))
    bits = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, bits)


def test_strength_zero_is_the_base_even_if_training_diverged():
    layer = adapted()
    nn.init.constant_(layer.lora_B, math.inf)
    layer.strength = 0.0
    assert torch.equal(layer(x_of(5, IN)), layer.base_layer(x_of(5, IN)))


@pytest.mark.parametrize("value", [0.5, 2.0, 7.25, -1.0])
def test_the_output_is_linear_in_strength(value):
    layer = adapted().double()
    x = x_of(5, IN, dtype=torch.float64)
    at = {}
    for s in (0.0, 1.0, value):
        layer.strength = s
        at[s] = layer(x)
    torch.testing.assert_close(at[value] - at[0.0], value * (at[1.0] - at[0.0]), rtol=1e-12, atol=1e-12)


def test_strength_cannot_change_while_merged():
    layer = adapted()
    layer.merge()
    with pytest.raises(LoRAError, match=r"`strength` \(=0.5\) must not change while .* merged; call unmerge first"):
        layer.strength = 0.5
    layer.strength = 1.0  # no change
    layer.unmerge()
    layer.strength = 0.5
    assert layer.strength == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_strength_must_be_finite(value):
    layer = adapted()
    with pytest.raises(LoRAError, match=r"`strength` \(=.*\) must be a finite number"):
        layer.strength = value
    assert layer.strength == 1.0


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seed_gives_one_A_whatever_the_bases_type_and_B_is_zero(init, dtype):
    def layer(seed, dtype=torch.float32):
        return adapted(dtype=dtype, trained=False, init=init, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(layer(1, dtype).lora_A, layer(1).lora_A)
    assert not torch.equal(layer(2).lora_A, layer(1).lora_A)
    assert layer(1, dtype).lora_B.count_nonzero() == 0


def test_kaiming_is_torchs_own_with_a_root_5():
    layer = LoRALinear(nn.Linear(300, 100), 64, 1.0, generator=torch.Generator().manual_seed(9))
    expected = nn.init.kaiming_uniform_(
        torch.empty(64, 300), a=math.sqrt(5), generator=torch.Generator().manual_seed(9)
    )
    torch.testing.assert_close(layer.lora_A.detach(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("r", [4, 64])
def test_gaussian_has_variance_1_over_r(r):
    A = LoRALinear(nn.Linear(4000, 100), r, 1.0, init="gaussian", generator=torch.Generator().manual_seed(9)).lora_A
    assert A.mean().item() == pytest.approx(0, abs=4 / math.sqrt(r * A.numel()))
    assert A.var().item() == pytest.approx(1 / r, rel=0.05)
    assert A.abs().max() > 3.5 / math.sqrt(r)  # no uniform draw goes so far


@pytest.mark.parametrize(
    "module",
    [nn.ConvTranspose2d(2, 2, 1), nn.Embedding(4, 4, max_norm=1.0), nn.LayerNorm(4), nn.Bilinear(2, 2, 2)],
)
def test_a_layer_of_another_kind_is_refused(module):
    assert matrix_shape(module) is None
    with pytest.raises(LoRAError, match=rf"`base_layer` \(={type(module).__name__}\) must be a linear layer .*Conv1D"):
        LoRALinear(module, 1, 1.0)


@pytest.mark.parametrize("r", [0, -1])
def test_r_must_be_at_least_1(r):
    with pytest.raises(LoRAError, match=rf"`r` \(={r}\) must be at least 1"):
        LoRALinear(nn.Linear(IN, OUT), r, 1.0)


def test_an_r_above_the_matrix_is_taken_as_adapters_of_others_have_it():
    layer = LoRALinear(nn.Linear(IN, OUT), OUT + 1, 1.0)
    assert layer(torch.ones(2, IN)).shape == (2, OUT)


def test_conv1d_is_told_by_its_shape_and_not_by_its_name_alone():
    class Conv1D(nn.Conv1d):  # a namesake
        pass

    assert is_conv1d(base("conv1d"))
    assert not is_conv1d(Conv1D(2, 2, 1))
    assert not is_conv1d(nn.Linear(2, 2))
    assert matrix_shape(base("conv1d")) == matrix_shape(base("linear")) == (OUT, IN)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_layer_is_kept_as_the_same_object_and_frozen(kind):
    module = base(kind)
    weight = module.weight
    layer = LoRALinear(module, 2, 1.0)
    assert layer.base_layer is module and layer.weight is weight and layer.bias is module.bias
    assert not module.weight.requires_grad and not module.bias.requires_grad
    assert LoRALinear(base(bias=False), 2, 1.0).bias is None


def test_on_the_meta_device_nothing_is_drawn():
    layer = LoRALinear(nn.Linear(1 << 20, 1 << 20, device="meta"), 8, 1.0)
    assert layer.lora_A.is_meta and layer.lora_B.is_meta
    assert layer.lora_A.shape == (8, 1 << 20) and layer.lora_B.shape == (1 << 20, 8)


@pytest.mark.parametrize("learns", [True, False])
def test_dropout_drops_the_adapters_input_and_not_the_bases(learns):
    layer = adapted(dropout=0.5).train()
    x = x_of(6, IN)
    torch.manual_seed(11)
    with torch.set_grad_enabled(learns):
        y = layer(x)
    torch.manual_seed(11)
    dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(y, layer.base_layer(x) + dropped @ layer.delta_weight().T, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, layer.base_layer(x) + x @ layer.delta_weight().T)


@pytest.mark.parametrize("state", ["eval", "merged"])
def test_dropout_is_off_in_eval_and_when_merged(state):
    layer = adapted(dropout=0.5)
    layer.eval()
    expected = layer(x_of(6, IN))
    if state == "merged":
        layer.train()
        layer.merge()
    assert torch.allclose(layer(x_of(6, IN)), expected, atol=1e-4)


def test_printing_a_layer_says_its_rank_scaling_strength_and_state():
    layer = adapted()
    layer.strength = 0.25
    assert "r=3, scaling=0.7, strength=0.25, merged=False" in repr(layer)
    layer.merge()
    assert "merged=True" in repr(layer)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1.0, 0.0, -0.5])
def test_without_gradients_a_layer_gives_what_it_gives_with_them(kind, dtype, value):
    layer = adapted(kind, dtype).eval()
    layer.strength = value
    x = x_of(2, 3, IN).to(dtype)
    with torch.no_grad():
        found = layer(x)
    expected = layer(x)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert (found - expected).float().norm() <= (1e-6 if dtype == torch.float32 else 0.01) * expected.float().norm()
