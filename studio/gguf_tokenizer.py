"""A Hugging Face folder's tokenizer in the head of a GGUF file, by llama.cpp's names."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf

from core import LoRAError, quoted
from studio.model_files import read_json

_CONTRACTIONS, _TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}": "qwen2",
}
"""How a tokenizer.json cuts text into words → llama.cpp's name for it (llama-vocab.cpp)."""


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Adds a byte-level BPE tokenizer, as its tokenizer.json says it.

    Raises:
        LoRAError: It is another kind of tokenizer, or none that llama.cpp is known to have a name for.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise _no_tokenizer(folder, "it has no tokenizer.json")
    values, settings = read_json(str(folder), file), {}
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json(str(folder), folder / "tokenizer_config.json")
    model = values["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _no_tokenizer(folder, f"its model is {quoted(model.get('type'))}, not byte-level BPE")
    called = pre_tokenizer(folder, values)
    if bool(model.get("ignore_merges")) != (called == "llama-bpe"):  # llama.cpp goes by the name alone
        raise _no_tokenizer(folder, f"its ignore_merges is not what llama.cpp takes {called} to have")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(called)
    names: dict[int, tuple[str, gguf.TokenType]] = {i: (t, gguf.TokenType.NORMAL) for t, i in model["vocab"].items()}
    for added in values.get("added_tokens") or ():
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        names[added["id"]] = added["content"], kind
    listed = [names.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(max(vocab_size, max(names) + 1))]
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    ids = {token: i for i, (token, _) in names.items()}
    for role in ("bos", "eos", "unk", "pad"):
        named = settings.get(f"{role}_token")
        named = named["content"] if isinstance(named, dict) else named
        if named in ids:
            getattr(writer, f"add_{role}_token_id")(ids[named])
    writer.add_add_bos_token(_begins(values, settings))
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if isinstance(text, str):
        writer.add_chat_template(text)


def _begins(values: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Says whether the tokenizer puts its begin token before every text."""
    if "add_bos_token" in settings:
        return bool(settings["add_bos_token"])
    return '"SpecialToken"' in json.dumps((values.get("post_processor") or {}).get("single", ""))


def pre_tokenizer(folder: Path, values: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name for the way in which a tokenizer.json cuts text into words.

    Raises:
        LoRAError: It is a way that is not known here.
    """
    steps = values.get("pre_tokenizer") or {}
    steps = list(_flat(steps))
    normalizer = (values.get("normalizer") or {}).get("type", "NFC")
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    found = None
    if normalizer == "NFC" and kinds[-1:] == ["ByteLevel"] and not last.get("add_prefix_space"):
        by_itself = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and by_itself:
            found = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and by_itself:
            found = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not by_itself and steps[0].get("behavior") == "Isolated":
            found = _SPLITS.get(str((steps[0].get("pattern") or {}).get("Regex")))
    if found is None:
        raise _no_tokenizer(folder, f"how it cuts text into words ({quoted(json.dumps(steps))}) has no name here")
    return found


def _flat(step: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if step.get("type") == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _flat(inner)
    elif step:
        yield step


def _no_tokenizer(folder: Path, why: str) -> LoRAError:
    return LoRAError(
        f"`model` (={folder.name!r}) must have a tokenizer that llama.cpp knows by name to be written as GGUF: {why}. "
        "Take the Hugging Face folder to llama.cpp's own converter instead."
    )
