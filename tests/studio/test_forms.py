"""Forms: what is declared becomes widgets, and what the widgets hold becomes the same config again."""

import asyncio
import dataclasses
import re

import gradio as gr
import pytest

from core import Config, LoRAConfig, LoRAError, MethodConfig, TrainConfig, setting, settings
from studio.data import DataSpec
from studio.forms import Form, address, info, widget
from studio.generating import EvaluationSpec
from studio.panes import Pane
from studio.sampling import ChatSettings

CONFIGS = [LoRAConfig, TrainConfig, DataSpec]
ALL = [(config, s) for config in (*CONFIGS, MethodConfig, EvaluationSpec, Pane, ChatSettings) for s in settings(config)]
each_setting = pytest.mark.parametrize(
    "s", [s for _, s in ALL], ids=[f"{config.__name__}.{s.name}" for config, s in ALL]
)


def draw(config: type[Config], names=None, **defaults) -> Form:
    async def drawn() -> Form:  # outside of a running loop, each gr.Blocks leaves one behind that nobody closes
        with gr.Blocks():
            return Form(config, names, **defaults)

    return asyncio.run(drawn())


@pytest.fixture(scope="module")
def forms() -> dict[type[Config], Form]:
    return {config: draw(config) for config in CONFIGS}


def held(form: Form) -> list:
    return [w.value for w in form.widgets]


@pytest.mark.parametrize("config", CONFIGS)
def test_an_untouched_form_gives_the_defaults_back(config, forms):
    form = forms[config]
    assert config.from_dict(form.values(held(form))) == config()
    assert sorted(form.names) == sorted(s.name for s in settings(config))


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(r=3, alpha=0.5, dropout=0.1, scaling="rslora", rank_pattern={"q_proj": 2}, alpha_pattern={"v": 1.5}),
        LoRAConfig(target_modules=r".*\.(0|1)\..*q_proj"),
        TrainConfig(steps=7, learning_rate=2e-5, schedule="cosine", clip_norm=0, device="cuda:1", seed=2**31 - 1),
        DataSpec(source="my rows.csv", layout="messages", messages="chat log", instruction='Say «é» 日本, "so".'),
        pytest.param(
            LoRAConfig(target_modules=("q_proj", "v_proj")),
        ),
    ],
)
def test_what_a_form_shows_of_a_config_is_that_config(config, forms):
    form = forms[type(config)]
    assert type(config).from_dict(form.values(form.shown(config))) == config


def test_a_form_of_some_settings_begins_with_the_values_given():
    form = draw(TrainConfig, ["seed", "steps"], steps=9)
    assert form.names == ["steps", "seed"]  # the advanced ones come last, under "More"
    assert held(form) == [9, 0]
    assert form.values([12, 3]) == {"steps": 12, "seed": 3}


@pytest.mark.parametrize("config", CONFIGS)
def test_each_setting_is_drawn_with_its_title_its_explanation_and_an_id(config, forms):
    form = forms[config]
    declared = {s.name: s for s in settings(config)}
    for name, drawn in zip(form.names, form.widgets, strict=True):
        s = declared[name]
        assert (drawn.label, drawn.info, drawn.elem_id) == (s.label, info(s.help, s.why), f"setting-{name}")


@each_setting
def test_each_setting_is_told_in_few_sentences_and_a_number_by_its_usual_range(s):
    assert s.label and s.help.endswith(".") and len(s.help) < 240
    assert s.type not in (int, float) or re.search(r"\d", s.help)
    # What Gradio would take for its marks of code, links, bold or italics would not be shown as it stands.
    assert re.search(r"[`*\[\]]|__|(?<!\w)_|https?:|arXiv", s.help) is None


SECTIONS = {"4": 2, "5": 5, "7": 3}
"""Sections of the LoRA paper that have parts, and how many."""


@each_setting
def test_each_why_is_a_link_to_a_part_that_the_lora_paper_has_or_to_another_paper(s):
    for place in filter(None, s.why.split("; ")):
        link = address(place)
        if section := re.fullmatch(r"https://arxiv\.org/pdf/2106\.09685#subsection\.(\d)\.(\d)", link):
            assert 1 <= int(section[2]) <= SECTIONS[section[1]] and place == f"LoRA paper, §{section[1]}.{section[2]}"
        elif "/pdf/" in link:
            assert (place, link) == ("LoRA paper, app. D", "https://arxiv.org/pdf/2106.09685#appendix.D")
        else:
            assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}", link) and place.endswith(link[22:])
        assert f"{place}]({link})" in info(s.help, s.why) and place in s.told
    assert s.why or info(s.help, s.why) == s.help == s.told


def test_several_places_are_links_beside_each_other():
    assert info("Help.", "LoRA paper, §4; DoRA, arXiv:2402.09353") == (
        "Help. [Why: LoRA paper, §4](https://arxiv.org/pdf/2106.09685#section.4); "
        "[DoRA, arXiv:2402.09353](https://arxiv.org/abs/2402.09353)"
    )


@pytest.mark.parametrize(
    "why", ["§7.2", "LoRA paper, §72", "DoRA arXiv:2402.09353", "x](https://evil), arXiv:2402.09353", "A paper"]
)
def test_a_why_that_names_no_place_is_refused(why):
    with pytest.raises(LoRAError, match=r"`why` \(=.*\) must be a place like 'LoRA paper, §7\.2'"):
        info("Help.", why)


@pytest.mark.parametrize(
    ("config", "name", "kind"),
    [
        (LoRAConfig, "r", gr.Number),
        (LoRAConfig, "alpha", gr.Number),
        (LoRAConfig, "scaling", gr.Radio),
        (LoRAConfig, "rank_pattern", gr.Textbox),
        (TrainConfig, "device", gr.Textbox),
        (DataSpec, "template", gr.Radio),
    ],
)
def test_the_type_of_a_setting_decides_its_widget(config, name, kind, forms):
    drawn = forms[config].widgets[forms[config].names.index(name)]
    assert type(drawn) is kind
    if kind is gr.Radio:
        (s,) = [s for s in settings(config) if s.name == name]
        assert tuple(value for value, _ in drawn.choices) == s.choices


def test_a_whole_number_s_box_takes_whole_numbers_only():
    r, alpha = draw(LoRAConfig, ["r", "alpha"]).widgets
    assert (r.preprocess(8.4), alpha.preprocess(0.5)) == (8, 0.5)


NUMBERS = [(config, s.name) for config in CONFIGS for s in settings(config) if s.type in (int, float)]


@pytest.mark.parametrize(("config", "name"), NUMBERS)
def test_an_emptied_number_box_is_refused_by_name(config, name, forms):
    form = forms[config]
    raw = [None if n == name else value for n, value in zip(form.names, held(form), strict=True)]
    with pytest.raises(LoRAError, match=rf"^`{name}` \(=None\) must be a (whole )?number\.$"):
        config.from_dict(form.values(raw))


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"q_proj": }',
            r'`{name}` \(=\'{{"q_proj": }}\'\) must be a table like {{"q_proj": 4}}, written as JSON; Exp',
        ),
        ("q_proj=4", r"`{name}` \(='q_proj=4'\) must be a table like .*, written as JSON; Expecting value"),
        ("[1]", r"`{name}` \(=\(1,\)\) must be a table of name to number"),
        ("4", r"`{name}` \(=4\) must be a table of name to number"),
        ("null", r"`{name}` \(=None\) must be a table of name to number"),
        ('{"q_proj": "4"}', r"`{name}` \(={{'q_proj': '4'}}\) must be a table of name to number"),
        pytest.param(
            "[" * 100_000,
            r"`{name}` .* must be a table like",
            id="nested too deeply",
        ),
    ],
)
def test_a_table_that_is_no_table_is_refused_by_name(name, text, message, forms):
    form = forms[LoRAConfig]
    raw = [text if n == name else value for n, value in zip(form.names, held(form), strict=True)]
    with pytest.raises(LoRAError, match=message.format(name=name)):
        LoRAConfig.from_dict(form.values(raw))


def test_an_empty_table_is_no_table():
    form = draw(LoRAConfig, ["rank_pattern"])
    assert all(form.values([text]) == {"rank_pattern": {}} for text in ("", None, "{}"))


def test_text_is_taken_without_the_spaces_around_it():
    assert draw(TrainConfig, ["device"]).values(["  cpu \n"]) == {"device": "cpu"}


@dataclasses.dataclass(frozen=True)
class Late(Config):
    """A setting that nobody had when forms were written."""

    names: tuple[str, ...] = setting(("a", "b"), "Names", "Many of them.")
    share: float = setting(0.5, "Share", "From 0 to 1.", minimum=0, maximum=1)


def test_a_new_setting_needs_no_new_form():
    form = draw(Late)
    assert held(form) == ["a, b", 0.5]
    assert [w.label for w in form.widgets] == ["Names", "Share"]


def test_a_table_is_drawn_as_json_and_an_empty_one_as_nothing():
    (s,) = [s for s in settings(LoRAConfig) if s.name == "rank_pattern"]
    assert (widget(s, {"q_proj": 2}).value, widget(s, {}).value) == ('{"q_proj": 2}', "")
