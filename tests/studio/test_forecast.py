"""Before Start: what the page says that a run will take, what a probe adds to it, and proposals that fill the form."""

import asyncio
import html
import re
import shutil
import threading
import time
from dataclasses import replace

import gradio as gr
import pytest
import torch

from core import LoRAConfig, LoRAError, TrainConfig
from studio import bars, planner
from studio.forms import Form
from studio.probe import Probe
from studio.runs import Runs
from studio.specs import RunSpec
from studio.state import Studio
from studio.tabs import forecast
from studio.workspace import Workspace

CHANGES = ("preset", "names", "pattern")


class Page:
    """The part on a page of its own, with a form of the training settings; handlers are called by name."""

    def __init__(self, studio: Studio, spec: RunSpec) -> None:
        self.studio, self.spec, self.asked = studio, spec, forecast.Asked()
        asyncio.run(self._draw())  # outside of a running loop, gr.Blocks leaves one behind that nobody closes
        self.values: list = []

    async def _draw(self) -> None:
        with gr.Blocks() as blocks:
            self.form = Form(TrainConfig)
            self.names = [*self.form.names, *CHANGES]
            choice = [gr.Textbox() for _ in CHANGES]
            inputs = [*self.form.widgets, *choice]
            self.part, start = forecast.draw(), gr.Button("Start")
            forecast.wire(
                self.studio,
                self.part,
                inputs,
                self.read,
                dict(zip(self.names, inputs, strict=True)),
                changed=[w.change for w in self.form.widgets],
                start=start,
                redraw=lambda event: event,
            )
        self.fns = [event.fn for event in blocks.fns.values()]

    def read(self, *values, rows=True) -> RunSpec:
        lora = replace(self.spec.lora, target_modules=values[-1] or self.spec.lora.target_modules)
        settings = TrainConfig.from_dict(self.form.values(values[: len(self.form.names)]))
        return replace(self.spec, lora=lora, train=settings)

    def set(self, **changes) -> None:
        for name, value in changes.items():
            self.values[self.names.index(name)] = value

    def fill(self, updates: list) -> None:
        """What a browser does with the updates of `take` and `undo`."""
        for name, update in zip(self.names, updates, strict=True):
            if "value" in update:
                self.set(**{name: update["value"]})

    def call(self, name: str, *args, place: int = 0):
        fns = list(dict.fromkeys(fn for fn in self.fns if fn.__name__ == name))
        return fns[place](*args)

    def forecast(self, free: str = "") -> str:
        *_, last = self.call("forecast", self.asked, free, *self.values)
        return last[0]

    def fit(self, free: str) -> list:
        *_, last = self.call("fit", self.asked, free, *self.values)
        return last

    def probe(self, *, place: int = 0) -> list:
        return list(self.call("probe", self.asked, "", *self.values, place=place))


@pytest.fixture
def workspace(workspace, measured) -> Workspace:
    shutil.copytree(measured, workspace.cache, dirs_exist_ok=True)
    return workspace


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    monkeypatch.setattr(forecast, "REST_SECONDS", 0.0)


@pytest.fixture(scope="module")
def spec(tiny_folder, tiny_data) -> RunSpec:
    train = TrainConfig(steps=6, batch_size=8, max_length=256, device="cpu", precision="fp32", warmup_steps=0)
    return RunSpec("Planned", str(tiny_folder), tiny_data, LoRAConfig(r=2), train)


@pytest.fixture(scope="module")
def drawn(spec, tmp_path_factory, measured) -> Page:
    workspace = Workspace(tmp_path_factory.mktemp("forecast"))
    shutil.copytree(measured, workspace.cache, dirs_exist_ok=True)
    return Page(Studio(workspace), spec)


@pytest.fixture
def page(drawn, spec, tmp_path_factory) -> Page:
    """As it opens; what was forecast before is known to it."""
    drawn.asked, drawn.values = forecast.Asked(), [*drawn.form.shown(spec.train), "All linear", "", ""]
    drawn.studio.open_folders = (tmp_path_factory.getbasetemp(),)
    return drawn


def shown(button) -> dict:
    return button._constructor_args[0]


def text(of: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", of))


def widths(of: str) -> list[float]:
    """The lengths of the bars, in per cent of the drawing."""
    lanes = re.findall(r'<div class="bar">(.*?)</div>', of)
    return [sum(map(float, re.findall(r"width:([\d.]+)%", lane))) for lane in lanes]


# The forecast


def test_the_bars_are_the_planner_s_numbers_on_one_scale(page, spec):
    of, made = page.forecast(), page.studio.planner(spec.model).plan(spec)
    lora, full = widths(of)
    assert lora / full == pytest.approx(made.lora.total / made.full.total, rel=1e-3)
    for name, title in bars.TERMS.items():
        has_any = getattr(made.lora, name) or getattr(made.full, name)
        assert not has_any or f'<i class="{name}"></i>{title}</th><td>{bars.size(getattr(made.lora, name))}</td>' in of
    assert text(of).count(bars.size(made.full.total)) >= 2 and "It fits" in of


def test_the_bars_follow_the_form_and_say_what_is_wrong_with_a_setting(page):
    few = page.forecast()
    page.set(batch_size=16)
    assert page.forecast() != few
    page.set(batch_size=0)
    assert "`batch_size` (=0) must be at least 1" in text(page.forecast())
    page.set(batch_size=8)
    assert "`free` (='much') must be a number of GB above 0" in text(page.forecast("much"))
    assert widths(page.forecast()) == widths(few)


def test_what_does_not_fit_is_said_with_what_is_missing_and_marked(page, spec):
    total = page.studio.planner(spec.model).forecast(spec).total
    of = page.forecast(f"{(total - 2_000_000) / 1e9:.6f}")
    assert "2 MB more than the" in text(of) and 'class="said error"' in of
    lora, _ = widths(of)
    (mark,) = set(re.findall(r'class="mark free" style="left:([\d.]+)%', of))
    assert float(mark) == pytest.approx(lora * (total - 2_000_000) / total, abs=0.05)
    assert 'class="mark free"' not in page.forecast("500") and "500.00 GB free →" in page.forecast("500")


def test_several_devices_share_what_is_named_twice(page, spec, monkeypatch):
    monkeypatch.setattr(planner, "device_memory", lambda device: (8 * 10**9, 12 * 10**9))
    page.set(device="cpu,cpu")
    words = text(page.forecast())
    assert "On each of 2 devices (cpu …)" in words and "4.00 GB free" in words and "6.00 GB in all" in words


def test_only_the_last_of_changes_that_follow_fast_is_answered(page, monkeypatch):
    monkeypatch.setattr(forecast, "REST_SECONDS", 0.3)
    answers = {}

    def ask(name: str, size: int) -> None:
        values = list(page.values)
        values[page.names.index("batch_size")] = size
        (answers[name],) = page.call("forecast", page.asked, "", *values)

    first = threading.Thread(target=ask, args=("first", 2))
    first.start()
    while page.asked.turn == 0:
        time.sleep(0.01)
    ask("last", 3)
    first.join()
    assert isinstance(answers["last"][0], str) and not isinstance(answers["first"][0], str)


def test_a_model_whose_code_wants_values_is_told_of_in_a_sentence(workspace, spec):
    class Peeking(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(8, 8, device="meta")

        def forward(self, input_ids, **_):
            return self.q_proj(torch.zeros(int(input_ids.max().item()) + 1, 8))

    with pytest.raises(LoRAError, match=r"`model` \(='.*'\) must run on shapes alone .* a probe measures it"):
        planner.Planner(spec.model, workspace, Peeking()).forecast(spec)


# What makes it fit


def test_a_proposal_fills_the_form_and_undo_brings_it_back(page, spec):
    before = list(page.values)
    total = page.studio.planner(spec.model).forecast(spec).total
    said, *buttons = page.fit(f"{(total - 1_000_000) / 1e9:.6f}")
    assert "Each of these fits" in said
    offered = page.asked.offered
    assert [shown(b)["value"] for b in buttons if shown(b)["visible"]] == [forecast.words_of(r) for r in offered]
    taken = list(dict.fromkeys(fn for fn in page.fns if fn.__name__ == "take"))
    for place, remedy in enumerate(offered):
        undo, *updates = taken[place](page.asked, *page.values)
        assert shown(undo)["visible"] and remedy.label in shown(undo)["value"]
        page.fill(updates)
        assert page.read(*page.values) == remedy.spec
        assert bars.size(remedy.predicted_bytes) in forecast.words_of(remedy)
        _, *updates = page.call("undo", page.asked)
        page.fill(updates)
        assert page.values == before
    page.forecast()
    with pytest.raises(gr.Error, match="must be looked for again"):
        taken[0](page.asked, *page.values)


def test_undo_leaves_alone_what_was_changed_besides(page, spec):
    total = page.studio.planner(spec.model).forecast(spec).total
    page.fit(f"{(total - 1_000_000) / 1e9:.6f}")
    page.fill(page.call("take", page.asked, *page.values)[1:])
    page.set(steps=99)
    page.fill(page.call("undo", page.asked)[1:])
    assert page.read(*page.values) == replace(spec, train=replace(spec.train, steps=99))


def test_what_fits_as_it_is_and_what_never_does_is_said(page, monkeypatch):
    said, *buttons = page.fit("500")
    assert "It fits 500.00 GB as it is" in said and not any(shown(b)["visible"] for b in buttons)
    monkeypatch.setattr(planner, "MOST_FORECASTS", 3)
    assert "Nothing was found" in page.fit("0.001")[0]
    monkeypatch.setattr(planner, "device_memory", lambda device: (0, 0))
    with pytest.raises(gr.Error, match=r"`free` \(=nothing\) must be given"):
        page.fit("")


# The probe


def test_a_probe_is_a_further_bar_beside_the_forecast(page, spec):
    *steps, last = page.probe()
    assert [re.search(r'valuenow="(\d)"', said[0])[1] for said in steps[:-1]] == list("012345")
    (measured, _) = page.asked.measured
    assert f"Measured, {bars.difference(measured.probe.peak_bytes, measured.forecast_bytes)} the forecast" in last[4]
    assert len(widths(last[4])) == 3 and "for all steps" in last[0]
    assert shown(last[1])["interactive"] and page.asked.probing is None
    page.set(batch_size=4)
    assert "Measured, with earlier settings" in page.forecast()


def test_a_probe_beside_a_training_is_asked_for_twice_and_can_be_cancelled(
    page, spec, write_run, hold, workspace, monkeypatch
):
    monkeypatch.setattr(page.studio, "runs", Runs(workspace))
    run = write_run(spec=replace(spec, name="Zebra <b>"))
    hold(run)
    ((said, _, beside, *_),) = page.probe()
    assert "“Zebra &lt;b&gt;” trains on cpu now" in said and shown(beside)["visible"]
    going = page.call("probe", page.asked, "", *page.values, place=1)
    while page.asked.probing is None:
        said, *_, cancel, _ = next(going)
    assert shown(cancel)["visible"]
    probing = page.asked.probing
    page.call("cancel", page.asked)
    *_, last = going
    assert "The probe was cancelled." in last[0] and shown(last[1])["interactive"]
    assert probing.is_ended and page.asked.measured is None


def test_a_probe_opens_no_file_that_pages_may_not(page, workspace):
    page.studio.open_folders = (workspace.root,)
    ((said, *_),) = page.probe()
    assert "to be opened from the page" in text(said)
    assert "to be opened from the page" in text(page.forecast())


@pytest.mark.parametrize(
    ("actual", "forecast_bytes", "words"),
    [(110, 100, "10 % more than"), (90, 100, "10 % less than"), (1004, 1000, "the same as")],
)
def test_a_difference_in_words(actual, forecast_bytes, words):
    assert bars.difference(actual, forecast_bytes) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 MB"), (9_768_960, "9.77 MB"), (99.96e6, "100 MB"), (999.4e6, "999 MB"), (1.1e9, "1.10 GB")],
)
def test_bytes_in_words(number, words):
    assert bars.size(number) == words


def test_a_probe_of_shorter_rows_or_a_peak_at_loading_says_so():
    found = Probe("cpu", 8, 112, 300, 1000, 1000, 0.5, 90.0)
    words = bars.measured_words(bars.Measured(found, 2000, 1500))
    assert words[:2] == [
        "0.001 MB at most, 50 % less than the forecast.",
        "0.50 s a batch, about 1 min 30 s for all steps.",
    ]
    assert "8 longest rows have up to 112 tokens" in words[2] and "loaded" in words[3]
    assert len(bars.measured_words(bars.Measured(replace(found, peak_bytes=2000), 2000, 2000))) == 2
