"""Directions in words: cosines with a model's own tokens, where that makes sense, and why not where it does not."""

import pytest
import torch

from core import Factors, Layout, spectrum
from studio import models, words
from studio.tabs.spectrum import reading


@pytest.fixture(scope="module")
def tiny(tiny_folder, tmp_path_factory):
    from studio.workspace import Workspace

    workspace = Workspace(tmp_path_factory.mktemp("words"))
    name = str(tiny_folder)
    return name, workspace, models.skeleton(name, workspace), models.load_model(name, workspace)


def test_cosines_are_those_of_the_embeddings_in_double_precision(tiny):
    name, workspace, tree, model = tiny
    X = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    E = model.get_input_embeddings().weight.detach().double()
    expected = torch.nn.functional.normalize(E, dim=1) @ torch.nn.functional.normalize(X.double(), dim=0)
    found = words.vocabulary(tree, name, workspace, "reads")
    torch.testing.assert_close(found.cosines(X).double(), expected, rtol=0, atol=1e-6)
    random = torch.nn.functional.normalize(torch.randn(32, 400, dtype=torch.float64), dim=0)
    usual = (torch.nn.functional.normalize(E, dim=1) @ random).max(0).values.median()
    assert found.chance() == pytest.approx(float(usual), rel=0.2)


def test_what_is_written_passes_the_model_s_own_norm_and_unembedding(tiny):
    name, workspace, tree, model = tiny
    U = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(1)))[0]
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(U.T))
        logits = logits - logits.mean(1, keepdim=True)
    W = model.lm_head.weight.detach()
    found = words.vocabulary(tree, name, workspace, "writes")
    cosines = found.cosines(words.through_final_norm(tree, name, workspace, U))
    lengths = (W - W.mean(0)).norm(dim=1)
    scale = (cosines[:, 0] * lengths) @ logits[0] / logits[0].square().sum()
    torch.testing.assert_close((cosines[:, 0] * lengths) / scale, logits[0], rtol=1e-3, atol=1e-4)


def test_an_update_that_writes_one_token_says_that_token_first(tiny):
    name, workspace, tree, model = tiny
    W = model.lm_head.weight.detach()
    wanted = 42
    u = ((W[wanted] - W.mean(0)) / model.model.norm.weight.detach())[:, None]
    found = spectrum(Factors(torch.ones(1, 48), u, 1.0))
    moved = words.through_final_norm(tree, name, workspace, found.U)
    cosines = words.vocabulary(tree, name, workspace, "writes").cosines(moved)[:, 0]
    assert int(cosines.abs().argmax()) == wanted and float(cosines.abs().max()) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("path", "shape", "form", "side", "reason"),
    [
        ("model.layers.0.self_attn.q_proj", (32, 32), "linear", "reads", ""),
        ("model.layers.0.self_attn.q_proj", (32, 32), "linear", "writes", "not the residual stream"),
        ("model.layers.0.self_attn.o_proj", (32, 32), "linear", "reads", "not the residual stream"),
        ("model.layers.0.mlp.down_proj", (32, 48), "linear", "writes", ""),
        ("model.layers.0.mlp.down_proj", (32, 48), "linear", "reads", "reads 48 numbers of its heads or inner"),
        ("h.0.attn.c_attn.v", (32, 32), "slice", "reads", ""),
        ("model.layers.0.mlp.experts.gate_proj.3", (48, 32), "expert", "reads", ""),
        ("model.layers.0.up_proj", (48, 40), "linear", "reads", "reads 40 numbers, and the model's embeddings have 32"),
        ("model.layers.0.strange", (32, 32), "linear", "reads", "not known by its name whether it reads"),
        ("model.embed_tokens", (32, 300), "embedding", "writes", "no linear layer"),
    ],
)
def test_directions_without_words_say_why(tiny, path, shape, form, side, reason):
    f = Factors(torch.ones(1, shape[1]), torch.ones(shape[0], 1), 1.0, Layout(form))
    found = words.reason_against(tiny[2], path, f, side)
    assert reason in found and bool(reason) == bool(found)


class Tokens:
    """A tokenizer of tokens that are hard to see."""

    texts = (" a", "\n\t", "<b>", "\u202ex", "�", "")
    all_special_ids, all_special_tokens, added_tokens_decoder = [5], ["<|end|>"], {}

    def decode(self, ids, **_):
        return self.texts[ids[0]]

    def convert_ids_to_tokens(self, token_id):
        return "Ġé"[token_id % 2 :]


def test_tokens_can_be_seen_and_are_text():
    found = [words.shown(Tokens(), i) for i in range(6)]
    assert found == [
        ("␣a", ""),
        ("⏎⇥", ""),
        ("<b>", ""),
        ("\\u202ex", ""),
        ("Ġé", "bytes"),
        ("<|end|>", "special"),
    ]
    html = reading.drawn([("<b>", "", 0.3), ("x", "special", -0.1)], 0.2)
    assert "<b>" not in html.replace('<b style="left', "") and "&lt;b&gt;" in html
    assert html.count("faint") == 1, "what chance alone would give is drawn fainter"
    assert "+0.30" in html and "−0.10" in html
