"""Tabs: what their forms say becomes specs, and what runs and adapters hold becomes text, plots and tables."""

import asyncio
import dataclasses
import html
import math
import re
import shlex
import shutil
from html.parser import HTMLParser

import gradio as gr
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from core import (
    ALL_LINEAR,
    Adapter,
    Evaluated,
    Factors,
    Failed,
    Finished,
    LoRAConfig,
    LoRAError,
    Noted,
    Started,
    Step,
    TrainConfig,
    adaptable,
    amplification,
    plan,
    random_sigma,
    resolve_devices,
    spectrum,
)
from studio import __main__ as cli
from studio import data, jobs, matrices, models
from studio.answers import Answer
from studio.conversation import prompt
from studio.data import DataSpec
from studio.forms import Form
from studio.opened import Opened, Source
from studio.runs import Run
from studio.specs import RunSpec
from studio.state import Studio
from studio.tables import Table, list_starters
from studio.tabs import chat as chat_tab
from studio.tabs import data as data_tab
from studio.tabs import model as model_tab
from studio.tabs import runs as runs_tab
from studio.tabs import train as train_tab
from studio.tabs.spectrum import matrix, overview

HOSTILE = '<img src=x onerror="alert(1)">&amp;'
STARTED = Started(60, 384, 10_000, "cpu", "bfloat16", "resident memory of the process")


def step(number: int, loss: float = 1.5) -> Step:
    return Step(
        number, loss, 1e-3, 0.25, num_tokens=120, num_trained_tokens=80, step_seconds=0.5, memory_bytes=2 * 10**9
    )


class Read(HTMLParser):
    """What a browser makes of HTML: `tags`, `text` in pieces, and the `pictures` as they are told to who sees none."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.pictures: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "svg":
            self.pictures.append(dict(attrs)["aria-label"])

    def handle_data(self, data):
        self.text.append(data)

    @property
    def facts(self) -> dict[str, str]:
        """Title → value, of `theme.facts`."""
        return dict(zip(self.text[::2], self.text[1::2], strict=True))


def drawn(make):
    """Returns what `make` draws on a page of its own."""

    async def draw():  # outside of a running loop, gr.Blocks leaves one behind that nobody closes
        with gr.Blocks():
            return make()

    return asyncio.run(draw())


@pytest.fixture
def studio(workspace) -> Studio:
    return Studio(workspace)


# Model


@pytest.mark.parametrize(
    ("preset", "names", "pattern", "expected"),
    [
        ("All linear", ["self_attn.q_proj"], "", ALL_LINEAR),
        ("All linear", [], None, ALL_LINEAR),
        (
            "Query and value (the paper)",
            ["self_attn.q_proj", "self_attn.v_proj"],
            "",
            ("self_attn.q_proj", "self_attn.v_proj"),
        ),
        (model_tab.CHOOSE, ["mlp.up_proj"], "  ", ("mlp.up_proj",)),
        (model_tab.CHOOSE, ["mlp.up_proj"], r" .*\.0\..*q_proj ", r".*\.0\..*q_proj"),
        ("All linear", [], ".*v_proj", ".*v_proj"),
    ],
)
def test_a_pattern_goes_before_the_ticks_and_all_linear_means_all(preset, names, pattern, expected):
    assert model_tab.targets(preset, names, pattern) == expected


@pytest.mark.parametrize("names", [[], None])
def test_no_matrix_at_all_is_refused(names):
    with pytest.raises(
        LoRAError, match=r"`target_modules` \(=nothing\) must name at least one matrix; click some in the"
    ):
        model_tab.targets(model_tab.CHOOSE, names, "")


LORA_NAMES = ["r", "alpha", "dropout", "scaling", "init", "rank_pattern", "alpha_pattern"]


def test_the_model_tab_s_values_become_model_and_settings():
    form = drawn(lambda: Form(LoRAConfig, LORA_NAMES))
    settings = dict(zip(form.names, [w.value for w in form.widgets], strict=True))
    settings |= {"r": 4, "dropout": 0.1, "rank_pattern": '{"q_proj": 2}'}
    values = ["owner/name", model_tab.CHOOSE, ["q_proj"], "", *(settings[name] for name in form.names)]
    assert model_tab.parse(form, values) == (
        "owner/name",
        LoRAConfig(r=4, dropout=0.1, rank_pattern={"q_proj": 2}, target_modules=("q_proj",)),
    )
    values[4 + form.names.index("r")] = 0
    with pytest.raises(LoRAError, match=r"`r` \(=0\) must be at least 1"):
        model_tab.parse(form, values)


def test_the_cost_is_told_before_a_weight_is_loaded(studio, tiny_folder):
    config = LoRAConfig(r=4, target_modules=("self_attn.q_proj", "mlp.up_proj"))
    facts = Read(model_tab.cost_view(studio, str(tiny_folder), config)).facts
    trainable = 2 * 4 * ((32 + 32) + (48 + 32))
    whole = sum(p.numel() for p in models.load_model(str(tiny_folder), studio.workspace).parameters())
    assert facts == {
        "Trainable parameters": f"{trainable:,}",
        "Share of the model": f"{100 * trainable / (whole + trainable):.2f} %",
        "Adapter file": f"{4 * trainable / 1e3:.1f} kB",
        "Matrices adapted": "4 of 16",  # of 14 in layers, the head and the embedding
        "As settings: ": "target_modules: self_attn.q_proj (2), mlp.up_proj (2)",
    }
    assert all(p.is_meta for p in studio.skeleton(str(tiny_folder)).parameters())


def test_the_cost_of_experts_counts_their_matrices_and_the_picker_their_stacks(studio, tiny_folder, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    model = MixtralForCausalLM(MixtralConfig(num_local_experts=5, **sizes, **heads))
    model.save_pretrained(tmp_path)
    shutil.copy(tiny_folder / "tokenizer.json", tmp_path)
    config = LoRAConfig(r=2, target_modules=("q_proj", "experts.down_proj.4"))
    facts = Read(model_tab.cost_view(studio, str(tmp_path), config)).facts
    everything = 2 * (4 + 2 * 5) + 2  # attention and two stacks in two layers, the head and the embedding
    assert facts["Matrices adapted"] == f"4 of {everything}"
    (gate_up, down) = matrices.kinds(adaptable(studio.skeleton(str(tmp_path)), ["expert"]), "expert")
    assert model_tab.label(down) == "mlp.experts.down_proj · 16 × 24 · 2× · 5 experts each"
    taken = plan(model, LoRAConfig(r=2, target_modules=(gate_up.name, down.name))).targets
    assert len(taken) == 2 * 2 * 5


def test_the_cost_says_what_each_setting_of_the_choice_takes(studio, tiny_folder):
    ranks = {"q_proj": 2, HOSTILE.replace("(", "").replace(")", ""): 3}
    config = LoRAConfig(layers="1", exclude_modules=("up_proj",), rank_pattern=ranks)
    shown = model_tab.cost_view(studio, str(tiny_folder), config)
    text = " ".join(Read(shown).text)
    assert "target_modules: all-linear (6) · layers: 1 · except: up_proj · ranks: q_proj → 2, " in text
    assert "which fits no adapted matrix" in text
    assert set(Read(shown).tags) == {"dl", "div", "dt", "dd", "p", "code"}


def test_a_cost_that_cannot_be_is_one_sentence(studio, tiny_folder):
    with pytest.raises(LoRAError, match=r"`r` \(=17\) must be at most 16 to fit"):
        model_tab.cost_view(studio, str(tiny_folder), LoRAConfig(r=17))


def test_what_a_model_s_files_do_not_say_is_unknown_and_what_they_say_stays_text(studio, tiny_folder):
    info = studio.info(str(tiny_folder))
    unknown = dataclasses.replace(info, weight_bytes=None, dtype=None, licence=None, context_length=None)
    facts = Read(model_tab.facts_view(unknown)).facts
    assert {facts[k] for k in ("Size as stored", "Stored as", "Context", "Licence")} == {"unknown"}
    hostile = model_tab.facts_view(dataclasses.replace(info, licence=HOSTILE))
    assert Read(hostile).facts["Licence"] == HOSTILE
    assert Read(hostile).tags == Read(model_tab.facts_view(info)).tags


# Data

DATA_NAMES = ["instruction", "template", "train_on", "eval_fraction", "max_eval_rows", "max_rows"]


def test_the_data_tab_s_values_become_a_spec():
    form = drawn(lambda: Form(DataSpec, DATA_NAMES))
    spec = DataSpec(
        source="rows.csv",
        prompt="q",
        completion="a",
        instruction="Do.",
        template="plain",
        eval_fraction=0.2,
        max_rows=9,
    )
    columns = ["q", data_tab.NONE, "a", None, data_tab.NONE]
    assert data_tab.parse(form, ["rows.csv", "causal", [], "pair", *columns, *form.shown(spec)]) == spec
    wrong = dict(zip(form.names, form.shown(spec), strict=True)) | {"eval_fraction": 0.9}
    with pytest.raises(LoRAError, match=r"`eval_fraction` \(=0\.9\) must be at least 0 and at most 0\.5"):
        data_tab.parse(form, ["rows.csv", "causal", [], "pair", *columns, *wrong.values()])
    with pytest.raises(LoRAError, match=r"`source` \(=nothing\) must name a data set; choose one in the Data tab\."):
        data_tab.parse(form, ["", "causal", [], "pair", *columns, *form.shown(spec)])


def test_a_preview_shows_the_first_rows_as_plain_text():
    rows = [{"a": HOSTILE, "b": None}, {"b": [1, {"x": "é"}], "c": 2.5}, *({"a": i} for i in range(50))]
    header, shown = data_tab.preview(Table("t", ("a", "b", "c"), rows))
    assert header == ["a", "b", "c"]
    assert shown[:3] == [[HOSTILE, "", ""], ["", "[1, {'x': 'é'}]", "2.5"], ["0", "", ""]]
    assert len(shown) == data_tab.PREVIEW_ROWS


@pytest.mark.parametrize("extra", [0, 1, 10_000])
def test_a_long_cell_is_cut_and_says_so(extra):
    text = "é" * (data_tab.CELL_LIMIT + extra)
    ((cell,),) = data_tab.preview(Table("t", ("a",), [{"a": text}]))[1]
    assert len(cell) == data_tab.CELL_LIMIT
    assert cell.endswith("…") == bool(extra)
    assert text.startswith(cell.removesuffix("…"))


def test_a_preview_can_be_sent_to_the_page_whatever_the_file_holds(tmp_path, workspace):
    import orjson

    (tmp_path / "cut.jsonl").write_text('{"a": "half an emoji: \\ud83d"}\n')
    table = data.read_table(str(tmp_path / "cut.jsonl"), workspace)
    orjson.dumps(data_tab.preview(table))


# Train


def update(component) -> dict:
    """What a component that a handler returns changes on the page."""
    return component._constructor_args[0]


def test_the_view_of_no_run_says_what_to_do():
    shown = train_tab.view(None)
    assert "press Start training" in shown["status"] and "<svg" not in shown["status"]
    assert shown["worker-log"] == shown["charts"] == ""
    assert not any(update(control)["visible"] for control in train_tab.controls(None))


def test_the_tab_has_a_place_for_each_part_of_the_view():
    tab = drawn(train_tab.build)
    assert set(tab.form.names) == set(TrainConfig().to_dict()) - {"max_length"}

    def within(block) -> list:
        return [block, *(one for child in getattr(block, "children", []) for one in within(child))]

    around = tab.form.widgets[0].parent.parent.parent.parent
    places = [block.value or "" for block in within(around) if isinstance(block, gr.HTML)]
    assert all(any(f'id="{name}"' in place for place in places) for name in train_tab.view(None))


def test_a_running_run_shows_progress_time_left_and_all_charts(write_run, hold, monkeypatch):
    monkeypatch.setattr("studio.runs.time.time", lambda: 1000.0)
    evaluated = [Evaluated(0, 3.25, 9, 0.1), Evaluated(2, 2.75, 9, 0.1)]
    run = write_run(
        [Noted("Reading"), STARTED, evaluated[0], step(1, 3.0), step(2, 2.5), evaluated[1]],
        RunSpec(name=HOSTILE, train=TrainConfig(steps=8)),
    )
    run.worker_log.write_text("12:00:00 step 2\n")
    hold(run)
    shown = train_tab.view(run)
    read = Read(shown["status"])
    text = read.text
    assert text[:2] == [HOSTILE, " "] and text[2] == "running"
    facts = dict(zip(text[3:17:2], text[4:17:2], strict=True))
    assert facts == {
        "Step": "2 of 8",
        "Time left": "3 s",
        "Training loss": "2.500",
        "Held-out loss": "3.250 → 2.750",
        "Best at step": "2",
        "Runs on": "cpu, weights bfloat16",
        "Memory shown": "resident memory of the process",
    }
    assert 'aria-valuenow="2" aria-valuemax="8"' in shown["status"] and "width:25.0%" in shown["status"]
    assert Read(shown["charts"]).pictures == [
        "Loss (nats per token): training 2.5, held-out rows 2.75",
        "Learning rate: 0.001",
        "Gradient norm: 0.25",
        "Memory (GB): 2",
        "Tokens per second: 240",
    ]
    assert shown["worker-log"] == "12:00:00 step 2"


KILLED = "The worker ended without a word (killed, or the machine went down)."


@pytest.mark.parametrize(
    ("events", "status", "words"),
    [
        ([], "interrupted", f"{KILLED} Resume starts it from the beginning."),
        ([STARTED, step(1)], "interrupted", f"{KILLED} Resume starts it from the beginning."),
        (
            [STARTED, step(1), Failed("Worker process 2 of 2 was killed. The run can be resumed.", "killed")],
            "interrupted",
            "Worker process 2 of 2 was killed. Resume starts it from the beginning.",
        ),
        (
            [STARTED, step(1), Finished(1, "paused", 0)],
            "paused",
            "Everything is saved and its memory is free. Resume goes on after step 1.",
        ),
        (
            [STARTED, Evaluated(0, 3.0, 9, 0.1), Evaluated(2, 1.0, 9, 0.1), Evaluated(4, 2.0, 9, 0.1)]
            + [Finished(4, "early", 0)],
            "finished",
            "Ended early: the held-out loss rose. The adapter saved is that of step 2.",
        ),
        ([Failed("The disk is full.", "disk")], "paused", "The disk is full."),
        (
            [STARTED, step(1), Finished(1, "killed", 0)],
            "stopped",
            "It was killed: all of its processes are gone, and their memory is free. "
            "Resume starts it from the beginning.",
        ),
        ([Failed(f"`x` (={HOSTILE}) must be 2.")], "failed", f"`x` (={HOSTILE}) must be 2."),
        ([STARTED, step(1), Failed("No room.")], "failed", "No room."),
        (
            [STARTED, step(1), Finished(60, "done", 0)],
            "finished",
            "The adapter is saved. Look at its spectrum, or chat with it.",
        ),
        (
            [STARTED, step(1), Finished(1, "stopped", 0)],
            "stopped",
            "The adapter is saved. Look at its spectrum, or chat with it.",
        ),
    ],
)
def test_a_run_that_has_ended_says_how(events, status, words, write_run):
    run = write_run(events)
    run.adapter_folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run.adapter_folder / name).write_text("{}")
    read = Read(train_tab.view(run)["status"])
    assert read.text[2] == status and words in read.text
    assert "img" not in read.tags
    assert "Time left" not in read.text


@pytest.mark.parametrize(
    ("events", "words"),
    [([], "Starting the worker …"), ([Noted("Reading"), Noted("Loading the model")], "Loading the model …")],
)
def test_before_the_first_step_the_worker_s_last_word_is_shown(events, words, write_run, hold):
    run = write_run(events)
    hold(run)
    assert words in Read(train_tab.view(run)["status"]).text


def test_a_run_stopped_before_its_first_step_does_not_claim_an_adapter(write_run):
    assert "The adapter is saved" not in train_tab.view(write_run([Finished(0, "stopped", 0)]))["status"]


def buttons(run: Run) -> dict[str, tuple[str, bool]]:
    """Name → words, and whether it can be pressed, of the buttons that are shown."""
    shown = zip(train_tab.ACTIONS, map(update, train_tab.controls(run)), strict=False)
    return {name: (b["value"], b["interactive"]) for name, b in shown if b["visible"]}


def test_a_running_run_can_be_paused_or_stopped_and_once_asked_killed(write_run, hold):
    run = write_run([STARTED, step(1)])
    hold(run)
    assert buttons(run) == {"pause": ("Pause", True), "stop": ("Stop and save", True)}
    run.ask_to_stop()
    assert buttons(run) == {"stop": ("Stopping after this step …", False), "kill": ("Kill it now", True)}
    run.ask_to_stop("paused")
    assert buttons(run)["stop"] == ("Pausing after this step …", False)


@pytest.mark.parametrize(
    ("end", "has_checkpoint", "possible"),
    [
        (None, False, {"resume"}),
        (None, True, {"resume", "further"}),
        (Finished(1, "paused", 0), True, {"resume", "further"}),
        (Finished(1, "stopped", 0), True, {"resume", "further"}),
        (Failed("No room.", "memory"), False, {"resume"}),
        (Finished(60, "done", 0), True, {"further"}),
        (Finished(60, "done", 0), False, set()),
    ],
)
def test_a_run_that_has_ended_can_go_on_from_where_it_is(end, has_checkpoint, possible, write_run):
    run = write_run([STARTED, step(1), *([end] if end else [])])
    if has_checkpoint:
        run.checkpoints.at(1).mkdir(parents=True)
        (run.checkpoints.at(1) / "training.safetensors").touch()
    assert set(buttons(run)) == possible
    number = update(train_tab.controls(run)[len(train_tab.ACTIONS)])
    assert number["visible"] == ("further" in possible)


def test_a_queued_run_can_be_moved_and_taken_out(write_run):
    run = write_run([])
    run.place = 1.0
    assert buttons(run) == {
        "stop": ("Take out of the queue", True),
        "earlier": ("Move up", True),
        "later": ("Move down", True),
    }
    assert Read(train_tab.view(run)["status"]).text[2] == "queued"


def test_what_may_help_a_run_that_failed_is_a_button_each(write_run):
    run = write_run([STARTED, step(1), Failed("Not enough memory.", "memory")])
    shown = [update(c) for c in train_tab.controls(run)[len(train_tab.ACTIONS) + 1 :]]
    assert [b["value"] for b in shown if b["visible"]] == [
        "Batch size 2, accumulation 2, and go on",
        "Activation checkpointing (slower), and go on",
        "Rows of at most 128 tokens, and go on",
        "Query and value alone, and go on",
    ]
    assert len(train_tab.controls(run)) == len(train_tab.controls(None))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_several_gpus_are_a_choice_with_the_free_memory_of_each(count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (i * 10**9, 8 * 10**9))
    shown = update(train_tab.gpu_choices())
    assert shown["visible"] == (count > 1)
    assert [words for words, _ in shown["choices"]] == [f"cuda:{i} · Card · {i}.0 of 8.0 GB free" for i in range(count)]
    if count:
        assert resolve_devices(train_tab.device_of([name for _, name in shown["choices"]])) == tuple(
            torch.device(f"cuda:{i}") for i in range(count)
        )
    assert train_tab.device_of([]) == "auto" and train_tab.device_of(["cuda:10", "cuda:2"]) == "cuda:2,cuda:10"


def test_a_number_of_further_steps_that_is_none_is_refused(write_run, studio):
    run = write_run([STARTED, step(1), Finished(1, "stopped", 0)])
    with pytest.raises(LoRAError, match=r"`steps` \(=None\) must be a whole number"):
        train_tab.act(studio.runs, "further", run, None)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 0 min"),
        (7505, "2 h 5 min"),
        (90_000, "25 h 0 min"),
        (math.nan, "unknown"),
        (math.inf, "unknown"),
    ],
)
def test_a_length_of_time_in_words(seconds, words):
    assert train_tab.duration(seconds) == words


def test_the_time_left_is_what_the_last_steps_took_less_what_has_passed(write_run, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("studio.runs.time.time", lambda: now[0])
    slow = [dataclasses.replace(step(i), step_seconds=100.0) for i in range(1, 11)]
    run = write_run([*slow, *(step(i) for i in range(11, 31))], RunSpec(train=TrainConfig(steps=60)))
    run.log.refresh()
    assert train_tab.seconds_left(run) == pytest.approx(30 * 0.5)
    now[0] += 0.2
    assert train_tab.seconds_left(run) == pytest.approx(30 * 0.5 - 0.2)
    now[0] += 100  # a step that hangs does not eat up the others' time
    assert train_tab.seconds_left(run) == pytest.approx(29 * 0.5)
    now[0] -= 500  # the clock was put back
    assert train_tab.seconds_left(run) == pytest.approx(30 * 0.5)


# Spectrum


def factors(size: float = 1.0, r: int = 2) -> Factors:
    generator = torch.Generator().manual_seed(0)
    return Factors(torch.randn(r, 6, generator=generator), size * torch.randn(8, r, generator=generator), 0.5)


W = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def table_7(found: Factors, r: int | None = None) -> str:
    names = {"ΔW": "delta", "W": "weight", "random": "random"}
    return matrix.table_7({title: amplification(found, W, r, kind) for title, kind in names.items()})


def test_table_7_holds_the_numbers_of_a_dense_computation():
    delta = factors().delta_weight().double()
    U, _, Vh = torch.linalg.svd(delta)
    projected = float(torch.linalg.matrix_norm(U[:, :2].T @ W.double() @ Vh[:2].T))
    delta_norm, weight_norm = (float(torch.linalg.matrix_norm(M.double())) for M in (delta, W))
    own = float(torch.linalg.vector_norm(torch.linalg.svdvals(W.double())[:2]))
    null = 2 * weight_norm / math.sqrt(8 * 6)
    read = Read(table_7(factors()))
    assert read.text[:9] == ["This matrix", "GPT-3, r = 4 (paper)", "U, V from", *2 * ["ΔW", "W", "random"]]
    rows = {read.text[i]: read.text[i + 1 : i + 7] for i in range(9, 37, 7)}
    assert rows["‖Uᵀ W V‖"][:2] == [f"{projected:.3f}", f"{own:.3f}"]
    assert rows["chance level"][:3] == [f"{null:.3f}"] * 3
    assert rows["enrichment (× chance)"][:2] == [f"{projected / null:.2f}", f"{own / null:.2f}"]
    assert rows["‖ΔW‖ / ‖Uᵀ W V‖"][:2] == [f"{delta_norm / projected:.2f}", f"{delta_norm / own:.2f}"]
    # The paper's own, of which its text names 21.5 and science since then the level of chance.
    assert rows["‖Uᵀ W V‖"][3:] == ["0.32", "21.67", "0.02"] and rows["chance level"][3:] == ["0.02"] * 3
    assert float(rows["‖ΔW‖ / ‖Uᵀ W V‖"][3]) == pytest.approx(21.5, rel=0.01)
    said = " ".join(read.text[37:])
    assert f"‖W‖ = {weight_norm:.3f}, ‖ΔW‖ = {delta_norm:.3f}; the top r = 2 directions" in said
    assert f"amplifies its directions by {delta_norm / projected:.2f}" in said


def test_table_7_of_an_update_that_is_zero_says_so():
    read = Read(table_7(factors(0.0)))
    assert read.text == ["ΔW is zero here: B has not moved, so there are no directions to follow."]


def test_the_overview_is_one_picture_in_which_paths_stay_text():
    paths = ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.0.<script>x</script>"]
    spectra = {path: spectrum(factors(i)) for i, path in enumerate(paths)}
    both = {path: (factors(i), s) for i, (path, s) in enumerate(spectra.items())}
    for title, quantity in overview.QUANTITIES.items():
        values = {path: None if quantity.needs_weight else quantity.value(s) for path, s in spectra.items()}
        values[paths[0]] = 1.0
        note = overview.chance_note(both, quantity)
        read = Read(overview.overview(title, values, note, {path: f for path, (f, _) in both.items()}, "1").page())
        assert read.tags[:3] == ["div", "div", "svg"] and read.tags.count("svg") == 1
        assert "script" not in read.tags
        assert title in " ".join(read.text) and note in " ".join(read.text)


def test_the_chance_of_a_quantity_is_that_of_gaussian_factors_of_the_same_norm():
    f = factors(3.0)
    sigma = random_sigma(f)
    for title, level in {"Largest σ": float(sigma[0]), "Stable rank": float((sigma / sigma[0]).square().sum())}.items():
        assert overview.chance_note({"a": (f, spectrum(f))}, overview.QUANTITIES[title]) == f"chance: {level:.3g}"
    nothing = factors(0.0)
    assert overview.chance_note({"a": (nothing, spectrum(nothing))}, overview.QUANTITIES["Stable rank"]) == ""


def test_the_quantities_are_those_of_the_spectrum():
    found = spectrum(factors())
    sigma = torch.linalg.svdvals(factors().delta_weight().double())[:2]
    values = {title: q.value(found) for title, q in overview.QUANTITIES.items() if not q.needs_weight}
    assert values["Size ‖ΔW‖"] == pytest.approx(float(sigma.square().sum().sqrt()))
    assert values["Largest σ"] == pytest.approx(float(sigma[0]))
    assert values["Stable rank"] == pytest.approx(float((sigma / sigma[0]).square().sum()))
    p = sigma / sigma.sum()
    assert values["Effective rank"] == pytest.approx(float((-(p * p.log()).sum()).exp()))


def test_the_summary_names_the_adapter_and_the_matrix_that_moved_most(write_run):
    run = write_run(spec=RunSpec(name=HOSTILE, lora=LoRAConfig(r=5)))
    pair = {"a": Factors(torch.zeros(5, 6), torch.zeros(8, 5), 1.0)}
    opened = Opened(Source(run.id), run.spec.name, Adapter(run.spec.lora, pair), None, run, 0)
    summary = overview.summary(opened, {"a": spectrum(factors(1.0)), "b": spectrum(factors(3.0))})
    facts = Read(summary.partition("</dl>")[0]).facts
    assert (facts["Adapter"], facts["Matrices"], facts["r"]) == (HOSTILE, "2", "5")
    assert Read(summary).text[-1] == f"Largest ‖ΔW‖, {float(factors(3.0).delta_weight().norm()):.3f}, in b."


def test_one_matrix_s_facts():
    found = spectrum(factors())
    shape, r, rank, effective, stable, most = Read(matrix.matrix_facts(found)).facts.values()
    assert (shape, r, rank) == ("8 × 6", "2", "2")
    assert (effective, stable) == (f"{found.effective_rank:.2f}", f"{found.stable_rank:.2f}")
    assert most.split()[0] == str(found.rank_for_energy(0.9))
    _, _, rank, effective, stable, most = Read(matrix.matrix_facts(spectrum(factors(0.0)))).facts.values()
    assert (rank, effective, stable, most.split()[0]) == ("0", "0.00", "0.00", "0")


# Chat


@pytest.fixture
def tokenizer(tiny_folder, workspace):
    return models.load_tokenizer(str(tiny_folder), workspace)


PAIR = DataSpec(prompt="q", completion="a", context="c", instruction="Describe it.")
ROW = {"q": "name[Inn 3]", "c": "", "a": "Inn 3 has 3 stars."}
TALK = DataSpec(layout="messages", messages="m")
TURNS = {"m": [{"role": "user", "content": "name[Inn 3]"}, {"role": "assistant", "content": "Inn 3."}]}


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize(
    ("spec", "row"),
    [
        (PAIR, ROW),
        (dataclasses.replace(PAIR, instruction=""), ROW),
        (TALK, TURNS),
        (dataclasses.replace(TALK, instruction="Be short."), TURNS),
    ],
    ids=["pair with instruction", "pair", "conversation", "conversation with instruction"],
)
def test_a_message_is_put_as_training_put_its_rows(spec, row, template, write_run, tokenizer):
    spec = dataclasses.replace(spec, template=template)
    run = write_run(spec=RunSpec(data=spec))
    example = data.tokenize_row(row, spec, tokenizer, 1_000)
    begin = next(i for i, label in enumerate(example.labels) if label != -100)
    asked = prompt(run, "  name[Inn 3]\n")
    assert data.prompt_ids(asked, tokenizer, template) == example.input_ids[:begin].tolist()


def test_a_model_trained_on_text_is_asked_to_go_on_with_the_message(write_run, tokenizer):
    spec = DataSpec(layout="text", text="t")
    asked = prompt(write_run(spec=RunSpec(data=spec)), "Inn 3 has ")
    assert asked == "Inn 3 has "
    ids = data.tokenize_row({"t": asked}, spec, tokenizer, 1_000).input_ids.tolist()
    assert [*data.prompt_ids(asked, tokenizer), tokenizer.eos_token_id] == ids


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_message_is_refused(text, write_run):
    with pytest.raises(LoRAError, match=r"`Message` \(=nothing\) must not be empty; write one, or take an example\."):
        prompt(write_run(), text)


@pytest.mark.parametrize("starter", list_starters(), ids=lambda s: s.name)
def test_a_run_on_a_starter_set_offers_that_set_s_examples_and_they_can_be_asked(starter, write_run):
    spec = DataSpec.from_dict({"source": starter.source, **starter.mapping})
    run = write_run(spec=RunSpec(data=spec))
    examples = chat_tab.examples_for(run)
    assert examples == [str(e) for e in starter.examples] and len(examples) >= 3
    for example in examples:
        (turn,) = prompt(run, example)
        assert turn["role"] == "user" and turn["content"].endswith(example)


def test_other_runs_have_no_examples(write_run, tiny_data):
    assert chat_tab.examples_for(None) == []
    assert chat_tab.examples_for(write_run(spec=RunSpec(data=tiny_data))) == []


def test_a_pane_s_line_tells_engine_speed_length_and_fingerprint():
    answer = Answer((1, 2, 3), False, 0.256, 12.34, "adapter off (strength 0) · float32", "0123abcd")
    assert chat_tab.engine_line(answer) == (
        '<div class="engine-line">adapter off (strength 0) · float32\n'
        "12.3 tokens/s · first token 0.26 s · 3 tokens\nfirst logits 0123abcd</div>"
    )
    assert "\n… · first token" in chat_tab.engine_line(dataclasses.replace(answer, tokens_per_second=0.0))
    assert chat_tab.engine_line(None, "Not <b>asked") == '<div class="engine-line">Not &lt;b&gt;asked</div>'


def test_panes_that_should_differ_and_do_not_are_told_in_words():
    answer = Answer((1,), False, 0.2, 0.0, "x", "0123abcd", same_as=(0, 2))
    words = chat_tab.engine_line(answer, kinds=["Base", "Adapter", "Merged"])
    assert "Same first logits as A (Base) and C (Merged), from which it should differ" in words
    assert "A comparison of the two shows nothing" in words


# Runs


def test_a_row_tells_what_was_trained_and_how_it_went(write_run):
    spec = RunSpec(
        name=HOSTILE,
        model="owner/name",
        data=DataSpec(source="/data/my rows.csv"),
        lora=LoRAConfig(r=3),
        train=TrainConfig(steps=8),
    )
    run = write_run(
        [STARTED, Evaluated(0, 3.0, 9, 0.1), step(1, 3.0), step(2, 1.0), Evaluated(2, 2.0, 9, 0.1), Failed("No.")], spec
    )
    row = runs_tab.row(run)
    assert len(row) == len(runs_tab.HEADER)
    cells = dict(zip(runs_tab.HEADER, row, strict=True))
    assert cells.pop("Made") == f"{run.created:%Y-%m-%d %H:%M}"
    assert cells == {
        "Name": HOSTILE,
        "Status": "failed",
        "Model": "name",
        "Data": "my rows.csv",
        "Method": "LoRA",
        "r": "3",
        "Steps": "2 / 8",
        "Held-out loss": "3.000 → 2.000",
        "Score": "",
        "Training loss": "█▁",
    }


@pytest.mark.parametrize(
    ("source", "name"),
    [("starter:restaurants", "restaurants"), ("hub:owner/name", "name"), ("hub:owner/name:train", "name:train")],
)
def test_a_row_names_the_data_shortly(source, name, write_run):
    row = runs_tab.row(write_run(spec=RunSpec(data=DataSpec(source=source))))
    assert row[runs_tab.HEADER.index("Data")] == name
    assert row[runs_tab.HEADER.index("Steps")] == "0 / 60" and row[-3:] == ["", "", ""]


@pytest.fixture(params=["events", "spec", "spec is gone"])
def damaged(request, write_run) -> Run:
    """A run whose files somebody spoiled."""
    run = write_run([STARTED, step(1)])
    if request.param == "events":
        (run.folder / "events.jsonl").write_text("{\n")
    elif request.param == "spec":
        (run.folder / "spec.json").write_text('{"lora": {"r": 0}}')
    else:
        (run.folder / "spec.json").unlink()
    return Run(run.folder)


def test_a_damaged_run_says_so_in_its_row_and_in_the_list(damaged):
    row = runs_tab.row(damaged)
    assert len(row) == len(runs_tab.HEADER)
    assert row[:2] == [damaged.id, "damaged"]
    assert any(word in row[4] for word in ("is damaged at event 1", "must be at least 1", "must be a JSON file"))
    assert runs_tab.label(damaged) == f"{damaged.id} · damaged"


def test_a_run_is_called_by_name_state_and_time(write_run):
    run = write_run([STARTED], RunSpec(name="Inns"))
    assert runs_tab.label(run) == f"Inns · interrupted · {run.created:%d %b %H:%M}"


def test_the_details_hold_all_settings_that_matter_as_text(write_run):
    spec = RunSpec(
        lora=LoRAConfig(r=3, alpha=6, dropout=0.05, target_modules=("q_proj", HOSTILE)),
        train=TrainConfig(steps=7, batch_size=3, accumulation=2, learning_rate=2e-4, seed=5),
    )
    facts = Read(runs_tab.details(write_run(spec=spec))).facts
    assert facts["Target matrices"] == f"q_proj, {HOSTILE}"
    assert facts["r, alpha, dropout"] == "3, 6, 0.05"
    assert facts["Steps × batch"] == "7 × 6"
    assert facts["Learning rate"] == "0.0002, linear"
    assert (facts["Model"], facts["Data"], facts["Seed"]) == ("starter", "starter:restaurants", "5")
    assert "Begins with" not in facts


def test_the_command_shown_makes_the_same_run(write_run, monkeypatch):
    run = write_run(spec=RunSpec("Two words", lora=LoRAConfig(r=3), train=TrainConfig(seed=5)))
    words = shlex.split(html.unescape(re.search("<code>(.*)</code>", runs_tab.details(run))[1]))
    asked = []
    monkeypatch.setattr(jobs, "start", lambda runs, spec: asked.append((runs.workspace.root, spec)))
    monkeypatch.setattr(jobs, "follow", lambda run, as_json: 0)
    assert words[0] == "lora-studio" and cli.main(words[1:]) == 0
    assert asked == [(run.folder.parent.parent, run.spec)]


def test_details_say_what_a_run_begins_with(write_run):
    run = write_run([STARTED, step(1)])
    run._spec = RunSpec(continues="20260101-000000-x-abcd@40")
    assert Read(runs_tab.details(run)).facts["Begins with"] == "20260101-000000-x-abcd@40"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([math.nan, math.inf], ""),
        ([2.0], "▁"),
        ([3.0, 3.0, 3.0], "▁▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([7.0, math.nan, 0.0], "█▁"),
    ],
)
def test_a_sparkline_rises_and_falls_as_its_values(values, line):
    drawn_line = runs_tab.sparkline(values)
    assert drawn_line == (drawn_line if line is None else line)
    assert set(drawn_line) <= set(runs_tab.BLOCKS)


@pytest.mark.parametrize("length", [16, 17, 100, 10_001])
def test_a_sparkline_is_at_most_so_wide_and_keeps_the_trend(length):
    line = runs_tab.sparkline([-i for i in range(length)], width=16)
    assert len(line) == 16
    assert line == "".join(sorted(line, reverse=True)) and line[0] == "█" and line[-1] == "▁"
