"""What an open page still says in English once it speaks Korean."""

import re

_SEEN = """() => {
    const beside = 'script, style, textarea, pre, code, .katex, [translate=no], #tokens, #preview, '
        + '[role=option]';
    const found = new Set();
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT, (node) =>
        node.nodeType === Node.ELEMENT_NODE && node.matches(beside)
            ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT);
    const say = (text) => found.add(text.trim().replace(/\\s+/g, ' '));
    for (let node = walk.nextNode(); node; node = walk.nextNode()) {
        if (node.nodeType === Node.TEXT_NODE) say(node.data);
        else for (const name of ['placeholder', 'title', 'aria-label', 'alt']) say(node.getAttribute(name) ?? '');
    }
    return [...found];
}"""

_NAMES = re.compile(
    r"[a-z0-9_.:/·×,<>|\[\]{}\"' -]*"  # values of settings, matrices, files
    r"|(?:LoRA|DoRA|BitFit|Adapter_[HLP]|BLEU|NIST|METEOR|ROUGE-L|CIDEr|Pre\w+)(?: Studio| [\d.]+)?"
    r"|[\d.,]+ [kMGT]?B|[QFI]\w*\d\w*|Apache-2\.0|Hugging Face Hub|Top p|α / r|alpha / r|scaling = alpha / r|ID|AUC"
)
"""Names, values and units, which are the same in every language."""


def left_in_english(page, data: tuple[str, ...] = ()) -> list[str]:
    """Texts and labels without a Korean letter, but for names and for what has a word of `data` in it."""
    seen = [text for text in page.evaluate(_SEEN) if re.search("[A-Za-z]{2}", text) and not re.search("[가-힣]", text)]
    return [text for text in seen if not _NAMES.fullmatch(text) and not any(word in text for word in data)]
