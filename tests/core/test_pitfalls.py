"""Where analysis of an update goes wrong without a sound: each with the layer that it comes from."""

import pytest
import torch

from core import (
    Adapter,
    Factors,
    LoRAConfig,
    LoRALinear,
    adaptable,
    alignment,
    amplification,
    basis_of,
    inject,
    intruder_dimensions,
    lora_layers,
    matrix_at,
    random_sigma,
    spectra,
    spectrum,
    weight_svd,
)


def adapted(build, perturb, name, **settings):
    model = build(name)
    before = {path: p.detach().clone().double() for path, p in model.named_parameters()}
    inject(model, LoRAConfig(r=2, alpha=6, **settings))
    return perturb(model), before


def test_in_a_Conv1D_and_in_its_slices_delta_lies_as_the_matrix_that_is_read_from_the_file(build, perturb):
    for target in ("c_attn", "c_attn.q", "c_attn.v"):
        base = build("gpt2")
        model, before = adapted(build, perturb, "gpt2", target_modules=(target,))
        adapter = Adapter.from_model(model)
        for path, f in adapter.factors.items():
            holder, as_matrix = matrix_at(base, path)
            stored = before[f"{holder}.weight"]  # (in, out)
            W = as_matrix(stored)
            columns = {"c_attn": slice(0, 96), "q": slice(0, 32), "v": slice(64, 96)}[path.rpartition(".")[2]]
            assert torch.equal(W, stored[:, columns].T)
            U, _, Vh = torch.linalg.svd((3 * f.B @ f.A).double())
            expected = (U[:, :2].T @ W @ Vh[:2].T).norm().item()
            assert amplification(f, W).projected_norm == pytest.approx(expected, rel=1e-5)
            assert intruder_dimensions(f, weight_svd(W)).U.shape[0] == len(W)


def test_of_an_embedding_A_starts_at_zero_and_delta_maps_tokens_to_vectors(build):
    model = build("llama")
    inject(model, LoRAConfig(r=2, target_modules=("embed_tokens",)))
    (layer,) = lora_layers(model).values()
    assert spectrum(layer.factors).rank == 0
    assert {b: basis_of(layer.factors, b).shape[1] for b in ("A-right", "B-left", "delta-right")} == {
        "A-right": 0,
        "B-left": 2,
        "delta-right": 0,
    }
    with torch.no_grad():
        layer.lora_A.normal_()
    found = spectrum(layer.factors)
    dense = torch.linalg.svdvals(layer.delta_weight().double())
    torch.testing.assert_close(found.sigma, dense[:2], rtol=1e-5, atol=0)
    assert found.U.shape[0] == 32 and found.V.shape[0] == 64  # what it writes: a vector; what it reads: a token
    assert amplification(layer.factors, layer.weight_matrix()).r == 2


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_of_a_start_from_W_s_own_directions_only_what_training_changed_is_seen(build, init):
    model = build("llama")
    inject(model, LoRAConfig(r=2, target_modules=("q_proj",), init=init))
    untrained = Adapter.from_model(model).factors
    assert all(f.r == 4 and s.rank == 0 for f, s in zip(untrained.values(), spectra(untrained).values(), strict=True))
    layers = lora_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B += 0.01 * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(0))
    for path, f in Adapter.from_model(model).factors.items():
        assert spectrum(f).rank == 2  # A has not moved, so the change of B has as many directions as A
        dense = layers[path].delta_weight().double()
        torch.testing.assert_close(spectrum(f).sigma[:2], torch.linalg.svdvals(dense)[:2], rtol=1e-3, atol=0)


def test_an_update_of_zero_has_no_figure_that_could_be_taken_for_one():
    zero = Factors(torch.randn(4, 30, generator=torch.Generator().manual_seed(0)), torch.zeros(20, 4), 2.0)
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    found = spectrum(zero)
    assert (found.rank, found.effective_rank, found.participation_ratio) == (0, 0, 0)
    assert amplification(zero, W) is None and random_sigma(zero).abs().max() == 0
    assert alignment(zero, weight_svd(W)).cosines.shape[0] == 0
    assert intruder_dimensions(zero, weight_svd(W)).count == 0


def test_keys_and_values_of_grouped_queries_have_fewer_rows_than_queries(build, perturb):
    model, _ = adapted(build, perturb, "llama", target_modules=("q_proj", "k_proj"))
    shapes = {f.shape for f in Adapter.from_model(model).factors.values()}
    assert shapes == {(32, 32), (16, 32)}
    assert {len(s.U) for s in spectra(Adapter.from_model(model).factors).values()} == {32, 16}
    assert all(adaptable(build("llama"))[path] == f.shape for path, f in Adapter.from_model(model).factors.items())


def test_adam_with_no_epsilon_does_not_see_how_scale_is_shared_between_alpha_A_and_B():
    """alpha / (p·q), p·A and p·η_A, q·η_B train the same model (Schulman et al. 2025, LoRA Without Regret)."""

    def train(p, q, steps=200):
        torch.manual_seed(0)
        base = torch.nn.Linear(12, 8, bias=False, dtype=torch.float64)
        layer = LoRALinear(base, 3, 2.0 / (p * q))
        x, y = torch.randn(64, 12, dtype=torch.float64), torch.randn(64, 8, dtype=torch.float64)
        A = torch.randn(3, 12, dtype=torch.float64)
        layer.lora_A = torch.nn.Parameter(p * A)
        layer.lora_B = torch.nn.Parameter(torch.zeros(8, 3, dtype=torch.float64))
        groups = [{"params": [layer.lora_A], "lr": p * 1e-2}, {"params": [layer.lora_B], "lr": q * 1e-2}]
        optimizer = torch.optim.Adam(groups, eps=0.0)
        losses = []
        for step in range(steps):
            optimizer.zero_grad()
            loss = (layer(x) - y).square().mean()
            loss.backward()
            if step == 0:
                layer.lora_A.grad = None  # it is 0, as B is, and 0 / 0 would follow
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses, dtype=torch.float64)

    plain = train(1.0, 1.0)
    assert plain[-1] < 0.9 * plain[0]
    torch.testing.assert_close(train(3.0, 0.25), plain, rtol=1e-10, atol=0)
