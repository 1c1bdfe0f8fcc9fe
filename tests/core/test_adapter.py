import dataclasses
import json
import math

import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from core import (
    Adapter,
    AdapterFileError,
    Factors,
    LoRAConfig,
    eject,
    inject,
    injection_of,
    lora_layers,
    merge,
    plan,
)

# Raised by PEFT's own use of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Model, our settings, PEFT's settings for the same.
FORMS = {
    "query and value": ("llama", {"r": 4, "target_modules": ("q_proj", "v_proj")}),
    "one name": ("llama", {"r": 2, "alpha": 3, "target_modules": ("self_attn.o_proj",)}),
    "one expression": ("llama", {"r": 4, "target_modules": r".*layers\.1\..*_proj"}),
    "all linear": ("llama", {"r": 4, "dropout": 0.1}),
    "rslora": ("llama", {"r": 4, "alpha": 6, "scaling": "rslora", "target_modules": ("q_proj", "v_proj")}),
    "gaussian": ("llama", {"r": 4, "init": "gaussian", "target_modules": ("up_proj",)}),
    "rank_pattern": (
        "llama",
        {"r": 4, "target_modules": ("q_proj", "v_proj"), "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 7}},
    ),
    "alpha_pattern": (
        "llama",
        {"r": 4, "target_modules": ("q_proj", "v_proj"), "alpha_pattern": {r"layers\.1\..*": 5, "q_proj": 2.5}},
    ),
    "all patterns and rslora": (
        "llama",
        {
            "r": 3,
            "alpha": 5,
            "scaling": "rslora",
            "rank_pattern": {"q_proj": 7, "down_proj": 2},
            "alpha_pattern": {"q_proj": 3, r"layers\.0\.mlp\..*": 9},
        },
    ),
    "DoRA": ("llama", {"r": 4, "target_modules": ("q_proj", "up_proj"), "dora": True}),
    "DoRA and rslora": (
        "llama",
        {"r": 4, "alpha": 6, "dora": True, "scaling": "rslora", "rank_pattern": {"q_proj": 2}},
    ),
    "Conv1D, DoRA": ("gpt2", {"r": 4, "target_modules": ("c_attn", "mlp.c_proj"), "dora": True}),
    "embedding": ("llama", {"r": 4, "target_modules": ("embed_tokens", "q_proj"), "rank_pattern": {"q_proj": 2}}),
    "embedding, DoRA": ("gpt2", {"r": 4, "target_modules": ("wpe", "c_attn"), "dora": True}),
    "modules_to_save": ("llama", {"r": 2, "target_modules": ("q_proj",), "modules_to_save": ("lm_head", "norm")}),
    "exceptions": (
        "llama",
        {"r": 4, "target_modules": ("q_proj", "v_proj"), "exclude_modules": r".*layers\.0\..*v_.*"},
    ),
    "one layer": ("llama", {"r": 4, "target_modules": ("q_proj", "v_proj"), "layers": "1"}),
    "biases of the adapted": ("gpt2", {"r": 4, "target_modules": ("c_attn",), "bias": "lora_only"}),
    "all biases": ("gpt2", {"r": 4, "target_modules": ("c_attn",), "bias": "all"}),
    "Conv1D, one name": ("gpt2", {"r": 4, "target_modules": ("c_attn",)}),
    "Conv1D, all linear": ("gpt2", {"r": 4, "rank_pattern": {"attn.c_proj": 2}, "alpha_pattern": {"c_fc": 3}}),
}
in_every_form = pytest.mark.parametrize(("name", "values"), FORMS.values(), ids=FORMS)


def peft_config(name, values):
    values = dict(values)
    renamed = {"lora_alpha": values.pop("alpha", 16.0), "lora_dropout": values.pop("dropout", 0.0)}
    renamed["use_rslora"] = values.pop("scaling", "standard") == "rslora"
    renamed["init_lora_weights"] = values.pop("init", "kaiming") == "kaiming" or "gaussian"
    targets = values.pop("target_modules", "all-linear")
    renamed["target_modules"] = targets if isinstance(targets, str) else list(targets)
    if "layers" in values:
        renamed["layers_to_transform"] = [int(layer) for layer in values.pop("layers").split(",")]
    renamed["use_dora"] = values.pop("dora", False)
    renamed["modules_to_save"] = list(values.pop("modules_to_save", ())) or None
    return peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2", **renamed, **values)


def loaded_by_peft(model, folder):
    return peft.PeftModel.from_pretrained(model, folder).eval()


def trained(model, seed=0):
    """Moves all that is trained, ours or PEFT's, as training would: B from zero, lengths, heads and biases a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture
def adapted(build):
    """adapted(name, seed=0, **settings): a model with an adapter whose ΔW is not zero."""

    def make(name="llama", seed=0, **values):
        model = build(name)
        inject(model, LoRAConfig(**({"r": 2} | values)), seed=seed)
        return trained(model, seed)

    return make


@pytest.fixture
def folder(adapted, tmp_path):
    """A saved adapter of the plain model: up and down, r = 2."""
    model = adapted("plain", target_modules=("up", "down"))
    Adapter.from_model(model, base_model="plain").save(tmp_path / "adapter")
    return tmp_path / "adapter"


def assert_equal(one, other, exactly_scaled=True):
    assert one.factors.keys() == other.factors.keys()
    for path, f in one.factors.items():
        g = other.factors[path]
        assert torch.equal(f.A, g.A) and torch.equal(f.B, g.B)
        assert f.scaling == pytest.approx(g.scaling, rel=0 if exactly_scaled else 1e-15)


# PEFT as the oracle, both ways.


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT then does the right thing
@in_every_form
def test_peft_computes_the_same_from_the_files_that_we_save(adapted, build, tokens, logits, tmp_path, name, values):
    model = adapted(name, **values)
    Adapter.from_model(model).save(tmp_path / "adapter")
    theirs = loaded_by_peft(build(name), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs, tokens), logits(model, tokens), rtol=1e-5, atol=1e-5)
    assert (logits(theirs, tokens) - logits(build(name), tokens)).abs().max() > 0.01


@in_every_form
def test_we_compute_the_same_from_the_files_that_peft_saves(build, tokens, logits, tmp_path, name, values):
    theirs = trained(peft.get_peft_model(build(name), peft_config(name, values)).eval())
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model = build(name)
    adapter = Adapter.load(tmp_path / "adapter")
    adapter.apply(model)
    torch.testing.assert_close(logits(model, tokens), logits(theirs, tokens), rtol=1e-5, atol=1e-5)
    assert (logits(model, tokens) - logits(build(name), tokens)).abs().max() > 0.01

    adapter.save(tmp_path / "again")
    assert_equal(Adapter.load(tmp_path / "again"), adapter, exactly_scaled=False)


@in_every_form
def test_a_config_of_peft_injects_the_same_ranks_and_scalings_here(build, tmp_path, name, values):
    peft.get_peft_model(build(name), peft_config(name, values)).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    adapter = Adapter.load(tmp_path / "adapter")
    planned = {t.path: (t.r, t.scaling) for t in plan(build(name), adapter.config).targets}
    assert planned == {path: (f.r, pytest.approx(f.scaling)) for path, f in adapter.factors.items()}
    asked = LoRAConfig(**values)
    saved = {name for name in adapter.trained_in_full if not name.endswith(".bias")}
    assert saved == {n for n in plan(build(name), adapter.config).trained_in_full if not n.endswith(".bias")}
    for same in ("r", "alpha", "dropout", "scaling", "init", "rank_pattern", "alpha_pattern", "dora", "bias", "layers"):
        assert getattr(adapter.config, same) == getattr(asked, same)


@in_every_form
def test_we_and_peft_choose_the_same_matrices_ranks_and_scalings(build, name, values):
    theirs = {
        path.removeprefix("base_model.model."): (m.r["default"], pytest.approx(m.scaling["default"]))
        for path, m in peft.get_peft_model(build(name), peft_config(name, values)).named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert {t.path: (t.r, t.scaling) for t in plan(build(name), LoRAConfig(**values)).targets} == theirs


def test_peft_gives_each_of_many_layers_its_own_r_and_scaling(build, perturb, tokens, logits, tmp_path):
    """Layers 1 and 11 have paths that end alike, and from 20 targets on PEFT shortens the list by itself."""
    model = build("llama", num_hidden_layers=12)
    inject(model, LoRAConfig(r=2, rank_pattern={r"layers\.1\..*": 3}, alpha_pattern={r"layers\.11\..*q_proj": 4}))
    perturb(model)
    Adapter.from_model(model).save(tmp_path / "adapter")
    theirs = loaded_by_peft(build("llama", num_hidden_layers=12), tmp_path / "adapter")
    for path, layer in lora_layers(model).items():
        one = theirs.base_model.model.get_submodule(path)
        assert (one.r["default"], one.scaling["default"]) == (layer.r, layer.scaling)
    torch.testing.assert_close(logits(theirs, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_an_adapter_trained_here_gives_peft_the_trained_model(build, make_batch, tokens, logits, tmp_path):
    from core import TrainConfig, train

    model = build("llama")
    inject(model, LoRAConfig(r=4))
    before = logits(model, tokens)
    for _ in train(model, [make_batch((2, 3))] * 5, TrainConfig(steps=5, learning_rate=0.01)):
        pass
    Adapter.from_model(model).save(tmp_path / "adapter")
    theirs = loaded_by_peft(build("llama"), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs, tokens), logits(model, tokens), rtol=1e-5, atol=1e-5)
    assert (logits(model, tokens) - before).abs().max() > 0.01


# Save and load.


@in_every_form
def test_what_is_saved_is_loaded_bit_for_bit(adapted, tmp_path, name, values):
    adapter = Adapter.from_model(adapted(name, **values), base_model="a/b")
    adapter.save(tmp_path / "deep" / "adapter")
    loaded = Adapter.load(tmp_path / "deep" / "adapter")
    assert_equal(loaded, adapter, exactly_scaled=False)
    assert loaded.config == adapter.config
    assert loaded.base_model == "a/b"
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["adapter"]
    assert sorted(p.name for p in (tmp_path / "deep" / "adapter").iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_scalings_that_no_alpha_of_the_config_gives_survive(tmp_path, scaling):
    config = LoRAConfig(r=3, alpha=1, scaling=scaling)
    factors = {
        path: Factors(torch.ones(r, 5), torch.ones(4, r), s)
        for path, r, s in [("a", 3, 1 / 3), ("b.a", 1, 0.123), ("c", 4, 1e-7), ("d", 2, 40.0)]
    }
    Adapter(config, factors).save(tmp_path / "adapter")
    assert_equal(Adapter.load(tmp_path / "adapter"), Adapter(config, factors), exactly_scaled=False)


def test_from_model_takes_a_copy_and_leaves_the_model(adapted, perturb, tokens, logits):
    model = adapted("llama")
    expected = logits(model, tokens)
    adapter = Adapter.from_model(model)
    kept = {path: (f.A.clone(), f.B.clone()) for path, f in adapter.factors.items()}
    assert torch.equal(logits(model, tokens), expected)
    assert adapter.config == injection_of(model).config
    assert adapter.num_parameters == injection_of(model).num_trainable
    perturb(model, seed=7)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_A.zero_()
    for path, f in adapter.factors.items():
        assert torch.equal(f.A, kept[path][0]) and torch.equal(f.B, kept[path][1])


def test_a_merged_model_gives_the_same_adapter(adapted):
    model = adapted("llama")
    adapter = Adapter.from_model(model)
    merge(model)
    assert_equal(Adapter.from_model(model), adapter)


def test_from_model_wants_an_adapted_model(build):
    with pytest.raises(ValueError, match="`model` must be adapted; call inject"):
        Adapter.from_model(build("plain"))


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (OSError(28, "No space left on device"), "save_file"),
        (SafetensorError("I/O error"), "save_file"),
        (OSError(5, "Input/output error"), "os.fsync"),
    ],
)
def test_a_failed_save_leaves_the_old_adapter(folder, adapted, monkeypatch, error, where):
    old = Adapter.load(folder)
    new = Adapter.from_model(adapted("plain", seed=3, target_modules=("up", "down")))

    def fail(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"core.files.{where}", fail)
        with pytest.raises(AdapterFileError, match=r"`folder` \(=.*adapter'\) could not be written: .*\. Free some"):
            new.save(folder)
    assert_equal(Adapter.load(folder), old)
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]
    new.save(folder)
    assert_equal(Adapter.load(folder), new)


def test_an_interrupted_save_leaves_the_old_adapter(folder, adapted, monkeypatch):
    old = Adapter.load(folder)

    def interrupted(tensors, path, **_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("core.files.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Adapter.from_model(adapted("plain")).save(folder)
    assert_equal(Adapter.load(folder), old)
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def test_a_save_that_fails_in_its_last_move_leaves_the_old_adapter(folder, adapted, monkeypatch):
    old = Adapter.load(folder)

    def fail(*_):
        raise OSError("in use")

    with monkeypatch.context() as patch:
        patch.setattr("core.files.os.replace", fail)
        with pytest.raises(AdapterFileError, match="could not be written"):
            Adapter.from_model(adapted("plain")).save(folder)
    assert_equal(Adapter.load(folder), old)


def test_saving_into_a_folder_leaves_the_other_files_there(folder, adapted):
    (folder / "README.md").write_text("mine")
    Adapter.from_model(adapted("plain")).save(folder)
    assert (folder / "README.md").exists()


def test_saving_onto_a_file_is_refused(adapted, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(AdapterFileError, match="thesis.txt"):
        Adapter.from_model(adapted("plain")).save(tmp_path / "thesis.txt")


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(adapted, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterFileError, match=r"could not be written: .*Free some space or name another folder\."):
        Adapter.from_model(adapted("plain")).save(tmp_path / "file" / "adapter")


# Damaged and foreign files.


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not ...}))

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def only_pickle(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


def nan_in(key):
    def change(tensors):
        tensors[key][0, 0] = math.nan

    return change


UP_A, UP_B = (f"base_model.model.up.lora_{half}.weight" for half in "AB")
BAD_FILES = {
    "no folder": (
        lambda f: f.rename(f.parent / "other"),
        r"`folder` \(=.*\) must be an adapter folder; it has no adap.*g",
    ),
    "no config": (lambda f: (f / CONFIG).unlink(), "must be an adapter folder; it has no adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "must be an adapter folder; it has no adapter_model.safetensors"),
    "pickle only": (only_pickle, r"Pickled weights \(.bin\) are not opened"),
    "truncated weights": (truncate, "adapter_model.safetensors is damaged or no safetensors file"),
    "empty weights": (write(WEIGHTS, b""), "is damaged or no safetensors file"),
    "weights of another format": (write(WEIGHTS, b"PK\x03\x04" * 100), "is damaged or no safetensors file"),
    "huge header": (write(WEIGHTS, b"\xff" * 64), "is damaged or no safetensors file"),
    "weights are a folder": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        "is damaged or no safetensors file",
    ),
    "config is not JSON": (write(CONFIG, b"{'r': 3}"), "adapter_config.json is not readable JSON"),
    "config is not text": (write(CONFIG, b"\xff\xfe\x00"), "adapter_config.json is not readable JSON"),
    "config is nested deep": (write(CONFIG, b"[" * 100_000), "adapter_config.json is not readable JSON"),
    "config is a list": (write(CONFIG, b"[1]"), r"`peft_type` \(='list'\)"),
    "config of another kind": (edit_config(peft_type="IA3"), r"`peft_type` \(='IA3'\) in .* must be 'LORA'"),
    "config without a kind": (edit_config(peft_type=...), r"`peft_type` \(=None\)"),
    "DoRA": (edit_config(use_dora=True), "up has no lora_magnitude_vector"),
    "PiSSA": (edit_config(init_lora_weights="pissa"), "init_lora_weights='pissa', so its .* not the update; save it"),
    "a newer format": (
        edit_config(peft_version="9.1", use_bora=True, bora_k=3),
        r"of PEFT 9.1\) uses use_bora=True, bora_k=3, which cannot be read",
    ),
    "no alpha": (edit_config(lora_alpha=...), "does not hold a LoRA config: 'lora_alpha'"),
    "alpha is text": (edit_config(lora_alpha="loud"), "does not hold a LoRA config: could not convert"),
    "alpha is null": (edit_config(lora_alpha=None), "does not hold a LoRA config"),
    "NaN in A": (edit_tensors(nan_in(UP_A)), "up.lora_A.weight holds NaN, infinity"),
    "NaN in B": (edit_tensors(nan_in(UP_B)), "up.lora_B.weight holds NaN, infinity"),
    "A without B": (edit_tensors(lambda t: t.pop(UP_B)), "up has lora_A without its partner"),
    "B without A": (edit_tensors(lambda t: t.pop(UP_A)), "up has lora_B without its partner"),
    "ranks differ": (
        edit_tensors(lambda t: t.update({UP_A: torch.ones(3, 16)})),
        r"up: A \(3, 16\) and B \(24, 2\) differ in r",
    ),
    "another key": (edit_tensors(lambda t: t.update(other=torch.ones(2, 2))), r"other \(2, 2\) is no lora_A or lora_B"),
    "a bias of LoRA's": (
        edit_tensors(lambda t: t.update({"base_model.model.up.lora_B.bias": torch.ones(24)})),
        r"up.lora_B.bias \(24,\) is no lora_A or lora_B matrix",
    ),
    "a convolution": (
        edit_tensors(lambda t: t.update({UP_A: torch.ones(2, 4, 4)})),
        r"A \(2, 4, 4\) and B \(24, 2\) are no matrices",
    ),
    "no tensors": (edit_tensors(lambda t: t.clear()), "it holds no lora_A and lora_B"),
    "two of these": (
        edit_tensors(lambda t: (t.pop(UP_A), t.update({"head.lora_C": torch.ones(2)}))),
        "head.lora_C .* is no lora_A.*; up has lora_B without",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_adapter_is_refused_with_its_reason(folder, damage, message):
    damage(folder)
    with pytest.raises(AdapterFileError, match=message):
        Adapter.load(folder)


BAD_PEFT_CONFIGS = {
    "no r": ({"r": ...}, "does not hold a LoRA config: 'r'"),
    "r of zero": ({"r": 0}, r"does not hold a LoRA config: `r` \(=0\) must be at least 1"),
    "alpha below zero": ({"lora_alpha": -1}, r"`alpha` \(=-1.0\) must be above 0"),
    "alpha not a number": ({"lora_alpha": math.nan}, r"`alpha` \(=nan\) must be above 0"),
    "dropout of one": ({"lora_dropout": 1}, r"`dropout` \(=1.0\) must be at least 0 and below 1"),
    "ranks in a list": ({"rank_pattern": [1]}, "does not hold a LoRA config"),
    "targets are a number": ({"target_modules": 3}, "does not hold a LoRA config"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_PEFT_CONFIGS.values(), ids=BAD_PEFT_CONFIGS)
def test_a_bad_config_of_peft_is_refused_with_its_reason(folder, changes, message):
    edit_tensors(lambda tensors: None)(folder)  # drops our own metadata, as PEFT's files have none
    edit_config(**changes)(folder)
    with pytest.raises(AdapterFileError, match=message):
        Adapter.load(folder)


def test_a_file_without_our_metadata_and_with_settings_that_peft_leaves_out_is_read(folder):
    old = Adapter.load(folder)
    edit_tensors(lambda tensors: None)(folder)
    minimum = {"peft_type": "LORA", "r": 2, "lora_alpha": 16.0}
    (folder / CONFIG).write_text(json.dumps(minimum))
    loaded = Adapter.load(folder)
    assert_equal(loaded, old)
    assert loaded.base_model is None
    assert set(loaded.config.target_modules) == {"up", "down"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_are_float32_whatever_the_file_holds(folder, dtype):
    old = Adapter.load(folder)
    edit_tensors(lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()}))(folder)
    for path, f in Adapter.load(folder).factors.items():
        assert f.A.dtype == f.B.dtype == torch.float32
        assert torch.equal(f.A, old.factors[path].A.to(dtype).float())


@pytest.mark.parametrize(
    "changes", [{"alpha_pattern": {"(": 2}}, {"alpha_pattern": [1]}, {"lora_alpha": math.nan}, {"lora_alpha": -3}]
)
def test_alphas_of_a_file_that_make_no_sense_are_refused(folder, changes):
    edit_config(**changes)(folder)
    with pytest.raises(AdapterFileError, match="does not hold a LoRA config"):
        Adapter.load(folder)


def test_an_adapter_that_waits_for_certain_tokens_is_refused(folder):
    edit_config(alora_invocation_tokens=[3, 4])(folder)
    with pytest.raises(AdapterFileError, match="alora_invocation_tokens"):
        Adapter.load(folder)


# Applying.


@pytest.mark.parametrize("name", ["llama", "gpt2", "plain"])
def test_applying_gives_the_model_that_the_adapter_was_taken_from(adapted, build, tokens, logits, name):
    model, other = adapted(name), build(name)
    adapter = Adapter.from_model(model)
    injection = adapter.apply(other)
    assert torch.equal(logits(other, tokens), logits(model, tokens))
    assert injection.targets == injection_of(model).targets
    assert injection.num_parameters == injection_of(model).num_parameters
    assert injection.unmatched == injection_of(model).unmatched
    assert injection_of(other) is injection
    assert_equal(Adapter.from_model(other), adapter)
    assert {n.rpartition(".")[2] for n, p in other.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_targets_of_an_adapter_from_a_file_come_in_the_models_order(folder, build):
    model = build("plain")
    assert [t.path for t in Adapter.load(folder).apply(model).targets] == list(lora_layers(model))


def test_applying_ejects_an_earlier_adapter_even_a_merged_one(adapted, build, tokens, logits):
    first, second = adapted(seed=1, target_modules=("q_proj",)), adapted(seed=2, target_modules=("v_proj",))
    model = build("llama")
    Adapter.from_model(first).apply(model)
    merge(model)
    Adapter.from_model(second).apply(model)
    assert torch.equal(logits(model, tokens), logits(second, tokens))
    eject(model)
    assert torch.equal(logits(model, tokens), logits(build("llama"), tokens))
    assert all(p.requires_grad for p in model.parameters())


def test_training_the_model_does_not_change_the_adapter_that_was_applied(adapted, build, perturb):
    adapter = Adapter.from_model(adapted())
    kept = {path: f.B.clone() for path, f in adapter.factors.items()}
    model = build("llama")
    adapter.apply(model)
    perturb(model, seed=9)
    assert all(torch.equal(f.B, kept[path]) for path, f in adapter.factors.items())


@pytest.mark.parametrize("earlier", [False, True])
def test_a_model_that_does_not_fit_is_left_as_it_was(adapted, build, tokens, logits, earlier):
    adapter = dataclasses.replace(Adapter.from_model(adapted(target_modules=("q_proj", "up_proj"))), base_model="a/b")
    model = build("llama", hidden_size=16)
    if earlier:
        inject(model, LoRAConfig(r=3))
    before, modules = logits(model, tokens), dict(model.named_modules())
    message = (
        r"The adapter \(made for a/b\) must fit the model: "
        r"model\.layers\.0-1\.self_attn\.q_proj is 16 × 16 in the model and 32 × 32 in the adapter; "
        r"model\.layers\.0-1\.mlp\.up_proj is 48 × 16 in the model and 48 × 32 in the adapter\. Load the base model"
    )
    with pytest.raises(AdapterFileError, match=message):
        adapter.apply(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model, tokens), before)
    assert len(lora_layers(model)) == (14 if earlier else 0)
    assert earlier or all(p.requires_grad for p in model.parameters())


def test_all_matrices_that_do_not_exist_are_listed(adapted, build):
    with pytest.raises(AdapterFileError, match=r"\(made for a model not named\) must fit .* Load the base") as caught:
        Adapter.from_model(adapted()).apply(build("gpt2"))
    names = {path.partition(".1.")[2] for path in lora_layers(adapted()) if ".1." in path}
    assert len(names) == 7
    for name in names:
        assert f"model.layers.0-1.{name} does not exist or cannot be adapted" in str(caught.value)


def test_every_misfit_of_another_kind_is_listed_beside_them(adapted, build):
    adapter = Adapter.from_model(adapted("plain", target_modules=("up", "down"), modules_to_save=("norm",)))
    model = build("plain")
    model.up, model.norm = nn.Linear(16, 20), nn.LayerNorm(20)
    del model.down
    with pytest.raises(AdapterFileError) as caught:
        adapter.apply(model)
    assert all(
        clause in str(caught.value)
        for clause in (
            "up is 20 × 16 in the model and 24 × 16 in the adapter",
            "down does not exist",
            "norm.weight is 20 in the model and 24 in the adapter",
            "norm.bias is 20 in the model and 24 in the adapter",
        )
    )


def test_all_that_is_wrong_in_a_file_is_listed(adapted, tmp_path):
    Adapter.from_model(adapted("llama")).save(tmp_path)
    edit_tensors(lambda tensors: [tensors.pop(key) for key in list(tensors) if "lora_A" in key])(tmp_path)
    names = {path.partition(".1.")[2] for path in lora_layers(adapted()) if ".1." in path}
    with pytest.raises(AdapterFileError) as caught:
        Adapter.load(tmp_path)
    assert all(f"model.layers.0-1.{name} has lora_B without its partner" in str(caught.value) for name in names)


def test_all_that_the_settings_promise_and_the_file_lacks_is_listed(adapted, tmp_path):
    Adapter.from_model(adapted("llama")).save(tmp_path)
    edit_config(use_dora=True)(tmp_path)
    edit_tensors(lambda tensors: tensors.update({f"extra{i}.bias": torch.ones(i) for i in range(1, 9)}))(tmp_path)
    with pytest.raises(AdapterFileError) as caught:
        Adapter.load(tmp_path)
    assert str(caught.value).count("model.layers.0-1.") == 7
    assert all(f"extra{i}.bias ({i},) is no lora_A" in str(caught.value) for i in range(1, 9))


def test_an_adapter_of_more_rank_than_a_matrix_is_applied_or_leaves_the_model_as_it_was():
    """PEFT trains such adapters, for example r = 32 on the narrow k_proj of grouped attention."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    factors = {
        "0": Factors(torch.ones(2, 8), torch.ones(16, 2), 1.0),
        "1": Factors(torch.ones(6, 16), torch.ones(4, 6), 1.0),
    }
    try:
        Adapter(LoRAConfig(r=6), factors).apply(model)
    except AdapterFileError:
        assert not lora_layers(model)
    assert len(lora_layers(model)) in (0, 2)
    assert bool(lora_layers(model)) is not model[0].weight.requires_grad


def test_an_adapter_that_names_another_base_model_is_refused_where_the_name_is_known(build):
    source, target = build("plain"), build("plain")
    inject(source, LoRAConfig(r=2))
    adapter = Adapter.from_model(source, base_model="this/one")
    with pytest.raises(AdapterFileError, match=r"\(made for this/one\) must fit the model: this model is that/one"):
        adapter.apply(target, base_model="that/one")
    assert not lora_layers(target)
    adapter.apply(target, base_model="this/one")
    Adapter.from_model(source).apply(target, base_model="that/one")  # it names none
    adapter.apply(target)  # nobody says what this one is called
