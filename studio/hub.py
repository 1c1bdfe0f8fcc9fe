"""Models on the Hugging Face Hub: its local cache first, the network only for what is not there."""

import re
from pathlib import Path

from core.errors import LoRAError
from studio.model_files import (
    INDEX,
    STARTER,
    TOKENIZER_FILES,
    WEIGHTS,
    Progress,
    missing_weights,
    no_safetensors,
    one_line,
    weight_names,
)

ID = re.compile(r"[a-z0-9][\w.-]{0,95}(/[a-z0-9][\w.-]{0,95})?", re.ASCII | re.IGNORECASE)
"""The form of a Hub id: owner/name, or name."""

_TIMEOUT_SECONDS = 5
_SMALL_FILES = [  # all of a repository but its weights and its card
    *("config.json", "generation_config.json", "adapter_config.json", "added_tokens.json", "special_tokens_map.json"),
    *("tokenizer_config.json", "merges.txt", "chat_template.*", INDEX, *TOKENIZER_FILES),
]


def fetch(model: str, weights: bool, progress: Progress | None) -> Path:
    """Returns the folder of the model in the local Hub cache, fetched only when it is not complete there.

    Args:
        model: owner/name, or name.
        weights: Whether the weights must be there too.
        progress: Told of a download.

    Raises:
        LoRAError: The model does not exist, is not open, has no safetensors, or cannot be reached.
    """
    _quiet()
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(huggingface_hub.snapshot_download(model, local_files_only=True, allow_patterns=_SMALL_FILES))
        if (cached / "config.json").is_file() and not (weights and missing_weights(cached)):
            return cached
    except LocalEntryNotFoundError:
        pass
    names = _list_files(model)
    if WEIGHTS not in names and INDEX not in names:
        raise no_safetensors(model, names)
    folder = _download(model, [])
    if weights:
        wanted = weight_names(folder)
        if progress:
            size = num_bytes(model, wanted)
            progress(f"Downloading {model}" + (f", {size / 1e6:.0f} MB" if size else ""))
        folder = _download(model, wanted)
    return folder


def num_bytes(model: str, names: list[str]) -> int | None:
    """Returns the size of the files `names` of a fetched repository, or None where the Hub did not say."""
    import huggingface_hub
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = huggingface_hub.get_cached_repo_tree(model)
    except CachedRepoTreeNotFoundError:
        return None
    return sum(file.size for file in tree if file.path in names) or None


def _list_files(model: str) -> list[str]:
    """Returns the names of the repository's files; answers within seconds when there is no network."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = huggingface_hub.HfApi().model_info(model, timeout=_TIMEOUT_SECONDS)
    except RepositoryNotFoundError as error:
        raise _refusal(model, error) from error
    except Exception as error:  # the errors of the HTTP library behind it have no public name here
        raise LoRAError(
            f"`model` (={model!r}) must be on this machine or within reach: it is no folder, it is not in the local "
            f"Hub cache, and the Hub does not answer ({one_line(error)}). Without network name a folder in "
            f"Hugging Face layout or a .gguf file, or take the starter model ({STARTER!r})."
        ) from error
    return [file.rfilename for file in info.siblings or []]


def _download(model: str, wanted: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=[*_SMALL_FILES, "README.md", *wanted]))
    except RepositoryNotFoundError as error:
        raise _refusal(model, error) from error
    except Exception as error:  # as in `_list_files`
        raise LoRAError(
            f"`model` (={model!r}) must be fetched whole; the download stopped ({one_line(error)}). "
            "Try again: it goes on where it stopped."
        ) from error


def _refusal(model: str, error: Exception) -> LoRAError:
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError):
        return LoRAError(
            f"`model` (={model!r}) must be open to you; its owner asks for consent first. Accept the terms on its "
            "page on the Hub, then log in with: hf auth login"
        )
    return LoRAError(
        f"`model` (={model!r}) must exist; there is no such folder here and no such model on the Hub "
        "(for a private one log in with: hf auth login)."
    )


def _quiet() -> None:
    import huggingface_hub.utils

    huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()
