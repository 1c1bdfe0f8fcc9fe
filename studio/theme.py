"""The look: two colours with a meaning, system fonts, and little CSS; light and dark."""

from html import escape

from gradio.themes import Base, Color, colors, sizes

from studio import bars, certificate, chat_page, grid_page, label_page
from studio.palette import ADAPTED, ADAPTED_TEXT, BASE, BASE_TEXT

_ORANGE = Color(
    name="adapted",
    c50="#fff6ee",
    c100="#ffe9d5",
    c200="#fdcfa8",
    c300="#fab072",
    c400="#f28c3f",
    c500="#e0701d",
    c600="#bd5409",
    c700="#98430b",
    c800="#7b380f",
    c900="#663111",
    c950="#381706",
)

_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial")
_SANS += ("Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans CJK KR", "Noto Sans KR", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def theme() -> Base:
    """Returns the Gradio theme; it names only fonts that the machine has, so nothing is fetched."""
    return Base(
        primary_hue=_ORANGE,
        neutral_hue=colors.slate,
        radius_size=sizes.radius_md,
        spacing_size=sizes.spacing_md,
        text_size=sizes.text_md,
        font=_SANS,
        font_mono=_MONO,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="#0e1420",
        background_fill_primary_dark="#151d2c",
        background_fill_secondary_dark="#0e1420",
        block_background_fill="white",
        block_background_fill_dark="#151d2c",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="#273247",
        border_color_primary_dark="#273247",
        block_label_text_size="*text_sm",
        block_title_text_weight="600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="white",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        input_background_fill="white",
        input_background_fill_dark="#0e1420",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="#35425c",
        button_secondary_text_color="*neutral_800",
        button_secondary_text_color_dark="*neutral_100",
        slider_color="*primary_600",
    )


CSS = f"""
:root {{ --base: {BASE}; --adapted: {ADAPTED}; --base-text: {BASE_TEXT[0]}; --adapted-text: {ADAPTED_TEXT[0]}; }}
.dark {{ --base-text: {BASE_TEXT[1]}; --adapted-text: {ADAPTED_TEXT[1]}; }}
:is(button, a, summary, label, output, [tabindex], [type=radio], [type=checkbox], [type=range]):focus-visible {{
  outline: 2px solid var(--adapted) !important; outline-offset: 2px; }}
@media (prefers-reduced-motion: reduce) {{
  *, ::before, ::after {{ animation-duration: 1ms !important; animation-iteration-count: 1 !important;
    transition-duration: 1ms !important; scroll-behavior: auto !important; }}
}}
.info-text a {{ color: inherit !important; text-underline-offset: 2px; }}
.info-text a:hover {{ color: var(--body-text-color) !important; }}
[id^=setting-] {{ min-width: min(220px, 100%) !important; }}
.form > .block:not(.hidden):has(> .container), .form > .block > .container {{ display: flex; flex-direction: column; }}
.form > .block > .container {{ flex: 1; }}
.form > .block > .container > :last-child {{ margin-top: auto; }}
.dark input[type=range] {{ --neutral-200: #35425c; }}
.form:has(> #run) {{ flex-grow: 0 !important; }}
.head > label:has(.info-text) {{ flex: 1 1 9rem !important; }}
.gradio-container > main {{ max-width: 1360px; margin: 0 auto !important; }}
:where(#tabs) .prose h2 {{ font-size: var(--text-lg); }} :where(#tabs) .prose h3 {{ font-size: 1.1em; }}
:where(#tabs) .prose h4 {{ font-size: 1.05em; }}
.secondary-wrap input {{ padding-right: 1.6rem !important; text-overflow: ellipsis; }}
.studio-head {{ display: flex; flex-wrap: wrap; align-items: baseline; gap: .35rem 1rem; }}
.studio-head h1 {{ font-size: 1.35rem; font-weight: 700; margin: 0; letter-spacing: -.01em; }}
.studio-head .sub {{ order: 1; flex-basis: 100%; color: var(--body-text-color-subdued); font-size: .9rem; }}
.sub-line {{ color: var(--body-text-color-subdued); font-size: .85rem; font-variant-numeric: tabular-nums; }}
.tab-wrapper button.selected {{ color: var(--adapted-text); }}
#head-line {{ display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; margin-top: .15rem; }}
#head-line > div {{ display: flex; align-items: center; gap: .5rem; min-width: 0; overflow-wrap: anywhere; }}
#head-line .progress {{ flex: 0 0 5rem; margin: 0; }}
.facts {{ display: grid; gap: .6rem 1rem; margin: 0;
  grid-template-columns: repeat(auto-fill, minmax(var(--least, 9.75rem), 1fr)); }}
@media (max-width: 640px) {{ .facts {{ --least: 8.5rem; }} }}
.facts div {{ min-width: 0; }} .facts .long {{ grid-column: 1 / -1; }}
.facts dt {{ color: var(--body-text-color-subdued); font-size: .8rem; }}
.facts dd {{ margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }}
:is(.scroll-x, .facts) + .said {{ margin-top: .75rem; }}
.said {{ border-left: 3px solid var(--border-color-primary); padding: .15rem .75rem; color: var(--body-text-color); }}
.said.warn {{ border-color: var(--adapted); }}
.said.error {{ border-color: #c62828; }}
.said p {{ margin: .2rem 0; }}
.command {{ margin: .75rem 0 0; font-size: .85rem; color: var(--body-text-color-subdued); }}
.command code {{ user-select: all; overflow-wrap: anywhere; }}
.ways {{ display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; margin: .75rem 0 0; }}
.ways button {{ padding: .35rem .9rem; border: 1px solid var(--border-color-primary); border-radius: var(--radius-md);
  background: var(--block-background-fill); color: var(--body-text-color);
  font-size: .9rem; font-weight: 600; cursor: pointer; }}
:is(.ways, .link) button {{ margin: 0 !important; }}
.ways button:first-child {{ background: var(--button-primary-background-fill); border-color: transparent;
  color: var(--button-primary-text-color); }}
.ways button:hover {{ border-color: var(--body-text-color); }}
.link {{ display: flex; flex-wrap: wrap; align-items: center; gap: .4rem .6rem; margin: .75rem 0 0;
  font-size: .85rem; }}
.link > a {{ color: var(--body-text-color); padding: 0 !important; }}
.chip {{ display: inline-block; border-radius: 999px; padding: .05rem .6rem; font-size: .8rem; font-weight: 600;
  border: 1px solid currentColor; }}
.chip.running {{ color: var(--adapted-text); }} .chip.finished {{ color: #2e7d4f; }}
.dark .chip.finished {{ color: #6cc393; }}
.chip.failed, .chip.interrupted {{ color: #c62828; }} .dark .chip.failed, .dark .chip.interrupted {{ color: #ff8a80; }}
.chip.stopped, .chip.queued, .chip.paused {{ color: var(--body-text-color-subdued); }}
.progress {{ height: .5rem; border-radius: 999px; background: var(--border-color-primary); overflow: hidden;
  margin: .5rem 0 .25rem; }}
.progress > span {{ display: block; height: 100%; background: var(--adapted); }}
.charts {{ display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .75rem 1.25rem; margin-top: 1rem; }}
.charts > :first-child {{ grid-column: 1 / -1; }}
.live {{ margin: 0; padding: 0 .4rem 1.4rem 0; min-width: 0; contain: content; font-variant-numeric: tabular-nums; }}
.live figcaption {{ display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; margin-bottom: .35rem; }}
.live .key::before {{ content: ""; display: inline-block; width: .9rem; border-top: 3px solid var(--key);
  vertical-align: middle; margin-right: .35rem; }}
.live .key.faint::before {{ border-top-width: 1.5px; opacity: .6; }}
.live .plot {{ position: relative; margin: 0 .6rem 0 3.2rem !important; border: solid var(--border-color-primary);
  border-width: 0 0 1px 1px; }}
.live svg {{ position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; fill: none; }}
.live .closer svg {{ overflow: hidden; }}
.live svg rect {{ fill: transparent; }}
.live .grid {{ stroke: var(--border-color-primary); vector-effect: non-scaling-stroke; opacity: .7; }}
.live .plot span {{ position: absolute; font-size: .75rem; line-height: 1; color: var(--body-text-color-subdued); }}
.live .y {{ right: 100%; margin-right: .4rem; white-space: nowrap; transform: translateY(-50%); }}
.live .x {{ top: 100%; margin-top: .4rem; transform: translateX(-50%); }}
.lengths {{ padding-right: 1.1rem; }}
.lengths rect.kept {{ fill: var(--adapted) !important; }}
.lengths rect.lost {{ fill: var(--adapted) !important; opacity: .3; }}
.lengths figcaption span {{ color: var(--body-text-color-subdued); }}
.lengths .cut {{ position: absolute; top: -.3rem; bottom: 0; border-left: 2px solid var(--body-text-color);
  pointer-events: none; }}
.lengths .cut b {{ position: absolute; top: 0; left: .35rem; font-size: .8rem; line-height: 1; font-style: normal;
  white-space: nowrap; }}
.lengths .cut.left b {{ left: auto; right: .45rem; }}
#cut-off input {{ display: block; width: calc(100% - 4.3rem + 1rem); margin: 0 0 0 calc(3.2rem - .5rem);
  accent-color: var(--adapted); cursor: ew-resize; }}
#cut-keep {{ align-items: flex-end; }}
#past-slider {{ display: flex; flex-direction: column; }}
#past-slider input {{ display: block; width: 100%; max-width: 713px; accent-color: var(--adapted); }}
#past-slider output {{ font-size: .85rem; font-variant-numeric: tabular-nums; }}
#past-plot .mark {{ stroke: var(--body-text-color); stroke-width: 1.2; }}
.said.good {{ border-color: #2e7d4f; }} .dark .said.good {{ border-color: #6cc393; }}
:is(#survey-progress, #advice):not(:has(.progress, .said)) {{ display: none; }}
.stacked .wrap {{ flex-direction: column; align-items: stretch; gap: .35rem; }}
.live .none {{ top: 45%; left: 1rem; }}
#actions, #remedies {{ justify-content: flex-start; align-items: flex-end; gap: .5rem; margin-left: .75rem; }}
#actions > *, #remedies > * {{ flex: 0 1 auto; }}
#actions > .form {{ flex: 0 0 7rem !important; min-width: 0 !important; background: none; border: 0; }}
#actions > .form > .block {{ background: none; padding: 0; }}
:is(#actions, #remedies):not(:has(button)) {{ display: none; }}
#worker-log {{ margin: 0; max-height: 16rem; overflow: auto; font-size: .8rem; white-space: pre-wrap; }}
.figure svg {{ width: 100%; height: auto; display: block; color: var(--body-text-color); }}
.figure {{ overflow-x: auto; }}
.view .html-container {{ padding: 0 !important; }}
.picture .below {{ display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; margin: .5rem 0; }}
:is(.picture, .link) button {{ font-size: .8rem; padding: .15rem .6rem; border: 1px solid var(--border-color-primary);
  border-radius: 999px; background: none; color: var(--body-text-color-subdued); cursor: pointer; }}
:is(.picture, .link) button:is(:hover, :focus-visible) {{ color: var(--body-text-color); border-color: currentColor; }}
.picture rect[data-name] {{ cursor: pointer; }}
.picture rect[data-name]:hover {{ stroke: var(--body-text-color); stroke-width: 1.2; }}
.picture summary {{ cursor: pointer; font-size: .85rem; color: var(--body-text-color-subdued); }}
.picture pre {{ margin: .4rem 0 0; font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
#read-again {{ align-self: flex-start; width: auto; min-width: 0; }}
.words h3 {{ margin: 0; }} .words h4 {{ margin: .9rem 0 .3rem; font-size: .85rem; font-weight: 600; }}
.words .both {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .25rem 1.5rem; }}
.tokens {{ list-style: none; margin: 0; padding: 0; }}
.tokens li {{ display: grid; grid-template-columns: minmax(0, 1fr) 6rem 3rem; gap: .5rem; align-items: center;
  font-size: .85rem; line-height: 1.5; font-variant-numeric: tabular-nums; }}
.tokens li > :last-child {{ text-align: right; }}
.tokens code {{ overflow: hidden; text-overflow: ellipsis; white-space: pre; unicode-bidi: isolate; }}
.tokens code:is(.special, .bytes) {{ font-style: italic; }}
.tokens .faint > :is(code, span) {{ color: var(--body-text-color-subdued) !important; }}
.tokens .bar {{ position: relative; height: .55rem; background: var(--border-color-primary); border-radius: 2px; }}
.tokens .bar i {{ position: absolute; inset: 0 auto 0 0; background: var(--adapted); border-radius: 2px; }}
.tokens .bar b {{ position: absolute; top: -.15rem; bottom: -.15rem; border-left: 2px dashed var(--body-text-color); }}
table.plain {{ border: 0 !important; border-collapse: collapse; width: 100%; margin: 0;
  font-variant-numeric: tabular-nums; }}
table.plain :is(thead, tbody, tr) {{ border: 0 !important; }}
table.plain :is(th, td) {{ text-align: right; padding: .35rem .6rem; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; }}
table.plain :is(th, td):first-child {{ text-align: left; }}
table.plain td:not(:first-child) {{ white-space: nowrap; }}
table.plain thead th {{ color: var(--body-text-color-subdued); font-weight: 600; font-size: .85rem; }}
.measured {{ margin: 1rem 0; }} .measured :is(th, td) {{ white-space: nowrap; }}
.measured small {{ display: block; color: var(--body-text-color-subdued); font-size: .8rem; }}
.dark #tokens span {{ color: var(--body-text-color); }}
.scroll-x {{ overflow-x: auto; }}
.unseen, .form:has(> .unseen:only-child) {{ display: none !important; }}
.tight {{ justify-content: flex-start; gap: .5rem; flex-wrap: wrap; }} .tight > * {{ flex: 0 1 auto !important; }}
.tight > button {{ min-width: 0 !important; }}
.steps {{ margin: .4rem 0 0 1.2rem; padding: 0; font-size: .9rem; list-style: decimal; }}
.steps li {{ color: var(--body-text-color-subdued); margin: .1rem 0; }}
.steps li[aria-current] {{ color: var(--body-text-color); }}
#experiment-about p {{ margin: 0 0 .5rem; }} #experiment-about .sub-line {{ white-space: nowrap; }}
#experiment-result > div > div > * {{ margin-bottom: 1rem; }} #experiment-result h3 {{ margin-bottom: .3rem; }}
#experiment-result td:not(:first-child) {{ white-space: nowrap; }}
.download a {{ font-weight: 600; color: var(--adapted-text); overflow-wrap: anywhere; }}
#fit-row {{ align-items: flex-end; gap: .5rem; }}
#fit-row > button {{ flex: 0 1 auto; }}
@media (max-width: 1200px) {{ #fit-row > .form {{ flex-basis: 100% !important; }} }}
:is(#probe-progress, #fitting, #task-note, #label-note):not(:has(.said, .progress)) {{ display: none; }}
#offers {{ gap: .4rem; }}
#offers:not(:has(button)) {{ display: none; }}
#offers button:not(.hidden) {{ display: block; white-space: pre-line; text-align: left; font-weight: 400;
  line-height: 1.35; }}
#offers button::first-line {{ font-weight: 600; }}
{bars.CSS}{chat_page.CSS}{label_page.CSS}{grid_page.CSS}{certificate.CSS}"""


_LONG = 40  # letters of a value that has a line of its own


def facts(pairs: list[tuple[str, str]]) -> str:
    """Returns HTML of labelled values; both are escaped."""
    place = {True: ' class="long"', False: ""}
    cells = "".join(f"<div{place[len(v) > _LONG]}><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs)
    return f'<dl class="facts">{cells}</dl>'


def command(label: str, words: str) -> str:
    """Returns HTML of a command to copy into a terminal, escaped."""
    return f'<p class="command">{escape(label)}: <code>{escape(words)}</code></p>'


def said(sentences: str | list[str], kind: str = "") -> str:
    """Returns HTML of sentences to read, escaped; `kind` is "", "warn" or "error"."""
    lines = [sentences] if isinstance(sentences, str) else sentences
    return f'<div class="said {kind}" role="status">{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>'


def bar(done: int, total: int, label: str) -> str:
    """Returns HTML of a bar that is filled to `done` of `total`; `label` says of what."""
    return (
        f'<div class="progress" role="progressbar" aria-valuenow="{done}" aria-valuemax="{total}" '
        f'aria-label="{escape(label)}"><span style="width:{100 * done / max(1, total):.1f}%"></span></div>'
    )


def progress(done: int, total: int, what: str) -> str:
    """Returns HTML of how far something is: so many of so many `what`."""
    return f'{bar(done, total, what)}<div class="sub-line">{done:,} of {total:,} {escape(what)}</div>'


def chip(status: str) -> str:
    """Returns HTML of a run's status."""
    return f'<span class="chip {escape(status)}">{escape(status)}</span>'
