"""Which matrices to adapt, and with which rank: the paper's Tables 5 and 6."""

from collections.abc import Callable, Mapping, Sequence

from core import LoRAConfig, LoRAError, quoted
from studio import models
from studio.experiments.base import Asked, Experiment, Piece, Record, Result, Table, as_paper, by_seed, spread
from studio.experiments.runs import SCALES, held_out, of_text
from studio.workspace import Workspace

_LETTERS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_PAPER_5 = {
    "q": (8, 70.4, 91.0),
    "k": (8, 70.0, 90.8),
    "v": (8, 73.0, 91.0),
    "o": (8, 73.2, 91.3),
    "q, k": (4, 71.4, 91.3),
    "q, v": (4, 73.7, 91.3),
    "q, k, v, o": (2, 73.7, 91.7),
}
"""Matrices → the paper's r, and its accuracy on WikiSQL and MNLI, in per cent."""

_PAPER_6 = {
    "q": ((68.8, 69.6, 70.5, 70.4, 70.0), (90.7, 90.9, 91.1, 90.7, 90.7)),
    "q, v": ((73.4, 73.3, 73.7, 73.8, 73.5), (91.3, 91.4, 91.3, 91.6, 91.4)),
    "q, k, v, o": ((74.1, 73.7, 74.0, 74.0, 73.9), (91.2, 91.7, 91.7, 91.5, 91.4)),
}
_PAPER_RANKS = (1, 2, 4, 8, 64)
_ALPHAS: Mapping[str, Callable[[int], int]] = {"alpha = 32": lambda r: 32, "alpha = 8 r": lambda r: 8 * r}
"""The paper's way, one alpha for every r, with which the scale of ΔW falls as r grows; and one scale for every r."""
_RANKS: Mapping[str, tuple[int, ...]] = {"tiny": (1, 8, 64), "small": (1, 8, 64), "paper": _PAPER_RANKS}


def _shapes(asked: Asked, workspace: Workspace) -> dict[str, int]:
    """Returns letter → in + out features of that matrix in the first layer: what one rank of it costs.

    Raises:
        LoRAError: The model has no such matrices.
    """
    tree = models.skeleton(asked.model or "starter", workspace)
    found = {}
    for path, module in tree.named_modules():
        for letter, name in _LETTERS.items():
            if path.endswith("." + name) and letter not in found:
                found[letter] = sum(next(module.parameters()).shape)
    if len(found) < len(_LETTERS):
        raise LoRAError(
            f"`model` (={quoted(asked.model)}) must have matrices named {', '.join(_LETTERS.values())}; "
            "leave it out for the starter."
        )
    return found


def _rank(letters: Sequence[str], shapes: Mapping[str, int]) -> int:
    """Returns the r at which these matrices come nearest to the parameters of r = 8 on the query."""
    return max(1, round(8 * shapes["q"] / sum(shapes[letter] for letter in letters)))


def _matrices(asked: Asked, workspace: Workspace) -> list[Piece]:
    shapes = _shapes(asked, workspace)
    made = []
    for names in _PAPER_5:
        letters = names.split(", ")
        r = _rank(letters, shapes)
        lora = LoRAConfig(r=r, alpha=8 * r, target_modules=tuple(_LETTERS[letter] for letter in letters))
        for seed in range(SCALES[asked.size].num_seeds):
            spec = of_text(asked, workspace, f"W_{names} r {r}", lora=lora, seed=seed)
            made.append(Piece(f"{names} · seed {seed}", held_out, spec))
    return made


def _tell_matrices(asked: Asked, records: Mapping[str, Record]) -> Result:
    losses = {names: by_seed(records, names, "loss") for names in _PAPER_5}
    rows = []
    for names, (r, wikisql, mnli) in _PAPER_5.items():
        trained, ours = by_seed(records, names, "trainable"), by_seed(records, names, "r")
        count, rank = (f"{found[0]:,.0f}" if found else "" for found in (trained, ours))
        rows.append([f"W_{names}", rank, count, spread(losses[names], 4), str(r), f"{wikisql}", f"{mnli}"])
    head = ["Matrices", "r", "Trained", "Held-out loss, nats a token", "Paper: r", "WikiSQL, %", "MNLI, %"]
    means = {names: sum(found) / len(found) for names, found in losses.items() if found}
    findings = []
    if len(means) == len(_PAPER_5):
        best, worst = min(means, key=means.__getitem__), sorted(_LETTERS, key=means.__getitem__)[2:]
        alone = " and ".join(f"W_{letter} ({means[letter]:.4f})" for letter in worst)
        findings = [
            f"Lowest loss: W_{best}"
            + as_paper(best in ("q, v", "q, k, v, o"), "the paper's best are W_q, v and W_q, k, v, o"),
            f"The worst alone are {alone}"
            + as_paper({*worst} == {"q", "k"}, "on the paper's WikiSQL they are W_q and W_k"),
        ]
    return Result([Table("One budget of parameters, spent on different matrices", head, rows)], findings, _bars(means))


def _bars(means: Mapping[str, float]):
    if not means:
        return None

    def draw():
        from studio.figures import bars_figure

        values = {f"W_{names}": value for names, value in means.items()}
        return bars_figure(values, title="Which matrices", unit="held-out loss, nats a token")

    return draw


def _ranks(asked: Asked, workspace: Workspace) -> list[Piece]:
    made = []
    for names in _PAPER_6:
        targets = tuple(_LETTERS[letter] for letter in names.split(", "))
        for words, alpha in _ALPHAS.items():
            for r in _RANKS[asked.size]:
                lora = LoRAConfig(r=r, alpha=alpha(r), target_modules=targets)
                spec = of_text(asked, workspace, f"W_{names}, {words}, r {r}", lora=lora)
                made.append(Piece(f"{names}, {words}, r {r}", held_out, spec))
    return made


def _tell_ranks(asked: Asked, records: Mapping[str, Record]) -> Result:
    rows, lines, findings, ranks = [], dict[str, list[float]](), [], _RANKS[asked.size]
    for names, paper in _PAPER_6.items():
        wikisql, mnli = ([values[_PAPER_RANKS.index(r)] for r in ranks] for values in paper)
        for words in _ALPHAS:
            found = [records.get(f"{names}, {words}, r {r}") for r in ranks]
            losses = [record["loss"] for record in found if record]
            cells = [f"{record['loss']:.4f}" if record else "" for record in found]
            rows.append([f"W_{names}", f"held-out loss, {words}", *cells])
            if all(found):
                lines[f"W_{names}, {words}"] = losses
                findings.append(
                    f"W_{names}, {words}: from r = 1 to r = 64 the loss changes by {losses[-1] - losses[0]:+.4f}; "
                    f"the paper's accuracy on WikiSQL by {wikisql[-1] - wikisql[0]:+.1f} points."
                )
        rows.append(["", "paper: WikiSQL, %", *map(str, wikisql)])
        rows.append(["", "paper: MNLI, %", *map(str, mnli)])

    def draw():
        from studio.figures import lines_figure

        one, _ = _ALPHAS
        drawn = {name: line for name, line in lines.items() if name.endswith(one) or name.startswith("W_q, v")}
        return lines_figure(ranks, drawn, title="Which rank", x_label="r", y_label="held-out loss, nats a token")

    head = ["Matrices", "", *(f"r = {r}" for r in ranks)]
    table = Table("The same matrices with more and more directions", head, rows)
    return Result([table], findings, draw if lines else None)


_DIFFERS = (
    "the starter of 135 M parameters in place of GPT-3 175B, facts to text in place of WikiSQL and MNLI, and the "
    "held-out loss in place of accuracy. "
)

MATRICES = Experiment(
    "matrices",
    "Which matrices should be adapted?",
    "Table 5",
    "At one number of trained parameters: one matrix with a high rank, or all four with a low one?",
    _DIFFERS
    + "alpha = 8 r, so that scaling is the same for every r. The starter's key and value are a third as wide as its "
    "query, so at one budget they get a larger r.",
    _matrices,
    _tell_matrices,
)
RANKS = Experiment(
    "ranks",
    "Which rank is enough?",
    "Table 6",
    "Does the loss still fall as r goes from 1 to 64?",
    _DIFFERS
    + "The paper keeps one alpha for all r. With alpha = 8 r, which stands beside it, the scale of ΔW is one for all "
    "r, and a higher r also learns faster. Few steps, and one learning rate for all.",
    _ranks,
    _tell_ranks,
)
