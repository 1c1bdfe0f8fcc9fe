"""Every family's tensors come back from GGUF as they were; what llama.cpp would compute otherwise is refused."""

import json

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from core import Adapter, LoRAConfig, LoRAError, inject, lora_layers, merged_copy
from studio import export, gguf_export, gguf_tokenizer, models
from studio.export import Choice
from studio.gguf_families import FAMILIES, Naming
from studio.specs import RunSpec
from studio.workspace import Workspace
from tests.studio import gguf_models
from tests.studio.test_export import a_run, made

slow = pytest.mark.slow
BRIEF = ("llama3", "gpt2", "gemma2", "phi3-long", "gpt_neox")
"""One for each way in which tensors may lie; the others are tried with the slow tests."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("name", [n if n in BRIEF else pytest.param(n, marks=slow) for n in gguf_models.MODELS])
def test_every_parameter_comes_back_as_it_was_meant(name, home, tmp_path):
    folder = str(gguf_models.make(name, tmp_path / "model"))
    model = models.load_model(folder, home)
    tokenizer = models.load_tokenizer(folder, home)
    gguf_export.check_merged(models.skeleton(folder, home), tokenizer, None)
    inject(model, LoRAConfig(r=2, alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.fill_(0.1)
    merged = merged_copy(model)
    digests = gguf_export.write_merged(tmp_path / "m.gguf", merged, lambda path: True, tokenizer, None, "f32")
    back = models.load_model(folder, home)
    gguf_export.read_merged(tmp_path / "m.gguf", back)
    parameters = dict(back.named_parameters())
    assert {name: gguf_export.digest(p) for name, p in parameters.items()} == digests
    for path, wanted in merged.named_parameters():
        torch.testing.assert_close(parameters[path], wanted, rtol=0, atol=1e-6)
    adapter = Adapter.from_model(model)
    gguf_export.write_adapter(tmp_path / "a.gguf", adapter, model.config, "f32", "Inns")
    held = gguf_export.read_adapter(tmp_path / "a.gguf", model.config, adapter.factors)
    for path, f in adapter.factors.items():
        torch.testing.assert_close(held[path].delta_weight(), f.delta_weight())


@slow
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gemma3", "phi3", "starcoder2", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model_where_it_knows_the_family(name, home, tmp_path):
    folder = gguf_models.make(name, tmp_path / "model")
    model = models.load_model(str(folder), home)
    tokenizer = models.load_tokenizer(str(folder), home)
    (tmp_path / "alone").mkdir()
    gguf_export.write_merged(tmp_path / "alone" / "m.gguf", model, lambda path: True, tokenizer, None, "f32")
    read = models.load_model(str(tmp_path / "alone" / "m.gguf"), home)
    if (
        "query_pre_attn_scalar" in gguf_models.MODELS[name][2]
    ):  # a head does not say it; transformers has the large one's
        settings = {**read.config.to_dict(), "query_pre_attn_scalar": 32}
        other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
        other.load_state_dict(read.state_dict())
        read = other
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@slow
@pytest.mark.parametrize(("name", "kind"), [("gpt2", "gguf"), ("gpt2", "gguf-adapter"), ("gemma2", "gguf")])
def test_an_export_is_opened_again_and_sound(name, kind, home, tiny_data, tmp_path):
    folder = gguf_models.make(name, tmp_path / "model")
    targets = ("c_attn.q", "c_attn.v", "c_proj") if name == "gpt2" else "all-linear"
    run = a_run(home, RunSpec(name, str(folder), tiny_data, LoRAConfig(r=4, alpha=8, target_modules=targets)))
    report = made(run, home, Choice(kind, "f16"), tmp_path / "out.gguf")
    assert report.problems == ()
    assert report.reloads[0].num_tensors > 10


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "the activation is 'gelu', not silu"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn', not default or lin"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True, not False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, not False"),
        (
            "gpt2",
            {"scale_attn_weights": False, "activation_function": "relu"},
            "is 'relu', .*; scale_attn_weights is F",
        ),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings is False, not True"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar is 144, not 256"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping .* is False, not True"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 26}, "layer_types is .*, not .*sliding_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm is True, not False"),
        ("starcoder2", {"use_bias": False}, "use_bias is False, not True"),
        ("granite", {"mlp_bias": True}, "mlp_bias is True, not False"),
        ("smollm3", {"no_rope_layers": [1] * 36}, "no_rope_layers is .*, not"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias is False, not True"),
    ],
)
def test_settings_that_llama_cpp_does_not_compute_with_are_refused(family, settings, words):
    Naming.of(AutoConfig.for_model(family))
    with pytest.raises(LoRAError, match=f"must be computed by llama.cpp as transformers computes it.*{words}"):
        Naming.of(AutoConfig.for_model(family, **settings))


def test_the_depth_of_the_largest_gemma_tells_how_queries_are_scaled():
    sizes = {"num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128}
    Naming.of(AutoConfig.for_model("gemma2", **sizes, query_pre_attn_scalar=144))
    with pytest.raises(LoRAError, match="query_pre_attn_scalar is 128, not 144"):
        Naming.of(AutoConfig.for_model("gemma2", **sizes, query_pre_attn_scalar=128))


def test_positions_are_no_matrix_that_llama_cpp_adapts(home, tmp_path):
    folder = gguf_models.make("gpt2", tmp_path / "model")
    model = models.load_model(str(folder), home)
    inject(model, LoRAConfig(r=2, target_modules=("wte", "wpe", "c_fc")))
    with pytest.raises(
        LoRAError, match=r"wte, which shares its weight, transformer\.wpe, whose rows are added as they"
    ):
        gguf_export.refuse(Adapter.from_model(model), Naming.of(model.config))


def test_what_cannot_be_written_is_refused_before_the_model_is_loaded(
    home, tiny_folder, tiny_data, tmp_path, monkeypatch
):
    run = a_run(home, RunSpec("Inns", str(tiny_folder), tiny_data, LoRAConfig(r=2, target_modules=("q_proj",))))
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the work began"))
    monkeypatch.delitem(FAMILIES, "llama")
    for kind in ("gguf", "gguf-adapter"):
        with pytest.raises(LoRAError, match="must be of a family that can be written as GGUF here"):
            next(export.make(run, home, Choice(kind), tmp_path / "out.gguf"))
    export.check(run, home, Choice("merged"))


def test_a_file_with_other_tensors_is_no_copy_of_the_model(home, tmp_path):
    folder = str(gguf_models.make("olmo2", tmp_path / "model"))
    model = models.load_model(folder, home)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "olmo2")
    writer.add_tensor("blk.0.nonsense.weight", torch.zeros(2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LoRAError, match=r"missing: model\.embed_tokens\.weight, .*, unknown: blk\.0\.nonsense\.weight"):
        gguf_export.read_merged(tmp_path / "m.gguf", model)


def test_tokenizers_that_llama_cpp_would_run_otherwise_are_refused():
    writer = gguf.GGUFWriter(None, "llama")
    pieces = gguf_models.of_pieces()
    raw = json.loads(pieces.backend_tokenizer.to_str())
    merges = raw["model"]["merges"]

    def refused(words: str, tokenizer=pieces, num_rows: int = 1000, **changes) -> None:
        values = {**raw, "model": {**raw["model"], **changes.pop("model", {})}, **changes}
        tokenizer = type("Loaded", (), {"is_fast": True, "unk_token": "<unk>", **tokenizer_of(values)})()
        with pytest.raises(LoRAError, match=f"must have a tokenizer that llama.cpp knows by name.*{words}"):
            gguf_tokenizer.add_tokenizer(writer, tokenizer, "tiny", num_rows)

    def tokenizer_of(values):
        return {"backend_tokenizer": type("Raw", (), {"to_str": staticmethod(lambda: json.dumps(values))})}

    refused("its model is 'Unigram', not BPE", model={"type": "Unigram"})
    refused("it has 3.. tokens where the model has rows for 10", num_rows=10)
    refused("is not made of all its parts", model={"merges": merges[1:]})
    twice = next(n for n in range(len(merges) - 1) if "".join(merges[n]) == "".join(merges[n + 1]))
    apart = [*merges[: twice + 1], *merges[twice + 2 :], merges[twice + 1]]
    refused("merges of .* have others between them", model={"merges": apart})
    refused("how it changes and cuts text", normalizer={"type": "Lowercase"})
    with pytest.raises(LoRAError, match="it has no tokenizer.json"):
        gguf_tokenizer.add_tokenizer(writer, object(), "tiny", 1000)
