"""A tokenizer in the head of a GGUF file, by llama.cpp's names."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import gguf

from core import LoRAError, quoted

_CONTRACTIONS, _TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_SPLITS = {(_LLAMA3, True): "llama-bpe", (_LLAMA3, False): "dbrx", (_QWEN2, False): "qwen2"}
"""How a tokenizer cuts text, and whether it takes words that it knows whole → llama.cpp's name (llama-vocab.cpp)."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNMERGED = -1e6
"""The score of a token that is put together of no others."""


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, name: str, num_rows: int) -> None:
    """Adds a byte-level BPE tokenizer, or one of SentencePiece's kind, as it is loaded.

    Args:
        writer: Of the file.
        tokenizer: Transformers': its classes set some steps themselves, whatever a tokenizer.json says.
        name: Of the model, for errors.
        num_rows: Of the embedding; those without a token have unused ones.

    Raises:
        LoRAError: It is another kind of tokenizer, or none that llama.cpp is known to have a name for.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise _no_tokenizer(name, "it has no tokenizer.json")
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    model = values["model"]
    if model.get("type") != "BPE":
        raise _no_tokenizer(name, f"its model is {quoted(model.get('type'))}, not BPE")
    tokens = {i: (token, gguf.TokenType.NORMAL) for token, i in model["vocab"].items()}
    for added in values.get("added_tokens") or ():
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = added["content"], kind
    if max(tokens) >= num_rows:
        raise _no_tokenizer(name, f"it has {max(tokens) + 1:,} tokens where the model has rows for {num_rows:,}")
    if model.get("byte_fallback"):
        tokens = {i: (token, _kind(token, kind, tokenizer)) for i, (token, kind) in tokens.items()}
    listed = [tokens.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(num_rows)]
    if model.get("byte_fallback"):
        scores = _scores(name, model, {token for token, kind in listed if kind == gguf.TokenType.NORMAL})
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([scores.get(token, _UNMERGED) for token, _ in listed])
        writer.add_add_space_prefix(_begins_with_space(name, values))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(name, values))
        writer.add_token_merges([" ".join(pair) for pair in _merges(model)])
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    for role in ("bos", "eos", "unk", "pad"):
        if (token_id := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(token_id)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _kind(token: str, kind: gguf.TokenType, tokenizer: Any) -> gguf.TokenType:
    """Returns the kind of a token of SentencePiece's kind of tokenizers."""
    if token == tokenizer.unk_token:
        return gguf.TokenType.UNKNOWN
    return gguf.TokenType.BYTE if _BYTE.fullmatch(token) else kind


def _merges(model: Mapping[str, Any]) -> list[list[str]]:
    return [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]


def _scores(name: str, model: Mapping[str, Any], normal: set[str]) -> dict[str, float]:
    """Returns how early each piece is put together, as llama.cpp's scores: it joins the neighbours that score highest.

    It goes by the pieces alone, whatever two parts they are of. So the merges must be what SentencePiece's own pieces
    become in a tokenizer.json: for each piece all pairs of parts, one after another.

    Raises:
        LoRAError: They are not.
    """
    pairs = _merges(model)
    known = {(left, right) for left, right in pairs}
    places: dict[str, list[int]] = {}
    for place, (left, right) in enumerate(pairs):
        places.setdefault(left + right, []).append(place)
    for piece in normal:
        parts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        if any(a in normal and b in normal and (a, b) not in known for a, b in parts):
            raise _no_tokenizer(name, f"{quoted(piece)} is not made of all its parts, as SentencePiece's pieces are")
    for piece, found in places.items():
        if found[-1] - found[0] + 1 != len(found):
            raise _no_tokenizer(name, f"merges of {quoted(piece)} have others between them")
    return {piece: -float(found[0]) for piece, found in places.items()}


def _begins_with_space(name: str, values: Mapping[str, Any]) -> bool:
    """Says whether a tokenizer of SentencePiece's kind puts a space before a text.

    Raises:
        LoRAError: It changes or cuts texts in some other way.
    """
    normalizer, cut = (list(_flat(values.get(key) or {})) for key in ("normalizer", "pre_tokenizer"))
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    words = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if not cut or cut == [words]:  # Gemma's finds nothing to cut any more
        if normalizer == [{"type": "Prepend", "prepend": "▁"}, to_mark]:
            return True
        if normalizer == [to_mark]:
            return False
    marks = {"type": "Metaspace", "replacement": "▁", "split": False}
    if not normalizer and [{**step, "prepend_scheme": ""} for step in cut] == [{**marks, "prepend_scheme": ""}]:
        return cut[0].get("prepend_scheme") != "never"  # llama.cpp puts it after special tokens, too
    said = quoted(json.dumps({"normalizer": normalizer, "pre_tokenizer": cut}, ensure_ascii=False))
    raise _no_tokenizer(name, f"how it changes and cuts text ({said}) is not how SentencePiece's kind does")


def pre_tokenizer(name: str, values: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name for the way in which a tokenizer.json cuts text into words.

    Raises:
        LoRAError: It is a way that is not known here.
    """
    steps = list(_flat(values.get("pre_tokenizer") or {}))
    normalizer = (values.get("normalizer") or {}).get("type", "NFC")
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    is_whole = bool(values.get("model", {}).get("ignore_merges"))  # llama.cpp goes by the name alone
    found = None
    if normalizer == "NFC" and kinds[-1:] == ["ByteLevel"] and not last.get("add_prefix_space"):
        by_itself = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and by_itself and not is_whole:
            found = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and by_itself and not is_whole:
            found = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not by_itself and steps[0].get("behavior") == "Isolated":
            found = _SPLITS.get((str((steps[0].get("pattern") or {}).get("Regex")), is_whole))
    if found is None:
        raise _no_tokenizer(name, f"how it cuts text into words ({quoted(json.dumps(steps))}) has no name here")
    return found


def _flat(step: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if step.get("type") == "Sequence":
        for inner in step.get("pretokenizers") or step["normalizers"]:
            yield from _flat(inner)
    elif step:
        yield step


def _no_tokenizer(name: str, why: str) -> LoRAError:
    return LoRAError(
        f"`model` (={name!r}) must have a tokenizer that llama.cpp knows by name to be written as GGUF: {why}. "
        "Take the Hugging Face folder to llama.cpp's own converter instead."
    )
