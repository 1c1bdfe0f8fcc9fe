"""Time machine: loss, spectrum and effective rank over a run's steps, and one answer of any step that was kept."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from core import Factors, LoRAError, random_sigma, spectrum
from studio import theme
from studio.asking import ask
from studio.opened import Opened, Source
from studio.pictures import Picture, recipe
from studio.runs import Run
from studio.state import Studio
from studio.tabs.spectrum.frame import PRIVATE, Frame

_SLIDER = """
const stops = () => JSON.parse(element.querySelector('input')?.dataset.stops || '[]');
const mark = () => {
    const range = element.querySelector('input'), svg = document.querySelector('#past-plot svg');
    if (!range || !stops().length) return;
    const [step, x, top, bottom] = stops()[range.value], output = element.querySelector('output');
    if (output.step !== step) output.textContent = `step ${output.step = step}`;
    range.setAttribute('aria-valuetext', `step ${step}`);
    if (!svg) return;
    let line = svg.querySelector('.mark');
    if (!line) {
        line = document.createElementNS('http://www.w3.org/2000/svg', 'line');
        line.setAttribute('class', 'mark');
        svg.append(line);
    }
    for (const [name, value] of Object.entries({x1: x, x2: x, y1: top, y2: bottom})) line.setAttribute(name, value);
};
let rest;
element.addEventListener('input', () => {
    mark();
    clearTimeout(rest);
    rest = setTimeout(() => trigger('input', {place: Number(element.querySelector('input').value)}), 120);
});
for (const drawn of [element, document.querySelector('#past-plot')])
    new MutationObserver(mark).observe(drawn, {childList: true, subtree: true, attributeFilter: ['data-stops']});
"""
"""The line in the charts follows the thumb at once; the numbers follow when it rests and the server has answered."""

_NOT_A_RUN = "This adapter comes from files, which do not say how it was trained; open a run to go back in time."


def stops_of(run: Run) -> list[int]:
    """Returns the steps that can be looked at: those whose spectrum was measured, and those with a checkpoint."""
    run.log.read()
    return sorted({*run.log.spectra.steps.tolist(), *run.checkpoints.steps()})


def sigma_at(run: Run, path: str, step: int, studio: Studio) -> np.ndarray | None:
    """Returns the singular values of one ΔW after a step, of the log or a checkpoint; None where neither has them."""
    spectra = run.log.spectra
    measured = np.flatnonzero(spectra.steps == step)
    if len(measured):
        row = spectra.sigma(path)[measured[-1]]
        row = row[~np.isnan(row)]
        return row if len(row) else None
    if step not in run.checkpoints.steps():
        return None
    factors = studio.opened(Source(run.id, step)).adapter.factors
    return spectrum(factors[path]).sigma.numpy() if path in factors else None


def course(opened: Opened, run: Run, path: str, studio: Studio) -> tuple[Picture, list[list[float]]]:
    """Returns the charts over a run's steps, and where each stop stands in them: step, x, top, bottom."""
    from studio import figures

    spectra, log = run.log.spectra, run.log
    columns = log.steps.columns()
    steps, sigma, ranks = spectra.steps, spectra.sigma(path), spectra.effective_rank(path)
    means = spectra.means()[: len(steps), 1]
    chance = _chance(opened.adapter.factors[path])
    norms = np.sqrt(np.nansum(sigma**2, axis=1))
    held_out = [(e.step, e.loss) for e in log.evaluations]
    figure = figures.training_figure(
        (columns["step"], columns["loss"]),
        ([s for s, _ in held_out], [loss for _, loss in held_out]),
        steps,
        sigma,
        ranks,
        means,
        chance_sigma=chance[0] * norms,
        chance_rank=effective_rank_of(chance),
        title=path,
    )
    stops = stops_of(run)
    marks: list[list[float]] = []
    if len(figure.axes):
        xs, top, bottom = figures.mark_places(figure, stops)
        marks = [[step, round(x, 2), round(top, 2), round(bottom, 2)] for step, x in zip(stops, xs, strict=True)]
    f = opened.adapter.factors[path]
    code = recipe(
        opened,
        studio.workspace,
        "import numpy as np",
        "",
        "from core import Factors, random_sigma",
        "from studio import figures",
        "from studio.runs import Runs",
        "",
        "",
        f"path, log = {path!r}, Runs(workspace).get({run.id!r}).log",
        "log.read()",
        "measured, columns = log.spectra, log.steps.columns()",
        "steps, sigma, ranks = measured.steps, measured.sigma(path), measured.effective_rank(path)",
        "held_out = [e.step for e in log.evaluations], [e.loss for e in log.evaluations]",
        "",
        "",
        "f = adapter.factors[path]",
        "chance = random_sigma(Factors(f.A * 0 + 1, f.B * 0 + 1, 1.0)).numpy()  # of any update of these shapes",
        "chance = chance / np.linalg.norm(chance)",
        "shares = chance / chance.sum()",
        "figure = figures.training_figure(",
        "    (columns['step'], columns['loss']),",
        "    held_out,",
        "    steps,",
        "    sigma,",
        "    ranks,",
        "    measured.means()[: len(steps), 1],",
        "    chance_sigma=chance[0] * np.sqrt(np.nansum(sigma**2, axis=1)),",
        "    chance_rank=float(np.exp(-(shares * np.log(shares)).sum())),",
        "    title=path,",
        ")",
        "figure",
    )
    picture = Picture(
        f"{path} over the steps",
        figure,
        numbers={
            "step": steps,
            **{f"σ{place}": column for place, column in enumerate(sigma.T, 1)},
            "effective rank": ranks,
            "mean effective rank": means,
        },
        maths=(
            f"σ² = eig(scaling²·Lᵀ·(A·Aᵀ)·L) with BᵀB = L·Lᵀ, {f.r} × {f.r}, in float64, while it trained\n"
            "effective rank = exp(−Σ p ln p), p = σ / Σ σ\n"
            f"chance: Gaussian B, {f.shape[0]} × {f.r}, and A, {f.r} × {f.shape[1]}, of the ΔW's norm at each step"
        ),
        notebook=code,
    )
    return picture, marks


def _chance(f: Factors) -> np.ndarray:
    """Returns the singular values of random factors of a ΔW's shapes, of norm 1."""
    generous = Factors(f.A * 0 + 1, f.B * 0 + 1, 1.0)  # any ΔW that is not zero: the norm is taken out below
    sigma = random_sigma(generous).numpy()
    return sigma / np.linalg.norm(sigma)


def effective_rank_of(sigma: np.ndarray) -> float:
    """Returns exp of the entropy of p = σ / Σ σ; 0 where all are zero."""
    shares = sigma[sigma > 0] / sigma.sum() if sigma.sum() else sigma[:0]
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def facts_at(run: Run, path: str, step: int, sigma: np.ndarray | None) -> str:
    """Returns HTML of what is known of a step."""
    steps = run.log.steps.columns()
    place = int(np.searchsorted(steps["step"], step))
    has_step = place < len(steps["step"]) and steps["step"][place] == step
    held_out = next((e.loss for e in run.log.evaluations if e.step == step), None)
    pairs = [
        ("Step", f"{step:,}"),
        ("Training loss", f"{steps['loss'][place]:.4f}" if has_step else "–"),
        ("Held-out loss", "–" if held_out is None else f"{held_out:.4f}"),
        ("σ₁", "–" if sigma is None else f"{sigma[0]:.4g}"),
        ("‖ΔW‖", "–" if sigma is None else f"{np.linalg.norm(sigma):.4g}"),
        ("Effective rank", "–" if sigma is None else f"{effective_rank_of(sigma):.2f}"),
    ]
    kept = run.checkpoints.steps()
    if step in kept:
        words = f"The checkpoint of step {step} has its factors: it can be asked below."
    else:
        others = ", ".join(map(str, kept)) or "none"
        words = f"Of step {step} only the singular values were kept; steps with all factors: {others}."
    return theme.facts(pairs) + theme.said(words)


def build(frame: Frame, tab: Any) -> None:
    """Draws the section in its `tab`."""
    studio = frame.studio
    # A State tells nobody of a change by an event of the page; and Gradio shows what it hides after a link here.
    place = gr.Number(0, precision=0, visible="hidden", elem_classes="unseen")
    said = gr.HTML()
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            slider = gr.HTML(
                [0, []],
                html_template='<input type="range" min="0" max="${value[1].length - 1}" value="${value[0]}" '
                'data-stops="${JSON.stringify(value[1])}" aria-label="Step to look at"><output></output>',
                js_on_load=_SLIDER,
                elem_id="past-slider",
                visible="hidden",
            )
            plot = frame.picture("past-plot")
        with gr.Column(scale=5, min_width=320):
            facts = gr.HTML(elem_id="past-facts")
            bars = frame.picture("past-sigma")
            message = gr.Textbox(
                label="Message", lines=2, elem_id="past-message", placeholder="Ask the adapter as it was"
            )
            button = gr.Button("Ask it as it was at this step", size="sm", elem_id="past-ask")
            reply = gr.Textbox(label="Answer", lines=4, interactive=False, elem_id="past-answer", buttons=["copy"])

    def show_course(opened: Opened, path: str) -> list[Any]:
        run = opened.run
        stops = stops_of(run) if run else []
        if run is None or not stops:
            words = "The spectrum was not measured while this run trained." if run else _NOT_A_RUN
            return [theme.said(words, "warn"), "", gr.HTML(visible="hidden"), 0]
        picture, marks = course(opened, run, path, studio)
        last = len(stops) - 1
        thumb = gr.HTML(value=[last, marks], visible=True if marks else "hidden")
        return ["", frame.put(picture), thumb, last]

    def show_step(opened: Opened, path: str, at: int) -> list[Any]:
        run = opened.run
        stops = stops_of(run) if run else []
        if run is None or not stops:
            return ["", "", gr.Button(interactive=False)]
        step = stops[min(int(at), len(stops) - 1)]
        sigma = sigma_at(run, path, step, studio)
        drawn = "" if sigma is None else frame.put(_bars(opened, path, step, sigma))
        return [facts_at(run, path, step, sigma), drawn, gr.Button(interactive=step in run.checkpoints.steps())]

    def go_to(event: gr.EventData) -> int:
        return int(event.place)

    def answer_then(looked_at: tuple[Source, Any] | None, at: int, text: str) -> Iterator[str]:
        opened = studio.opened(looked_at[0]) if looked_at else None
        if opened is None or opened.run is None:
            raise LoRAError(_NOT_A_RUN)
        stops, run = stops_of(opened.run), opened.run
        step = stops[min(int(at), len(stops) - 1)]
        if step not in run.checkpoints.steps():
            raise LoRAError(f"Step {step} has no checkpoint any more, so its factors are gone; move to another one.")
        yield f"Loading the adapter of step {step} …"
        yield from ask(studio, studio.opened(Source(run.id, step)), text)

    frame.draws(tab, show_course, [], [said, plot, slider, place], by_matrix=True)
    frame.draws(
        tab,
        show_step,
        [place],
        [facts, bars, button],
        by_matrix=True,
        also=[place.change],
        show_progress="hidden",
        trigger_mode="multiple",
    )
    slider.input(
        studio.guard(go_to), None, place, queue=False, show_progress="hidden", trigger_mode="always_last", **PRIVATE
    )
    gr.on([button.click, message.submit], studio.guard(answer_then), [frame.source, place, message], reply, **PRIVATE)


def _bars(opened: Opened, path: str, step: int, sigma: np.ndarray) -> Picture:
    from studio import figures

    chance = _chance(opened.adapter.factors[path])[: len(sigma)] * np.linalg.norm(sigma)
    return Picture(
        f"Singular values of ΔW after step {step} in {path}",
        figures.sigma_figure(sigma, chance, title=f"After step {step}"),
        numbers={"direction": range(1, len(sigma) + 1), "σ": sigma, "chance": chance},
    )
