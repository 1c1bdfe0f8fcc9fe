"""What a run would take -> stacked bars of memory: LoRA over full fine-tuning, and what a probe measured.

HTML and CSS without a script. A term is told by its colour and by its pattern, and stands with its number in the
table below, so that no colour needs to be seen.
"""

from dataclasses import dataclass
from html import escape

from core import METHODS, MemoryForecast
from studio import live
from studio.palette import ADAPTED, ADAPTED_SOFT, BASE, CHANCE
from studio.planner import Plan
from studio.probe import Probe

TERMS = {
    "weights": "Weights",
    "adapter": "Adapter",
    "gradients": "Gradients",
    "moments": "Optimizer (Adam)",
    "activations": "Activations",
    "holes": "Gaps on the heap",
    "choosing": "Trying ways out, once",
    "framework": "Framework",
}
"""The terms of a forecast in the order in which they are stacked, as the table calls them."""

WIDEST = 1.5
"""What is free stands in the drawing up to so many times the longest bar; beyond, the bars would be too short."""

_BASE_SOFT = f"color-mix(in srgb, {BASE} 45%, white)"

CSS = f"""
.memory {{ margin: .75rem 0 0; min-width: 0; font-variant-numeric: tabular-nums; }}
.memory figcaption {{ font-size: .85rem; margin-bottom: .5rem; }}
.memory figcaption span {{ color: var(--body-text-color-subdued); }}
.memory .plot {{ position: relative; padding-bottom: .3rem; border-bottom: 1px solid var(--border-color-primary); }}
.memory .who {{ display: flex; justify-content: space-between; gap: 1rem; font-size: .85rem; margin: .3rem 0 .2rem; }}
.memory .bar {{ display: flex; height: 1.35rem; overflow: hidden; border-radius: 3px; }}
.memory .bar i {{ flex: 0 0 auto; min-width: 2px; box-shadow: inset -1px 0 var(--block-background-fill); }}
.memory .tick {{ position: absolute; top: 100%; margin-top: .3rem; transform: translateX(-50%); font-size: .75rem;
  line-height: 1; color: var(--body-text-color-subdued); }}
.memory .tick:first-of-type {{ transform: none; }}
.memory .lane {{ position: relative; }}
.memory .mark {{ position: absolute; top: -.1rem; bottom: -.2rem; border-left: 2px solid var(--body-text-color); }}
.memory .mark.all {{ border-left-style: dashed; }}
.memory .has {{ display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; margin: 1.5rem 0 .5rem !important;
  font-size: .85rem; }}
.memory .has span::before {{ content: ""; display: inline-block; height: .85em; border-left: 2px solid currentColor;
  margin-right: .45rem; vertical-align: -.08em; }}
.memory .has .all::before {{ border-left-style: dashed; }}
.memory th i {{ display: inline-block; width: 1rem; height: .75rem; border-radius: 2px; margin-right: .5rem; }}
.memory table.plain :is(th, td) {{ padding: .2rem .25rem; font-size: .85rem; }}
.memory table.plain tbody th {{ font-weight: 400; }}
.memory table.plain tfoot :is(th, td) {{ font-weight: 700; border-bottom: 0 !important; }}
.memory .weights {{ background: {BASE}; }}
.memory .adapter {{ background: {ADAPTED}; }}
.memory .gradients {{ background: repeating-linear-gradient(45deg, {ADAPTED} 0 3px, {ADAPTED_SOFT} 3px 8px); }}
.memory .moments {{ background: radial-gradient({ADAPTED} 1.4px, transparent 1.8px) 0 0 / 6px 6px {ADAPTED_SOFT}; }}
.memory .activations {{ background: repeating-linear-gradient(-45deg, {BASE} 0 2px, {_BASE_SOFT} 2px 7px); }}
.memory .holes {{ border: 1px dashed {BASE}; }}
.memory .choosing {{ border: 1px dotted {ADAPTED}; }}
.memory .framework {{ background: {CHANCE}; }}
.memory .rest {{ border: 1px solid var(--body-text-color-subdued);
  background: repeating-linear-gradient(90deg, var(--body-text-color-subdued) 0 1px, transparent 1px 5px); }}
"""


@dataclass(frozen=True)
class Measured:
    """What a probe found, beside what was forecast.

    Attributes:
        probe: What it found.
        forecast_bytes: Of rows of `max_length` tokens.
        same_bytes: Of as many and as long rows as the probe took.
        is_earlier: Whether settings have changed since.
    """

    probe: Probe
    forecast_bytes: int
    same_bytes: int
    is_earlier: bool = False


def drawn(plan: Plan, measured: Measured | None = None) -> str:
    """Returns HTML of the bars, on one scale, and the table of their numbers."""
    rows = [
        (METHODS[plan.method], plan.lora.total, _segments(plan.lora)),
        ("Full fine-tuning, Adam", plan.full.total, _segments(plan.full)),
    ]
    if plan.method == "full":
        del rows[1]
    if measured is not None:
        found = measured.probe
        own = min(found.framework_bytes, found.peak_bytes)
        parts = [("framework", "Framework", own), ("rest", "All else, measured", found.peak_bytes - own)]
        rows.insert(1, ("Measured", found.peak_bytes, parts))
    longest = max(total for _, total, _ in rows)
    right = 1.02 * max(longest, min(plan.free_bytes, WIDEST * longest))
    bars = "".join(_row(*row, right, measured, _marks(plan, right)) for row in rows)
    each = f"On each of {plan.num_devices} devices ({plan.device} …)" if plan.num_devices > 1 else f"On {plan.device}"
    spoken = f"{each}: " + ", ".join(f"{title} {size(total)}" for title, total, _ in rows)
    return (
        f'<figure class="memory"><figcaption><b>{escape(each)}</b> <span>weights in {escape(plan.dtype)}, '
        f"{plan.num_trained:,} of {plan.num_parameters:,} parameters trained</span></figcaption>"
        f'<div class="plot" role="img" aria-label="{escape(spoken, True)}">{bars}{_ticks(right)}</div>'
        f"{_has(plan, right)}{_table(plan)}</figure>"
    )


def verdict(plan: Plan) -> tuple[list[str], str]:
    """Returns in sentences whether a run fits, or by how much it does not; and how that is said."""
    takes, free = size(plan.lora.total), size(plan.free_bytes)
    where = f"{plan.device} and each other device" if plan.num_devices > 1 else plan.device
    full = [f"Full fine-tuning would take {plan.full.total / plan.lora.total:.1f} times as much."]
    full = [] if plan.method == "full" else full
    if plan.fits is None:
        return [f"It takes {takes}; how much is free on {where} is not known.", *full], ""
    if plan.fits:
        return [f"It fits: {takes} of {free} free on {where}.", *full], "good"
    missing = size(plan.lora.total - plan.free_bytes)
    return [f"It does not fit: it takes {takes}, {missing} more than the {free} free on {where}.", *full], "error"


def measured_words(measured: Measured) -> list[str]:
    """Returns sentences on what a probe found."""
    found = measured.probe
    words = [
        f"{size(found.peak_bytes)} at most, {difference(found.peak_bytes, measured.forecast_bytes)} the forecast.",
        f"{found.batch_seconds:.2f} s a batch, about {live.duration(found.total_seconds)} for all steps.",
    ]
    if measured.same_bytes != measured.forecast_bytes:
        words.append(
            f"The {found.num_rows} longest rows have up to {found.num_tokens} tokens; for those the forecast is "
            f"{size(measured.same_bytes)}."
        )
    if found.peak_bytes == found.loading_bytes:
        words.append("The most was held while the model was loaded, before the first step.")
    return words


def difference(actual: int, forecast: int) -> str:
    """Returns by how many per cent a measurement differs from a forecast, in words that go before it."""
    share = round(100 * (actual / forecast - 1))
    return f"{abs(share)} % {'more' if share > 0 else 'less'} than" if share else "the same as"


def size(number: float) -> str:
    """Returns bytes for people to read: 1.10 GB, 9.8 MB."""
    if number >= 1e9:
        return f"{number / 1e9:.2f} GB"
    return f"{number / 1e6:.3g} MB" if number < 99.9e6 else f"{number / 1e6:.0f} MB"


def _segments(forecast: MemoryForecast) -> list[tuple[str, str, int]]:
    return [(name, title, getattr(forecast, name)) for name, title in TERMS.items()]


def _row(
    title: str, total: int, parts: list[tuple[str, str, int]], right: float, measured: Measured | None, marks: str
) -> str:
    filled = "".join(
        f'<i class="{name}" style="width:{100 * number / right:.2f}%" title="{words}: {size(number)}"></i>'
        for name, words, number in parts
        if number
    )
    if title == "Measured" and measured is not None:
        title = (
            "Measured, with earlier settings"
            if measured.is_earlier
            else f"Measured, {difference(total, measured.forecast_bytes)} the forecast"
        )
    return (
        f'<div class="who"><span>{title}</span><b>{size(total)}</b></div>'
        f'<div class="lane"><div class="bar">{filled}</div>{marks}</div>'
    )


def _ticks(right: float) -> str:
    return "".join(
        f'<span class="tick" style="left:{100 * tick / right:.2f}%">{tick / 1e9:g}{" GB" if tick else ""}</span>'
        for tick in live.ticks(0, right, 4)
    )


def _marks(plan: Plan, right: float) -> str:
    return "".join(
        f'<span class="mark {kind}" style="left:{100 * number / right:.2f}%"></span>'
        for kind, number in (("free", plan.free_bytes), ("all", plan.total_bytes))
        if 0 < number <= right
    )


def _has(plan: Plan, right: float) -> str:
    """Returns HTML of what the device has, as the key of the marks; → where one lies beyond the drawing."""
    known = [("free", "free", plan.free_bytes)]
    if plan.total_bytes != plan.free_bytes:
        known.append(("all", "in all", plan.total_bytes))
    said = "".join(
        f'<span class="{kind}">{size(number)} {words}{" →" * (number > right)}</span>'
        for kind, words, number in known
        if number
    )
    return f'<div class="has">{said}</div>'


def _table(plan: Plan) -> str:
    rows = "".join(
        f'<tr><th scope="row"><i class="{name}"></i>{title}</th>'
        f"<td>{_cell(getattr(plan.lora, name))}</td><td>{_cell(getattr(plan.full, name))}</td></tr>"
        for name, title in TERMS.items()
        if getattr(plan.lora, name) or getattr(plan.full, name)
    )
    return (
        '<table class="plain"><thead><tr><th scope="col">At the peak of a step</th>'
        f'<th scope="col">{METHODS[plan.method]}</th>'
        f'<th scope="col">Full</th></tr></thead><tbody>{rows}</tbody><tfoot><tr><th scope="row">Total</th>'
        f"<td>{size(plan.lora.total)}</td><td>{size(plan.full.total)}</td></tr></tfoot></table>"
    )


def _cell(number: int) -> str:
    return size(number) if number else "–"
