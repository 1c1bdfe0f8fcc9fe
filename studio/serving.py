"""An OpenAI-compatible server: several adapters on one base model, chosen by the name of the model that is asked for.

All requests run on one engine. One thread gives each of them a token by turns, so that none waits for another's end.
"""

import asyncio
import json
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from core import LoRAError, cut
from studio import data, doors
from studio.answers import Answer
from studio.chat import Engine
from studio.panes import Pane
from studio.sampling import ChatSettings

MAX_WAITING = 32
"""Requests that may go on at once; more are told to come again."""

MAX_STOPS, DEFAULT_TOKENS = 4, 256
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class RequestError(LoRAError):
    """What was asked for cannot be had; `param` names the field."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True)
class Asked:
    """One checked request.

    Attributes:
        model: As it was asked for.
        pane: What that runs.
        prompt_ids: What it goes on from.
        settings: How tokens are chosen.
        stops: Texts that end the answer and are not part of it.
        is_chat: Whether it is a conversation.
        is_streamed: Whether the answer comes in pieces.
        with_usage: Whether the last of them counts the tokens.
    """

    model: str
    pane: Pane
    prompt_ids: list[int]
    settings: ChatSettings
    stops: tuple[str, ...] = ()
    is_chat: bool = True
    is_streamed: bool = False
    with_usage: bool = False


@dataclass
class _Job:
    """A request that goes on: its answers, and where they are told."""

    answers: Iterator[Answer]
    tell: Callable[[Answer | Exception | None], object]
    is_left: threading.Event = field(default_factory=threading.Event)


class Turns:
    """Requests that take turns on one engine, a token each."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="turns", daemon=True)
        self._thread.start()

    async def answers(self, asked: Asked) -> AsyncIterator[Answer]:
        """Yields the growing answer to a request.

        Raises:
            RequestError: There are too many already.
            LoRAError: It cannot be run.
        """
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Answer | Exception | None]()
        # What a request begins with, loading an adapter say, is done in its first turn, too.
        answers = _later(lambda: self.engine.answer(asked.pane, asked.prompt_ids, asked.settings))
        job = _Job(answers, lambda said: loop.call_soon_threadsafe(told.put_nowait, said))
        with self._changed:
            if len(self._jobs) >= MAX_WAITING:
                raise RequestError(
                    f"{MAX_WAITING} requests are going on; try again in a moment.", status=429, code="too_many_requests"
                )
            self._jobs.append(job)
            self._changed.notify()
        try:
            while (said := await told.get()) is not None:
                if isinstance(said, Exception):
                    raise said
                yield said
        finally:
            job.is_left.set()

    def close(self) -> None:
        """Ends all of them."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_closed)
                if self._is_closed:
                    return
                job = self._jobs[0]
            said: Answer | Exception | None = None
            if not job.is_left.is_set():
                try:
                    said = next(job.answers, None)
                except Exception as error:  # told to the one who asked; the others go on
                    said = error
            is_over = not isinstance(said, Answer)
            with self._changed:
                self._jobs.popleft()
                if not is_over:
                    self._jobs.append(job)
            try:
                job.tell(said)
                if isinstance(said, Exception):
                    job.tell(None)
            except RuntimeError:  # the loop of the one who asked is closed
                job.is_left.set()


def _later(begin: Callable[[], Iterator[Answer]]) -> Iterator[Answer]:
    yield from begin()


class Service:
    """The endpoints over one engine."""

    def __init__(self, turns: Turns, tokenizer: Any, models: Mapping[str, tuple[Pane, str]]) -> None:
        """Serves.

        Args:
            turns: What runs requests.
            tokenizer: The model's.
            models: Name → what it runs, and how its rows put a conversation: "chat" or "plain".
        """
        self._turns = turns
        self._tokenizer = tokenizer
        self._models = models
        self._created = int(time.time())

    async def list_models(self, request: Request) -> Response:
        """Answers GET /v1/models."""
        listed = [self._about(name) for name in self._models]
        return JSONResponse({"object": "list", "data": listed})

    async def one_model(self, request: Request) -> Response:
        """Answers GET /v1/models/NAME."""
        self._model(request.path_params["name"])
        return JSONResponse(self._about(request.path_params["name"]))

    async def chat(self, request: Request) -> Response:
        """Answers POST /v1/chat/completions."""
        return await self._complete(request, is_chat=True)

    async def text(self, request: Request) -> Response:
        """Answers POST /v1/completions."""
        return await self._complete(request, is_chat=False)

    async def _complete(self, request: Request, *, is_chat: bool) -> Response:
        asked = self.parse(await _body(request), is_chat=is_chat)
        told = _Told(asked, self._tokenizer)
        pieces = told.pieces(self._turns.answers(asked))
        if not asked.is_streamed:
            async for _ in pieces:
                if await request.is_disconnected():
                    break
            return JSONResponse(told.whole())
        first = await anext(pieces)  # an error comes as such, not in the middle of a stream

        async def stream() -> AsyncIterator[str]:
            yield _event(first)
            try:
                async for piece in pieces:
                    yield _event(piece)
            except LoRAError as error:
                yield _event(_error(str(error))[0])
            yield "data: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    def parse(self, body: Mapping[str, Any], *, is_chat: bool) -> Asked:
        """Returns what a request's body asks for.

        Raises:
            RequestError: A field is missing, of a wrong type or out of range, or asks for what is not offered.
            LoRAError: The chat template refuses the conversation.
        """
        pane, template = self._model(_field(body, "model", str, None))
        for name, offered in (("n", 1), ("best_of", 1), ("logprobs", False), ("echo", False), ("tools", None)):
            if body.get(name) not in (None, offered, 0, False, []):
                raise RequestError(f"`{name}` (={cut(str(body[name]), 40)}) is not offered here; leave it out.", name)
        longest = body.get("max_completion_tokens", body.get("max_tokens"))
        longest = DEFAULT_TOKENS if longest is None else _typed("max_tokens", longest, int)
        stop = body.get("stop") or []
        stops = (stop,) if isinstance(stop, str) else stop
        if not isinstance(stops, (list, tuple)) or len(stops) > MAX_STOPS or not all(map(_is_text, stops)):
            raise RequestError(f"`stop` must be a text or a list of at most {MAX_STOPS} texts.", "stop")
        try:
            settings = ChatSettings(
                longest,
                float(_field(body, "temperature", float, 1.0)),
                float(_field(body, "top_p", float, 1.0)),
                _field(body, "seed", int, secrets.randbits(32)),
            )
        except LoRAError as error:
            raise RequestError(str(error)) from error
        ids = self._chat_ids(body, template) if is_chat else self._text_ids(body)
        options = body.get("stream_options") or {}
        with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        return Asked(body["model"], pane, ids, settings, tuple(stops), is_chat, bool(body.get("stream")), with_usage)

    def _chat_ids(self, body: Mapping[str, Any], template: str) -> list[int]:
        messages = _field(body, "messages", list, None)
        if not messages:
            raise RequestError("`messages` must hold at least one message.", "messages")
        try:
            return data.prompt_ids([_message(m, i) for i, m in enumerate(messages)], self._tokenizer, template)
        except data.RowError as error:
            raise RequestError(f"`messages` cannot be asked: {error}.", "messages") from error

    def _text_ids(self, body: Mapping[str, Any]) -> list[int]:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            (prompt,) = prompt
        if not isinstance(prompt, str) or not prompt:
            raise RequestError("`prompt` must be one text that is not empty.", "prompt")
        return data.prompt_ids(_sound(prompt, "prompt"), self._tokenizer, "plain")

    def _model(self, name: str) -> tuple[Pane, str]:
        if name not in self._models:
            raise RequestError(
                f"`model` (={cut(name, 80)!r}) must be one of {', '.join(self._models)}.",
                "model",
                404,
                "model_not_found",
            )
        return self._models[name]

    def _about(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "lora-studio"}


class _Told:
    """An answer in OpenAI's form, whole or in pieces."""

    def __init__(self, asked: Asked, tokenizer: Any) -> None:
        self._asked, self._tokenizer = asked, tokenizer
        self._kind = "chat.completion" if asked.is_chat else "text_completion"
        self._id = f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._text, self._num_tokens, self._reason = "", 0, "length"

    async def pieces(self, answers: AsyncIterator[Answer]) -> AsyncIterator[dict[str, Any]]:
        """Yields pieces of the answer as it grows; a part of what might become a stop text or a character waits."""
        is_first = self._asked.is_chat
        async for answer in answers:
            if is_first:
                is_first = False
                yield self._piece({"role": "assistant", "content": ""})
            self._num_tokens = len(answer.token_ids)
            whole = str(self._tokenizer.decode(answer.token_ids))
            at = min((p for stop in self._asked.stops if (p := whole.find(stop)) >= 0), default=-1)
            if answer.done or at >= 0:
                is_stopped = at >= 0 or self._num_tokens < self._asked.settings.max_new_tokens
                self._reason = "stop" if is_stopped else "length"
                sure = whole if at < 0 else whole[:at]
            else:
                sure = _sure(whole, self._asked.stops)
            if new := sure[len(self._text) :]:
                self._text = sure
                yield self._piece({"content": new})
            if at >= 0:
                break
        yield self._piece({}, self._reason)
        if self._asked.with_usage:
            yield self._frame() | {"choices": [], "usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        """Returns the answer as one, once `pieces` has ended."""
        said = (
            {"message": {"role": "assistant", "content": self._text}} if self._asked.is_chat else {"text": self._text}
        )
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": self._reason}
        return self._frame(is_piece=False) | {"choices": [choice], "usage": self._usage()}

    def _piece(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        said = {"delta": delta} if self._asked.is_chat else {"text": delta.get("content", "")}
        return self._frame() | {"choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]}

    def _frame(self, *, is_piece: bool = True) -> dict[str, Any]:
        kind = f"{self._kind}.chunk" if is_piece and self._asked.is_chat else self._kind
        return {"id": self._id, "object": kind, "created": self._created, "model": self._asked.model}

    def _usage(self) -> dict[str, int]:
        num = len(self._asked.prompt_ids)
        return {
            "prompt_tokens": num,
            "completion_tokens": self._num_tokens,
            "total_tokens": num + self._num_tokens,
        }


def application(service: Service, host: str = "127.0.0.1") -> ASGIApp:
    """Returns the server's application; it answers at this machine's own names only, and no other site's page."""
    routes = [
        Route("/v1/models", service.list_models),
        Route("/v1/models/{name:path}", service.one_model),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.text, methods=["POST"]),
    ]

    async def refused(request: Request, error: Exception) -> Response:
        is_asked = isinstance(error, RequestError)
        value, status = _error(
            str(error),
            error.param if is_asked else None,
            error.code if is_asked else None,
            error.status if is_asked else 400,
        )
        return JSONResponse(value, status)

    async def absent(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        return JSONResponse(*_error(f"{request.method} {request.url.path} is not offered here.", status=status))

    inner = Starlette(routes=routes, exception_handlers={LoRAError: refused, 404: absent, 405: absent})

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                doors.check_origin(Headers(scope=scope), host)
            except doors.RefusedError as error:
                value, status = _error(str(error), status=error.status, code="refused")
                await JSONResponse(value, status)(scope, receive, send)
                return
        await inner(scope, receive, send)

    return guarded


async def _body(request: Request) -> Mapping[str, Any]:
    raw = b""
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > doors.MAX_BODY_BYTES:
                raise RequestError(f"A request must have at most {doors.MAX_BODY_BYTES:,} bytes.", status=413)
    except ClientDisconnect as error:
        raise RequestError("The request broke off.") from error
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body must be JSON ({error}).") from error
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.")
    return value


def _message(value: Any, place: int) -> Any:
    where = f"messages[{place}]"
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise RequestError(f"`{where}.role` must be one of {', '.join(ROLES)}.", "messages")
    content = value.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise RequestError(f"`{where}.content` must be text.", "messages")
    return {"role": ROLES[value["role"]], "content": _sound(content, where)}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _sound(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"`{name}` holds half of a character.", name) from error
    return text


def _field(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None and default is not None:
        return default
    return _typed(name, value, kind)


def _typed(name: str, value: Any, kind: type) -> Any:
    is_number = kind is float and isinstance(value, int) and not isinstance(value, bool)
    if not (isinstance(value, kind) or is_number) or (kind is int and isinstance(value, bool)):
        words = {str: "text", int: "a whole number", float: "a number", list: "a list"}[kind]
        raise RequestError(f"`{name}` (={cut(str(value), 40)}) must be {words}.", name)
    if is_number or kind is float:
        return float(value) if abs(value) < 2**1023 else math.inf
    return value


def _sure(text: str, stops: tuple[str, ...]) -> str:
    """Returns as much of a growing text as cannot turn out to be the beginning of a stop text or of a character."""
    end = len(text.rstrip("\ufffd"))
    for stop in stops:
        for size in range(min(len(stop) - 1, end), 0, -1):
            if text[:end].endswith(stop[:size]):
                end -= size
                break
    return text[:end]


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _error(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> tuple[Any, int]:
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}, status
