"""The command line: one sentence and a fitting exit code, never a traceback."""

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from core import LoRAConfig, LoRAError, TrainConfig, settings
from studio import __main__ as cli
from studio import jobs
from studio.data import DataSpec
from studio.runs import Runs
from studio.specs import RunSpec


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """command(*words): runs them in this process with a workspace of the test's own; returns exit code, out and err."""
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    for name in ("LORA_STUDIO_PASSWORD", "GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # and afterwards again, whatever serving does to it

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def served(monkeypatch):
    """What would have been served; nothing is, and gradio is not imported."""
    calls = []
    app, state = types.ModuleType("studio.app"), types.ModuleType("studio.state")
    app.launch = lambda studio, **how: calls.append({**studio, **how})
    state.Studio = lambda workspace, allowed: {"workspace": workspace.root, "allowed": allowed}
    monkeypatch.setitem(sys.modules, "studio.app", app)
    monkeypatch.setitem(sys.modules, "studio.state", state)
    return calls


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def says(err: str, sentence: str) -> bool:
    """Whether the terminal shows this one sentence and nothing else."""
    return err.startswith(f"lora-studio: {sentence}") and err.count("\n") == 1 and err.endswith("\n")


# What is understood


def test_without_a_command_the_page_is_served(command, served, tmp_path, monkeypatch, free_port):
    assert command("--port", free_port)[0] == 0
    assert command("serve", "--port", free_port)[0] == 0
    assert served[0] == served[1]
    assert served[0] == {
        "workspace": tmp_path / "home",
        "allowed": [],
        "host": "127.0.0.1",
        "port": free_port,
        "url": f"http://localhost:{free_port}/",
        "browser": True,
        "account": None,
        "notes": [],
    }


def test_no_words_at_all_serve_too(monkeypatch, workspace):
    called = []
    monkeypatch.setattr(cli, "_serve", lambda args, workspace: called.append(args) or 0)
    monkeypatch.setenv("LORA_STUDIO_HOME", str(workspace.root))
    monkeypatch.setattr(sys, "argv", ["lora-studio"])
    assert cli.main() == 0
    assert (called[0].command, called[0].port, called[0].host) == ("serve", 7860, "127.0.0.1")


def test_serve_takes_host_run_workspace_and_no_browser(command, served, tmp_path, free_port):
    options = ("--host", "0.0.0.0", "--run-id", "r-1", "--no-browser", "--workspace", tmp_path / "other")
    assert command("serve", "--port", free_port, *options)[0] == 0
    (how,) = served
    assert (how["workspace"], how["host"], how["browser"]) == (tmp_path / "other", "0.0.0.0", False)
    assert how["url"] == f"http://0.0.0.0:{free_port}/?run=r-1"


def commands() -> dict[str, argparse.ArgumentParser]:
    """Returns all commands, in the order in which help lists them."""
    (sub,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return sub.choices


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_lists_every_command_with_its_sentence(words, command):
    code, out, err = command(*words)
    assert (code, err) == (0, "")
    assert out.startswith("usage: lora-studio")
    for name, parser in commands().items():
        sentence, *_ = parser.description.split("\n\n")
        assert "".join((name + sentence).split()) in "".join(out.split())


@pytest.mark.parametrize("name", commands())
def test_help_of_a_command_has_examples_which_are_understood(name, command):
    code, out, err = command(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: lora-studio {name}") and "--workspace DIR" in out
    examples = [shlex.split(line, comments=True) for line in out.split("\nexamples:\n")[1].splitlines()]
    assert examples[-1][0] == "lora-studio"
    for program, *words in examples:
        if program == "echo":  # what the next one reads
            RunSpec.from_dict(json.loads(words[0]))
            continue
        args = cli._parser().parse_args(cli._with_command(words))
        assert (program, args.command) == ("lora-studio", name)


def test_the_readme_s_table_has_every_command_and_no_flag_that_is_not_there():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`lora-studio.*?) \| (.+) \|$", readme.split("\n## Commands\n")[1], re.MULTILINE)
    known = commands()
    told = []
    for cell, words in rows:
        names = re.findall(r"`(?:lora-studio)? ?([a-z][a-z-]*)?[^`]*`", cell)
        names = [name or "serve" for name in names]
        told += names
        flags = {flag for name in names for flag in known[name]._option_string_actions}
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", cell + words)) <= flags, cell
    assert list(dict.fromkeys(told)) == list(known)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dance"], "invalid choice: 'dance'"),
        (["train"], "the following arguments are required: SPEC"),
        (["train", "a.json", "b.json"], "unrecognized arguments: b.json"),
        (["--port", "many"], "argument --port: invalid int value: 'many'"),
        (["demo", "--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
        (["--dance"], "unrecognized arguments: --dance"),
    ],
)
def test_what_is_not_understood_ends_with_2_and_the_usage(words, message, command):
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert err.startswith("usage: lora-studio") and message in err


# Serving


@pytest.mark.parametrize("port", [0, -1, 65536, 10**9])
def test_a_port_that_is_none_is_refused(port, command, served):
    code, _, err = command("serve", "--port", port)
    assert code == 2 and not served
    assert says(err, f"`--port` (={port}) must be from 1 to 65535.")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_told_with_another_to_try(host, command, served):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, err = command("serve", "--host", host, "--port", port)
    assert code == 2 and not served
    another = port % 65535 + 1
    assert says(err, f"`--port` (={port}) must be free on {host} (Address already in use); is the studio running alre")
    assert err.endswith(f"Else try --port {another}.\n")


def test_a_port_that_was_in_use_a_moment_ago_is_free(command, served):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            other.accept()[0].close()  # the server's end closes first and lingers in TIME_WAIT
    assert command("serve", "--port", port)[0] == 0
    assert len(served) == 1


@pytest.mark.parametrize(
    "host",
    [
        "no.such.host.invalid",
        pytest.param(
            "a..é",
        ),
    ],
)
def test_a_host_that_does_not_exist_ends_with_one_sentence(host, command, served, free_port):
    code, _, err = command("serve", "--host", host, "--port", free_port)
    assert code == 2 and not served
    assert says(err, "`--")


def test_an_ipv6_address_may_be_the_host(command, served, free_port):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    code, _, _ = command("serve", "--host", "::1", "--port", free_port)
    assert code == 0 and served[0]["url"] == f"http://[::1]:{free_port}/"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost"])
def test_this_machine_alone_needs_no_password_unless_one_is_given(host, command, served, free_port, monkeypatch):
    serve = ("serve", "--host", host, "--port", free_port)
    assert command(*serve)[0] == 0
    assert served[0]["account"] is None and served[0]["notes"] == []
    monkeypatch.setenv("LORA_STUDIO_PASSWORD", "eight letters")
    assert command(*serve)[0] == 0
    account = served[1]["account"]
    assert (account.name, account.password) == ("studio", "eight letters")
    assert "LORA_STUDIO_PASSWORD" not in os.environ, "what is started later does not need it"
    assert served[1]["notes"] == ["Sign in as studio; password: as given."]


def test_any_other_address_gets_a_password_which_is_told_once_with_what_others_can_do(command, served, free_port):
    serve = ("serve", "--host", "0.0.0.0", "--port", free_port)
    assert command(*serve)[0] == command(*serve)[0] == 0
    first, second = (how["account"] for how in served)
    assert first.name == "studio" and len(first.password) >= 20 and first.password != second.password
    assert first.password not in repr(first)
    said = "\n".join(served[0]["notes"])
    assert said.count(first.password) == 1
    assert "Other machines can reach this page" in said and "not encrypted" in said


def test_the_operator_s_password_comes_from_a_file_before_the_variable_and_is_not_printed(
    command, served, free_port, tmp_path, monkeypatch
):
    monkeypatch.setenv("LORA_STUDIO_PASSWORD", "from the variable")
    file = tmp_path / "password"
    file.write_text("from: the file, ä \n")
    words = ("serve", "--host", "0.0.0.0", "--port", free_port, "--user", "ada", "--password-file", file)
    assert command(*words)[0] == 0
    (how,) = served
    assert (how["account"].name, how["account"].password) == ("ada", "from: the file, ä ")
    assert "from: the file" not in "".join(how["notes"])


@pytest.mark.parametrize(
    ("words", "password", "sentence"),
    [
        (["--user", "a:b"], None, "`--user` (='a:b') must be a name without a colon."),
        (["--user", ""], None, "`--user` (='') must be"),
        ([], "seven…7", "The password of $LORA_STUDIO_PASSWORD must have at least 8 characters."),
        ([], "", "The password of $LORA_STUDIO_PASSWORD must have at least 8 characters."),
        (["--password-file", "/no/such"], None, "`--password-file` (='/no/such') must be a text file ("),
        (["--password-file", "/"], None, "`--password-file` (='/') must be a text file ("),
        (["--password-file", "/dev/null"], None, "The password of --password-file /dev/null must have at least 8"),
        (["--allow-path", "/no/such"], None, "`--allow-path` (='/no/such') must be a folder that exists."),
    ],
)
def test_an_account_or_a_folder_that_cannot_be_is_refused(
    words, password, sentence, command, served, free_port, monkeypatch
):
    if password is not None:
        monkeypatch.setenv("LORA_STUDIO_PASSWORD", password)
    code, _, err = command("serve", "--port", free_port, *words)
    assert code == 2 and not served
    assert says(err, sentence)


def test_folders_to_open_may_be_given_again_and_again(command, served, free_port, tmp_path):
    assert command("serve", "--port", free_port, "--allow-path", tmp_path, "--allow-path", "/")[0] == 0
    assert served[0]["allowed"] == [tmp_path, Path("/")]


# Workspaces


@pytest.mark.parametrize("words", [["serve"], ["train", "spec.json"], ["demo"]])
def test_a_workspace_that_cannot_be_written_ends_with_one_sentence(words, command, tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("x")
    code, out, err = command(*words, "--workspace", in_the_way / "below")
    assert (code, out) == (2, "")
    assert says(err, f"`--workspace` (={str(in_the_way / 'below')!r}) must be a folder that can be written (Not a dir")


def test_the_variable_s_workspace_is_checked_alike(command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "file"))
    code, _, err = command("serve")
    assert code == 2 and says(err, "`--workspace` (=")


# Training


SPECS = {
    "missing": (None, r"must be a JSON file ([Errno 2] No such file or directory"),
    "no JSON": ("r: 8", "must be a JSON file (Expecting value"),
    "no table": ("[1]", "A spec must be a table with name, model, data, lora, method, train, evaluation; not list."),
    "unknown part": (
        '{"lorra": {}}',
        "A spec has no part lorra; it has name, model, data, lora, method, train, evaluation.",
    ),
    "unknown setting": ('{"lora": {"rank": 8}}', "LoRAConfig has no setting 'rank'; it has r, alpha,"),
    "out of range": ('{"train": {"steps": 0}}', "`steps` (=0) must be at least 1 and at most 10000000."),
    "wrong type": ('{"train": {"steps": "many"}}', "`steps` (='many') must be a whole number."),
}


@pytest.mark.parametrize(("content", "sentence"), SPECS.values(), ids=SPECS)
def test_a_spec_that_cannot_be_used_ends_with_one_sentence_and_makes_no_run(content, sentence, command, tmp_path):
    path = tmp_path / "spec.json"
    if content is not None:
        path.write_text(content)
    code, out, err = command("train", path)
    assert (code, out) == (2, "")
    assert err.startswith("lora-studio: ") and err.count("\n") == 1 and sentence in err
    assert list((tmp_path / "home" / "runs").iterdir()) == []


NAMED = DataSpec(prompt="mr", completion="text")


@pytest.mark.parametrize(
    ("given", "source", "columns"),
    [
        ({}, "starter:restaurants", ("mr", "text")),
        ({"data": {"source": "starter:tickets", "max_rows": 9}}, "starter:tickets", ("request", "ticket")),
    ],
)
def test_rows_whose_columns_nobody_names_are_read_as_the_page_reads_them(
    given, source, columns, command, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(jobs, "start", lambda runs, spec: asked.append(spec))
    monkeypatch.setattr(jobs, "follow", lambda run, as_json: 0)
    (tmp_path / "spec.json").write_text(json.dumps(given))
    assert command("train", tmp_path / "spec.json")[0] == 0
    (rows,) = (spec.data for spec in asked)
    assert (rows.source, rows.prompt, rows.completion) == (source, *columns) and rows.instruction
    assert rows.max_rows == given.get("data", {}).get("max_rows", 0)


@pytest.mark.parametrize("code", [0, 1])
def test_train_starts_the_spec_and_ends_as_the_run_does(code, command, tmp_path, monkeypatch):
    asked = {}

    def start(runs: Runs, spec: RunSpec):
        asked.update(root=runs.workspace.root, spec=spec)
        return "the run"

    def follow(run, *, as_json):
        asked.update(run=run, as_json=as_json)
        return code

    monkeypatch.setattr(jobs, "start", start)
    monkeypatch.setattr(jobs, "follow", follow)
    spec = RunSpec("From a file", data=NAMED)
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_dict()))
    assert command("train", tmp_path / "spec.json", "--json")[0] == code
    assert asked == {"root": tmp_path / "home", "spec": spec, "run": "the run", "as_json": True}
    command("train", tmp_path / "spec.json")
    assert asked["as_json"] is False


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["--r", "4", "--alpha", "2"], {"lora": {"r": 4, "alpha": 2.0}}),
        (
            ["--target-modules", "q_proj, v_proj", "--dora", "true"],
            {"lora": {"target_modules": ["q_proj", "v_proj"], "dora": True}},
        ),
        (
            ["--modules-to-save", "score", "--rank-pattern", '{"q_proj": 2}'],
            {"lora": {"modules_to_save": ["score"], "rank_pattern": {"q_proj": 2}}},
        ),
        (
            ["--init", "pissa", "--learning-rate", "2e-4", "--steps", "7"],
            {"lora": {"init": "pissa"}, "train": {"learning_rate": 2e-4, "steps": 7}},
        ),
    ],
)
def test_settings_on_the_command_line_go_before_those_of_the_spec(words, changes, command, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(jobs, "start", lambda runs, spec: asked.append(spec))
    monkeypatch.setattr(jobs, "follow", lambda run, as_json: 0)
    spec = RunSpec("From a file", data=NAMED, lora=LoRAConfig(r=3), train=TrainConfig(seed=5)).to_dict()
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert command("train", tmp_path / "spec.json", *words)[0] == 0
    for part, values in changes.items():
        spec[part] |= values
    assert [one.to_dict() for one in asked] == [spec]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--r", "x"], "`r` (='x') must be a whole number."),
        (["--r", "2.5"], "`r` (=2.5) must be a whole number."),
        (["--r", "0"], "`r` (=0) must be at least 1."),
        (["--alpha", "-1"], "`alpha` (=-1.0) must be above 0."),
        (["--dora", "maybe"], "`dora` (='maybe') must be true or false."),
        (["--init", "zeros"], "`init` (='zeros') must be one of kaiming, gaussian, pissa, olora."),
        (["--rank-pattern", "{"], "`rank_pattern` (='{') must be a table like"),
        (["--layers", "a"], "`layers` (='a') must be numbers and ranges"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence_and_makes_no_run(words, sentence, command, tmp_path):
    (tmp_path / "spec.json").write_text("{}")
    code, _, err = command("train", tmp_path / "spec.json", *words)
    assert code == 2 and says(err, sentence)
    assert list((tmp_path / "home" / "runs").iterdir()) == []


def test_train_s_help_explains_every_setting(command):
    _, out, _ = command("train", "--help")
    told = "".join(out.split())  # however it is wrapped
    for config in (LoRAConfig, TrainConfig):
        for s in settings(config):
            assert f"--{s.name.replace('_', '-')}" in out and "".join(s.told.split()) in told
    assert "(LoRApaper,§7.2)" in told and "http" not in told


def test_train_while_another_run_is_going_waits_and_ctrl_c_takes_it_out(command, tmp_path, hold, monkeypatch):
    from studio.runs import Run
    from studio.workspace import Workspace

    runs = Runs(Workspace(tmp_path / "home"))
    hold(runs.create(RunSpec(name="The first")))
    (tmp_path / "spec.json").write_text("{}")
    monkeypatch.setattr(jobs, "_detached", lambda *_: subprocess.Popen(["true"]))

    def interrupt(self: Run):
        assert self.status == "queued"
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Run, "follow", interrupt)
    code, _, err = command("train", tmp_path / "spec.json")
    assert (code, err) == (0, "Queued: it starts when its device is free. Ctrl-C takes it out of the queue.\n")
    assert runs.queued() == []
    for child in jobs._children:
        child.wait()
    jobs._children.clear()


def test_a_second_ctrl_c_ends_without_a_traceback(command, tmp_path, monkeypatch):
    def follow(run, *, as_json):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "start", lambda runs, spec: None)
    monkeypatch.setattr(jobs, "follow", follow)
    (tmp_path / "spec.json").write_text("{}")
    try:
        code, _, _ = command("train", tmp_path / "spec.json")
    except KeyboardInterrupt:
        pytest.fail("a traceback")
    assert code not in (0, None)


def test_demo_hands_its_options_on(command, monkeypatch, tmp_path):
    asked = []
    demo = types.ModuleType("studio.demo")
    demo.demo = lambda workspace, **options: asked.append({"root": workspace.root, **options}) or 0
    monkeypatch.setitem(sys.modules, "studio.demo", demo)
    assert command("demo")[0] == 0
    assert asked[0] == {"root": tmp_path / "home", "model": "starter", "source": "starter:restaurants", "steps": 40}
    command("demo", "--steps", "3", "--model", "m", "--data", "d.csv", "--workspace", tmp_path / "w")
    assert asked[1] == {"root": tmp_path / "w", "model": "m", "source": "d.csv", "steps": 3}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--steps", "0"], "`steps` (=0) must be at least 1"),
        (["--steps", "-3"], "`steps` (=-3) must be at least 1"),
        (["--data", "nothing.csv"], "`source` (='nothing.csv') must be a file that exists"),
        (["--model", "/no/such/folder"], "`model` (='/no/such/folder') must be"),
    ],
)
def test_demo_with_unusable_options_ends_before_a_run_is_made(
    options, sentence, command, tiny_folder, rows_file, tmp_path
):
    code, _, err = command("demo", "--model", tiny_folder, "--data", rows_file, *options)
    assert code == 2 and says(err, sentence)
    assert list((tmp_path / "home" / "runs").iterdir()) == []


# The command itself


def test_what_is_foreseen_is_a_sentence_and_what_is_not_stays_an_error(command, monkeypatch):
    def fail(args, workspace):
        raise error

    monkeypatch.setattr(cli, "_serve", fail)
    error: Exception = LoRAError("`x` (=1) must be 2.")
    assert command() == (2, "", "lora-studio: `x` (=1) must be 2.\n")
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        command()


def test_help_needs_neither_transformers_nor_gradio():
    """So that the command answers at once."""
    look = (
        "import sys\n"
        "from studio.__main__ import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    print(sorted({'transformers', 'datasets', 'gradio', 'matplotlib'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines()[-1] == "[]"
