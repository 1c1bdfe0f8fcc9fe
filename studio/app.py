"""The page: a header that tells the truth, and the tabs."""

import importlib
import json
import logging
import shutil
import threading
import webbrowser
import zlib
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from core import LoRAError, MethodConfig, TrainConfig
from studio import doors, ends, header, jobs, language, links, rewriting, theme, watch, zoom
from studio.data import DataSpec
from studio.generating import EvaluationSpec
from studio.remedies import remedies
from studio.specs import RunSpec
from studio.state import Studio
from studio.tabs import chat, data, experiments, forecast, guide, home, labels, learn, model, runs, spectrum, train


def build(studio: Studio) -> gr.Blocks:
    """Returns the whole application over `studio`; `launch` serves it."""

    @studio.guard
    def look(asked: Any) -> dict[str, Any]:
        return news(studio, asked)

    with gr.Blocks(title=watch.TITLE, analytics_enabled=False, fill_width=True) as page:
        with gr.Row(equal_height=True):
            with gr.Column(scale=6, min_width=300):
                head = gr.HTML(
                    _TITLE,
                    elem_id="head",
                    js_on_load=watch.JS + zoom.JS + links.JS + spectrum.JS + ends.JS + learn.JS,
                    server_functions=[look],
                )
            with gr.Column(scale=4, min_width=300):
                run_id = gr.Dropdown([], label="Run shown in Train, Spectrum, Chat and Take home", elem_id="run")
        learn.build(studio, head)
        with gr.Tabs(elem_id="tabs", selected="model") as tabs:
            with gr.Tab("Start", id="start"):
                guide.build(studio, run_id, tabs)
            with gr.Tab("Model", id="model"):
                model_tab = model.build(studio, page)
            with gr.Tab("Data", id="data"):
                data_tab = data.build(studio, page, model_tab.model)
            with gr.Tab("Train", id="train") as train_page:
                train_tab = train.build()
            with gr.Tab("Spectrum", id="spectrum"):
                looked_at = spectrum.build(studio, run_id, head)
            with gr.Tab("Chat", id="chat"):
                with gr.Column() as talk:
                    chat.build(studio, run_id, links.event(head, "see_chat"))
                labels.build(studio, run_id, links.event(head, "see_chat"), talk)
            with gr.Tab("Runs", id="runs"):
                runs.build(studio, run_id, links.event(head, "see_runs"), tabs)
                experiments.build(studio)
            with gr.Tab("Take home", id="home"):
                show_pair = [tabs, *looked_at.pair.outputs], looked_at.pair.show
                home.build(studio, run_id, links.event(head, "see_home"), runs.picker, *show_pair)
        for tab in tabs.children:
            if isinstance(tab, gr.Tab):
                tab.select(None, js=links.opens(str(tab.id)), api_visibility="private")
        run_id.change(None, run_id, js=links.CHOSE, api_visibility="private")
        _open(studio, page, head, run_id, tabs, looked_at)
        _wire(studio, page, head, run_id, model_tab, data_tab, train_tab, train_page)
    return page


def _open(studio: Studio, page: gr.Blocks, head: Any, run_id: Any, tabs: Any, looked_at: spectrum.SpectrumTab) -> None:
    """Has a page open at what its address asks for, else at the run that goes on, the newest, or Start; and go on."""
    names, sections = (
        [str(tab.id) for tab in of.children if isinstance(tab, gr.Tab)] for of in (tabs, looked_at.sections)
    )

    def opened(request: gr.Request) -> list[Any]:
        view, problems = links.read(studio, request.query_params, names, sections)
        listed = studio.runs.list()
        going = next((run.id for run in listed if run.is_running()), None)
        value = view.run or going or (listed[0].id if listed else None)
        if not listed and not view.tab:
            view = replace(view, tab="start")
        shown = [gr.skip()] * len(looked_at.outputs)
        if view.tab == "spectrum" and value:
            try:
                shown = looked_at.open(value, view.section, view.module)
            except LoRAError as error:
                problems.append(str(error))
        for problem in dict.fromkeys(problems):
            gr.Warning(escape(problem), duration=None)  # the toast takes HTML
        chosen = gr.Dropdown(choices=runs.choices(studio, listed), value=value)
        return [chosen, view.tab or gr.skip(), *shown]

    asked_tab = gr.Textbox(visible="hidden", elem_id="asked-tab", elem_classes="unseen")
    outputs = [run_id, asked_tab, *looked_at.outputs]
    options: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}
    load = page.load(studio.guard(opened), None, outputs, **options)
    load.success(None, asked_tab, tabs, js=links.OPEN, **options)
    head.went(None, None, [tabs, run_id], js=links.GO, **options)


def _wire(
    studio: Studio,
    page: gr.Blocks,
    head: Any,
    run_id: Any,
    model_tab: model.ModelTab,
    data_tab: data.DataTab,
    train_tab: train.TrainTab,
    train_page: Any,
) -> None:
    num_model, num_data = len(model_tab.inputs), len(data_tab.inputs)
    inputs = [*model_tab.inputs, *data_tab.inputs, data_tab.max_length, *train_tab.form.widgets]
    inputs += train_tab.method.widgets + train_tab.evaluation.widgets
    num_train, num_method = len(train_tab.form.widgets), len(train_tab.method.widgets)

    def controls(run: str | None) -> list[Any]:
        return train.controls(studio.runs.get(run) if run else None)

    def turned(run: str | None) -> Any:
        listed = runs.choices(studio, studio.runs.list())
        ids = [run_id for _, run_id in listed]
        if run and run not in ids:  # it was deleted
            return gr.Dropdown(choices=listed, value=ids[0] if ids else None)
        # The value is left alone: this may be asked before the page has opened its run, or while another is chosen.
        return gr.Dropdown(choices=listed)

    def read(*values: Any, rows: bool = True) -> RunSpec:
        chosen, lora = model.parse(model_tab.form, list(values[:num_model]))
        told = list(values[num_model : num_model + num_data])
        read_rows = data.parse(data_tab.form, told) if rows else DataSpec.from_dict(data.task_of(told))
        longest, *rest = values[num_model + num_data :]
        settings = TrainConfig.from_dict(train_tab.form.values(rest[:num_train]) | {"max_length": longest})
        method = MethodConfig.from_dict(train_tab.method.values(rest[num_train : num_train + num_method]))
        evaluation = EvaluationSpec.from_dict(train_tab.evaluation.values(rest[num_train + num_method :]))
        return studio.settled(RunSpec("Untitled", chosen, read_rows, lora, settings, evaluation, method=method))

    def begin(name: str, sweep: str, look: Any, *values: Any) -> Any:
        spec = read(*values)
        data.verify(look, spec.model, spec.data, spec.train.max_length)
        return runs.picker(studio, studio.start(replace(spec, name=name.strip() or spec.name), sweep))

    def act(name: str) -> Any:
        def done(run: str | None, num_further: Any) -> list[Any]:
            if not run:
                raise LoRAError("`run` (=nothing) must be chosen; start one first.")
            shown = train.act(studio.runs, name, studio.runs.get(run), num_further)
            return [
                runs.picker(studio, shown),
                *train.controls(shown),
            ]

        done.__name__ = name
        return studio.guard(done)

    def mend(place: int) -> Any:
        def done(run: str) -> list[Any]:
            started = studio.start(remedies(studio.runs.get(run))[place].spec)
            return [
                runs.picker(studio, started),
                *train.controls(started),
            ]

        return studio.guard(done)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    gr.on(train_page.select, studio.guard(train.gpu_choices), None, train_tab.gpus, **quiet)
    last: dict[str, Any] = {"trigger_mode": "always_last"}  # of ticks that follow fast, none is lost
    train_tab.gpus.input(studio.guard(train.device_of), train_tab.gpus, train_tab.device, queue=False, **last, **quiet)
    changed = [run_id, *train_tab.controls]
    head.turned(studio.guard(turned), run_id, run_id, queue=False, **quiet)
    head.see_train(studio.guard(controls), run_id, train_tab.controls, queue=False, **last, **quiet)
    train_tab.start.click(
        studio.guard(begin),
        [
            train_tab.name,
            train_tab.sweep,
            data_tab.look,
            *inputs,
        ],
        run_id,
        api_visibility="private",
        show_progress="minimal",
    )
    settings = dict(zip(train_tab.form.names, train_tab.form.widgets, strict=True))
    forecast.wire(
        studio,
        train_tab.forecast,
        inputs,
        read,
        {**settings, "max_length": data_tab.max_length, **model_tab.choice},
        changed=[
            train_page.select,
            *(widget.change for widget in (*train_tab.form.widgets, *train_tab.method.widgets)),
        ],
        start=train_tab.start,
        redraw=model_tab.redraw,
    )
    for name, button in train_tab.actions.items():
        button.click(act(name), [run_id, train_tab.num_further], changed, queue=False, **quiet)
    for place, button in enumerate(train_tab.remedies):
        button.click(mend(place), run_id, changed, **quiet)


def news(studio: Studio, asked: Any) -> dict[str, Any]:
    """Returns what an open page does not know yet; see `studio.watch`.

    Args:
        studio: What is served.
        asked: A table with `page`, which page asks; `hidden`, whether it is in the background; `run`, the id of the run
            that it shows; `train`, whether the tab is open; `steps`, which of its steps the charts show; `going`, the
            ids that it was told of the last time; and `marks`, id -> mark of the parts that it shows.
    """
    listed = studio.runs.list()
    rows = studio.shown.each(listed, runs.labelled_row)
    statuses = [status for _, _, status, *_ in rows]
    run = next((run for run in listed if run.id == asked["run"]), None)
    going = next((run for run, status in zip(listed, statuses, strict=True) if status == "running"), None)
    parts = {"head-line": header.line(going, statuses, studio.loaded)}
    if run is not None and asked["train"]:
        run.note_killed()
    if asked["train"]:
        parts |= train.view(run, asked["steps"])
    turn = [[row[0] for row in rows], [run.id for run in listed], run.stop_asked if run else ""]
    is_cpu_busy = going is not None and going.log.started is not None and going.log.started.device == "cpu"
    seconds = watch.LOOK_SECONDS if going is not None and asked["train"] else watch.LOOK_SECONDS_ELSEWHERE
    num_pages = studio.pages.count(str(asked["page"]), hidden=bool(asked["hidden"]))
    marks = {part: format(zlib.crc32(drawn.encode()), "08x") for part, drawn in parts.items()}
    known, now = asked["going"], dict(zip(listed, statuses, strict=True))
    over = [ends.told(run, status) for run, status in now.items() if status not in ends.GOING and run.id in known]
    return {
        "parts": {part: (parts[part], mark) for part, mark in marks.items() if asked["marks"].get(part) != mark},
        "turn": json.dumps(turn),
        "every": 1000 * seconds * (max(1, num_pages) if is_cpu_busy else 1),
        "going": [run.id for run, status in now.items() if status in ends.GOING],
        "ended": [end for end in over if end],
        "share": header.share(going) if going else None,
    }


_TITLE = (
    '<div class="studio-head"><h1>LoRA Studio</h1>'
    '<span class="sub">Fine-tune a language model, and see what the low-rank update learned</span>'
    f"<nav>{learn.LINKS}{language.SWITCH}</nav></div>"
    f'<div class="sub-line" id="head-line">Starting …</div>{ends.PLACE}'
)


def launch(
    studio: Studio,
    *,
    host: str,
    port: int,
    url: str,
    browser: bool,
    account: doors.Account | None,
    notes: Sequence[str] = (),
) -> None:
    """Serves the page until interrupted.

    Args:
        studio: What is served.
        host: Address to listen on.
        port: Port to listen on.
        url: The page's address, as it is shown and opened.
        browser: Whether to open it in the user's browser.
        account: Who may come in; None lets in all who reach the address.
        notes: Sentences to print once the page is up.
    """
    workspace = studio.workspace
    logging.basicConfig(
        filename=studio.log_file, level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    shutil.rmtree(workspace.incoming)  # what an earlier server was sent and nobody took over
    workspace.incoming.mkdir()
    jobs.wake(studio.runs)
    gr.set_static_paths([workspace.downloads])  # handed out as they lie there, not copied first
    # Imported while the page is opened, so that the first figure need not wait for it.
    threading.Thread(target=importlib.import_module, args=("studio.figures",), daemon=True).start()
    page = build(studio).queue(default_concurrency_limit=8)
    page._queue.sleep_when_free = watch.QUEUE_SECONDS
    page.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        inbrowser=False,
        prevent_thread_lock=True,
        theme=theme.theme(),
        css=theme.CSS + learn.CSS + guide.CSS + ends.CSS + zoom.CSS + language.CSS,
        i18n=language.i18n(),
        footer_links=[],
        app_kwargs={
            "middleware": [
                Middleware(doors.Doors, workspace=workspace, host=host, account=account),
                Middleware(
                    rewriting.Rewritten,
                    changes={
                        "/": rewriting.scripts_first(watch.CALM, language.SCRIPT),
                        "/assets/core-.+[.]js": rewriting.without_searches,
                    },
                ),
            ],
        },
        max_file_size=doors.MAX_UPLOAD_BYTES,
        allowed_paths=[str(workspace.downloads)],
        num_workers=0,  # said, as the environment could ask for more servers, without these doors
        mcp_server=False,
        ssr_mode=False,
        quiet=True,
        share=False,
        _frontend=False,  # else it gives up where the whole page takes over three seconds, as beside a training it may
        show_error=True,
    )
    ready = f"LoRA Studio is at {url} (workspace {workspace.root}; Ctrl-C ends the page, not a training)."
    print("\n".join((ready, *notes)), flush=True)
    if browser:
        webbrowser.open(url)
    page.block_thread()
