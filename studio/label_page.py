"""How labels and their probabilities look in the page: a bar each, with its number. All text is escaped."""

from collections.abc import Sequence
from html import escape

from studio.judge import Verdict

MOST_LABELS = 12
"""So many are shown, the likeliest first where there are more."""

CSS = """
.labels { display: grid; grid-template-columns: minmax(5rem, auto) 1fr auto; gap: .35rem .7rem; align-items: center;
  margin: .5rem 0; }
.labels .name { overflow-wrap: anywhere; font-size: .9rem; max-width: 12rem; }
.labels .lane { height: .9rem; border-radius: .25rem; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); overflow: hidden; }
.labels .lane i { display: block; height: 100%; background: var(--adapted); }
.labels.base .lane i { background: var(--base); }
.labels .share { text-align: right; font-variant-numeric: tabular-nums; font-size: .9rem; white-space: nowrap; }
.labels .is { font-weight: 700; }
.labels .moved { display: block; font-weight: 400; font-size: .75rem; color: var(--body-text-color-subdued); }
.labels-note { font-size: .85rem; color: var(--body-text-color-subdued); margin: .2rem 0; }
.number { font-size: 1.8rem; font-weight: 600; font-variant-numeric: tabular-nums; color: var(--adapted); }
.number.base { color: var(--base); }
.number small { font-size: .85rem; font-weight: 400; color: var(--body-text-color-subdued); }
"""


def bars(
    labels: Sequence[str], verdict: Verdict, *, base: Verdict | None = None, truth: str = "", is_base: bool = False
) -> str:
    """Returns HTML of what a pane gives: a bar for each label, or the number of a regressor.

    Args:
        labels: The labels' names; none for a regressor.
        verdict: What the pane gives.
        base: What the base gives, to say how far it moved.
        truth: What the data says of this text; "" where nothing is known.
        is_base: Whether it is the base's own colour.
    """
    kind = " base" if is_base else ""
    if not labels:
        change = _signed(f"{verdict.logits[0] - base.logits[0]:+.3f}") if base else ""
        moved = f" <small>{change} from the base</small>" if base else ""
        said = f'<div class="labels-note">In the data: {escape(truth)}</div>' if truth else ""
        return f'<div class="number{kind}">{verdict.logits[0]:.3f}{moved}</div>{said}'
    shares = verdict.probabilities
    before = base.probabilities if base else None
    order = list(range(len(labels)))
    if len(order) > MOST_LABELS:
        order = sorted(order, key=lambda i: -shares[i])[:MOST_LABELS]
    top = max(range(len(labels)), key=shares.__getitem__)
    rows = []
    for i in order:
        name = escape(labels[i]) + (" ✓" if labels[i] == truth else "")
        mark = " is" if i == top else ""
        # The base's own lines are as high, so that the panes' bars stand beside each other.
        points = _signed(f"{100 * (shares[i] - before[i]):+.1f} points") if before else "\N{NO-BREAK SPACE}"
        moved = f'<span class="moved">{points}</span>'
        rows.append(
            f'<span class="name{mark}">{name}</span>'
            f'<span class="lane"><i style="width:{100 * shares[i]:.2f}%"></i></span>'
            f'<span class="share{mark}">{100 * shares[i]:.1f}\N{NO-BREAK SPACE}%{moved}</span>'
        )
    spoken = ", ".join(f"{labels[i]} {100 * shares[i]:.1f} %" for i in order)
    left = len(labels) - len(order)
    more = f'<div class="labels-note">and {left} less likely ones</div>' if left else ""
    return f'<div class="labels{kind}" role="img" aria-label="{escape(spoken, True)}">{"".join(rows)}</div>{more}'


def legend() -> str:
    """Returns HTML of what marks mean."""
    return '<div class="legend"><b>Bold</b> the likeliest label <span>✓ what the data says</span></div>'


def engine_line(verdict: Verdict) -> str:
    """Returns HTML of what a pane was computed with."""
    cut = f", {verdict.num_cut} cut off" if verdict.num_cut else ""
    logits = ", ".join(f"{x:.3f}" for x in verdict.logits[:MOST_LABELS])
    words = f"{verdict.engine}\n{verdict.num_tokens} tokens{cut} · {1000 * verdict.seconds:.0f} ms\nlogits {logits}"
    return f'<div class="engine-line">{escape(words)}</div>'


def _signed(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")
