"""The paper's experiments: pieces that are kept, what is told of them, and the process that does them."""

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core import Evaluated, Failed, Finished, LoRAError
from studio.__main__ import main
from studio.experiments import conduct as conducting
from studio.experiments.base import Asked, Experiment, Found, Piece, Result, Table
from studio.experiments.conduct import Conduct, named, start
from studio.experiments.registry import EXPERIMENTS
from studio.experiments.runs import held_out, run_of
from studio.runs import Runs
from studio.specs import RunSpec
from studio.tabs import experiments as tab
from studio.workspace import Workspace
from tests.studio import labelled_models

Record = dict[str, Any]


def evaluated(step: int, loss: float, **metrics: float) -> Evaluated:
    return Evaluated(step, loss, 100, 1.0, metrics=metrics)


def loss_record(loss: float, **more: Any) -> Record:
    return {"r": 4, "loss": loss, "last_loss": loss, "trainable": 1000, "seconds": 1.0, "memory": 1e9, **more}


def similarity(one: float, q: float, v: float) -> Record:
    def panels(value: float) -> dict[str, list[list[float]]]:
        panels = {"trained": value, "step 0": value, "chance": 0.1}
        return {name: np.full((2, 3), share).tolist() for name, share in panels.items()}

    def kind(seeds: float) -> Record:
        return {"path": "layers.1.q_proj", "ranks": panels(one), "seeds": panels(seeds), "first": [0.1, 0.2]}

    return {"q_proj": kind(q), "v_proj": kind(v)}


def table_7(enrichment: float) -> Record:
    def column(value: float) -> Record:
        named = {"projected": 0.3, "factor": 2.0, "delta": 0.6, "weight": 9.0, "null_factor": 3.0}
        return named | {"enrichment": value}

    layer = {"delta": column(enrichment), "weight": column(9.0), "random": column(1.0)}
    layers = {"layers.0.q_proj": {}, "layers.1.q_proj": layer, "layers.2.q_proj": layer}
    middles = {f"middle {r}": "layers.1.q_proj" for r in (4, 64)}
    return {"4": layers, "64": layers, **middles}


def latency(merged: float) -> Record:
    over = {"base": 0.0, "LoRA merged": merged, "LoRA unmerged": 0.2, "Adapter_L": 0.05, "Adapter_H": 0.1}
    return {"ms": dict.fromkeys(over, 12.0), "over": over}


COST = {"parameters": 1e8, "trained": 300_000, "adapter_bytes": 1_200_000, "lora_bytes": 2e9, "full_bytes": 6e9}
COST |= {"weight_bytes": 4e8}
SCORES = {"NIST": 5.0, "METEOR": 0.4, "ROUGE-L": 0.6, "CIDEr": 2.0}

Make = Callable[[str], Record]
CASES: Mapping[str, tuple[tuple[Make, str], ...]] = {
    "labels": (
        (lambda key: loss_record(1.0, accuracy=0.9 if "LoRA" in key else 0.5), r"LoRA is \+40.0 .*, as in the paper"),
        (lambda key: loss_record(1.0, accuracy=0.1 if "LoRA" in key else 0.5), "LoRA is -40.0 .*; in the paper's mean"),
        (lambda key: loss_record(1.0, accuracy=0.5), "On Topics no method is two standard deviations above the head"),
    ),
    "data-to-text": (
        (lambda key: loss_record(1.0, BLEU=0.6 if key == "LoRA" else 0.3, **SCORES), "LoRA, 60.0, as in the paper"),
        (lambda key: loss_record(1.0, BLEU=0.6 if key == "PreLayer" else 0.3, **SCORES), "60.0; the paper's is LoRA's"),
    ),
    "matrices": (
        (
            lambda key: loss_record({"q, v": 1.0, "q": 2.0, "k": 2.1}.get(key.split(" ·")[0], 1.5)),
            r"W_q, v, as in the paper.*W_q \(2.0000\) and W_k \(2.1000\), as in the paper",
        ),
        (
            lambda key: loss_record({"q": 1.0, "k": 1.1}.get(key.split(" ·")[0], 1.5)),
            "Lowest loss: W_q; the paper's best.*; on the paper's WikiSQL they are W_q and W_k",
        ),
    ),
    "ranks": (
        (lambda key: loss_record(2 - int(key.rpartition(" ")[2]) / 64), "the loss changes by -0.9844"),
        (lambda key: loss_record(2 + int(key.rpartition(" ")[2]) / 64), r"the loss changes by \+0.9844"),
    ),
    "subspaces": (
        (lambda key: similarity(0.7, 0.6, 0.5), "= 0.70, as in the paper.*W_q's more, as in the paper"),
        (lambda key: similarity(0.2, 0.4, 0.5), "= 0.20; the paper has.*; the paper finds more in W_q"),
        (lambda key: similarity(0.7, 0.11, 0.1), "no more than chance, 0.1"),
    ),
    "amplification": (
        (lambda key: table_7(2.0), "more of W than random ones in 2 of 2 layers, at the median 2.00"),
        (lambda key: table_7(0.5), "more of W than random ones in 0 of 2 layers, at the median 0.50"),
    ),
    "latency": (
        (lambda key: latency(0.01), "within 1.0% of the base's, as in the paper"),
        (lambda key: latency(-0.2), "within 20.0% of the base's; it is the same matrices"),
    ),
    "low-data": (
        (lambda key: loss_record(1.0 if "LoRA" in key else 2.0), "LoRA is ahead of both"),
        (lambda key: loss_record(2.0 if "LoRA" in key else 1.0), "LoRA is not ahead of both"),
    ),
    "costs": (
        (lambda key: COST, "6.0 GB in full and 2.0 GB with LoRA.*667 times smaller"),
        (lambda key: COST | {"full_bytes": 3e9}, "3.0 GB in full and 2.0 GB with LoRA"),
    ),
}
"""Experiment → what its pieces find, and what is then said, when the paper is right and when it is not."""


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    return labelled_models.save_encoder(tmp_path_factory.mktemp("encoder"), max_position_embeddings=130)


@pytest.fixture
def ask(tiny_folder, encoder_folder) -> Callable[..., Asked]:
    """ask(name, size): an experiment with a tiny model."""

    def of(name: str, size: str = "small") -> Asked:
        models = {"labels": str(encoder_folder), "latency": "", "costs": ""}
        return Asked(name, size, models.get(name, str(tiny_folder)))  # type: ignore[arg-type]

    return of


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_told_follows_the_numbers_whichever_way_they_fall(name, workspace, ask):
    asked = ask(name)
    keys = [piece.key for piece in EXPERIMENTS[name].pieces(asked, workspace)]
    for make, wanted in CASES[name]:
        result = EXPERIMENTS[name].tell(asked, {key: make(key) for key in keys})
        assert re.search(wanted, " ".join(result.findings)), result.findings


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_can_be_told_and_drawn_with_nothing_with_some_and_with_all_pieces_done(name, workspace, ask):
    asked = ask(name)
    keys = [piece.key for piece in EXPERIMENTS[name].pieces(asked, workspace)]
    assert len(set(keys)) == len(keys)
    for done in (0, 1, len(keys)):
        result = EXPERIMENTS[name].tell(asked, {key: CASES[name][0][0](key) for key in keys[:done]})
        for table in result.tables:
            assert {len(row) for row in table.rows} <= {len(table.head)}
        assert done or result.figure is None
        if done == len(keys):
            assert result.figure is not None
            assert result.figure().get_size_inches()[0] > 1


@pytest.fixture
def two(monkeypatch, workspace) -> tuple[Conduct, list[str]]:
    """An experiment of two pieces that train nothing, and the keys of the pieces that were measured."""
    measured: list[str] = []

    def measure(key: str) -> Callable[[Found], Record]:
        def done(found: Found) -> Record:
            measured.append(key)
            return {"value": len(measured)}

        return done

    def pieces(asked: Asked, workspace: Workspace) -> list[Piece]:
        return [Piece(key, measure(key), settings={"size": asked.size}) for key in ("a | b", "c")]

    def tell(asked: Asked, records: Mapping[str, Record]) -> Result:
        return Result([Table("Found", ["Key", "Value"], [[k, str(r["value"])] for k, r in records.items()])])

    made = Experiment("two", "<i>Two</i>", "Table 0", "Is it?", "all of it.", pieces, tell)
    monkeypatch.setitem(EXPERIMENTS, "two", made)
    return Conduct(workspace, Asked("two", "tiny")), measured


def test_a_piece_that_is_done_is_not_done_again_unless_its_file_is_damaged_or_its_settings_have_changed(two, workspace):
    conduct, measured = two
    assert [line["note"] for line in conduct.go()] == ["a | b", "c"]
    assert [*conduct.go()] == [] and measured == ["a | b", "c"]
    files = sorted((conduct.folder / "pieces").iterdir())
    for damage in (
        "{",
        "[]",
        '{"digest": "another", "found": {}}',
        json.dumps({"digest": conduct.pieces()[0].digest, "found": 3}),
    ):
        files[0].write_text(damage)
        assert [*conduct.records(conduct.pieces())] == ["c"]
    [line] = conduct.go()
    assert (line["note"], line["done"], line["of"]) == ("a | b", 0, 2) and measured[2:] == ["a | b"]
    assert len([*Conduct(workspace, replace(conduct.wanted, size="small")).go()]) == 2


def test_the_result_says_how_much_is_done_and_keeps_its_table_whole(two):
    conduct, _ = two
    pieces = conduct.pieces()
    assert "0 of 2 pieces are done." in conduct.markdown()
    list(conduct.go())
    text = (conduct.folder / "result.md").read_text()
    assert "pieces are done" not in text and "| a \\| b | 1 |" in text and "all of it." in text
    assert conduct.result()[1:] == (2, len(pieces))
    conduct.clear()
    assert not (conduct.folder / "result.md").exists() and conduct.result()[1] == 2


def fill(conduct: Conduct) -> None:
    """Leaves the experiment as it is when all its pieces are done."""
    (conduct.folder / "pieces").mkdir(parents=True)
    for piece in conduct.pieces():
        found = CASES[conduct.wanted.name][0][0](piece.key)
        conduct._file(piece).write_text(json.dumps({"digest": piece.digest, "found": found}))


@pytest.mark.slow
def test_the_paper_s_counts_come_from_the_shapes_alone(workspace):
    conduct = Conduct(workspace, Asked("costs", "tiny"))
    list(conduct.go())
    assert conduct.records(conduct.pieces())["RoBERTa base"]["trained"] == 294_912  # science.md, 1.6


def test_its_figure_lies_beside_the_result_and_is_shown_in_it(workspace):
    conduct = Conduct(workspace, Asked("costs", "tiny"))
    fill(conduct)
    assert [*conduct.go()] == []
    assert (conduct.folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (conduct.folder / "figure.svg").read_bytes()
    text = (conduct.folder / "result.md").read_text()
    assert "(figure.svg)" in text and "| 300,000 | 0.30 M |" in text


def test_a_record_counts_as_long_as_the_run_that_it_names_is_there(two, write_run, monkeypatch):
    conduct, _ = two
    run = write_run([Finished(1, "done", 1)])
    piece = Piece("c", lambda found: {"run": run.id, "value": 1})
    monkeypatch.setitem(EXPERIMENTS, "two", replace(conduct.experiment, pieces=lambda asked, workspace: [piece]))
    list(conduct.go())
    assert conduct.record(piece) == {"run": run.id, "value": 1}
    Runs(conduct.workspace).delete(run)
    assert conduct.record(piece) is None


def test_the_run_of_a_spec_is_the_finished_one_whatever_its_name_and_a_damaged_run_is_passed_over(write_run, workspace):
    spec = RunSpec("Wanted")
    done = write_run([Finished(6, "done", 1)], spec)
    write_run([Finished(2, "stopped", 1)], spec)
    write_run().spec_file.write_text("{")
    for name in ("Wanted", "By another experiment"):
        found = run_of(Runs(workspace), replace(spec, name=name))
        assert found is not None and found.id == done.id
    assert run_of(Runs(workspace), replace(spec, model="another")) is None


def test_the_lowest_loss_and_the_scores_of_the_best_step_are_read_off_a_run(write_run, workspace):
    run = write_run([evaluated(0, 3.0), evaluated(2, 1.0, BLEU=0.5), evaluated(4, 2.0, BLEU=0.1)])
    found = held_out(Found(workspace, run))
    assert (found["loss"], found["last_loss"], found["base_loss"], found["BLEU"]) == (1.0, 2.0, 3.0, 0.5)


def test_what_cannot_be_done_is_said_before_anything_starts(workspace, write_run, tiny_folder, encoder_folder):
    with pytest.raises(LoRAError, match="`size` .*must be one of tiny, small, paper"):
        Asked("costs", "huge")  # type: ignore[arg-type]
    with pytest.raises(LoRAError, match="`experiment` .*must be one of labels, data-to-text"):
        start(workspace, Asked("nothing"))
    with pytest.raises(LoRAError, match="must be a folder of GLUE's"):
        start(workspace, Asked("labels", data=str(tiny_folder)))
    with pytest.raises(LoRAError, match="must have matrices named q_proj, k_proj, v_proj, o_proj"):
        start(workspace, Asked("matrices", model=str(encoder_folder)))
    assert not (workspace.root / "experiments").exists()
    with pytest.raises(LoRAError, match="measured no held-out loss"):
        held_out(Found(workspace, write_run([Finished(1, "done", 1)])))


def test_a_run_that_was_deleted_between_two_pieces_is_named(workspace, ask):
    *_, last = named("subspaces").pieces(ask("subspaces", "tiny"), workspace)
    with pytest.raises(LoRAError, match="The run “subspaces, tiny: .*” was deleted; start the experiment again"):
        last.measure(Found(workspace, None))


def test_an_experiment_whose_run_failed_says_why(workspace, write_run, ask, monkeypatch):
    asked = ask("ranks", "tiny")
    conduct = Conduct(workspace, asked)
    run = write_run([Failed("It has no rows.")], conduct.pieces()[0].spec)
    resumed = []
    monkeypatch.setattr(conducting.jobs, "resume", lambda runs, run: resumed.append(run.id))
    with pytest.raises(LoRAError, match="did not finish: It has no rows. Start the experiment again to go on"):
        list(conduct.go())
    assert resumed == [run.id]


def test_the_command_lists_all_and_shows_what_was_found_without_starting_anything(workspace, capsys):
    home = ["--workspace", str(workspace.root)]
    assert main(["experiment", *home]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [*EXPERIMENTS] and "Table 2" in listed[0]
    assert main(["experiment", *home, "costs", "--size", "tiny", "--show"]) == 0
    assert "0 of 1 pieces are done." in capsys.readouterr().out
    fill(Conduct(workspace, Asked("costs", "tiny")))
    assert main(["experiment", *home, "costs", "--size", "tiny", "--show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["RoBERTa base"]["trained"] == 300_000
    assert not Conduct(workspace, Asked("costs", "tiny")).lines()
    assert main(["experiment", *home, "nothing", "--show"]) == 2
    assert "must be one of" in capsys.readouterr().err


def test_the_page_teaches_when_nothing_is_done_and_escapes_what_it_shows(two):
    conduct, _ = two
    empty = tab.look(conduct)
    assert "it has 2 pieces" in empty.result and "Start" in empty.result and not empty.markdown and not empty.status
    list(conduct.go())
    conduct.folder.joinpath("job.json").write_text("{}")
    conduct.say({"end": "failed", "problem": "<script>"})
    seen = tab.look(conduct)
    assert "&lt;script&gt;" in seen.about and "<script>" not in seen.about
    assert "<td>a | b</td>" in seen.result and "All of it." in seen.result and seen.status == "failed"
    table = Table("<b>", ["<i>"], [["<u>"]])
    assert not re.search("<[biu]>", tab.table(table))


def test_the_page_shows_progress_by_pieces_while_it_goes_on(two):
    import fcntl

    conduct, _ = two
    next(iter(conduct.go()))
    (conduct.folder / "job.json").write_text("{}")
    conduct.say({"note": "a | b", "done": 0, "of": 2})
    with (conduct.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        seen = tab.look(conduct)
        assert seen.status == "running" and "0 of 2 pieces are done" in seen.about and "a | b …" in seen.about
        before = tab.mark(conduct)
        conduct.say({"note": "c", "done": 1, "of": 2})
        assert tab.mark(conduct) != before


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_shown_with_its_figure(name, workspace, ask):
    e = EXPERIMENTS[name]
    asked = ask(name, "tiny")
    records = {piece.key: CASES[name][0][0](piece.key) for piece in e.pieces(asked, workspace)}
    shown = tab.told(e, e.tell(asked, records))
    assert "<svg" in shown and "<table" in shown and "What differs from the paper" in shown


def until(condition: Callable[[], Any], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def wide_folder(tiny_folder, tmp_path):
    """The tiny model with matrices of 64 rows and more, so that r = 64 fits them."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_folder, hidden_size=128, head_dim=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.slow
def test_cancelled_in_the_middle_it_pauses_its_run_and_goes_on_from_there_to_the_end(workspace, wide_folder):
    asked = Asked("subspaces", "tiny", str(wide_folder))
    conduct, runs = start(workspace, asked), Runs(workspace)
    first, second, *_ = conduct.pieces()
    assert first.spec is not None and second.spec is not None
    wanted = second.spec
    with pytest.raises(LoRAError, match="This experiment is going on already; watch it, or cancel it first"):
        start(workspace, asked)
    until(lambda: (run := run_of(runs, wanted)) is not None and run.is_running())
    conduct.cancel()
    assert conduct.status == "cancelled"
    until(lambda: (run := run_of(runs, wanted)) is not None and not run.is_running())
    stopped = run_of(runs, wanted)
    assert stopped is not None and stopped.status == "paused"
    kept = {file.name: file.stat().st_mtime_ns for file in (conduct.folder / "pieces").iterdir()}
    assert len(kept) == 1

    start(workspace, asked)
    until(lambda: not conduct.is_running())
    assert conduct.status == "done", conduct.lines()
    after = {file.name: file.stat().st_mtime_ns for file in (conduct.folder / "pieces").iterdir()}
    assert kept.items() <= after.items() and len(after) == 4
    assert sorted(run.status for run in runs.list()) == ["finished"] * 3  # the paused one was taken up, not made anew
    found = conduct.records(conduct.pieces())["similarity"]["q_proj"]
    assert np.shape(found["ranks"]["trained"]) == (8, 64) and np.shape(found["seeds"]["step 0"]) == (64, 64)
    assert len(found["first"]) == 2 and 0 <= found["first"][0] <= 1
    assert "(figure.svg)" in (conduct.folder / "result.md").read_text() and (conduct.folder / "figure.png").is_file()


@pytest.mark.slow
def test_the_runs_of_labels_are_found_again_with_the_head_that_starting_them_adds(workspace, ask):
    asked = ask("labels", "tiny")
    conduct = Conduct(workspace, asked)
    whole = conduct.experiment.pieces
    first = replace(conduct.experiment, pieces=lambda asked, workspace: whole(asked, workspace)[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXPERIMENTS, "labels", first)
        list(conduct.go())
        [piece] = conduct.pieces()
        conduct._file(piece).unlink()
        list(conduct.go())
        record = conduct.record(piece)
    assert record is not None and 0 <= record["accuracy"] <= 1
    assert len(Runs(workspace).list()) == 1


@pytest.mark.slow
def test_the_command_follows_an_experiment_to_its_end(workspace, capsys):
    command = ["experiment", "--workspace", str(workspace.root), "latency", "--size", "tiny"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "1 of 1: 1 × 32, bottleneck 16 and 8 …" in err
    assert "Merged, LoRA's time is within" in out and "pieces are done" not in out


def test_of_glue_s_folder_the_sentence_and_the_label_are_trained_though_cola_names_no_columns(
    tmp_path, workspace, encoder_folder
):
    (tmp_path / "CoLA").mkdir()
    for name in ("train", "dev"):
        rows = (f"gj04\t{1 - i % 2}\t{'*' if i % 2 else ''}\tThe cat sat {i}.\n" for i in range(12))
        (tmp_path / "CoLA" / f"{name}.tsv").write_text("".join(rows))
    pieces = named("labels").pieces(Asked("labels", "tiny", str(encoder_folder), str(tmp_path)), workspace)
    spec = pieces[0].spec
    assert spec is not None
    assert (spec.data.prompt, spec.data.completion, spec.data.labels) == ("col4", "col2", ("0", "1"))
    assert spec.data.metric == "matthews" and spec.data.eval_source.endswith("dev.tsv")
