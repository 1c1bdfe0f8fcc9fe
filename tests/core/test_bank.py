import copy

import pytest
import torch

from core import Adapter, AdapterBank, AdapterFileError, LoRAConfig, LoRAError, inject, lora_layers, weighted_sum

SETTINGS = {
    "linear": ("llama", {"r": 3}),
    "other ranks": ("llama", {"r": 2, "rank_pattern": {"v_proj": 5}, "target_modules": ("q_proj", "v_proj")}),
    "conv1d": ("gpt2", {"r": 2, "target_modules": ("c_fc", "c_attn")}),
    "slices": ("gpt2", {"r": 2, "target_modules": ("c_attn.q", "c_attn.v")}),
    "embedding": ("llama", {"r": 2, "target_modules": ("embed_tokens", "down_proj")}),
    "dora": ("llama", {"r": 2, "dora": True, "alpha": 3.0}),
    "dora on slices": ("gpt2", {"r": 2, "dora": True, "target_modules": ("c_attn.v", "c_proj")}),
}


@pytest.fixture
def adapter_of(build, perturb):
    """adapter_of(name of SETTINGS, seed): an adapter that changes its model, and that model."""

    def make(name, seed):
        family, settings = SETTINGS[name]
        model = build(family)
        inject(model, LoRAConfig(**settings), seed=seed)
        perturb(model, seed)
        for layer in lora_layers(model).values():
            if layer.magnitude is not None:
                layer.set_magnitude(layer.magnitude * 1.2)
        return Adapter.from_model(model), model

    return make


@pytest.mark.parametrize("name", SETTINGS)
def test_each_row_of_a_batch_runs_what_it_chose(build, adapter_of, logits, tokens, name):
    (a, model_a), (b, model_b) = adapter_of(name, 1), adapter_of(name, 2)
    base = build(SETTINGS[name][0])
    expected = [logits(model, tokens) for model in (base, model_a, model_b)]
    assert all((x - y).abs().max() > 1e-2 for x, y in zip(expected, expected[1:], strict=False))
    bank = AdapterBank(base, {"a": a, "b": b})
    bank.use(None, "a", "b")
    found = logits(base, tokens[:1].expand(3, -1))
    for row, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(row, alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_one_choice_holds_for_all_rows(build, adapter_of, logits, tokens, name):
    (a, model_a), (b, model_b) = adapter_of(name, 1), adapter_of(name, 2)
    base = build(SETTINGS[name][0])
    alone = logits(base, tokens)
    bank = AdapterBank(base, {"a": a, "b": b})
    assert bank.rows == (None,)
    assert torch.equal(logits(base, tokens), alone)
    for choice, model in (("b", model_b), ("a", model_a), ({"b": 1.0}, model_b)):
        bank.use(choice)
        torch.testing.assert_close(logits(base, tokens), logits(model, tokens), rtol=1e-5, atol=1e-5)
    bank.use(None)
    assert torch.equal(logits(base, tokens), alone)


def test_a_row_of_several_adapters_runs_their_weighted_sum(build, adapter_of, logits, tokens):
    (a, _), (b, _) = adapter_of("linear", 1), adapter_of("linear", 2)
    together = build("llama")
    weighted_sum([a, b], [0.5, -1.5]).apply(together)
    base = build("llama")
    bank = AdapterBank(base, {"a": a, "b": b})
    bank.use({"a": 0.5, "b": -1.5})
    torch.testing.assert_close(logits(base, tokens), logits(together, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "dora", "slices"])
@pytest.mark.parametrize("value", [-1.0, 0.0, 0.5, 2.0])
def test_a_strength_is_that_of_the_layers(build, adapter_of, logits, tokens, name, value):
    a, model = adapter_of(name, 1)
    for layer in lora_layers(model).values():
        layer.strength = value
    base = build(SETTINGS[name][0])
    bank = AdapterBank(base, {"a": a})
    bank.use({"a": value})
    torch.testing.assert_close(logits(base, tokens), logits(model, tokens), rtol=1e-5, atol=1e-5)


def test_adapters_of_other_matrices_stand_side_by_side(build, adapter_of, logits, tokens):
    (a, model_a), (b, model_b) = adapter_of("linear", 1), adapter_of("embedding", 2)
    base = build("llama")
    bank = AdapterBank(base, {"a": a, "b": b})
    for name, model in (("a", model_a), ("b", model_b)):
        bank.use(name)
        torch.testing.assert_close(logits(base, tokens), logits(model, tokens), rtol=1e-5, atol=1e-5)
    bank.use("a", "b")
    found = logits(base, tokens[:2])
    torch.testing.assert_close(found[0], logits(model_a, tokens[:1])[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], logits(model_b, tokens[1:2])[0], rtol=1e-5, atol=1e-5)


def test_the_matrices_of_an_adapter_are_counted_while_they_are_there(build, adapter_of):
    (a, _), (b, _) = adapter_of("linear", 1), adapter_of("other ranks", 2)
    bank = AdapterBank(build("llama"), {"a": a, "b": b})
    assert [bank.num_matrices(name) for name in ("a", "b", "c")] == [len(a.factors), len(b.factors), 0]
    assert len(a.factors) != len(b.factors)
    bank.eject()
    assert bank.num_matrices("a") == 0


def test_to_switch_moves_no_number_and_allocates_nothing(build, adapter_of):
    (a, _), (b, _) = adapter_of("linear", 1), adapter_of("linear", 2)
    base = build("llama")
    bank = AdapterBank(base, {"a": a, "b": b})
    places = {id(m): (m._A.data_ptr(), m._A._version, m._B._version) for _, m in bank._banked.values()}
    with torch.profiler.profile(profile_memory=True) as profile:
        for name in ("b", "a", None):
            bank.use(name)
    assert not [e for e in profile.events() if e.name.startswith("aten::")]
    assert places == {id(m): (m._A.data_ptr(), m._A._version, m._B._version) for _, m in bank._banked.values()}


def test_eject_gives_the_model_its_own_layers_back(build, adapter_of, logits, tokens):
    a, _ = adapter_of("slices", 1)
    base = build("gpt2")
    before, alone = dict(base.named_modules()), logits(base, tokens)
    bank = AdapterBank(base, {"a": a})
    assert dict(base.named_modules()) != before
    bank.use("a")
    bank.eject()
    assert dict(base.named_modules()) == before
    assert torch.equal(logits(base, tokens), alone)


@pytest.mark.parametrize("names", [("linear", "dora"), ("other ranks", "linear"), ("dora on slices", "conv1d")])
def test_adapters_come_and_go_beside_others_as_if_they_had_been_there_from_the_start(
    build, adapter_of, logits, tokens, names
):
    family = SETTINGS[names[0]][0]
    (a, model_a), (b, model_b) = adapter_of(names[0], 1), adapter_of(names[1], 2)
    base = build(family)
    before, alone = dict(base.named_modules()), logits(base, tokens)
    bank, whole = AdapterBank(base, {"a": a}), build(family)
    bank.add("b", b)
    assert (bank.names, bank.rows) == (("a", "b"), (None,))
    rows = ({"a": 0.5, "b": -1.0}, None, "b")
    AdapterBank(whole, {"a": a, "b": b}).use(*rows)
    bank.use(*rows)
    assert torch.equal(logits(base, tokens[:1].expand(3, -1)), logits(whole, tokens[:1].expand(3, -1)))
    bank.remove("a")
    assert (bank.names, bank.rows, bank.num_matrices("a")) == (("b",), (None,), 0)
    bank.use("b")
    torch.testing.assert_close(logits(base, tokens), logits(model_b, tokens), rtol=1e-5, atol=1e-5)
    bank.remove("b")
    assert dict(base.named_modules()) == before
    assert torch.equal(logits(base, tokens), alone)
    bank.add("a", a)
    bank.use("a")
    torch.testing.assert_close(logits(base, tokens), logits(model_a, tokens), rtol=1e-5, atol=1e-5)


def test_dora_s_strength_leads_straight_from_the_base_to_the_adapter(build, adapter_of, tokens):
    """W0 + s·(W' − W0), which a strength on B·A alone would not be: its magnitude stands at 0, too."""
    a, model = adapter_of("dora", 1)
    base = build("llama")
    bank = AdapterBank(base, {"a": a})
    path = "model.layers.0.self_attn.q_proj"
    x = torch.randn(1, 3, base.get_submodule(path).in_features)
    at = {}
    for value in (0.0, 0.25, 1.0, 2.0):
        bank.use({"a": value})
        at[value] = base.get_submodule(path)(x)
    assert torch.equal(at[0.0], base.get_submodule(path).base_layer(x))
    torch.testing.assert_close(at[1.0], model.get_submodule(path)(x), rtol=1e-5, atol=1e-5)
    for value in (0.25, 2.0):
        torch.testing.assert_close(at[value], torch.lerp(at[0.0], at[1.0], value), rtol=1e-5, atol=1e-5)


def test_an_embedding_that_is_also_the_head_stays_the_head(build, adapter_of, logits, tokens):
    base = build("llama", tie_word_embeddings=True)
    adapted = copy.deepcopy(base)
    a, _ = adapter_of("embedding", 1)
    a.apply(adapted)
    bank = AdapterBank(base, {"a": a})
    bank.use("a")
    torch.testing.assert_close(logits(base, tokens), logits(adapted, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bank_works_in_the_type_of_its_base(build, adapter_of, logits, tokens, dtype):
    a, _ = adapter_of("linear", 1)
    base, adapted = build("llama").to(dtype), build("llama").to(dtype)
    a.apply(adapted)
    bank = AdapterBank(base, {"a": a})
    bank.use(None, "a", "a")
    found, expected = logits(base, tokens), logits(adapted, tokens)
    assert found.dtype == dtype
    error = torch.linalg.vector_norm((found[1:] - expected[1:]).float()) / torch.linalg.vector_norm(expected.float())
    assert error < 0.02


# What it refuses.


def test_no_adapter_is_refused(build):
    with pytest.raises(LoRAError, match="`adapters` must hold at least one"):
        AdapterBank(build("llama"), {})


def test_an_adapted_model_is_refused(adapter_of):
    a, model = adapter_of("linear", 1)
    with pytest.raises(LoRAError, match="must not be adapted already"):
        AdapterBank(model, {"a": a})


def test_an_adapter_that_does_not_fit_is_refused_and_the_model_left_alone(build, adapter_of):
    a, _ = adapter_of("linear", 1)
    base = build("gpt2")
    before = dict(base.named_modules())
    with pytest.raises(AdapterFileError, match="must fit the model"):
        AdapterBank(base, {"a": a})
    assert dict(base.named_modules()) == before


def test_parameters_trained_in_full_are_refused(build):
    model = build("llama")
    inject(model, LoRAConfig(r=2, modules_to_save=("lm_head",)))
    with pytest.raises(LoRAError, match="with parameters trained in full"):
        AdapterBank(build("llama"), {"a": Adapter.from_model(model)})


def test_what_cannot_come_beside_others_is_refused_and_the_bank_left_as_it_was(build, adapter_of, logits, tokens):
    (a, _), (wrong, _) = adapter_of("linear", 1), adapter_of("conv1d", 1)
    base = build("llama")
    bank = AdapterBank(base, {"a": a})
    bank.use("a")
    before, found = dict(base.named_modules()), logits(base, tokens)
    with pytest.raises(LoRAError, match=r"`name` \(='a'\) must be new to the bank; remove that adapter first\."):
        bank.add("a", a)
    with pytest.raises(AdapterFileError, match="must fit the model"):
        bank.add("b", wrong)
    with pytest.raises(LoRAError, match=r"`name` \(='b'\) must be of the bank: a\."):
        bank.remove("b")
    assert bank.names == bank.rows == ("a",)
    assert dict(base.named_modules()) == before
    assert torch.equal(logits(base, tokens), found)


def test_experts_are_refused(build):
    model = build("mixtral")
    inject(model, LoRAConfig(r=2, target_modules=("experts.down_proj",)))
    with pytest.raises(LoRAError, match="with expert"):
        AdapterBank(build("mixtral"), {"a": Adapter.from_model(model)})


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ((), "`rows` must say what runs"),
        (("c",), r"`rows` \(='c'\) must name adapters of the bank: a"),
        (("a", {"c": 1.0}), r"`rows` \(='c'\) must name"),
        (({"a": float("nan")},), "finite"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_and_the_last_one_holds(build, adapter_of, rows, match):
    a, _ = adapter_of("linear", 1)
    bank = AdapterBank(build("llama"), {"a": a})
    bank.use("a")
    with pytest.raises(LoRAError, match=match):
        bank.use(*rows)
    assert bank.rows == ("a",)


def test_rows_that_are_not_those_of_the_batch_are_refused(build, adapter_of, logits, tokens):
    a, _ = adapter_of("linear", 1)
    base = build("llama")
    bank = AdapterBank(base, {"a": a})
    bank.use("a", None)
    with pytest.raises(LoRAError, match=r"`rows` \(=2 of them\) must be as many as the rows of the batch \(=3\)"):
        logits(base, tokens)
