"""Embeddings, convolutions, slices, DoRA, PiSSA and OLoRA: each against its dense form."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from core import LoRAConfig, LoRAError, LoRALinear, adaptable, eject, inject, lora_layers, merge, unmerge
from core.layers import adapted_layer
from core.matrices import matrix_shape

R, SCALING = 3, 0.7


def conv1d() -> nn.Module:
    layer = Conv1D(20, 24)
    nn.init.normal_(layer.bias)
    return layer


class Packed(nn.Module):
    """A layer that only computes like a linear one: its weight lies in eight bits, as quantized ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 24, 20
        self.register_buffer("codes", torch.randint(-127, 127, (20, 24), dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.codes.to(x.dtype) / 127)


KINDS = {
    "linear": (lambda: nn.Linear(24, 20), (5, 24)),
    "linear without bias": (lambda: nn.Linear(24, 20, bias=False), (2, 5, 24)),
    "conv1d of gpt2": (conv1d, (5, 24)),
    "embedding": (lambda: nn.Embedding(24, 20), None),
    "embedding with padding": (lambda: nn.Embedding(24, 20, padding_idx=0), None),
    "conv1d": (lambda: nn.Conv1d(6, 20, 3, stride=2, padding=1), (4, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 20, (3, 2), padding=1, bias=False), (4, 6, 8, 7)),
    "conv2d, dilated, reflecting": (
        lambda: nn.Conv2d(6, 20, 3, dilation=2, padding=2, padding_mode="reflect"),
        (2, 6, 8, 8),
    ),
    "conv2d in groups": (lambda: nn.Conv2d(6, 20, 3, groups=2), (2, 6, 8, 7)),
    "conv2d, depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding="same"), (2, 8, 8, 7)),
    "conv3d": (lambda: nn.Conv3d(3, 20, 2), (2, 3, 4, 5, 4)),
}
STARTS = ["kaiming", "gaussian", "pissa", "olora"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def base(kind, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = KINDS[kind][0]()
        for p in layer.parameters():
            nn.init.normal_(p)
    return layer.to(dtype)


def x_of(kind, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    shape = KINDS[kind][1]
    if shape is None:
        return torch.randint(0, 24, (4, 7), generator=generator)
    return torch.randn(*shape, generator=generator).to(dtype)


def adapted(kind, *, trained=True, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(3)
    layer = adapted_layer(base(kind, dtype), R, SCALING, generator=generator, **options)
    if trained:
        for p, seed in ((layer.lora_A, 4), (layer.lora_B, 5)):
            with torch.no_grad():
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        if layer.magnitude is not None:
            with torch.no_grad():
                layer.magnitude *= 1 + 0.2 * torch.rand(len(layer.magnitude), generator=generator)
    return layer


def with_weight(kind, matrix, dtype=torch.float64):
    """The base layer with another matrix in place of its own."""
    layer = base(kind, dtype)
    with torch.no_grad():
        is_flat = isinstance(layer, (Conv1D, nn.Embedding))
        layer.weight.copy_((matrix.T if is_flat else matrix).reshape(layer.weight.shape))
    return layer


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_layer_equals_its_base_bit_for_bit(kind, init, dora, dtype):
    layer = adapted(kind, trained=False, dtype=dtype, init=init, dora=dora)
    x = x_of(kind, dtype)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_forward_and_merge_are_the_base_with_W0_plus_delta(kind, init, dora, strength):
    layer = adapted(kind, init=init, dora=dora).double()
    layer.strength = strength
    x = x_of(kind, torch.float64)
    W0 = layer.weight_matrix().clone()
    expected = with_weight(kind, W0 + strength * layer.delta_weight().double())(x)
    # The norms of DoRA's rows are float32.
    torch.testing.assert_close(layer(x), expected, rtol=1e-5 if dora else 1e-11, atol=1e-4 if dora else 1e-10)
    weight = layer.weight
    before = weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5 if dora else 1e-11, atol=1e-4 if dora else 1e-10)
    layer.unmerge()
    assert layer.weight is weight and torch.equal(weight, before)


@pytest.mark.parametrize("init", STARTS)
def test_delta_weight_is_that_of_the_factors_and_of_rank_at_most_2r(kind, init):
    layer = adapted(kind, init=init)
    factors = layer.factors
    assert factors.shape == matrix_shape(layer.base_layer) == tuple(layer.delta_weight().shape)
    assert factors.r == (2 * R if init in ("pissa", "olora") else R)
    moved = SCALING * (layer.lora_B.double() @ layer.lora_A.double())
    if layer.lora_A0 is not None:
        moved -= SCALING * (layer.lora_B0.double() @ layer.lora_A0.double())
    torch.testing.assert_close(layer.delta_weight().double(), moved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_reach_what_is_trained_and_nothing_else(kind, dora):
    layer = adapted(kind, dora=dora)
    layer(x_of(kind)).square().sum().backward()
    trained = {"lora_A", "lora_B", "magnitude"} if dora else {"lora_A", "lora_B"}
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == trained
    assert all(p.grad.count_nonzero() for p in layer.parameters() if p.grad is not None)


def test_the_rows_of_a_dora_layer_have_the_lengths_of_its_magnitude(kind):
    start = adapted(kind, trained=False, dora=True)
    torch.testing.assert_close(start.magnitude.detach(), start.weight_matrix().norm(dim=1), rtol=1e-5, atol=1e-5)
    layer = adapted(kind, dora=True)
    lengths = (layer.weight_matrix() + layer.delta_weight()).norm(dim=1)
    torch.testing.assert_close(lengths, layer.magnitude.detach(), rtol=1e-4, atol=1e-4)


def test_dora_gradients_are_those_of_the_paper_with_the_norm_held():
    layer = adapted("linear", dora=True).double()
    x = x_of("linear", torch.float64)
    layer(x).square().sum().backward()
    W0, bias = layer.weight.detach(), layer.bias.detach()
    A, B, m = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.magnitude))
    W = W0 + SCALING * B @ A
    (x @ (m[:, None] * W / W.detach().norm(dim=1, keepdim=True)).T + bias).square().sum().backward()
    for name, expected in (("lora_A", A), ("lora_B", B), ("magnitude", m)):
        torch.testing.assert_close(layer.get_parameter(name).grad, expected.grad, rtol=1e-4, atol=1e-3)


def test_pissa_starts_from_the_largest_directions_and_olora_from_the_first_of_qr():
    W = base("linear").weight.detach()
    U, sigma, Vh = torch.linalg.svd(W)
    pissa = adapted("linear", trained=False, init="pissa")
    torch.testing.assert_close(
        SCALING * pissa.lora_B0 @ pissa.lora_A0, U[:, :R] @ sigma[:R].diag() @ Vh[:R], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(pissa.lora_A @ pissa.lora_A.T, (sigma[:R] / SCALING).diag(), rtol=1e-4, atol=1e-4)
    olora = adapted("linear", trained=False, init="olora")
    assert torch.allclose(olora.lora_B.T @ olora.lora_B, torch.eye(R), atol=1e-5)
    torch.testing.assert_close((olora.lora_B @ olora.lora_A)[:, :1], W[:, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_such_a_start_trains_as_it_does_in_peft(init):
    from peft import LoraConfig, get_peft_model

    ours, theirs = nn.Sequential(base("linear")), nn.Sequential(base("linear"))
    inject(ours, LoRAConfig(r=R, alpha=2 * R, target_modules=("0",), init=init))
    theirs = get_peft_model(theirs, LoraConfig(r=R, lora_alpha=2 * R, target_modules=["0"], init_lora_weights=init))
    x, wanted = x_of("linear"), torch.randn(5, 20, generator=torch.Generator().manual_seed(9))
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - wanted).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours(x), base("linear")(x), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_twenty_round_trips_leave_every_bit(kind, dtype):
    layer = adapted(kind, dtype=dtype)
    before = layer.weight.detach().clone()
    for _ in range(20):
        layer.merge()
        layer.unmerge()
    assert torch.equal(layer.weight, before)


# What `LoRALayer.merge` states.
AGREE = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def assert_merged_agrees(model, x, dtype):
    apart = model(x).double()
    merge(model)
    together = model(x).double()
    assert (together - apart).norm() <= AGREE[dtype] * apart.norm()
    assert all(layer.merged for layer in lora_layers(model).values())


@pytest.mark.parametrize("strength", [1.0, -0.5, 2.0])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("dtype", AGREE)
def test_merged_and_unmerged_agree_to_the_stated_bound(kind, dtype, init, dora, strength):
    layer = adapted(kind, dtype=dtype, init=init, dora=dora)
    layer.strength = strength
    assert_merged_agrees(nn.Sequential(layer), x_of(kind, dtype), dtype)


@pytest.mark.parametrize("settings", [{}, {"init": "pissa"}, {"dora": True}], ids=str)
@pytest.mark.parametrize("dtype", AGREE)
def test_merged_and_unmerged_slices_agree_to_the_stated_bound(fused, perturb, dtype, settings):
    fused.to(dtype)
    inject(fused, LoRAConfig(r=2, target_modules=("c_attn.q", "c_attn.v"), **settings))
    assert_merged_agrees(perturb(fused), torch.randn(4, 8).to(dtype), dtype)


class Experts(nn.Module):
    """Three matrices in one parameter, of which each takes its share of x."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.up_proj = nn.Parameter(torch.randn(3, 20, 24, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.linear(part, self.up_proj[i]) for i, part in enumerate(x.chunk(3))])


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("dtype", AGREE)
def test_merged_and_unmerged_experts_agree_to_the_stated_bound(perturb, dtype, init):
    model = nn.Sequential(Experts()).to(dtype)
    inject(model, LoRAConfig(r=2, target_modules=("up_proj",), init=init))
    assert_merged_agrees(perturb(model), torch.randn(9, 24).to(dtype), dtype)


@pytest.mark.parametrize("dtype", AGREE)
def test_merged_experts_are_the_exact_sum_rounded_once(perturb, dtype):
    model = nn.Sequential(Experts()).to(dtype)
    inject(model, LoRAConfig(r=2, target_modules=("up_proj",)))
    layers = lora_layers(perturb(model))
    W0 = {path: layer.weight_matrix().double() for path, layer in layers.items()}
    merge(model)
    for path, layer in layers.items():
        exact = W0[path] + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        error = (layer.weight[layer.index].double() - exact).abs()
        float32 = 8 * torch.finfo(torch.float32).eps * (W0[path].abs() + exact.abs())  # the sum itself is taken there
        assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() + float32).all()


@pytest.mark.filterwarnings("ignore:A Packed is merged in bfloat16")
def test_merged_and_unmerged_packed_layers_agree_to_the_stated_bound_of_bfloat16(perturb):
    model = nn.Sequential(Packed())
    inject(model, LoRAConfig(r=2))
    assert_merged_agrees(perturb(model), torch.randn(5, 24).bfloat16(), torch.bfloat16)


def test_what_only_computes_like_a_linear_layer_is_trained_beside_and_merged_into_a_plain_one(perturb):
    model = nn.Sequential(Packed())
    x = torch.randn(3, 24)
    base = model(x)
    inject(model, LoRAConfig(r=2))
    (layer,) = lora_layers(model).values()
    assert torch.equal(model(x), base)
    model(x).square().sum().backward()
    assert layer.lora_B.grad.count_nonzero()
    assert torch.equal(layer.weight_matrix(), (layer.base_layer.codes / 127).bfloat16())
    perturb(model)
    changed, packed = model(x), layer.base_layer
    with pytest.warns(UserWarning, match="A Packed is merged in bfloat16, not quantized"):
        merge(model)
    torch.testing.assert_close(model(x.bfloat16()).float(), changed, rtol=0.05, atol=0.05)
    unmerge(model)
    assert layer.base_layer is packed and torch.equal(model(x), changed)


def test_an_embedding_that_does_more_than_look_up_is_left_alone():
    class Scaled(nn.Embedding):
        def forward(self, input):
            return 2 * super().forward(input)

    assert adaptable(nn.ModuleList([Scaled(4, 3), nn.Embedding(4, 3, max_norm=1.0)])) == {}


def test_a_layer_answers_for_its_base_and_still_says_what_nobody_has():
    layer = adapted("conv2d")
    assert layer.kernel_size == (3, 2) and layer.stride == (1, 1)
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("dora", [False, True])
def test_copies_states_and_pickles_compute_the_same(kind, init, dora):
    layer, x = adapted(kind, init=init, dora=dora), x_of(kind)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    other = adapted(kind, init=init, dora=dora, trained=False)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)


class Fused(nn.Module):
    """Attention as GPT-2's, as far as its fused projection goes."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_attn(x)


@pytest.fixture
def fused():
    torch.manual_seed(0)
    return nn.Sequential(Fused())


def test_slices_are_adapted_side_by_side_merged_together_and_ejected(fused, perturb):
    x = torch.randn(4, 8)
    projection, base = fused[0].c_attn, fused(x)
    injection = inject(fused, LoRAConfig(r=2, target_modules=("c_attn.q", "c_attn.v")))
    assert [t.path for t in injection.targets] == ["0.c_attn.q", "0.c_attn.v"] == list(lora_layers(fused))
    assert injection.unmatched == () and injection.num_trainable == 2 * 2 * (8 + 8)
    assert torch.equal(fused(x), base)
    perturb(fused)
    changed = fused(x)
    assert torch.equal(changed[:, 8:16], base[:, 8:16]), "the key is left alone"
    assert (changed - base)[:, :8].abs().min() > 0 and (changed - base)[:, 16:].abs().min() > 0
    lora_layers(fused)["0.c_attn.q"].merge()
    assert all(layer.merged for layer in lora_layers(fused).values())
    torch.testing.assert_close(fused(x), changed, rtol=1e-5, atol=1e-5)
    unmerge(fused)
    assert torch.equal(fused(x), changed)
    lora_layers(fused)["0.c_attn.q"].strength = 0.0
    assert torch.equal(fused(x)[:, :16], base[:, :16]) and torch.equal(fused(x)[:, 16:], changed[:, 16:])
    eject(fused)
    assert fused[0].c_attn is projection and torch.equal(fused(x), base)


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_slice_trains_as_the_matrix_of_its_own_that_it_is(fused, perturb, init, dora):
    alone = nn.Linear(8, 8)
    with torch.no_grad():
        alone.weight.copy_(fused[0].c_attn.weight[8:16])
        alone.bias.copy_(fused[0].c_attn.bias[8:16])
    inject(fused, LoRAConfig(r=2, target_modules=("c_attn.k",), init=init, dora=dora))
    (part,) = lora_layers(fused).values()
    twin = LoRALinear(alone, 2, part.scaling, init=init, dora=dora)
    with torch.no_grad():
        twin.lora_A.copy_(part.lora_A)
        for layer in (part, twin):
            layer.lora_B.add_(0.1)
    x = torch.randn(4, 8)
    torch.testing.assert_close(fused(x)[:, 8:16], twin(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.delta_weight(), twin.delta_weight(), rtol=1e-4, atol=1e-5)


def test_a_projection_is_taken_whole_or_in_slices(fused):
    with pytest.raises(LoRAError, match="must name a fused projection whole or its slices, not both; 0.c_attn.q"):
        inject(fused, LoRAConfig(r=2, target_modules=("c_attn", "c_attn.q")))
    assert [t.path for t in inject(fused, LoRAConfig(r=2, target_modules=r".*c_attn.*")).targets] == ["0.c_attn"]


def test_an_adapted_model_with_slices_survives_copy_and_pickle(fused, perturb):
    inject(fused, LoRAConfig(r=2, target_modules=("c_attn.q", "c_attn.v")))
    perturb(fused)
    x = torch.randn(4, 8)
    expected = fused(x)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(x), expected)
        merge(twin)
        assert torch.equal(fused(x), expected), "a copy merges by itself"
        torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-5)
