"""A certificate passes what merging may do, and nothing else: planted faults of each kind are found."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from core import LoRAConfig, LoRAError, certify, inject, lora_layers, merge, merged_copy

TARGETS = {
    "llama": ("q_proj", "down_proj"),
    "gpt2": ("c_attn.q", "c_attn.v", "c_proj"),
    "mixtral": ("experts.down_proj",),
}


@pytest.fixture
def adapted(build: Callable[..., nn.Module], perturb: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def make(name: str = "llama", dtype: torch.dtype = torch.float32, **settings: object) -> nn.Module:
        model = build(name).to(dtype)
        inject(model, LoRAConfig(r=4, alpha=8, target_modules=TARGETS[name], **settings))
        return perturb(model).eval()

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TARGETS)
def test_an_honest_merge_has_no_problems(adapted, tokens: Tensor, name: str, dtype: torch.dtype) -> None:
    found = certify(adapted(name, dtype), tokens)
    assert found.problems == ()
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert (found.num_rows, found.num_tokens) == (3, 27)
    assert found.is_restored
    assert found.effect > 0.01
    assert found.merged_effect == pytest.approx(found.effect, rel=0.1)
    assert 0 <= found.mean_kl < 1e-2


@pytest.mark.parametrize("settings", [{"dora": True}, {"init": "pissa"}, {"bias": "all"}])
def test_other_kinds_of_adapters_merge_honestly_too(adapted, tokens: Tensor, settings: dict[str, object]) -> None:
    assert certify(adapted(**settings), tokens).problems == ()


def test_a_merge_that_did_nothing_is_found(adapted, build, tokens: Tensor) -> None:
    found = certify(adapted(), tokens, merged=build("llama"))
    assert found.merged_effect == 0.0
    assert any("did nothing" in problem for problem in found.problems)
    assert found.is_restored is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_scaling_is_found_even_where_it_drowns_in_the_logits(adapted, tokens: Tensor, dtype) -> None:
    model = adapted(dtype=dtype)
    other = copy.deepcopy(model)
    for layer in lora_layers(other).values():
        layer.scaling *= 1.25
    found = certify(model, tokens, merged=merged_copy(other))
    assert set(found.wrong_matrices) == set(lora_layers(model))
    assert any("are not W₀ + ΔW" in problem for problem in found.problems)


def test_a_half_merge_names_the_matrices_that_were_left_out(adapted, build, tokens: Tensor) -> None:
    model = adapted()
    half = merged_copy(model)
    left_out = "model.layers.1.mlp.down_proj"
    half.get_submodule(left_out).weight = build("llama").get_submodule(left_out).weight
    found = certify(model, tokens, merged=half)
    assert found.wrong_matrices == (left_out,)
    assert any("1 of 4 matrices" in problem and left_out in problem for problem in found.problems)


def test_logits_beyond_the_bound_are_found(adapted, tokens: Tensor) -> None:
    model = adapted()
    off = merged_copy(model)
    off.lm_head.weight = nn.Parameter(off.lm_head.weight * 1.01)  # not a matrix of the adapter's
    found = certify(model, tokens, merged=off)
    assert not found.wrong_matrices
    assert found.logit_error == pytest.approx(0.01, rel=0.01)
    assert any("differ by" in problem for problem in found.problems)


def test_an_untrained_adapter_is_said_to_change_nothing(build, tokens: Tensor) -> None:
    model = build("llama")
    inject(model, LoRAConfig(target_modules=("q_proj",)))
    assert any("changes nothing" in problem for problem in certify(model, tokens).problems)


def test_figures_are_those_of_the_dense_logits(adapted, tokens: Tensor, logits) -> None:
    model = adapted()
    twin = merged_copy(model)
    twin.lm_head.weight = nn.Parameter(twin.lm_head.weight + 0.1 * torch.randn_like(twin.lm_head.weight))
    found = certify(model, tokens, merged=twin)
    assert found.top1_agreement < 1
    mine, theirs = (torch.cat([logits(m, row[None])[0] for row in tokens]).double() for m in (model, twin))
    p, q = mine.log_softmax(-1), theirs.log_softmax(-1)
    assert found.max_logit_difference == pytest.approx(float((mine - theirs).abs().max()), rel=1e-5)
    assert found.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=1e-9)
    assert found.top1_agreement == pytest.approx(float((mine.argmax(-1) == theirs.argmax(-1)).double().mean()))


def test_it_asks_for_an_unmerged_model_and_for_rows(adapted, build, tokens: Tensor) -> None:
    model = adapted()
    with pytest.raises(LoRAError, match="`rows` must hold at least one row"):
        certify(model, [])
    merge(model)
    with pytest.raises(LoRAError, match="`model` must be adapted and unmerged"):
        certify(model, tokens)
    with pytest.raises(LoRAError, match="`model` must be adapted and unmerged"):
        certify(build("llama"), tokens)
