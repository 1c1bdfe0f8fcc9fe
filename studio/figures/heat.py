"""One number of every matrix, as a map of layers and matrices."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from studio.figures.style import (
    FRAME,
    TEXT,
    WIDTH,
    Plot,
    finished,
    heat_colours,
    new_figure,
    number_text,
    sentence_figure,
    short_names,
    shortened,
    style_axes,
    ticks,
)
from studio.matrices import split_path
from studio.svg import INK

_LEAST_SPAN = 1e-3  # of the colours, beside the largest number: less is no difference that anybody should see
_MOST_DIGITS = 5  # of each of five numbers below the bar
MOST_REGIONS = 3000
"""Up to so many cells can be pointed at; a map of more would weigh too much in a page."""


def heat_figure(values: Mapping[str, float | None], *, title: str, unit: str = "", note: str = "") -> Plot:
    """Returns a map of one number a module: layers across, kinds of matrix down, the largest framed.

    Modules without a number, and numbers that are not finite, are hatched.

    Args:
        values: By module path, such as "model.layers.17.self_attn.q_proj".
        title: What the number is; shown as it stands.
        unit: The number's unit, for the colour bar.
        note: A few words beside the colour bar, such as what chance would give.
    """
    layers, names, grid, cells = _grid(values)
    seen = np.isfinite(grid)
    if not seen.any():
        return sentence_figure(title, "No value is a finite number." if values else "No values to show.")
    num_rows, num_columns = grid.shape
    height = 88 + 15 * bool(note) + min(15 * num_rows + 12 * (num_rows < 3), 640)
    figure = new_figure(title, height, width=WIDTH + 5 * max(0, num_columns - 40))
    axes = style_axes(figure.add_subplot(), "", "")
    axes.grid(visible=False)
    if not seen.all():
        style: dict[str, Any] = {"facecolor": "none", "edgecolor": to_rgba(INK, 0.28), "hatch": "/////", "linewidth": 0}
        axes.add_patch(Rectangle((-0.5, -0.5), num_columns, num_rows, zorder=-1, **style))
    low, high = np.nanmin(grid), np.nanmax(grid)
    least = _LEAST_SPAN * max(abs(low), abs(high))
    if low == high:
        low -= 0.5 * abs(low) or 0.5
    elif high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    colours = heat_colours()
    image = axes.imshow(grid, colours, aspect="auto", interpolation="none", vmin=low, vmax=high)
    _name_cells(axes, layers, names)
    _mark_largest(figure, axes, layers, names, grid, note)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.55, anchor=(1, 0), aspect=28, pad=10 / height)
    bar.outline.set_visible(False)
    style_axes(bar.ax, shortened(unit, 32) or " ", "")  # the line stays, as the words beside it need it
    is_wide = any(len(number_text(tick)) > _MOST_DIGITS for tick in ticks(5).tick_values(low, high))
    bar.locator, bar.formatter = ticks(2 if is_wide else 5), FuncFormatter(number_text)
    bar.update_ticks()
    finished(figure)
    if len(cells) <= MOST_REGIONS:
        figure.regions = _regions(figure, axes, cells, values)
    return figure


def _name_cells(axes: Axes, layers: Sequence[int], names: Sequence[str]) -> None:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**9) if len(layers) / step <= 16)
    first = int(layers[0] < 0)
    columns = [*range(first), *range(first, len(layers), step)]
    axes.set_xticks(columns, [str(layers[column]) if layers[column] >= 0 else "·" for column in columns])
    step = math.ceil(len(names) / 50)
    axes.set_yticks(range(0, len(names), step), names[::step], parse_math=False)
    style = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "top"}
    axes.annotate("layer", (0, 0), (-3.5, -6.5), **style, **TEXT)
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)


def _mark_largest(
    figure: Figure, axes: Axes, layers: Sequence[int], names: Sequence[str], grid: np.ndarray, note: str
) -> None:
    row, column = divmod(int(np.nanargmax(grid)), grid.shape[1])
    frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=FRAME, linewidth=1.6, clip_on=False)
    axes.add_patch(frame)
    layer = f"layer {layers[column]}, " if layers[column] >= 0 else ""
    lines = [f"framed: largest, {number_text(float(f'{grid[row, column]:.3g}'))}", f"{layer}{names[row]}"]
    if not np.isfinite(grid).all():
        lines.append("hatched: no value")
    if note:
        lines.append(shortened(note, 34))
    figure.text(0.01, 0.02, "\n".join(lines), va="bottom", linespacing=1.3, **TEXT)


def _regions(
    figure: Figure, axes: Axes, cells: Mapping[str, tuple[int, int]], values: Mapping[str, float | None]
) -> dict[str, tuple[tuple[float, float, float, float], str]]:
    """Returns path → where its cell lies in the figure, and its value in words."""
    height = figure.bbox.height
    scale = 72 / figure.dpi
    found = {}
    for path, (row, column) in cells.items():
        corners = axes.transData.transform([(column - 0.5, row - 0.5), (column + 0.5, row + 0.5)])
        (left, right), (low, high) = sorted(corners[:, 0]), sorted(corners[:, 1])
        box = tuple(float(x) * scale for x in (left, height - high, right - left, high - low))
        value = values[path]
        words = number_text(float(f"{value:.4g}")) if value is not None and math.isfinite(value) else "no value"
        found[path] = (box, f"{path}: {words}")
    return found


def _grid(values: Mapping[str, float | None]) -> tuple[list[int], list[str], np.ndarray, dict[str, tuple[int, int]]]:
    """Returns layers, the shown names of matrices, values as (matrices, layers), NaN for none, and path → its cell."""
    places = {path: split_path(path) for path in values}
    cells = Counter(place[1:] for place in places.values())
    clash = any(count > 1 for count in cells.values())  # such as an encoder's layer 3 and a decoder's
    keys = {
        path: f"{before}.*.{matrix}" if clash and before else matrix for path, (before, _, matrix) in places.items()
    }
    kinds = list(dict.fromkeys(keys.values()))
    numbers = sorted({layer for _, layer, _ in places.values() if layer >= 0})
    if numbers and numbers[-1] - numbers[0] < 200:
        numbers = list(range(numbers[0], numbers[-1] + 1))
    layers = [-1, *numbers] if any(layer < 0 for _, layer, _ in places.values()) else numbers
    grid = np.full((len(kinds), len(layers)), np.nan)
    rows, columns = ({key: place for place, key in enumerate(some)} for some in (kinds, layers))
    cells = {path: (rows[keys[path]], columns[places[path][1]]) for path in values}
    for path, value in values.items():
        grid[cells[path]] = np.nan if value is None else float(value)
    names = short_names(kinds)
    return layers, [names[kind] for kind in kinds], np.where(np.isfinite(grid), grid, np.nan), cells
