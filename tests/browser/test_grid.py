"""The grid of matrices, clicked in a real browser; what it says is what the plan adapts and what the run records."""

import re

import pytest

from core import LoRAConfig, plan, settings
from studio import models
from studio.forms import address
from studio.runs import Runs
from studio.workspace import Workspace
from tests.browser.serving import open_tab

WAIT = 240_000  # milliseconds, on a busy machine

# In the place of the starter's own tree, one of the size that the test names.
OF_SIZE = """
import torch, transformers
from studio import skeletons
def large(model, config, head=None):
    with torch.device('meta'):
        return transformers.AutoModelForCausalLM.from_config(transformers.{config})
skeletons.build = large
"""
LLAMA_7B = "LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)"
GPT3_175B = (
    "OPTConfig(hidden_size=12288, ffn_dim=49152, num_hidden_layers=96, num_attention_heads=96, "
    "word_embed_proj_dim=12288)"
)


def opened(browser, url, parameters="134,515,008", **options):
    context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(f"{url}?tab=model")
    page.wait_for_selector(f"text={parameters}", timeout=WAIT)
    page.wait_for_selector(".matrix-cell[data-on='1']", timeout=WAIT)
    return page


@pytest.fixture
def page(browser, server):
    page = opened(browser, server.url)
    yield page
    assert page.errors == []
    page.context.close()


@pytest.fixture(scope="module")
def skeleton(workspace_folder):
    return models.skeleton("starter", Workspace(workspace_folder))


def cell(page, layer, name):
    return page.locator(f"[data-path='model.layers.{layer}.{name}']")


def heading(page, name):
    return page.get_by_role("columnheader", name=name, exact=True)


def adapted(page):
    return set(page.locator(".matrix-cell[aria-selected=true]").evaluate_all("all => all.map(e => e.dataset.path)"))


def agrees(page, skeleton, **settings):
    """The grid shows the plan's matrices, and the totals come to be the plan's."""
    planned = plan(skeleton, LoRAConfig(**settings))
    page.wait_for_function(
        "words => words.every(w => document.querySelector('#model-cost').innerText.includes(w))",
        arg=[f"{planned.num_trainable:,}", f"{len(planned.targets)} of 212"],
        timeout=WAIT,
    )
    assert adapted(page) == {t.path for t in planned.targets}


def test_cells_rows_and_columns_are_toggled_and_undone(page, skeleton):
    agrees(page, skeleton)
    cell(page, 3, "self_attn.q_proj").click()
    agrees(page, skeleton, exclude_modules=("model.layers.3.self_attn.q_proj",))
    heading(page, "mlp.up_proj").click()
    page.get_by_role("rowheader", name="model.layers 7", exact=True).click()
    out = r"model\.layers\.3\.self_attn\.q_proj|"  # a row that is not full is filled first
    agrees(page, skeleton, exclude_modules=out + r".*layers\.(?!7\.).*up_proj")
    page.get_by_role("rowheader", name="model.layers 7", exact=True).click()
    agrees(page, skeleton, exclude_modules=out + r".*up_proj|model\.layers\.7\..*")
    assert page.get_by_label("My own choice").is_checked()
    for _ in range(4):
        page.locator("#matrix-undo").click()
    agrees(page, skeleton)
    assert page.get_by_label("All linear").is_checked() and page.locator("#matrix-undo").is_disabled()
    heading(page, "all layers").click()
    page.wait_for_selector("#model-cost >> text=must name at least one matrix", timeout=WAIT)
    assert adapted(page) == set()
    page.locator("#matrix-reset").click()
    agrees(page, skeleton)
    page.locator("#matrix-undo").click()
    page.wait_for_selector("#model-cost >> text=must name at least one matrix", timeout=WAIT)


def test_presets_names_and_patterns_show_in_the_grid_and_the_grid_in_them(page, skeleton):
    page.get_by_label("All attention").check()
    agrees(page, skeleton, target_modules=(r".*self_attn\..*"))
    heading(page, "self_attn.k_proj").click()
    heading(page, "self_attn.o_proj").click()
    agrees(page, skeleton, target_modules=("q_proj", "v_proj"))
    assert page.get_by_label("Query and value (the paper)").is_checked()
    page.get_by_text("By name or pattern").click()
    ticks = page.locator("#matrices")
    assert [ticks.get_by_label(name).is_checked() for name in ("q_proj", "k_proj", "v_proj")] == [True, False, True]
    ticks.get_by_label("mlp.down_proj").check()
    agrees(page, skeleton, target_modules=("q_proj", "v_proj", "down_proj"))

    pattern = page.locator("#pattern").get_by_role("textbox")
    typed = r".*\.layers\.(0|1)\..*q_proj"
    pattern.press_sequentially(typed)
    agrees(page, skeleton, target_modules=typed)
    assert f"{typed} (2)" in page.locator("#model-cost").inner_text()
    ticks.get_by_label("lm_head").click()  # beside a pattern, a name takes its column
    agrees(page, skeleton, target_modules=typed + "|lm_head")
    assert "lm_head" in pattern.input_value()
    pattern.fill("q_prog")
    page.wait_for_selector("#model-cost >> text=must match at least one matrix", timeout=WAIT)
    assert adapted(page) == set()
    page.get_by_label("All linear").check()  # a preset goes before what was there
    agrees(page, skeleton)
    assert pattern.input_value() == ""


def test_the_settings_beside_it_are_told_word_by_word_and_link_to_papers_in_another_tab(page):
    page.locator("button.label-wrap:visible", has_text="More").click()
    for s in settings(LoRAConfig):
        if s.name == "target_modules":  # the grid's own
            continue
        told = page.locator(f"#setting-{s.name} .info-text")
        assert told.text_content() == s.help + (f" Why: {s.why}" if s.why else "")
        links = told.locator("a").evaluate_all("all => all.map(e => [e.href, e.target, e.rel.split(' ')[0]])")
        assert links == [[address(place), "_blank", "noopener"] for place in s.why.split("; ") if place]


def test_the_grid_is_worked_by_keys_alone_and_says_what_is_where(page, skeleton):
    first = cell(page, 0, "self_attn.q_proj")
    first.focus()
    about = page.locator(".matrix-about")
    assert about.inner_text() == "model.layers.0.self_attn.q_proj · 576 × 576 · r 8 · 9,216 trainable"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    agrees(page, skeleton, exclude_modules=("model.layers.1.self_attn.k_proj",))
    assert about.inner_text() == "model.layers.1.self_attn.k_proj · 192 × 576 · left out"
    assert page.locator(".matrix-box [tabindex='0']").count() == 1, "Tab goes to one cell and on"
    page.keyboard.press("Control+z")
    agrees(page, skeleton)
    page.keyboard.press("Control+End")
    assert page.evaluate("document.activeElement.dataset.path") == "lm_head"
    for role, count in (("grid", 1), ("row", 33), ("columnheader", 8), ("rowheader", 30)):
        assert page.locator(f"#grid [role={role}]").count() == count


def test_a_run_records_the_choice_and_the_ranks(page, skeleton, server):
    page.get_by_label("Query and value (the paper)").check()
    agrees(page, skeleton, target_modules=("q_proj", "v_proj"))
    page.locator("#matrix-rank").fill("4")
    heading(page, "self_attn.v_proj").click()
    cell(page, 5, "self_attn.q_proj").click()
    own = {"v_proj": 4, r"layers\.5\.self_attn\.q_proj": 4}
    agrees(page, skeleton, target_modules=("q_proj", "v_proj"), rank_pattern=own)
    assert cell(page, 5, "self_attn.q_proj").inner_text() == "4"
    page.get_by_label("Adapt or leave out").check()
    cell(page, 6, "self_attn.v_proj").click()
    out = ("model.layers.6.self_attn.v_proj",)
    agrees(page, skeleton, target_modules=("q_proj", "v_proj"), rank_pattern=own, exclude_modules=out)
    open_tab(page, "Data")
    page.wait_for_selector("#tokens >> text=<|im_end|>", timeout=WAIT)
    open_tab(page, "Train")
    page.get_by_label("Name of the run").fill("From the grid")
    page.get_by_label("Steps", exact=True).fill("6")
    page.locator("#start").click()
    page.wait_for_function("document.querySelector('#status').innerText.includes('finished')", timeout=WAIT)
    (run,) = Runs(Workspace(server.workspace)).list()
    assert run.spec.lora == LoRAConfig(
        target_modules=("self_attn.q_proj", "self_attn.v_proj"),
        exclude_modules=out,
        rank_pattern={"self_attn.v_proj": 4, r"model\.layers\.5\.self_attn\.q_proj": 4},
    )


@pytest.mark.parametrize(
    ("config", "parameters", "num_cells"),
    [pytest.param(LLAMA_7B, "6,738,415,616", 226, marks=pytest.mark.slow), (GPT3_175B, "174,604,", 578)],
    ids=["7B", "175B"],
)
def test_a_click_in_the_grid_of_a_large_model_shows_in_the_frame_in_which_it_comes(
    server_after, browser, config, parameters, num_cells, record_property
):
    server = server_after(OF_SIZE.format(config=config))
    page = opened(browser, server.url, parameters)
    assert page.locator(".matrix-cell").count() == num_cells
    took = page.evaluate(
        """async () => {
            const cell = document.querySelector('.matrix-cell'), cost = document.querySelector('#model-cost');
            const before = cost.innerText, start = performance.now();
            cell.click();
            const drawn = performance.now() - start, isOff = cell.dataset.on === '0';
            while (cost.innerText === before) await new Promise(done => setTimeout(done, 10));
            return {drawn, isOff, total: performance.now() - start};
        }"""
    )
    record_property("click", took)
    assert took["isOff"]
    page.context.close()


def test_on_a_narrow_page_the_grid_scrolls_in_its_own_box(browser, server):
    page = opened(browser, server.url, viewport={"width": 390, "height": 844}, color_scheme="dark")
    inner, outer = page.evaluate("(b => [b.scrollWidth, b.clientWidth])(document.querySelector('.matrix-box'))")
    assert inner > outer
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    heading(page, "mlp.down_proj").click()
    box = page.locator(".matrix-box").bounding_box()
    shown = heading(page, "mlp.down_proj").bounding_box()
    assert box["x"] <= shown["x"] and shown["x"] + shown["width"] <= box["x"] + box["width"] + 1
    assert re.search("mlp.down_proj · 0 of 30 adapted", page.locator(".matrix-about").inner_text())
    page.context.close()
