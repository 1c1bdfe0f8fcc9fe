"""What an open page does by itself while a run goes on: it tells of its end, and disturbs nobody who reads it.

The run is one by hand, so that what it says, and when, is the test's to choose.
"""

import pytest

from core import Failed, Finished
from studio.runs import Runs
from studio.workspace import Workspace
from tests.browser.axe import barriers
from tests.browser.by_hand import ByHand, step

pytestmark = pytest.mark.slow
WAIT = 240_000  # milliseconds, on a busy machine

ASIDE = """
let aside = false;
Object.defineProperty(document, 'hidden', {get: () => aside});
window.putAside = (is) => { aside = is; };
window.notified = [];
window.asked = 0;
const ask = Notification.requestPermission.bind(Notification);
window.Notification = class extends Notification {
    constructor(title, options) { super(title, options); notified.push(this); }
};
window.Notification.requestPermission = () => { asked++; return ask(); };
"""
"""Lets a test put the page into the background, and counts what it asks for and says there."""


@pytest.fixture
def by_hand(workspace_folder):
    started = []

    def start(name):
        started.append(ByHand(Workspace(workspace_folder), name))
        return started[-1]

    yield start
    for one in started:
        one.end()
        Runs(Workspace(workspace_folder)).delete(one.run)


@pytest.fixture
def open_page(browser, server):
    contexts = []

    def open_at(query, *, allowed=True, **options):
        contexts.append(browser.new_context(viewport={"width": 1440, "height": 900}, **options))
        if allowed:
            contexts[-1].grant_permissions(["notifications"])
        page = contexts[-1].new_page()
        page.add_init_script(ASIDE)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(f"{server.url}?{query}")
        return page

    yield open_at
    for context in contexts:
        context.close()


def wait_for(page, words, place="#status"):
    page.wait_for_function(
        "([place, words]) => document.querySelector(place)?.innerText.includes(words)", arg=[place, words], timeout=WAIT
    )


def test_each_page_tells_of_an_end_and_its_button_shows_the_run(by_hand, open_page):
    run, another = by_hand("Inns <b>bold</b>"), by_hand("Others")
    page, page_elsewhere = (open_page(f"run={another.run.id}&tab={tab}") for tab in ("train", "runs"))
    wait_for(page, "step 10 of 40", "#head-line")
    wait_for(page_elsewhere, "step 10 of 40", "#head-line")
    run.end(Failed("The loss is <nan>."))
    for one in (page, page_elsewhere):
        wait_for(one, "“Inns <b>bold</b>” failed", "#failures")
        wait_for(one, "The loss is <nan>.", "#failures")
        assert barriers(one) == []
    page.locator("#failures [data-tab=train]").click()
    wait_for(page, "The loss is <nan>.")
    assert "Inns" in page.locator("#run input").input_value()
    assert page.locator(".end").count() == 0, "who went there needs the toast no more"
    page_elsewhere.get_by_role("button", name="Close").click()
    another.end(Finished(10, "done", 0))
    for one in (page, page_elsewhere):
        wait_for(one, "Lowest held-out loss 1.125, at step 10. Trained for 5 s.", "#ends")
        assert one.locator(".end").count() == 1
        assert one.title() == "LoRA Studio" and one.evaluate("[asked, notified.length]") == [0, 0] and one.errors == []
    late = open_page("tab=train")
    wait_for(late, "Nothing is training", "#head-line")
    late.wait_for_timeout(5000)  # more than one look
    assert late.locator(".end").count() == 0


def test_the_browser_tells_of_it_once_somebody_asked_and_the_page_is_hidden(by_hand, open_page):
    run = by_hand("Inns")
    page = open_page(f"run={run.run.id}&tab=train")
    box = page.get_by_label("Tell me when a run ends")
    box.first.click()
    wait_for(page, "The browser does, too", ".tell")
    assert page.evaluate("notified.map((one) => one.title)") == ["LoRA Studio tells you here"]
    page.evaluate("putAside(true)")
    page.wait_for_function("document.title === '(25 %) LoRA Studio'", timeout=WAIT)
    run.end(Finished(10, "stopped", 0))
    page.wait_for_function("document.title === '✓ LoRA Studio'", timeout=WAIT)
    assert page.evaluate("[notified[1].title, notified[1].body.split(',')[0], notified[1].tag]") == [
        "“Inns” was stopped",
        "Lowest held-out loss 1.125",
        run.run.id,
    ]
    looks = []
    page.on("request", lambda request: looks.append(request.url))
    page.wait_for_timeout(17_000)
    assert looks == [], "with nothing going on, a page in the background asks for nothing"
    page.evaluate("notified[1].onclick()")
    page.evaluate("putAside(false)")
    page.wait_for_function("document.title === 'LoRA Studio'", timeout=WAIT)
    wait_for(page, "stopped")
    page.reload()
    box.first.wait_for(timeout=WAIT)
    page.wait_for_function("document.querySelector('[data-tell]').checked", timeout=WAIT)
    assert page.evaluate("asked") == 0, "what was allowed is not asked for again"
    box.first.click()
    page.reload()
    box.first.wait_for(timeout=WAIT)
    wait_for(page, "Nothing is training", "#head-line")
    assert not box.first.is_checked() and page.errors == []


def test_where_the_browser_may_not_it_is_said_and_the_page_tells_all_the_same(by_hand, open_page):
    run = by_hand("Inns")
    page = open_page(f"run={run.run.id}&tab=train", allowed=False)
    box = page.get_by_label("Tell me when a run ends")
    box.first.wait_for(timeout=WAIT)
    assert page.evaluate("asked") == 0
    box.first.click()
    wait_for(page, "the page itself still says it", ".tell")
    page.wait_for_function("!document.querySelector('[data-tell]').checked", timeout=WAIT)
    assert page.evaluate("asked") == 1
    run.end(Finished(10, "done", 0))
    wait_for(page, "“Inns” has finished", "#ends")
    assert page.evaluate("notified.length") == 0 and page.errors == []


def test_a_refresh_keeps_focus_selection_scroll_and_what_is_open(by_hand, open_page):
    run = by_hand("Inns")
    run.run.worker_log.write_text("".join(f"line {i}\n" for i in range(18)))
    page = open_page(f"run={run.run.id}&tab=train")
    wait_for(page, "10 of 40")
    page.get_by_role("button", name="Worker's log").click()
    page.locator("#worker-log").wait_for(timeout=WAIT)
    wait_for(page, "line 17", "#worker-log")
    page.evaluate(
        """() => {
            const name = [...document.querySelectorAll('#status dt')].find((dt) => dt.innerText === 'Held-out loss');
            const log = document.querySelector('#worker-log').firstChild;
            log.parentElement.scrollTop = 40;
            getSelection().setBaseAndExtent(name.nextSibling.firstChild, 0, log, log.data.indexOf('line 9'));
            window.kept = [...document.querySelectorAll('#charts svg, #status dd')];
            document.querySelector('#charts rect').id = 'pointed';
        }"""
    )
    said = page.evaluate("String(getSelection())")
    assert said.startswith("3.250 → 1.125") and said.rstrip().endswith("line 8")
    run.run.worker_log.write_text("".join(f"line {i}\n" for i in range(20)))
    run.say(step(11), step(12))
    wait_for(page, "12 of 40")
    wait_for(page, "line 19", "#worker-log")
    now = page.evaluate("String(getSelection())")
    assert now.startswith("3.250 → 1.125") and now.rstrip().endswith("line 8")
    assert page.evaluate("document.querySelector('#worker-log').scrollTop") == 40
    assert page.evaluate("kept.every((one) => one.isConnected)")
    assert "0.167" in page.locator("#charts .key").first.inner_text(), "and yet the charts are those of step 12"
    run.end(Finished(12, "done", 0))
    wait_for(page, "finished")
    assert page.errors == []
