"""The commands that list and steer runs, for people and with --json."""

import json
import subprocess

import pytest
import torch

from core import Evaluated, Failed, Finished, Step, resolve_device
from studio import __main__ as cli
from studio import jobs
from studio.event_log import EventWriter
from studio.runs import Run, Runs
from studio.specs import RunSpec

STEP = Step(3, 1.25, 1e-3, 0.5, num_tokens=120, num_trained_tokens=80, step_seconds=0.5, memory_bytes=1 << 20)


@pytest.fixture
def command(workspace, capsys, monkeypatch):
    """command(*words): runs them in this process; returns exit code, out and err. No worker is started."""
    monkeypatch.setenv("LORA_STUDIO_HOME", str(workspace.root))
    monkeypatch.setattr(jobs, "_detached", lambda *_: subprocess.Popen(["true"]))

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    yield run
    for child in jobs._children:
        child.wait()
    jobs._children.clear()


def two_gpus(monkeypatch) -> None:
    """Torch reports two GPUs; this machine need not have one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (i * 10**9, 8 * 10**9))


@pytest.fixture
def runs(workspace) -> Runs:
    return Runs(workspace)


@pytest.fixture
def spec_file(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(RunSpec("Grid").to_dict()))
    return path


def ended(runs: Runs, name: str) -> Run:
    run = runs.create(RunSpec(name))
    writer = EventWriter(run.log)
    for event in (STEP, Evaluated(3, 0.5, 99, 0.1), Finished(3, "stopped", 1)):
        writer.write(event)
    writer.close()
    return run


def test_runs_are_listed_with_state_and_loss(command, runs):
    run = ended(runs, "First")
    code, out, _ = command("runs")
    assert code == 0
    assert out.split()[:2] == [run.id, "stopped"] and "3 of 60" in out and out.rstrip().endswith("First")
    code, out, _ = command("runs", "--json")
    assert json.loads(out) == [
        {
            "id": run.id,
            "name": "First",
            "status": "stopped",
            "step": 3,
            "steps": 60,
            "held_out_loss": 0.5,
            "adapter": None,
        }
    ]


def test_a_damaged_run_is_listed_as_that(command, runs):
    run = runs.create(RunSpec("x"))
    (run.folder / "spec.json").write_text("{")
    code, out, _ = command("runs", "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert (row["id"], row["status"]) == (run.id, "damaged") and "must be a JSON file" in row["problem"]


def test_a_sweep_is_queued_in_order_moved_and_cancelled(command, runs, spec_file, hold):
    hold(runs.create(RunSpec("on the device")))
    code, out, _ = command("queue", spec_file, "--sweep", "r=4,8", "--sweep", "seed=1,2", "--steps", "9", "--json")
    assert code == 0
    assert [(row["name"], row["status"], row["steps"]) for row in json.loads(out)] == [
        (f"Grid · r {r}, seed {seed}", "queued", 9) for r in (4, 8) for seed in (1, 2)
    ]
    ids = [row["id"] for row in json.loads(command("queue", "--json")[1])]
    code, out, _ = command("queue", "--move", ids[3], "-3", "--json")
    assert [row["id"] for row in json.loads(out)] == [ids[3], *ids[:3]]
    code, out, _ = command("queue", "--cancel", ids[0], "--json")
    assert [row["id"] for row in json.loads(out)] == [ids[3], *ids[1:3]]
    code, out, _ = command("stop", ids[1], "--json")  # a queued run is stopped by taking it out
    assert json.loads(out)[0]["status"] == "stopped"
    assert [run.id for run in runs.queued()] == [ids[3], ids[2]]


def test_a_failed_run_tells_its_cause_and_what_may_help_which_resume_takes_by_number(command, runs, monkeypatch):
    sizes = {"weights": 3, "Rows of at most 128 tokens": 2_000_000_000, "Batch size 2, accumulation 2": 10**9}
    run = runs.create(RunSpec("x"))
    writer = EventWriter(run.log)
    writer.write(Failed("Not enough memory.", "memory", sizes))
    writer.close()
    failed = json.loads(command("runs", "--json")[1])[0]["failed"]
    assert (failed["cause"], failed["predicted_bytes"]) == ("memory", sizes)
    assert failed["remedies"] == ["Batch size 2, accumulation 2", "Rows of at most 128 tokens"]
    assert "--remedy 2: Rows of at most 128 tokens, about 2.00 GB" in command("runs")[1]
    monkeypatch.setattr(jobs, "follow", lambda run, as_json: print(run.spec.train.max_length) or 0)
    assert command("resume", run.id, "--remedy", "2")[:2] == (0, "128\n")
    for words in (("--remedy", "3"), ("--remedy", "0"), ("--remedy", "1", "--further", "2")):
        code, _, err = command("resume", run.id, *words)
        assert code == 2 and "one of the 2 that `lora-studio runs` offers" in err


def test_a_killed_run_is_listed_with_its_cause(command, runs):
    run = runs.create(RunSpec("x"))
    writer = EventWriter(run.log)
    writer.write(STEP)
    writer.close()
    (row,) = json.loads(command("runs", "--json")[1])
    assert (row["status"], row["failed"]["cause"], row["failed"]["remedies"]) == ("interrupted", "killed", [])


def test_devices_are_listed_with_their_free_memory(command, monkeypatch):
    assert command("devices") == (0, f"No GPU that torch can use; training runs on: {resolve_device('auto')}\n", "")
    two_gpus(monkeypatch)
    assert json.loads(command("devices", "--json")[1])[1] == {
        "device": "cuda:1",
        "title": "GPU 1",
        "free_bytes": 10**9,
        "total_bytes": 8 * 10**9,
    }
    assert command("devices")[1].splitlines()[0].split() == ["cuda:0", "0.0", "of", "8.0", "GB", "free", "GPU", "0"]


@pytest.mark.parametrize(("name", "reason"), [("pause", "paused"), ("stop", "stopped")])
def test_pause_and_stop_ask_the_worker_and_wait_for_it(name, reason, command, runs, monkeypatch):
    run = runs.create(RunSpec("x"))

    def answer(self: Run):  # as a worker does, once it is asked
        writer = EventWriter(self.log)
        writer.write(Finished(3, self.stop_asked, 1))
        writer.close()
        monkeypatch.setattr(Run, "is_running", lambda self: False)
        return iter(())

    monkeypatch.setattr(Run, "is_running", lambda self: True)
    monkeypatch.setattr(Run, "follow", answer)
    code, out, _ = command(name, run.id, "--json")
    assert (code, json.loads(out)[0]["status"]) == (0, reason)


def test_resume_starts_the_worker_again(command, runs, monkeypatch):
    run = ended(runs, "x")
    run.ask_to_stop()
    followed = []
    monkeypatch.setattr(jobs, "follow", lambda run, as_json: followed.append((run.id, as_json)) or 0)
    code, _, _ = command("resume", run.id[:-1])
    assert (code, followed) == (0, [(run.id, False)])
    assert len(jobs._children) == 1 and not run.stop_asked


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("stop", "RUN"), "must be running or queued to be ended; it is stopped"),
        (("stop", "no-such"), "`RUN` (='no-such') must be, or begin like, the id of one run, not of 0"),
        (("stop", "2"), "`RUN` (='2') must be, or begin like, the id of one run, not of 2"),
        (("resume", "RUN", "--further", "0"), "`steps` (=0) must be at least 1"),
        (("resume", "RUN", "--further", "5"), "must have a checkpoint to be trained further; it has none"),
        (("queue", "--move", "RUN", "up"), "`--move` (='up') must be given a whole number of places, such as -1"),
        (("queue", "--move", "RUN", "1"), "must be queued to be moved; it is stopped"),
        (("queue", "--sweep", "r=4"), "`--sweep` must come with the SPEC whose settings it varies"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(words, sentence, command, runs):
    run, _ = ended(runs, "x"), ended(runs, "y")
    code, out, err = command(*(run.id if word == "RUN" else word for word in words))
    assert (code, out) == (2, "")
    assert err.startswith("lora-studio: ") and sentence in err and err.count("\n") == 1
