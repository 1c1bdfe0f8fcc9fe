"""The doors of the server behind the page: who comes in, by which routes, and with what.

Whatever is not named here is closed; so is a route that a new Gradio brings.
"""

import asyncio
import base64
import hmac
import ipaddress
import json
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from weakref import WeakValueDictionary

from starlette.datastructures import Headers, MutableHeaders
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import LoRAError
from studio.workspace import Workspace

MAX_UPLOAD_BYTES = 200 * 1024 * 1024
MAX_BODY_BYTES = 1_000_000
"""Of a request that uploads nothing, and what an upload may hold besides its file."""

PASSWORD_VARIABLE = "LORA_STUDIO_PASSWORD"
MIN_PASSWORD_LENGTH = 8
WRONG_PASSWORD_SECONDS = 1.0

_API = "/gradio_api/"
_UPLOAD, _FILE, _STARTED = _API + "upload", _API + "file=", _API + "startup-events"
ROUTES = {
    "HEAD": "/",
    "GET": rf"/|/(assets|static)/.+|/theme\.css|/favicon\.ico|/manifest\.json|/config|{_STARTED}|{_FILE}.+"
    rf"|{_API}(app_id|queue/data|upload_progress|heartbeat/\w+)",
    "POST": rf"{_UPLOAD}|{_API}(queue/join|run/predict|component_server/?|cancel|reset)",
}
"""Method → what the page asks for. Of the rest of Gradio (its API by name, proxies, other pages) it needs nothing."""

_HEADERS = {
    # Gradio's page runs scripts of its own from strings and from within itself; none may come from, or talk to, others.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Account:
    """Whom the server lets in.

    Attributes:
        name: The user's name.
        password: The password.
        is_generated: Whether it was made here, so that it has to be told.
    """

    name: str
    password: str = field(repr=False)
    is_generated: bool = False

    @classmethod
    def of(cls, name: str | None, password_file: Path | None) -> Self:
        """Returns the account that the operator wants; the password is the file's, else the variable's, else a new one.

        Raises:
            LoRAError: The name or the password cannot be used, or the file cannot be read.
        """
        name = "studio" if name is None else name
        if not name or ":" in name or not name.isprintable():
            raise LoRAError(f"`--user` (={name!r}) must be a name without a colon.")
        source, given = f"${PASSWORD_VARIABLE}", os.environ.get(PASSWORD_VARIABLE)
        if password_file is not None:
            source = f"--password-file {password_file}"
            try:
                given = password_file.read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, ValueError) as error:
                raise LoRAError(
                    f"`--password-file` (={str(password_file)!r}) must be a text file ({error})."
                ) from error
        if given is None:
            return cls(name, secrets.token_urlsafe(16), is_generated=True)
        if len(given) < MIN_PASSWORD_LENGTH:
            raise LoRAError(f"The password of {source} must have at least {MIN_PASSWORD_LENGTH} characters.")
        return cls(name, given)

    @property
    def header(self) -> bytes:
        """What a browser sends in `Authorization` (RFC 7617)."""
        return b"Basic " + base64.b64encode(f"{self.name}:{self.password}".encode())


class RefusedError(Exception):
    """A request that is not let in; `status` is HTTP's."""

    def __init__(self, status: int, words: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(words)
        self.status = status
        self.response = PlainTextResponse(words + "\n", status, headers)


class Doors:
    """Lets through what the page needs and the account may, and refuses the rest before Gradio sees it."""

    def __init__(self, app: ASGIApp, *, workspace: Workspace, host: str, account: Account | None) -> None:
        """Guards `app`.

        Args:
            app: What is guarded.
            workspace: Whose `incoming` takes uploads and whose `downloads` are handed out.
            host: The address that is listened on.
            account: Who may come in; None lets in all who reach the address, which must then be this machine's own.
        """
        self._app = app
        self._incoming = workspace.incoming
        self._download = re.compile(re.escape(f"{workspace.downloads}/") + r"[\w-]+\.(zip|gguf)")
        self._host = host
        self._account = account
        self._guesses: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page opens no WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            check_origin(Headers(scope=scope), None if self._account else self._host)
            await self._check_account(scope)
            self._check_route(scope["method"], scope["path"])
            if scope["method"] == "POST":
                receive = await self._checked_body(scope, receive)
        except RefusedError as refused:
            await refused.response(scope, receive, send_with_headers)
        except ClientDisconnect:
            return
        else:
            await self._app(scope, receive, send_with_headers)

    async def _check_account(self, scope: Scope) -> None:
        if self._account is None or scope["path"] == _STARTED:  # Gradio asks for that itself, and it says nothing
            return
        given = Headers(scope=scope).get("authorization")
        if given is not None:
            address = scope["client"][0] if scope["client"] else ""
            async with self._guesses.setdefault(address, asyncio.Lock()):  # one guess at a time from an address
                if hmac.compare_digest(given.encode("latin-1"), self._account.header):
                    return
                await asyncio.sleep(WRONG_PASSWORD_SECONDS)
        challenge = {"WWW-Authenticate": 'Basic realm="LoRA Studio", charset="UTF-8"'}
        raise RefusedError(401, "LoRA Studio asks for a user name and a password.", challenge)

    def _check_route(self, method: str, path: str) -> None:
        if not re.fullmatch(ROUTES.get(method, ""), path):
            raise RefusedError(404, "There is nothing here.")
        if path.startswith(_FILE):
            file = path.removeprefix(_FILE)
            if not self._download.fullmatch(file) or Path(file).is_symlink():
                raise RefusedError(403, "Only what was made ready for a download can be fetched.")

    async def _checked_body(self, scope: Scope, receive: Receive) -> Receive:
        """Returns what gives the request's body in place of `receive`, within its bounds."""
        is_upload = scope["path"] == _UPLOAD
        limit = MAX_BODY_BYTES + (MAX_UPLOAD_BYTES if is_upload else 0)
        too_large = f"A request must have at most {limit:,} bytes."
        if int(Headers(scope=scope).get("content-length", 0)) > limit:
            raise RefusedError(413, too_large)
        if is_upload:
            return _bounded(receive, limit)
        body = b""
        async for chunk in Request(scope, receive).stream():
            body += chunk
            if len(body) > limit:
                raise RefusedError(413, too_large)
        try:
            value = json.loads(body, object_pairs_hook=self._checked_pairs)
            json.dumps(value, ensure_ascii=False).encode()  # half a character would fail on its way to other pages
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, "The request must be JSON.") from error
        first: list[Message] = [{"type": "http.request", "body": body}]

        async def again() -> Message:
            return first.pop() if first else await receive()

        return again

    def _checked_pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Returns an object of a request; where it names a file, as Gradio's uploads do, that must be an upload."""
        for key, value in pairs:
            if key == "path" and not self._was_uploaded(value):
                raise RefusedError(403, "A file must be uploaded before it is named.")
        return dict(pairs)

    def _was_uploaded(self, value: Any) -> bool:
        return isinstance(value, str) and Path(os.path.realpath(value)).is_relative_to(self._incoming)


def check_origin(headers: Headers, host: str | None) -> None:
    """Refuses what a page of another site asks for, in the browser of somebody who may come in.

    Args:
        headers: The request's.
        host: The only name of the server besides this machine's own, or None if it may have any. Without a password
            a foreign name may be an attacker's that he let point here (DNS rebinding).
    """
    named = headers.get("host", "")
    if host is not None and not _is_local(named, host):
        raise RefusedError(403, f"This server is not {named}; it answers at localhost.")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != named:
        raise RefusedError(403, "Other sites may not use this server.")


def _is_local(named: str, host: str) -> bool:
    name = re.sub(r":\d+$", "", named).strip("[]").lower()
    if name in ("localhost", host.lower()):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _bounded(receive: Receive, limit: int) -> Receive:
    """Returns `receive` for an upload; one that breaks off or passes the limit leaves no file behind."""
    num_bytes, is_going = 0, True

    async def count() -> Message:
        nonlocal num_bytes, is_going
        message = await receive()
        num_bytes += len(message.get("body", b""))
        is_broken = is_going and message["type"] == "http.disconnect"
        is_going = is_going and message.get("more_body", False)
        if is_broken or num_bytes > limit:
            # The one error after which Gradio removes what it has stored so far; by these words it says 413.
            raise MultiPartException(f"Broken off, or over the maximum allowed size of {limit:,} bytes.")
        return message

    return count
