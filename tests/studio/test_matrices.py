import pytest
import torch

from core import FORMS, LoRAConfig, adaptable, plan
from studio.matrices import MatrixKind, kinds, layer_and_matrix, presets, split_path
from studio.tabs.model import label, targets
from tests.core.families import FAMILIES

QUERY_VALUE, ATTENTION, ALL = "Query and value (the paper)", "All attention", "All linear"
LLAMA = {
    **{f"self_attn.{name}_proj": (64, 64) for name in "qo"},
    **{f"self_attn.{name}_proj": (32, 64) for name in "kv"},
    **{f"mlp.{name}_proj": (128, 64) for name in ("gate", "up")},
    "mlp.down_proj": (64, 128),
}
GPT2 = {"attn.c_attn": (192, 64), "attn.c_proj": (64, 64), "mlp.c_fc": (256, 64), "mlp.c_proj": (64, 256)}
BERT = {
    **{f"attention.self.{name}": (64, 64) for name in ("query", "key", "value")},
    "attention.output.dense": (64, 64),
    "intermediate.dense": (256, 64),
    "output.dense": (64, 256),
}
T5 = {
    **{f"layer.0.SelfAttention.{name}": (64, 64) for name in "qkvo"},
    **{f"layer.1.EncDecAttention.{name}": (64, 64) for name in "qkvo"},
    "layer.2.DenseReluDense.wi": (256, 64),
    "layer.2.DenseReluDense.wo": (64, 256),
}
DISTILBERT = {f"attention.{name}_lin": (64, 64) for name in ("q", "k", "v", "out")} | {"ffn.lin1": (256, 64)}


def model(before: str, layer: dict[str, tuple[int, int]], num_layers: int = 3) -> dict[str, tuple[int, int]]:
    """path → shape of a model of that many layers and a head."""
    inside = {f"{before}.{i}.{name}": shape for i in range(num_layers) for name, shape in layer.items()}
    return inside | {"lm_head": (1000, 64)}


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("model.layers.17.self_attn.q_proj", (17, "self_attn.q_proj")),
        ("transformer.h.3.attn.c_attn", (3, "attn.c_attn")),
        ("encoder.block.0.layer.1.DenseReluDense.wi", (0, "layer.1.DenseReluDense.wi")),
        ("h.3.block.experts.11.w1", (3, "block.experts.11.w1")),
        ("layers.007.q", (7, "q")),
        ("0.q", (0, "q")),
        ("lm_head", (-1, "lm_head")),
        ("model.layers.3", (-1, "model.layers.3")),
        ("model.layers.3a.q", (-1, "model.layers.3a.q")),
        ("model.layers.³.q", (-1, "model.layers.³.q")),
        ("model.layers." + "9" * 5000 + ".q", (-1, "model.layers." + "9" * 5000 + ".q")),
        ("", (-1, "")),
    ],
)
def test_a_path_gives_layer_and_matrix(path, place):
    assert layer_and_matrix(path) == place


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("model.layers.17.self_attn.q_proj", ("model.layers", 17, "self_attn.q_proj")),
        ("encoder.block.0.layer.1.wi", ("encoder.block", 0, "layer.1.wi")),
        ("0.q", ("", 0, "q")),
        ("lm_head", ("", -1, "lm_head")),
    ],
)
def test_a_path_is_split_at_its_layer(path, place):
    assert split_path(path) == place


@pytest.mark.parametrize("layer", [LLAMA, GPT2, BERT, T5])
def test_kinds_are_the_matrices_of_a_layer_and_the_head_in_the_models_order(layer):
    found = kinds(model("stack.of.layers", layer))
    assert found == [
        *(MatrixKind(name, shape, 3) for name, shape in layer.items()),
        MatrixKind("lm_head", (1000, 64), 1),
    ]


def test_a_kind_that_some_layers_lack_counts_those_that_have_it():
    found = kinds({"h.0.attn.q": (8, 4), "h.1.mamba.in_proj": (6, 4), "h.2.attn.q": (8, 4)})
    assert [(kind.name, kind.num_layers) for kind in found] == [("attn.q", 2), ("mamba.in_proj", 1)]
    assert kinds({}) == []


def test_experts_are_one_kind_a_stack_however_many_a_layer_has():
    paths = [f"h.{i}.mlp.experts.{name}.{e}" for i in range(3) for name in ("up", "down") for e in range(4 + i)]
    found = kinds(dict.fromkeys(paths, (8, 4)), "expert")
    assert found == [MatrixKind(f"mlp.experts.{name}", (8, 4), 3, "expert", 6) for name in ("up", "down")]
    attention = kinds({f"h.{i}.attn.q": (8, 4) for i in range(3)})
    assert presets([*attention, *found]) == {
        QUERY_VALUE: ["attn.q"],
        ATTENTION: ["attn.q"],
        ALL: ["attn.q", "mlp.experts.up", "mlp.experts.down"],
    }


@pytest.mark.parametrize(
    ("layer", "query_value", "attention"),
    [
        (LLAMA, ["self_attn.q_proj", "self_attn.v_proj"], [name for name in LLAMA if name.startswith("self_attn.")]),
        (BERT, ["attention.self.query", "attention.self.value"], [name for name in BERT if name.startswith("att")]),
        (T5, [name for name in T5 if name[-2:] in (".q", ".v")], [name for name in T5 if "Attention" in name]),
        (DISTILBERT, ["attention.q_lin", "attention.v_lin"], [name for name in DISTILBERT if "_lin" in name]),
    ],
    ids=["Llama", "BERT", "T5", "DistilBERT"],
)
def test_presets_know_a_familys_names_and_leave_the_head_out(layer, query_value, attention):
    found = presets(kinds(model("stack", layer)))
    assert {title: set(names) for title, names in found.items()} == {
        QUERY_VALUE: set(query_value),
        ATTENTION: set(attention),
        ALL: set(layer),
    }


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.slices])
def test_the_picker_offers_the_slices_of_a_fused_projection_and_the_paper_s_choice_takes_them(name):
    family = FAMILIES[name]
    with torch.device("meta"):
        skeleton = family.make()
    found = [kind for form in FORMS for kind in kinds(adaptable(skeleton, [form]), form)]
    offered = {kind.name: label(kind) for kind in found if kind.form == "slice"}
    assert set(offered) == set(family.slices)
    assert all(words.endswith(f" · part of {kind.rpartition('.')[0]}") for kind, words in offered.items())
    chosen = targets("Query and value (the paper)", presets(found)[QUERY_VALUE], "")
    planned = plan(skeleton, LoRAConfig(r=2, target_modules=chosen))
    wanted = {path for path in family.everywhere(family.slices) if path.endswith(family.query_and_value)}
    assert {t.path for t in planned.targets} == wanted and wanted


def test_where_query_and_value_are_fused_there_is_no_preset_for_them():
    found = presets(kinds(model("transformer.h", GPT2)))
    assert found == {ATTENTION: ["attn.c_attn", "attn.c_proj"], ALL: list(GPT2)}


def test_a_model_of_one_layer_has_all_its_matrices_in_all_linear():
    assert presets(kinds(model("h", {"mlp.up": (8, 4)}, num_layers=1))) == {ALL: ["mlp.up", "lm_head"]}
