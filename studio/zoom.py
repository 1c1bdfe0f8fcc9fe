"""Looking closer at a run's charts: which of its steps they show, chosen by a button or by dragging across a chart.

The choice is the page's and goes with each of its looks, so it stays while the charts are drawn anew.
"""

from collections.abc import Sequence

import numpy as np

from studio.live import Range

SHARES = {"": ("All", 1.0), "half": ("Last half", 0.5), "tenth": ("Last tenth", 0.1)}
"""What a page may ask for → its words, and the share of the steps so far."""

_MOST_STEPS = 1e15


def read(asked: object, steps: Sequence[float] | np.ndarray) -> Range | None:
    """Returns the first and the last step to show; None for all, or where there is nothing to choose from.

    Args:
        asked: A key of `SHARES`, or [first, last]; what is neither is all.
        steps: Those so far, rising.
    """
    if len(steps) < 2:
        return None
    first, last = float(steps[0]), float(steps[-1])
    if isinstance(asked, str):
        share = SHARES.get(asked, ("", 1.0))[1]
        return (last - share * (last - first), last) if share < 1 else None
    if not isinstance(asked, list) or len(asked) != 2 or not all(_is_a_step(value) for value in asked):
        return None
    low, high = sorted(map(float, asked))
    return (low, high) if high - low >= 0.5 else None


def _is_a_step(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < _MOST_STEPS  # false for NaN, too


def bar(asked: object, shown: Range | None) -> str:
    """Returns HTML of the buttons; the one of the steps that are `shown` is pressed."""
    chosen = asked if shown else ""
    buttons = [
        f'<button type="button" data-steps="{name}" aria-pressed="{str(name == chosen).lower()}">{words}</button>'
        for name, (words, _) in SHARES.items()
    ]
    if shown and not isinstance(asked, str):
        buttons.append(f'<button type="button" aria-pressed="true">{shown[0]:.0f} to {shown[1]:.0f}</button>')
    return (
        '<div class="zoom" role="group" aria-label="Steps that the charts show">'
        f"<span>Steps</span>{''.join(buttons)}<span>or drag across a chart</span></div>"
    )


CSS = """
.zoom { display: flex; flex-wrap: wrap; align-items: center; gap: .35rem .4rem; margin-top: 1rem; font-size: .8rem;
  color: var(--body-text-color-subdued); }
.zoom button { margin: 0 !important; padding: .15rem .6rem; font: inherit;
  border: 1px solid var(--border-color-primary); border-radius: 999px; background: none;
  color: var(--body-text-color-subdued); cursor: pointer; }
.zoom button:hover { color: var(--body-text-color); border-color: currentColor; }
.zoom button[aria-pressed=true] { color: var(--adapted-text); border-color: currentColor; font-weight: 600; }
#charts .plot { touch-action: pan-y; cursor: crosshair; user-select: none; }
.zoom-mark { position: fixed; z-index: 50; background: var(--adapted); opacity: .2; pointer-events: none; }
"""

JS = """
const plotOf = (event) => event.target.closest?.('#charts .plot[data-steps]');
const closer = (asked) => { steps = asked; last = 0; tick(); };
let drag = null;
document.addEventListener('pointerdown', (event) => {
    const plot = event.button === 0 && plotOf(event);
    if (plot) drag = {plot: plot, from: event.clientX, mark: null};
});
document.addEventListener('pointermove', (event) => {
    if (!drag || !event.buttons) { drag?.mark?.remove(); drag = null; return; }
    const box = drag.plot.getBoundingClientRect();
    const [a, b] = [drag.from, event.clientX].map((x) => Math.min(1, Math.max(0, (x - box.left) / box.width)))
        .sort((one, two) => one - two);
    drag.share = [a, b];
    if ((b - a) * box.width < 5) return;
    if (!drag.mark) {  // not in the plot, which is drawn anew meanwhile
        drag.mark = document.body.appendChild(document.createElement('i'));
        drag.mark.className = 'zoom-mark';
    }
    Object.assign(drag.mark.style, {top: `${box.top}px`, height: `${box.height}px`,
        left: `${box.left + a * box.width}px`, width: `${(b - a) * box.width}px`});
});
document.addEventListener('pointerup', () => {
    if (drag?.mark) {
        const [first, to] = drag.plot.dataset.steps.split(' ').map(Number);
        closer(drag.share.map((share) => first + share * (to - first)));
    }
    drag?.mark?.remove();
    drag = null;
});
document.addEventListener('pointercancel', () => { drag?.mark?.remove(); drag = null; });
document.addEventListener('dblclick', (event) => { if (plotOf(event)) closer(''); });
document.addEventListener('click', (event) => {
    const button = event.target.closest('.zoom [data-steps]');
    if (button) closer(button.dataset.steps);
});
"""
"""Runs in the page's head, after `studio.watch`, whose look carries `steps`."""
