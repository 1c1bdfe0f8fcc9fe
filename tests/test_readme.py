"""What the README shows and names is there: its picture of the architecture, its files, links and commands."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import grimp
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PICTURE = ElementTree.parse(ROOT / "assets" / "architecture.svg")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def graph():
    """Who imports whom; a package with a box of its own counts as one."""
    graph = grimp.build_graph("core", "studio", cache_dir=None)
    for name in boxes():
        if (ROOT / name.replace(".", "/")).is_dir():
            graph.squash_module(name)
    return graph


def boxes() -> dict[str, tuple[float, str]]:
    """Returns module → how far down its box stands, and the name that it bears."""
    found = {}
    for group in PICTURE.iterfind(f".//{SVG}g[@data-module]"):
        box, name = group.find(f"{SVG}rect"), group.find(f"{SVG}text")
        assert box is not None and name is not None
        found[group.attrib["data-module"]] = float(box.attrib["y"]), name.text or ""
    return found


def arrows(kind: str) -> list[tuple[str, str]]:
    lines = PICTURE.iterfind(f".//{SVG}line[@class='{kind}'][@data-from]")
    return [(line.attrib["data-from"], line.attrib["data-to"]) for line in lines]


def readme_section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_part_and_box_is_there_under_the_name_that_it_bears():
    assert [part.attrib["data-part"] for part in PICTURE.iterfind(f".//{SVG}g[@data-part]")] == [
        "notebooks",
        "studio",
        "core",
    ]
    for module, (_, name) in boxes().items():
        assert module.split(".")[-1] == re.sub(r"\.py$|/$", "", name)
        assert (ROOT / module.split(".")[0] / name).exists(), name


def test_every_arrow_is_an_import_and_goes_down(graph):
    drawn = boxes()
    inner = [(a, b) for a, b in arrows("import") if a in drawn]
    assert len(inner) > 10
    for a, b in inner:
        assert graph.direct_import_exists(importer=a, imported=b), f"{a} does not import {b}"
        assert drawn[a][0] < drawn[b][0], f"{a} stands below {b}"


def test_no_box_imports_one_that_stands_above_it(graph):
    drawn = boxes()
    upward = [
        (a, b)
        for a, (low, _) in drawn.items()
        for b, (high, _) in drawn.items()
        if low > high and graph.direct_import_exists(importer=a, imported=b)
    ]
    assert upward == []


def test_notebooks_stand_on_studio_and_studio_stands_on_core(graph):
    assert [(a, b) for a, b in arrows("import") if "." not in a] == [("notebooks", "studio"), ("studio", "core")]
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").glob("[0-9]*.py")]
    assert any(re.search(r"^from studio", source, re.MULTILINE) for source in sources)
    over = graph.find_modules_that_directly_import("core")
    assert any(name.startswith("studio.") for name in over)
    assert graph.find_downstream_modules("studio", as_package=True) == set()


def test_the_process_that_jobs_starts_is_the_worker_which_it_does_not_import(graph):
    ((a, b),) = arrows("starts")
    assert not graph.direct_import_exists(importer=a, imported=b)
    assert f'"{b}"' in (ROOT / f"{a.replace('.', '/')}.py").read_text(encoding="utf-8")


def test_the_five_decisions_are_the_readme_s():
    titles = [
        " ".join(span.text or "" for span in group.iterfind(f"{SVG}text[@class='title']/{SVG}tspan"))
        for group in PICTURE.iterfind(f".//{SVG}g[@data-decision]")
    ]
    told = re.findall(r"^\d\. \*\*(.+?)\.?\*\*", readme_section("Architecture"), re.MULTILINE)
    assert titles == told and len(titles) == 5
    badges = {badge.text for badge in PICTURE.iterfind(f".//{SVG}g[@data-module]/{SVG}text[@class='digit']")}
    assert badges == {"1", "2", "3", "4", "5"}


@pytest.mark.parametrize("part", ["core", "studio"])
def test_the_readme_names_every_file_of_a_part_and_none_that_is_not_there(part):
    named = set(re.findall(r"\b([a-z]\w*)\.py\b", readme_section("Architecture")))
    there = {path.stem for path in (ROOT / part).glob("*.py")} - {"__init__", "__main__"}
    assert there - named == set()
    assert named - {path.stem for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts} == set()


def test_every_link_into_the_repository_leads_somewhere():
    places = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)", README, re.M)
    }
    assert len([place for place in places if place.endswith((".png", ".svg", ".webp"))]) == 10
    for place in places:
        assert place[1:] in headings if place.startswith("#") else (ROOT / place).exists(), place


def test_every_measured_figure_names_a_command_that_is_there():
    table = readme_section("What makes it different").split("| measured |")[1].split("\n\n")[0]
    lines = re.findall(r"^\|.+\|$", table, re.M)[1:]
    workloads = (ROOT / "tests" / "benchmarks" / "workloads.py").read_text(encoding="utf-8")
    (letters,) = re.findall(r"^WORKLOADS.*= (\{.+?^\})", workloads, re.M | re.S)
    known = {key.value for key in ast.parse(letters, mode="eval").body.keys}  # type: ignore[attr-defined]
    for line in lines:
        program, *words = shlex.split(re.findall(r"`([^`]+)` \|$", line)[0])
        if program == "pytest":
            assert (ROOT / words[-1]).is_file()
        else:
            flag, module, *more = words
            assert (program, flag) == ("python", "-m") and importlib.util.find_spec(module)
            assert module != "tests.benchmarks" or more[0] in known
