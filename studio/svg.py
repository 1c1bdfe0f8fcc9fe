"""A matplotlib figure -> SVG to stand inside a page, or a file."""

import hashlib
import io
import re
import threading
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from core.errors import LoRAError

INK = "#1b2330"
"""Text, spines, ticks and grid; in `to_svg` it becomes the page's own text colour."""

_SCALES = 0.75, 1.65  # of SVG units to CSS pixels: text never under 7.5 nor over 16.5 pixels
_PLACE = "\ue000"  # stands where the figure's own id prefix will; unprintable, so never in a label
_SETTINGS = threading.Lock()


def to_svg(figure: Figure, label: str) -> str:
    """Returns `figure` as SVG to stand inside an HTML page.

    Ink takes the page's text colour and text its font; the background is the page's. It scales with
    the width it is given, between sizes at which text is readable. Ids are the figure's own, so that
    many figures fit on one page. The same figure and label give the same string. What can be pointed at
    (`Plot.regions`) are rectangles with their words as a title.

    Args:
        figure: One of `studio.figures`, or another whose ink is `INK`.
        label: What a screen reader says in place of the picture.
    """
    # No prolog, metadata or style sheet: the sheet's rule for `*` would reach the whole page.
    root = ET.fromstring(_svg(figure, fonttype="none", transparent=True))
    for sheet in root.findall("./{*}defs[{*}style]"):
        root.remove(sheet)
    width, height = figure.get_size_inches() * 72
    used = dict.fromkeys(name for element in root.iter() for text in element.attrib.values() for name in _used(text))
    ids = {name: f"{_PLACE}-{number}" for number, name in enumerate(used)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: text for name, text in element.attrib.items()}
        element.attrib = {name: _adapted(text, ids) for name, text in attributes.items() if name != "id"}
        if attributes.get("id") in ids:
            element.set("id", ids[attributes["id"]])
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-label": printable(label),
        "fill": "currentColor",
        "stroke-linejoin": "round",
        "style": f"min-width: {_SCALES[0] * width:.0f}px; max-width: {_SCALES[1] * width:.0f}px; "
        "font-variant-numeric: tabular-nums",
    }
    for name, ((x, y, w, h), words) in getattr(figure, "regions", {}).items():
        place = {"x": f"{x:.2f}", "y": f"{y:.2f}", "width": f"{w:.2f}", "height": f"{h:.2f}"}
        area = ET.SubElement(root, "rect", {**place, "data-name": printable(name), "fill": "transparent"})
        ET.SubElement(area, "title").text = printable(words)
    text = ET.tostring(root, encoding="unicode")
    return text.replace(_PLACE, "f" + hashlib.sha256(text.encode()).hexdigest()[:12])


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes `figure` to `path`, as PNG (150 dpi) or SVG by its ending, in dark ink on white.

    Raises:
        LoRAError: The ending is another one.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".png", ".svg"):
        raise LoRAError(f"`path` (={path}) must end in .png or .svg.")
    path.write_bytes(figure_bytes(figure, ending[1:]))


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """Returns `figure` as a file, "png" (150 dpi) or "svg", in dark ink on white."""
    if kind == "svg":
        return _svg(figure, fonttype="path", facecolor="white")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def printable(text: str) -> str:
    """Returns `text` with a space for each letter that cannot be shown."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _svg(figure: Figure, *, fonttype: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # The only way to choose how text is written; put back at once, and one thread at a time.
    with _SETTINGS, mpl.rc_context({"svg.fonttype": fonttype, "svg.hashsalt": "lora-studio"}):
        figure.savefig(buffer, format="svg", metadata=metadata, **settings)
    return buffer.getvalue()


def _used(attribute: str) -> list[str]:
    return [attribute[1:]] if attribute.startswith("#") else re.findall(r"url\(#([^)]+)\)", attribute)


def _adapted(attribute: str, ids: Mapping[str, str]) -> str:
    for name in _used(attribute):
        attribute = attribute.replace(f"#{name}", f"#{ids[name]}")
    return re.sub(r"font-family: [^;]*(; )?", "", attribute.replace(INK, "currentColor"))
