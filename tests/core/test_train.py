import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from core import (
    Evaluated,
    Finished,
    LoRAConfig,
    LoRAError,
    NonFiniteLossError,
    Started,
    Step,
    TrainConfig,
    evaluate,
    inject,
    lora_layers,
    token_losses,
    train,
)
from core.train import learning_rate

MODELS = ["llama", "gpt2", "plain"]
CPU = {"device": "cpu", "precision": "fp32", "spectrum_every": 0}


@pytest.fixture
def adapted(build):
    """adapted(name, seed=0, dtype=…, **settings): a freshly injected model; B is zero, as at the start of training."""

    def make(name="llama", seed=0, dtype=torch.float32, **values):
        model = build(name).to(dtype)
        inject(model, LoRAConfig(**({"r": 3} | values)), seed=seed)
        return model

    return make


@pytest.fixture
def batches(make_batch):
    """batches(n): different batches of two rows, with different numbers of trained tokens."""
    return lambda n: [make_batch((2 + i % 5, 1), seed=i) for i in range(n)]


def config(steps=3, **values):
    return TrainConfig(**({"steps": steps, "warmup_steps": 0, "learning_rate": 0.01} | CPU | values))


def factors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def steps_of(events):
    return [e for e in events if isinstance(e, Step)]


def full_logits_losses(model, batch):
    """The cross-entropy of every trained token by the book: all logits, shifted by one, the ignored ones dropped."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = getattr(output, "logits", output).float()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    return losses[batch["labels"][:, 1:].flatten() != -100]


# What training does.


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_falls(adapted, make_batch, name):
    model = adapted(name)
    batch = make_batch((2, 1, 3))
    events = steps_of(train(model, [batch] * 30, config(30, learning_rate=0.02), eval_batches=[batch]))
    assert events[-1].loss < 0.6 * events[0].loss
    assert evaluate(model, [batch]).loss < events[-1].loss + 0.05


def test_a_model_that_is_not_adapted_nor_frozen_can_be_evaluated(build, make_batch):
    model, batch = build("llama"), make_batch((2, 1, 3))
    model.requires_grad_(True)
    expected = full_logits_losses(model, batch).mean().item()
    assert evaluate(model, [batch]).loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_base_is_unchanged_bit_for_bit(adapted, batches, name):
    model = adapted(name)
    before = {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}
    started = factors(model)
    list(train(model, batches(4), config(4, weight_decay=0.1)))
    assert same_bits({n: t for n, t in model.state_dict().items() if "lora_" not in n}, before)
    assert not any(torch.equal(p, started[n]) for n, p in factors(model).items())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
@pytest.mark.parametrize("name", ["llama", "plain"])
def test_a_run_is_a_plain_loop_of_AdamW_over_the_full_loss(adapted, batches, name, clip_norm, schedule):
    chosen = config(5, warmup_steps=2, weight_decay=1.0, clip_norm=clip_norm, schedule=schedule)
    model, twin = adapted(name), adapted(name)
    events = steps_of(train(model, batches(5), chosen))

    parameters = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=1.0)
    for event, batch in zip(events, batches(5), strict=True):
        optimizer.param_groups[0]["lr"] = learning_rate(chosen, event.step)
        loss = full_logits_losses(twin, batch).mean()
        loss.backward()
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in parameters]))
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
            assert norm > clip_norm
        optimizer.step()
        optimizer.zero_grad()
        assert event.loss == pytest.approx(loss.item(), rel=1e-5)
        assert event.grad_norm == pytest.approx(norm.item(), rel=1e-3)
        assert event.learning_rate == learning_rate(chosen, event.step)
    for n, p in factors(model).items():
        torch.testing.assert_close(p, factors(twin)[n], rtol=1e-3, atol=1e-4)


def test_clipping_and_weight_decay_make_a_difference(adapted, batches):
    """Else the test above could not see them."""
    results = []
    for values in ({}, {"clip_norm": 0.05}, {"weight_decay": 1.0}):
        model = adapted("plain")
        list(train(model, batches(5), config(5, **({"clip_norm": 0.0} | values))))
        results.append(torch.cat([p.flatten() for p in factors(model).values()]))
    assert (results[1] - results[0]).abs().max() > 1e-3
    assert (results[2] - results[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_seed_repeats_bit_for_bit(adapted, batches, dropout):
    runs = []
    for _ in range(2):
        model = adapted(dropout=dropout)
        losses = [e.loss for e in steps_of(train(model, batches(4), config(4, seed=5)))]
        runs.append((losses, factors(model)))
        torch.rand(7)  # what went on before does not matter
    assert runs[0][0] == runs[1][0] and same_bits(runs[0][1], runs[1][1])


def test_dropout_is_drawn_from_the_seed(adapted, batches):
    def losses(dropout, seed):
        return [e.loss for e in steps_of(train(adapted(dropout=dropout), batches(4), config(4, seed=seed)))]

    assert losses(0.3, seed=1) != losses(0.3, seed=2)
    assert losses(0.0, seed=1) == losses(0.0, seed=2)
    assert losses(0.3, seed=1) != losses(0.0, seed=1)


def test_a_consumer_that_draws_random_numbers_does_not_change_the_run(adapted, batches):
    results = []
    for draws in (False, True):
        model = adapted(dropout=0.3)
        for _ in train(model, batches(4), config(4)):
            if draws:
                torch.rand(1)
        results.append(factors(model))
    assert same_bits(*results)


@pytest.mark.parametrize("name", MODELS)
def test_four_batches_of_one_accumulated_are_one_batch_of_four(adapted, make_batch, name):
    """Also where the four have 8, 1, 5 and 2 trained tokens, and one of the next four has none."""
    whole = [make_batch((2, 8, 3, 8), seed=0), make_batch((1, 10, 4, 2), seed=1)]
    ones = [{k: v[row : row + 1] for k, v in batch.items()} for batch in whole for row in range(4)]
    trained = [int((one["labels"][:, 1:] != -100).sum()) for one in ones]
    assert 0 in trained and len(set(trained[:4])) > 2
    model, twin = adapted(name), adapted(name)
    at_once = steps_of(train(model, whole, config(2)))
    in_four = steps_of(train(twin, ones, config(2, accumulation=4)))
    for one, other in zip(at_once, in_four, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert (other.num_tokens, other.num_trained_tokens) == (one.num_tokens, one.num_trained_tokens)
    for n, p in factors(model).items():
        torch.testing.assert_close(p, factors(twin)[n], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_base_in_bfloat16_is_trained_with_A_and_B_in_float32(adapted, make_batch, name):
    model = adapted(name, dtype=torch.bfloat16)
    batch = make_batch((2, 1))
    events = list(train(model, [batch] * 20, config(20, learning_rate=0.02)))
    assert events[0].precision == "bfloat16"
    assert events[-2].loss < 0.8 * events[1].loss
    for layer in lora_layers(model).values():
        assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


# The events.


@pytest.mark.parametrize(
    ("eval_every", "expected"),
    [(0, "S E 1 2 3 4 5 E F"), (2, "S E 1 2 E 3 4 E 5 E F"), (5, "S E 1 2 3 4 5 E F"), (9, "S E 1 2 3 4 5 E F")],
)
def test_events_come_in_order_and_the_last_step_is_evaluated_once(adapted, batches, eval_every, expected):
    events = list(train(adapted("plain"), batches(5), config(5, eval_every=eval_every), eval_batches=batches(1)))
    words = {Started: "S", Evaluated: "E", Finished: "F"}
    assert " ".join(words.get(type(e)) or str(e.step) for e in events) == expected
    assert [e.step for e in events if isinstance(e, Evaluated)] == [
        0,
        *(s for s in range(1, 6) if s == 5 or (eval_every and s % eval_every == 0)),
    ]


def test_without_held_out_batches_nothing_is_evaluated(adapted, batches):
    kinds = [type(e) for e in train(adapted("plain"), batches(2), config(2, eval_every=1))]
    assert kinds == [Started, Step, Step, Finished]


@pytest.mark.parametrize("name", MODELS)
def test_events_state_what_is_so(adapted, make_batch, name):
    model = adapted(name)
    batch = make_batch((2, 1, 4))
    started, step, finished = train(model, [batch] * 2, config(1, accumulation=2))
    assert started.num_steps == 1
    assert started.num_parameters == sum(p.numel() for p in model.parameters())
    assert started.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (started.device, started.precision) == ("cpu", "float32")
    assert step.num_tokens == 2 * int(batch["attention_mask"].sum()) == 2 * (10 + 9 + 8)
    assert step.num_trained_tokens == 2 * int((batch["labels"][:, 1:] != -100).sum()) == 2 * (8 + 8 + 4)
    assert step.step_seconds > 0 and step.memory_bytes > 1 << 20
    assert (finished.step, finished.reason) == (1, "done")
    assert finished.peak_memory_bytes >= step.memory_bytes


def test_a_batch_without_a_mask_counts_all_its_tokens(adapted, make_batch):
    batch = make_batch((2, 1, 4))
    del batch["attention_mask"]
    _, step, _ = train(adapted("plain"), [batch], config(1))
    assert step.num_tokens == 30


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_evaluating_does_not_change_the_run(adapted, batches, dropout):
    results = []
    for held_out in (None, batches(3)):
        model = adapted(dropout=dropout)
        list(train(model, batches(4), config(4, eval_every=1), eval_batches=held_out))
        results.append(factors(model))
    assert same_bits(*results)


def test_the_model_is_in_train_mode_in_steps_and_in_eval_mode_afterwards(adapted, batches):
    model = adapted("plain")
    seen = []
    model.up.register_forward_hook(lambda layer, *_: seen.append(layer.training))
    list(train(model, batches(2), config(2, eval_every=1), eval_batches=batches(1)))
    assert seen[-5:] == [False, True, False, True, False]  # before them, what the model allows is tried out
    assert not any(m.training for m in model.modules())


def test_batches_are_taken_one_step_at_a_time(adapted, batches):
    taken = []

    def stream():
        for i, batch in enumerate(batches(100)):
            taken.append(i)
            yield batch

    for event in train(adapted("plain"), stream(), config(3, accumulation=2)):
        if isinstance(event, Step):
            assert len(taken) == 2 * event.step
    assert len(taken) == 6


def test_nothing_happens_before_the_first_event_is_asked_for(adapted, batches):
    state = torch.get_rng_state()
    train(adapted("plain"), batches(1), config(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_consumer_that_stops_early_has_A_and_B_as_of_the_last_step(adapted, batches, stop_at):
    whole = adapted(dropout=0.2)
    for event in train(whole, batches(5), config(5)):
        if isinstance(event, Step) and event.step == stop_at:
            expected = factors(whole)
    model = adapted(dropout=0.2)
    events = train(model, batches(5), config(5))
    for event in events:
        if isinstance(event, Step) and event.step == stop_at:
            events.close()
            break
    assert same_bits(factors(model), expected)
    assert not same_bits(factors(model), factors(whole))
    assert not any(p.grad is not None for p in model.parameters())
    with pytest.raises(StopIteration):
        next(events)


# Refusals.


def test_a_model_that_is_not_adapted_is_refused(build, batches):
    with pytest.raises(
        LoRAError, match=r"`model` must be adapted before it is trained; call inject\(model, LoRAConfig"
    ):
        next(train(build("plain"), batches(1), config(1)))


def test_a_merged_model_is_refused(adapted, batches):
    model = adapted("plain")
    next(iter(lora_layers(model).values())).merge()
    with pytest.raises(LoRAError, match=r"`model` must not be merged while it is trained; call unmerge\(model\) first"):
        next(train(model, batches(1), config(1)))


@pytest.mark.parametrize(("num_batches", "accumulation", "step"), [(0, 1, 1), (2, 1, 3), (3, 2, 2), (5, 3, 2)])
def test_batches_that_run_out_are_an_error_that_says_when(adapted, batches, num_batches, accumulation, step):
    total = 3 * accumulation
    message = rf"`batches` must give steps × accumulation \(={total}\) batches; they ran out in step {step}\."
    with pytest.raises(LoRAError, match=message):
        list(train(adapted("plain"), batches(num_batches), config(3, accumulation=accumulation)))


@pytest.mark.parametrize("label", ["none", "first position only"])
def test_a_step_without_a_trained_token_is_an_error(adapted, make_batch, label):
    bad = make_batch((10, 10))
    if label != "none":
        bad["labels"][:, 0] = 5  # no position predicts it
    with pytest.raises(LoRAError, match="The batch of step 2 must hold at least one trained token; all its labels are"):
        list(train(adapted(), [make_batch((2, 1)), bad], config(2)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_the_step_and_moves_nothing(adapted, batches, value):
    model = adapted("plain")
    events = train(model, batches(5), config(5))
    assert [next(events) for _ in range(3)][-1].step == 2
    with torch.no_grad():
        model.embed.weight[:, 0] = value
    before = factors(model)
    with pytest.raises(
        NonFiniteLossError, match=r"The loss of step 3 is not a finite number .*; try a smaller learning r"
    ):
        next(events)
    assert same_bits(factors(model), before)


def test_a_gradient_that_is_no_number_names_the_step_and_moves_nothing(adapted, batches):
    model = adapted("plain")
    events = train(model, batches(5), config(5))
    assert [next(events) for _ in range(2)][-1].step == 1
    model.up.lora_A.register_hook(lambda grad: grad * math.inf)
    before = factors(model)
    with pytest.raises(NonFiniteLossError, match=r"The gradient of step 2 is not a finite number"):
        next(events)
    assert same_bits(factors(model), before)


# The loss.


@pytest.mark.parametrize("head", ["frozen head", "adapted head"])
@pytest.mark.parametrize("name", MODELS)
def test_token_losses_and_their_gradients_are_those_of_the_full_logits(adapted, perturb, make_batch, name, head):
    model = perturb(adapted(name, target_modules=".*" if head == "adapted head" else "all-linear"))
    twin = copy.deepcopy(model)
    batch = make_batch((2, 10, 1, 8))
    losses, expected = token_losses(model, batch), full_logits_losses(twin, batch)
    assert losses.shape == (int((batch["labels"][:, 1:] != -100).sum()),) and losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    expected.sum().backward()
    for (n, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (p.grad is None) is (q.grad is None), n
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_float32_whatever_the_logits(adapted, make_batch, dtype):
    assert token_losses(adapted(dtype=dtype), make_batch((2,))).dtype == torch.float32


def test_the_head_sees_only_positions_before_a_trained_token(adapted, make_batch):
    model = adapted()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    token_losses(model, make_batch((6, 8)))  # 4 and, for padding, 1 of 10
    assert seen == [(1, 5, 64)]
    model(input_ids=torch.zeros(2, 10, dtype=torch.int64))
    assert seen[-1] == (2, 10, 64)  # afterwards it sees all again


def test_the_head_sees_all_again_after_an_error(adapted, make_batch, monkeypatch):
    model = adapted()
    monkeypatch.setattr(model.model.norm, "forward", lambda h: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        token_losses(model, make_batch((6, 8)))
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_without_trained_tokens_has_no_losses(adapted, make_batch, name):
    assert token_losses(adapted(name), make_batch((10, 10))).shape == (0,)


# Evaluation.


@pytest.mark.parametrize("name", MODELS)
def test_evaluate_is_the_mean_over_tokens_and_not_over_batches(adapted, perturb, make_batch, name):
    model = perturb(adapted(name))
    parts = [make_batch((1, 2, 3)), make_batch((8,), seed=1), make_batch((10, 10), seed=2)]
    losses = [full_logits_losses(model, part).detach() for part in parts]
    found = evaluate(model, parts, step=7)
    assert found.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert abs(found.loss - torch.stack([part.mean() for part in losses[:2]]).mean().item()) > 0.01
    assert found.num_trained_tokens == len(torch.cat(losses))
    assert found.step == 7 and found.evaluate_seconds > 0


def test_evaluate_uses_no_dropout_makes_no_gradient_and_leaves_eval_mode(adapted, perturb, batches):
    model = perturb(adapted(dropout=0.5)).train()
    assert evaluate(model, batches(2)).loss == evaluate(model.train(), batches(2)).loss
    assert not any(m.training for m in model.modules())
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("what", ["no batch", "no trained token"])
def test_evaluating_nothing_is_an_error(adapted, make_batch, what):
    held_out = [] if what == "no batch" else [make_batch((10,))]
    with pytest.raises(LoRAError, match=r"`batches` \(for evaluation\) must hold at least one trained token"):
        evaluate(adapted("plain"), held_out)


# The learning rate.


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "step", "share"),
    [
        ("linear", 4, 1, 1 / 4),
        ("linear", 4, 4, 1),
        ("linear", 4, 5, 1),
        ("linear", 4, 7, 1 - 2 / 6),
        ("linear", 4, 10, 1 / 6),
        ("linear", 0, 1, 1),
        ("linear", 0, 10, 1 / 10),
        ("linear", 10, 10, 1),
        ("linear", 10, 1, 1 / 10),
        ("cosine", 4, 2, 1 / 2),
        ("cosine", 4, 5, 1),
        ("cosine", 4, 8, 1 / 2),
        ("cosine", 0, 1, 1),
        ("cosine", 0, 6, 1 / 2),
        ("constant", 4, 3, 3 / 4),
        ("constant", 4, 5, 1),
        ("constant", 0, 10, 1),
    ],
)
def test_the_schedule_has_its_values_at_the_borders(schedule, warmup_steps, step, share):
    chosen = config(10, learning_rate=0.5, schedule=schedule, warmup_steps=warmup_steps)
    assert learning_rate(chosen, step) == pytest.approx(0.5 * share, rel=1e-12)


@pytest.mark.parametrize(("schedule", "warmup_steps"), [("linear", 3), ("linear", 0), ("cosine", 3), ("cosine", 0)])
def test_after_the_warm_up_the_schedule_is_transformers_own(schedule, warmup_steps):
    import transformers

    make = getattr(transformers, f"get_{schedule}_schedule_with_warmup")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = make(optimizer, warmup_steps, 12)
    theirs = []
    for _ in range(12):
        theirs.append(optimizer.param_groups[0]["lr"])  # theirs counts steps from 0, so its first rate is 0
        optimizer.step()
        scheduler.step()
    chosen = config(12, learning_rate=0.5, schedule=schedule, warmup_steps=warmup_steps)
    ours = [learning_rate(chosen, step) for step in range(1, 13)]
    assert ours[warmup_steps:] == pytest.approx(theirs[warmup_steps:])
    assert ours[: max(0, warmup_steps - 1)] == pytest.approx(theirs[1:warmup_steps])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(steps=st.integers(1, 500), share=st.floats(0, 1), schedule=st.sampled_from(["linear", "cosine", "constant"]))
def test_every_step_moves_the_weights_and_the_rate_rises_then_falls(steps, share, schedule):
    warmup_steps = round(share * steps)
    chosen = config(steps, schedule=schedule, warmup_steps=warmup_steps)
    rates = [learning_rate(chosen, step) for step in range(1, steps + 1)]
    assert all(0 < rate <= 0.01 * (1 + 1e-12) for rate in rates)
    assert max(rates) == pytest.approx(0.01)
    assert rates[:warmup_steps] == sorted(rates[:warmup_steps])
    assert rates[warmup_steps:] == sorted(rates[warmup_steps:], reverse=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled_training_gives_the_losses_of_the_plain_one(adapted, batches, name):
    plain, compiled = adapted(name), adapted(name)
    expected = [e.loss for e in steps_of(train(plain, batches(4), config(4)))]
    events = []
    for event in train(compiled, batches(4), config(4, compile=True)):
        events.append(event)
        if isinstance(event, Step):
            assert any(m._compiled_call_impl for m in compiled.modules())
    found = [e.loss for e in steps_of(events)]
    assert found == pytest.approx(expected, rel=1e-4)
    assert not any(m._compiled_call_impl for m in compiled.modules())
    assert [e.loss for e in steps_of(train(compiled, batches(1), config(1)))]
