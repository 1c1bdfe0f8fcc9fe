"""The commands that look at adapters, on a model with weights on disk, against dense matrices."""

import csv
import io
import json
import math
from dataclasses import replace

import pytest
import torch

from core import Adapter, Evaluated, Finished, LoRAConfig, adaptable, inject, lora_layers, matrix_at, norm
from studio import __main__ as cli
from studio import analysis, models
from studio.runs import Runs
from studio.specs import RunSpec


@pytest.fixture
def command(workspace, capsys, monkeypatch):
    """command(*words): runs them in this process; returns exit code, out and err."""
    monkeypatch.setenv("LORA_STUDIO_HOME", str(workspace.root))

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what loading a model said before
        code = cli.main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def make(tiny_folder):
    """make(seed, **settings): an adapter of the tiny model with random B, and the matrices that it is of."""
    from transformers import AutoModelForCausalLM

    def build(seed=0, **settings):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        weights = {p: matrix_at(model, p)[1](model.get_submodule(p).weight.detach().double()) for p in adaptable(model)}
        inject(model, LoRAConfig(r=4, alpha=8, **settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B.normal_(0, 0.02, generator=generator)
        return Adapter.from_model(model, base_model="tiny"), weights

    return build


@pytest.fixture
def saved(make, tmp_path):
    adapter, weights = make()
    adapter.save(tmp_path / "adapter")
    return tmp_path / "adapter", adapter, weights


def dense(f):
    return f.scaling * f.B.double() @ f.A.double()


def test_spectrum_says_of_each_matrix_what_the_dense_ones_say(command, saved, tiny_folder):
    folder, adapter, weights = saved
    code, out, err = command("spectrum", folder, "--base", tiny_folder, "--intruders", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert (
        said["base"] == str(tiny_folder) and said["notes"] == [] and said["matrices"].keys() == adapter.factors.keys()
    )
    for path, row in said["matrices"].items():
        X, W = dense(adapter.factors[path]), weights[path]
        U, sigma, Vh = torch.linalg.svd(X)
        assert row["sigma"] == pytest.approx(sigma[:4].tolist(), rel=1e-9)
        assert row["relative_norm"] == pytest.approx((X.norm() / W.norm()).item(), rel=1e-9)
        projected = (U[:, :4].T @ W @ Vh[:4].T).norm().item()
        assert row["projected_norm"] == pytest.approx(projected, rel=1e-6)
        assert row["factor"] == pytest.approx(X.norm().item() / projected, rel=1e-6)
        assert row["null"] == pytest.approx(4 * W.norm().item() / math.sqrt(W.numel()), rel=1e-9)
        cosines = (torch.linalg.svd(W + X)[0][:, :10].T @ torch.linalg.svd(W, full_matrices=False)[0]).abs()
        assert row["max_cosine"] == pytest.approx(cosines.max(1).values.tolist(), abs=1e-6)
        assert row["intruders"] == int((cosines.max(1).values < 0.5).sum())


def test_without_base_weights_it_says_what_is_missing_and_how_to_get_it(command, saved):
    code, out, err = command("spectrum", saved[0])
    assert code == 0 and "enrichment" not in out and "self_attn.q_proj" in out
    assert "not compared with W: no base weights are at hand, which says that it was made for tiny" in err
    assert "Name the model by --base" in err
    code, _, err = command("spectrum", saved[0], "--intruders")
    assert code == 2 and "`--intruders` needs the base model's weights" in err


def test_of_a_run_the_base_is_known(command, saved, tiny_folder, write_run, workspace):
    run = write_run([Evaluated(3, 0.5, 99, 0.1), Finished(3, "done", 1)], RunSpec("Mine", model=str(tiny_folder)))
    code, _, err = command("spectrum", run.id)
    assert code == 2 and "has no adapter yet" in err
    saved[1].save(run.adapter_folder)
    code, out, err = command("spectrum", run.id[:15])
    assert (code, err) == (0, "") and "enrichment" in out and "by chance" in out


def test_csv_has_a_line_a_matrix(command, saved, tiny_folder):
    code, out, _ = command("spectrum", saved[0], "--base", tiny_folder, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and [row["path"] for row in rows] == sorted(saved[1].factors)
    assert all(float(row["enrichment"]) > 0 and len(row["sigma"].split()) == 4 for row in rows)


def test_figures_are_written_for_all_that_is_known(command, saved, tiny_folder, tmp_path):
    code, out, _ = command("spectrum", saved[0], "--base", tiny_folder, "--figures", tmp_path / "figures")
    names = {"effective-rank", "norm", "relative-norm", "enrichment", "spectra"}
    expected = {f"{name}.png" for name in names}
    assert code == 0 and {p.name for p in (tmp_path / "figures").iterdir()} == expected == {
        line.rpartition("/")[2] for line in out.splitlines()
    }
    (tmp_path / "file").write_text("")
    code, _, err = command("spectrum", saved[0], "--figures", tmp_path / "file" / "x")
    assert code == 2 and "`--figures`" in err and "must be a folder that can be written" in err


def test_a_matrix_whose_weight_cannot_be_read_is_said_and_the_others_are_shown(
    command, saved, tiny_folder, monkeypatch
):
    from core import LoRAError

    read, lost = models.read_weight, "model.layers.0.self_attn.q_proj"

    def one_is_lost(model, workspace, path):
        if path == lost:
            raise LoRAError("Its file is in pieces.")
        return read(model, workspace, path)

    monkeypatch.setattr(models, "read_weight", one_is_lost)
    code, out, err = command("spectrum", saved[0], "--base", tiny_folder)
    assert code == 0 and err == f"Of 1 matrices, such as {lost}: Its file is in pieces.\n"
    assert out.count("–") == 4


def test_dora_and_what_is_trained_in_full_are_said(command, make, tmp_path, tiny_folder):
    adapter, _ = make(dora=True)
    replace(adapter, trained_in_full={"model.norm.weight": torch.ones(32)}).save(tmp_path / "dora")
    code, out, err = command("spectrum", tmp_path / "dora", "--base", tiny_folder, "--intruders")
    assert code == 0 and "intruders" not in out
    assert "low-rank part, B·A, alone" in err and "its intruders are not counted" in err
    assert "It also trained 1 parameters in full, which have no factors: model.norm.weight" in err


def test_compare_says_what_two_adapters_share(command, saved, make, tmp_path):
    other, _ = make(1, target_modules=("q_proj", "v_proj"))
    other.save(tmp_path / "other")
    code, out, _ = command("compare", saved[0], tmp_path / "other", "--json")
    said = json.loads(out)
    assert code == 0 and said["matrices"].keys() == other.factors.keys() and said["only_second"] == []
    for path, row in said["matrices"].items():
        X, Y = dense(saved[1].factors[path]), dense(other.factors[path])
        squares = (X.square().sum() + Y.square().sum()).item()
        assert row["interference"] == pytest.approx((X + Y).square().sum().item() / squares - 1, abs=1e-9)
        assert row["phi_right_null"] == 4 / X.shape[1] and len(row["left_angles"]) == 4
    assert said["together"]["norms"] == pytest.approx([norm(saved[1]), norm(other)], rel=1e-9)
    code, out, _ = command("compare", saved[0], tmp_path / "other", "--rank", 1)
    assert code == 0 and "interference" in out and "all together" in out and "matrices are in" in out
    code, _, err = command("compare", saved[0], tmp_path / "other", "--rank", 0)
    assert code == 2 and "`--rank` (=0) must be at least 1" in err


@pytest.mark.parametrize("how", [("--energy", 0.8), ("--rank", 2), ("--directions", 5), ("--energy", 0.8, "--pooled")])
def test_truncate_writes_an_adapter_that_is_as_near_as_it_says(command, saved, tmp_path, how):
    from core import distance

    code, out, _ = command("truncate", saved[0], tmp_path / "small", *how, "--json")
    said = json.loads(out)
    small = Adapter.load(tmp_path / "small")
    assert code == 0 and {p: r for p, r in said["ranks"].items() if r} == {p: f.r for p, f in small.factors.items()}
    assert distance(saved[1], small) == pytest.approx(said["relative_error"] * said["norm"], rel=1e-4)
    assert said["num_parameters"] == small.num_parameters < said["num_parameters_before"]
    if "--energy" in how:
        assert said["energy"] >= 0.8
    code, _, err = command("truncate", saved[0], tmp_path / "small", *how)
    assert code == 2 and "must not hold an adapter already" in err
    code, out, _ = command("truncate", saved[0], tmp_path / "again", *how)
    assert code == 0 and "of ‖ΔW‖²; the error is" in out


@pytest.mark.parametrize("name", ["nowhere/at-all", "none.bin", "no-such-run"])
def test_an_adapter_that_does_not_exist_is_refused(command, name):
    code, _, err = command("spectrum", name)
    assert code == 2 and ("must be a run, or a folder or file that exists" in err or "the id of one run" in err)


def test_what_takes_long_says_how_far_it_is(monkeypatch, capsys):
    now = iter([0.0, 0.5, 1.6, 1.6, 2.0])
    monkeypatch.setattr(analysis.time, "monotonic", lambda: next(now))
    assert list(analysis.told("abc", 3, "Doing it")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "Doing it: 2 of 3 …\n"


def test_a_loralib_file_needs_its_scaling(command, saved, tmp_path):
    f = next(iter(saved[1].factors.values()))
    torch.save({"encoder.query.lora_A": f.A, "encoder.query.lora_B": f.B}, tmp_path / "old.bin")
    code, _, err = command("spectrum", tmp_path / "old.bin")
    assert code == 2 and "`scaling` (=None) must be given" in err
    code, out, _ = command("spectrum", tmp_path / "old.bin", "--scaling", 3, "--json")
    (row,) = json.loads(out)["matrices"].values()
    assert code == 0 and row["norm"] == pytest.approx(3 * (f.B.double() @ f.A.double()).norm().item(), rel=1e-9)


def test_a_run_is_found_by_how_it_begins(workspace):
    runs = Runs(workspace)
    run = runs.create(RunSpec("One"))
    assert runs.find(run.id[:10]) is run


def test_layers_are_listed_by_their_numbers():
    paths = ["layers.10.q", "layers.2.q", "layers.2.k", "head", "layers.2.experts.1", "layers.2.experts.0"]
    expected = ["head", "layers.2.experts.0", "layers.2.experts.1", "layers.2.k", "layers.2.q", "layers.10.q"]
    assert sorted(paths, key=analysis.in_order) == expected
