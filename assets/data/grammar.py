"""What the two grammar-made data sets share: seeded choices, English joins, and writing JSON lines."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

Row = dict[str, str]
Splits = dict[str, list[Row]]


class Dice:
    """Seeded choices built on `random.random()` alone, whose stream Python promises to keep between versions."""

    def __init__(self, seed: int):
        """Start the stream of `seed`."""
        self._random = random.Random(seed)

    def chance(self, share: float) -> bool:
        """True in `share` of the calls."""
        return self._random.random() < share

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`, all equally likely."""
        return options[int(self._random.random() * len(options))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """`items` in a random order."""
        keyed = sorted((self._random.random(), place) for place in range(len(items)))
        return [items[place] for _, place in keyed]

    def weighted(self, options: Mapping[T, float]) -> T:
        """One of the keys, as likely as its weight."""
        mark = self._random.random() * sum(options.values())
        for option, weight in options.items():
            mark -= weight
            if mark < 0:
                return option
        return list(options)[-1]


def with_article(phrase: str) -> str:
    """`phrase` behind "a" or "an"; the grammars hold no word whose first letter misleads about its sound."""
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"


def listed(parts: Sequence[str]) -> str:
    """`parts` as "x", "x and y" or "x, y and z"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def sentence_case(text: str) -> str:
    """`text` with a capital first letter and the rest as it stands."""
    return text[:1].upper() + text[1:]


def as_jsonl(rows: Sequence[Mapping[str, object]]) -> bytes:
    """The bytes of a JSON-lines file: one object a line, UTF-8, LF endings."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(splits: Splits, folder: Path) -> None:
    """Write each split to `folder/<split>.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_bytes(as_jsonl(rows))
