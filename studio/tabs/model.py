"""Model: which base, which matrices, what rank; and what that costs, before anything is loaded."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from core import ALL_LINEAR, FORMS, LoRAConfig, LoRAError, adaptable, plan, settings
from studio import matrices, models, theme
from studio.forms import Form
from studio.state import Studio

CHOOSE = "My own choice"
KINDS = {
    "Starter (SmolLM2-135M-Instruct)": "starter",
    "Hugging Face Hub": "hub",
    "Folder": "folder",
    "GGUF file": "gguf",
}
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
    """

    model: gr.State
    inputs: list[Any]
    form: Form


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
        raise LoRAError("`target_modules` (=nothing) must name at least one matrix; tick some in the Model tab.")
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
            ("Licence", info.licence or "unknown"),
        ]
    )


def cost_view(studio: Studio, model: str, config: LoRAConfig) -> str:
    """Returns HTML of what `config` trains in `model`, and what it leaves out."""
    skeleton = studio.skeleton(model)
    injection = plan(skeleton, config)
    experts = adaptable(skeleton, ["expert"])  # of which `unmatched` counts a stack once
    stacks = {path.rpartition(".")[0] for path in experts}
    left_out = {*injection.unmatched, *experts} - stacks - {t.path for t in injection.targets}
    return theme.facts(
        [
            ("Trainable parameters", f"{injection.num_trainable:,}"),
            ("Share of the model", f"{100 * injection.trainable_share:.2f} %"),
            ("Adapter file", _bytes(injection.adapter_bytes)),
            ("Matrices adapted", f"{len(injection.targets)} of {len(injection.targets) + len(left_out)}"),
        ]
    )


def build(studio: Studio, page: gr.Blocks) -> ModelTab:
    """Draws the tab on `page`."""
    model = gr.State("starter")
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            gr.Markdown("### Base model\nIts weights W₀ stay frozen; the adapter learns beside them.")
            kind = gr.Radio(list(KINDS), value=next(iter(KINDS)), label="Where from", elem_id="model-kind")
            with gr.Group(visible=False) as elsewhere:
                place = gr.Textbox(label="Hub id", elem_id="model-place", max_lines=1)
                look = gr.Button("Look at this model", variant="primary")
            facts = gr.HTML(theme.said("Reading the model's description …"), elem_id="model-facts")
        with gr.Column(scale=6, min_width=320):
            gr.Markdown("### The adapter\nΔW = (alpha / r) · B·A, added to each matrix that you pick.")
            preset = gr.Radio(["All linear"], value="All linear", label="Which matrices", elem_id="preset")
            names = gr.CheckboxGroup([], label="Matrices in each layer (out × in)", elem_id="matrices")
            form = Form(LoRAConfig, [s.name for s in settings(LoRAConfig) if s.name != "target_modules"])
            with gr.Accordion("By pattern", open=False):
                pattern = gr.Textbox(
                    label="Regular expression over whole paths",
                    info=r"Goes before the ticks. For example .*\.layers\.(0|1)\..*q_proj for the first two layers.",
                    max_lines=1,
                )
            cost = gr.HTML(elem_id="model-cost")

    inputs = [model, preset, names, pattern, *form.widgets]

    @studio.guard
    def show_cost(*values: Any) -> str:
        try:
            chosen, config = parse(form, list(values))
            return cost_view(studio, chosen, config)
        except LoRAError as error:  # said where the cost would stand: the form is still being filled in
            return theme.said(str(error), "error")

    def found_in(chosen: str) -> list[matrices.MatrixKind]:
        skeleton = studio.skeleton(chosen)
        return [kind for form in FORMS for kind in matrices.kinds(adaptable(skeleton, [form]), form)]

    def look_at(kind_title: str, place_text: str) -> tuple[Any, ...]:
        wanted = KINDS[kind_title]
        chosen = "starter" if wanted == "starter" else (place_text or "").strip()
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
        )

    def take_preset(chosen: str, title: str) -> Any:
        if title == CHOOSE:
            return gr.skip()
        return matrices.presets(found_in(chosen))[title]

    def take_kind(kind_title: str) -> tuple[Any, ...]:
        wanted = KINDS[kind_title]
        label, info = HINTS.get(wanted, ("", ""))
        return gr.Group(visible=wanted != "starter"), gr.Textbox(label=label, info=info)

    shown = [model, facts, preset, names]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    kind.change(take_kind, kind, [elsewhere, place], queue=False, **quiet)
    looked = [
        kind.change(
            studio.guard(lambda title, text: look_at(title, text) if KINDS[title] == "starter" else [gr.skip()] * 4),
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
        preset.input(studio.guard(take_preset), [model, preset], names, trigger_mode="always_last", **quiet),
        names.input(lambda: CHOOSE, None, preset, queue=False, **quiet),
        page.load(studio.guard(look_at), [kind, place], shown, **quiet),
    ]
    for event in looked:
        event.success(show_cost, inputs, cost, **quiet)
    edited = [pattern.input, *(w.input for w in form.widgets)]
    gr.on(edited, show_cost, inputs, cost, trigger_mode="always_last", **quiet)
    return ModelTab(model, inputs, form)


def _bytes(number: int | None) -> str:
    if number is None:
        return "unknown"
    if number < 1e5:
        return f"{number / 1e3:.1f} kB"
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
