"""Model: which base, which matrices, what rank; and what that costs, before anything is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from core import ALL_LINEAR, FORMS, LoRAConfig, LoRAError, adaptable, chosen_ranks, plan, quoted, settings
from studio import grid, grid_page, matrices, models, theme
from studio.forms import Form
from studio.model_files import STARTER, STARTER_ENCODER
from studio.state import Studio

CHOOSE = "My own choice"
KINDS = {
    "Starter (SmolLM2-135M-Instruct)": "starter",
    "Starter encoder (all-MiniLM-L6-v2)": "starter-encoder",
    "Hugging Face Hub": "hub",
    "Folder": "folder",
    "GGUF file": "gguf",
}
STARTERS = (STARTER, STARTER_ENCODER)
HINTS = {
    "hub": ("Hub id", "owner/name, for example HuggingFaceTB/SmolLM2-360M-Instruct. Needs the network."),
    "folder": (
        "Folder",
        "A folder in Hugging Face layout, with config.json and *.safetensors: in the workspace, or where --allow-path "
        "allows.",
    ),
    "gguf": (
        "GGUF file",
        "The path of a .gguf file: in the workspace, or where --allow-path allows. It is converted once and then kept.",
    ),
}


@dataclass(frozen=True)
class ModelTab:
    """The tab's parts that others read.

    Attributes:
        model: State: the name of the model that was looked at.
        inputs: The components whose values `parse` takes.
        form: The LoRA settings.
        choice: Name → component, of what says which matrices are adapted: preset, names, pattern.
        redraw: Lets the grid follow them after an event that filled them in; returns the event after that.
    """

    model: gr.State
    inputs: list[Any]
    form: Form
    choice: dict[str, Any]
    redraw: Callable[[Any], Any]


def parse(form: Form, values: list[Any]) -> tuple[str, LoRAConfig]:
    """Returns the model and the LoRA settings that the tab's `inputs` say.

    Raises:
        LoRAError: No matrix is chosen, or a setting is out of range.
    """
    model, preset, names, pattern, *widgets = values
    return model, LoRAConfig.from_dict(form.values(widgets) | {"target_modules": targets(preset, names, pattern)})


def targets(preset: str, names: list[str], pattern: str) -> str | tuple[str, ...]:
    """Returns `target_modules` for the picker: a pattern goes before the ticked names."""
    if pattern and pattern.strip():
        return pattern.strip()
    if preset == "All linear":
        return ALL_LINEAR
    if not names:
        raise LoRAError(grid.NOTHING)
    return tuple(names)


def label(kind: matrices.MatrixKind) -> str:
    """Returns what the picker says of one kind of matrix."""
    notes = {
        "linear": "",
        "slice": f" · part of {kind.name.rpartition('.')[0]}",
        "expert": f" · {kind.num_experts} experts each",
    }
    note = notes.get(kind.form, f" · {kind.form}")
    return f"{kind.name} · {kind.shape[0]} × {kind.shape[1]} · {kind.num_layers}×{note}"


def facts_view(info: models.ModelInfo) -> str:
    """Returns HTML of what is known of a model."""
    return theme.facts(
        [
            ("Parameters", f"{info.num_parameters:,}"),
            ("Size as stored", _bytes(info.weight_bytes)),
            ("Stored as", info.dtype or "unknown"),
            ("Layers × width", f"{info.num_layers} × {info.hidden_size}"),
            ("Vocabulary", f"{info.vocab_size:,}"),
            ("Context", f"{info.context_length:,} tokens" if info.context_length else "unknown"),
            ("Chat template", "yes" if info.has_chat_template else "no"),
            ("Made for", "text" if info.can_write else "labels, numbers"),
            ("Licence", info.licence or "unknown"),
        ]
    )


def cost_view(studio: Studio, model: str, config: LoRAConfig) -> str:
    """Returns HTML of what `config` trains in `model`, and what it leaves out."""
    skeleton = studio.base(model)
    injection = plan(skeleton, config)
    experts = adaptable(skeleton, ["expert"])  # of which `unmatched` counts a stack once
    stacks = {path.rpartition(".")[0] for path in experts}
    left_out = {*injection.unmatched, *experts} - stacks - {t.path for t in injection.targets}
    facts = theme.facts(
        [
            ("Trainable parameters", f"{injection.num_trainable:,}"),
            ("Share of the model", f"{100 * injection.trainable_share:.2f} %"),
            ("Adapter file", _bytes(injection.adapter_bytes)),
            ("Matrices adapted", f"{len(injection.targets)} of {len(injection.targets) + len(left_out)}"),
            *([] if studio.info(model).can_write else [("Trained in full", "its head")]),
        ]
    )
    words = chosen_by(config, {pattern: len(paths) for pattern, paths in injection.by_pattern.items()})
    unused = grid.unused_ranks(config, {t.path: t.r for t in injection.targets})
    warnings = [f"`rank_pattern` has {quoted(key)}, which fits no adapted matrix." for key in unused]
    return facts + theme.command("As settings", words) + (theme.said(warnings, "warn") if warnings else "")


def chosen_by(config: LoRAConfig, counts: dict[str, int]) -> str:
    """Returns in words what the settings of the choice are; `counts` is pattern → matrices that it takes."""
    told = [f"{pattern} ({count:,})" for pattern, count in counts.items()]
    words = f"target_modules: {', '.join(told)}"
    if config.layers:
        words += f" · layers: {config.layers}"
    if config.exclude_modules:
        left = config.exclude_modules
        words += f" · except: {left if isinstance(left, str) else ', '.join(left)}"
    if config.rank_pattern:
        words += f" · ranks: {', '.join(f'{key} → {r}' for key, r in config.rank_pattern.items())}"
    return words


def build(studio: Studio, page: gr.Blocks) -> ModelTab:
    """Draws the tab on `page`."""
    model = gr.State("starter")
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            gr.Markdown("## Base model\nIts weights W₀ stay frozen; the adapter learns beside them.")
            kind = gr.Radio(list(KINDS), value=next(iter(KINDS)), label="Where from", elem_id="model-kind")
            with gr.Group(visible=False) as elsewhere:
                place = gr.Textbox(label="Hub id", elem_id="model-place", max_lines=1)
                look = gr.Button("Look at this model", variant="primary")
            facts = gr.HTML(theme.said("Reading the model's description …"), elem_id="model-facts")
            gr.Markdown("## The update\nΔW = (alpha / r) · B·A, added to each matrix that you pick.")
            form = Form(LoRAConfig, [s.name for s in settings(LoRAConfig) if s.name != "target_modules"])
        with gr.Column(scale=6, min_width=320):
            gr.Markdown(
                "## Which matrices\nOrange is adapted, blue stays as it is. Click a matrix, a layer or a column; "
                "or go there with the arrow keys and press space."
            )
            preset = gr.Radio(["All linear"], value="All linear", label="Choices to start from", elem_id="preset")
            cells = gr.HTML("", html_template=grid_page.TEMPLATE, js_on_load=grid_page.JS, elem_id="grid", layout="")
            cost = gr.HTML(elem_id="model-cost")
            with gr.Accordion("By name or pattern", open=False):
                names = gr.CheckboxGroup([], label="Matrices in each layer (out × in)", elem_id="matrices")
                pattern = gr.Textbox(
                    label="Regular expression over whole paths",
                    # Without stars, of which Gradio would make italics.
                    info=r"Goes before the names. For example `.+\.layers\.[01]\..+q_proj` for the first two layers.",
                    max_lines=2,
                    elem_id="pattern",
                )

    inputs = [model, preset, names, pattern, *form.widgets]
    own = [form.widgets[form.names.index(name)] for name in CHOICE]
    choice = [preset, names, pattern, *own]

    def r_of(values: Sequence[Any]) -> int:
        """Returns the general rank, or its default while none is written."""
        r = values[4 + form.names.index("r")]
        return r if isinstance(r, int) and r > 0 else LoRAConfig().r

    def cost_of(chosen: str, config: LoRAConfig) -> str:
        try:
            return cost_view(studio, chosen, config)
        except LoRAError as error:  # said where the cost would stand: the form is still being filled in
            return theme.said(str(error), "error")

    @studio.guard
    def show(*values: Any) -> tuple[Any, ...]:
        """Returns the grid, the names and the cost that the settings say."""
        model_name, title, ticked, text, *_ = values
        grid_cells = grid.cells(studio.base(model_name))
        try:
            targets(title, ticked, text)
        except LoRAError as error:
            nothing = grid.state(grid_cells, model_name, {}, r_of(values))
            return nothing, gr.skip(), gr.skip(), theme.said(str(error), "error")
        try:
            _, config = parse(form, list(values))
        except LoRAError as error:  # of another setting: the choice is as it was
            return gr.skip(), gr.skip(), gr.skip(), theme.said(str(error), "error")
        ranks = _ranks(studio, model_name, config)
        state = grid.state(grid_cells, model_name, ranks, config.r, config.dora)
        ticks = grid.full_columns(grid_cells, ranks) if (text or "").strip() else ticked
        # What is as it was is not sent: an answer that comes late would take back a tick that was set meanwhile.
        new_ticks = gr.skip() if set(ticks) == set(ticked) else ticks
        return state, new_ticks, CHOOSE if (text or "").strip() else gr.skip(), cost_of(model_name, config)

    def represent(ranks: grid.Ranks, *values: Any) -> tuple[Any, ...]:
        """Returns the values of `choice`, and the cost, for a choice of matrices."""
        chosen, _, _, _, *widgets = values
        tree = studio.base(chosen)
        if not ranks:
            return CHOOSE, [], "", "", "", "", theme.said(grid.NOTHING, "error")
        try:
            config = parse(form, list(values))[1]
        except LoRAError:  # the rest of the form is still being filled in, or nothing was chosen
            try:
                config = LoRAConfig.from_dict(form.values(widgets))
            except LoRAError:
                config = LoRAConfig()
        config = grid.settings_for(tree, grid.cells(tree), ranks, config)
        by_title = matrices.presets(found_in(chosen))
        target = config.target_modules
        is_plain = not (config.layers or config.exclude_modules)
        if target == ALL_LINEAR:
            title, ticks, text = "All linear", by_title["All linear"], ""
        elif isinstance(target, str):
            title, ticks, text = CHOOSE, grid.full_columns(grid.cells(tree), ranks), target
        else:
            same = [title for title, found in by_title.items() if set(found) == set(target) and is_plain]
            title, ticks, text = (*same, CHOOSE)[0], list(target), ""
        shown = dict(zip(form.names, form.shown(config), strict=True))
        return title, ticks, text, *(shown[name] for name in CHOICE), cost_of(chosen, config)

    @studio.guard
    def edited(text: str, *values: Any) -> tuple[Any, ...]:
        """Returns the settings that make what was clicked in the grid."""
        grid_cells = grid.cells(studio.base(values[0]))
        return represent(grid.read_state(grid_cells, text, r_of(values)), *values)

    @studio.guard
    def tick(shown: str, *values: Any) -> tuple[Any, ...]:
        """Returns the settings and the grid after a name was ticked; beside a pattern it takes or leaves the column."""
        model_name, _, ticked, text, *widgets = values
        if not (text or "").strip():
            kept = [values[4 + form.names.index(name)] for name in CHOICE]
            now = [model_name, CHOOSE, ticked, "", *widgets]
            state, _, _, words = show(*now)
            return state, CHOOSE, ticked, "", *kept, words
        grid_cells, r = grid.cells(studio.base(model_name)), r_of(values)
        ranks = dict(grid.read_state(grid_cells, shown, r))
        before = set(grid.full_columns(grid_cells, ranks))
        for cell in grid_cells:
            if cell.column in set(ticked) - before:
                for other in grid_cells:  # a fused projection is adapted whole or in slices
                    if cell.whole == other.path or other.whole == cell.path:
                        ranks.pop(other.path, None)
                ranks |= {path: ranks.get(path, r) for path in cell.paths}
            elif cell.column in before - set(ticked):
                for path in cell.paths:
                    ranks.pop(path, None)
        dora = bool(widgets[form.names.index("dora")])
        return grid.state(grid_cells, model_name, ranks, r, dora), *represent(ranks, *values)

    def found_in(chosen: str) -> list[matrices.MatrixKind]:
        skeleton = studio.base(chosen)
        return [kind for form in FORMS for kind in matrices.kinds(adaptable(skeleton, [form]), form)]

    def look_at(kind_title: str, place_text: str) -> tuple[Any, ...]:
        wanted = KINDS[kind_title]
        chosen = wanted if wanted in STARTERS else (place_text or "").strip()
        if not chosen:
            raise LoRAError(f"`{HINTS[wanted][0]}` must not be empty; write one, or take the starter.")
        studio.check_model(chosen)
        info = studio.info(chosen)
        found = found_in(chosen)
        choices = [(label(k), k.name) for k in found]
        by_title = matrices.presets(found)
        return (
            chosen,
            facts_view(info),
            gr.Radio(choices=[*by_title, CHOOSE], value="All linear"),
            gr.CheckboxGroup(choices=choices, value=by_title["All linear"]),
            "",
            gr.HTML(layout=grid.layout(grid.cells(studio.base(chosen)), chosen)),
        )

    def take_preset(chosen: str, title: str) -> tuple[Any, ...]:
        if title == CHOOSE:
            return (gr.skip(),) * 4
        return matrices.presets(found_in(chosen))[title], "", "", ""

    def take_kind(kind_title: str) -> tuple[Any, ...]:
        wanted = KINDS[kind_title]
        label, info = HINTS.get(wanted, ("", ""))
        return gr.Group(visible=wanted not in STARTERS), gr.Textbox(label=label, info=info)

    shown = [model, facts, preset, names, pattern, cells]
    drawn = [cells, names, preset, cost]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    last: dict[str, Any] = {"trigger_mode": "always_last"}  # of clicks that follow fast, the last one counts
    kind.change(take_kind, kind, [elsewhere, place], queue=False, **quiet)
    looked = [
        kind.change(
            studio.guard(
                lambda title, text: look_at(title, text) if KINDS[title] in STARTERS else [gr.skip()] * len(shown)
            ),
            [kind, place],
            shown,
            **quiet,
        ),
        gr.on(
            [look.click, place.submit],
            studio.guard(look_at),
            [kind, place],
            shown,
            api_visibility="private",
            show_progress_on=facts,
        ),
        preset.input(studio.guard(take_preset), [model, preset], [names, pattern, *own[:2]], **last, **quiet),
        page.load(studio.guard(look_at), [kind, place], shown, **quiet),
    ]
    for event in looked:
        event.success(show, inputs, drawn, **quiet)
    numbers = [w.input for name, w in zip(form.names, form.widgets, strict=True) if name not in CHOICE]
    gr.on(numbers, show, inputs, drawn, queue=False, **last, **quiet)
    cells.typed(show, inputs, drawn, queue=False, **last, **quiet)
    names.input(tick, [cells, *inputs], [cells, *choice, cost], queue=False, **last, **quiet)
    cells.edited(edited, [cells, *inputs], [*choice, cost], queue=False, **last, **quiet)

    def redraw(event: Any) -> Any:
        return event.then(show, inputs, drawn, **quiet)

    return ModelTab(model, inputs, form, {"preset": preset, "names": names, "pattern": pattern}, redraw)


CHOICE = ("exclude_modules", "layers", "rank_pattern")
"""The settings beside `target_modules` that a choice in the grid may need."""


def _ranks(studio: Studio, model: str, config: LoRAConfig) -> dict[str, int]:
    try:
        return chosen_ranks(studio.base(model), config)
    except LoRAError:  # the settings fit nothing; the cost says why
        return {}


def _bytes(number: int | None) -> str:
    if number is None:
        return "unknown"
    if number < 1e5:
        return f"{number / 1e3:.1f} kB"
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
