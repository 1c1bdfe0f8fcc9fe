"""llama.cpp itself opens what is written for it, and finds the same next tokens as likely as the model here does."""

from pathlib import Path

import pytest
import torch

from core import Adapter, LoRAConfig, inject, lora_layers, merged_copy
from studio import gguf_export, models
from studio.workspace import Workspace

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

    def found():
        with torch.inference_mode():
            return [torch.log_softmax(model(ids).logits[0, -1].double(), -1) for ids in rows]

    def write(name, of, kind):
        gguf_export.write_merged(folder / name, of, lambda path: True, tiny_folder, None, kind, lambda message: None)

    base = found()
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
    return folder, base, found()


def by_llama_cpp(file: Path, lora: Path | None = None) -> list[dict[int, float]]:
    """Returns for each text the log-probabilities of the likeliest next tokens; it cuts the text into tokens itself."""
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
    server = xllamacpp.Server(params)
    found = []
    for text in TEXTS:
        asked = {"prompt": text, "n_predict": 1, "temperature": 0.0, "n_probs": 50, "ignore_eos": False}
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
