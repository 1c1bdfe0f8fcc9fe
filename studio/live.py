"""Numbers -> charts that are drawn anew every second, cheap enough to watch beside a training.

A page that redraws a chart takes time from the cores that train. Here a chart is a few hundred bytes of
SVG without a script, stretched to the width it is given; its words are HTML, so that they do not stretch.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

MAX_POINTS = 300
_WIDTH, _HEIGHT = 1000, 100  # of the drawing's own units; it is stretched to the page's
_MAX_STRIPS = 40  # to point at, in a chart that is large enough for it
_STRIP_HEIGHT = 200
_TOO_LARGE = 1e300
_FEWEST, _MEANS, _STRETCHES = 40, 80, 4  # a mean is over four stretches of steps, of which there are up to 80

Point = tuple[float, float]
Range = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One series of a chart.

    Attributes:
        name: What the key calls it; "" where the chart's title says it all.
        color: Any CSS colour.
        points: (step, value), steps rising, as pairs or as the rows of an array; values that are not finite leave a
            gap.
        dots: Whether each point is marked, too.
        thickness: Of the line, in pixels.
        faint: Whether the line stands back behind another of the same colour.
    """

    name: str
    color: str
    points: Sequence[Point] | np.ndarray
    dots: bool = False
    thickness: float = 1.5
    faint: bool = False


def chart(title: str, curves: Sequence[Curve], *, height: int, empty: str = "", shown: Range | None = None) -> str:
    """Returns HTML of a chart of one or more curves over the same steps.

    Args:
        title: What is drawn, and its unit.
        curves: The series; those without a finite value are only named in the key.
        height: Of the drawing, in pixels.
        empty: What stands there while there is nothing to draw.
        shown: The steps from which to which it shows; None for all.
    """
    drawn = [replace(c, points=thin(_within(c.points, shown))) for c in curves]
    finite = [p for c in drawn for p in c.points if _can_be_drawn(p[1])]
    if shown:
        finite = [p for p in finite if shown[0] <= p[0] <= shown[1]] or finite
    if not finite:
        return (
            f'<figure class="live"><figcaption><b>{escape(title)}</b></figcaption>'
            f'<div class="plot" style="height:{height}px"><span class="none">{escape(empty)}</span></div></figure>'
        )
    left, right = shown or (min(x for x, _ in finite), max(x for x, _ in finite))
    if left == right:
        left, right = left - 0.5, right + 0.5
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    spare = max(0.06 * (high - low), 0.002 * abs(high), 0.002 * abs(low))  # so that rounding looks as small as it is
    spare = spare if spare > 1e-290 else 1.0
    # A value that is never negative has no negative axis.
    low, high = (max(0.0, low - spare) if low >= 0 else low - spare), high + spare

    def across(x: float) -> float:
        return (x - left) / (right - left)

    def down(y: float) -> float:
        return (high - y) / (high - low)

    parts, words = [], []
    for tick in ticks(low, high, max(3, height // 50)):
        parts.append(f'<path class="grid" d="M0 {_HEIGHT * down(tick):.2f}H{_WIDTH}"/>')
        words.append(f'<span class="y" style="top:{100 * down(tick):.1f}%">{_number(tick)}</span>')
    for tick in ticks(left, right, 4):
        if tick == round(tick):
            words.append(f'<span class="x" style="left:{100 * across(tick):.1f}%">{tick:g}</span>')
    for curve in drawn:
        parts.append(
            _path(
                curve,
                [(_WIDTH * across(x), _HEIGHT * down(y) if _can_be_drawn(y) else math.nan) for x, y in curve.points],
            )
        )
    if height >= _STRIP_HEIGHT:
        parts += _strips(drawn, left, right)
    key = "".join(
        f'<span class="key{" faint" * c.faint}" style="--key:{c.color}">{escape(c.name)} '
        f"<b>{_number(c.points[-1][1])}</b></span>"
        for c in curves
        if len(c.points)
    )
    spoken = escape(
        f"{title}: " + ", ".join(f"{c.name} {_number(c.points[-1][1])}".strip() for c in curves if len(c.points)), True
    )
    return (
        f'<figure class="live"><figcaption><b>{escape(title)}</b>{key}</figcaption>'
        f'<div class="plot{" closer" if shown else ""}" style="height:{height}px" data-steps="{left:g} {right:g}">'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'preserveAspectRatio="none" role="img" aria-label="{spoken}">{"".join(parts)}</svg>'
        f"{''.join(words)}</div></figure>"
    )


def _within(points: Sequence[Point] | np.ndarray, shown: Range | None) -> Sequence[Point] | np.ndarray:
    """Returns the points of the steps shown, and the one before and the one after, to which the line goes on."""
    if shown is None:
        return points
    steps = np.asarray(points, float).reshape(-1, 2)[:, 0]
    return points[
        max(0, int(np.searchsorted(steps, shown[0])) - 1) : int(np.searchsorted(steps, shown[1], "right")) + 1
    ]


def with_mean(curve: Curve, name: str = "mean of {} steps") -> list[Curve]:
    """Returns a noisy curve, faint, and before it its mean over a few steps, by which it is read; a short one alone."""
    table = np.asarray(curve.points, float).reshape(-1, 2)
    if len(table) < _FEWEST:
        return [curve]
    stretch = max(1, round(_rounded_up(len(table) / _MEANS)))
    whole = len(table) // stretch * stretch
    values = table[:whole, 1].reshape(-1, stretch)
    is_drawn = np.abs(values) < _TOO_LARGE
    sums, counts = (
        np.convolve(each.sum(1), np.ones(_STRETCHES), "valid") for each in (np.where(is_drawn, values, 0.0), is_drawn)
    )
    means = np.divide(sums, counts, out=np.full(len(sums), math.nan), where=counts > 0)
    steps = table[_STRETCHES * stretch // 2 - 1 : whole : stretch, 0][: len(means)]  # in the middle, as else it lags
    mean = Curve(name.format(_STRETCHES * stretch), curve.color, np.stack([steps, means], 1), thickness=2.5)
    return [replace(curve, faint=True), mean]


def thin(points: Sequence[Point] | np.ndarray) -> list[Point]:
    """Returns at most `MAX_POINTS` points: of each stretch the lowest and the highest, so that spikes stay."""
    table = np.asarray(points, float).reshape(-1, 2)
    if len(table) > MAX_POINTS:
        stretch = math.ceil(2 * len(table) / (MAX_POINTS - 1))
        starts = np.arange(0, len(table) - 1, stretch)
        values = np.full(len(starts) * stretch, np.nan)
        values[: len(table) - 1] = table[:-1, 1]
        values = values.reshape(-1, stretch)
        can_be_drawn = np.abs(values) < _TOO_LARGE
        lowest = starts + np.where(can_be_drawn, values, np.inf).argmin(1)
        highest = starts + np.where(can_be_drawn, values, -np.inf).argmax(1)
        kept = np.unique(np.stack([lowest, highest])[:, can_be_drawn.any(1)])
        table = table[[*kept[: MAX_POINTS - 1], -1]]  # the last as it stands: it is the one in the key
    return [(x, y) for x, y in table.tolist()]


def duration(seconds: float) -> str:
    """Returns a length of time in words: 45 s, 3 min 20 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Returns round numbers from `low` to `high`, evenly spaced, at most one more than `most`."""
    step = _rounded_up((high - low) / most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def _rounded_up(rough: float) -> float:
    """Returns the next of 1, 2, 5, 10 and so on, or of 0.5, 0.2, 0.1 and so on."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _path(curve: Curve, places: Sequence[Point]) -> str:
    """Returns a line through the finite places; a dot is a line of no length with round ends, so it stays round."""
    style = f'stroke="{curve.color}" vector-effect="non-scaling-stroke"'
    line, pen = [], "M"
    for x, y in places:
        if _can_be_drawn(y):
            line.append(f"{pen}{x:.0f} {y:.1f}")
            pen = "L"
        else:
            pen = "M"
    faint = ' stroke-opacity=".5"' if curve.faint else ""
    drawn = f'<path d="{"".join(line)}" {style}{faint} stroke-width="{curve.thickness}"/>'
    if curve.dots or len(line) == 1:
        dots = "".join(f"M{x:.1f} {y:.2f}h0" for x, y in places if _can_be_drawn(y))
        drawn += f'<path d="{dots}" {style} stroke-width="{4 * curve.thickness}" stroke-linecap="round"/>'
    return drawn


def _strips(curves: Sequence[Curve], left: float, right: float) -> list[str]:
    """Returns strips that cannot be seen and tell, under the pointer, the last values up to there."""
    steps = max((curve.points for curve in curves), key=len)
    bounds = [steps[i][0] for i in range(0, len(steps), max(1, math.ceil(len(steps) / _MAX_STRIPS)))]
    strips = []
    for start, end in zip(bounds, [*bounds[1:], right], strict=True):
        known = [(c.name, c.points[bisect_right(c.points, start, key=lambda p: p[0]) - 1]) for c in curves if c.points]
        said = [f"{name} {_number(y)}".strip() for name, (x, y) in known if x <= start]
        x, width = (_WIDTH * (start - left) / (right - left), _WIDTH * (end - start) / (right - left))
        strips.append(
            f'<rect x="{x:.1f}" width="{width:.1f}" height="{_HEIGHT}">'
            f"<title>{escape(f'step {start:g}: ' + ', '.join(said))}</title></rect>"
        )
    return strips


def _can_be_drawn(value: float) -> bool:
    return abs(value) < _TOO_LARGE  # false for NaN, too


def _number(value: float) -> str:
    if not _can_be_drawn(value):
        return "not finite"
    if 0 < abs(value) < 0.001:  # with its zeros it is wider than its place
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
