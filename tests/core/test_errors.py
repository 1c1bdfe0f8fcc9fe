"""A message stays one line that can be shown, whatever it quotes, and says all that is wrong."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import AdapterFileError, LoRAConfig, LoRAError, NonFiniteLossError
from core.errors import listed


@pytest.mark.parametrize(
    ("problems", "words"),
    [
        ([], ""),
        (["up is small"], "up is small"),
        (["up is small", "down is small"], "up is small; down is small"),
        ([f"layers.{i}.up is small" for i in (0, 1, 3)], "layers.0-1,3.up is small"),
        (["layers.0.up is small", "layers.1.up is large"], "layers.0.up is small; layers.1.up is large"),
        (
            ["layers.1.up is small", "head does not exist", "layers.0.up is small"],
            "layers.0-1.up is small; head does not exist",
        ),
        ([f"h.{i}.experts.{j} is small" for i in range(2) for j in range(3)], "h.0-1.experts.0-2 is small"),
        (
            [f"h.{i}.experts.{j} is small" for i, j in [(0, 1), (1, 0)]],
            "h.0.experts.1 is small; h.1.experts.0 is small",
        ),
        (["layers.07.up is small", "layers.7.up is small"], "layers.07.up is small; layers.7.up is small"),
        (["h.0.up: 3 numbers", "h.1.up: 3 numbers"], "h.0-1.up: 3 numbers"),
        (["this model is a/b.1", "this model is a/b.2"], "this model is a/b.1; this model is a/b.2"),
    ],
)
def test_what_repeats_over_numbers_is_said_once_and_nothing_is_left_out(problems, words):
    assert listed(problems) == words


@given(st.sets(st.tuples(st.integers(0, 4), st.sampled_from("ab"), st.integers(0, 4))))
def test_every_problem_can_be_read_out_of_the_row(places):
    row = listed(f"h.{i}.{name}.{j} is wrong" for i, name, j in places)
    read = set()
    for clause in row.split("; ") if row else []:
        _, layers, name, experts = clause.removesuffix(" is wrong").split(".")
        read |= {(i, name, j) for i in numbers(layers) for j in numbers(experts)}
    assert read == places


def numbers(runs: str) -> set[int]:
    bounds = [run.split("-") for run in runs.split(",")]
    return {n for run in bounds for n in range(int(run[0]), int(run[-1]) + 1)}


@pytest.mark.parametrize("text", ["a\nb", "\x1b[2J", "a\0", "\ud800", "\u2028", "\u202e"])
def test_what_cannot_be_printed_is_escaped_and_the_rest_is_left(text):
    message = str(AdapterFileError(f"`Größe “1”` {text}."))
    assert message == f"`Größe “1”` {text.encode('unicode_escape', 'surrogatepass').decode()}."
    assert message.isprintable() and message.encode()


def test_a_message_is_cut_and_survives_a_process_border():
    error = LoRAError("x" * 10**6)
    assert len(str(error)) == 20_000 and str(error).endswith("x…")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_value_that_is_nested_too_deeply_to_be_written_is_refused_all_the_same():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(LoRAError, match=r"`r` \(=a tuple that is nested too deeply\) must be a whole number"):
        LoRAConfig(r=nested)
    while nested:  # taken apart from outside: so deep a list could not be freed at once
        (nested,) = nested


def test_the_attributes_of_an_error_survive_a_process_border():
    error = pickle.loads(pickle.dumps(NonFiniteLossError.of("loss", 3, batch=1, rows=(0, 2), where="x.y")))
    assert (error.what, error.step, error.batch, error.rows, error.where) == ("loss", 3, 1, (0, 2), "x.y")
