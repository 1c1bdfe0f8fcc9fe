"""How near an answer is to its references."""

import re
from collections.abc import Sequence

BETA = 1.2
"""Weight of recall over precision in ROUGE-L, as the COCO captions' evaluation has it."""


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Returns 1 if the answer is one of the references, up to white space, and else 0."""
    return float(" ".join(answer.split()) in {" ".join(reference.split()) for reference in references})


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Returns ROUGE-L: F of the longest common subsequence of words, of the best precision and recall.

    F = (1 + β²)·P·R / (R + β²·P); Lin 2004, *ROUGE: A Package for Automatic Evaluation of Summaries*, with β = 1.2.
    Words are runs of letters and digits, in lower case.
    """
    said = _words(answer)
    wanted = [words for reference in references if (words := _words(reference))]
    if not said or not wanted:
        return 0.0
    common = [_common(said, words) for words in wanted]
    precision = max(common) / len(said)
    recall = max(c / len(words) for c, words in zip(common, wanted, strict=True))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if max(common) else 0.0


METRICS = {"Exact match": exact_match, "ROUGE-L": rouge_l}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
