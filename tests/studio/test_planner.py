"""What a run would take before it is begun: plans without weights, what makes a run fit, and the probe."""

import dataclasses
import json
import shutil

import pytest

from core import LoRAConfig, LoRAError, TrainConfig
from studio import __main__ as cli
from studio.planner import Planner
from studio.probe import Probe, Probing
from studio.specs import RunSpec
from studio.workspace import Workspace


@pytest.fixture
def workspace(workspace, measured) -> Workspace:
    shutil.copytree(measured, workspace.cache, dirs_exist_ok=True)
    return workspace


@pytest.fixture
def spec(tiny_folder, tiny_data) -> RunSpec:
    train = TrainConfig(steps=6, batch_size=8, max_length=256, device="cpu", precision="fp32", warmup_steps=0)
    return RunSpec("Planned", str(tiny_folder), tiny_data, LoRAConfig(r=2), train)


@pytest.fixture
def planner(spec, workspace) -> Planner:
    return Planner(spec.model, workspace)


def test_a_plan_counts_what_the_shapes_say_and_full_fine_tuning_takes_more(planner, spec, tiny_folder):
    made = planner.plan(spec, free_bytes=10**12)
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    trained = 2 * 2 * sum(out + width for out, width in shapes)  # layers × r
    assert (made.num_trained, made.adapter_bytes) == (trained, 4 * trained)
    assert (made.lora.adapter, made.lora.gradients, made.lora.moments) == (4 * trained, 4 * trained, 8 * trained)
    assert made.full.moments == 8 * made.num_parameters and made.full.gradients == 4 * made.num_parameters
    assert made.full.adapter == 0 and made.full.total > made.lora.total
    assert made.lora.framework == made.full.framework > 10**8
    assert made.fits is True and planner.plan(spec, free_bytes=10**6).fits is False


def test_a_folder_with_a_config_alone_is_planned(spec, tiny_folder, tmp_path, workspace):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_folder / "config.json", bare)
    whole = Planner(str(tiny_folder), workspace).plan(spec, free_bytes=1)
    assert Planner(str(bare), workspace).plan(dataclasses.replace(spec, model=str(bare)), free_bytes=1) == whole


@pytest.mark.parametrize("shard_weights", [False, True])
def test_on_several_devices_split_weights_take_a_part_of_each(spec, tiny_folder, workspace, tmp_path, shard_weights):
    config = json.loads((tiny_folder / "config.json").read_text()) | {"num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    planner = Planner(str(tmp_path), workspace)
    split = dataclasses.replace(spec, train=dataclasses.replace(spec.train, shard_weights=shard_weights))
    one, four = (planner.forecast(split, num_devices=number) for number in (1, 4))
    assert (four.weights < one.weights) == shard_weights
    assert four.adapter == one.adapter and four.gradients == 2 * one.gradients  # the buckets that DDP sends


def test_what_makes_it_fit_does_fit_and_keeps_the_rows_of_a_step(planner, spec):
    whole = planner.forecast(spec).total
    less = planner.forecast(
        dataclasses.replace(spec, train=dataclasses.replace(spec.train, batch_size=2, accumulation=4))
    )
    free = (whole + less.total) // 2
    offered = [remedy for remedy in planner.fit(spec, free) if remedy is not None]
    assert offered
    for remedy in offered:
        assert remedy.predicted_bytes == planner.forecast(remedy.spec).total <= free
        train = remedy.spec.train
        assert train.batch_size * train.accumulation == 8
        assert remedy.cost and remedy.label
    order = [(remedy.trains_less, remedy.relative_time) for remedy in offered]
    assert order == sorted(order)
    (same,) = planner.fit(spec, whole)
    assert same is not None and same.spec == spec


def test_nothing_is_offered_where_nothing_fits_and_one_look_is_enough(planner, spec):
    assert [*planner.fit(spec, 1)] == [None]


def test_where_the_weights_fit_in_half_their_bits_changes_are_looked_at(planner, spec):
    half = planner.forecast(spec).weights // 2
    looks = iter(planner.fit(spec, half))
    assert [next(looks), next(looks)] == [None, None]


def test_a_probe_takes_real_steps_on_the_longest_rows_and_leaves_no_run(spec, workspace):
    *notes, found = Probing(spec, workspace)
    assert isinstance(found, Probe) and notes[0].message == "Reading the data"
    assert (found.device, found.num_rows) == ("cpu", 8)
    assert 0 < found.num_tokens <= 256
    assert found.peak_bytes >= found.loading_bytes > found.framework_bytes > 10**8
    assert found.total_seconds == pytest.approx(6 * found.batch_seconds)
    assert not any((workspace.root / "runs").iterdir())


def test_a_probe_says_in_a_sentence_what_is_wrong_and_can_be_cancelled(spec, workspace):
    wrong = dataclasses.replace(spec, data=dataclasses.replace(spec.data, completion="nothing"))
    with pytest.raises(LoRAError, match="must be a column"):
        list(Probing(wrong, workspace))
    probing = Probing(spec, workspace)
    next(probing)
    probing.close()
    assert probing.is_ended
    with pytest.raises(LoRAError, match="cancelled"):
        list(probing)


def test_the_command_tells_it_to_people_and_as_json(spec, workspace, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LORA_STUDIO_HOME", str(workspace.root))
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec.to_dict()))
    assert cli.main(["plan", str(file), "--free", "1e12", "--r", "4"]) == 0
    told = capsys.readouterr().out
    assert "It fits" in told and "full" in told
    assert cli.main(["plan", str(file), "--free", "1", "--json", "--probe"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False and found["proposals"] == [] and found["probe"]["num_rows"] == 8
    assert cli.main(["plan", "--model", "no/such/place", "--json"]) != 0
    assert "Traceback" not in capsys.readouterr().err
