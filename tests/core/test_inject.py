import copy
import re

import pytest
import torch
from torch import nn

from core import (
    LoRAConfig,
    LoRAError,
    LoRALinear,
    TargetError,
    adaptable,
    eject,
    inject,
    injection_of,
    lora_layers,
    merge,
    merged_copy,
    plan,
    strength,
    unmerge,
)
from core.targets import count_parameters

MODELS = ["llama", "gpt2", "plain"]
EVERYTHING = LoRAConfig(r=2)
HEAD = {"llama": "lm_head", "gpt2": "lm_head", "plain": None}
LLAMA_PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def bits_of(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# What inject does.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_an_injected_model_equals_its_base_bit_for_bit(build, tokens, logits, name, dtype, training):
    model = build(name).to(dtype).train(training)
    expected = logits(model, tokens)
    inject(model, LoRAConfig(r=2, dropout=0.5))
    assert torch.equal(logits(model, tokens), expected)
    assert all(m.training is training for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_A_and_B_of_every_target_and_nothing_else(build, perturb, tokens, name):
    model = build(name)
    injection = inject(model, EVERYTHING)
    perturb(model)
    output = model(input_ids=tokens)
    getattr(output, "logits", output).square().mean().backward()
    expected = {f"{t.path}.{half}" for t in injection.targets for half in ("lora_A", "lora_B")}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == expected


@pytest.mark.parametrize("name", MODELS)
def test_an_adapted_model_computes_what_dense_weights_W0_plus_delta_do(build, perturb, tokens, logits, name):
    model = build(name)
    inject(model, LoRAConfig(r=3, alpha=5, target_modules=".*"))
    perturb(model).double()
    twin = build(name, tie_word_embeddings=False) if name != "plain" else build(name)
    twin.load_state_dict(build(name).state_dict())
    twin.double()
    with torch.no_grad():
        for path, layer in lora_layers(model).items():
            delta = 5 / 3 * layer.lora_B @ layer.lora_A
            twin.get_submodule(path).weight += layer._as_weight(delta)
    torch.testing.assert_close(logits(model, tokens), logits(twin, tokens), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits(model, tokens), logits(build(name).double(), tokens), atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_takes_every_matrix_but_the_output_head(build, name):
    model = build(name)
    injection = inject(model, EVERYTHING)
    taken = {t.path for t in injection.targets}
    head = HEAD[name]
    kinds = {"Linear", "Conv1D"}
    expected = {path for path, m in build(name).named_modules() if type(m).__name__ in kinds and path != head}
    assert taken == set(lora_layers(model)) == expected
    embeddings = {path for path, m in build(name).named_modules() if isinstance(m, nn.Embedding)}
    assert set(injection.unmatched) == embeddings | ({head} if head else set())
    assert injection.by_pattern == {"all-linear": tuple(t.path for t in injection.targets)}


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (("q_proj",), r"model\.layers\.\d\.self_attn\.q_proj"),
        (("q_proj", "v_proj"), r"model\.layers\.\d\.self_attn\.[qv]_proj"),
        (("self_attn.q_proj",), r"model\.layers\.\d\.self_attn\.q_proj"),
        (("model.layers.1.mlp.up_proj",), r"model\.layers\.1\.mlp\.up_proj"),
        (("lm_head", "q_proj"), r"lm_head|.*q_proj"),
        (r".*layers\.0\..*_proj", r"model\.layers\.0\..*_proj"),
        (r"lm_head", r"lm_head"),
        (("q_proj", "self_attn.q_proj"), r".*q_proj"),
    ],
)
def test_names_fit_the_end_of_a_path_and_an_expression_the_whole(build, target_modules, expected):
    model = build("llama")
    injection = inject(model, LoRAConfig(r=2, target_modules=target_modules))
    everything = adaptable(build("llama"))
    assert list(lora_layers(model)) == [p for p in everything if re.fullmatch(expected, p)]
    assert set(injection.unmatched) == set(everything) - set(lora_layers(model))
    patterns = (target_modules,) if isinstance(target_modules, str) else target_modules
    assert tuple(injection.by_pattern) == patterns


def test_by_pattern_says_what_each_pattern_matched(build):
    injection = plan(build("llama"), LoRAConfig(r=2, target_modules=("v_proj", "layers.0.self_attn.v_proj")))
    paths = tuple(f"model.layers.{i}.self_attn.v_proj" for i in (0, 1))
    assert injection.by_pattern == {"v_proj": paths, "layers.0.self_attn.v_proj": paths[:1]}


@pytest.mark.parametrize("bias", [True, False])
def test_a_matrix_without_or_with_bias_is_adapted_as_in_out_of_its_own_shape(bias):
    model = nn.ModuleDict({"a": nn.Linear(6, 10, bias=bias)})
    assert adaptable(model) == {"a": (10, 6)}
    inject(model, EVERYTHING)
    assert adaptable(model) == {"a": (10, 6)}


def test_conv1d_shapes_are_given_as_out_by_in(build):
    shapes = adaptable(build("gpt2"))
    assert shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    assert shapes["transformer.h.0.mlp.c_fc"] == (128, 32)


@pytest.mark.parametrize("name", MODELS)
def test_injection_counts_what_is_in_the_model(build, name):
    model = build(name)
    num_parameters = sum(p.numel() for p in model.parameters())  # parameters() gives tied weights once
    injection = inject(model, LoRAConfig(r=3))
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert injection.num_parameters == num_parameters == count_parameters(model)
    assert injection.num_trainable == num_trainable == sum(t.num_trainable for t in injection.targets)
    assert injection.adapter_bytes == 4 * num_trainable
    assert injection.trainable_share == num_trainable / sum(p.numel() for p in model.parameters())
    assert injection_of(model) is injection


def test_tied_weights_count_once(build):
    tied, untied = (plan(build("llama", tie_word_embeddings=t), EVERYTHING).num_parameters for t in (True, False))
    assert untied - tied == 64 * 32


@pytest.mark.parametrize(
    ("rank_pattern", "expected"),
    [
        ({"q_proj": 4}, [4, 2, 4, 2]),
        ({r"layers\.1\..*": 5}, [2, 2, 5, 5]),
        ({"model.layers.0.self_attn.q_proj": 1}, [1, 2, 2, 2]),
        ({"self_attn.q_proj": 4, "q_proj": 7}, [4, 2, 4, 2]),  # the first that fits counts
        ({"proj": 7}, [2, 2, 2, 2]),  # not at a dot
        ({"layers.1": 7}, [2, 2, 2, 2]),  # not the end
        ({r"^model\.layers\.1\.self_attn\.q_proj": 3}, [2, 2, 3, 2]),
    ],
)
def test_rank_and_alpha_patterns_fit_the_end_of_a_path(build, rank_pattern, expected):
    config = LoRAConfig(r=2, alpha=8, target_modules=("q_proj", "v_proj"), rank_pattern=rank_pattern)
    model = build("llama")
    inject(model, config)
    layers = lora_layers(model).values()
    assert [layer.r for layer in layers] == expected
    assert [layer.scaling for layer in layers] == [8 / r for r in expected]
    alphas = {pattern: 10.0 * r for pattern, r in rank_pattern.items()}
    found = plan(build("llama"), LoRAConfig(r=2, alpha=8, target_modules=("q_proj", "v_proj"), alpha_pattern=alphas))
    assert [t.scaling * 2 for t in found.targets] == [8 if r == 2 else 10 * r for r in expected]


def test_rslora_scales_by_the_root_of_each_matrixs_own_r(build):
    config = LoRAConfig(r=4, alpha=8, scaling="rslora", target_modules=("q_proj", "v_proj"), rank_pattern={"q_proj": 9})
    assert [t.scaling for t in plan(build("llama"), config).targets] == [8 / 3, 4.0] * 2


# What is refused.


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        (
            ("nothing",),
            r"`target_modules` \(=nothing\) must match .*; this model has down_proj, embed_tokens, gate_proj, k_proj",
        ),
        (("q_proj", "query", "value"), r"`target_modules` \(=query, value\) must match at least one"),
        (("proj",), r"\(=proj\) must match"),
        (("norm",), r"\(=norm\) must match"),
        (("self_attn",), r"\(=self_attn\) must match"),
        ("q_proj", r"\(=q_proj\) must match"),  # as an expression it must fit the whole path
        ("(q_proj", r"`target_modules` \(='\(q_proj'\) must be a valid regular expression .*use a list"),
        ("*", r"must be a valid regular expression"),
    ],
)
def test_patterns_that_match_nothing_are_errors_that_say_what_exists(build, target_modules, message):
    model = build("llama")
    before = bits_of(model)
    with pytest.raises(TargetError, match=message):
        inject(model, LoRAConfig(r=2, target_modules=target_modules))
    assert not lora_layers(model) and same_bits(bits_of(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_matrices_says_so():
    with pytest.raises(TargetError, match=r"\(=all-linear\) must match at least one matrix; this model has none"):
        inject(nn.Sequential(nn.LayerNorm(3)), EVERYTHING)


def test_r_larger_than_a_matrix_is_refused_with_the_matrices_that_are_too_small(build):
    model = build("llama")  # k_proj and v_proj are 16 × 32
    message = (
        r"`r` \(=20\) must be at most 16 to fit model.layers.0-1.self_attn.k_proj \(16 × 32\), "
        r"model.layers.0-1.self_attn.v_proj \(16 × 32\); choose a smaller r"
    )
    with pytest.raises(LoRAError, match=message):
        inject(model, LoRAConfig(r=20))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    inject(model, LoRAConfig(r=20, rank_pattern={"[kv]_proj": 16}))


def test_injecting_twice_is_refused(build):
    model = build("llama")
    first = inject(model, EVERYTHING)
    layers = lora_layers(model)
    with pytest.raises(LoRAError, match=r"`model` must not be adapted already; call eject\(model\) first"):
        inject(model, LoRAConfig(r=3))
    assert lora_layers(model) == layers and injection_of(model) is first


def test_a_model_that_is_not_adapted_has_no_injection(build):
    model = build("plain")
    with pytest.raises(LoRAError, match=r"`model` must be adapted; call inject\(model, LoRAConfig\(\)\)"):
        injection_of(model)
    inject(model, EVERYTHING)
    eject(model)
    with pytest.raises(LoRAError, match="`model` must be adapted"):
        injection_of(model)


# Planning.


@pytest.mark.parametrize("name", MODELS)
def test_planning_on_the_meta_device_gives_what_injecting_does(build, name):
    config = LoRAConfig(r=3, rank_pattern={"down": 2, "q_proj": 1}, target_modules=".*")
    with torch.device("meta"):
        skeleton = build(name)
    planned = plan(skeleton, config)
    assert planned == inject(build(name), config)
    inject(skeleton, config)
    assert all(layer.lora_A.is_meta for layer in lora_layers(skeleton).values())
    assert adaptable(skeleton) == adaptable(build(name))


@pytest.mark.parametrize("name", MODELS)
def test_planning_changes_nothing(build, name):
    model = build(name)
    before, modules = bits_of(model), dict(model.named_modules())
    plan(model, EVERYTHING)
    assert dict(model.named_modules()) == modules and same_bits(bits_of(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapted_model_can_be_planned_anew_by_its_own_paths(build):
    model = build("llama")
    config = LoRAConfig(r=3, target_modules=("q_proj", "lm_head"))
    first = inject(model, config)
    assert plan(model, config) == first
    assert plan(model, EVERYTHING) == plan(build("llama"), EVERYTHING)


# The start of A.


def starts(model, config, seed=0):
    inject(model, config, seed=seed)
    return {path: layer.lora_A.detach().clone() for path, layer in lora_layers(model).items()}


def test_the_start_of_a_matrix_does_not_depend_on_the_other_targets(build):
    every = starts(build("llama"), EVERYTHING)
    some = starts(build("llama", seed=5), LoRAConfig(r=2, target_modules=("v_proj",), alpha=1, rank_pattern={"q": 4}))
    assert len(some) == 2
    assert same_bits(some, {path: every[path] for path in some})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_repeats_and_another_seed_does_not(build, dtype):
    first = starts(build("llama"), EVERYTHING, seed=1)
    torch.rand(3)  # the global generator has no say
    assert same_bits(first, starts(build("llama").to(dtype), EVERYTHING, seed=1))
    other = starts(build("llama"), EVERYTHING, seed=2)
    assert not any(torch.equal(first[path], other[path]) for path in first)


def test_drawing_A_leaves_the_global_generator_alone(build):
    model = build("llama")
    before = torch.get_rng_state()
    inject(model, EVERYTHING)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_no_two_matrices_share_a_row_of_A(build, init):
    """With one seed for all, A of r = 2 would be the first rows of A of r = 8: science and not only taste."""
    by_r = [starts(build("llama"), LoRAConfig(r=r, init=init)) for r in (2, 3, 8)]
    rows = [row / row.norm() for one in by_r for A in one.values() if A.shape[1] == 32 for row in A]
    cosines = torch.stack(rows) @ torch.stack(rows).T - torch.eye(len(rows))
    assert len(rows) == 2 * 6 * (2 + 3 + 8)
    assert cosines.abs().max() < 0.9


# Merging a whole model.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_unmerging_a_model_is_bit_exact_after_twenty_round_trips(build, perturb, tokens, logits, name, dtype):
    model = build(name).to(dtype)
    inject(model, LoRAConfig(r=2, target_modules=".*"))
    perturb(model)
    before, expected = bits_of(model), logits(model, tokens)
    for _ in range(20):
        merge(model)
        assert not same_bits(bits_of(model), before)
        unmerge(model)
    assert same_bits(bits_of(model), before)
    assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.2), (torch.float16, 0.03)]
)
@pytest.mark.parametrize("name", MODELS)
def test_merging_keeps_the_models_function(build, perturb, tokens, logits, name, dtype, bound):
    model = build(name).to(dtype)
    inject(model, LoRAConfig(r=2, target_modules=".*"))
    perturb(model)
    if dtype == torch.float64:
        model.double()  # A and B, too
    separate = logits(model, tokens).double()
    merge(model)
    assert all(layer.merged for layer in lora_layers(model).values())
    merged = logits(model, tokens).double()
    with_base = logits(build(name).to(dtype), tokens).double()
    spread = (separate - with_base).norm()
    assert (merged - separate).norm() < bound * spread  # of what the adapter changes, merging changes a small share


@pytest.mark.parametrize("name", MODELS)
def test_train_eval_forward_and_generate_never_merge_nor_unmerge(build, perturb, tokens, logits, name):
    model = build(name)
    inject(model, EVERYTHING)
    perturb(model)
    for merged in (False, True):
        if merged:
            merge(model)
        before = bits_of(model)
        model.train()
        logits(model, tokens)
        model.eval()
        logits(model, tokens)
        if name != "plain":
            model.generate(input_ids=tokens, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert {layer.merged for layer in lora_layers(model).values()} == {merged}
        assert same_bits(bits_of(model), before)


@pytest.mark.parametrize("failing", [0, 5, -1])
def test_when_one_layer_cannot_be_merged_all_are_unmerged_bit_for_bit(build, perturb, failing):
    model = build("llama").to(torch.bfloat16)
    inject(model, EVERYTHING)
    perturb(model)
    layers = list(lora_layers(model).values())
    layers[failing].lora_B = nn.Parameter(torch.zeros(3, 3))  # fits no A
    before = bits_of(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        merge(model)
    assert not any(layer.merged for layer in layers)
    assert same_bits(bits_of(model), before)


def test_an_interrupted_merge_keeps_what_was_merged_before_it(build, perturb, monkeypatch):
    model = build("llama")
    inject(model, EVERYTHING)
    perturb(model)
    layers = list(lora_layers(model).values())
    layers[1].merge()

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(layers[3], "merge", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(model)
    assert [layer.merged for layer in layers[:4]] == [False, True, False, False]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_the_head_leaves_the_embedding_that_it_is_tied_to(build, perturb, tokens, logits, name):
    model = build(name, tie_word_embeddings=True)
    embedding = model.get_input_embeddings()
    assert model.lm_head.weight is embedding.weight
    inject(model, LoRAConfig(r=2, target_modules=("lm_head",)))
    perturb(model)
    bits, expected = embedding.weight.clone(), logits(model, tokens)
    merge(model)
    assert torch.equal(embedding.weight, bits)
    assert not torch.equal(model.lm_head.weight, bits)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert model.lm_head.weight is embedding.weight and torch.equal(embedding.weight, bits)
    eject(model)
    assert model.lm_head.weight is embedding.weight


# Strength.


@pytest.mark.parametrize("name", MODELS)
def test_strength_zero_is_the_base_inside_the_block_only(build, perturb, tokens, logits, name):
    model = build(name)
    base = logits(model, tokens)
    inject(model, EVERYTHING)
    perturb(model)
    adapted = logits(model, tokens)
    with strength(model, 0.0):
        assert torch.equal(logits(model, tokens), base)
        with strength(model, 1.0):
            assert torch.equal(logits(model, tokens), adapted)
        assert torch.equal(logits(model, tokens), base)
    assert torch.equal(logits(model, tokens), adapted)
    assert not torch.equal(base, adapted)


def test_strength_comes_back_to_each_layers_own_after_an_error(build):
    model = build("llama")
    inject(model, EVERYTHING)
    layers = list(lora_layers(model).values())
    layers[0].strength = 0.5
    with pytest.raises(ZeroDivisionError), strength(model, 2.0):
        assert {layer.strength for layer in layers} == {2.0}
        raise ZeroDivisionError
    assert [layer.strength for layer in layers] == [0.5] + [1.0] * (len(layers) - 1)


@pytest.mark.parametrize("how_many", [1, None])
def test_strength_of_a_merged_model_is_an_error_and_changes_no_layer(build, how_many):
    model = build("llama")
    inject(model, EVERYTHING)
    layers = list(lora_layers(model).values())
    for layer in layers[:how_many][::-1]:
        layer.merge()
    layers[-1].merge()
    with pytest.raises(LoRAError, match=r"`strength` \(=0.0\) must not change while"), strength(model, 0.0):
        pytest.fail("the block must not run")
    assert {layer.strength for layer in layers} == {1.0}


# Ejecting.


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_eject_gives_back_the_same_modules_bits_and_requires_grad(build, perturb, tokens, logits, name, merged):
    model = build(name)
    frozen = [n for n, _ in model.named_parameters()][::3]
    for n in frozen:
        model.get_parameter(n).requires_grad_(False)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    before, expected = bits_of(model), logits(model, tokens)
    inject(model, LoRAConfig(r=2, target_modules=".*"))
    perturb(model)
    if merged:
        merge(model)
    eject(model)
    assert list(model.named_modules()) == list(modules.items())
    assert all(m is modules[n] for n, m in model.named_modules())
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert same_bits(bits_of(model), before) and torch.equal(logits(model, tokens), expected)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == frozen
    inject(model, EVERYTHING)  # and it can be adapted again


def test_eject_can_keep_the_merged_weights(build, perturb, tokens, logits):
    model = build("llama")
    names = set(model.state_dict())
    inject(model, EVERYTHING)
    perturb(model)
    merge(model)
    expected = logits(model, tokens)
    eject(model, keep_merged=True)
    assert not lora_layers(model) and set(model.state_dict()) == names
    assert torch.equal(logits(model, tokens), expected)


def test_ejecting_a_model_without_layers_does_nothing(build):
    model = build("plain")
    model.up.weight.requires_grad_(False)
    eject(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["up.weight"]


# Copies and state.


@pytest.mark.parametrize("name", MODELS)
def test_merged_copy_shares_every_weight_that_the_adapter_does_not_change(build, perturb, tokens, logits, name):
    model = build(name)
    targets = {"llama": "up_proj", "gpt2": "c_attn", "plain": "up"}
    inject(model, LoRAConfig(r=2, target_modules=(targets[name],)))
    perturb(model)
    before, expected = bits_of(model), logits(model, tokens)
    twin = merged_copy(model)
    assert not lora_layers(twin)
    torch.testing.assert_close(logits(twin, tokens), expected, rtol=1e-4, atol=1e-4)
    adapted = {f"{path}.weight" for path in lora_layers(model)}
    own = dict(build(name).state_dict())
    mine = {n.replace(".base_layer", ""): t for n, t in model.state_dict().items()}
    for key, tensor in twin.state_dict().items():
        assert (tensor.data_ptr() == mine[key].data_ptr()) is (key not in adapted), key
        assert torch.equal(tensor, own[key]) is (key not in adapted), key
    assert same_bits(bits_of(model), before) and torch.equal(logits(model, tokens), expected)
    assert not any(layer.merged for layer in lora_layers(model).values())


def test_merged_copy_leaves_the_base_of_the_original_frozen(build):
    model = build("llama")
    inject(model, EVERYTHING)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    merged_copy(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable


def test_merged_copy_merges_at_the_present_strength(build, perturb, tokens, logits):
    model = build("llama")
    inject(model, EVERYTHING)
    perturb(model)
    with strength(model, 0.0):
        twin = merged_copy(model)
    assert torch.equal(logits(twin, tokens), logits(build("llama"), tokens))


def test_merged_copy_unties_a_merged_head(build, perturb, tokens, logits):
    model = build("llama", tie_word_embeddings=True)
    inject(model, LoRAConfig(r=2, target_modules=("lm_head",)))
    perturb(model)
    twin = merged_copy(model)
    torch.testing.assert_close(logits(twin, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)
    assert twin.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("state", ["bare", "merged"])
def test_merged_copy_wants_an_adapted_unmerged_model(build, state):
    model = build("plain")
    if state == "merged":
        inject(model, EVERYTHING)
        merge(model)
    with pytest.raises(LoRAError, match="`model` must be adapted and unmerged to be copied merged"):
        merged_copy(model)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_deep_copy_of_an_adapted_model_is_one_of_its_own(build, perturb, tokens, logits, name, merged):
    model = build(name)
    bare = logits(model, tokens)
    inject(model, EVERYTHING)
    perturb(model)
    if merged:
        merge(model)
    expected = logits(model, tokens)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, tokens), expected)
    assert injection_of(twin) == injection_of(model)
    unmerge(twin)
    perturb(twin, seed=1)
    assert torch.equal(logits(model, tokens), expected)
    eject(twin)
    assert all(p.requires_grad for p in twin.parameters())
    assert torch.equal(logits(twin, tokens), bare)
    assert len(lora_layers(model)) > 0
    assert {layer.merged for layer in lora_layers(model).values()} == {merged}


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_carries_an_adapted_model_into_another(build, perturb, tokens, logits, name):
    model, other = build(name), build(name, seed=1)
    inject(model, EVERYTHING)
    inject(other, EVERYTHING, seed=1)
    perturb(model)
    assert not torch.equal(logits(other, tokens), logits(model, tokens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, tokens), logits(model, tokens))


def test_layers_come_in_the_models_order(build):
    model = build("llama")
    injection = inject(model, LoRAConfig(r=2, target_modules=tuple(LLAMA_PARTS[::-1])))
    assert list(lora_layers(model)) == [t.path for t in injection.targets]
    assert [p.rpartition(".")[2] for p in lora_layers(model)] == LLAMA_PARTS * 2
    assert all(type(layer) is LoRALinear for layer in lora_layers(model).values())


# Modules that a model uses in unusual ways.


def test_an_adapted_matrix_is_used_or_refused_inside_torchs_own_attention(perturb):
    model = nn.MultiheadAttention(8, 2)
    x = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(0))
    base = model(x, x, x)[0]
    try:
        inject(model, EVERYTHING)
    except LoRAError:
        return
    perturb(model)
    assert not torch.equal(model(x, x, x)[0], base)


def test_a_module_that_stands_in_two_places_is_adapted_in_both_or_refused(perturb):
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    try:
        inject(model, EVERYTHING)
    except LoRAError:
        return
    assert model["a"] is model["b"]


def test_a_bare_matrix_is_adapted_or_refused_as_an_error_of_ours():
    model = nn.Linear(4, 4)
    try:
        inject(model, EVERYTHING)
    except LoRAError:
        return
