"""Model families as llama.cpp has them: names of tensors, how their entries lie, and what the head must say.

What a family needs is llama.cpp's (its conversion/*.py and the models of libllama). llama.cpp computes some things in
one way only, an activation or every how many layers a window lies: a model that has another is refused.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import gguf
import torch
from torch import Tensor

from core import LoRAError, quoted

Want = tuple[str, Any, Any]
"""A setting: what it is called, what it is, and the only value that llama.cpp computes with."""

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""What stands in a file beside a model's parameters: how its rotary positions are stretched."""


def _nothing(*_: Any) -> tuple[()]:
    return ()


@dataclass(frozen=True)
class Family:
    """What is particular to the models of one kind.

    Attributes:
        arch: llama.cpp's name for it.
        activation: The one that it computes, in transformers' words for it.
        is_turned: Whether a query's and a key's rows stand in another order: llama.cpp turns neighbouring entries by
            one angle, where Hugging Face's layout turns the two halves.
        is_shifted: Whether its norms are kept with the 1 that transformers adds to them.
        is_by_heads: Whether transformers keeps each head's query, key and value together, where llama.cpp keeps all
            queries, all keys, all values.
        is_transposed: Whether its layers are transformers' Conv1D, whose weights lie as (in, out).
        is_headless: Whether it takes no head of its own, only the embedding.
        is_read_by_transformers: Whether transformers' own reader of GGUF restores it, if its positions are plain.
        ropes: The kinds of rotary positions that can be written.
        wants: Settings that must be one value.
        describe: Writes what only this family's head has.
    """

    arch: str
    activation: tuple[str, ...] = ("silu",)
    is_turned: bool = False
    is_shifted: bool = False
    is_by_heads: bool = False
    is_transposed: bool = False
    is_headless: bool = False
    is_read_by_transformers: bool = False
    ropes: tuple[str, ...] = ("default", "linear")
    wants: Callable[[Any], Iterable[Want]] = _nothing
    describe: Callable[[gguf.GGUFWriter, Any], object] = _nothing


@dataclass(frozen=True)
class Naming:
    """How llama.cpp calls the tensors of one model, and how their entries lie.

    Attributes:
        family: What is particular to the model's family.
        table: From paths to llama.cpp's names.
        num_heads: Of the queries; num_kv_heads: of the keys.
        tied: Whether the embedding is the head, too.
        is_read_by_transformers: Whether transformers' own reader of GGUF restores all that matters.
    """

    family: Family
    table: gguf.TensorNameMap
    num_heads: int
    num_kv_heads: int
    tied: bool
    is_read_by_transformers: bool

    @classmethod
    def of(cls, config: Any) -> Self:
        """Returns the naming for a model with this config.

        Raises:
            LoRAError: Its family is none that is known to work, or has settings that llama.cpp does not compute with.
        """
        called = config.model_type
        if called not in FAMILIES:
            raise LoRAError(
                f"`model` (a {quoted(called)}) must be of a family that can be written as GGUF here: "
                f"{', '.join(FAMILIES)}. Take the Hugging Face folder to llama.cpp's own converter instead."
            )
        family = FAMILIES[called]
        _check(family, config)
        number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
        table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        by_transformers = family.is_read_by_transformers and _rope_type(config) == "default"
        return cls(family, table, heads, kv_heads, bool(config.tie_word_embeddings), by_transformers)

    def name(self, path: str) -> str:
        """Returns llama.cpp's name, without ".weight".

        Raises:
            LoRAError: It has none.
        """
        found = self.table.get_name(path)
        if found is None:
            raise LoRAError(
                f"`{path}` must have a name in GGUF to be written; llama.cpp knows none for {self.family.arch}."
            )
        return found

    def order(self, name: str, num_rows: int) -> Tensor | None:
        """Returns (num_rows) int64: which output feature comes at each place in the file; None for the model's order.

        Args:
            name: As of `name`.
            num_rows: Output features of the matrix.
        """
        part = name.rpartition(".")[2]
        if self.family.is_by_heads and part == "attn_qkv":
            return torch.arange(num_rows).reshape(self.num_heads, 3, -1).transpose(0, 1).reshape(-1)
        heads = {"attn_q": self.num_heads, "attn_k": self.num_kv_heads}.get(part)
        if not self.family.is_turned or heads is None:
            return None
        return torch.arange(num_rows).reshape(heads, 2, num_rows // heads // 2).transpose(1, 2).reshape(-1)

    def stored(self, name: str, value: Tensor) -> Tensor:
        """Returns a parameter as it lies in the file; `name` is its module's."""
        if self._is_transposed(name, value):
            value = value.T
        if self._is_shifted(name):
            value = value.float() + 1
        order = self.order(name, len(value))
        return value if order is None else value[order]

    def restored(self, name: str, value: Tensor) -> Tensor:
        """Returns a parameter as it lies in the model, from what `stored` gave."""
        order = self.order(name, len(value))
        value = value if order is None else value[order.argsort()]
        if self._is_shifted(name):
            value = value - 1
        return value.T if self._is_transposed(name, value) else value

    def _is_shifted(self, name: str) -> bool:
        return self.family.is_shifted and name.endswith("norm")

    def _is_transposed(self, name: str, value: Tensor) -> bool:
        return self.family.is_transposed and value.dim() == 2 and name.startswith("blk.")


def describe(writer: gguf.GGUFWriter, config: Any, family: Family, name: str) -> None:
    """Writes the settings of a model into the head of its file."""
    heads = config.num_attention_heads
    head_dim = _head_dim(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    inner = _first(config, "intermediate_size", "n_inner") or 4 * config.hidden_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if (eps := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(eps)
    else:
        writer.add_layer_norm_eps(_first(config, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"))
    if rope := _rope(config):
        writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
        writer.add_rope_dimension_count(_rotary_dim(config))
        if rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
    writer.add_vocab_size(config.vocab_size)
    family.describe(writer, config)


def rope_tensors(model: Any) -> dict[str, Tensor]:
    """Returns the tensors of `ROPE_TENSORS` that a model needs, by name; float32, (rotary dim / 2) each."""
    config = model.config
    rope, kind = _rope(config), _rope_type(config)
    if kind == "longrope":
        return {f"rope_factors_{of}.weight": torch.tensor(rope[f"{of}_factor"]).float() for of in ("long", "short")}
    if kind != "llama3":
        return {}
    scaled = next(buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    num = _rotary_dim(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, num, 2).float() / num)
    return {"rope_freqs.weight": plain / scaled.float().cpu()}


def _check(family: Family, config: Any) -> None:
    found = _first(config, "hidden_activation", "hidden_act", "activation_function")
    wants: list[Want] = [] if found in family.activation else [("the activation", found, family.activation[0])]
    kind = _rope_type(config)
    wants += [] if kind in family.ropes else [("rope_type", kind, " or ".join(family.ropes))]
    if family.is_headless:
        wants.append(("tie_word_embeddings", config.tie_word_embeddings, True))
    wants += family.wants(config)
    wrong = [f"{name} is {quoted(found)}, not {needed}" for name, found, needed in wants if found != needed]
    if wrong:
        raise LoRAError(
            f"`model` (a {quoted(config.model_type)}) must be computed by llama.cpp as transformers computes it to be "
            f"written as GGUF; it is not: {'; '.join(wrong)}. Export the adapter or the merged Hugging Face folder."
        )


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: Any) -> dict[str, Any]:
    """Returns how positions turn, of layers without a window where there are several kinds; {} where none turn."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rope.get("full_attention", rope))


def _rope_type(config: Any) -> str:
    return _rope(config).get("rope_type", "default")


def _rotary_dim(config: Any) -> int:
    share = _rope(config).get("partial_rotary_factor") or _first(config, "partial_rotary_factor", "rotary_pct") or 1.0
    return int(_head_dim(config) * share)


def _no_window(config: Any) -> Iterator[Want]:
    yield "use_sliding_window", bool(getattr(config, "use_sliding_window", False)), False


def _gpt2_wants(config: Any) -> Iterator[Want]:
    yield "scale_attn_weights", config.scale_attn_weights, True
    yield "scale_attn_by_inverse_layer_idx", config.scale_attn_by_inverse_layer_idx, False
    yield "add_cross_attention", config.add_cross_attention, False


def _gemma_wants(every: int, largest: int) -> Callable[[Any], Iterator[Want]]:
    """Returns the wants of a Gemma with windows in all layers but each `every`-th; `largest` is a model's depth."""

    def wants(config: Any) -> Iterator[Want]:
        num = config.num_hidden_layers
        kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(num)]
        yield "layer_types", list(config.layer_types), kinds
        # llama.cpp tells the largest model by its depth.
        scalar = config.hidden_size // config.num_attention_heads if num == largest else _head_dim(config)
        yield "query_pre_attn_scalar", config.query_pre_attn_scalar, scalar

    return wants


def _gemma2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma2_wants(config: Any) -> Iterator[Want]:
    yield from _gemma_wants(2, 46)(config)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        yield f"{name} (whether there is one)", bool(getattr(config, name)), True


def _gemma3(writer: gguf.GGUFWriter, config: Any) -> None:
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma3_wants(config: Any) -> Iterator[Want]:
    yield from _gemma_wants(6, 62)(config)
    yield "attn_logit_softcapping", config.attn_logit_softcapping, None
    yield "use_bidirectional_attention", bool(getattr(config, "use_bidirectional_attention", False)), False
    windowed = config.rope_parameters["sliding_attention"]
    yield "rope_theta of layers with a window", float(windowed["rope_theta"]), 10_000.0
    yield "rope_type of layers with a window", windowed.get("rope_type", "default"), "default"


def _phi3(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = _rope(config)
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_sliding_window(config.sliding_window or 0)  # 0 tells Phi-4 from others
    if rope.get("rope_type") == "longrope":
        stretch = config.max_position_embeddings / original
        factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or factor)


def _granite(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _granite_wants(config: Any) -> Iterator[Want]:
    yield "head_dim", _head_dim(config), config.hidden_size // config.num_attention_heads
    yield "attention_bias", config.attention_bias, False
    yield "mlp_bias", config.mlp_bias, False


def _smollm3_wants(config: Any) -> Iterator[Want]:
    yield from _no_window(config)
    turned = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    yield "no_rope_layers", list(config.no_rope_layers), turned


def _neox(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_parallel_residual(config.use_parallel_residual)


_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_LLAMA = {"is_turned": True, "ropes": ("default", "linear", "llama3"), "is_read_by_transformers": True}
_GEMMA = {"activation": _GELU_TANH, "is_shifted": True, "is_headless": True}

FAMILIES = {
    "llama": Family("llama", **_LLAMA),
    "mistral": Family("llama", **_LLAMA),
    "qwen2": Family("qwen2", wants=_no_window, is_read_by_transformers=True),
    "qwen3": Family("qwen3", wants=_no_window, is_read_by_transformers=True),
    "gpt2": Family("gpt2", _GELU_TANH, is_transposed=True, wants=_gpt2_wants),
    "gemma": Family("gemma", **_GEMMA),
    "gemma2": Family("gemma2", **_GEMMA, wants=_gemma2_wants, describe=_gemma2),
    "gemma3_text": Family("gemma3", **_GEMMA, wants=_gemma3_wants, describe=_gemma3),
    "phi": Family("phi2", _GELU_TANH, wants=lambda c: [("qk_layernorm", c.qk_layernorm, False)]),
    "phi3": Family("phi3", ropes=("default", "longrope"), describe=_phi3),
    "starcoder2": Family("starcoder2", _GELU_TANH, wants=lambda c: [("use_bias", c.use_bias, True)]),
    "stablelm": Family("stablelm", wants=lambda c: [("qk_layernorm", c.qk_layernorm, False)], describe=_neox),
    "olmo2": Family("olmo2"),
    "granite": Family("granite", is_turned=True, wants=_granite_wants, describe=_granite),
    "smollm3": Family("smollm3", is_turned=True, wants=_smollm3_wants),
    "gpt_neox": Family(
        "gptneox",
        ("gelu", *_GELU_TANH),
        is_by_heads=True,
        wants=lambda c: [("attention_bias", c.attention_bias, True)],
        describe=_neox,
    ),
}
"""By transformers' model_type. GELU is llama.cpp's approximation with tanh; GPT-NeoX's exact one differs by 1e-3."""
