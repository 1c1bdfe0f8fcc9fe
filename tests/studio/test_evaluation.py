"""Answers to held-out prompts: how they are generated, measured while a run trains and after it, and shown."""

import dataclasses
import json
import re
import signal
from dataclasses import replace

import pytest
import torch

from core import Evaluated, Finished, LoRAConfig, LoRAError, Step, TrainConfig
from studio import __main__ as cli
from studio import data, evaluation, generating, models, prompts, run_commands, worker
from studio.chat import Engine
from studio.checkpoints import best
from studio.generating import EvaluationSpec, generate
from studio.metrics import TASKS
from studio.panes import Pane
from studio.runs import Runs
from studio.sampling import ChatSettings
from studio.specs import RunSpec
from studio.tabs import runs as runs_tab
from studio.tabs import train as train_tab

ASKED = EvaluationSpec(evaluation_task="data_to_text", evaluation_at="each", evaluation_prompts=3, longest_answer=8)
TRAIN = TrainConfig(
    steps=4,
    batch_size=4,
    learning_rate=1e-2,
    eval_every=2,
    warmup_steps=0,
    max_length=96,
    device="cpu",
    precision="fp32",
)
PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [9]]


@pytest.fixture(autouse=True)
def as_it_was():
    """A worker in this process leaves the signals as they were."""
    before = {number: signal.getsignal(number) for number in worker.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def model(tiny_folder, tmp_path_factory):
    from studio.workspace import Workspace

    found = models.load_model(str(tiny_folder), Workspace(tmp_path_factory.mktemp("workspace")))
    models.prepare_to_train(found)  # as the worker has it
    return found


@pytest.fixture
def spec(tiny_folder, tmp_path) -> RunSpec:
    """Of rows of which each two have one prompt."""
    rows = tmp_path / "rows.jsonl"
    lines = [{"facts": f"name[Inn {i // 2}]", "text": f"Inn {i // 2} is {'open'[: 1 + i % 4]} now."} for i in range(24)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    of_rows = data.DataSpec(str(rows), prompt="facts", completion="text", eval_fraction=0.25)
    return RunSpec("Tiny", str(tiny_folder), of_rows, LoRAConfig(r=2), TRAIN, ASKED)


@pytest.fixture
def train(workspace):
    """train(spec): a run that this process has trained."""

    def trained(spec):
        run = Runs(workspace).create(spec)
        assert worker.main([str(run.folder)]) == 0, run.log.refresh()[-1]
        run.log.read()
        return run

    return trained


def answers_of(model, spec, **how):
    found = {}
    for batch in generate(model, PROMPTS, spec, end_token_ids=[2], pad_token_id=0, **how):
        found |= batch
    return [found[place] for place in sorted(found)]


def test_greedy_answers_are_those_of_the_chat_whatever_shares_their_batch(model):
    engine = Engine(model, lambda name, step: None, frozenset([2]))  # type: ignore[arg-type, return-value]
    expected = [list(engine.answer(Pane(), ids, ChatSettings(12, 0.0)))[-1].token_ids for ids in PROMPTS]
    assert answers_of(model, EvaluationSpec(longest_answer=12)) == [list(ids) for ids in expected]


def log_probability(model, prompt, answer):
    logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


@torch.no_grad()
def test_beams_find_answers_at_least_as_likely_and_the_penalty_and_the_batch_are_as_asked(model):
    by = {n: answers_of(model, EvaluationSpec(beams=n, longest_answer=6)) for n in (1, 8)}
    scores = {
        n: [log_probability(model, p, a) / max(1, len(a)) for p, a in zip(PROMPTS, by[n], strict=True)] for n in by
    }
    assert all(more >= greedy - 1e-5 for more, greedy in zip(scores[8], scores[1], strict=True))
    assert sum(scores[8]) > sum(scores[1])
    ends = {2, *range(100, 300)}  # so that answers may end early
    lengths = {}
    for penalty in (-10.0, 10.0):
        spec = EvaluationSpec(beams=8, longest_answer=12, length_penalty=penalty)
        found = list(generate(model, PROMPTS, spec, end_token_ids=sorted(ends), pad_token_id=0))
        lengths[penalty] = sum(len(answer) for batch in found for answer in batch.values())
        assert not any(token in ends for batch in found for answer in batch.values() for token in answer)
    assert lengths[-10.0] < lengths[10.0]


@pytest.mark.parametrize("beams", [1, 4])
def test_no_run_of_tokens_comes_twice_in_an_answer_though_the_prompt_s_may(model, beams):
    plain, without = (answers_of(model, EvaluationSpec(beams=beams, longest_answer=40, no_repeat=n)) for n in (0, 2))

    def repeats(answer):
        pairs = list(zip(answer, answer[1:], strict=False))
        return len(pairs) - len(set(pairs))

    assert sum(map(repeats, plain)) > 0 == sum(map(repeats, without))
    forbid = generating._NoRepeat(2, width=4)
    scores = forbid(torch.tensor([[7, 8, 7, 8, 7], [7, 8, 0, 0, 7]]), torch.zeros(2, 9))
    assert scores.isfinite().all()  # 7 8 is the prompt's
    scores = forbid(torch.tensor([[0, 0, 0, 0, 5, 6, 5], [0, 0, 0, 0, 5, 6, 4]]), torch.zeros(2, 9))
    assert (~scores.isfinite()).nonzero().tolist() == [[0, 6]]


def test_generation_ends_at_the_token_at_which_it_is_asked_to(model):
    asked = []

    def is_stopped():
        asked.append(0)
        return len(asked) > 3

    assert answers_of(model, EvaluationSpec(longest_answer=200), is_stopped=is_stopped) == []
    assert len(asked) == 5  # after each of four tokens, and at the end


def test_a_prompt_without_room_for_an_answer_is_refused(model):
    room = model.config.max_position_embeddings
    spec = EvaluationSpec(longest_answer=50)
    (found,) = generate(model, [[5] * (room - 3)], spec, end_token_ids=[2], pad_token_id=0)
    assert len(found[0]) <= 3
    with pytest.raises(LoRAError, match=r"A held-out prompt \(=256 tokens\) must be shorter than the model's context"):
        list(generate(model, [[5] * room], spec, end_token_ids=[2], pad_token_id=0))


def test_rows_of_one_prompt_are_one_case_with_all_their_references(spec, workspace):
    table = data.read_table(spec.data.source, workspace)
    tokenizer = models.load_tokenizer(spec.model, workspace)
    survey = prompts.survey_of(spec, table, tokenizer)
    for _ in survey.read():
        pass
    cases = prompts.held_out(spec, survey, 2)
    assert len({case.text for case in cases}) == 2
    for case in cases:
        assert [r for row in table.rows if row["facts"] == case.text for r in [row["text"]]] == sorted(
            case.references, key=[row["text"] for row in table.rows].index
        )
        assert len(case.references) == 2


def test_a_file_s_prompts_may_have_several_references(write_run, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a", "reference": ["b", "c", ""]}\n{"prompt": "d", "reference": "e"}\nf\n')
    cases = prompts.from_file(file, write_run(), 9)
    assert [case.references for case in cases] == [("b", "c"), ("e",), ()]
    file.write_text('{"prompt": "a", "reference": [1]}')
    with pytest.raises(LoRAError, match='as "reference", or a list of texts there'):
        prompts.from_file(file, write_run(), 9)


def test_a_query_is_asked_for_where_the_text_has_its_answer(tiny_folder, tmp_path, workspace):
    rows = tmp_path / "sql.jsonl"
    text = "table: 1-2\ncolumns: a, b\nQ: how many a {}?\nA: SELECT a FROM 1-2 WHERE b = {}"
    rows.write_text("".join(json.dumps({"text": text.format(i, i)}) + "\n" for i in range(8)))
    of_rows = data.DataSpec(str(rows), layout="text", text="text", eval_fraction=0.25)
    asked = EvaluationSpec(evaluation_task="text_to_sql")
    exam = evaluation.Exam.of(RunSpec("SQL", str(tiny_folder), of_rows, evaluation=asked), workspace)
    for case in exam.cases:
        assert isinstance(case.content, str) and case.content.endswith("?\nA:")
        number = case.content.split("how many a ")[1][0]
        assert case.references == (f"SELECT a FROM 1-2 WHERE b = {number}",)


def test_a_run_measures_its_answers_without_a_change_to_its_training(spec, train):
    run, plain = train(spec), train(replace(spec, evaluation=EvaluationSpec()))
    assert [s.loss for s in run.log.steps] == [s.loss for s in plain.log.steps]
    assert [e.loss for e in run.log.evaluations] == [e.loss for e in plain.log.evaluations]
    assert not any(e.metrics for e in plain.log.evaluations)
    found = evaluation.kept(run)
    assert [kept.step for kept in found] == [e.step for e in run.log.evaluations] == [0, 2, 4]
    for kept, event in zip(found, run.log.evaluations, strict=True):
        assert event.metrics == {r.metric: r.value for r in kept.results} and event.metric == "BLEU"
        assert list(event.metrics) == [metric.name for metric in TASKS["data_to_text"].metrics]
        lines = [json.loads(line) for line in evaluation.answers_file(run, kept.step).read_text().splitlines()]
        assert len(lines) == 3 and all(len(line["references"]) == 2 for line in lines)
        again = TASKS["data_to_text"].measure([x["prediction"] for x in lines], [x["references"] for x in lines])
        assert tuple(again) == kept.results


def test_the_best_step_goes_by_the_task_where_it_is_measured_each_time(spec, train, monkeypatch):
    scores = {0: 0.9, 1: 0.5, 2: 0.7, 3: 0.6, 4: 0.65, 5: 0.6}
    real = evaluation.Exam.keep

    def keep(self, run, step, answers):
        kept = real(self, run, step, answers)
        return replace(kept, results=(kept.results[0]._replace(value=scores[step]), *kept.results[1:]))

    monkeypatch.setattr(evaluation.Exam, "keep", keep)
    config = replace(TRAIN, steps=6, eval_every=1, patience=2)
    run = train(replace(spec, train=config))
    # The third step is the second after 0.9 that does not reach it; of those after the start, the second was best.
    assert isinstance(run.log.end, Finished) and (run.log.end.reason, run.log.end.step) == ("early", 2)
    assert evaluation.adapter_step(run) == 2 == best((e.step, e.to_minimize) for e in run.log.evaluations)
    assert "Ended early: BLEU no longer rose. The adapter saved is that of step 2." in train_tab.status_view(
        run, "finished"
    )


def test_measured_at_the_end_only_the_last_step_has_answers_and_the_loss_decides(spec, train):
    run = train(replace(spec, evaluation=replace(ASKED, evaluation_at="end", evaluation_task="summary")))
    assert [bool(e.metrics) for e in run.log.evaluations] == [False, False, True]
    assert {e.metric for e in run.log.evaluations} == {""}
    assert [kept.step for kept in evaluation.kept(run)] == [4]


def test_a_run_that_is_asked_to_end_while_it_answers_says_no_score(spec, workspace, monkeypatch):
    run = Runs(workspace).create(spec)
    real = evaluation.Exam.answers

    def answers(self, model, places, is_stopped):
        run.ask_to_stop("paused")
        yield from real(self, model, places, is_stopped)

    monkeypatch.setattr(evaluation.Exam, "answers", answers)
    assert worker.main([str(run.folder)]) == 0
    run.log.read()
    (event,) = run.log.evaluations
    assert event.metrics == {} and event.to_minimize == float("inf") and evaluation.kept(run) == []
    assert run.status == "paused"


def test_a_run_that_is_taken_up_again_keeps_the_scores_before_and_forgets_those_after(spec, train, workspace):
    whole = train(spec)
    spec = replace(spec, train=replace(TRAIN, checkpoint_every=3))
    run = Runs(workspace).create(spec)
    real = evaluation.Evaluator.__call__

    def at_the_end(self, model, event):
        if event.step == 4:
            raise LoRAError("The lights went out.")
        return real(self, model, event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation.Evaluator, "__call__", at_the_end)
        assert worker.main([str(run.folder)]) == 1
    exam = evaluation.Exam.of(spec, workspace)
    exam.keep(run, 99, [""] * 3)  # as of a step that the break took away
    assert worker.main([str(run.folder)]) == 0
    run.log.read()
    assert [e.metrics for e in run.log.evaluations] == [e.metrics for e in whole.log.evaluations]
    assert evaluation.kept(run) == evaluation.kept(whole)
    assert not evaluation.answers_file(run, 99).exists()


def test_the_command_gives_what_the_run_itself_measured_and_compares_runs(spec, train, workspace, capsys):
    run = train(spec)
    other = train(replace(spec, train=replace(TRAIN, learning_rate=0.3)))
    (*_, before) = evaluation.kept(run)
    words = ["evaluate", run.id, "--workspace", str(workspace.root)]
    assert cli.main([*words, "--against", other.id, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["results"] == [result._asdict() for result in before.results] and found["step"] == 4
    (*_, theirs) = evaluation.kept(other)
    for d, mine, other_s in zip(found["differences"], before.results, theirs.results, strict=True):
        assert d["value"] == pytest.approx(mine.value - other_s.value) and d["low"] <= d["value"] <= d["high"]
    assert cli.main([*words, "--task", "exact", "--prompts", "2", "--beams", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Exact match") and "n 2" in said and "step_4.jsonl" in said
    assert cli.main([*words, "--against", other.id]) == 0  # its own settings again
    evaluation.answers_file(other, 4).write_text("{}")
    with pytest.raises(LoRAError, match=r"step_4\.jsonl is damaged \(KeyError: 'prompt'\); delete it"):
        evaluation.compare(run, other)
    evaluation.of_run(other, workspace, replace(ASKED, evaluation_prompts=2))
    with pytest.raises(LoRAError, match="must have answered the same prompts for the same task"):
        evaluation.compare(run, other)


def test_what_cannot_be_evaluated_says_why(spec, write_run, workspace, capsys):
    run = write_run([], replace(spec, evaluation=EvaluationSpec()))
    words = ["evaluate", run.id, "--workspace", str(workspace.root)]
    assert cli.main(words) == 2
    assert "`--task` must be given for a run that has none: data_to_text" in capsys.readouterr().err
    assert cli.main([*words, "--task", "exact"]) == 2
    assert "has no adapter yet" in capsys.readouterr().err
    with pytest.raises(LoRAError, match=r"`evaluation_task` \(='none'\) must be one of data_to_text"):
        evaluation.Exam.of(run.spec, workspace)
    with pytest.raises(LoRAError, match="has no measured answers of its adapter; lora-studio evaluate it first"):
        evaluation.compare(run, run)
    with pytest.raises(LoRAError, match="`beams` .* must be .*at least 1"):
        EvaluationSpec.from_dict({"beams": 0})


def test_a_spec_keeps_its_task_and_says_nothing_of_none(spec):
    assert RunSpec.from_dict(spec.to_dict()) == spec
    assert "evaluation" not in replace(spec, evaluation=EvaluationSpec()).to_dict()
    changed = run_commands.spec_of(cli._parser().parse_args(["plan", "--evaluation-task", "summary", "--beams", "3"]))
    assert (changed.evaluation.evaluation_task, changed.evaluation.beams) == ("summary", 3)


def test_the_runs_tab_shows_what_was_measured_and_says_what_is_damaged(spec, write_run):
    run = write_run([Step(1, 1.0, 0.1, 1.0, 8, 8, 0.1, 1), Evaluated(1, 1.0, 8, 0.1), Finished(1, "done", 1)], spec)
    cases = [prompts.Case("a <b>", "a <b>", ("x y z",)), prompts.Case("c", "c", ("x y z", "z"))]
    exam = evaluation.Exam(ASKED, cases, [], None)
    kept = exam.keep(run, 1, ["x y z", "x z"])
    shown = runs_tab.measured(run)
    assert "Data to text: 2 prompts, the likeliest token each time, answers of up to 8 tokens" in shown
    for result in kept.results:
        assert f"<th>{result.metric}</th>" in shown
        assert f"<td>{result.value:.4f}<small>{result.low:.3f} … {result.high:.3f}</small></td>" in shown
    for step in range(2, 20):
        exam.keep(run, step, ["x y z", "x z"])
    dataclasses.replace(exam, spec=replace(ASKED, beams=4)).keep(run, 7, ["x", "z"])
    shown = runs_tab.measured(run)
    assert shown.count("<table") == 2 and "4 beams" in shown and "6 earlier steps are in the run" in shown
    assert [int(step) for step in re.findall(r"<tr><td>(\d+)</td>", shown)] == [*range(19, 7, -1), 7]
    file = evaluation.answers_file(run, 1).with_suffix(".json")
    whole = json.loads(file.read_text())
    for wrong in ("{", json.dumps(whole | {"results": [{"metric": "<b>"}]}), json.dumps(whole | {"evaluation": {}})):
        file.write_text(wrong)
        with pytest.raises(LoRAError, match=r"step_1\.json is damaged .*delete it, and evaluate the run again"):
            evaluation.kept(run)
        assert "is damaged" in runs_tab.measured(run)


def test_an_answer_that_is_no_query_is_kept_with_what_is_wrong_with_it(spec, write_run):
    run = write_run([], spec)
    case = prompts.Case("Q", "Q", ("SELECT a FROM t",))
    exam = evaluation.Exam(dataclasses.replace(ASKED, evaluation_task="text_to_sql"), [case, case], [], None)
    kept = exam.keep(run, 1, ["select A from t", "Nothing."])
    assert [(r.metric, r.value) for r in kept.results] == [
        ("Logical form", 0.5),
        ("Exact match", 0),
        ("Can be read", 0.5),
    ]
    fine, wrong = (json.loads(line) for line in evaluation.answers_file(run, 1).read_text().splitlines())
    assert "problem" not in fine and "must read SELECT … FROM …" in wrong["problem"]
