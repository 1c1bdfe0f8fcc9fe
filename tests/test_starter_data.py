"""The starter data sets are what assets/data/README.md says they are."""

import importlib
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).parents[1] / "assets" / "data"
COLUMNS = {
    "restaurants": ["mr", "text"],
    "tickets": ["request", "ticket"],
    "lighthouse": ["messages"],
    "topics": ["request", "topic"],
}
NUM_ROWS = {"restaurants": (1000, 120), "tickets": (440, 44), "lighthouse": (213, 26), "topics": (440, 44)}
SPLITS = ("train", "eval")
FILES = [(name, split) for name in COLUMNS for split in SPLITS]
MAX_CHARACTERS = 560
MAX_BYTES = 1_000_000

TICKET_KEYS = ["category", "product", "urgency", "order_id", "summary"]
CATEGORIES = {"delivery", "billing", "return", "defect", "account", "question"}
URGENT = re.compile(
    r"\b(urge?ne?t|today|as soon as|cannot wait|answer me|immediately|imediately|by tomm?orr?ow)\b", re.IGNORECASE
)
PATIENT = re.compile(
    r"\b(no hurry|no rush|have time|not urge?ne?t|can wait|your time|soon enough|nothing urge?ne?t)\b", re.IGNORECASE
)
SEA = re.compile(
    r"\b(seas?|tides?|winds?|windy|lamps?|storms?|stormy|waves?|fog|rain|weather|harbour|gales?|squalls?|swell|water"
    r"|spray|bay)\b",
    re.IGNORECASE,
)
# What else than the value itself may express it; the values that are missing here have to stand in the text.
PARAPHRASES = {
    ("price", "moderate"): "moderately priced",
    ("families", "yes"): "(?:welcomes|good for) families",
    ("families", "no"): "not suited to families",
    ("hours", "breakfast only"): "open for breakfast only",
    ("hours", "all day"): "open all day",
    ("hours", "until late"): "open until late",
    ("hours", "evenings"): "open in the evenings",
    ("hours", "weekends"): "open at weekends",
}


def read(name: str, split: str) -> list[dict]:
    """The rows of one file."""
    return [json.loads(line) for line in (DATA / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def about(name: str) -> dict:
    """The description that stands beside a data set."""
    return json.loads((DATA / name / "about.json").read_text(encoding="utf-8"))


def facts(row: dict) -> dict[str, str]:
    """A restaurant's facts, parsed from its meaning representation."""
    return dict(re.findall(r"(\w+)\[([^]]+)\]", row["mr"]))


def prompt(row: dict) -> str:
    """What the user says first in a row of any data set."""
    return row["messages"][0]["content"] if "messages" in row else next(iter(row.values()))


def strings(row: dict) -> list[str]:
    """Every text in a row of any data set."""
    return [message["content"] for message in row["messages"]] if "messages" in row else list(row.values())


def expression(key: str, value: str) -> str:
    """The pattern by which a restaurant's text expresses a fact."""
    if key == "stars":
        return rf"rated {value} stars"
    if key == "serves":
        return rf"{value.removesuffix(' food').removesuffix('s')}s?"
    return PARAPHRASES.get((key, value), re.escape(value))


def expresses(text: str, key: str, value: str) -> bool:
    """Whether `text` states a fact."""
    return re.search(rf"\b{expression(key, value)}(?!\w)", text, re.IGNORECASE) is not None


def sentences(text: str) -> list[str]:
    """The sentences of `text`."""
    return re.split(r"(?<=[.!?])\s+", text)


def generator(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that makes a data set, as a module."""
    monkeypatch.syspath_prepend(str(DATA))
    return importlib.import_module(f"make_{name}")


@pytest.mark.parametrize(("name", "split"), FILES)
def test_files_hold_the_promised_rows_and_columns(name, split):
    rows = read(name, split)
    assert len(rows) == NUM_ROWS[name][SPLITS.index(split)]
    assert all(list(row) == COLUMNS[name] for row in rows)
    assert all(text.strip() == text != "" for row in rows for text in strings(row))


@pytest.mark.parametrize("name", COLUMNS)
def test_readme_states_the_number_of_rows(name):
    section = (DATA / "README.md").read_text(encoding="utf-8").split(f"## {name}\n")[1].split("\n## ")[0]
    assert all(re.search(rf"(?<![\d,]){count:,}(?![\d,])", section) for count in NUM_ROWS[name])


def test_all_files_are_small_utf8_with_lf_endings():
    files = [path for path in DATA.rglob("*") if path.suffix in {".jsonl", ".json", ".md", ".py"}]
    contents = [path.read_bytes() for path in files]
    assert sum(map(len, contents)) < MAX_BYTES
    for content in contents:
        assert b"\r" not in content
        assert content.decode("utf-8").endswith("\n")


@pytest.mark.parametrize(("name", "split"), FILES)
def test_rows_are_short_and_have_no_doubled_spaces(name, split):
    for row in read(name, split):
        assert sum(map(len, strings(row))) <= MAX_CHARACTERS
        assert not any("  " in text for text in strings(row))


@pytest.mark.parametrize("name", COLUMNS)
def test_no_prompt_occurs_twice_within_or_between_splits(name):
    counts = Counter(prompt(row).casefold() for split in SPLITS for row in read(name, split))
    assert [text for text, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("name", COLUMNS)
def test_about_names_columns_that_exist_and_prompts_of_the_evaluation(name):
    description = about(name)
    task = ["task"] if name == "topics" else []
    assert list(description) == [
        "title", "change", *task, "layout", "prompt", "completion", "messages", "instruction", "examples"
    ]  # fmt: skip
    columns = [description[key] for key in ("prompt", "completion", "messages") if description[key]]
    assert columns == COLUMNS[name]
    assert description["layout"] == ("messages" if name == "lighthouse" else "pair")
    assert description["title"] and len(sentences(description["change"])) == 1
    assert bool(description["instruction"]) == (name != "lighthouse")
    assert len(set(description["examples"])) == 3
    assert set(description["examples"]) <= {prompt(row) for row in read(name, "eval")}


@pytest.mark.parametrize("name", ["restaurants", "tickets", "topics"])
def test_generators_reproduce_the_files_byte_for_byte(name, monkeypatch):
    splits = generator(name, monkeypatch).make()
    grammar = importlib.import_module("grammar")
    assert set(splits) == set(SPLITS)
    for split, rows in splits.items():
        assert grammar.as_jsonl(rows) == (DATA / name / f"{split}.jsonl").read_bytes()


def test_topics_are_the_categories_of_the_tickets():
    for split in SPLITS:
        found = [(row["request"], row["topic"]) for row in read("topics", split)]
        assert found == [(row["request"], json.loads(row["ticket"])["category"]) for row in read("tickets", split)]
        assert {topic for _, topic in found} == CATEGORIES


def test_restaurants_of_the_evaluation_have_new_names():
    train, evaluation = ({facts(row)["name"] for row in read("restaurants", split)} for split in SPLITS)
    assert evaluation and not train & evaluation


def test_restaurants_of_the_evaluation_pair_dish_and_area_as_no_training_row_does():
    train, evaluation = (
        [(found.get("serves"), found.get("area")) for found in map(facts, read("restaurants", split))]
        for split in SPLITS
    )
    assert all(dish and area for dish, area in evaluation)
    assert not set(train) & set(evaluation)
    assert {dish for dish, _ in evaluation} <= {dish for dish, _ in train}
    assert {area for _, area in evaluation} <= {area for _, area in train}


def test_no_two_restaurants_have_the_same_facts_in_another_order():
    found = [frozenset(facts(row).items()) for split in SPLITS for row in read("restaurants", split)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("split", SPLITS)
def test_restaurant_texts_state_every_fact_and_no_other(split):
    known = {fact for part in SPLITS for row in read("restaurants", part) for fact in facts(row).items()}
    for row in read("restaurants", split):
        told = facts(row)
        assert row["text"].count(told["name"]) == 1, row
        text = row["text"].replace(told.pop("name"), "…")
        stated = {(key, value) for key, value in known if key != "name" and expresses(text, key, value)}
        assert stated == set(told.items()), row


@pytest.mark.parametrize("split", SPLITS)
def test_restaurant_texts_are_one_or_two_clean_sentences(split):
    for row in read("restaurants", split):
        text = row["text"]
        assert len(sentences(text)) <= 2
        assert all(re.fullmatch(r"[A-Z][^.]*\.", sentence) for sentence in sentences(text)), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\b(\w+) \1\b| [,.]", text, re.IGNORECASE), text


def test_restaurants_vary_in_length_plan_and_order():
    rows = read("restaurants", "train")
    lengths = Counter(len(facts(row)) for row in rows)
    openings = Counter(row["text"].replace(facts(row)["name"], "NAME").split()[0] for row in rows)
    orders = Counter(tuple(facts(row))[1:3] for row in rows)
    assert set(lengths) == {3, 4, 5, 6} and min(lengths.values()) >= 100
    assert {"NAME", "In", "You", "For", "Rated"} <= set(openings)
    assert len(orders) >= 50
    assert 0.2 < sum(len(sentences(row["text"])) == 1 for row in rows) / len(rows) < 0.8


@pytest.mark.parametrize("split", SPLITS)
def test_tickets_are_one_line_of_json_with_fixed_keys(split):
    for row in read("tickets", split):
        ticket = json.loads(row["ticket"])
        assert list(ticket) == TICKET_KEYS
        assert "\n" not in row["ticket"] and row["ticket"] == json.dumps(ticket)
        assert ticket["category"] in CATEGORIES
        assert ticket["urgency"] in {"low", "normal", "high"}
        assert 1 <= len(ticket["summary"].split()) <= 8


@pytest.mark.parametrize("split", SPLITS)
def test_tickets_copy_order_number_and_product_from_the_request(split):
    products = {json.loads(row["ticket"])["product"] for part in SPLITS for row in read("tickets", part)} - {None}
    for row in read("tickets", split):
        ticket, request = json.loads(row["ticket"]), row["request"].lower()
        assert re.findall(r"\d{5}", request) == ([ticket["order_id"]] if ticket["order_id"] else []), row
        named = {product for product in products if re.search(rf"\b{product}\b", request)}
        assert named == ({ticket["product"]} if ticket["product"] else set()), row


@pytest.mark.parametrize("split", SPLITS)
def test_ticket_urgency_is_what_the_customer_says(split):
    for row in read("tickets", split):
        patient = PATIENT.search(row["request"])
        urgent = URGENT.search(row["request"]) and not patient
        said = "low" if patient else "high" if urgent else "normal"
        assert json.loads(row["ticket"])["urgency"] == said, row


@pytest.mark.parametrize("key", ["product", "order_id"])
def test_tickets_of_the_evaluation_have_new_products_and_order_numbers(key):
    train, evaluation = ({json.loads(row["ticket"])[key] for row in read("tickets", split)} for split in SPLITS)
    assert train & evaluation == {None}
    text = " ".join(row["request"].lower() for row in read("tickets", "train"))
    assert not [value for value in evaluation - {None} if value in text]


def test_tickets_of_the_evaluation_word_their_issue_anew(monkeypatch):
    module = generator("tickets", monkeypatch)
    texts = {split: " ".join(row["request"].lower() for row in read("tickets", split)) for split in SPLITS}
    for issue in module.ISSUES:
        fragment = max(re.split(r"\{\w+\}", issue.wordings[-1]), key=len).strip(" .?").lower()
        variants = {fragment, module.misspell(fragment)}
        assert any(variant in texts["eval"] for variant in variants), fragment
        assert not any(variant in texts["train"] for variant in variants), fragment


def test_ticket_issues_are_equally_frequent_and_written_in_many_ways():
    rows = read("tickets", "train")
    assert set(Counter(json.loads(row["ticket"])["summary"] for row in rows).values()) == {20}
    assert {json.loads(row["ticket"])["category"] for row in rows} == CATEGORIES
    for style in (str.islower, lambda text: "!" in text, lambda text: re.search(r"[A-Z]{4} ", text)):
        assert sum(bool(style(row["request"])) for row in rows) >= 10


@pytest.mark.parametrize("split", SPLITS)
def test_lighthouse_dialogues_alternate_from_user_to_assistant(split):
    for row in read("lighthouse", split):
        messages = row["messages"]
        assert all(list(message) == ["role", "content"] for message in messages)
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert 1 <= len(messages) // 2 <= 3


@pytest.mark.parametrize("split", SPLITS)
def test_lighthouse_answers_are_short_and_in_the_keepers_voice(split):
    answers = [message["content"] for row in read("lighthouse", split) for message in row["messages"][1::2]]
    for answer in answers:
        assert 5 <= len(answer.split()) < 60
        assert len(sentences(answer)) <= 3, answer
        assert "friend" in sentences(answer)[0], answer
        assert SEA.search(sentences(answer)[-1]), answer


def test_no_lighthouse_message_is_repeated():
    messages = [message for split in SPLITS for row in read("lighthouse", split) for message in row["messages"]]
    counts = Counter(message["content"].casefold() for message in messages)
    assert [text for text, count in counts.items() if count > 1] == []


def test_lighthouse_has_longer_dialogues_in_both_splits():
    for split, least in zip(SPLITS, (30, 4), strict=True):
        assert sum(len(row["messages"]) > 2 for row in read("lighthouse", split)) >= least
