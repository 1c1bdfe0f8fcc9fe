"""What is clicked in the grid becomes settings that choose the same matrices, on models of several families."""

import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from core import ALL_LINEAR, LoRAConfig, LoRAError, adaptable, chosen_ranks, plan
from studio import grid as grids
from tests.core.families import FAMILIES, decoder

R = 3


@functools.cache
def made(family):
    with torch.device("meta"):
        model = FAMILIES[family].make() if family in FAMILIES else decoder("Llama", num_hidden_layers=5)()
    return model, grids.cells(model)


def clicked(grid, on, own=None, some=None):
    return json.dumps({"on": on, "own": own or {}, "some": some or {}})


@st.composite
def choices(draw, family):
    """Random cells, or whole rows and columns, or all of them but a few; with ranks of their own, and some experts."""
    _, grid = made(family)
    spots = st.sets(st.integers(0, len(grid) - 1), max_size=len(grid))
    how = draw(st.sampled_from(["cells", "rows and columns", "all but"]))
    if how == "cells":
        taken = draw(spots)
    elif how == "all but":
        out = draw(st.sets(st.integers(0, len(grid) - 1), max_size=3))
        taken = {i for i, cell in enumerate(grid) if i not in out and not cell.whole}
    else:
        columns = draw(st.sets(st.sampled_from(sorted({cell.column for cell in grid}))))
        rows = draw(st.sets(st.sampled_from(sorted({cell.layer for cell in grid}))))
        taken = {i for i, cell in enumerate(grid) if cell.column in columns and (not rows or cell.layer in rows)}
    on = ["1" if i in taken else "0" for i in range(len(grid))]
    own = draw(st.dictionaries(st.sampled_from(sorted(taken)), st.integers(1, 5))) if taken else {}
    some = {}
    for i in taken:
        if grid[i].num_experts and draw(st.booleans()):
            kept = draw(st.sets(st.integers(0, grid[i].num_experts - 1), min_size=1, max_size=grid[i].num_experts - 1))
            on[i], some[str(i)] = "p", sorted(kept)
    return clicked(grid, "".join(on), {str(i): r for i, r in own.items()}, some)


@pytest.mark.parametrize("family", ["llama of five layers", "gpt2", "mixtral", "gpt_oss", "phi3", "gpt_neox", "opt"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_choice_in_the_grid_is_what_the_plan_adapts(family, data):
    model, grid = made(family)
    text = data.draw(choices(family))
    ranks = grids.read_state(grid, text, R)
    before = LoRAConfig(r=R, rank_pattern=data.draw(st.sampled_from([{}, {r".*": 2}])))
    if not ranks:
        with pytest.raises(LoRAError, match="click some in the Model tab's grid"):
            grids.settings_for(model, grid, ranks, before)
        return
    found = grids.settings_for(model, grid, ranks, before)
    assert {t.path: t.r for t in plan(model, found).targets} == ranks
    assert LoRAConfig.from_dict(json.loads(json.dumps(found.to_dict()))) == found, "it survives spec.json"
    assert grids.settings_for(model, grid, ranks, found) == found, "what says it already stays"
    assert grids.read_state(grid, grids.state(grid, "m", ranks, R), R) == ranks, "the page shows it as it is"


def chosen(family, wanted, r=None):
    model, grid = made(family)
    ranks = {path: (r or {}).get(path, R) for cell in grid if wanted(cell) for path in cell.paths}
    return grids.settings_for(model, grid, ranks, LoRAConfig(r=R, target_modules=("q_proj",)))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (lambda c: c.layer >= 0, {"target_modules": ALL_LINEAR}),
        (lambda c: c.layer == 1, {"target_modules": ALL_LINEAR, "layers": "1"}),
        (lambda c: c.column == "self_attn.v_proj", {"target_modules": ("self_attn.v_proj",)}),
        (lambda c: c.column == "mlp.up_proj" and c.layer == 0, {"target_modules": ("mlp.up_proj",), "layers": "0"}),
        (
            lambda c: c.layer >= 0 and c.path != "model.layers.1.mlp.up_proj",
            {"target_modules": ALL_LINEAR, "exclude_modules": ("model.layers.1.mlp.up_proj",)},
        ),
        (
            lambda c: c.path in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head"),
            {"target_modules": r"lm_head|model\.layers\.0\.mlp\.up_proj|model\.layers\.1\.mlp\.down_proj"},
        ),
    ],
)
def test_a_choice_is_said_in_the_shortest_words(wanted, said):
    assert chosen("llama", wanted) == LoRAConfig(r=R, **said)


def test_the_ranks_of_whole_columns_go_by_name_and_those_of_cells_by_path():
    ranks = {f"model.layers.{i}.self_attn.q_proj": 1 for i in (0, 1)} | {"model.layers.1.mlp.up_proj": 2}
    assert chosen("llama", lambda c: c.layer >= 0, ranks).rank_pattern == {
        "self_attn.q_proj": 1,
        r"model\.layers\.1\.mlp\.up_proj": 2,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_grid_has_every_matrix_once(family):
    model, grid = made(family)
    paths = [path for cell in grid for path in cell.paths]
    assert sorted(paths) == sorted(adaptable(model))
    drawn = json.loads(grids.layout(grid, "m"))["cells"]
    assert [row[0] for row in drawn] == [cell.path for cell in grid]


def test_a_slice_is_not_adapted_beside_its_whole():
    _, grid = made("gpt2")
    ranks = grids.read_state(grid, clicked(grid, "1" * len(grid)), R)
    assert "transformer.h.0.attn.c_attn" in ranks and "transformer.h.0.attn.c_attn.q" not in ranks


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"on": "1", "own": {}, "some": {}}', "null", '{"on": 3, "own": {}, "some": {}}']
)
def test_what_is_no_state_of_the_grid_is_refused(text):
    _, grid = made("llama")
    with pytest.raises(LoRAError, match="must be a choice in the grid that is shown; reload"):
        grids.read_state(grid, text, R)


def test_names_of_ranks_that_fit_nothing_are_told():
    model, _ = made("llama")
    config = LoRAConfig(target_modules=("q_proj",), rank_pattern={"q_proj": 2, "up_proj": 3, r"layers\.7\..*": 1})
    assert grids.unused_ranks(config, chosen_ranks(model, config)) == ["up_proj", r"layers\.7\..*"]


def test_an_expression_tells_some_layers_from_all():
    picked = {f"model.layers.{i}.mlp.up_proj" for i in (0, 2, 4)}
    found = chosen("llama of five layers", lambda c: c.column == "self_attn.q_proj" or c.path in picked)
    some, every = r"model\.layers\.(?:0|2|4)\.mlp\.up_proj", r"model\.layers\.\d+\.self_attn\.q_proj"
    assert found == LoRAConfig(r=R, target_modules=f"{every}|{some}")


def test_a_path_that_is_the_end_of_another_keeps_its_own_rank():
    with torch.device("meta"):
        model = nn.ModuleDict(
            {"proj": nn.Linear(8, 8), "layers": nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(8, 8)})])}
        )
    ranks = {"proj": 5, "layers.0.proj": R}
    found = grids.settings_for(model, grids.cells(model), ranks, LoRAConfig(r=R))
    assert chosen_ranks(model, found) == ranks
