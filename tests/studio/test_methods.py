"""Runs of other methods than LoRA: through the worker, in chat, and wherever a LoRA adapter is looked for."""

import asyncio
import copy
import json
from dataclasses import replace

import gradio as gr
import pytest
import torch

from core import (
    AdapterFileError,
    Baseline,
    LoRAConfig,
    LoRAError,
    MethodConfig,
    TrainConfig,
    World,
    apply_method,
    load_trained,
    plan_method,
)
from studio import __main__ as command_line
from studio import bars, capsule, export_jobs, models, setup, sweeps
from studio.chat import Engine
from studio.export import Choice
from studio.forms import Form
from studio.opened import Source
from studio.panes import Pane
from studio.planner import Planner
from studio.runs import Runs
from studio.sampling import ChatSettings
from studio.specs import RunSpec
from studio.state import Studio
from studio.tabs import home, train
from studio.tabs import runs as runs_tab
from studio.tabs.spectrum import compare
from tests.studio.test_resume import as_it_was, at_step, break_off, told, work  # noqa: F401 (a fixture)

TRAIN = TrainConfig(
    steps=6, batch_size=4, learning_rate=1e-2, eval_every=3, warmup_steps=0, checkpoint_every=2, max_length=96,
    device="cpu", precision="fp32",
)  # fmt: skip
SMALL = {"bottleneck": 2, "prefix_length": 3, "infix_length": 2}


@pytest.fixture
def spec(tiny_folder, tiny_data):
    """spec(method): a run of that method."""

    def of(method, **values):
        config = MethodConfig(method=method, **SMALL)
        return RunSpec("Inns", str(tiny_folder), tiny_data, LoRAConfig(r=2), replace(TRAIN, **values), method=config)

    return of


@pytest.fixture
def done(workspace, spec):
    """done(method): a run that was trained so, to its end."""

    def run(method):
        made = Runs(workspace).create(spec(method))
        assert work(made) == 0
        return made

    return run


# From the worker to the files.


@pytest.mark.parametrize("method", ["adapter_h", "prefix_layer"])
def test_a_run_is_trained_saved_and_goes_on_after_a_break_as_if_there_was_none(
    method, done, workspace, spec, monkeypatch
):
    whole, broken = done(method), Runs(workspace).create(spec(method))
    break_off(broken, monkeypatch, at_step(5))
    assert broken.checkpoints.steps()[-1] == 4
    assert work(broken) == 0 and broken.status == "finished"
    assert told(broken) == told(whole)
    one, other = (load_trained(run.adapter_folder) for run in (whole, broken))
    assert isinstance(one, Baseline) and one.method == whole.spec.method and one.base_model == whole.spec.model
    assert all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())
    skeleton = models.skeleton(whole.spec.model, workspace)
    assert one.num_parameters == plan_method(skeleton, one.method).num_trainable
    whole.log.read()
    assert whole.log.evaluations[-1].loss < whole.log.evaluations[0].loss and not len(whole.log.spectra.steps)
    assert f"by {whole.spec.method.title}" in " ".join(note.message for note in whole.log.notes)


def test_a_run_packed_up_and_restored_is_the_same(done, workspace, tmp_path):
    run = done("prefix_embed")
    capsule.write(run, tmp_path / "run.zip")
    again = capsule.restore(Runs(workspace), tmp_path / "run.zip")
    assert again.spec == run.spec
    assert load_trained(again.adapter_folder).tensors.keys() == load_trained(run.adapter_folder).tensors.keys()


def test_rows_are_cut_so_that_the_tokens_of_a_prefix_fit(spec, workspace):
    lengths = {}
    for method in ("lora", "prefix_embed"):
        rows = setup.rows_of(spec(method, max_length=48), workspace, World(), lambda note: None)
        lengths[method] = max(len(example.input_ids) for example in rows.prepared.train)
    assert lengths == {"lora": 48, "prefix_embed": 43}


def test_too_long_a_prefix_is_refused_before_a_run_is_made(spec, workspace, tiny_folder, rows_file):
    long = replace(spec("prefix_embed"), method=MethodConfig(method="prefix_embed", prefix_length=90))
    with pytest.raises(
        LoRAError, match=r"`prefix_length` \+ `infix_length` \(=98\) must leave a row at least 8 of `max"
    ):
        Studio(workspace, [tiny_folder, rows_file.parent]).start(long)
    assert Runs(workspace).list() == []


def test_split_weights_are_lora_s_alone(spec, workspace):
    with pytest.raises(LoRAError, match=r"`shard_weights` \(=True\) must be off for the method adapter_h; only lora"):
        setup.adapted_model(
            spec("adapter_h", shard_weights=True), workspace, World(), torch.device("cpu"), lambda note: None
        )


@pytest.mark.parametrize(
    ("method", "precision", "expected"),
    [
        ("full", "auto", "float32"),
        ("full", "bf16", "bfloat16"),
        ("lora", "auto", "bfloat16"),
        ("head", "fp32", "float32"),
    ],
)
def test_weights_that_are_trained_are_float32_unless_asked_otherwise(method, precision, expected, spec, monkeypatch):
    """Where "auto" would take bfloat16, as on a GPU."""
    words = {"auto": "bfloat16", "bf16": "bfloat16", "fp32": "float32"}
    monkeypatch.setattr("studio.specs.resolve_dtype", lambda precision, device: getattr(torch, words[precision]))
    found = spec(method, precision=precision).weights_dtype(torch.device("cpu"))
    assert found == getattr(torch, expected)


@pytest.fixture
def share_is_known(monkeypatch):
    """What the libraries take is measured, in a process of its own, by the tests of the planner."""
    monkeypatch.setattr("studio.planner.framework_share", lambda *_: 10**8)


# What says which method.


def test_an_old_spec_opens_as_lora_and_a_new_one_comes_back():
    assert RunSpec.from_dict({"lora": {"r": 2}}).method == MethodConfig()
    spec = RunSpec(method=MethodConfig(method="adapter_l", bottleneck=3))
    assert RunSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_sweep_may_go_over_methods(spec):
    made = sweeps.grid(spec("lora"), sweeps.parse(["method = lora, adapter_h", "bottleneck = 4"]))
    assert [(one.method.method, one.method.bottleneck) for one in made] == [("lora", 4), ("adapter_h", 4)]


def test_the_command_line_takes_a_method(spec, workspace, tmp_path, capsys, share_is_known):
    (tmp_path / "spec.json").write_text(json.dumps(spec("lora").to_dict()))
    words = ["plan", str(tmp_path / "spec.json"), "--method", "bitfit", "--json", "--workspace", str(workspace.root)]
    assert command_line.main(words) == 2
    assert "must be used on a model that has biases" in capsys.readouterr().err
    words[3] = "prefix_layer"
    assert command_line.main([*words, "--prefix-length", "4"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["method"], planned["num_trained"]) == ("prefix_layer", 2 * 32 * (4 + 2))


def test_the_form_shows_what_the_method_needs():
    async def drawn():  # outside of a running loop, gr.Blocks leaves one behind that nobody closes
        with gr.Blocks() as page:
            return page, Form(MethodConfig)

    page, form = asyncio.run(drawn())
    (event,) = [fn for fn in page.fns.values() if fn.targets[0][0] == form.widgets[0]._id]
    assert [row.visible for row in event.outputs] == [False] * 3
    ids = {widget._id: name for widget, name in zip(form.widgets, form.names, strict=True)}
    held = [[ids[w._id] for w in _leaves(row) if w._id in ids] for row in event.outputs]

    def shown(method):
        return [names for names, update in zip(held, event.fn(method), strict=True) if update.visible]

    assert shown("lora") == [] and shown("adapter_p") == [["bottleneck"]] and shown("last_layers") == [["num_layers"]]
    assert shown("prefix_embed") == [["prefix_length", "infix_length"]]
    assert ("Adapter_H", "adapter_h") in form.widgets[0].choices
    assert MethodConfig.from_dict(form.values(["adapter_h", 4, 2, 8, 8])) == MethodConfig("adapter_h", bottleneck=4)


def _leaves(block):
    children = getattr(block, "children", None)
    return [leaf for child in children for leaf in _leaves(child)] if children is not None else [block]


def test_a_plan_is_of_the_method_and_full_fine_tuning_is_not_set_beside_itself(spec, workspace, share_is_known):
    planner = Planner(spec("full").model, workspace)
    plans = {method: planner.plan(spec(method)) for method in ("lora", "full", "adapter_p")}
    assert plans["full"].lora.total == plans["full"].full.total == plans["lora"].full.total
    assert plans["adapter_p"].num_trained == 2 * (2 * 32 * 2 + 2 + 32)
    assert plans["adapter_p"].lora.adapter == 4 * plans["adapter_p"].num_trained
    drawn = {method: bars.drawn(plan) for method, plan in plans.items()}
    assert {method: text.count('class="who"') for method, text in drawn.items()} == {
        "lora": 2,
        "full": 1,
        "adapter_p": 2,
    }
    assert "Adapter_P" in drawn["adapter_p"] and "LoRA" not in drawn["adapter_p"]
    assert "times as much" not in " ".join(bars.verdict(plans["full"])[0])


# Where a ΔW is looked for.


def test_a_run_without_an_update_is_shown_as_what_it_is_and_nothing_is_offered_for_it(done, workspace, spec, write_run):
    run, studio = done("adapter_h"), Studio(workspace)
    assert run.has_adapter and not run.has_lora
    row = dict(zip(runs_tab.HEADER, runs_tab.row(run), strict=True))
    assert (row["Method"], row["r"]) == ("Adapter_H", "")
    assert "Adapter_H, Bottleneck 2" in runs_tab.details(run) and "Target matrices" not in runs_tab.details(run)
    assert "What Adapter_H trained is saved" in train.view(run)["status"]
    assert "was trained by Adapter_H, which has no ΔW" in home.view(run)
    with pytest.raises(
        LoRAError, match=r"was trained by Adapter_H, which has no ΔW = scaling · B·A: no spectrum, no me"
    ):
        export_jobs.start(run, Choice("adapter"))
    with pytest.raises(AdapterFileError, match=r"was trained by another method, 'adapter_h', and has no A and B"):
        studio.opened(Source(run.id))
    found = studio.adapter(run.spec.model, run.id)
    assert isinstance(found, Baseline) and studio.adapter(run.spec.model, run.id) is found
    assert isinstance(studio.adapter(run.spec.model, run.id, 4), Baseline)
    lora = done("lora")
    assert [word for _, word in compare.choices(studio, studio.opened(Source(lora.id)), ()) if run.id in word] == []


# In chat.


@pytest.fixture(scope="module")
def loaded(tiny_folder, tmp_path_factory):
    from studio.workspace import Workspace

    return models.load_model(str(tiny_folder), Workspace(tmp_path_factory.mktemp("workspace")))


def baseline(loaded, method):
    """What a method has learned, as if trained: all of it moved by random numbers; and the model with it."""
    model = copy.deepcopy(loaded)
    apply_method(model, MethodConfig(method=method, **SMALL), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return Baseline.from_model(model), model


PROMPT = [1, 40, 70, 99, 12]


@pytest.mark.parametrize("method", ["adapter_l", "prefix_embed", "prefix_layer", "last_layers"])
def test_a_pane_says_what_the_trained_model_says_beside_one_that_is_the_base(method, loaded):
    trained, model = baseline(loaded, method)
    engine = Engine(copy.deepcopy(loaded), lambda name, step: trained, frozenset())
    panes = [Pane(), Pane("inns")]
    *_, last = engine.answer_all(panes, [PROMPT, PROMPT], ChatSettings(max_new_tokens=6))
    for answer, own in zip(last, (loaded, model), strict=True):
        ids = PROMPT
        if own is model and method.startswith("prefix"):
            first = loaded.config.vocab_size
            ids = [first, first + 1, first + 2, *PROMPT, first + 3, first + 4]
        said = []
        for _ in range(6):  # anew for each token: without the cache that the engine uses
            with torch.no_grad():
                said.append(int(own(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
        assert list(answer.token_ids) == said
    assert last[0].token_ids != last[1].token_ids
    assert f"trained by {trained.method.title}, {trained.num_parameters:,} parameters" in last[1].engine
    shift = engine.shift(panes[1], [*PROMPT, 7, 8], len(PROMPT))
    assert len(shift.kl) == 2 and max(shift.kl) > 0
    assert engine.logits(panes[1], torch.tensor([PROMPT])).shape[1] == len(PROMPT)


@pytest.mark.parametrize(
    ("pane", "asked"),
    [
        (Pane("inns", strength=0.5), "run at strength 0.5"),
        (Pane("inns", merged=True), "merged"),
        (Pane("inns", plus="other"), "added to another"),
        (Pane("inns", rank=2), "cut to rank 2"),
    ],
)
def test_what_has_no_update_is_run_as_it_was_trained_or_not_at_all(pane, asked, loaded):
    trained, _ = baseline(loaded, "adapter_h")
    engine = Engine(copy.deepcopy(loaded), lambda name, step: trained, frozenset())
    with pytest.raises(LoRAError, match=rf"What Adapter_H trained must not be {asked}: it has no ΔW"):
        list(engine.answer(pane, PROMPT, ChatSettings(max_new_tokens=2)))
