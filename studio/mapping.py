"""What a data set's columns mean: a spec names them, and a row becomes a conversation or a text."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from core.declarations import Config, setting
from core.errors import LoRAError
from studio.heads import TASKS, TaskName
from studio.label_metrics import OF_TASK
from studio.readers import names_of
from studio.rows import BadRow, Row
from studio.tables import Table, list_starters

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
# Pairs of columns that mean prompt and completion, the surest first; then what else belongs to the prompt.
PAIRS = (
    (("instruction", "prompt", "query"), ("output", "completion", "response", "instances.output", "answer")),
    (("question",), ("answer", "answers.text", "output", "response", "sql")),
    (("mr", "meaning_representation"), ("ref", "human_reference", "text", "target")),
    (("request", "user", "input", "source"), ("ticket", "assistant", "reply", "output", "target", "response")),
    (("sentence", "article", "document", "dialogue"), ("label", "summary", "highlights")),
    (("text", "review"), ("label", "summary", "sentiment", "category")),
)
CONTEXTS = {"instruction": ("input", "instances.input"), "question": ("context",)}

# Two texts and what they are to each other, as in GLUE.
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("#1_string", "#2_string"),
)
LABELS = ("label", "gold_label", "quality", "is_duplicate", "score", "similarity")
MOST_LABELS = 200

Message = dict[str, str]
RowFault = Literal["unreadable", "empty", "useless"]


class RowError(LoRAError):
    """One row cannot be trained on; the message says why, without the row's number.

    Attributes:
        kind: Whether it could not be read, lacks its words, or has some of which nothing can be learnt.
    """

    def __init__(self, message: str, kind: RowFault = "useless") -> None:
        super().__init__(message)
        self.kind: RowFault = kind


@dataclass(frozen=True)
class DataSpec(Config):
    """Which rows to train on, and how a row becomes what the model sees."""

    source: str = setting(
        "starter:restaurants",
        "Data set",
        "starter:NAME, the path of a JSONL, JSON, CSV, TSV, Parquet or text file, or hub:owner/name; several with a "
        "semicolon between them.",
    )
    eval_source: str = setting(
        "", "Evaluation data", "The like, whose rows are held out in place of a share of the data set's; may be empty."
    )
    task: TaskName = setting(
        "causal",
        "Task",
        "causal: the model writes on from a text. classification: it gives each row one of a few labels. regression: a "
        "number.",
        choices=TASKS,
    )
    labels: tuple[str, ...] = setting(
        (), "Labels", "Of a classification, in the order of the model's logits. Empty: those that the rows have."
    )
    metric: Literal["auto", "accuracy", "f1", "matthews", "pearson", "spearman"] = setting(
        "auto",
        "Score that decides",
        "By which the best step is found. auto: accuracy, or Pearson's correlation of numbers. GLUE takes F1 on MRPC "
        "and QQP, Matthews' correlation on CoLA.",
        choices=("auto", "accuracy", "f1", "matthews", "pearson", "spearman"),
        why="GLUE, arXiv:1804.07461",
    )
    layout: Literal["pair", "messages", "text"] = setting(
        "pair",
        "A row is",
        "pair: a prompt and its completion. messages: a conversation. text: plain text to continue.",
        choices=("pair", "messages", "text"),
    )
    prompt: str = setting("", "Prompt column", "What the model is asked. For pairs.")
    context: str = setting("", "Context column", "Put after the prompt and a blank line, where not empty. For pairs.")
    completion: str = setting("", "Completion column", "What the model should answer. For pairs.")
    messages: str = setting("", "Messages column", "Lists of messages with role and content. For conversations.")
    text: str = setting("", "Text column", "For plain text.")
    instruction: str = setting("", "Instruction", "One sentence put before every prompt; may be empty.")
    template: Literal["chat", "plain"] = setting(
        "chat",
        "Template",
        "chat: the model's own chat template, for models tuned to chat. plain: the prompt, a line break, the "
        "completion and the end token, for base models. Plain text takes neither.",
        choices=("chat", "plain"),
    )
    train_on: Literal["completion", "everything"] = setting(
        "completion",
        "Train on",
        "completion: the loss counts the answer's tokens only. everything: the prompt's too.",
        choices=("completion", "everything"),
    )
    eval_fraction: float = setting(
        0.1,
        "Share held out",
        "Share of rows kept from training to measure the loss on; usually 0.05 to 0.2. Too few make it a rough guess. "
        "Ignored where the data set has its own.",
        minimum=0,
        maximum=0.5,
    )
    max_eval_rows: int = setting(
        64,
        "Most rows held out",
        "Evaluation takes time: at most so many rows are measured; 64 to 500 is usual. Held-out rows beyond "
        "it that the data set brings are left out; others are trained on.",
        minimum=1,
        advanced=True,
    )
    bad_rows: Literal["stop", "skip"] = setting(
        "stop",
        "Rows that cannot be used",
        "stop: a run does not start before they are mended. skip: it trains on the others, and says how many it left.",
        choices=("stop", "skip"),
    )
    max_rows: int = setting(
        0,
        "Most rows",
        "Takes so many rows, drawn by the seed. 0 takes all; few are quick, and teach less.",
        minimum=0,
        advanced=True,
    )

    @property
    def is_labelled(self) -> bool:
        """Whether a row has one label, in place of an answer to write."""
        return self.task != "causal"

    @property
    def score(self) -> str:
        """The score that decides; "" for a task that has none."""
        own = OF_TASK.get(self.task, ("",))[0]
        return own if self.metric == "auto" else self.metric

    def further_problems(self) -> list[str]:
        problems = []
        if self.is_labelled and self.layout != "pair":
            problems.append(
                f"`layout` (={self.layout!r}) must be pair for the task {self.task}: one text or two, and a label"
            )
        if self.metric != "auto" and self.score not in OF_TASK.get(self.task, ()):
            known = ", ".join(("auto", *OF_TASK.get(self.task, ())))
            problems.append(f"`metric` (={self.metric!r}) must be one of {known} for the task {self.task}")
        if repeated := sorted({label for label in self.labels if self.labels.count(label) > 1}):
            problems.append(f"`labels` must each be named once; {', '.join(repeated)} is there twice")
        return problems


def guess_spec(
    table: Table, source: str, *, has_chat_template: bool = True, can_write: bool = True, task: str = ""
) -> DataSpec:
    """Returns a spec that fits `table`: a starter's own, else by the columns' names, else by their length.

    A model that can write is asked to write labels, too, unless a `task` is named.
    """
    template = "chat" if has_chat_template else "plain"
    starter = next((s for s in list_starters() if s.source == source), None)
    columns = _guess_columns(table) if starter is None else starter.mapping
    spec = DataSpec.from_dict({"source": source, "template": template, **columns})
    return spec if can_write and task in ("", "causal") else with_task(spec, table, task)


def with_task(spec: DataSpec, table: Table, task: str = "") -> DataSpec:
    """Returns a spec for a task with labels, by what is in its label column; as it is where that holds none.

    Args:
        spec: Which columns.
        table: The rows.
        task: "" for the one that the column asks for.
    """
    if spec.layout != "pair" or spec.completion not in table.columns:
        return spec
    if task not in ("classification", "regression"):
        texts = [str(row.get(spec.completion, "")) for row in table.rows[:2000] if not isinstance(row, BadRow)]
        is_number = all(map(_is_number, texts)) and any(not text.isdigit() for text in texts)
        task = "regression" if is_number else "classification"
    known = {} if task == "regression" else {"labels": labels_of(table, spec.completion, strict=False)}
    if task == "classification" and not known["labels"]:
        return spec
    name = _plain(spec.completion)
    metric = "f1" if name in ("quality", "is_duplicate") else "matthews" if "cola" in spec.source.lower() else "auto"
    settled = replace(spec, task=task, metric=metric if task == "classification" else "auto", **known)
    return replace(settled, instruction="")  # it is for a model that writes


def labels_of(table: Table, column: str, *, strict: bool = True) -> tuple[str, ...]:
    """Returns the different labels that a column has, numbers by their size.

    Raises:
        LoRAError: With `strict`, they are fewer than two, or too many to be labels; else none are returned then.
    """
    found: dict[str, None] = {}
    for rows in (table.rows, table.eval_rows):
        for row in rows:
            if not isinstance(row, BadRow) and (text := _cell(row, column).strip()):
                found[text] = None
            if len(found) > MOST_LABELS:
                break
    if 2 <= len(found) <= MOST_LABELS:
        return tuple(sorted(found, key=lambda text: (float(text), text) if _is_number(text) else (math.inf, text)))
    if not strict:
        return ()
    number = f"more than {MOST_LABELS}" if len(found) > MOST_LABELS else str(len(found))
    raise LoRAError(
        f"`completion` (={column!r}) must have 2 to {MOST_LABELS} different labels for the task classification; it has "
        f"{number}. Choose another column, or the task regression for numbers."
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def format_of(table: Table, spec: DataSpec) -> str:
    """Returns what form of data set the columns that `spec` names are known as."""
    if spec.layout == "text":
        return f"plain text in {spec.text}"
    if spec.layout == "messages":
        value = next((row[spec.messages] for row in table.rows[:200] if row.get(spec.messages)), None)
        first = value[0] if isinstance(value, list) and value else {}
        kind = "ShareGPT conversations (from, value)" if "from" in first else "chat messages (role, content)"
        return f"{kind} in {spec.messages}"
    names = [name for name in (spec.prompt, spec.context, spec.completion) if name]
    if spec.context and (_plain(spec.prompt), _plain(spec.context)) in TEXT_PAIRS:
        return f"text pairs with a label ({', '.join(names)})"
    return " / ".join(names)


def _plain(name: str) -> str:
    return name.lower().strip().replace(" ", "_")


def _guess_columns(table: Table) -> dict[str, str]:
    names = {_plain(name): name for name in reversed(table.columns)}
    sample = table.rows[:200]
    for key in MESSAGES:
        if key in names and any(isinstance(row.get(names[key]), list) for row in sample):
            return {"layout": "messages", "messages": names[key]}
    label = next((name for name in LABELS if name in names), None)
    for first, second in TEXT_PAIRS:
        if label and first in names and second in names:
            chosen = {"prompt": names[first], "context": names[second], "completion": names[label]}
            return {"layout": "pair", **chosen}
    for prompts, completions in PAIRS:
        prompt = next((p for p in prompts if p in names), None)
        completion = next((c for c in completions if c in names and c != prompt), None)
        if prompt and completion:
            context = next((c for c in CONTEXTS.get(prompt, ()) if c in names and c != completion), None)
            found = {"layout": "pair", "prompt": names[prompt], "completion": names[completion]}
            return found | ({"context": names[context]} if context else {})
    if "text" in names:
        return {"layout": "text", "text": names["text"]}
    return _guess_by_length(table.columns, sample)


def _guess_by_length(columns: tuple[str, ...], sample: Sequence[Row]) -> dict[str, str]:
    values = {name: ["" if row.get(name) is None else str(row[name]) for row in sample] for name in columns}
    lengths = {name: sum(map(len, values[name])) for name in columns}
    first, *others = sorted(columns, key=lambda name: -lengths[name])
    others = [name for name in others if lengths[name]]
    if not others:
        return {"layout": "text", "text": first}
    second = others[0]
    if lengths[first] > 4 * lengths[second]:
        # One long text and small fields beside it: a classification, where the label is the shortest field that every
        # row has and few values fill.
        labels = [name for name in others if 1 < len(set(values[name])) <= 20 and "" not in values[name]]
        return {"layout": "pair", "prompt": first, "completion": labels[-1] if labels else second}
    prompt, completion = sorted((first, second), key=columns.index)
    return {"layout": "pair", "prompt": prompt, "completion": completion}


def check_spec(spec: DataSpec, table: Table) -> None:
    """Checks that the columns that `spec` needs are in `table`.

    Raises:
        LoRAError: With every column that is missing, and those that exist.
    """
    needed = {"pair": ("completion",), "messages": ("messages",), "text": ("text",)}[spec.layout]
    if spec.layout == "pair":
        needed = (("prompt",) if spec.prompt or not spec.instruction else ()) + needed
        needed += ("context",) if spec.context else ()
    missing = [
        f"`{field}` (={getattr(spec, field)!r})" for field in needed if getattr(spec, field) not in table.columns
    ]
    if missing:
        raise LoRAError(f"{' and '.join(missing)} must be a column of {table.name}; it has {names_of(table.columns)}.")


def to_messages(row: Row, spec: DataSpec) -> list[Message] | str:
    """Returns the conversation that a row holds; for the layout "text", the text itself.

    Raises:
        RowError: The row could not be read, or lacks what it should hold.
    """
    if isinstance(row, BadRow):
        raise RowError(row.reason, "unreadable")
    if spec.layout == "text":
        return _filled(row, spec.text)
    if spec.layout == "messages":
        messages = _parse_messages(row.get(spec.messages), spec.messages)
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
        if spec.instruction and first is not None:
            joined = f"{spec.instruction}\n\n{messages[first]['content']}"
            messages[first] = {"role": "user", "content": joined}
        return messages
    return [_question(row, spec), {"role": "assistant", "content": _filled(row, spec.completion)}]


class Labelled(NamedTuple):
    """A row with a label.

    Attributes:
        texts: One, or two.
        label: The number of its label, or its value.
        is_value: Whether it is a value.
    """

    texts: tuple[str, ...]
    label: float
    is_value: bool = False


def to_labelled(row: Row, spec: DataSpec) -> Labelled:
    """Returns the texts and the label that a row holds.

    Raises:
        RowError: The row could not be read, or lacks what it should hold.
    """
    if isinstance(row, BadRow):
        raise RowError(row.reason, "unreadable")
    texts = texts_of(_filled(row, spec.prompt), _cell(row, spec.context) if spec.context else "", spec)
    said = _filled(row, spec.completion).strip()
    if spec.task == "regression":
        if not _is_number(said):
            raise RowError(f"`{spec.completion}` (={said[:40]!r}) is no number")
        return Labelled(texts, float(said), is_value=True)
    if said not in spec.labels:
        raise RowError(f"`{spec.completion}` (={said[:40]!r}) is none of the labels ({names_of(spec.labels)})")
    return Labelled(texts, spec.labels.index(said))


def texts_of(first: str, second: str, spec: DataSpec) -> tuple[str, ...]:
    """Returns a text, or two, as training gives them to the model."""
    first = f"{spec.instruction}\n\n{first}" if spec.instruction else first
    return (first, second) if second.strip() else (first,)


def prompt_messages(row: Row, spec: DataSpec) -> list[Message] | str:
    """Returns what to ask a model so that it should answer `reference(row, spec)`.

    Of a conversation, all before the last answer; of plain text, its first half.

    Raises:
        RowError: The row lacks what it should hold.
    """
    if spec.layout == "pair":
        return [_question(row, spec)]
    content = to_messages(row, spec)
    return content[: _half(content)] if isinstance(content, str) else content[: _last_answer(content)]


def reference(row: Row, spec: DataSpec) -> str:
    """Returns the answer that the row holds to `prompt_messages(row, spec)`.

    Raises:
        RowError: The row lacks what it should hold.
    """
    content = to_messages(row, spec)
    if isinstance(content, str):
        return content[_half(content) :]
    return content[_last_answer(content)]["content"]


def _question(row: Row, spec: DataSpec) -> Message:
    prompt = _filled(row, spec.prompt) if spec.prompt else ""
    context = _cell(row, spec.context) if spec.context else ""
    parts = [part for part in (spec.instruction, prompt, context) if part.strip()]
    return {"role": "user", "content": "\n\n".join(parts)}


def _filled(row: Row, column: str) -> str:
    text = _cell(row, column)
    if not text.strip():
        raise RowError(f"`{column}` is empty", "empty")
    return text


def _cell(row: Row, column: str) -> str:
    """Returns a field as text; what is neither text nor a number, as JSON."""
    value = row.get(column)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if value is None:
        return ""
    if isinstance(value, bytes):
        raise RowError(f"`{column}` holds bytes, not text")
    if isinstance(value, (list, dict, bool)):
        try:
            value = json.dumps(value, ensure_ascii=False, default=str)
        except RecursionError as error:
            raise RowError(f"`{column}` is nested too deeply") from error
    return _sound(str(value), column)


def _sound(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"`{column}` holds half of a character ({text[error.start]!r}) at {error.start + 1}") from error
    return text


def _parse_messages(value: Any, column: str) -> list[Message]:
    """Returns messages with role and content, from those or from ShareGPT's from and value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"`{column}` is not valid JSON ({error})") from error
    if not isinstance(value, list) or not value:
        must = f"`{column}` must be a list of messages"
        raise RowError(must) if value else RowError(f"{must}, and is empty", "empty")
    messages = [_parse_message(m, f"message {i} of `{column}`", column) for i, m in enumerate(value, start=1)]
    roles = [m["role"] for m in messages if m["role"] != "system"]
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise RowError(f"`{column}` has no answer of the assistant to train on", "empty")
    if roles[0] != "user":
        raise RowError(f"`{column}` begins with the {roles[0]}; the user must speak first")
    return messages


def _parse_message(value: Any, place: str, column: str) -> Message:
    if not isinstance(value, dict):
        raise RowError(f"{place} must have a role and content")
    role = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"{place} has the role {str(role)[:40]!r}; it must be system, user, assistant or tool")
    if not isinstance(content, str):
        raise RowError(f"{place} has no text as content")
    return {"role": ROLES[role], "content": _sound(content, column)}


def _last_answer(messages: list[Message]) -> int:
    return max(i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip())


def _half(text: str) -> int:
    """Returns where the first word after the middle begins, its space included."""
    middle = len(text) // 2
    space = re.search(r"\s", text[middle:])
    return middle + space.start() if space else middle
