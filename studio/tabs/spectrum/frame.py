"""What the sections of the Spectrum tab share: the adapter and the matrix that they look at, and when they draw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.opened import Source
from studio.state import Studio

PRIVATE: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None}


@dataclass(frozen=True)
class Frame:
    """The tab around the sections.

    Attributes:
        studio: What is served.
        source: State with a `Source`, as `Studio.place_of` gives it with the times of its files; None for none.
        matrix: The choice of one matrix by its path.
        view: State with the source and the matrix, which changes once when both do.
        section: State with the id of the section that is seen.
        sections: The `gr.Tabs` of the sections.
    """

    studio: Studio
    source: Any
    matrix: Any
    view: Any
    section: Any
    sections: Any

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
    ) -> None:
        """Has a section drawn whenever it is opened, or seen while what it shows changes.

        Args:
            tab: The section's `gr.Tab`.
            show: show(opened, *values) returns what `outputs` show; with `by_matrix`, show(opened, path, *values).
            inputs: The components with the values.
            outputs: What is filled.
            by_matrix: Whether it shows the matrix that is chosen.
            also: Further events after which it is drawn anew, such as a choice of its own.
            options: For `gr.on`.
        """
        nothing = gr.skip() if len(outputs) == 1 else [gr.skip()] * len(outputs)

        def draw(view: tuple[Source, Any, str] | None, *values: Any) -> Any:
            if view is None:
                return nothing
            source, _, path = view
            opened = self.studio.opened(source)
            if not by_matrix:
                return show(opened, *values)
            return show(opened, path, *values) if path in opened.adapter.factors else nothing

        def draw_if_seen(seen: str, *values: Any) -> Any:
            return draw(*values) if seen == tab.id else nothing

        draw.__name__ = show.__name__
        given = [self.view, *inputs]
        events = [(self.view if by_matrix else self.source).change, *also]
        tab.select(lambda: tab.id, None, self.section, queue=False, show_progress="hidden", **PRIVATE)
        tab.select(self.studio.guard(draw), given, [*outputs], **PRIVATE | options)
        gr.on(events, self.studio.guard(draw_if_seen), [self.section, *given], [*outputs], **PRIVATE | options)


def show_figure(figure: Any, label: str) -> str:
    """Returns HTML of a figure of `studio.figures`.

    Args:
        figure: The figure.
        label: What a screen reader says in its place.
    """
    from studio import svg  # matplotlib is not needed to serve the page

    return f'<div class="figure">{svg.to_svg(figure, label)}</div>'
