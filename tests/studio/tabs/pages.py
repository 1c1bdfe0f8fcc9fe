"""What the tests of the tabs share."""

import asyncio
from html.parser import HTMLParser

import gradio as gr

from core import (
    Started,
    Step,
)

HOSTILE = '<img src=x onerror="alert(1)">&amp;'


STARTED = Started(60, 384, 10_000, "cpu", "bfloat16", "resident memory of the process")


def step(number: int, loss: float = 1.5) -> Step:
    return Step(
        number, loss, 1e-3, 0.25, num_tokens=120, num_trained_tokens=80, step_seconds=0.5, memory_bytes=2 * 10**9
    )


class Read(HTMLParser):
    """What a browser makes of HTML: `tags`, `text` in pieces, and the `pictures` as they are told to who sees none."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.pictures: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "svg":
            self.pictures.append(dict(attrs)["aria-label"])

    def handle_data(self, data):
        self.text.append(data)

    @property
    def facts(self) -> dict[str, str]:
        """Title → value, of `theme.facts`."""
        return dict(zip(self.text[::2], self.text[1::2], strict=True))


def drawn(make):
    """Returns what `make` draws on a page of its own."""

    async def draw():  # outside of a running loop, gr.Blocks leaves one behind that nobody closes
        with gr.Blocks():
            return make()

    return asyncio.run(draw())
