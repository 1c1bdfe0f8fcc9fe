"""The methods that the paper compares with: what each trains and costs, and that all go the way that LoRA goes."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core import (
    METHODS,
    Adapter,
    AdapterFileError,
    Baseline,
    Evaluated,
    LoRAConfig,
    LoRAError,
    MethodConfig,
    SpectrumMeasured,
    Started,
    Step,
    TargetError,
    TrainConfig,
    apply_method,
    forecast_memory,
    inject,
    load_trained,
    method_of,
    plan_method,
    special_tokens_of,
    token_losses,
    train,
    trained_of,
)
from core.losses import Losses
from studio.models import prepare_to_train
from tests.core.families import FAMILIES
from tests.core.test_paper_counts import gpt2, roberta

OTHERS = [name for name in METHODS if name != "lora"]
SMALL = {"bottleneck": 3, "num_layers": 1, "prefix_length": 2, "infix_length": 1}
TRAIN = TrainConfig(steps=4, warmup_steps=0, learning_rate=0.01, device="cpu", precision="fp32", spectrum_every=1)


def small(method):
    return MethodConfig(method=method, **SMALL)


def made(name, seed=0):
    """A tiny model of a family in eval mode, made ready as the studio does: with rows that lie in one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[name].make().eval()
    prepare_to_train(model)
    return model


def ready(method, name="qwen2"):
    """A model that has biases, and a head of its own, and is ready to be trained."""
    model = made(name)
    apply_method(model, small(method), seed=3)
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def batches(make_batch):
    return [make_batch((2 + i % 3, 1), seed=i) for i in range(4)]


# What is counted: Hu et al. 2021, §5.1, and the tables of its appendix D.


def adapters(num, d, r, norms=0):
    return num * (2 * d * r + r + d) + 2 * norms * d


PAPER = {
    "Adapter_L, GPT-2 M, 0.37M": ("gpt2-m", {"method": "adapter_l", "bottleneck": 6}, 368_784),
    "Adapter_L, GPT-2 M, 11.09M": ("gpt2-m", {"method": "adapter_l", "bottleneck": 224}, 11_089_152),
    "the last two layers, GPT-2 M, 25.19M": ("gpt2-m", {"method": "last_layers", "num_layers": 2}, 25_192_448),
    "BitFit, RoBERTa base, 0.1M": ("roberta-base", {"method": "bitfit"}, 102_144 + 768),  # the pooler's besides
    "Adapter_P, RoBERTa large, 0.8M": ("roberta-large", {"method": "adapter_p", "bottleneck": 16}, 811_392),
    "Adapter_H, RoBERTa large, 0.8M": ("roberta-large", {"method": "adapter_h", "bottleneck": 8}, 835_968),
    # Stated as 3.0M and 6.0M, which they are in units of 2^20.
    "Adapter_P, RoBERTa large, 3.0M": ("roberta-large", {"method": "adapter_p", "bottleneck": 64}, 3_171_840),
    "Adapter_H, RoBERTa large, 6.0M": ("roberta-large", {"method": "adapter_h", "bottleneck": 64}, 6_343_680),
    **{
        f"Adapter_H, GPT-3, r = {r}, {stated}M": (
            "gpt3",
            {"method": "adapter_h", "bottleneck": r},
            adapters(192, 12288, r),
        )
        for r, stated in {1: 7.1, 4: 21.2, 8: 40.1, 16: 77.9, 64: 304.4}.items()
    },
    # Of 3.2M stated; l_p + l_i = 256 + 8.
    "PreEmbed, GPT-3, 3.2M": ("gpt3", {"method": "prefix_embed", "prefix_length": 256}, 12288 * (256 + 8)),
    # The paper states 20.2M, which its own formula does not give.
    "PreLayer, GPT-3, 8 + 8": ("gpt3", {"method": "prefix_layer"}, 96 * 12288 * 16),
    "full, GPT-2 M": ("gpt2-m", {"method": "full"}, 354_823_168),
}
SHAPES = {
    "gpt2-m": lambda: gpt2(1024, 24, 16),
    "gpt3": lambda: gpt2(12288, 96, 96),
    "roberta-base": lambda: roberta("base"),
    "roberta-large": lambda: roberta("large"),
}


@pytest.fixture(scope="module")
def shape():
    """shape(name): a model of that size without a weight; the same each time, as a plan changes nothing."""
    kept = {}

    def of(name):
        if name not in kept:
            with torch.device("meta"):
                kept[name] = SHAPES[name]()
        return kept[name]

    return of


@pytest.mark.parametrize(("model", "settings", "expected"), PAPER.values(), ids=PAPER)
def test_the_paper_s_counts_come_out_on_models_without_a_weight(shape, model, settings, expected):
    assert plan_method(shape(model), MethodConfig(**settings)).num_trainable == expected


def test_what_the_paper_states_of_GPT_3_in_millions_is_what_is_counted():
    stated = {int(name.split("r = ")[1].split(",")[0]): name for name in PAPER if "r = " in name}
    assert {r: f"{adapters(192, 12288, r) / 1e6:.1f}M" for r in stated} == {
        r: name.rpartition(" ")[2] for r, name in stated.items()
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "opt", "bert", "deberta_v2"])
def test_what_is_planned_is_what_is_trained_and_nothing_else_has_a_gradient(name, method):
    model, lora = made(name), LoRAConfig(r=2, target_modules=FAMILIES[name].query_and_value)
    refused = {"bitfit": ("llama",), "head": ("gpt2", "opt"), "prefix": ("bert", "deberta_v2")}
    if name in refused.get(method.partition("_")[0], ()):
        with pytest.raises(LoRAError, match=rf"`method` \(='{method}'\) must"):
            plan_method(model, small(method), lora)
        return
    before = {id(p) for p in model.parameters()}
    planned = plan_method(model, small(method), lora)
    assert {id(p) for p in model.parameters()} == before and method_of(model) is None
    done = apply_method(model, small(method), lora)
    assert planned.num_trainable == done.num_trainable == sum(p.numel() for p in trained(model).values())
    assert done.num_in_all == sum(p.numel() for p in model.parameters())
    assert method_of(model).method == method
    ids = tokens_with_all_special(model)
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    assert all((p.grad is not None) is p.requires_grad for p in model.parameters())


def tokens_with_all_special(model):
    ids, special = torch.tensor([[5, 7, 9]]), special_tokens_of(model)
    return ids if special is None else torch.tensor([special.around(ids[0].tolist())])


def test_a_head_that_is_named_is_trained_beside_every_method():
    head = LoRAConfig(target_modules=("query",), modules_to_save=("classifier",), r=2)
    for method in METHODS:
        if method.startswith("prefix"):
            continue
        model = made("bert")
        apply_method(model, small(method), head)
        assert {"classifier.weight", "classifier.bias"} <= set(trained(model)), method
    assert set(trained(apply_and_return("bert", "head"))) == {"classifier.weight", "classifier.bias"}


def apply_and_return(name, method):
    model = made(name)
    apply_method(model, small(method))
    return model


# What they compute.


@pytest.mark.parametrize("method", [m for m in OTHERS if "prefix" not in m])
def test_a_model_gives_at_first_bit_for_bit_what_it_gave(method, tokens, logits):
    for dtype in (torch.float32, torch.bfloat16):
        model = made("qwen2").to(dtype)
        expected = logits(model, tokens)
        apply_method(model, small(method), seed=3)
        assert torch.equal(logits(model, tokens), expected)


def drawn(model):
    """Gives everything that was added random values, and its type float64."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in trained(model).values():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model.double()


def hooked(base, places, change):
    """Lets what the modules at these paths give pass through `change(path, output)`."""
    for path in places:
        base.get_submodule(path).register_forward_hook(lambda m, a, output, path=path: change(path, output))
    return base


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
@pytest.mark.parametrize("method", ["adapter_h", "adapter_l", "adapter_p"])
def test_adapters_are_what_the_paper_describes(name, method, tokens, logits):
    """Beside the formula, written as hooks on the base: where it is, with which nonlinearity, and the skip."""
    model = drawn(ready(method, name))
    found = {n.rpartition(".adapter.")[0] for n in trained(model)}
    layer = FAMILIES[name].stacks[0]
    ends = {"qwen2": ("self_attn.o_proj", "mlp.down_proj"), "gpt2": ("attn.c_proj", "mlp.c_proj")}
    attention, mlp = ends[name]
    expected = {"adapter_h": (attention, mlp), "adapter_p": (mlp,), "adapter_l": ("",)}[method]
    places = {f"{layer}.{i}.{end}".removesuffix(".") for i in range(2) for end in expected}
    assert found == places
    own = trained(model)

    def adapted(path, output):
        x = output[0] if isinstance(output, tuple) else output
        p = {n.rpartition(".")[2]: v for n, v in own.items() if n.startswith(f"{path}.adapter.")}
        h = F.layer_norm(x, (32,), p["norm_weight"], p["norm_bias"]) if method == "adapter_l" else x
        h = (F.gelu if method == "adapter_h" else F.relu)(h @ p["down_weight"].T + p["down_bias"])
        y = x + h @ p["up_weight"].T + p["up_bias"]
        return (y, *output[1:]) if isinstance(output, tuple) else y

    oracle = hooked(made(name).double(), places, adapted)
    torch.testing.assert_close(logits(model, tokens), logits(oracle, tokens), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["prefix_embed", "prefix_layer"])
@pytest.mark.parametrize("name", ["gpt2"])
def test_prefixes_are_what_the_paper_describes(name, method, make_batch):
    """Row by row, without padding: vectors between those of the tokens, and in each layer again where it says so."""
    model, oracle = drawn(ready(method, name)), made(name).double()
    batch = make_batch((4, 2))
    found = token_losses(model, batch)
    (prefix,) = trained(model).values()
    assert prefix.shape == ((2 if method == "prefix_layer" else 1), 3, 32)
    embed = oracle.get_input_embeddings()
    later = [f"{FAMILIES[name].stacks[0]}.{i}" for i in range(1, len(prefix))]
    expected = []
    for row, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        cut, length = int((labels != -100).int().argmax()), int(mask.sum())
        at = [0, 1, 2 + cut]

        def vectors(table, h, at=at):
            h = h.clone()
            h[0, at] = table
            return h

        spread = row.new_zeros(1, length + 3)
        own = [i for i in range(length + 3) if i not in at]
        spread[0, own] = row[:length]
        handles = [
            oracle.get_submodule(path).register_forward_pre_hook(
                lambda m, a, table=prefix[i]: (vectors(table, a[0]), *a[1:])
            )
            for i, path in enumerate(later, 1)
        ]
        with torch.no_grad():
            given = oracle(inputs_embeds=vectors(prefix[0], embed(spread))).logits[0]
        for handle in handles:
            handle.remove()
        for j in range(max(1, cut), length):
            expected.append(F.cross_entropy(given[own[j] - 1][None], row[j : j + 1]))
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert special_tokens_of(model).around([7, 8]) == [64, 65, 7, 8, 66]


def test_a_prefix_alone_is_peft_s_prompt_tuning(make_batch):
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(made("llama"), config)
    ours = made("llama")
    apply_method(ours, MethodConfig(method="prefix_embed", prefix_length=4, infix_length=0))
    (table,) = [p for p in theirs.parameters() if p.requires_grad]
    with torch.no_grad():
        next(iter(trained(ours).values())).copy_(table[None])
    batch = make_batch((3, 1, 5))
    with torch.no_grad():
        loss = theirs(**batch).loss
    torch.testing.assert_close(token_losses(ours, batch).mean().detach(), loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_lie_in_one_give_what_they_give_beside_each_other(method, make_batch):
    model = ready(method)
    losses = Losses(model)
    losses.choose()
    assert losses.way.packs
    batch = make_batch((2, 4, 3))
    batch["input_ids"][1, :2] = batch["input_ids"][0, :2]  # two begin alike
    torch.testing.assert_close(token_losses(model, batch, losses.way), token_losses(model, batch), rtol=1e-4, atol=1e-5)


# The trainer, and what is kept.


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_resumes_bit_for_bit_and_comes_back_from_its_files(method, batches, make_batch, tmp_path):
    held_out = [make_batch((3,), seed=9)]
    model, base = ready(method), dict(made("qwen2").state_dict())
    events = list(train(model, batches, TRAIN, eval_batches=held_out))
    assert isinstance(events[0], Started) and events[0].num_trainable == sum(p.numel() for p in trained(model).values())
    assert events[0].num_parameters == sum(p.numel() for p in model.parameters())
    assert any(isinstance(e, SpectrumMeasured) for e in events) is (method == "lora")
    evaluated = [e for e in events if isinstance(e, Evaluated)]
    assert evaluated[0].loss != evaluated[-1].loss

    frozen = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, base[n]) for n, p in frozen.items()) and bool(frozen) is (method != "full")

    half = ready(method)
    training = train(half, batches, TRAIN, eval_batches=held_out)
    for event in training:
        if isinstance(event, Step) and event.step == 2:
            break
    checkpoint = training.checkpoint()
    training.close()
    other = ready(method)
    rest = list(train(other, batches[2:], TRAIN, eval_batches=held_out, start=checkpoint))
    steps = [(e.step, e.loss) for e in events if isinstance(e, Step)]
    assert [(e.step, e.loss) for e in rest if isinstance(e, Step)] == steps[2:]
    assert all(torch.equal(p, trained(other)[n]) for n, p in trained(model).items())

    trained_of(model, base_model="tiny").save(tmp_path)
    assert sorted(f.suffix for f in tmp_path.iterdir()) == [".json", ".safetensors"]
    fresh, shared = made("qwen2"), made("qwen2")
    twin = copy.deepcopy(shared, {id(t): t for t in (*shared.parameters(), *shared.buffers())})
    load_trained(tmp_path).apply(fresh, base_model="tiny")
    load_trained(tmp_path).apply(twin)
    with torch.no_grad():
        expected = token_losses(model, held_out[0])
        for again in (fresh, twin):
            assert torch.equal(token_losses(again, held_out[0]), expected)
    assert all(torch.equal(p, base[n]) for n, p in shared.named_parameters())


@pytest.mark.parametrize("method", ["full", "adapter_l", "prefix_layer"])
def test_layers_computed_twice_give_the_same_steps(method, batches):
    losses = []
    for twice in (False, True):
        model = made("qwen2")
        prepare_to_train(model, activation_checkpointing=twice)
        apply_method(model, small(method), seed=3)
        losses.append([e.loss for e in train(model, batches, TRAIN) if isinstance(e, Step)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_tied_weight_that_is_trained_in_full_stays_one(tmp_path, batches):
    model = ready("full", "gpt2")
    list(train(model, batches, TRAIN))
    trained_of(model).save(tmp_path)
    fresh = made("gpt2")
    load_trained(tmp_path).apply(fresh)
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
    assert torch.equal(fresh.lm_head.weight, model.lm_head.weight)


def test_the_seed_and_the_place_decide_what_is_drawn():
    one, same = trained(ready("adapter_h")), trained(ready("adapter_h"))
    other = made("qwen2")
    apply_method(other, small("adapter_h"), seed=4)
    name = "model.layers.0.mlp.down_proj.adapter.down_weight"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], trained(other)[name])
    assert not torch.equal(one[name], one[name.replace("0", "1")])


@pytest.mark.parametrize("method", ["full", "last_layers", "adapter_l", "prefix_layer"])
def test_the_memory_is_forecast_for_each_method(method):
    with torch.device("meta"):
        model = FAMILIES["qwen2"].make()
    train_config = TrainConfig(batch_size=2, max_length=16)
    found = forecast_memory(model, LoRAConfig(), train_config, torch.float32, method=small(method))
    planned = 4 * plan_method(model, small(method)).num_trainable
    assert (found.gradients, found.moments) == (planned, 2 * planned)
    assert found.adapter == (0 if method == "full" else planned) and found.activations > 0


# Refusals.


def test_settings_out_of_range_and_without_a_meaning_are_refused():
    with pytest.raises(LoRAError, match=r"`method` \(='lora2'\) must be one of lora, full, bitfit, head"):
        MethodConfig(method="lora2")
    with pytest.raises(LoRAError, match=r"`prefix_length` \(=0\) and `infix_length` \(=0\) must be above 0 together"):
        MethodConfig(method="prefix_embed", prefix_length=0, infix_length=0)
    assert MethodConfig(prefix_length=0, infix_length=0).num_special_tokens == 0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {"method": "bitfit"}, r"`method` \(='bitfit'\) must be used on a model that has biases; this one"),
        ("gpt2", {"method": "head"}, r"`method` \(='head'\) must not train lm_head, which shares its weight"),
        ("llama", {"method": "last_layers", "num_layers": 3}, r"`num_layers` \(=3\) must be at most 2"),
        ("t5", {"method": "last_layers"}, r"must be used on a model with one stack of layers; this one has 2"),
        ("mixtral", {"method": "adapter_h"}, r"layers.0-1 has 1 ends of attention and 0 of an MLP. Choose lora"),
        ("bert", {"method": "prefix_embed"}, r"must be used on a causal language model, as in the paper"),
    ],
)
def test_a_method_that_a_model_cannot_take_is_refused_in_words(name, settings, message):
    with pytest.raises(LoRAError, match=message):
        apply_method(made(name), MethodConfig(**settings))


def test_a_model_without_a_head_or_with_a_wrong_name_is_refused(build):
    with pytest.raises(LoRAError, match=r"must find a head beside the layers; this model's parts are embed, up, norm"):
        plan_method(build("plain"), MethodConfig(method="head"))
    with pytest.raises(TargetError, match=r"`modules_to_save` \(=score\) must match a module with weights"):
        plan_method(made("bert"), MethodConfig(method="bitfit"), LoRAConfig(modules_to_save=("score",)))


def test_a_model_is_made_ready_once():
    model = ready("adapter_h")
    with pytest.raises(LoRAError, match=r"`model` must not be adapted already; load it again, or call eject"):
        apply_method(model, small("bitfit"))
    with pytest.raises(LoRAError, match=r"`model` must not be made ready for adapter_h already; load it again"):
        inject(model, LoRAConfig(r=2))


def test_what_is_not_lora_s_is_no_adapter_and_the_other_way_round(tmp_path):
    model, other = ready("adapter_h"), ready("lora")
    with pytest.raises(LoRAError, match=r"`model` must be adapted by lora to have an adapter; adapter_h has none"):
        Adapter.from_model(model)
    with pytest.raises(LoRAError, match=r"`model` must be trained by another method than lora here"):
        Baseline.from_model(other)
    trained_of(model).save(tmp_path / "one")
    trained_of(other).save(tmp_path / "other")
    with pytest.raises(AdapterFileError, match=r"was trained by another method, 'adapter_h', and has no A and B"):
        Adapter.load(tmp_path / "one")
    with pytest.raises(AdapterFileError, match=r"must name a method other than lora; read a LoRA adapter by Adapter"):
        Baseline.load(tmp_path / "other")


def test_what_was_trained_must_fit_the_model_and_all_misfits_are_told_at_once():
    found = Baseline.from_model(ready("adapter_p"), base_model="tiny")
    wrong = dict(found.tensors)
    first, second, *_ = wrong
    del wrong[first]
    wrong |= {second: torch.zeros(1, 4), "score.weight": torch.zeros(2)}
    with pytest.raises(
        AdapterFileError,
        match=r"What adapter_p trained \(made for tiny\) must fit the model: this model is big; .*down_weight is not "
        r"in the file; score.weight is not trained by adapter_p here; .*down_bias is \(3,\) in the model and \(1, 4\) "
        r"in the",
    ):
        Baseline(found.method, wrong, "tiny").apply(model := made("qwen2"), base_model="big")
    assert method_of(model) is None and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"method": {"method": "adapter_h", "bottleneck": 0}},
            r"does not hold a method's settings: `bottleneck` \(=0\)",
        ),
        ({"method": None}, r"does not hold a method's settings: MethodConfig must be given as a table"),
        ({"modules_to_save": [3]}, r"modules_to_save or base_model_name_or_path are no text, or the method is lora"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path, change, message):
    trained_of(ready("adapter_h")).save(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterFileError, match=message):
        load_trained(tmp_path)


def test_numbers_that_are_none_are_refused(tmp_path):
    model = ready("prefix_embed")
    with torch.no_grad():
        next(iter(trained(model).values()))[0, 0, 0] = torch.nan
    trained_of(model).save(tmp_path)
    with pytest.raises(AdapterFileError, match=r"must hold finite numbers: model.embed_tokens.prefix does not"):
        load_trained(tmp_path)


def test_rows_with_more_than_ids_mask_and_labels_are_refused_for_a_prefix(make_batch):
    batch = make_batch((2,))
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    with pytest.raises(LoRAError, match=r"`batches` \(with token_type_ids\) must have input_ids, attention_mask and"):
        token_losses(ready("prefix_embed"), batch)


def test_a_model_of_a_code_of_its_own_can_be_trained_in_full(build, make_batch):
    model: nn.Module = build("plain")
    apply_method(model, MethodConfig(method="full"))
    events = list(train(model, [make_batch((2, 1))] * 4, TRAIN))
    assert [e.loss for e in events if isinstance(e, Step)][-1] < events[1].loss
