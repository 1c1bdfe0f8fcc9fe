"""Answers of a run's model to held-out prompts, measured by a task, and kept with the run.

evaluations/step_40.jsonl   a line for each prompt: prompt, references, prediction, and what is wrong with it by itself
evaluations/step_40.json    how they were generated, and what the metrics gave

What is generated again for a step takes the place of what there was.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core import Adapter, Evaluated, Finished, LoRAError, World, read_json, resolve_devices, resolve_dtype
from studio import data, models, prompts
from studio.checkpoints import best
from studio.generating import EvaluationSpec, generate
from studio.metrics import TASKS, Difference, Result, difference
from studio.runs import Run
from studio.specs import RunSpec
from studio.workspace import Workspace, write_whole

FOLDER = "evaluations"


@dataclass(frozen=True)
class Kept:
    """What was measured of a step.

    Attributes:
        step: That of the adapter.
        spec: By which task, and how the answers were generated.
        results: What each metric gave.
    """

    step: int
    spec: EvaluationSpec
    results: tuple[Result, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold."""
        results = [result._asdict() for result in self.results]
        return {"step": self.step, "evaluation": self.spec.to_dict(), "results": results}


@dataclass(frozen=True)
class Exam:
    """Prompts to ask a run's model, as it was trained to be asked.

    Attributes:
        spec: By which task its answers are measured, and how they are generated.
        cases: The prompts, each with its references.
        prompt_ids: Their tokens.
        tokenizer: The model's.
    """

    spec: EvaluationSpec
    cases: list[prompts.Case]
    prompt_ids: list[list[int]]
    tokenizer: Any

    @classmethod
    def of(cls, spec: RunSpec, workspace: Workspace) -> "Exam":
        """Returns that of a run.

        Raises:
            LoRAError: It has no task, holds no rows out, they cannot be read, or a metric's library is missing.
        """
        asked = spec.evaluation
        if not asked.is_on:
            raise LoRAError(f"`evaluation_task` (='none') must be one of {', '.join(TASKS)}.")
        TASKS[asked.evaluation_task].check()
        tokenizer = models.load_tokenizer(spec.model, workspace)
        table = data.read_table(spec.data.source, workspace, spec.data.eval_source)
        after = "\nA:" if asked.evaluation_task == "text_to_sql" else ""
        survey = prompts.survey_of(spec, table, tokenizer)
        for _ in survey.read():
            pass
        cases = prompts.held_out(spec, survey, asked.evaluation_prompts, answer_after=after)
        ids = [data.prompt_ids(case.content, tokenizer, spec.data.template) for case in cases]
        return cls(asked, cases, ids, tokenizer)

    def answers(
        self, model: Any, places: Sequence[int], is_stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[dict[int, str]]:
        """Yields place → answer, batch by batch, of those of the cases at `places`."""
        for found in generate(
            model,
            [self.prompt_ids[place] for place in places],
            self.spec,
            end_token_ids=sorted(models.end_token_ids(model, self.tokenizer)),
            pad_token_id=self.tokenizer.pad_token_id,
            is_stopped=is_stopped,
        ):
            yield {
                places[at]: self.tokenizer.decode(ids, skip_special_tokens=True).strip() for at, ids in found.items()
            }

    def keep(self, run: Run, step: int, answers: Sequence[str]) -> Kept:
        """Measures answers to all cases, and keeps both with the run.

        Raises:
            LoRAError: A reference cannot be read.
            OSError: They cannot be written.
        """
        task = TASKS[self.spec.evaluation_task]
        kept = Kept(step, self.spec, tuple(task.measure(answers, [case.references for case in self.cases])))
        lines = [
            {"prompt": case.text, "references": list(case.references), "prediction": answer}
            | ({"problem": problem} if (problem := task.problem(answer)) else {})
            for case, answer in zip(self.cases, answers, strict=True)
        ]
        (run.folder / FOLDER).mkdir(exist_ok=True)
        write_whole(
            answers_file(run, step), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        )
        write_whole(answers_file(run, step).with_suffix(".json"), json.dumps(kept.to_dict(), indent=2).encode())
        return kept


class Evaluator:
    """Measures a run's answers while it trains; of several processes, each asks its share of the prompts."""

    def __init__(self, run: Run, workspace: Workspace, world: World, start: int = 0) -> None:
        """Reads the prompts, and forgets what was measured after step `start`, as it will come again.

        Raises:
            LoRAError: As of `Exam.of`.
        """
        self._run, self._world = run, world
        self._exam = Exam.of(run.spec, workspace)
        for step, file in _files(run).items() if world.is_first else ():
            if step > start:
                file.unlink()
                answers_file(run, step).unlink(missing_ok=True)
        # Processes that share the weights out go through the model together: all ask the same, to the end.
        self._is_together = run.spec.train.shard_weights and world.size > 1

    def __call__(self, model: Any, event: Evaluated) -> Evaluated:
        """Returns the evaluation with the task's metrics, if it is one after which they are wanted.

        If somebody asks the run to end meanwhile, without them.
        """
        spec, begin = self._exam.spec, time.perf_counter()
        if spec.evaluation_at == "end" and event.step < self._run.spec.train.steps:
            return event
        world, num = self._world, len(self._exam.cases)
        places = range(num) if self._is_together else range(num)[world.rows]
        is_stopped = (lambda: False) if self._is_together else (lambda: bool(self._run.stop_asked))
        own: dict[int, str] = {}
        for found in self._exam.answers(model, places, is_stopped) if places else ():
            own |= found
        answers = {place: answer for part in world.gather(own) for place, answer in part.items()}
        metrics: dict[str, float] = {}
        if len(answers) == num and world.is_first:
            kept = self._exam.keep(self._run, event.step, [answers[place] for place in range(num)])
            metrics = {result.metric: result.value for result in kept.results}
        metric = TASKS[spec.evaluation_task].metrics[0].name if spec.evaluation_at == "each" else event.metric
        seconds = event.evaluate_seconds + time.perf_counter() - begin
        return replace(
            event, metrics={**event.metrics, **world.agree(metrics)}, metric=metric, evaluate_seconds=seconds
        )


def of_run(
    run: Run, workspace: Workspace, spec: EvaluationSpec, note: Callable[[str], None] = lambda message: None
) -> Kept:
    """Generates and measures the answers of a run's adapter, and keeps them with the run.

    Raises:
        LoRAError: It has no adapter; else as of `Exam.of`.
    """
    if not run.has_adapter:
        raise LoRAError(f"Run {run.id} has no adapter yet; it is saved at the first evaluation and at the end.")
    note("Reading the data")
    exam = Exam.of(replace(run.spec, evaluation=spec), workspace)
    note("Loading the model")
    device = resolve_devices(run.spec.train.device)[0]
    dtype = resolve_dtype(run.spec.train.precision, device)
    model = models.load_model(run.spec.model, workspace, device=str(device), dtype=dtype)
    Adapter.load(run.adapter_folder).apply(model)
    answers: dict[int, str] = {}
    for found in exam.answers(model.eval(), range(len(exam.cases))):
        answers |= found
        note(f"{len(answers)} of {len(exam.cases)} prompts answered")
    return exam.keep(run, adapter_step(run), [answers[place] for place in range(len(answers))])


def adapter_step(run: Run) -> int:
    """Returns after which step the run's adapter was saved; 0 for one from elsewhere."""
    run.log.read()
    end, evaluations = run.log.end, run.log.evaluations
    if isinstance(end, Finished):
        return (best([(e.step, e.to_minimize) for e in evaluations]) or 0) if end.reason == "early" else end.step
    saved = [e.step for e in evaluations] + ([run.log.checkpoint.step] if run.log.checkpoint else [])
    return max(saved, default=0)


def kept(run: Run) -> list[Kept]:
    """Returns what was measured of a run, by step.

    Raises:
        LoRAError: A file is damaged.
    """
    return [_read(file) for file in _files(run).values()]


def compare(run: Run, other: Run) -> list[Difference]:
    """Returns how far the answers of a run's adapter score above those of another's, of the same task and prompts.

    Raises:
        LoRAError: One of them has none, or they are of another task or other prompts.
    """
    (first, ours), (second, theirs) = _answers(run), _answers(other)
    asked = [[(line["prompt"], line["references"]) for line in lines] for lines in (ours, theirs)]
    if first.spec.evaluation_task != second.spec.evaluation_task or asked[0] != asked[1]:
        raise LoRAError(
            f"Run {other.id} must have answered the same prompts for the same task as {run.id}; evaluate it with the "
            "same `--evaluation-task` and `--evaluation-prompts`."
        )
    references = [line["references"] for line in ours]
    mine, others = ([line["prediction"] for line in lines] for lines in (ours, theirs))
    return [difference(metric, mine, others, references) for metric in TASKS[first.spec.evaluation_task].metrics]


def _answers(run: Run) -> tuple[Kept, list[dict[str, Any]]]:
    step = adapter_step(run)
    if step not in _files(run):
        raise LoRAError(f"Run {run.id} has no measured answers of its adapter; lora-studio evaluate it first.")
    file = answers_file(run, step)
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return _read(_files(run)[step]), [
            {name: line[name] for name in ("prompt", "references", "prediction")} for line in lines
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, error) from error


def _files(run: Run) -> dict[int, Path]:
    """Returns step → the file with what was measured of it, by step."""
    found = {int(file.stem.removeprefix("step_")): file for file in (run.folder / FOLDER).glob("step_[0-9]*.json")}
    return dict(sorted(found.items()))


def _read(file: Path) -> Kept:
    try:
        values = read_json(file)
        spec = EvaluationSpec.from_dict(values["evaluation"])
        results = [
            Result(str(r["metric"]), float(r["value"]), float(r["low"]), float(r["high"]), int(r["num"]))
            for r in values["results"]
        ]
        if not spec.is_on:
            raise ValueError("it names no task")
        return Kept(int(values["step"]), spec, tuple(results))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> LoRAError:
    return LoRAError(f"{file} is damaged ({type(error).__name__}: {error}); delete it, and evaluate the run again.")


def answers_file(run: Run, step: int) -> Path:
    """Returns where the answers of a step are kept, or would be."""
    return run.folder / FOLDER / f"step_{step}.jsonl"
