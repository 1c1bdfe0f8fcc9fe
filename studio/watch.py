"""How an open page keeps up with a run, and how little that may cost: it shares the cores that train.

Every few seconds a page asks once for the parts that change and puts them where they belong, without Gradio's
round of states for each of its components; a page that nobody sees asks for nothing.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOK_SECONDS, LOOK_SECONDS_ON_CPU = 2, 4
"""Time between two looks; longer while a run trains on the CPU, which the page's drawing would take from it."""

QUEUE_SECONDS = 0.02
"""How often Gradio is to look for a waiting event; at its own 0.001 s an idle server takes a tenth of a core."""

JS = """
let every = 2000, last = 0, open = null, run = null, turn = null;
const put = (id, html) => {
    const box = document.getElementById(id);
    if (box && box.shown !== html) { box.innerHTML = html; box.shown = html; }
};
const look = async () => {
    const started = last = Date.now();
    try {
        const now = await server.look({run: run, train: open});
        if (started !== last) return;  // it was asked for something else meanwhile
        every = now.every;
        for (const [id, html] of Object.entries(now.parts)) put(id, html);
        if (turn !== now.turn) { turn = now.turn; trigger('turned'); }
    } catch (error) {
        put('head-line', 'No answer from LoRA Studio: is it still running? Asking again …');
    }
};
setInterval(() => {
    if (document.hidden) return;
    const seen = document.getElementById('status')?.offsetParent != null;
    if (Date.now() - last < every && seen === open && props.run === run) return;
    open = seen;
    run = props.run;
    look();
}, 400);
"""
"""Runs in the page's head. `server.look` gives `parts`, id -> HTML, `turn`, and `every`, the milliseconds to the next
look; when `turn` is a new one, the event `turned` is raised."""

CALM = """
// Gradio's timers count tenths of a second in every frame, and one of them never ends: once a second will do.
const frame = window.requestAnimationFrame.bind(window);
window.requestAnimationFrame = (then) =>
    /performance[.]now[(][)].*1e3/.test(then) ? setTimeout(() => frame(then), 1000) : frame(then);
"""
"""Runs before all other scripts of the page."""


class BeforeAll:
    """Puts scripts before all others of the page; Gradio's own `head` comes too late for them."""

    def __init__(self, app: ASGIApp, *scripts: str) -> None:
        self._app = app
        self._head = "".join(["<head>", *(f"<script>{script}</script>" for script in scripts)]).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or scope["path"] != "/":
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
            body = body.replace(b"<head>", self._head, 1)
            kept = [(key, value) for key, value in start["headers"] if key.lower() != b"content-length"]
            await send({**start, "headers": [*kept, (b"content-length", str(len(body)).encode())]})
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, collect)
