"""What is changed in Gradio's own page on its way to the browser: scripts before all others, and two slow searches."""

import re
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Change = Callable[[str], str]

_NAME = r"[\w$]+"
_SEARCH = re.compile(
    rf"function (?P<name>{_NAME})\((?P<node>{_NAME}),(?P<id>{_NAME})\)\{{if\((?P=node)\.id===(?P=id)\)return (?P=node);"
    rf"if\((?P=node)\.children\)for\(let (?P<child>{_NAME}) of (?P=node)\.children\)\{{"
    rf"let (?P<found>{_NAME})=(?P=name)\((?P=child),(?P=id)\);if\((?P=found)\)return (?P=found)\}}return null\}}"
)
"""How Gradio finds a component: by going through the tree of all, whose every property is read through a proxy. An
event does so for each component that ever showed a state: more than half of the time of a click on this page."""

_BY_PATH = """function NAME(root, id) {
  let node = NAME.paths?.has(id) ? root : null;
  for (const place of NAME.paths?.get(id) ?? []) node = node?.children?.[place];
  if (node?.id === id) return node;
  const paths = NAME.paths = new Map();
  const walk = (node, path) => {
    if (!paths.has(node.id)) paths.set(node.id, path);
    node.children?.forEach((child, place) => walk(child, [...path, place]));
  };
  walk(root, []);
  return paths.has(id) ? NAME(root, id) : null;
}"""
"""The same, which goes where the component was, and through all only when another is there or none."""

_EVENTS = re.compile(
    rf"(?P<name>find_attached_events)\((?P<node>{_NAME}),(?P<all>{_NAME})\)\{{let (?P<found>{_NAME})=(?P=all)\.filter\("
    rf"({_NAME})=>\5\.targets\.find\(\(\[({_NAME})\]\)=>\6===(?P=node)\.id\)\)\.map\(\5=>\{{let ({_NAME})=\5\.targets"
    rf"\.find\(\(\[\6\]\)=>\6===(?P=node)\.id\);return \7\?\7\[1\]:null\}}\)\.filter\(Boolean\);"
    rf"return (?P=node)\.props\.shared_props\.attached_events=(?P=found),(?P=node)\}}"
)
"""How it finds which events of a component are listened to: by going through all listeners for each component."""

_BY_ID = """NAME(node, all) {
  if (this.listeners?.of !== all) {
    this.listeners = {of: all, by: new Map()};
    for (const {targets} of all) {
      for (const [id, event] of new Map([...targets].reverse())) {
        if (!this.listeners.by.has(id)) this.listeners.by.set(id, []);
        if (event) this.listeners.by.get(id).push(event);
      }
    }
  }
  node.props.shared_props.attached_events = [...(this.listeners.by.get(node.id) ?? [])];
  return node;
}"""
"""The same, which goes through all listeners once; of one with two events of a component the first counts."""


def scripts_first(*scripts: str) -> Change:
    """Returns the change of a page that has `scripts` run before all others; Gradio's own `head` comes too late."""
    head = "".join(["<head>", *(f"<script>{script}</script>" for script in scripts)])
    return lambda page: page.replace("<head>", head, 1)


def without_searches(script: str) -> str:
    """Returns Gradio's script without its slow searches; one that does not have them is left as it is."""
    for slow, quick in ((_SEARCH, _BY_PATH), (_EVENTS, _BY_ID)):
        script = slow.sub(lambda found, quick=quick: quick.replace("NAME", found["name"]), script)
    return script


class Rewritten:
    """Changes what is answered to a GET, by the first of `changes` whose pattern is the whole path."""

    def __init__(self, app: ASGIApp, changes: Mapping[str, Change]) -> None:
        self._app = app
        self._changes = [(re.compile(path), change) for path, change in changes.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = scope["path"] if scope["type"] == "http" and scope["method"] == "GET" else None
        change = next((change for path, change in self._changes if asked is not None and path.fullmatch(asked)), None)
        if change is None:
            await self._app(scope, receive, send)
            return
        start: Message = {}
        body = b""

        async def collect(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            if start["status"] == 200:
                body = change(body.decode()).encode()
            kept = [(key, value) for key, value in start["headers"] if key.lower() != b"content-length"]
            await send({**start, "headers": [*kept, (b"content-length", str(len(body)).encode())]})
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, collect)
