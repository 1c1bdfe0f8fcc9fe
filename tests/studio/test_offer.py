"""What serve-api offers: names, folders and the one base model."""

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import time

import openai
import pytest

from core import Adapter, LoRAConfig, LoRAError, TrainConfig, inject
from studio import models
from studio import offer as offered
from studio.runs import Runs
from studio.specs import RunSpec


@pytest.fixture
def trained(write_run, tiny_folder, tiny_data, workspace):
    model = models.load_model(str(tiny_folder), workspace)
    inject(model, LoRAConfig(r=2))
    run = write_run(spec=RunSpec("Inns", str(tiny_folder), tiny_data, LoRAConfig(r=2), TrainConfig()))
    Adapter.from_model(model, base_model=str(tiny_folder)).save(run.adapter_folder)
    return run


@pytest.fixture
def find(workspace):
    return Runs(workspace).get


def test_runs_and_folders_are_offered_by_their_names_or_by_others(trained, find, tiny_folder):
    found = offered.offer([trained.id, f"mine={trained.adapter_folder}"], None, find)
    assert found.base == str(tiny_folder)
    assert found.folders == {trained.id: trained.adapter_folder, "mine": trained.adapter_folder}
    assert found.templates == {trained.id: "chat", "mine": "chat"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "{run}"], r"`ADAPTER` \(=.*\) must have a name of its own; write NAME="),
        (["a b={run}"], r"must have a name of its own"),
        (["{run}", "{other}"], r"`ADAPTER` must be of one base model \(.*: starter\); name it with --base"),
        (["{bare}"], "must have an adapter; .* has none yet"),
        (["nowhere"], "must be a run of this workspace"),
    ],
)
def test_what_cannot_be_offered_is_refused(words, message, trained, write_run, find):
    other = write_run(spec=dataclasses.replace(trained.spec, model="starter"))
    shutil.copytree(trained.adapter_folder, other.adapter_folder)
    ids = {"run": trained.id, "other": other.id, "bare": write_run().id}
    with pytest.raises(LoRAError, match=message):
        offered.offer([word.format(**ids) for word in words], None, find)


def test_an_adapter_is_not_called_like_its_base(trained, find):
    with pytest.raises(LoRAError, match=r"`ADAPTER` \(='starter'\) must have another name than the base model"):
        offered.offer([f"starter={trained.adapter_folder}"], "starter", find)


def test_a_port_that_is_taken_is_named(trained, find, workspace):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LoRAError, match=rf"`--port` \(={port}\) must be a free one from 1 to 65535"):
            offered.serve(offered.offer([trained.id], None, find), workspace, port=port)


def test_the_command_serves_a_run_to_openai_s_client(trained, workspace):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve-api", f"inns={trained.id[:20]}", "--port", str(port), "--workspace", str(workspace.root)]
    process = subprocess.Popen([sys.executable, "-m", "studio", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert "/v1 (Ctrl-C ends)" in process.stdout.readline()
        with openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0) as client:
            for _ in range(100):
                try:
                    names = [model.id for model in client.models.list()]
                    break
                except openai.APIConnectionError:
                    time.sleep(0.1)
            assert names == [trained.spec.model, "inns"]
            said = client.chat.completions.create(
                model="inns", messages=[{"role": "user", "content": "Hi"}], max_tokens=4
            )
            assert json.loads(said.model_dump_json())["usage"]["completion_tokens"] == 4
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
