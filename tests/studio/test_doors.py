"""The doors, tried from outside: the real command serves, and a plain HTTP client knocks."""

import asyncio
import base64
import http.client
import io
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import httpx
import psutil
import pytest
from torch import nn

from core import Adapter, LoRAConfig, inject
from studio import doors
from studio.runs import Runs
from studio.specs import RunSpec
from studio.workspace import Workspace
from tests.studio.page.pages import question

ROOT = Path(__file__).parents[2]
API = "/gradio_api"
MULTIPART = {"Content-Type": "multipart/form-data; boundary=end"}
CLOSED = "There is nothing here.\n"
FILE_DATA = {"meta": {"_type": "gradio.FileData"}}

# What the page asks for; all else that Gradio serves is closed.
NEEDED = {
    *(("GET", path) for path in ("/", "/config", "/assets/{path:path}", "/static/{path:path}", "/theme.css")),
    *(("GET", path) for path in ("/favicon.ico", "/manifest.json", f"{API}/app_id", f"{API}/startup-events")),
    *(("GET", f"{API}/{path}") for path in ("queue/data", "heartbeat/{session_hash}", "upload_progress")),
    ("GET", API + "/file={path_or_url:path}"),
    ("HEAD", "/"),
    *(("POST", f"{API}/{path}") for path in ("queue/join", "run/{api_name}", "component_server", "component_server/")),
    *(("POST", f"{API}/{path}") for path in ("cancel", "reset", "upload")),
}


# What the studio does not ask for, though Gradio would do it at these words.
ENVIRONMENT = {"GRADIO_NUM_WORKERS": "1", "GRADIO_MCP_SERVER": "true", "GRADIO_ALLOWED_PATHS": "/"}
ENVIRONMENT |= {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_TEMP_DIR": tempfile.gettempdir(), "GRADIO_SHARE": "true"}


class Server:
    """The `lora-studio` command, serving a workspace of its own."""

    def __init__(self, folder: Path, *options: object, port: int = 0) -> None:
        self.workspace = Workspace(folder / "workspace")
        (self.workspace.incoming / "left.csv").write_text("by an earlier server")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = port or probe.getsockname()[1]
        self.at = f"127.0.0.1:{self.port}"
        self.log = folder / "log.txt"
        words = ["--no-browser", "--port", self.port, "--workspace", self.workspace.root, *options]
        command = [sys.executable, "-u", "-m", "studio", *map(str, words)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | ENVIRONMENT)
        self.http = httpx.Client(base_url=f"http://{self.at}", timeout=60, trust_env=False)

    def wait(self) -> None:
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()
            if "LoRA Studio is at" in self.log.read_text():
                return
            time.sleep(0.1)
        raise AssertionError("the server did not come up within two minutes")

    def stop(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait(20)

    def raw(self, method: str, path: str, headers: dict[str, str], source: str = "127.0.0.1") -> tuple[int, str]:
        """Sends a request as it is written, from an address; a polite client would tidy path and headers up."""
        connection = http.client.HTTPConnection(self.at, timeout=30, source_address=(source, 0))
        connection.putrequest(method, path, skip_host=True)
        for name, value in ({"Host": self.at} | headers).items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        status, text = answer.status, answer.read(2000).decode("utf-8", "replace") if answer.length else ""
        connection.close()
        return status, text


@pytest.fixture(scope="module")
def servers(tmp_path_factory, tiny_folder):
    """Two servers: one for this machine, with a folder that it may open besides, and one for all, with a password."""
    folder = tmp_path_factory.mktemp("doors")
    (folder / "allowed").mkdir()
    shutil.copytree(tiny_folder, folder / "allowed" / "model")
    made = {
        "local": Server(folder / "local", "--allow-path", folder / "allowed"),
        "public": Server(folder / "public", "--host", "0.0.0.0", "--user", "ada"),
    }
    try:
        for server in made.values():
            server.wait()
        yield made
    finally:
        for server in made.values():
            server.stop()


@pytest.fixture(scope="module")
def local(servers) -> Server:
    return servers["local"]


@pytest.fixture(scope="module")
def public(servers) -> Server:
    return servers["public"]


@pytest.fixture(scope="module")
def password(public) -> str:
    """As the terminal shows it."""
    said = public.log.read_text()
    (found,) = re.findall(r"Sign in as ada; password: (\S+) \(made for this start, shown only here\)", said)
    assert said.count(found) == 1
    return found


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


class Page:
    """What a page does, by hand: raises its events with any data, and reads what comes back."""

    def __init__(self, http: httpx.Client, session: str) -> None:
        self.http, self.session = http, session
        config = http.get("/config").json()
        ids = {c["id"]: c["props"].get("elem_id") for c in config["components"]}
        self.head = next(number for number, name in ids.items() if name == "head")
        values = {c["id"]: c["props"].get("value") for c in config["components"]}
        self.events = [
            {"id": d["id"], "on": [e for _, e in d["targets"]], "of": [ids.get(i) for i, _ in d["targets"]]}
            | {part: [ids[i] for i in d[part]] for part in ("inputs", "outputs")}
            | {"values": [values[i] for i in d["inputs"]]}
            for d in config["dependencies"]
        ]

    def event(self, **wanted: object) -> int:
        found = [e["id"] for e in self.events if all(e[k][: len(v)] == v for k, v in wanted.items())]
        assert found, wanted
        return found[0]

    def join(self, event: int, data: list) -> httpx.Response:
        body = {"fn_index": event, "data": data, "session_hash": self.session}
        return self.http.post(f"{API}/queue/join", json=body)

    def run(self, event: int, *data: object) -> list:
        """Returns what the event gave; raises what it said instead."""
        assert self.join(event, list(data)).status_code == 200
        with self.http.stream("GET", f"{API}/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line else {}
                if message.get("msg") == "process_completed":
                    if not message["success"]:
                        raise RuntimeError(message["output"]["error"])
                    return message["output"]["data"]
        raise AssertionError("the stream ended without an answer")

    def look(self, run: object, *, train: bool, fn_name: str = "look") -> dict:
        """Returns what the open page is told of a run."""
        body = {"component_id": self.head, "session_hash": self.session, "fn_name": fn_name}
        answer = self.http.post(f"{API}/component_server", json=body | {"data": question(run, train=train)})
        return {part: drawn for part, (drawn, _) in answer.raise_for_status().json()["parts"].items()}

    def look_at(self, kind: str, place: str) -> list:
        return self.run(self.event(inputs=["model-kind", "model-place"], on=["click", "submit"]), kind, place)

    def upload(self, name: str, content: bytes = b"question,answer\na,b\n") -> str:
        (path,) = self.http.post(f"{API}/upload", files={"files": (name, content)}).json()
        return path


@pytest.fixture
def page(local, request) -> Page:
    return Page(local.http, request.node.name[:100])


# Addresses


def test_by_default_only_this_machine_s_own_address_is_listened_on(local, public):
    assert local.http.get("/").status_code == 200
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", local.port), 5)
    socket.create_connection(("127.0.0.2", public.port), 5).close()


def test_one_port_of_one_process_is_open_whatever_the_environment_says(local):
    process = psutil.Process(local.process.pid)
    assert process.children(recursive=True) == []
    listening = {c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert listening == {("127.0.0.1", local.port)}


def test_a_server_for_others_says_so_and_that_nothing_is_encrypted(public, local, password):
    said = public.log.read_text()
    assert "Other machines can reach this page. The connection is not encrypted" in said
    assert "Other machines" not in local.log.read_text() and "password" not in local.log.read_text()


# Who comes in


def live_routes() -> set[tuple[str, str]]:
    """Method and path of every route that the installed Gradio serves."""

    def walk(routes: list) -> set[tuple[str, str]]:
        found = set()
        for route in routes:
            inner = getattr(route, "original_router", None)
            found |= walk(inner.routes) if inner else {(method, route.path) for method in route.methods}
        return found

    async def serve() -> list:  # outside of a running loop, Gradio leaves one behind that nobody closes
        with gr.Blocks(analytics_enabled=False) as page:
            gr.Textbox()
        return gr.routes.App.create_app(page).routes

    return walk(asyncio.run(serve()))


def knock(http: httpx.Client, method: str, path: str) -> tuple[int, str]:
    """Returns status and text of a route; of one that streams without an end, no text."""
    with http.stream(method, path) as answer:
        is_text = "event-stream" not in answer.headers.get("content-type", "")
        return answer.status_code, answer.read().decode("utf-8", "replace") if is_text else ""


def filled(path: str) -> str:
    return re.sub(r"\{(\w+)[^}]*\}", lambda found: {"api_name": "predict"}.get(found[1], "x"), path)


def test_of_all_that_gradio_serves_only_what_the_page_needs_is_open(local):
    routes = live_routes()
    assert len(routes) > 60 and routes >= NEEDED, "Gradio serves these under other names now"
    open_routes = {(m, p) for m, p in routes if knock(local.http, m, filled(p)) != (404, "" if m == "HEAD" else CLOSED)}
    assert open_routes == NEEDED


OTHERS = [
    "docs",
    "redoc",
    "openapi.json",
    "metrics",
    "login",
    "monitoring",
    "svelte/x.js",
    "Config",
    "/config",
    "static",
]
OTHERS += ["config/../openapi.json", "config%00", "config%09", "assets/../gradio_api/info", "gradio_api/", "gradio_api"]
OF_API = ["info", "%69nfo", "mcp", "mcp/sse", "call/predict", "api/predict", "run/start", "vibe-code", "deep_link"]
OF_API += [
    "proxy=https://example.com/",
    "file/etc/hostname",
    "custom_component/x/client/y/z",
    "stream/x",
    "queue/status",
]


@pytest.mark.parametrize("path", [*OTHERS, *(f"gradio_api/{name}" for name in OF_API)])
def test_no_other_name_spelling_or_method_opens_a_route(path, local):
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        assert local.raw(method, f"/{path}", {"Content-Length": "0"})[0] in (400, 403, 404)


def test_without_a_password_every_route_is_closed_to_others(public, password):
    answers = {(m, p): knock(public.http, m, filled(p)) for m, p in live_routes()}
    assert answers.pop(("GET", f"{API}/startup-events")) == (200, "false")
    assert {status for status, _ in answers.values()} == {401}
    assert {text for _, text in answers.values()} == {"", "LoRA Studio asks for a user name and a password.\n"}
    for path in ("/", "/theme.css", "/?all_endpoints=1", f"{API}/file={public.workspace.downloads}/x-adapter.zip"):
        assert public.http.get(path).status_code == 401
    look = {"data": {"run": None, "train": True}, "component_id": 1, "session_hash": "x", "fn_name": "look"}
    assert public.http.post(f"{API}/component_server", json=look).status_code == 401


def test_with_the_password_the_page_is_there(public, password):
    with httpx.Client(base_url=public.http.base_url, auth=("ada", password), timeout=60, trust_env=False) as client:
        assert "gradio_config" in client.get("/").text
        page = Page(client, "signed-in")
        assert "Nothing is training" in page.look("", train=False)["head-line"]
        shown = page.run(page.event(inputs=["data-kind"]), "My own file")
    assert [part["visible"] for part in shown] == [False, True, False]


def guess(server: Server, given: str, source: str) -> int:
    return server.raw("GET", "/config", {"Authorization": given}, source)[0]


def test_only_the_right_name_with_the_whole_password_opens(public, password):
    pairs = [
        ("studio", password),
        ("ada", password[:-1]),
        ("ada", password + "x"),
        ("ADA", password),
        ("", ""),
        ("ada", ""),
    ]
    tries = [*(basic(*pair) for pair in pairs), "", "Basic", "Basic !", "Basic \xe4", f"Bearer {password}", password]
    with ThreadPoolExecutor(len(tries)) as pool:  # each from an address of its own, so that none waits for another
        sources = [f"127.0.1.{number}" for number in range(1, 1 + len(tries))]
        assert set(pool.map(guess, [public] * len(tries), tries, sources)) == {401}
    assert guess(public, basic("ada", password), "127.0.0.1") == 200


def test_guesses_from_one_address_wait_for_one_another_and_nobody_else_does(public, password):
    started = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        wrong = [pool.submit(guess, public, basic("ada", f"guess {i}"), "127.0.0.9") for i in range(3)]
        assert public.raw("GET", "/config", {}, "127.0.0.9")[0] == 401, "the browser asks for the password first"
        assert guess(public, basic("ada", password), "127.0.0.8") == 200
        assert not all(one.done() for one in wrong)
        assert [one.result() for one in wrong] == [401] * 3
    assert time.monotonic() - started >= 3 * doors.WRONG_PASSWORD_SECONDS


# Pages of other sites


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST:{port}", "127.0.0.1:{port}", "127.1.2.3", "[::1]:{port}"])
def test_the_server_answers_to_this_machine_s_own_names(name, local):
    assert local.raw("GET", "/config", {"Host": name.format(port=local.port)})[0] == 200


@pytest.mark.parametrize(
    "name",
    [
        *("attacker.example", "attacker.example:{port}", "localhost.attacker.example", "127.0.0.1.attacker.example"),
        *("", "0.0.0.0:{port}", "192.168.0.1", "localhost@attacker.example", "attacker.example#localhost", "[::2]"),
    ],
)
def test_a_foreign_name_that_points_here_gets_nothing(name, local):
    status, text = local.raw("GET", "/config", {"Host": name.format(port=local.port)})
    assert status in (400, 403) and "components" not in text


@pytest.mark.parametrize("which", ["local", "public"])
@pytest.mark.parametrize(
    "origin", ["https://attacker.example", "null", "http://localhost:1", "http://127.0.0.1", "file://", ""]
)
def test_a_page_of_another_site_can_neither_read_nor_write(origin, which, servers, password):
    server = servers[which]
    headers = {"Origin": origin, "Authorization": basic("ada", password), "Content-Length": "0"}
    for method, path in (("GET", "/config"), ("GET", "/"), ("POST", f"{API}/queue/join"), ("POST", f"{API}/upload")):
        status, text = server.raw(method, path, headers)
        assert (status, text) == (403, "Other sites may not use this server.\n")


def test_the_page_itself_and_links_to_it_are_let_in(local):
    assert local.raw("GET", "/config", {"Origin": f"http://{local.at}"})[0] == 200
    assert local.raw("GET", "/config", {"Origin": "https://studio.example", "Host": "studio.example"})[0] == 403
    assert (
        local.raw("GET", "/?run=x", {"Referer": "https://elsewhere.example/", "Sec-Fetch-Site": "cross-site"})[0] == 200
    )


def test_behind_a_proxy_with_tls_the_name_is_the_proxy_s_and_the_password_guards(public, password):
    headers = {"Host": "studio.example", "Origin": "https://studio.example", "Authorization": basic("ada", password)}
    assert public.raw("GET", "/config", headers)[0] == 200


def test_every_answer_keeps_others_from_framing_it_and_scripts_from_talking_to_others(local):
    for path in ("/", "/config", "/nothing", "/theme.css"):
        headers = local.http.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'self'" in headers["content-security-policy"]
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"


# What is sent


def stored(workspace: Workspace) -> list[Path]:
    """Files that hold something on their way in; Gradio leaves empty ones about."""
    return [path for path in workspace.incoming.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_request_that_says_it_is_too_large_is_refused_before_it_is_sent(local):
    for path, limit in ((f"{API}/upload", doors.MAX_UPLOAD_BYTES), (f"{API}/queue/join", doors.MAX_BODY_BYTES)):
        length = str(limit + doors.MAX_BODY_BYTES + 1)
        status, text = local.raw("POST", path, {"Content-Length": length, "Content-Type": "application/json"})
        assert status == 413 and "at most" in text


def send_parts(server: Server, path: str, parts: list[bytes]) -> int:
    """Sends a body in chunks without saying how long it is, until it is through or refused; returns the status."""
    head = f"POST {path} HTTP/1.1\r\nHost: {server.at}\r\nTransfer-Encoding: chunked\r\n"
    head += "Content-Type: multipart/form-data; boundary=end\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(head.encode())
        for part in parts:
            if select.select([connection], [], [], 0)[0]:
                break
            connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        else:
            connection.sendall(b"0\r\n\r\n")
        return int(connection.recv(100).split()[1])


def part_head(name: str) -> bytes:
    return f'\r\n--end\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()


def test_what_an_earlier_server_left_on_its_way_in_is_gone(local, public):
    for server in (local, public):
        assert server.workspace.incoming.is_dir() and not (server.workspace.incoming / "left.csv").exists()


@pytest.mark.parametrize("num_files", [1, 2])
def test_an_upload_without_a_length_is_cut_off_at_the_limit_of_one_file_and_of_all_together(num_files, local):
    megabyte = b"x" * 2**20
    size = doors.MAX_UPLOAD_BYTES // 2**20 // num_files + 8  # each of two is well within what one may have
    parts = [part for i in range(num_files) for part in (part_head(f"{i}.csv"), *[megabyte] * size)]
    assert send_parts(local, f"{API}/upload", parts) == 413
    assert stored(local.workspace) == []


def test_a_long_request_that_is_no_upload_is_cut_off_much_earlier(local):
    assert send_parts(local, f"{API}/queue/join", [b" " * 2**18] * 100) == 413


def test_an_upload_that_breaks_off_leaves_nothing(local):
    head = f"POST {API}/upload HTTP/1.1\r\nHost: {local.at}\r\nContent-Length: 9999999\r\n"
    head += "Content-Type: multipart/form-data; boundary=end\r\n\r\n"
    with socket.create_connection(("127.0.0.1", local.port), 10) as connection:
        connection.sendall(head.encode() + part_head("half.csv") + b"x" * 2**20)
        wait_until(lambda: stored(local.workspace) != [])
    wait_until(lambda: stored(local.workspace) == [])


def wait_until(is_so) -> None:
    for _ in range(100):
        if is_so():
            return
        time.sleep(0.05)
    raise AssertionError("it did not become so within five seconds")


@pytest.mark.parametrize(
    "name",
    [
        *("rows.csv", "../../up.csv", "..\\..\\up.csv", "/etc/cron.d/up.csv", "C:\\up.csv", ".hidden.csv", "a\tb.csv"),
        *("x" * 300 + ".csv", "日本語.csv", "CON.csv", "aux", "<img src=x onerror=alert(1)>.csv", "%2e%2e%2fup.csv"),
    ],
)
def test_an_upload_lands_in_the_workspace_whatever_its_name_and_gradio_keeps_no_copy(name, page, local):
    before = set(local.workspace.uploads.iterdir())
    path = Path(page.upload(name))
    assert path.is_relative_to(local.workspace.incoming) and ".." not in path.parts
    try:
        page.run(page.event(inputs=["upload"]), [FILE_DATA | {"path": str(path)}], None)
    except RuntimeError as refused:  # the name says nothing of what is in it; kept it was all the same
        assert "must end in" in str(refused)
    (kept,) = set(local.workspace.uploads.iterdir()) - before
    assert re.fullmatch(r"[\w()-][\w.()-]{0,59}", kept.name) and not re.match(r"(?i)(con|aux)\b", kept.name)
    assert not path.exists()


@pytest.mark.parametrize("name", ["..", ".", "/", "\0", "a\0b.csv"])
def test_a_name_that_is_none_is_refused_or_made_one(name, page, local):
    outside = set(local.workspace.root.parent.rglob("*")) - set(local.workspace.incoming.rglob("*"))
    answer = page.http.post(f"{API}/upload", content=part_head(name)[2:] + b"a,b\n\r\n--end--\r\n", headers=MULTIPART)
    assert answer.status_code in (200, 400)
    if answer.status_code == 200:
        assert Path(answer.json()[0]).is_relative_to(local.workspace.incoming)
    assert set(local.workspace.root.parent.rglob("*")) - set(local.workspace.incoming.rglob("*")) == outside


# Files that a client names


@pytest.fixture(scope="module")
def secret(tmp_path_factory) -> Path:
    """A file that nobody gave to the studio."""
    path = tmp_path_factory.mktemp("elsewhere") / "secret.csv"
    path.write_text("question,answer\nthe code?,1234\n")
    return path


@pytest.mark.parametrize(
    "form", ["{secret}", "{incoming}/../../../../..{secret}", "{incoming}/link.csv", "file://{secret}"]
)
@pytest.mark.parametrize("component", ["upload", "model-kind", "run"])
def test_no_file_is_opened_that_was_not_uploaded(form, component, secret, page, local):
    link = local.workspace.incoming / "link.csv"
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    path = form.format(secret=secret, incoming=local.workspace.incoming)
    answer = page.join(page.event(inputs=[component]), [FILE_DATA | {"path": path}, None])
    assert (answer.status_code, answer.text) == (403, "A file must be uploaded before it is named.\n")
    link.unlink()


@pytest.mark.parametrize(
    "body",
    [
        '{"data": [{"path": "https://example.com/x.csv", "meta": {"_type": "gradio.FileData"}}]}',
        '{"data": [[[{"p\\u0061th": "/etc/hostname"}]]]}',
        '{"data": [{"path": "/etc/hostname", "path": null}]}',
        '{"data": [{"path": ["/etc/hostname"]}]}',
    ],
)
@pytest.mark.parametrize("path", ["queue/join", "run/predict", "component_server"])
def test_however_a_file_is_named_it_is_seen(body, path, local):
    assert local.http.post(f"{API}/{path}", content=body).status_code == 403


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b'{"path": "\\u0000"}', b'"\\ud800"', b"\xff", b"--end\r\n"]
)
def test_what_is_no_sound_json_is_refused(body, local):
    for path in ("queue/join", "component_server"):
        assert local.http.post(f"{API}/{path}", content=body).status_code == 400


@pytest.mark.parametrize("kind", ["Folder", "Hugging Face Hub", "GGUF file"])
@pytest.mark.parametrize(
    "form", ["{tiny}", "{workspace}/../../..{tiny}", "{workspace}/linked", "~root", "/no/such", "tests"]
)
def test_a_page_opens_no_model_outside_of_the_workspace(kind, form, page, local, tiny_folder):
    link = local.workspace.root / "linked"
    link.unlink(missing_ok=True)
    link.symlink_to(tiny_folder)
    place = form.format(tiny=tiny_folder, workspace=local.workspace.root)
    with pytest.raises(
        RuntimeError, match=r"`model` .* must lie in .*/workspace or .*/allowed to be opened .*--allow-path"
    ):
        page.look_at(kind, place)
    link.unlink()


def test_models_in_the_workspace_and_where_the_operator_allows_are_opened(page, local, tiny_folder):
    inside = local.workspace.root / "models" / "tiny"
    shutil.copytree(tiny_folder, inside, dirs_exist_ok=True)
    allowed = local.workspace.root.parents[1] / "allowed" / "model"
    for place in (inside, f"{inside}/../tiny", allowed):
        model_facts = page.look_at("Folder", str(place))[1]
        assert "2 × 32" in model_facts


def test_the_chosen_model_is_kept_by_the_server_and_cannot_be_sent(page, tiny_folder):
    cost = page.event(outputs=["grid", "matrices", "preset", "model-cost"])
    (values,) = [e["values"] for e in page.events if e["id"] == cost]
    assert values[0] is None, "the server does not even tell it"
    *_, words = page.run(cost, *values)
    assert "Trainable parameters" in words
    assert page.run(cost, str(tiny_folder), *values[1:])[-1] == words


@pytest.mark.parametrize("value", ["starter:../../x", "/etc/passwd", "hub:../x", "file:///etc/passwd"])
def test_a_data_set_that_is_no_choice_is_refused(value, page):
    with pytest.raises(RuntimeError, match="is not in the list of choices"):
        page.run(page.event(inputs=["starter-set"]), value, None)


@pytest.mark.parametrize("run", ["../..", "/etc", ".", "..%2f", "x" * 500, "a\nb", 5, ["x"], {"x": 1}])
def test_a_run_that_is_none_is_not_opened(run, page):
    with pytest.raises(RuntimeError, match="list of choices|unhashable"):
        page.run(page.event(inputs=["run"], outputs=["run-details"]), run, None)
    assert "No run yet" in page.look(run, train=True)["status"]


def test_nothing_of_a_component_is_called_but_the_look(page):
    for name in ("__init__", "postprocess", "get_config", "_look", ""):
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            page.look(None, train=True, fn_name=name)


# Downloads


@pytest.fixture
def run(local):
    """A run with a real adapter, and beside it a link to a file that is none of its own."""
    made = Runs(local.workspace).create(RunSpec("Mine"))
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoRAConfig(r=2, target_modules=("0",)))
    Adapter.from_model(model).save(made.adapter_folder)
    (made.adapter_folder / "passwd").symlink_to("/etc/passwd")
    yield made
    shutil.rmtree(made.folder, ignore_errors=True)


def test_a_download_is_the_run_s_own_files_and_goes_with_the_run(run, page, local):
    page.run(page.event(outputs=["run"], on=["load"]))
    data = page.run(page.event(inputs=["run"], outputs=["run-details"]), run.id, None)
    url = data[1]["value"]["url"].partition(local.at)[2]
    packed = zipfile.ZipFile(io.BytesIO(local.http.get(url).content))
    assert set(packed.namelist()) == {"adapter_config.json", "adapter_model.safetensors"}
    saved = (run.adapter_folder / "adapter_model.safetensors").read_bytes()
    assert packed.read("adapter_model.safetensors") == saved
    page.run(page.event(of=["delete-yes"]), run.id)
    assert not run.folder.exists() and list(local.workspace.downloads.iterdir()) == []
    assert local.http.get(url).status_code == 403


@pytest.mark.parametrize(
    "form",
    [
        *("{downloads}/notes.txt", "{downloads}/link-adapter.zip", "{downloads}/../../spec.json", "{downloads}", ""),
        *("{downloads}/sub/x-adapter.zip", "{downloads}/../downloads/x-adapter.zip", "{uploaded}", "{root}/studio.log"),
        *("{downloads}/%2e%2e/%2e%2e/studio.log", "{here}/pyproject.toml", "pyproject.toml", "/etc/passwd"),
        *("https://example.com/x-adapter.zip", "file:///etc/passwd", "{downloads}/x-adapter.zip%00", "{downloads}//x"),
    ],
)
def test_nothing_else_is_handed_out(form, page, local):
    folder = local.workspace.downloads
    (folder / "sub").mkdir(exist_ok=True)
    for name in ("notes.txt", "x-adapter.zip", "sub/x-adapter.zip"):
        (folder / name).write_bytes(b"x")
    link = folder / "link-adapter.zip"
    link.symlink_to("/etc/passwd")
    uploaded = page.upload("mine.csv")
    assert local.raw("GET", f"{API}/file={folder}/x-adapter.zip", {})[0] == 200
    path = form.format(downloads=folder, uploaded=uploaded, root=local.workspace.root, here=ROOT)
    status, text = local.raw("GET", f"{API}/file={path}", {})
    assert (status, text) in [(403, "Only what was made ready for a download can be fetched.\n"), (404, CLOSED)]
    link.unlink()
    shutil.rmtree(folder)
    folder.mkdir()
