"""The interface in other languages: tables that say what the page says, and nothing that it does not say any more."""

import ast
import calendar
import json
import re
from html import unescape
from pathlib import Path

import pytest

from studio import language

ROOT = Path(__file__).resolve().parents[2]
HOLE = re.compile(r"\{#?\}")
ENTRIES = [(name, english, other) for name, table in language.tables().items() for english, other in table.items()]


def texts(path):
    """All string literals of a file, those that are joined joined, holes as {}."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)


def pairs(text):
    """Each word with the one after it."""
    words = re.findall(r"[A-Za-z]+(?:'[a-z]+)?", text.lower())
    return [*zip(words, words[1:], strict=False)] or [(word,) for word in words]


@pytest.fixture(scope="module")
def said():
    """What the sources say, as `pairs`, and each word alone."""
    files = [*(ROOT / "studio").rglob("*.py"), *(ROOT / "core").rglob("*.py")]
    plain = {re.sub(r"<[^>]*>", " ", unescape(text)) for file in files for text in texts(file)}
    plain |= {file.read_text(encoding="utf-8") for file in (ROOT / "assets" / "data").glob("*/about.json")}
    found = {pair for text in plain for pair in pairs(text)}
    months = {(month.lower(),) for month in calendar.month_abbr}
    return found | months | {(word,) for pair in found for word in pair}


def test_there_is_korean():
    assert "ko" in language.tables() and len(ENTRIES) > 1000
    assert language.i18n().translations_dict["ko"][language.MARK + "Learn"] == "배우기"


def test_what_is_said_in_the_holes_of_a_sentence_is_said_in_its_translation():
    for name, english, other in ENTRIES:
        holes = len(HOLE.findall(english))
        places = [int(place) for place in re.findall(r"\{(\d+)\}", other)]
        plain = other.count("{}")
        assert not (places and plain), f"{name}: {english!r} has both {{}} and numbers in {other!r}"
        assert plain in (0, holes) and all(place < holes for place in places), f"{name}: {english!r}: {other!r}"
        assert holes == 0 or places or plain, f"{name}: {english!r} says what is in its holes, {other!r} does not"


def test_a_key_is_a_text_as_the_page_shows_it():
    for name, english, other in ENTRIES:
        assert english == " ".join(english.split()), f"{name}: {english!r}"
        assert not re.search(r"</?[a-z]|&[a-z]+;", english + other), f"{name}: {english!r} has markup"
        letters = re.sub(r"[^A-Za-z]", "", HOLE.sub("", english))
        assert letters, f"{name}: {english!r} would be found in anything"


def test_nothing_is_translated_that_the_sources_do_not_say(said):
    """Sentences are put together at run time, so not each pair of words stands in the sources; some do."""
    for path in sorted(Path(language.__file__).parent.glob("*/page.json")):
        for english in json.loads(path.read_text(encoding="utf-8")):
            found = pairs(english)
            known = [pair in said or (len(found) < 4 and all((word,) in said for word in pair)) for pair in found]
            assert sum(known) >= len(known) / 4, f"{path.parent.name}: {english!r} is said nowhere"
