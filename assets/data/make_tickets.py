"""Makes the `tickets` data set: a customer's message in, a ticket as one line of JSON out.

Run `python assets/data/make_tickets.py`; it is seeded, so that it always writes the same files.
A message is an issue told in one of several wordings, put into a voice (polite, terse, angry, …) that brings its own
greeting, small talk, urgency and spelling. The ticket holds only what the message says.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from grammar import Dice, Splits, sentence_case, with_article, write

SEED = 2106
NUM_EACH = {"train": 20, "eval": 2}
KEYS = ("category", "product", "urgency", "order_id", "summary")


@dataclass(frozen=True)
class Issue:
    """One thing that goes wrong, and the wordings it is told in; the last wording is kept for evaluation.

    `{p}` stands for the product and `{a_p}` for the product with its article.
    """

    category: str
    summary: str
    wordings: tuple[str, ...]
    names_product: bool = True
    has_order: bool = True


ISSUES = (
    Issue(
        "delivery",
        "parcel has not arrived",
        (
            "the {p} I ordered still has not arrived",
            "I am still waiting for my {p}, nothing has come through the door",
            "two weeks have gone by and there is no sign of the {p}",
            "my {p} was meant to be here on Monday and it never came",
            "where is my {p}? The delivery date has come and gone",
            "nobody has brought me the {p} I paid for, and it should have been here by now",
        ),
    ),
    Issue(
        "delivery",
        "parcel left in the wrong place",
        (
            "the driver left the {p} out in the rain by the bins",
            "your courier gave my {p} to a neighbour I do not know",
            "the tracking says my {p} was delivered, but it went to the wrong house",
            "somebody dropped the {p} off at number 9 and I live at number 6",
            "the {p} was thrown over the garden fence instead of being handed to me",
            "the {p} ended up on a stranger's doorstep at the other end of the road",
        ),
    ),
    Issue(
        "delivery",
        "change the delivery address",
        (
            "can you send the {p} to my office instead of my home address?",
            "I have just moved house, so the {p} has to go to a different address",
            "I typed the wrong postcode when I bought the {p}, can it still be changed?",
            "the {p} should go to my sister's address and not to mine",
            "please change the delivery address for the {p}",
            "the {p} is about to go to my old flat, please redirect it to the new one",
        ),
    ),
    Issue(
        "delivery",
        "choose another delivery day",
        (
            "nobody is home on Friday, can the {p} come on another day?",
            "I would like to move the delivery of the {p} to next week",
            "I am away until the 14th, so please bring the {p} after that",
            "is it possible to have the {p} delivered on a Saturday instead?",
            "the day you gave me for the {p} does not work, I need a later one",
            "we will be on holiday when the {p} is due, so please hold it back for a few days",
        ),
    ),
    Issue(
        "billing",
        "charged twice",
        (
            "I was charged twice for one {p}",
            "my bank shows two payments for the same {p}",
            "you have taken the money for the {p} two times",
            "I bought one {p} and paid for it twice, according to my statement",
            "there is a double charge on my card for the {p}",
            "the same amount for the {p} left my account on Tuesday and again on Wednesday",
        ),
    ),
    Issue(
        "billing",
        "refund not received",
        (
            "I sent the {p} back a month ago and I still have no refund",
            "the refund for my {p} has not reached my account",
            "you promised me my money back for the {p} and nothing has come",
            "I am waiting for the refund for the {p} that I returned",
            "when will I get the refund for the {p}? It has been 3 weeks",
            "you have had the {p} back since the 2nd, and my money is nowhere to be seen",
        ),
    ),
    Issue(
        "billing",
        "discount code not applied",
        (
            "the discount code did not work when I bought the {p}",
            "I had a 10% code for the {p} but I was charged the full price",
            "my voucher was not taken off the price of the {p}",
            "the {p} was in the sale, yet the discount is missing from my bill",
            "I typed in the discount code for the {p} and the total did not change",
            "your newsletter promised me 15% off the {p}, and the bill says otherwise",
        ),
    ),
    Issue(
        "billing",
        "needs an invoice",
        (
            "could you send me an invoice for the {p}?",
            "I need a receipt for the {p} for my tax return",
            "there was no invoice in the box with the {p}",
            "my company needs an invoice with our name on it for the {p}",
            "please email me the bill for the {p}, I have lost mine",
            "our bookkeeper is asking for the paperwork for the {p}, please send the invoice again",
        ),
    ),
    Issue(
        "return",
        "wants to return the item",
        (
            "I would like to return the {p}",
            "the {p} does not suit my room, how do I send it back?",
            "I have changed my mind about the {p} and want to send it back",
            "the {p} is too big for me, please tell me how to return it",
            "I no longer need the {p} and would like my money back",
            "the {p} is not for me after all, so I want to give it back",
        ),
    ),
    Issue(
        "return",
        "wants a different colour",
        (
            "can I swap the {p} for one in another colour?",
            "I would like to exchange my {p} for a blue one",
            "the green of the {p} is not what I expected, can I have it in grey?",
            "could I change the {p} for the same thing in white?",
            "I picked the wrong colour for my {p} and would like to swap it",
            "please exchange the {p}, I would rather have the red one",
        ),
    ),
    Issue(
        "return",
        "return label missing",
        (
            "I want to send the {p} back but there is no return label in the box",
            "the label for returning the {p} never reached me",
            "please send me a return label for the {p}",
            "I cannot print the return label for the {p}, the link is dead",
            "where do I find the label to send back the {p}?",
            "the {p} is packed up to go back to you, all I am missing is the sticker with your address",
        ),
    ),
    Issue(
        "return",
        "wants to cancel the order",
        (
            "please cancel my order for the {p}",
            "I ordered the {p} by mistake, can you stop it before it ships?",
            "I want to cancel the {p}, I found one at home",
            "can I still cancel the {p} that I bought last night?",
            "my son ordered the {p} without asking, please cancel it",
            "do not ship the {p}, I have decided against it",
        ),
    ),
    Issue(
        "defect",
        "item arrived broken",
        (
            "the {p} arrived broken",
            "I opened the box and the {p} was cracked right down the middle",
            "my {p} came in two pieces",
            "the {p} was smashed when I unpacked it",
            "there is a big dent in the {p} and the packaging was torn",
            "the {p} got damaged on its way to me, one corner is bent",
        ),
    ),
    Issue(
        "defect",
        "item stopped working",
        (
            "the {p} worked for a week and then gave up",
            "my {p} has stopped working",
            "after only 3 days the {p} is dead",
            "the {p} was fine at first but now it does nothing at all",
            "the {p} broke the second time I used it",
            "since this morning the {p} no longer does its job, although I treated it well",
        ),
    ),
    Issue(
        "defect",
        "parts are missing",
        (
            "there are screws missing from the {p}",
            "the {p} came without its instructions and one part is missing",
            "I cannot put the {p} together because a piece is missing",
            "half of the parts for the {p} were not in the box",
            "the box with the {p} was missing the small bag of fittings",
            "I counted everything that came with the {p} and two bits on the list are not there",
        ),
    ),
    Issue(
        "defect",
        "wrong item received",
        (
            "I ordered {a_p} and got something else",
            "you sent me the wrong thing, I asked for {a_p}",
            "instead of the {p} there was a pack of candles in the box",
            "this is not the {p} I ordered, it is a different model",
            "I was expecting {a_p}, but somebody else's things are in my parcel",
            "what came out of the box was a garden gnome and not the {p} I had chosen",
        ),
    ),
    Issue(
        "account",
        "cannot log in",
        (
            "I cannot log in to my account",
            "your site keeps telling me that my password is wrong",
            "I am locked out of my account",
            "the login page throws me out every time",
            "I forgot my password and the reset email never comes",
            "whatever I type, your website will not let me into my account",
        ),
        names_product=False,
        has_order=False,
    ),
    Issue(
        "account",
        "change the email address",
        (
            "I have a new email address, please update my account",
            "can you change the email address on my account?",
            "my old email is closed, so I need a new one on my profile",
            "please use my work email for my account from now on",
            "how do I change the email address that you have for me?",
            "my messages from you go to a mailbox I gave up, please put in the new one",
        ),
        names_product=False,
        has_order=False,
    ),
    Issue(
        "account",
        "stop the newsletter",
        (
            "please stop sending me your newsletter",
            "I want to unsubscribe from your emails",
            "I get 4 adverts a week from you and want none",
            "take me off your mailing list",
            "the unsubscribe link in your newsletter does not work",
            "my inbox is full of your offers, please make that end",
        ),
        names_product=False,
        has_order=False,
    ),
    Issue(
        "question",
        "asks whether it is in stock",
        (
            "do you have the {p} in stock?",
            "when will the {p} be available again?",
            "the {p} is sold out on your site, is more on its way?",
            "is the {p} still available?",
            "will you be getting the {p} back in?",
            "is there a single {p} left in your warehouse?",
        ),
        has_order=False,
    ),
    Issue(
        "question",
        "asks about the size",
        (
            "what are the measurements of the {p}?",
            "how big is the {p}?",
            "I would like to know how tall and wide the {p} is",
            "will the {p} fit on a shelf that is 30 cm deep?",
            "could you tell me the size of the {p}?",
            "before I buy it, how much room does the {p} take up?",
        ),
        has_order=False,
    ),
    Issue(
        "question",
        "asks about the guarantee",
        (
            "how long is the guarantee on the {p}?",
            "does the {p} come with a warranty?",
            "what does the warranty for the {p} cover?",
            "I cannot find the guarantee terms for the {p}",
            "is the guarantee for the {p} 1 year or 2?",
            "for how many years would you repair the {p} free of charge?",
        ),
        has_order=False,
    ),
)

PRODUCTS = {
    "train": (
        "desk lamp", "electric kettle", "hand blender", "coffee grinder", "bread bin", "wall clock", "garden hose",
        "folding chair", "air pump", "umbrella stand", "rice cooker", "wool blanket", "bath mat", "bookcase",
        "office chair", "tea tray", "picnic basket", "doormat", "laundry basket", "toaster", "alarm clock",
        "ironing board", "camping stove", "frying pan", "bicycle bell", "shower head", "standing fan", "wall mirror",
        "space heater", "egg timer", "water filter", "tool box", "bird feeder", "oven glove", "radio", "suitcase",
    ),
    "eval": (
        "waffle iron", "hammock", "salad spinner", "floor cushion", "cheese grater", "weather station", "stepladder",
        "pepper mill", "sewing machine", "yoga mat", "ice bucket", "wheelbarrow",
    ),
}  # fmt: skip

URGENCY = {
    "high": (
        "This is urgent.", "I need an answer today.", "Please reply as soon as possible.", "I need this sorted today.",
        "It is really urgent.", "Please treat this as urgent.", "I cannot wait any longer.", "Answer me right now.",
        "Please deal with it immediately.", "It has to be solved by tomorrow.",
    ),
    "normal": ("",),
    "low": (
        "There is no hurry.", "No rush at all.", "Whenever you have time.", "It is not urgent.", "It can wait.",
        "Take your time.", "Next week is soon enough for me.", "Nothing urgent.",
    ),
}  # fmt: skip
URGENCY_SHARES = {"high": 0.35, "normal": 0.4, "low": 0.25}
ORDER_FIRST = ("My order number is {id}.", "Order {id}.", "Order no. {id}.", "Reference {id}.", "This is about {id}.")
ORDER_LATER = (
    "My order number is {id}.", "Order {id}.", "It is order #{id}.", "The order number is {id}.", "Order no. {id}.",
    "It was order {id}.", "Reference {id}.", "(order {id})", "You can look it up under {id}.",
)  # fmt: skip
SMALL_TALK = (
    "I have bought from you for years.", "I found your shop through a friend.", "It has been a long week.",
    "I looked at your help page and it did not help.", "I tried to call you, but I was 20 minutes in the queue.",
    "This is the first time I have written to you.", "My husband says I should have asked sooner.",
    "Your chat robot sent me here.", "My daughter usually does this for me.",
)  # fmt: skip
PARCEL_TALK = (
    "My cat likes the boxes, at least.", "It was meant as a birthday present for my mother.",
    "We are redoing the whole flat at the moment.", "I live on the third floor, by the way.",
)  # fmt: skip


@dataclass(frozen=True)
class Voice:
    """A way of writing: what goes before and after, how much small talk, and what becomes of the letters.

    `lower`, `misspelt` and `shouting` are the shares of messages it happens to. Only a patient voice says that there is
    no hurry.
    """

    share: float
    openers: tuple[str, ...] = ("",)
    closers: tuple[str, ...] = ("",)
    small_talk: float = 0.0
    lower: float = 0.0
    misspelt: float = 0.0
    shouting: float = 0.0
    patient: bool = True
    swaps: tuple[tuple[str, str], ...] = ()


VOICES = (
    Voice(
        share=0.25,
        openers=("Hello,", "Dear team,", "Good morning,", "Hi there,", "Good evening,"),
        closers=("Many thanks.", "Thank you for your help.", "Kind regards, Ruth", "Best wishes, Tom", "Thanks!"),
        small_talk=0.4,
    ),
    Voice(share=0.2, openers=("", "", "Hi,", "Hello,"), closers=("", "Thanks.", "Please help."), small_talk=0.2),
    Voice(
        share=0.2,
        openers=("", "hi", "hey", "hiya,", "hello"),
        closers=("", "thx", "cheers", "thanks x", "ta"),
        small_talk=0.2,
        lower=1.0,
        misspelt=0.5,
        swaps=((" you ", " u "), ("please", "pls"), (" are ", " r "), ("cannot", "cant"), ("I am ", "im ")),
    ),
    Voice(
        share=0.15,
        openers=("This is ridiculous!", "I am furious.", "Not good enough!", "Seriously?", "What a shambles!"),
        closers=("I expect better.", "Never again!", "Sort it out!", "Shame on you.", "I am not happy!!"),
        small_talk=0.3,
        shouting=0.4,
        misspelt=0.3,
        swaps=((".", "!"),),
        patient=False,
    ),
    Voice(
        share=0.2,
        openers=("Sorry to bother you,", "Hello again,", "Hope you are all well.", "Me again!", "Quick one:"),
        closers=("Sorry for going on.", "That is all.", "Sent from my phone", "Greetings from Leeds"),
        small_talk=0.9,
        misspelt=0.4,
    ),
)

MISSPELT = {
    "address": "adress", "because": "becuase", "delivered": "deliverd", "delivery": "delivrey", "received": "recieved",
    "refund": "refnud", "still": "stil", "would": "woud", "which": "wich", "there": "ther", "thing": "thign",
    "account": "acount", "email": "emial", "return": "retrun", "charged": "chraged", "different": "diffrent",
    "missing": "mising", "wrong": "worng", "guarantee": "garantee", "arrived": "arived", "tomorrow": "tommorow",
    "immediately": "imediately", "available": "availible", "discount": "discout", "broken": "brokn", "label": "lable",
    "week": "weak", "weeks": "weaks", "colour": "color", "number": "nubmer", "password": "pasword", "cancel": "cancle",
    "urgent": "urgnet", "possible": "posible", "answer": "anwser", "please": "plese", "bought": "bougth", "bill": "bil",
    "instead": "insted", "exchange": "exchagne", "since": "sicne", "decided": "desided", "something": "somthing",
    "measurements": "mesurements", "website": "webiste", "newsletter": "newsleter", "invoice": "invoce",
}  # fmt: skip


def misspell(text: str) -> str:
    """`text` with every word of `MISSPELT` written the way people often get it wrong."""
    return re.sub(r"[a-z]+", lambda word: MISSPELT.get(word[0], word[0]), text)


def draw_order_id(dice: Dice, split: str) -> str:
    """Five digits; those of evaluation begin with 7, those of training never do."""
    first = "7" if split == "eval" else dice.pick("12345689")
    return first + "".join(dice.pick("0123456789") for _ in range(4))


def write_message(dice: Dice, voice: Voice, issue: Issue, core: str, order_id: str | None, urgency: str) -> str:
    """The message: greeting, the matter, order number, small talk and urgency in some order, and a farewell."""
    before, after = [], []
    if order_id and dice.chance(0.25):
        before.append(dice.pick(ORDER_FIRST).format(id=order_id))
    elif order_id:
        after.append(dice.pick(ORDER_LATER).format(id=order_id))
    if dice.chance(voice.small_talk):
        after.append(dice.pick(SMALL_TALK + PARCEL_TALK if issue.has_order else SMALL_TALK))
    after.append(dice.pick(URGENCY[urgency]))
    matter = sentence_case(core if core.endswith("?") else f"{core}.")
    for plain, swapped in voice.swaps:
        matter = matter.replace(plain, swapped)
    if dice.chance(voice.shouting):
        matter = matter.upper()
    parts = [dice.pick(voice.openers), *before, matter, *dice.shuffled(after), dice.pick(voice.closers)]
    message = " ".join(part for part in parts if part)
    if dice.chance(voice.misspelt):
        message = misspell(message)
    return message.lower() if dice.chance(voice.lower) else message


def draw_row(dice: Dice, split: str, issue: Issue) -> dict[str, str]:
    """One message about `issue`, and its ticket."""
    product = dice.pick(PRODUCTS[split]) if issue.names_product else None
    order_id = draw_order_id(dice, split) if issue.has_order and dice.chance(0.7) else None
    wording = issue.wordings[-1] if split == "eval" else dice.pick(issue.wordings[:-1])
    core = wording.format(p=product, a_p=with_article(product)) if product else wording
    voice = dice.weighted({voice: voice.share for voice in VOICES})
    urgency = dice.weighted({key: share for key, share in URGENCY_SHARES.items() if voice.patient or key != "low"})
    ticket = dict(zip(KEYS, (issue.category, product, urgency, order_id, issue.summary), strict=True))
    return {"request": write_message(dice, voice, issue, core, order_id, urgency), "ticket": json.dumps(ticket)}


def make() -> Splits:
    """The rows of both splits: every issue equally often, in a random order, no two messages alike."""
    dice = Dice(SEED)
    splits: Splits = {}
    for split, num_each in NUM_EACH.items():
        rows: dict[str, dict[str, str]] = {}
        for count in range(num_each):
            for place, issue in enumerate(ISSUES):
                while len(rows) <= count * len(ISSUES) + place:
                    row = draw_row(dice, split, issue)
                    rows.setdefault(row["request"].lower(), row)
        splits[split] = dice.shuffled(list(rows.values()))
    return splits


if __name__ == "__main__":
    write(make(), Path(__file__).parent / "tickets")
