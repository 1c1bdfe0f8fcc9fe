"""The whole journey of a newcomer, in a real browser, with the real starter model on real rows."""

import io
import json
import re
import zipfile

import pytest
from PIL import Image

from core import Failed
from studio.runs import Runs
from studio.workspace import Workspace
from tests.browser.axe import barriers
from tests.browser.by_hand import ByHand
from tests.browser.korean import left_in_english
from tests.browser.serving import WAIT, open_tab

STEPS = 20

# Whether the three answers are the same as when this was asked before: they have ended.
SETTLED = """() => {
    const now = ["a", "b", "c"].map(p => document.querySelector(`#talk-${p}`).innerText).join("|");
    const same = now === window.last;
    window.last = now;
    return same && document.querySelectorAll(".talk .said-by").length >= 3;
}"""


def said_by(page, letter):
    return page.locator(f"#talk-{letter} .said-by p").last.text_content()


def status_text(page):
    return page.locator("#status").inner_text()


def step_shown(page):
    found = re.search(r"(\d+) of \d+", status_text(page))
    return int(found[1]) if found else 0


def wait_for_step(page, step):
    page.wait_for_function(
        "step => Number((document.querySelector('#status').innerText.match(/(\\d+) of \\d+/) || [0, 0])[1]) >= step",
        arg=step,
        timeout=WAIT,
    )


@pytest.fixture(scope="module")
def page(browser, server):
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.foreign, page.errors = [], []
    page.on(
        "request",
        lambda r: page.foreign.append(r.url) if not r.url.startswith((server.url, "data:", "blob:")) else None,
    )
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(f"{server.url}?tab=model")
    page.wait_for_selector("text=134,515,008", timeout=WAIT)  # the starter's parameters: it was described
    yield page
    context.close()


@pytest.fixture(scope="module")
def trained(page, server):
    """A run of 20 steps, watched while it goes on."""
    open_tab(page, "Model")
    page.get_by_label("All attention").check()
    page.wait_for_function("document.querySelector('#model-cost').innerText.includes('120 of 212')", timeout=WAIT)
    open_tab(page, "Data")
    page.wait_for_selector("#tokens >> text=<|im_end|>", timeout=WAIT)
    open_tab(page, "Train")
    page.get_by_label("Name of the run").fill("Journey <b>bold</b>")
    page.get_by_label("Steps", exact=True).fill(str(STEPS))
    page.locator("#start").click()
    wait_for_step(page, 2)
    return page


def test_the_run_is_shown_live_and_survives_a_reload_a_pause_and_a_killed_server(trained, server):
    page = trained
    before = step_shown(page)
    assert 2 <= before < STEPS, "the page must show the run while it is going on"
    assert "running" in status_text(page)
    assert page.locator("#stop").is_enabled()

    page.reload()
    open_tab(page, "Train")
    wait_for_step(page, before + 1)
    assert "running" in status_text(page) or step_shown(page) == STEPS

    page.locator("#pause").click()
    page.wait_for_function("document.querySelector('#status').innerText.includes('paused')", timeout=WAIT)
    paused_at = step_shown(page)
    assert before < paused_at < STEPS
    page.get_by_role("button", name="Last half").click()
    half = page.get_by_role("button", name="Last half", pressed=True)
    half.wait_for()
    half.evaluate("button => { button.same = true; }")
    page.locator("#resume").click()
    wait_for_step(page, paused_at + 1)
    assert half.evaluate("button => button.same"), "what was chosen stays, in the same button, while charts are drawn"

    server.kill()
    server.start()
    page.goto(f"{server.url}?tab=model")
    page.errors.clear()  # a page whose server has just gone may miss a part of its own
    open_tab(page, "Train")
    page.wait_for_function("document.querySelector('#status').innerText.includes('finished')", timeout=WAIT)
    assert step_shown(page) == STEPS
    for toast in page.get_by_role("button", name="Close").all():  # the page may have seen the end
        toast.click()
    first, last = map(float, re.search(r"([\d.]+) → ([\d.]+)", status_text(page)).groups())
    (run,) = Runs(Workspace(server.workspace)).list()
    run.log.refresh()
    assert [step.step for step in run.log.steps] == list(range(1, STEPS + 1)), "each step stands there once"
    assert last < first - 0.3, "twenty steps on the starter data lower the held-out loss plainly"
    assert "<b>bold</b>" in status_text(page), "a name is shown as text, never as HTML"


def test_the_loss_chart_draws_both_series(trained):
    page = trained
    open_tab(page, "Train")
    chart = page.locator("#charts .live").first
    chart.locator("svg").wait_for(timeout=WAIT)
    colours = dominant_colours(chart.locator(".plot").screenshot())
    assert (217, 105, 26) in colours, "the held-out losses are drawn"
    assert (239, 176, 124) in colours, "the training losses are drawn"


def test_dragging_across_a_chart_looks_closer_and_the_buttons_look_at_all_again(trained):
    page = trained
    open_tab(page, "Train")
    plot = page.locator("#charts .plot").first
    page.get_by_role("button", name="All", exact=True).click()
    page.wait_for_selector(f"#charts .plot[data-steps='0 {STEPS}']")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 60, steps=3)
    assert page.locator(".zoom-mark").bounding_box()["width"] == pytest.approx(0.5 * box["width"], abs=2)
    page.mouse.up()
    page.get_by_role("button", name=f"{STEPS // 4} to {3 * STEPS // 4}", pressed=True).wait_for()
    assert page.locator(".zoom-mark").count() == 0
    assert len(set(page.locator("#charts .plot").evaluate_all("all => all.map(plot => plot.dataset.steps)"))) == 1
    page.get_by_role("button", name="Last tenth").focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Last tenth", pressed=True).wait_for()
    plot.dblclick()
    page.get_by_role("button", name="All", exact=True, pressed=True).wait_for()


def dominant_colours(png):
    image = Image.open(io.BytesIO(png)).convert("RGB")
    counted = image.getcolors(maxcolors=image.width * image.height)
    return {colour for count, colour in counted if count >= 20}


def test_a_file_of_one_s_own_is_read_its_columns_guessed_and_a_bad_one_refused_in_words(trained, tmp_path):
    page = trained
    good, bad = tmp_path / "mine.csv", tmp_path / "broken.jsonl"
    good.write_text('question,answer\n"Where, <b>if</b> at all?",At the quay.\nWhen?,At noon.\n', encoding="utf-8")
    bad.write_text('{"a": 1\n\n{"a": \n', encoding="utf-8")
    open_tab(page, "Data")
    page.get_by_label("My own file").check()
    upload = page.locator("#upload input[type=file]")
    upload.wait_for(state="attached")
    page.wait_for_timeout(1000)  # nobody chooses a file faster; in its first moments the field forgets one
    upload.set_input_files(good)
    page.wait_for_function("document.querySelector('#data-summary').innerText.includes('2 rows')", timeout=WAIT)
    assert page.locator("#column-prompt input").input_value() == "question"
    assert page.locator("#column-completion input").input_value() == "answer"
    page.wait_for_function(
        r"document.querySelector('#tokens').innerText.replace(/\s/g, '').includes('Atthequay')", timeout=WAIT
    )
    assert "Where, <b>if</b> at all?" in page.locator("#preview").inner_text()
    page.locator("#upload").get_by_label("Clear").click()
    upload.set_input_files(bad)
    page.wait_for_selector("text=line 1", timeout=WAIT)
    assert "Traceback" not in page.locator("body").inner_text()
    assert "2 rows" in page.locator("#data-summary").inner_text(), "what was read before is still there"


def test_the_spectrum_of_the_run_is_shown(trained):
    page = trained
    open_tab(page, "Spectrum")
    page.wait_for_selector("#heat svg", timeout=WAIT)
    assert "120" in page.locator("#spectrum-facts").inner_text()
    cell = page.locator("#heat rect[data-name]").first
    cell.click()  # opens its matrix
    page.wait_for_selector("#sigma svg", timeout=WAIT)
    assert page.locator("#module input").input_value() == cell.get_attribute("data-name")
    page.wait_for_selector("#table-7 table", timeout=WAIT)
    with page.expect_download(timeout=WAIT) as download:
        page.locator("#sigma button[data-get=csv]").click()
    assert download.value.path().read_text().startswith("direction,σ,chance,energy")
    cells = page.locator("#table-7 tbody tr").first.locator("td").all_inner_texts()
    delta, weight, random, *_ = (float(c.replace(",", "")) for c in cells)  # and the paper's
    assert weight > delta > 0
    assert random > 0


def test_three_panes_answer_and_merged_agrees_with_unmerged(trained):
    page = trained
    open_tab(page, "Chat")
    page.wait_for_function("document.querySelector('#message textarea').value.length > 10", timeout=WAIT)
    asked = page.locator("#message textarea").input_value()
    page.locator("#send").click()
    page.wait_for_selector("#talk-c .tok", timeout=WAIT)  # coloured: all have ended
    said = {letter: said_by(page, letter) for letter in "abc"}
    engine = {letter: page.locator(f"#engine-{letter}").inner_text() for letter in said}
    assert said["b"] and said["b"] == said["c"]
    assert said["a"] != said["b"]
    assert "adapter off (strength 0)" in engine["a"]
    assert "unmerged on 120 matrices, strength 1" in engine["b"]
    assert "W₀ + ΔW in 120 matrices, no LoRA layer" in engine["c"]
    assert len({re.search(r"first logits (\w{8})", line)[1] for line in engine.values()}) == 3
    assert (
        page.locator("#talk-a .asked").inner_text() == asked and page.locator("#message textarea").input_value() == ""
    )

    token = page.locator("#talk-b .tok").nth(1)
    token.focus()
    assert page.locator("#talk-b .mind li").count() == 10, "five tokens by either model"
    assert re.search(r"KL [\d.]+ nats", page.locator("#talk-b .mind").inner_text())


def test_the_slider_is_heard_while_a_pane_answers_and_a_stop_keeps_what_was_said(trained):
    page = trained
    page.locator("#new-talk").click()
    page.locator("#message textarea").fill("Tell me a long story about a lighthouse.")
    page.locator("#send").click()
    page.wait_for_function("document.querySelector('#engine-b').innerText.includes('strength 1 ')", timeout=WAIT)
    slider = page.locator("#strength-b input[type=number]")
    slider.fill("0.5")
    slider.press("Enter")
    page.wait_for_function("document.querySelector('#engine-b').innerText.includes('strength 0.5')", timeout=WAIT)
    page.locator("#chat-stop").click()
    page.wait_for_function(SETTLED, polling=4000, timeout=WAIT)
    assert said_by(page, "a")
    slider.fill("1")
    slider.press("Enter")


def test_a_blind_vote_names_nobody_before_it_is_cast_and_is_counted(trained):
    page = trained
    page.locator("#new-talk").click()
    page.get_by_label("Blind test").check()
    page.locator("#message textarea").fill("name[Inn 3], food[French]")
    page.locator("#send").click()
    page.locator("#vote-2").wait_for(timeout=WAIT)
    heads = page.locator(".pane-head:visible").all_inner_texts()
    assert [head.split("\n")[0].split("·")[0].strip() for head in heads] == ["Answer 1", "Answer 2", "Answer 3"]
    assert "strength" not in page.locator("#engine-a").inner_text()
    page.locator("#vote-2").click()
    page.wait_for_function("document.querySelector('.pane-head').innerText.match(/Base|Merged/)", timeout=WAIT)
    page.get_by_role("button", name="Votes of this run").click()
    assert "1 of 1" in page.locator("#tally").inner_text()
    page.get_by_label("Blind test").uncheck()


def test_a_transcript_is_downloaded_as_json_and_markdown(trained, tmp_path):
    page = trained
    for kind, button in (("json", "#as-json"), ("md", "#as-markdown")):
        with page.expect_download(timeout=30_000) as downloaded:
            page.locator(button).click()
        assert downloaded.value.suggested_filename.endswith(f"-transcript.{kind}")
        downloaded.value.save_as(tmp_path / kind)
    (turn,) = json.loads((tmp_path / "json").read_text())["turns"]
    assert turn["message"] == "name[Inn 3], food[French]" and len(turn["answers"]) == 3
    assert "### C: Merged" in (tmp_path / "md").read_text()


def test_the_runs_tab_lists_downloads_and_deletes_only_after_a_question(trained, tmp_path):
    page = trained
    open_tab(page, "Runs")
    page.wait_for_function("document.querySelector('#runs-table').innerText.includes('finished')", timeout=30_000)
    page.locator("#download:not([disabled])").wait_for(timeout=30_000)
    with page.expect_download(timeout=30_000) as downloaded:
        page.locator("#download").click()
    downloaded.value.save_as(tmp_path / "adapter.zip")
    names = set(zipfile.ZipFile(tmp_path / "adapter.zip").namelist())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    page.locator("#delete").click()
    page.wait_for_selector("text=This cannot be undone", timeout=WAIT)
    page.locator("#delete-no").click()
    page.locator("#delete-yes").wait_for(state="hidden")
    assert "finished" in page.locator("#runs-table").inner_text()


def test_buttons_and_links_open_views_of_the_run_and_the_keyboard_is_seen_where_it_is(trained, server):
    page = trained
    open_tab(page, "Train")
    page.locator("[data-tab=chat]:visible").click(timeout=WAIT)
    page.wait_for_selector("#message:visible", timeout=WAIT)
    (run,) = Runs(Workspace(server.workspace)).list()
    asked = f"{server.url}?run={run.id}&tab=spectrum&module=model.layers.3.self_attn.q_proj"
    page.goto(asked)
    page.wait_for_selector("#sigma svg", timeout=WAIT)
    assert page.locator("#module input").input_value() == "model.layers.3.self_attn.q_proj"
    assert page.locator(".link a:visible").evaluate("link => link.href") == asked
    for _ in range(60):  # what was said goes when the matrix is drawn anew
        page.locator("[data-copy]:visible").press("Enter")
        page.wait_for_timeout(500)
        if said := page.locator(".link:visible [role=status]").inner_text():
            break
    assert said
    assert re.search(r"[\d.]+ of [\d.]+ GB free", page.locator("#head-line").inner_text())

    page.locator("#run input").focus()
    seen = set()
    for _ in range(16):
        page.keyboard.press("Tab")
        name, shows_itself, outline = page.evaluate(
            "(e => [e.outerHTML.slice(0, 200), e.matches('body, input'), getComputedStyle(e).outline])"
            "(document.activeElement)"
        )
        assert shows_itself or "solid" in outline, f"{name} has the keyboard, and nothing shows it"
        seen.add(name)
    assert len(seen) > 8


def test_a_notebook_is_read_in_the_page_and_the_page_is_as_it_was_after_it(trained, server):
    page = trained
    open_tab(page, "Runs")
    page.get_by_role("link", name="Learn", exact=True).press("Enter")
    page.get_by_role("link", name="What did it actually learn?").click(timeout=WAIT)
    page.locator("#lesson img").first.wait_for(timeout=WAIT)
    page.locator("#lesson .katex-display").first.wait_for(timeout=WAIT)
    page.locator("#lesson code.language-python .token").first.wait_for(timeout=WAIT)
    assert page.url.endswith("#learn/02_what_did_it_learn")
    assert all(page.locator("#lesson img").evaluate_all("(all) => all.map((one) => one.naturalWidth > 100)"))
    solution = page.locator("#lesson details li").first
    assert not solution.is_visible() and not page.locator("#runs-table").is_visible()
    page.locator("#lesson summary").press("Enter")
    solution.wait_for(timeout=WAIT)
    page.go_back()
    page.locator("#lesson img").first.wait_for(state="detached", timeout=WAIT)
    page.get_by_role("link", name="To the studio").click()
    page.locator("#runs-table").wait_for(timeout=WAIT)
    assert "Journey" in page.locator("#runs-table").inner_text() and not page.locator("#lesson").is_visible()


# Colours change no sizes: each width once.
LOOKS = [
    ("light", 1440, 900),
    ("dark", 390, 844),
    *(pytest.param(*look, marks=pytest.mark.slow) for look in [("dark", 1440, 900), ("light", 390, 844)]),
]


DATA = ("Journey", "starter:", "SmolLM2", "all-MiniLM", "Warm a litre", "yoghurt", "name[")
"""Words of what the pages show that is nobody's interface: names of runs and models, rows."""


@pytest.mark.parametrize(("scheme", "width", "height"), LOOKS)
def test_no_tab_overflows_the_page_or_keeps_anybody_out(trained, browser, server, scheme, width, height):
    look = {"color_scheme": scheme, "reduced_motion": "reduce"}
    context = browser.new_context(viewport={"width": width, "height": height}, **look)
    page = context.new_page()
    page.goto(f"{server.url}?tab=model")
    page.wait_for_selector("text=134,515,008", timeout=WAIT)
    for name in ("Start", "Model", "Data", "Train", "Spectrum", "Chat", "Runs", "Take home"):
        open_tab(page, name)
        page.wait_for_timeout(2500)
        inner = page.evaluate("document.documentElement.scrollWidth")
        assert inner <= width, f"{name} is {inner} wide on a page of {width}"
        assert barriers(page) == [], name
        if width == 1440:
            for switch, start in ((".to-ko", "시작하기"), (".to-en", "Start")):
                page.locator(switch).click()
                page.wait_for_function(
                    "start => document.querySelector('#tabs [role=tab]').textContent.trim() === start",
                    arg=start,
                    timeout=WAIT,
                )
                if switch == ".to-ko":
                    assert left_in_english(page, data=DATA) == [], name
    page.goto(f"{server.url}#learn/02_what_did_it_learn")
    page.locator("#lesson img").last.wait_for(timeout=WAIT)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def test_the_page_tells_of_a_run_that_ends(trained, server):
    page, run = trained, ByHand(Workspace(server.workspace), "Inns <b>bold</b>")
    page.wait_for_function("document.querySelector('#head-line').innerText.includes('step 10 of 40')", timeout=WAIT)
    assert page.locator(".end").count() == 0, "the runs that ended before it was opened are none of them"
    open_tab(page, "Runs")
    page.locator("#runs-table", has_text="running").wait_for(timeout=WAIT)
    run.end(Failed("The loss is <nan>."))
    page.locator("#failures .end", has_text="“Inns <b>bold</b>” failed").wait_for(timeout=WAIT)
    page.locator("#runs-table", has_text="failed").wait_for(timeout=WAIT)  # the tab that is open follows it
    page.get_by_role("button", name="Close").click()
    page.locator(".end").wait_for(state="detached")
    Runs(Workspace(server.workspace)).delete(run.run)


def test_nothing_was_asked_from_elsewhere_and_no_script_failed(trained):
    assert trained.foreign == []
    assert trained.errors == []
