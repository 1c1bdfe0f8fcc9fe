"""What the sections of the Spectrum tab share: the adapter and the matrix that they look at, and when they draw."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from core import LoRAError
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
        section: State with the id of the section that is seen.
        sections: The `gr.Tabs` of the sections.
        pictures: What was drawn last.
        tabs: Section → its `gr.Tab`.
        turns: (section, whether by matrix) → State that changes when the section is to be drawn anew.
    """

    studio: Studio
    source: Any
    matrix: Any
    view: Any
    files: Any
    section: Any
    sections: Any
    pictures: Pictures = field(default_factory=Pictures)
    tabs: dict[str, Any] = field(default_factory=dict)
    turns: dict[tuple[str, bool], Any] = field(default_factory=dict)

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
            given, seen = values[: len(inputs)], values[len(inputs) :]
            if looked_at is None or seen not in ((), (tab.id,)):
                yield nothing
                return
            source, _, *path = looked_at
            opened = self.studio.opened(source)
            if not all(one in opened.adapter.factors for one in path):
                yield nothing
                return
            found = show(opened, *path, *given)
            yield from found if is_stream else (found,)

        draw.__name__ = show.__name__
        self.tabs[tab.id] = tab
        if (tab.id, by_matrix) not in self.turns:
            self.turns[tab.id, by_matrix] = gr.State(0)
        events = [self.turns[tab.id, by_matrix].change, *also]
        # The section that is seen is asked for, too: a page takes each State that is set first for a new one, even
        # where it is left as it is.
        given = [self.view if by_matrix else self.source, *inputs, self.section]
        options = {"show_progress": "minimal", **PRIVATE, **options}
        return gr.on(events, self.studio.guard(draw), given, [*outputs], **options)

    def follow(self) -> None:
        """Has the section that is seen, and no other, drawn when it is opened and when what is looked at changes.

        For once all are built. Gradio asks a page's listeners of one event one after another, so those of hidden
        sections would be waited for. All goes through its queue: of a State that is set past it no page is told.
        """
        hidden: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
        for looked_at, by_matrix in ((self.source, False), (self.view, True)):
            turns = {section: turn for (section, kind), turn in self.turns.items() if kind == by_matrix}

            def take_turns(seen: str, *now: int, names: tuple[str, ...] = tuple(turns)) -> list[Any]:
                return [turn + 1 if name == seen else gr.skip() for name, turn in zip(names, now, strict=True)]

            places = [*turns.values()]
            looked_at.change(take_turns, [self.section, *places], places, **hidden)
        for name, tab in self.tabs.items():

            def open_section(seen: str, *now: int, name: str = name) -> list[Any]:
                if seen == name:  # the page was opened at it: it is drawn once what is looked at is known
                    return [gr.skip()] * (1 + len(now))
                return [name, *(turn + 1 for turn in now)]

            places = [self.section, *(turn for (section, _), turn in self.turns.items() if section == name)]
            tab.select(open_section, places, places, **hidden)
