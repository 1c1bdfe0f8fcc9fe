"""Learn: the list says what the files say, each notebook is shown whole, and what cannot be read says so."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from core import LoRAError
from studio.tabs import learn

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SOURCES = [path.with_suffix(".py") for path in FILES]
KEPT = [json.loads(path.read_text(encoding="utf-8")) for path in FILES]


def notebook(*cells: dict) -> str:
    first = {"cell_type": "markdown", "source": ["# 0. One\n", "\n", "**Question.** Is it\n", "so?\n", "\n", "More."]}
    return json.dumps({"cells": [first, *cells]})


def code(source: str, *outputs: dict) -> dict:
    return {"cell_type": "code", "source": source, "outputs": [*outputs]}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "00_one.ipynb").write_text(notebook())
    return tmp_path


def test_the_list_says_the_title_and_the_question_of_every_notebook_in_order():
    listed = re.findall(r"^- \[(.+)\]\(#learn/(.+)\)  \n  (.+)$", learn.page(""), re.MULTILINE)
    assert [name for _, name, _ in listed] == [source.stem for source in SOURCES] != []
    for (title, _, question), source in zip(listed, SOURCES, strict=True):
        told = source.read_text(encoding="utf-8")
        assert told.startswith(f"# %% [markdown]\n# # {title}\n")
        assert f"**Question.** {question}" in " ".join(told.replace("\n# ", " ").split())


@pytest.mark.parametrize(("source", "kept"), [*zip(SOURCES, KEPT, strict=True)], ids=lambda x: getattr(x, "stem", ""))
def test_a_notebook_is_shown_whole(source, kept):
    shown = learn.page(source.stem)
    outputs = [output for cell in kept["cells"] for output in cell.get("outputs", [])]
    num_images = sum("image/png" in output.get("data", {}) for output in outputs)
    assert len(re.findall(r"!\[.+\]\(data:image/png;base64,[\w+/=]+\)", shown)) == num_images > 0
    assert len(re.findall("^`{3,}text$", shown, re.MULTILINE)) == len(outputs) - num_images > 0
    for cell in kept["cells"]:
        assert "".join(cell["source"]).rstrip() in shown
    # HTML in a notebook is that of its solutions; the page's Markdown lets nothing else through either.
    assert set(re.findall(r"^</?\w+", re.sub(r"(?s)(`{3,}).*?\1", "", shown), re.MULTILINE)) == {
        "<details",
        "</details",
    }


def test_a_notebook_leads_to_the_next_and_the_last_to_the_list():
    for source, after in zip(SOURCES, [*SOURCES[1:], None], strict=True):
        end = learn.page(source.stem).rpartition("\n---\n")[2]
        assert re.findall(r"#learn[/\w]*", end) == [f"#learn/{after.stem}" if after else "#learn"]


def test_outputs_and_code_cannot_end_their_own_fence(folder):
    (folder / "00_one.ipynb").write_text(
        notebook(code("print('````')", {"output_type": "stream", "name": "stdout", "text": ["```\n", "# no title\n"]}))
    )
    assert "`````python\nprint('````')\n`````\n\n````text\n```\n# no title\n````" in learn.page("00_one", folder)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"cells": []}', notebook({"cell_type": "code", "source": "1"}), notebook(code("1", {"data": {}}))],
)
def test_a_notebook_that_cannot_be_read_says_so_and_hides_no_other(content, folder):
    (folder / "01_two.ipynb").write_text(content)
    message = r"`01_two.ipynb` must be a notebook with a title and a question \(\w+: .+\); make it anew by `python not"
    with pytest.raises(LoRAError, match=message):
        learn.read(folder / "01_two.ipynb")
    listed, shown = learn.page("", folder), learn.page("01_two", folder)
    assert "- [0. One](#learn/00_one)  \n  Is it so?\n" in listed
    assert re.search(f"\n- {message}", listed) and re.match(message, shown) and "(#learn)" in shown
    assert re.search(f"Next:\n\n- {message}", learn.page("00_one", folder))


def test_a_first_cell_without_a_question_is_named(folder):
    (folder / "01_two.ipynb").write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": "# 1. Two"}]}))
    assert "ValueError: its first cell has other words" in learn.page("", folder)


def test_no_notebooks_or_no_such_notebook_is_said_and_no_other_file_is_opened(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert f"No notebooks lie in `{empty}`. Install LoRA Studio anew" in learn.page("", empty)
    for name in ("07_gone", "../00_one", "<img src=x>"):
        told = learn.page(name, folder)
        assert told.startswith("# Learn\n\nThere is no such notebook; these are all.\n") and name not in told


def test_the_notebooks_travel_in_an_installed_package(tmp_path):
    build = "import setuptools; setuptools.setup()"
    steps = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run([sys.executable, "-c", build, *steps], cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert learn.page("", tmp_path / "lib/notebooks") == learn.page("")
    assert (tmp_path / "lib/studio/tabs/learn.py").is_file(), "from where it looks two folders up"
