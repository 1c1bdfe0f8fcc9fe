"""Activation checkpointing of ours, beside torch's own."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from core import LoRAConfig, TrainConfig, forecast_memory, inject, lora_layers, recomputed


def checkpointed(model, function=recomputed):
    """The model, whose blocks are passed again by a function."""
    model.config.use_cache = False
    model.activation_checkpointing_enable()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = function
    return model


def step(model, ids):
    """(logits, gradients, random state after) of a model in training."""
    torch.manual_seed(1)
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for p in model.parameters():
        p.grad = None
    return logits.detach(), gradients, torch.get_rng_state()


@pytest.mark.parametrize("layers", ["", "1-"], ids=["all", "upper layers"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_gives_what_torch_s_own_does_bit_for_bit_dropout_included(name, layers, build):
    model = checkpointed(build(name), partial(checkpoint, use_reentrant=False))
    inject(model, LoRAConfig(r=4, dropout=0.2, layers=layers))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    model.train()
    ids = torch.arange(24).view(2, 12)
    expected = step(model, ids)
    found = step(checkpointed(model), ids)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
    assert len(found[1]) == 2 * len(lora_layers(model))
    assert all(map(torch.equal, found[1], expected[1]))


class Block(nn.Module):
    """Adds what it is told to what a linear layer gives."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.passed = 0

    def forward(self, hidden, scale=1.0, other=0.0):
        self.passed += 1
        value = other["it"] if isinstance(other, dict) else other
        self.gave = self.linear(hidden).tanh() * scale + value
        return self.gave


def test_the_first_pass_leaves_no_graph_but_one_node_and_the_second_makes_the_gradients():
    block, hidden = Block(), torch.randn(2, 4, 3)
    found = recomputed(partial(Block.forward, block, scale=2.0), hidden)
    reached = {type(node).__name__ for node, _ in found.grad_fn.next_functions if node is not None}
    assert reached == {"AccumulateGrad"} and block.passed == 1
    assert torch.equal(found, block.gave) and found.data_ptr() != block.gave.data_ptr()  # in room taken before the pass
    found.sum().backward()
    assert block.passed == 2
    expected = torch.autograd.grad(block(hidden, 2.0).sum(), block.linear.weight)[0]
    assert torch.equal(block.linear.weight.grad, expected)


@pytest.mark.parametrize("as_", [lambda x: x, lambda x: {"it": x}], ids=["a tensor", "in a dict"])
def test_what_a_block_takes_beside_the_hidden_states_gets_its_gradient_by_torch_s_own(as_):
    block, hidden, other = Block(), torch.randn(2, 4, 3), torch.zeros(3, requires_grad=True)
    recomputed(partial(Block.forward, block, other=as_(other)), hidden).sum().backward()
    assert torch.equal(other.grad, torch.full((3,), 8.0))


def test_a_function_of_which_nothing_is_known_is_left_to_torch_s_own():
    weight, hidden = torch.ones(3, requires_grad=True), torch.ones(2, 3)
    recomputed(lambda x: x * weight, hidden).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))


def test_holes_in_the_heap_do_not_grow_with_the_number_of_blocks(build, monkeypatch):
    monkeypatch.setattr("core.memory._alike", lambda model: None)  # all blocks are passed
    few, many = (
        forecast_memory(
            build("llama", num_hidden_layers=num).to("meta"),
            LoRAConfig(r=4),
            TrainConfig(batch_size=4, max_length=64),
            torch.float32,
            prepare=checkpointed,
            on_heap=True,
        ).holes
        for num in (3, 8)
    )
    assert few <= many < few + 1000
