"""What an open page costs: its scripts come first, and only the page gets it."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from studio import watch


@pytest.fixture
def client():
    page = "<!doctype html><html><head><script src=first.js></script></head><body>ä</body></html>"
    routes = [
        Route("/", lambda _: HTMLResponse(page, headers={"x-mine": "kept"})),
        Route("/other", lambda _: PlainTextResponse("<head>")),
    ]
    with TestClient(
        Starlette(routes=routes, middleware=[Middleware(watch.BeforeAll, watch.CALM, "first()")])
    ) as client:
        yield client


def test_the_scripts_stand_before_all_others(client):
    answer = client.get("/")
    assert answer.headers["x-mine"] == "kept"
    assert int(answer.headers["content-length"]) == len(answer.content)
    head = answer.text.partition("<head>")[2]
    assert head.index("requestAnimationFrame") < head.index("<script>first()</script>") < head.index("first.js")
    assert answer.text.endswith("<body>ä</body></html>")


def test_nothing_else_is_touched(client):
    assert client.get("/other").text == "<head>"
    assert client.head("/").status_code == 200
