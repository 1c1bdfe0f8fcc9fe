"""Pictures: what a view shows can be downloaded, and its notebook really makes it anew."""

import csv
import io
import json
import re
from pathlib import Path

import matplotlib.figure
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from core import (
    Adapter,
    LoRAConfig,
    LoRAError,
    TrainConfig,
    WeightSpectrum,
    inject,
    intruder_dimensions,
    lora_layers,
)
from studio import comparing, models, worker
from studio.measuring import Measured
from studio.opened import Source
from studio.pictures import MOST, Picture, Pictures
from studio.runs import Runs
from studio.specs import RunSpec
from studio.state import Studio
from studio.svg import to_svg
from studio.tabs.spectrum import compare, intruding, matrix, overview, past, reading

PATH = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def train(tiny_folder, tiny_data, workspace, write_run):
    """train(seed): a run of the tiny model, with an adapter as if it had been trained."""

    def made(seed: int = 0, r: int = 3):
        model = models.load_model(str(tiny_folder), workspace)
        config = LoRAConfig(r=r, alpha=2 * r, target_modules=("q_proj", "down_proj"))
        inject(model, config, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=generator))
        spec = RunSpec(f"Seed {seed}", str(tiny_folder), tiny_data, config, TrainConfig(seed=seed, device="cpu"))
        run = write_run((), spec)
        Adapter.from_model(model, base_model=spec.model).save(run.adapter_folder)
        return run

    return made


def run_cells(content: bytes) -> dict:
    """Executes a notebook's cells of code; returns what they leave."""
    told = json.loads(content)
    assert (told["nbformat"], told["nbformat_minor"]) == (4, 5)
    assert all(cell["id"] and isinstance(cell["source"], str) for cell in told["cells"])
    names: dict = {}
    for cell in told["cells"]:
        if cell["cell_type"] == "code":
            assert not re.search(r"(from|import) core\.|studio\.tabs|\._[a-z]", cell["source"]), "public names only"
            exec(compile(cell["source"], "notebook", "exec"), names)
    return names


def test_the_notebook_of_every_figure_draws_the_same_figure(train, workspace):
    studio = Studio(workspace)
    first, second = (studio.opened(Source(train(seed).id)) for seed in (0, 1))
    spectra = studio.spectra(first)
    factors = {path: f for path, (f, _) in spectra.items()}
    svd = studio.weight_svd(first, PATH)
    pictures = [
        matrix.sigma_picture(first, studio, PATH, log=True),
        matrix.alignment_picture(first, studio, PATH, svd),
        matrix.weight_picture(first, studio, PATH, WeightSpectrum(svd.sigma, svd.shape)),
        compare.phi_picture(studio, first, second, PATH, "A-right"),
        compare.phi_picture(studio, first, second, PATH, "delta-left"),
        *(compare.map_picture(studio, first, second, t, studio.comparison(first, second)) for t in compare.QUANTITIES),
    ]
    for title, quantity in overview.QUANTITIES.items():
        *_, towards = studio.amplifications(first)
        of = towards if quantity.needs_weight else {path: s for path, (_, s) in spectra.items()}
        values = {path: quantity.value(of[path]) for path in spectra}
        note = overview.chance_note(spectra, quantity)
        code = overview.code_of(first, studio, title, note)
        pictures.append(overview.overview(title, values, note, factors, code))
    for picture in pictures:
        found = run_cells(picture.file("ipynb"))["figure"]
        assert to_svg(found, "x") == to_svg(picture.figure, "x"), picture.title
        assert found._repr_png_().startswith(b"\x89PNG"), "Jupyter shows it without further help"
        rows = list(csv.reader(io.StringIO(picture.csv())))
        assert len(rows) > 1 and all(len(row) == len(rows[0]) for row in rows)


@pytest.fixture
def pictures_of_a_run(tiny_folder, tiny_data, workspace):
    """What the Spectrum tab shows of a run that was really trained."""
    lora = LoRAConfig(r=3, target_modules=("q_proj", "down_proj"))
    settings = TrainConfig(steps=6, batch_size=2, learning_rate=1e-2, spectrum_every=2, eval_every=3, device="cpu")
    run = Runs(workspace).create(RunSpec("Inns", str(tiny_folder), tiny_data, lora, settings))
    assert worker.main([str(run.folder)]) == 0, run.log.refresh()[-1]
    run.log.read()
    studio = Studio(workspace)
    opened = studio.opened(Source(run.id))
    svd = studio.weight_svd(opened, PATH)
    found = intruder_dimensions(opened.adapter.factors[PATH], svd, k=4, threshold=0.5)
    half, whole = (Measured("x", loss, 3.0, 9, 99) for loss in (1.5, 1.4))
    losses = {"measured": {0.5: (half, half), 1.0: (whole, whole)}, "base": None}
    return [
        past.course(opened, run, PATH, studio)[0],
        intruding.cosine_picture(studio, opened, PATH, found),
        intruding.loss_picture(studio, opened, losses, "nine rows"),
        matrix.sigma_picture(opened, studio, PATH, log=False),
    ]


def test_the_notebooks_of_a_trained_run_draw_its_course_its_intruders_and_its_losses(pictures_of_a_run):
    for picture in pictures_of_a_run:
        found = run_cells(picture.file("ipynb"))["figure"]
        assert to_svg(found, "x") == to_svg(picture.figure, "x"), picture.title


@pytest.mark.slow
def test_the_notebooks_of_a_trained_run_show_their_figure_in_a_fresh_kernel(pictures_of_a_run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    for picture in pictures_of_a_run:
        written = nbformat.reads(picture.file("ipynb").decode(), as_version=4)
        nbformat.validate(written)
        quiet = ["--IPKernelApp.log_level=ERROR"]  # it warns of its own socket
        resources = {"metadata": {"path": str(tmp_path)}}
        done = NotebookClient(written, timeout=600, extra_arguments=quiet, resources=resources).execute()
        outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
        assert [sorted(output.get("data", output)) for output in outputs] == [["image/png", "text/plain"]]


def test_the_notebook_of_a_table_says_its_numbers(train, workspace, capsys):
    studio = Studio(workspace)
    opened = studio.opened(Source(train().id))
    table = matrix.table_picture(opened, studio, PATH)
    run_cells(table.file("ipynb"))
    projected = list(csv.DictReader(io.StringIO(table.csv())))[0]["‖UᵀWV‖"]
    assert f"{float(projected):.5f}"[:6] in capsys.readouterr().out
    words = reading.side_picture(studio, opened, PATH, "reads", 2)
    run_cells(words.file("ipynb"))
    said = capsys.readouterr().out
    for row in csv.DictReader(io.StringIO(words.csv())):
        assert repr(row["token"].removeprefix("'"))[1:-1] in said


def test_the_maths_and_the_title_are_text():
    hostile = "<img src=x onerror=alert(1)>"
    page = Picture(hostile, html="<p>ok</p>", numbers={"a": [1]}, maths=hostile, notebook="1").page()
    assert "<img" not in page and page.count("&lt;img") >= 2
    assert 'data-get="png"' not in page and 'data-get="csv"' in page and 'data-get="ipynb"' in page


def test_numbers_of_a_spreadsheet_hold_no_formula():
    numbers = {"matrix": ["=1+1", "+x", "q_proj"], "value": [1.5, float("nan"), -2.0], "is": [True, False, True]}
    rows = list(csv.reader(io.StringIO(Picture("x", numbers=numbers).csv())))
    assert rows == [["matrix", "value", "is"], ["'=1+1", "1.5", "True"], ["'+x", "", "False"], ["q_proj", "-2", "True"]]


def test_files_are_what_they_say_and_other_kinds_are_refused():
    figure = matplotlib.figure.Figure()
    picture = Picture("One/two", figure)
    assert picture.file("png").startswith(b"\x89PNG") and b"<svg" in picture.file("svg")[:500]
    with pytest.raises(LoRAError, match=r"`kind` \(='csv'\) must be one of png, svg"):
        picture.file("csv")
    pictures = Pictures()
    pictures.put(picture)
    assert pictures.hand_out(picture.key, "png")["name"] == "One-two.png"


def test_the_oldest_pictures_are_forgotten():
    pictures, made = Pictures(), [Picture(str(i), numbers={"a": [i]}) for i in range(MOST + 1)]
    for picture in made:
        pictures.put(picture)
    assert pictures.hand_out(made[1].key, "csv")["mime"] == "text/csv"
    with pytest.raises(LoRAError, match="This picture is an older one; open its section again"):
        pictures.hand_out(made[0].key, "csv")


def test_what_a_run_began_with_is_the_A_that_it_was_injected_with(tiny_folder, workspace):
    model = models.load_model(str(tiny_folder), workspace)
    config = LoRAConfig(r=3, target_modules=("q_proj", "down_proj"), init="gaussian")
    spec = RunSpec("x", str(tiny_folder), lora=config, train=TrainConfig(seed=5))
    inject(model, config, seed=5)
    for path, layer in lora_layers(model).items():
        begun = comparing.start(spec, path, layer.factors)
        assert begun is not None and torch.equal(begun.A, layer.factors.A) and not begun.B.any()
    for unknown in (RunSpec(lora=LoRAConfig(init="pissa")), RunSpec(continues="other@20")):
        assert comparing.start(unknown, path, layer.factors) is None


def test_panels_show_the_trap_of_one_seed_and_its_level_of_chance(train, workspace):
    studio = Studio(workspace)
    first, second = (studio.opened(Source(train(seed).id)) for seed in (0, 1))
    f, g = first.adapter.factors[PATH], second.adapter.factors[PATH]
    starts = [comparing.start(o.run.spec, PATH, o.adapter.factors[PATH]) for o in (first, second)]
    same = comparing.panels(f, f, "A-right", (starts[0], starts[0]))
    torch.testing.assert_close(same["step 0"].diagonal(), torch.ones(3, dtype=torch.float64))
    other = comparing.panels(f, g, "A-right", (starts[0], starts[1]))
    assert other["step 0"].max() < 0.5 and float(other["chance"][0, 2]) == 3 / 32
    assert list(comparing.panels(f, g, "B-left", (starts[0], starts[1]))) == ["trained", "chance"]
