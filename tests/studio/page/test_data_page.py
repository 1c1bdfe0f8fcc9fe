"""Data and Model, as the page wires them."""

import html
import json

import gradio as gr
import pytest

from core import (
    LoRAConfig,
    plan,
)
from studio.data import DataSpec
from tests.studio.page.pages import events, handler, update


def test_a_file_is_read_guessed_and_previewed(page, tmp_path, tiny_folder):
    path = tmp_path / "quiz.csv"
    path.write_text("number,question,answer\n" + "".join(f"{i},Why {i}?,Because <{i}>.\n" for i in range(24)))
    source, summary, note, task, labels, layout, *rest = events(page, "read")[0].fn(str(path), str(tiny_folder))
    assert (source, layout["value"]) == (str(path), "pair")
    assert (note, task, labels["visible"]) == ("", "causal", False)
    assert "24 rows, columns number, question, answer." in summary
    assert [c["value"] for c in rest[:5]] == ["question", "(none)", "answer", "(none)", "(none)"]
    assert rest[-1]["headers"] == ["number", "question", "answer"]
    assert rest[-1]["data"][1] == ["1", "Why 1?", "Because <1>."] and len(rest[-1]["data"]) == 20


def test_a_file_that_cannot_be_read_is_one_sentence(page, tmp_path, tiny_folder):
    (tmp_path / "empty.csv").write_text("")
    read = events(page, "read")[0].fn
    with pytest.raises(gr.Error, match=r"`empty\.csv` is empty \(0 bytes\)"):
        read(str(tmp_path / "empty.csv"), str(tiny_folder))


@pytest.fixture
def row_values(page, tiny_folder, tiny_data):
    """What the inputs of `show_row` hold, by place, when the tiny data set is chosen."""
    event = events(page, "show_row")[0]
    values = [c.value for c in event.inputs]
    names = [c.elem_id or type(c).__name__ for c in event.inputs]
    values[0], values[names.index("State", 1)] = str(tiny_folder), tiny_data.source
    values[names.index("column-prompt")], values[names.index("column-completion")] = "facts", "text"
    return dict(zip([f"{i} {name}" for i, name in enumerate(names)], values, strict=True))


def test_a_row_is_shown_as_the_model_sees_it_with_the_trained_tokens_marked(page, row_values):
    marked, facts = handler(page, "show_row")(*row_values.values())
    assert "".join(text for text, _ in marked) == (
        "<|im_start|>user\nname[Inn 0], stars[0]<|im_end|>\n<|im_start|>assistant\nInn 0 has 0 stars.<|im_end|>\n"
    )
    trained = [text for text, mark in marked if mark == "trained"]
    assert "".join(trained) == "Inn 0 has 0 stars.<|im_end|>"
    assert f"{len(marked)} tokens, {len(trained)} of them trained." in facts


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"setting-max_length": 8}, "its answer begins at token"),
        ({"setting-max_length": None}, "`max_length` (=None) must be a whole number."),
        ({"column-completion": "answer"}, "`completion` (='answer') must be a column of inns.jsonl"),
    ],
)
def test_a_row_that_cannot_be_shown_is_said_in_its_place(changes, sentence, page, row_values):
    for name, value in changes.items():
        (key,) = [k for k in row_values if k.endswith(f" {name}")]
        row_values[key] = value
    marked, words = handler(page, "show_row")(*row_values.values())
    assert marked is None and 'class="said error"' in words and sentence in html.unescape(words)


@pytest.fixture
def survey(page, row_values):
    """survey(name=value): looks at all rows; returns id -> what each component shows at the end."""
    (event,) = {e.fn: e for e in events(page, "survey")}.values()

    def press(**changes) -> dict:
        by_name = {key.partition(" ")[2]: value for key, value in row_values.items()}
        values = [
            changes.get((c.elem_id or "").replace("-", "_"), by_name.get(c.elem_id or "", c.value))
            for c in event.inputs
        ]
        values[0], values[3] = row_values["0 State"], next(v for k, v in row_values.items() if k.endswith("3 State"))
        *_, last = event.fn(*values)
        return {c.elem_id or "look": value for c, value in zip(event.outputs, last, strict=True)}

    return press


def test_checking_all_rows_with_an_emptied_length_names_it(survey):
    with pytest.raises(gr.Error, match="max_length"):
        survey(setting_max_length=None)


def test_checking_all_rows_reports_them_and_draws_their_lengths(survey):
    shown = survey()
    assert "24 rows: 22 to train on, 2 held out." in shown["verdict"]
    assert "<svg" in shown["lengths"] and "24 rows, median" in shown["lengths"]
    assert "&lt;|im_end|&gt;: 24 of 24" in shown["cut-facts"]
    assert update(shown["checks"])["visible"] is False, "nothing was found"


def test_a_check_s_rows_are_listed_with_their_place_in_the_file_and_why(survey):
    found = update(survey(setting_max_length=10)["checks"])["choices"]
    assert [title for _, title in found][0] == "Answer begins beyond the cut-off"
    shown = survey(setting_max_length=10, checks="Answer begins beyond the cut-off")
    assert "24 rows of inns.jsonl cannot be used" in shown["verdict"] or "No row of inns.jsonl" in shown["verdict"]
    first = update(shown["found"])["value"]["data"][0]
    assert first[:2] == ["1", "inns.jsonl, line 1"]
    assert first[2].startswith("its answer begins at token")


def test_a_look_at_a_model_offers_the_matrices_that_it_has(page, studio, tiny_folder):
    look_at = events(page, "look_at")[0].fn
    model, facts, preset, names, pattern, cells = look_at("Folder", f"  {tiny_folder} ")
    assert model == str(tiny_folder) and "2 × 32" in facts
    assert pattern == "", "a pattern for another model does not stay"
    drawn = json.loads(update(cells)["layout"])
    assert drawn["model"] == model and len(drawn["cells"]) == 16
    titles = update(preset)["choices"]
    assert titles == ["Query and value (the paper)", "All attention", "All linear", "My own choice"]
    offered = update(names)["choices"]
    assert ("self_attn.k_proj · 16 × 32 · 2×", "self_attn.k_proj") in offered
    take = handler(page, "take_preset")
    skeleton = studio.skeleton(model)
    for title, count in (("Query and value (the paper)", 4), ("All attention", 8), ("All linear", 14)):
        chosen, *cleared = take(model, title)
        assert cleared == ["", "", ""], "a preset goes before a pattern, exceptions and layers"
        assert len(plan(skeleton, LoRAConfig(target_modules=tuple(chosen))).targets) == count
        assert set(chosen) <= {name for _, name in offered}
    with pytest.raises(gr.Error, match="`Folder` must not be empty; write one, or take the starter"):
        look_at("Folder", " ")
    with pytest.raises(gr.Error, match=r"`model` \(=.*/no/such"):
        look_at("Folder", "/no/such")


def test_reading_from_the_hub_without_a_name_says_how_it_looks(page):
    (press,) = [
        e.fn for e in page.fns.values() if [c.label for c in e.inputs][:1] == ["Hub id"] and len(e.outputs) > 10
    ]
    with pytest.raises(gr.Error, match="must look like hub:owner/name"):
        press("", "starter")


def test_data_specs_of_the_page_begin_as_declared(page):
    (event,) = events(page, "begin")
    by_id = {c.elem_id: c.value for c in event.inputs if c.elem_id}
    for name in ("template", "train_on", "eval_fraction", "max_eval_rows"):
        assert by_id[f"setting-{name}"] == getattr(DataSpec(), name)
