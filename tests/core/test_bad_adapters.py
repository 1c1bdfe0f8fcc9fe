"""All that is wrong with an adapter's files comes in one message, and the model that it was for stays as it was."""

import json
import math
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from core import Adapter, AdapterFileError, Factors, Layout, LoRAConfig, inject, lora_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UP_A, UP_B, DOWN_A, DOWN_B = (f"base_model.model.{name}.lora_{half}.weight" for name in ("up", "down") for half in "AB")


@pytest.fixture
def folder(build, perturb, tmp_path):
    """A saved adapter of the plain model: up and down, r = 2."""
    model = build("plain")
    inject(model, LoRAConfig(r=2, target_modules=("up", "down")))
    Adapter.from_model(perturb(model), base_model="plain").save(tmp_path / "adapter")
    return tmp_path / "adapter"


def config(**changes):
    def edit(folder):
        found = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps(found))

    return edit


def weights(change, *, with_notes=False):
    def edit(folder):
        from safetensors import safe_open

        with safe_open(folder / WEIGHTS, framework="pt") as file:
            notes = file.metadata()
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, notes if with_notes else None)

    return edit


def header(text, body=64):
    """A file whose header is this text, and as many bytes after it."""
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(body))


def one(dtype="F32", shape=(4, 4), offsets=(0, 64)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def set_entry(key, value):
    def change(tensors):
        tensors[key].view(-1)[0] = value

    return weights(change)


DAMAGED = "is damaged or no safetensors file"
CASES = {
    "A of another width": (
        weights(lambda t: t.update({UP_A: torch.ones(3, 16)})),
        r"up: A \(3, 16\) and B \(24, 2\) differ in r",
    ),
    "A that is a vector": (weights(lambda t: t.update({UP_A: torch.ones(16)})), "are no matrices or kernels"),
    "A without rows": (weights(lambda t: t.update({UP_A: torch.ones(0, 16)})), "are no matrices or kernels"),
    "a missing key": (weights(lambda t: t.pop(DOWN_A)), "down has lora_B without its partner"),
    "an extra key": (weights(lambda t: t.update(x=torch.ones(2))), r"x \(2,\) is no lora_A or lora_B matrix"),
    "NaN in A": (set_entry(UP_A, math.nan), r"adapter: \S*up.lora_A.weight holds NaN, infinity or whole numbers\.$"),
    "infinity in B": (set_entry(DOWN_B, math.inf), r"adapter: \S*down.lora_B.weight holds NaN, infinity"),
    "minus infinity in B": (set_entry(DOWN_B, -math.inf), r"adapter: \S*down.lora_B.weight holds NaN, infinity"),
    "NaN in a magnitude": (
        weights(lambda t: t.update({"base_model.model.up.lora_magnitude_vector": torch.full((24,), math.nan)})),
        "up.lora_magnitude_vector holds NaN",
    ),
    "a magnitude of another matrix": (
        weights(lambda t: t.update({"base_model.model.up.lora_magnitude_vector": torch.ones(16)})),
        "up: the magnitude, 16 numbers, fits no B",
    ),
    "no header": (lambda f: (f / WEIGHTS).write_bytes(b"\x08"), DAMAGED),
    "a header cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:40]), DAMAGED),
    "numbers cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-4]), DAMAGED),
    "a header of 2^63 bytes": (lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}"), DAMAGED),
    "a header that is no JSON": (header(b"{'a': 1}"), DAMAGED),
    "a header that is a list": (header([1]), DAMAGED),
    "a tensor beyond the end": (header({"a": one(offsets=(0, 10**9))}), DAMAGED),
    "a tensor that ends before it begins": (header({"a": one(offsets=(64, 0))}), DAMAGED),
    "offsets below zero": (header({"a": one(offsets=(-64, 0))}), DAMAGED),
    "a tensor of fewer bytes than its shape": (header({"a": one(shape=(4, 4), offsets=(0, 60))}, 60), DAMAGED),
    "two tensors in one place": (header({"a": one(), "b": one()}), DAMAGED),
    "a hole between tensors": (header({"a": one(), "b": one(offsets=(128, 192))}, 192), DAMAGED),
    "a type that does not exist": (header({"a": one(dtype="F99")}), DAMAGED),
    "a newer format": (
        config(peft_version="9.1", use_bora=True),
        r"of PEFT 9.1\) uses use_bora=True, which cannot be read; save it without",
    ),
    "r = 0": (config(r=0), "down has an r of 2, not 0; up has an r of 2, not 0"),
    "another r": (config(r=4), "down has an r of 2, not 4; up has an r of 2, not 4"),
    "another r for one": (config(rank_pattern={"up": 1}), r"config\.json says: up has an r of 2, not 1\.$"),
    "negative alpha": (
        config(lora_alpha=-1),
        "config: down has a `lora_alpha` of -1.0; up has a `lora_alpha` of -1.0; it must be above 0",
    ),
    "a negative alpha for one": (
        config(alpha_pattern={"up": -2}),
        "config: up has a `lora_alpha` of -2.0; it must be above 0",
    ),
    "alpha = NaN": (config(lora_alpha=math.nan), "up has a `lora_alpha` of nan; it must be above 0"),
}


@pytest.mark.parametrize(("damage", "message"), CASES.values(), ids=CASES)
def test_what_cannot_be_read_is_refused_with_its_reason(folder, damage, message):
    damage(folder)
    with pytest.raises(AdapterFileError, match=message):
        Adapter.load(folder)


@pytest.mark.parametrize("foreign", [True, False])
def test_all_that_is_wrong_in_both_files_comes_in_one_message(folder, foreign):
    """Of a file of PEFT's, and of one of ours, which holds our own settings, too."""
    config(peft_version="9.1", use_bora=True, init_lora_weights="pissa", modules_to_save=[1], r=0, lora_alpha=-3)(
        folder
    )

    def spoil(tensors):
        tensors[UP_A][0, 0] = math.nan
        tensors.pop(DOWN_B)
        tensors["head.bias"] = torch.ones(3)

    weights(spoil, with_notes=not foreign)(folder)
    with pytest.raises(AdapterFileError) as caught:
        Adapter.load(folder)
    for clause in (
        "init_lora_weights='pissa', so its factors are not the update",
        "`modules_to_save` (=[1]) in",
        "(of PEFT 9.1) uses use_bora=True",
        "up.lora_A.weight holds NaN",
        "down has lora_A without its partner",
        "`r` (=0) must be at least 1; `alpha` (=-3.0) must be above 0" if foreign else "up has an r of 2, not 0",
        "" if foreign else "up has a `lora_alpha` of -3.0; it must be above 0",
        "" if foreign else "head.bias (3,) is no lora_A or lora_B matrix, nor named by modules_to_save",
    ):
        assert clause in str(caught.value)


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_stays_as_it_was_with_the_adapter_that_it_had(build, perturb, folder, tokens, logits, merged):
    """Matrices that are missing, of other shapes and of another base, all at once."""
    model = build("plain")
    inject(model, LoRAConfig(r=3, target_modules=("up",)))
    perturb(model)
    if merged:
        lora_layers(model)["up"].merge()
    before, modules = logits(model, tokens), dict(model.named_modules())
    parameters = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    adapter = Adapter.load(folder)
    wide = Factors(torch.ones(2, 5), torch.ones(24, 2), 1.0)
    broken = Adapter(adapter.config, {**adapter.factors, "up": wide, "no.such": wide}, "this/one")
    message = (
        r"made for this/one\) must fit the model: this model is that/one; up is 24 × 16 in the model and 24 × 5 in "
        r"the adapter; no\.such does not exist or cannot be adapted\. Load the base model"
    )
    with pytest.raises(AdapterFileError, match=message):
        broken.apply(model, base_model="that/one")
    assert dict(model.named_modules()) == modules and torch.equal(logits(model, tokens), before)
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()} == parameters


def test_slices_of_other_rows_do_not_fit_though_their_shape_does():
    """GPT-NeoX lays query, key and value out by head: with other heads the same rows are of other matrices."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    def of_heads(heads):
        sizes = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return GPTNeoXForCausalLM(GPTNeoXConfig(num_attention_heads=heads, **sizes, **special))

    source, target = of_heads(4), of_heads(8)
    inject(source, LoRAConfig(r=2, target_modules=("query_key_value.q",)))
    adapter = Adapter.from_model(source)
    with pytest.raises(AdapterFileError, match=r"query_key_value\.q is of other rows in the model than in the adapter"):
        adapter.apply(target)
    assert not lora_layers(target)
    adapter.apply(of_heads(4))


def test_a_projection_and_a_slice_of_it_are_not_applied_together(build):
    model = build("gpt2")
    path = "transformer.h.0.attn.c_attn"
    rows = Layout("slice", rows=torch.arange(32), num_rows=96, transposed=True)
    factors = {
        path: Factors(torch.ones(1, 32), torch.ones(96, 1), 1.0, Layout(transposed=True)),
        f"{path}.q": Factors(torch.ones(1, 32), torch.ones(32, 1), 1.0, rows),
    }
    with pytest.raises(AdapterFileError, match=r"c_attn\.q is adapted and \S*c_attn as well, of which it is a part"):
        Adapter(LoRAConfig(r=1), factors).apply(model)
    assert not lora_layers(model) and type(model.get_submodule(path)).__name__ == "Conv1D"


def test_what_peft_starts_from_orthogonal_factors_is_read(tmp_path):
    import peft

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6))

    wanted = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights="orthogonal")
    theirs, ours, x = peft.get_peft_model(net(), wanted), net(), torch.randn(3, 8)
    with torch.no_grad():
        theirs.base_model.model[0].lora_B["default"].weight += 1
    theirs.save_pretrained(tmp_path)
    Adapter.load(tmp_path).apply(ours)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours(x), net()(x), atol=1e-2)
