"""What a run will take, in a real browser: the bars follow the form, a proposal fills it, a probe measures it."""

import pytest

from tests.browser.serving import open_tab

WAIT = 240_000  # milliseconds, on a busy machine


@pytest.mark.slow
def test_what_a_run_will_take_follows_the_form_is_made_to_fit_and_is_measured(browser, server):
    page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{server.url}?tab=model")
    page.wait_for_selector("text=134,515,008", timeout=WAIT)
    open_tab(page, "Train")

    def filled(name):
        return page.locator(f"#setting-{name} input").input_value()

    def wait_for(place, words):
        page.wait_for_function(
            "([place, words]) => document.querySelector(place).innerText.includes(words)",
            arg=[place, words],
            timeout=WAIT,
        )

    def bars():
        return page.locator("#forecast .bar").evaluate_all("all => all.map(b => b.lastElementChild.offsetLeft)")

    page.wait_for_selector("#forecast .memory", timeout=WAIT)
    first = bars()
    assert len(first) == 2 and 0 < first[0] < first[1], "LoRA takes less than full fine-tuning"
    total = page.locator("#forecast .who b").first.inner_text()
    page.locator("#setting-batch_size input").fill("16")
    page.wait_for_function(
        "total => document.querySelector('#forecast .who b').innerText !== total", arg=total, timeout=WAIT
    )
    page.locator("#free-memory input").fill("1.1")
    wait_for("#forecast", "It does not fit")
    page.locator("#fit").click()
    wait_for("#fitting", "Click one to fill it in")
    assert "accumulation" in page.locator("#offer-0").inner_text()
    page.locator("#offer-0").click()
    wait_for("#forecast", "It fits")
    batch = int(filled("batch_size"))
    assert batch < 16
    page.locator("#undo-fit").click()
    wait_for("#forecast", "It does not fit")
    assert filled("batch_size") == "16"
    page.locator("#free-memory input").fill("")
    page.locator("#setting-batch_size input").fill("1")
    wait_for("#forecast", "It fits")
    page.locator("#probe").click()
    wait_for("#forecast", "Measured, ")
    assert "s a batch, about" in page.locator("#probe-progress").inner_text()
    assert len(bars()) == 3
    assert errors == []
    page.context.close()


@pytest.mark.slow
def test_the_method_brings_its_own_settings_and_the_bars_are_its(browser, server):
    page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{server.url}?tab=model")
    page.wait_for_selector("text=134,515,008", timeout=WAIT)
    open_tab(page, "Train")

    def take(title):
        page.locator("#setting-method input").click(timeout=WAIT)
        page.get_by_role("option", name=title, exact=True).click(timeout=WAIT)

    page.wait_for_selector("#forecast .memory", timeout=WAIT)
    take("Adapter_H")
    page.locator("#setting-bottleneck input").fill("1", timeout=WAIT)
    # Two adapters in each of 30 layers: 2·d·r + r + d each, for d = 576.
    page.wait_for_selector(f"#forecast >> text={60 * (2 * 576 + 1 + 576):,}", timeout=WAIT)
    assert page.locator("#forecast .who").first.inner_text().startswith("Adapter_H")
    take("Prefix-layer")
    page.wait_for_selector("#setting-infix_length", timeout=WAIT)
    assert page.locator("#setting-bottleneck").count() == 0 or not page.locator("#setting-bottleneck").is_visible()
    take("BitFit")
    page.wait_for_selector("#forecast >> text=must be used on a model that has biases", timeout=WAIT)
    assert page.locator("html").evaluate("e => e.scrollWidth - e.clientWidth") == 0, "nothing stands out at the side"
    assert errors == []
    page.context.close()
