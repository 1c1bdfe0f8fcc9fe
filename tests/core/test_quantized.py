"""4-bit and 8-bit bases of bitsandbytes, on the CPU: trained beside, merged in bfloat16 with a word, given back."""

import pytest
import torch
from torch import nn

from core import Adapter, LoRAConfig, eject, inject, lora_layers, merge, merged_copy, unmerge

bnb = pytest.importorskip("bitsandbytes", reason="the extra `bitsandbytes` is not installed")
BITS = {4: lambda: bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4"), 8: None}
BITS[8] = lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)

pytestmark = pytest.mark.filterwarnings("ignore:.*(bitsandbytes|MatMul8bitLt|kernels).*")


@pytest.fixture(params=BITS)
def quantized(request):
    torch.manual_seed(0)
    layer = BITS[request.param]()
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    return nn.Sequential(layer.to("cpu")).eval()


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def test_a_quantized_base_is_equal_at_the_start_and_learns_beside(quantized):
    base = quantized(X)
    inject(quantized, LoRAConfig(r=4))
    assert torch.equal(quantized(X), base)
    optimizer = torch.optim.AdamW([p for p in quantized.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = quantized(X).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[3] < losses[0]


@pytest.mark.parametrize("dora", [False, True])
def test_it_merges_in_bfloat16_says_so_and_comes_back_as_the_same_object(quantized, perturb, dora):
    module = quantized[0]
    inject(quantized, LoRAConfig(r=4, dora=dora))
    perturb(quantized)
    apart = quantized(X)
    with pytest.warns(UserWarning, match="is merged in bfloat16, not quantized"):
        merge(quantized)
    (layer,) = lora_layers(quantized).values()
    assert type(layer.base_layer) is nn.Linear and layer.weight.dtype == torch.bfloat16
    # bfloat16's, as `LoRALayer.merge` states it; 8-bit inference also quantizes x, which the merged layer does not.
    bound = 2**-6 if isinstance(module, bnb.nn.Linear4bit) else 0.05
    assert (quantized(X.bfloat16()).float() - apart).norm() <= bound * apart.norm()
    unmerge(quantized)
    assert torch.equal(quantized(X), apart)
    eject(quantized)
    assert quantized[0] is module


def test_its_merged_copy_is_an_ordinary_model_and_its_adapter_an_ordinary_file(quantized, perturb, tmp_path):
    inject(quantized, LoRAConfig(r=4))
    perturb(quantized)
    with pytest.warns(UserWarning, match="merged in bfloat16"):
        twin = merged_copy(quantized)
    assert type(twin[0]) is nn.Linear
    Adapter.from_model(quantized).save(tmp_path)
    plain = nn.Sequential(nn.Linear(64, 32))
    Adapter.load(tmp_path).apply(plain)
    assert torch.equal(lora_layers(plain)["0"].lora_B, lora_layers(quantized)["0"].lora_B)
