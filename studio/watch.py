"""How an open page keeps up with a run, and how little that may cost: it shares the cores that train.

Every few seconds a page asks once for the parts that change and makes what it shows like them, without Gradio's
round of states for each of its components. A page that nobody sees asks seldom, and only while a run goes on, so that
it can tell of its end.
"""

import math
import threading
import time

LOOK_SECONDS, LOOK_SECONDS_ELSEWHERE = 1, 2
"""Time between two looks at the charts of a run that goes on, and at all else. While a run trains on the CPU, which the
page's drawing takes from it, it is the time between two looks of all pages: five look every five seconds each."""

QUEUE_SECONDS = 0.02
"""How often Gradio is to look for a waiting event; at its own 0.001 s an idle server takes a tenth of a core."""

LOOK_SECONDS_UNSEEN = 15
"""The same, of a page in the background."""

_GONE_SECONDS = 20
"""A page that has not looked for so long is shut, or in the background."""

TITLE = "LoRA Studio"
"""The page's; in the background it also says how far a run is, and whether one has ended."""

JS = (
    f"""
const title = '{TITLE}', unseen = {1000 * LOOK_SECONDS_UNSEEN};
"""
    + """
const page = Math.random().toString(36);
window.runShown ??= null;
let every = 2000, last = 0, open = null, run = null, turn = null, steps = '', going = [], share = null, mark = '';
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
const put = (id, html, mark) => {
    const box = document.getElementById(id);
    if (!box) return;
    const now = box.cloneNode();
    now.innerHTML = html;
    match(box, now);
    box.mark = mark;
};
const marks = () => Object.fromEntries(
    ['head-line', 'status', 'charts', 'worker-log'].map((id) => [id, document.getElementById(id)?.mark ?? '']));
const look = async () => {
    const started = last = Date.now();
    every = 60_000;  // while it waits for an answer
    try {
        const now = await server.look(
            {page: page, hidden: document.hidden, run: run, train: open, steps: steps, going: going, marks: marks()});
        if (started !== last) return;  // it was asked for something else meanwhile
        ({every, going, share} = now);
        for (const [id, [html, mark]] of Object.entries(now.parts)) put(id, html, mark);
        now.ended.forEach(tell);
        if (turn !== now.turn) {
            trigger('turned');
            if (turn !== null) window.seeTab();  // a run has ended: the tab that is open may have more to show of it
            turn = now.turn;
        }
    } catch (error) {
        every = 2000;
        put('head-line', 'No answer from LoRA Studio: is it still running? Asking again …', '');
    }
};
const tick = () => {
    const hidden = document.hidden;
    if (!hidden) mark = '';
    const words = hidden ? [mark, share === null ? '' : `(${share} %)`, title].filter(Boolean).join(' ') : title;
    if (document.title !== words) document.title = words;
    if (hidden && (!going.length || Date.now() - last < Math.max(every, unseen))) return;
    const seen = !hidden && document.getElementById('status')?.offsetParent != null;
    if (Date.now() - last < every - 100 && seen === open && window.runShown === run) return;
    open = seen;
    if (window.runShown !== run) steps = '';  // of another run
    run = window.runShown;
    look();
};
setInterval(tick, 200);
tick();
"""
)
"""Runs in the page's head, before `studio.ends`. `server.look` gives `parts`, id -> HTML and its mark, of those that
the page shows with another mark, `every`, the milliseconds to the next look, `going`, the runs that go on, `share`, per
cent of the first, and `ended`, what `tell` says; when `turn` is a new one, the event `turned` is raised."""

CALM = """
// Gradio's timers count tenths of a second in every frame, and one of them never ends: once a second will do.
const frame = window.requestAnimationFrame.bind(window);
window.requestAnimationFrame = (then) =>
    /performance[.]now[(][)].*1e3/.test(then) ? setTimeout(() => frame(then), 1000) : frame(then);
"""
"""Runs before all other scripts of the page."""


class Pages:
    """The pages that somebody may be looking at, each by the time at which it last asked for news."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}
        self._lock = threading.Lock()

    def count(self, page: str, *, hidden: bool = False) -> int:
        """Takes note of a page that asks, and returns how many there are; one that is hidden is none."""
        now = time.monotonic()
        with self._lock:
            self._asked[page] = -math.inf if hidden else now
            self._asked = {page: then for page, then in self._asked.items() if now - then < _GONE_SECONDS}
            return len(self._asked)
