"""The part of the Chat tab that says what each pane runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from core import LoRAError
from studio import chat_page
from studio.forms import info
from studio.panes import HIGHEST, LOWEST, Pane
from studio.runs import Run
from studio.state import Studio

LETTERS = "ABCD"
KINDS = {
    "Base": (),
    "Adapter": ("adapter", "strength"),
    "Merged": ("adapter", "strength"),
    "Cut to rank": ("adapter", "rank", "strength"),
    "Checkpoint": ("adapter", "step", "strength"),
    "Sum of two": ("adapter", "strength", "plus", "plus_strength"),
}
"""What a pane may be → the settings of a `Pane` that it shows."""

AT_FIRST = ("Base", "Adapter", "Merged", "Cut to rank")
FIELDS = ("adapter", "strength", "rank", "step", "plus", "plus_strength")


@dataclass(frozen=True)
class PaneForm:
    """One pane's components.

    Attributes:
        column: All of it.
        settings: What says what it runs.
        kind: Which of `KINDS`.
        fields: The widgets of `FIELDS`.
        head: HTML of what it is called.
        talk: HTML of what it was asked and said.
        engine: HTML of what its engine says of itself.
    """

    column: Any
    settings: Any
    kind: Any
    fields: dict[str, Any]
    head: Any
    talk: Any
    engine: Any

    @property
    def inputs(self) -> list[Any]:
        """What `parse` reads."""
        return [self.kind, *self.fields.values()]


NUM_INPUTS = 1 + len(FIELDS)


def draw(place: int) -> PaneForm:
    """Draws a pane where this is called."""
    letter, kind = LETTERS[place].lower(), AT_FIRST[place]
    shown = KINDS[kind]
    with gr.Column(min_width=270, visible=place < 3, elem_classes=["pane-card"], elem_id=f"pane-{letter}") as column:
        head = gr.HTML(chat_page.head(LETTERS[place], kind, kind="" if shown else "base"))
        with gr.Group() as settings:
            runs = gr.Dropdown(
                list(KINDS), value=kind, label="What it runs", filterable=False, elem_id=f"kind-{letter}"
            )
            fields = {
                "adapter": gr.Dropdown([], label="Adapter of", visible="adapter" in shown),
                "strength": gr.Slider(
                    LOWEST,
                    HIGHEST,
                    value=1,
                    step=0.05,
                    label="Strength",
                    info="0: the base, 1: as trained, 2: twice ΔW, -1: its opposite. Also while it answers.",
                    visible="strength" in shown,
                    elem_id=f"strength-{letter}",
                ),
                "rank": gr.Number(
                    1,
                    label="Directions kept",
                    info="From 1 to r, of each ΔW the strongest. Too few lose what it learnt.",
                    precision=0,
                    minimum=1,
                    visible="rank" in shown,
                ),
                "step": gr.Dropdown([], label="Checkpoint of step", visible=False),
                "plus": gr.Dropdown([], label="Plus the adapter of", visible=False),
                "plus_strength": gr.Slider(
                    LOWEST,
                    HIGHEST,
                    value=1,
                    step=0.05,
                    label="Its strength",
                    info=info("0: not at all, 1: as trained.", "Task arithmetic, arXiv:2212.04089"),
                    visible=False,
                ),
            }
        talk = gr.HTML(chat_page.talk((), place), js_on_load=chat_page.JS, elem_id=f"talk-{letter}")
        engine = gr.HTML(
            '<div class="engine-line">What it was computed with comes here.</div>', elem_id=f"engine-{letter}"
        )
    return PaneForm(column, settings, runs, fields, head, talk, engine)


def parse(values: Sequence[Any]) -> Pane:
    """Returns what a pane's `inputs` say.

    Raises:
        LoRAError: No adapter or checkpoint is chosen where one is needed, or a setting is out of range.
    """
    kind, *rest = values
    given = dict(zip(FIELDS, rest, strict=True))
    asked = {name: given[name] for name in KINDS[kind]}
    if "adapter" in asked and not asked["adapter"]:
        raise LoRAError(f"`Adapter of` (=nothing) must name a run, for a pane that runs {kind!r}; choose one, or Base.")
    for name, words in (("plus", "`Plus the adapter of`"), ("step", "`Checkpoint of step`")):
        if name in asked and not asked[name]:
            raise LoRAError(f"{words} (=nothing) must be chosen for a pane that runs {kind!r}.")
    if "rank" in asked:
        asked["rank"] = max(1, int(asked["rank"] or 1))
    return Pane.from_dict(asked | {"merged": kind == "Merged"})


def title(pane: Pane, kind: str) -> tuple[str, str]:
    """Returns what a pane is called, and what else there is to say of it."""
    notes = [f"strength {pane.strength:g}"] if pane.adapter and pane.strength != 1 else []
    notes += [f"rank {pane.rank}"] if pane.rank else []
    notes += [f"step {pane.step}"] if pane.step else []
    notes += [f"+ {pane.plus_strength:g} × {pane.plus}"] if pane.plus else []
    return kind, " · ".join(notes)


def choices(studio: Studio, run: Run) -> list[tuple[str, str]]:
    """Returns (name, id) of the runs with an adapter on the base model of `run`."""
    found = []
    for one in studio.runs.list():
        try:
            if one.has_adapter and (one.spec.model, one.spec.head) == (run.spec.model, run.spec.head):
                method = "" if one.spec.method.method == "lora" else f" · {one.spec.method.title}"
                found.append((f"{one.spec.name}{method} · {one.created:%d %b %H:%M}", one.id))
        except LoRAError:  # damaged: the Runs tab says so
            continue
    return found


def steps(studio: Studio, run_id: str | None) -> Any:
    """Returns the choice of checkpoints of a run."""
    found = studio.runs.get(run_id).checkpoints.steps() if run_id else []
    return gr.Dropdown(choices=found, value=found[0] if found else None)


def shown(kind: str, place: int) -> list[Any]:
    """Returns updates of a pane's head and fields for another kind."""
    wanted = KINDS[kind]
    head = chat_page.head(LETTERS[place], kind, kind="" if wanted else "base")
    return [head, *(gr.update(visible=name in wanted) for name in FIELDS)]
