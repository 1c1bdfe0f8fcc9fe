"""From declared settings to widgets, and from the widgets' values back to a checked config."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import gradio as gr

from core import Config, LoRAError, Setting, quoted, settings

MOST_RADIOS = 6
"""More choices than these are in a list that opens."""

PAPER = "https://arxiv.org/pdf/2106.09685"
"""Hu et al. 2021; a place in it follows as LaTeX names it, #subsection.7.2 or #appendix.D."""


class Form:
    """Widgets of some settings of a config class, made where this is called.

    Attributes:
        names: The settings, in the widgets' order.
        widgets: Their widgets.
    """

    def __init__(self, config: type[Config], names: Sequence[str] | None = None, **defaults: Any) -> None:
        """Draws the settings; the advanced ones go under "More".

        Those that mean something under some choices of the first setting only are seen under these.

        Args:
            config: The class whose settings are drawn.
            names: Which; by default all.
            defaults: Values to begin with that differ from the declared ones.
        """
        declared = {s.name: s for s in settings(config)}
        chosen = [declared[name] for name in (names or declared)]
        plain, advanced = [s for s in chosen if not s.advanced], [s for s in chosen if s.advanced]
        self.widgets, depending = _rows(plain, defaults)
        if advanced:
            with gr.Accordion("More", open=False):
                more, _ = _rows(advanced, defaults)
                self.widgets += more
        self.names = [s.name for s in (*plain, *advanced)]
        self._settings = {s.name: s for s in chosen}
        if depending:
            self.widgets[0].change(
                lambda value: [gr.Row(visible=value in only) for _, only in depending],
                self.widgets[0],
                [row for row, _ in depending],
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )

    def values(self, raw: Sequence[Any]) -> dict[str, Any]:
        """Returns setting → value for what the widgets hold, ready for `Config.from_dict`.

        Raises:
            LoRAError: A table of names and numbers is no JSON.
        """
        return {name: _from_widget(self._settings[name], v) for name, v in zip(self.names, raw, strict=True)}

    def shown(self, config: Config) -> list[Any]:
        """Returns what the widgets show for `config`."""
        values = config.to_dict()
        return [_to_widget(values[name]) for name in self.names]


def _rows(chosen: list[Setting], defaults: dict[str, Any]) -> tuple[list[Any], list[tuple[Any, tuple[str, ...]]]]:
    """Returns the widgets, and the rows that are seen under some choices of the first setting, with these."""
    widgets, depending = [], []
    for only, alike in groupby(chosen, lambda s: s.only):
        together = list(alike)
        is_seen = not only or defaults.get(chosen[0].name, chosen[0].default) in only
        for start in range(0, len(together), 2):
            with gr.Row(equal_height=False, visible=is_seen) as row:
                widgets += [widget(s, defaults.get(s.name, s.default)) for s in together[start : start + 2]]
            if only:
                depending.append((row, only))
    return widgets, depending


def address(place: str) -> str:
    """Returns the link to a place that `Setting.why` names.

    Raises:
        LoRAError: It is neither a section or an appendix of the LoRA paper, nor ends as a paper's number does.
    """
    if found := re.fullmatch(r"[\w+ ]+, arXiv:(\d{4}\.\d{4,5})", place):
        return f"https://arxiv.org/abs/{found[1]}"
    if found := re.fullmatch(r"LoRA paper, (?:§(\d(\.\d)?)|app\. ([A-H]))", place):
        section, is_deep, appendix = found.groups()
        return f"{PAPER}#appendix.{appendix}" if appendix else f"{PAPER}#{'sub' if is_deep else ''}section.{section}"
    raise LoRAError(
        f"`why` (={quoted(place)}) must be a place like 'LoRA paper, §7.2', 'LoRA paper, app. D' or "
        "'DoRA, arXiv:2402.09353'."
    )


def info(help: str, why: str = "") -> str:
    """Returns an explanation and where a paper speaks of it, in the few marks that Gradio knows there.

    Gradio escapes all else, and opens the links in a tab of their own that knows nothing of this one.

    Raises:
        LoRAError: `why` is no list of places as `Setting.why` is.
    """
    links = [f"{place}]({address(place)})" for place in why.split("; ") if place]
    return help + (f" [Why: {'; ['.join(links)}" if links else "")


def widget(s: Setting, value: Any) -> Any:
    """Returns the Gradio component for one setting, its explanation beside it."""
    common: dict[str, Any] = {
        "label": s.label,
        "info": info(s.help, s.why),
        "elem_id": f"setting-{s.name}",
        "min_width": 220,
    }
    if s.choices is not None:
        choices = [(s.choices[c], c) for c in s.choices] if isinstance(s.choices, Mapping) else list(s.choices)
        if len(choices) > MOST_RADIOS:
            return gr.Dropdown(choices, value=value, filterable=False, **common)
        return gr.Radio(choices, value=value, **common)
    if s.type is bool:
        return gr.Checkbox(value=value, **common)
    if s.type in (int, float):
        # Bounds are checked with a better message when the form is used.
        return gr.Number(value=value, precision=0 if s.type is int else None, **common)
    return gr.Textbox(value=_to_widget(value), max_lines=3, **common)


def _to_widget(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value) if value else ""
    return ", ".join(value) if isinstance(value, (list, tuple)) else value


def _from_widget(s: Setting, value: Any) -> Any:
    if value is None and isinstance(s.default, (dict, tuple)):
        return s.parse("")  # an emptied box
    return s.parse(value) if isinstance(value, str) else value
