"""GGUF files: what their heads say, and their conversion to an ordinary folder with float32 safetensors."""

import contextlib
import copy
import functools
import hashlib
import importlib
import mmap
import os
import re
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import LoRAError
from studio.model_files import check_counts, one_line
from studio.workspace import Workspace

_CONVERSION = 1  # raise it when converted files must be made anew

_READING = threading.Lock()  # what is set meanwhile is the library's own, for all threads


def converted_folder(file: Path, workspace: Workspace) -> Path:
    """Returns where the converted file stands once it is converted; a changed file has another place."""
    stat = file.stat()
    key = f"{file.name}|{stat.st_size}|{stat.st_mtime_ns}|{_CONVERSION}"
    slug = re.sub(r"[^A-Za-z0-9]+", "-", file.stem).strip("-")[:60] or "model"
    return workspace.cache / "models" / f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def convert(model: str, file: Path, tree: Any, workspace: Workspace) -> None:
    """Writes the file's weights and tokenizer into `converted_folder`, whole or not at all.

    Not for two threads at once: transformers changes the process's settings while it builds a model.

    Args:
        model: What the user named.
        file: The GGUF file.
        tree: The model of `read_config` on the meta device; it takes the weights.
        workspace: Where the folder goes.

    Raises:
        LoRAError: The file is damaged or of a family that transformers does not read, or there is no room.
    """
    from safetensors import SafetensorError

    final = converted_folder(file, workspace)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final.parent)
        needed = 4 * sum(p.numel() for p in tree.parameters()) + 2**26
        free = shutil.disk_usage(final.parent).free
        if free < needed:
            raise OSError(f"{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")
        temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=final.parent))
        try:
            _write(file, tree, temporary)
            _settle(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise LoRAError(
            f"`--workspace` (={str(workspace.root)!r}) must have room for the converted weights of {model!r} "
            f"({one_line(error)}); free some space, or name another one."
        ) from error


def read_config(file: Path) -> Any:
    """Returns the config that the file's head describes, without traces of the file; takes seconds the first time.

    Raises:
        LoRAError: The file is damaged, a part of a split one, or of a family that transformers does not read.
    """
    header = read_header(file)
    if header.get("split.count", 0) > 1:
        raise LoRAError(
            f"`model` (={file.name!r}) must be a whole GGUF file; it is one of {header['split.count']} parts. "
            "Join them with llama-gguf-split --merge."
        )
    check_counts(file.name, header, "head")
    stat = file.stat()
    return copy.deepcopy(_parse_config(file, stat.st_size, stat.st_mtime_ns))


def read_header(file: Path) -> dict[str, Any]:
    """Returns the key-value pairs at the head of a GGUF file; arrays as their length.

    Raises:
        LoRAError: It is no GGUF file.
    """
    formats = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
    try:
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            position = 0

            def take(code: str) -> Any:
                nonlocal position
                (value,) = struct.unpack_from("<" + code, data, position)
                position += struct.calcsize("<" + code)
                return value

            def value(kind: int) -> Any:
                nonlocal position
                if kind == 8:
                    size = take("Q")
                    position += size
                    return data[position - size : position].decode()
                if kind == 9:
                    inner, count = take("I"), take("Q")
                    if inner in formats:
                        position += count * struct.calcsize("<" + formats[inner])
                    else:
                        for _ in range(count):
                            value(inner)
                    return count
                return take(formats[kind])

            def pair() -> tuple[str, Any]:
                found = value(8), value(take("I"))
                if position > len(data):
                    raise ValueError(f"its head is cut off within {found[0]}")
                return found

            if take("4s") != b"GGUF" or take("I") not in (2, 3):
                raise ValueError("it does not begin as GGUF of version 2 or 3")
            take("Q")  # number of tensors
            return dict(pair() for _ in range(take("Q")))
    except (OSError, ValueError, KeyError, RecursionError, struct.error) as error:
        raise _refusal(file, error) from error


def dtype_name(header: dict[str, Any]) -> str | None:
    """Returns the type of most of the weights in GGUF's words, such as Q4_1, or None where the head does not say."""
    from gguf import LlamaFileType

    try:
        return LlamaFileType(header.get("general.file_type")).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:  # no such field, or a type newer than the library
        return None


def quiet() -> None:
    """Turns off the libraries' progress bars and advice; what matters is raised or said by `progress`."""
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()


def _write(file: Path, tree: Any, folder: Path) -> None:
    """Writes the file's dequantized weights and its tokenizer into `folder`, as of an ordinary model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with _no_bar(), _quick_reading():
            # From an empty folder: an adapter beside the file would be applied to it where PEFT is installed. By an
            # absolute `gguf_file`: a bare name would be looked for in the current folder first.
            loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=str(file),
                config=tree.config,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
                local_files_only=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                folder, gguf_file=str(file), trust_remote_code=False, local_files_only=True
            )
        # The loaded model counts as quantized and refuses to be saved; its weights in a fresh tree do not.
        tree.load_state_dict(loaded.state_dict(), assign=True)
    except Exception as error:  # whatever a damaged file sets off in its readers
        raise _refusal(file, error) from error
    tree.config.dtype = torch.float32
    tree.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _settle(temporary: Path, final: Path) -> None:
    """Renames the finished folder into place; where another process was first, its folder stands."""
    for file in temporary.iterdir():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def _remove_leftovers(parent: Path) -> None:
    """Removes what conversions that were killed more than a day ago left behind."""
    for folder in parent.glob(".converting-*"):
        with contextlib.suppress(FileNotFoundError):  # its owner has just finished
            if folder.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(folder, ignore_errors=True)


@functools.lru_cache(maxsize=4)
def _parse_config(file: Path, num_bytes: int, mtime_ns: int) -> Any:
    quiet()
    from transformers import AutoConfig

    try:
        with _quick_reading():
            config = AutoConfig.from_pretrained(
                file.parent, gguf_file=str(file), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # as in `_write`
        raise _refusal(file, error) from error
    values = config.to_dict()
    for trace in ("_model_name_or_path", "quantization_config"):
        values.pop(trace, None)
    # What transformers passes over in a head.
    if "n_ctx" in values:  # GPT-2's old name for it
        values["n_positions"] = values.pop("n_ctx")
    if values["model_type"] == "qwen3":
        values["head_dim"] = read_header(file).get("qwen3.attention.key_length", values["head_dim"])
    return type(config).from_dict(values)


def _refusal(file: Path, error: Exception) -> LoRAError:
    return LoRAError(
        f"`model` (={file.name!r}) must be a whole GGUF file of a family that transformers reads; "
        f"this one is refused ({one_line(error)}). Fetch it again, or name another model."
    )


@contextlib.contextmanager
def _quick_reading() -> Iterator[None]:
    """Has transformers read a file once for its weights and its tokenizer, from a plain array, and name tensors once.

    Its head holds 150,000 words and more, and a piece of a `memmap` takes several times as long to cut as one of a
    plain array; the names of all tensors are made anew for each of the model's modules.
    """
    import numpy as np

    names = vars(importlib.import_module("gguf"))
    with _READING:
        slow = {name: names[name] for name in ("GGUFReader", "get_tensor_name_map")}

        class Reader(slow["GGUFReader"]):
            def __setattr__(self, name: str, value: Any) -> None:
                super().__setattr__(name, np.asarray(value) if name == "data" else value)

        names["GGUFReader"] = functools.lru_cache(maxsize=1)(Reader)
        names["get_tensor_name_map"] = functools.lru_cache(maxsize=1)(slow["get_tensor_name_map"])
        try:
            yield
        finally:
            names.update(slow)


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """Silences the one progress bar that transformers' own switch does not reach."""
    names = vars(importlib.import_module("transformers.modeling_gguf_pytorch_utils"))
    bar = names.get("tqdm")
    names["tqdm"] = lambda items, **_: items
    try:
        yield
    finally:
        names["tqdm"] = bar
