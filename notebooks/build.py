"""Builds the notebooks: source in percent form -> fresh kernel -> executed notebook, the same bytes for the same run.

python notebooks/build.py             # all
python notebooks/build.py 00 02       # those whose names begin so
"""

import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
TIMEOUT_SECONDS = 1800
"""For one cell; generous, as machines differ."""

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""Of every notebook: nothing of the machine that ran it."""

_PLACE = re.compile(r"/(?:home|root|tmp|Users|work|opt|usr)/\S|0x[0-9a-f]{6,}")


class BuildError(Exception):
    """A notebook said what it must not say."""


def sources() -> list[Path]:
    """Returns the notebooks' sources, in order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def read_source(path: Path) -> NotebookNode:
    """Returns the notebook that a source in jupytext's percent form describes, not executed; ids go by position."""
    return _normal(jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent"))


def execute(notebook: NotebookNode) -> NotebookNode:
    """Runs all cells in a fresh kernel of this Python, in the notebooks' folder; returns the notebook with outputs.

    Raises:
        CellExecutionError: A cell failed; its message shows the cell.
        BuildError: A cell shows what it must not (see `problems_of`).
    """
    notebook = nbformat.from_dict(notebook)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_SECONDS,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns of its own socket
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()
    notebook = _normal(notebook)
    if problems := problems_of(notebook):
        raise BuildError("\n".join(problems))
    return notebook


def problems_of(notebook: NotebookNode) -> list[str]:
    """Returns what a student must not see in the outputs: warnings, places of this machine, stray values."""
    problems = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            if output.get("name") == "stderr":
                problems.append(f"{cell.id} writes to stderr: {text.strip()}")
            elif found := _PLACE.search(text):
                problems.append(f"{cell.id} shows a place of this machine: {found.group()}")
            elif output.output_type == "execute_result" and "image/png" not in output.data:
                problems.append(f"{cell.id} ends in a value that is no figure: {text[:60]}")
    return problems


def as_text(notebook: NotebookNode) -> str:
    """Returns a notebook as the text of its file."""
    return nbformat.writes(notebook) + "\n"


def _normal(notebook: NotebookNode) -> NotebookNode:
    """Returns the notebook in the one form that is written: fixed ids and metadata, outputs without noise."""
    cells = []
    for place, cell in enumerate(notebook.cells):
        cell = nbformat.from_dict({**cell, "id": f"cell-{place:02}", "metadata": {}})
        for output in cell.get("outputs", []):
            output.pop("transient", None)
            if "data" in output:
                output["metadata"] = {}
                if "image/png" in output["data"]:
                    output["data"].pop("text/plain", None)  # the figure's class and size
        cells.append(cell)
    return nbformat.from_dict(
        {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    )


def main(names: list[str]) -> None:
    """Builds the notebooks whose names begin with one of `names`; all without any."""
    for path in sources():
        if not names or path.name.startswith(tuple(names)):
            print(path.stem, flush=True)
            path.with_suffix(".ipynb").write_text(
                as_text(execute(read_source(path))), encoding="utf-8"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
