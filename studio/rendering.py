"""What the model sees of a row: text in pieces, each trained on or not, and the tokens of that text."""

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from core.errors import LoRAError
from studio.mapping import DataSpec, Message, RowError, to_messages
from studio.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

MAX_CHARACTERS = 1_000_000  # of a row: a tokenizer takes minutes and gigabytes for more
IGNORED = -100  # the label of a token that is not trained on, as in torch's cross_entropy


class Piece(NamedTuple):
    """A stretch of what the model sees.

    Attributes:
        text: The text, special tokens included.
        trained: Whether the model learns to say it.
    """

    text: str
    trained: bool


class Example(NamedTuple):
    """A row as tokens.

    Attributes:
        input_ids: (seq,) what the model sees.
        labels: (seq,) the same token where it is trained, otherwise -100. The loss shifts them, not we. The first is
            always -100: nothing comes before it that could predict it.
        num_cut: How many tokens were cut away at the end.
        row: Its number in the data set, from 1; 0 where it is of none.
    """

    input_ids: "array[int]"
    labels: "array[int]"
    num_cut: int
    row: int = 0


def render(row: Row, spec: DataSpec, tokenizer: "Tokenizer") -> list[Piece]:
    """Returns the row as the model sees it: the pieces' texts, one after the other.

    Raises:
        RowError: The row lacks what it should hold, or the chat template refuses it.
        LoRAError: The tokenizer has no chat template, or one that changes earlier turns.
    """
    pieces = [p for p in _pieces(to_messages(row, spec), tokenizer, spec.template) if p.text]
    length = sum(len(p.text) for p in pieces)
    if length > MAX_CHARACTERS:
        raise RowError(f"it has {length:,} characters; at most {MAX_CHARACTERS:,} are read; split it")
    return [p._replace(trained=True) for p in pieces] if spec.train_on == "everything" else pieces


def prompt_ids(messages: list[Message] | str, tokenizer: "Tokenizer", template: str = "chat") -> list[int]:
    """Returns the ids to generate from: the same that training put before the answer.

    Args:
        messages: A conversation to answer, or text to continue.
        tokenizer: The model's.
        template: "chat" or "plain", as in `DataSpec`; text takes neither.

    Raises:
        RowError: The chat template refuses the conversation.
        LoRAError: The tokenizer has no chat template, or one that changes earlier turns.
    """
    return [i for ids in _encode(_pieces(messages, tokenizer, template, ask=True), tokenizer) for i in ids]


def tokenize_row(row: Row, spec: DataSpec, tokenizer: "Tokenizer", max_length: int) -> Example:
    """Returns the row's tokens, cut at the end to at most `max_length`.

    Raises:
        RowError: Nothing to train on is in the row, or within `max_length`.
        LoRAError: As `render`.
    """
    (found,) = tokenize_pieces([render(row, spec, tokenizer)], tokenizer)
    if isinstance(found, RowError):
        raise found
    return cut(found, max_length)


def tokenize_pieces(rows: Sequence[list[Piece]], tokenizer: "Tokenizer") -> list[Example | RowError]:
    """Returns the tokens of rendered rows, uncut, or why a row has nothing to train on.

    The tokenizer is asked once for all of them, which takes a fraction of the time; the ids are the same.
    """
    encoded = iter(_encode_all(rows, tokenizer))
    found: list[Example | RowError] = []
    for pieces in rows:
        ids, labels = array("i"), array("i")
        for piece, new in zip(pieces, next(encoded), strict=True):
            ids.extend(new)
            labels.extend(new if piece.trained else [IGNORED] * len(new))
        if labels:
            labels[0] = IGNORED
        is_trained = any(label != IGNORED for label in labels)
        found.append(Example(ids, labels, 0) if is_trained else RowError("it has no token to train on"))
    return found


def cut(example: Example, max_length: int) -> Example:
    """Returns an example cut at the end to at most `max_length` tokens.

    Raises:
        RowError: Nothing to train on is within them.
    """
    begin = next(i for i, label in enumerate(example.labels) if label != IGNORED)
    if begin >= max_length:
        raise RowError(beyond(begin, max_length))
    num_cut = max(0, len(example.input_ids) - max_length)
    return example._replace(
        input_ids=example.input_ids[:max_length], labels=example.labels[:max_length], num_cut=num_cut
    )


def beyond(begin: int, max_length: int) -> str:
    """Returns why a row whose first trained token is at `begin`, from 0, cannot be used."""
    return f"its answer begins at token {begin + 1}; raise `max_length` (={max_length}) well above that"


def end_tokens(tokenizer: "Tokenizer") -> dict[int, str]:
    """Returns id -> text of the tokens that can end an answer: all that the tokenizer calls special."""
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def marked_tokens(example: Example, tokenizer: "Tokenizer") -> list[tuple[str, bool]]:
    """Returns the text of each token and whether it is trained; together they are the decoded example.

    Tokens that are only parts of one character stand together.
    """
    marked, before, group = [], [], []
    trained = [label != IGNORED for label in example.labels]
    for i, token in enumerate(example.input_ids):
        group.append(token)
        text = _decode_after(before, group, tokenizer)
        open_ended = text.endswith("\ufffd") and len(group) < 8
        if open_ended and i + 1 < len(trained) and trained[i + 1] == trained[i]:
            continue
        marked.append((text, trained[i]))
        before, group = group, []
    return marked


def token_texts(ids: Sequence[int], tokenizer: "Tokenizer") -> list[tuple[str, int]]:
    """Returns the text of tokens and how many have it: those that are only parts of one character stand together."""
    found, before, group = [], [], []
    for i, token in enumerate(ids):
        group.append(token)
        text = _decode_after(before, group, tokenizer)
        if text.endswith("\ufffd") and len(group) < 8 and i + 1 < len(ids):
            continue
        found.append((text, len(group)))
        before, group = group, []
    return found


def text_ids(text: str, tokenizer: "Tokenizer") -> list[int]:
    """Returns the ids of a text that stands behind others, or alone."""
    return _encode([Piece(text, False)], tokenizer)[0]


def _pieces(content: list[Message] | str, tokenizer: "Tokenizer", template: str, ask: bool = False) -> list[Piece]:
    """Returns what the model sees of a conversation or text; with `ask`, up to where its next answer begins."""
    if not isinstance(content, str) and template == "chat":
        return _chat_pieces(content, tokenizer, ask)
    # A model whose tokenizer starts every text with a mark has never seen a text without it.
    marks = tokenizer.encode("")
    begins = bool(marks) and marks[0] == tokenizer.bos_token_id
    pieces = [Piece(str(tokenizer.bos_token), False)] if begins else []
    end = str(tokenizer.eos_token or "")
    if isinstance(content, str):
        return pieces + [Piece(content, False) if ask else Piece(content + end, True)]
    for message in content:
        answer = message["role"] == "assistant"
        text = message["content"] + (end if answer else "\n")
        pieces.append(Piece(text, answer and bool(message["content"].strip())))
    return pieces


def _chat_pieces(messages: list[Message], tokenizer: "Tokenizer", ask: bool) -> list[Piece]:
    if not tokenizer.chat_template:
        raise LoRAError("`template` (='chat') needs a chat template, which this model's tokenizer lacks; choose plain.")
    pieces, seen = [], ""

    def continue_to(text: str) -> str:
        """Returns what `text` adds to what was seen."""
        if not text.startswith(seen):
            raise LoRAError(
                "`template` (='chat') must add turns without changing earlier ones, which this model's chat template "
                "does not; choose plain, or rows with one answer each."
            )
        return text[len(seen) :]

    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        added = continue_to(_apply(messages[:i], tokenizer, ask=True))
        pieces.append(Piece(added, False))
        seen += added
        answer = continue_to(_apply(messages[: i + 1], tokenizer, ask=False))
        answer = answer[: _answer_end(answer, tokenizer)]
        pieces.append(Piece(answer, True))
        seen += answer
    return [*pieces, Piece(continue_to(_apply(messages, tokenizer, ask)), False)]


def _apply(messages: list[Message], tokenizer: "Tokenizer", ask: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except Exception as error:  # whatever a template's expressions can set off
        raise RowError(f"the model's chat template refuses it ({error})") from error


def _answer_end(text: str, tokenizer: "Tokenizer") -> int:
    """Returns the length of an answer with its end token, without the white space that the template puts after it."""
    body = text.rstrip()
    return len(body) if body.endswith(tuple(end_tokens(tokenizer).values())) else len(text)


def _encode(pieces: Sequence[Piece], tokenizer: "Tokenizer") -> list[list[int]]:
    return _encode_all([pieces], tokenizer)[0]


def _encode_all(rows: Sequence[Sequence[Piece]], tokenizer: "Tokenizer") -> list[list[list[int]]]:
    """Returns the ids of each row's pieces; they depend on the piece alone: a prompt has the same everywhere."""

    def encode(texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        wanted = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return tokenizer(texts, verbose=False, **wanted)["input_ids"]  # type: ignore[return-value]

    # Some tokenizers put a space before any text; in the middle it does not belong there. Behind a line break they put
    # none, so there a piece is read behind one, whose ids are taken off again.
    anchor, single, behind = encode(["\n", "x", "\nx"])
    adds_space = behind != anchor + single
    texts: dict[tuple[str, bool], int] = {}  # each is read once, whatever the number of rows that it stands in
    places: list[list[int]] = []
    for pieces in rows:
        in_middle, row = False, []
        for piece in pieces:
            row.append(texts.setdefault((piece.text, adds_space and in_middle), len(texts)))
            in_middle = in_middle or piece.text != tokenizer.bos_token
        places.append(row)
    ids = encode(["\n" * is_behind + text for text, is_behind in texts])
    again = []
    for i, (text, is_behind) in enumerate(texts):
        if is_behind and ids[i][: len(anchor)] == anchor:
            ids[i] = ids[i][len(anchor) :]
        elif is_behind:
            again.append((i, text))
    for (i, _), new in zip(again, encode([text for _, text in again]), strict=True):
        ids[i] = new
    return [[ids[place] for place in row] for row in places]


def _decode_after(before: list[int], ids: list[int], tokenizer: "Tokenizer") -> str:
    """Returns the text of `ids` where they follow `before`: some tokenizers drop the space before a first word."""
    start, whole = (
        str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for part in (before, before + ids)
    )
    if whole.startswith(start):
        return whole[len(start) :]
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
