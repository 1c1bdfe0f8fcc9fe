"""Tiny models with heads for labels, saved as folders, and rows for them."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

TEXTS = [f"the {thing} is {how}" for thing in ("soup", "room", "bill", "view") for how in ("good", "bad", "fine")]
ROWS = [
    {
        "sentence1": text,
        "sentence2": f"it is {text.split()[-1]}" if i % 3 else "",
        "label": "no" if "bad" in text else "yes",
    }
    for i, text in enumerate(TEXTS * 4)
]
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def wordpiece() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of BERT's form: [CLS] first [SEP] second [SEP], with token types."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = sorted({word for text in TEXTS for word in text.split()} | {"it"})
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*marks, *words])}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=inputs, **names)


def save_encoder(folder: Path, kind: type = transformers.BertModel, **changes: Any) -> Path:
    """Saves an encoder with random weights and its tokenizer."""
    tokenizer = wordpiece()
    values = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 40, "initializer_range": 0.2} | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(kind.config_class(pad_token_id=0, **values))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
