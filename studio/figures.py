"""Numbers -> matplotlib figures in one calm style: for the page and for files (`studio.svg`), for notebooks.

Nothing here touches matplotlib's global state for drawing: every figure is a `Figure` of its own, styled by
`_figure` and `_axes`, so that it looks the same whatever the caller's settings are. Data colours come from
`studio.palette` and mean the same everywhere; each also has its own line style, marker or hatch.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from core.errors import LoRAError
from studio.matrices import layer_and_matrix, split_path
from studio.palette import ADAPTED, ADAPTED_SOFT, CHANCE
from studio.svg import INK, printable

WIDTH = 432
"""Width of a figure in points, one SVG unit each: narrow, so that text is still readable on a phone."""

_TEXT: dict[str, Any] = {"size": 10, "color": INK, "family": "DejaVu Sans", "parse_math": False}  # names are data
_ROUNDING = 1e-7  # singular values below this share of the largest are float32's rounding


def loss_figure(
    steps: Sequence[float], losses: Sequence[float], eval_steps: Sequence[float], eval_losses: Sequence[float]
) -> Figure:
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
    x, y = _paired("steps", steps, "losses", losses)
    eval_x, eval_y = _paired("eval_steps", eval_steps, "eval_losses", eval_losses)
    title = "Loss"
    if not len(x) + len(eval_x):
        return _sentence_figure(title, "No loss yet: the first one appears after the first step.")
    if not (np.isfinite(y).any() or np.isfinite(eval_y).any()):
        return _sentence_figure(title, "No loss is finite: training diverged. Try a lower learning rate.")
    figure = _figure(title, 235)
    axes = _axes(figure.add_subplot(), "step", "loss (nats per token)")
    if len(x):
        marker = "." if np.isfinite(y).sum() < 3 else ""
        axes.plot(*_thinned(x, y), color=ADAPTED_SOFT, linewidth=1.3, marker=marker, label="training")
    if len(eval_x):
        seen = eval_y[np.isfinite(eval_y)]
        label = f"held out, last {seen[-1]:.3g}" if len(seen) else "held out"
        axes.plot(eval_x, eval_y, color=ADAPTED, linewidth=2, marker="o", markersize=5, label=label)
    lost = np.concatenate([x[~np.isfinite(y)], eval_x[~np.isfinite(eval_y)]])
    if len(lost):
        first = lost.min()
        axes.axvline(first, color=INK, linewidth=1, linestyle=":", label=f"not finite (step {first:g})")
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(_ticks(8, whole=True))
    _legend(axes)
    return _finished(figure)


def sigma_figure(sigma: Any, chance: Any, *, log: bool = False, title: str = "") -> Figure:
    """Returns the singular values of one ΔW beside those of chance, and the energy they add up to.

    Args:
        sigma: (k), the singular values of ΔW, falling.
        chance: (k), those of random factors with the same ‖ΔW‖_F.
        log: Draw sigma on a logarithmic axis.
        title: Such as the module's path; shown as it stands.

    Raises:
        LoRAError: `chance` has another length than `sigma`.
    """
    sigma, chance = _paired("sigma", sigma, "chance", chance)
    title = title or "Singular values of ΔW"
    reason = _nothing_to_see(sigma)
    if reason:
        return _sentence_figure(title, reason)
    figure = _figure(title, 300)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _axes(top, "", "σ of ΔW" + " (log)" * log)
    _axes(below, "direction, strongest first", "energy")
    index = np.arange(1, len(sigma) + 1)
    edges = np.arange(len(sigma) + 1) + 0.5
    bars = top.bar(index, sigma, width=0.78, color=ADAPTED, label="ΔW")
    steps = top.stairs(chance, edges, baseline=None, color=CHANCE, linestyle="--", linewidth=1.8)
    steps.set_label("chance, same ‖ΔW‖")
    both = np.concatenate([sigma, chance])
    if log:
        _log_scale(top, both)
    else:
        top.set_ylim(0, 1.05 * np.nanmax(both))
    top.tick_params(axis="x", labelbottom=False)
    _legend(top, [bars, steps])
    _draw_energy(below, index, sigma, chance)
    spare = max(0, 5 - len(sigma)) / 2  # a bar is never wider than a fifth
    below.set_xlim(0.3 - spare, len(sigma) + 0.7 + spare)
    below.xaxis.set_major_locator(FixedLocator(index.tolist()) if len(index) <= 10 else _ticks(10, whole=True))
    return _finished(figure)


def heat_figure(values: Mapping[str, float], *, title: str, unit: str = "") -> Figure:
    """Returns a map of one number a module: layers across, kinds of matrix down, the largest framed.

    Modules without a number, and numbers that are not finite, are hatched.

    Args:
        values: By module path, such as "model.layers.17.self_attn.q_proj".
        title: What the number is; shown as it stands.
        unit: The number's unit, for the colour bar.
    """
    layers, names, grid = _grid(values)
    seen = np.isfinite(grid)
    if not seen.any():
        return _sentence_figure(title, "No value is a finite number." if values else "No values to show.")
    num_rows, num_columns = grid.shape
    height = 88 + min(15 * num_rows + 12 * (num_rows < 3), 640)
    figure = _figure(title, height, width=WIDTH + 5 * max(0, num_columns - 40))
    axes = _axes(figure.add_subplot(), "", "")
    axes.grid(visible=False)
    if not seen.all():
        style: dict[str, Any] = {"facecolor": "none", "edgecolor": to_rgba(INK, 0.28), "hatch": "/////", "linewidth": 0}
        axes.add_patch(Rectangle((-0.5, -0.5), num_columns, num_rows, zorder=-1, **style))
    low, high = np.nanmin(grid), np.nanmax(grid)
    if low == high:
        low -= 0.5 * abs(low) or 0.5
    colours = _heat_colours()
    image = axes.imshow(grid, colours, aspect="auto", interpolation="none", vmin=low, vmax=high)
    _name_cells(axes, layers, names)
    _mark_largest(figure, axes, layers, names, grid)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.55, anchor=(1, 0), aspect=28, pad=10 / height)
    bar.outline.set_visible(False)
    _axes(bar.ax, _short(unit, 32), "")
    bar.locator, bar.formatter = _ticks(5), FuncFormatter(_number)
    bar.update_ticks()
    return _finished(figure)


def profile_figure(
    sigmas: Mapping[str, Any], *, chance: Mapping[str, Any] | None = None, log: bool = True, title: str = ""
) -> Figure:
    """Returns the spectra of all modules: one panel a kind of matrix, its median over layers and 10-90 % band.

    Thin lines repeat the other kinds' medians, for comparison. Numbers inside a matrix name, as of
    experts, are pooled like layers.

    Args:
        sigmas: By module path, the singular values of its ΔW, falling; they may differ in length.
        chance: By the same paths, those of random factors with the same ‖ΔW‖_F; their median is drawn.
        log: Draw sigma on a logarithmic axis.
        title: Shown as it stands.

    Raises:
        LoRAError: `chance` has other modules than `sigmas`, or another length for one of them.
    """
    title = title or "Singular values of ΔW, all modules"
    _check_alike(sigmas, sigmas if chance is None else chance)
    groups = _by_kind(sigmas)
    reason = _nothing_to_see(np.concatenate([np.zeros(0), *(sigma for group in groups.values() for sigma in group)]))
    if reason:
        return _sentence_figure(title, reason)
    bands = {kind: _quantiles(group) for kind, group in groups.items()}
    nulls = {kind: _quantiles(group)[1] for kind, group in _by_kind(chance or {}).items()}
    names = _short_names(list(bands))
    num_columns = min(4, len(bands))
    num_rows = math.ceil(len(bands) / num_columns)
    height = 85 + (120 if num_rows > 1 else 150) * num_rows
    figure = _figure(title, height)
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).flatten()
    handles: list[Any] = []
    for panel, kind in zip(panels, bands, strict=False):
        handles = _draw_profile(panel, bands, nulls, kind, log)
        panel.set_title(names[kind], loc="left", pad=3, **_TEXT)
    for panel in panels[len(bands) :]:
        panel.remove()
    for panel in panels[len(bands) - num_columns : len(bands)]:
        panel.tick_params(labelbottom=True)
    if log:
        _log_scale(panels[0], np.concatenate([band.ravel() for band in (*bands.values(), *nulls.values())]))
    else:
        panels[0].set_ylim(bottom=0)
    panels[0].xaxis.set_major_locator(_ticks(4, whole=True))
    figure.supxlabel("direction, strongest first", **_TEXT)
    figure.supylabel("σ of ΔW" + " (log)" * log, **_TEXT)
    _legend(figure, handles, loc="upper left", bbox_to_anchor=(0.01, 1 - 21 / height))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 18 / height))  # which leaves the legend its row
    return _finished(figure)


def _figure(title: str, height: float, *, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained", facecolor="white")
    figure.suptitle(_short(title, int(width / 8.5)), x=0.01, ha="left", **_TEXT | {"size": 12, "weight": "bold"})
    return figure


def _thinned(x: np.ndarray, y: np.ndarray, num_parts: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lowest and the highest point of each of `num_parts` parts: all that can be seen of a long curve."""
    if len(x) <= 2 * num_parts:
        return x, y
    parts = np.array_split(np.arange(len(x)), num_parts)
    lows, highs = np.where(np.isfinite(y), y, np.inf), np.where(np.isfinite(y), y, -np.inf)
    keep = np.unique([part[pick] for part in parts for pick in (lows[part].argmin(), highs[part].argmax())])
    return x[keep], y[keep]


def _axes(axes: Axes, x_label: str, y_label: str) -> Axes:
    line = to_rgba(INK, 0.55)
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=line, linewidth=0.8)
    axes.grid(visible=True, axis="y", color=INK, alpha=0.13, linewidth=0.8, linestyle="-")
    axes.set_axisbelow(True)
    axes.tick_params(
        color=line, labelcolor=INK, labelsize=_TEXT["size"], labelfontfamily=_TEXT["family"], length=3, width=0.8
    )
    axes.set_xlabel(x_label, **_TEXT)
    axes.set_ylabel(y_label, **_TEXT)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_number))
    return axes


def _legend(parent: Axes | Figure, handles: Any = None, **place: Any) -> None:
    parent.legend(
        handles=handles,
        ncols=4,
        frameon=False,
        borderaxespad=0.1,
        borderpad=0.1,
        columnspacing=1.4,
        handlelength=1.8,
        labelcolor=INK,
        prop={"family": _TEXT["family"], "size": _TEXT["size"]},
        **place or {"loc": "lower left", "bbox_to_anchor": (0, 1)},
    )


def _sentence_figure(title: str, sentence: str) -> Figure:
    figure = _figure(title, 50)
    figure.text(0.01, 0.08, textwrap.fill(sentence, 66), va="bottom", **_TEXT)
    return _finished(figure)


def _finished(figure: Figure) -> Figure:
    # Laid out once: each further layout would move things by a little.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _log_scale(axes: Axes, values: np.ndarray) -> None:
    high = float(np.nanmax(values))
    seen = values[values > _ROUNDING * high]
    low = float(seen.min())
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(low / 1.6, high * 1.25)
    decades = math.log10(high / low * 2)
    axes.yaxis.set_major_locator(
        _ticks(5) if decades < 1 else LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=7)
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_number))


def _ticks(most: int, *, whole: bool = False) -> MaxNLocator:
    return MaxNLocator(
        nbins=most, integer=whole, min_n_ticks=1 if whole else 2, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10]
    )


def _heat_colours() -> Colormap:
    # Without the darkest end, which would melt into a dark page.
    return ListedColormap(mpl.colormaps["viridis"](np.linspace(0.12, 1, 200)))


def _draw_energy(axes: Axes, index: np.ndarray, sigma: np.ndarray, chance: np.ndarray) -> None:
    shares, null = (100 * np.cumsum(s**2) / np.sum(s**2) for s in (sigma, chance))
    rank = int((shares < 90 * (1 - 1e-12)).sum()) + 1
    axes.plot(index, null, color=CHANCE, linestyle="--", linewidth=1.4)
    axes.plot(index, shares, color=ADAPTED, linewidth=1.4, marker=".", markersize=4)
    axes.vlines(rank, 0, shares[rank - 1], color=INK, linewidth=1, linestyle=":")
    axes.plot([rank], [shares[rank - 1]], color=ADAPTED, marker="o", markersize=6, linestyle="")
    right = rank <= 0.55 * len(sigma)
    style = {"textcoords": "offset points", "ha": "left" if right else "right"}
    axes.annotate(f"90 % in {rank} of {len(sigma)}", (rank, 0), (5 if right else -5, 5), **style, **_TEXT)
    axes.set_ylim(0, 108)
    axes.yaxis.set_major_locator(FixedLocator([0, 50, 100]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0f} %"))


def _draw_profile(
    axes: Axes, bands: Mapping[str, np.ndarray], nulls: Mapping[str, np.ndarray], kind: str, log: bool
) -> list[Any]:
    _axes(axes, "", "")
    shown = {name: np.where(band > 0, band, np.nan) if log else band for name, band in bands.items()}
    low, median, high = shown.pop(kind)
    rest: list[Any] = []
    for _, other, _ in shown.values():
        index = np.arange(1, len(other) + 1)
        rest = axes.plot(index, other, color=INK, alpha=0.3, linewidth=0.8, label="other matrices")
    index = np.arange(1, len(median) + 1)
    area = axes.fill_between(index, low, high, color=ADAPTED, alpha=0.25, linewidth=0, label="10-90 %")
    style: dict[str, Any] = {"linewidth": 1.8, "marker": "o", "markersize": 3.2, "label": "median over layers"}
    drawn = [*axes.plot(index, median, color=ADAPTED, **style), area]
    if kind in nulls:
        null = np.where(nulls[kind] > 0, nulls[kind], np.nan) if log else nulls[kind]
        drawn += axes.plot(index, null, color=CHANCE, linestyle="--", linewidth=1.4, label="chance")
    return [*drawn, *rest]


def _name_cells(axes: Axes, layers: Sequence[int], names: Sequence[str]) -> None:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**9) if len(layers) / step <= 16)
    first = int(layers[0] < 0)
    columns = [*range(first), *range(first, len(layers), step)]
    axes.set_xticks(columns, [str(layers[column]) if layers[column] >= 0 else "·" for column in columns])
    step = math.ceil(len(names) / 50)
    axes.set_yticks(range(0, len(names), step), names[::step], parse_math=False)
    style = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "top"}
    axes.annotate("layer", (0, 0), (-3.5, -6.5), **style, **_TEXT)
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)


def _mark_largest(figure: Figure, axes: Axes, layers: Sequence[int], names: Sequence[str], grid: np.ndarray) -> None:
    row, column = divmod(int(np.nanargmax(grid)), grid.shape[1])
    # Not ink: it lies on the lightest colour of the map, whatever the page's background.
    frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#a01010", linewidth=1.6, clip_on=False)
    axes.add_patch(frame)
    layer = f"layer {layers[column]}, " if layers[column] >= 0 else ""
    lines = [f"framed: largest, {_number(float(f'{grid[row, column]:.3g}'))}", f"{layer}{names[row]}"]
    if not np.isfinite(grid).all():
        lines.append("hatched: no value")
    figure.text(0.01, 0.02, "\n".join(lines), va="bottom", linespacing=1.3, **_TEXT)


def _grid(values: Mapping[str, float]) -> tuple[list[int], list[str], np.ndarray]:
    """Returns layers, the shown names of matrices, and values as (matrices, layers), NaN where there are none."""
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
    for path, value in values.items():
        grid[rows[keys[path]], columns[places[path][1]]] = np.nan if value is None else float(value)
    names = _short_names(kinds)
    return layers, [names[kind] for kind in kinds], np.where(np.isfinite(grid), grid, np.nan)


def _short_names(names: Sequence[str]) -> dict[str, str]:
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
    return {name: _short(tail, 22) for name, tail in short.items()}


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _paired(name: str, values: Any, other_name: str, others: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = _array(values), _array(others)
    if first.shape != second.shape or first.ndim != 1:
        raise LoRAError(
            f"`{other_name}` (={second.shape}) must be one row of numbers as long as `{name}`, {first.shape}."
        )
    return first, second


def _nothing_to_see(sigma: np.ndarray) -> str:
    if not len(sigma):
        return "No singular values to show."
    if not np.isfinite(sigma).all():
        return "The singular values hold NaN or infinity: training diverged."
    return "" if sigma.max() > 0 else "ΔW is zero: B is still as it started, so nothing was learned yet."


def _check_alike(sigmas: Mapping[str, Any], chance: Mapping[str, Any]) -> None:
    shapes, others = ({path: _array(sigma).shape for path, sigma in some.items()} for some in (sigmas, chance))
    if unlike := [path for path in {**shapes, **others} if shapes.get(path) != others.get(path)]:
        raise LoRAError(
            f"`chance` (={len(chance)} modules) must hold as many numbers for each module as `sigmas`; "
            f"it does not for {', '.join(unlike[:3])}."
        )


def _by_kind(sigmas: Mapping[str, Any]) -> dict[str, list[np.ndarray]]:
    """Returns the spectra of all modules that differ by numbers in their path only, by the kind of matrix."""
    groups: dict[str, list[np.ndarray]] = {}
    for path, sigma in sigmas.items():
        kind = ".".join("*" if part.isdigit() else part for part in layer_and_matrix(path)[1].split("."))
        groups.setdefault(kind, []).append(_array(sigma))
    return groups


def _quantiles(group: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the 10 %, 50 % and 90 % quantiles of σ over modules, (3, k); those without a σ_i do not count."""
    longest = max(len(sigma) for sigma in group)
    padded = [np.pad(sigma, (0, longest - len(sigma)), constant_values=np.nan) for sigma in group]
    return np.nanquantile(padded, [0.1, 0.5, 0.9], axis=0)


def _number(value: float, _: int | None = None) -> str:
    mantissa, *exponent = f"{value:.6g}".split("e")
    mantissa = mantissa.replace("-", "−")
    if not exponent:
        return mantissa
    power = "10" + str(int(exponent[0])).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}·{power}"


def _short(text: str, limit: int) -> str:
    text = printable(text)
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-(limit - limit // 2) :]}"
