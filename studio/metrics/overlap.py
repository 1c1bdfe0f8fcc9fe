"""Metrics of common words and their runs: exact match, BLEU, NIST, ROUGE, CIDEr."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from studio.metrics.base import Metric, References, mean, mean_of
from studio.metrics.words import Ngram, library, ngrams, words

BETA = 1.2
"""Weight of recall over precision in ROUGE-L, as the COCO captions' evaluation has it."""

NIST_ORDER = 5
NIST_BETA = -math.log(0.5) / math.log(1.5) ** 2
"""A text of 2/3 of the references' length is worth half (mteval-v13a)."""

CIDER_ORDER, CIDER_SIGMA = 4, 6.0


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Returns 1 if the answer is one of the references, up to white space, and else 0."""
    return float(" ".join(answer.split()) in {" ".join(reference.split()) for reference in references})


def bleu(order: int = 4) -> Metric:
    """Returns BLEU over the whole corpus, from 0 to 1, in lower case and mteval-v13a's tokens; by sacrebleu.

    Of references of several lengths the nearest counts. Where no run of `order` words is common, sacrebleu's
    exponential smoothing gives half, a quarter … of one.
    """

    def statistics(predictions: Sequence[str], references: References) -> np.ndarray:
        scorer = library("sacrebleu", "BLEU").BLEU(lowercase=True, max_ngram_order=order, effective_order=True)
        found = [scorer.sentence_score(p, list(r)) for p, r in zip(predictions, references, strict=True)]
        return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in found], float)

    def score(total: np.ndarray) -> float:
        counts, totals, lengths = np.split(total.astype(int), [order, 2 * order])
        compute = library("sacrebleu", "BLEU").BLEU.compute_bleu
        found = compute(counts.tolist(), totals.tolist(), *lengths.tolist(), max_ngram_order=order)
        return found.score / 100 if counts[0] else 0.0

    return Metric("BLEU" if order == 4 else f"BLEU-{order}", statistics, score)


def nist() -> Metric:
    """Returns NIST: common runs of up to five words, each worth what the references let it tell, in bits.

    As mteval-v13a: a run's worth is log₂(count of all but its last word / count of it) in all references, and a text
    is held against the mean length of its references. With nltk's only the single-reference case would agree.
    Source: Doddington 2002.
    """

    def statistics(predictions: Sequence[str], references: References) -> np.ndarray:
        tokens = library("sacrebleu.tokenizers.tokenizer_13a", "NIST").Tokenizer13a()
        said = [tokens(text.lower()).split() for text in predictions]
        wanted = [[tokens(text.lower()).split() for text in texts] for texts in references]
        known: Counter[Ngram] = Counter()
        for text in (text for texts in wanted for text in texts):
            known[()] += len(text)
            for n in range(1, NIST_ORDER + 1):
                known.update(ngrams(text, n))
        return np.array([_nist_row(s, w, known) for s, w in zip(said, wanted, strict=True)])

    def score(total: np.ndarray) -> float:
        info, counts, (length, wanted) = np.split(total, [NIST_ORDER, 2 * NIST_ORDER])
        ratio = min(1.0, length / wanted) if wanted else 0.0
        if not ratio:
            return 0.0
        per_order = np.divide(info, counts, out=np.zeros_like(info), where=counts > 0)
        return float(per_order.sum()) * math.exp(-NIST_BETA * math.log(ratio) ** 2)

    return Metric("NIST", statistics, score)


def _nist_row(said: list[str], wanted: list[list[str]], known: Counter[Ngram]) -> list[float]:
    info, counts = [], []
    for n in range(1, NIST_ORDER + 1):
        most: Counter[Ngram] = Counter()
        for text in wanted:
            most |= ngrams(text, n)
        common = ngrams(said, n) & most
        info.append(sum(num * math.log2(known[run[:-1]] / known[run]) for run, num in common.items()))
        counts.append(max(0, len(said) - n + 1))
    return [*info, *counts, len(said), sum(map(len, wanted)) / len(wanted)]


def rouge(name: str, *, stemmed: bool = True) -> Metric:
    """Returns the mean F1 of "ROUGE-1", "ROUGE-2" or "ROUGE-L"; by rouge-score, against the best of the references.

    With `stemmed`, Porter's stems are compared, as most published figures on summaries have it.
    """

    def statistics(predictions: Sequence[str], references: References) -> np.ndarray:
        kind = name.lower().replace("-l", "L").replace("-", "")
        scorer = library("rouge_score.rouge_scorer", name).RougeScorer([kind], use_stemmer=stemmed)
        found = [scorer.score_multi(list(r), p)[kind] for p, r in zip(predictions, references, strict=True)]
        return np.array([[one.fmeasure, 1.0] for one in found])

    return Metric(name, statistics, mean)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Returns ROUGE-L: F of the longest common subsequence of words, of the best precision and recall.

    F = (1 + β²)·P·R / (R + β²·P); Lin 2004, *ROUGE: A Package for Automatic Evaluation of Summaries*, with β = 1.2.
    """
    said = words(answer)
    wanted = [found for reference in references if (found := words(reference))]
    if not said or not wanted:
        return 0.0
    common = [_common(said, found) for found in wanted]
    precision = max(common) / len(said)
    recall = max(c / len(found) for c, found in zip(common, wanted, strict=True))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if max(common) else 0.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def cider() -> Metric:
    """Returns CIDEr-D, from 0 to 10: cosines of tf-idf vectors of runs of one to four words, as COCO's evaluation.

    How rare a run is, is counted over the rows' references, so that one row alone has nothing to go by and scores 0.
    Repeating a run more often than a reference brings nothing, and a difference of lengths d costs exp(-d² / 2σ²).
    Source: Vedantam et al. 2015, arXiv:1411.5726.
    """

    def statistics(predictions: Sequence[str], references: References) -> np.ndarray:
        wanted = [[_runs(text) for text in texts] for texts in references]
        rows_with: Counter[Ngram] = Counter(
            run for texts in wanted for run in {run for text in texts for counts in text for run in counts}
        )
        scores = []
        for said, texts in zip(map(_runs, predictions), wanted, strict=True):
            one = _weighed(said, rows_with, len(wanted))
            scores.append(np.mean([_likeness(one, _weighed(text, rows_with, len(wanted))) for text in texts]))
        return np.stack([np.array(scores, float), np.ones(len(scores))], axis=1)

    return Metric("CIDEr", statistics, mean)


def _runs(text: str) -> list[Counter[Ngram]]:
    tokens = words(text)
    return [ngrams(tokens, n) for n in range(1, CIDER_ORDER + 1)]


_Weighed = tuple[list[dict[Ngram, float]], int]


def _weighed(runs: list[Counter[Ngram]], rows_with: Counter[Ngram], num_rows: int) -> _Weighed:
    """Returns the tf-idf vector of each order, and how many pairs of words there are, which is taken for the length."""
    idf = math.log(num_rows)
    vectors = [{run: num * (idf - math.log(max(1, rows_with[run]))) for run, num in counts.items()} for counts in runs]
    return vectors, runs[1].total()


def _likeness(said: _Weighed, wanted: _Weighed) -> float:
    total = 0.0
    for a, b in zip(said[0], wanted[0], strict=True):
        norm = math.hypot(*a.values()) * math.hypot(*b.values())
        if norm:
            total += sum(min(value, b[run]) * b[run] for run, value in a.items() if run in b) / norm
    return 10 * total / CIDER_ORDER * math.exp(-((said[1] - wanted[1]) ** 2) / (2 * CIDER_SIGMA**2))


EXACT = mean_of("Exact match", exact_match)
ROUGE_L = mean_of("ROUGE-L", rouge_l)
