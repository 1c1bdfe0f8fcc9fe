"""What an adapter of fewer directions costs: measured losses against how many are kept."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from studio.figures.style import TEXT, Plot, add_legend, array, finished, new_figure, sentence_figure, style_axes, ticks
from studio.palette import ADAPTED, ADAPTED_SOFT, BASE, CHANCE

Series = Mapping[str, Sequence[tuple[float, float | None, float]]]
"""Name → (directions kept a matrix, loss on the task or None, loss on general text), in order."""

_STYLES = (
    {"color": ADAPTED, "marker": "o", "linestyle": "-"},
    {"color": ADAPTED_SOFT, "marker": "s", "linestyle": "-."},
    {"color": CHANCE, "marker": "x", "linestyle": "--"},
)


def rank_loss_figure(
    series: Series, *, rank: int, base: tuple[float | None, float] | None, full: tuple[float | None, float] | None
) -> Plot:
    """Returns the loss on the task, and on general text below it, against how many directions are kept.

    Args:
        series: Three curves, of which some may be empty: the strongest of each matrix, the strongest of all together,
            and random ones, the level of chance.
        rank: How many directions the whole adapter has.
        base: The losses of the base model alone, if they are known yet.
        full: Those of the whole adapter.
    """
    title = "Measured loss against directions kept"
    known = [point for points in series.values() for point in points]
    if not known and base is None and full is None:
        return sentence_figure(title, "Nothing is measured yet.")
    has_task = any(p[1] is not None for p in known) or any(
        one is not None and one[0] is not None for one in (base, full)
    )
    figure = new_figure(title, 330 if has_task else 200)
    parts = figure.subplots(1 + has_task, 1, sharex=True, squeeze=False).flatten()
    names = ["held-out rows" * has_task, "general text"][0 if has_task else 1 :]
    for place, (axes, name) in enumerate(zip(parts, names, strict=True)):
        which = place if has_task else 1
        style_axes(axes, "directions kept a matrix" if place == len(parts) - 1 else "", f"loss, {name}")
        _draw(axes, series, which, base, full)
        axes.xaxis.set_major_locator(ticks(10, whole=True))
        axes.set_xlim(-0.03 * rank, 1.03 * rank)
    if known:
        add_legend(parts[0])
    figure.align_ylabels()
    return finished(figure)


def _draw(
    axes: Axes,
    series: Series,
    which: int,
    base: tuple[float | None, float] | None,
    full: tuple[float | None, float] | None,
) -> None:
    for (name, points), style in zip(series.items(), _STYLES, strict=True):
        seen = [(k, values[which]) for k, *values in points if values[which] is not None]
        if seen:
            x, y = zip(*seen, strict=True)
            axes.plot(array(x), array(y), linewidth=1.6, markersize=4.5, label=name, **style)
    for one, words, colour in ((base, "base model", BASE), (full, "whole adapter", ADAPTED)):
        value = None if one is None else one[which]
        if value is not None:
            axes.axhline(value, color=colour, linewidth=1.4, linestyle=":")
            place: dict[str, Any] = {
                "textcoords": "offset points",
                "xycoords": ("axes fraction", "data"),
                "ha": "right",
            }
            axes.annotate(words, (1.0, value), (0, 3), **place, **TEXT)
    axes.margins(y=0.16)
