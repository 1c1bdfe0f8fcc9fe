"""Models of transformers made ready to train: rows go through them without padding, and the losses stay the same."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core import LoRAConfig, inject
from core.losses import Losses, Way
from studio.models import load_model, prepare_to_train
from studio.workspace import Workspace
from tests.core.families import FAMILIES, decoder

WINDOW = {"sliding_window": 4}
MODELS = {
    **{
        name: FAMILIES[name].make for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "opt")
    },
    **{name: FAMILIES[name].make for name in ("gpt2", "bloom", "falcon", "mixtral")},
    "a window": decoder("Mistral", **WINDOW),
    "a window as long as the longest row": decoder("Mistral", sliding_window=12),
    "a window that a row is longer than": decoder("Mistral", sliding_window=11),
    "capped logits": decoder("Gemma2", head_dim=8, query_pre_attn_scalar=8),
}
PACKS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "opt", "gpt2"}
PACKS |= {"a window as long as the longest row", "a window that a row is longer than"}


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (4, 12), generator=generator)
    ids[1, :5] = ids[0, :5]
    mask = torch.ones_like(ids)
    for row, length in enumerate((12, 9, 3, 10)):
        mask[row, length:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def prepared():
    """prepared(name): the model ready to train and adapted, and one of the same weights that is only adapted."""

    def make(name, **settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = MODELS[name]().eval()
            for path, p in model.named_parameters():
                nn.init.normal_(p, mean=float(p.dim() == 1 and "norm" in path), std=0.2)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        twin = copy.deepcopy(model)
        prepare_to_train(model)
        for each in (model, twin):
            inject(each, LoRAConfig(**{"r": 2} | settings))
            with torch.no_grad():
                for i, (path, p) in enumerate(each.named_parameters()):
                    if "lora_B" in path:
                        p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        return model, twin

    return make


def by_the_book(model, b):
    logits = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits.float()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten(), reduction="none")
    return losses[b["labels"][:, 1:].flatten() != -100]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_made_ready_has_the_losses_and_gradients_that_it_had(prepared, name):
    model, twin = prepared(name)
    losses = Losses(model)
    losses.choose()
    assert losses.way.packs == (name in PACKS)
    with losses.fusion:
        found = losses(batch())
        found.sum().backward()
    assert losses.way.packs == (name in PACKS - {"a window that a row is longer than"})
    expected = by_the_book(twin, batch())
    expected.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradients = {path: p.grad for path, p in twin.named_parameters() if p.requires_grad}
    for path, p in model.named_parameters():
        if p.requires_grad:
            assert (p.grad - gradients[path]).norm() <= 1e-4 * gradients[path].norm() + 1e-6, path


def test_rows_that_are_packed_pass_without_padding_and_repetition(prepared):
    model, _ = prepared("llama")
    losses = Losses(model)
    losses.choose()
    assert losses.way == Way(True, True)
    shapes = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    b = batch()
    losses(b)
    rows = [row[mask.bool()].tolist() for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
    beginnings = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
    assert len(beginnings) < sum(map(len, rows)) < b["input_ids"].numel()
    assert shapes == [(1, len(beginnings), 32)]


def test_a_model_made_ready_generates_what_it_did(prepared):
    model, twin = prepared("llama")
    ids = batch()["input_ids"][:1]
    model.config.use_cache = True
    found, expected = (m.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (model, twin))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("activation_checkpointing", [True, False])
def test_activation_checkpointing_changes_no_gradient(activation_checkpointing):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS["llama"]()
        prepare_to_train(model, activation_checkpointing=activation_checkpointing)
        inject(model, LoRAConfig(r=2))
    losses = Losses(model)
    losses.choose()
    calls = []
    model.train()
    layer = model.model.layers[1]
    layer.input_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))
    with losses.fusion:
        found = losses(batch())
        found.sum().backward()
    assert len(calls) == (2 if activation_checkpointing else 1)
    by = {path: p.grad.clone() for path, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.eval()
    by_the_book(model, batch()).sum().backward()
    for path, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(by[path], p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_starter_model_packs_in_half_precision_too(tmp_path):
    model = load_model("starter", Workspace(tmp_path), device=torch.device("cpu"), dtype=torch.bfloat16)
    prepare_to_train(model)
    inject(model, LoRAConfig(r=2))
    losses = Losses(model)
    losses.choose()
    assert losses.way == Way(True, True)
    assert len(model.model.layers) == 30 and model.dtype == torch.bfloat16
