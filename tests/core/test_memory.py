"""The forecast of memory, against what tensors really take, and against what must be so."""

import copy
import re
import tracemalloc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from core import LoRAConfig, LoRAError, TrainConfig, forecast_memory, inject, lora_layers
from core.losses import Losses


def train_config(batch_size=3, length=40) -> TrainConfig:
    return TrainConfig(batch_size=batch_size, max_length=length)


@pytest.fixture
def forecast(build):
    def make(name="llama", dtype=torch.float32, lora=None, prepare=lambda model: None, **shape):
        lora = lora or LoRAConfig(r=4)
        return forecast_memory(build(name).to("meta"), lora, train_config(**shape), dtype, prepare=prepare)

    return make


def measured_peak(model, batch_size: int, length: int) -> int:
    """The most that torch's allocator held on the CPU in a real step, above what was there before and stays after."""
    ids = torch.zeros(batch_size, length, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    losses = Losses(model)
    losses.choose()
    model.train()
    with losses.fusion, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        losses(batch).sum().backward()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 32), (4, 32), (2, 64)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_activations_are_what_torch_s_allocator_held(name, shape, dtype, build, forecast):
    model = build(name).to(dtype)
    inject(model, LoRAConfig(r=4))
    model.train()
    predicted = forecast(name, dtype, batch_size=shape[0], length=shape[1]).activations
    assert predicted == pytest.approx(measured_peak(model, *shape), rel=0.2)


def test_of_a_large_vocabulary_the_logits_are_never_all_there(build):
    model = build("llama", vocab_size=20_000)
    predicted = forecast_memory(
        copy.deepcopy(model).to("meta"), LoRAConfig(r=4), train_config(8, 128), torch.float32
    ).activations
    inject(model, LoRAConfig(r=4))
    assert predicted == pytest.approx(measured_peak(model, 8, 128), rel=0.1)
    assert predicted < 8 * 128 * 20_000 * 4 / 1.5


def test_the_rest_is_counted_by_entries(build, forecast):
    model = build("llama")
    weights = sum(p.numel() for p in model.parameters())
    inject(model, LoRAConfig(r=4))
    trained = sum(p.numel() for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B))
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        found = forecast(dtype=dtype)
        buffers = found.weights - size * weights
        assert 0 <= buffers < 1000  # the rotary frequencies
        assert (found.adapter, found.gradients, found.moments) == (4 * trained, 4 * trained, 8 * trained)
        assert found.total == sum(found.terms.values())
    assert list(found.terms.values()) == sorted(found.terms.values(), reverse=True)


def test_activations_grow_with_the_rows_and_checkpointing_takes_most_of_them_away(build):
    def activations(batch_size, prepare=lambda model: None):
        model = build("llama", num_hidden_layers=12).to("meta")
        shape = train_config(batch_size, 64)
        return forecast_memory(model, LoRAConfig(r=4), shape, torch.float32, prepare=prepare).activations

    one, four = activations(1), activations(4)
    assert four == pytest.approx(4 * one, rel=0.1)  # not exactly: some things are done a few rows at a time
    assert activations(4, lambda model: model.activation_checkpointing_enable()) < 0.4 * four


def test_split_weights_leave_each_device_its_part_and_the_blocks_at_work(build):
    model = build("llama", num_hidden_layers=8).to("meta")
    weights = {
        (split, num): forecast_memory(
            model, LoRAConfig(r=4), TrainConfig(max_length=16, shard_weights=split), torch.float32, num_devices=num
        ).weights
        for split in (False, True)
        for num in (1, 2, 4)
    }
    whole = weights[False, 1]
    assert whole == weights[False, 4] == weights[True, 1] > weights[True, 2] > weights[True, 4]
    assert weights[True, 2] - weights[True, 4] == pytest.approx(whole / 4, abs=2)


def test_tied_weights_count_once_and_the_model_stays_as_it_was(build):
    model = build("llama", tie_word_embeddings=True).to("meta")
    modules = dict(model.named_modules())
    tied = forecast_memory(model, LoRAConfig(r=4), train_config(), torch.float32).weights
    apart = forecast_memory(build("llama").to("meta"), LoRAConfig(r=4), train_config(), torch.float32).weights
    assert apart - tied == 4 * 64 * 32  # one embedding
    assert dict(model.named_modules()) == modules and all(p.is_meta for p in model.parameters())


def test_a_model_far_larger_than_this_machine_takes_no_memory(build):
    with torch.device("meta"):
        model = build("llama", hidden_size=8192, intermediate_size=28672, num_attention_heads=64)
    tracemalloc.start()
    found = forecast_memory(model, LoRAConfig(r=4), TrainConfig(batch_size=64, max_length=4096), torch.bfloat16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.total > 100e9 and peak < 100e6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "lora",
    [LoRAConfig(r=4), LoRAConfig(r=2, layers="3-"), LoRAConfig(r=2, rank_pattern={r"model\.layers\.5\..*": 8}), None],
    ids=["all", "upper layers", "a rank of its own", "full"],
)
def test_a_few_blocks_tell_the_same_to_the_byte_as_all(build, lora, checkpointing, monkeypatch):
    model = build("llama", num_hidden_layers=9).to("meta")

    def prepare(model):
        if checkpointing:
            model.activation_checkpointing_enable()

    def forecast():
        return forecast_memory(model, lora, train_config(2, 24), torch.float32, prepare=prepare)

    few = forecast()
    monkeypatch.setattr("core.memory._alike", lambda model: None)
    assert few == forecast()


def test_full_fine_tuning_counts_every_weight_and_two_moments_in_float32(build):
    model = build("llama").to("meta")
    num = sum(p.numel() for p in model.parameters())
    found = forecast_memory(model, None, train_config(), torch.bfloat16)
    assert (found.gradients, found.moments, found.adapter) == (2 * num, 8 * num, 0)
    assert found.activations > forecast_memory(model, LoRAConfig(r=4), train_config(), torch.bfloat16).activations


def test_dropout_which_draws_its_seed_can_be_forecast(forecast):
    assert forecast(lora=LoRAConfig(r=4, dropout=0.1)).activations > 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_of_a_base_in_few_bits_the_blocks_matrices_are_told_by_hand_and_the_rest_stays_whole(name, bits, build):
    model = build(name).to("meta")
    whole, few = (
        forecast_memory(model, LoRAConfig(r=4), train_config(), torch.bfloat16, base_bits=b) for b in (None, bits)
    )
    matrices = {p: p.shape for path, p in model.named_parameters() if p.dim() == 2 and re.search(r"\.\d+\.", path)}
    rows = 1 if name == "gpt2" else 0  # Conv1D's weight lies the other way round
    scales = [-(-w * h // 64) if bits == 4 else shape[rows] for shape in matrices.values() for w, h in [shape]]
    entries = [w * h for w, h in matrices.values()]
    saved = sum(2 * n - n * bits // 8 - 4 * s for n, s in zip(entries, scales, strict=True))
    assert whole.weights - few.weights == saved > 0
    assert few.activations - whole.activations == 2 * max(entries)  # the one that is widened
    assert (few.adapter, few.gradients, few.moments) == (whole.adapter, whole.gradients, whole.moments)


@pytest.mark.parametrize("bits", [3, 16])
def test_a_base_has_4_or_8_bits_and_is_whole_in_full_fine_tuning(bits, build):
    model = build("llama").to("meta")
    for lora, number in ((LoRAConfig(r=4), bits), (None, 4)):
        with pytest.raises(LoRAError, match="must be 4, 8 or None, and None in full fine-tuning"):
            forecast_memory(model, lora, train_config(), torch.bfloat16, base_bits=number)


@pytest.mark.parametrize("num_devices", [2, 3, 8])
def test_full_fine_tuning_on_split_weights_leaves_each_device_its_part_of_all_that_is_trained(num_devices, build):
    model = build("llama", num_hidden_layers=12).to("meta")
    num = sum(p.numel() for p in model.parameters())
    (block, *_), buffers = model.model.layers, 2 * sum(b.numel() for b in model.buffers())
    block = sum(p.numel() for p in block.parameters())
    train = TrainConfig(batch_size=3, max_length=40, shard_weights=True)
    alone, one = (
        forecast_memory(model, None, train, torch.bfloat16, num_devices=n, moments_dtype=torch.float32)
        for n in (1, num_devices)
    )
    assert (alone.weights, alone.gradients, alone.moments) == (2 * num + buffers, 2 * num, 8 * num)
    assert one.gradients == -(-2 * num // num_devices) and one.moments == -(-8 * num // num_devices)
    asked_for = 2 * (num - 12 * block + 2 * block) + buffers  # outside of the blocks, and two of them
    assert one.weights == min(alone.weights, -(-alone.weights // num_devices) + asked_for)
    assert one.activations == alone.activations and one.adapter == 0


def test_on_a_heap_holes_come_to_what_tensors_hold(build):
    model = build("llama", num_hidden_layers=9).to("meta")
    plain, heap = (
        forecast_memory(model, LoRAConfig(r=4), train_config(4, 64), torch.float32, on_heap=on) for on in (False, True)
    )
    assert plain.holes == 0 and "holes" not in plain.terms
    assert 0 < heap.holes < 0.5 * heap.activations
    assert heap.total - heap.holes == plain.total


def test_of_a_large_vocabulary_in_half_precision_a_small_batch_takes_less_than_the_choice_before_it(build):
    def forecast(dtype, batch_size=1):
        model = build("llama", vocab_size=20_000, num_hidden_layers=3).to("meta")
        return forecast_memory(model, LoRAConfig(r=4), train_config(batch_size, 16), dtype)

    half = forecast(torch.bfloat16)
    copy_in_float32 = 4 * 2 * 20_000 * 32  # embedding and head
    step = half.gradients + half.moments + half.activations
    assert copy_in_float32 < half.choosing + step < 1.3 * copy_in_float32
    assert forecast(torch.float32).choosing == 0 == forecast(torch.bfloat16, batch_size=400).choosing
