"""Prompts as a list, of a run's held-out rows or a file, and how near answers are to their references."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core import LoRAError
from studio import data
from studio.conversation import prompt
from studio.mapping import Message
from studio.metrics import METRICS
from studio.runs import Run
from studio.tables import Table

MAX_FILE_BYTES = 5_000_000


class Case(NamedTuple):
    """One prompt of a list.

    Attributes:
        text: As a person reads it.
        content: As the model is asked.
        reference: The answer that was wanted; "" where none is known.
    """

    text: str
    content: list[Message] | str
    reference: str = ""


def survey_of(run: Run, table: Table, tokenizer: Any) -> data.Survey:
    """Returns the survey of a run's rows, which is still to be read: only all of them tell which it held out."""
    return data.Survey(table, run.spec.data, tokenizer, run.spec.train.seed)


def held_out(run: Run, survey: data.Survey, num: int) -> list[Case]:
    """Returns the first rows that the run held out of its training, at most `num`.

    Raises:
        LoRAError: The run holds none out, or its rows cannot be read.
    """
    places = survey.split(run.spec.train.max_length).evaluation[:num].tolist()
    if not places:
        raise LoRAError(f"“{run.spec.name}” holds no rows out; give a file with prompts instead.")
    cases = []
    for place in places:
        row = survey.row(place)
        content = data.prompt_messages(row, run.spec.data)
        text = content if isinstance(content, str) else content[-1]["content"]
        cases.append(Case(text, content, data.reference(row, run.spec.data)))
    return cases


def from_file(path: Path, run: Run, num: int) -> list[Case]:
    """Returns the prompts of a file, at most `num`: one a line, or JSON lines with "prompt" and perhaps "reference".

    Each is put as the run's rows were.

    Raises:
        LoRAError: The file is too long, holds no prompt, or has a line that cannot be read.
    """
    raw = path.read_bytes()
    if len(raw) > MAX_FILE_BYTES:
        raise LoRAError(f"{path.name} (={len(raw):,} bytes) must have at most {MAX_FILE_BYTES:,} bytes.")
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise LoRAError(f"{path.name} must be a text file in UTF-8; byte {error.start + 1} is not.") from error
    cases = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        text, reference = _parsed(line, f"{path.name}, line {number}") if line.lstrip().startswith("{") else (line, "")
        cases.append(Case(text, prompt(run, text), reference))
        if len(cases) == num:
            break
    if not cases:
        raise LoRAError(f"{path.name} must hold at least one prompt, one a line.")
    return cases


def scores(answer: str, reference: str) -> dict[str, float]:
    """Returns metric → value; without a reference, none."""
    return {name: metric(answer, [reference]) for name, metric in METRICS.items()} if reference else {}


def means(all_scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns metric → mean over the answers that have it."""
    found = {name: [s[name] for s in all_scores if name in s] for name in METRICS}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def to_csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table as CSV (RFC 4180)."""
    file = io.StringIO()
    csv.writer(file).writerows([header, *rows])
    return file.getvalue()


def _parsed(line: str, where: str) -> tuple[str, str]:
    try:
        value = json.loads(line)
        text, reference = value["prompt"], value.get("reference", "")
    except (ValueError, KeyError, RecursionError) as error:
        raise LoRAError(f'{where} must be JSON with a "prompt" ({type(error).__name__}: {error}).') from error
    if not isinstance(text, str) or not isinstance(reference, str):
        raise LoRAError(f'{where} must hold text as "prompt" and, if any, as "reference".')
    return text, reference
