"""A run with an adapter in Spectrum."""

import json
import re
import shutil

import gradio as gr
import pytest

from core import (
    Adapter,
    LoRAError,
    SpectrumMeasured,
    amplification,
)
from studio import models
from studio.event_log import EventWriter
from studio.opened import Source
from tests.studio.page.pages import STARTED, handler, update


def test_the_spectrum_tab_shows_the_adapter_s_own_numbers(page, trained, studio, tiny_folder):
    adapter = Adapter.load(trained.adapter_folder)
    loudest = max(adapter.factors, key=lambda path: float(adapter.factors[path].delta_weight().norm()))
    _, place, said, module = handler(page, "follow")(trained.id, "", None, None)
    assert place == studio.place_of(Source(trained.id)) and "Looking at “Inns”" in said
    assert (update(module)["choices"], update(module)["value"]) == (list(adapter.factors), loudest)
    view = handler(page, "see")(place, loudest)
    facts, heat, *_ = list(handler(page, "show", "heat")(place, "Size ‖ΔW‖"))[-1]
    assert loudest in facts and "<svg" in heat
    ((bars, about),) = handler(page, "show_bars")(view, "log")
    assert "<svg" in bars and "Effective rank" in about
    weight = models.load_model(str(tiny_folder), studio.workspace).get_submodule(loudest).weight
    expected = amplification(adapter.factors[loudest], weight.detach())
    (table, *_), (_, aligned, noise) = handler(page, "show_weight")(view)
    assert f"<td>{expected.projected_norm:.3f}</td>" in table
    assert "<svg" in aligned and "edge of noise" in noise


def test_the_spectrum_tab_without_an_adapter_says_what_to_do(page, write_run):
    for run in ("", write_run([STARTED]).id):
        _, place, said, _ = handler(page, "follow")(run, "", None, None)
        assert place is None and "Train one" in said and handler(page, "see")(None, "x") is None


def test_rank_surgery_counts_saves_and_asks_what_is_left_of_the_adapter(page, trained, studio):
    view = (*studio.place_of(Source(trained.id)), next(iter(Adapter.load(trained.adapter_folder).factors)))
    cut = ("rank", 1, 90, False, [])
    assert "4 of 8" in next(handler(page, "show_cut")(view, *cut))
    assert "adapters/less" in handler(page, "keep")(view, "less", *cut)
    less = Adapter.load(studio.workspace.root / "adapters" / "less")
    assert {f.r for f in less.factors.values()} == {1} and less.base_model == trained.spec.model
    *_, (before, after) = handler(page, "both")(view, "name[Inn 3]", *cut)
    assert before and after and before != after
    with pytest.raises(gr.Error, match="at least one curve"):
        next(handler(page, "measure_many")(view, []))


def test_the_time_machine_goes_back_to_a_checkpoint_and_says_where_there_is_none(page, trained, studio):
    path = next(iter(Adapter.load(trained.adapter_folder).factors))
    place = studio.place_of(Source(trained.id))
    said, *_ = next(handler(page, "show_course")((*place, path)))
    assert "was not measured" in said
    writer = EventWriter(trained.log)
    for number in (1, 2):
        writer.write(SpectrumMeasured(number, {path: [0.5 * number, 0.25]}))
    writer.close()
    shutil.copytree(trained.adapter_folder, trained.checkpoints.at(2))
    (trained.checkpoints.at(2) / "training.safetensors").touch()
    said, plot, _, last = next(handler(page, "show_course")((*place, path)))
    assert said == "" and "<svg" in plot and last == 1
    facts, bars, _ = next(handler(page, "show_step")((*place, path), 0))
    assert "steps with all factors: 2" in facts and "After step 1" in bars
    with pytest.raises(gr.Error, match="Step 1 has no checkpoint any more"):
        list(handler(page, "answer_then")(place, 0, "name[Inn 3]"))
    loading, *_, answer = handler(page, "answer_then")(place, 1, "name[Inn 3]")
    assert "step 2" in loading and answer


def test_what_needs_w_says_how_far_it_is_and_then_shows_it(page, trained, studio, monkeypatch):
    place = studio.place_of(Source(trained.id))
    *_, (_, heat, problem, cancel) = handler(page, "show", "heat")(place, "Enrichment")
    assert "chance: 1" in heat and problem == "" and update(cancel)["visible"] is False
    monkeypatch.setattr(studio, "weight", lambda *_: (_ for _ in ()).throw(LoRAError("W is in pieces.")))
    studio._kept.clear()
    *_, (_, heat, problem, _) = handler(page, "show", "heat")(place, "Size beside W")
    assert "No value is a finite number" in heat and "W is in pieces." in problem


def test_directions_are_shown_in_words_where_they_have_some(page, trained, studio):
    place = studio.place_of(Source(trained.id))
    ((reads, writes),) = handler(page, "show_words")((*place, "model.layers.0.self_attn.q_proj"), 2)
    assert reads.count("<h4>") == 2 and "not the residual stream" in writes


def test_a_cell_of_the_map_opens_its_matrix(page):
    path, sections = handler(page, "open_matrix", "sections")(gr.EventData(None, {"name": "model.x"}))
    assert path == "model.x" and update(sections)["selected"] == "matrix"


def test_two_runs_are_compared_and_their_seeds_told(page, trained, studio):
    folder = trained.folder.with_name("20990101-000000-twin-0000")
    shutil.copytree(trained.folder, folder)
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps(spec | {"name": "Twin", "train": spec["train"] | {"seed": 7}}))
    place = studio.place_of(Source(trained.id))
    ((others,),) = [[o] for o in handler(page, "list_others")(place, (), None)]
    word = f"run:{folder.name}"
    assert word in [value for _, value in update(others)["choices"]]
    view = (*place, next(iter(Adapter.load(folder / "adapter").factors)))
    ((told, phi, seeds, heat),) = handler(page, "compare")(view, (), word, "A-right", "Cosine")
    assert "Twin" in told and "1.000" in told, "the same adapter under another name"
    assert "step 0" in phi and "Their seeds differ (0, 7)" in seeds and "<svg" in heat
    with pytest.raises(gr.Error, match=r"`basis` \(=&#x27;C&#x27;\) must be one of"):
        list(handler(page, "compare")(view, (), word, "C", "Cosine"))
    with pytest.raises(gr.Error, match=r"`other` \(=&#x27;file:3&#x27;\) must be one of the adapters listed"):
        list(handler(page, "compare")(view, (), "file:3", "A-right", "Cosine"))
    ((alone, *_),) = handler(page, "compare")(view, (), None, "A-right", "Cosine")
    assert "Nothing to compare with yet" in alone


def test_intruders_are_shown_with_the_level_of_chance(page, trained, studio):
    path = "model.layers.0.self_attn.q_proj"
    *_, (facts, picture) = handler(page, "show_intruders")((*studio.place_of(Source(trained.id)), path), 6, 0.9)
    assert "of 6" in facts and "by chance" in facts and "<svg" in picture


@pytest.mark.slow
def test_damping_is_measured_in_a_process_apart(page, trained, studio):
    view = (*studio.place_of(Source(trained.id)), "model.layers.0.self_attn.q_proj")
    said = list(handler(page, "weigh")(view, 6, 0.95, "the matrix chosen above", 0.5, None))
    going, picture, points, measure, cancel = said[-1]
    assert sorted(points["measured"]) == [0.5, 1.0] and "<svg" in picture and "held-out rows" in going
    assert update(measure)["interactive"] and not update(cancel)["interactive"]
    ((none, *_),) = list(handler(page, "weigh")(view, 6, 0.05, "the matrix chosen above", 0.5, points))[-1:]
    assert "nothing can be damped" in none


def test_pictures_are_handed_out_and_what_is_gone_is_said(page, trained, studio):
    view = (*studio.place_of(Source(trained.id)), "model.layers.0.self_attn.q_proj")
    ((bars, _),) = handler(page, "show_bars")(view, "log")
    (place,) = (b for b in page.blocks.values() if b.elem_id == "sigma")
    key = re.search(r'data-key="(\w+)"', bars)[1]
    assert place.hand_out({"key": key, "kind": "svg"})["mime"] == "image/svg+xml"
    assert "older one" in place.hand_out({"key": "none", "kind": "svg"})["problem"]


def test_an_adapter_from_files_is_left_for_another_run_but_not_by_leaving_the_tab(page, trained, write_run, studio):
    elsewhere = studio.place_of(Source(path=str(trained.adapter_folder)))
    follow = handler(page, "follow")
    assert follow(trained.id, trained.id, elsewhere, None)[1] == elsewhere
    assert follow(trained.id, write_run([STARTED]).id, elsewhere, None)[1] == studio.place_of(Source(trained.id))
