"""All rows before a step is taken, in a real browser: the cut-off moves, rows are listed, a look can be cancelled."""

import json
import re

import pytest
from playwright.sync_api import expect

from tests.browser.serving import open_tab

WAIT = 240_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def page(browser, server):
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(f"{server.url}?tab=model")
    page.wait_for_selector("text=134,515,008", timeout=WAIT)
    open_tab(page, "Data")
    page.wait_for_selector("#lengths svg", timeout=WAIT)
    yield page
    assert page.errors == []
    context.close()


STEADY = """(place) => {
    const before = window.steady, now = window.steady = document.querySelector(place);
    now.focus();
    return now === before;
}"""
"""Whether an element is still the one that was focused when this was asked before: it is not drawn anew any more."""


@pytest.fixture
def upload(page, tmp_path):
    """upload(name, text): gives the page a file of one's own."""

    def give(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        page.get_by_label("My own file").check()
        field = page.locator("#upload input[type=file]")
        field.wait_for(state="attached")
        page.wait_for_timeout(1000)
        if page.locator("#upload").get_by_label("Clear").count():
            page.locator("#upload").get_by_label("Clear").click()
        field.set_input_files(path)
        page.wait_for_function(
            "name => document.querySelector('#data-summary').innerText.includes(name)", arg=name, timeout=WAIT
        )

    return give


def wait_for(page, place, words):
    page.wait_for_function(
        "([place, words]) => document.querySelector(place)?.innerText.includes(words)",
        arg=[place, words],
        timeout=WAIT,
    )


def line(page):
    return page.locator("#lengths .cut").evaluate("e => parseFloat(e.style.left)")


def test_the_cut_off_moves_with_the_keyboard_and_the_numbers_follow(page):
    wait_for(page, "#cut-facts", "0 of ")
    thumb, before = page.locator("#cut-off input"), line(page)
    page.wait_for_function(STEADY, arg="#cut-off input", polling=500, timeout=WAIT)
    for _ in range(30):
        page.keyboard.press("ArrowLeft")
    value = thumb.evaluate("e => e.value")
    page.wait_for_function(
        "v => document.querySelector('#setting-max_length input').value === v", arg=value, timeout=WAIT
    )
    wait_for(page, "#checks", "Answers cut off")
    assert line(page) < before
    assert "0 of" not in page.locator("#cut-facts").inner_text().split("Tokens lost")[0]
    page.locator("#setting-max_length input").fill("256")
    page.locator("#setting-max_length input").press("Tab")
    wait_for(page, "#verdict", "answers cut off")


def test_a_check_lists_its_rows_and_start_is_refused_with_the_reason(page, upload):
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}, <b>{i}</b>."} for i in range(30)]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, rows[4]])
    upload("faulty.jsonl", text + '{"prompt": "cut\n')
    wait_for(page, "#verdict", "cannot be used")
    wait_for(page, "#data-summary", "Recognised: prompt / completion")
    page.locator("#checks").get_by_text("Exact duplicates · 1").click()
    wait_for(page, "#found", "faulty.jsonl, line 31")
    assert "<b>4</b>" in page.locator("#found").inner_text(), "text of rows is shown as text"
    open_tab(page, "Train")
    page.locator("#start").click()
    page.wait_for_selector(".toast-body >> text=1 row of faulty.jsonl cannot be used", timeout=WAIT)
    page.keyboard.press("Escape")
    open_tab(page, "Data")
    page.locator("#setting-bad_rows").get_by_text("skip", exact=True).click()
    page.wait_for_function("!document.querySelector('#verdict').innerText.includes('cannot be used')", timeout=WAIT)
    wait_for(page, "#verdict", "1 skipped")


def test_a_bad_row_is_mended_on_the_page_and_the_mend_is_undone(page, upload):
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(30)]
    upload("mend.jsonl", '{"prompt": "cut\n' + "".join(json.dumps(row) + "\n" for row in rows))
    wait_for(page, "#verdict", "1 row of mend.jsonl cannot be used")  # not of a file before it, with the same check
    page.locator("#checks").get_by_text("Rows that cannot be read · 1").click()
    cell = page.locator("#found .body-cell:visible", has_text="is not valid JSON")
    cell.click()
    wait_for(page, "#mend-facts", "Row 1, mend.jsonl, line 1")
    box = page.locator("#mend-text textarea")
    assert box.input_value() == '{"prompt": "cut'
    box.fill('{"prompt": "Say it.", "completion": " "}')
    page.locator("#mend-save").click()
    page.wait_for_selector(".toast-body >> text=still cannot be used: `completion` is empty", timeout=WAIT)
    page.keyboard.press("Escape")
    box.fill('{"prompt": "Say it.", "completion": "Said, <b>again</b>."}')
    page.locator("#mend-save").click()
    wait_for(page, "#verdict", "(1 of them mended)")
    assert "cannot be used" not in page.locator("#verdict").inner_text()
    box.wait_for(state="hidden")
    page.locator("#checks").get_by_text("Mended by hand · 1").click()
    page.locator("#found .body-cell:visible", has_text="Said, <b>again</b>.").click()
    wait_for(page, "#mend-facts", "mended")
    page.locator("#mend-undo").click()
    wait_for(page, "#verdict", "1 row of mend.jsonl cannot be used")


def test_all_mends_are_undone_only_when_that_is_confirmed(page, upload):
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(30)]
    upload("two.jsonl", '{"prompt": "cut\n{"prompt": "too\n' + "".join(json.dumps(row) + "\n" for row in rows))
    wait_for(page, "#verdict", "2 rows of two.jsonl cannot be used")
    for left in (2, 1):
        page.locator("#checks").get_by_text(f"Rows that cannot be read · {left}").click()
        page.locator("#found .body-cell:visible", has_text="is not valid JSON").first.click()
        text = page.locator("#mend-text textarea")
        expect(text).to_have_value(re.compile('"(cut|too)$'), timeout=WAIT)  # else it would come over what is typed
        text.fill(json.dumps({"prompt": "Say it.", "completion": f"Said {left}."}))
        page.locator("#mend-save").click()
        wait_for(page, "#verdict", f"({3 - left} of them mended)")
    page.locator("#checks").get_by_text("Mended by hand · 2").click()
    page.locator("#found .body-cell:visible", has_text="Said 1.").click()
    page.locator("#mend-undo-all").click()
    wait_for(page, "#mend-question", "Undo all 2 mends?")
    page.locator("#mend-undo-no").click()
    page.locator("#mend-question").wait_for(state="hidden")
    assert "2 of them mended" in page.locator("#verdict").inner_text()
    page.locator("#mend-undo-all").click()
    page.locator("#mend-undo-yes").click()
    wait_for(page, "#verdict", "2 rows of two.jsonl cannot be used")


def test_nothing_stands_above_the_button_that_checks_all_rows(page):
    title = page.get_by_role("heading", name="All rows, before a step is taken").bounding_box()
    button = page.locator("#check-rows").bounding_box()
    assert button["y"] - title["y"] - title["height"] < 30


def test_a_long_look_tells_how_far_it_is_and_can_be_cancelled(page, upload):
    row = json.dumps({"prompt": "Say it.", "completion": "A sentence that goes on for a while. " * 8}) + "\n"
    upload("long.jsonl", row * 60_000)
    wait_for(page, "#verdict", "press Check all rows")
    page.locator("#check-rows").click()
    wait_for(page, "#survey-progress", "of 60,000 rows")
    page.locator("#cancel-check").click()
    wait_for(page, "#survey-progress", "Cancelled")
    wait_for(page, "#verdict", "Not all rows were looked at")
    said = page.locator("#verdict").inner_text()
    page.wait_for_timeout(1500)
    assert page.locator("#verdict").inner_text() == said
    assert "Cancelled" in page.locator("#survey-progress").inner_text()
