"""A frozen weight W: its own spectrum, how ΔW's directions lie towards its strongest, and how much of W is in them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter

from core.errors import LoRAError
from studio.figures.style import (
    TEXT,
    Plot,
    add_legend,
    array,
    finished,
    log_scale,
    new_figure,
    number_text,
    sentence_figure,
    shortened,
    style_axes,
    ticks,
)
from studio.palette import ADAPTED, BASE, CHANCE
from studio.svg import INK

_STYLES = ("-", "-.", ":")  # of the leading 1, some, and all directions of ΔW


def weight_figure(sigma: Any, shape: tuple[int, int], *, title: str = "") -> Plot:
    """Returns the singular values of W beside those of noise of its size, up to the edge of Marchenko and Pastur.

    Args:
        sigma: (min(out, in)), all singular values of W, falling.
        shape: (out, in) of W.
        title: Shown as it stands.

    Raises:
        LoRAError: There are not as many of them as W has.
    """
    sigma = array(sigma)
    if sigma.shape != (min(shape),):
        raise LoRAError(f"`sigma` (={sigma.shape}) must be all {min(shape)} singular values of a W of shape {shape}.")
    title = title or "Singular values of W"
    if not (np.isfinite(sigma).all() and sigma.max() > 0):
        return sentence_figure(title, "W is zero, or not finite: there is nothing to compare with noise.")
    scale = float(np.linalg.norm(sigma)) / math.sqrt(shape[0] * shape[1])
    noise = scale * _noise(shape)
    edge = scale * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    num_above = int((sigma > edge).sum())
    figure = new_figure(title, 240)
    axes = style_axes(figure.add_subplot(), "direction, strongest first", "σ of W (log)")
    index = np.arange(1, len(sigma) + 1)
    axes.plot(index, noise, color=CHANCE, linestyle="--", linewidth=1.6, label="noise of the same size and ‖W‖")
    axes.plot(index, sigma, color=BASE, linewidth=1.8, label="W")
    axes.axhline(edge, color=INK, linewidth=1, linestyle=":")
    axes.annotate(
        f"edge of noise: {num_above} of {len(sigma)} above",
        (1, edge),
        (-4, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        **TEXT,
    )
    log_scale(axes, np.concatenate([sigma, noise]))
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(ticks(6, whole=True))
    add_legend(axes)
    return finished(figure)


def alignment_figure(sides: Mapping[str, tuple[Any, int]], *, title: str = "") -> Plot:
    """Returns how much of ΔW's leading directions lies in W's leading j: a panel a side, with the level of chance.

    Args:
        sides: Such as "reads" → (|cos| between direction i of ΔW and j of W, (k, q); the dimension of their space).
        title: Shown as it stands.
    """
    title = title or "Where ΔW's directions lie in W's"
    tables = {name: (array(cosines) ** 2, dim) for name, (cosines, dim) in sides.items()}
    if not all(table.size for table, _ in tables.values()):
        return sentence_figure(title, "ΔW is zero: it has no directions yet.")
    figure = new_figure(title, 240)
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False).flatten()
    handles: list[Any] = []
    top = 0.0
    for panel, (name, (table, dim)) in zip(panels, tables.items(), strict=True):
        style_axes(panel, f"j, W's strongest of {dim:,}", "")
        num, width = table.shape
        j = np.arange(1, width + 1)
        handles = panel.plot(j, 100 * j / dim, color=CHANCE, linestyle="--", linewidth=1.6, label="chance")
        for i, style in zip(sorted({1, min(4, num), num}), _STYLES, strict=False):
            share = 100 * table[:i].sum(0).cumsum() / i
            top = max(top, share[-1], 100 * width / dim)
            label = "ΔW's first" if i == 1 else f"first {i}"
            handles += panel.plot(j, share, color=ADAPTED, linestyle=style, linewidth=1.8, label=label)
        panel.set_title(name, loc="left", pad=3, **TEXT)
        panel.set_xlim(1, max(2, width))
        panel.xaxis.set_major_locator(ticks(4, whole=True))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g} %"))
    panels[0].set_ylim(0, 1.05 * top)
    panels[0].set_ylabel("share of their length²", **TEXT)
    add_legend(figure, handles, loc="upper left", bbox_to_anchor=(0.01, 1 - 21 / 240))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 18 / 240))  # which leaves the legend its row
    return finished(figure)


def enrichment_figure(panels: Mapping[str, tuple[int, Mapping[str, tuple[float, float]]]], *, title: str = "") -> Plot:
    """Returns how much of W lies in ΔW's directions, between chance and the most there is: a line a matrix.

    Args:
        panels: Title → (r, name of a matrix → ‖Uᵀ·W·V‖ in multiples of chance for the top-r directions of ΔW, and for
            those of W). All panels have the same matrices.
        title: Shown as it stands.
    """
    title = title or "How much of W lies in ΔW's directions"
    names = list(dict.fromkeys(name for _, rows in panels.values() for name in rows))
    if not names:
        return sentence_figure(title, "ΔW is zero: it has no directions yet.")
    height = 105 + 17 * len(names)
    figure = new_figure(title, height)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False).flatten()
    handles: list[Any] = []
    for panel, (name, (r, rows)) in zip(axes, panels.items(), strict=True):
        style_axes(panel, "", "")
        places = [names.index(row) for row in rows]
        delta, weight = array(list(rows.values())).T
        spread = 2 / (math.sqrt(2) * r)  # of random directions, 19 of 20 lie within
        area = panel.axvspan(max(0.1, 1 - spread), 1 + spread, color=CHANCE, alpha=0.3, linewidth=0)
        area.set_label("19 of 20 by chance")
        chance = panel.axvline(1, color=CHANCE, linestyle="--", linewidth=1.6, label="chance")
        panel.hlines(places, np.minimum(delta, 1), weight, colors=INK, alpha=0.4, linewidth=1)
        style: dict[str, Any] = {"linestyle": "", "markersize": 6}
        handles = [chance, area]
        handles += panel.plot(delta, places, color=ADAPTED, marker="o", label="ΔW's", **style)
        handles += panel.plot(weight, places, color=BASE, marker="s", label="W's own top r", **style)
        panel.grid(visible=False)
        panel.set_xscale("log")
        panel.minorticks_off()
        panel.xaxis.set_major_formatter(FuncFormatter(number_text))
        panel.set_title(name, loc="left", pad=3, **TEXT)
    axes[0].set_yticks(range(len(names)), [shortened(name, 22) for name in names])
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel("‖UᵀWV‖ of these directions, × chance (log)", **TEXT)
    add_legend(figure, handles, loc="upper left", bbox_to_anchor=(0.01, 1 - 21 / height))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 18 / height))  # which leaves the legend its row
    return finished(figure)


def _noise(shape: tuple[int, int]) -> np.ndarray:
    """Returns the singular values of a large random matrix with entries of variance 1, falling.

    They are the quantiles of their density, √((σ₊² − σ²)(σ² − σ₋²)) / σ between σ₊ and σ₋ = √out ± √in.
    """
    low, high = sorted((abs(math.sqrt(shape[0]) - math.sqrt(shape[1])), math.sqrt(shape[0]) + math.sqrt(shape[1])))
    angle = np.linspace(0, math.pi, 4001)[1:-1]
    x = (low + high) / 2 - (high - low) / 2 * np.cos(angle)  # denser at both ends, where the density turns
    density = np.sqrt((high**2 - x**2) * (x**2 - low**2)) / x * np.sin(angle)
    share = np.cumsum(density)
    p = min(shape)
    return np.interp((np.arange(p, 0, -1) - 0.5) / p, share / share[-1], x)
