"""What is trained, in one buffer: AdamW on it is AdamW on each parameter."""

import copy

import pytest
import torch
from torch import nn

from core.flat import Flat

SHAPES = [(3, 5), (7,), (2, 4, 3), (1,)]


@pytest.fixture
def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def optimizer_of(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.2, fused=True)


def backward(parameters, step):
    for place, p in enumerate(parameters):
        (p.sin() * (step + place + 1)).sum().backward()


def test_values_stay_and_every_parameter_is_a_view_of_one_buffer(parameters):
    before = [p.detach().clone() for p in parameters]
    flat = Flat(parameters)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert {p.untyped_storage().data_ptr() for p in parameters} == {flat.values.untyped_storage().data_ptr()}
    assert {p.grad.untyped_storage().data_ptr() for p in parameters} == {flat.values.grad.untyped_storage().data_ptr()}
    assert all(p.data_ptr() % 64 == flat.values.data_ptr() % 64 for p in parameters)


def test_steps_are_those_of_each_parameter_alone(parameters):
    alone = copy.deepcopy(parameters)
    flat = Flat(parameters)
    one, each = optimizer_of([flat.values]), optimizer_of(alone)
    for step in range(4):
        backward(parameters, step)
        backward(alone, step)
        one.step()
        each.step()
        one.zero_grad(set_to_none=False)
        each.zero_grad()
        assert not any(p.grad.any() for p in parameters)
    torch.testing.assert_close(parameters, alone, rtol=1e-6, atol=1e-7)
    moments = flat.moments(one)
    for p, twin in zip(parameters, alone, strict=True):
        assert moments[p].keys() == each.state[twin].keys()
        torch.testing.assert_close(moments[p], dict(each.state[twin]), rtol=1e-6, atol=1e-7)


def test_moments_put_back_go_on_bit_for_bit(parameters):
    flat = Flat(parameters)
    one = optimizer_of([flat.values])
    assert flat.moments(one) == {}
    backward(parameters, 0)
    one.step()
    one.zero_grad(set_to_none=False)
    kept = {p: {key: value.clone() for key, value in of.items()} for p, of in flat.moments(one).items()}
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    other_flat = Flat(twins)
    other = optimizer_of([other_flat.values])
    other_flat.set_moments(other, {twin: kept[p] for p, twin in zip(parameters, twins, strict=True)})
    for which, optimizer in ((parameters, one), (twins, other)):
        backward(which, 1)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, twins, strict=True))


def test_afterwards_there_are_values_and_no_gradients(parameters):
    flat = Flat(parameters)
    backward(parameters, 0)
    flat.release()
    assert all(p.grad is None for p in parameters)
    backward(parameters, 0)
    assert all(p.grad is not None for p in parameters)
