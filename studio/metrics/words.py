"""Texts as words, and what the metrics count of them."""

import importlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from core import LoRAError

Ngram = tuple[str, ...]

# As the Penn Treebank has words, without punctuation: "isn't" is two, "family-friendly" one, "£20" two.
_WORD = re.compile(
    r"[^\W_]+(?=n't\b)|n't\b|'(?:s|m|d|ll|re|ve)\b"
    r"|[^\W_]+(?:-[^\W_]+)+|\d+(?:[.,:]\d+)*|[^\W_]+|[$£€¥%&#@+=*/°<>]"
)


def words(text: str) -> list[str]:
    """Returns the words of a text, in lower case, and signs that are read aloud; without punctuation."""
    return _WORD.findall(text.lower().replace("’", "'"))


def ngrams(tokens: Sequence[str], n: int) -> Counter[Ngram]:
    """Returns how often each run of `n` tokens occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def library(module: str, metric: str) -> Any:
    """Returns a module of a library that is there only if somebody wanted it.

    Raises:
        LoRAError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LoRAError(
            f"{metric} needs {module.partition('.')[0]}, which is not installed; "
            "install `pip install lora-studio[eval]`."
        ) from error
