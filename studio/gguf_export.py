"""Adapters and merged models as GGUF files for llama.cpp, and what such a file says when it is read again.

Names, the order of rows and the meaning of an adapter's tensors are llama.cpp's (its convert_hf_to_gguf.py,
convert_lora_to_gguf.py and llama-adapter.cpp). A family that is not known to need no more than that is refused.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import gguf
import numpy as np
import torch
from torch import Tensor

from core import Adapter, Factors, LoRAError, quoted
from studio import gguf_tokenizer

TYPES = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}
TYPES |= {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


@dataclass(frozen=True)
class Naming:
    """How llama.cpp calls the tensors of one model, and how it orders their rows.

    Attributes:
        arch: Its name for the family.
        table: From paths to its names.
        num_heads: Of the queries; num_kv_heads: of the keys.
        tied: Whether the embedding is the head, too.
    """

    arch: str
    table: gguf.TensorNameMap
    num_heads: int
    num_kv_heads: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Self:
        """Returns the naming for a model with this config.

        Raises:
            LoRAError: Its family is none that is known to work.
        """
        family = config.model_type
        if family not in _ARCHITECTURES:
            raise LoRAError(
                f"`model` (a {quoted(family)}) must be of a family that can be written as GGUF here: "
                f"{', '.join(_ARCHITECTURES)}. Take the Hugging Face folder to llama.cpp's own converter instead."
            )
        arch = _ARCHITECTURES[family]
        number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
        table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        heads = config.num_attention_heads
        return cls(arch, table, heads, config.num_key_value_heads or heads, bool(config.tie_word_embeddings))

    def name(self, path: str) -> str:
        """Returns llama.cpp's name, without ".weight".

        Raises:
            LoRAError: It has none.
        """
        found = self.table.get_name(path)
        if found is None:
            raise LoRAError(f"`{path}` must have a name in GGUF to be written; llama.cpp knows none for {self.arch}.")
        return found

    def order(self, name: str, num_rows: int) -> Tensor | None:
        """Returns (num_rows) int64: which row of the model's comes at each place in the file; None for its own order.

        llama.cpp turns neighbouring entries of a query by one angle, where Hugging Face's layout turns the two halves.
        """
        heads = {"attn_q": self.num_heads, "attn_k": self.num_kv_heads}.get(name.rpartition(".")[2])
        if self.arch != "llama" or heads is None:
            return None
        return torch.arange(num_rows).reshape(heads, 2, num_rows // heads // 2).transpose(1, 2).reshape(-1)


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
    writer = gguf.GGUFWriter(None, naming.arch)
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
    ends = [path for path in adapter.factors if naming.tied and path.endswith(("embed_tokens", "lm_head"))]
    problems += [f"{path}, which shares its weight" for path in ends]
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
        joined[path] = Factors(A, B, 1.0)
    return joined


def write_merged(
    file: Path,
    merged: Any,
    changed: Callable[[str], bool],
    folder: Path,
    base: Path | None,
    kind: str,
    note: Callable[[str], None],
) -> dict[str, str]:
    """Writes a merged model; returns its parameters' names → digest of what each must be when it is read again.

    Args:
        file: Where to.
        merged: The model, without LoRA layers.
        changed: Says of a parameter whether the adapter changed it.
        folder: The base in Hugging Face layout: its tokenizer.
        base: The GGUF file that the base came from, whose head, tokenizer and unchanged tensors are taken as they are.
        kind: Of `TYPES`, for matrices; vectors are float32.
        note: Told how far it is.

    Raises:
        LoRAError: The family or the tokenizer is none that is known to work in llama.cpp.
    """
    naming = Naming.of(merged.config)
    writer = gguf.GGUFWriter(None, naming.arch)
    kept = {}
    if base is not None:
        reader = gguf.GGUFReader(base)
        _copy_head(writer, reader)
        kept = {tensor.name: tensor for tensor in reader.tensors}
    else:
        _describe(writer, merged.config, naming, folder.name)
        gguf_tokenizer.add_tokenizer(writer, folder, merged.config.vocab_size)
    writer.add_file_type(TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    digests: dict[str, str] = {}
    entries: dict[str, _Entry] = {}
    for path, parameter in merged.named_parameters():
        module, _, attribute = path.rpartition(".")
        called = naming.name(module)
        name, order = f"{called}.{attribute}", naming.order(called, len(parameter))
        if name in kept and not changed(path):
            entries[name] = _kept_entry(kept[name])
        else:
            value = parameter.detach() if order is None else parameter.detach()[order]
            entries[name] = _entry(name, value, kind)
        entries[name] = _watched(entries[name], path, order, digests)
    entries |= {name: _kept_entry(tensor) for name, tensor in kept.items() if name not in entries}
    note(f"Writing {len(entries)} tensors")
    _write(writer, file, list(entries.values()))
    return digests


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


def _watched(entry: _Entry, path: str, order: Tensor | None, digests: dict[str, str]) -> _Entry:
    """Returns an entry that notes, once it is made, what is to be read back for `path`."""

    def make() -> np.ndarray:
        made = entry.make()
        values = torch.from_numpy(np.array(gguf.dequantize(made, entry.kind), np.float32)).reshape(entry.shape)
        digests[path] = digest(values if order is None else values[order.argsort()])
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


def _copy_head(writer: gguf.GGUFWriter, reader: gguf.GGUFReader) -> None:
    own = {"general.architecture", "general.file_type", "general.quantization_version"}
    for key, field in reader.fields.items():
        if key not in own and not key.startswith(("GGUF.", "split.")):
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)


def _describe(writer: gguf.GGUFWriter, config: Any, naming: Naming, name: str) -> None:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        raise LoRAError(
            f"`model` (={name!r}) must have plain rotary positions to be written as GGUF here; its rope_type is "
            f"{quoted(rope['rope_type'])}. Take the Hugging Face folder to llama.cpp's own converter instead."
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(naming.num_heads)
    writer.add_head_count_kv(naming.num_kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
