"""Tiny models with random weights, shared by the tests of `core`; nothing is read from disk."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 64


class Plain(nn.Module):
    """A causal model that follows none of transformers' conventions: it returns logits and names no head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.up = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)
        self.down = nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embed(input_ids)
        return self.head(h + self.down(self.norm(self.up(h)).relu()))


def _llama(**changes: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    values = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "initializer_range": 0.2} | sizes | changes
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **values))


def _gpt2(**changes: object) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    values = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "embd_pdrop": 0.0} | sizes | changes
    return GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, **values))


def _mixtral(**changes: object) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    # Every token goes to all experts: which ones it goes to is a jump, that a rounding can make.
    experts = {"num_local_experts": 3, "num_experts_per_tok": 3, "experts_implementation": "eager"}
    values = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "initializer_range": 0.2} | sizes | experts | changes
    return MixtralForCausalLM(MixtralConfig(max_position_embeddings=64, **values))


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """build(name, seed=0, **changes to the model's config): the same weights for the same arguments, in eval mode."""

    def make(name: str, seed: int = 0, **changes: object) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kinds = {"llama": _llama, "gpt2": _gpt2, "mixtral": _mixtral, "plain": Plain}
            return kinds[name](**changes).eval()

    return make


@pytest.fixture
def perturb() -> Callable[..., nn.Module]:
    """perturb(model, seed=0): gives every B random entries, so that ΔW is not zero; also on a model of PEFT's."""

    def fill(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        return model

    return fill


@pytest.fixture
def tokens() -> Tensor:
    """Token ids, (3, 9)."""
    return torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logits() -> Callable[..., Tensor]:
    """logits(model, tokens): what the model gives, whether bare or in an output object."""

    @torch.no_grad()
    def run(model: nn.Module, ids: Tensor) -> Tensor:
        output = model(input_ids=ids)
        return getattr(output, "logits", output)

    return run


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """make_batch(prompts, length=10, seed=0): one row a prompt, whose first tokens are not trained.

    Rows end in a padding of 0, 1, 2 … tokens, so that rows differ in their number of tokens.
    """

    def make(prompts: tuple[int, ...], length: int = 10, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, VOCABULARY, (len(prompts), length), generator=generator)
        mask, labels = torch.ones_like(ids), ids.clone()
        for row, prompt in enumerate(prompts):
            labels[row, :prompt] = -100
            mask[row, length - row % 3 :] = 0
        labels[mask == 0] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return make
