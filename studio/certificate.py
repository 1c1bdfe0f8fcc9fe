"""The certificate of a merge, as it is taken home: which rows were tried, what came out, as JSON and as a card.

`core.certify` compares; here are the texts that it compares on, and what else was found when the exported thing was
opened again in a process of its own.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Self

import torch
from torch import Tensor, nn

from core import Adapter, Certificate, LoRAError, World, certify, lora_layers, merge, merged_copy, quoted, unmerge
from studio import markup, models, setup
from studio.runs import Run
from studio.workspace import Workspace

PROMPTS = (
    "The kettle had just begun to sing when",
    "Write one sentence about the weather in spring.",
    "Q: Which of these is heavier, a litre of oil or a litre of water?\nA:",
    "17 + 26 = 43, and 43 - 9 =",
    "def area(width, height):\n    return",
    '{"name": "Ada", "languages": ["English", ',
    "Der Zug nach Hamburg fährt um",
    "1. Wash the rice.\n2. Add twice as much water.\n3.",
)
"""Neutral ones, of several kinds: what an adapter was trained on is only a part of what a merge must keep."""

MAX_ROWS, MAX_TOKENS = 8, 64
"""So many of the run's evaluation rows are tried, and so many tokens of each row; each costs a few forward passes."""

EXACT_LIMIT = 1_000_000_000
"""Models up to so many parameters are compared in float32; larger ones in the type that they are stored in."""


@dataclass(frozen=True)
class Rows:
    """What is tried: token ids.

    Attributes:
        ids: (seq) int64 each, the neutral prompts first.
        num_evaluation: How many are of the run's evaluation rows.
        note: Why there are none of them, or "".
    """

    ids: tuple[Tensor, ...]
    num_evaluation: int
    note: str = ""


@dataclass(frozen=True)
class Reload:
    """What was found when the exported thing was opened again, in a process that knew nothing of the first.

    Attributes:
        opened_by: By what: "LoRA Studio", or "PEFT 0.21.2".
        kind: The type of its weights, as torch or GGUF names it.
        max_logit_difference: Largest |reopened − unmerged| of all logits.
        logit_error: ‖reopened − unmerged‖ / ‖unmerged‖ over all logits.
        bound: What `logit_error` must not exceed.
        mean_kl: KL(unmerged ‖ reopened) of the next token, in nats, mean over all tokens.
        top1_agreement: Share of tokens after which both find the same next token likeliest.
        num_tensors: How many tensors were compared with what was to be written.
        wrong: Those that are not what was to be written.
        problem: Why it could not be opened at all, or "".
    """

    opened_by: str
    kind: str
    max_logit_difference: float
    logit_error: float
    bound: float
    mean_kl: float
    top1_agreement: float
    num_tensors: int
    wrong: tuple[str, ...] = ()
    problem: str = ""

    @property
    def problems(self) -> tuple[str, ...]:
        """What speaks against the export, a sentence each."""
        if self.problem:
            return (f"{self.opened_by} cannot open it: {self.problem}",)
        found = []
        if self.wrong:
            some = ", ".join(self.wrong[:3]) + (" …" if len(self.wrong) > 3 else "")
            found.append(f"Opened again by {self.opened_by}, {len(self.wrong)} tensors are not as written: {some}.")
        if not self.logit_error <= self.bound:  # NaN is no agreement
            found.append(
                f"Opened again by {self.opened_by}, the logits differ by {self.logit_error:.2g} of their norm; "
                f"in {self.kind} at most {self.bound:g} is rounding."
            )
        return tuple(found)


@dataclass(frozen=True)
class Report:
    """All that is known of an export: what the merge did to the function, and what came back from the disk.

    Attributes:
        run: The run's id.
        what: What was exported, in words; "merge" where nothing was.
        num_prompts: Neutral prompts among the rows.
        num_evaluation: Rows of the run's evaluation among them.
        note: What else a reader should know, or "".
        merges: One certificate for each type of weights that was tried.
        reloads: One for each program that opened the exported thing again.
        is_forced: Whether it was written in spite of problems, because somebody said so.
    """

    run: str
    what: str
    num_prompts: int
    num_evaluation: int
    note: str
    merges: tuple[Certificate, ...]
    reloads: tuple[Reload, ...] = ()
    is_forced: bool = False

    @property
    def problems(self) -> tuple[str, ...]:
        """What speaks against it, a sentence each; none where all is well."""
        return tuple(dict.fromkeys(p for part in (*self.merges, *self.reloads) for p in part.problems))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold; the problems stand there, too, for readers without this program."""
        values = {"problems": list(self.problems), **dataclasses.asdict(self)}
        # JSON has no NaN, which a broken model's logits are.
        return _each(values, lambda x: str(x) if isinstance(x, float) and not math.isfinite(x) else x)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Builds a report from what `to_dict` gave.

        Raises:
            LoRAError: It is something else.
        """
        try:
            values = dict(values)
            values.pop("problems", None)
            parts = {
                "merges": tuple(_built(Certificate, part) for part in values.pop("merges")),
                "reloads": tuple(_built(Reload, part) for part in values.pop("reloads")),
            }
            report = _built(cls, values | parts)
            _ = report.problems, card(report)  # whatever it holds can be said
            return report
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LoRAError(
                f"A certificate must be a table as `lora-studio certificate --json` writes it ({quoted(str(error))})."
            ) from error


def rows_of(run: Run, workspace: Workspace, note: Callable[[str], None]) -> Rows:
    """Returns the neutral prompts and the first of the run's evaluation rows, as tokens.

    Raises:
        LoRAError: The model has no tokenizer that can be read.
    """
    tokenizer = models.load_tokenizer(run.spec.model, workspace)
    texts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    held_out: Sequence[Any] = ()
    why = ""
    if run.is_imported:
        why = "The adapter was imported: of its evaluation rows nothing is known."
    else:
        try:
            found = setup.rows_of(run.spec, workspace, World(), note, is_begun=True)
            held_out = found.prepared.evaluation[:MAX_ROWS]
        except LoRAError as error:
            why = f"The run's evaluation rows could not be read: {error}"
    rows = [*texts, *(row.input_ids for row in held_out)]
    ids = tuple(torch.tensor(list(row[:MAX_TOKENS])) for row in rows if len(row))
    return Rows(ids, len(held_out), why)


def of_run(run: Run, workspace: Workspace) -> Report:
    """Returns the certificate of a merge that is tried in memory, in float32 and in the base's own type.

    Raises:
        LoRAError: The run has no adapter, or its base cannot be loaded.
    """
    if not run.has_adapter:
        raise LoRAError(f"Run {run.id} has no adapter yet; it is saved at the first evaluation and at the end.")
    info = models.describe(run.spec.model, workspace)
    model = models.load_model(
        run.spec.model, workspace, dtype=reference_dtype(info), head=run.spec.head, seed=run.spec.train.seed
    )
    adapter = Adapter.load(run.adapter_folder)
    adapter.apply(model)
    rows = rows_of(run, workspace, lambda message: None)
    merged = merged_copy(model)
    merges = [certify_merge(model, rows, merged)]
    if own_dtype(info) != reference_dtype(info):
        del merged
        merges.append(certify_in(own_dtype(info), model, adapter, rows))
    num_prompts = len(rows.ids) - rows.num_evaluation
    return Report(run.id, "Merge, tried in memory", num_prompts, rows.num_evaluation, rows.note, tuple(merges))


def reference_dtype(info: models.ModelInfo) -> torch.dtype:
    """Returns the type of weights in which an adapter is compared with what becomes of it."""
    return torch.float32 if info.num_parameters <= EXACT_LIMIT else own_dtype(info)


def own_dtype(info: models.ModelInfo) -> torch.dtype:
    """Returns the type that the model's weights are stored in; of packed ones bfloat16, in which the studio trains."""
    named = getattr(torch, info.dtype or "", None)
    return named if named in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16


def certify_merge(model: nn.Module, rows: Rows, merged: nn.Module) -> Certificate:
    """Returns the certificate of `merged`, and whether the model itself, merged and unmerged, has its W0 back.

    Raises:
        LoRAError: As of `core.certify`.
    """
    found = certify(model, rows.ids, merged=merged)
    before = {path: layer.weight_matrix().clone() for path, layer in lora_layers(model).items()}
    merge(model)
    unmerge(model)
    restored = all(torch.equal(before[path], layer.weight_matrix()) for path, layer in lora_layers(model).items())
    return dataclasses.replace(found, is_restored=restored)


def certify_in(dtype: torch.dtype, model: nn.Module, adapter: Adapter, rows: Rows) -> Certificate:
    """Returns the certificate of merging in another type of weights; the adapter keeps its own, as in training."""
    other = copy.deepcopy(model).to(dtype)
    adapter.apply(other)
    return certify(other, rows.ids)


@torch.inference_mode()
def logits_of(model: nn.Module, rows: Sequence[Tensor]) -> list[Tensor]:
    """Returns (seq, vocabulary) float32 logits of each row, or (1, num_labels) of a classifier, on the CPU."""
    device = next(model.parameters()).device
    found = (model(input_ids=row[None].to(device)).logits[0].float().cpu() for row in rows)
    return [logits.reshape(-1, logits.shape[-1]) for logits in found]


def compare(
    opened_by: str, kind: str, bound: float, unmerged: Sequence[Tensor], reopened: Sequence[Tensor], **tensors: Any
) -> Reload:
    """Returns what the logits of a reopened thing say of it; `tensors` is what was found of its tensors."""
    error = norm = kl = largest = 0.0
    agreed = num_tokens = 0
    for wanted, found in zip(unmerged, reopened, strict=True):
        difference = found - wanted
        largest = max(largest, float(difference.abs().max()))
        error, norm = error + float(difference.double().square().sum()), norm + float(wanted.double().square().sum())
        p, q = (torch.log_softmax(logits.double(), -1) for logits in (wanted, found))
        kl += float((p.exp() * (p - q)).sum())
        agreed += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        num_tokens += len(wanted)
    return Reload(
        opened_by, kind, largest, math.sqrt(error / norm), bound, kl / num_tokens, agreed / num_tokens, **tensors
    )


CSS = """
.certificate { border: 1px solid var(--border-color-primary); border-left: 6px solid #2e7d4f; border-radius: 8px;
  padding: .75rem 1rem; margin-top: .75rem; }
.certificate.red { border-left-color: #c62828; }
.certificate h3 { margin: 0 0 .25rem; font-size: 1rem; }
.certificate h3 b { color: #2e7d4f; } .certificate.red h3 b { color: #c62828; }
.dark .certificate h3 b { color: #6cc393; } .dark .certificate.red h3 b { color: #ff8a80; }
.certificate p { margin: .2rem 0; font-size: .9rem; }
.certificate .small { color: var(--body-text-color-subdued); font-size: .85rem; }
.certificate table { margin-top: .5rem; font-size: .85rem; }
.certificate :is(th, td) { padding: .35rem .4rem !important; }
.certificate :is(th, td):not(:first-child) { white-space: nowrap; }
"""


def card(report: Report) -> str:
    """Returns the report as HTML, escaped: a verdict in words, the reasons, the numbers."""
    problems = report.problems
    verdict = "✗ Not sound" if problems else "✓ Sound"
    if problems and report.is_forced:
        verdict += ", written all the same"
    rows = "".join(f"<p>{escape(problem)}</p>" for problem in problems)
    if not problems:
        rows = "<p>Merged and unmerged are the same function, up to the rounding of the weights’ type.</p>"
    tried = f"Tried on {report.num_prompts} neutral prompts"
    if report.num_evaluation:
        tried += f" and {report.num_evaluation} of the run’s evaluation rows"
    names = ("", "‖Δ‖ / ‖logits‖", "at most", "max |Δlogit|", "KL, nats", "Top-1")
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = [_line(f"Merged, {c.dtype}", c) for c in report.merges]
    lines += [_line(f"Reopened by {r.opened_by}, {r.kind}", r) for r in report.reloads]
    effect = f"The adapter moves the logits by {report.merges[0].effect:.2g} of their norm." if report.merges else ""
    restored = "Unmerged again, W₀ is back bit for bit." if any(c.is_restored for c in report.merges) else ""
    small = " ".join(filter(None, (f"{tried}.", effect, restored, report.note)))
    return (
        f'<div class="certificate{" red" if problems else ""}" role="status"><h3><b>{verdict}</b> · '
        f"{escape(report.what)}</h3>{rows}"
        f'{markup.table(f"<tr>{head}</tr>", "".join(lines))}<p class="small">{escape(small)}</p></div>'
    )


def markdown(report: Report) -> str:
    """Returns the report as a table for a model card."""
    lines = [
        "**" + ("Not sound: " + " ".join(report.problems) if report.problems else "Sound.") + "**",
        "",
        "| | ‖Δ‖ / ‖logits‖ | at most | max abs Δlogit | KL, nats | top-1 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_markdown_line(f"merged, {c.dtype}", c) for c in report.merges]
    lines += [_markdown_line(f"reopened by {r.opened_by}, {r.kind}", r) for r in report.reloads]
    return "\n".join(lines)


def plain(report: Report) -> str:
    """Returns the report as lines for a terminal."""
    lines = [f"{'Not sound' if report.problems else 'Sound'}: {report.what}", *report.problems]
    lines.append(f"{'':<36}{'error':>9}{'at most':>9}{'max |Δ|':>9}{'KL':>9}{'top-1':>9}")
    named = [(f"merged, {c.dtype}", c) for c in report.merges]
    named += [(f"reopened by {r.opened_by}, {r.kind}", r) for r in report.reloads]
    lines += [f"{name:<36}" + "".join(f"{text:>9}" for text in _numbers(part)) for name, part in named]
    return "\n".join([*lines, *filter(None, [report.note])])


def _numbers(part: Certificate | Reload) -> tuple[str, ...]:
    error, largest, kl = (f"{x:.1e}" if x else "0" for x in (part.logit_error, part.max_logit_difference, part.mean_kl))
    return error, f"{part.bound:g}", largest, kl, f"{100 * part.top1_agreement:.1f}\N{NO-BREAK SPACE}%"


def _line(name: str, part: Certificate | Reload) -> str:
    return "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in (name, *_numbers(part))) + "</tr>"


def _markdown_line(name: str, part: Certificate | Reload) -> str:
    return "| " + " | ".join((name, *_numbers(part))) + " |"


def _built(kind: Any, values: dict[str, Any]) -> Any:
    """Returns a dataclass of plain values: lists become tuples, the words of `to_dict` numbers."""
    fields: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(kind)}
    if unknown := values.keys() - fields.keys():
        raise TypeError(f"unknown: {', '.join(map(str, unknown))}")
    made = {}
    for name, value in values.items():
        if fields[name] in (int, float, str, bool):
            value = fields[name](value)
        elif isinstance(value, list):
            value = tuple(map(str, value))
        made[name] = value
    return kind(**made)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _each(part, change) for key, part in value.items()}
    return [_each(part, change) for part in value] if isinstance(value, (list, tuple)) else change(value)
