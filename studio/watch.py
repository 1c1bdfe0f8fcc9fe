"""How an open page keeps up with a run, and how little that may cost: it shares the cores that train.

Every few seconds a page asks once for the parts that change and makes what it shows like them, without Gradio's
round of states for each of its components. A page that nobody sees asks seldom, and only while a run goes on, so that
it can tell of its end.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOK_SECONDS, LOOK_SECONDS_ON_CPU = 2, 4
"""Time between two looks; longer while a run trains on the CPU, which the page's drawing would take from it."""

QUEUE_SECONDS = 0.02
"""How often Gradio is to look for a waiting event; at its own 0.001 s an idle server takes a tenth of a core."""

LOOK_SECONDS_UNSEEN = 15
"""The same, of a page in the background."""

TITLE = "LoRA Studio"
"""The page's; in the background it also says how far a run is, and whether one has ended."""

JS = (
    f"""
const title = '{TITLE}', unseen = {1000 * LOOK_SECONDS_UNSEEN};
"""
    + """
let every = 2000, last = 0, open = null, run = null, turn = null, going = [], share = null, mark = '';
const alter = (text, now) => {  // only where it differs, as what is selected beside that stays so
    const old = text.data, both = Math.min(old.length, now.length);
    let start = 0, end = 0;
    while (start < both && old[start] === now[start]) start++;
    while (end < both - start && old.at(-1 - end) === now.at(-1 - end)) end++;
    text.replaceData(start, old.length - start - end, now.slice(start, now.length - end));
};
const match = (old, now) => {
    if (old.nodeName !== now.nodeName) return old.replaceWith(now);
    if (now.nodeType !== Node.ELEMENT_NODE) return old.data === now.data || alter(old, now.data);
    for (const name of old.getAttributeNames()) {
        if (!now.hasAttribute(name) && name !== 'open') old.removeAttribute(name);  // <details> stay as they are
    }
    for (const {name, value} of now.attributes) {
        if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    const [here, there] = [[...old.childNodes], [...now.childNodes]];
    here.slice(there.length).forEach((node) => node.remove());
    there.forEach((node, place) => place < here.length ? match(here[place], node) : old.append(node));
};
const put = (id, html) => {
    const box = document.getElementById(id);
    if (!box || box.shown === html) return;
    const now = box.cloneNode();
    now.innerHTML = html;
    match(box, now);
    box.shown = html;
};
const look = async () => {
    const started = last = Date.now();
    every = 60_000;  // while it waits for an answer
    try {
        const now = await server.look({run: run, train: open, going: going});
        if (started !== last) return;  // it was asked for something else meanwhile
        ({every, going, share} = now);
        for (const [id, html] of Object.entries(now.parts)) put(id, html);
        now.ended.forEach(tell);
        if (turn !== now.turn) { turn = now.turn; trigger('turned'); }
    } catch (error) {
        every = 2000;
        put('head-line', 'No answer from LoRA Studio: is it still running? Asking again …');
    }
};
setInterval(() => {
    const hidden = document.hidden;
    if (!hidden) mark = '';
    const words = hidden ? [mark, share === null ? '' : `(${share} %)`, title].filter(Boolean).join(' ') : title;
    if (document.title !== words) document.title = words;
    if (hidden && (!going.length || Date.now() - last < Math.max(every, unseen))) return;
    const seen = !hidden && document.getElementById('status')?.offsetParent != null;
    if (Date.now() - last < every && seen === open && props.run === run) return;
    open = seen;
    run = props.run;
    look();
}, 400);
"""
)
"""Runs in the page's head, before `studio.ends`. `server.look` gives `parts`, id -> HTML, `every`, the milliseconds
to the next look, `going`, the runs that go on, `share`, per cent of the first, and `ended`, what `tell` says; when
`turn` is a new one, the event `turned` is raised."""

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
