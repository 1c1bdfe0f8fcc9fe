"""The Model tab: what its form says becomes a model and settings, and what it costs is told."""

import dataclasses
import shutil

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from core import (
    ALL_LINEAR,
    LoRAConfig,
    LoRAError,
    adaptable,
    plan,
)
from studio import matrices, models
from studio.forms import Form
from studio.tabs import model as model_tab
from tests.studio.tabs.pages import HOSTILE, Read, drawn


@pytest.mark.parametrize(
    ("preset", "names", "pattern", "expected"),
    [
        ("All linear", ["self_attn.q_proj"], "", ALL_LINEAR),
        ("All linear", [], None, ALL_LINEAR),
        (
            "Query and value (the paper)",
            ["self_attn.q_proj", "self_attn.v_proj"],
            "",
            ("self_attn.q_proj", "self_attn.v_proj"),
        ),
        (model_tab.CHOOSE, ["mlp.up_proj"], "  ", ("mlp.up_proj",)),
        (model_tab.CHOOSE, ["mlp.up_proj"], r" .*\.0\..*q_proj ", r".*\.0\..*q_proj"),
        ("All linear", [], ".*v_proj", ".*v_proj"),
    ],
)
def test_a_pattern_goes_before_the_ticks_and_all_linear_means_all(preset, names, pattern, expected):
    assert model_tab.targets(preset, names, pattern) == expected


@pytest.mark.parametrize("names", [[], None])
def test_no_matrix_at_all_is_refused(names):
    with pytest.raises(
        LoRAError, match=r"`target_modules` \(=nothing\) must name at least one matrix; click some in the"
    ):
        model_tab.targets(model_tab.CHOOSE, names, "")


LORA_NAMES = ["r", "alpha", "dropout", "scaling", "init", "rank_pattern", "alpha_pattern"]


def test_the_model_tab_s_values_become_model_and_settings():
    form = drawn(lambda: Form(LoRAConfig, LORA_NAMES))
    settings = dict(zip(form.names, [w.value for w in form.widgets], strict=True))
    settings |= {"r": 4, "dropout": 0.1, "rank_pattern": '{"q_proj": 2}'}
    values = ["owner/name", model_tab.CHOOSE, ["q_proj"], "", *(settings[name] for name in form.names)]
    assert model_tab.parse(form, values) == (
        "owner/name",
        LoRAConfig(r=4, dropout=0.1, rank_pattern={"q_proj": 2}, target_modules=("q_proj",)),
    )
    values[4 + form.names.index("r")] = 0
    with pytest.raises(LoRAError, match=r"`r` \(=0\) must be at least 1"):
        model_tab.parse(form, values)


def test_the_cost_is_told_before_a_weight_is_loaded(studio, tiny_folder):
    config = LoRAConfig(r=4, target_modules=("self_attn.q_proj", "mlp.up_proj"))
    facts = Read(model_tab.cost_view(studio, str(tiny_folder), config)).facts
    trainable = 2 * 4 * ((32 + 32) + (48 + 32))
    whole = sum(p.numel() for p in models.load_model(str(tiny_folder), studio.workspace).parameters())
    assert facts == {
        "Trainable parameters": f"{trainable:,}",
        "Share of the model": f"{100 * trainable / (whole + trainable):.2f} %",
        "Adapter file": f"{4 * trainable / 1e3:.1f} kB",
        "Matrices adapted": "4 of 16",  # of 14 in layers, the head and the embedding
        "As settings: ": "target_modules: self_attn.q_proj (2), mlp.up_proj (2)",
    }
    assert all(p.is_meta for p in studio.skeleton(str(tiny_folder)).parameters())


def test_the_cost_of_experts_counts_their_matrices_and_the_picker_their_stacks(studio, tiny_folder, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    model = MixtralForCausalLM(MixtralConfig(num_local_experts=5, **sizes, **heads))
    model.save_pretrained(tmp_path)
    shutil.copy(tiny_folder / "tokenizer.json", tmp_path)
    config = LoRAConfig(r=2, target_modules=("q_proj", "experts.down_proj.4"))
    facts = Read(model_tab.cost_view(studio, str(tmp_path), config)).facts
    everything = 2 * (4 + 2 * 5) + 2  # attention and two stacks in two layers, the head and the embedding
    assert facts["Matrices adapted"] == f"4 of {everything}"
    (gate_up, down) = matrices.kinds(adaptable(studio.skeleton(str(tmp_path)), ["expert"]), "expert")
    assert model_tab.label(down) == "mlp.experts.down_proj · 16 × 24 · 2× · 5 experts each"
    taken = plan(model, LoRAConfig(r=2, target_modules=(gate_up.name, down.name))).targets
    assert len(taken) == 2 * 2 * 5


def test_the_cost_says_what_each_setting_of_the_choice_takes(studio, tiny_folder):
    ranks = {"q_proj": 2, HOSTILE.replace("(", "").replace(")", ""): 3}
    config = LoRAConfig(layers="1", exclude_modules=("up_proj",), rank_pattern=ranks)
    shown = model_tab.cost_view(studio, str(tiny_folder), config)
    text = " ".join(Read(shown).text)
    assert "target_modules: all-linear (6) · layers: 1 · except: up_proj · ranks: q_proj → 2, " in text
    assert "which fits no adapted matrix" in text
    assert set(Read(shown).tags) == {"dl", "div", "dt", "dd", "p", "code"}


def test_a_cost_that_cannot_be_is_one_sentence(studio, tiny_folder):
    with pytest.raises(LoRAError, match=r"`r` \(=17\) must be at most 16 to fit"):
        model_tab.cost_view(studio, str(tiny_folder), LoRAConfig(r=17))


def test_what_a_model_s_files_do_not_say_is_unknown_and_what_they_say_stays_text(studio, tiny_folder):
    info = studio.info(str(tiny_folder))
    unknown = dataclasses.replace(info, weight_bytes=None, dtype=None, licence=None, context_length=None)
    facts = Read(model_tab.facts_view(unknown)).facts
    assert {facts[k] for k in ("Size as stored", "Stored as", "Context", "Licence")} == {"unknown"}
    hostile = model_tab.facts_view(dataclasses.replace(info, licence=HOSTILE))
    assert Read(hostile).facts["Licence"] == HOSTILE
    assert Read(hostile).tags == Read(model_tab.facts_view(info)).tags
