"""Chat: each pane generates what transformers and PEFT would, and says truly what it runs."""

import copy
import json
import threading

import pytest
import torch

from core import (
    Adapter,
    AdapterFileError,
    LoRAConfig,
    LoRAError,
    inject,
    lora_layers,
    merge,
    trained_in_full,
    truncate,
    unmerge,
    weighted_sum,
)
from studio import models
from studio.answers import Answer, describe
from studio.chat import Engine
from studio.panes import Pane
from studio.sampling import ChatSettings, choose

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT

PANES = {"base": Pane(), "adapter": Pane("adapter"), "merged": Pane("adapter", merged=True)}
PROMPT = [1, 40, 70, 99, 12, 201, 33, 2]
LENGTH = 12
IDS = torch.tensor([PROMPT])
NO_END = frozenset[int]()
GREEDY = ChatSettings(max_new_tokens=LENGTH)
MERGED_TOLERANCE = 1e-4
"""On logits of size 10 in float32: W0·x + ΔW·x is rounded otherwise than (W0 + ΔW)·x, no more."""


@pytest.fixture(scope="module")
def loaded(tiny_folder, tmp_path_factory):
    from studio.workspace import Workspace

    return models.load_model(str(tiny_folder), Workspace(tmp_path_factory.mktemp("workspace")))


@pytest.fixture
def base(loaded):
    """A copy of the tiny Llama that an engine may own."""
    return copy.deepcopy(loaded)


def make_adapter(model, config: LoRAConfig, size: float) -> Adapter:
    """An adapter as if trained: B is `size` times a normal number, and what is trained in full moved by as much."""
    model = copy.deepcopy(model)
    inject(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            zero = layer.lora_B if layer.lora_A.any() else layer.lora_A  # an embedding starts with A = 0
            zero.copy_(size * torch.randn(zero.shape, generator=generator))
        for p in trained_in_full(model).values():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return Adapter.from_model(model)


@pytest.fixture(scope="module")
def adapter(loaded) -> Adapter:
    return make_adapter(loaded, LoRAConfig(r=4, target_modules=("q_proj", "v_proj", "up_proj")), 0.2)


def engine_of(model, adapter: Adapter | None, end=NO_END, **options) -> Engine:
    """An engine that finds one adapter, whatever it is called, or none."""

    def find(name: str, step: int) -> Adapter:
        if adapter is None:
            raise LoRAError(f"`adapter` (={name!r}) must be one that exists.")
        return adapter

    return Engine(model, find, end, **options)


@pytest.fixture
def engine(base, adapter) -> Engine:
    return engine_of(base, adapter)


@pytest.fixture
def with_head(loaded) -> Adapter:
    """An adapter that rows of a batch cannot have for themselves: the head is trained in full."""
    config = LoRAConfig(r=4, target_modules=("q_proj", "v_proj", "up_proj"), modules_to_save=("lm_head",))
    return make_adapter(loaded, config, 0.2)


@pytest.fixture
def switched(base, with_head) -> Engine:
    return engine_of(base, with_head)


def applied(model, adapter: Adapter):
    """A model of its own that runs the adapter."""
    model = copy.deepcopy(model)
    adapter.apply(model)
    return model.eval()


def shapes_seen(model) -> list[tuple[int, ...]]:
    """A list to which each forward of the model adds the shape of its tokens from here on."""
    seen = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def ask(engine: Engine, pane: str, settings: ChatSettings = GREEDY, prompt: list[int] = PROMPT) -> tuple[int, ...]:
    *_, last = engine.answer(PANES[pane], prompt, settings)
    return last.token_ids


def together_of(engine: Engine, names=PANES, settings: ChatSettings = GREEDY) -> list[dict[str, Answer]]:
    """All that panes say, token by token, by their names."""
    steps = engine.answer_all([PANES[name] for name in names], [PROMPT] * len(names), settings)
    return [dict(zip(names, answers, strict=True)) for answers in steps]


def ask_all(engine: Engine, settings: ChatSettings = GREEDY, panes=PANES) -> dict[str, tuple[int, ...]]:
    return {name: answer.token_ids for name, answer in together_of(engine, panes, settings)[-1].items()}


def generate(model, **options) -> tuple[int, ...]:
    """What transformers itself answers, greedily, without the prompt."""
    options = {"max_new_tokens": LENGTH, "eos_token_id": None, "pad_token_id": 0} | options
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    return tuple(out[0, len(PROMPT) :].tolist())


@pytest.fixture
def peft_model(loaded, adapter, tmp_path):
    from peft import PeftModel

    adapter.save(tmp_path / "adapter")
    return PeftModel.from_pretrained(copy.deepcopy(loaded), str(tmp_path / "adapter")).eval()


# What the panes compute


def test_the_base_pane_answers_as_transformers_does(engine, loaded):
    assert ask(engine, "base") == generate(loaded)


def test_the_adapter_pane_answers_as_peft_does_and_not_as_the_base(engine, peft_model, loaded):
    answer = ask(engine, "adapter")
    assert answer == generate(peft_model)
    assert answer != generate(loaded)


def test_the_merged_pane_answers_as_peft_s_merged_model_does(engine, peft_model):
    assert ask(engine, "merged") == generate(peft_model.merge_and_unload())


def test_an_adapter_with_a_trained_head_answers_too_and_leaves_the_base_its_own(switched, with_head, loaded):
    ours, theirs = generate(loaded), generate(applied(loaded, with_head))
    assert ours != theirs
    assert ask_all(switched) == {"base": ours, "adapter": theirs, "merged": theirs}


def tiny_opt():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 1}
    return OPTForCausalLM(OPTConfig(vocab_size=300, num_attention_heads=2, init_std=0.5, **sizes))


def tiny_gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 300, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
    return GPT2LMHeadModel(GPT2Config(**sizes | changes))


@pytest.mark.parametrize(("make", "target"), [(tiny_opt, "fc1"), (tiny_gpt2, "wpe")])
def test_a_layer_that_does_not_get_rows_is_switched_instead(make, target):
    torch.manual_seed(0)
    model = make().eval()
    adapter = make_adapter(model, LoRAConfig(r=2, target_modules=(target,)), 1.0)
    ours, theirs = generate(model), generate(applied(model, adapter))
    assert ours != theirs
    assert ask_all(engine_of(model, adapter)) == {"base": ours, "adapter": theirs, "merged": theirs}


def test_an_engine_that_finds_no_adapter_answers_as_base_and_says_why_no_other_pane_does(base, loaded):
    engine = engine_of(base, None)
    assert ask(engine, "base") == generate(loaded)
    for pane in (PANES["adapter"], PANES["merged"]):
        with pytest.raises(LoRAError, match=r"`adapter` \(='adapter'\) must be one that exists"):
            engine.answer(pane, PROMPT, GREEDY)
        with pytest.raises(LoRAError, match="must be one that exists"):
            engine.logits(pane, IDS)


def test_logits_of_merged_and_unmerged_agree_and_differ_from_the_base(engine, loaded, peft_model):
    ids = torch.randint(3, 290, (2, 20), generator=torch.Generator().manual_seed(3))
    by_pane = {name: engine.logits(pane, ids) for name, pane in PANES.items()}
    with torch.inference_mode():
        assert torch.equal(by_pane["base"], loaded(ids).logits)
        torch.testing.assert_close(by_pane["adapter"], peft_model(ids).logits, rtol=0, atol=MERGED_TOLERANCE)
    assert (by_pane["merged"] - by_pane["adapter"]).abs().max() < MERGED_TOLERANCE
    assert (by_pane["adapter"] - by_pane["base"]).abs().max() > 1_000 * MERGED_TOLERANCE


def twin_of(engine: Engine):
    """The model of the last pane that has one for itself."""
    return list(engine._models.values())[-1]


def test_the_merged_twin_shares_what_the_adapter_does_not_change(engine, base, adapter):
    ask(engine, "merged")
    twin = twin_of(engine)
    assert not lora_layers(twin)
    own = dict(base.named_parameters())
    changed = {name for name, p in twin.named_parameters() if own.get(name) is not p}
    assert changed == {f"{path}.weight" for path in adapter.factors}


def test_asking_leaves_every_weight_as_it_was(engine, base, loaded):
    for pane in PANES:
        ask(engine, pane, ChatSettings(max_new_tokens=3, temperature=1.0))
    base_weights = {name.replace(".base_layer", ""): p for name, p in base.named_parameters() if "lora_" not in name}
    assert base_weights.keys() == dict(loaded.named_parameters()).keys()
    assert all(torch.equal(base_weights[name], p) for name, p in loaded.named_parameters())


# Panes of all kinds, together


@pytest.fixture(scope="module")
def several(loaded) -> dict[str, Adapter]:
    """Adapters as runs would have them: of other matrices and ranks, DoRA's, and one that no bank takes."""
    return {
        "a": make_adapter(loaded, LoRAConfig(r=4, target_modules=("q_proj", "v_proj", "up_proj")), 0.2),
        "a@40": make_adapter(loaded, LoRAConfig(r=4, target_modules=("q_proj", "v_proj", "up_proj")), 0.1),
        "b": make_adapter(loaded, LoRAConfig(r=2, target_modules=("o_proj", "down_proj")), 0.3),
        "dora": make_adapter(loaded, LoRAConfig(r=2, dora=True, target_modules=("q_proj", "down_proj")), 0.3),
        "head": make_adapter(loaded, LoRAConfig(r=2, target_modules=("q_proj",), modules_to_save=("lm_head",)), 0.2),
    }


@pytest.fixture
def lab(base, several) -> Engine:
    return Engine(base, lambda name, step: several[f"{name}@{step}" if step else name], NO_END)


def alone(loaded, adapter: Adapter | None, value: float = 1.0):
    """A model of its own that runs the adapter at a strength, by the layers and not by a bank."""
    model = copy.deepcopy(loaded)
    if adapter is not None:
        adapter.apply(model)
    for layer in lora_layers(model).values():
        layer.strength = value
    return model.eval()


MIXED = {
    "strengths": [Pane(), Pane("a"), Pane("a", strength=-0.5), Pane("a", strength=2.0)],
    "sources": [Pane("a", rank=2), Pane("a", step=40), Pane("b"), Pane("a", plus="b", strength=0.5)],
    "dora": [Pane("dora", strength=0.5), Pane("dora"), Pane("a"), Pane("dora", strength=0.0)],
    "merged": [Pane("a", merged=True), Pane("dora", strength=0.5, merged=True), Pane("head"), Pane("a", plus="b")],
}


def expected_model(loaded, several, pane: Pane):
    if not pane.adapter:
        return alone(loaded, None)
    adapter = several[f"{pane.adapter}@{pane.step}" if pane.step else pane.adapter]
    if pane.rank:
        adapter = truncate(adapter, rank=pane.rank).adapter
    if pane.plus:
        return alone(loaded, weighted_sum([adapter, several[pane.plus]], [pane.strength, pane.plus_strength]))
    return alone(loaded, adapter, pane.strength)


@pytest.mark.parametrize("kind", MIXED)
def test_panes_of_all_kinds_say_together_what_each_says_alone(kind, lab, loaded, several):
    panes = MIXED[kind]
    wanted = [generate(expected_model(loaded, several, pane)) for pane in panes]
    *_, last = lab.answer_all(panes, [PROMPT] * 4, GREEDY)
    assert [answer.token_ids for answer in last] == wanted
    assert len(set(wanted)) >= 3
    for pane in panes:
        with torch.inference_mode():
            there = expected_model(loaded, several, pane)(IDS).logits
        assert (lab.logits(pane, IDS) - there).abs().max() < MERGED_TOLERANCE


def test_all_unmerged_panes_are_one_batch_and_a_merged_one_is_another(lab, base):
    seen = shapes_seen(base)
    list(lab.answer_all(MIXED["sources"], [PROMPT] * 4, GREEDY))
    del seen[:-LENGTH]  # each adapter was tried once
    assert seen == [(4, len(PROMPT))] + [(4, 1)] * (LENGTH - 1)


def test_prompts_of_other_lengths_go_together_and_each_answers_as_alone(lab):
    panes = [Pane(), Pane("a"), Pane("b"), Pane("a", merged=True)]
    prompts = [PROMPT, PROMPT[:3], [7, 8, 9, *PROMPT], PROMPT[:5]]
    single = [list(lab.answer(pane, ids, GREEDY))[-1].token_ids for pane, ids in zip(panes, prompts, strict=True)]
    *_, last = lab.answer_all(panes, prompts, GREEDY)
    assert [answer.token_ids for answer in last] == single


def test_a_strength_that_moves_takes_effect_at_the_next_token(lab, loaded):
    panes, moved = [Pane(), Pane("a", strength=0.0)], [0.0, 0.0]  # of the base none is asked for
    for number, answers in enumerate(lab.answer_all(panes, [PROMPT] * 2, GREEDY, lambda: moved), start=1):
        if number <= 4:
            assert answers[0].token_ids == answers[1].token_ids == generate(loaded)[:number]
            assert answers[1].engine == "adapter off (strength 0) · float32"
        else:
            assert answers[1].engine == "a unmerged on 6 matrices, strength 1.5 · float32"
        moved[1] = 1.5 if number == 4 else moved[1]
    assert answers[0].token_ids == generate(loaded)
    assert answers[1].token_ids != answers[0].token_ids


def test_an_adapter_that_was_trained_on_is_run_as_it_is_now(lab, several, loaded, monkeypatch):
    pane, merged = Pane("a"), Pane("a", merged=True)
    before = [list(lab.answer(p, PROMPT, GREEDY))[-1].token_ids for p in (pane, merged)]
    monkeypatch.setitem(several, "a", several["b"])
    after = [list(lab.answer(p, PROMPT, GREEDY))[-1].token_ids for p in (pane, merged)]
    assert after == [generate(alone(loaded, several["b"]))] * 2
    assert before[0] == before[1] != after[0]


def test_adapters_make_room_for_others_and_come_back(lab, monkeypatch):
    monkeypatch.setattr("studio.chat.KEPT_ADAPTERS", 1)
    first = [list(lab.answer(Pane(name), PROMPT, GREEDY))[-1].token_ids for name in ("a", "b", "dora")]
    assert lab._bank.names == ("dora",)
    slow = lab.answer(Pane("a"), PROMPT, GREEDY)
    next(slow)
    assert list(lab.answer(Pane("b"), PROMPT, GREEDY))[-1].token_ids == first[1]
    *_, last = slow  # it goes on though it had to make room
    assert last.token_ids == first[0]


# Fingerprints


def test_panes_that_should_differ_and_do_not_are_marked_and_others_are_not(base, several, loaded):
    dead = make_adapter(loaded, LoRAConfig(r=2), 0.0)
    engine = Engine(base, lambda name, step: dead if name == "dead" else several[name], NO_END)
    panes = [Pane(), Pane("dead"), Pane("a"), Pane("dead", merged=True)]
    first = next(engine.answer_all(panes, [PROMPT] * 4, GREEDY))
    assert [answer.same_as for answer in first] == [(1, 3), (0,), (), (0,)]
    assert first[0].fingerprint == first[1].fingerprint != first[2].fingerprint
    first = next(
        engine.answer_all([Pane("a", rank=4), Pane("a"), Pane("a", merged=True), Pane()], [PROMPT] * 4, GREEDY)
    )
    assert [answer.same_as for answer in first] == [(1, 2), (0,), (0,), ()], "rank 4 of 4 cuts nothing off"


# Where it changed its mind


@pytest.mark.parametrize("pane", [Pane("a"), Pane("head"), Pane("dora", strength=0.5, merged=True)])
def test_the_shift_is_the_divergence_of_the_two_models_own_distributions(pane, lab, loaded, several):
    model = alone(loaded, several[pane.adapter], pane.strength)
    with torch.inference_mode():
        p, q = (m(IDS).logits[0].double().log_softmax(-1) for m in (model, loaded))
    found = lab.shift(pane, PROMPT, 3, top=4)
    assert list(found.token_ids) == PROMPT[3:]
    for n, place in enumerate(range(3, len(PROMPT))):
        a, b = p[place - 1], q[place - 1]
        assert found.kl[n] == pytest.approx(float((a.exp() * (a - b)).sum()), abs=1e-4)
        assert found.log_probs[n] == pytest.approx((float(a[PROMPT[place]]), float(b[PROMPT[place]])), abs=1e-4)
        for told, true in zip(found.top[n], (a, b), strict=True):
            assert [i for i, _ in told] == true.topk(4).indices.tolist()
            assert [p for _, p in told] == pytest.approx(true.topk(4).values.exp().tolist(), abs=1e-4)
    assert max(found.kl) > 0.1


def test_the_base_has_not_changed_its_mind_and_a_text_without_a_token_to_score_is_refused(lab):
    assert lab.shift(Pane(), PROMPT, 0).kl == (0.0,) * (len(PROMPT) - 1)
    with pytest.raises(LoRAError, match=r"The text \(=0 tokens\) must have from 1 to 2048 tokens to be scored\."):
        lab.shift(Pane("a"), PROMPT, len(PROMPT))


# The stream


@pytest.mark.parametrize("pane", PANES)
def test_an_answer_grows_by_one_token_until_its_longest(pane, engine):
    answers = list(engine.answer(PANES[pane], PROMPT, GREEDY))
    assert [len(a.token_ids) for a in answers] == list(range(1, LENGTH + 1))
    assert [a.done for a in answers] == [False] * (LENGTH - 1) + [True]
    for before, after in zip(answers, answers[1:], strict=False):
        assert after.token_ids[:-1] == before.token_ids


@pytest.mark.parametrize("place", [0, 4, LENGTH - 1])
def test_an_end_token_ends_the_answer_and_is_not_part_of_it(place, base, loaded):
    whole = generate(loaded)
    end = whole[place]
    *_, last = engine_of(base, None, frozenset({end, 2})).answer(Pane(), PROMPT, GREEDY)
    assert last.done
    assert last.token_ids == whole[: whole.index(end)]


def test_speed_is_told_once_there_are_two_tokens(engine):
    first, *others = engine.answer(Pane(), PROMPT, GREEDY)
    assert first.tokens_per_second == 0
    assert first.first_token_seconds > 0
    assert all(a.tokens_per_second > 0 and a.first_token_seconds == first.first_token_seconds for a in others)


SETTINGS = [GREEDY, *(ChatSettings(LENGTH, temperature=1.0, seed=seed) for seed in range(3))]


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "seed 0", "seed 1", "seed 2"])
@pytest.mark.parametrize("kind", ["engine", "switched"])
def test_all_panes_go_in_step_and_each_answers_as_alone(kind, settings, request):
    engine = request.getfixturevalue(kind)
    alone = {pane: ask(engine, pane, settings) for pane in PANES}
    assert alone["base"] != alone["adapter"]
    together = together_of(engine, PANES, settings)
    assert len(together) == LENGTH
    for number, answers in enumerate(together, start=1):
        assert {pane: a.token_ids for pane, a in answers.items()} == {p: alone[p][:number] for p in PANES}
    assert all(answer.done for answer in together[-1].values())


def test_base_and_adapter_take_one_forward_a_token_and_the_merged_model_its_own(engine, base):
    ask(engine, "merged", ChatSettings(max_new_tokens=1))  # is made
    unmerged, merged = shapes_seen(base), shapes_seen(twin_of(engine))
    ask_all(engine)
    assert unmerged == [(2, len(PROMPT))] + [(2, 1)] * (LENGTH - 1)
    assert merged == [(1, len(PROMPT))] + [(1, 1)] * (LENGTH - 1)


@pytest.mark.parametrize("first", ["base", "adapter"])
@pytest.mark.parametrize("settings", SETTINGS[:2], ids=["greedy", "drawn"])
def test_a_pane_that_has_ended_stands_and_leaves_the_batch_while_the_other_goes_on(
    first, settings, base, adapter, loaded
):
    unended = engine_of(copy.deepcopy(loaded), adapter, NO_END)
    whole = {pane: ask(unended, pane, settings) for pane in ("base", "adapter")}
    [other] = whole.keys() - {first}
    place, end = next((i, t) for i, t in enumerate(whole[first]) if i and t not in whole[other])
    engine = engine_of(base, adapter, frozenset({end}))
    seen = shapes_seen(base)
    together = together_of(engine, ("base", "adapter"), settings)
    assert {pane: answer.token_ids for pane, answer in together[-1].items()} == {
        first: whole[first][:place],
        other: whole[other],
    }
    assert [answers[first].done for answers in together] == [False] * place + [True] * (LENGTH - place)
    assert [answers[other].done for answers in together] == [False] * (LENGTH - 1) + [True]
    assert [rows for rows, _ in seen[-LENGTH:]] == [2] * (place + 1) + [1] * (LENGTH - place - 1)
    assert together[-1][other].engine == told_by(unended, other)


def test_a_row_leaves_a_cache_of_states_too():
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    kinds = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "initializer_range": 0.5}
    model = Lfm2ForCausalLM(Lfm2Config(vocab_size=300, **sizes, **kinds)).eval()
    adapter = make_adapter(model, LoRAConfig(r=2, target_modules=("in_proj", "q_proj")), 0.3)
    ours, theirs = generate(model), generate(applied(model, adapter))
    place, end = next((i, t) for i, t in enumerate(ours) if i and t not in theirs)
    found = ask_all(engine_of(model, adapter, frozenset({end})))
    assert found == {"base": ours[:place], "adapter": theirs, "merged": theirs}


def test_an_answer_that_is_left_in_the_middle_disturbs_no_other(engine):
    whole = ask(engine, "adapter")
    for _ in engine.answer(Pane(), PROMPT, GREEDY):
        break
    assert ask(engine, "adapter") == whole


def test_two_people_may_ask_at_once(engine):
    alone = {pane: ask(engine, pane) for pane in ("base", "adapter")}
    found: dict[str, set[tuple[int, ...]]] = {"base": set(), "adapter": set()}

    def ask_often(pane: str) -> None:
        for _ in range(10):
            found[pane].add(ask(engine, pane))

    threads = [threading.Thread(target=ask_often, args=(pane,)) for pane in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {pane: {answer} for pane, answer in alone.items()}


def test_one_thread_is_used_while_something_else_is_busy_on_the_cores(base, adapter):
    torch.set_num_threads(2)
    try:
        engine = engine_of(base, adapter, NO_END, is_cpu_shared=iter((True, False)).__next__)  # asked once an answer
        used = []
        for _ in range(2):
            for _ in engine.answer(Pane(), PROMPT, ChatSettings(max_new_tokens=2)):
                used.append(torch.get_num_threads())
        assert used == [1, 1, 2, 2]
    finally:
        torch.set_num_threads(1)


# How tokens are chosen


def hot(**changes) -> ChatSettings:
    return ChatSettings(**{"max_new_tokens": LENGTH, "temperature": 1.0, "top_p": 1.0} | changes)


@pytest.mark.parametrize("pane", PANES)
def test_the_same_seed_gives_the_same_answer_and_others_give_others(pane, engine):
    assert ask(engine, pane, hot(seed=3)) == ask(engine, pane, hot(seed=3))
    assert len({ask(engine, pane, hot(seed=seed)) for seed in range(5)}) == 5


def test_the_same_seed_draws_alike_in_every_pane(base, loaded):
    engine = engine_of(base, make_adapter(loaded, LoRAConfig(r=2), 0.0), NO_END)  # ΔW = 0: all panes are the base
    assert len(set(ask_all(engine, hot(seed=4)).values())) == 1


def test_drawing_does_not_touch_the_process_s_own_random_numbers(engine):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ask(engine, "adapter", hot())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tiny_top_p_takes_the_likeliest_token_at_any_temperature(engine):
    for heat in (0.5, 1.0, 5.0):
        assert ask(engine, "adapter", hot(temperature=heat, top_p=1e-9)) == ask(engine, "adapter")


def test_a_low_temperature_comes_to_the_likeliest_tokens(engine):
    assert ask(engine, "base", hot(temperature=1e-3)) == ask(engine, "base")


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.9, 1.0])
def test_top_p_draws_from_the_tokens_that_transformers_keeps(top_p):
    from transformers import TopPLogitsWarper

    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(8, generator=generator)
    kept = TopPLogitsWarper(top_p)(None, logits[None])[0] if top_p < 1 else logits
    drawn = [choose(logits, hot(top_p=top_p), generator) for _ in range(2_000)]
    share = torch.bincount(torch.tensor(drawn), minlength=8) / len(drawn)
    expected = kept.softmax(-1)
    assert torch.equal(share[expected == 0], torch.zeros(int((expected == 0).sum())))
    assert (share - expected).abs().max() < 0.04  # over three standard deviations of 2000 draws


def test_temperature_divides_the_logits():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    pairs = [(torch.Generator().manual_seed(s), torch.Generator().manual_seed(s)) for s in range(50)]
    warm = [choose(logits, hot(temperature=2.0), a) for a, _ in pairs]
    assert warm == [choose(logits / 2, hot(), b) for _, b in pairs]
    assert warm != [choose(logits, hot(), torch.Generator().manual_seed(s)) for s in range(50)]


# What the panes say of themselves


def told_by(engine: Engine, pane: str) -> str:
    return next(engine.answer(PANES[pane], PROMPT, GREEDY)).engine


def test_each_pane_says_what_it_runs(engine):
    expected = {
        "base": "adapter off (strength 0) · float32",
        "adapter": "adapter unmerged on 6 matrices, strength 1 · float32",
        "merged": "W₀ + ΔW in 6 matrices, no LoRA layer · float32",
    }
    assert told_by(engine, "base") == "no adapter · float32"  # none was asked for yet
    told_by(engine, "adapter")
    assert {pane: told_by(engine, pane) for pane in PANES} == expected
    for answers in together_of(engine):
        assert {pane: answer.engine for pane, answer in answers.items()} == expected


def test_the_panes_of_an_adapter_that_no_bank_takes_say_what_they_run(switched):
    assert [told_by(switched, pane) for pane in PANES] == [
        "no adapter · float32",
        "adapter unmerged on 6 matrices, strength 1 · float32",
        "W₀ + ΔW in 7 matrices, no LoRA layer · float32",
    ]


def test_rows_are_told_as_they_stand_in_the_bank_whatever_was_asked(engine, monkeypatch):
    ask(engine, "adapter")  # there is a bank
    use = engine._bank.use
    monkeypatch.setattr(engine._bank, "use", lambda *rows: use({"adapter": 0.5}, {"adapter": 0.0}))
    answers = together_of(engine, ("base", "adapter"))[0]
    assert answers["base"].engine == "adapter unmerged on 6 matrices, strength 0.5 · float32"
    assert answers["adapter"].engine == "adapter off (strength 0) · float32"


def test_without_an_adapter_it_says_so_and_names_the_type(base):
    assert told_by(engine_of(base.bfloat16(), None), "base") == "no adapter · bfloat16"


def test_a_merge_by_hand_is_told_and_another_strength_then_refused(switched):
    expected = ask(switched, "adapter")
    merge(twin_of(switched))
    assert told_by(switched, "adapter") == "6 of 6 LoRA layers merged · float32"
    assert ask(switched, "adapter") == expected
    with pytest.raises(
        LoRAError, match=r"`strength` \(=0\.5\) must not change while the layer is merged; call unmerge"
    ):
        next(switched.answer(Pane("adapter", strength=0.5), PROMPT, GREEDY))
    unmerge(twin_of(switched))
    next(iter(lora_layers(twin_of(switched)).values())).merge()
    assert told_by(switched, "adapter") == "1 of 6 LoRA layers merged · float32"


def test_strengths_are_told_as_they_stand_in_the_layers(base, adapter):
    adapter.apply(base)
    first, *others = lora_layers(base).values()
    for layer in others:
        layer.strength = 0.5
    assert describe(base, base) == "adapter unmerged on 6 matrices, strength 0.5 and 1 · float32"
    first.strength = 0.0
    assert describe(base, base) == "adapter unmerged on 6 matrices, strength 0 and 0.5 · float32"
    for layer in others:
        layer.strength = 0.0
    assert describe(base, base) == "adapter off (strength 0) · float32"


# Errors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, r"`max_new_tokens` \(=0\) must be at least 1\."),
        ({"temperature": -0.1}, r"`temperature` \(=-0\.1\) must be at least 0 and at most 5\."),
        ({"temperature": 5.1}, r"`temperature` \(=5\.1\) must be at least 0 and at most 5\."),
        ({"temperature": float("nan")}, r"`temperature` \(=nan\) must be at least 0 and at most 5\."),
        ({"top_p": 0.0}, r"`top_p` \(=0\.0\) must be above 0 and at most 1\."),
        ({"top_p": 1.1}, r"`top_p` \(=1\.1\) must be above 0 and at most 1\."),
        ({"top_p": float("nan")}, r"`top_p` \(=nan\) must be above 0 and at most 1\."),
        pytest.param(
            {"seed": 2**64},
            r"`seed` \(=18446744073709551616\) must be",
        ),
    ],
)
def test_wrong_settings_are_refused_by_name_and_value(values, message):
    with pytest.raises(LoRAError, match=message):
        ChatSettings(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"merged": True}, r"`merged` \(=True\) must go with an adapter; name one in `adapter`\."),
        ({"rank": 2, "plus": "b"}, r"`rank` \(=2\) and `plus` \(='b'\) must go with an adapter"),
        ({"adapter": "a", "strength": 2.5}, r"`strength` \(=2\.5\) must be at least -1\.0 and at most 2\.0"),
        ({"adapter": "a", "rank": -1}, r"`rank` \(=-1\) must be at least 0"),
        ({"adapter": "a", "step": 0.5}, r"`step` \(=0\.5\) must be a whole number"),
    ],
)
def test_a_pane_that_cannot_be_is_refused_by_name_and_value(values, message):
    with pytest.raises(LoRAError, match=message):
        Pane(**values)


@pytest.mark.parametrize("pane", [Pane(), Pane("a", -0.5, 2, 40, "b", 0.25), Pane("a", merged=True)])
def test_a_pane_goes_to_plain_values_and_comes_back(pane):
    assert Pane.from_dict(json.loads(json.dumps(pane.to_dict()))) == pane


@pytest.mark.parametrize(
    ("pane", "title"),
    [
        (Pane(), "Base"),
        (Pane("a"), "Base + adapter"),
        (Pane("b", merged=True, strength=0.5), "Merged, b, strength 0.5"),
        (Pane("a", rank=2, step=40), "Base + adapter, step 40, rank 2"),
        (Pane("a", plus="b", plus_strength=-1), "Base + adapter, plus -1 × b"),
    ],
)
def test_a_pane_says_what_it_runs_in_a_few_words(pane, title):
    assert pane.title("a") == title


@pytest.mark.parametrize("num", [0, 5])
def test_more_or_fewer_panes_than_there_can_be_are_refused(engine, num):
    with pytest.raises(LoRAError, match=rf"`panes` \(={num} of them\) must be from 1 to 4\."):
        engine.answer_all([Pane()] * num, [PROMPT] * num, GREEDY)


def test_a_prompt_that_fills_the_context_is_refused(engine):
    with pytest.raises(LoRAError, match=r"The prompt \(=256 tokens\) must be shorter than the model's context, 256"):
        engine.answer(Pane(), [5] * 256, GREEDY)


def test_an_empty_prompt_is_refused(engine):
    with pytest.raises(LoRAError, match=r"`prompt_ids` must hold at least one token; write a message first\."):
        engine.answer(Pane(), [], GREEDY)


def test_an_adapter_of_another_model_is_refused_and_leaves_the_model_bare(base, loaded):
    wider = copy.deepcopy(loaded)
    wider.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 40)
    other = make_adapter(wider, LoRAConfig(r=2, target_modules="model.layers.0.self_attn.q_proj"), 0.1)
    with pytest.raises(AdapterFileError, match=r"must fit the model: .*q_proj is 32 × 32 in the model and 40 × 32 in"):
        engine_of(base, other).answer(Pane("other"), PROMPT, GREEDY)
    assert not lora_layers(base)


def test_an_answer_ends_where_the_model_s_context_does():
    torch.manual_seed(0)
    short = tiny_gpt2(n_positions=10).eval()
    *_, last = engine_of(short, None, NO_END).answer(Pane(), PROMPT, GREEDY)
    assert isinstance(last, Answer) and last.done
