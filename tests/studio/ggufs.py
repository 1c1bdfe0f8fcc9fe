"""A tiny model as a GGUF file."""

from pathlib import Path

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode


def write_gguf(file: Path, seed: int = 0, **extra) -> Path:
    """A whole GGUF file of 2 tiny Llama layers with a byte-level tokenizer, Q8_0 where rows are long enough."""
    rng = np.random.default_rng(seed)
    width, inner, kv = 64, 96, 32
    alphabet = sorted(bytes_to_unicode().values())
    tokens = [*alphabet, "he", "<|end|>"]
    writer = gguf.GGUFWriter(file, "llama")
    for add, value in (
        (writer.add_name, "tiny"),
        (writer.add_license, "mit"),
        (writer.add_block_count, 2),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, width),
        (writer.add_feed_forward_length, inner),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_rope_dimension_count, 16),
        (writer.add_vocab_size, len(tokens)),
        (writer.add_file_type, gguf.LlamaFileType.MOSTLY_Q8_0),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, tokens),
        (writer.add_token_types, [1] * (len(tokens) - 1) + [3]),
        (writer.add_token_merges, ["h e"]),
        (writer.add_bos_token_id, len(tokens) - 1),
        (writer.add_eos_token_id, len(tokens) - 1),
    ):
        add(value)
    for key, value in extra.items():
        writer.add_uint16(key.replace("__", "."), value)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{n}": (width,) for n in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{n}": (width, width) for n in ("attn_q", "attn_output")}
        shapes |= {f"blk.{i}.{n}": (kv, width) for n in ("attn_k", "attn_v")}
        shapes |= {f"blk.{i}.{n}": (inner, width) for n in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (width, inner)}
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
