"""What a view of an adapter shows: a figure or a table, the numbers and the maths behind it, and a notebook of it."""

import base64
import csv
import hashlib
import io
import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core import LoRAError
from studio.opened import Opened
from studio.workspace import Workspace

if TYPE_CHECKING:
    from studio.figures.style import Plot

KINDS = {
    "png": ("PNG", "image/png"),
    "svg": ("SVG", "image/svg+xml"),
    "csv": ("Numbers (CSV)", "text/csv"),
    "ipynb": ("Open as notebook", "application/x-ipynb+json"),
}
MOST = 64
"""So many pictures can be downloaded: those that were drawn last."""


@dataclass(frozen=True)
class Picture:
    """One view of an adapter.

    Attributes:
        title: What it shows, also what a screen reader says in its place.
        figure: The figure; None where `html` is a table.
        html: What stands in the place of a figure, or below it.
        numbers: Column → what stands in it, all of one length: what is drawn.
        maths: How the numbers come about, a few lines with the shapes at hand.
        notebook: Code that makes the figure, or the table, anew from an opened adapter; see `recipe`.
    """

    title: str
    figure: "Plot | None" = None
    html: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    maths: str = ""
    notebook: str = ""

    @property
    def key(self) -> str:
        """Its name among all pictures."""
        return hashlib.sha256(f"{self.title}\n{self.notebook}\n{self.csv()}".encode()).hexdigest()[:24]

    def kinds(self) -> list[str]:
        """Returns the kinds of file that `file` can make of it."""
        has = {"png": self.figure, "svg": self.figure, "csv": self.numbers, "ipynb": self.notebook}
        return [kind for kind, there in has.items() if there]

    def page(self) -> str:
        """Returns it as HTML, with its downloads and its maths."""
        from studio.svg import to_svg  # which brings matplotlib: it is not needed to serve the page

        drawn = "" if self.figure is None else f'<div class="figure">{to_svg(self.figure, self.title)}</div>'
        buttons = "".join(
            f'<button type="button" data-get="{kind}" aria-label="{KINDS[kind][0]}: {escape(self.title)}">'
            f"{KINDS[kind][0]}</button>"
            for kind in self.kinds()
        )
        maths = f"<details><summary>The maths</summary><pre>{escape(self.maths)}</pre></details>" if self.maths else ""
        below = f'<div class="below">{buttons}<span class="sub-line" role="status"></span></div>'
        return f'<div class="picture" data-key="{self.key}">{drawn}{self.html}{below}{maths}</div>'

    def file(self, kind: str) -> bytes:
        """Returns it as a file.

        Raises:
            LoRAError: There is no file of that kind.
        """
        if kind not in self.kinds():
            raise LoRAError(f"`kind` (={kind!r}) must be one of {', '.join(self.kinds())}.")
        if kind == "csv":
            return self.csv().encode()
        if kind == "ipynb":
            return notebook(self.title, self.maths, self.notebook)
        from studio.svg import figure_bytes

        assert self.figure is not None
        return figure_bytes(self.figure, kind)

    def csv(self) -> str:
        """Returns the numbers as CSV. Text that a spreadsheet would compute has a ' before it."""
        columns = {name: [_cell(value) for value in np.asarray(c).tolist()] for name, c in self.numbers.items()}
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        return text.getvalue()


class Pictures:
    """The pictures that pages show, kept for their downloads."""

    def __init__(self) -> None:
        self._kept: dict[str, Picture] = {}
        self._lock = threading.Lock()

    def put(self, picture: Picture) -> str:
        """Keeps a picture, and returns it as HTML."""
        with self._lock:
            self._kept.pop(picture.key, None)
            self._kept[picture.key] = picture
            for oldest in [*self._kept][:-MOST]:
                del self._kept[oldest]
        return picture.page()

    def hand_out(self, key: str, kind: str) -> dict[str, str]:
        """Returns a picture as a file: its `name`, `mime`, and `data` in base64.

        Raises:
            LoRAError: The picture is not kept any more, or has no such file.
        """
        picture = self._kept.get(key)
        if picture is None:
            raise LoRAError("This picture is an older one; open its section again and it can be downloaded.")
        name = "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in picture.title)[:80]
        data = base64.b64encode(picture.file(kind)).decode()
        return {"name": f"{name}.{kind}", "mime": KINDS[kind][1], "data": data}


def recipe(opened: Opened, workspace: Workspace, *lines: str, name: str = "adapter") -> str:
    """Returns code that reads an adapter as `name`, and then `lines`; the last of them shows what is seen.

    Args:
        opened: The adapter.
        workspace: Where it lies, or its base model.
        lines: Further code; imports included, but for `Adapter` and `Workspace`.
        name: The variable that holds the adapter.
    """
    root = workspace.root
    home = Path.home()
    shown = f"~/{root.relative_to(home)}" if root.is_relative_to(home) else str(root)
    first = [
        "from core import Adapter",
        "from studio.workspace import Workspace",
        "",
        f"workspace = Workspace({shown!r})  # where the studio keeps what it writes; change it if that has moved",
    ]
    return "\n".join([*first, loading(opened, name), *lines])


def loading(opened: Opened, name: str) -> str:
    """Returns the line that reads an adapter as `name`."""
    source = opened.source
    if source.run:
        part = "adapter" if source.step is None else f"checkpoints/{source.step:08d}"
        return f"{name} = Adapter.load(workspace.root / {f'runs/{source.run}/{part}'!r})"
    more = "".join(f", {key}={value!r}" for key in ("scaling", "parts") if (value := getattr(source, key)))
    return f"{name} = Adapter.load({source.path!r}{more})"


def notebook(title: str, maths: str, code: str) -> bytes:
    """Returns a Jupyter notebook (nbformat 4.5) of one view."""
    told = "\n\n".join([f"# {title}", *(["```\n" + maths + "\n```"] if maths else [])])
    cells: list[dict[str, Any]] = [{"cell_type": "markdown", "id": "told", "metadata": {}, "source": told}]
    for place, part in enumerate(code.split("\n\n\n")):
        cell = {"cell_type": "code", "id": f"code-{place}", "metadata": {}, "source": part}
        cells.append({**cell, "execution_count": None, "outputs": []})
    about = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return json.dumps({"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}, indent=1).encode()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.9g}"
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return value
