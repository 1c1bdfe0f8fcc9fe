"""The part of the Train tab that says what a run will take: a forecast, a probe, and what makes it fit."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import gradio as gr

from core import LoRAError, Noted, quoted
from studio import bars, jobs, theme
from studio.planner import MOST_PROPOSALS
from studio.probe import NUM_STEPS, Probe, Probing
from studio.remedies import Remedy
from studio.specs import RunSpec
from studio.state import Studio

REST_SECONDS = 0.25
"""A form that is being typed in must rest for so long before it is looked at."""

WAITING = "Counting what this run will take …"


@dataclass
class Asked:
    """What one open page has asked.

    Attributes:
        turn: Counts the changes of its form; whoever works for an earlier one may stop.
        probing: The probe that goes on, if any.
        measured: What the last one found, and what the form said then.
        spec: What the offers below change.
        offered: What was offered to make it fit.
        before: Field → what it said before the last offer was taken.
    """

    turn: int = 0
    probing: Probing | None = None
    measured: tuple[bars.Measured, list[Any]] | None = None
    spec: RunSpec | None = None
    offered: list[Remedy] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """The part's components that others read or fill.

    Attributes:
        asked: State with an `Asked`.
        view: The bars, or why there are none.
        probe, beside, cancel: Buttons: take the steps; do it beside a training; end it.
        progress: What the probe does or found.
        free: GB that the run may take; empty for what the device has free.
        fit, undo: Buttons: look for what makes it fit; take back what was filled in.
        fitting: What is said of the look.
        offers: A button for each proposal.
    """

    asked: Any
    view: Any
    probe: Any
    beside: Any
    cancel: Any
    progress: Any
    free: Any
    fit: Any
    undo: Any
    fitting: Any
    offers: list[Any]


def draw() -> Part:
    """Draws the part where it is called; `wire` makes it answer."""
    gr.Markdown("## What it will take")
    view = gr.HTML(theme.said(WAITING), padding=False, elem_id="forecast")
    with gr.Row(elem_id="fit-row", equal_height=False):
        free = gr.Textbox(
            label="Memory it may take (GB)",
            info="Of each device, such as 8.",
            placeholder="what is free now",
            max_lines=1,
            min_width=160,
            elem_id="free-memory",
        )
        fit = gr.Button("Fit it for me", size="sm", min_width=120, elem_id="fit")
        probe = gr.Button("Probe", size="sm", min_width=90, elem_id="probe")
        beside = gr.Button("Probe beside it", size="sm", min_width=120, visible=False, elem_id="probe-beside")
        cancel = gr.Button("Cancel", size="sm", min_width=90, visible=False, elem_id="cancel-probe")
    progress = gr.HTML(padding=False, elem_id="probe-progress")
    fitting = gr.HTML(padding=False, elem_id="fitting")
    with gr.Column(elem_id="offers"):
        offers = [gr.Button(visible=False, size="sm", elem_id=f"offer-{i}") for i in range(MOST_PROPOSALS)]
    undo = gr.Button("Undo", visible=False, size="sm", elem_id="undo-fit")
    return Part(gr.State(Asked()), view, probe, beside, cancel, progress, free, fit, undo, fitting, offers)


def shown(studio: Studio, spec: RunSpec, free_bytes: int | None, measured: bars.Measured | None) -> str:
    """Returns HTML of whether a run fits, and of its bars.

    Raises:
        LoRAError: As of `Planner.plan`.
    """
    plan = studio.planner(spec.model, spec.head).plan(spec, free_bytes=free_bytes)
    words, kind = bars.verdict(plan)
    return theme.said(words, kind) + bars.drawn(plan, measured)


def free_bytes_of(free: str) -> int | None:
    """Returns the bytes that the box of GB says; None for an empty one.

    Raises:
        LoRAError: It says no number above 0.
    """
    if not free.strip():
        return None
    try:
        number = float(free)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e9:
        raise LoRAError(f"`free` (={quoted(free)}) must be a number of GB above 0; empty the box for what is free now.")
    return round(number * 1e9)


def trains_there(studio: Studio, spec: RunSpec) -> str:
    """Returns the name of a run that trains on a device of `spec`; "" where none does.

    Raises:
        LoRAError: The device is not there.
    """
    wanted = jobs.devices_of(spec)
    going = (run for run in studio.runs.list() if run.is_running())
    return next((run.spec.name for run in going if jobs.devices_of(run.spec) & wanted), "")


def going(step: int, message: str) -> str:
    """Returns HTML of how far a probe is; it reads, loads, and takes its steps."""
    last = 2 + NUM_STEPS
    return (
        f'<div class="progress" role="progressbar" aria-valuenow="{step}" aria-valuemax="{last}" '
        f'aria-label="Probe"><span style="width:{100 * step / last:.0f}%"></span></div>'
        f'<div class="sub-line">{escape(message)} …</div>'
    )


def words_of(remedy: Remedy) -> str:
    """Returns what the button of a proposal says: what it changes, what it takes, and what that costs."""
    return (
        f"{remedy.label}\n{bars.size(remedy.predicted_bytes or 0)} · time × {remedy.relative_time:.2g}: {remedy.cost}"
    )


def changes(remedy: Remedy, spec: RunSpec) -> dict[str, Any]:
    """Returns field → value of what a proposal changes in the form; of the matrices, their pattern."""
    before, after = spec.train.to_dict(), remedy.spec.train.to_dict()
    changed = {name: value for name, value in after.items() if value != before[name]}
    if remedy.spec.lora != spec.lora:
        changed["pattern"] = remedy.spec.lora.target_modules
    return changed


def wire(
    studio: Studio,
    part: Part,
    inputs: Sequence[Any],
    read: Callable[..., RunSpec],
    fields: dict[str, Any],
    *,
    changed: Sequence[Any],
    start: Any,
    redraw: Callable[[Any], Any],
) -> None:
    """Makes the part answer.

    Args:
        studio: What is served.
        part: The part.
        inputs: All that says what the run will be.
        read: From their values to the run; with `rows` False the rows need not be chosen yet.
        fields: Name → component, of what a proposal may change.
        changed: Triggers after which to look at the form.
        start: The button that starts the run; a probe ends then.
        redraw: Lets a choice of matrices be drawn anew after an event, and returns the event after that.
    """
    num_offers, names = len(part.offers), list(fields)

    def no_offers() -> list[Any]:
        return [gr.Button(visible=False)] * num_offers

    def draw_bars(asked: Asked, free: str, values: list[Any]) -> str:
        try:
            spec = read(*values, rows=False)
            studio.check_model(spec.model)
            measured = None
            if asked.measured is not None:
                measured, then = asked.measured
                measured = replace(measured, is_earlier=then != values)
            return shown(studio, spec, free_bytes_of(free), measured)
        except LoRAError as error:  # said where the bars would stand: the form is still being filled in
            return theme.said(str(error), "error")

    @studio.guard
    def forecast(asked: Asked, free: str, *values: Any) -> Iterator[list[Any]]:
        asked.turn += 1
        turn = asked.turn
        time.sleep(REST_SECONDS)
        if asked.turn != turn:
            yield [gr.skip()] * (2 + num_offers)
            return
        asked.offered = []
        found = draw_bars(asked, free, list(values))
        yield [found, "", *no_offers()] if asked.turn == turn else [gr.skip()] * (2 + num_offers)

    def take_steps(asked: Asked, spec: RunSpec, values: list[Any]) -> Iterator[str]:
        asked.probing = probing = Probing(spec, studio.workspace)
        try:
            for number, said in enumerate(probing, 1):
                if isinstance(said, Noted):
                    yield going(number, said.message)
                else:
                    measured = compared(said, spec)
                    asked.measured = measured, values
                    yield theme.said(bars.measured_words(measured), "good")
        finally:
            probing.close()
            asked.probing = None

    def compared(found: Probe, spec: RunSpec) -> bars.Measured:
        planner = studio.planner(spec.model, spec.head)
        same = replace(spec, train=replace(spec.train, batch_size=found.num_rows, max_length=found.num_tokens))
        whole, alike = (planner.forecast(one, num_devices=1).total for one in (spec, same))
        return bars.Measured(found, whole, alike)

    def probe(is_alone: bool, asked: Asked, free: str, *values: Any) -> Iterator[list[Any]]:
        """Yields what is said, the buttons, and the bars."""
        ready = [gr.Button(interactive=True), gr.Button(visible=False), gr.Button(visible=False)]
        busy = [gr.Button(interactive=False), gr.Button(visible=False), gr.Button(visible=True)]
        try:
            spec = read(*values)
            studio.check(spec)
            other = trains_there(studio, spec) if is_alone else ""
            if other:
                words = (
                    f"“{other}” trains on {spec.train.device} now: a probe takes from its memory, and both are slower."
                )
                yield [theme.said(words, "warn"), ready[0], gr.Button(visible=True), ready[2], gr.skip()]
                return
            yield [going(0, "Starting"), *busy, gr.skip()]
            said = ""
            for said in take_steps(asked, spec, list(values)):
                yield [said, *busy, gr.skip()]
            yield [said, *ready, draw_bars(asked, free, list(values))]
        except LoRAError as error:
            yield [theme.said(str(error), "warn"), *ready, gr.skip()]

    def cancel(asked: Asked) -> None:
        if asked.probing is not None:
            asked.probing.close()  # it says so itself

    def fit(asked: Asked, free: str, *values: Any) -> Iterator[list[Any]]:
        """Yields what is said, and the proposals found so far."""
        turn, asked.offered = asked.turn, []
        asked.spec = spec = read(*values, rows=False)
        studio.check_model(spec.model)
        planner = studio.planner(spec.model, spec.head)
        yield [theme.said("Looking for what makes it fit …"), *no_offers()]
        room = planner.plan(spec, free_bytes=free_bytes_of(free)).free_bytes
        if not room:
            raise LoRAError("`free` (=nothing) must be given: this system does not say how much memory is free.")
        number = 0
        for number, remedy in enumerate(planner.fit(spec, room), 1):
            if asked.turn != turn:  # the form has changed meanwhile: what is found is of no use
                return
            if remedy is not None:
                asked.offered.append(remedy)
            words = f"Looking for what makes it fit {bars.size(room)} … {number} looked at"
            yield [theme.said(words), *offers(asked)]
        if len(asked.offered) == 1 and not asked.offered[0].label:
            words, kind = f"It fits {bars.size(room)} as it is.", "good"
            asked.offered = []
        elif asked.offered:
            words, kind = f"Each of these fits {bars.size(room)}. Click one to fill it in.", "good"
        else:
            words, kind = f"Nothing was found that fits {bars.size(room)}; a smaller model may.", "error"
        yield [theme.said(words, kind), *offers(asked)]

    def offers(asked: Asked) -> list[Any]:
        found = [gr.Button(words_of(remedy), visible=True) for remedy in asked.offered if remedy.label]
        return [*found, *no_offers()][:num_offers]

    def filled(wanted: dict[str, Any]) -> list[Any]:
        return [gr.update(value=wanted[name]) if name in wanted else gr.skip() for name in names]

    def take(place: int, asked: Asked, *now: Any) -> list[Any]:
        if asked.spec is None or place >= len(asked.offered):
            raise LoRAError(
                "The proposals must be looked for again, as the settings have changed since; press Fit it for me."
            )
        wanted = changes(asked.offered[place], asked.spec)
        kept = {*wanted, *(CHOICE if "pattern" in wanted else ())}
        asked.before = {name: value for name, value in zip(names, now, strict=True) if name in kept}
        return [gr.Button(f"Undo “{asked.offered[place].label}”", visible=True), *filled(wanted)]

    def undo(asked: Asked) -> list[Any]:
        wanted, asked.before = asked.before, {}
        return [gr.Button(visible=False), *filled(wanted)]

    def named(handler: Callable[..., Any], *args: Any) -> Callable[..., Any]:
        """Returns a guarded handler whose first values stand fixed, under the name of the other."""
        return studio.guard(functools.wraps(handler)(functools.partial(handler, *args)))

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    asking, bars_shown = [part.asked, part.free, *inputs], [part.view, part.fitting, *part.offers]
    gr.on([*changed, part.free.change], forecast, asking, bars_shown, trigger_mode="multiple", **quiet)
    components = list(fields.values())
    taken = [
        offer.click(named(take, place), [part.asked, *components], [part.undo, *components], **quiet)
        for place, offer in enumerate(part.offers)
    ]
    taken.append(part.undo.click(studio.guard(undo), part.asked, [part.undo, *components], **quiet))
    for event in taken:
        redraw(event).then(forecast, asking, bars_shown, **quiet)
    told = [part.progress, part.probe, part.beside, part.cancel, part.view]
    for button, is_alone in ((part.probe, True), (part.beside, False)):
        button.click(named(probe, is_alone), asking, told, **quiet)
    for button in (part.cancel, start):
        button.click(studio.guard(cancel), part.asked, None, queue=False, **quiet)
    part.fit.click(studio.guard(fit), asking, [part.fitting, *part.offers], **quiet)


CHOICE = ("preset", "names", "pattern")
"""The fields that say together which matrices are adapted."""
