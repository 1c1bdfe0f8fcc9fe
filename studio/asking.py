"""One question to an adapter that is looked at, put as the rows were that it was trained on."""

from collections.abc import Iterator

from core import LoRAError
from studio import data
from studio.conversation import question
from studio.opened import Opened
from studio.sampling import ChatSettings
from studio.state import Studio


def ask(studio: Studio, opened: Opened, text: str, *, max_new_tokens: int = 80) -> Iterator[str]:
    """Yields the growing answer of the model with an adapter, each token the likeliest.

    Raises:
        LoRAError: The text is empty, or the base model is not at hand.
    """
    if opened.model is None:
        raise LoRAError("The base model must be at hand to chat; name it where the adapter is opened.")
    if opened.run:
        opened.run.spec.must_write("a question")
    spec = opened.run.spec.data if opened.run else data.DataSpec()
    tokenizer = studio.tokenizer(opened.model)
    ids = data.prompt_ids(question(spec, text), tokenizer, spec.template)
    engine, pane = studio.engine_for(opened)
    for answer in engine.answer(pane, ids, ChatSettings(max_new_tokens)):
        yield tokenizer.decode(answer.token_ids)
