"""Jobs and the worker: a run in a process of its own, from a spec to an adapter, or to a sentence that says why not."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import time

import pytest
import torch

from core import (
    Adapter,
    Evaluated,
    Event,
    Failed,
    Finished,
    LoRAConfig,
    LoRAError,
    MemoryForecast,
    Noted,
    Started,
    Step,
    TrainConfig,
    lora_layers,
    strength,
)
from studio import data, jobs, models, setup, worker
from studio.event_log import EventWriter
from studio.remedies import for_memory, remedies
from studio.runs import KILLED, Run, Runs
from studio.specs import RunSpec

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT

STEP = Step(3, 1.25, 1e-3, 0.5, num_tokens=120, num_trained_tokens=80, step_seconds=0.5, memory_bytes=1 << 20)
TRAIN = TrainConfig(
    steps=4,
    batch_size=4,
    learning_rate=1e-2,
    warmup_steps=1,
    eval_every=2,
    max_length=128,
    device="cpu",
    precision="fp32",
)
FOREVER = dataclasses.replace(TRAIN, steps=1_000_000)


@pytest.fixture
def spec(tiny_folder, tiny_data) -> RunSpec:
    return RunSpec("Tiny", str(tiny_folder), tiny_data, LoRAConfig(r=4), TRAIN)


@pytest.fixture
def work(workspace):
    """work(spec, …): runs a worker in this process to its end; returns the exit code and the run."""

    def run_worker(spec: RunSpec, prepare=lambda run: None) -> tuple[int, Run]:
        run = Runs(workspace).create(spec)
        prepare(run)
        return worker.main([str(run.folder)]), run

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield run_worker
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def reap():
    """Ends what `jobs.start` started and a failed test left going."""
    yield
    for child in jobs._children:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        child.wait()
    jobs._children.clear()


def all_linear(r: int) -> int:
    """Entries of A and B on every matrix of the tiny Llama but its head."""
    width, inner, key_value = 32, 48, 16
    attention = [(width, width), (key_value, width), (key_value, width), (width, width)]
    mlp = [(inner, width), (inner, width), (width, inner)]
    return 2 * sum(r * (rows + columns) for rows, columns in attention + mlp)


# The worker


def test_a_run_goes_from_reading_the_data_to_an_adapter(work, spec, tiny_folder, workspace):
    code, run = work(spec)
    events = list(run.follow())
    assert (code, run.status) == (0, "finished")
    told = [type(event).__name__ for event in events]
    assert told[told.index("Started") :] == (
        ["Started", "Evaluated"]
        + ["Step", "Step", "Evaluated", "Checkpointed"]  # the best so far, and so is the next
        + ["Step", "SpectrumMeasured", "Step", "Evaluated", "Checkpointed", "Finished"]
    )
    assert set(told[: told.index("Started")]) == {"Noted"}
    notes = [note.message for note in run.log.notes]
    assert notes[0] == "Reading the data"
    assert "24 rows: 22 to train on, 2 held out." in notes
    assert notes[-1] == f"Training {all_linear(4):,} parameters in 14 matrices"
    started = run.log.started
    assert (started.num_steps, started.num_trainable, started.device) == (4, all_linear(4), "cpu")
    base = models.load_model(str(tiny_folder), workspace)
    assert started.num_parameters - started.num_trainable == sum(p.numel() for p in base.parameters())
    assert [s.step for s in run.log.steps] == [1, 2, 3, 4]
    assert [e.step for e in run.log.evaluations] == [0, 2, 4]
    assert run.log.evaluations[-1].loss < run.log.evaluations[0].loss
    assert dataclasses.replace(run.log.end, peak_memory_bytes=0) == Finished(4, "done", 0)


@pytest.fixture
def prompt(spec, workspace, tiny_folder) -> torch.Tensor:
    tokenizer = models.load_tokenizer(str(tiny_folder), workspace)
    return torch.tensor([data.prompt_ids([{"role": "user", "content": "name[Inn 7]"}], tokenizer)])


def test_the_adapter_is_the_same_to_us_and_to_peft_and_leaves_the_base_as_it_was(
    work, spec, prompt, tiny_folder, workspace
):
    from peft import PeftModel

    files = {p.name: p.read_bytes() for p in tiny_folder.iterdir()}
    _, run = work(spec)
    assert {p.name: p.read_bytes() for p in tiny_folder.iterdir()} == files
    adapter = Adapter.load(run.adapter_folder)
    assert adapter.base_model == spec.model
    assert adapter.num_parameters == all_linear(4)
    base, ours = (models.load_model(spec.model, workspace) for _ in range(2))
    adapter.apply(ours)
    assert len(lora_layers(ours)) == 14
    with torch.no_grad():
        before, adapted = base(prompt).logits, ours(prompt).logits
        assert (adapted - before).abs().max() > 0.01
        with strength(ours, 0.0):
            assert torch.equal(ours(prompt).logits, before)
        theirs = PeftModel.from_pretrained(base, str(run.adapter_folder))
        torch.testing.assert_close(adapted, theirs(prompt).logits, rtol=0, atol=1e-4)


def test_the_same_spec_gives_the_same_run(work, spec):
    runs = [work(spec)[1] for _ in range(2)]
    for run in runs:
        run.log.refresh()
    first, second = ([s.loss for s in run.log.steps] for run in runs)
    assert first == second
    a, b = (Adapter.load(run.adapter_folder) for run in runs)
    assert all(torch.equal(a.factors[path].B, b.factors[path].B) for path in a.factors)
    _, other = work(dataclasses.replace(spec, train=dataclasses.replace(TRAIN, seed=1)))
    other.log.refresh()
    assert [s.loss for s in other.log.steps] != first


def test_a_request_to_stop_saves_and_ends_after_the_step_at_hand(work, spec, monkeypatch):
    write, made = EventWriter.write, []

    def write_and_ask(self, event: Event) -> None:
        write(self, event)
        if isinstance(event, Step) and event.step == 3:
            made[0].ask_to_stop()

    monkeypatch.setattr(EventWriter, "write", write_and_ask)
    forever = dataclasses.replace(spec, train=dataclasses.replace(FOREVER, eval_every=0))
    code, run = work(forever, prepare=made.append)
    assert (code, run.status) == (0, "stopped")
    assert (run.log.steps[-1].step, run.log.end.step, run.log.end.reason) == (3, 3, "stopped")
    factors = Adapter.load(run.adapter_folder).factors.values()
    assert all(f.B.abs().max() > 0 for f in factors)


@pytest.mark.parametrize("eval_fraction", [0.1, 0.0])
def test_the_adapter_is_there_before_an_evaluation_or_the_end_is_told(eval_fraction, work, spec, monkeypatch):
    write, made, seen = EventWriter.write, [], []

    def look_and_write(self, event: Event) -> None:
        seen.append((type(event), made[0].has_adapter))
        write(self, event)

    monkeypatch.setattr(EventWriter, "write", look_and_write)
    rows = dataclasses.replace(spec.data, eval_fraction=eval_fraction)
    assert work(dataclasses.replace(spec, data=rows), prepare=made.append)[0] == 0
    assert [has for kind, has in seen if kind is Finished] == [True]
    assert [has for kind, has in seen if kind is Evaluated] == ([False, True, True] if eval_fraction else [])


def test_a_request_before_the_first_step_ends_the_run_without_an_adapter(work, spec):
    code, run = work(spec, prepare=lambda run: run.ask_to_stop())
    assert (code, run.status, run.has_adapter) == (0, "stopped", False)
    assert run.log.end == Finished(0, "stopped", 0)


FAULTS = {
    "missing file": ({"data": {"source": "/no/such.csv"}}, r"`source` \(='/no/such\.csv'\) must be a file that exists"),
    "unknown starter": ({"data": {"source": "starter:x"}}, r"`source` \(='starter:x'\) must be a starter data set"),
    "missing column": (
        {"data": {"prompt": "question"}},
        r"`prompt` \(='question'\) must be a column of inns\.jsonl; it",
    ),
    "no row fits": (
        {"train": {"max_length": 8}},
        r"No row of inns\.jsonl can be trained on \(row 1: its answer begins",
    ),
    "no matrix fits": (
        {"lora": {"target_modules": ["qq"]}},
        r"`target_modules` \(=qq\) must match at least one matrix",
    ),
    "r too large": ({"lora": {"r": 17}}, r"`r` \(=17\) must be at most 16 to fit"),
    "no such device": ({"train": {"device": "cuda:99"}}, r"`device` \(='cuda:99'\) must be one that this machine has"),
    "diverged": (
        {"train": {"learning_rate": 10, "clip_norm": 0, "steps": 500}},
        r"The \w+ of step \d+ is not a finite",
    ),
}


@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_what_goes_wrong_ends_the_run_with_one_sentence(changes, message, work, spec, caplog):
    values = spec.to_dict()
    for part, new in changes.items():
        values[part] |= new
    if "learning_rate" in changes.get("train", {}):
        values["lora"]["alpha"] = 1e30
    code, run = work(RunSpec.from_dict(values))
    assert (code, run.status) == (1, "failed")
    assert_one_sentence(run.log.end, message)
    assert any(record.exc_info for record in caplog.records)


def assert_one_sentence(end, message: str) -> None:
    assert isinstance(end, Failed)
    assert re.match(message, end.message)
    assert "\n" not in end.message and "Traceback" not in end.message


def test_a_damaged_spec_fails_the_run_and_names_the_file(work, spec):
    code, run = work(spec, prepare=lambda run: (run.folder / "spec.json").write_text("{"))
    assert (code, run.status) == (1, "failed")
    assert_one_sentence(run.log.end, r"`SPEC` \(='.*spec\.json'\) must be a JSON file")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), r"Not enough memory for batch size 4 × 128 tokens; halve the batch size"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), r"Not enough memory for batch size 4"),
        (
            OSError(28, "No space left on device"),
            r"The disk is full, so the run is paused\. Free some space on the disk of",
        ),
        (KeyError("boo"), r"An error that was not foreseen: KeyError: 'boo' \(the whole of it is in .*worker\.log\)"),
    ],
    ids=["memory", "torch's allocator", "disk", "unforeseen"],
)
def test_what_only_the_machine_can_cause_is_told_with_the_next_step(error, message, work, spec, monkeypatch, caplog):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("studio.setup.apply_method", fail)
    code, run = work(spec)
    assert (code, run.status) == (1, "paused" if isinstance(error, OSError) else "failed")
    assert_one_sentence(run.log.end, message)


def test_memory_that_this_machine_really_does_not_have_is_a_failure_for_memory(work, spec, monkeypatch):
    """Torch's own error, in its own words, and not one that was written down here."""
    monkeypatch.setattr("studio.setup.apply_method", lambda *args, **options: torch.empty(2**60, dtype=torch.uint8))
    _, run = work(spec)
    assert (run.status, run.log.end.cause) == ("failed", "memory")
    assert run.log.end.predicted_bytes


def failing_after(num_steps: int):
    """`train`, but for want of memory after so many steps."""
    real = worker.train

    class Failing:
        def __init__(self, *args, **options):
            self._training = real(*args, **options)
            self._events = iter(self._training)

        def __getattr__(self, name):
            return getattr(self._training, name)

        def __iter__(self):
            return self

        def __next__(self):
            if self._training.step == num_steps:
                raise MemoryError
            return next(self._events)

    return Failing


def test_a_failure_for_memory_says_what_it_was_to_take_and_what_each_remedy_would(work, spec, monkeypatch):
    def fail(*args, **options):
        raise MemoryError

    monkeypatch.setattr(worker, "train", fail)
    _, run = work(spec)
    assert (run.status, run.log.end.cause) == ("failed", "memory")
    sizes = run.log.end.predicted_bytes
    terms = {name: size for name, size in sizes.items() if name in MemoryForecast.__dataclass_fields__}
    assert sizes.keys() - terms.keys() == {remedy.label for remedy in remedies(run)}
    assert len(sizes) == 5 + 5 and all(0 < size < sum(terms.values()) for size in sizes.values())
    half = sizes["Batch size 2, accumulation 2"] - sum(terms.values()) + terms["activations"]
    assert half == pytest.approx(terms["activations"] / 2, rel=0.1)


def test_with_fewer_targets_a_run_that_lacked_memory_goes_on_from_its_checkpoint(work, spec, monkeypatch, workspace):
    spec = dataclasses.replace(spec, lora=dataclasses.replace(spec.lora, target_modules="all-linear"))
    with monkeypatch.context() as patch:
        patch.setattr(worker, "train", failing_after(3))
        _, run = work(spec)
    (fewer,) = (remedy for remedy in remedies(run) if remedy.label == "Query and value alone")
    assert (
        0
        < fewer.predicted_bytes
        < sum(run.log.end.predicted_bytes.get(name, 0) for name in MemoryForecast.__annotations__)
    )
    mended = Runs(workspace).create(fewer.spec)
    assert worker.main([str(mended.folder)]) == 0
    assert (mended.status, [s.step for s in mended.log.steps]) == ("finished", [1, 2, 3, 4])
    assert "The checkpoint also has 20 tensors that this run does not train; they are left out" in {
        note.message for note in mended.log.notes
    }
    factors = Adapter.load(mended.adapter_folder).factors
    assert {path.rpartition(".")[2] for path in factors} == {"q_proj", "v_proj"}
    before = Adapter.load(run.checkpoints.at(2)).factors
    path = next(iter(factors))
    assert not torch.equal(before[path].A, factors[path].A)
    torch.testing.assert_close(before[path].A, factors[path].A, rtol=0, atol=0.1)  # it went on from there


@pytest.mark.parametrize(
    ("targets", "model", "is_offered"),
    [("all-linear", "llama", True), (("q_proj", "v_proj"), "llama", False), ("all-linear", "no attention", False)],
)
def test_fewer_targets_are_offered_where_there_are_fewer(targets, model, is_offered, work, spec, monkeypatch):
    def fail(*args, **options):
        raise MemoryError

    if model == "no attention":
        monkeypatch.setattr("studio.remedies.QUERY_AND_VALUE", "no_such_matrix")
    monkeypatch.setattr(worker, "train", fail)
    _, run = work(dataclasses.replace(spec, lora=dataclasses.replace(spec.lora, target_modules=targets)))
    assert ("Query and value alone" in {remedy.label for remedy in remedies(run)}) == is_offered
    assert len(remedies(run)) == 4 + is_offered


def test_on_several_devices_the_weights_may_be_split(spec):
    train = dataclasses.replace(spec.train, device="cpu,cpu")
    changes = [remedy.spec.train.shard_weights for remedy in for_memory(dataclasses.replace(spec, train=train))]
    assert changes.count(True) == 1
    train = dataclasses.replace(train, shard_weights=True)
    assert all(remedy.spec.train.shard_weights for remedy in for_memory(dataclasses.replace(spec, train=train)))


def test_a_remedy_of_memory_trains_on_from_the_last_checkpoint(work, spec, monkeypatch, workspace):
    """With activation checkpointing the same steps are taken, to rounding."""
    with monkeypatch.context() as patch:
        patch.setattr(worker, "train", failing_after(3))
        _, run = work(spec)
    assert (run.status, run.checkpoints.steps()) == ("failed", [2])
    by_label = {remedy.label: remedy.spec for remedy in remedies(run)}
    mended = Runs(workspace).create(by_label["Activation checkpointing (slower)"])
    assert mended.spec.continues == f"{run.id}@2"
    assert worker.main([str(mended.folder)]) == 0
    _, whole = work(spec)
    assert whole.status == mended.status == "finished"
    assert [s.step for s in mended.log.steps] == [1, 2, 3, 4]
    assert [s.loss for s in mended.log.steps] == pytest.approx([s.loss for s in whole.log.steps], rel=1e-5)


def test_rows_that_cannot_be_trained_on_are_a_failure_of_the_data(work, spec):
    _, run = work(dataclasses.replace(spec, data=dataclasses.replace(spec.data, prompt="nothing")))
    assert (run.status, run.log.end.cause) == ("failed", "data")
    assert "must be a column of" in run.log.end.message


def test_a_loss_that_is_not_finite_names_the_rows_of_the_data_and_offers_a_smaller_rate(work, spec, monkeypatch):
    real = setup.apply_method

    def spoil(model, *args, **options):
        injection = real(model, *args, **options)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.base_layer.weight[0, 0] = float("nan")
        return injection

    monkeypatch.setattr("studio.setup.apply_method", spoil)
    _, run = work(dataclasses.replace(spec, data=dataclasses.replace(spec.data, eval_fraction=0.0)))
    assert (run.status, run.log.end.cause) == ("failed", "loss")
    found = re.fullmatch(
        r"The loss of step 1 is not a finite number in row ([\d, ]+) of the data, first in "
        r"model\.layers\.1\.mlp\.up_proj\.base_layer; try a smaller learning rate, .*",
        run.log.end.message,
    )
    assert found and len(found[1].split(", ")) == 4 and all(1 <= int(n) <= 24 for n in found[1].split(", "))
    assert [remedy.label for remedy in remedies(run)] == ["Learning rate 0.0033"]


def test_a_gradient_that_exploded_is_a_failure_with_its_cause_and_offers_a_smaller_rate(work, spec):
    train = dataclasses.replace(spec.train, explosion_norm=1e-3)
    _, run = work(dataclasses.replace(spec, train=train))
    assert (run.status, run.log.end.cause) == ("failed", "gradient")
    assert run.log.end.message.startswith("The gradient of step 1 has exploded: its length is ")
    assert [remedy.label for remedy in remedies(run)] == ["Learning rate 0.0033"]


def test_a_worker_refuses_a_run_that_another_holds(spec, workspace, hold):
    run = Runs(workspace).create(spec)
    hold(run)
    with pytest.raises(LoRAError, match=rf"Run {run.id} is running already"):
        worker.main([str(run.folder)])
    assert run.log.refresh() == []


# Starting and following


def test_a_worker_that_fails_at_once_says_why_in_log_and_exit_code(workspace, spec, reap, capsys):
    run = jobs.start(Runs(workspace), dataclasses.replace(spec, model="/no/such/folder"))
    code = jobs.follow(run)
    assert (code, run.status) == (1, "failed")
    assert_one_sentence(run.log.end, r"`model` \(='/no/such/folder'\) must be ")
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["Reading the data", f"Failed: {run.log.end.message}"]
    log = run.worker_log.read_text()
    assert "Traceback (most recent call last):" in log
    assert f"LoRAError: {run.log.end.message}" in log


def wait_for_a_step(run: Run) -> None:
    deadline = time.monotonic() + 60
    while not run.log.steps:
        assert run.status == "running" and time.monotonic() < deadline, run.log_tail()
        time.sleep(0.05)


def test_a_worker_lives_on_its_own_and_saves_when_it_is_ended(workspace, spec, reap):
    run = jobs.start(Runs(workspace), dataclasses.replace(spec, train=FOREVER))
    assert run.status == "running"
    wait_for_a_step(run)
    (child,) = jobs._children
    assert os.getsid(child.pid) == child.pid != os.getsid(0)
    child.send_signal(signal.SIGTERM)
    assert jobs.follow(run) == 0
    assert run.status == "stopped"
    assert run.log.steps[-1].step == run.log.end.step
    assert Adapter.load(run.adapter_folder).num_parameters == all_linear(4)
    assert "everything is saved" in run.log_tail()


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Noted("Reading the data"), "Reading the data"),
        (Started(60, 384, 10_000, "cpu", "bfloat16", "x"), "60 steps on cpu, weights in bfloat16"),
        (STEP, None),
        (Evaluated(10, 0.75, 512, 0.25), "step    10  held-out loss 0.7500  (over 512)"),
        (Finished(60, "done", 1_500_000_000), "Done after step 60; peak memory 1.50 GB"),
        (Finished(7, "stopped", 0), "Stopped after step 7; peak memory 0.00 GB"),
        (Failed("No row."), "Failed: No row."),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_terminal_shows_one_line_an_event_but_none_for_steps(event, line, write_run, capsys):
    assert jobs.as_line(event) == line
    jobs.follow(write_run([event]))
    told = "" if isinstance(event, Finished | Failed) else jobs.as_line(Failed(KILLED.format("The worker"))) + "\n"
    assert capsys.readouterr().out == (f"{line}\n" if line else "") + told


EVENTS = [Noted("«x»\nline"), Started(1, 2, 3, "cpu", "float32", "x"), STEP, Evaluated(3, 0.5, 9, 0.1)]


def test_as_json_every_event_is_one_line_of_json(write_run, capsys):
    done = Finished(3, "done", 0)
    assert jobs.follow(write_run([*EVENTS, done]), as_json=True) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["Noted", "Started", "Step", "Evaluated", "Finished"]
    assert lines[2] == {"event": "Step", **dataclasses.asdict(STEP)}


@pytest.mark.parametrize(
    ("events", "code"),
    [
        ([Finished(3, "done", 0)], 0),
        ([Finished(3, "stopped", 0)], 0),
        ([Failed("No row.")], 1),
        ([STEP], 1),
        ([], 1),
    ],
)
def test_the_exit_code_is_0_only_where_the_run_ended_well(events, code, write_run, capsys):
    run = write_run(events)
    assert jobs.follow(run) == code
    lost = f"lora-studio: the worker ended without a word; see {run.worker_log}.\n"
    assert capsys.readouterr().err == (lost if run.status == "interrupted" else "")


def interrupt(run: Run, times: int, events: list[Event], monkeypatch) -> None:
    """Presses Ctrl-C `times` times while the run is followed; after that, `events` come."""
    pressed = []

    def sleep(seconds: float) -> None:
        if len(pressed) < times:
            pressed.append(1)
            raise KeyboardInterrupt
        writer = EventWriter(run.log)
        for event in events:
            writer.write(event)
        writer.close()
        monkeypatch.setattr(Run, "is_running", lambda self: False)

    monkeypatch.setattr(Run, "is_running", lambda self: True)
    monkeypatch.setattr("studio.runs.time.sleep", sleep)


def test_ctrl_c_asks_the_worker_to_stop_and_goes_on_following(write_run, capsys, monkeypatch):
    run = write_run([Noted("Reading")])
    interrupt(run, 1, [Evaluated(3, 0.5, 9, 0.1), Finished(3, "stopped", 0)], monkeypatch)
    assert jobs.follow(run) == 0
    assert run.stop_asked
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["Reading", "step", "Stopped"]
    assert "Ctrl-C again leaves without waiting" in printed.err


def test_a_second_ctrl_c_leaves_the_worker_alone(write_run, monkeypatch):
    run = write_run([Noted("Reading")])
    interrupt(run, 2, [], monkeypatch)
    try:
        jobs.follow(run)
    except KeyboardInterrupt:
        assert run.stop_asked
    else:
        pytest.fail("the second Ctrl-C was swallowed")


@pytest.fixture(autouse=True)
def quiet_log():
    """The worker sets up logging for its whole process; here that is pytest's."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
