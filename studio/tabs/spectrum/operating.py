"""Rank surgery: fewer directions of ΔW, what that keeps and costs by measuring, to chat with and to save."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr

from core import Adapter, LoRAError, Noted, Truncation
from studio import markup, surgery, theme
from studio.asking import ask
from studio.measuring import MOST_ROWS, Bench, Measured, Measuring
from studio.opened import Opened, Source
from studio.pictures import Picture
from studio.state import Studio
from studio.surgery import CHANCE, CURVES, STRONGEST, WHAT, Cut
from studio.tabs.spectrum.frame import PRIVATE, Frame

BASE, FULL = "base model", "whole adapter"

Losses = dict[tuple[str, int], Measured]
"""(curve, k) → losses; (BASE, 0) and (FULL, r) are the references."""


def bench_of(opened: Opened) -> Bench:
    """Returns what an adapter is measured on: its run's held-out rows, and general text.

    Raises:
        LoRAError: Its base model is not at hand.
    """
    if opened.model is None:
        raise LoRAError("The base model must be at hand to measure a loss; name it where the adapter is opened.")
    return Bench.of(opened.run) if opened.run else Bench(opened.model)


def cut_facts(opened: Opened, made: Truncation, cut: Cut) -> str:
    """Returns HTML of what a cut keeps, and of its exact error."""
    before, after = surgery.num_bytes(opened.adapter), surgery.num_bytes(made.adapter)
    ranks = made.ranks
    whole = sum(min(f.r, *f.shape) for f in opened.adapter.factors.values())
    left_out = sum(not k for k in ranks.values())
    pairs = [
        ("Directions kept", f"{sum(ranks.values()):,} of {whole:,}"),
        ("‖ΔW‖² kept", f"{100 * made.energy:.2f} %"),
        ("Relative error ‖ΔW − ΔW_k‖ / ‖ΔW‖", f"{made.relative_error:.4f}"),
        ("Adapter", f"{_size(after)} instead of {_size(before)}"),
    ]
    if cut.by != "rank" or cut.pooled:
        pairs.append(("r of its matrices", f"{min(ranks.values())} to {max(ranks.values())}"))
    words = [f"{left_out} matrices keep nothing and are left out."] if left_out else []
    return theme.facts(pairs) + (theme.said(words) if words else "")


def measured_facts(found: dict[str, Measured]) -> str:
    """Returns HTML of the losses of a cut beside those of the whole adapter and the base."""
    one = next(iter(found.values()))
    head = "<th scope='col'>held-out rows</th><th scope='col'>general text</th>"
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{_loss(m.task_loss)}</td><td>{_loss(m.general_loss)}</td></tr>"
        for name, m in found.items()
    )
    words = (
        f"Nats per token; measured on {one.num_rows:,} held-out rows, and on {one.num_general_tokens:,} tokens of "
        "plain English that the studio brings along and no run trains on."
    )
    return markup.table(f"<tr><td></td>{head}</tr>", rows) + theme.said(words)


def loss_picture(found: Losses, whole_rank: int) -> Picture:
    """Returns the measured losses against how many directions are kept.

    Args:
        found: What is known.
        whole_rank: r of the whole adapter, where all curves end.
    """
    from studio import figures

    ends = {name: next((m for (of, _), m in found.items() if of == name), None) for name in (BASE, FULL)}
    base, full = ((m.task_loss, m.general_loss) if m else None for m in ends.values())
    series = {}
    for kind in CURVES:
        points = {k: (m.task_loss, m.general_loss) for (of, k), m in found.items() if of == kind}
        if points:  # they begin at the base and end at the whole
            points |= ({0: base} if base else {}) | ({whole_rank: full} if full else {})
        series[kind] = [(k, *points[k]) for k in sorted(points)]
    rows = [(of, k, m) for (of, k), m in found.items()]
    return Picture(
        "Measured loss against directions kept",
        figures.rank_loss_figure(series, rank=whole_rank, base=base, full=full),
        numbers={
            "kept": [of for of, _, _ in rows],
            "k": [k for _, k, _ in rows],
            "held-out loss": [float("nan") if m.task_loss is None else m.task_loss for _, _, m in rows],
            "general loss": [m.general_loss for _, _, m in rows],
        },
        maths=(
            "loss: the mean over tokens of −ln p(token), in nats, of the model with scaling·B_k·A_k\n"
            "kept: the first k directions of U·diag(σ)·Vᵀ = ΔW of each matrix; pooled, k·(number of matrices) in all\n"
            "chance: k directions of each matrix drawn at random (the same ones each time, each set within the next)"
        ),
    )


def wanted(opened: Opened, studio: Studio, kinds: list[str]) -> dict[tuple[str, int], Adapter | None]:
    """Returns (curve, k) → the adapters to measure for some curves, the references first.

    Raises:
        LoRAError: The adapter cannot be cut.
    """
    spectra = {path: found for path, (_, found) in studio.spectra(opened).items()}
    ranks = surgery.curve_ranks(spectra)
    asked: dict[tuple[str, int], Adapter | None] = {(BASE, 0): None, (FULL, _rank(opened)): opened.adapter}
    for kind in kinds:
        asked |= {(kind, k): adapter for k, adapter in surgery.curve(opened.adapter, kind, ranks).items()}
    return asked


def measured(
    studio: Studio, opened: Opened, asked: dict[tuple[str, int], Adapter | None]
) -> Iterator[tuple[Measuring, str, Losses]]:
    """Yields what goes on, in words, and the losses so far.

    Raises:
        LoRAError: It cannot be measured, or was cancelled.
    """
    by_name = {_name(*key): key for key in asked}
    going = Measuring(studio.workspace, bench_of(opened), {name: asked[key] for name, key in by_name.items()})
    found: Losses = {}
    try:
        for said in going:
            if isinstance(said, Noted):
                yield going, said.message, found
            else:
                found[by_name[said.name]] = said
                yield going, f"{len(found)} of {len(asked)} measured", found
    finally:
        going.close()  # also when the page is gone


def build(frame: Frame, tab: Any) -> None:
    """Draws the section in its `tab`."""
    studio = frame.studio
    going = gr.State(None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            gr.Markdown("## Keep fewer directions")
            by = gr.Radio([(words, key) for key, words in WHAT.items()], value="rank", label="Keep", elem_id="cut-by")
            told = "Of each matrix, from 1 to r. Fewer make a smaller adapter, and lose more of what it learnt."
            rank = gr.Slider(1, 8, value=1, step=1, label="Directions k", info=told, elem_id="cut-rank")
            told = "What the kept directions have of it; 90 to 99 is usual. Less loses more of what it learnt."
            share = gr.Slider(
                10, 100, value=90, step=1, label="Share of ‖ΔW‖², %", info=told, visible=False, elem_id="cut-share"
            )
            pooled = gr.Checkbox(
                label="All matrices compete",
                info="The strongest of all together stay: k is then the mean, and matrices may lose all of theirs.",
                elem_id="cut-pooled",
            )
            chosen = gr.CheckboxGroup([], label="Directions, with their σ", visible=False, elem_id="cut-chosen")
            facts = gr.HTML(elem_id="cut-facts-surgery")
            one = gr.Button("Measure this adapter", size="sm", elem_id="measure-one")
            losses = gr.HTML(elem_id="cut-losses")
            with gr.Row(elem_id="cut-keep"):
                name = gr.Textbox(
                    label="Save it as",
                    placeholder="A name of its own",
                    max_lines=1,
                    elem_id="cut-name",
                    scale=3,
                    min_width=200,
                )
                save = gr.Button("Save as a new adapter", size="sm", elem_id="cut-save", scale=2, min_width=150)
            saved = gr.HTML(elem_id="cut-saved")
        with gr.Column(scale=6, min_width=320):
            gr.Markdown("## What that costs, measured")
            kinds = gr.CheckboxGroup(list(CURVES), value=[STRONGEST, CHANCE], label="Directions kept", elem_id="curves")
            with gr.Row():
                many = gr.Button("Measure the curves", variant="primary", size="sm", elem_id="measure-many")
                cancel = gr.Button("Cancel", size="sm", elem_id="measure-cancel", interactive=False)
            progress = gr.HTML(elem_id="measure-progress")
            plot = frame.picture("rank-losses")
    gr.Markdown("## Ask it\nThe same question to the whole adapter and to what is left of it.")
    message = gr.Textbox(label="Message", lines=2, elem_id="cut-message")
    button = gr.Button("Ask both", size="sm", elem_id="cut-ask")
    with gr.Row(equal_height=False):
        answers = [
            gr.Textbox(label=words, lines=5, interactive=False, elem_id=f"cut-answer-{place}", buttons=["copy"])
            for place, words in enumerate(("Whole adapter", "After surgery"))
        ]
    settings = [by, rank, share, pooled, chosen]

    def show_choices(opened: Opened, path: str) -> list[Any]:
        _, found = studio.spectra(opened)[path]
        choices = [(f"{i + 1} · σ {float(s):.3g}", i) for i, s in enumerate(found.sigma[: found.rank])]
        most = _rank(opened)
        return [
            gr.Slider(maximum=max(2, most), value=max(1, most // 2)),
            gr.CheckboxGroup(choices=choices, value=[i for _, i in choices]),
        ]

    def show_cut(opened: Opened, path: str, *values: Any) -> str:
        cut = parse(path, *values)
        return cut_facts(opened, cut.of(opened.adapter), cut)

    def show_curve(opened: Opened) -> list[Any]:
        asked = len(surgery.curve_ranks({path: found for path, (_, found) in studio.spectra(opened).items()}))
        words = (
            f"Nothing is measured yet. Each curve takes {asked} measurement{'s' * (asked != 1)} of its own, of at most "
            f"{MOST_ROWS} held-out rows; what was measured once is kept."
        )
        return ["", theme.said(words)]

    def opened_by(view: tuple[Source, Any, str] | None) -> tuple[Opened, str]:
        if view is None:
            raise LoRAError("`adapter` (=nothing) must be opened first.")
        return studio.opened(view[0]), view[2]

    def made_by(view: tuple[Source, Any, str] | None, *values: Any) -> tuple[Opened, Opened, Cut]:
        opened, path = opened_by(view)
        cut = parse(path, *values)
        adapter = surgery.named(cut.of(opened.adapter).adapter, opened.model)
        return opened, replace(opened, adapter=adapter, name=f"{opened.name}, {cut.title}", key=(opened.key, cut)), cut

    def measuring(
        opened: Opened, asked: dict[tuple[str, int], Adapter | None], shown: Callable[[Losses], str]
    ) -> Iterator[list[Any]]:
        try:
            for process, words, found in measured(studio, opened, asked):
                drawn = shown(found) if found else gr.skip()
                yield [process, _progress(words, len(found), len(asked)), drawn, gr.Button(interactive=True)]
        except LoRAError as error:
            yield [None, theme.said(str(error), "warn"), gr.skip(), gr.Button(interactive=False)]
            return
        yield [None, "", gr.skip(), gr.Button(interactive=False)]

    def measure_one(view: Any, *values: Any) -> Iterator[list[Any]]:
        opened, less, cut = made_by(view, *values)
        asked = {(BASE, 0): None, (FULL, _rank(opened)): opened.adapter, (cut.title, -1): less.adapter}
        yield from measuring(opened, asked, lambda found: measured_facts({of: m for (of, _), m in found.items()}))

    def measure_many(view: Any, kinds: list[str]) -> Iterator[list[Any]]:
        if not kinds:
            raise LoRAError("`Directions kept` (=nothing) must hold at least one curve; tick one.")
        opened, _ = opened_by(view)
        yield [None, _progress("Cutting the adapter", 0, 1), gr.skip(), gr.Button(interactive=False)]
        asked = wanted(opened, studio, kinds)
        yield from measuring(opened, asked, lambda found: frame.put(loss_picture(found, _rank(opened))))

    def end_measuring(process: Measuring | None) -> None:
        if process is not None:
            process.close()

    def keep(view: Any, title: str, *values: Any) -> str:
        _, less, _ = made_by(view, *values)
        folder = surgery.save(less.adapter, title, studio.workspace)
        return theme.said(
            f"Saved in {folder}. “Open another adapter …” above opens it, and PEFT reads it, too.", "good"
        )

    def both(view: Any, text: str, *values: Any) -> Iterator[list[Any]]:
        opened, less, _ = made_by(view, *values)
        yield ["", "Loading the model …"]
        after = ""
        for after in ask(studio, less, text):
            yield ["", after]
        yield ["Loading the model …", after]
        for before in ask(studio, opened, text):
            yield [before, after]

    quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
    by.change(
        lambda key: [
            gr.update(visible=key == "rank"),
            gr.update(visible=key == "energy"),
            gr.update(visible=key != "chosen"),
            gr.update(visible=key == "chosen"),
        ],
        by,
        [rank, share, pooled, chosen],
        queue=False,
        **quiet,
    )
    frame.draws(tab, show_choices, [], [rank, chosen], by_matrix=True, show_progress="hidden")
    changed = [part.change for part in settings]
    last: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "multiple"}
    frame.draws(tab, show_cut, settings, [facts], by_matrix=True, also=changed, **last)
    frame.draws(tab, show_curve, [], [progress, plot], show_progress="hidden")
    one.click(studio.guard(measure_one), [frame.view, *settings], [going, progress, losses, cancel], **quiet)
    many.click(studio.guard(measure_many), [frame.view, kinds], [going, progress, plot, cancel], **quiet)
    cancel.click(studio.guard(end_measuring), going, None, queue=False, **quiet)
    save.click(studio.guard(keep), [frame.view, name, *settings], saved, **quiet)
    gr.on([button.click, message.submit], studio.guard(both), [frame.view, message, *settings], answers, **quiet)


def parse(path: str, by: str, rank: Any, share: Any, pooled: bool, chosen: list[Any] | None) -> Cut:
    """Returns the cut that the form describes."""
    numbers = tuple(sorted(int(i) for i in chosen or ()))
    return Cut(by, int(rank or 1), float(share or 0) / 100, bool(pooled) and by != "chosen", path, numbers)


def _rank(opened: Opened) -> int:
    return max((min(f.r, *f.shape) for f in opened.adapter.factors.values()), default=0)


def _name(of: str, k: int) -> str:
    return of if of in (BASE, FULL) or k < 0 else f"k = {k}, {of}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _progress(words: str, done: int, total: int) -> str:
    width = 100 * done / max(1, total)
    return (
        f'<div class="progress" role="progressbar" aria-valuenow="{done}" aria-valuemax="{total}" '
        f'aria-label="Measuring"><span style="width:{width:.1f}%"></span></div>'
        f'<div class="sub-line">{escape(words)}</div>'
    )
