"""Twenty pages watch a run while the server is killed under them; the run does not notice."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from core import LoRAConfig, TrainConfig
from studio.runs import Run, Runs
from studio.specs import RunSpec
from studio.workspace import Workspace
from tests.studio.test_doors import Page, Server

NUM_PAGES, STEPS = 20, 1500


def start_again(server: Server, folder: Path) -> None:
    server.process.kill()
    server.process.wait(20)
    again = Server(folder, port=server.port)
    again.wait()
    server.process, again_http = again.process, again.http
    again_http.close()


def watch(server: Server, run: Run, number: int) -> list[str]:
    """Returns the distinct states that a page is shown until the run is over."""
    seen: list[str] = []
    page = None
    deadline = time.monotonic() + 240
    with httpx.Client(base_url=server.http.base_url, timeout=60, trust_env=False) as client:
        while not (seen and seen[-1].endswith("finished")):
            assert time.monotonic() < deadline, seen[-3:]
            try:
                page = page or Page(client, f"page-{number}")
                status = page.look(run.id, train=True)["status"]
            except httpx.HTTPError:  # the server is gone: a page asks again, and is a new session to the next server
                page = None
                time.sleep(0.5)
                continue
            step = re.search(rf"(\d+) of {STEPS}", status)
            chip = re.search(r'class="chip (\w+)"', status)
            assert step and chip
            state = f"{int(step[1]):05d} {chip[1]}"
            if not seen or seen[-1] != state:
                seen.append(state)
            time.sleep(0.5)
    return seen


def test_twenty_pages_watch_a_run_that_survives_its_server(tmp_path, tiny_folder, tiny_data):
    settings = TrainConfig(
        steps=STEPS, batch_size=2, eval_every=100, max_length=64, checkpoint_every=0, device="cpu", precision="fp32"
    )
    run = Runs(Workspace(tmp_path / "workspace")).create(
        RunSpec("Watched", str(tiny_folder), tiny_data, LoRAConfig(r=2), settings)
    )
    run.place = 0.0  # it was queued when the machine went down: the server starts it
    server = Server(tmp_path)
    server.wait()
    with ThreadPoolExecutor(NUM_PAGES) as pool:
        pages = [pool.submit(watch, server, run, number) for number in range(NUM_PAGES)]
        while not run.log.steps:
            assert run.status in ("running", "queued"), run.log_tail()
            time.sleep(0.1)
        started_at = run.log.steps[-1].step
        start_again(server, tmp_path)
        shown = [page.result() for page in pages]
    server.stop()
    assert run.status == "finished"
    assert started_at < STEPS
    assert run.log.steps.columns()["step"].tolist() == list(range(1, STEPS + 1))
    for states in shown:
        steps = [int(state.split()[0]) for state in states]
        assert steps == sorted(steps) and steps[-1] == STEPS
        assert {state.split()[1] for state in states} <= {"queued", "running", "finished"}
    assert any(started_at < int(state.split()[0]) < STEPS for states in shown for state in states)
