"""Takes the README's pictures of the real thing: python -m tests.browser.pictures [--out DIR] [--every-tab]

Serves the studio over a new workspace and films the guided first run with the real starter model: choosing, training,
talking, looking. Then six views are taken as that run left them. Takes some minutes; needs Chromium, and no network.
"""

import argparse
import io
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageDraw

from tests.browser.serving import Server, browsing, open_tab

FILM_WIDTH, FILM_HEIGHT = 960, 640
TALL = {"width": FILM_WIDTH, "height": 1600}
"""So tall that nothing scrolls while it is filmed."""

WIDE = {"width": 1440, "height": 900}
LOOKS = [(scheme, width, height) for width, height in ((1440, 900), (390, 844)) for scheme in ("light", "dark")]
TABS = ("Start", "Model", "Data", "Train", "Spectrum", "Chat", "Runs", "Take home")
LESSON = "02_what_did_it_learn"
STEPS = 40
WAIT = 1_200_000  # milliseconds; three answers on a machine that does much else

POINTER = [(0, 0), (0, 17), (4, 13.5), (6.8, 20), (9.6, 18.8), (6.9, 12.5), (12, 12.5)]
"""Corners of the arrow, its tip first."""

SAID = """() => document.querySelector('#guide-base').innerText.length
    + document.querySelector('#guide-adapted').innerText.length"""

REACHED = """step => (document.querySelector('#guide-progress').innerText.match(/step (\\d+)/) || [0, 0])[1] >= step"""


class Film:
    """Frames of a page, and how long each is shown; one that is like the frame before only prolongs it."""

    def __init__(self, page: Any, at: tuple[float, float]):
        """`at` is where the pointer lies, in pixels of the frame."""
        self.page, self.at = page, at
        self.selector, self.above, self.top = "body", 0, 0.0
        self.frames: list[Image.Image] = []
        self.durations: list[int] = []  # milliseconds

    def look_at(self, selector: str, above: int = 20) -> None:
        """Has frames begin so many pixels above an element, wherever it goes."""
        self.selector, self.above = selector, above

    def take(self, duration: int) -> None:
        """Adds what the page shows now, for `duration` milliseconds."""
        self.top = self.page.locator(self.selector).first.bounding_box()["y"] - self.above
        self.plain = picture(self.page, clip={"x": 0, "y": self.top, "width": FILM_WIDTH, "height": FILM_HEIGHT})
        self._add(duration)

    def click(self, target: Any) -> None:
        """Moves the pointer to a target, rests there a moment, and clicks."""
        box = target.bounding_box()
        (x0, y0), x1, y1 = self.at, box["x"] + min(box["width"] / 2, 90), box["y"] + box["height"] / 2 - self.top
        for part in (0.15, 0.5, 0.85, 1.0):
            self.at = (x0 + part * (x1 - x0), y0 + part * (y1 - y0))
            self._add(40)
        self.durations[-1] += 200
        target.click()

    def save(self, path: Path) -> None:
        """Writes an animated WebP that begins anew at its end."""
        first, *others = self.frames
        first.save(path, save_all=True, append_images=others, duration=self.durations, loop=0, lossless=True, method=4)

    def _add(self, duration: int) -> None:
        frame = pointed(self.plain, self.at)
        if self.frames and ImageChops.difference(self.frames[-1], frame).getbbox() is None:
            self.durations[-1] += duration
        else:
            self.frames.append(frame)
            self.durations.append(duration)


def picture(page: Any, **options: Any) -> Image.Image:
    """Returns what is seen of a page."""
    return Image.open(io.BytesIO(page.screenshot(animations="disabled", **options))).convert("RGB")


def pointed(plain: Image.Image, at: tuple[float, float]) -> Image.Image:
    """Returns the picture with an arrow whose tip lies at `at`."""
    fine, margin, size = 4, 2, (20, 30)  # drawn four times as large, then smoothed
    arrow = Image.new("RGBA", (size[0] * fine, size[1] * fine))
    corners = [((1.25 * x + margin) * fine, (1.25 * y + margin) * fine) for x, y in POINTER]
    ImageDraw.Draw(arrow).polygon(corners, fill="#1e293b", outline="white", width=fine + 1)
    arrow = arrow.resize(size, Image.Resampling.LANCZOS)
    shown = plain.copy()
    shown.paste(arrow, (round(at[0]) - margin, round(at[1]) - margin), arrow)
    return shown


def film(page: Any, url: str) -> Film:
    """Films the guided first run, which leaves the workspace with a trained run."""
    page.goto(f"{url}?tab=start")
    page.locator("#guide-about .asked").wait_for(timeout=WAIT)
    made = Film(page, (FILM_WIDTH - 130, FILM_HEIGHT - 110))
    made.look_at("#guide")
    choose_and_train(made)
    ask_and_look(made)
    page.locator("#guide-seen [data-tab=spectrum]").click()
    open_matrix(page)
    made.look_at("#sections", above=4)
    made.take(2300)
    return made


def choose_and_train(made: Film) -> None:
    page = made.page
    made.take(500)
    made.click(page.locator("#guide-source label", has_text="Restaurants"))
    page.locator("#guide-about .asked", has_text="restaurant").wait_for(timeout=WAIT)
    made.take(1000)
    made.click(page.locator("#guide-to-train"))
    page.locator("#guide-train").wait_for(timeout=WAIT)
    made.take(200)
    made.click(page.locator("#guide-train"))
    for step in range(1, STEPS + 1, 2):
        page.wait_for_function(REACHED, arg=step, timeout=WAIT)
        made.take(80)
    page.locator("#guide-to-talk").wait_for(timeout=WAIT)
    made.take(700)
    made.click(page.locator("#guide-to-talk"))


def ask_and_look(made: Film) -> None:
    page = made.page
    page.wait_for_function("document.querySelector('#guide-message textarea')?.value", timeout=WAIT)
    made.take(200)
    made.click(page.locator("#guide-ask"))
    page.locator("#guide-adapted .said-by").wait_for(timeout=WAIT)
    shown, length, quiet = 0, 0, 0
    while quiet < 20:  # so often was nothing more said: both have ended
        if length >= shown + 50:
            shown = length
            made.take(110)
        page.wait_for_timeout(250)
        quiet = quiet + 1 if length == (length := page.evaluate(SAID)) else 0
    made.take(1700)
    made.click(page.locator("#guide-to-see"))
    page.locator("#guide-seen svg").wait_for(timeout=WAIT)
    made.take(1400)


def open_matrix(page: Any) -> None:
    """Opens the strongest matrix in the Spectrum tab, with the paper's Table 7 beside it."""
    page.locator("#heat svg").wait_for(timeout=WAIT)
    open_tab(page, "One matrix")
    page.locator("#sigma svg").wait_for(timeout=WAIT)
    page.locator("#table-7 table").wait_for(timeout=WAIT)
    page.locator("#weight-spectrum svg").wait_for(timeout=WAIT)  # W is decomposed: the last that is drawn
    page.wait_for_timeout(1000)


def shoot(browser: Any, server: Server, out: Path) -> None:
    """Takes the six views, three in light and three in dark."""
    pages = {}
    for scheme in ("light", "dark"):
        pages[scheme] = browser.new_context(viewport=WIDE, color_scheme=scheme, reduced_motion="reduce").new_page()
        pages[scheme].goto(f"{server.url}?tab=model")
        pages[scheme].wait_for_selector("text=134,515,008", timeout=WAIT)  # the starter's parameters: it was described

    def save(name: str, scheme: str, below: str = "", above: int = 16) -> None:
        page = pages[scheme]
        page.mouse.move(0, 0)
        to_top(page, below, above)
        picture(page).save(out / f"{name}-{scheme}-{WIDE['width']}.png", optimize=True)

    light, dark = pages["light"], pages["dark"]
    light.get_by_label("Query and value").check()
    light.wait_for_function("document.querySelector('#model-cost').innerText.includes('60 of 212')", timeout=WAIT)
    save("model", "light")
    open_tab(dark, "Data")
    dark.wait_for_selector("#tokens >> text=<|im_end|>", timeout=WAIT)
    save("data", "dark")
    open_tab(light, "Train")
    light.locator("#charts .live svg").first.wait_for(timeout=WAIT)
    save("train", "light")
    open_tab(dark, "Spectrum")
    open_matrix(dark)
    save("spectrum", "dark", below="#sections")
    open_tab(light, "Chat")
    light.wait_for_function("document.querySelector('#message textarea').value.length > 10", timeout=WAIT)
    light.locator("#send").click()
    light.wait_for_selector("#talk-c .tok", timeout=WAIT)  # coloured: all have ended
    light.locator("#talk-b .tok.k4").first.focus()  # one where the adapter changed the model's mind most
    save("chat", "light", below="#send")
    dark.goto(f"{server.url}#learn/{LESSON}")
    dark.locator("#lesson img").last.wait_for(timeout=WAIT)
    save("learn", "dark", below="#lesson img", above=400)


def shoot_every_tab(browser: Any, server: Server, out: Path) -> None:
    """Takes every tab, wide and narrow, light and dark, to look the page over."""
    for scheme, width, height in LOOKS:
        viewport = {"width": width, "height": height}
        context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
        page = context.new_page()
        page.goto(f"{server.url}?tab=model")
        page.wait_for_selector("text=134,515,008", timeout=WAIT)
        for name in TABS:
            open_tab(page, name)
            page.wait_for_timeout(2500)
            file = f"{name.lower().replace(' ', '-')}-{scheme}-{width}.png"
            picture(page, full_page=width < 600).save(out / file, optimize=True)
        context.close()


def to_top(page: Any, selector: str, above: int) -> None:
    """Scrolls an element to the page's top, but for so many pixels; "" scrolls to the very top."""
    for _ in range(3):  # what is drawn only when it is seen may move it
        place = page.locator(selector).first.bounding_box()["y"] - above if selector else -1e6
        page.mouse.wheel(0, place)
        page.wait_for_timeout(700)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/screenshots"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--every-tab", action="store_true", help="instead take every tab, wide and narrow, light and dark"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browsing() as browser:
        server = Server(Path(folder))
        server.start()
        try:
            page = browser.new_context(viewport=TALL, color_scheme="light", reduced_motion="reduce").new_page()
            made = film(page, server.url)
            if args.every_tab:
                shoot_every_tab(browser, server, args.out)
            else:
                made.save(args.out / "first-run.webp")
                print(f"{len(made.frames)} frames, {sum(made.durations) / 1000:.1f} s")
                shoot(browser, server, args.out)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
