"""The interface in other languages: what the page shows in English → the same in another, applied in the browser.

The page is written in English, in one place for each sentence. Gradio's I18n brings the tables to the browser, picks
the language, and translates most of Gradio's own words; `page.js` says ours, in whatever component they stand. In the
folder of a language `page.json` has what this project's sources say, `gradio.json` what Gradio says in English whatever
the language.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import gradio as gr

_HERE = Path(__file__).parent

MARK = "studio:"

SCRIPT = (_HERE / "page.js").read_text(encoding="utf-8").replace("MARK", json.dumps(MARK))
"""Runs in the page before all other scripts."""

SWITCH = (
    '<button type="button" class="to-ko" lang="ko" translate="no" data-language="ko">한국어</button>'
    '<button type="button" class="to-en" lang="en" translate="no" data-language="en">English</button>'
)
"""HTML of the buttons that change the language; of two, the one that is not spoken is seen."""

CSS = """
.studio-head nav button { margin: 0 !important; padding: 0; border: 0; background: none; font-size: .9rem;
  color: var(--body-text-color-subdued); cursor: pointer; }
.studio-head nav button:hover { color: var(--body-text-color); text-decoration: underline; }
html:lang(ko) .studio-head .to-ko, html:not(:lang(ko)) .studio-head .to-en { display: none; }
html:lang(ko) { word-break: keep-all; }
"""


def tables() -> Mapping[str, Mapping[str, str]]:
    """Returns language → English → what is said in its place; see `page.js` for "{}"."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(_HERE.glob("*/*.json")):
        found.setdefault(path.parent.name, {}).update(json.loads(path.read_text(encoding="utf-8")))
    return found


def i18n() -> gr.I18n:
    """Returns the tables as Gradio hands them to the page.

    Each key has `MARK` before it: a text that is a key itself Gradio would also translate where it is the value of a
    choice, which the server then would not know.
    """
    return gr.I18n(
        **{name: {MARK + english: other for english, other in table.items()} for name, table in tables().items()}
    )
