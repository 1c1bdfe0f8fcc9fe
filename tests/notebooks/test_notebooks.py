"""The notebooks: sources and executed files agree, they keep the form that students rely on, and every one runs."""

import base64
import importlib.util
import os
import re
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
FAST = {"00_low_rank"}
"""Those that train no model."""


def _load_build():
    spec = importlib.util.spec_from_file_location("notebooks_build", ROOT / "notebooks/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build()
SOURCES = build.sources()
every_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def executed(source: Path) -> nbformat.NotebookNode:
    return nbformat.reads(source.with_suffix(".ipynb").read_text(encoding="utf-8"), as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_every_source_has_its_notebook_and_every_notebook_its_source():
    kept = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert kept == {path.stem for path in SOURCES} != set()


@every_notebook
def test_source_and_notebook_hold_the_same_cells(source):
    wanted, found = build.read_source(source), executed(source)
    parts = [[(cell.id, cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (wanted, found)]
    assert parts[0] == parts[1], "run `python notebooks/build.py` again"
    assert found.metadata == wanted.metadata


@every_notebook
def test_a_notebook_was_run_from_top_to_bottom_and_written_by_the_build(source):
    found = executed(source)
    counts = [cell.execution_count for cell in found.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert build.as_text(found) == source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert not build.problems_of(found)
    assert not [output for output in outputs(found) if output.output_type == "error"]


@every_notebook
def test_a_notebook_has_the_parts_that_a_student_expects(source):
    found = executed(source)
    text = "\n".join(cell.source for cell in found.cells if cell.cell_type == "markdown")
    parts = ("**Question.**", "$$", "§", "**Predict before you run.**", "## What we saw", "## Try it", "<details>")
    assert [part for part in parts if part not in text] == []
    code = [cell.source for cell in found.cells if cell.cell_type == "code"]
    assert "\nON_COLAB = False\nif ON_COLAB:" in code[0]
    assert any("assert " in cell for cell in code)
    assert {cell: n for cell in code if (n := len([line for line in cell.splitlines() if line.strip()])) > 15} == {}


@every_notebook
def test_a_notebook_uses_public_names_only(source):
    code = "\n".join(cell.source for cell in executed(source).cells if cell.cell_type == "code")
    ours = "\n".join(line for line in code.splitlines() if not line.startswith("from torch"))
    assert not re.search(r"(from|import) core\.|\._[a-z]|import peft", ours)


@every_notebook
def test_figures_are_small(source):
    images = [output.data["image/png"] for output in outputs(executed(source)) if "image/png" in output.get("data", {})]
    sizes = [len(base64.b64decode(image)) for image in images]
    assert sizes and max(sizes) < 150_000


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A workspace of all notebooks, as a student's: the starter is unpacked by the first that asks for it."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize(
    "source", [pytest.param(s, id=s.stem, marks=[] if s.stem in FAST else pytest.mark.slow) for s in SOURCES]
)
def test_a_notebook_runs_in_a_fresh_kernel(source, monkeypatch, home):
    monkeypatch.setenv("LORA_STUDIO_HOME", str(home))
    monkeypatch.setenv("LORA_STUDIO_NOTEBOOK_STEPS", "8")  # the claims hold already; those that are kept train longer
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    ran = build.execute(build.read_source(source))  # its asserts are its claims
    kinds = [[sorted(output.get("data", output)) for output in outputs(one)] for one in (ran, executed(source))]
    assert kinds[0] == kinds[1]


def test_cells_that_warn_tell_of_the_machine_or_end_in_stray_values_stop_the_build():
    cells = (
        "import warnings; warnings.warn('old')",
        "print('/home/ada/model')",
        "print(object())",
        "2 + 3",
        "print('1/2')",
    )
    notebook = jupytext.reads("".join(f"# %%\n{code}\n\n" for code in cells), fmt="py:percent")
    with pytest.raises(build.BuildError) as caught:
        build.execute(notebook)
    first, *others = str(caught.value).partition("\ncell-01 ")
    assert first.startswith("cell-00 writes to stderr: ") and "old" in first
    assert "".join(others).split("\n")[1:] == [
        "cell-01 shows a place of this machine: /home/a",
        "cell-02 shows a place of this machine: 0x" + re.search(r"0x(\w+)", str(caught.value))[1],
        "cell-03 ends in a value that is no figure: 5",
    ]


def test_the_same_run_gives_the_same_bytes():
    notebook = jupytext.reads("# %% [markdown]\n# # A\n\n# %%\nprint(1 + 1)\n", fmt="py:percent")
    first, second = (build.as_text(build.execute(notebook)) for _ in range(2))
    assert first == second and '"id": "cell-01"' in first
