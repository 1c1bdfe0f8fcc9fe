"""A run with an adapter in Chat, and in Runs."""

import csv
import dataclasses
import html
import io
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import gradio as gr
import pytest
import torch

from core import (
    Adapter,
)
from studio import capsule, models
from studio.conversation import Conversation, prompt
from studio.data import prompt_ids
from studio.opened import Source
from studio.specs import RunSpec
from studio.tabs import chat as chat_tab
from studio.tabs import prompt_list
from tests.studio.page.pages import STARTED, events, handler, update


def pane_values(*kinds: str, run: str, **fields) -> list:
    """What the panes' widgets hold."""
    mine = {"adapter": run, "strength": 1, "rank": 1, "step": None, "plus": run, "plus_strength": 1} | fields
    return [value for kind in (*kinds, *["Base"] * (4 - len(kinds))) for value in (kind, *mine.values())]


def send(page, run: str, text: str, *kinds: str, past=None, blind=False, live=None, heat=0.0, length=6, **fields):
    """What the page shows while all panes answer: the last picture, by name, and how many there were."""
    past = Conversation() if past is None else past
    values = pane_values(*kinds, run=run, **fields)
    given = [run, past, text, live or chat_tab.Live(), blind, True, len(kinds), None, heat, 0.95, length, 0, *values]
    pictures = list(handler(page, "answer", "talk-a")(*given))
    names = ("past", "order", "ballot", "message", "notes")
    last = dict(zip(names, pictures[-1][:5], strict=True))
    for start, name in ((5, "heads"), (9, "talks"), (13, "engines")):
        last[name] = pictures[-1][start : start + 4]
    return last, pictures


def words(html_text: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", html_text))


def test_chat_streams_to_all_panes_what_the_engine_says(page, trained, studio, tiny_folder):
    shown, pictures = send(page, trained.id, "name[Inn 3]", "Base", "Adapter", "Merged")
    assert "Loading the model …" in pictures[0][13]
    model = models.load_model(str(tiny_folder), studio.workspace)
    tokenizer = studio.tokenizer(str(tiny_folder))
    ids = torch.tensor([prompt_ids(prompt(trained, "name[Inn 3]"), tokenizer)])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, eos_token_id=None
        )
    base, adapter, merged = (reply.text for reply in shown["past"].turns[0].replies)
    assert base == tokenizer.decode(out[0, ids.shape[1] :])
    assert adapter == merged not in ("", base)
    assert base in words(shown["talks"][0]) and "name[Inn 3]" in words(shown["talks"][0])
    assert [line.split(" ·")[0].split(">")[1] for line in shown["engines"][:3]] == [
        "adapter off (strength 0)",
        f"{trained.id} unmerged on 4 matrices, strength 1",
        "W₀ + ΔW in 4 matrices, no LoRA layer",
    ]
    assert "tok k" not in shown["talks"][0]
    for talk in shown["talks"][1:3]:
        coloured = re.findall(r'<span class="tok k\d" tabindex="0" data-mind="[^"]*">([^<]*)</span>', talk)
        assert html.unescape("".join(coloured)) == adapter, "each token is coloured"
    assert shown["notes"] == "", "the template's end token stops this model"


def test_a_conversation_goes_on_in_each_pane_with_its_own_answers(page, trained, studio):
    first, _ = send(page, trained.id, "name[Inn 3]", "Base", "Adapter")
    second, _ = send(page, trained.id, "And <b>more</b>?", "Base", "Adapter", past=first["past"])
    tokenizer = studio.tokenizer(trained.spec.model)
    for place in (0, 1):
        seen = tokenizer.decode(second["past"].turns[1].replies[place].prompt_ids)
        assert "Describe it.\n\nname[Inn 3]<|im_end|>" in seen, "the first message is put as the rows were"
        assert f"{first['past'].turns[0].replies[place].text}<|im_end|>" in seen
        assert seen.endswith("And <b>more</b>?<|im_end|>\n<|im_start|>assistant\n")
    assert "And &lt;b&gt;more&lt;/b&gt;?" in second["talks"][0] and "<b>more" not in second["talks"][0]


def test_to_stop_keeps_what_was_said(page, trained):
    live = chat_tab.Live()
    given = [trained.id, Conversation(), "Hi", live, False, False, 2, None, 0.0, 0.95, 60, 0]
    going = handler(page, "answer", "talk-a")(*given, *pane_values("Base", "Adapter", run=trained.id))
    next(going), next(going)
    live.is_stopped = True
    *_, last = going
    assert 1 <= len(last[0].turns[0].replies[0].token_ids) < 60
    assert last[0].turns[0].replies[0].text in words(last[9])


def test_the_last_message_can_be_edited_and_asked_again(page, trained):
    shown, _ = send(page, trained.id, "name[Inn 3]", "Base", "Adapter")
    values = [2, *pane_values("Base", "Adapter", run=trained.id)]
    before, text, *_ = handler(page, "take_back")(shown["past"], *values)
    assert (before.turns, text) == ((), "name[Inn 3]")
    assert handler(page, "ask_again")(shown["past"], 4) == [before, "name[Inn 3]", 5]
    with pytest.raises(gr.Error, match="There is no message yet to take back; write one and send it"):
        handler(page, "take_back")(before, *values)


def test_a_blind_test_shows_neither_names_nor_engines_until_the_vote_and_counts_it_for_the_right_pane(page, trained):
    for _ in range(8):
        shown, pictures = send(page, trained.id, "name[Inn 3]", "Base", "Adapter", "Merged", blind=True)
        told = words(" ".join(str(part) for picture in pictures for part in picture[5:]))
        assert not any(word in told for word in ("Base", "Adapter", "Merged", "unmerged", "float32", "strength"))
        texts = [reply.text for reply in shown["past"].turns[0].replies]
        for column, place in enumerate(shown["order"]):
            assert texts[place] in words(shown["talks"][column])
        if shown["order"] != [0, 1, 2]:
            break
    vote = events(page, "cast")[1].fn  # the second answer is best
    order, ballot, tally, *rest = vote(trained.id, shown["past"], shown["order"])
    assert order == [] and update(ballot)["visible"] is False
    (kept,) = [json.loads(line) for line in (trained.folder / "votes.jsonl").read_text().splitlines()]
    assert kept["best"] == shown["order"][1] and kept["answers"] == texts
    assert [pane["adapter"] for pane in kept["panes"]] == ["", trained.id, trained.id]
    assert "1 of 1" in words(tally) and "21% – 100%" in words(tally)
    assert "voted best" in rest[1] and "ABC"[shown["order"][1]] in words(rest[1])
    assert "float32" in rest[4]


def test_a_transcript_is_saved_as_json_and_markdown_and_kept_with_its_run(page, trained, tmp_path):
    shown, _ = send(page, trained.id, "Is *this* <b>bold</b>?", "Base", "Adapter")
    as_json, as_text = (json.loads(event.fn(trained.id, shown["past"])) for event in events(page, "write"))
    record = json.loads(as_json["text"])
    replies = shown["past"].turns[0].replies
    assert (record["run"], record["turns"][0]["message"]) == (trained.id, "Is *this* <b>bold</b>?")
    assert [a["text"] for a in record["turns"][0]["answers"]] == [reply.text for reply in replies]
    assert record["turns"][0]["answers"][1]["fingerprint"] == replies[1].fingerprint
    assert r"> Is \*this\* \<b\>bold\</b\>?" in as_text["text"] and "### B: Base + adapter" in as_text["text"]
    (earlier,) = (trained.folder / "transcripts").glob("*.json")
    earlier.rename(earlier.with_name(f"20260101-000000-{earlier.name.rpartition('-')[2]}"))
    events(page, "write")[0].fn(trained.id, shown["past"])  # the same, some time later
    with zipfile.ZipFile(capsule.write(trained, tmp_path / "capsule.zip")) as packed:
        kept = {name: packed.read(name).decode() for name in packed.namelist() if name.startswith("transcripts/")}
    assert sorted(kept.values()) == sorted([as_json["text"], as_text["text"]])
    with pytest.raises(gr.Error, match="There is nothing to save yet; send a message first"):
        events(page, "write")[0].fn(trained.id, Conversation())
    shutil.rmtree(trained.folder / "transcripts")
    (trained.folder / "transcripts").touch()
    with pytest.raises(gr.Error, match="The transcript could not be kept in"):
        events(page, "write")[0].fn(trained.id, shown["past"])
    (trained.folder / "transcripts").unlink()


def test_a_text_of_one_s_own_is_scored_by_a_pane_and_the_base(page, trained):
    values = pane_values("Base", "Adapter", run=trained.id)
    scored = handler(page, "scored")(trained.id, "name[Inn 3]", "Inn 3 has <b> stars.", "B", 2, *values)
    assert "Inn 3 has <b> stars." in words(scored) and "<b>" not in scored
    alone = handler(page, "scored")(trained.id, "", "Inn 3 has 3 stars.", "B", 2, *values)
    assert words(alone).startswith("Inn 3 has 3 stars.")
    for text, letter, sentence in (("", "B", "`Text` (=nothing) must not be empty"), ("x", "D", "must be one that is")):
        with pytest.raises(gr.Error) as shown:
            handler(page, "scored")(trained.id, "", text, letter, 2, *values)
        assert sentence in html.unescape(shown.value.message)


def test_a_list_of_prompts_is_asked_of_all_panes_and_measured(page, trained, tmp_path):
    values = [0.0, 0.95, 6, 0, *pane_values("Base", "Adapter", run=trained.id)]
    asked = handler(page, "asked")
    *_, (summary, view, kept) = asked(trained.id, prompt_list.Going(), prompt_list.WHERE[0], None, 2, 2, *values)
    titles, rows, _ = kept
    assert titles == ["A: Base", "B: Base + adapter"] and len(rows) == 2
    assert rows[0][1].startswith("Inn "), "the reference of the row that was held out"
    assert "ROUGE-L" in words(summary) and update(view)["value"]["data"][0][:2] == rows[0][:2]
    file = json.loads(handler(page, "csv")(trained.id, kept))
    first, *others = csv.reader(io.StringIO(file["text"]))
    assert first[:4] == ["prompt", "reference", *titles] and [row[:4] for row in others] == rows
    path = tmp_path / "mine.jsonl"
    path.write_text('name[Inn 3]\n\n{"prompt": "Hi", "reference": "Ho"}\n')
    *_, (_, _, kept) = asked(trained.id, prompt_list.Going(), prompt_list.WHERE[1], str(path), 9, 2, *values)
    assert [row[:2] for row in kept[1]] == [["name[Inn 3]", ""], ["Hi", "Ho"]]
    stopped = prompt_list.Going()
    going = asked(trained.id, stopped, prompt_list.WHERE[1], str(path), 9, 2, *values)
    next(going), next(going)
    stopped.is_stopped = True
    *_, (summary, _, _) = going
    assert re.search(r"Cancelled after [01] of 2 prompts\.", words(summary))


def test_a_list_without_prompts_or_answers_says_what_is_missing(page, trained):
    values = [0.0, 0.95, 6, 0, *pane_values("Base", run=trained.id)]
    for run, sentence in ((trained.id, "`Prompts` (=nothing) must be a file"), ("", "`run` (=nothing) must be one")):
        with pytest.raises(gr.Error) as shown:
            list(handler(page, "asked")(run, prompt_list.Going(), prompt_list.WHERE[1], None, 2, 2, *values))
        assert html.unescape(shown.value.message).startswith(sentence)
    with pytest.raises(gr.Error, match="There are no answers yet; ask all panes first"):
        handler(page, "csv")(trained.id, [])


@pytest.mark.parametrize(
    ("run", "text", "kinds", "fields", "sentence"),
    [
        ("", "Hi", ["Base"], {}, "`run` (=nothing) must be one with an adapter; train one first, or open one in Runs."),
        (None, " ", ["Base"], {}, "`Message` (=nothing) must not be empty; write one, or take an example."),
        (None, "", ["Base"], {}, "`Message` (=nothing) must not be empty; write one, or take an example."),
        (None, "Hi", ["Adapter"], {"adapter": None}, "`Adapter of` (=nothing) must name a run, for a pane that runs"),
        (None, "Hi", ["Sum of two"], {"plus": None}, "`Plus the adapter of` (=nothing) must be chosen for a pane that"),
        (None, "Hi", ["Checkpoint"], {}, "`Checkpoint of step` (=nothing) must be chosen for a pane that runs"),
        (None, "Hi", ["Checkpoint"], {"step": 7}, "`step` (=7) must be that of a checkpoint of “Inns”; it has none."),
    ],
)
def test_chat_refuses_what_it_cannot_answer(run, text, kinds, fields, sentence, page, trained):
    run = trained.id if run is None else run
    with pytest.raises(gr.Error) as shown:
        send(page, run, text, *kinds, **fields)
    assert html.unescape(shown.value.message).startswith(sentence)


def test_chat_with_a_run_that_has_no_adapter_yet_says_when_it_will(page, write_run, trained):
    run = write_run([STARTED], dataclasses.replace(trained.spec, name="Early"))
    with pytest.raises(
        gr.Error, match="“Early” has no adapter yet; it is saved at the first evaluation and at the end"
    ):
        send(page, run.id, "Hi", "Adapter")
    send(page, run.id, "Hi", "Base")
    other = write_run([STARTED], dataclasses.replace(trained.spec, model="starter"))
    with pytest.raises(gr.Error, match="must be of a run on .*; it is on starter"):
        send(page, trained.id, "Hi", "Adapter", adapter=other.id)


def test_the_panes_offer_the_adapters_on_the_same_base_and_keep_what_was_chosen(page, trained, write_run):
    write_run([STARTED], dataclasses.replace(trained.spec, model="starter"))
    second = write_run([STARTED], dataclasses.replace(trained.spec, name="Second"))
    shutil.copytree(trained.adapter_folder, second.adapter_folder)
    (event,) = events(page, "offer")
    names = [getattr(output, "label", None) for output in event.outputs]
    for before, chosen in ((trained.id, second.id), ("", trained.id), (second.id, trained.id)):
        told = event.fn(trained.id, before, *pane_values("Base", run=second.id))
        adapter, plus = (told[names.index(name)] for name in ("Adapter of", "Plus the adapter of"))
        assert {i for _, i in update(adapter)["choices"]} == {trained.id, second.id}
        assert update(adapter)["value"] == update(plus)["value"] == chosen
        is_begun_anew = any(isinstance(value, Conversation) for value in told)
        assert is_begun_anew == (before != trained.id), "what was said stays while the tab is away"
    no_longer = event.fn(trained.id, trained.id, *pane_values("Base", run=None))
    assert no_longer[1] == "", "an adapter has come since it was said that there is none"
    assert event.fn(trained.id, trained.id, *pane_values("Base", run=second.id))[1] == gr.skip()


def test_the_adapter_s_zip_holds_what_peft_reads_and_follows_the_adapter(trained, workspace, tmp_path):
    from studio.tabs.runs import pack

    file = pack(trained, tmp_path)
    with zipfile.ZipFile(file) as packed:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert packed.read(name) == (trained.adapter_folder / name).read_bytes()
    (tmp_path / Path(file).name).write_bytes(b"old")
    os.utime(file, (0, 0))
    assert zipfile.is_zipfile(pack(trained, tmp_path))


def test_deleting_asks_first_then_shows_the_next_run(page, trained, write_run, hold):
    other = write_run([STARTED], RunSpec(name="Other"))
    question, words = handler(page, "ask")(trained.id)
    assert update(question)["visible"] is True and "Delete “Inns”" in words and trained.folder.exists()
    hidden, chosen, table, ids = handler(page, "remove")(trained.id)
    assert update(hidden)["visible"] is False and update(chosen)["value"] == other.id
    assert ids == [other.id] and [row[0] for row in table["data"]] == ["Other"]
    assert not trained.folder.exists()
    hold(other)
    with pytest.raises(gr.Error, match="is still running; stop it before you delete it"):
        handler(page, "remove")(other.id)


def test_an_adapter_that_was_trained_on_is_read_anew(studio, trained):
    before = studio.spectra(studio.opened(Source(trained.id)))
    assert studio.spectra(studio.opened(Source(trained.id))) is before
    shutil.copytree(trained.adapter_folder, trained.folder / "copy")
    adapter = Adapter.load(trained.folder / "copy")
    louder = {p: dataclasses.replace(f, B=2 * f.B) for p, f in adapter.factors.items()}
    dataclasses.replace(adapter, factors=louder).save(trained.adapter_folder)
    after = studio.spectra(studio.opened(Source(trained.id)))
    path = next(iter(louder))
    assert after[path][1].norm == pytest.approx(2 * before[path][1].norm)


def test_labels_stay_as_they_are_while_the_tab_is_away(page, trained):
    show = handler(page, "show", "label-text")
    assert trained.id == show(trained.id, "")[0]
    assert {str(value) for value in show(trained.id, trained.id)} == {str(gr.skip())}
