"""Queries of WikiSQL as text, read into their logical form: what is selected, how it is summed up, and where.

SELECT [MAX|MIN|COUNT|SUM|AVG] column FROM table [WHERE column =|>|< value [AND …]]
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from core import LoRAError, quoted

AGGREGATES = ("MAX", "MIN", "COUNT", "SUM", "AVG")

_QUERY = re.compile(
    r"\s*SELECT\s+(?P<select>.+?)\s+FROM\s+(?P<table>\S+)(?:\s+WHERE\s+(?P<where>.+?))?\s*;?\s*", re.I | re.S
)
# A column may hold anything; a text may hold quotes and AND, and ends at a quote that a condition can end at.
_CONDITION = re.compile(
    r"\s*(?P<column>.+?)\s+(?P<operator>=|>|<|OP)\s+(?P<value>'.*?'|[^\s']\S*)\s*(?:\s(?P<more>AND)\s|$)", re.I | re.S
)


@dataclass(frozen=True)
class Query:
    """A query's logical form; the table, which the question names, is none of it.

    Attributes:
        column: What is selected.
        aggregate: How it is summed up; "" for not at all.
        conditions: (column, operator, value) that all must hold, in any order.
    """

    column: str
    aggregate: str
    conditions: frozenset[tuple[str, str, str]]


def parse(text: str) -> Query:
    """Returns the logical form of a query; names and values up to case and white space, numbers by their value.

    Raises:
        LoRAError: It cannot be read.
    """
    found = _QUERY.fullmatch(text)
    if not found:
        raise LoRAError(f"`query` (={quoted(text)}) must read SELECT … FROM … or SELECT … FROM … WHERE ….")
    first, _, rest = found["select"].partition(" ")
    aggregate, column = (first, rest) if first in AGGREGATES and rest.strip() else ("", found["select"])
    return Query(_plain(column), aggregate, frozenset(_conditions(found["where"] or "")))


def _conditions(text: str) -> list[tuple[str, str, str]]:
    conditions, place, is_more = [], 0, bool(text)
    while is_more:
        found = _CONDITION.match(text, place)
        if not found:
            raise LoRAError(f"`query` (=… {quoted(text[place:])}) must have a condition there: column = value.")
        conditions.append((_plain(found["column"]), found["operator"].upper(), _value(found["value"])))
        place, is_more = found.end(), bool(found["more"])
    return conditions


def problem(text: str) -> str:
    """Returns why a query cannot be read; "" where it can."""
    try:
        parse(text)
    except LoRAError as error:
        return str(error)
    return ""


def logical_form(prediction: str, references: Sequence[str]) -> float:
    """Returns 1 if a query has the logical form of a reference; 0 if it has another, or cannot be read.

    Raises:
        LoRAError: A reference cannot be read.
    """
    wanted = {parse(reference) for reference in references}
    return float(not problem(prediction) and parse(prediction) in wanted)


def parsed(prediction: str, references: Sequence[str]) -> float:
    """Returns 1 if a query can be read, whatever it asks."""
    return float(not problem(prediction))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _value(text: str) -> str:
    text = _plain(text[1:-1] if text.startswith("'") else text)
    try:
        return f"{float(text.replace(',', '')):.15g}"
    except ValueError:
        return text
