"""How a run ended: in words, and as an open page tells of it, which the browser does, too, if it was asked to.

A page says at each look which runs went on when it looked last, and is told of those that no longer do. So nobody
hears of what ended before the page was opened, or twice, and the server keeps nothing of the pages.
"""

import math
import textwrap
from html import escape
from typing import Any

from core import Failed, Finished, LoRAError
from studio import label_metrics, links
from studio.checkpoints import best
from studio.event_log import EventLog
from studio.live import duration
from studio.runs import Run

GOING = ("running", "queued")
"""The statuses of a run that has not ended."""

TERMS = {
    "weights": "the frozen weights",
    "adapter": "the adapter",
    "gradients": "its gradients",
    "moments": "AdamW's moments",
    "activations": "activations and logits",
    "holes": "holes between tensors",
    "choosing": "the copy on which the fastest way is chosen",
}
"""The parts of a forecast, in words."""

_HEADS = {
    "finished": "“{}” has finished",
    "stopped": "“{}” was stopped",
    "paused": "“{}” is paused",
    "failed": "“{}” failed",
    "interrupted": "“{}” was interrupted",
}

_MOST_LETTERS = 220  # about three lines of a toast; all of it stands in Train

CSS = """
.ends { position: fixed; z-index: 900; right: 1rem; bottom: 1rem; width: min(25rem, calc(100vw - 2rem)); }
.end { position: relative; margin-top: .6rem; padding: .7rem 2.6rem .8rem .9rem; overflow-wrap: anywhere;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-left: 3px solid #2e7d4f; border-radius: var(--radius-md); box-shadow: 0 4px 18px rgb(0 0 0 / .2);
  animation: end .2s ease-out; }
.dark .end { border-left-color: #6cc393; }
.end.warn { border-left-color: var(--adapted); } .end.error { border-left-color: #c62828; }
.end p { margin: 0; font-size: .9rem; } .end p + p { margin-top: .2rem; }
.end .ways { margin-top: .6rem; } .end .ways button { padding: .25rem .7rem; font-size: .85rem; }
.end > button { position: absolute; top: .4rem; right: .4rem; width: 1.9rem; height: 1.9rem; padding: 0;
  margin: 0 !important; border: 0; border-radius: var(--radius-md); background: none; font-size: 1rem; line-height: 1;
  color: var(--body-text-color-subdued); cursor: pointer; }
.end > button:hover { color: var(--body-text-color); }
@media (max-width: 40rem) { .end .ways button + button { display: none; } }
@keyframes end { from { opacity: 0; transform: translateY(.5rem); } }
.tell { display: flex; flex-wrap: wrap; gap: .1rem .75rem; font-size: .9rem; }
.tell label { display: inline-flex; align-items: center; gap: .45rem; cursor: pointer; }
.tell input { width: 1rem; height: 1rem; margin: 0; accent-color: var(--adapted); }
.tell [role=status] { color: var(--body-text-color-subdued); font-size: .85rem; }
"""

PLACE = '<div class="ends"><div id="ends" role="status"></div><div id="failures" role="alert"></div></div>'
"""HTML of where a page tells of ends; it is there from the beginning, so that screen readers listen to it."""

BOX = (
    '<div class="tell"><label><input type="checkbox" data-tell>Tell me when a run ends</label>'
    '<span role="status"></span></div>'
)
"""HTML of what asks the browser for notifications, for where a run is begun."""

JS = """
const MOST = 2, SECONDS = 20, KEY = 'lora-studio-tells-of-ends';
const kept = (value) => {
    try {
        if (value !== undefined) localStorage.setItem(KEY, value);
        return localStorage.getItem(KEY);
    } catch { return null; }  // a browser that keeps nothing for pages asks anew at each
};
let wanted = kept() === 'yes' && window.Notification?.permission === 'granted';
const show = (title, options) => {
    try { return new Notification(title, options); } catch { return null; }  // as on phones
};
const tell = (end) => {
    const place = document.getElementById(end.is_good ? 'ends' : 'failures');
    place.insertAdjacentHTML('beforeend', end.html);
    while (place.children.length > MOST) place.firstElementChild.remove();
    if (!document.hidden) return;
    mark = end.is_good ? '✓' : '✗';
    const shown = wanted && show(end.title, {body: end.body, tag: end.run});
    if (shown) shown.onclick = () => { window.focus(); go({tab: 'train', run: end.run}); shown.close(); };
};
const ask = async () => {
    const still = 'the page itself still says it.';
    if (!window.isSecureContext || !window.Notification) {
        return `The browser can do so at https or localhost only; ${still}`;
    }
    const answer = await Notification.requestPermission();
    if (answer === 'denied') return `The browser blocks this page’s notifications, as its settings say; ${still}`;
    if (answer !== 'granted') return `The browser may not do so; ${still}`;
    return show('LoRA Studio tells you here') ? '' : `The browser cannot do so on this device; ${still}`;
};
document.addEventListener('change', async ({target}) => {
    if (!target.matches('[data-tell]')) return;
    const said = target.closest('.tell').querySelector('[role=status]');
    wanted = target.checked;
    said.textContent = '';
    const problem = wanted ? await ask() : '';
    wanted &&= !problem;
    kept(wanted ? 'yes' : 'no');
    said.textContent = problem || (wanted ? 'The browser does, too, while the page is out of sight.' : '');
});
document.addEventListener('click', ({target}) => {
    if (target.closest('.end button')) target.closest('.end').remove();
});
setInterval(() => {
    for (const box of document.querySelectorAll('[data-tell]')) box.checked = wanted;
    if (document.hidden) return;
    for (const end of document.querySelectorAll('#ends .end:not(:hover, :focus-within)')) {
        end.seen = (end.seen ?? 0) + 0.4;
        if (end.seen > SECONDS) end.remove();  // a failure stays until it is closed
    }
}, 400);
"""
"""Runs once, in the page's head, with `studio.watch` and `studio.links`; permission is asked for at a click, only."""


def told(run: Run, status: str) -> dict[str, Any] | None:
    """Returns what a page says of a run that went on when it looked last, or None where that is nothing.

    Nothing is said of one that was paused by hand, or taken out of the queue before it began. `html` is the toast;
    `title` and `body` are its words, for the browser.
    """
    try:
        run.log.read()
        name, (sentences, kind) = run.spec.name, words(run, status)
        ways_on = ways(run, status) or links.ways(run.id, train="See what happened")
    except LoRAError:  # damaged files: said where the run is shown
        return None
    log, end = run.log, run.log.end
    was_paused = status == "paused" and isinstance(end, Finished)
    if status not in _HEADS or was_paused or (status == "stopped" and log.started is None):
        return None
    title, is_good = _HEADS[status].format(name), kind in ("good", "")
    if isinstance(end, Finished):
        sentences = [*(sentences if end.reason in ("early", "killed") else []), *_results(log)]
    body = textwrap.shorten(" ".join(sentences), _MOST_LETTERS, placeholder=" …")
    html = (
        f'<div class="end {kind}"><p><b>{escape(title)}</b></p><p>{escape(body)}</p>{ways_on}'
        '<button type="button" aria-label="Close">✕</button></div>'
    )
    return {"run": run.id, "title": title, "body": body, "html": html, "is_good": is_good}


def _results(log: EventLog) -> list[str]:
    """Returns sentences on what a run has reached, and how long that took."""
    if not log.steps:
        return []
    reached = f"Last training loss {log.steps[-1].loss:.3f}"
    if tried := [e for e in log.evaluations if e.step]:
        lowest = min(tried, key=lambda e: e.to_minimize)
        reached = f"Lowest held-out loss {lowest.loss:.3f}, at step {lowest.step}"
        if lowest.metric:
            score = label_metrics.number(lowest.metrics.get(lowest.metric, math.nan))
            reached = f"Best {label_metrics.TITLES.get(lowest.metric, lowest.metric)} {score}, at step {lowest.step}"
    seconds = log.steps.columns()["step_seconds"].sum() + sum(e.evaluate_seconds for e in log.evaluations)
    return [f"{reached}.", f"Trained for {duration(float(seconds))}."]


def ways(run: Run, status: str) -> str:
    """Returns HTML of buttons for what can be done with what a run has trained, once it is over."""
    if status not in ("finished", "stopped") or not run.has_adapter:
        return ""
    chat = "Try it on texts" if run.spec.data.is_labelled else "Chat with it"
    if not run.has_lora:
        return links.ways(run.id, chat=chat)
    return links.ways(run.id, spectrum="Look at the spectrum", chat=chat, home="Take it home")


def words(run: Run, status: str) -> tuple[list[str], str]:
    """Returns what there is to say of a run's state, and how it is said."""
    log, end = run.log, run.log.end
    step = log.steps[-1].step if log.steps else 0
    reason = end.reason if isinstance(end, Finished) else ""
    if status == "running":
        last = log.notes[-1].message if log.notes else "Starting the worker"
        return ([] if log.steps else [f"{last} …"]), ""
    if status == "queued":
        return ["It waits in the queue, and starts as soon as its device is free, page or no page."], ""
    if isinstance(end, Failed) and status != "interrupted":
        return [end.message, *_memory_words(end)], "error"
    if status == "interrupted" or reason == "killed":
        how = "The worker ended without a word (killed, or the machine went down)."
        how = end.message.removesuffix(" The run can be resumed.") if isinstance(end, Failed) else how
        how = "It was killed: all of its processes are gone, and their memory is free." if reason else how
        steps = run.checkpoints.steps()
        where = f"Resume goes on from step {steps[-1]}." if steps else "Resume starts it from the beginning."
        return [f"{how} {where}"], "warn"
    if status == "paused":
        return [f"Everything is saved and its memory is free. Resume goes on after step {step}."], ""
    if reason == "early":
        lowest = best([(e.step, e.to_minimize) for e in log.evaluations])
        metric = log.evaluations[-1].metric if log.evaluations else ""
        why = f"{label_metrics.TITLES.get(metric, metric)} no longer rose" if metric else "the held-out loss rose"
        return [f"Ended early: {why}. The adapter saved is that of step {lowest}."], ""
    if run.has_adapter and not run.has_lora:
        return [f"What {run.spec.method.title} trained is saved. Chat with it; it has no ΔW, and so no spectrum."], ""
    return (["The adapter is saved."] if run.has_adapter else []), "good"


def _memory_words(failed: Failed) -> list[str]:
    terms = [(name, size) for name, size in failed.predicted_bytes.items() if name in TERMS]
    if not terms:
        return []
    total, (largest, size) = sum(size for _, size in terms), max(terms, key=lambda term: term[1])
    return [
        f"By its shapes it was to take about {total / 1e9:.2f} GB, of which {size / 1e9:.2f} GB for {TERMS[largest]}."
    ]
