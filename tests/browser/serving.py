"""A real server with the starter model, and a real browser that looks at it: for tests and for pictures."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
WAIT = 240_000  # milliseconds; training on a busy machine


class Server:
    """The `lora-studio` command, serving on a free port; it can be stopped and started again."""

    def __init__(self, workspace, *options, first=""):
        """`first` is Python that runs before the command does."""
        self.workspace, self.options, self.first = workspace, options, first
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.process = None

    def start(self):
        self.log = (self.workspace / "server.txt").open("ab")
        start = f"import sys; {self.first}\nfrom studio.__main__ import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", start, "--no-browser", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "--workspace", str(self.workspace), *self.options],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=os.environ,
        )
        for _ in range(2400):
            assert self.process.poll() is None, (self.workspace / "server.txt").read_text()
            try:
                urllib.request.urlopen(self.url + "gradio_api/startup-events", timeout=5).close()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server did not answer within four minutes")

    def stop(self):
        self.process.terminate()
        self.process.wait(20)
        self.log.close()

    def kill(self):
        self.process.kill()
        self.process.wait(20)
        self.log.close()


@contextmanager
def browsing() -> Iterator:
    """Yields the system's Chromium; while it is open, nothing else of this process can run an event loop."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        plain = browser.new_context

        def new_context(**options):
            context = plain(**options)
            context.set_default_timeout(120_000)  # milliseconds, on a busy machine
            return context

        browser.new_context = new_context
        yield browser
        browser.close()


def open_tab(page, name):
    page.get_by_role("tab", name="Start", exact=True).first.wait_for(timeout=WAIT)
    tab = page.get_by_role("tab", name=name, exact=True).first
    if not tab.is_visible():  # on a narrow page the last tabs are behind a menu
        page.locator(".overflow-menu button").first.click()
        tab = page.locator(".overflow-dropdown button", has_text=name).first
    tab.click()
