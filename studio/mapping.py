"""What a data set's columns mean: a spec names them, and a row becomes a conversation or a text."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from core.declarations import Config, setting
from core.errors import LoRAError
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
        "Share of rows kept from training to measure the loss on. Ignored where the data set has its own.",
        minimum=0,
        maximum=0.5,
    )
    max_eval_rows: int = setting(
        64,
        "Most rows held out",
        "Evaluation takes time: at most so many rows are measured. Held-out rows beyond it that the data set brings "
        "are left out; others are trained on.",
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
        0, "Most rows", "Takes so many rows, drawn by the seed. 0 takes all.", minimum=0, advanced=True
    )


def guess_spec(table: Table, source: str, *, has_chat_template: bool = True) -> DataSpec:
    """Returns a spec that fits `table`: a starter's own, else by the columns' names, else by their length."""
    template = "chat" if has_chat_template else "plain"
    starter = next((s for s in list_starters() if s.source == source), None)
    if starter is not None:
        return DataSpec.from_dict({"source": source, "template": template, **starter.mapping})
    return DataSpec.from_dict({"source": source, "template": template, **_guess_columns(table)})


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
