"""Times the page while a run trains beside it: `python -m tests.browser.timings`. Prints Markdown; asserts nothing.

First page: from the request to the moment at which tabs and header can be used. Tab: from the click to the frame in
which the tab's content is seen. Click: what the browser's own Event Timing measures, from the click to the next frame,
in steps of 8 ms.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.browser.serving import CHROMIUM, Server

TABS = ("Model", "Data", "Train", "Spectrum", "Chat", "Runs", "Take home")

_USABLE = """() => document.querySelectorAll('#tabs [role=tab]').length > 7
    && document.querySelector('#head-line')?.innerText.includes('GB free')"""

_SWITCH = """(name) => new Promise((done) => {
    const tabs = [...document.querySelectorAll('#tabs > .tab-wrapper [role=tab]')];
    const shown = () => [...document.querySelectorAll('#tabs > [role=tabpanel], #tabs > div > [role=tabpanel]')]
        .find((panel) => panel.offsetParent && panel.innerText.trim());
    const before = shown(), start = performance.now();
    const seen = () => {
        if ((shown() ?? before) !== before) {
            requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
        } else requestAnimationFrame(seen);
    };
    tabs.find((tab) => tab.innerText === name).click();
    seen();
})"""

_OBSERVE = """() => {
    window.clicks = [];
    new PerformanceObserver((list) => {
        for (const entry of list.getEntries()) if (entry.name === 'click') window.clicks.push(entry.duration);
    }).observe({type: 'event', durationThreshold: 16, buffered: true});
}"""

_WATCH = """() => {
    window.drawn = [];
    new MutationObserver(() => window.drawn.push(performance.now()))
        .observe(document.querySelector('#status'), {childList: true, subtree: true, characterData: true});
}"""

_WEIGHT = """() => performance.getEntriesByType('resource').concat(performance.getEntriesByType('navigation'))
    .map(({encodedBodySize, transferSize}) => [encodedBodySize, transferSize])"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loads", type=int, default=7, help="how often the page is opened (default 7)")
    parser.add_argument("--idle", action="store_true", help="with nothing training beside it, to compare")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        workspace = Path(folder)
        command = [sys.executable, "-m", "studio", "train", str(_spec(workspace)), "--workspace", folder]
        server = Server(workspace)
        server.start()
        training = None if asked.idle else subprocess.Popen(command, stdout=subprocess.DEVNULL)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            context = browser.new_context(viewport={"width": 1440, "height": 900})
            page = context.new_page()
            page.set_default_timeout(120_000)
            if training:
                page.goto(f"{server.url}?tab=train")
                page.wait_for_function("document.querySelector('#head-line')?.innerText.match(/step [1-9]/)")
            _tell(page, server.url, asked.loads)
        finally:
            browser.close()
            server.stop()
            if training:
                training.terminate()
                subprocess.run(
                    [sys.executable, "-m", "studio", "stop", "--now", *_runs(workspace), "--workspace", folder]
                )


def _spec(workspace: Path) -> Path:
    file = workspace / "spec.json"
    file.write_text(
        json.dumps({"name": "Beside", "data": {"prompt": "mr", "completion": "text"}, "train": {"steps": 2000}})
    )
    return file


def _runs(workspace: Path) -> list[str]:
    return [folder.name for folder in (workspace / "runs").iterdir()]


def _tell(page: Page, url: str, loads: int) -> None:
    rows = []
    opened = []
    for _ in range(loads):
        page.goto("about:blank")
        page.goto(f"{url}?tab=model", wait_until="commit")
        page.wait_for_function(_USABLE)
        opened.append(page.evaluate("performance.now()"))
    rows.append(("First page can be used", opened, "2,000"))
    page.wait_for_selector("text=134,515,008")
    page.evaluate(_OBSERVE)
    first = [page.evaluate(_SWITCH, name) for name in (*TABS[1:], TABS[0])]
    again = [page.evaluate(_SWITCH, name) for _ in range(3) for name in (*TABS[1:], TABS[0])]
    rows += [("Tab opened for the first time", first, "300"), ("Tab opened again", again, "300")]
    page.evaluate("window.clicks = []")
    _click_around(page)
    rows.append(("Click acknowledged", page.evaluate("window.clicks") or [16.0], "150"))
    page.evaluate(_SWITCH, "Train")
    page.evaluate(_WATCH)
    page.wait_for_timeout(20_000)
    drawn = page.evaluate("window.drawn")
    between = [b - a for a, b in zip(drawn, drawn[1:], strict=False) if b - a > 100]
    if between:
        rows.append(("Between two drawings of the live charts", between, ""))
    print("| | median, ms | worst, ms | goal, ms |\n|---|---|---|---|")
    for name, values, goal in rows:
        print(f"| {name} ({len(values)}) | {statistics.median(values):,.0f} | {max(values):,.0f} | {goal} |")
    pairs = page.evaluate(_WEIGHT)
    sent = sum(size for size, _ in pairs) / 1e6
    print(f"\nThe page: {len(pairs)} requests, {sent:.2f} MB as sent, all of them from this machine.")


def _click_around(page: Page) -> None:
    """Clicks what a person would: choices, a matrix, folds, checks, the header."""
    page.get_by_role("tab", name="Model", exact=True).first.click()
    for label in ("All attention", "Query and value (the paper)", "All linear"):
        page.get_by_label(label, exact=True).click()
        page.wait_for_timeout(1500)
    for cell in page.locator("#grid [role=gridcell]").all()[:4]:
        cell.click()
        page.wait_for_timeout(500)
    for tab in ("Data", "Train", "Spectrum", "Chat", "Runs"):
        page.get_by_role("tab", name=tab, exact=True).first.click()
        page.wait_for_timeout(2500)
        for fold in page.locator("button.label-wrap:visible").all()[:3]:
            fold.click()
            page.wait_for_timeout(500)


if __name__ == "__main__":
    main()
