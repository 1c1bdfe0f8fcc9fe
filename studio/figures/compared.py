"""Numbers of runs beside one another: as bars, and as lines over a setting."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter

from studio.figures.style import TEXT, Plot, add_legend, finished, new_figure, number_text, sentence_figure, style_axes
from studio.palette import ADAPTED, BASE, CHANCE
from studio.svg import INK

_STYLES: Sequence[dict[str, Any]] = (
    {"color": ADAPTED, "linestyle": "-", "marker": "o"},
    {"color": BASE, "linestyle": "--", "marker": "s"},
    {"color": INK, "linestyle": "-.", "marker": "^"},
    {"color": CHANCE, "linestyle": ":", "marker": "D"},
)


def bars_figure(values: Mapping[str, float], *, title: str, unit: str) -> Plot:
    """Returns one bar a name, across, with its number; where all are alike, points on an axis that begins near them.

    Args:
        values: Name → number.
        title: Shown as it stands.
        unit: What the numbers are.
    """
    if not values:
        return sentence_figure(title, "Nothing was measured yet.")
    figure = new_figure(title, 70 + 24 * len(values))
    axes = style_axes(figure.subplots(), unit, "")
    axes.grid(visible=False)
    names, numbers = list(values), np.array(list(values.values()), float)
    low, high = min(numbers.min(), 0.0), max(numbers.max(), 0.0)
    if low == 0 and numbers.min() > 0.6 * high:  # alike: their differences are what is to be seen
        low = numbers.min() - 0.6 * (high - numbers.min() or high)
    places = range(len(names))
    if low > 0:  # a bar from there would lie about the ratio
        axes.plot(numbers, places, "o", color=ADAPTED, markersize=7)
        axes.hlines(places, low, numbers, colors=ADAPTED, linestyles=":", linewidth=1)
        axes.set_ylim(-0.6, len(names) - 0.4)
    else:
        axes.barh(places, numbers, color=ADAPTED, height=0.62)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(low if low else None, high + 0.2 * (high - low or 1))
    for place, number in enumerate(numbers):
        axes.annotate(
            number_text(float(f"{number:.4g}")),
            (max(number, 0.0), place),
            (7, 0),
            textcoords="offset points",
            va="center",
            **TEXT,
        )
    return finished(figure)


def lines_figure(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    names: Sequence[str] = (),
    level: tuple[float, str] | None = None,
) -> Plot:
    """Returns one line a name over x, each with its own colour, dashes and marks.

    Args:
        x: Where the points are; spread by powers of two if they grow like that.
        lines: Name → a number for each x; the first four can be told apart.
        title: Shown as it stands.
        x_label, y_label: What the axes are.
        names: Words for each x in the place of numbers.
        level: A number to draw across, and its words: chance.
    """
    if not lines:
        return sentence_figure(title, "Nothing was measured yet.")
    figure = new_figure(title, 250)
    axes = style_axes(figure.subplots(), x_label, y_label)
    for place, (name, values) in enumerate(lines.items()):
        axes.plot(x, values, label=name, linewidth=1.6, markersize=4.5, **_STYLES[place % len(_STYLES)])
    if level is not None:
        axes.axhline(level[0], color=CHANCE, linestyle="--", linewidth=1.4, label=level[1])
    if min(x) > 0 and max(x) / min(x) > 16:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(x)) if len(x) <= 8 else FixedLocator(list(x)[:: -(-len(x) // 8)]))
    if names:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: names[list(x).index(round(value))]))
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(number_text))
    axes.minorticks_off()
    axes.margins(y=0.12)
    add_legend(axes)
    return finished(figure)
