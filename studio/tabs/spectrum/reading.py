"""Reads and writes: the strongest directions of one ΔW in words."""

from html import escape
from typing import Any

import gradio as gr
from torch import Tensor

from core import Factors, Spectrum
from studio import theme, words
from studio.opened import Opened
from studio.pictures import Picture, recipe
from studio.state import Studio
from studio.tabs.spectrum.frame import Frame

NUM_TOKENS = 8
SIDES = {"reads": "What it reads", "writes": "What it writes"}


def directions_of(side: str, found: Spectrum, k: int) -> Tensor:
    """Returns the first k directions of one side, (dim, k)."""
    return (found.V if side == "reads" else found.U)[:, : min(k, found.rank)]


def cosines_of(studio: Studio, opened: Opened, side: str, found: Spectrum, k: int) -> tuple[Tensor, float]:
    """Returns the cosine of each token with the first k directions of one side, (vocab_size, k), and chance's largest.

    Raises:
        LoRAError: The weights cannot be read.
    """
    model = opened.model or ""
    tree = studio.skeleton(model)
    known, chance = studio.vocabulary(model, side)
    directions = directions_of(side, found, k)
    if side == "writes":
        directions = words.through_final_norm(tree, model, studio.workspace, directions)
    return known.cosines(directions), chance


def token_list(tokenizer: Any, cosines: Tensor, sign: int) -> list[tuple[str, str, float]]:
    """Returns the tokens that a direction lies towards most: text, kind, cosine.

    Args:
        tokenizer: The model's.
        cosines: (vocab_size), of one direction.
        sign: 1 for those along it, -1 for those against it.
    """
    top = (sign * cosines[: len(tokenizer)]).topk(NUM_TOKENS)
    return [(*words.shown(tokenizer, int(i)), float(sign * v)) for v, i in zip(*top, strict=True)]


def drawn(tokens: list[tuple[str, str, float]], chance: float) -> str:
    """Returns HTML of tokens with a bar each; the mark on it is chance's largest."""
    most = max(chance, *(abs(value) for _, _, value in tokens)) * 1.05
    lines = []
    for text, kind, value in tokens:
        width, mark = 100 * abs(value) / most, 100 * chance / most
        faint = " faint" if abs(value) <= chance else ""
        lines.append(
            f'<li class="token{faint}"><code class="{kind}">{escape(text)}</code>'
            f'<span class="bar" aria-hidden="true"><i style="width:{width:.1f}%"></i><b style="left:{mark:.1f}%"></b>'
            f"</span><span>{f'{value:+.2f}'.replace('-', '−')}</span></li>"
        )
    return f'<ol class="tokens">{"".join(lines)}</ol>'


def side_picture(studio: Studio, opened: Opened, path: str, side: str, k: int) -> Picture:
    """Returns the first k directions of one side in words, or why they have none.

    Raises:
        LoRAError: The weights cannot be read.
    """
    f, found = studio.spectra(opened)[path]
    title = f"{SIDES[side]}, in words: {path}"
    tree = studio.skeleton(opened.model or "")
    if reason := words.reason_against(tree, path, f, side):
        return Picture(title, html=f"<h3>{SIDES[side]}</h3>{theme.said(reason)}")
    if not found.rank:
        return Picture(title, html=f"<h3>{SIDES[side]}</h3>{theme.said('ΔW is zero: it has no directions yet.')}")
    cosines, chance = cosines_of(studio, opened, side, found, k)
    tokenizer = studio.tokenizer(opened.model or "")
    cards, rows = [], []
    for i in range(cosines.shape[1]):
        lists = {sign: token_list(tokenizer, cosines[:, i], sign) for sign in (1, -1)}
        share = float(found.sigma[i].square() / found.sigma.square().sum())
        both = "".join(f"<div>{drawn(lists[sign], chance)}</div>" for sign in (1, -1))
        head = f"Direction {i + 1} · σ = {float(found.sigma[i]):.3g} · {share:.0%} of ‖ΔW‖²"
        cards.append(f'<h4>{head}</h4><div class="both">{both}</div>')
        rows += [(i + 1, text, value) for sign in (1, -1) for text, _, value in lists[sign]]
    told = (
        f"Numbers are cosines; the mark is the largest that a random direction has with any token, {chance:.2f}. Left "
        "along the direction, right against it: the sign of a direction as a whole means nothing."
    )
    return Picture(
        title,
        html=f'<div class="words"><h3>{SIDES[side]}</h3>{"".join(cards)}{theme.said(told)}</div>',
        numbers=dict(zip(("direction", "token", "cosine"), zip(*rows, strict=True), strict=True)),
        maths=_maths(f, found, side, len(cosines)),
        notebook=_code(opened, studio, path, side, k),
    )


def _maths(f: Factors, found: Spectrum, side: str, num_tokens: int) -> str:
    out, width = f.shape
    if side == "reads":
        return (
            f"V, {width} × {found.rank}: the right singular vectors of ΔW\n"
            f"cos(v_i, e_t) with the embeddings e_t, {num_tokens:,} × {width}, as they are stored: the layer's own "
            "norm is left out\nchance: the median over random directions of their largest cosine with any token"
        )
    return (
        f"U, {out} × {found.rank}: the left singular vectors of ΔW\n"
        f"cos(norm(u_i), w_t − w̄) with the unembedding w_t, {num_tokens:,} × {out}, less its mean w̄, which moves all "
        "logits alike; norm is the model's final one, without what it makes of 0\n"
        "What later layers do to the direction is left out (the “logit lens”)."
    )


def _code(opened: Opened, studio: Studio, path: str, side: str, k: int) -> str:
    norm = "directions = words.through_final_norm(tree, model, workspace, directions)"
    return recipe(
        opened,
        studio.workspace,
        "from core import spectrum",
        "from studio import models, words",
        "",
        "",
        f"model, path, side = {opened.model!r}, {path!r}, {side!r}",
        "found = spectrum(adapter.factors[path])",
        f"directions = found.{'V' if side == 'reads' else 'U'}[:, : min({k}, found.rank)]",
        "tree, tokenizer = models.skeleton(model, workspace), models.load_tokenizer(model, workspace)",
        *([norm] if side == "writes" else []),
        "cosines = words.vocabulary(tree, model, workspace, side).cosines(directions)[: len(tokenizer)]",
        "for i, column in enumerate(cosines.T, 1):",
        "    for sign in (1, -1):",
        f"        top = (sign * column).topk({NUM_TOKENS}).indices.tolist()",
        "        print(i, [(words.shown(tokenizer, t)[0], round(float(column[t]), 3)) for t in top])",
    )


def build(frame: Frame, tab: Any) -> None:
    """Draws the section in its `tab`."""
    studio = frame.studio
    gr.Markdown(
        "## The strongest directions, in words\n"
        "What a matrix reads is held against the embeddings of all tokens; what it writes passes the final norm and "
        "the unembedding. A rough lens: true words need not appear."
    )
    number = gr.Slider(
        1,
        8,
        value=3,
        step=1,
        label="Directions",
        info="How many are read, the strongest first.",
        elem_id="num-directions",
    )
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            reads = frame.picture("reads")
        with gr.Column(min_width=320):
            writes = frame.picture("writes")

    def show_words(opened: Opened, path: str, k: int) -> list[str]:
        if opened.model is None:
            return [theme.said("Words need the base model: its embeddings and its tokenizer.", "warn"), ""]
        return [frame.put(side_picture(studio, opened, path, side, k)) for side in SIDES]

    frame.draws(tab, show_words, [number], [reads, writes], by_matrix=True, also=[number.release])
