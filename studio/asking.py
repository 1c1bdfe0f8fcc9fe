"""One question to an adapter that is looked at, put as the rows were that it was trained on."""

from collections.abc import Iterator

from core import LoRAError
from studio import data
from studio.chat import ChatSettings
from studio.opened import Opened
from studio.state import Studio


def question(spec: data.DataSpec, text: str) -> list[dict[str, str]] | str:
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


def ask(studio: Studio, opened: Opened, text: str, *, max_new_tokens: int = 80) -> Iterator[str]:
    """Yields the growing answer of the model with an adapter, each token the likeliest.

    Raises:
        LoRAError: The text is empty, or the base model is not at hand.
    """
    if opened.model is None:
        raise LoRAError("The base model must be at hand to chat; name it where the adapter is opened.")
    spec = opened.run.spec.data if opened.run else data.DataSpec()
    tokenizer = studio.tokenizer(opened.model)
    ids = data.prompt_ids(question(spec, text), tokenizer, spec.template)
    for answer in studio.engine_of(opened).answer("adapter", ids, ChatSettings(max_new_tokens)):
        yield tokenizer.decode(answer.token_ids)
