"""What intruder dimensions cost: losses while they are damped, beside an update that is smaller as a whole."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studio.figures.style import TEXT, Plot, add_legend, finished, new_figure, sentence_figure, style_axes, ticks
from studio.palette import ADAPTED, BASE, CHANCE


def damping_figure(
    losses: Mapping[str, Mapping[float, tuple[float | None, float | None]]],
    base: Mapping[str, float | None],
    *,
    title: str = "",
) -> Plot:
    """Returns losses against λ, what is left of the intruders: a panel a kind of text.

    Args:
        losses: Title of a panel, such as "held-out rows" → λ → (with the intruders damped, with ΔW as a whole shrunk to
            the same norm), in nats per token; None where it was not measured.
        base: Title of a panel → the loss of the base model alone.
        title: Shown as it stands.
    """
    title = title or "Loss while intruders are damped"
    panels: dict[str, Mapping[float, Sequence[float | None]]] = {name: found for name, found in losses.items() if found}
    if not panels:
        return sentence_figure(title, "Nothing is measured yet.")
    figure = new_figure(title, 240)
    axes = figure.subplots(1, len(panels), squeeze=False).flatten()
    handles: list[Any] = []
    for panel, (name, found) in zip(axes, panels.items(), strict=True):
        style_axes(panel, "λ, what is left of them", "")
        x = np.array(sorted(found))
        damped, shrunk = (np.array([found[at][i] for at in sorted(found)], float) for i in (0, 1))
        style: dict[str, Any] = {"linewidth": 1.8, "markersize": 5}
        handles = panel.plot(x, shrunk, color=CHANCE, linestyle="--", marker="s", label="control: ΔW shrunk", **style)
        handles += panel.plot(x, damped, color=ADAPTED, marker="o", label="intruders damped", **style)
        level = base.get(name)
        if level is not None:
            handles.append(panel.axhline(level, color=BASE, linewidth=1.4, linestyle=":", label="base model"))
        panel.set_title(name, loc="left", pad=3, **TEXT)
        panel.set_xlim(-0.05, 1.05)
        panel.xaxis.set_major_locator(ticks(4))
    axes[0].set_ylabel("loss (nats per token)", **TEXT)
    add_legend(figure, handles, loc="upper left", bbox_to_anchor=(0.01, 1 - 21 / 240))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 18 / 240))  # which leaves the legend its row
    return finished(figure)
