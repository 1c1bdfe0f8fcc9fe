"""What the settings beside r and alpha do: exceptions, layers, biases, modules trained in full, LoRA+."""

import copy

import pytest
import torch
from torch import nn

from core import (
    Adapter,
    AdapterFileError,
    LoRAConfig,
    LoRAError,
    TargetError,
    TrainConfig,
    eject,
    inject,
    lora_layers,
    merged_copy,
    plan,
    strength,
    train,
    trained_in_full,
)

QV = ("q_proj", "v_proj")


def paths(model, **settings):
    return [t.path for t in plan(model, LoRAConfig(r=2, **settings)).targets]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers": "1"}, r"\.1\."),
        ({"layers": "0-1"}, r"\.[01]\."),
        ({"layers": " 1- "}, r"\.1\."),
        ({"layers": "0,1"}, r"\.[01]\."),
        ({"exclude_modules": ("v_proj",)}, "q_proj"),
        ({"exclude_modules": r".*layers\.0.*"}, r"\.1\."),
        ({"exclude_modules": ("v_proj",), "layers": "0"}, r"\.0\..*q_proj"),
    ],
)
def test_layers_and_exceptions_narrow_the_targets(build, settings, expected):
    import re

    model = build("llama")
    everything = paths(model, target_modules=QV)
    assert paths(model, target_modules=QV, **settings) == [p for p in everything if re.search(expected, p)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "7-"}, r"`exclude_modules` and `layers` take all of them out"),
        ({"exclude_modules": QV}, r"must leave at least one matrix to adapt"),
        (
            {"exclude_modules": ("up_proj",)},
            r"`exclude_modules` \(=up_proj\) must match at least one matrix; .* q_proj",
        ),
        ({"exclude_modules": "("}, r"`exclude_modules` \(='\('\) must be a valid regular expression"),
        (
            {"modules_to_save": ("nothing",)},
            r"`modules_to_save` \(=nothing\) must match a module .*parts are model, lm",
        ),
    ],
)
def test_what_leaves_nothing_or_fits_nothing_is_an_error(build, settings, message):
    with pytest.raises(TargetError, match=message):
        inject(build("llama"), LoRAConfig(r=2, target_modules=QV, **settings))


@pytest.mark.parametrize("layers", ["x", "1-2-3", "-", "1;2", "--1"])
def test_layers_that_are_no_numbers_are_refused(layers):
    with pytest.raises(LoRAError, match=r"`layers` \(=.*\) must be numbers and ranges, such as 0-5, 8, 20-"):
        LoRAConfig(layers=layers)


def test_a_module_is_trained_in_full_or_adapted_and_not_both(build):
    with pytest.raises(LoRAError, match=r"`modules_to_save` \(=mlp\) must not hold a matrix that is adapted as well"):
        inject(build("llama"), LoRAConfig(r=2, target_modules=("up_proj",), modules_to_save=("mlp",)))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("gpt2", {"bias": "lora_only", "target_modules": ("c_fc",)}, {"mlp.c_fc.bias"}),
        ("gpt2", {"bias": "lora_only", "target_modules": ("c_attn.q",)}, {"attn.c_attn.bias"}),
        ("plain", {"target_modules": ("up",), "modules_to_save": ("head",)}, {"head.weight", "head.bias"}),
        ("plain", {"target_modules": ("up",), "bias": "all"}, {"up.bias", "norm.bias", "head.bias"}),
        (
            "plain",
            {"target_modules": ("up",), "bias": "lora_only", "modules_to_save": ("norm",)},
            {"up.bias", "norm.weight", "norm.bias"},
        ),
    ],
)
def test_what_is_trained_in_full_is_reported_gets_gradients_and_comes_back(
    build, tokens, logits, name, settings, expected
):
    model = build(name)
    before = dict(model.named_parameters())
    values = {n: p.detach().clone() for n, p in before.items()}
    base = logits(model, tokens)
    injection = inject(model, LoRAConfig(r=2, **settings))
    assert {
        n.removeprefix("transformer.h.0.").removeprefix("transformer.h.1.") for n in injection.trained_in_full
    } == expected
    assert set(trained_in_full(model)) == set(injection.trained_in_full)
    assert injection.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert injection.num_parameters == sum(p.numel() for p in before.values())
    assert torch.equal(logits(model, tokens), base)
    output = model(tokens)
    getattr(output, "logits", output).square().mean().backward()
    assert all(p.grad is not None for p in trained_in_full(model).values())
    with torch.no_grad():
        for p in trained_in_full(model).values():
            p += 0.5
    changed = logits(model, tokens)
    assert not torch.allclose(changed, base, atol=1e-3)
    with strength(model, 0.0):
        assert torch.equal(logits(model, tokens), base)
    assert torch.equal(logits(model, tokens), changed)
    torch.testing.assert_close(logits(merged_copy(model), tokens), changed, rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, tokens), changed)
    eject(twin)
    assert torch.equal(logits(twin, tokens), base)
    eject(model)
    assert all(p is before[n] and torch.equal(p, values[n]) for n, p in model.named_parameters())


def test_a_head_that_shares_its_weight_with_the_embedding_is_trained_without_it(build, tokens, logits):
    model = build("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    inject(model, LoRAConfig(r=2, target_modules=QV, modules_to_save=("lm_head",)))
    embedding = model.model.embed_tokens.weight
    before = embedding.detach().clone()
    assert model.lm_head.weight is not embedding and not embedding.requires_grad
    with torch.no_grad():
        model.lm_head.weight += 1.0
    assert torch.equal(embedding, before)
    eject(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapting_one_of_two_tied_weights_leaves_the_other_alone_merged_or_not(build, perturb, target):
    model = build("llama", tie_word_embeddings=True)
    shared = model.lm_head.weight
    before = shared.detach().clone()
    inject(model, LoRAConfig(r=2, target_modules=(target,)))
    perturb(model)
    for layer in lora_layers(model).values():
        layer.merge()
        assert layer.weight is not shared
    other = model.model.embed_tokens if target == "lm_head" else model.lm_head
    assert other.weight is shared and torch.equal(shared, before)


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_what_was_trained_with_every_setting_is_saved_and_loaded(
    build, tokens, logits, make_batch, tmp_path, init, dora
):
    config = LoRAConfig(
        r=2, target_modules=("up", "embed"), modules_to_save=("head",), bias="lora_only", init=init, dora=dora
    )
    model = build("plain")
    inject(model, config)
    list(train(model, [make_batch((2, 3))] * 3, TrainConfig(steps=3, warmup_steps=0, learning_rate=0.02, device="cpu")))
    adapter = Adapter.from_model(model, base_model="plain")
    adapter.save(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert loaded.config == config and loaded.num_parameters == adapter.num_parameters
    fresh = build("plain")
    loaded.apply(fresh)
    torch.testing.assert_close(logits(fresh, tokens), logits(model, tokens), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(fresh, tokens), logits(build("plain"), tokens), atol=1e-3)
    again = Adapter.from_model(fresh)
    assert set(again.trained_in_full) == {"head.weight", "head.bias", "up.bias"}
    assert set(again.magnitudes) == ({"up", "embed"} if dora else set())


def test_lora_plus_gives_B_its_own_rate(build, make_batch):
    def moved(ratio):
        model = build("plain")
        inject(model, LoRAConfig(r=2, target_modules=("up",)))
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        config = TrainConfig(
            steps=1, warmup_steps=0, schedule="constant", learning_rate=1e-3, lora_plus_ratio=ratio, spectrum_every=0
        )
        events = list(train(model, [make_batch((2,))], config))
        assert events[1].learning_rate == 1e-3
        return {
            name: (p.detach() - before[name]).abs().max().item()
            for name, p in model.named_parameters()
            if name in before
        }

    plain, plus = moved(1.0), moved(16.0)
    # Adam's first step is the rate itself wherever there is a gradient.
    assert plus["up.lora_B"] == pytest.approx(16 * plain["up.lora_B"], rel=1e-3) == pytest.approx(16e-3, rel=1e-2)


def test_peft_reads_a_head_biases_and_dora_that_were_trained_here(tmp_path):
    from peft import PeftModel

    from tests.core.families import FAMILIES

    family = FAMILIES["bert"]
    torch.manual_seed(0)
    model = family.make().eval()
    fresh, third = copy.deepcopy(model), copy.deepcopy(model)
    inject(
        model,
        LoRAConfig(
            r=2,
            target_modules=("query", "word_embeddings"),
            dora=True,
            bias="lora_only",
            modules_to_save=("classifier",),
        ),
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.rand_like(p)
        expected = model(**family.inputs()).logits
        Adapter.from_model(model).save(tmp_path / "ours")
        theirs = PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
        torch.testing.assert_close(theirs(**family.inputs()).logits, expected, rtol=1e-4, atol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        Adapter.load(tmp_path / "theirs").apply(third)
        torch.testing.assert_close(third(**family.inputs()).logits, expected, rtol=1e-4, atol=1e-5)


def test_peft_reads_a_convolution_that_was_trained_here(tmp_path, perturb):
    from peft import PeftModel

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv1d(6, 4, 3), nn.Conv3d(4, 4, 1))

    model, x = net(), torch.randn(2, 3, 8, 8)
    inject(model, LoRAConfig(r=2, target_modules=("0", "2"), dora=False))
    perturb(model)
    Adapter.from_model(model).save(tmp_path)
    theirs = PeftModel.from_pretrained(net(), tmp_path).base_model.model
    torch.testing.assert_close(model[0](x), theirs[0](x), rtol=1e-5, atol=1e-5)
    y = torch.randn(2, 6, 9)
    torch.testing.assert_close(model[2](y), theirs[2](y), rtol=1e-5, atol=1e-5)


GROUPS = {
    "two groups": lambda: nn.Conv2d(6, 8, 3, groups=2, stride=2),
    "depthwise": lambda: nn.Conv1d(4, 4, 3, groups=4, padding=1),
    "two groups in space": lambda: nn.Conv3d(4, 6, 2, groups=2, bias=False),
}


def grouped(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer = GROUPS[name]()
    return nn.Sequential(layer), torch.randn(2, layer.in_channels, *(7 for _ in layer.kernel_size))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize("name", GROUPS)
def test_peft_reads_a_convolution_with_groups_that_was_trained_here_and_it_comes_back(tmp_path, perturb, name):
    """There A reads all channels: ours stands in it once for each group, in those that the group has."""
    from peft import PeftModel

    model, x = grouped(name)
    base = model(x)
    inject(model, LoRAConfig(r=2, alpha=3, target_modules=("0",)))
    adapter = Adapter.from_model(perturb(model))
    adapter.save(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(grouped(name)[0], tmp_path / "ours").base_model.model
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), base, atol=1e-2)
    loaded, f = Adapter.load(tmp_path / "ours"), adapter.factors["0"]
    assert torch.equal(loaded.factors["0"].A, f.A) and torch.equal(loaded.factors["0"].B, f.B)
    assert loaded.factors["0"].scaling == pytest.approx(f.scaling)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_a_convolution_of_peft_s_is_read_where_its_groups_read_only_what_is_theirs(tmp_path, perturb):
    from peft import LoraConfig, get_peft_model

    fresh, x = grouped("two groups")
    theirs = get_peft_model(grouped("two groups")[0], LoraConfig(r=4, target_modules=["0"]))
    perturb(theirs)
    theirs.save_pretrained(tmp_path / "crossed")
    with pytest.raises(
        AdapterFileError, match=r"0: A \(4, 6, 3, 3\) .* of 2 groups read inputs of other groups, which"
    ):
        Adapter.load(tmp_path / "crossed")
    with torch.no_grad():
        A = theirs.base_model.model[0].lora_A["default"].weight
        A[:2, 3:], A[2:, :3] = 0.0, 0.0
    theirs.save_pretrained(tmp_path / "apart")
    Adapter.load(tmp_path / "apart").apply(fresh)
    torch.testing.assert_close(fresh(x), theirs(x), rtol=1e-5, atol=1e-5)
    merged = merged_copy(fresh)  # which PEFT cannot do
    torch.testing.assert_close(merged(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fresh(x), grouped("two groups")[0](x), atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model:UserWarning")  # PEFT loads the start beside
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_started_from_w0_s_own_directions_goes_to_peft_and_comes_from_it_as_the_true_update(
    build, tokens, logits, tmp_path, start, rslora
):
    from peft import LoraConfig, PeftModel, get_peft_model

    def move(model):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn(p.shape, generator=generator)
        return model

    base = logits(build("llama"), tokens)
    model = build("llama")
    inject(model, LoRAConfig(r=2, target_modules=QV, init=start, scaling="rslora" if rslora else "standard"))
    Adapter.from_model(move(model)).save(tmp_path / "ours")
    read = PeftModel.from_pretrained(build("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(read, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model, tokens), base, atol=1e-2)

    wanted = LoraConfig(r=2, lora_alpha=16, target_modules=list(QV), init_lora_weights=start, use_rslora=rslora)
    theirs = get_peft_model(build("llama"), wanted).eval()
    theirs.peft_config["default"].init_lora_weights = True  # what PEFT's guide says to do, so that the start is kept
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = start
    move(theirs).save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "start")
    fresh = build("llama")
    adapter = Adapter.load(tmp_path / "theirs")
    adapter.apply(fresh)
    assert {f.r for f in adapter.factors.values()} == {4}
    torch.testing.assert_close(logits(fresh, tokens), logits(theirs, tokens), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(fresh, tokens), base, atol=1e-2)
