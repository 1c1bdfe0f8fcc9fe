import math
import re
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import StepPatch
from matplotlib.text import Text
from PIL import Image

from core import Factors, LoRAError, Spectrum, random_sigma, spectrum
from studio.figures import (
    alignment_figure,
    bars_figure,
    damping_figure,
    enrichment_figure,
    heat_figure,
    intruder_figure,
    lines_figure,
    loss_figure,
    profile_figure,
    sigma_figure,
    similarity_figure,
    weight_figure,
)
from studio.figures.heat import MOST_REGIONS
from studio.palette import ADAPTED, ADAPTED_SOFT, CHANCE
from studio.svg import INK, save_figure, to_svg

NAN = float("nan")
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
HOSTILE = ("a.0.<script>alert(1)</script>", "a.0.$x_1$", "a.0.$\\frac{", 'a.0." onload="x', "a.0.&amp;\x00\ue000-0")


def factors(r: int = 8, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, 48, generator=generator), torch.randn(40, r, generator=generator)
    return Factors(A, B * torch.exp(-torch.arange(r) / 3), 2.0)


def spectra(num_layers: int = 6, r: int = 8) -> dict[str, torch.Tensor]:
    return {
        f"model.layers.{layer}.{matrix}": spectrum(factors(r, 10 * layer + place)).sigma
        for layer in range(num_layers)
        for place, matrix in enumerate(MATRICES)
    }


def nulls(num_layers: int = 6, r: int = 8) -> dict[str, torch.Tensor]:
    return {
        f"model.layers.{layer}.{matrix}": random_sigma(factors(r, 10 * layer + place))
        for layer in range(num_layers)
        for place, matrix in enumerate(MATRICES)
    }


def texts(figure) -> str:
    figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in figure.findobj(Text) if text.get_visible())


def gallery():
    sigma, chance = spectrum(factors()).sigma, random_sigma(factors())
    norms = {path: float(sigma.norm()) for path, sigma in spectra().items()}
    wide = {f"h.{layer}.block.experts.{e}.w1": math.sin(layer + e) * 1e-6 for layer in range(100) for e in range(12)}
    return {
        "sigma": sigma_figure(sigma, chance, title="model.layers.17.self_attn.q_proj"),
        "sigma of rank 64, log": sigma_figure(torch.exp(-torch.arange(64) / 5), torch.ones(64) * 0.3, log=True),
        "sigma of rank 1": sigma_figure([0.2], [0.2]),
        "sigma, tiny": sigma_figure(sigma * 1e-7, chance * 1e-7),
        "sigma = 0": sigma_figure(sigma * 0, chance * 0, title="x" * 300),
        "heat": heat_figure(norms, title="‖ΔW‖", unit="Frobenius norm"),
        "heat with holes": heat_figure({**norms, "lm_head": NAN, "model.embed_tokens": 1.0}, title="‖ΔW‖", unit="u"),
        "heat of one cell": heat_figure({"lm_head": 1.0}, title="one", unit="unit"),
        "heat, nearly alike": heat_figure(
            {f"h.{i}.q": 0.999999 - 1e-7 * i for i in range(30)}, title="φ", unit="φ(k, k)"
        ),
        "heat, long numbers": heat_figure({f"h.{i}.q": 0.99 + 1e-4 * i for i in range(30)}, title="φ", unit="φ(k, k)"),
        "heat, 100 × 12": heat_figure(wide, title="wide", unit="share"),
        "heat of two": heat_figure(
            {"a.0.q": 1.0, "b.0.q": 2.0, "a.1." + "long" * 20: 3.0}, title="y" * 300, unit="z" * 99
        ),
        "profile": profile_figure(spectra()),
        "profile with chance": profile_figure(spectra(), chance=nulls()),
        "profile of one": profile_figure({"a.0.q": [1.0, 0.5]}, log=False, title="one"),
        "enrichment": enrichment_figure(
            {f"r = {r}": (r, {f"layer {i}, q_proj": (1 + i / r, 1000.0 / r) for i in range(9)}) for r in (1, 64)}
        ),
        "lines": lines_figure([1, 8, 64], {"W_q": [3, 2, 1]}, title="r", x_label="r", y_label="loss"),
        "lines, long names": lines_figure(
            [1, 8, 64],
            {f"W_q, k, v, o, alpha = {number} r": [number, 2, 1] for number in range(32, 36)},
            title="Which rank",
            x_label="r",
            y_label="held-out loss, nats a token",
        ),
        "lines, one very long name": lines_figure([1, 2], {"x" * 60: [1, 2]}, title="t", x_label="r", y_label="loss"),
        "bars": bars_figure({"W_q, k, v, o": 0.4495, "Full fine-tuning": 0.0423}, title="Which", unit="loss"),
        "loss": loss_figure([1, 2, 3], [3.0, NAN, 2.0], [0, 3], [3.1, 2.1]),
        "loss, none": loss_figure([], [], [], []),
    }


@pytest.fixture(scope="module")
def figures():
    return gallery()


NAMES = list(gallery())


@pytest.mark.parametrize("log", [False, True])
def test_bars_are_sigma_and_the_dashed_line_is_chance(log):
    sigma, chance = spectrum(factors()).sigma, random_sigma(factors())
    top = sigma_figure(sigma, chance, log=log).axes[0]
    steps = next(patch for patch in top.patches if isinstance(patch, StepPatch))
    bars = [patch for patch in top.patches if patch is not steps]
    assert [bar.get_height() for bar in bars] == sigma.tolist()
    assert [bar.get_center()[0] for bar in bars] == pytest.approx(range(1, 9))
    assert {to_hex(bar.get_facecolor()) for bar in bars} == {ADAPTED}
    assert steps.get_data().values.tolist() == chance.tolist()
    assert (steps.get_linestyle(), to_hex(steps.get_edgecolor())) == ("--", CHANCE)
    assert top.get_yscale() == ("log" if log else "linear")
    low, high = top.get_ylim()
    assert low < min(sigma.min(), chance.min()) and max(sigma.max(), chance.max()) < high


@pytest.mark.parametrize("sigma", [spectrum(factors()).sigma, torch.tensor([1.0, 0, 0]), torch.ones(10), torch.ones(1)])
def test_the_marked_rank_is_the_one_that_the_spectrum_reports(sigma):
    figure = sigma_figure(sigma, sigma)
    whole = Spectrum(sigma.double(), Factors(torch.eye(len(sigma)), torch.diag(sigma), 1.0))
    assert f"90 % in {whole.rank_for_energy(0.9)} of {len(sigma)}" in texts(figure)
    energy = next(
        line for line in figure.axes[1].lines if len(line.get_xdata()) == len(sigma) and line.get_linestyle() == "-"
    )
    assert energy.get_ydata() == pytest.approx([100 * whole.energy(k) for k in range(1, len(sigma) + 1)])


@pytest.mark.parametrize(
    ("sigma", "sentence"),
    [([0.0] * 8, "nothing was learned"), ([], "No singular values"), ([1.0, NAN], "NaN or infinity")],
)
def test_where_there_is_no_spectrum_a_sentence_says_so(sigma, sentence):
    for figure in (sigma_figure(sigma, sigma), sigma_figure(sigma, sigma, log=True), profile_figure({"a.0.q": sigma})):
        assert figure.axes == []
        assert sentence in texts(figure)
    assert "No singular values" in texts(profile_figure({}))


def test_a_log_axis_stops_above_rounding():
    top = sigma_figure([1.0, 0.5, 1e-17, 0.0], [0.6, 0.5, 0.4, 0.3], log=True).axes[0]
    assert 0.1 < top.get_ylim()[0] < 0.3


def test_numbers_of_different_length_are_refused():
    with pytest.raises(LoRAError, match=r"`chance` \(=\(3,\)\) must be one row of numbers as long as `sigma`, \(2,\)"):
        sigma_figure([1.0, 0.5], [1.0, 0.5, 0.2])
    with pytest.raises(LoRAError, match=r"`eval_losses` \(=\(1,\)\) must be .* `eval_steps`, \(0,\)"):
        loss_figure([1], [1.0], [], [1.0])


def test_tensors_of_any_kind_are_read():
    sigma = torch.tensor([2.0, 1.0], dtype=torch.bfloat16, requires_grad=True)
    assert [bar.get_height() for bar in sigma_figure(sigma, sigma).axes[0].patches[:2]] == [2.0, 1.0]


def test_the_loss_curves_are_the_numbers_given():
    axes = loss_figure([1, 2, 3], [3.0, 2.5, 2.0], [0, 3], [3.25, 2.125]).axes[0]
    training, held_out = axes.lines
    assert training.get_xydata().tolist() == [[1, 3.0], [2, 2.5], [3, 2.0]]
    assert held_out.get_xydata().tolist() == [[0, 3.25], [3, 2.125]]
    assert (training.get_color(), held_out.get_color()) == (ADAPTED_SOFT, ADAPTED)
    assert held_out.get_marker() == "o" and held_out.get_linewidth() > training.get_linewidth()
    assert held_out.get_label() == "held out, last 2.12"


def test_losses_that_are_not_finite_leave_a_gap_and_are_marked():
    figure = loss_figure([1, 2, 3], [3.0, NAN, 2.0], [0, 4], [3.1, None])
    axes = figure.axes[0]
    assert np.isnan(axes.lines[0].get_ydata()).tolist() == [False, True, False]
    assert axes.lines[1].get_label() == "held out, last 3.1"
    assert axes.lines[2].get_xdata() == [2, 2] and "not finite (step 2)" in texts(figure)


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [(([], [], [], []), "No loss yet"), (([1, 2], [NAN, math.inf], [0], [None]), "No loss is finite")],
)
def test_without_a_loss_a_sentence_says_so(numbers, sentence):
    figure = loss_figure(*numbers)
    assert figure.axes == [] and sentence in texts(figure)


def test_a_single_loss_is_a_visible_point():
    assert loss_figure([1], [3.0], [], []).axes[0].lines[0].get_marker() == "."
    assert len(loss_figure([], [], [0], [3.0]).axes[0].lines) == 1


def test_a_long_curve_is_thinned_but_keeps_its_ends_peaks_and_gaps():
    losses = np.sin(np.arange(20_000) / 1000)
    losses[7777], losses[12_345], losses[-1] = 9.0, -9.0, 3.0
    losses[15_000:15_200] = np.nan
    kept = loss_figure(np.arange(1, 20_001), losses, [], []).axes[0].lines[0].get_xydata()
    assert len(kept) <= 1200
    assert {(7778.0, 9.0), (12_346.0, -9.0), (20_000.0, 3.0)} <= set(map(tuple, kept.tolist()))
    assert np.isnan(kept[:, 1]).any()
    assert (np.diff(kept[:, 0]) > 0).all()


def cells(figure) -> tuple[list[str], list[str], np.ma.MaskedArray]:
    axes = figure.axes[0]
    x, y = ([label.get_text() for label in labels] for labels in (axes.get_xticklabels(), axes.get_yticklabels()))
    return x, y, axes.images[0].get_array()


def test_the_heat_map_places_values_by_layer_and_matrix():
    values = {"m.layers.2.attn.q": 1.0, "m.layers.2.attn.v": 2.0, "m.layers.4.attn.q": 3.0, "m.layers.4.attn.v": NAN}
    figure = heat_figure({**values, "lm_head": 9.0}, title="t", unit="u")
    x, y, grid = cells(figure)
    assert (x, y) == (["·", "2", "3", "4"], ["q", "v", "lm_head"])
    none = None
    assert grid.tolist() == [[none, 1, none, 3], [none, 2, none, none], [9, none, none, none]]
    assert "framed: largest, 9\nlm_head\nhatched: no value" in texts(figure)
    assert {patch.get_hatch() for patch in figure.axes[0].patches} == {"/////", None}


def test_a_difference_of_rounding_has_no_colour_of_its_own():
    alike = heat_figure({"h.0.q": 0.999999, "h.1.q": 0.999998}, title="t").axes[0].images[0]
    low, high = alike.get_clim()
    assert high - low == pytest.approx(1e-3, rel=1e-4) and low < 0.999998 < 0.999999 < high
    assert np.abs(np.diff(alike.cmap(alike.norm([0.999998, 0.999999])), axis=0)).max() < 0.01
    assert heat_figure({"h.0.q": 1.0, "h.1.q": 0.99}, title="t").axes[0].images[0].get_clim() == (0.99, 1)


def test_without_holes_nothing_is_hatched_and_the_largest_is_framed():
    figure = heat_figure({"h.0.q": 1.0, "h.1.q": 5.0, "h.0.v": 2.0, "h.1.v": 3.0}, title="t")
    (frame,) = figure.axes[0].patches
    assert frame.get_xy() == (0.5, -0.5)
    assert "framed: largest, 5\nlayer 1, q" in texts(figure) and "hatched" not in texts(figure)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"], ["c_attn", "attn.c_proj", "mlp.c_proj"]),
        (["e.0.layer.0.q", "e.0.layer.1.q"], ["layer.0.q", "layer.1.q"]),
        (["enc.0.attn.q", "dec.0.attn.q"], ["enc.*.attn.q", "dec.*.attn.q"]),
        (["enc.0.q", "dec.1.q"], ["q"]),
        (["h.0.q", "h.0.x.q"], ["q", "x.q"]),
    ],
)
def test_matrices_are_named_as_shortly_as_is_unambiguous(paths, names):
    _, shown, grid = cells(heat_figure({path: float(value) for value, path in enumerate(paths)}, title="t"))
    assert shown == names
    assert sorted(grid.compressed()) == list(range(len(paths)))


def test_a_wild_layer_number_does_not_blow_the_map_up():
    _, _, grid = cells(heat_figure({"h.0.q": 1.0, "h.99999999.q": 2.0}, title="t"))
    assert grid.shape == (1, 2)


def test_equal_values_give_a_map_and_none_gives_a_sentence():
    assert cells(heat_figure({"h.0.q": 0.0, "h.1.q": 0.0}, title="t"))[2].shape == (1, 2)
    assert "No values" in texts(heat_figure({}, title="t"))
    assert "finite" in texts(heat_figure({"h.0.q": NAN}, title="t"))


@pytest.mark.parametrize("log", [True, False])
def test_the_profile_draws_median_and_band_over_layers(log):
    every = spectra()
    figure = profile_figure(every, log=log)
    assert [panel.get_title(loc="left") for panel in figure.axes] == [name.split(".")[1] for name in MATRICES]
    for panel, matrix in zip(figure.axes, MATRICES, strict=True):
        sigmas = torch.stack([sigma for path, sigma in every.items() if path.endswith(matrix)]).numpy()
        (median,) = (line for line in panel.lines if line.get_color() == ADAPTED)
        assert median.get_ydata() == pytest.approx(np.median(sigmas, axis=0))
        band = panel.collections[0].get_paths()[0].vertices
        for k in range(1, 9):
            ends = band[band[:, 0] == k, 1]
            assert (ends.min(), ends.max()) == pytest.approx(np.quantile(sigmas[:, k - 1], [0.1, 0.9]))
        assert panel.get_yscale() == ("log" if log else "linear")


@pytest.mark.parametrize("log", [True, False])
def test_the_profile_draws_chance_as_a_dashed_line_of_medians(log):
    sigmas, chance = spectra(), {path: 3 * sigma for path, sigma in nulls().items()}
    figure = profile_figure(sigmas, chance=dict(reversed(chance.items())), log=log)
    for panel, matrix in zip(figure.axes, MATRICES, strict=True):
        (line,) = (line for line in panel.lines if line.get_color() == CHANCE)
        values = torch.stack([sigma for path, sigma in chance.items() if path.endswith(matrix)]).numpy()
        assert line.get_ydata() == pytest.approx(np.median(values, axis=0))
        assert line.get_xdata().tolist() == list(range(1, 9))
        assert line.get_linestyle() == "--"
        low, high = panel.get_ylim()
        assert low < line.get_ydata().min() and line.get_ydata().max() < high
    assert "chance" in texts(figure)
    plain = profile_figure(sigmas, log=log)
    assert CHANCE not in {line.get_color() for panel in plain.axes for line in panel.lines}
    assert "chance" not in texts(plain)


@pytest.mark.parametrize(
    "chance", [{"a.0.q": [1.0]}, {"a.0.q": [1.0], "a.1.q": [1.0]}, {"a.0.q": [1.0], "a.1.q": [1.0, 0.5], "b": [1.0]}]
)
def test_chance_of_other_modules_or_lengths_is_refused(chance):
    odd = "b" if "b" in chance else r"a\.1\.q"
    message = (
        rf"`chance` \(=\d modules\) must hold as many numbers for each module as `sigmas`; it does not for {odd}\.$"
    )
    with pytest.raises(LoRAError, match=message):
        profile_figure({"a.0.q": [1.0], "a.1.q": [1.0, 0.5]}, chance=chance)


def test_the_profile_takes_ranks_that_differ_and_pools_experts():
    figure = profile_figure(
        {"h.0.experts.0.w": [4.0, 2.0], "h.0.experts.1.w": [2.0], "h.1.experts.0.w": [6.0]}, log=False
    )
    (panel,) = figure.axes
    assert panel.lines[0].get_ydata().tolist() == [4.0, 2.0]


@pytest.mark.parametrize("name", NAMES)
def test_every_label_lies_inside_the_figure_and_on_no_other(figures, name):
    figure = figures[name]
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else figure._get_renderer()
    shown = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    # Tick labels beyond an axis exist, but are not drawn.
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            drawn = set(axis._update_ticks())
            hidden = [tick for tick in axis.get_major_ticks() if tick not in drawn]
            shown = [text for text in shown if all(text not in (tick.label1, tick.label2) for tick in hidden)]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown]
    for text, box in boxes:
        inside = figure.bbox.padded(1)
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1, text
    for place, (text, box) in enumerate(boxes):
        for other, other_box in boxes[place + 1 :]:
            assert not box.padded(-1).overlaps(other_box.padded(-1)), (text, other)


@pytest.mark.parametrize("name", NAMES)
def test_svg_takes_the_pages_ink_font_and_width(figures, name):
    svg = to_svg(figures[name], "a label")
    root = ET.fromstring(svg)
    assert svg.startswith("<svg ")
    assert INK not in svg and "#000000" not in svg and "#ffffff" not in svg and "currentColor" in svg
    assert "font-family" not in svg and "<style" not in svg and "<script" not in svg and "metadata" not in svg
    assert {"width", "height"}.isdisjoint(root.attrib) and root.get("viewBox").startswith("0 0 ")
    assert (root.get("role"), root.get("aria-label")) == ("img", "a label")
    ids = [element.get("id") for element in root.iter() if "id" in element.attrib]
    used = re.findall(r'(?:url\(|href=")#([^)"]+)', svg)
    assert len(set(ids)) == len(ids) and set(used) == set(ids)


def test_svgs_on_one_page_share_no_ids(figures):
    svgs = [to_svg(figure, "same label") for figure in figures.values()]
    ids = [name for svg in svgs for name in set(re.findall(r' id="([^"]+)"', svg))]
    assert len(ids) > 20 and len(set(ids)) == len(ids)


def test_the_same_figure_and_label_give_the_same_svg(figures):
    again = heat_figure({"a.0.q": 1.0, "a.1.v": 2.0}, title="t")
    figure = heat_figure({"a.0.q": 1.0, "a.1.v": 2.0}, title="t")
    assert to_svg(figure, "one") == to_svg(again, "one") != to_svg(figure, "two")
    for name in ("sigma", "profile", "loss"):
        assert to_svg(figures[name], "one") == to_svg(figures[name], "one"), name


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.names, self.words = [], set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("path", HOSTILE)
def test_names_from_outside_are_shown_as_they_stand(path, tmp_path):
    sigma = spectrum(factors()).sigma
    name = path.removeprefix("a.0.")
    for figure, times in (
        (sigma_figure(sigma, sigma, title=name), 1),
        (heat_figure({path: 1.0}, title=name, unit=name), 3),  # title, unit and row
        (profile_figure({path: sigma}, title=name), 2),  # title and panel
    ):
        page = Page(to_svg(figure, name))
        assert "script" not in page.tags and "onload" not in page.names
        kept = "".join(letter if letter.isprintable() else " " for letter in name)
        assert sum(word.startswith(kept[:8]) for word in page.words) == times
        save_figure(figure, tmp_path / "figure.png")
        save_figure(figure, tmp_path / "figure.svg")


def test_saved_files_are_dark_ink_on_white(tmp_path, figures):
    save_figure(figures["sigma"], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (900, 625)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
        assert image.convert("RGB").getpixel((899, 0)) == (255, 255, 255)
        assert tuple(bytes.fromhex(INK[1:])) in colours
    save_figure(figures["sigma"], str(tmp_path / "a.SVG"))
    text = (tmp_path / "a.SVG").read_text(encoding="utf-8")
    ET.fromstring(text)
    assert INK in text and "#ffffff" in text and "currentColor" not in text


def test_a_file_of_another_kind_is_refused(tmp_path, figures):
    with pytest.raises(LoRAError, match=r"`path` \(=.*a\.pdf\) must end in \.png or \.svg"):
        save_figure(figures["sigma"], tmp_path / "a.pdf")
    assert list(tmp_path.iterdir()) == []


def test_the_callers_style_neither_shows_nor_changes(tmp_path):
    def draw() -> list[bytes]:
        figures = sigma_figure([1.0, 0.5], [0.8, 0.7]), heat_figure({"a.0.q": 1.0, "a.1.v": 2.0}, title="t")
        for place, figure in enumerate(figures):
            save_figure(figure, tmp_path / f"{place}.png")
        return [to_svg(figure, "x").encode() for figure in figures] + [
            (tmp_path / f"{place}.png").read_bytes() for place in range(len(figures))
        ]

    plain = draw()
    with mpl.style.context("dark_background"):
        before = dict(mpl.rcParams)
        assert draw() == plain
        assert dict(mpl.rcParams) == before


def test_figures_drawn_in_several_threads_come_out_the_same():
    def draw(size: float) -> str:
        return to_svg(heat_figure({"a.0.q": size}, title="t"), "x")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, range(8))) == [draw(size) for size in range(8)]


# Weights, subspaces, intruders


def test_the_noise_beside_w_is_that_of_a_gaussian_matrix_of_its_size_and_norm():
    shape = (300, 120)
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.linalg.svdvals(W)
    axes = weight_figure(sigma, shape).axes[0]
    noise, own, edge = axes.lines
    assert np.abs(noise.get_ydata() / own.get_ydata() - 1).max() < 0.06, "W is noise, and lies on its curve"
    assert edge.get_ydata()[0] == pytest.approx(float(W.norm()) / math.sqrt(300 * 120) * (300**0.5 + 120**0.5))
    spiked = torch.linalg.svdvals(W + 60 * torch.nn.functional.one_hot(torch.tensor(0), 120))
    assert "1 of 120 above" in texts(weight_figure(spiked, shape))
    with pytest.raises(LoRAError, match=r"`sigma` \(=\(119,\)\) must be all 120 singular values"):
        weight_figure(sigma[1:], shape)


def test_shares_of_w_s_directions_rise_from_none_to_all_and_chance_is_a_straight_line():
    full = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    figure = alignment_figure({"reads": (full[:6].abs(), 40), "writes": (full[:6, :10].abs(), 40)})
    reads, writes = figure.axes
    chance, *shares = reads.lines
    assert [line.get_label() for line in shares] == ["ΔW's first", "first 4", "first 6"]
    assert chance.get_ydata().tolist() == pytest.approx([100 * j / 40 for j in range(1, 41)])
    for line in shares:
        assert np.all(np.diff(line.get_ydata()) >= 0) and line.get_ydata()[-1] == pytest.approx(100)
    assert len(writes.lines[1].get_ydata()) == 10
    assert reads.get_ylim()[1] > 100 and writes.get_ylim() == reads.get_ylim(), "both sides are seen whole"
    assert "no directions yet" in texts(alignment_figure({"reads": (torch.zeros(0, 10), 40)}))


def test_w_in_the_directions_of_dw_is_drawn_between_chance_with_its_spread_and_w_s_own():
    rows = {"layer 0, q_proj": (0.9, 30.0), "GPT-3": (15.9, 1070.0)}
    figure = enrichment_figure({"r = 4": (4, rows), "r = 64": (64, dict(reversed(rows.items())))})
    few, many = figure.axes
    chance, delta, weight = few.lines
    assert chance.get_xdata() == [1, 1] and delta.get_xdata().tolist() == [0.9, 15.9]
    assert weight.get_xdata().tolist() == [30.0, 1070.0]
    assert many.lines[1].get_ydata().tolist() == [1, 0], "a matrix has its own line in all panels"
    assert [label.get_text() for label in few.get_yticklabels()] == list(rows)
    left, right = (panel.patches[0].get_extents().transformed(panel.transData.inverted()) for panel in (few, many))
    draws = [random_directions_hold(4, seed) for seed in range(400)]
    inside = np.mean([left.x0 < share < left.x1 for share in draws])
    assert 0.92 < inside < 0.98 and right.width < left.width / 10, "19 of 20 random directions lie in the band"
    assert "no directions yet" in texts(enrichment_figure({"r = 4": (4, {})}))


def random_directions_hold(r: int, seed: int) -> float:
    """Returns how much of a random W random directions hold, in multiples of the mean."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(40, 48, generator=generator, dtype=torch.float64)
    U, V = (torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))[0] for n in W.shape)
    return float((U.T @ W @ V).norm() / (r * W.norm() / math.sqrt(W.numel())))


def test_panels_of_similarity_share_one_scale_and_say_their_mean():
    panels = {"trained": torch.full((4, 8), 0.5), "chance": torch.full((4, 8), 0.01)}
    figure = similarity_figure(panels, first="r = 4", second="<b>r = 8</b>")
    images = [image for axes in figure.axes for image in axes.images]
    assert [image.get_clim() for image in images] == [(0, 1), (0, 1)]
    said = texts(figure)
    assert "trained, mean 0.50" in said and "chance, mean 0.01" in said and "of r = 4" in said
    assert "<b>" not in to_svg(figure, "x")
    assert "no directions in this basis" in texts(similarity_figure({"trained": torch.zeros(0, 4)}))


def test_intruders_are_framed_and_below_the_threshold():
    cosines = torch.eye(6)[:, [0, 1, 2, 3, 4, 5]] * torch.tensor([1, 0.9, 0.2, 0.95, 0.3, 1.0])
    figure = intruder_figure(cosines, torch.arange(6, 0, -1), 0.5, 0.1)
    above, below = figure.axes[:2]
    assert [patch.get_x() for patch in above.patches] == [2.5, 4.5]
    framed = [bar for bar in below.patches if bar.get_edgecolor() == above.patches[0].get_edgecolor()]
    assert [round(bar.get_height(), 3) for bar in framed] == [0.2, 0.3]
    assert sorted(line.get_ydata()[0] for line in below.lines) == [0.1, 0.5]
    none = intruder_figure(torch.eye(6), torch.ones(6), 0.5, 0.1)
    assert not none.axes[0].patches and "intruder" not in texts(none)


def test_damping_draws_the_control_and_the_base_model_beside_it():
    losses = {"held-out rows": {1.0: (2.0, 2.0), 0.0: (2.5, 2.2)}, "general text": {1.0: (3.0, 3.0), 0.0: (2.9, 2.8)}}
    figure = damping_figure(losses, {"general text": 2.7})
    rows, general = figure.axes
    assert [line.get_label() for line in general.lines] == ["control: ΔW shrunk", "intruders damped", "base model"]
    assert len(rows.lines) == 2 and rows.lines[1].get_ydata().tolist() == [2.5, 2.0]
    assert "Nothing is measured yet" in texts(damping_figure({"held-out rows": {}}, {}))


def test_the_cells_of_a_heat_map_can_be_pointed_at_where_they_are_seen():
    values = {path: float(sigma[0]) for path, sigma in spectra(num_layers=5).items()}
    figure = heat_figure(values, title="σ₁")
    width, height = figure.get_size_inches() * 72
    grid = figure.axes[0].get_window_extent()
    inside = {}
    for path, ((x, y, w, h), words) in figure.regions.items():
        assert x >= 0 and x + w <= width and y >= 0 and y + h <= height
        assert words.startswith(f"{path}: ")
        inside[path] = (round(x, 3), round(y, 3))
    assert inside.keys() == values.keys() and len(set(inside.values())) == len(values)
    area = sum(w * h for (_, _, w, h), _ in figure.regions.values())
    assert area == pytest.approx(grid.width * grid.height * (72 / figure.dpi) ** 2, rel=1e-6), "they cover the map"
    ordered = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(5)]
    assert [inside[path][0] for path in ordered] == sorted(inside[path][0] for path in ordered)
    drawn = ET.fromstring(to_svg(figure, "x"))
    areas = [e for e in drawn.iter() if e.get("data-name")]
    assert [e.get("data-name") for e in areas] == list(values) and areas[0][0].text.startswith(f"{ordered[0]}: ")
    assert not heat_figure({f"a.{i}.b": 1.0 for i in range(MOST_REGIONS + 1)}, title="x").regions
