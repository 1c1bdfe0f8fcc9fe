"""How chat looks in the page: turns, answers coloured by what the adapter changed, scores. All text is escaped."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from studio import markup
from studio.ballots import Score
from studio.conversation import Turn
from studio.shift import Shift

LEVELS = (0.01, 0.1, 0.5, 2.0)
"""KL in nats from which a token is coloured more strongly."""

_WORDS = ("below 0.01", "0.01", "0.1", "0.5", "2 and more")

CSS = """
.talk { display: flex; flex-direction: column; gap: .5rem; min-height: 7rem; }
.talk p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.talk .asked { align-self: flex-end; max-width: 88%; padding: .35rem .7rem; border-radius: .6rem;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); font-size: .9rem; }
.talk .copy { display: block; margin: .3rem 0 0 auto; font-size: .75rem; padding: .1rem .45rem; cursor: pointer;
  border: 1px solid var(--border-color-primary); border-radius: .4rem; background: none;
  color: var(--body-text-color-subdued); }
.talk .copy:hover, .talk .copy:focus-visible { color: var(--body-text-color); border-color: currentColor; }
.talk .empty { color: var(--body-text-color-subdued); }
.pane-card { border-top: 3px solid var(--adapted) !important; padding-top: .6rem; }
.pane-card:has(.pane-head.base), .pane-card:has(.pane-head.hidden) { border-top-color: var(--base) !important; }
.pane-card:has(.pane-head.hidden) { border-top-color: var(--body-text-color-subdued) !important; }
#panes { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); align-items: start; }
#panes > .pane-card { display: grid; grid-template-rows: subgrid; grid-row: span 4; align-items: start; }
.engine-line:empty { display: none; }
.pane-head { font-weight: 600; display: flex; flex-wrap: wrap; gap: .1rem .6rem; align-items: baseline; }
.pane-head span { font-weight: 400; color: var(--body-text-color-subdued); font-size: .85rem; overflow-wrap: anywhere; }
.engine-line { font-size: .8rem; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums;
  white-space: pre-line; overflow-wrap: anywhere; padding-top: .4rem;
  border-top: 1px solid var(--border-color-primary); }
.tok { border-radius: .15rem; cursor: help; background: rgb(217 105 26 / var(--shade)); border-bottom: 2px solid
  rgb(217 105 26 / var(--line)); }
.tok:hover, .tok:focus { outline: 2px solid var(--body-text-color); outline-offset: 0; }
.k0 { --shade: 0; --line: 0; } .k1 { --shade: .13; --line: 0; } .k2 { --shade: .26; --line: .5; }
.k3 { --shade: .42; --line: .8; } .k4 { --shade: .62; --line: 1; font-weight: 600; }
.dark .k1 { --shade: .2; } .dark .k2 { --shade: .36; } .dark .k3 { --shade: .54; } .dark .k4 { --shade: .78; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem .9rem; font-size: .8rem; color: var(--body-text-color-subdued);
  align-items: center; margin: .35rem 0; }
.legend .tok { display: inline-block; padding: 0 .45rem; cursor: default; color: var(--body-text-color); }
.mind { min-height: 2.4rem; font-size: .85rem; border: 1px solid var(--border-color-primary); border-radius: .5rem;
  padding: .5rem .7rem; margin-top: .4rem; }
.mind .lists { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .2rem 1.25rem; margin-top: .3rem; }
.mind ol { margin: 0; padding: 0; list-style: none; font-variant-numeric: tabular-nums; }
.mind li { display: flex; justify-content: space-between; gap: .5rem; }
.mind li code { white-space: pre; overflow: hidden; text-overflow: ellipsis; background: none; padding: 0; }
.mind li.is { font-weight: 700; }
.mind h2 { font-size: .8rem; margin: 0; font-weight: 600; }
.mind .a { color: var(--adapted-text); } .mind .b { color: var(--base-text); }
.dark .mind .a { color: #f0964f; } .dark .mind .b { color: #7fb0ee; }
"""

JS = """
const make = (tag, words, name) => {
    const made = document.createElement(tag);
    if (words !== undefined) made.textContent = words;
    if (name) made.className = name;
    return made;
};
const percent = (p) => (100 * p).toFixed(p < 0.1 ? 2 : 1) + ' %';
const list = (title, name, rows, token) => {
    const box = make('div');
    box.append(make('h2', title, name));
    const lines = make('ol');
    for (const [text, p] of rows) {
        const line = make('li', undefined, text === token ? 'is' : '');
        line.append(make('code', JSON.stringify(text).slice(1, -1).replaceAll('\\\\"', '"')), make('span', percent(p)));
        lines.append(line);
    }
    box.append(lines);
    return box;
};
const tell = (event) => {
    const token = event.target.closest?.('.tok[data-mind]'), box = element.querySelector('.mind');
    if (!token || !box) return;
    const [kl, mine, base, top, under] = JSON.parse(token.dataset.mind);
    const lists = make('div', undefined, 'lists');
    lists.append(list('With the adapter', 'a', top, token.textContent), list('Base', 'b', under, token.textContent));
    const words = `KL ${kl.toFixed(3)} nats · this token ${percent(mine)}, by the base ${percent(base)}`;
    box.replaceChildren(make('div', words), lists);
};
element.addEventListener('mouseover', tell);
element.addEventListener('focusin', tell);
element.addEventListener('click', async (event) => {
    const button = event.target.closest?.('.copy');
    if (!button) return;
    await navigator.clipboard.writeText(button.parentElement.querySelector('p').textContent);
    button.textContent = 'Copied';
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
});
"""
"""Of an element with answers: which lists a token that is pointed at or focused has, and the Copy buttons."""

DOWNLOAD = """(told) => {
    if (!told) return;
    const {name, kind, text} = JSON.parse(told);
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([text], {type: kind}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""
"""Saves a file whose content the page was sent; no file of it is left on the server."""


def file(name: str, kind: str, text: str) -> str:
    """Returns what `DOWNLOAD` saves; half of a character, which no page can be sent, becomes a question mark."""
    return json.dumps({"name": name, "kind": kind, "text": text.encode(errors="replace").decode()})


def head(letter: str, title: str, note: str = "", kind: str = "") -> str:
    """Returns HTML of a pane's name; `kind` is "", "base" or "hidden"."""
    return f'<div class="pane-head {kind}">{escape(letter)} · {escape(title)}<span>{escape(note)}</span></div>'


def talk(turns: Sequence[Turn], place: int, asked: str | None = None, answer: str = "") -> str:
    """Returns HTML of what one pane was asked and said.

    Args:
        turns: The turns that are over.
        place: Of the pane.
        asked: The message that is being answered, or None.
        answer: HTML of the answer to it, from `said` or `coloured`.
    """
    parts = []
    for turn in turns:
        text = turn.replies[place].text if place < len(turn.replies) else "(not asked)"
        parts.append(_asked(turn.asked) + said(text))
    if asked is not None:
        parts.append(_asked(asked) + answer)
    return f'<div class="talk">{"".join(parts) or _EMPTY}</div>'


def said(text: str) -> str:
    """Returns HTML of an answer, as text."""
    return f'<div class="said-by"><p translate="no">{escape(_whole(text))}</p>{_COPY}</div>'


def coloured(shift: Shift, texts: Sequence[tuple[str, int]], decode: Any, before: str = "") -> str:
    """Returns HTML of tokens, each coloured by how far the pane's next-token distribution is from the base's.

    Args:
        shift: The numbers.
        texts: (text, number of tokens) of the tokens that stand together: parts of one character have no text alone.
        decode: Token id → text.
        before: Text before them that nothing scores.
    """
    parts, at = [escape(_whole(before))], 0
    for text, num in texts:
        worst = max(range(at, at + num), key=lambda i: shift.kl[i])
        lists = [[(_whole(decode(i)), round(p, 5)) for i, p in one] for one in shift.top[worst]]
        mine, base = (2.718281828459045**value for value in shift.log_probs[worst])
        mind = json.dumps([round(shift.kl[worst], 4), round(mine, 5), round(base, 5), *lists], ensure_ascii=False)
        level = sum(shift.kl[worst] >= bound for bound in LEVELS)
        parts.append(
            f'<span class="tok k{level}" tabindex="0" data-mind="{escape(mind)}">{escape(_whole(text))}</span>'
        )
        at += num
    return f'<div class="said-by"><p translate="no">{"".join(parts)}</p>{_COPY}</div>{MIND}'


def legend() -> str:
    """Returns HTML of what the colours of tokens mean."""
    keys = "".join(f'<span class="tok k{level}">{words}</span>' for level, words in enumerate(_WORDS))
    return f'<div class="legend"><span>KL(pane ‖ base) of the next token, nats:</span>{keys}</div>'


def tally(scores: Sequence[Score], name_of: Any, num_bad: int = 0) -> str:
    """Returns HTML of the votes so far; `name_of` says what a pane is called."""
    if not scores:
        return '<div class="sub-line">No votes yet in this run.</div>'
    rows = "".join(
        f"<tr><td>{escape(name_of(s.pane))}</td><td>{s.num_wins} of {s.num_decided}</td>"
        f"<td>{s.share:.0%}</td><td>{s.interval[0]:.0%} – {s.interval[1]:.0%}</td><td>{s.num_ties}</td></tr>"
        for s in scores
    )
    bad = f'<div class="sub-line">{num_bad} lines of the file could not be read.</div>' if num_bad else ""
    heads = "".join(f"<th>{h}</th>" for h in ("Pane", "Best", "Share", "95 % interval", "Ties"))
    return (
        f"{markup.table(f'<tr>{heads}</tr>', rows)}{bad}"
        '<div class="sub-line">Shares are of the votes that were no tie; Wilson score intervals. '
        "Where they overlap, more votes are needed before one is called better.</div>"
    )


MIND = (
    '<div class="mind" aria-live="polite">Point at a token, or step to it with Tab: what either model would say.</div>'
)
_COPY = '<button type="button" class="copy">Copy</button>'
_EMPTY = '<p class="empty">The answer comes here.</p>'


def _asked(text: str) -> str:
    return f'<div class="asked"><p translate="no">{escape(_whole(text))}</p></div>'


def _whole(text: str) -> str:
    return text.encode(errors="replace").decode()
