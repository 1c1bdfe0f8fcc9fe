"""The workspace: one folder, made on demand, and one sentence where it cannot be."""

import re

import pytest

from core import LoRAError
from studio.workspace import ASSETS, Workspace


def test_a_workspace_is_made_with_all_its_folders_and_opened_again_as_it_is(tmp_path):
    made = Workspace(tmp_path / "a" / "b")
    assert made.root == tmp_path / "a" / "b"
    assert {p.name for p in made.root.iterdir()} == {"runs", "uploads", "cache"}
    (made.runs / "kept").mkdir()
    again = Workspace(str(made.root))
    assert (again.runs, again.uploads, again.cache) == (made.runs, made.uploads, made.cache)
    assert (again.runs / "kept").is_dir()


def test_a_relative_root_stays_the_same_place_when_the_process_moves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Workspace("here")
    monkeypatch.chdir("/")
    assert made.runs == tmp_path / "here" / "runs"


def test_the_default_is_named_by_the_variable_else_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "named"))
    assert Workspace.default().root == tmp_path / "named"
    for nothing in (lambda: monkeypatch.setenv("LORA_STUDIO_HOME", ""), lambda: monkeypatch.delenv("LORA_STUDIO_HOME")):
        nothing()
        assert Workspace.default().root == tmp_path / "lora-studio"


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Workspace("~/x").root == tmp_path / "x"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file", "File exists|Not a directory"),
        ("file/below", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("runs-in-the-way", "File exists"),
    ],
)
def test_a_root_that_cannot_be_one_is_refused_by_name_and_reason(place, reason, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "runs-in-the-way").mkdir()
    (tmp_path / "runs-in-the-way" / "runs").write_text("x")
    named = re.escape(repr(str(tmp_path / place)))
    with pytest.raises(
        LoRAError, match=rf"`--workspace` \(={named}\) must be a folder that can be written \(({reason})\)"
    ):
        Workspace(tmp_path / place)


def test_the_home_of_nobody_is_refused():
    with pytest.raises(LoRAError, match="`--workspace`"):
        Workspace("~nobody-of-this-name/x")


def test_the_assets_lie_where_they_are_looked_for():
    assert (ASSETS / "data").is_dir()
