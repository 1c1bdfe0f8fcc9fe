"""Taking home: every format is opened again and computes what the adapter computes; planted faults stop it."""

import copy
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from core import Adapter, Finished, LoRAConfig, LoRAError, Noted, inject, lora_layers, merged_copy
from studio import certificate, export, gguf_export, gguf_tokenizer, models, reload
from studio.certificate import Report
from studio.export import Choice, RefusedError
from studio.runs import Run, Runs
from studio.specs import RunSpec
from studio.workspace import Workspace
from tests.studio.ggufs import write_gguf

TARGETS = ("q_proj", "k_proj", "down_proj")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def trained(home, tiny_folder, tiny_data) -> Run:
    """A run on a folder's model, whose adapter moves the logits by a good part of their norm."""
    return a_run(home, RunSpec("Inns", str(tiny_folder), tiny_data, LoRAConfig(r=4, alpha=8, target_modules=TARGETS)))


@pytest.fixture(scope="module")
def packed(home, tmp_path_factory, tiny_data) -> Run:
    """The same, of a base that comes from a GGUF file."""
    base = write_gguf(tmp_path_factory.mktemp("base") / "tiny.gguf")
    return a_run(home, RunSpec("Packed", str(base), tiny_data, LoRAConfig(r=4, alpha=8, target_modules=TARGETS)))


def a_run(workspace: Workspace, spec: RunSpec, std: float = 0.05) -> Run:
    model = models.load_model(spec.model, workspace)
    inject(model, spec.lora)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=std)
    run = Runs(workspace).create(spec)
    run.tell(Finished(1, "done", 0))
    Adapter.from_model(model, base_model=spec.model).save(run.adapter_folder)
    return run


def made(run: Run, home: Workspace, choice: Choice, out: Path) -> Report:
    said = list(export.make(run, home, choice, out))
    assert not list(out.parent.glob(".*")), "what was written on the way is cleared"
    assert any(isinstance(part, Noted) for part in said)
    (report,) = (part for part in said if isinstance(part, Report))
    return report


@pytest.mark.parametrize(
    ("base", "kind", "dtype"),
    [
        ("packed", "gguf", "f16"),  # the others take a process of some seconds each
        pytest.param("trained", "merged", "bfloat16", marks=slow),
        pytest.param("trained", "gguf", "q8_0", marks=slow),
        pytest.param("packed", "merged", "float16", marks=slow),
        pytest.param("trained", "merged", "float32", marks=slow),
        pytest.param("trained", "gguf", "f32", marks=slow),
        pytest.param("trained", "gguf", "bf16", marks=slow),
        pytest.param("packed", "gguf", "f32", marks=slow),
    ],
)
def test_a_merged_model_comes_back_as_the_adapter_made_it(home, tmp_path, request, base, kind, dtype):
    run = request.getfixturevalue(base)
    out = tmp_path / ("out.gguf" if kind == "gguf" else "out")
    report = made(run, home, Choice(kind, dtype), out)
    assert report.problems == ()
    assert report.merges[0].effect > 0.01
    assert report.merges[0].is_restored
    (opened,) = report.reloads
    assert opened.num_tensors == 21 if base == "trained" else 20
    beside = out / "certificate.json" if out.is_dir() else out.with_name("out.certificate.json")
    assert Report.from_dict(json.loads(beside.read_text())) == report


def test_a_merged_folder_is_a_whole_model_for_transformers(home, trained, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_SIZE", "20KB")
    monkeypatch.setattr(export._Making, "_ways_back", lambda self: [])
    made(trained, home, Choice("merged", "float32"), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    texts = [AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", tiny_folder)]
    chat = [{"role": "user", "content": "An inn?"}]
    assert texts[0].apply_chat_template(chat, tokenize=False) == texts[1].apply_chat_template(chat, tokenize=False)
    adapted = models.load_model(trained.spec.model, home)
    Adapter.load(trained.adapter_folder).apply(adapted)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_comes_back_here_and_by_peft(home, trained, tmp_path):
    report = made(trained, home, Choice("adapter"), tmp_path / "out")
    assert report.problems == ()
    assert [part.opened_by for part in report.reloads] == ["LoRA Studio", f"PEFT {reload.peft_version()}"]
    assert report.reloads[0].num_tensors == 2 * len(Adapter.load(trained.adapter_folder).factors)
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("Sound.", "r, alpha, dropout", "PeftModel.from_pretrained", "effective rank"):
        assert words in card
    assert str(home.root) not in card


@slow
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_an_adapter_comes_back_from_gguf(home, packed, tmp_path, dtype):
    report = made(packed, home, Choice("gguf-adapter", dtype), tmp_path / "out.gguf")
    assert report.problems == ()
    assert report.reloads[0].num_tensors == 12


def test_a_gguf_adapter_is_what_llama_cpp_applies(trained, home, tmp_path):
    adapter = Adapter.load(trained.adapter_folder)
    model = models.load_model(trained.spec.model, home)
    gguf_export.write_adapter(tmp_path / "out.gguf", adapter, model.config, "f32", "Inns")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "down_proj": "ffn_down"}
    for path, f in adapter.factors.items():
        name = f"blk.{path.split('.')[2]}.{names[path.rpartition('.')[2]]}.weight"
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        delta = alpha / a.shape[0] * b @ a  # llama-adapter.cpp: alpha / rank, per matrix
        true = (f.scaling * f.B @ f.A).numpy()
        np.testing.assert_allclose(LlamaTensorProcessor(heads).process(delta, name).weights, true, atol=1e-6)


def test_scalings_that_differ_by_matrix_survive_gguf(home, tiny_folder, tiny_data, tmp_path):
    lora = LoRAConfig(
        r=4, alpha=8, target_modules=("q_proj", "up_proj"), scaling="rslora", alpha_pattern={"up_proj": 3.0}
    )
    run = a_run(home, RunSpec("Mixed", str(tiny_folder), tiny_data, lora))
    adapter = Adapter.load(run.adapter_folder)
    config = models.load_model(run.spec.model, home).config
    gguf_export.write_adapter(tmp_path / "out.gguf", adapter, config, "f32", "Mixed")
    back = gguf_export.read_adapter(tmp_path / "out.gguf", config, adapter.factors)
    for path, f in adapter.factors.items():
        torch.testing.assert_close(back[path].scaling * back[path].B, f.scaling * f.B)


def test_what_the_adapter_does_not_change_stays_as_the_base_packs_it(home, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(export._Making, "_ways_back", lambda self: [])
    made(packed, home, Choice("gguf", "f16"), tmp_path / "out.gguf")
    before, after = (gguf.GGUFReader(file) for file in (packed.spec.model, tmp_path / "out.gguf"))
    own = {"general.file_type", "general.quantization_version", "GGUF.kv_count"}
    assert {k: v.contents() for k, v in before.fields.items() if k not in own} == {
        k: v.contents() for k, v in after.fields.items() if k not in own
    }
    old, new = ({t.name: t for t in reader.tensors} for reader in (before, after))
    assert old.keys() == new.keys()
    changed = {name for name in old if any(part in name for part in ("attn_q", "attn_k", "ffn_down"))}
    assert {new[name].tensor_type.name for name in changed} == {"F16"}
    for name in old.keys() - changed:
        assert new[name].tensor_type == old[name].tensor_type
        np.testing.assert_array_equal(new[name].data, old[name].data)


def no_op(model):
    """A merge that does nothing."""
    twin = merged_copy(model)
    base = {f"{path}.weight": layer.weight_matrix() for path, layer in lora_layers(model).items()}
    twin.load_state_dict(base, strict=False, assign=True)
    return twin


def wrong_scaling(model):
    """A merge with twice the alpha."""
    other = copy.deepcopy(model)
    for layer in lora_layers(other).values():
        layer.scaling *= 2
    return merged_copy(other)


def half_merge(model):
    """A merge that leaves every other matrix out."""
    twin = merged_copy(model)
    left_out = list(lora_layers(model).items())[::2]
    twin.load_state_dict({f"{p}.weight": layer.weight_matrix() for p, layer in left_out}, strict=False, assign=True)
    return twin


@pytest.mark.parametrize(
    ("plant", "words"), [(no_op, "did nothing"), (wrong_scaling, "matrices are not"), (half_merge, "matrices are not")]
)
@pytest.mark.parametrize("kind", ["merged", "gguf"])
def test_a_planted_fault_stops_the_export(home, trained, tmp_path, monkeypatch, plant, words, kind):
    monkeypatch.setattr(export, "merged_copy", plant)
    out = tmp_path / ("out.gguf" if kind == "gguf" else "out")
    with pytest.raises(RefusedError, match=f"Nothing was written, as the certificate is red.*{words}") as caught:
        made(trained, home, Choice(kind), out)
    assert not list(tmp_path.iterdir())
    assert "Not sound" in certificate.card(caught.value.report)


def test_an_override_writes_and_says_so(home, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "merged_copy", half_merge)
    monkeypatch.setattr(export._Making, "_ways_back", lambda self: [])
    report = made(trained, home, Choice("merged", force=True), tmp_path / "out")
    assert report.is_forced
    kept = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert kept["problems"] == list(report.problems) != []
    assert "written all the same" in certificate.card(report)


def test_files_that_are_not_what_was_meant_stop_the_export(home, trained, tmp_path, monkeypatch):
    write = export._Making._write

    def write_less(self, adapter, merged):
        meant = write(self, adapter, merged)
        file = self.payload / "model.safetensors"
        tensors = reload.load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1.5
        reload.save_file(tensors, file, {"format": "pt"})
        return meant

    monkeypatch.setattr(export._Making, "_write", write_less)
    with pytest.raises(RefusedError, match=r"1 tensors are not as written: model\.layers\.1\.mlp\.down_proj"):
        made(trained, home, Choice("merged", "float32"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_that_is_broken_off_leaves_nothing_and_can_be_made_again(home, trained, tmp_path, monkeypatch):
    making = export.make(trained, home, Choice("adapter"), tmp_path / "out")
    for said in making:
        if isinstance(said, Noted) and said.message.startswith("Opening it again"):
            break
    assert list(tmp_path.iterdir()) == [tmp_path / ".out.part"]
    with pytest.raises(LoRAError, match="is being written by another process already"):
        next(export.make(trained, home, Choice("adapter"), tmp_path / "out"))
    making.close()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.part" / "made").mkdir(parents=True)  # as a kill leaves it
    monkeypatch.setattr(export._Making, "_ways_back", lambda self: [])
    made(trained, home, Choice("adapter"), tmp_path / "out")


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (("zip", ""), r"`--as` \(='zip'\) must be one of adapter"),
        (("merged", "f16"), r"`--dtype` \(='f16'\) must, for merged, be one of: float32"),
        (("adapter", "f16"), "left out: it keeps its own type"),
    ],
)
def test_an_unknown_choice_is_refused(choice, words):
    with pytest.raises(LoRAError, match=words):
        Choice(*choice)


def test_places_and_runs_that_cannot_be_are_refused(home, trained, tmp_path):
    (tmp_path / "there").mkdir()
    for out, choice, words in (
        (tmp_path / "there", Choice("adapter"), "must not exist"),
        (tmp_path / "file", Choice("gguf"), r"must end with \.gguf"),
    ):
        with pytest.raises(LoRAError, match=words):
            next(export.make(trained, home, choice, out))
    empty = Runs(home).create(RunSpec())
    with pytest.raises(LoRAError, match="has no adapter yet"):
        next(export.make(empty, home, Choice("adapter"), tmp_path / "out"))


def test_an_adapter_that_llama_cpp_cannot_apply_is_refused_with_all_reasons(home, tiny_folder, tiny_data, tmp_path):
    lora = LoRAConfig(r=4, alpha=8, target_modules=("q_proj",), dora=True, modules_to_save=("norm",))
    run = a_run(home, RunSpec("DoRA", str(tiny_folder), tiny_data, lora))
    with pytest.raises(LoRAError, match=r"it has DoRA's magnitudes, parameters trained in full \(model\.norm\.weight"):
        list(export.make(run, home, Choice("gguf-adapter"), tmp_path / "out.gguf"))


def test_an_adapter_beside_a_gguf_file_is_not_applied_to_it(home, packed, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    Adapter.load(packed.adapter_folder).save(tmp_path)
    weight = "model.layers.0.self_attn.q_proj.weight"
    alone, beside = (models.load_model(str(path), home).state_dict() for path in (packed.spec.model, file))
    assert alone.keys() == beside.keys() and torch.equal(alone[weight], beside[weight])


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(numbers):
    pattern = {"Regex": CONTRACTIONS + numbers + TAIL}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    cut = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, byte_level]}


@pytest.mark.parametrize(
    ("steps", "is_whole", "name"),
    [
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, False, "gpt-2"),
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, True, None),
        (split(r"\p{N}{1,3}"), True, "llama-bpe"),
        (split(r"\p{N}{1,3}"), False, "dbrx"),
        (split(r"\p{N}"), False, "qwen2"),
        (split(r"\p{N}"), True, None),
        (split(r"\p{N}{1,2}"), False, None),
        ({"type": "Metaspace"}, False, None),
    ],
)
def test_a_pre_tokenizer_is_known_by_its_pattern_or_refused(steps, is_whole, name):
    values = {"pre_tokenizer": steps, "model": {"ignore_merges": is_whole}}
    if name is not None:
        assert gguf_tokenizer.pre_tokenizer(Path("m"), values) == name
        return
    with pytest.raises(LoRAError, match="must have a tokenizer that llama.cpp knows by name.*has no name here"):
        gguf_tokenizer.pre_tokenizer(Path("m"), values)


def test_a_family_without_a_known_naming_is_refused():
    class Config:
        model_type = "mamba"

    with pytest.raises(LoRAError, match=r"a 'mamba'\) must be of a family that can be written as GGUF here: llama"):
        gguf_export.Naming.of(Config())


@slow
def test_the_starter_comes_home_in_every_format(tmp_path):
    home = Workspace(tmp_path / "home")
    spec = RunSpec("Starter", "starter", lora=LoRAConfig(r=4, alpha=8, target_modules=TARGETS))
    run = a_run(home, spec, std=0.01)
    (run.folder / "imported").touch()  # no rows to read: the neutral prompts are enough here
    for kind, dtype in (("adapter", ""), ("merged", "bfloat16"), ("gguf-adapter", "f16"), ("gguf", "q8_0")):
        out = tmp_path / f"{kind}{'.gguf' if 'gguf' in kind else ''}"
        assert made(run, home, Choice(kind, dtype), out).problems == ()
