"""The checks that are not tests: format, lint, types, and which room may import which."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))

CHECKS = {
    "format": ["ruff", "format", "--check", "--diff", "--no-cache", "."],
    "lint": ["ruff", "check", "--no-cache", "."],
    "types": ["basedpyright", "--pythonpath", sys.executable],
    "imports": ["lint-imports", "--no-cache"],
}


@pytest.mark.parametrize("check", CHECKS)
def test_tree_passes(check):
    tool, *arguments = CHECKS[check]
    done = subprocess.run(
        [SCRIPTS / tool, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_top_level_is_the_agreed_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {line.split("/")[0] for line in tracked.splitlines()}
    agreed = {"core", "studio", "notebooks", "tests", "assets", "pyproject.toml", "README.md"}
    assert {n for n in names if not n.startswith(".")} <= agreed
