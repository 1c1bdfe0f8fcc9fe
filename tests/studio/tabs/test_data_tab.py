"""The Data tab: what its form says becomes a spec, and rows are previewed."""

import pytest

from core import (
    LoRAError,
)
from studio import data
from studio.data import DataSpec
from studio.forms import Form
from studio.tables import Table
from studio.tabs import data as data_tab
from tests.studio.tabs.pages import HOSTILE, drawn

DATA_NAMES = ["instruction", "template", "train_on", "eval_fraction", "max_eval_rows", "max_rows"]


def test_the_data_tab_s_values_become_a_spec():
    form = drawn(lambda: Form(DataSpec, DATA_NAMES))
    spec = DataSpec(
        source="rows.csv",
        prompt="q",
        completion="a",
        instruction="Do.",
        template="plain",
        eval_fraction=0.2,
        max_rows=9,
    )
    columns = ["q", data_tab.NONE, "a", None, data_tab.NONE]
    assert data_tab.parse(form, ["rows.csv", "causal", [], "pair", *columns, *form.shown(spec)]) == spec
    wrong = dict(zip(form.names, form.shown(spec), strict=True)) | {"eval_fraction": 0.9}
    with pytest.raises(LoRAError, match=r"`eval_fraction` \(=0\.9\) must be at least 0 and at most 0\.5"):
        data_tab.parse(form, ["rows.csv", "causal", [], "pair", *columns, *wrong.values()])
    with pytest.raises(LoRAError, match=r"`source` \(=nothing\) must name a data set; choose one in the Data tab\."):
        data_tab.parse(form, ["", "causal", [], "pair", *columns, *form.shown(spec)])


def test_a_preview_shows_the_first_rows_as_plain_text():
    rows = [{"a": HOSTILE, "b": None}, {"b": [1, {"x": "é"}], "c": 2.5}, *({"a": i} for i in range(50))]
    header, shown = data_tab.preview(Table("t", ("a", "b", "c"), rows))
    assert header == ["a", "b", "c"]
    assert shown[:3] == [[HOSTILE, "", ""], ["", "[1, {'x': 'é'}]", "2.5"], ["0", "", ""]]
    assert len(shown) == data_tab.PREVIEW_ROWS


@pytest.mark.parametrize("extra", [0, 1, 10_000])
def test_a_long_cell_is_cut_and_says_so(extra):
    text = "é" * (data_tab.CELL_LIMIT + extra)
    ((cell,),) = data_tab.preview(Table("t", ("a",), [{"a": text}]))[1]
    assert len(cell) == data_tab.CELL_LIMIT
    assert cell.endswith("…") == bool(extra)
    assert text.startswith(cell.removesuffix("…"))


def test_a_preview_can_be_sent_to_the_page_whatever_the_file_holds(tmp_path, workspace):
    import orjson

    (tmp_path / "cut.jsonl").write_text('{"a": "half an emoji: \\ud83d"}\n')
    table = data.read_table(str(tmp_path / "cut.jsonl"), workspace)
    orjson.dumps(data_tab.preview(table))
