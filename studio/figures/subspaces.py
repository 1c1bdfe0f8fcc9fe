"""How near the directions of two updates are, and how far those of W + ΔW are from W's."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from studio.figures.style import (
    FRAME,
    TEXT,
    Plot,
    add_legend,
    array,
    finished,
    heat_colours,
    new_figure,
    number_text,
    sentence_figure,
    shortened,
    style_axes,
    ticks,
)
from studio.palette import ADAPTED, BASE, CHANCE
from studio.svg import INK


def similarity_figure(panels: Mapping[str, Any], *, first: str = "", second: str = "", title: str = "") -> Plot:
    """Returns φ(i, j) of pairs of subspaces, a panel each, all with one scale; the paper's figures 3 and 4.

    Args:
        panels: Title → φ, (r1, r2): how much of the leading i directions of the first (down) lies in the leading j of
            the second (across), or the other way round; 1 is all.
        first, second: What the two are called.
        title: Shown as it stands.
    """
    title = title or "Similarity of subspaces φ(i, j)"
    tables = {name: array(table) for name, table in panels.items()}
    tables = {name: table for name, table in tables.items() if table.size}
    if not tables:
        return sentence_figure(title, "One of the two has no directions in this basis: its factor is still zero.")
    num_columns = min(3, len(tables))
    num_rows = math.ceil(len(tables) / num_columns)
    figure = new_figure(title, 60 + 175 * num_rows)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    image: Any = None
    for panel, (name, table) in zip(axes, tables.items(), strict=False):
        style_axes(panel, "", "")
        panel.grid(visible=False)
        r1, r2 = table.shape
        extent = (0.5, r2 + 0.5, r1 + 0.5, 0.5)
        image = panel.imshow(table, heat_colours(), vmin=0, vmax=1, aspect="auto", interpolation="none", extent=extent)
        panel.set_title(f"{shortened(name, 16)}, mean {table.mean():.2f}", loc="left", pad=3, **TEXT)
        panel.xaxis.set_major_locator(ticks(4, whole=True))
        panel.yaxis.set_major_locator(ticks(4, whole=True))
    for panel in axes[len(tables) :]:
        panel.remove()
    figure.supxlabel(f"j, directions of {shortened(second or 'the second', 40)}", **TEXT)
    figure.supylabel(f"i, of {shortened(first or 'the first', 22)}", **TEXT)
    bar = figure.colorbar(image, ax=axes[: len(tables)].tolist(), location="right", aspect=24, pad=0.02)
    bar.outline.set_visible(False)
    style_axes(bar.ax, "", "φ")
    bar.formatter = FuncFormatter(number_text)
    bar.update_ticks()
    return finished(figure)


def intruder_figure(
    cosines: Any, sigma: Any, threshold: float, null: float, *, most: int = 40, title: str = ""
) -> Plot:
    """Returns |cos| of the strongest directions of W + ΔW with W's own, and the largest of each.

    Args:
        cosines: (k, p), of direction i of W + ΔW with j of W.
        sigma: (k), the singular values of W + ΔW.
        threshold: A direction whose largest cosine lies below is an intruder.
        null: About the largest cosine of a random direction.
        most: How many of W's directions the map shows.
        title: Shown as it stands.
    """
    title = title or "Directions of W + ΔW among W's"
    table, sigma = array(cosines), array(sigma)
    if not table.size:
        return sentence_figure(title, "W + ΔW is zero: it has no directions.")
    k, highest = len(table), table.max(1)
    is_intruder = highest < threshold
    figure = new_figure(title, 330)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    style_axes(above, "", "W's direction")
    above.grid(visible=False)
    shown = table[:, :most].T
    extent = (0.5, k + 0.5, len(shown) + 0.5, 0.5)
    image = above.imshow(shown, heat_colours(), vmin=0, vmax=1, aspect="auto", interpolation="none", extent=extent)
    for i in np.flatnonzero(is_intruder):
        frame = Rectangle((i + 0.5, 0.5), 1, len(shown), fill=False, edgecolor=FRAME, linewidth=1.6, clip_on=False)
        above.add_patch(frame)
    above.tick_params(axis="x", labelbottom=False)
    style_axes(below, "direction of W + ΔW, strongest first", "largest |cos|")
    index = np.arange(1, k + 1)
    bars = below.bar(index, highest, width=0.78, color=BASE, label="W's own")
    handles: list[Any] = [bars]
    if is_intruder.any():
        style: dict[str, Any] = {"width": 0.78, "color": ADAPTED, "edgecolor": FRAME, "linewidth": 1.6}
        marked = below.bar(index[is_intruder], highest[is_intruder], **style)
        marked.set_label("intruder (framed)")
        handles.append(marked)
    handles += [
        below.axhline(threshold, color=INK, linewidth=1, linestyle=":", label="threshold"),
        below.axhline(null, color=CHANCE, linewidth=1.6, linestyle="--", label="chance"),
    ]
    below.set_ylim(0, 1.05)
    below.set_xlim(0.4, k + 0.6)
    below.xaxis.set_major_locator(ticks(10, whole=True))
    bar = figure.colorbar(image, ax=[above], location="right", aspect=18, pad=0.02)
    bar.outline.set_visible(False)
    style_axes(bar.ax, "", "|cos|")
    add_legend(figure, handles, loc="upper left", bbox_to_anchor=(0.01, 1 - 21 / 330))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 18 / 330))
    return finished(figure)
