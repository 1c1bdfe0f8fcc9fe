"""loralib's files: tensors are read, code is not run, and what a file does not say is asked for."""

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from core import Adapter, AdapterFileError, spectrum

REAL = Path(__file__).parents[3] / "shared" / "data" / "adapters" / "roberta_base_lora_mnli.bin"


def tensors(r=2, out=6, width=5):
    generator = torch.Generator().manual_seed(0)
    return {
        "encoder.0.query.lora_A": torch.randn(r, width, generator=generator),
        "encoder.0.query.lora_B": torch.randn(out, r, generator=generator),
        "classifier.weight": torch.randn(3, out, generator=generator),
    }


@pytest.mark.parametrize("ending", [".bin", ".pt", ".safetensors"])
def test_a_file_of_loralib_s_is_read_with_the_scaling_that_is_said(tmp_path, ending):
    path, made = tmp_path / f"lora{ending}", tensors()
    if ending == ".safetensors":
        save_file(made, path)
    else:
        torch.save(made, path)
    adapter = Adapter.load(path, scaling=2.0)
    (name, factors), *_ = adapter.factors.items()
    assert name == "encoder.0.query" and factors.scaling == 2.0
    assert torch.equal(factors.A, made["encoder.0.query.lora_A"])
    assert (adapter.config.r, adapter.config.alpha) == (2, 4.0)
    assert torch.equal(adapter.trained_in_full["classifier.weight"], made["classifier.weight"])
    adapter.save(tmp_path / "folder")
    again = Adapter.load(tmp_path / "folder")
    assert torch.equal(again.factors[name].B, factors.B) and again.factors[name].scaling == 2.0
    assert torch.equal(again.trained_in_full["classifier.weight"], made["classifier.weight"])


class Hostile:
    """Makes a folder where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_that_would_run_code_is_not_opened(tmp_path, protocol):
    path, mark = tmp_path / "lora.bin", tmp_path / "was_here"
    torch.save({**tensors(), "x": Hostile(mark)}, path, pickle_protocol=protocol)
    with pytest.raises(AdapterFileError, match="is damaged, or holds more than data and is not opened .* safetensors"):
        Adapter.load(path, scaling=2.0)
    path.write_bytes(pickle.dumps(Hostile(mark), protocol=protocol))
    with pytest.raises(AdapterFileError, match="holds more than data"):
        Adapter.load(path, scaling=2.0)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists(), "the file would have"


@pytest.mark.parametrize(
    ("change", "scaling", "message"),
    [
        (lambda t: t, None, r"`scaling` \(=None\) must be given for lora.bin: .* r is 2 here"),
        (lambda t: t, 0.0, r"`scaling` \(=0.0\) must be above 0"),
        (lambda t: t, float("nan"), r"`scaling` \(=nan\) must be above 0"),
        (lambda t: {k: v for k, v in t.items() if "lora" not in k}, 1.0, "it holds no lora_A and lora_B"),
        (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, 1.0, "query has lora_A without its partner"),
        (lambda t: t | {"encoder.0.query.lora_B": torch.ones(6, 3)}, 1.0, "differ in r"),
        (lambda t: t | {"encoder.0.query.lora_B": torch.full((6, 2), torch.inf)}, 1.0, "lora_B holds NaN, infinity"),
        (lambda t: [1, 2], 1.0, "must hold a table of tensors"),
        (lambda t: {"model": t}, 1.0, "must hold a table of tensors"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, change, scaling, message):
    torch.save(change(tensors()), tmp_path / "lora.bin")
    with pytest.raises(AdapterFileError, match=message):
        Adapter.load(tmp_path / "lora.bin", scaling=scaling)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00", b"junk" * 100])
def test_a_damaged_file_says_so(tmp_path, content):
    (tmp_path / "lora.bin").write_bytes(content)
    with pytest.raises(AdapterFileError, match="cannot be read as tensors alone: it is damaged"):
        Adapter.load(tmp_path / "lora.bin", scaling=2.0)


def test_the_authors_adapter_of_roberta_for_mnli_fits_the_model_and_is_nearly_of_rank_one_in_its_last_query():
    if not REAL.exists():
        pytest.skip(f"{REAL.name} is not here: it is not part of the project")
    from transformers import RobertaConfig, RobertaForSequenceClassification

    adapter = Adapter.load(REAL, scaling=2.0)
    assert len(adapter.factors) == 24 and sum(f.A.numel() + f.B.numel() for f in adapter.factors.values()) == 294_912
    assert set(adapter.trained_in_full) == {
        f"classifier.{name}.{kind}" for name in ("dense", "out_proj") for kind in ("weight", "bias")
    }
    config = RobertaConfig(vocab_size=99, max_position_embeddings=16, num_labels=3, num_hidden_layers=12)
    model = RobertaForSequenceClassification(config).eval()
    adapter.apply(model)
    assert torch.equal(model.classifier.out_proj.weight, adapter.trained_in_full["classifier.out_proj.weight"])
    last = spectrum(adapter.factors["roberta.encoder.layer.11.attention.self.query"])
    assert last.energy(1) > 0.95


# The forms that only loralib has, computed as its own code does: MergedLinear's grouped product, ConvLoRA's view.


def merged_linear(A, B, r, enabled, num_features):
    """ΔW of loralib's `MergedLinear`: a grouped 1 × 1 convolution of A by B, laid into the thirds that are adapted."""
    parts = sum(enabled)
    delta = F.conv1d(A.unsqueeze(0), B.unsqueeze(-1), groups=parts).squeeze(0)
    rows = torch.zeros(len(enabled), num_features // len(enabled), dtype=torch.bool)
    rows[torch.tensor(enabled)] = True
    whole = torch.zeros(num_features, A.shape[1])
    whole[rows.view(-1)] = delta
    return whole


@pytest.mark.parametrize("parts", [("q", "v"), ("q", "k", "v"), ("v",), ("k", "v")], ids="".join)
def test_a_fused_projection_of_loralib_s_becomes_the_slices_that_are_named(build, tokens, logits, tmp_path, parts):
    r, generator = 2, torch.Generator().manual_seed(0)
    table, dense = {}, build("gpt2")
    for layer in range(2):
        path = f"transformer.h.{layer}.attn.c_attn"
        A = torch.randn(r * len(parts), 32, generator=generator)
        B = 0.1 * torch.randn(32 * len(parts), r, generator=generator)
        table |= {f"{path}.lora_A": A, f"{path}.lora_B": B}
        with torch.no_grad():
            enabled = [name in parts for name in "qkv"]
            dense.get_submodule(path).weight += 2.0 * merged_linear(A, B, r, enabled, 96).T
    torch.save(table, tmp_path / "lora.bin")
    adapter = Adapter.load(tmp_path / "lora.bin", scaling=2.0, parts=parts)
    assert {path.rpartition(".")[2] for path in adapter.factors} == set(parts) and adapter.config.r == r
    model = build("gpt2")
    adapter.apply(model)
    torch.testing.assert_close(logits(model, tokens), logits(dense, tokens), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model, tokens), logits(build("gpt2"), tokens), atol=1e-2)
    adapter.save(tmp_path / "folder")
    again = build("gpt2")
    Adapter.load(tmp_path / "folder").apply(again)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("parts", [None, ("q",), ("q", "k", "v")])
def test_which_slices_a_fused_projection_has_is_asked_for(tmp_path, parts):
    shapes = {"lora_A": (4, 6), "lora_B": (12, 2)}
    table = {f"h.{i}.c_attn.{half}": torch.ones(shape) for i in range(3) for half, shape in shapes.items()}
    torch.save(table, tmp_path / "lora.bin")
    message = r"h\.0-2\.c_attn has 2 slices of a fused projection that the file does not name; `parts` \(=.*\) must, in"
    with pytest.raises(AdapterFileError, match=message):
        Adapter.load(tmp_path / "lora.bin", scaling=2.0, parts=parts)


@pytest.mark.parametrize(("groups", "kernel"), [(1, 3), (1, 1), (1, 2), (3, 3)])
def test_a_convolution_of_loralib_s_is_laid_out_anew_for_the_model_s(tmp_path, groups, kernel):
    """loralib has B·A, (out / groups · k, in · k), in the order of the weight's own numbers."""
    torch.manual_seed(0)
    r, x = 2, torch.randn(2, 6, 7, 7)
    base = nn.Conv2d(6, 9, kernel, groups=groups)
    A, B = torch.randn(r * kernel, 6 * kernel), torch.randn(9 // groups * kernel, r * kernel)
    dense = copy.deepcopy(base)
    with torch.no_grad():
        dense.weight += 0.5 * (B @ A).view(base.weight.shape)
    torch.save({"0.lora_A": A, "0.lora_B": B}, tmp_path / "lora.bin")
    model = nn.Sequential(copy.deepcopy(base))
    Adapter.load(tmp_path / "lora.bin", scaling=0.5).apply(model)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-4)
    Adapter.from_model(model).save(tmp_path / "folder")
    again = nn.Sequential(copy.deepcopy(base))
    Adapter.load(tmp_path / "folder").apply(again)
    torch.testing.assert_close(again(x), dense(x), rtol=1e-4, atol=1e-4)


def test_a_convolution_of_loralib_s_that_fits_no_kernel_here_is_refused(tmp_path):
    torch.save({"0.lora_A": torch.ones(2, 6), "0.lora_B": torch.ones(9, 2)}, tmp_path / "lora.bin")
    model = nn.Sequential(nn.Conv2d(6, 9, 3))
    with pytest.raises(AdapterFileError, match="0 is 9 × 54 in the model and 9 × 6 in the adapter"):
        Adapter.load(tmp_path / "lora.bin", scaling=2.0).apply(model)
