"""What was asked and what each pane answered: the prompts that follow from it, and the transcript."""

import dataclasses
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core import LoRAError
from studio import data
from studio.mapping import Message
from studio.panes import Pane
from studio.runs import Run
from studio.workspace import write_whole

TRANSCRIPTS = "transcripts"
"""The folder in a run's that saved conversations are kept in."""

HISTORY_LIMIT = 50
"""Turns of one conversation; beyond, a new one has to begin."""


@dataclass(frozen=True)
class Reply:
    """What one pane answered.

    Attributes:
        pane: What it ran.
        text: The answer.
        prompt_ids: All that the model saw before it.
        token_ids: Its tokens.
        engine: What the engine said of itself.
        fingerprint: Of the first logits.
        first_token_seconds: From the question to the first token.
        tokens_per_second: After it.
    """

    pane: Pane
    text: str = ""
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    engine: str = ""
    fingerprint: str = ""
    first_token_seconds: float = 0.0
    tokens_per_second: float = 0.0


@dataclass(frozen=True)
class Turn:
    """One message and the panes' answers to it, in the order of the panes."""

    asked: str
    replies: tuple[Reply, ...]


@dataclass(frozen=True)
class Conversation:
    """Turns that all panes have seen, each with its own answers.

    Attributes:
        system: What stands before all of them; "" for nothing, or what the chat template puts there itself.
        turns: The turns, the oldest first.
    """

    system: str = ""
    turns: tuple[Turn, ...] = ()

    def without_last(self) -> "Conversation":
        """Returns the conversation as it was before the last message.

        Raises:
            LoRAError: There was none.
        """
        if not self.turns:
            raise LoRAError("There is no message yet to take back; write one and send it.")
        return dataclasses.replace(self, turns=self.turns[:-1])

    def with_turn(self, asked: str, replies: tuple[Reply, ...]) -> "Conversation":
        """Returns the conversation with one turn more."""
        return dataclasses.replace(self, turns=(*self.turns, Turn(asked, replies)))

    def messages(self, run: Run, text: str, place: int) -> list[Message] | str:
        """Returns what the pane at `place` is asked for `text`; the first message is put as the run's rows were.

        Raises:
            LoRAError: The text is empty, or there are too many turns.
        """
        if len(self.turns) >= HISTORY_LIMIT:
            raise LoRAError(f"A conversation has at most {HISTORY_LIMIT} turns; begin a new one.")
        asked = [*(turn.asked for turn in self.turns), text]
        answers = [turn.replies[place].text if place < len(turn.replies) else "" for turn in self.turns]
        first, *others = asked
        begin = prompt(run, first)
        if not text.strip():
            prompt(run, text)  # says so
        if isinstance(begin, str):
            return "".join([begin, *(part for pair in zip(answers, others, strict=True) for part in pair)])
        found: list[Message] = [{"role": "system", "content": self.system}] if self.system.strip() else []
        found += begin
        for answer, message in zip(answers, others, strict=True):
            # An answer of another number of panes is missing; most templates want user and assistant by turns.
            found.append({"role": "assistant", "content": answer or "…"})
            found.append({"role": "user", "content": message.strip()})
        return found

    def record(self, run: Run) -> dict[str, Any]:
        """Returns the transcript as plain values, without the token ids."""
        turns = [
            {
                "message": turn.asked,
                "answers": [
                    {
                        "pane": reply.pane.to_dict(),
                        "text": reply.text,
                        "engine": reply.engine,
                        "fingerprint": reply.fingerprint,
                        "first_token_seconds": round(reply.first_token_seconds, 4),
                        "tokens_per_second": round(reply.tokens_per_second, 2),
                    }
                    for reply in turn.replies
                ],
            }
            for turn in self.turns
        ]
        return {"run": run.id, "name": run.spec.name, "model": run.spec.model, "system": self.system, "turns": turns}

    def markdown(self, run: Run) -> str:
        """Returns the transcript as Markdown; marks in what was said stay text."""
        lines = [f"# {_line(run.spec.name)}", "", f"Run `{run.id}`, base model `{_line(run.spec.model)}`.", ""]
        if self.system.strip():
            lines += ["System:", "", *_quoted(self.system), ""]
        for number, turn in enumerate(self.turns, start=1):
            lines += [f"## Message {number}", "", *_quoted(turn.asked), ""]
            for place, reply in enumerate(turn.replies):
                lines += [f"### {'ABCD'[place]}: {_line(reply.pane.title(run.id))}", "", f"{_line(reply.engine)}", ""]
                lines += [*_quoted(reply.text), ""]
        return "\n".join(lines)


def keep(run: Run, text: str, kind: str) -> Path:
    """Keeps a transcript with its run, where capsules take it from; the same one once. Returns its file.

    Args:
        run: Whose folder.
        text: The transcript, whole; half of a character becomes a question mark.
        kind: "json" or "md".

    Raises:
        LoRAError: It cannot be written.
    """
    content = text.encode(errors="replace")
    digest = hashlib.sha256(content).hexdigest()[:10]
    folder = run.folder / TRANSCRIPTS
    try:
        folder.mkdir(exist_ok=True)
        kept = next(folder.glob(f"*-{digest}.{kind}"), None)
        if kept is None:
            kept = folder / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{digest}.{kind}"
            write_whole(kept, content)
    except OSError as error:
        raise LoRAError(f"The transcript could not be kept in {folder} ({error.strerror}); free some space.") from error
    return kept


def prompt(run: Run, text: str) -> list[Message] | str:
    """Returns what the model is asked for `text`, put as the run's training rows were; errors as of `question`."""
    return question(run.spec.data, text)


def question(spec: data.DataSpec, text: str) -> list[Message] | str:
    """Returns what a model is asked for `text`, put as the rows of a data set are.

    Raises:
        LoRAError: The text is empty.
    """
    if not text.strip():
        raise LoRAError("`Message` (=nothing) must not be empty; write one, or take an example.")
    if spec.layout == "text":
        return text
    turns = [{"role": "user", "content": text.strip()}, {"role": "assistant", "content": "…"}]  # a row has an answer
    row = {"prompt": text.strip(), "messages": turns}
    as_row = {"prompt": "prompt", "context": "", "completion": "", "messages": "messages", "text": ""}
    return data.prompt_messages(row, data.DataSpec.from_dict(spec.to_dict() | as_row))


def unstopped(run: Run, tokenizer: Any, end_token_ids: frozenset[int]) -> str:
    """Returns a warning where what ends an answer in the run's rows does not stop the model; "" where it does."""
    if run.spec.data.layout == "text":  # there is no template
        return ""
    spec = data.DataSpec(prompt="prompt", completion="completion", template=run.spec.data.template)
    example = data.tokenize_row({"prompt": "Hello", "completion": "Yes."}, spec, tokenizer, 10_000)
    last = [i for i in example.labels if i != data.IGNORED][-1]
    if last in end_token_ids:
        return ""
    stops = ", ".join(tokenizer.convert_ids_to_tokens(sorted(end_token_ids))) or "none"
    return (
        f"The chat template ends an answer with {tokenizer.decode([last])!r}, which does not stop this model "
        f"(what does: {stops}): answers may run on to the longest length. Set eos_token_id in its "
        "generation_config.json."
    )


def _quoted(text: str) -> list[str]:
    return [f"> {line}".rstrip() for line in _plain(text).splitlines() or [""]]


def _line(text: str) -> str:
    return " ".join(_plain(text).split())


def _plain(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|~" else c for c in text)
