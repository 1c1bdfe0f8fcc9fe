"""Reading: whatever form a data set has, its rows come out whole; what is wrong with it, one sentence says."""

import csv
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import LoRAError
from studio import readers, tables
from studio.rows import BadRow
from studio.tables import list_starters, read_table, save_upload
from studio.workspace import Workspace

SHARED = Path(__file__).parents[3] / "shared" / "data"
ROWS = [{"prompt": "one", "completion": "eins"}, {"prompt": "tw\u00f6", "completion": "zwei, \u65e5\u672c"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "home")


@pytest.fixture
def put(tmp_path):
    """Writes a file and returns its path; text is written as UTF-8."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


CSV = 'prompt,completion\none,eins\ntwö,"zwei, 日本"\n'
FORMS = {
    "a.jsonl": LINES,
    "blank_lines.jsonl": "\n" + LINES.replace("\n", "\n\n"),
    "crlf.jsonl": LINES.replace("\n", "\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "a_list.jsonl": json.dumps(ROWS, indent=2),
    "a.ndjson": LINES,
    "a.json": json.dumps(ROWS, indent=2),
    "lines.json": LINES,
    "data.json": json.dumps({"version": 1, "data": ROWS, "note": []}),
    "other.json": json.dumps({"version": 1, "anything": ROWS}),
    "utf16.json": json.dumps(ROWS, ensure_ascii=False).encode("utf-16"),
    "no_ending": json.dumps(ROWS),
    "strange.ending": LINES,
    "a.csv": CSV,
    "bom.csv": b"\xef\xbb\xbf" + CSV.encode(),
    "crlf.csv": CSV.replace("\n", "\r\n"),
    "utf16.csv": CSV.encode("utf-16"),
    "utf32.csv": CSV.encode("utf-32"),
    "semicolon.csv": 'prompt;completion\none;eins\ntwö;"zwei, 日本"\n',
    "tabs.csv": "prompt\tcompletion\none\teins\ntwö\tzwei, 日本\n",
    "spaced_header.csv": 'prompt , completion\none,eins\ntwö,"zwei, 日本"\n',
    "a.tsv": "prompt\tcompletion\none\teins\ntwö\tzwei, 日本\n",
    "UPPER.TSV": "prompt\tcompletion\r\none\teins\r\ntwö\tzwei, 日本",
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(name, put, workspace):
    table = read_table(str(put(name, FORMS[name])), workspace)
    assert table.rows == ROWS
    assert table.columns == ("prompt", "completion")
    assert table.name == name
    assert table.eval_rows == []
    assert table.problems == ()


@pytest.mark.parametrize("name", ["a.parquet", "named_wrongly.txt"])
def test_parquet_gives_the_same_rows_whatever_its_name(name, tmp_path, workspace):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / name)
    assert read_table(tmp_path / name, workspace).rows == ROWS


field = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"a": field, "b": field}), min_size=1, max_size=5))
def test_any_text_survives_csv_and_jsonl(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, ["a", "b"], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    for name, text in (
        ("a.csv", buffer.getvalue()),
        ("a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
    ):
        (folder / name).write_bytes(text.encode())
        found, held_out = readers.read_rows(folder / name, [])
        assert (list(found), held_out) == (rows, [])


def test_json_lines_may_hold_line_separators_inside_a_text(put, workspace):
    path = put("a.jsonl", '{"text": "one\u2028two\x85three"}\n{"text": "four"}\n')
    assert [row["text"] for row in read_table(path, workspace).rows] == ["one\u2028two\x85three", "four"]


def test_json_with_splits_keeps_its_own_evaluation_rows(put, workspace):
    table = read_table(put("a.json", json.dumps({"train": ROWS, "validation": ROWS[:1]})), workspace)
    assert (table.rows, table.eval_rows) == (ROWS, ROWS[:1])


def test_text_is_paragraphs_or_where_it_has_none_lines(put, workspace):
    paragraphs = read_table(put("p.txt", "One\nmore.\r\n \n\n  Two.\n"), workspace)
    assert paragraphs.rows == [{"text": "One\nmore."}, {"text": "  Two."}]
    assert read_table(put("l.txt", "One.\nTwo.\n"), workspace).rows == [{"text": "One."}, {"text": "Two."}]
    assert read_table(put("j.txt", LINES), workspace).columns == ("text",)


def test_columns_are_those_of_all_rows_in_order_of_appearance(put, workspace):
    assert read_table(put("a.jsonl", '{"a": 1}\n{"b": 2, "a": 3}\n'), workspace).columns == ("a", "b")


def test_tsv_quotes_are_mere_text(put, workspace):
    table = read_table(put("a.tsv", 'a\tb\n" He said\tso "\n"x"\ty"\n'), workspace)
    assert table.rows == [{"a": '" He said', "b": 'so "'}, {"a": '"x"', "b": 'y"'}]


def test_tsv_is_read_with_quotes_where_only_that_fits_the_header(put, workspace):
    table = read_table(put("a.tsv", 'a\tb\n"one\ttwo"\tthree\n'), workspace)
    assert table.rows == [{"a": "one\ttwo", "b": "three"}]


def test_tsv_whose_first_row_cannot_be_a_header_loses_no_row(put, workspace):
    table = read_table(put("a.tsv", "gj04\t1\t\tA sentence.\ngj04\t0\t*\tAnother.\n"), workspace)
    assert table.columns == ("col1", "col2", "col3", "col4")
    assert [row["col4"] for row in table.rows] == ["A sentence.", "Another."]
    assert "has no header" in table.problems[0]


def test_the_index_that_pandas_writes_gets_a_name(put, workspace):
    assert read_table(put("a.csv", ",mr\n0,x\n"), workspace).rows == [{"index": "0", "mr": "x"}]


def test_short_csv_rows_are_filled_and_told(put, workspace):
    table = read_table(put("a.csv", "a,b\n1,2\n3\n"), workspace)
    assert table.rows[1] == {"a": "3", "b": ""}
    assert "`a.csv`, line 3: has fewer fields than the header (1 of 2 rows are like this)" in table.problems[0]


def test_columns_of_objects_are_unfolded_and_told(put, workspace):
    path = put("a.jsonl", '{"q": "x", "instances": [{"input": "i", "output": "o"}]}\n{"q": "y", "instances": null}\n')
    table = read_table(path, workspace)
    assert table.columns == ("q", "instances.input", "instances.output")
    assert table.rows == [{"q": "x", "instances.input": "i", "instances.output": "o"}, {"q": "y"}]
    assert "instances.input, instances.output" in table.problems[0]


@pytest.mark.parametrize("message", [{"role": "user", "content": "x"}, {"from": "human", "value": "x"}])
def test_messages_are_never_unfolded(message, put, workspace):
    assert read_table(put("a.json", json.dumps([{"m": [message]}])), workspace).rows == [{"m": [message]}]


def test_a_bare_name_is_found_among_the_uploads(workspace):
    (workspace.uploads / "mine.jsonl").write_text(LINES)
    assert read_table("mine.jsonl", workspace).rows == ROWS


def test_starters_have_rows_to_train_on_others_to_evaluate_and_name_their_columns(workspace):
    starters = list_starters()
    assert {"restaurants", "tickets", "lighthouse"} <= {s.name for s in starters}
    for starter in starters:
        table = read_table(starter.source, workspace)
        assert len(table.rows) >= 200
        assert table.eval_rows
        assert not {json.dumps(r) for r in table.rows} & {json.dumps(r) for r in table.eval_rows}
        assert starter.title
        assert starter.change
        used = [starter.mapping[k] for k in ("prompt", "completion", "messages") if k in starter.mapping]
        assert used
        assert set(used) <= set(table.columns)


DEEP = "[" * 100_000 + "]" * 100_000
BAD = [
    ("empty.jsonl", "", r"`empty.jsonl` is empty \(0 bytes\); choose a file"),
    ("blank.csv", " \n\n", r"`blank.csv` is empty \(only white space\)"),
    ("bom_only.txt", b"\xef\xbb\xbf", r"`bom_only.txt` is empty \(only white space\)"),
    ("picture.txt", b"\x89PNG\r\n\x1a\n\0\0", r"`picture.txt` is not a text file \(a zero byte at byte 9\); save it"),
    (
        "header.csv",
        "caf\u00e9,b\nok,ok\n".encode("latin-1"),
        r"`header.csv`, line 1: byte 4 is not UTF-8; save it as",
    ),
    ("half.txt", "\u65e5\u672c".encode()[:-1], r"`half.txt`, line 1, field `text`: byte 4 is not UTF-8; 1 of 1 lines"),
    ("latin.json", '[{"a": "caf\u00e9"}]'.encode("latin-1"), r"`latin.json`, line 1: byte 12 is not UTF-8; save it as"),
    ("half16.txt", "ab".encode("utf-16")[:-1], r"`half16.txt`, line 1: byte 5 is not UTF-16"),
    ("book.xlsx", "PK something", r"`book.xlsx` must end in .jsonl, .json, .csv, .tsv, .parquet or .txt; save it"),
    ("none", "plain words", r"`none` must end in .jsonl"),
    ("deep.json", DEEP, r"`deep.json` is nested too deeply; make each row"),
    ("long.jsonl", '{"a": ' + "1" * 5000 + "}\n", r"`long.jsonl`, line 1: .*a number that is too long"),
    ("long.json", '[{"a": ' + "1" * 5000 + "}]", r"`long.json` holds a number that is too long; write it as text"),
    ("cut.json", '[{"a": 1},\n{"a": ', r"`cut.json`, line 2: is not valid JSON \(Expecting value, column 7\); correct"),
    (
        "all.jsonl",
        '{"a": 2\n\n{a}\n',
        r"`all.jsonl`, line 1: is not valid JSON .*; 2 of 2 lines are like this; correct",
    ),
    ("numbers.json", "[1]", r"`numbers.json`, row 1: must be an object like .*, not a number; 1 of 1"),
    ("null.json", "null", r"`null.json`, row 1: .*not null;"),
    ("true.json", "[true]", r"`true.json`, row 1: .*not true or false;"),
    (
        "object.json",
        '{"a": 1, "b": [2]}',
        r"`object.json` must hold a list of rows, or .*; it holds one object with a, b\.",
    ),
    ("two.json", '{"x": [{"a": 1}], "y": [{"a": 1}]}', r"`two.json` must hold a list of rows.* with x, y\."),
    ("no_rows.json", "[]", r"`no_rows.json` has no rows; choose a file"),
    ("no_rows.csv", "a,b\n", r"`no_rows.csv` has no rows; choose a file"),
    ("more.csv", "a,b\n1,2\n1,2,3\n1,2,3,4\n", r"`more.csv`, line 3: has 3 fields, but the header has 2 \(2 of 3 rows"),
    ("twice.csv", "a,b, a\n1,2,3\n", r"`twice.csv`, line 1: the header has two columns 'a'; rename one"),
    (
        "unnamed.csv",
        "\na,,b\n1,2,3\n",
        r"`unnamed.csv`, line 2: column 2 of the header has no name; name it or remove it",
    ),
    ("open.csv", 'a,b\n1,2\n"1,2\n3,4\n', r"`open.csv`, line 3: its quotes do not match .*; close each quote"),
    ("stray.csv", 'a,b\n1,2\n"x"y,2\n', r"`stray.csv`, line 3: its quotes do not match"),
    ("wide.csv", "a,b\n1," + "x" * 140_000 + "\n", r"`wide.csv`, line 2: .*field larger than field limit"),
    ("more.tsv", "a\tb\n1\t2\n1\t2\t3\n", r"`more.tsv`, line 3: has 3 fields, but the header has 2"),
    ("false.parquet", "a,b\n1,2\n", r"`false.parquet` is not a Parquet file that can be read \(.*\); write it again"),
    ("cut.parquet", b"PAR1" + b"x" * 40, r"`cut.parquet` is not a Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "match"), BAD, ids=[b[0] for b in BAD])
def test_a_bad_file_gives_one_sentence_with_place_and_next_step(name, content, match, put, workspace):
    with pytest.raises(LoRAError, match=match) as caught:
        read_table(put(name, content), workspace)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


SPOILT = b"caf\xe9 d\xe9"
SPOILT_FILES = {
    "plain.csv": (b"a,b\nx,y\nx," + SPOILT + b"\nz,y\n", 3, "b"),
    "crlf.csv": (b"a,b\r\nx,y\r\n" + SPOILT + b",x\r\nz,y\r\n", 3, "a"),
    "bom.csv": (b"\xef\xbb\xbfa,b\nx,\xc3\xa9\n" + SPOILT + b",\xc3\xa9\nz,y\n", 3, "a"),
    "quoted.csv": (b'a,b\nx,"y\ny"\n"x\n' + SPOILT + b'",x\nz,y\n', 5, "a"),
    "a.tsv": (b"a\tb\n\nx\ty\nx\t" + SPOILT + b"\nz\ty\n", 4, "b"),
    "lines.txt": (b"one\n" + SPOILT + b"\nthree\n", 2, "text"),
    "parts.txt": (b"\n\none\r\none\r\n\r\nx\r\n" + SPOILT + b"\r\n\r\nthree\r\n", 7, "text"),
}


@pytest.mark.parametrize("name", SPOILT_FILES)
def test_a_byte_that_is_no_text_spoils_its_row_alone_and_is_named_by_file_line_field_and_byte(name, put, workspace):
    content, line, column = SPOILT_FILES[name]
    table = read_table(put(name, content), workspace)
    before, row, after = table.rows
    assert not isinstance(before, BadRow) and not isinstance(after, BadRow)
    byte = content.index(SPOILT) + 4
    assert row.reason == f"`{name}`, line {line}, field `{column}`: byte {byte} is not UTF-8"
    assert "caf\ufffd d\ufffd" in json.loads(row.text)[column]
    assert table.problems == (
        f"`{name}` has bytes that are not UTF-8 in 1 row; if all of it has another encoding, save it as UTF-8.",
    )


def test_every_spoilt_row_has_its_own_place(put, workspace):
    content = b"a,b\n" + b"".join(b"row %d,%s\n" % (i, b"\xff\xfe\xfd"[: i % 4]) for i in range(40))
    rows = read_table(put("a.csv", content), workspace).rows
    for i, row in enumerate(rows):
        byte = content.index(b"row %d," % i) + len(b"row %d," % i) + 1
        spoilt = f"`a.csv`, line {i + 2}, field `b`: byte {byte} is not UTF-8" if i % 4 else ""
        assert getattr(row, "reason", "") == spoilt


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("nothing.jsonl", r"`source` \(='nothing.jsonl'\) must be a file that exists; check the path, or say starter:"),
        ("a\0b.jsonl", "must be a file that exists"),
        ("x" * 5000, "must be a file that exists; check the path"),
        ("~nobody-of-this-name/x.csv", "must be a file that exists; check the path"),
        (".", r"`source` \(='.'\) must be a file, not a folder or a device"),
        ("", "must be a file, not a folder or a device"),
        (os.devnull, "must be a file, not a folder or a device"),
        ("starter:none", r"`source` \(='starter:none'\) must be a starter data set; there are .*restaurants"),
        ("starter:../../core", "must be a starter data set"),
        ("hub:", r"`source` \(='hub:'\) must look like hub:owner/name"),
        ("hub:../x", "must look like hub:owner/name"),
        ("hub:owner/name:a:b", "must look like hub:owner/name"),
    ],
)
def test_a_source_that_is_none_names_the_choices(source, match, workspace):
    with pytest.raises(LoRAError, match=match):
        read_table(source, workspace)


def test_over_large_files_are_refused_with_the_limit(put, workspace, monkeypatch):
    path = put("big.csv", b"")
    os.truncate(path, readers.MAX_BYTES + 1)
    with pytest.raises(LoRAError, match=r"`big.csv` \(200 MB\) must be at most 200 MB; save it as JSONL"):
        read_table(path, workspace)
    with pytest.raises(LoRAError, match="must be at most 200 MB"):
        save_upload(path, "big.csv", workspace)
    assert not list(workspace.uploads.iterdir())


def test_an_unreadable_file_is_named(put, workspace, monkeypatch):
    path = put("locked.csv", "a\n1\n")
    monkeypatch.setattr(readers.os, "access", lambda *_: False)
    with pytest.raises(LoRAError, match="`locked.csv` must be readable; change its permissions"):
        read_table(path, workspace)


def test_parquet_that_unpacks_to_too_much_is_refused_early(tmp_path, workspace, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(readers, "MAX_UNPACKED_BYTES", 10_000_000)
    path = tmp_path / "bomb.parquet"
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000), pa.array(["x" * 10_000]))
    pq.write_table(pa.table({"text": repeated}), path)
    assert path.stat().st_size < 100_000
    with pytest.raises(LoRAError, match="`bomb.parquet` must be at most 0.01 GB unpacked"):
        read_table(path, workspace)


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path, workspace):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(["1"]), pa.array(["2"])], names=["a", "a"]), tmp_path / "t.parquet")
    with pytest.raises(LoRAError, match="`t.parquet` has two columns of one name among a, a; rename one"):
        read_table(tmp_path / "t.parquet", workspace)


def test_many_columns_are_named_only_in_part(put, workspace):
    path = put("a.json", json.dumps({f"c{i}": 1 for i in range(30)}))
    with pytest.raises(LoRAError, match="c19 and 10 more"):
        read_table(path, workspace)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("../../etc/passwd.csv", "passwd.csv"),
        ("C:\\data\\my rows.csv", "my_rows.csv"),
        ("...hidden.json", "hidden.json"),
        ("/", "data"),
        ("a\0b\nc<>.csv", "a_b_c_.csv"),
        ("\u65e5\u672c\u8a9e.csv", "\u65e5\u672c\u8a9e.csv"),
        ("x" * 300 + ".jsonl", "x" * 54 + ".jsonl"),
        ("rows.tar.gz", "rows.tar.gz"),
        ("CON.csv", "data_CON.csv"),
        ("lpt1", "data_lpt1"),
        ("console.csv", "console.csv"),
    ],
)
def test_an_upload_gets_a_harmless_name_in_the_uploads(name, kept, put, workspace):
    target = save_upload(put("source", LINES), name, workspace)
    assert target == workspace.uploads / kept
    assert target.read_text() == LINES
    assert len(target.name.encode()) <= 255


def test_uploads_never_overwrite_one_another(put, workspace):
    contents = [f'{{"a": {i}}}\n' for i in range(3)]
    targets = [save_upload(put("source", text), "rows.jsonl", workspace) for text in contents]
    assert [t.name for t in targets] == ["rows.jsonl", "rows-2.jsonl", "rows-3.jsonl"]
    assert [t.read_text() for t in targets] == contents


def test_a_link_is_not_uploaded(put, tmp_path, workspace):
    link = tmp_path / "link.csv"
    link.symlink_to(put("secret.csv", CSV))
    with pytest.raises(LoRAError, match="`link.csv` must be a file of its own, not a link"):
        save_upload(link, "link.csv", workspace)


@pytest.mark.parametrize("place", [(shutil, "copyfileobj"), (tables.Path, "touch")])
def test_a_full_disk_leaves_nothing_half_written(place, put, workspace, monkeypatch):
    path = put("source", LINES)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*place, full)
    with pytest.raises(
        LoRAError, match=r"`rows.csv` must be copied to .* \(No space left on device\); free some space"
    ):
        save_upload(path, "rows.csv", workspace)
    assert not list(workspace.uploads.iterdir())


@pytest.fixture
def hub(monkeypatch):
    """A Hub that answers, with one data set of two splits."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    parts = {
        name: datasets.IterableDataset.from_generator(lambda n=n: ({"text": f"row {i}"} for i in range(n)))
        for name, n in (("test", 3), ("train", 5))
    }
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.IterableDatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_set_is_streamed_with_its_own_evaluation_rows(hub, workspace):
    table = read_table("hub:owner/name", workspace)
    assert (table.name, len(table.rows), len(table.eval_rows)) == ("owner/name", 5, 3)
    (args, kwargs) = hub[0]
    assert args == ("owner/name", None)
    assert kwargs["streaming"]
    assert not {"trust_remote_code", "data_files"} & kwargs.keys()


def test_a_hub_split_and_config_can_be_named(hub, workspace):
    table = read_table("hub:owner/name/main:test", workspace)
    assert (len(table.rows), table.eval_rows) == (3, [])
    assert hub[0][0] == ("owner/name", "main")
    with pytest.raises(LoRAError, match="must name a split of owner/name; it has test, train"):
        read_table("hub:owner/name:dev", workspace)


def test_a_large_hub_set_is_read_in_part_and_says_so(hub, workspace, monkeypatch):
    monkeypatch.setattr(tables, "MAX_HUB_ROWS", 4)
    table = read_table("hub:owner/name", workspace)
    assert len(table.rows) == 4
    assert table.problems == ("Only the first 4 rows of owner/name were read.",)


def test_a_hub_set_that_cannot_be_read_says_why(hub, workspace, monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported,\nbut found name.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        LoRAError, match=r"cannot be read \(Dataset scripts are no longer supported, but found name.py\)"
    ):
        read_table("hub:owner/name", workspace)


def test_without_a_network_the_hub_says_so_at_once_and_names_the_others(workspace, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(
        LoRAError, match=r"needs the Hub, which does not answer .*starter:restaurants.* or a file of your"
    ):
        read_table("hub:owner/name", workspace)


def test_a_hub_set_that_does_not_exist_is_told_from_a_missing_network(workspace, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def absent(*_, **__):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", absent)
    with pytest.raises(
        LoRAError, match=r"`source` \(='hub:owner/name'\) must be a data set on the Hub .*hf auth login"
    ):
        read_table("hub:owner/name", workspace)


def test_importing_the_data_module_loads_no_heavy_library():
    # `core` is replaced by an empty package of the same folder: what it loads itself is its own affair.
    code = (
        "import sys, types; core = types.ModuleType('core'); core.__path__ = ['core']; sys.modules['core'] = core;"
        "import studio.data;"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'gradio'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "num_rows", "columns"),
    [
        ("e2e/devset.csv", 4672, "mr ref"),
        ("wikisql/train.jsonl", 1000, "text"),
        ("wikisql/valid.jsonl", 100, "text"),
        ("glue/RTE/train.tsv", 2490, "index sentence1 sentence2 label"),
        ("glue/CoLA/train.tsv", 8551, "col1 col2 col3 col4"),
        ("glue/CoLA/dev.tsv", 1043, "col1 col2 col3 col4"),
        ("glue/MRPC/train.tsv", 3667, "Quality|#1 ID|#2 ID|#1 String|#2 String"),
        (
            "instruct/user_oriented_instructions.jsonl",
            252,
            "id motivation_app instruction instances.input instances.output",
        ),
        ("instruct/alpaca_en_demo.json", 999, "instruction input output"),
        ("instruct/sharegpt_conversations.json", 500, "id conversations"),
    ],
)
def test_real_files_are_read_whole(name, num_rows, columns, workspace):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not here: it is not part of the project")
    table = read_table(path, workspace)
    assert len(table.rows) == num_rows
    assert table.columns == tuple(columns.split("|" if "|" in columns else " "))


def test_real_plain_text_is_read_by_paragraph(workspace):
    path = SHARED / "text" / "shakespeare.txt"
    if not path.exists():
        pytest.skip("shakespeare.txt is not here: it is not part of the project")
    rows = read_table(path, workspace).rows
    assert "\n\n".join(row["text"] for row in rows).split() == path.read_text(encoding="utf-8").split()
    assert all(row["text"].strip() for row in rows)
