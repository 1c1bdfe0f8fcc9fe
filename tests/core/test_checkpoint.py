"""Training that was broken off and taken up again is the training that was not."""

import dataclasses
import math

import pytest
import torch

from core import (
    Checkpoint,
    CheckpointError,
    Evaluated,
    ExplodedGradientError,
    Finished,
    LoRAConfig,
    LoRAError,
    NonFiniteLossError,
    SpectrumMeasured,
    Step,
    TrainConfig,
    inject,
    lora_layers,
    train,
)

STEPS = 7

SETTINGS = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "DoRA": {"dora": True},
    "PiSSA": {"init": "pissa"},
    "a module trained in full, and biases": {"modules_to_save": ("lm_head",), "bias": "all"},
    "another rank for some": {"rank_pattern": {"q_proj": 5}},
}
TRAINING = {
    "one group": {},
    "accumulation": {"accumulation": 2},
    "LoRA+, decay, cosine": {"lora_plus_ratio": 8, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 3},
}


@pytest.fixture
def adapted(build):
    def make(seed=0, dtype=torch.float32, **values):
        model = build("llama").to(dtype)
        inject(model, LoRAConfig(**({"r": 3} | values)), seed=seed)
        return model

    return make


@pytest.fixture
def batches(make_batch):
    """batches(first, last): those of a training without an end, from `first` on."""
    return lambda first, last: [make_batch((2 + i % 5, 1), seed=i) for i in range(first, last)]


def config(**values) -> TrainConfig:
    usual = {
        "steps": STEPS,
        "warmup_steps": 0,
        "learning_rate": 0.01,
        "eval_every": 2,
        "spectrum_every": 3,
        "device": "cpu",
    }
    return TrainConfig(**(usual | values))


def said(event) -> tuple:
    """What an event says, but for the time and the memory that it took."""
    return type(event).__name__, *(
        value for key, value in dataclasses.asdict(event).items() if not key.endswith(("_seconds", "memory_bytes"))
    )


def end_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


CASES = [
    *((lora, "one group", torch.float32) for lora in SETTINGS),
    *(("dropout", training, torch.float32) for training in TRAINING),
    ("dropout", "one group", torch.bfloat16),
]


@pytest.mark.parametrize(("lora", "training", "dtype"), CASES)
def test_a_break_changes_nothing_that_comes_after(lora, training, dtype, adapted, batches, tmp_path):
    chosen = config(**TRAINING[training])
    per_step, held_out = chosen.accumulation, batches(90, 92)
    model = adapted(dtype=dtype, **SETTINGS[lora])
    whole = list(train(model, batches(0, STEPS * per_step), chosen, eval_batches=held_out))
    assert [type(e) for e in whole].count(Evaluated) == 5  # before the first step, after 2, 4, 6, and at the end
    assert [type(e) for e in whole].count(SpectrumMeasured) == 3
    # After Started, after an evaluation, between a step and its evaluation; for one case after every event but those
    # that come just before their step's own.
    for taken in range(1, len(whole)) if lora == "plain" else (4, 5, 7):
        if isinstance(whole[taken - 1], SpectrumMeasured):
            continue
        first = adapted(dtype=dtype, **SETTINGS[lora])
        broken_off = train(first, batches(0, STEPS * per_step), chosen, eval_batches=held_out)
        before = [next(broken_off) for _ in range(taken)]
        broken_off.checkpoint().save(tmp_path / "state")
        broken_off.close()
        second = adapted(seed=99, dtype=dtype, **SETTINGS[lora])  # its own start does not matter
        start = Checkpoint.load(tmp_path / "state")
        rest = batches(start.step * per_step, STEPS * per_step)
        after = list(train(second, rest, chosen, eval_batches=held_out, start=start))
        assert [said(e) for e in before[1:] + after[1:]] == [said(e) for e in whole[1:]]
        ends = end_of(model), end_of(second)
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_checkpoint_is_of_its_step_whatever_training_does_afterwards(adapted, batches):
    events = train(adapted(), batches(0, STEPS), config())
    next(events), next(events)
    taken = events.checkpoint()
    kept = {name: tensor.clone() for name, tensor in taken.tensors.items()}
    list(events)
    assert taken.step == 1
    assert all(torch.equal(taken.tensors[name], kept[name]) for name in kept)
    assert not all(torch.equal(events.checkpoint().tensors[name], kept[name]) for name in kept)


def test_a_checkpoint_holds_what_is_trained_and_not_the_frozen_weights(adapted, batches):
    model = adapted()
    events = train(model, batches(0, STEPS), config())
    list(events)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition("/")[0] for name in events.checkpoint().tensors} == trained
    assert len(trained) < len(list(model.parameters()))


def test_before_its_first_event_training_has_no_checkpoint(adapted, batches):
    with pytest.raises(LoRAError, match="must have given its first event before a checkpoint can be taken"):
        train(adapted(), batches(0, STEPS), config()).checkpoint()


def test_more_steps_may_follow_than_were_first_asked_for(adapted, batches):
    events = train(adapted(), batches(0, 3), config(steps=3))
    list(events)
    further = list(train(adapted(), batches(3, 5), config(steps=5), start=events.checkpoint()))
    assert [e.step for e in further if isinstance(e, Step)] == [4, 5]


def test_a_checkpoint_of_the_last_step_only_finishes(adapted, batches):
    events = train(adapted(), batches(0, 3), config(steps=3), eval_batches=batches(9, 10))
    list(events)
    again = list(train(adapted(), [], config(steps=3), eval_batches=batches(9, 10), start=events.checkpoint()))
    assert [type(e).__name__ for e in again] == ["Started", "Finished"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 4}, r"layers.0-1.self_attn.q_proj.lora_A is \(4, 32\), not \(3, 32\)"),
        ({"target_modules": ("q_proj",)}, r"layers.0-1.mlp.up_proj.lora_A is not trained"),
        ({"dora": True}, r"layers.0-1.self_attn.q_proj.magnitude is not in the checkpoint"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_with_every_misfit(values, message, adapted, batches):
    events = train(adapted(), batches(0, STEPS), config())
    next(events), next(events)
    model = adapted(**values)
    before = end_of(model)
    with pytest.raises(CheckpointError, match=message) as error:
        next(train(model, batches(1, STEPS), config(), start=events.checkpoint()))
    assert str(error.value).count(";") >= 7 - 1  # each of the seven kinds of matrix, over both layers
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "no safetensors", "another file of tensors"])
def test_a_damaged_file_is_named(damage, adapted, batches, tmp_path):
    file = tmp_path / "state"
    events = train(adapted(), batches(0, STEPS), config())
    next(events)
    events.checkpoint().save(file)
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "another file of tensors":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, file)
    else:
        file.write_bytes({"empty": b"", "cut short": whole[:-9], "no safetensors": b"\xff" * 400}[damage])
    with pytest.raises(CheckpointError, match=str(file)):
        Checkpoint.load(file)


def test_what_cannot_be_written_leaves_the_earlier_checkpoint(adapted, batches, tmp_path, monkeypatch):
    events = train(adapted(), batches(0, STEPS), config())
    next(events), next(events)
    events.checkpoint().save(tmp_path / "state")
    next(events)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("core.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="could not be written: .*No space left on device. Free some space"):
        events.checkpoint().save(tmp_path / "state")
    assert Checkpoint.load(tmp_path / "state").step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


# The end before the last step.


@pytest.fixture
def rising(adapted, batches):
    """rising(patience, start=None): training whose held-out loss falls over six steps and then rises."""

    def make(patience, start=None):
        one, other = batches(0, 2)
        series = [one] * 6 + [other] * 34
        chosen = config(steps=40, eval_every=1, learning_rate=0.02, patience=patience)
        rest = series[start.step if start else 0 :]
        return train(adapted(), rest, chosen, eval_batches=[one], start=start)

    return make


@pytest.mark.parametrize("patience", [0, 1, 2])
def test_training_ends_when_the_held_out_loss_has_risen_so_often(patience, rising):
    events = list(rising(patience))
    losses = [e.loss for e in events if isinstance(e, Evaluated)]
    lowest, end = losses.index(min(losses)), events[-1]
    assert isinstance(end, Finished)
    assert 0 < lowest < len(losses) - 1
    assert (end.step, end.reason) == ((lowest + patience, "early") if patience else (40, "done"))
    assert len(losses) == end.step + 1  # one before the first step


def test_patience_counts_on_after_a_break(rising):
    end = list(rising(3))[-1].step
    broken_off = rising(3)
    while broken_off.step < end - 1:
        next(broken_off)
    rest = rising(3, start=broken_off.checkpoint())
    assert [(e.step, e.reason) for e in rest if isinstance(e, Finished)] == [(end, "early")]


# Where a number that is not finite comes from.


def error_of(events) -> NonFiniteLossError:
    with pytest.raises(NonFiniteLossError) as raised:
        list(events)
    return raised.value


def test_the_layer_whose_weights_broke_is_named(adapted, batches):
    model = adapted()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.base_layer.weight[3, 4] = math.nan
    error = error_of(train(model, batches(0, STEPS), config()))
    assert (error.what, error.step, error.batch, error.rows) == ("loss", 1, 0, (0, 1))
    assert error.where == "model.layers.1.mlp.up_proj.base_layer"
    assert "first in model.layers.1.mlp.up_proj.base_layer; try a smaller learning rate" in str(error)


def test_an_update_that_broke_is_named_by_its_parameter(adapted, batches):
    model = adapted()
    with torch.no_grad():
        lora_layers(model)["model.layers.0.mlp.down_proj"].lora_B[0, 0] = math.inf
    assert error_of(train(model, batches(0, STEPS), config())).where == "model.layers.0.mlp.down_proj.lora_B"


def test_the_rows_that_broke_are_named_by_their_places_in_their_batch(adapted, batches, make_batch):
    model = adapted()
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = math.nan  # a token that one row has
    whole = batches(0, 1)[0]
    whole["input_ids"][whole["input_ids"] == 63] = 1
    bad = {key: torch.cat([value, value[:1]]) for key, value in whole.items()}
    bad["input_ids"][1, 0] = 63
    error = error_of(train(model, [whole, bad], config(accumulation=2)))
    assert (error.step, error.batch, error.rows, error.where) == (1, 1, (1,), "model.embed_tokens")
    assert "in row 1 of batch 1 (from 0)" in str(error)


def test_a_finite_gradient_that_exploded_ends_training_before_its_step(adapted, batches):
    model = adapted()
    layer = model.model.layers[1].mlp.up_proj
    layer.scaling = 1e9
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ExplodedGradientError, match=r"of step 1 has exploded.*longest in model\.layers\.1\.mlp\.up_proj"
    ):
        list(train(model, batches(0, STEPS), config()))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    (_, first, *_) = train(model, batches(0, STEPS), config(explosion_norm=0))
    assert 1e6 < first.grad_norm < math.inf


def test_a_gradient_that_broke_is_named_by_its_parameter(adapted, batches):
    model = adapted()
    model.model.layers[0].self_attn.v_proj.lora_B.register_hook(lambda grad: grad * math.nan)
    error = error_of(train(model, batches(0, STEPS), config()))
    assert (error.what, error.rows, error.where) == ("gradient", (), "model.layers.0.self_attn.v_proj.lora_B")
