"""Experts that lie in one parameter: each is a matrix of its own, whatever way the model computes with the stack."""

import ctypes
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from core import (
    Adapter,
    AdapterFileError,
    LoRAConfig,
    LoRAError,
    TargetError,
    adaptable,
    eject,
    inject,
    lora_layers,
    merge,
    merged_copy,
    plan,
    strength,
    unmerge,
    weighted_sum,
)
from tests.core.families import EXPERTS, FAMILIES, LAYERS, decoder, tokens

# PEFT looks for such keys among modules only, and then does as they say.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
NAMES = ["Mixtral", "GptOss"]
STACKS = ("gate_up_proj", "down_proj")


def model_of(name: str = "Mixtral", implementation: str = "eager", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Always the same weights, in eval mode; two of three experts a token."""
    changes = {"head_dim": 8} if name == "GptOss" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "experts_implementation": implementation}
        model = decoder(name, **experts, **changes)().eval()
        for path, p in model.named_parameters():
            nn.init.normal_(p, mean=float("norm" in path), std=0.2 if p.dim() > 1 else 0.05)
    return model.to(dtype)


def output(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tokens()).logits


def adapted(perturb, *of_model, **settings) -> nn.Module:
    model = model_of(*of_model)
    inject(model, LoRAConfig(**{"r": 3, "alpha": 4.0, "target_modules": STACKS} | settings))
    return perturb(model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    output(model).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> str:
    return request.param


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


# What it computes.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "olora"])
def test_at_the_start_it_is_the_base_bit_for_bit(name, implementation, init, dtype):
    model = model_of(name, implementation, dtype)
    base = output(model)
    inject(model, LoRAConfig(r=3, target_modules=STACKS, init=init))
    assert torch.equal(output(model), base)


@pytest.mark.parametrize("value", [1.0, -0.5])
def test_forward_and_merge_are_the_base_with_delta_on_each_experts_matrix(name, implementation, perturb, value):
    # torch has no grouped product in float64.
    dtype, bound = (torch.float32, 1e-5) if implementation == "grouped_mm" else (torch.float64, 1e-9)
    model, dense = adapted(perturb, name, implementation).to(dtype), model_of(name, implementation, dtype)
    for path, layer in lora_layers(model).items():
        layer.strength = value
        stack, _, index = path.rpartition(".")
        delta = value * 4 / 3 * layer.lora_B @ layer.lora_A
        with torch.no_grad():
            dense.get_parameter(stack)[int(index)] += delta.T if name == "GptOss" else delta
    expected = output(dense)
    torch.testing.assert_close(output(model), expected, rtol=bound, atol=bound)
    merge(model)
    torch.testing.assert_close(output(model), expected, rtol=bound, atol=bound)
    assert (expected - output(model_of(name, implementation, dtype))).abs().max() > 0.01


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_gradients_do_not_depend_on_how_the_model_computes_with_its_experts(name, perturb, init):
    wanted = gradients(adapted(perturb, name, "eager", init=init))
    assert len(wanted) == 2 * len(STACKS) * EXPERTS * LAYERS and all(g.count_nonzero() for g in wanted.values())
    for implementation in IMPLEMENTATIONS[1:]:
        found = gradients(adapted(perturb, name, implementation, init=init))
        for path, gradient in wanted.items():
            torch.testing.assert_close(found[path], gradient, rtol=1e-4, atol=1e-6)


class Ones(nn.Module):
    """Matrices whose every entry is 1, so that they give 0 for an x that sums to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.up_proj = nn.Parameter(torch.ones(3, 5, 6, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([F.linear(x, self.up_proj[i]) for i in range(3)])


def test_an_update_too_small_for_the_weights_type_still_acts():
    model, x = nn.Sequential(Ones()), torch.tensor([1.0, -1.0] * 3, dtype=torch.bfloat16)
    inject(model, LoRAConfig(r=2, alpha=2.0, target_modules=("up_proj",)))
    for layer in lora_layers(model).values():
        nn.init.constant_(layer.lora_B, torch.finfo(torch.bfloat16).eps / 100)
    expected = torch.stack([layer.delta_weight() @ x.float() for layer in lora_layers(model).values()])
    assert expected.abs().min() > 0
    torch.testing.assert_close(model(x).float(), expected, rtol=0.02, atol=0)
    merge(model)
    assert not model(x).any(), "in the weight itself it is rounded away"


def test_dropout_thins_what_the_update_sees_in_training_only(name, implementation, perturb):
    model = adapted(perturb, name, implementation, dropout=0.5)
    plain = output(adapted(perturb, name, implementation))
    assert torch.equal(output(model), plain)
    model.train()
    assert not torch.allclose(output(model), plain)
    nothing = adapted(perturb, name, implementation, dropout=1 - 1e-7).train()
    torch.testing.assert_close(output(nothing), output(model_of(name, implementation)), rtol=1e-5, atol=1e-5)


def test_experts_without_an_update_stay_as_they_are(perturb):
    model = adapted(perturb, target_modules=("down_proj.1",))
    merge(model)
    for path, p in model_of().named_parameters():
        if path.endswith("down_proj"):
            now = model.get_parameter(path.replace("experts.", "experts.base_layer."))
            assert [torch.equal(now[i], p[i]) for i in range(EXPERTS)] == [True, False, True]


class Einsum(nn.Module):
    """A mixture that does with its weight what no model does yet."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.mix = nn.Parameter(torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("noi,bi->bo", self.mix, x) + F.relu(self.mix).sum()


def test_what_is_no_product_gets_the_dense_sum_and_the_same_gradients(perturb):
    model, x = nn.Sequential(Einsum()), torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    inject(model, LoRAConfig(r=2, alpha=2.0, target_modules=("mix",)))
    perturb(model)
    layers = lora_layers(model)
    W = torch.stack([e.weight_matrix() + e.lora_B @ e.lora_A for e in layers.values()])
    expected = torch.einsum("noi,bi->bo", W, x) + F.relu(W).sum()
    torch.testing.assert_close(model(x), expected)
    wanted = torch.autograd.grad(expected.sum(), list(model.parameters())[1:])
    model(x).sum().backward()
    for p, gradient in zip(list(model.parameters())[1:], wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_dropout_is_refused_where_only_the_dense_sum_will_do():
    model = nn.Sequential(Einsum())
    inject(model, LoRAConfig(r=2, target_modules=("mix",), dropout=0.1))
    model.eval()(torch.randn(2, 6))
    with pytest.raises(LoRAError, match=r"`dropout` \(=0.1\) must be 0 for experts whose code does more"):
        model.train()(torch.randn(2, 6))
    assert isinstance(model[0].base_layer.mix, nn.Parameter)


def test_a_kernel_that_reads_memory_finds_the_sum_there(perturb):
    model = nn.Sequential(Einsum())
    inject(model, LoRAConfig(r=2, target_modules=("mix",)))
    perturb(model)
    read = model[0].mix.sum()
    numbers = ctypes.cast(read.data_ptr(), ctypes.POINTER(ctypes.c_float))
    assert numbers[0] == read.kept.flatten()[0] != read.base.flatten()[0]
    torch.testing.assert_close(read.kept, read.dense())


@pytest.mark.parametrize(
    "turn",
    [lambda W: W.mT, lambda W: W.transpose(-1, -2), lambda W: torch.transpose(W, 1, 2), lambda W: W.relu().mT],
)
@pytest.mark.parametrize(
    "index", [2, torch.tensor(2), torch.tensor([3, 0, 3]), slice(1, 3), (2, 1), torch.eye(4)[0] > 0]
)
def test_whatever_is_read_of_a_stack_and_multiplied_is_that_of_the_dense_sum(perturb, turn, index):
    model = nn.Sequential(Einsum()).double()
    inject(model, LoRAConfig(r=2, target_modules=("mix",)))
    perturb(model).double()
    read = model[0].mix.sum()
    dense = read.dense()
    for one in (lambda W: W[index], lambda W: turn(W), lambda W: turn(W)[index]):
        found, wanted = one(read), one(dense)
        assert (found.shape, found.dim(), found.dtype) == (wanted.shape, wanted.dim(), wanted.dtype)
        x, y = torch.randn(wanted.shape[-1], 3).double(), torch.randn(3, wanted.shape[-2 % wanted.dim()]).double()
        torch.testing.assert_close(found @ x, wanted @ x)
        torch.testing.assert_close(found + 0.0, wanted)
        if wanted.dim() > 1:
            torch.testing.assert_close(y @ found, y @ wanted)
        if wanted.dim() == 2:
            bias = torch.randn(len(wanted)).double()
            torch.testing.assert_close(F.linear(x.T, found, bias), F.linear(x.T, wanted, bias))
            torch.testing.assert_close(y @ found.T.T, y @ wanted)


# What is done to it.


def test_a_stack_is_merged_at_once_and_its_parameter_comes_back_as_the_same_object(name, perturb):
    model = adapted(perturb, name)
    changed = output(model)
    layers = lora_layers(model)
    weights = {path: layer.weight for path, layer in layers.items()}
    bits = {path: p.detach().clone() for path, p in weights.items()}
    first, *rest = layers
    layers[first].merge()
    assert {path for path, layer in layers.items() if layer.merged} == {
        path for path in layers if path.rpartition(".")[0] == first.rpartition(".")[0]
    }
    torch.testing.assert_close(output(model), changed, rtol=1e-5, atol=1e-5)
    merge(model)
    assert all(layers[path].merged for path in rest)
    torch.testing.assert_close(output(model), changed, rtol=1e-5, atol=1e-5)
    unmerge(model)
    for path, layer in layers.items():
        assert layer.weight is weights[path] and torch.equal(layer.weight, bits[path])
    assert torch.equal(output(model), changed)


def test_a_merge_that_fails_half_way_leaves_nothing_merged(perturb, monkeypatch):
    model = adapted(perturb)
    expected = output(model)
    last = list(lora_layers(model).values())[-1]

    def fail(dtype):
        raise MemoryError("not enough")

    monkeypatch.setattr(last, "_delta_as_weight", fail)
    with pytest.raises(MemoryError):
        merge(model)
    assert not any(layer.merged for layer in lora_layers(model).values())
    assert torch.equal(output(model), expected)


def test_a_forward_pass_that_fails_leaves_the_parameters_in_their_place(perturb):
    model = adapted(perturb)
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(TypeError):
        experts(torch.randn(2, 32), None, None)
    assert isinstance(experts.base_layer.gate_up_proj, nn.Parameter)


def test_merged_copy_shares_what_is_not_adapted_and_leaves_the_model(perturb):
    model = adapted(perturb, target_modules=("down_proj.1",))
    expected = output(model)
    twin = merged_copy(model)
    torch.testing.assert_close(output(twin), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(output(model), expected) and not lora_layers(twin)
    ours, theirs = (m.model.layers[0].mlp.experts for m in (model, twin))
    assert theirs.gate_up_proj is ours.base_layer.gate_up_proj and theirs.down_proj is not ours.base_layer.down_proj


def test_strength_goes_expert_by_expert(perturb):
    model = adapted(perturb)
    changed = output(model)
    for path, layer in lora_layers(model).items():
        layer.strength = 0.0 if path.endswith(".0") else 0.5
    found = output(model)
    for path, layer in lora_layers(model).items():
        layer.strength = 1.0
        with torch.no_grad():
            layer.lora_B *= 0.0 if path.endswith(".0") else 0.5
    torch.testing.assert_close(found, output(model))
    assert not torch.allclose(found, changed)
    with strength(model, 0.0):
        assert torch.equal(output(model), output(model_of()))
    eject(model)
    assert torch.equal(output(model), output(model_of()))


def test_transformers_own_checkpointing_gives_the_same_gradients(implementation, perturb):
    wanted = gradients(adapted(perturb, "Mixtral", implementation))
    model = adapted(perturb, "Mixtral", implementation).train()
    model.activation_checkpointing_enable()
    for path, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[path], rtol=1e-5, atol=1e-7)


# Between two graphs, such as eager's loop over experts makes, dynamo looks at all that a tensor has.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "way", ["batched_mm", *(pytest.param(w, marks=pytest.mark.slow) for w in ("eager", "grouped_mm"))]
)
def test_a_compiled_mixture_computes_the_same_and_has_the_same_gradients(perturb, way):
    model = adapted(perturb, "Mixtral", way, init="pissa")
    expected, wanted = output(model), gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(output(compiled), expected, rtol=1e-5, atol=1e-5)
    for path, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, wanted[path.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


# Which ones are taken.

LAST = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("settings", "paths"),
    [
        ({"target_modules": ("down_proj",)}, {f"{n}.{i}" for n in ("0", "1") for i in range(EXPERTS)}),
        ({"target_modules": ("experts.down_proj",), "layers": "1"}, {f"1.{i}" for i in range(EXPERTS)}),
        ({"target_modules": (LAST,)}, {f"1.{i}" for i in range(EXPERTS)}),
        ({"target_modules": ("experts.down_proj.2",)}, {"0.2", "1.2"}),
        ({"target_modules": (f"{LAST}.0",)}, {"1.0"}),
        ({"target_modules": r".*\.1\..*experts\.down_proj"}, {f"1.{i}" for i in range(EXPERTS)}),
        ({"target_modules": r".*down_proj\.[02]"}, {"0.0", "0.2", "1.0", "1.2"}),
        ({"target_modules": ("down_proj",), "exclude_modules": ("down_proj.0", f"{LAST}.1")}, {"0.1", "0.2", "1.2"}),
        ({"target_modules": ("down_proj", "q_proj"), "exclude_modules": ("down_proj", "0.self_attn.q_proj")}, set()),
    ],
)
def test_experts_are_taken_by_the_name_of_their_stack_or_their_own(settings, paths):
    planned = plan(model_of(), LoRAConfig(r=2, **settings))
    experts = {t.path for t in planned.targets if "experts" in t.path}
    assert experts == {f"model.layers.{p[0]}.mlp.experts.down_proj.{p[2]}" for p in paths}
    untouched = {path.rpartition(".")[0] for path in adaptable(model_of(), ["expert"])} - {
        path.rpartition(".")[0] for path in experts
    }
    assert [path for path in planned.unmatched if "experts" in path] == sorted(untouched, key=planned.unmatched.index)


def test_patterns_of_rank_and_alpha_take_a_stack_or_one_of_its_experts():
    config = LoRAConfig(
        r=4,
        alpha=8,
        target_modules=("down_proj",),
        rank_pattern={"down_proj.1": 2, r"layers\.0\..*down_proj": 3},
        alpha_pattern={"experts.down_proj": 6},
    )
    found = {t.path.replace("model.layers.", ""): (t.r, t.scaling) for t in plan(model_of(), config).targets}
    ranks = {"0": [3, 2, 3], "1": [4, 2, 4]}
    assert found == {
        f"{layer}.mlp.experts.down_proj.{i}": (r, 6 / r) for layer, rs in ranks.items() for i, r in enumerate(rs)
    }


def test_an_adapted_model_shows_the_same_matrices_as_its_base():
    model = model_of()
    before = adaptable(model)
    inject(model, LoRAConfig(r=2, target_modules=("down_proj.1", "q_proj")))
    assert adaptable(model) == before


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dora": True}, LoRAError, r"`dora` \(=True\) must be False for experts .*model.layers.0.*exclude_modules"),
        ({"r": 33}, LoRAError, r"`r` \(=33\) must be at most 32 to fit model.layers.0-1.mlp.experts.gate_up_proj.0-2"),
        ({"target_modules": ("no_proj",)}, TargetError, r"this model has down_proj, .*gate_up_proj, k_proj"),
        ({"target_modules": ("down_proj.3",)}, TargetError, r"`target_modules` \(=down_proj.3\) must match"),
        ({"modules_to_save": ("mlp.experts",)}, LoRAError, r"\(=mlp.experts\) must not hold a matrix that is adapted"),
    ],
)
def test_what_cannot_be_is_refused_in_words(settings, error, message):
    with pytest.raises(error, match=message):
        inject(model_of(), LoRAConfig(**{"r": 2, "target_modules": STACKS} | settings))


def test_weights_of_eight_bits_are_no_stack():
    experts = Einsum()
    experts.mix = nn.Parameter(experts.mix.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert adaptable(nn.Sequential(experts)) == {}


# Files.

SETTINGS = {
    "both stacks": {},
    "one stack": {"target_modules": ("gate_up_proj",)},
    "some experts, and q_proj": {"target_modules": ("gate_up_proj.2", "down_proj.0", "down_proj.1", "q_proj")},
    "ranks and alphas of their own": {
        "rank_pattern": {"down_proj.2": 5, "gate_up_proj": 2},
        "alpha_pattern": {"down_proj.1": 8},
    },
    "rslora and dropout": {"scaling": "rslora", "dropout": 0.1},
    "from W's directions": {"init": "pissa"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_is_saved_is_loaded_and_the_same_function_for_peft(name, perturb, tmp_path, settings):
    model = adapted(perturb, name, **settings)
    adapter = Adapter.from_model(model)
    adapter.save(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert loaded.config == adapter.config and set(loaded.factors) == set(adapter.factors)
    for path, f in adapter.factors.items():
        g = loaded.factors[path]
        exact = "alpha_pattern" not in settings  # those of one stack share a scaling, to which the others are brought
        assert torch.equal(f.A, g.A) and g.layout == f.layout
        assert torch.equal(f.B, g.B) if exact else torch.allclose(f.B, g.B, rtol=1e-6)
        assert f.scaling == pytest.approx(g.scaling, rel=1e-15)
    fresh = model_of(name)
    loaded.apply(fresh)
    expected = output(model)
    torch.testing.assert_close(output(fresh), expected, rtol=1e-5, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(model_of(name), tmp_path).eval()
    torch.testing.assert_close(output(theirs), expected, rtol=1e-4, atol=1e-4)
    assert (expected - output(model_of(name))).abs().max() > 0.01


PEFTS = {
    "bare names": ["gate_up_proj", "down_proj"],
    "names of their module": ["mlp.experts.down_proj", "experts.gate_up_proj"],
    "whole paths": [f"model.layers.{i}.mlp.experts.{stack}" for i in range(LAYERS) for stack in STACKS],
    "one of them": ["down_proj"],
    "a layer's weight by its parameter": ["q_proj.weight", "down_proj"],
}


@pytest.mark.parametrize("linear", [["k_proj"], [], r".*\.v_proj"], ids=str)
@pytest.mark.parametrize("parameters", PEFTS.values(), ids=PEFTS)
def test_what_peft_saves_of_target_parameters_is_read(name, perturb, tmp_path, parameters, linear):
    wanted = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=linear, target_parameters=parameters, rank_pattern={r".*\.down_proj": 5}
    )
    theirs = perturb(peft.get_peft_model(model_of(name), wanted).eval())
    theirs.save_pretrained(tmp_path)
    model = model_of(name)
    adapter = Adapter.load(tmp_path)
    adapter.apply(model)
    torch.testing.assert_close(output(model), output(theirs), rtol=1e-4, atol=1e-4)
    planned = {t.path: (t.r, t.scaling) for t in plan(model_of(name), adapter.config).targets}
    assert planned == {path: (f.r, f.scaling) for path, f in adapter.factors.items()}


def test_the_order_of_the_stacks_survives_sums_of_adapters(perturb, tmp_path):
    one = Adapter.from_model(adapted(perturb, target_modules=("down_proj",)))
    other = Adapter.from_model(adapted(perturb))
    total = weighted_sum([one, other], [0.5, 2.0])
    total.save(tmp_path)
    model = model_of()
    total.apply(model)
    theirs = peft.PeftModel.from_pretrained(model_of(), tmp_path).eval()
    torch.testing.assert_close(output(theirs), output(model), rtol=1e-4, atol=1e-4)


def edit(folder, **changes):
    """Changes PEFT's settings, and takes our own notes out."""
    from safetensors.torch import save_file

    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_parameters": ["here", "there"]}, r"`target_parameters` \(=here, there\) must tell which of model.*0"),
        (
            {"target_parameters": ["gate_up_proj"]},
            r"must tell which of model.layers.0.mlp.experts's parameters .*base_",
        ),
        ({"r": 2, "rank_pattern": {}}, r"`r` of .*gate_up_proj \(=2\) must go into the 9 rows of its A"),
    ],
)
def test_a_file_that_does_not_tell_the_stacks_apart_is_refused(perturb, tmp_path, changes, message):
    Adapter.from_model(adapted(perturb)).save(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(AdapterFileError, match=message):
        Adapter.load(tmp_path)


def test_our_file_without_our_notes_is_the_same_function(perturb, tmp_path):
    model = adapted(perturb, target_modules=("down_proj.1", "gate_up_proj", "q_proj"))
    Adapter.from_model(model).save(tmp_path)
    edit(tmp_path)
    adapter, fresh = Adapter.load(tmp_path), model_of()
    assert len(adapter.factors) == LAYERS * (2 * EXPERTS + 1)
    adapter.apply(fresh)
    torch.testing.assert_close(output(fresh), output(model), rtol=1e-5, atol=1e-5)


def test_an_adapter_for_more_experts_does_not_fit():
    three = decoder("Mixtral", num_local_experts=EXPERTS)()
    four = decoder("Mixtral", num_local_experts=EXPERTS + 1)()
    inject(four, LoRAConfig(r=2, target_modules=("down_proj",)))
    with pytest.raises(AdapterFileError, match=r"model.layers.0-1.mlp.experts.down_proj.3 does not exist"):
        Adapter.from_model(four).apply(three)


def test_both_layouts_stand_in_the_table_of_families():
    assert [name for name, family in FAMILIES.items() if family.experts] == ["mixtral", "gpt_oss"]
