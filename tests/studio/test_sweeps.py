"""Sweeps: a grid of settings is as many runs, and what is wrong with it is said before one is made."""

import dataclasses

import pytest

from core import LoRAConfig, LoRAError
from studio import sweeps
from studio.specs import RunSpec

SPEC = RunSpec("Grid")


def test_a_grid_makes_each_combination_once_and_says_which_it_is():
    made = sweeps.grid(SPEC, sweeps.parse(["r = 4, 8", "", "learning_rate=1e-4,1e-3"]))
    assert [(s.lora.r, s.train.learning_rate) for s in made] == [(4, 1e-4), (4, 1e-3), (8, 1e-4), (8, 1e-3)]
    assert [s.name for s in made][:2] == ["Grid · r 4, learning_rate 1e-4", "Grid · r 4, learning_rate 1e-3"]
    assert len({s.name for s in made}) == 4


def test_values_with_commas_stand_between_semicolons():
    made = sweeps.grid(SPEC, sweeps.parse(["target_modules = q_proj, v_proj; all-linear"]))
    assert [s.lora.target_modules for s in made] == [("q_proj", "v_proj"), "all-linear"]


def test_no_values_make_the_one_run_as_it_is():
    assert sweeps.grid(SPEC, sweeps.parse([])) == [SPEC]


def test_all_else_stays():
    spec = RunSpec("x", "model", lora=LoRAConfig(r=3, alpha=5, dora=True))
    (made,) = sweeps.grid(spec, {"r": ["7"]})
    assert made == dataclasses.replace(spec, name="x · r 7", lora=LoRAConfig(r=7, alpha=5, dora=True))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["r"], r"`sweep` \(='r'\) must be a setting and its values, once each: r = 4, 8, 16"),
        (["r = "], r"`sweep` \(='r ='\) must be a setting and its values"),
        (["r = 4", "r = 8"], r"`sweep` \(='r = 8'\) must be a setting and its values, once each"),
        (["rank = 4"], r"`rank` \(='4'\) must be a setting; there are r, alpha, dropout"),
        (["r = 4, 0"], r"`r` \(=0\) must be at least 1"),
        (["r = 4, many"], r"`r` \(='many'\) must be a whole number"),
        (
            ["r = " + ",".join(map(str, range(1, 22))), "seed = " + ",".join(map(str, range(10)))],
            r"\(=21 × 10\) must make",
        ),
    ],
)
def test_a_wrong_grid_is_refused_in_one_sentence(lines, message):
    with pytest.raises(LoRAError, match=message):
        sweeps.grid(SPEC, sweeps.parse(lines))
