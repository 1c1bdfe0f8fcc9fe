"""llama.cpp itself opens what is written for it, and finds the same next tokens as likely as the model here does."""

import json
import urllib.request
from pathlib import Path

import pytest
import torch

from core import Adapter, LoRAConfig, inject, lora_layers, merged_copy
from studio import gguf_export, models
from studio.workspace import Workspace
from tests.studio import gguf_models

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")

TEXTS = ("Inn 3 has 4 stars.", "name[Inn 12], stars[1] and 2024 more\n\n  Inns don't", "Ünïcode 日本 ok")
TOLERANCES = {"f32": 1e-5, "f16": 0.05, "bf16": 0.3, "q8_0": 0.5}  # in nats, of the fifty likeliest


@pytest.fixture(scope="module")
def written(tiny_folder, tmp_path_factory):
    """A folder with a base, an adapter for it and their merger as GGUF; and log-probabilities of base and adapted."""
    workspace, folder = Workspace(tmp_path_factory.mktemp("home")), tmp_path_factory.mktemp("gguf")
    model = models.load_model(str(tiny_folder), workspace)
    tokenizer = models.load_tokenizer(str(tiny_folder), workspace)
    rows = [torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in TEXTS]

    def write(name, of, kind):
        gguf_export.write_merged(folder / name, of, lambda path: True, tokenizer, None, kind)

    base = found_by(model, rows)
    write("base.gguf", model, "f32")
    targets = ("q_proj", "k_proj", "v_proj", "down_proj")
    inject(model, LoRAConfig(r=4, alpha=8, target_modules=targets, scaling="rslora", alpha_pattern={"k_proj": 3.0}))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.1)
    gguf_export.write_adapter(folder / "lora.gguf", Adapter.from_model(model), model.config, "f32", "Inns")
    for kind in TOLERANCES:
        write(f"merged-{kind}.gguf", merged_copy(model), kind)
    return folder, base, found_by(model, rows)


def serve(file: Path, lora: Path | None = None):
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 256, 1, 1
    params.warmup, params.verbosity = False, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(lora), 1.0
        params.lora_adapters = [adapter]
    return xllamacpp.Server(params)


def by_llama_cpp(file: Path, lora: Path | None = None) -> list[dict[int, float]]:
    """Returns for each text the log-probabilities of the likeliest next tokens; it cuts the text into tokens itself."""
    server = serve(file, lora)
    found = []
    for text in TEXTS:
        # A next token is told only if it has a text of its own; the likelihoods that are told know nothing of the bias.
        asked = {"prompt": text, "n_predict": 1, "temperature": 0.0, "n_probs": 50, "logit_bias": [["e", 1000.0]]}
        said = server.handle_completions(asked)
        (token,) = said["choices"][0]["logprobs"]["content"]
        found.append({top["id"]: top["logprob"] for top in token["top_logprobs"]})
    return found


def assert_same(found: list[dict[int, float]], wanted: list[torch.Tensor], tolerance: float) -> None:
    assert [len(tops) for tops in found] == [50] * len(TEXTS)
    for tops, true in zip(found, wanted, strict=True):
        assert max(abs(logprob - float(true[token])) for token, logprob in tops.items()) < tolerance


def test_a_model_of_a_folder_and_its_tokenizer_mean_the_same_there(written):
    folder, base, _ = written
    assert_same(by_llama_cpp(folder / "base.gguf"), base, TOLERANCES["f32"])


def test_an_adapter_with_scalings_of_several_kinds_is_applied_there(written):
    folder, _, adapted = written
    assert_same(by_llama_cpp(folder / "base.gguf", folder / "lora.gguf"), adapted, TOLERANCES["f32"])


@pytest.mark.parametrize("kind", TOLERANCES)
def test_a_merged_model_computes_the_same_there(written, kind):
    folder, _, adapted = written
    assert_same(by_llama_cpp(folder / f"merged-{kind}.gguf"), adapted, TOLERANCES[kind])


SLICES = {
    "gpt2": ("c_attn.q", "c_attn.v"),
    "phi3": ("qkv_proj.k", "gate_up_proj.up"),
    "gpt_neox": ("query_key_value.v",),
}
EXACT = {"llama3", "linear", "qwen2", "qwen3", "phi3", "phi3-long", "stablelm", "olmo2", "granite", "smollm3"}


@pytest.mark.parametrize(
    "name", [n if n in ("gpt2", "gemma2") else pytest.param(n, marks=pytest.mark.slow) for n in gguf_models.MODELS]
)
def test_a_model_of_every_family_and_adapters_for_it_mean_the_same_there(name, tmp_path):
    folder, home = gguf_models.make(name, tmp_path / "model"), Workspace(tmp_path / "home")
    tokenizer = models.load_tokenizer(str(folder), home)
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    # Its GELU is a table of float16.
    tolerance = TOLERANCES["f32"] if name.partition("-")[0] in EXACT else 5e-3
    base, lora, merged = (tmp_path / f"{name}.gguf" for name in ("base", "lora", "merged"))
    model = models.load_model(str(folder), home)
    gguf_export.write_merged(base, model, lambda path: True, tokenizer, None, "f32")
    assert_same(by_llama_cpp(base), found_by(model, rows), tolerance)
    for targets in ("all-linear", *([SLICES[name]] if name in SLICES else [])):
        model = models.load_model(str(folder), home)
        inject(model, LoRAConfig(r=4, alpha=8, target_modules=targets))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            for layer in lora_layers(model).values():
                layer.lora_B.normal_(std=0.1)
        gguf_export.write_adapter(lora, Adapter.from_model(model), model.config, "f32", "Inns")
        assert_same(by_llama_cpp(base, lora), found_by(model, rows), tolerance)
    gguf_export.write_merged(merged, merged_copy(model), lambda path: True, tokenizer, None, "f32")
    assert_same(by_llama_cpp(merged), found_by(model, rows), tolerance)


@pytest.mark.parametrize("name", ["gemma", "phi3", "gpt2", "qwen2"])
def test_texts_are_cut_there_as_they_are_here(name, tmp_path):
    folder, home = gguf_models.make(name, tmp_path / "model"), Workspace(tmp_path / "home")
    tokenizer = models.load_tokenizer(str(folder), home)
    model = models.load_model(str(folder), home)
    gguf_export.write_merged(tmp_path / "base.gguf", model, lambda path: True, tokenizer, None, "f32")
    server = serve(tmp_path / "base.gguf")
    texts = [
        f"{a}{b}Inn {n}{b}has{a}{n} stars."
        for n, a in enumerate(("", " ", "\n", "é日", "'S 12,345", "\t\t"))
        for b in " \u2003x"
    ]
    for text in [*TEXTS, *texts]:
        asked = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", asked, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["tokens"] == tokenizer(text)["input_ids"], text


def found_by(model, rows) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [torch.log_softmax(model(ids).logits[0, -1].double(), -1) for ids in rows]
