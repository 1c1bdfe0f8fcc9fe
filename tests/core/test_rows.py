"""Training on one label a row: transformers' own losses are the oracle."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from core import (
    Checkpoint,
    Evaluated,
    Finished,
    LoRAConfig,
    RowLabels,
    Step,
    TrainConfig,
    World,
    evaluate,
    forecast_memory,
    from_record,
    inject,
    to_record,
    train,
)
from core.rows import row_losses
from core.train import _own

HEADS = {"bert": ("classifier",), "llama": ("score",)}


def classifier(name: str, num_labels: int = 3, **changes: object) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    values = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_labels": num_labels, "pad_token_id": 0, "initializer_range": 0.2}
    kinds = {
        "bert": (BertForSequenceClassification, BertConfig),
        "llama": (LlamaForSequenceClassification, LlamaConfig),
    }
    model, config = kinds[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(config(**(values | changes))).eval()


def batch_of(seed: int, num_labels: int, num_rows: int = 4) -> dict[str, Tensor]:
    """Rows of 3 to 9 tokens, padded at the right with id 0."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (num_rows, 1), generator=draw)
    mask = (torch.arange(9)[None] < lengths).long()
    ids = torch.randint(1, 64, (num_rows, 9), generator=draw) * mask
    is_number = num_labels == 1
    labels = torch.randn(num_rows, generator=draw) if is_number else torch.randint(num_labels, (num_rows,))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    return {"accuracy": float((logits.argmax(1) == labels).float().mean())}


@pytest.mark.parametrize("num_labels", [3, 1])
@pytest.mark.parametrize("name", HEADS)
def test_steps_follow_transformers_own_loss_and_torch_s_own_optimizer(name: str, num_labels: int):
    config = TrainConfig(steps=3, learning_rate=1e-2, warmup_steps=0, schedule="constant", clip_norm=0.0)
    lora = LoRAConfig(r=2, modules_to_save=HEADS[name])
    batches = [batch_of(seed, num_labels) for seed in range(3)]
    ours, theirs = (
        classifier(name, num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) for _ in "ab"
    )
    inject(ours, lora)
    inject(theirs, lora)
    told = [e.loss for e in train(ours, batches, config, row_labels=RowLabels(accuracy)) if isinstance(e, Step)]
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=config.weight_decay)
    wanted = []
    theirs.train()
    for batch in batches:
        loss = theirs(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    assert told == pytest.approx(wanted, rel=2e-4)
    assert told[0] != told[1]
    for mine, its in zip((p for p in ours.parameters() if p.requires_grad), trained, strict=True):
        assert torch.allclose(mine, its, atol=2e-4)


def test_the_head_is_trained_and_what_is_frozen_stays():
    model = classifier("bert")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inject(model, LoRAConfig(r=2, modules_to_save=("classifier",)))
    config = TrainConfig(steps=2, learning_rate=1e-2, warmup_steps=0)
    list(train(model, [batch_of(0, 3), batch_of(1, 3)], config, row_labels=RowLabels(accuracy)))
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_evaluation_is_of_all_rows_whatever_their_batches_and_names_the_score_that_decides():
    model = classifier("bert")
    inject(model, LoRAConfig(r=2, modules_to_save=("classifier",)))
    whole = batch_of(3, 3, num_rows=6)
    parts = [{key: value[i : i + 2] for key, value in whole.items()} for i in (0, 2, 4)]
    scored = RowLabels(accuracy, "accuracy")
    one, three = (evaluate(model, rows, row_labels=scored) for rows in ([whole], parts))
    with torch.no_grad():
        output = model(**whole)
    assert one.loss == pytest.approx(output.loss.item(), rel=1e-5)
    assert three.loss == pytest.approx(one.loss, rel=1e-5)
    assert three.metrics == one.metrics == accuracy(output.logits, whole["labels"])
    assert (one.metric, one.num_trained_tokens, one.to_minimize) == ("accuracy", 6, -one.metrics["accuracy"])


def test_training_ends_early_by_the_score_though_the_loss_still_falls():
    model = classifier("bert")
    inject(model, LoRAConfig(r=2, modules_to_save=("classifier",)))
    scores = iter([0.5, 0.9, 0.8, 0.7, 0.6, 0.95])
    config = TrainConfig(steps=9, eval_every=1, patience=2, warmup_steps=0)
    told = list(
        train(
            model,
            [batch_of(0, 3)] * 9,
            config,
            eval_batches=[batch_of(1, 3)],
            row_labels=RowLabels(lambda logits, labels: {"score": next(scores)}, "score"),
        )
    )
    assert isinstance(told[-1], Finished)
    assert (told[-1].reason, told[-1].step) == ("early", 3)


def test_an_undefined_score_is_the_worst_of_all():
    nothing = Evaluated(1, 0.1, 4, 0.0, {"matthews": float("nan")}, "matthews")
    assert nothing.to_minimize > replace(nothing, metrics={"matthews": -1.0}).to_minimize
    assert replace(nothing, metrics={}, metric="").to_minimize == 0.1


def test_an_evaluation_with_scores_goes_to_json_and_back_and_an_older_one_has_none():
    event = Evaluated(4, 0.5, 8, 0.1, {"accuracy": 0.75, "f1": 1}, "accuracy")
    assert from_record(to_record(event)) == event
    older = {key: value for key, value in to_record(event).items() if key not in ("metrics", "metric")}
    assert from_record(older).metrics == {}
    with pytest.raises(ValueError, match="`metrics` .* must be a table of text to numbers"):
        from_record(to_record(event) | {"metrics": {"accuracy": "high"}})


@pytest.mark.parametrize("num_labels", [3, 1])
def test_a_process_without_a_row_of_its_own_trains_nothing(num_labels: int):
    spare = World(rank=1, size=2)
    own = _own(batch_of(0, num_labels, num_rows=1), spare)
    assert len(own["labels"]) == 1
    assert row_losses(torch.zeros(1, num_labels), own["labels"]).numel() == 0


def test_taken_up_from_a_checkpoint_every_number_is_the_same():
    config = TrainConfig(steps=4, eval_every=2, warmup_steps=0)
    batches, held_out = [batch_of(seed, 3) for seed in range(4)], [batch_of(9, 3)]
    scored = RowLabels(accuracy, "accuracy")

    def fresh() -> nn.Module:
        model = classifier("bert")  # its own dropout of 0.1 is drawn in each step
        inject(model, LoRAConfig(r=2, dropout=0.1, modules_to_save=("classifier",)))
        return model

    def facts(events: list[object]) -> list[object]:
        return [(e.step, e.loss) for e in events if isinstance(e, (Step, Evaluated))]

    whole = facts(list(train(fresh(), batches, config, eval_batches=held_out, row_labels=scored)))
    begun = train(fresh(), batches, config, eval_batches=held_out, row_labels=scored)
    first = []
    for event in begun:
        first.append(event)
        if isinstance(event, Step) and event.step == 3:
            break
    start: Checkpoint = begun.checkpoint()
    rest = list(train(fresh(), batches[3:], config, eval_batches=held_out, start=start, row_labels=scored))
    assert facts(first) + facts(rest) == whole


@pytest.mark.parametrize("name", HEADS)
def test_memory_of_a_step_is_forecast_without_a_head_over_the_vocabulary(name: str):
    lora = LoRAConfig(r=2, modules_to_save=HEADS[name])
    config = TrainConfig(batch_size=4, max_length=32)
    with torch.device("meta"):
        few, many = (classifier(name, vocab_size=size) for size in (64, 64_000))
    small, large = (forecast_memory(model, lora, config, torch.float32, per_row=True) for model in (few, many))
    assert large.weights > small.weights
    assert large.activations == small.activations > 0
    trained = sum(p.numel() for p in classifier(name).get_submodule(HEADS[name][0]).parameters())
    assert small.adapter > 4 * trained
