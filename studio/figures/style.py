"""The one style of all figures: sizes, text, axes, colours, and how names and numbers are written."""

import io
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from core.errors import LoRAError
from studio.svg import INK, printable

WIDTH = 432
"""Width of a figure in points, one SVG unit each: narrow, so that text is still readable on a phone."""

TEXT: dict[str, Any] = {"size": 10, "color": INK, "family": "DejaVu Sans", "parse_math": False}  # names are data
FRAME = "#a01010"
"""Frames on heat maps: not ink, as the map's colours are the same on every page."""

ROUNDING = 1e-7
"""Singular values below this share of the largest are float32's rounding."""


class Plot(Figure):
    """A figure that a notebook shows as it is, and that knows what can be pointed at.

    Attributes:
        regions: What an area stands for → the area (left, top, width, height) in SVG units, and words for it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.regions: dict[str, tuple[tuple[float, float, float, float], str]] = {}

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, facecolor="white")
        return buffer.getvalue()


_MOST_OF_WIDTH = 0.88  # that a legend may take: the axis and its label stand left of it


def new_figure(title: str, height: float, *, width: float = WIDTH) -> Plot:
    """Returns an empty figure, WIDTH points wide unless said otherwise, with its title."""
    figure = Plot(figsize=(width / 72, height / 72), layout="constrained", facecolor="white")
    figure.suptitle(shortened(title, int(width / 8.5)), x=0.01, ha="left", **TEXT | {"size": 12, "weight": "bold"})
    return figure


def style_axes(axes: Axes, x_label: str, y_label: str) -> Axes:
    """Gives axes the one look, and their labels; returns them."""
    line = to_rgba(INK, 0.55)
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=line, linewidth=0.8)
    axes.grid(visible=True, axis="y", color=INK, alpha=0.13, linewidth=0.8, linestyle="-")
    axes.set_axisbelow(True)
    axes.tick_params(
        color=line, labelcolor=INK, labelsize=TEXT["size"], labelfontfamily=TEXT["family"], length=3, width=0.8
    )
    axes.set_xlabel(x_label, **TEXT)
    axes.set_ylabel(y_label, **TEXT)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(number_text))
    return axes


def add_legend(parent: Axes | Figure, handles: Any = None, **place: Any) -> None:
    """Puts a legend above axes, in as many columns as there is room for, or where `place` says, in four."""
    figure = parent.get_figure(root=True)
    for columns in (4, 3, 2, 1):
        legend = parent.legend(
            handles=handles,
            ncols=columns,
            frameon=False,
            borderaxespad=0.1,
            borderpad=0.1,
            columnspacing=1.4,
            handlelength=1.8,
            labelcolor=INK,
            prop={"family": TEXT["family"], "size": TEXT["size"]},
            **place or {"loc": "lower left", "bbox_to_anchor": (0, 1)},
        )
        if place or figure is None or legend.get_window_extent().width < _MOST_OF_WIDTH * figure.bbox.width:
            return


def sentence_figure(title: str, sentence: str) -> Plot:
    """Returns a figure that says why there is nothing to draw."""
    figure = new_figure(title, 50)
    figure.text(0.01, 0.08, textwrap.fill(sentence, 66), va="bottom", **TEXT)
    return finished(figure)


def finished(figure: Plot) -> Plot:
    """Lays a figure out once for all: each further layout would move things by a little."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def log_scale(axes: Axes, values: np.ndarray) -> None:
    """Makes the y axis logarithmic over `values`, without those that are rounding."""
    high = float(np.nanmax(values))
    seen = values[values > ROUNDING * high]
    low = float(seen.min())
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(low / 1.6, high * 1.25)
    decades = math.log10(high / low * 2)
    axes.yaxis.set_major_locator(
        ticks(5) if decades < 1 else LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=7)
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(number_text))


def ticks(most: int, *, whole: bool = False) -> MaxNLocator:
    """Returns a locator of at most so many round numbers."""
    return MaxNLocator(
        nbins=most, integer=whole, min_n_ticks=1 if whole else 2, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10]
    )


def heat_colours() -> Colormap:
    """Returns the colours of heat maps, which are told apart by lightness alone, too."""
    # Without the darkest end, which would melt into a dark page.
    return ListedColormap(mpl.colormaps["viridis"](np.linspace(0.12, 1, 200)))


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Returns for each name its fewest last components that no other name ends in."""
    short: dict[str, str] = {}
    for depth in range(1, max((name.count(".") for name in names), default=0) + 2):
        tails = {name: ".".join(name.split(".")[-depth:]) for name in names}
        counts = Counter(tails.values())
        short |= {
            name: tail
            for name, tail in tails.items()
            if name not in short and counts[tail] == 1 and (not tail[0].isdigit() or tail == name)
        }
    return {name: shortened(tail, 22) for name, tail in short.items()}


def array(values: Any) -> np.ndarray:
    """Returns numbers, of a tensor, too, as float64."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def paired(name: str, values: Any, other_name: str, others: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns two rows of numbers of one length as float64.

    Raises:
        LoRAError: They differ in length.
    """
    first, second = array(values), array(others)
    if first.shape != second.shape or first.ndim != 1:
        raise LoRAError(
            f"`{other_name}` (={second.shape}) must be one row of numbers as long as `{name}`, {first.shape}."
        )
    return first, second


def nothing_to_see(sigma: np.ndarray) -> str:
    """Returns why a spectrum cannot be drawn; "" if it can."""
    if not len(sigma):
        return "No singular values to show."
    if not np.isfinite(sigma).all():
        return "The singular values hold NaN or infinity: training diverged."
    return "" if sigma.max() > 0 else "ΔW is zero: B is still as it started, so nothing was learned yet."


def number_text(value: float, _: int | None = None) -> str:
    """Returns a number as people write it: 1.5, −2, 3·10⁻⁵."""
    mantissa, *exponent = f"{value:.6g}".split("e")
    mantissa = mantissa.replace("-", "−")
    if not exponent:
        return mantissa
    power = "10" + str(int(exponent[0])).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}·{power}"


def shortened(text: str, limit: int) -> str:
    """Returns `text` with its middle left out where it is longer than `limit`."""
    text = printable(text)
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-(limit - limit // 2) :]}"
