"""The metrics of generated text, against the values that public implementations give and by what must hold."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from core import LoRAError
from studio import metrics
from studio.metrics import TASKS, bleu, cider, meteor, nist, rouge
from studio.metrics.base import SAMPLES
from studio.metrics.sql import logical_form, parse
from studio.metrics.words import words

SHARED = Path("/work/shared/data")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not on this machine")

# A few sentences in the manner of E2E, several references a row; none of them from a data set.
REFERENCES = [
    ["The Inn has 3 stars and isn't cheap.", "With 3 stars, the Inn is expensive."],
    ["A family-friendly cafe by the river, the Mill serves fish.", "The Mill is a family friendly riverside cafe."],
    ["Near the Mill you find the Oak; it serves Indian food."],
    ["The Oak costs less than £20.", "You pay under £20 at the Oak.", "The Oak is cheap."],
]
PREDICTIONS = [
    "The Inn has 3 stars.",
    "The Mill is a cafe by the river serving fishes.",
    "The Oak serves Indian food near the Mill.",
    "The Oak is cheap and costs less.",
]
CORPUS_METRICS = {m.name: m for task in ("data_to_text", "summary") for m in TASKS[task].metrics}


@pytest.fixture(scope="module")
def oracles():
    return json.loads((SHARED / "metric_oracles.json").read_text())


@needs_shared
@pytest.mark.parametrize(
    ("name", "metric", "digits"),
    [(f"bleu_{n}", bleu(n), 1e-6) for n in range(1, 5)]
    + [("rouge_l", TASKS["data_to_text"].metrics[3], 1e-6), ("cider", cider(), 1e-6)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_corpus_scores_what_the_reference_implementation_gives(name, metric, digits, oracles):
    for case in (oracles["corpus_two_items"], oracles["single"]):
        if name in case["expected"]:
            said = case.get("hypotheses") or [case["hypothesis"]]
            wanted = case["references"] if "hypotheses" in case else [case["references"]]
            assert metric(said, wanted) == pytest.approx(case["expected"][name], abs=2 * digits)


@needs_shared
def test_meteor_is_the_reference_s_where_no_synonym_or_paraphrase_matches_and_less_where_one_does(oracles):
    one, two = oracles["single"], oracles["corpus_two_items"]
    assert meteor()([one["hypothesis"]], [one["references"]]) == pytest.approx(one["expected"]["meteor"], abs=5e-6)
    # METEOR 1.5's own code, run on these two with `-m "exact stem"`, prints 0.2673152202390133; with its synonyms
    # 0.2825, and with its paraphrases the expected value.
    found = meteor()(two["hypotheses"], two["references"])
    assert found == pytest.approx(0.2673152202390133, abs=1e-15) and found < two["expected"]["meteor"]


@needs_shared
def test_rouge_is_that_of_the_perl_script(oracles):
    said, wanted = ((SHARED / "rouge_perl" / f"{n}.txt").read_text().splitlines() for n in ("prediction", "target"))
    for prediction, target, expected in zip(said, wanted, oracles["rouge_perl_1_5_5"]["expected"], strict=True):
        for key, (_, _, f) in expected.items():
            name = "ROUGE-" + key[5]
            found = rouge(name, stemmed=key.endswith("stemmed"))([prediction], [[target]])
            assert found == pytest.approx(f, abs=5e-6)


def test_nist_of_one_reference_a_row_is_nltk_s():
    from nltk.translate.nist_score import corpus_nist

    wanted = [texts[0].lower().replace(".", "").replace(",", "") for texts in REFERENCES]
    said = [text.lower().replace(".", "") for text in PREDICTIONS]
    found = nist()(said, [[text] for text in wanted])
    split = [text.replace(";", " ;").split() for text in wanted]
    expected = corpus_nist([[text] for text in split], [text.split() for text in said], n=5)
    assert found == pytest.approx(expected, rel=1e-9)


def test_nist_gives_each_word_the_bits_that_the_references_give_it():
    # Of eight words each is there once, so that a word tells 3 bits, and a pair nothing beyond its first word.
    assert nist()(["a b c d"], [["a b c d e f g h"]]) == pytest.approx(
        3 * np.exp(-np.log(2) * (np.log(0.5) / np.log(1.5)) ** 2)
    )
    assert nist()(["a b c d e f g h"], [["a b c d e f g h"]]) == pytest.approx(3)


@pytest.mark.parametrize("name", CORPUS_METRICS)
def test_a_perfect_prediction_has_the_most_and_one_without_a_common_word_nothing(name):
    metric = CORPUS_METRICS[name]
    perfect = [texts[0] for texts in REFERENCES]
    alone = [[text] for text in perfect]
    top = metric(perfect, alone)
    expected = {"NIST": top, "CIDEr": 10.0}.get(name, 1.0)
    assert top == pytest.approx(expected) and top > metric(PREDICTIONS, alone) > 0
    assert metric(["zebra"] * 4, REFERENCES) == 0 == metric([""] * 4, REFERENCES)


@pytest.mark.parametrize("name", CORPUS_METRICS)
def test_neither_the_order_of_rows_nor_that_of_references_matters(name):
    metric = CORPUS_METRICS[name]
    turned = [list(reversed(texts)) for texts in reversed(REFERENCES)]
    assert metric(PREDICTIONS[::-1], turned) == pytest.approx(metric(PREDICTIONS, REFERENCES), rel=1e-12)


@pytest.mark.parametrize("name", ["ROUGE-1", "ROUGE-2", "ROUGE-L"])
def test_a_further_reference_never_lowers_the_best_of_references(name):
    more = [[*texts, "The Oak serves fish in the Mill."] for texts in REFERENCES]
    assert CORPUS_METRICS[name](PREDICTIONS, more) >= CORPUS_METRICS[name](PREDICTIONS, REFERENCES)


def test_a_further_reference_never_lowers_bleu_s_precisions():
    rows = bleu().of_rows(PREDICTIONS, REFERENCES)
    more = bleu().of_rows(PREDICTIONS, [[*texts, "The Oak serves fish in the Mill."] for texts in REFERENCES])
    assert (more[:, :4] >= rows[:, :4]).all() and (more[:, 4:8] == rows[:, 4:8]).all()
    assert (more[:, :4] > rows[:, :4]).any()


def test_cider_lets_nothing_be_gained_by_saying_a_word_twice():
    # Words: 2·2/(√8·√2) = 1/2, though the direction is the same. Pairs: one of three, 1/√3. Lengths: 3 pairs and 1.
    first = 10 * (1 / 2 + 1 / np.sqrt(3)) / 4 * np.exp(-4 / 72)
    assert cider()(["a a b b", "c d"], [["a b"], ["c d"]]) == pytest.approx((first + 5) / 2)


def test_of_two_alignments_meteor_takes_the_one_with_fewer_chunks_and_stems_count_for_less():
    score = meteor()
    # "the" may go with either; only the second leaves one chunk.
    assert score(["the blue boat"], [["the red the blue boat"]]) > score(["blue the boat"], [["the red the blue boat"]])
    equal, stems, none = (
        score([text], [["two boats sailed"]]) for text in ("two boats sailed", "two boat sailing", "two")
    )
    assert equal == 1 > stems > none > 0


def test_words_are_those_of_the_penn_treebank_without_punctuation():
    assert words("It isn’t family-friendly; under £20 (3.5 stars), the Inn's.") == [
        *("it", "is", "n't", "family-friendly", "under", "£", "20", "3.5", "stars", "the", "inn", "'s")
    ]


def test_the_interval_holds_the_score_and_is_the_same_each_time():
    many = [text for text in PREDICTIONS for _ in range(5)], [texts for texts in REFERENCES for _ in range(5)]
    found, again = (TASKS["data_to_text"].measure(*many) for _ in range(2))
    assert found == again and [result.num for result in found] == [20] * 5
    assert all(result.low < result.value < result.high for result in found)


def test_an_interval_of_a_mean_is_that_of_the_binomial_law():
    predictions, references = ["a"] * 30 + ["b"] * 70, [["a"]] * 100
    (result,) = TASKS["exact"].measure(predictions, references)
    assert result.value == 0.3 and SAMPLES == 1000
    # ±1.96·√(0.3·0.7/100) = 0.09, to about a tenth by so many samples
    assert (result.low, result.high) == pytest.approx((0.21, 0.39), abs=0.015)


def test_a_paired_bootstrap_sees_a_difference_that_each_row_has_and_none_where_there_is_none():
    metric = TASKS["exact"].metrics[0]
    references = [["a"]] * 60
    better, worse = ["a"] * 40 + ["b"] * 20, ["a"] * 25 + ["b"] * 35
    found = metrics.difference(metric, better, worse, references)
    assert found.value == pytest.approx(0.25) and found.p < 0.01
    # ±1.96·√(0.25·0.75/60) = 0.11: the rows' own differences, not the sum of two spreads
    assert (found.low, found.high) == pytest.approx((0.14, 0.36), abs=0.02)
    back = metrics.difference(metric, worse, better, references)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert metrics.difference(metric, worse, worse, references).p == 1


def test_what_does_not_fit_is_refused():
    metric = TASKS["exact"].metrics[0]
    with pytest.raises(
        LoRAError, match=r"`references` \(=1 rows\) must be of as many rows as there are predictions \(=2\)"
    ):
        metric(["a", "b"], [["a"]])
    with pytest.raises(LoRAError, match="at least one"):
        metric([], [])
    with pytest.raises(LoRAError, match="at least one text for each row; row 2 has none"):
        metric(["a", "b"], [["a"], []])


@pytest.mark.parametrize(
    ("task", "module"), [("data_to_text", "sacrebleu"), ("data_to_text", "nltk"), ("summary", "rouge_score")]
)
def test_a_library_that_is_missing_is_named_with_what_installs_it(task, module, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        LoRAError, match=rf"needs {module}, which is not installed; install `pip install lora-studio\[eval\]`"
    ):
        TASKS[task].check()
    TASKS["text_to_sql"].check()


QUERY = (
    "SELECT COUNT Name (EN) FROM 1-23-4 WHERE Top 5 = 9 AND State/territory = 'New  Wales AND O'Brien' AND Pick < 243.0"
)


@pytest.mark.parametrize(
    ("query", "is_same"),
    [
        (
            "select COUNT name (en) from t where pick < 243 and top 5 = 9 "
            "and State/Territory = 'new wales and o'brien'",
            True,
        ),
        (QUERY.replace("243.0", "'243'"), True),
        (QUERY.replace("COUNT", "SUM"), False),
        (QUERY.replace("COUNT ", ""), False),
        (QUERY.replace("(EN)", "(FR)"), False),
        (QUERY.replace("<", ">"), False),
        (QUERY.replace("= 9", "= 8"), False),
        (QUERY.replace(" AND Pick < 243.0", ""), False),
        (QUERY + " AND Pick = 1", False),
    ],
)
def test_queries_are_compared_by_what_they_ask(query, is_same):
    assert logical_form(query, [QUERY]) == is_same
    assert parse(query)  # each of them can be read


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", r"`query` \(=''\) must read SELECT … FROM … or SELECT … FROM … WHERE …"),
        ("The answer is 3.", "must read SELECT … FROM …"),
        ("SELECT a", "must read SELECT … FROM …"),
        ("SELECT a FROM t WHERE b", r"`query` \(=… 'b'\) must have a condition there: column = value"),
        ("SELECT a FROM t WHERE b = 1 AND c", r"`query` \(=… 'c'\) must have a condition there"),
        ("SELECT a FROM t WHERE b = 'c", "must have a condition there"),
    ],
)
def test_a_query_that_cannot_be_read_is_wrong_and_says_why(query, message):
    with pytest.raises(LoRAError, match=message):
        parse(query)
    assert logical_form(query, ["SELECT a FROM t WHERE b = 1"]) == 0
    assert re.search(message, TASKS["text_to_sql"].problem(query))
    with pytest.raises(LoRAError, match=message):
        logical_form("SELECT a FROM t", [query])


@needs_shared
def test_every_query_of_wikisql_is_read_with_all_of_its_conditions():
    for file in ("train", "valid"):
        for line in (SHARED / "wikisql" / f"{file}.jsonl").read_text().splitlines():
            text = json.loads(line)["text"].rpartition("\nA: ")[2]
            query = parse(text)
            assert len(query.conditions) == (" WHERE " in text) + text.count(" AND ")
            assert logical_form(text, [text]) == 1
