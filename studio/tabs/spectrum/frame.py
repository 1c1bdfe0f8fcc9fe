"""What the sections of the Spectrum tab share: the adapter and the matrix that they look at, and when they draw."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from core import LoRAError
from studio import links
from studio.opened import Source
from studio.pictures import Picture, Pictures
from studio.state import Studio

_PICTURE = """
element.addEventListener('click', async (event) => {
    const asked = event.target.closest('[data-get]'), area = event.target.closest('rect[data-name]');
    if (area) trigger('pointed', {name: area.dataset.name});
    if (!asked) return;
    const picture = asked.closest('[data-key]'), said = picture.querySelector('.below [role=status]');
    said.textContent = '…';
    const file = await server.hand_out({key: picture.dataset.key, kind: asked.dataset.get});
    said.textContent = file.problem ?? '';
    if (file.problem) return;
    const link = document.createElement('a');
    link.href = `data:${file.mime};base64,${file.data}`;
    link.download = file.name;
    link.click();
});
"""
"""Runs where a picture is: its buttons download it, and what can be pointed at raises the event `pointed`."""

_SECTIONS = ("overview", "matrix", "past", "reading", "compare", "operating", "intruders")

JS = (
    f"""
const DRAWS = new Set({[f"draw_{name}_{what}" for name in _SECTIONS for what in ("source", "view")]});
"""
    + """
const due = new Set();
window.section = 'overview';
window.draw = (...changed) => {
    if (!due.size) setTimeout(() => {
        const events = [...due].map((what) => `draw_${window.section}_${what}`).filter((name) => DRAWS.has(name));
        due.clear();
        events.forEach((name) => trigger(name));
    }, 20);  // where both change, and a section is opened with them, it is drawn once
    changed.forEach((what) => due.add(what));
};
window.openSection = (name) => {
    if (window.section !== name) window.draw('source', 'view');  // the page opens at one, which is drawn by its changes
    window.section = name;
};
"""
)
"""Runs once, in the page's head: has the section that is seen drawn, by its events `draw_…`, when it is opened, or when
the source or the view of `Frame` changes. A State for each would have Gradio ask every section, one after another."""

PRIVATE: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None}


@dataclass(frozen=True)
class Frame:
    """The tab around the sections.

    Attributes:
        studio: What is served.
        source: State with a `Source`, as `Studio.place_of` gives it with the times of its files; None for none.
        matrix: The choice of one matrix by its path.
        view: State with the source and the matrix, which changes once when both do.
        files: State with the sources of the adapters that were opened from files.
        head: The page's, with `links.JS` and `JS`.
        sections: The `gr.Tabs` of the sections.
        pictures: What was drawn last.
        tabs: Section → its `gr.Tab`.
    """

    studio: Studio
    source: Any
    matrix: Any
    view: Any
    files: Any
    head: Any
    sections: Any
    pictures: Pictures = field(default_factory=Pictures)
    tabs: dict[str, Any] = field(default_factory=dict)

    def picture(self, elem_id: str, **options: Any) -> gr.HTML:
        """Draws the place of a picture; its value is what `put` returns. `pointed` is the event of its areas."""

        def hand_out(asked: dict[str, str]) -> dict[str, str]:
            try:
                return self.pictures.hand_out(str(asked["key"]), str(asked["kind"]))
            except LoRAError as error:
                return {"problem": str(error)}

        return gr.HTML(
            elem_id=elem_id, elem_classes=["view"], js_on_load=_PICTURE, server_functions=[hand_out], **options
        )

    def put(self, picture: Picture) -> str:
        """Returns a picture as HTML, and keeps it for its downloads."""
        return self.pictures.put(picture)

    def draws(
        self,
        tab: Any,
        show: Callable[..., Any],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        *,
        by_matrix: bool = False,
        also: Sequence[Any] = (),
        **options: Any,
    ) -> Any:
        """Has a section drawn whenever it is opened, or seen while what it shows changes.

        Args:
            tab: The section's `gr.Tab`.
            show: show(opened, *values) returns what `outputs` show, or yields it more than once; with `by_matrix`,
                show(opened, path, *values).
            inputs: The components with the values.
            outputs: What is filled.
            by_matrix: Whether it shows the matrix that is chosen.
            also: Further events after which it is drawn anew, such as a choice of its own.
            options: For `gr.on`.

        Returns:
            The event that draws, for `cancels`.
        """
        is_stream = inspect.isgeneratorfunction(show)
        nothing = gr.skip() if len(outputs) == 1 else [gr.skip()] * len(outputs)

        def draw(looked_at: tuple[Source, Any] | tuple[Source, Any, str] | None, *values: Any) -> Iterator[Any]:
            if looked_at is None:
                yield nothing
                return
            source, _, *path = looked_at
            opened = self.studio.opened(source)
            if not all(one in opened.adapter.factors for one in path):
                yield nothing
                return
            found = show(opened, *path, *values)
            yield from found if is_stream else (found,)

        draw.__name__ = show.__name__
        self.tabs[tab.id] = tab
        events = [links.event(self.head, f"draw_{tab.id}_{'view' if by_matrix else 'source'}"), *also]
        given = [self.view if by_matrix else self.source, *inputs]
        options = {"show_progress": "minimal", "trigger_mode": "always_last", **PRIVATE, **options}
        return gr.on(events, self.studio.guard(draw), given, [*outputs], **options)

    def follow(self) -> None:
        """Has the section that is seen, and no other, drawn when it is opened and when what is looked at changes.

        For once all are built.
        """
        for what, state in (("source", self.source), ("view", self.view)):
            state.change(None, js=f"() => window.draw('{what}')", api_visibility="private")
        for name, tab in self.tabs.items():
            tab.select(None, js=f"() => window.openSection('{name}')", api_visibility="private")
