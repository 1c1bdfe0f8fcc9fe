"""What the tests of the page ask it with."""

import asyncio

import gradio as gr

from core import (
    Started,
    Step,
)
from studio import app
from studio.state import Studio

STARTED = Started(60, 384, 10_000, "cpu", "float32", "resident memory of the process")


STEP = Step(1, 1.5, 1e-3, 0.25, num_tokens=120, num_trained_tokens=80, step_seconds=0.5, memory_bytes=2 * 10**9)


def build(studio: Studio) -> gr.Blocks:
    async def built() -> gr.Blocks:  # outside of a running loop, gr.Blocks leaves one behind that nobody closes
        return app.build(studio)

    return asyncio.run(built())


def events(page: gr.Blocks, name: str) -> list:
    found = [event for event in page.fns.values() if getattr(event.fn, "__name__", None) == name]
    assert found, name
    return found


def handler(page: gr.Blocks, name: str, elem_id: str | None = None):
    """The handler of that name; where there are several, the one that fills the component of that id."""
    (only,) = {e.fn for e in events(page, name) if elem_id is None or elem_id in [o.elem_id for o in e.outputs]}
    return only


def question(run: object, *, train: bool = True) -> dict:
    """What an open page asks the first time."""
    return {"page": "one", "hidden": False, "run": run, "train": train, "steps": "", "going": [], "marks": {}}


def look(page: gr.Blocks, run: str, /, *, train: bool = True, **known) -> dict:
    """What an open page is told when it asks."""
    (head,) = (b for b in page.blocks.values() if b.elem_id == "head")
    told = head.look(question(run, train=train) | known)
    return told | {
        "parts": {part: drawn for part, (drawn, _) in told["parts"].items()},
        "marks": {part: mark for part, (_, mark) in told["parts"].items()},
    }


def update(component) -> dict:
    """What a component that a handler returns changes on the page."""
    return component._constructor_args[0]
