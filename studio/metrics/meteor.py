"""METEOR 1.5 for English, by words and their stems."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from studio.metrics.base import Metric, References
from studio.metrics.words import library, words

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
STEM_WEIGHT = 0.6
BEAM = 40

_COMMON = """
the to of and a in that for is on 's it with was as said at he by be from have has are his but an this not i will
they who their had we which were been more or s its would about new one after you also up when there than $ all out
her people she year two can if last first over other into some what so no time years could
"""
FUNCTION_WORDS = frozenset(_COMMON.split())
"""Words so common that they tell little: METEOR 1.5 weighs them 1 - δ, and others δ."""


class _Pair(NamedTuple):
    """Words i of the prediction and j of the reference that may be matched, and what that is worth."""

    i: int
    j: int
    weight: float


class _Path(NamedTuple):
    """An alignment of the first words of a reference.

    Attributes:
        used: Bit i is set where word i of the prediction is matched.
        last: The word of the prediction that the word before is matched with; -2 where it is with none.
        num_equal: How many pairs are of equal words. Equal stems do not count here, as in METEOR's own code, where
            their weight is rounded down.
        chunks: Runs of words that follow on each other in both.
        distance: The sum of |i - j|.
        pairs: What is matched.
    """

    used: int = 0
    last: int = -2
    num_equal: int = 0
    chunks: int = 0
    distance: int = 0
    pairs: tuple[_Pair, ...] = ()

    @property
    def rank(self) -> tuple[int, int, int]:
        return -self.num_equal, self.chunks, self.distance

    def matched(self, pair: _Pair) -> "_Path":
        return _Path(
            self.used | 1 << pair.i,
            pair.i,
            self.num_equal + int(pair.weight),
            self.chunks + (pair.i != self.last + 1),
            self.distance + abs(pair.i - pair.j),
            (*self.pairs, pair),
        )


def meteor() -> Metric:
    """Returns METEOR 1.5, from 0 to 1, with the parameters that it has for English; stems by nltk's Snowball.

    Matched are equal words and equal stems. METEOR also matches WordNet's synonyms and a table of paraphrases, of
    60 MB, which no package of Python's brings: where those would match, this gives less. It is what METEOR's own
    program gives with `-m "exact stem"`, or a little more where that program's search misses the best alignment.
    F = 1 / ((1-α)/P + α/R), score = F·(1 - γ·(chunks / matches)^β), over the whole corpus, each row with its best
    reference.
    Source: Denkowski and Lavie 2014, Meteor Universal.
    """

    def statistics(predictions: Sequence[str], references: References) -> np.ndarray:
        stem = _Stems(library("nltk.stem.snowball", "METEOR").SnowballStemmer("english").stem)
        rows = []
        for prediction, texts in zip(predictions, references, strict=True):
            said = words(prediction)
            rows.append(max((_row(said, words(text), stem) for text in texts), key=_score))
        return np.array(rows)

    return Metric("METEOR", statistics, _score)


class _Stems(dict[str, str]):
    """Word → its stem, each found once."""

    def __init__(self, find: Callable[[str], str]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, word: str) -> str:
        self[word] = found = self._find(word)
        return found


def _row(said: list[str], wanted: list[str], stem: Any) -> np.ndarray:
    """Returns weighed matches and length of the prediction, of the reference; matches and chunks."""
    path = _align(said, wanted, stem)
    matched = [
        sum(pair.weight * _weight(side[place(pair)]) for pair in path.pairs)
        for side, place in ((said, lambda pair: pair.i), (wanted, lambda pair: pair.j))
    ]
    lengths = [sum(map(_weight, side)) for side in (said, wanted)]
    is_whole = len(path.pairs) == len(said) == len(wanted) and path.chunks == 1
    chunks = 0 if is_whole else path.chunks  # an answer that is all of a reference is not said to be broken up
    return np.array([matched[0], lengths[0], matched[1], lengths[1], len(path.pairs), chunks], float)


def _score(total: np.ndarray) -> float:
    of_said, said, of_wanted, wanted, matches, chunks = total
    if not matches:
        return 0.0
    precision, recall = of_said / said, of_wanted / wanted
    mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
    return float(mean * (1 - GAMMA * (chunks / matches) ** BETA))


def _weight(word: str) -> float:
    return 1 - DELTA if word in FUNCTION_WORDS else DELTA


def _align(said: list[str], wanted: list[str], stem: Any) -> _Path:
    """Returns the alignment of most equal words, of those the one of fewest chunks; by a beam search, as METEOR's."""
    pairs = [
        [_Pair(i, j, 1.0 if a == b else STEM_WEIGHT) for i, a in enumerate(said) if a == b or stem[a] == stem[b]]
        for j, b in enumerate(wanted)
    ]
    num_suitors = np.bincount([pair.i for of_word in pairs for pair in of_word], minlength=1)
    paths = [_Path()]
    for of_word in pairs:
        is_certain = len(of_word) == 1 and num_suitors[of_word[0].i] == 1
        found: dict[tuple[int, int], _Path] = {}
        for path in paths:
            options = [path.matched(pair) for pair in of_word if not path.used >> pair.i & 1]
            if not is_certain:
                options.append(path._replace(last=-2))
            for option in options:
                key = option.used, option.last
                if key not in found or option.rank < found[key].rank:
                    found[key] = option
        paths = sorted(found.values(), key=lambda path: path.rank)[:BEAM]
    return paths[0]
