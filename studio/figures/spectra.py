"""The singular values of ΔW: of one matrix, and of all."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter

from core.errors import LoRAError
from studio.figures.style import (
    TEXT,
    Plot,
    add_legend,
    array,
    finished,
    log_scale,
    new_figure,
    nothing_to_see,
    paired,
    sentence_figure,
    short_names,
    style_axes,
    ticks,
)
from studio.matrices import layer_and_matrix
from studio.palette import ADAPTED, CHANCE
from studio.svg import INK


def sigma_figure(sigma: Any, chance: Any, *, log: bool = False, title: str = "") -> Plot:
    """Returns the singular values of one ΔW beside those of chance, and the energy they add up to.

    Args:
        sigma: (k), the singular values of ΔW, falling.
        chance: (k), those of random factors with the same ‖ΔW‖_F.
        log: Draw sigma on a logarithmic axis.
        title: Such as the module's path; shown as it stands.

    Raises:
        LoRAError: `chance` has another length than `sigma`.
    """
    sigma, chance = paired("sigma", sigma, "chance", chance)
    title = title or "Singular values of ΔW"
    reason = nothing_to_see(sigma)
    if reason:
        return sentence_figure(title, reason)
    figure = new_figure(title, 300)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    style_axes(top, "", "σ of ΔW" + " (log)" * log)
    style_axes(below, "direction, strongest first", "energy")
    index = np.arange(1, len(sigma) + 1)
    edges = np.arange(len(sigma) + 1) + 0.5
    bars = top.bar(index, sigma, width=0.78, color=ADAPTED, label="ΔW")
    steps = top.stairs(chance, edges, baseline=None, color=CHANCE, linestyle="--", linewidth=1.8)
    steps.set_label("chance, same ‖ΔW‖")
    both = np.concatenate([sigma, chance])
    if log:
        log_scale(top, both)
    else:
        top.set_ylim(0, 1.05 * np.nanmax(both))
    top.tick_params(axis="x", labelbottom=False)
    add_legend(top, [bars, steps])
    _draw_energy(below, index, sigma, chance)
    spare = max(0, 5 - len(sigma)) / 2  # a bar is never wider than a fifth
    below.set_xlim(0.3 - spare, len(sigma) + 0.7 + spare)
    below.xaxis.set_major_locator(FixedLocator(index.tolist()) if len(index) <= 10 else ticks(10, whole=True))
    return finished(figure)


def profile_figure(
    sigmas: Mapping[str, Any], *, chance: Mapping[str, Any] | None = None, log: bool = True, title: str = ""
) -> Plot:
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
    reason = nothing_to_see(np.concatenate([np.zeros(0), *(sigma for group in groups.values() for sigma in group)]))
    if reason:
        return sentence_figure(title, reason)
    bands = {kind: _quantiles(group) for kind, group in groups.items()}
    nulls = {kind: _quantiles(group)[1] for kind, group in _by_kind(chance or {}).items()}
    names = short_names(list(bands))
    num_columns = min(4, len(bands))
    num_rows = math.ceil(len(bands) / num_columns)
    height = 85 + (120 if num_rows > 1 else 150) * num_rows
    figure = new_figure(title, height)
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).flatten()
    handles: list[Any] = []
    for panel, kind in zip(panels, bands, strict=False):
        handles = _draw_profile(panel, bands, nulls, kind, log)
        panel.set_title(names[kind], loc="left", pad=3, **TEXT)
    for panel in panels[len(bands) :]:
        panel.remove()
    for panel in panels[len(bands) - num_columns : len(bands)]:
        panel.tick_params(labelbottom=True)
    if log:
        log_scale(panels[0], np.concatenate([band.ravel() for band in (*bands.values(), *nulls.values())]))
    else:
        panels[0].set_ylim(bottom=0)
    panels[0].xaxis.set_major_locator(ticks(4, whole=True))
    figure.supxlabel("direction, strongest first", **TEXT)
    figure.supylabel("σ of ΔW" + " (log)" * log, **TEXT)
    add_legend(figure, handles, loc="upper left", bbox_to_anchor=(0.01, 1 - 21 / height))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 18 / height))  # which leaves the legend its row
    return finished(figure)


def _draw_energy(axes: Axes, index: np.ndarray, sigma: np.ndarray, chance: np.ndarray) -> None:
    shares, null = (100 * np.cumsum(s**2) / np.sum(s**2) for s in (sigma, chance))
    rank = int((shares < 90 * (1 - 1e-12)).sum()) + 1
    axes.plot(index, null, color=CHANCE, linestyle="--", linewidth=1.4)
    axes.plot(index, shares, color=ADAPTED, linewidth=1.4, marker=".", markersize=4)
    axes.vlines(rank, 0, shares[rank - 1], color=INK, linewidth=1, linestyle=":")
    axes.plot([rank], [shares[rank - 1]], color=ADAPTED, marker="o", markersize=6, linestyle="")
    right = rank <= 0.55 * len(sigma)
    style = {"textcoords": "offset points", "ha": "left" if right else "right"}
    axes.annotate(f"90 % in {rank} of {len(sigma)}", (rank, 0), (5 if right else -5, 5), **style, **TEXT)
    axes.set_ylim(0, 108)
    axes.yaxis.set_major_locator(FixedLocator([0, 50, 100]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0f} %"))


def _draw_profile(
    axes: Axes, bands: Mapping[str, np.ndarray], nulls: Mapping[str, np.ndarray], kind: str, log: bool
) -> list[Any]:
    style_axes(axes, "", "")
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


def _check_alike(sigmas: Mapping[str, Any], chance: Mapping[str, Any]) -> None:
    shapes, others = ({path: array(sigma).shape for path, sigma in some.items()} for some in (sigmas, chance))
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
        groups.setdefault(kind, []).append(array(sigma))
    return groups


def _quantiles(group: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the 10 %, 50 % and 90 % quantiles of σ over modules, (3, k); those without a σ_i do not count."""
    longest = max(len(sigma) for sigma in group)
    padded = [np.pad(sigma, (0, longest - len(sigma)), constant_values=np.nan) for sigma in group]
    return np.nanquantile(padded, [0.1, 0.5, 0.9], axis=0)
