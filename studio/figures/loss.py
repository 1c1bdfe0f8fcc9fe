"""The losses of a run, step by step."""

from collections.abc import Sequence

import numpy as np

from studio.figures.style import Plot, add_legend, finished, new_figure, paired, sentence_figure, style_axes, ticks
from studio.palette import ADAPTED, ADAPTED_SOFT
from studio.svg import INK


def loss_figure(
    steps: Sequence[float], losses: Sequence[float], eval_steps: Sequence[float], eval_losses: Sequence[float]
) -> Plot:
    """Returns the training loss of each step, soft, and the held-out loss, strong with markers.

    Losses that are not finite (or None) leave a gap, and the first of them is marked.

    Args:
        steps: Optimizer steps, from 1.
        losses: In nats per token, one for each of `steps`.
        eval_steps: Steps after which the held-out rows were evaluated; 0 is before the first.
        eval_losses: In nats per token, one for each of `eval_steps`.

    Raises:
        LoRAError: Steps and losses differ in number.
    """
    x, y = paired("steps", steps, "losses", losses)
    eval_x, eval_y = paired("eval_steps", eval_steps, "eval_losses", eval_losses)
    title = "Loss"
    if not len(x) + len(eval_x):
        return sentence_figure(title, "No loss yet: the first one appears after the first step.")
    if not (np.isfinite(y).any() or np.isfinite(eval_y).any()):
        return sentence_figure(title, "No loss is finite: training diverged. Try a lower learning rate.")
    figure = new_figure(title, 235)
    axes = style_axes(figure.add_subplot(), "step", "loss (nats per token)")
    if len(x):
        marker = "." if np.isfinite(y).sum() < 3 else ""
        axes.plot(*thinned(x, y), color=ADAPTED_SOFT, linewidth=1.3, marker=marker, label="training")
    if len(eval_x):
        seen = eval_y[np.isfinite(eval_y)]
        label = f"held out, last {seen[-1]:.3g}" if len(seen) else "held out"
        axes.plot(eval_x, eval_y, color=ADAPTED, linewidth=2, marker="o", markersize=5, label=label)
    lost = np.concatenate([x[~np.isfinite(y)], eval_x[~np.isfinite(eval_y)]])
    if len(lost):
        first = lost.min()
        axes.axvline(first, color=INK, linewidth=1, linestyle=":", label=f"not finite (step {first:g})")
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(ticks(8, whole=True))
    add_legend(axes)
    return finished(figure)


def thinned(x: np.ndarray, y: np.ndarray, num_parts: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lowest and the highest point of each of `num_parts` parts: all that can be seen of a long curve."""
    if len(x) <= 2 * num_parts:
        return x, y
    parts = np.array_split(np.arange(len(x)), num_parts)
    lows, highs = np.where(np.isfinite(y), y, np.inf), np.where(np.isfinite(y), y, -np.inf)
    keep = np.unique([part[pick] for part in parts for pick in (lows[part].argmin(), highs[part].argmax())])
    return x[keep], y[keep]
