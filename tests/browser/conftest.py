"""A real server with the starter model, and a real browser that looks at it.

All of a module and no longer: while Playwright is up, no other test could run an event loop.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def workspace_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("studio")


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


@pytest.fixture(scope="module")
def guarded_server(workspace_folder):
    """One that asks ada for her password."""
    (workspace_folder / "password").write_text("correct horse")
    server = Server(workspace_folder, "--user", "ada", "--password-file", str(workspace_folder / "password"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def server(workspace_folder):
    server = Server(workspace_folder)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server_after(workspace_folder):
    """server_after(python): a server in whose process that ran first."""
    started = []

    def start(python: str) -> Server:
        started.append(server := Server(workspace_folder, first=python))
        server.start()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
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
