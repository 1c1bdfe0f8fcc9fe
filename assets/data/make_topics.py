"""Makes the `topics` data set: a customer's message in, what it is about as one of six labels out.

Run `python assets/data/make_topics.py`. The messages are those of the `tickets` data set, and the label is the category
of their ticket.
"""

import json
from pathlib import Path

import make_tickets
from grammar import Splits, write


def make() -> Splits:
    """The rows of both splits, in the order of the tickets."""
    return {
        split: [{"request": row["request"], "topic": json.loads(row["ticket"])["category"]} for row in rows]
        for split, rows in make_tickets.make().items()
    }


if __name__ == "__main__":
    write(make(), Path(__file__).parent / "topics")
