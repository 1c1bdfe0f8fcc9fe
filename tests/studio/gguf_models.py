"""Tiny models of every family that can be written as GGUF, with random weights and tokenizers of the two kinds."""

from pathlib import Path
from typing import Any

from tests.studio.conftest import ROWS

BYTES = "bytes"
PIECES = "pieces"
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_KV = {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2}
_PARTIAL = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
_LONG |= {"short_factor": [1.0, 1.5, 2.0, 3.0] * 2, "long_factor": [2.0, 3.0, 4.0, 6.0] * 2}
_GEMMA = {"head_dim": 32, "num_key_value_heads": 1}

_SWA = {"query_pre_attn_scalar": 32, "sliding_window": 8}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
_TIMES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.2}
_PARALLEL = {"use_parallel_residual": True}
_ALL_HEADS = {"num_key_value_heads": 4}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama3": ("llama", BYTES, {"rope_parameters": _LLAMA3 | {"original_max_position_embeddings": 32}}),
    "linear": ("llama", PIECES, {"rope_parameters": _LINEAR}),
    "qwen2": ("qwen2", BYTES, {}),
    "qwen3": ("qwen3", BYTES, {"head_dim": 32}),
    "gpt2": ("gpt2", BYTES, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96, "initializer_range": 0.2}),
    "gemma": ("gemma", PIECES, _GEMMA),
    "gemma2": ("gemma2", PIECES, {**_GEMMA, **_SWA}),
    "gemma3": ("gemma3_text", PIECES, {**_GEMMA, **_SWA, "num_hidden_layers": 6}),
    "phi": ("phi", BYTES, {**_ALL_HEADS, "rope_parameters": _PARTIAL}),
    "phi3": ("phi3", PIECES, {}),
    "phi3-long": ("phi3", PIECES, {"rope_parameters": _LONG}),
    "starcoder2": ("starcoder2", BYTES, {}),
    "stablelm": ("stablelm", BYTES, {"rope_parameters": _PARTIAL, "use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", BYTES, {"rope_parameters": _PARTIAL, **_PARALLEL}),
    "olmo2": ("olmo2", BYTES, {}),
    "granite": ("granite", BYTES, _TIMES),
    "smollm3": ("smollm3", BYTES, {"num_hidden_layers": 4}),
    "gpt_neox": ("gpt_neox", BYTES, {**_ALL_HEADS, "rope_parameters": _PARTIAL, **_PARALLEL}),
    "gpt_neox-serial": ("gpt_neox", BYTES, {**_ALL_HEADS, "use_parallel_residual": False}),
}
"""By name: transformers' model_type, the kind of tokenizer, and the settings of a tiny one."""


def make(name: str, folder: Path) -> Path:
    """Writes the model of that name as a Hugging Face folder; every norm and bias has numbers of its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, tokens, settings = MODELS[name]
    tokenizer = of_bytes() if tokens == BYTES else of_pieces(is_spaced=not name.startswith("gemma"))
    settings = settings if kind == "gpt2" else {**_SIZES, **_KV, **settings}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = AutoConfig.for_model(kind, **settings, vocab_size=len(tokenizer) + 3, **ids)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def of_bytes() -> Any:
    """Returns a byte-level tokenizer as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([text for row in ROWS for text in row.values()], trainer)
    names = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def of_pieces(*, is_spaced: bool = True) -> Any:
    """Returns a tokenizer as SentencePiece's become: bytes to fall back on, every pair of parts a merge.

    Args:
        is_spaced: Whether a text begins with a space, as Llama's do and Gemma's do not.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [text.replace(" ", "▁") for row in ROWS for text in row.values()]
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    marks = ["<unk>", "<s>", "</s>"]
    vocab = {p: i for i, p in enumerate([*marks, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces])}
    merges = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if is_spaced else []
    raw.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    raw.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
