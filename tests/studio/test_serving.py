"""Serving: the real OpenAI client talks to a real server, and gets what the engine says."""

import asyncio
import concurrent.futures
import copy
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest
import torch
import uvicorn

from core import Adapter, LoRAConfig, LoRAError, inject, lora_layers
from studio import models, serving
from studio.chat import Engine
from studio.data import prompt_ids
from studio.panes import Pane
from studio.sampling import ChatSettings

HELLO = [{"role": "user", "content": "name[Inn 3]"}]
LENGTH = 10
CAT, NO_TEXT = {"role": "cat", "content": "x"}, {"role": "user", "content": 3}
LONG = {"role": "user", "content": "x " * 400}


@pytest.fixture(scope="module")
def parts(tiny_folder, tmp_path_factory):
    """The tiny model's engine with adapters "inns" and "stars", and its tokenizer."""
    from studio.workspace import Workspace

    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    model = models.load_model(str(tiny_folder), workspace)
    adapters = {}
    for seed, name in enumerate(("inns", "stars")):
        adapted = copy.deepcopy(model)
        inject(adapted, LoRAConfig(r=2, target_modules=("q_proj", "down_proj")))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in lora_layers(adapted).values():
                layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=generator))
        adapters[name] = Adapter.from_model(adapted)
    engine = Engine(model, lambda name, step: adapters[name], frozenset())
    return engine, models.load_tokenizer(str(tiny_folder), workspace)


@pytest.fixture(scope="module")
def server(parts):
    """A real server on a free port; its address."""
    engine, tokenizer = parts
    offered = {"tiny": (Pane(), "chat"), "inns": (Pane("inns"), "chat"), "stars": (Pane("stars"), "plain")}
    turns = serving.Turns(engine)
    app = serving.application(serving.Service(turns, tokenizer, offered))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", ws="none", lifespan="off"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join()
    turns.close()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(parts, pane: Pane, ids: list[int], **settings) -> str:
    engine, tokenizer = parts
    *_, last = engine.answer(pane, ids, ChatSettings(LENGTH, **settings))
    return tokenizer.decode(last.token_ids)


def chat(client, model="inns", **options):
    options = {"messages": HELLO, "max_tokens": LENGTH, "temperature": 0} | options
    return client.chat.completions.create(model=model, **options)


def test_the_models_are_the_base_and_the_adapters(client):
    assert [model.id for model in client.models.list()] == ["tiny", "inns", "stars"]
    assert client.models.retrieve("inns").owned_by == "lora-studio"


def test_each_model_says_what_its_pane_says_with_its_own_template(client, parts):
    _, tokenizer = parts
    said = {}
    for name, pane, template in (
        ("tiny", Pane(), "chat"),
        ("inns", Pane("inns"), "chat"),
        ("stars", Pane("stars"), "plain"),
    ):
        found = chat(client, name)
        ids = prompt_ids(HELLO, tokenizer, template)
        said[name] = found.choices[0].message.content
        assert said[name] == alone(parts, pane, ids)
        assert (found.choices[0].finish_reason, found.model) == ("length", name)
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), LENGTH)
    assert len(set(said.values())) == 3


def test_a_stream_gives_the_same_in_pieces(client):
    whole = chat(client).choices[0].message.content
    *pieces, usage = chat(client, stream=True, stream_options={"include_usage": True})
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [p.choices[0].finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len(pieces) > 4 and usage.usage.completion_tokens == LENGTH and usage.choices == []


def test_text_is_gone_on_with(client, parts):
    _, tokenizer = parts
    found = client.completions.create(model="inns", prompt="Inn 3 has ", max_tokens=LENGTH, temperature=0)
    assert found.choices[0].text == alone(parts, Pane("inns"), prompt_ids("Inn 3 has ", tokenizer, "plain"))
    pieces = client.completions.create(model="inns", prompt="Inn 3 has ", max_tokens=LENGTH, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == found.choices[0].text


def test_a_seed_repeats_a_draw_and_a_stop_text_ends_it_unsaid(client, parts):
    hot = {"temperature": 1.0, "top_p": 0.9, "seed": 5}
    drawn = chat(client, **hot).choices[0].message.content
    assert drawn == chat(client, **hot).choices[0].message.content
    assert drawn == alone(parts, Pane("inns"), prompt_ids(HELLO, parts[1]), temperature=1.0, top_p=0.9, seed=5)
    stop = drawn[len(drawn) // 2 :][:2]
    for stream in (False, True):
        found = chat(client, **hot, stop=[stop, "never"], stream=stream)
        if stream:
            found = list(found)
            text = "".join(piece.choices[0].delta.content or "" for piece in found)
            reason = found[-1].choices[0].finish_reason
        else:
            text, reason = found.choices[0].message.content, found.choices[0].finish_reason
        assert (text, reason) == (drawn[: drawn.index(stop)], "stop")


def test_a_long_answer_does_not_hold_up_a_short_one_and_both_are_as_alone(client):
    expected = chat(client, "stars").choices[0].message.content
    long = chat(client, "inns", max_tokens=200, stream=True)
    next(long)
    short = chat(client, "stars").choices[0].message.content
    assert short == expected
    assert sum(1 for _ in long) > 5, "the long one was still going on"
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda name: chat(client, name).choices[0].message.content, ["stars", "inns"] * 3))
    assert found[0::2] == [expected] * 3 and len(set(found)) == 2


def test_more_requests_than_can_go_on_are_told_to_come_again(client, monkeypatch):
    monkeypatch.setattr(serving, "MAX_WAITING", 1)
    going = chat(client, max_tokens=200, stream=True)
    next(going)
    with pytest.raises(openai.RateLimitError, match="1 requests are going on; try again in a moment"):
        chat(client)
    going.close()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, r"`model` \(='gpt-4'\) must be one of tiny, inns, stars\."),
        ({"messages": []}, openai.BadRequestError, "`messages` must hold at least one message"),
        ({"messages": [CAT]}, openai.BadRequestError, r"`messages\[0\]\.role` must be one of"),
        ({"messages": [NO_TEXT]}, openai.BadRequestError, r"`messages\[0\]\.content` must be text"),
        ({"temperature": 9}, openai.BadRequestError, r"`temperature` \(=9\.0\) must be at least 0 and at most 5"),
        ({"temperature": "hot"}, openai.BadRequestError, r"`temperature` \(=hot\) must be a number"),
        ({"max_tokens": 0}, openai.BadRequestError, r"`max_new_tokens` \(=0\) must be at least 1"),
        ({"max_tokens": 2.5}, openai.BadRequestError, r"`max_tokens` \(=2\.5\) must be a whole number"),
        ({"n": 2}, openai.BadRequestError, r"`n` \(=2\) is not offered here; leave it out"),
        ({"stop": [""]}, openai.BadRequestError, "`stop` must be a text or a list of at most 4 texts"),
        ({"messages": [LONG]}, openai.BadRequestError, "must be shorter than the mod"),
        ({"messages": [LONG], "stream": True}, openai.BadRequestError, "shorter than"),
    ],
)
def test_what_cannot_be_had_is_refused_in_openai_s_form(options, kind, message, client):
    with pytest.raises(kind, match=message):
        chat(client, **options)


def test_what_the_chat_template_refuses_is_told(parts, monkeypatch):
    monkeypatch.setattr(parts[1], "chat_template", "{{ raise_exception('no such order') }}")
    service = serving.Service(None, parts[1], {"inns": (Pane("inns"), "chat")})
    with pytest.raises(serving.RequestError, match="`messages` cannot be asked: .*no such order"):
        service.parse({"model": "inns", "messages": HELLO}, is_chat=True)


@pytest.mark.parametrize("prompt", ["", ["a", "b"], [1, 2]])
def test_completions_take_one_text(prompt, client):
    with pytest.raises(openai.BadRequestError, match="`prompt` must be one text that is not empty"):
        client.completions.create(model="inns", prompt=prompt)


def raw(url: str, body: bytes | None = None, **headers: str) -> tuple[int, dict]:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_it_answers_at_this_machine_s_names_only_and_to_no_other_site(server):
    assert raw(f"{server}/v1/models")[0] == 200
    status, said = raw(f"{server}/v1/models", Host="evil.example")
    assert status == 403 and "This server is not evil.example" in said["error"]["message"]
    status, said = raw(f"{server}/v1/models", Origin="http://evil.example")
    assert status == 403 and "Other sites may not use this server" in said["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/embeddings", b"{}", 404, "POST /v1/embeddings is not offered here"),
        ("/v1/chat/completions", None, 405, "GET /v1/chat/completions is not offered here"),
        ("/v1/chat/completions", b"{", 400, "The body must be JSON"),
        ("/v1/chat/completions", b"[" * 100_000, 400, "The body must be JSON"),
        ("/v1/chat/completions", b"[]", 400, "The body must be a JSON object"),
        ("/v1/chat/completions", b"x" * 1_000_001, 413, "A request must have at most 1,000,000 bytes"),
        ("/v1/chat/completions", b'{"model": 3}', 400, "`model` (=3) must be text"),
        ("/v1/completions", b'{"model": "inns", "prompt": "\\ud800"}', 400, "`prompt` holds half of a character"),
    ],
)
def test_a_request_that_is_none_is_refused_in_the_same_form(path, body, status, message, server):
    found, said = raw(server + path, body)
    assert (found, message in said["error"]["message"], said["error"]["type"]) == (
        status,
        True,
        "invalid_request_error",
    )


def test_one_who_leaves_frees_his_turn(parts):
    turns = serving.Turns(parts[0])
    service = serving.Service(turns, parts[1], {"inns": (Pane("inns"), "chat")})
    asked = service.parse({"model": "inns", "messages": HELLO, "max_tokens": 200}, is_chat=True)

    async def leave() -> int:
        answers = turns.answers(asked)
        await anext(answers)
        await answers.aclose()
        for _ in range(200):
            if not turns._jobs:
                break
            await asyncio.sleep(0.01)
        return len(turns._jobs)

    assert asyncio.run(leave()) == 0
    turns.close()


def test_an_adapter_that_cannot_be_run_is_told_to_the_one_who_asked(parts):
    def find(name, step):
        raise LoRAError("It is gone.")

    engine = Engine(copy.deepcopy(parts[0]._plain), find, frozenset())
    turns = serving.Turns(engine)
    service = serving.Service(turns, parts[1], {"inns": (Pane("inns"), "chat")})
    asked = service.parse({"model": "inns", "messages": HELLO}, is_chat=True)

    async def ask() -> None:
        async for _ in turns.answers(asked):
            raise AssertionError("there is no answer")

    with pytest.raises(LoRAError, match="It is gone"):
        asyncio.run(ask())
    turns.close()
