"""Rows mended by hand: the file stays as it is, the row keeps its place, counts add up, and the hash knows of it."""

import dataclasses
import errno
import json

import pytest

from core.errors import LoRAError
from studio import mends
from studio.data import DataSpec, Survey, checks, prepare, read_table
from studio.mends import Mend, digest_of
from studio.models import load_tokenizer
from studio.rows import BadRow
from studio.runs import Runs
from studio.specs import RunSpec
from studio.state import Studio
from studio.tables import fingerprint, mends_of
from studio.tabs import inspect, mend
from studio.workspace import Workspace

SPEC = DataSpec(prompt="q", completion="a", eval_fraction=0)
GOOD = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(6)]
NEW = {"q": "mended", "a": "by hand"}


@pytest.fixture(scope="module")
def tokenizer(tiny_folder, tmp_path_factory):
    return load_tokenizer(str(tiny_folder), Workspace(tmp_path_factory.mktemp("models")))


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "home")


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# What a file holds, and which of its rows cannot be used.
FILES = {
    "a line that is no JSON": ("x.jsonl", lines(GOOD[:3]) + b'\n{"q": \n' + lines(GOOD[3:]), 3),
    "a line of bad bytes": ("x.jsonl", lines(GOOD[:1]) + b'{"q": "caf\xe9"}\n' + lines(GOOD[1:]), 1),
    "a field too many": ("x.csv", b"q,a\nx,y\nu,v,w\nr,s\nt,t\n", 1),
    "a spoilt field": ("x.csv", b"q,a\nx,y\nr,s\ncaf\xe9,v\n", 2),
    "an empty field": ("x.json", json.dumps([*GOOD, {"q": "x", "a": ""}]).encode(), 6),
    "no object": ("x.json", json.dumps([3, *GOOD]).encode(), 0),
}


def keep(source, place, workspace, row=NEW, part="rows") -> None:
    table = read_table(source, workspace)
    was = digest_of(table.in_file(place, part == "eval_rows"))
    mends_of(source, workspace).put(Mend(part, place, was, row))


def report_of(spec, tokenizer, workspace):
    report = prepare(spec, tokenizer, max_length=100, seed=0, workspace=workspace).report
    assert report.num_rows == report.num_train + report.num_evaluation + len(report.skipped) + report.num_unused
    return report


@pytest.mark.parametrize(("name", "content", "place"), FILES.values(), ids=FILES)
def test_a_bad_row_is_mended_in_its_place_and_undone_and_the_file_stays(
    name, content, place, tmp_path, tokenizer, workspace
):
    path = tmp_path / name
    path.write_bytes(content)
    spec = dataclasses.replace(SPEC, source=str(path))
    before = read_table(spec.source, workspace)
    with pytest.raises(LoRAError, match="1 row of x.* cannot be used"):
        report_of(spec, tokenizer, workspace)
    keep(spec.source, place, workspace)
    table = read_table(spec.source, workspace)
    assert table.rows[place] == NEW and table.mended(False) == [place]
    assert table.where(place, False) == before.where(place, False)
    assert [r for i, r in enumerate(table.rows) if i != place] == [r for i, r in enumerate(before.rows) if i != place]
    report = report_of(spec, tokenizer, workspace)
    assert (report.num_train, report.num_mended, report.skipped) == (len(before.rows), 1, ())
    assert report.sentences()[0].endswith(f"{len(before.rows)} to train on, 0 held out (1 of them mended).")
    assert path.read_bytes() == content
    mends_of(spec.source, workspace).undo("rows", place)
    with pytest.raises(LoRAError, match="1 row of x.* cannot be used"):
        report_of(spec, tokenizer, workspace)


def test_mended_and_skipped_rows_add_up(tmp_path, tokenizer, workspace):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(GOOD) + b"{\n{\n")
    keep(str(path), 6, workspace)
    spec = dataclasses.replace(SPEC, source=str(path), bad_rows="skip", eval_fraction=0.3)
    report = report_of(spec, tokenizer, workspace)
    assert report.sentences()[0] == "8 rows: 5 to train on, 2 held out (1 of them mended), 1 skipped."
    few = report_of(dataclasses.replace(spec, max_rows=2, eval_fraction=0), tokenizer, workspace)
    assert few.num_unused == 6 and few.num_mended <= few.num_train


def test_a_run_notices_that_rows_were_mended_since_it_began(tmp_path, workspace):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(GOOD))
    run = Runs(workspace).create(RunSpec())

    def look() -> list[str]:
        return run.note_data(fingerprint(str(path), workspace, read_table(str(path), workspace)))

    assert look() == look() == []
    keep(str(path), 2, workspace)
    assert look() == [str(path)]
    mends_of(str(path), workspace).undo_all()
    assert look() == []


def test_a_mend_fits_only_the_row_that_it_mends(tmp_path, workspace):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(GOOD) + b'{"q": \n')
    keep(str(path), 6, workspace)
    keep(str(path), 0, workspace)
    path.write_bytes(lines(GOOD[:3]) + b'{"q": \n')
    table = read_table(str(path), workspace)
    assert table.rows[0] == NEW and isinstance(table.rows[3], BadRow)
    assert table.problems[-1].startswith("1 mended row fits no row of x.jsonl any more")


def test_of_several_files_each_has_its_own_mends_and_columns_of_objects_stay_apart(tmp_path, workspace):
    rows = [{"q": "x", "o": {"a": "y", "b": "z"}}] * 3
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(rows))
    source = f"{tmp_path / 'one.jsonl'}; {tmp_path / 'two.jsonl'}"
    new = {"q": "n", "o.a": "n", "o.b": "n"}
    table = read_table(source, workspace)
    home = table.home(4, False)
    assert (home.source, home.part, home.place) == (str(tmp_path / "two.jsonl"), "rows", 1)
    keep(home.source, home.place, workspace, new)
    table = read_table(source, workspace)
    unfolded = {"q": "x", "o.a": "y", "o.b": "z"}
    assert table.rows == [unfolded] * 4 + [new, unfolded]
    assert table.rows[-2] == new and table.mended(False) == [4]
    assert table.in_file(4, False) == unfolded
    held_out = read_table(str(tmp_path / "one.jsonl"), workspace, source)
    assert held_out.mended(True) == [4] and held_out.home(4, True) == home


def test_a_file_is_the_same_however_it_is_named(tmp_path, workspace, monkeypatch):
    (workspace.uploads / "x.jsonl").write_bytes(lines(GOOD))
    keep(str(workspace.uploads / "x.jsonl"), 1, workspace)
    assert read_table("x.jsonl", workspace).rows[1] == NEW
    monkeypatch.chdir(workspace.uploads)
    assert read_table("./x.jsonl", workspace).rows[1] == NEW


BAD = {
    '{"q": "x",\n "a": }': r"must be valid JSON \(Expecting value, line 2, column 7\); correct that place",
    "[1]": r"The mended row must be an object like \{.*\}; write it so",
    '{"q": "\\ud800", "a": "x"}': r"The mended row must be valid JSON \(.*surrogates not allowed\); correct it",
    "[" * 100_000: r"The mended row must be valid JSON \(.*recursion.*\); correct it",
    '{"q": "x", "a": " "}': r"The mended row still cannot be used: `a` is empty",
}


@pytest.fixture
def opened(tmp_path, tiny_folder):
    """A page's editor with row 7, which is no JSON, of an upload."""
    studio = Studio(Workspace(tmp_path / "home"), [tiny_folder])
    path = studio.workspace.uploads / "x.jsonl"
    path.write_bytes(lines(GOOD) + b'{"q": \n')
    *_, look = inspect.survey(studio, str(tiny_folder), dataclasses.replace(SPEC, source=str(path)))
    return studio, mend.Opened(look, inspect.pressed(look, 100, "Rows that cannot be read", ["7", "x.jsonl, line 7"]))


@pytest.mark.parametrize(("text", "match"), BAD.items(), ids=[text[:20] for text in BAD])
def test_what_still_cannot_be_used_is_not_kept(text, match, opened):
    studio, row = opened
    with pytest.raises(LoRAError, match=match):
        mend.save(studio, row, text, 100)
    assert not (studio.workspace.root / "mended").exists()


def test_the_page_shows_a_row_keeps_its_mend_and_lists_it_until_it_is_undone(opened):
    studio, row = opened
    shown = mend.show(row, 100)
    assert "Row 7, x.jsonl, line 7" in shown[2] and "is not valid JSON" in shown[2] and shown[3] == '{"q":'
    mend.save(studio, row, json.dumps(NEW), 100)
    spec = row.look.survey.spec
    *_, look = inspect.survey(studio, row.look.model, spec)
    found = look.survey
    asked = [c for c in checks(found, found.split(100), 100) if len(c.places)]
    assert [(c.title, c.places.tolist(), c.stops, c.warns) for c in asked] == [("Mended by hand", [6], False, False)]
    inspect.verify(look, look.model, spec, 100)
    again = mend.Opened(look, 6)
    assert json.loads(mend.show(again, 100)[3]) == NEW
    mend.save(studio, again, json.dumps({"q": "once", "a": "more"}), 100)
    assert studio.table(spec.source).rows[6] == {"q": "once", "a": "more"}
    mend.undo(studio, again)
    assert isinstance(studio.table(spec.source).rows[6], BadRow)
    mend.save(studio, again, json.dumps(NEW), 100)
    *_, look = inspect.survey(studio, again.look.model, spec)
    group, words = mend.ask_undo(mend.Opened(look, 6))
    assert group.visible and "Undo all 1 mends? What was written" in words
    assert mend.show(mend.Opened(look, 6), 100)[-1].visible is False  # no question is left of a row before
    mend.undo_all(studio, again)
    assert isinstance(studio.table(spec.source).rows[6], BadRow)


def test_beside_a_row_of_too_many_to_be_looked_at_unasked_stands_that_the_button_must_be_pressed(opened, monkeypatch):
    _, row = opened
    assert "Check all rows" not in mend.show(row, 100)[2]
    monkeypatch.setattr(inspect, "AUTOMATIC_ROWS", 3)
    assert "once it is mended, press Check all rows again" in mend.show(row, 100)[2]


def test_a_damaged_file_of_mends_is_named(tmp_path, workspace):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(GOOD))
    keep(str(path), 1, workspace)
    mends_of(str(path), workspace).path.write_text('{"part": "rows"')
    with pytest.raises(LoRAError, match=r"mended.*\.jsonl` must hold the rows that were mended.*; move it away"):
        read_table(str(path), workspace)


def test_a_full_disk_keeps_what_was_mended_before(tmp_path, workspace, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(GOOD))
    keep(str(path), 1, workspace)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mends, "write_whole", full)
    with pytest.raises(LoRAError, match=r"must be written to keep a mended row \(No space left on device\); free some"):
        keep(str(path), 2, workspace)
    assert read_table(str(path), workspace).mended(False) == [1]


def test_rows_drawn_by_a_limit_keep_their_mends(tmp_path, tokenizer, workspace):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines([*GOOD, *GOOD]))
    keep(str(path), 7, workspace)
    spec = dataclasses.replace(SPEC, source=str(path), max_rows=9)
    found = Survey(read_table(str(path), workspace), spec, tokenizer, seed=0)
    assert list(found.read()) == [9]
    rows = [found.row(place) for place in range(9)]
    assert found.mended().tolist() == [i for i, row in enumerate(rows) if row == NEW]
