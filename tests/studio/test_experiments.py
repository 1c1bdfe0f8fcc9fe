"""The paper's experiments: pieces that are kept, what is told of them, and the process that does them."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from core import Evaluated
from studio.experiments.base import Asked
from studio.experiments.registry import EXPERIMENTS
from tests.studio import labelled_models

Record = dict[str, Any]


def evaluated(step: int, loss: float, **metrics: float) -> Evaluated:
    return Evaluated(step, loss, 100, metrics=metrics)


def loss_record(loss: float, **more: Any) -> Record:
    return {"r": 4, "loss": loss, "last_loss": loss, "trainable": 1000, "seconds": 1.0, "memory": 1e9, **more}


def similarity(one: float, q: float, v: float) -> Record:
    def panels(value: float) -> dict[str, list[list[float]]]:
        return {name: np.full((2, 3), value).tolist() for name in ("trained", "step 0", "chance")}

    def kind(seeds: float) -> Record:
        return {"path": "layers.1.q_proj", "ranks": panels(one), "seeds": panels(seeds), "first": [0.1, 0.2]}

    return {"q_proj": kind(q), "v_proj": kind(v)}


def table_7(enrichment: float) -> Record:
    def column(value: float) -> Record:
        named = {"projected": 0.3, "factor": 2.0, "delta": 0.6, "weight": 9.0, "null_factor": 3.0}
        return named | {"enrichment": value}

    layer = {"delta": column(enrichment), "weight": column(9.0), "random": column(1.0)}
    layers = {"layers.0.q_proj": {}, "layers.1.q_proj": layer, "layers.2.q_proj": layer}
    middles = {f"middle {r}": "layers.1.q_proj" for r in (4, 64)}
    return {"4": layers, "64": layers, **middles}


def latency(merged: float) -> Record:
    over = {"base": 0.0, "LoRA merged": merged, "LoRA unmerged": 0.2, "Adapter_L": 0.05, "Adapter_H": 0.1}
    return {"ms": dict.fromkeys(over, 12.0), "over": over}


COST = {"parameters": 1e8, "trained": 300_000, "adapter_bytes": 1_200_000, "lora_bytes": 2e9, "full_bytes": 6e9}
COST |= {"weight_bytes": 4e8}
SCORES = {"NIST": 5.0, "METEOR": 0.4, "ROUGE-L": 0.6, "CIDEr": 2.0}

Make = Callable[[str], Record]
CASES: Mapping[str, tuple[tuple[Make, str], tuple[Make, str]]] = {
    "labels": (
        (lambda key: loss_record(1.0, accuracy=0.9 if "LoRA" in key else 0.5), r"LoRA is \+40.0 .*, as in the paper"),
        (lambda key: loss_record(1.0, accuracy=0.1 if "LoRA" in key else 0.5), "LoRA is -40.0 .*; in the paper's mean"),
    ),
    "data-to-text": (
        (lambda key: loss_record(1.0, BLEU=0.6 if key == "LoRA" else 0.3, **SCORES), "LoRA, 60.0, as in the paper"),
        (lambda key: loss_record(1.0, BLEU=0.6 if key == "PreLayer" else 0.3, **SCORES), "60.0; the paper's is LoRA's"),
    ),
    "matrices": (
        (
            lambda key: loss_record({"q, v": 1.0, "q": 2.0, "k": 2.1}.get(key.split(" ·")[0], 1.5)),
            r"W_q, v, as in the paper.*W_q \(2.0000\) and W_k \(2.1000\), as in the paper",
        ),
        (
            lambda key: loss_record({"q": 1.0, "k": 1.1}.get(key.split(" ·")[0], 1.5)),
            "Lowest loss: W_q; the paper's best.*; on the paper's WikiSQL they are W_q and W_k",
        ),
    ),
    "ranks": (
        (lambda key: loss_record(2 - int(key.rpartition(" ")[2]) / 64), "the loss changes by -0.9844"),
        (lambda key: loss_record(2 + int(key.rpartition(" ")[2]) / 64), r"the loss changes by \+0.9844"),
    ),
    "subspaces": (
        (lambda key: similarity(0.7, 0.6, 0.5), "= 0.70, as in the paper.*W_q's more, as in the paper"),
        (lambda key: similarity(0.2, 0.4, 0.5), "= 0.20; the paper has.*; the paper finds more in W_q"),
    ),
    "amplification": (
        (lambda key: table_7(2.0), "more of W than random ones in 2 of 2 layers, at the median 2.00"),
        (lambda key: table_7(0.5), "more of W than random ones in 0 of 2 layers, at the median 0.50"),
    ),
    "latency": (
        (lambda key: latency(0.01), "within 1.0% of the base's, as in the paper"),
        (lambda key: latency(-0.2), "within 20.0% of the base's; it is the same matrices"),
    ),
    "low-data": (
        (lambda key: loss_record(1.0 if "LoRA" in key else 2.0), "LoRA is ahead of both"),
        (lambda key: loss_record(2.0 if "LoRA" in key else 1.0), "LoRA is not ahead of both"),
    ),
    "costs": (
        (lambda key: COST, "6.0 GB in full and 2.0 GB with LoRA.*667 times smaller"),
        (lambda key: COST | {"full_bytes": 3e9}, "3.0 GB in full and 2.0 GB with LoRA"),
    ),
}
"""Experiment → what its pieces find, and what is then said, when the paper is right and when it is not."""


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    return labelled_models.save_encoder(tmp_path_factory.mktemp("encoder"), max_position_embeddings=130)


@pytest.fixture
def ask(tiny_folder, encoder_folder) -> Callable[..., Asked]:
    """ask(name, size): an experiment with a tiny model."""

    def of(name: str, size: str = "small") -> Asked:
        models = {"labels": str(encoder_folder), "latency": "", "costs": ""}
        return Asked(name, size, models.get(name, str(tiny_folder)))  # type: ignore[arg-type]

    return of


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_told_follows_the_numbers_whichever_way_they_fall(name, workspace, ask):
    asked = ask(name)
    keys = [piece.key for piece in EXPERIMENTS[name].pieces(asked, workspace)]
    for make, wanted in CASES[name]:
        result = EXPERIMENTS[name].tell(asked, {key: make(key) for key in keys})
        assert re.search(wanted, " ".join(result.findings)), result.findings


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_can_be_told_and_drawn_with_nothing_with_some_and_with_all_pieces_done(name, workspace, ask):
    asked = ask(name)
    keys = [piece.key for piece in EXPERIMENTS[name].pieces(asked, workspace)]
    assert len(set(keys)) == len(keys)
    for done in (0, 1, len(keys)):
        result = EXPERIMENTS[name].tell(asked, {key: CASES[name][0][0](key) for key in keys[:done]})
        for table in result.tables:
            assert {len(row) for row in table.rows} <= {len(table.head)}
        assert done or result.figure is None
        if done == len(keys):
            assert result.figure is not None
            assert result.figure().get_size_inches()[0] > 1
