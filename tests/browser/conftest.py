"""A real server with the starter model, and a real browser that looks at it.

All of a module and no longer: while Playwright is up, no other test could run an event loop.
"""

import pytest

from tests.browser.serving import CHROMIUM, Server, browsing


@pytest.fixture(scope="module")
def workspace_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("studio")


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
    with browsing() as browser:
        yield browser
