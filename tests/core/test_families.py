"""The same claims for every family of models, with the peft library as oracle."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from core import (
    Adapter,
    AdapterFileError,
    LoRAConfig,
    LoRAError,
    adaptable,
    eject,
    inject,
    lora_layers,
    matrix_at,
    merge,
    plan,
    unmerge,
)
from tests.core.families import FAMILIES, Family

NAMES = list(FAMILIES)
FUSED = [name for name, family in FAMILIES.items() if family.slices]
R = 4


@pytest.fixture(params=NAMES)
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def made():
    """made(family): a fresh copy of the family's model, with the same weights each time, in eval mode."""
    models: dict[int, nn.Module] = {}

    def make(family: Family) -> nn.Module:
        if id(family) not in models:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = family.make().eval()
                for name, p in model.named_parameters():  # many start at zero, where nothing can be told apart
                    is_norm = p.dim() == 1 and name.endswith("weight")
                    nn.init.normal_(p, mean=float(is_norm), std=0.2 if p.dim() > 1 else 0.05)
            models[id(family)] = model
        return copy.deepcopy(models[id(family)])

    return make


def test_what_is_written_into_a_models_configuration_is_in_no_other_model(family):
    family.make().config.mark = "written"
    assert not hasattr(family.make().config, "mark")


@torch.no_grad()
def output(model: nn.Module, family: Family) -> torch.Tensor:
    return model(**family.inputs()).logits


def config(family: Family, what: str) -> LoRAConfig:
    targets = {"all-linear": "all-linear", "query and value": family.query_and_value}[what]
    return LoRAConfig(r=R, alpha=6, target_modules=targets, modules_to_save=family.head)


BOTH = pytest.mark.parametrize("what", ["all-linear", "query and value"])


def test_the_matrices_are_found_by_the_names_that_people_know(family, made):
    model = made(family)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    paths = {path for path, module in model.named_modules() if module is head}
    linear = {
        path: shape
        for path, shape in adaptable(model, ["linear"]).items()
        if path not in paths and path.partition(".")[0] not in family.head
    }
    assert linear == family.everywhere(family.layer) | family.beside
    assert adaptable(model, ["slice"]) == family.everywhere(family.slices)
    experts = adaptable(model, ["expert"])
    assert experts == family.everywhere(family.experts)
    assert {t.path for t in plan(model, config(family, "all-linear")).targets} == set(linear | experts)


@BOTH
def test_the_trainable_entries_are_those_of_the_closed_form(family, made, what):
    model = made(family)
    injection = inject(model, config(family, what))
    taken = family.everywhere(family.layer | family.slices | family.experts) | family.beside
    if what == "all-linear":
        taken = {path: shape for path, shape in taken.items() if path not in family.everywhere(family.slices)}
    else:
        taken = {p: s for p, s in taken.items() if any(p.endswith(f".{one}") for one in family.query_and_value)}
        assert len(taken) == 2 * LAYERS_OF(family)
    expected = sum(R * (out + width) for out, width in taken.values())
    head = [p for name in family.head for p in made(family).get_submodule(name).parameters()]
    assert sum(t.num_trainable for t in injection.targets) == expected
    assert (
        injection.num_trainable
        == expected + sum(p.numel() for p in head)
        == sum(p.numel() for p in model.parameters() if p.requires_grad)
    )


def LAYERS_OF(family: Family) -> int:
    return len(family.everywhere({"x": (1, 1)})) + sum(".1.EncDecAttention.q" in path for path in family.beside)


@BOTH
def test_at_the_start_the_model_is_the_base_bit_for_bit_and_after_eject_again(family, made, what):
    model = made(family)
    base = output(model, family)
    modules = dict(model.named_modules())
    inject(model, config(family, what))
    assert torch.equal(output(model, family), base)
    eject(model)
    assert all(module is modules[path] for path, module in model.named_modules())
    assert torch.equal(output(model, family), base)


@BOTH
def test_three_steps_lower_the_loss_and_move_A_and_B_alone(family, made, what):
    model = made(family)
    inject(model, config(family, what))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    wanted = torch.randn(output(model, family).shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0)
    losses = []
    for _ in range(4):
        loss = (model(**family.inputs()).logits - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[3] < losses[2] < losses[1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert all(layer.lora_B.count_nonzero() for layer in lora_layers(model).values())


@BOTH
def test_merged_is_the_same_function_and_unmerged_is_as_before(family, made, perturb, what):
    model = made(family).double()
    base = output(model, family)
    inject(model, config(family, what))
    perturb(model).double()
    apart = output(model, family)
    merge(model)
    torch.testing.assert_close(output(model, family), apart, rtol=1e-9, atol=1e-9)
    unmerge(model)
    assert torch.equal(output(model, family), apart)
    assert (apart - base).abs().max() > 1e-3


@BOTH
def test_what_is_saved_and_loaded_is_the_same_function(family, made, perturb, tmp_path, what):
    model, fresh = made(family), made(family)
    inject(model, config(family, what))
    perturb(model)
    Adapter.from_model(model).save(tmp_path)
    Adapter.load(tmp_path).apply(fresh)
    assert list(lora_layers(fresh)) == list(lora_layers(model))
    assert torch.equal(output(fresh, family), output(model, family))


@BOTH
def test_peft_reads_what_is_saved_here_and_gives_the_same_logits(
    family, made, perturb, tmp_path, record_property, what
):
    from peft import PeftModel

    model = made(family)
    inject(model, config(family, what))
    perturb(model)
    Adapter.from_model(model).save(tmp_path)
    theirs = PeftModel.from_pretrained(made(family), tmp_path).eval()
    delta = (output(theirs, family) - output(model, family)).abs().max().item()
    record_property("largest difference from peft", delta)
    assert delta < 1e-4 * output(model, family).abs().max().item()


def test_what_peft_trained_is_read_here_and_gives_the_same_logits(family, made, perturb, tmp_path, record_property):
    from peft import LoraConfig, get_peft_model

    names = sorted({name.rpartition(".")[2] for name in family.layer})
    transposed = family is FAMILIES["gpt2"]
    stacks = sorted({name.rpartition(".")[0] for name in family.experts})
    wanted = LoraConfig(
        r=R, lora_alpha=6, target_modules=names, target_parameters=stacks or None, fan_in_fan_out=transposed
    )
    theirs = get_peft_model(made(family), wanted).eval()
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    model = made(family)
    Adapter.load(tmp_path).apply(model)
    delta = (output(theirs, family) - output(model, family)).abs().max().item()
    record_property("largest difference from peft", delta)
    assert delta < 1e-4 * output(model, family).abs().max().item()


def test_the_matrix_of_a_path_is_got_from_the_weight_as_it_is_stored(family, made):
    model, meta = made(family), made(family).to("meta")
    stored = {name.removesuffix(".weight"): p for name, p in made(family).named_parameters(remove_duplicate=False)}
    for some in filter(None, [family.layer, family.slices, family.experts]):
        inject(model, LoRAConfig(r=1, target_modules=tuple(some)))
        assert set(family.everywhere(some)) <= set(lora_layers(model))
        for path, layer in lora_layers(model).items():
            holder, as_matrix = matrix_at(meta, path)
            assert path.startswith(holder)
            assert torch.equal(as_matrix(stored[holder]), layer.weight_matrix())
        eject(model)
    with pytest.raises(LoRAError, match=r"`path` \(='no.such'\) must be that of a matrix"):
        matrix_at(model, "no.such")


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("name", FUSED)
def test_dora_on_slices_is_saved_bit_for_bit_and_the_same_function_for_peft(name, made, perturb, tmp_path, init):
    from peft import PeftModel

    family = FAMILIES[name]
    first, *_, last = family.slices
    model, fresh = made(family), made(family)
    inject(model, LoRAConfig(r=R, target_modules=(first, last), alpha_pattern={last: 4}, dora=True, init=init))
    with torch.no_grad():
        for layer in lora_layers(perturb(model)).values():
            layer.magnitude *= 1 + 0.3 * torch.rand(len(layer.magnitude), generator=torch.Generator().manual_seed(0))
    adapter = Adapter.from_model(model)
    adapter.save(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert set(loaded.magnitudes) == set(adapter.magnitudes) == set(adapter.factors)
    assert all(torch.equal(loaded.magnitudes[path], m) for path, m in adapter.magnitudes.items())
    assert loaded.num_parameters == adapter.num_parameters
    loaded.apply(fresh)
    torch.testing.assert_close(output(fresh, family), output(model, family), rtol=1e-5, atol=1e-5)
    theirs = PeftModel.from_pretrained(made(family), tmp_path).eval()
    size = output(model, family).abs().max()
    assert (output(theirs, family) - output(model, family)).abs().max() < 1e-4 * size
    assert (output(made(family), family) - output(model, family)).abs().max() > 1e-2 * size


def test_dora_on_slices_without_the_lengths_of_the_other_rows_is_not_written(made, tmp_path):
    model = made(FAMILIES["gpt2"])
    inject(model, LoRAConfig(r=R, target_modules=("c_attn.q",), dora=True))
    with pytest.raises(AdapterFileError, match=r"`dora` \(=True\) on slices of .*c_attn needs .* Adapter.from_model"):
        dataclasses.replace(Adapter.from_model(model), row_norms={}).save(tmp_path)


@pytest.mark.parametrize("name", FUSED)
def test_a_slice_is_the_update_of_the_rows_that_the_model_takes_for_it(name, made, perturb):
    family = FAMILIES[name]
    for part in family.slices:
        model, dense = made(family).double(), made(family).double()
        inject(model, LoRAConfig(r=R, alpha=6, target_modules=(part,)))
        perturb(model).double()
        for path, layer in lora_layers(model).items():
            whole = dense.get_submodule(path.rpartition(".")[0])
            with torch.no_grad():
                matrix = whole.weight.T if layer.transposed else whole.weight
                matrix[layer.rows] += 6 / R * layer.lora_B @ layer.lora_A
            assert layer.delta_weight().shape == family.slices[part]
        torch.testing.assert_close(output(model, family), output(dense, family), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in FUSED if "q" in str(FAMILIES[name].query_and_value)])
def test_the_slices_are_really_query_key_and_value(name, made):
    """Zero values make attention say nothing; equal keys make it look everywhere alike, whatever the queries."""
    family = FAMILIES[name]
    stem = family.query_and_value[0].rpartition(".")[0]

    def attention_after(part: str, fill) -> torch.Tensor:
        model = made(family)
        paths = [path for path in adaptable(model, ["slice"]) if path.endswith(f"{stem}.{part}")]
        inject(model, LoRAConfig(r=1, target_modules=tuple(paths)))
        rows = {path: layer.rows for path, layer in lora_layers(model).items()}
        eject(model)
        with torch.no_grad():
            for path, where in rows.items():
                fused = model.get_submodule(path.rpartition(".")[0])
                (fused.weight.T if type(fused).__name__ == "Conv1D" else fused.weight)[where] = fill
                if fused.bias is not None:
                    fused.bias[where] = fill
        return output(model, family)

    # No keys: the queries no longer matter. No queries: the keys no longer matter.
    silent = attention_after("k", 0.0)
    assert torch.allclose(silent, attention_after("q", 0.0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(silent, attention_after("v", 0.0), rtol=1e-2, atol=1e-2)
