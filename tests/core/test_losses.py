"""The loss of the trained tokens: the plain one, and the ways that leave out what is not needed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core import LoRAConfig, Segments, causal_attention, inject, token_losses
from core.losses import Losses, Way, _segments
from tests.core.families import FAMILIES

DECODERS = ["gpt2", "llama", "gemma", "phi3", "gpt_neox", "opt", "bloom", "falcon"]


class Packing(nn.Module):
    """A decoder of its own kind, whose attention takes rows one after the other."""

    def __init__(self, scale=1.0, caps=False, sees_all=False):
        super().__init__()
        self.embed, self.places = nn.Embedding(64, 16), nn.Embedding(32, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, 64)
        self.scale, self.caps, self.sees_all = scale, caps, sees_all
        self.shapes = []

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, position_ids=None, segments: Segments | None = None):
        self.shapes.append(tuple(input_ids.shape))
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        x = self.embed(input_ids) + self.places(position_ids)
        q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        o = causal_attention(q, k, v, 0.3, None if self.sees_all else segments)
        logits = self.head(x + self.out(o.transpose(1, 2).flatten(2))) * self.scale
        return torch.tanh(logits) if self.caps else logits


@pytest.fixture
def adapted(perturb):
    def make(model=None, **settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = (model or Packing)() if not isinstance(model, nn.Module) else model
            for name, p in model.named_parameters():
                nn.init.normal_(p, mean=float(p.dim() == 1 and "norm" in name), std=0.2)
        inject(model, LoRAConfig(**{"r": 2} | settings))
        return perturb(model.eval())

    return make


def by_the_book(model, batch):
    """The cross-entropy of every trained token: all logits, shifted by one, the ignored ones dropped."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = getattr(output, "logits", output).float()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    return losses[batch["labels"][:, 1:].flatten() != -100]


def same(model, batch, found):
    expected = by_the_book(model, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    mine = torch.autograd.grad(found.sum(), trained, allow_unused=True)
    theirs = torch.autograd.grad(expected.sum(), trained, allow_unused=True)
    for a, b in zip(mine, theirs, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", [Way(), Way(skips_head=True), Way(packs=True), Way(True, True)])
def test_every_way_has_the_plain_losses_and_gradients(adapted, make_batch, way):
    model, batch = adapted(), make_batch((2, 5, 1, 9), length=12)
    same(model, batch, token_losses(model, batch, way))


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_has_the_plain_losses_by_the_way_that_it_allows(adapted, make_batch, name):
    model = adapted(FAMILIES[name].make())
    losses = Losses(model)
    losses.choose()
    assert losses.way == Way(skips_head=True)  # nobody told it how to pack
    with losses.fusion:
        found = losses(make_batch((2, 1, 4)))
    same(model, make_batch((2, 1, 4)), found)


def test_rows_are_packed_without_their_padding(adapted, make_batch):
    model, batch = adapted(), make_batch((2, 1, 4))
    losses = Losses(model)
    losses.choose()
    assert losses.way == Way(True, True)
    model.shapes.clear()
    same(model, batch, losses(batch))
    assert model.shapes == [(1, int(batch["attention_mask"].sum())), (3, 10)]


def test_rows_without_padding_stay_as_they_are(adapted, make_batch):
    model, batch = adapted(), make_batch((2,))
    model.shapes.clear()
    token_losses(model, batch, Way(True, True))
    assert model.shapes == [(1, 10)]


def test_rows_pass_what_they_have_in_common_once(adapted, make_batch):
    model, batch = adapted(), make_batch((2, 1, 4, 0))
    batch["input_ids"][1:3, :4] = batch["input_ids"][0, :4]
    batch["labels"] = batch["labels"].where(batch["labels"] == -100, batch["input_ids"])
    model.shapes.clear()
    same(model, batch, token_losses(model, batch, Way(True, True)))
    assert model.shapes[0] == (1, int(batch["attention_mask"].sum()) - 8)


def test_rows_that_differ_in_more_than_their_tokens_share_nothing():
    ids = torch.ones(2, 5, dtype=torch.int64)
    assert _segments({"input_ids": ids, "attention_mask": ids}, torch.tensor([5, 4])).num_tokens == 5
    assert _segments({"input_ids": ids, "token_type_ids": ids}, torch.tensor([5, 4])).num_tokens == 9
    assert _segments({"input_ids": ids, "token_type_ids": ids}, torch.tensor([5, 5])) is None


def test_padding_that_all_rows_have_is_left_out_too(adapted, make_batch):
    model = adapted()
    batch = make_batch((2, 1, 4))
    wide = {key: F.pad(value, (0, 3), value=-100 if key == "labels" else 0) for key, value in batch.items()}
    model.shapes.clear()
    found = token_losses(model, wide, Way(True, True))
    assert model.shapes == [(1, int(batch["attention_mask"].sum()))]
    torch.testing.assert_close(found, token_losses(model, batch, Way(True, True)))


def test_padding_at_the_left_is_not_packed(adapted, make_batch):
    model, batch = adapted(), {key: value.flip(1) for key, value in make_batch((2, 1, 4)).items()}
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.shapes.clear()
    token_losses(model, batch, Way(True, True))
    assert model.shapes == [(3, 10)]


@pytest.mark.parametrize(
    ("how", "way"),
    [
        ({"scale": 0.5}, Way(packs=True)),
        ({"caps": True}, Way(packs=True)),
        ({"sees_all": True}, Way(skips_head=True)),
        ({"sees_all": True, "caps": True}, Way()),
    ],
)
def test_a_model_that_does_more_is_not_cut_short(adapted, make_batch, how, way):
    model, batch = adapted(Packing(**how)), make_batch((2, 1, 4))
    losses = Losses(model)
    losses.choose()
    assert losses.way == way
    same(model, batch, losses(batch))


@pytest.mark.parametrize("settings", [{"modules_to_save": ("head",)}, {"target_modules": ("head", "qkv")}])
def test_a_head_that_learns_gets_its_gradient(adapted, make_batch, settings):
    model, batch = adapted(**settings), make_batch((2, 1, 4))
    losses = Losses(model)
    losses.choose()
    assert losses.way == Way(packs=True)
    same(model, batch, losses(batch))


def test_an_adapted_head_is_not_skipped_though_at_the_start_its_update_is_zero():
    model = Packing().eval()
    inject(model, LoRAConfig(r=2, target_modules=("head",)))
    losses = Losses(model)
    losses.choose()
    assert losses.way == Way(packs=True)


def test_the_head_s_own_code_is_back_afterwards(adapted, make_batch):
    model = adapted()
    before = dict(vars(model.head))
    token_losses(model, make_batch((2, 1)), Way(True, True))
    assert vars(model.head) == before
    with pytest.raises(IndexError):
        token_losses(model, make_batch((2, 1), length=40), Way(True, True))
    assert vars(model.head) == before


def test_an_encoder_and_decoder_takes_the_plain_way():
    model = FAMILIES["t5"].make()
    inject(model, LoRAConfig(r=2))
    losses = Losses(model)
    losses.choose()
    assert losses.way == Way()


def test_the_trial_changes_nothing(adapted, make_batch):
    model, batch = adapted(), make_batch((2, 1))
    twin, state = copy.deepcopy(model), torch.get_rng_state()
    Losses(model).choose()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert torch.equal(by_the_book(model, batch), by_the_book(twin, batch))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_every_way_gives_the_losses_of_the_cpu(adapted, make_batch, dtype):
    model, batch = adapted(), make_batch((2, 5, 1, 9), length=12)
    expected = by_the_book(model, batch)
    model = model.to("cuda", dtype)
    for way in (Way(), Way(skips_head=True), Way(packs=True), Way(True, True)):
        found = token_losses(model, batch, way).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-3 if dtype == torch.float32 else 0.1, atol=1e-2)


# The frozen layers that a row passes once.


@pytest.fixture
def upper(perturb):
    """upper(name of a family, layers): its model, adapted in these layers alone, ready to be trained."""

    def make(name, layers="1", changes=None, **settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = changes() if changes else FAMILIES[name].make()
            for path, p in model.named_parameters():
                nn.init.normal_(p, mean=float(p.dim() == 1 and "norm" in path), std=0.2)
        inject(model, LoRAConfig(**{"r": 2, "layers": layers} | settings))
        return perturb(model.eval())

    return make


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt_neox", "mistral"])
def test_rows_pass_the_frozen_layers_once(upper, make_batch, name, where):
    model, batch = upper(name), make_batch((2, 1, 4))
    losses = Losses(model, where)
    losses.choose()
    assert losses.prefix is not None
    assert losses.prefix.num_layers == 1
    passed = []
    frozen, adapted = losses.prefix._blocks
    frozen.register_forward_pre_hook(lambda *_: passed.append("frozen"))
    adapted.register_forward_pre_hook(lambda *_: passed.append("adapted"))
    mlp = next(m for n, m in frozen.named_modules() if n.endswith("mlp"))
    mlp.register_forward_pre_hook(lambda *_: passed.append("mlp"))
    for num_new in (3, 0):
        passed.clear()
        found = losses(batch)
        assert passed.count("mlp") == num_new
        same(model, batch, found)
    known = losses.prefix.num_bytes
    losses(make_batch((2, 1, 4)))
    assert losses.prefix.num_bytes == known
    losses.close()


def test_what_is_kept_of_a_row_does_not_depend_on_its_company(upper, make_batch):
    batch = make_batch((2, 1, 4))
    alone, together = Losses(upper("llama"), "memory"), Losses(upper("llama"), "memory")
    for losses in (alone, together):
        losses.choose()
    for i in (2, 0, 1):
        alone({key: value[i : i + 1] for key, value in batch.items()})
    assert torch.equal(alone(batch), together(batch))


@pytest.mark.parametrize("why", ["all layers", "embedding", "dropout", "off"])
def test_where_nothing_can_be_kept_every_batch_goes_through_all(upper, make_batch, why):
    if why == "all layers":
        losses = Losses(upper("llama", layers=""), "memory")
    elif why == "embedding":
        losses = Losses(upper("llama", modules_to_save=("embed_tokens",)), "memory")
    elif why == "dropout":
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        losses = Losses(upper("gpt2", changes=lambda: GPT2LMHeadModel(GPT2Config(**sizes))), "memory")
    else:
        losses = Losses(upper("llama"))
    losses.choose()
    assert losses.prefix is None
    same(losses.model, make_batch((2, 1, 4)), losses(make_batch((2, 1, 4))))
