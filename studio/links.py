"""Links that open one view of the page: its address, with a query such as ?run=…&tab=spectrum&module=… after it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from types import MethodType
from typing import Any
from urllib.parse import urlencode

from core import LoRAError, quoted
from studio.opened import Source
from studio.state import Studio


@dataclass(frozen=True)
class View:
    """What a page shows; "" is what it would show anyway.

    Attributes:
        run: The run's id.
        tab: Of the page.
        section: Of the Spectrum tab; with a matrix and no section, the one that shows one matrix.
        module: The path of a matrix that the run adapts.
    """

    run: str = ""
    tab: str = ""
    section: str = ""
    module: str = ""

    def link(self) -> str:
        """Returns HTML of a link to it, with a button that copies the link."""
        query = urlencode({name: value for name, value in asdict(self).items() if value})
        return (
            f'<p class="link"><a href="?{escape(query)}">Link to this view</a> '
            '<button type="button" data-copy>Copy link</button> <span role="status"></span></p>'
        )


def ways(run: str = "", /, **tabs: str) -> str:
    """Returns HTML of buttons that open tabs: a tab's id → the button's words; the obvious one comes first.

    With the id of a run, they choose that run in the page's header, too.
    """
    of = f' data-run="{escape(run)}"' if run else ""
    buttons = (f'<button type="button" data-tab="{tab}"{of}>{escape(words)}</button>' for tab, words in tabs.items())
    return f'<div class="ways">{"".join(buttons)}</div>'


JS = """
const SEES = {train: 'see_train', spectrum: 'see_spectrum', chat: 'see_chat', runs: 'see_runs', home: 'see_home'};
window.seeTab = () => { if (SEES[window.openTab]) trigger(SEES[window.openTab]); };
const go = (way) => {
    window.way = way;
    if (document.body.classList.contains('learning')) location.hash = '';
    trigger('went');
};
document.addEventListener('click', async (event) => {
    const way = event.target.closest('[data-tab]'), button = event.target.closest('[data-copy]');
    if (way) go({...way.dataset});
    window.wentOn ||= event.target.closest('#tabs > .tab-wrapper button') !== null;
    if (!button) return;
    const link = button.parentElement.querySelector('a'), said = button.parentElement.querySelector('[role=status]');
    try {
        await navigator.clipboard.writeText(link.href);
        said.textContent = 'Copied';
    } catch {  // a page that came over plain http from another machine may not
        said.textContent = link.href;
        getSelection().selectAllChildren(said);
    }
});
"""
"""Runs once, in the page's head: the buttons of `View.link`, and of `ways`, which raise the event `went`; and what is
drawn of the run in the header: only in the tab that is open, by its event `see_…`."""


def event(head: Any, name: str) -> Any:
    """Returns an event that a script of the page's head raises, as `gr.on` takes events.

    `see_` and a tab: it is opened, or is open when another run is chosen.
    """
    return MethodType(getattr(head, name).func, head)


def opens(tab: str) -> str:
    """Returns what the page does when it opens a tab."""
    return f"() => {{ window.openTab = '{tab}'; window.seeTab?.(); }}"


CHOSE = "(run) => { window.runShown = run; window.seeTab?.(); }"
"""What the page does when another run is chosen in its header."""

GO = """() => {
    const {tab, run} = window.way;
    return [{__type__: 'update', selected: tab}, {__type__: 'update', ...(run ? {value: run} : {})}];
}"""
"""What the event `went` sets the page's tabs and the run in its header to; it runs in the page, without a request."""

OPEN = "(asked) => ({__type__: 'update', ...(asked && !window.wentOn ? {selected: asked} : {})})"
"""What the page's tabs are set to when it opens, unless somebody opened one before the server answered."""


def read(
    studio: Studio, query: Mapping[str, str], tabs: Sequence[str], sections: Sequence[str]
) -> tuple[View, list[str]]:
    """Returns the view that a page's address asks for, as far as it is there, and sentences on what is not."""
    view = View(**{name: query.get(name, "") for name in ("run", "tab", "section", "module")})
    problems = []
    if view.run:
        try:
            studio.runs.get(view.run)
        except LoRAError as error:
            problems.append(f"{error} The page opens without it.")
            view = replace(view, run="", module="")
    elif view.module:
        problems.append(f"`module` (={quoted(view.module)}) must come with the run that it is of, as run=….")
        view = replace(view, module="")
    if view.module:
        view = replace(view, tab=view.tab or "spectrum", section=view.section or "matrix")
        problems += _about_module(studio, view)
    for name, known in (("tab", tabs), ("section", sections)):
        value = getattr(view, name)
        if value and value not in known:
            problems.append(f"`{name}` (={quoted(value)}) must be one of {', '.join(known)}.")
            view = replace(view, **{name: ""})
    return view, problems


def _about_module(studio: Studio, view: View) -> list[str]:
    try:
        opened = studio.opened(Source(view.run))
    except LoRAError as error:
        return [str(error)]
    known = opened.adapter.factors
    if view.module in known:
        return []
    example = next(iter(known), "none")
    return [
        f"`module` (={quoted(view.module)}) must be one of the {len(known)} matrices of “{opened.name}”, such as "
        f"{example}; its largest is shown."
    ]
