"""How long rows are, and what a cut-off would take of them: a histogram that is drawn anew as the cut-off moves."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from studio.live import ticks

NUM_BARS = 60
_TAIL = 0.995  # of the rows are shown to their full length; the last bar holds the longer ones
_WIDTH, _HEIGHT, _PLOT = 1000, 100, 150  # of the drawing's own units; pixels of the plot


@dataclass(frozen=True)
class Cut:
    """What a cut-off does to rows.

    Attributes:
        max_length: The cut-off, in tokens.
        num_rows: Rows that can be used at all.
        num_cut: Rows that are longer.
        num_tokens: Tokens that the model sees.
        num_lost: Tokens cut away.
        num_padding: Tokens of padding that batches padded to their longest row would add; packing adds none.
    """

    max_length: int
    num_rows: int
    num_cut: int
    num_tokens: int
    num_lost: int
    num_padding: int


def cut(lengths: "Sequence[int] | array[int] | np.ndarray", max_length: int, batch_size: int) -> Cut:
    """Returns what cutting rows of these lengths does; rows of length 0 cannot be used and do not count."""
    whole = np.asarray(lengths, np.int64)
    whole = whole[whole > 0]
    kept = np.minimum(whole, max_length)
    drawn = np.random.default_rng(0).permutation(kept)
    longest = np.maximum.reduceat(drawn, np.arange(0, len(drawn), batch_size)) if len(drawn) else drawn
    sizes = np.full(len(longest), batch_size)
    if len(longest):
        sizes[-1] = len(drawn) - batch_size * (len(longest) - 1)
    num_tokens = int(kept.sum())
    return Cut(
        max_length=max_length,
        num_rows=len(whole),
        num_cut=int((whole > max_length).sum()),
        num_tokens=num_tokens,
        num_lost=int(whole.sum()) - num_tokens,
        num_padding=int((longest * sizes).sum()) - num_tokens,
    )


def right_end(lengths: "Sequence[int] | array[int] | np.ndarray") -> int:
    """Returns the length at the right end of the histogram, in tokens."""
    num_bars, width = _bars(np.asarray(lengths, np.int64))
    return num_bars * width


def _bars(lengths: np.ndarray) -> tuple[int, int]:
    """Returns how many bars there are, and how many lengths each stands for."""
    whole = lengths[lengths > 0]
    top = int(max(np.quantile(whole, _TAIL), 8)) if len(whole) else 8
    width = max(1, -(-top // NUM_BARS))
    return -(-top // width), width


def histogram(lengths: "Sequence[int] | array[int] | np.ndarray", max_length: int) -> str:
    """Returns HTML of the rows' lengths with the cut-off as a line; what lies beyond it is paler."""
    whole = np.asarray(lengths, np.int64)
    whole = whole[whole > 0]
    if not len(whole):
        return ""
    num_bars, width = _bars(whole)
    counts = np.bincount(np.minimum((whole - 1) // width, num_bars - 1), minlength=num_bars)
    right, most = num_bars * width, int(counts.max())
    place = min(max_length / right, 1.0)
    bars = []
    for i, count in enumerate(counts.tolist()):
        if not count:
            continue
        low, high = i * width + 1, (i + 1) * width
        to = "or more" if i == num_bars - 1 and whole.max() > high else f"to {high:,}"
        x, w, h = _WIDTH * i / num_bars, _WIDTH / num_bars, max(1.0, 94 * count / most)
        kind = "lost" if low > max_length else "kept"
        bars.append(
            f'<rect class="{kind}" x="{x + 0.08 * w:.1f}" width="{0.84 * w:.1f}" y="{_HEIGHT - h:.2f}" '
            f'height="{h:.2f}"><title>{low:,} {to} tokens: {count:,} rows</title></rect>'
        )
    words = []
    for tick in ticks(0, most / 0.94, 3):
        if tick and tick == round(tick):
            y = 100 * (1 - 0.94 * tick / most)
            words.append(f'<span class="y" style="top:{y:.1f}%">{tick:,.0f}</span>')
            bars.insert(0, f'<path class="grid" d="M0 {y:.2f}H{_WIDTH}"/>')
    for tick in ticks(0, right, 5):
        if tick == round(tick):
            words.append(f'<span class="x" style="left:{100 * tick / right:.1f}%">{tick:,.0f}</span>')
    beyond = f"{max_length:,}" + (" →" if max_length > right else "")
    side = "left" if place > 0.8 else "right"
    spoken = escape(
        f"Tokens a row: {len(whole):,} rows, median {np.median(whole):,.0f}, longest {whole.max():,}; "
        f"cut-off at {max_length:,}",
        True,
    )
    return (
        '<figure class="live lengths"><figcaption><b>Tokens a row</b>'
        f"<span>median {np.median(whole):,.0f} · longest {whole.max():,}</span></figcaption>"
        f'<div class="plot" style="height:{_PLOT}px"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" '
        f'role="img" aria-label="{spoken}">{"".join(bars)}</svg>{"".join(words)}'
        f'<i class="cut {side}" style="left:{100 * place:.2f}%"><b>{beyond}</b></i></div></figure>'
    )
