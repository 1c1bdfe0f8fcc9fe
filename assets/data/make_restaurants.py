"""Makes the `restaurants` data set: a list of facts in, one or two sentences out.

Run `python assets/data/make_restaurants.py`; it is seeded, so that it always writes the same files.
A restaurant is a dict from attribute to value. A sentence plan decides which attributes share a clause; what a plan
leaves over is told in a second sentence, so that every fact is expressed once and none is invented.
"""

from collections.abc import Callable
from pathlib import Path

from grammar import Dice, Splits, listed, sentence_case, with_article, write

SEED = 2021
NUM_ROWS = {"train": 1000, "eval": 120}

TRAIN_NAMES = (
    "The Copper Kettle", "The Painted Oar", "Juniper & Salt", "The Lazy Heron", "Marigold Table", "The Tin Lantern",
    "Otter's Rest", "The Velvet Turnip", "Saffron Gate", "The Crooked Spoon", "Bluefinch", "The Drowsy Pelican",
    "Nettle & Rye", "The Brass Acorn", "Windmill Nine", "The Folded Napkin", "Hazel's Corner", "The Salted Plum",
    "Lantern Row", "The Sleepy Badger", "Thistledown", "The Glass Teapot", "Orchard Eleven", "The Wandering Goat",
    "Moss & Ember", "The Iron Ladle", "Little Comet", "The Gilded Carp", "Pepper Lane", "The Red Bucket",
    "Sparrow Hall", "The Floating Onion", "Barley Moon", "The Second Anchor", "Fennel House", "The Whistling Crab",
    "Old Tobias", "The Amber Fork", "Clover & Coal", "The Last Umbrella",
)  # fmt: skip
EVAL_NAMES = (
    "The Silver Whisk", "Bramble & Bone", "The Patient Snail", "Magpie Terrace", "The Tilted Jug", "Tamarind Nook",
    "The Hollow Pear", "Quince & Candle", "The Dancing Walnut", "Sorrel Yard",
)  # fmt: skip

# What is served -> what such a place is called.
PLACES = {
    "ramen": "ramen bar",
    "dumplings": "dumpling house",
    "pizza": "pizza parlour",
    "tapas": "tapas bar",
    "oysters": "oyster bar",
    "curry": "curry house",
    "noodles": "noodle shop",
    "pancakes": "pancake house",
    "tacos": "taco kitchen",
    "soup": "soup bar",
    "steak": "steak house",
    "sushi": "sushi bar",
    "falafel": "falafel shop",
    "pies": "pie shop",
    "omelettes": "omelette kitchen",
    "Greek food": "Greek restaurant",
    "French food": "French restaurant",
    "Ethiopian food": "Ethiopian restaurant",
}
# Area -> where that is.
AREAS = {
    "old harbour": "in the old harbour",
    "hillside": "on the hillside",
    "market quarter": "in the market quarter",
    "mill district": "in the mill district",
    "university quarter": "in the university quarter",
    "station quarter": "in the station quarter",
    "lower town": "in the lower town",
    "upper town": "in the upper town",
    "garden suburb": "in the garden suburb",
    "east bank": "on the east bank",
    "south pier": "on the south pier",
    "castle hill": "on Castle Hill",
}
LANDMARKS = (
    "clock tower", "stone bridge", "opera house", "old cinema", "tram depot", "botanical garden", "town library",
    "fish market", "bandstand", "swimming baths", "chess museum", "post office",
)  # fmt: skip
PRICES = {"cheap": "cheap", "moderate": "moderately priced", "expensive": "expensive"}
MOODS = ("cosy", "lively", "quiet", "elegant", "old-fashioned")
HOURS = {
    "breakfast only": "is open for breakfast only",
    "all day": "is open all day",
    "until late": "is open until late",
    "evenings": "is open in the evenings",
    "weekends": "is open at weekends",
}
FAMILIES = {
    "yes": ("welcomes families", "is good for families"),
    "no": ("is not suited to families",),
}
STARS = ("2", "3", "4", "5")

VALUES = {
    "serves": tuple(PLACES),
    "price": tuple(PRICES),
    "area": tuple(AREAS),
    "landmark": LANDMARKS,
    "families": tuple(FAMILIES),
    "stars": STARS,
    "hours": tuple(HOURS),
    "mood": MOODS,
}
# The number of facts, the name included, and how often.
NUM_FACTS = {3: 2.0, 4: 3.0, 5: 3.0, 6: 2.0}

Facts = dict[str, str]


def is_held_out(facts: Facts) -> bool:
    """Whether `facts` pair a dish with an area that only the evaluation rows pair."""
    if "serves" not in facts or "area" not in facts:
        return False
    return (5 * VALUES["serves"].index(facts["serves"]) + VALUES["area"].index(facts["area"])) % 6 == 0


def draw_facts(dice: Dice, split: str) -> Facts:
    """A restaurant for `split`; one for evaluation has a new name and a held-out pair of dish and area."""
    evaluation = split == "eval"
    while True:
        others = dice.shuffled(tuple(VALUES))[: dice.weighted(NUM_FACTS) - 1]
        if evaluation and not {"serves", "area"} <= set(others):
            continue
        name = dice.pick(EVAL_NAMES if evaluation else TRAIN_NAMES)
        facts = {"name": name} | {key: dice.pick(VALUES[key]) for key in others}
        if is_held_out(facts) == evaluation:
            return facts


def adjectives(facts: Facts) -> str:
    """The mood and the price as "cosy and cheap", or whichever of them is known, or ""."""
    words = [facts[key] if key == "mood" else PRICES[facts[key]] for key in ("mood", "price") if key in facts]
    return (" but " if facts.get("price") == "expensive" else " and ").join(words)


def kind(facts: Facts) -> str:
    """What the place is, with its article: "a cosy and cheap ramen bar"."""
    noun = PLACES[facts["serves"]] if "serves" in facts else "restaurant"
    return with_article(f"{adjectives(facts)} {noun}".strip())


def where(facts: Facts) -> str:
    """The area and the landmark as "in the old harbour, near the clock tower", or whichever is known, or ""."""
    parts = [AREAS[facts["area"]]] if "area" in facts else []
    parts += [f"near the {facts['landmark']}"] if "landmark" in facts else []
    return ", ".join(parts)


def habits(facts: Facts, dice: Dice) -> list[str]:
    """The rating, the hours and the families as verb phrases, in that order."""
    phrases = [f"is rated {facts['stars']} stars"] if "stars" in facts else []
    phrases += [HOURS[facts["hours"]]] if "hours" in facts else []
    phrases += [dice.pick(FAMILIES[facts["families"]])] if "families" in facts else []
    return phrases


def spaced(*parts: str) -> str:
    """The parts that are not empty, a space between them."""
    return " ".join(part for part in parts if part)


def ended(first: str, phrases: list[str]) -> str:
    """`first` as a sentence, and a second one that holds `phrases`, if there are any."""
    return f"{first}. It {listed(phrases)}." if phrases else f"{first}."


def plain(facts: Facts, phrases: list[str]) -> str:
    """The Copper Kettle is a cheap ramen bar in the old harbour. It welcomes families."""
    return ended(spaced(facts["name"], "is", kind(facts), where(facts)), phrases)


def one_sentence(facts: Facts, phrases: list[str]) -> str:
    """The Copper Kettle, a cheap ramen bar in the old harbour, welcomes families."""
    return ended(f"{facts['name']}, {spaced(kind(facts), where(facts))}, {listed(phrases)}", [])


def place_first(facts: Facts, phrases: list[str]) -> str:
    """In the old harbour, The Copper Kettle is a cheap ramen bar. It welcomes families."""
    return ended(f"{sentence_case(where(facts))}, {facts['name']} is {kind(facts)}", phrases)


def you_will_find(facts: Facts, phrases: list[str]) -> str:
    """You will find The Copper Kettle, a cheap ramen bar, in the old harbour. It welcomes families."""
    return ended(f"You will find {facts['name']}, {kind(facts)}, {where(facts)}", phrases)


def serves(facts: Facts, phrases: list[str]) -> str:
    """The Copper Kettle serves ramen in the old harbour. It is cheap and welcomes families."""
    words = adjectives(facts)
    return ended(
        spaced(facts["name"], "serves", facts["serves"], where(facts)),
        [f"is {words}"] * bool(words) + phrases,
    )


def recommend(facts: Facts, phrases: list[str]) -> str:
    """For ramen in the old harbour, try The Copper Kettle. It is cheap and welcomes families."""
    words = adjectives(facts)
    first = f"{spaced('For', facts['serves'], where(facts))}, try {facts['name']}"
    return ended(first, [f"is {words}"] * bool(words) + phrases)


def rating_first(facts: Facts, phrases: list[str]) -> str:
    """Rated 4 stars, The Copper Kettle is a cheap ramen bar in the old harbour. It welcomes families."""
    rating, *rest = phrases
    opening = sentence_case(rating.removeprefix("is "))
    return ended(f"{opening}, {spaced(facts['name'], 'is', kind(facts), where(facts))}", rest)


# Sentence plan -> the attributes it cannot do without.
PLANS: dict[Callable[[Facts, list[str]], str], tuple[tuple[str, ...], ...]] = {
    plain: ((),),
    one_sentence: (("stars",), ("hours",), ("families",)),
    place_first: (("area",), ("landmark",)),
    you_will_find: (("area",), ("landmark",)),
    serves: (("serves",),),
    recommend: (("serves",),),
    rating_first: (("stars",),),
}


def describe(facts: Facts, dice: Dice) -> str:
    """One or two sentences that express every one of `facts`."""
    fitting = [plan for plan, needs in PLANS.items() if any(all(key in facts for key in need) for need in needs)]
    return dice.pick(fitting)(facts, habits(facts, dice))


def meaning(facts: Facts, dice: Dice) -> str:
    """`facts` as "name[…], serves[…], …": the name first, the rest in a random order."""
    keys = ["name", *dice.shuffled([key for key in facts if key != "name"])]
    return ", ".join(f"{key}[{facts[key]}]" for key in keys)


def make() -> Splits:
    """The rows of both splits, no two restaurants alike."""
    dice = Dice(SEED)
    seen: set[frozenset[tuple[str, str]]] = set()
    splits: Splits = {}
    for split, num_rows in NUM_ROWS.items():
        rows = splits.setdefault(split, [])
        while len(rows) < num_rows:
            facts = draw_facts(dice, split)
            if frozenset(facts.items()) not in seen:
                seen.add(frozenset(facts.items()))
                rows.append({"mr": meaning(facts, dice), "text": describe(facts, dice)})
    return splits


if __name__ == "__main__":
    write(make(), Path(__file__).parent / "restaurants")
