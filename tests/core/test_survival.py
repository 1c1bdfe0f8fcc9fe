"""What is done to models in practice does not change what an adapted one computes."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from core import LoRAConfig, inject, lora_layers, merge, unmerge

TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj", "embed_tokens"),
    "gpt2": ("c_attn.q", "c_attn.v", "c_proj", "wte"),
    "mixtral": ("q_proj", "gate_up_proj", "down_proj.1"),
}
SETTINGS = {"plain": {}, "dora": {"dora": True}, "pissa": {"init": "pissa"}}


CASES = [(name, what) for name in TARGETS for what in SETTINGS if (name, what) != ("mixtral", "dora")]


@pytest.fixture(params=CASES, ids=lambda p: "-".join(p))
def adapted(request, build, perturb):
    name, what = request.param
    model = build(name)
    inject(model, LoRAConfig(r=2, target_modules=TARGETS[name], **SETTINGS[what]))
    return perturb(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model, tokens):
    model.zero_grad()
    model(input_ids=tokens).logits.float().square().mean().backward()
    return gradients(model)


def test_copies_pickles_and_states_compute_the_same(adapted, build, tokens, logits):
    expected = logits(adapted, tokens)
    assert torch.equal(logits(copy.deepcopy(adapted), tokens), expected)
    other = pickle.loads(pickle.dumps(adapted))
    assert torch.equal(logits(other, tokens), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(logits(other, tokens), expected)
    merge(other)
    unmerge(other)
    assert torch.equal(logits(other, tokens), expected)


def test_activation_checkpointing_gives_the_same_gradients(adapted, tokens):
    plain = backward(adapted, tokens)
    adapted.train()  # transformers checkpoints in training only
    adapted.activation_checkpointing_enable({"use_reentrant": False})
    again = backward(adapted, tokens)
    assert plain.keys() == again.keys() and all("lora" in name or "magnitude" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


def test_checkpointing_one_layer_by_hand_gives_the_same_gradients():
    from core import LoRALinear

    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(6, 5), 2, 0.5)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).square().sum().backward()
    expected, layer.lora_A.grad = layer.lora_A.grad, None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.lora_A.grad, expected)


def test_autocast_agrees_up_to_its_precision_and_keeps_float32_gradients(adapted, tokens, logits):
    expected = logits(adapted, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(adapted, tokens).float()
        grads = backward(adapted, tokens)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    assert {g.dtype for g in grads.values()} == {torch.float32}


# Raised by torch itself, where inductor first looks at the processor's own kernels.
INDUCTOR = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@INDUCTOR
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("adapted", [("llama", "pissa"), ("gpt2", "dora")], indirect=True, ids="-".join)
def test_a_compiled_model_computes_the_same_and_has_the_same_gradients(adapted, tokens, logits, backend):
    """Every compiler starts from the graph of "aot_eager"; "inductor" makes machine code of it, which takes minutes."""
    expected, grads = logits(adapted, tokens), backward(adapted, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(adapted, backend=backend)
    torch.testing.assert_close(compiled(input_ids=tokens).logits.detach(), expected, rtol=1e-5, atol=1e-5)
    found = backward(compiled, tokens)
    assert len(found) == len(grads)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, grads[name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.slow
@INDUCTOR
def test_a_model_that_inductor_compiled_is_merged_and_unmerged_and_computes_the_same(build, perturb, tokens, logits):
    model = build("llama")
    inject(model, LoRAConfig(r=2, target_modules=TARGETS["llama"]))
    expected = logits(perturb(model), tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    for change in (lambda _: None, merge, unmerge):
        change(model)
        torch.testing.assert_close(logits(compiled, tokens), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_another_process_gets_the_same_model(build, perturb, tokens, logits, tmp_path):
    adapted = build("gpt2")
    inject(adapted, LoRAConfig(r=2, target_modules=TARGETS["gpt2"], dora=True, init="pissa"))
    perturb(adapted)
    torch.save({"model": adapted, "tokens": tokens}, tmp_path / "model.pt")
    code = (
        "import torch, sys; torch.set_num_threads(1); d = torch.load(sys.argv[1], weights_only=False);"
        "torch.save(d['model'](input_ids=d['tokens']).logits.detach(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt", tmp_path / "out.pt"], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits(adapted, tokens), rtol=1e-6, atol=1e-6)
    assert lora_layers(adapted)
