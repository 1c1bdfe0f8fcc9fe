"""Tiny models of the families that people adapt, made from their configurations; nothing is read from disk."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

D, FF, VOCABULARY, LAYERS, HEADS, LABELS, EXPERTS = 32, 48, 64, 2, 4, 3, 3
KV = 16
"""Rows of key and value where two heads share one of each."""

Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Family:
    """A model, and what is true of its matrices by the paper design of the family.

    Attributes:
        make: Returns the model, with random weights.
        stacks: The names of its stacks of layers; each has `LAYERS`.
        layer: The linear matrices of one layer by the names that people use: name → (out, in).
        beside: Those that stand in no layer, but for the output head.
        slices: Of one layer's fused projections: name → (out, in).
        experts: Of one layer's stacks of experts, which lie in one parameter each: name → (out, in).
        inputs: What `forward` is called with.
        query_and_value: `target_modules` for the paper's choice.
        head: The classifier, which is trained in full as in the paper, or nothing.
    """

    make: Callable[[], nn.Module]
    stacks: tuple[str, ...]
    layer: Shapes
    query_and_value: tuple[str, ...]
    beside: Shapes = field(default_factory=dict)
    slices: Shapes = field(default_factory=dict)
    experts: Shapes = field(default_factory=dict)
    head: tuple[str, ...] = ()
    inputs: Callable[[], dict[str, Tensor]] = field(default=lambda: {"input_ids": tokens()})

    def everywhere(self, shapes: Shapes) -> Shapes:
        """The shapes of one layer as full paths over all layers."""
        return {
            f"{stack}.{layer}.{name}": shape
            for stack in self.stacks
            for layer in range(LAYERS)
            for name, shape in shapes.items()
        }


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def decoder(name: str, **changes: Any) -> Callable[[], nn.Module]:

    sizes = {"vocab_size": VOCABULARY, "hidden_size": D, "intermediate_size": FF, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    return _with_its_own(name, kind, {**sizes, **heads, **special, **changes})


def encoder(name: str, **changes: Any) -> Callable[[], nn.Module]:

    sizes = {"hidden_size": D, "intermediate_size": FF, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    rest = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": LABELS}
    return _with_its_own(name, f"{name}ForSequenceClassification", {**sizes, **rest, **changes})


def _with_its_own(name: str, kind: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    """Returns what makes models that share no configuration: how one is prepared to train is written into its own."""
    import transformers

    return lambda: getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**settings))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": VOCABULARY, "d_model": D, "d_kv": 8, "d_ff": FF, "num_layers": LAYERS, "num_heads": HEADS}
    return T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": D, "intermediate_size": FF, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=LABELS))


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def below(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


SQUARE, WIDEN, NARROW = (D, D), (FF, D), (D, FF)
THIRDS = {"q": SQUARE, "k": SQUARE, "v": SQUARE}
LLAMA = below("self_attn", {"q_proj": SQUARE, "k_proj": (KV, D), "v_proj": (KV, D), "o_proj": SQUARE}) | below(
    "mlp", {"gate_proj": WIDEN, "up_proj": WIDEN, "down_proj": NARROW}
)
BERT = below("attention.self", {"query": SQUARE, "key": SQUARE, "value": SQUARE}) | {
    "attention.output.dense": SQUARE,
    "intermediate.dense": WIDEN,
    "output.dense": NARROW,
}
NEOX_MLP = below("mlp", {"dense_h_to_4h": WIDEN, "dense_4h_to_h": NARROW})


def llama_like(name: str, **changes: Any) -> Family:
    return Family(decoder(name, **changes), ("model.layers",), LLAMA, ("q_proj", "v_proj"))


def mixture(name: str, **changes: Any) -> Family:
    shapes = {"gate_up_proj": (2 * FF, D), "down_proj": NARROW}
    experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return Family(
        decoder(name, **experts, **changes),
        ("model.layers",),
        {name: shape for name, shape in LLAMA.items() if "self_attn" in name},
        ("q_proj", "v_proj"),
        experts={f"mlp.experts.{name}.{index}": shapes[name] for name in shapes for index in range(EXPERTS)},
    )


def falcon(num_rows: int, slices: Shapes, **changes: Any) -> Family:
    return Family(
        decoder("Falcon", ffn_hidden_size=FF, **changes),
        ("transformer.h",),
        {"self_attention.query_key_value": (num_rows, D), "self_attention.dense": SQUARE} | NEOX_MLP,
        ("query_key_value.q", "query_key_value.v"),
        slices=below("self_attention.query_key_value", slices),
    )


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        decoder("GPT2", n_embd=D, n_inner=FF, n_layer=LAYERS, n_head=HEADS, n_positions=64),
        ("transformer.h",),
        {"attn.c_attn": (3 * D, D), "attn.c_proj": SQUARE, "mlp.c_fc": WIDEN, "mlp.c_proj": NARROW},
        ("c_attn.q", "c_attn.v"),
        slices=below("attn.c_attn", THIRDS),
    ),
    "llama": llama_like("Llama"),
    "mistral": llama_like("Mistral"),
    "qwen2": llama_like("Qwen2"),
    "qwen3": llama_like("Qwen3", head_dim=D // HEADS),
    "gemma": llama_like("Gemma", head_dim=D // HEADS),
    "phi3": Family(
        decoder("Phi3"),
        ("model.layers",),
        {
            "self_attn.qkv_proj": (D + 2 * KV, D),
            "self_attn.o_proj": SQUARE,
            "mlp.gate_up_proj": (2 * FF, D),
            "mlp.down_proj": NARROW,
        },
        ("qkv_proj.q", "qkv_proj.v"),
        slices=below("self_attn.qkv_proj", {"q": SQUARE, "k": (KV, D), "v": (KV, D)})
        | below("mlp.gate_up_proj", {"gate": WIDEN, "up": WIDEN}),
    ),
    "gpt_neox": Family(
        decoder("GPTNeoX"),
        ("gpt_neox.layers",),
        {"attention.query_key_value": (3 * D, D), "attention.dense": SQUARE} | NEOX_MLP,
        ("query_key_value.q", "query_key_value.v"),
        slices=below("attention.query_key_value", THIRDS),
    ),
    "opt": Family(
        decoder("OPT", ffn_dim=FF, word_embed_proj_dim=D),
        ("model.decoder.layers",),
        below("self_attn", dict.fromkeys(("k_proj", "v_proj", "q_proj", "out_proj"), SQUARE))
        | {"fc1": WIDEN, "fc2": NARROW},
        ("q_proj", "v_proj"),
    ),
    "bloom": Family(
        decoder("Bloom", n_head=HEADS, n_layer=LAYERS),
        ("transformer.h",),
        {"self_attention.query_key_value": (3 * D, D), "self_attention.dense": SQUARE}
        | below("mlp", {"dense_h_to_4h": (4 * D, D), "dense_4h_to_h": (D, 4 * D)}),
        ("query_key_value.q", "query_key_value.v"),
        slices=below("self_attention.query_key_value", THIRDS),
    ),
    "falcon": falcon(3 * D, THIRDS, multi_query=False, new_decoder_architecture=False),
    "falcon, one key for all heads": falcon(D + 16, {"q": SQUARE, "k": (8, D), "v": (8, D)}, multi_query=True),
    "falcon, a key for each group": falcon(
        D + 2 * KV, {"q": SQUARE, "k": (KV, D), "v": (KV, D)}, new_decoder_architecture=True, num_kv_heads=2
    ),
    "mixtral": mixture("Mixtral"),
    "gpt_oss": mixture("GptOss", head_dim=D // HEADS),  # its matrices lie as (in, out)
    "t5": Family(
        t5,
        ("encoder.block", "decoder.block"),
        below("layer.0.SelfAttention", dict.fromkeys("qkvo", SQUARE)),
        ("q", "v"),
        beside={
            f"{stack}.block.{layer}.layer.{name}": shape
            for layer in range(LAYERS)
            for stack, name, shape in [
                *(("decoder", f"1.EncDecAttention.{one}", SQUARE) for one in "qkvo"),
                ("encoder", "1.DenseReluDense.wi", WIDEN),
                ("encoder", "1.DenseReluDense.wo", NARROW),
                ("decoder", "2.DenseReluDense.wi", WIDEN),
                ("decoder", "2.DenseReluDense.wo", NARROW),
            ]
        },
        inputs=lambda: {"input_ids": tokens(), "decoder_input_ids": tokens()},
    ),
    "bert": Family(
        encoder("Bert"),
        ("bert.encoder.layer",),
        BERT,
        ("query", "value"),
        beside={"bert.pooler.dense": SQUARE},
        head=("classifier",),
    ),
    "roberta": Family(
        encoder("Roberta"),
        ("roberta.encoder.layer",),
        BERT,
        ("query", "value"),
        head=("classifier",),
    ),
    "deberta_v2": Family(
        encoder("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
        ("deberta.encoder.layer",),
        below("attention.self", {f"{name}_proj": SQUARE for name in ("query", "key", "value", "pos_key", "pos_query")})
        | {"attention.output.dense": SQUARE, "intermediate.dense": WIDEN, "output.dense": NARROW},
        ("query_proj", "value_proj"),
        beside={"pooler.dense": SQUARE},
        head=("classifier",),
    ),
    "modernbert": Family(
        encoder("ModernBert"),
        ("model.layers",),
        {"attn.Wqkv": (3 * D, D), "attn.Wo": SQUARE, "mlp.Wi": (2 * FF, D), "mlp.Wo": NARROW},
        ("Wqkv.q", "Wqkv.v"),
        beside={"head.dense": SQUARE},
        head=("classifier",),
        slices=below("attn.Wqkv", THIRDS) | below("mlp.Wi", {"input": WIDEN, "gate": WIDEN}),
    ),
    "vit": Family(
        vit,
        ("vit.layers",),
        below("attention", dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), SQUARE))
        | below("mlp", {"fc1": WIDEN, "fc2": NARROW}),
        ("q_proj", "v_proj"),
        head=("classifier",),
        inputs=image,
    ),
}
