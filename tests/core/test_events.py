import dataclasses
import json
import typing

import pytest

from core import (
    Checkpointed,
    Evaluated,
    Event,
    Failed,
    Finished,
    LoRAError,
    Noted,
    Resumed,
    SpectrumMeasured,
    Started,
    Step,
    from_record,
    to_record,
)

STEP = Step(3, 1.25, 1e-3, 0.5, num_tokens=120, num_trained_tokens=80, step_seconds=0.5, memory_bytes=1 << 20)
EVENTS = [
    Noted("Reading the model."),
    Started(60, 384, 10_000, "cpu", "float32", "resident memory of the process"),
    STEP,
    Evaluated(10, 0.75, 512, 0.25),
    SpectrumMeasured(10, {"model.layers.0.self_attn.q_proj": [0.5, 0.25], "lm_head": [0.0]}),
    Finished(60, "done", 1 << 30),
    Checkpointed(40, 0.25, 1 << 20),
    Resumed(40),
    Failed("The loss of step 3 is not a finite number."),
]


def test_the_table_below_holds_every_kind_of_event():
    assert {type(e) for e in EVENTS} == set(typing.get_args(Event))


@pytest.mark.parametrize("event", EVENTS, ids=lambda e: type(e).__name__)
def test_an_event_goes_through_a_line_of_json_and_comes_back_equal(event):
    record = to_record(event)
    assert record["event"] == type(event).__name__
    assert from_record(json.loads(json.dumps(record))) == event


@pytest.mark.parametrize("event", EVENTS, ids=lambda e: type(e).__name__)
def test_events_are_frozen(event):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, dataclasses.fields(event)[0].name, None)


def test_reading_a_record_leaves_it_as_it_was():
    record = to_record(STEP)
    from_record(record)
    assert record == to_record(STEP)


@pytest.mark.parametrize("kind", ["Exploded", None, "step"])
def test_an_unknown_kind_is_refused_and_the_known_ones_are_named(kind):
    with pytest.raises(LoRAError, match=rf"`event` \(={kind!r}\) must be one of Noted, Started, Step"):
        from_record({"event": kind, "message": "x"})


def test_a_record_without_a_kind_is_refused():
    with pytest.raises(LoRAError, match=r"`event` \(=None\) must be one of"):
        from_record({"message": "x"})


@pytest.mark.parametrize("record", [{"event": "Noted"}, {"event": "Failed", "message": "x", "extra": 1}])
def test_a_record_whose_fields_do_not_fit_is_refused(record):
    with pytest.raises(LoRAError, match=rf"The record of `{record['event']}` does not fit: "):
        from_record(record)


def test_tokens_per_second_counts_all_tokens_of_the_step():
    assert STEP.tokens_per_second == 240.0
    assert dataclasses.replace(STEP, step_seconds=0.0).tokens_per_second == 0.0
