"""Which steps of a run its charts show: what a page asks for, and the buttons that say it."""

import math
import re

import pytest

from studio import zoom
from studio.tabs import train
from tests.studio.tabs.pages import STARTED, step


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("", None),
        ("half", (51, 101)),
        ("tenth", (91, 101)),
        ("all of them", None),
        ([20, 40.5], (20, 40.5)),
        ([40, 20], (20, 40)),
        ([20, 20.1], None),
        ([20], None),
        (["20", 40], None),
        ([20, math.nan], None),
        ([-math.inf, 5], None),
        ([10**400, 5], None),
        ({"half": 1}, None),
        (None, None),
    ],
)
def test_what_is_asked_for_becomes_a_first_and_a_last_step(asked, shown):
    assert zoom.read(asked, range(1, 102)) == shown


def test_before_two_steps_there_is_nothing_to_choose_from():
    assert zoom.read([1, 9], []) is zoom.read("half", [1]) is None


def pressed(html: str) -> list[str]:
    return re.findall('aria-pressed="true">([^<]+)<', html)


def test_one_button_is_pressed():
    assert pressed(zoom.bar("", None)) == pressed(zoom.bar([20, 20.1], None)) == pressed(zoom.bar("?", None)) == ["All"]
    assert pressed(zoom.bar("half", (5, 10))) == ["Last half"]
    assert pressed(zoom.bar([19.6, 40.2], (19.6, 40.2))) == ["20 to 40"]


def test_all_charts_of_a_run_show_the_same_steps(write_run):
    run = write_run([STARTED, *(step(number) for number in range(1, 41))])
    whole, closer = (train.view(run, asked)["charts"] for asked in ("", [10, 20]))
    assert pressed(whole) == ["All"] and pressed(closer) == ["10 to 20"]
    ranges = re.findall('data-steps="([0-9.]+ [0-9.]+)"', closer)
    assert len(ranges) >= 5 and set(ranges) == {"10 20"}
    assert set(re.findall('data-steps="([0-9.]+ [0-9.]+)"', whole)) == {"1 40"}
    one = write_run([STARTED, step(1)])
    assert 'class="zoom"' not in train.view(one)["charts"]
