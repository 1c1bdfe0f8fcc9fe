"""What happened to ΔW while it was trained: loss, singular values and effective rank over the same steps."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from studio.figures.loss import thinned
from studio.figures.style import Plot, add_legend, array, finished, new_figure, sentence_figure, style_axes, ticks
from studio.palette import ADAPTED, ADAPTED_SOFT, BASE, CHANCE


def training_figure(
    losses: tuple[Sequence[float], Sequence[float]],
    held_out: tuple[Sequence[float], Sequence[float]],
    steps: Any,
    sigma: Any,
    ranks: Any,
    mean_ranks: Any,
    *,
    chance_sigma: Any,
    chance_rank: float,
    title: str = "",
) -> Plot:
    """Returns three charts, one below the other, over the steps of a run.

    Args:
        losses: Steps and the training loss of each, in nats per token.
        held_out: Steps and the loss on held-out rows after each.
        steps: (n), after which the spectrum was measured.
        sigma: (n, k), the singular values of one ΔW then; NaN where there are none.
        ranks: (n), its effective rank.
        mean_ranks: (n), the mean over all matrices.
        chance_sigma: (n), the largest singular value of random factors with the ΔW's norm at that step.
        chance_rank: The effective rank of random factors.
        title: Such as the matrix's path; shown as it stands.
    """
    x, values = array(steps), array(sigma)
    title = title or "ΔW while it was trained"
    if not len(x) or not values.size or not np.isfinite(values).any():
        return sentence_figure(title, "The spectrum of this matrix was not measured while it was trained.")
    figure = new_figure(title, 400)
    top, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=(3, 4, 3))
    style_axes(top, "", "loss")
    style_axes(middle, "", "σ of ΔW")
    style_axes(below, "step", "effective rank")
    if len(losses[0]):
        top.plot(*thinned(array(losses[0]), array(losses[1])), color=ADAPTED_SOFT, linewidth=1.2, label="training")
    if len(held_out[0]):
        style: dict[str, Any] = {"color": ADAPTED, "linewidth": 1.8, "marker": "o", "markersize": 3.5}
        top.plot(array(held_out[0]), array(held_out[1]), label="held-out rows", **style)
    add_legend(top)
    dots = "." if len(x) < 3 else ""
    for place, column in enumerate(values.T):
        strongest = {"label": "σ₁ and the others"} if place == 0 else {}
        width, alpha = (1.9, 1.0) if place == 0 else (1.0, 0.65)
        middle.plot(x, column, color=ADAPTED, linewidth=width, alpha=alpha, marker=dots, **strongest)
    middle.plot(x, array(chance_sigma), color=CHANCE, linestyle="--", linewidth=1.4, label="σ₁ of chance, same ‖ΔW‖")
    middle.set_ylim(bottom=0)
    add_legend(middle)
    below.plot(x, array(ranks), color=ADAPTED, linewidth=1.9, marker=dots, label="this matrix")
    below.plot(x, array(mean_ranks), color=BASE, linewidth=1.4, linestyle="-.", marker=dots, label="mean of all")
    below.axhline(chance_rank, color=CHANCE, linestyle="--", linewidth=1.4, label="chance")
    below.set_ylim(0, 1.08 * max(chance_rank, float(np.nanmax([*array(ranks), *array(mean_ranks), 1]))))
    add_legend(below)
    below.xaxis.set_major_locator(ticks(8, whole=True))
    for axes in (top, middle, below):
        axes.margins(x=0.02)
    figure.align_ylabels()
    return finished(figure)


def mark_places(figure: Plot, steps: Sequence[float]) -> tuple[list[float], float, float]:
    """Returns where steps stand in a finished `training_figure`: each one's x, and the top and bottom, in SVG units."""
    scale = 72 / figure.dpi
    height = figure.get_size_inches()[1] * 72
    boxes = [axes.get_window_extent() for axes in figure.axes]
    xs = [float(figure.axes[0].transData.transform((step, 0.0))[0]) * scale for step in steps]
    top, bottom = max(b.y1 for b in boxes) * scale, min(b.y0 for b in boxes) * scale
    return xs, float(height - top), float(height - bottom)
