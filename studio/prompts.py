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
from studio.specs import RunSpec
from studio.tables import Table

MAX_FILE_BYTES = 5_000_000


class Case(NamedTuple):
    """One prompt of a list.

    Attributes:
        text: As a person reads it.
        content: As the model is asked.
        references: Answers that were wanted; empty where none is known.
    """

    text: str
    content: list[Message] | str
    references: tuple[str, ...] = ()


def survey_of(spec: RunSpec, table: Table, tokenizer: Any) -> data.Survey:
    """Returns the survey of a run's rows, which is still to be read: only all of them tell which it held out."""
    return data.Survey(table, spec.data, tokenizer, spec.train.seed)


def held_out(spec: RunSpec, survey: data.Survey, num: int, *, answer_after: str = "") -> list[Case]:
    """Returns the first prompts that a run holds out of its training, at most `num`.

    Rows with one prompt are one case with several references.

    Args:
        spec: The run's.
        survey: Of its rows, read to their end.
        num: The most prompts.
        answer_after: In plain text, what stands before the answer; without it the second half is taken for that.

    Raises:
        LoRAError: The run holds none out, or its rows cannot be read.
    """
    cases: dict[str, Case] = {}
    for place in survey.split(spec.train.max_length).evaluation.tolist():
        row = survey.row(place)
        content, reference = data.prompt_messages(row, spec.data), data.reference(row, spec.data)
        if answer_after and isinstance(content, str) and answer_after in content + reference:
            before, mark, answer = (content + reference).rpartition(answer_after)
            content, reference = before + mark, answer.strip()
        text = content if isinstance(content, str) else content[-1]["content"]
        key = json.dumps(content)
        if key in cases or len(cases) < num:
            known = cases.get(key, Case(text, content))
            cases[key] = known._replace(references=(*known.references, reference))
    if not cases:
        raise LoRAError(f"“{spec.name}” holds no rows out; give a file with prompts instead.")
    return list(cases.values())


def from_file(path: Path, run: Run, num: int) -> list[Case]:
    """Returns the prompts of a file, at most `num`: one a line, or JSON lines with "prompt" and perhaps "reference".

    A reference is a text, or a list of texts that are as good as each other.

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
        text, wanted = _parsed(line, f"{path.name}, line {number}") if line.lstrip().startswith("{") else (line, ())
        cases.append(Case(text, prompt(run, text), wanted))
        if len(cases) == num:
            break
    if not cases:
        raise LoRAError(f"{path.name} must hold at least one prompt, one a line.")
    return cases


def scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """Returns metric → value; without a reference, none."""
    return {name: metric(answer, references) for name, metric in METRICS.items()} if references else {}


def means(all_scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns metric → mean over the answers that have it."""
    found = {name: [s[name] for s in all_scores if name in s] for name in METRICS}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def to_csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table as CSV (RFC 4180)."""
    file = io.StringIO()
    csv.writer(file).writerows([header, *rows])
    return file.getvalue()


def _parsed(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    try:
        value = json.loads(line)
        text, found = value["prompt"], value.get("reference", [])
    except (ValueError, KeyError, RecursionError) as error:
        raise LoRAError(f'{where} must be JSON with a "prompt" ({type(error).__name__}: {error}).') from error
    references = [found] if isinstance(found, str) else found
    if not (isinstance(text, str) and isinstance(references, list) and all(isinstance(r, str) for r in references)):
        raise LoRAError(f'{where} must hold text as "prompt" and, if any, as "reference", or a list of texts there.')
    return text, tuple(reference for reference in references if reference)
