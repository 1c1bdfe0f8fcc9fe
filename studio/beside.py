"""Two runs beside each other: what they were asked for that differs, and their losses in one chart."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import numpy as np

from studio import live, markup
from studio.palette import ADAPTED, ADAPTED_SOFT, SECOND, SECOND_SOFT
from studio.runs import Run
from studio.specs import PARTS

_OWN = {"name", "continues"}


def differences(first: Run, second: Run) -> list[tuple[str, str, str]]:
    """Returns each setting in which two runs differ: its name, and what either has; "–" where one has none."""
    one, other = (dict(_flat(run.spec.to_dict())) for run in (first, second))
    names = [name for name in {**one, **other} if name not in _OWN and one.get(name) != other.get(name)]
    return [(name, _words(one.get(name)), _words(other.get(name))) for name in names]


def view(first: Run, second: Run) -> str:
    """Returns HTML of two runs beside each other, escaped."""
    for run in (first, second):
        run.log.read()
    titles = [f"{run.spec.name} ({letter})" for run, letter in ((first, "1"), (second, "2"))]
    rows = [*differences(first, second), *_results(first, second)]
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{escape(title)}</th>" for title in ("What differs", *titles))
    curves = []
    for run, letter, color, soft in ((first, "1", ADAPTED, ADAPTED_SOFT), (second, "2", SECOND, SECOND_SOFT)):
        steps, evaluations = run.log.steps.columns(), run.log.evaluations
        losses = np.stack([steps["step"], steps["loss"]], axis=1)
        curves += live.with_mean(live.Curve(f"training ({letter})", soft, losses), f"mean of {{}} steps ({letter})")
        held_out = [(e.step, e.loss) for e in evaluations]
        curves.append(live.Curve(f"held-out ({letter})", color, held_out, dots=True, thickness=2))
    drawn = live.chart("Loss (nats per token)", curves, height=220, empty="Neither has taken a step here.")
    return f'{markup.table(f"<tr>{head}</tr>", body)}<div class="charts">{drawn}</div>'


def _results(first: Run, second: Run) -> Iterator[tuple[str, str, str]]:
    for name, value in (("Held-out loss, lowest", _lowest), ("Steps taken", _num_steps)):
        yield name, value(first), value(second)


def _lowest(run: Run) -> str:
    losses = [e.loss for e in run.log.evaluations]
    return f"{min(losses):.4f}" if losses else "–"


def _num_steps(run: Run) -> str:
    return f"{run.log.steps[-1].step:,}" if run.log.steps else "–"


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields settings by the names that commands know them by; those of a data set after "data"."""
    for name, value in values.items():
        if name == "data":
            yield from ((f"data {key}", part) for key, part in value.items())
        elif name in PARTS:
            yield from value.items()
        else:
            yield name, value


def _words(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
