"""A model's folder in Hugging Face layout: which files it has, what they say, and how to say what is wrong with them.

Reads file names, JSON and the heads of safetensors files; never transformers, never the network.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import core
from core import LoRAError, cut, quoted

STARTER, STARTER_ENCODER = "starter", "starter-encoder"
"""The names of the models that come with the studio: one that writes, and one for labels."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")

_COUNT = re.compile(r"\b(num|n|encoder|decoder)_(\w+_)?(layer|block|expert)s?$|(block|expert)_count$")
_MAX_COUNT = 10_000

Progress = Callable[[str], None]
"""Takes one sentence about what is being done and takes long."""


def weight_names(folder: Path) -> list[str]:
    """Returns the names of the files that hold, or would hold, the weights.

    Raises:
        LoRAError: The index of the weights is damaged.
    """
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [WEIGHTS]
    return sorted(set(_weight_map(folder).values()))


def missing_weights(folder: Path) -> list[str]:
    """Returns those of `weight_names` that are not there."""
    return [name for name in weight_names(folder) if not (folder / name).is_file()]


def check_weights(model: str, folder: Path) -> None:
    """Refuses a folder without all of its weights as safetensors.

    Raises:
        LoRAError: Some are missing, or they are there as a pickle only.
    """
    missing = missing_weights(folder)
    if missing == [WEIGHTS]:
        raise no_safetensors(model, [p.name for p in folder.iterdir()])
    if missing:
        raise LoRAError(
            f"`model` (={model!r}) must hold all of its weights; {len(missing)} of the files that {INDEX} names are "
            f"missing: {', '.join(missing[:3])}. Copy them too."
        )


def weight_bytes(folder: Path) -> int | None:
    """Returns the size of the weights as stored, or None where some are missing."""
    return None if missing_weights(folder) else sum((folder / name).stat().st_size for name in weight_names(folder))


def tensor_files(folder: Path) -> dict[str, str]:
    """Returns the name of the file that holds each tensor.

    Raises:
        LoRAError: The index of the weights is damaged.
    """
    if not (folder / WEIGHTS).is_file():
        return _weight_map(folder)
    with open_weights(folder / WEIGHTS) as file:
        return dict.fromkeys(file.keys(), WEIGHTS)


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """Opens a safetensors file for reading, as `safetensors.safe_open` does.

    Raises:
        LoRAError: It is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (OSError, SafetensorError) as error:
        raise _damaged(str(file.parent), file, error) from error


def find_key(wanted: str, files: dict[str, str]) -> str | None:
    """Returns the stored name of a parameter: its own, or the one that differs by a leading part only."""
    if wanted in files:
        return wanted
    # GPT-2's files say h.0.… where the module is transformer.h.0.…
    near = [k for k in files if wanted.endswith(f".{k}") or k.endswith(f".{wanted}")]
    return near[0] if len(near) == 1 else None


def stored_dtype(folder: Path) -> str | None:
    """Returns the dtype of most of the weights, in torch's words, or None where some are missing."""
    if missing_weights(folder):
        return None
    sizes: Counter[str] = Counter()
    for name in weight_names(folder):
        with open_weights(folder / name) as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(key)
                sizes[part.get_dtype()] += math.prod(part.get_shape())
    words = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    top = sizes.most_common(1)[0][0] if sizes else None
    return words.get(top, top.lower()) if top else None


def licence(folder: Path) -> str | None:
    """Returns the `license` of the model card's YAML head, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    head = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    if not head:
        return None
    for field in ("license_name", "license"):  # the name says more where the licence is "other"
        found = re.search(rf"^{field}:[ \t]*(?:\n[ \t]*-[ \t]*)?([^\s#].*?)[ \t]*$", head[1], re.MULTILINE)
        if found:
            return found[1].strip("'\"")
    return None


def has_chat_template(folder: Path) -> bool:
    """Returns whether the tokenizer's files hold a chat template."""
    file = folder / "tokenizer_config.json"
    inside = file.is_file() and bool(read_json(str(folder), file).get("chat_template"))
    return inside or any(folder.glob("chat_template.*"))


def read_json(model: str, file: Path) -> dict[str, Any]:
    """Returns the table of settings in `file`.

    Raises:
        LoRAError: It is damaged, or no table.
    """
    try:
        values = core.read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(model, file, error) from error
    if not isinstance(values, dict):
        raise LoRAError(f"`model` (={model!r}) must hold a table of settings in {file.name}; it holds something else.")
    return values


def _damaged(model: str, file: Path, error: Exception) -> LoRAError:
    return LoRAError(
        f"`model` (={model!r}) must hold a readable {file.name}; it is damaged ({one_line(error)}). "
        "Fetch the file again."
    )


def no_safetensors(model: str, names: list[str]) -> LoRAError:
    """Returns the refusal of a model whose files, of these names, hold no safetensors."""
    pickles = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if not pickles:
        return LoRAError(f"`model` (={model!r}) must hold its weights in {WEIGHTS}; no weights are there.")
    return LoRAError(
        f"`model` (={model!r}) must hold its weights as safetensors; it has {pickles[0]}, a pickle, which can run code "
        "when read. Save it as safetensors: model.save_pretrained does, in any recent transformers."
    )


def one_line(error: Exception) -> str:
    """Returns what `error` says, on one line and not for pages."""
    return cut(" ".join(str(error).split()) or type(error).__name__, 200)


def check_counts(model: str, values: Mapping[str, Any], where: str) -> None:
    """Refuses settings that ask for so many layers that naming them would fill the memory.

    Raises:
        LoRAError: A model has no such number of layers, blocks or experts.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_counts(model, value, where)
        elif _COUNT.search(name) and isinstance(value, (int, float)) and value > _MAX_COUNT:
            raise LoRAError(
                f"`model` (={model!r}) must be of a size that exists; {name} (={quoted(value)}) in its {where} is "
                f"above {_MAX_COUNT:,}. Fetch the file again."
            )


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _weight_map(folder: Path) -> dict[str, str]:
    values = read_json(str(folder), folder / INDEX).get("weight_map")
    if not isinstance(values, dict) or not values:
        raise LoRAError(f"`model` (={str(folder)!r}) must have a weight_map in its {INDEX}; fetch the file again.")
    if strange := [name for name in values.values() if not _is_file_name(name)]:
        raise LoRAError(
            f"`model` (={str(folder)!r}) must name files beside its {INDEX}, and no others; {strange[0]!r} is "
            "none. Fetch the file again."
        )
    return values
