"""What several tests of the studio need: a tiny model on disk, rows to train it on, and runs written by hand."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from core import Event
from studio.data import DataSpec
from studio.event_log import EventWriter
from studio.runs import Run, Runs
from studio.specs import RunSpec
from studio.workspace import Workspace

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [{"facts": f"name[Inn {i}], stars[{i % 5}]", "text": f"Inn {i} has {i % 5} stars."} for i in range(24)]


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> Path:
    """The cache of a workspace in which it was measured what the libraries take, as each workspace does once."""
    import torch

    from studio.planner import framework_share

    once = Workspace(tmp_path_factory.mktemp("measured"))
    for dtype in (torch.float32, torch.bfloat16):
        framework_share(torch.device("cpu"), once, dtype)
    return once.cache


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A Llama of two layers with random weights and a small tokenizer that writes chats as the starter does."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([text for row in ROWS for text in row.values()], trainer)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=CHATML, **names)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "inns.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="session")
def tiny_data(rows_file) -> DataSpec:
    return DataSpec(source=str(rows_file), prompt="facts", completion="text", instruction="Describe it.")


@pytest.fixture
def write_run(workspace) -> Callable[..., Run]:
    """write_run(events, spec): a run in the state that a worker leaves which said these events and is gone."""

    def write(events: Iterable[Event] = (), spec: RunSpec | None = None) -> Run:
        run = Runs(workspace).create(spec or RunSpec())
        writer = EventWriter(run.log)
        for event in events:
            writer.write(event)
        writer.close()
        return run

    return write


@pytest.fixture
def hold() -> Iterable[Callable[[Run], None]]:
    """hold(run): holds the run's lock as its worker does, until the test ends."""
    import fcntl

    held = []

    def take(run: Run) -> None:
        held.append(os.open(run.folder / "lock", os.O_RDWR | os.O_CREAT))
        fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)

    yield take
    for fd in held:
        os.close(fd)
