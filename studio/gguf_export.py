"""Adapters and merged models as GGUF files for llama.cpp, and what such a file says when it is read again.

What a family of models needs is in `studio.gguf_families`; the meaning of an adapter's tensors is llama.cpp's (its
convert_lora_to_gguf.py and llama-adapter.cpp).
"""

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from core import Adapter, Factors, Layout, LoRAError, quoted
from studio import gguf_families, gguf_tokenizer
from studio.gguf_families import Naming

TYPES = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}
TYPES |= {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}


class _Entry(NamedTuple):
    """One tensor to write: its name, shape and type, and what makes its bytes when their turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    make: Callable[[], np.ndarray]


def write_adapter(file: Path, adapter: Adapter, config: Any, kind: str, name: str) -> None:
    """Writes an adapter for llama.cpp's `--lora`: A and B of each matrix, B's rows in llama.cpp's order.

    llama.cpp knows one alpha and takes alpha / r for each matrix; what scaling differs from that is put into B.

    Raises:
        LoRAError: The adapter has something that llama.cpp cannot apply, or the model is of an unknown family.
    """
    naming = Naming.of(config)
    refuse(adapter, naming)
    writer = gguf.GGUFWriter(None, naming.family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.config.alpha)
    writer.add_name(name)
    writer.add_file_type(TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    entries = []
    for path, f in wholes(adapter.factors).items():
        called = naming.name(path)
        A, B = f.A.float(), f.B.float() * (f.scaling * f.r / np.float32(adapter.config.alpha).item())
        if f.layout.form == "embedding":
            A = A.T  # llama.cpp takes a token's row of it
        elif (order := naming.order(called, len(B))) is not None:
            B = B[order]
        entries += [_entry(f"{called}.weight.lora_{half}", x, kind) for half, x in (("a", A), ("b", B))]
    _write(writer, file, entries)


def read_adapter(file: Path, config: Any, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Returns what an adapter's GGUF file holds, by the paths of `factors`, as llama.cpp would apply it."""
    naming = Naming.of(config)
    reader = gguf.GGUFReader(file)
    tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    alpha = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    found = {}
    for path, f in wholes(factors).items():
        called = naming.name(path)
        A, B = (tensors.pop(f"{called}.weight.lora_{half}") for half in "ab")
        if f.layout.form == "embedding":
            A = A.T
        elif (order := naming.order(called, len(B))) is not None:
            B = B[order.argsort()]
        found[path] = Factors(A, B, alpha / A.shape[0], f.layout)
    if tensors:
        raise LoRAError(
            f"{file.name} must hold the adapter's matrices and no others; it has {', '.join(tensors)}, too."
        )
    return found


def refuse(adapter: Adapter, naming: Naming) -> None:
    """Says what in an adapter llama.cpp cannot apply.

    Raises:
        LoRAError: There is something; all of it in one message.
    """
    problems = []
    if adapter.magnitudes:
        problems.append("DoRA's magnitudes")
    if adapter.trained_in_full:
        problems.append(f"parameters trained in full ({', '.join(list(adapter.trained_in_full)[:3])})")
    forms = {f.layout.form for f in adapter.factors.values()} - {"linear", "slice", "embedding"}
    problems += [f"matrices of the form {quoted(form)}" for form in sorted(forms)]
    for path, f in wholes(adapter.factors).items():
        name = naming.name(path) if f.layout.form not in forms else ""
        if naming.tied and name in ("token_embd", "output"):
            problems.append(f"{path}, which shares its weight")
        if name == "position_embd":  # it would be passed over without a word
            problems.append(f"{path}, whose rows are added as they are")
    if problems:
        raise LoRAError(
            f"The adapter must be plain LoRA to be applied by llama.cpp; it has {', '.join(problems)}. "
            "Export the merged model as GGUF instead."
        )


def wholes(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Returns the factors with slices of a fused projection joined to one update of the whole, of scaling 1."""
    joined = {path: f for path, f in factors.items() if f.layout.form != "slice"}
    parts: dict[str, list[Factors]] = {}
    for path, f in factors.items():
        if f.layout.form == "slice":
            parts.setdefault(path.rpartition(".")[0], []).append(f)
    for path, slices in parts.items():
        A = torch.cat([f.A for f in slices])
        B = torch.zeros(slices[0].layout.num_rows, len(A))
        begin = 0
        for f in slices:
            B[f.layout.rows, begin : begin + f.r] = f.scaling * f.B.float()
            begin += f.r
        joined[path] = Factors(A, B, 1.0, Layout(transposed=slices[0].layout.transposed))
    return joined


def check_merged(tree: Any, tokenizer: Any, base: Path | None) -> None:
    """Says what of a model cannot be written, before anything is computed.

    Args:
        tree: The model, which needs no weights.
        tokenizer: As of `write_merged`.
        base: As of `write_merged`.

    Raises:
        LoRAError: The family, a setting or the tokenizer is none that is known to work in llama.cpp.
    """
    naming = Naming.of(tree.config)
    for path, _ in tree.named_parameters():
        naming.name(path.rpartition(".")[0])
    if base is None:
        _write_head(gguf.GGUFWriter(None, naming.family.arch), tree.config, naming, tokenizer)


def write_merged(
    file: Path,
    merged: Any,
    changed: Callable[[str], bool],
    tokenizer: Any,
    base: Path | None,
    kind: str,
) -> dict[str, str]:
    """Writes a merged model; returns its parameters' names → digest of what each must be when it is read again.

    Args:
        file: Where to.
        merged: The model, without LoRA layers.
        changed: Says of a parameter whether the adapter changed it.
        tokenizer: The base's, as transformers loads it.
        base: The GGUF file that the base came from, whose head, tokenizer and unchanged tensors are taken as they are.
        kind: Of `TYPES`, for matrices; vectors are float32.

    Raises:
        LoRAError: As of `check_merged`.
    """
    naming = Naming.of(merged.config)
    writer = gguf.GGUFWriter(None, naming.family.arch)
    kept = {}
    if base is not None:
        reader = gguf.GGUFReader(base)
        _copy_head(writer, reader)
        kept = {tensor.name: tensor for tensor in reader.tensors}
    else:
        _write_head(writer, merged.config, naming, tokenizer)
    writer.add_file_type(TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    digests: dict[str, str] = {}
    entries: dict[str, _Entry] = {}
    for path, parameter in merged.named_parameters():
        module, _, attribute = path.rpartition(".")
        called = naming.name(module)
        name = f"{called}.{attribute}"
        if name in kept and not changed(path):
            entries[name] = _kept_entry(kept[name])
        else:
            entries[name] = _entry(name, naming.stored(called, parameter.detach()), kind)
        entries[name] = _watched(entries[name], path, functools.partial(naming.restored, called), digests)
    if base is None:
        entries |= {name: _entry(name, x, kind) for name, x in gguf_families.rope_tensors(merged).items()}
    entries |= {name: _kept_entry(tensor) for name, tensor in kept.items() if name not in entries}
    _write(writer, file, list(entries.values()))
    return digests


def read_merged(file: Path, model: Any) -> None:
    """Puts the tensors of a merged model's file in the place of all parameters of `model`, its base.

    Raises:
        LoRAError: The file has others than these.
    """
    naming = Naming.of(model.config)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    missing = []
    for path, parameter in model.named_parameters():
        module, _, attribute = path.rpartition(".")
        called = naming.name(module)
        tensor = tensors.pop(f"{called}.{attribute}", None)
        if tensor is None:
            missing.append(path)
            continue
        found = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
        found = naming.restored(called, found.reshape([int(size) for size in reversed(tensor.shape)]))
        with torch.no_grad():
            parameter.copy_(found)
    more = sorted(tensors.keys() - set(gguf_families.ROPE_TENSORS))
    if missing or more:
        raise LoRAError(
            f"{file.name} must hold the model's tensors and no others; missing: {', '.join(missing[:3]) or 'none'}, "
            f"unknown: {', '.join(more[:3]) or 'none'}."
        )


def digest(tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor's values."""
    return hashlib.sha256(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data).hexdigest()


def _entry(name: str, value: Tensor, kind: str) -> _Entry:
    shape = tuple(value.shape)
    stored = gguf.GGMLQuantizationType[kind.upper()]
    if len(shape) == 1:
        stored = gguf.GGMLQuantizationType.F32
    elif stored == gguf.GGMLQuantizationType.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
        stored = gguf.GGMLQuantizationType.F16  # as llama.cpp does where rows do not divide into blocks

    def make() -> np.ndarray:
        return gguf.quants.quantize(np.ascontiguousarray(value.float().cpu().numpy()), stored)

    return _Entry(name, shape, stored, make)


def _kept_entry(tensor: gguf.ReaderTensor) -> _Entry:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return _Entry(tensor.name, shape, tensor.tensor_type, lambda: tensor.data)


def _watched(entry: _Entry, path: str, restored: Callable[[Tensor], Tensor], digests: dict[str, str]) -> _Entry:
    """Returns an entry that notes, once it is made, what is to be read back for `path`."""

    def make() -> np.ndarray:
        made = entry.make()
        values = torch.from_numpy(np.array(gguf.dequantize(made, entry.kind), np.float32)).reshape(entry.shape)
        digests[path] = digest(restored(values))
        return made

    return entry._replace(make=make)


def _write(writer: gguf.GGUFWriter, file: Path, entries: list[_Entry]) -> None:
    """Writes head and tensors, one of them in memory at a time."""
    for entry in entries:
        block, size = gguf.GGML_QUANT_SIZES[entry.kind]
        num_bytes = int(np.prod(entry.shape)) // block * size
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), num_bytes, entry.kind)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(entry.make())
    writer.close()


def _write_head(writer: gguf.GGUFWriter, config: Any, naming: Naming, tokenizer: Any) -> None:
    name = Path(tokenizer.name_or_path).name or config.model_type
    gguf_families.describe(writer, config, naming.family, name)
    gguf_tokenizer.add_tokenizer(writer, tokenizer, name, config.vocab_size)


def _copy_head(writer: gguf.GGUFWriter, reader: gguf.GGUFReader) -> None:
    own = {"general.architecture", "general.file_type", "general.quantization_version"}
    for key, field in reader.fields.items():
        if key not in own and not key.startswith(("GGUF.", "split.")):
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
