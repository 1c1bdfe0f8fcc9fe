"""What `lora-studio serve-api` offers: runs and adapter folders by name, and the base; and the server's start."""

import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import Adapter, LoRAError, quoted, resolve_device, resolve_dtype
from studio import models, serving
from studio.chat import Engine
from studio.panes import Pane
from studio.runs import Run
from studio.workspace import Workspace

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Offer:
    """The adapters that are served, all of one base model.

    Attributes:
        base: The base model.
        folders: Name → the adapter's folder.
        templates: Name → how its rows put a conversation: "chat" or "plain".
    """

    base: str
    folders: dict[str, Path]
    templates: dict[str, str]


def offer(words: Sequence[str], base: str | None, find: Callable[[str], Run]) -> Offer:
    """Returns what `[NAME=]RUN` and `[NAME=]FOLDER` name.

    Args:
        words: Runs' ids, or how they begin, and folders with an adapter; NAME is what clients call it.
        base: The base model; None for the one that the adapters name.
        find: Returns the run whose id begins so.

    Raises:
        LoRAError: There is no such run or adapter, two have one name, or they are of several base models.
    """
    folders: dict[str, Path] = {}
    templates: dict[str, str] = {}
    bases: dict[str, str] = {}
    for word in words:
        name, _, place = word.rpartition("=")
        folder = Path(place).expanduser()
        if folder.is_dir():
            name, model, template = name or folder.resolve().name, Adapter.load(folder).base_model, "chat"
        else:
            run = find(place)
            folder, name = run.adapter_folder, name or run.id
            model, template = run.spec.model, run.spec.data.template
            run.spec.must_write("OpenAI's endpoints")
            if not run.has_adapter:
                raise LoRAError(f"`ADAPTER` (={place!r}) must have an adapter; {run.id} has none yet.")
        if not re.fullmatch(r"[\w.:@/-]+", name) or name in folders:
            raise LoRAError(f"`ADAPTER` (={quoted(word)}) must have a name of its own; write NAME={place}.")
        folders[name], templates[name] = folder, template
        bases[name] = base or model or ""
    found = {model for model in bases.values() if model} or ({base} if base else set())
    if len(found) != 1 or "" in bases.values():
        told = ", ".join(f"{name}: {model or 'not named'}" for name, model in bases.items()) or "none"
        raise LoRAError(f"`ADAPTER` must be of one base model ({told}); name it with --base.")
    (model,) = found
    if model in folders:
        raise LoRAError(f"`ADAPTER` (={model!r}) must have another name than the base model; write NAME={model}.")
    return Offer(model, folders, templates)


def serve(offered: Offer, workspace: Workspace, *, port: int) -> None:
    """Serves until interrupted.

    Raises:
        LoRAError: The port is taken, the model cannot be loaded, or an adapter does not fit it.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise LoRAError(f"`--port` (={port}) must be a free one from 1 to 65535 ({error}).") from error
    import uvicorn

    device = resolve_device("auto")
    tokenizer: Any = models.load_tokenizer(offered.base, workspace)
    dtype = resolve_dtype("fp32" if device.type == "cpu" else "auto", device)
    model = models.load_model(offered.base, workspace, device=str(device), dtype=dtype)
    adapters = {name: Adapter.load(folder) for name, folder in offered.folders.items()}
    for adapter in adapters.values():
        adapter.check_fit(model)
    ends = frozenset(models.end_token_ids(model, tokenizer))
    turns = serving.Turns(Engine(model, lambda name, step: adapters[name], ends))
    has_template = bool(tokenizer.chat_template)
    panes = {offered.base: (Pane(), "chat" if has_template else "plain")}
    panes |= {name: (Pane(name), offered.templates[name] if has_template else "plain") for name in adapters}
    print(f"Models at http://{HOST}:{port}/v1 (Ctrl-C ends):", *panes, sep="\n  ", flush=True)
    try:
        app = serving.application(serving.Service(turns, tokenizer, panes))
        uvicorn.run(app, host=HOST, port=port, log_level="warning", ws="none", lifespan="off")
    finally:
        turns.close()
