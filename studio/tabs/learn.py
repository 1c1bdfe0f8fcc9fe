"""Learn: the notebooks to read in the page. Its addresses are #learn and #learn/NAME, so Back leaves it as any page."""

import json
import re
from pathlib import Path
from typing import Any

import gradio as gr

from core import LoRAError
from studio.state import Studio

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"

JS = """
const follow = () => {
    const [is_open, name] = location.hash.match(/^#learn[/]?(.*)$/) ?? [];
    document.body.classList.toggle('learning', is_open !== undefined);
    if (is_open === undefined) return;
    scrollTo(0, 0);
    trigger('learn', {name: name});
};
window.addEventListener('hashchange', follow);
document.addEventListener('click', (event) => {
    const hash = event.target.closest('a[href^="#"]')?.getAttribute('href');
    if (hash === undefined || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();  // by the page's <base> the link would load it anew
    location.hash = hash;
});
if (location.hash.startsWith('#learn')) setTimeout(follow);
"""
"""Runs in the page's head: the address decides whether tabs or lessons are seen, and raises the event `learn`."""

LINKS = '<a class="learn" href="#learn">Learn</a><a class="back" href="#">To the studio</a>'
"""HTML for the page's head."""

CSS = """
.studio-head nav { display: flex; align-items: baseline; gap: 1rem; margin-left: auto; }
.studio-head nav a { color: var(--adapted-text) !important; font-weight: 600; }
body:not(.learning) :is(#lessons, .studio-head .back), .learning .studio-head .learn { display: none; }
.learning #tabs { visibility: hidden; height: 0; overflow: hidden; }
.learning .column:has(#run):not(:has(#head)) { display: none; }
#lesson { max-width: 50rem; margin: 0 auto; width: 100%; }
#lesson h2 { margin-top: 2rem; }
#lesson li { margin: .35rem 0; }
#lesson ul:has(> li > a[href^="#learn"]) { list-style: none; padding: 0; margin: 0; }
#lesson li:has(> a[href^="#learn"]) { margin: 1rem 0; }
#lesson li > a[href^="#learn"] { font-weight: 600; }
#lesson :not(pre) > code { white-space: normal; overflow-wrap: anywhere; }
#lesson .token.number { font-size: inherit; line-height: inherit; font-weight: inherit; }
#lesson img { display: block; max-width: 100%; border-radius: 4px; }
#lesson .katex-display { overflow: auto hidden; padding: .2rem 0; }
#lesson pre:has(> .language-text) { background: none; border-left: 3px solid var(--border-color-primary);
  padding: 0 0 0 .75rem; margin: .5rem 0; }
#lesson .code_wrap:has(.language-text) button { display: none; }
#lesson summary { cursor: pointer; font-weight: 600; }
"""

_WELCOME = (
    "What LoRA learns, how to see it, and how to doubt what you see: notebooks with all that they printed and drew, "
    "each with things to predict and to try. Begin with the first; it needs no model."
)

_DELIMITERS: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "$", "right": "$", "display": False},
]


def build(studio: Studio, head: Any) -> None:
    """Draws the place of the lessons, which stays empty until `head` raises the event `learn`."""
    with gr.Column(elem_id="lessons"):
        lesson = gr.Markdown(elem_id="lesson", latex_delimiters=_DELIMITERS)

    def show_lesson(event: gr.EventData) -> str:
        return page(str(event.name))

    head.learn(studio.guard(show_lesson), None, lesson, api_visibility="private", concurrency_limit=None, queue=False)


def page(name: str, folder: Path = NOTEBOOKS) -> str:
    """Returns the notebook of that name as Markdown; for "" the list of all."""
    files = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not files:
        return f"# Learn\n\nNo notebooks lie in `{folder}`. Install LoRA Studio anew: they come with it."
    if name not in files:
        told = "There is no such notebook; these are all." if name else _WELCOME
        return "\n".join([f"# Learn\n\n{told}\n", *map(_entry, files.values())])
    back = "[All notebooks](#learn)"
    try:
        cells = read(files[name])
    except LoRAError as error:
        return f"{error}\n\n{back}"
    later = [path for stem, path in files.items() if stem > name]
    above = f"{back} · to run and change it: `jupyter lab {files[name]}`"
    return "\n\n".join([above, *map(_drawn, cells), "---", "Next:" if later else back, *map(_entry, later[:1])])


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the cells of a notebook, the first of them with its title and its question.

    Raises:
        LoRAError: The file cannot be read as that.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        heading(cells)
        for cell in cells:
            _drawn(cell)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise LoRAError(
            f"`{path.name}` must be a notebook with a title and a question ({type(error).__name__}: {error}); "
            f"make it anew by `python notebooks/build.py {path.stem}`."
        ) from error
    return cells


def heading(cells: list[dict[str, Any]]) -> tuple[str, str]:
    """Returns a notebook's title and its question, as Markdown in one line each."""
    found = re.match(r"# (.+)\n\n\*\*Question\.\*\* ((?:.+\n?)+)", _text(cells[0]["source"]))
    if found is None:
        raise ValueError("its first cell has other words")
    return found[1], " ".join(found[2].split())


def _entry(path: Path) -> str:
    try:
        title, question = heading(read(path))
    except LoRAError as error:
        return f"- {error}"
    return f"- [{title}](#learn/{path.stem})  \n  {question}"


def _drawn(cell: dict[str, Any]) -> str:
    """Returns a cell with its outputs as Markdown."""
    source = _text(cell["source"])
    if cell["cell_type"] != "code":
        return source
    return "\n\n".join([_fenced(source, "python"), *map(_output, cell["outputs"])])


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![The figure that the code above draws](data:image/png;base64,{_text(data['image/png']).strip()})"
    return _fenced(_text(output["text"] if "text" in output else data["text/plain"]), "text")


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _text(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)
