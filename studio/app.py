"""The page: a header that tells the truth, and the tabs."""

import json
import logging
import time
import webbrowser
from html import escape
from typing import Any

import gradio as gr

from core import TrainConfig, resolve_device
from studio import jobs, theme
from studio.runs import RunSpec
from studio.state import Studio
from studio.tabs import chat, data, model, runs, spectrum, train

TICK_SECONDS = 2.0
SMALL_CHART_SECONDS = 10.0
"""Redrawing charts is most of what an open page costs a training on the same cores; the loss goes first."""
SMALL_CHARTS = slice(3, 3 + len(train.SMALL))
MAX_UPLOAD_BYTES = 200 * 1024 * 1024


def build(studio: Studio) -> gr.Blocks:
    """Returns the whole application over `studio`; `launch` serves it."""
    with gr.Blocks(title="LoRA Studio", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(equal_height=True):
            with gr.Column(scale=6, min_width=300):
                head = gr.HTML(_title("Starting …"), elem_id="head")
            with gr.Column(scale=4, min_width=300):
                run_id = gr.Dropdown([], label="Run shown in Train, Spectrum and Chat", elem_id="run")
        with gr.Tabs() as tabs:
            with gr.Tab("Model", id="model"):
                model_tab = model.build(studio, page)
            with gr.Tab("Data", id="data"):
                data_tab = data.build(studio, page, model_tab.model)
            with gr.Tab("Train", id="train"):
                train_tab = train.build()
            with gr.Tab("Spectrum", id="spectrum") as spectrum_tab:
                spectrum.build(studio, run_id, spectrum_tab.select)
            with gr.Tab("Chat", id="chat") as chat_tab:
                chat.build(studio, run_id, chat_tab.select)
            with gr.Tab("Runs", id="runs") as runs_tab:
                runs.build(studio, run_id, runs_tab.select, tabs)
        _wire(studio, page, head, run_id, model_tab, data_tab, train_tab)
    return page


def _wire(
    studio: Studio,
    page: gr.Blocks,
    head: Any,
    run_id: Any,
    model_tab: model.ModelTab,
    data_tab: data.DataTab,
    train_tab: train.TrainTab,
) -> None:
    seen = gr.State("")
    live = [head, *train_tab.outputs]
    num_model, num_data = len(model_tab.inputs), len(data_tab.inputs)

    def choices() -> list[tuple[str, str]]:
        return [(runs.label(run), run.id) for run in studio.runs.list()]

    def opened(request: gr.Request) -> Any:
        listed = studio.runs.list()
        asked = dict(request.query_params).get("run")
        ids = [run.id for run in listed]
        going = next((run.id for run in listed if run.is_running()), None)
        value = asked if asked in ids else going or (ids[0] if ids else None)
        return gr.Dropdown(choices=choices(), value=value)

    def show(run: str | None) -> list[Any]:
        found = studio.runs.get(run) if run else None
        return [head_view(studio), *train.view(found)]

    def tick(run: str | None, before: str) -> list[Any]:
        old = json.loads(before or "{}")
        known = [list(choice) for choice in choices()]
        found = studio.runs.get(run) if run and run in {i for _, i in known} else None
        new = {"known": known, "run": run, "num_events": found.log.num_events if found else 0}
        if new == {key: old.get(key) for key in new}:
            return [gr.skip()] * (len(live) + 2)
        parts = show(found.id if found else None)
        drawn = old.get("drawn", 0.0)
        if run == old.get("run") and found and found.is_running() and time.time() - drawn < SMALL_CHART_SECONDS:
            parts[SMALL_CHARTS] = [gr.skip()] * len(train.SMALL)
        else:
            drawn = time.time()
        listed = gr.skip() if known == old.get("known") else gr.Dropdown(choices=choices())
        return [*parts, listed, json.dumps(new | {"drawn": drawn})]

    def begin(name: str, *values: Any) -> Any:
        chosen, lora = model.parse(model_tab.form, list(values[:num_model]))
        rows = data.parse(data_tab.form, list(values[num_model : num_model + num_data]))
        longest, *rest = values[num_model + num_data :]
        settings = TrainConfig.from_dict(train_tab.form.values(rest) | {"max_length": longest})
        spec = RunSpec(name.strip() or "Untitled", chosen, rows, lora, settings)
        studio.check(spec)
        run = jobs.start(studio.runs, spec)
        return gr.Dropdown(choices=choices(), value=run.id)

    def stop(run: str | None) -> Any:
        if run:
            studio.runs.get(run).ask_to_stop()
        return gr.Button(train.STOPPING, interactive=False)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    page.load(studio.guard(opened), None, run_id, **quiet)
    page.load(studio.guard(show), run_id, live, **quiet)
    run_id.change(studio.guard(show), run_id, live, **quiet)
    gr.Timer(TICK_SECONDS).tick(studio.guard(tick), [run_id, seen], [*live, run_id, seen], queue=False, **quiet)
    train_tab.start.click(
        studio.guard(begin),
        [train_tab.name, *model_tab.inputs, *data_tab.inputs, data_tab.max_length, *train_tab.form.widgets],
        run_id,
        api_visibility="private",
        show_progress="minimal",
    )
    train_tab.stop.click(studio.guard(stop), run_id, train_tab.stop, queue=False, **quiet)


def head_view(studio: Studio) -> str:
    """Returns HTML of the title, where training would run, and what is going on."""
    device = str(resolve_device("auto"))
    going = studio.runs.running()
    if going is None:
        return _title(f"Device: {device} · nothing is training")
    going.log.refresh()
    step = going.log.steps[-1].step if going.log.steps else 0
    return _title(f"Device: {device} · training “{going.spec.name}”, step {step} of {going.spec.train.steps}")


def _title(words: str) -> str:
    return (
        '<div class="studio-head"><h1>LoRA Studio</h1>'
        '<span class="sub">Fine-tune a language model, and see what the low-rank update learned</span></div>'
        f'<div class="sub-line">{escape(words)}</div>'
    )


def launch(studio: Studio, *, host: str, port: int, url: str, browser: bool) -> None:
    """Serves the page until interrupted.

    Args:
        studio: What is served.
        host: Address to listen on.
        port: Port to listen on.
        url: The page's address, as it is shown and opened.
        browser: Whether to open it in the user's browser.
    """
    logging.basicConfig(
        filename=studio.log_file, level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    page = build(studio).queue(default_concurrency_limit=8)
    page.launch(
        server_name=host,
        server_port=port,
        inbrowser=False,
        prevent_thread_lock=True,
        theme=theme.theme(),
        css=theme.CSS,
        footer_links=[],
        max_file_size=MAX_UPLOAD_BYTES,
        allowed_paths=[str(studio.workspace.downloads)],
        ssr_mode=False,
        quiet=True,
        share=False,
        show_error=True,
    )
    print(
        f"LoRA Studio is at {url} (workspace {studio.workspace.root}; Ctrl-C ends the page, not a training).",
        flush=True,
    )
    if browser:
        webbrowser.open(url)
    page.block_thread()
