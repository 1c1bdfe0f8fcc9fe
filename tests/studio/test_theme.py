"""The look: colours with one meaning, fonts that the machine has, and no text that turns into HTML."""

import re
from html.parser import HTMLParser

import pytest
from gradio.themes import colors
from gradio.themes.utils import fonts

from studio import palette, theme

HOSTILE = '<img src=x onerror="alert(1)">&<b>'


class Reader(HTMLParser):
    """Collects the tags and the text of HTML as a browser would."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("view", [lambda s: theme.facts([(s, s)]), theme.said, lambda s: theme.said([s, s])])
def test_what_is_shown_stays_text(view):
    read, plain = Reader(view(HOSTILE)), Reader(view("x"))
    assert read.tags == plain.tags and not read.open
    assert set(read.text) == {HOSTILE}


def test_a_status_stays_text_in_the_chip_and_in_its_class():
    assert Reader(theme.chip(HOSTILE)).tags == ["span"]
    assert Reader(theme.chip("running")).text == ["running"]


def test_facts_are_pairs_and_sentences_are_paragraphs():
    assert Reader(theme.facts([("a", "1"), ("b", "2")])).text == ["a", "1", "b", "2"]
    short, long = theme.facts([("a", "1" * 40)]), theme.facts([("a", "1" * 41)])
    assert 'class="long"' in long and 'class="long"' not in short, "it would break into five lines beside others"
    assert Reader(theme.said(["One.", "Two."])).tags == ["div", "p", "p"]
    assert 'class="said error"' in theme.said("No.", "error")


@pytest.mark.parametrize("status", ["running", "finished", "stopped", "failed", "interrupted"])
def test_every_status_has_a_look_of_its_own(status):
    assert f".chip.{status}" in theme.CSS


@pytest.mark.parametrize("kind", ["warn", "error"])
def test_every_kind_of_sentence_has_a_look_of_its_own(kind):
    assert f".said.{kind}" in theme.CSS


def test_the_css_is_whole_and_fetches_nothing():
    assert theme.CSS.count("{") == theme.CSS.count("}") > 20
    assert not re.search(r"@import|url\(|https?:", theme.CSS)


def test_the_two_colours_are_the_palette_s():
    assert f"--base: {palette.BASE};" in theme.CSS
    assert f"--adapted: {palette.ADAPTED};" in theme.CSS


def test_only_fonts_of_the_machine_are_named_and_nothing_is_fetched():
    made = theme.theme()
    for font in (*made._font, *made._font_mono):
        assert not isinstance(font, (fonts.GoogleFont, fonts.LocalFont))  # Gradio's own defaults are
    assert made._stylesheets == []
    css = made._get_theme_css() + "".join(made._font_css)
    assert not re.search(r"@import|@font-face|url\((?!['\"]?data:)", css)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_marks_stand_out_from_the_page_in_light_and_dark():
    made = theme.theme()
    for background in (made.block_background_fill.replace("white", "#ffffff"), made.block_background_fill_dark):
        for colour in (palette.BASE, palette.ADAPTED):
            assert contrast(colour, background) >= 3  # WCAG 2.2, 1.4.11: what carries meaning and is no text


def test_words_in_the_two_colours_can_be_read_on_every_ground_in_light_and_dark():
    made = theme.theme()
    grounds = (
        ("#ffffff", colors.slate.c50, colors.slate.c100),
        (made.block_background_fill_dark, made.body_background_fill_dark, made.input_background_fill_dark),
    )
    for words in (palette.BASE_TEXT, palette.ADAPTED_TEXT):
        for colour, of_mode in zip(words, grounds, strict=True):
            assert all(contrast(colour, ground) >= 4.5 for ground in of_mode)  # WCAG 2.2, 1.4.3
            assert f": {colour};" in theme.CSS


@pytest.mark.parametrize("asked", ["prefers-reduced-motion: reduce", ":focus-visible {"])
def test_the_css_heeds_those_who_want_no_motion_and_those_who_use_the_keyboard(asked):
    assert asked in theme.CSS
