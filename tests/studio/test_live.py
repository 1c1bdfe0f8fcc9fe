"""The charts that are drawn while a run goes on: true to the numbers, and safe with any."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio import live


def parsed(html: str) -> ET.Element:
    return ET.fromstring(html)


def drawn(html: str) -> list[list[tuple[float, float]]]:
    """The pieces of each line of a chart, gaps between them, as places in the drawing."""
    lines = [p.get("d") for p in parsed(html).iter("path") if p.get("class") != "grid" and "h0" not in p.get("d")]
    return [[tuple(map(float, place.split())) for place in re.split("[ML]", line) if place] for line in lines]


def spoken(html: str) -> list[str]:
    return [title.text or "" for title in parsed(html).iter("title")]


def test_a_curve_runs_from_the_first_step_to_the_last_and_higher_is_higher():
    (line,) = drawn(live.chart("Loss", [live.Curve("", "red", [(1, 3.0), (2, 1.0), (5, 2.0)])], height=100))
    assert [x for x, _ in line] == [0, 250, 1000]
    top, bottom, middle = (y for _, y in line)
    assert 0 < top < middle < bottom < 100
    assert middle == pytest.approx((top + bottom) / 2, abs=0.1)


def test_two_curves_share_their_axes_and_each_has_its_last_value_in_the_key():
    curves = [
        live.Curve("training", "red", [(1, 2.0), (2, 1.25)]),
        live.Curve("held out", "blue", [(0, 3.0), (2, 1.0)], dots=True),
    ]
    html = live.chart("Loss", curves, height=100)
    first, second = drawn(html)
    assert first[-1][0] == second[-1][0] == 1000 and first[0][0] == 500
    assert first[-1][1] < second[-1][1]
    keys = ["".join(key.itertext()) for key in parsed(html).iter("span") if key.get("class") == "key"]
    assert keys == ["training 1.25", "held out 1"]
    assert parsed(html).find(".//svg").get("aria-label") == "Loss: training 1.25, held out 1"


def test_what_is_not_finite_leaves_a_gap_and_is_said():
    points = [(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0), (5, math.nan)]
    html = live.chart("Loss", [live.Curve("training", "red", points)], height=100)
    assert len(drawn(html)[0]) == 2
    assert parsed(html).find(".//path[@stroke]").get("d").count("M") == 2
    assert "training not finite" in parsed(html).find(".//svg").get("aria-label")


@pytest.mark.parametrize("points", [[], [(1, math.nan)]])
def test_without_a_value_a_sentence_stands_there(points):
    html = live.chart("Loss", [live.Curve("", "red", points)], height=100, empty="Not <yet>.")
    assert "Not <yet>." in "".join(parsed(html).itertext())
    assert parsed(html).find(".//svg") is None


def test_under_the_pointer_stand_the_last_values_up_to_there():
    curves = [live.Curve("a", "red", [(1, 2.0), (2, 1.5), (3, 1.0)]), live.Curve("b", "blue", [(0, 4.0), (2, 3.0)])]
    assert spoken(live.chart("Loss", curves, height=100)) == []  # too small to point at
    assert spoken(live.chart("Loss", curves, height=260)) == [
        "step 1: a 2, b 4",
        "step 2: a 1.5, b 3",
        "step 3: a 1, b 3",
    ]


def test_names_and_titles_are_text():
    html = live.chart("<u>T</u>", [live.Curve('<i title="x">', "red", [(1, 2.0)])], height=100)
    assert not {"i", "u"} & {element.tag for element in parsed(html).iter()}
    assert "".join(parsed(html).find("figcaption").itertext()) == '<u>T</u><i title="x"> 2'


@pytest.mark.parametrize("length", [1, live.MAX_POINTS, live.MAX_POINTS + 1, 12_345, 100_000])
def test_a_long_series_is_thinned_and_keeps_spikes_order_and_its_last_point(length):
    points = [(i, 1.0 + i / length) for i in range(length)]
    points[length // 3], points[length // 2] = (length // 3, 99.0), (length // 2, -99.0)
    kept = live.thin(points)
    assert len(kept) <= live.MAX_POINTS
    assert length > live.MAX_POINTS or kept == points
    assert {points[length // 3], points[length // 2], points[-1]} <= set(kept) <= set(points)
    assert kept == sorted(kept)


def test_a_spike_beside_a_number_that_is_none_is_kept():
    points = [(i, 1.0) for i in range(1_000)]
    points[0], points[1] = (0, math.nan), (1, 99.0)
    assert (1, 99.0) in live.thin(points)


@given(
    st.floats(-1e12, 1e12), st.floats(1e-9, 1e12).filter(lambda width: width > 1e-9), st.integers(3, 8)
)  # with two, none need be inside
def test_ticks_are_round_evenly_spaced_and_inside(low, width, most):
    high = low + width
    if high - low < 1e-6 * abs(low):
        return  # nearer than what floats can tell apart
    found = live.ticks(low, high, most)
    assert 1 <= len(found) <= most + 1
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in found)
    gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert all(gap == pytest.approx(gaps[0], rel=1e-6) for gap in gaps)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30), st.integers(40, 400))
def test_any_numbers_give_a_chart_that_stays_inside_its_frame(values, height):
    html = live.chart("T", [live.Curve("c", "red", list(enumerate(values)), dots=True)], height=height)
    for line in drawn(html):
        assert all(-0.1 <= x <= 1000.1 and -0.1 <= y <= 100.1 for x, y in line)


@pytest.mark.parametrize(
    ("value", "words"), [(0.000998, "9.98e-4"), (1e-12, "1e-12"), (0.00125, "0.00125"), (0, "0"), (12345, "12,345")]
)
def test_numbers_fit_beside_the_axis(value, words):
    assert f"<b>{words}</b>" in live.chart("T", [live.Curve("", "red", [(1, value)])], height=100)


def test_a_closer_look_shows_only_those_steps_and_where_the_lines_go_on():
    training = live.Curve("training", "red", [(step, 9.0 - step) for step in range(9)])
    held_out = live.Curve("held out", "blue", [(0, 100.0), (4, 6.0), (8, 50.0)], dots=True)
    html = live.chart("Loss", [training, held_out], height=260, shown=(3, 5))
    plot = parsed(html).find("div")
    assert plot.get("data-steps") == "3 5" and "closer" in plot.get("class").split()
    one, two = drawn(html)
    assert [x for x, _ in one] == [-500, 0, 500, 1000, 1500] and [x for x, _ in two] == [-1500, 500, 2500]
    assert 0 < one[3][1] < 100 and two[0][1] < 0 and two[2][1] < 0, "the axis is of what is seen"
    assert "training 1" in plot.find("svg").get("aria-label"), "the key says the last values of all"
    assert "data-steps" in live.chart("Loss", [training], height=100)
    between = live.chart("Loss", [held_out], height=100, shown=(5, 7))
    assert [x for x, _ in drawn(between)[0]] == [-500, 1500], "no value there: the line alone"


@pytest.mark.parametrize(("length", "window"), [(39, 0), (40, 4), (97, 8), (399, 20), (4000, 200)])
def test_a_noisy_curve_is_read_by_the_mean_over_a_few_steps_around(length, window):
    values = [math.nan if step % 7 == 3 else math.sin(step) + 2 for step in range(1, length + 1)]
    points = list(zip(range(1, length + 1), values, strict=True))
    noisy, *means = live.with_mean(live.Curve("training", "red", points))
    assert noisy.faint == bool(means) == bool(window)
    for mean in means:
        assert mean.name == f"mean of {window} steps"
        steps = mean.points[:, 0]
        assert steps[0] == window / 2 and 0 <= length - (steps[-1] + window / 2) < window / 4
        for step, value in mean.points:
            counted = [v for s, v in points if step - window / 2 < s <= step + window / 2 and math.isfinite(v)]
            assert value == pytest.approx(sum(counted) / len(counted))


def test_where_no_step_is_finite_neither_is_the_mean():
    points = [(step, math.nan if 20 < step < 30 else 1e200) for step in range(1, 81)]
    _, mean = live.with_mean(live.Curve("", "red", points))
    assert {step for step, value in mean.points if not math.isfinite(value)} == set(range(22, 28))
