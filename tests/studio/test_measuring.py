"""Losses of adapters, measured in a process apart, beside those that `core.evaluate` gives here."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core import Adapter, LoRAConfig, LoRAError, Noted, TrainConfig, evaluate, inject
from studio import data, measuring, models
from studio.measuring import GENERAL_TEXT, Bench, Measured, Measuring, digest, measure

TRAIN = TrainConfig(max_length=96, batch_size=4, device="cpu", precision="fp32", steps=1, warmup_steps=0)


@pytest.fixture
def bench(tiny_folder, tiny_data) -> Bench:
    return Bench(str(tiny_folder), tiny_data, TRAIN)


@pytest.fixture
def adapter(tiny_folder, workspace) -> Adapter:
    model = models.load_model(str(tiny_folder), workspace)
    inject(model, LoRAConfig(r=2))
    found = Adapter.from_model(model)
    torch.manual_seed(1)
    return found_with(found, lambda f: replace(f, B=torch.randn_like(f.B) * 0.2))


def found_with(adapter: Adapter, change) -> Adapter:
    return replace(adapter, factors={path: change(f) for path, f in adapter.factors.items()})


def results(measuring) -> dict[str, Measured]:
    return {m.name: m for m in measuring if isinstance(m, Measured)}


def test_the_losses_are_those_of_the_model_on_the_held_out_rows(bench, adapter, workspace):
    found = results(Measuring(workspace, bench, {"all of it": adapter, "none": None}))
    model = models.load_model(bench.model, workspace)
    tokenizer = models.load_tokenizer(bench.model, workspace)
    rows = data.prepare(bench.data, tokenizer, workspace=workspace, max_length=96, seed=0).evaluation
    batches = list(data.eval_batches(rows, 4, tokenizer.pad_token_id))
    assert found["none"].task_loss == pytest.approx(evaluate(model, batches).loss, rel=1e-6)
    adapter.apply(model)
    assert found["all of it"].task_loss == pytest.approx(evaluate(model, batches).loss, rel=1e-6)
    assert found["all of it"].task_loss != pytest.approx(found["none"].task_loss, rel=1e-3)
    ids = [tokenizer(text)["input_ids"][:96] for text in GENERAL_TEXT.read_text().strip().split("\n\n")]
    alone = [evaluate(model, [{"input_ids": i, "attention_mask": i**0, "labels": i}]) for i in map(row, ids)]
    total = sum(e.loss * e.num_trained_tokens for e in alone)
    assert found["all of it"].num_general_tokens == sum(e.num_trained_tokens for e in alone)
    assert found["all of it"].general_loss == pytest.approx(total / found["all of it"].num_general_tokens, rel=1e-5)
    assert found["none"].num_rows == len(rows)


def row(ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids])


def test_what_was_measured_is_not_measured_again_unless_its_file_is_damaged(bench, adapter, workspace):
    first = results(Measuring(workspace, bench, {"a": adapter}))
    assert not list(workspace.cache.glob("measuring-*"))
    again = Measuring(workspace, bench, {"another name": adapter, "base": None})
    assert next(again) == replace(first["a"], name="another name")
    assert next(again) == Noted("Reading the data")  # of the base, which is left
    again.close()
    (file,) = workspace.cache.glob("measured/*/*.json")
    assert list(Measuring(workspace, bench, {"a": adapter})) == [first["a"]]
    file.write_text("{")
    damaged = Measuring(workspace, bench, {"a": adapter})
    assert next(damaged) == Noted("Reading the data")
    damaged.close()
    with pytest.raises(LoRAError, match="The measuring was cancelled"):
        list(damaged)


def test_the_base_comes_back_after_an_adapter_bit_for_bit(bench, adapter, workspace, tmp_path):
    adapter.save(tmp_path / "adapter")
    found = [
        m
        for m in measure(workspace, bench, {"before": None, "a": tmp_path / "adapter", "after": None})
        if isinstance(m, Measured)
    ]
    assert replace(found[0], name="after") == found[2] != replace(found[1], name="after")


def test_without_rows_general_text_alone_is_measured(bench, workspace):
    (found,) = results(measure(workspace, replace(bench, data=None), {"base": None})).values()
    assert found.task_loss is None and found.num_rows == 0 and found.general_loss > 0


def test_of_many_held_out_rows_some_are_taken_evenly(bench, workspace, monkeypatch):
    monkeypatch.setattr(measuring, "MOST_ROWS", 1)
    (found,) = results(measure(workspace, bench, {"base": None})).values()
    assert found.num_rows == 1


def test_it_says_in_a_sentence_what_is_wrong(bench, adapter, workspace):
    wrong = found_with(adapter, lambda f: replace(f, A=f.A[:, :5]))
    with pytest.raises(LoRAError, match="The adapter .* must fit the model"):
        list(Measuring(workspace, bench, {"wrong": wrong}))


def test_an_adapter_s_digest_is_of_its_content(adapter):
    same = found_with(adapter, lambda f: replace(f, A=f.A.clone()))
    assert digest(adapter) == digest(same) != digest(None)
    for change in (lambda f: replace(f, scaling=2 * f.scaling), lambda f: replace(f, B=f.B + 1e-6)):
        assert digest(found_with(adapter, change)) != digest(adapter)
    extra = replace(adapter, trained_in_full={"lm_head.bias": torch.zeros(3)})
    assert digest(extra) != digest(adapter)


def test_what_rows_are_measured_on_is_told_apart(bench, workspace, tmp_path):
    known = bench.digest(workspace)
    assert replace(bench, train=replace(TRAIN, steps=7, learning_rate=0.5)).digest(workspace) == known
    assert replace(bench, train=replace(TRAIN, max_length=64)).digest(workspace) != known
    assert replace(bench, data=None).digest(workspace) != known
    rows = Path(workspace.uploads / "rows.jsonl")
    uploaded = replace(bench, data=replace(bench.data, source=rows.name))
    rows.write_text("{}\n")
    before = uploaded.digest(workspace)
    rows.write_text("{}\n{}\n")
    assert uploaded.digest(workspace) != before
