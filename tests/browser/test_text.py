"""Text of data sets, models, adapters, runs and answers is shown as text, in a real browser: none of it ever runs."""

import json

import pytest
import torch
from torch import nn

from core import Adapter, Failed, LoRAConfig, Noted, Started, Step, TrainConfig, inject
from studio.data import DataSpec
from studio.event_log import EventWriter
from studio.runs import Runs
from studio.specs import RunSpec
from studio.workspace import Workspace

WAIT = 240_000  # milliseconds, on a busy machine
NAME = "<img src=x onerror=ran=1>"  # a name of a file, a folder, a column or a module
TEXT = (
    f"{NAME}<script>window.ran=2</script><svg/onload=window.ran=3>${{window.ran=4}}{{{{constructor.constructor("
    "'window.ran=5')()}}[link](javascript:window.ran=6)![](x)<iframe srcdoc='<script>parent.ran=7</script>'></iframe>`"
)
STARTED = Started(1, 1, 1, TEXT, TEXT, TEXT)
# What the browser would have made of it, had any of it been markup.
MADE = "[src='x'], [srcdoc], [onerror], [onload], a[href^='javascript']"


@pytest.fixture(scope="module")
def hostile(workspace_folder):
    """A workspace in which everything that can be named or said is markup; the model says nothing else."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    workspace = Workspace(workspace_folder)
    vocabulary = {f"{TEXT}{number}": number for number in range(15)} | {"<end>": 15}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=f"{TEXT}0"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, eos_token_id=15, max_position_embeddings=256, **sizes))
    with torch.no_grad():
        model.lm_head.weight[15] = 0.0  # some other token is likelier than the end
    folder = workspace.root / NAME
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nlicense: {TEXT}\n---\n")
    rows = workspace.root / f"{NAME}.jsonl"
    rows.write_text(json.dumps({NAME: TEXT, TEXT: TEXT}) + "\n")
    spec = RunSpec(
        TEXT, str(folder), DataSpec(str(rows), layout="text", text=TEXT), LoRAConfig(r=2), TrainConfig(device="cpu")
    )
    plain = nn.Module()
    plain.add_module(NAME, nn.Sequential(nn.Linear(8, 8)))
    runs = []
    for adapted in (model, plain):  # the first can chat; the second has modules with names to see
        inject(adapted, LoRAConfig(r=2))
        runs.append(run := Runs(workspace).create(spec))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        Adapter.from_model(adapted, base_model=TEXT).save(run.adapter_folder)
        run.worker_log.write_text(TEXT)
        writer = EventWriter(run.log)
        for event in (Noted(TEXT), STARTED, Step(1, 1.0, 1e-3, 0.1, 1, 1, 1.0, 1), Failed(TEXT)):
            writer.write(event)
        writer.close()
    return folder, *(run.id for run in runs)


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).first.click()


@pytest.mark.slow
def test_nothing_that_a_page_shows_runs(hostile, server, browser, tmp_path):
    folder, chatting, named = hostile
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    asked, dialogs = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))

    def shows(selector, text=NAME):
        page.wait_for_function(
            "([selector, text, made]) => document.querySelector(made) || [...document.querySelectorAll(selector)].some("
            "e => (e.textContent + (e.value ?? '')).replace(/\\s+/g, '').includes(text.replace(/\\s+/g, '')))",
            arg=[selector, text, MADE],
            timeout=WAIT,
        )
        assert page.locator(MADE).count() == 0

    page.goto(f"{server.url}?run={named}")
    page.wait_for_selector("text=134,515,008", timeout=WAIT)
    page.get_by_label("Folder", exact=True).check()
    page.wait_for_selector("#model-place >> text=Hugging Face layout")
    page.locator("#model-place textarea, #model-place input").first.fill(str(folder))
    page.get_by_role("button", name="Look at this model").click()
    shows("#model-facts", TEXT)

    tab(page, "Data")
    page.get_by_label("My own file").check()
    upload = page.locator("#upload input[type=file]")
    upload.wait_for(state="attached")
    page.wait_for_timeout(1000)  # in its first moments the field forgets a file
    file = tmp_path / f"{NAME}.jsonl"
    file.write_text(json.dumps({NAME: TEXT, TEXT: TEXT}) + "\n")
    upload.set_input_files(file)
    shows("#data-summary")
    shows("#preview")
    shows("#upload", "img src")
    shows("#tokens", TEXT)
    page.locator("#column-prompt input").click()
    shows("[role=listbox]")
    page.keyboard.press("Escape")
    page.locator("#upload").get_by_label("Clear").click()
    file.write_text("{")
    upload.set_input_files(file)
    shows(".toast-body", "is not valid JSON")

    tab(page, "Train")
    shows("#status", TEXT)
    page.get_by_role("button", name="Worker's log").click()
    shows("#worker-log", TEXT)
    page.get_by_label("Name of the run").fill(TEXT)

    tab(page, "Spectrum")
    shows("#heat", NAME[:10])  # cut in the middle
    shows("#module input")
    tab(page, "One matrix")
    shows("#sigma")
    shows("#table-7")  # the adapter is not of this model; the message quotes its matrix

    tab(page, "Runs")
    shows("#runs-table")
    shows("#run-details")
    page.locator("#delete").click()
    shows("p", f"Delete “{NAME}")
    page.locator("#delete-no").click()

    page.goto(f"{server.url}?run={chatting}")
    page.locator("#run input").click()
    shows("[role=listbox]", TEXT)
    page.keyboard.press("Escape")
    tab(page, "Spectrum")
    tab(page, "Reads and writes")
    shows(".tokens", NAME.replace(" ", "␣"))
    tab(page, "Chat")
    page.locator("#message textarea").fill(TEXT)
    page.locator("#send").click()
    for pane in "abc":
        shows(f"#talk-{pane} .said-by", TEXT)
    page.locator("#talk-b .tok").first.focus()
    shows("#talk-b .mind li", TEXT[:20])

    assert page.evaluate("window.ran") is None
    assert dialogs == [] and not [url for url in asked if url.endswith("/x") or "javascript" in url]
    context.close()
