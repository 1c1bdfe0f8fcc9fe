"""A page behind a password, in a real browser."""

import pytest

WAIT = 240_000  # milliseconds, on a busy machine


@pytest.mark.parametrize("password", ["correct horse", "wrong horse"])
def test_who_knows_the_password_gets_a_page_that_works_and_nobody_else_gets_any(guarded_server, browser, password):
    context = browser.new_context(http_credentials={"username": "ada", "password": password})
    page = context.new_page()
    failed = []
    page.on("response", lambda response: failed.append(response.url) if response.status >= 400 else None)
    if password == "wrong horse":
        assert page.goto(guarded_server.url).status == 401
    else:
        page.goto(f"{guarded_server.url}?tab=model")
        page.wait_for_selector("text=134,515,008", timeout=WAIT)  # an event and its stream
        page.wait_for_selector("text=nothing is training", timeout=WAIT)  # the look
        assert failed == []
    context.close()
