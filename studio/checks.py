"""What may be wrong with a data set before a step is taken: each check has its rows; what wastes a run stops it.

The page shows these checks; the worker asks the very same ones before it trains.
"""

from dataclasses import dataclass

import numpy as np

from studio.survey import ENDED, FOREIGN, GARBLED, HOLLOW, REPLACED, SPECIAL, Split, Survey

MOST_OF_ALL = 0.9
"""Share of the rows with one label from which on a model learns to say just that one."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked for.

    Attributes:
        title: What was looked for, in a few words.
        places: Of the rows that have it, in the survey's arrays.
        advice: What it means and what to do, one sentence or two.
        stops: Whether training on it would waste the run.
        warns: Whether it is a fault.
    """

    title: str
    places: np.ndarray
    advice: str
    stops: bool = False
    warns: bool = True


def checks(survey: Survey, split: Split, max_length: int) -> list[Check]:
    """Returns all checks of a survey, also those that found nothing; instant, whatever the number of rows."""
    first, last, lengths = (np.asarray(numbers) for numbers in (survey.first, survey.last, survey.num_tokens))
    flags = np.asarray(survey.flags)
    skips = survey.spec.bad_rows == "skip"
    nothing_left = len(split.train) == 0
    whole, prompt = survey.shared(split)
    is_kept = (first >= 0) & (first < max_length)
    is_cut = is_kept & (last >= max_length)
    unread, empty, other = (survey.unusable(kind) for kind in ("unreadable", "empty", "useless"))
    is_all_leaked = 0 < len(whole) == len(split.evaluation)
    choose = "They are skipped." if skips else "Mend them, or choose to skip bad rows."
    blocks = not skips or nothing_left
    usable = [
        Check("Rows that cannot be read", unread, choose, bool(len(unread)) and blocks),
        Check("Empty fields", empty, choose, bool(len(empty)) and blocks),
    ]
    leaks = [
        Check(
            "Same row in training and evaluation",
            whole,
            "All that is held out is also trained on, so its loss would measure memory alone. "
            "Choose other evaluation data" + ("." if survey.table.eval_rows else ", or set the share held out to 0.")
            if is_all_leaked
            else "The held-out loss then measures memory. Remove them from one side.",
            is_all_leaked,
        ),
        Check(
            "Same prompt in training and evaluation",
            prompt,
            "The answers differ, yet the held-out loss is flattered.",
        ),
        Check("Exact duplicates", survey.repeated(), "Each repeats a row before it, and so weighs more. Remove them."),
    ]
    of_task = (
        [
            Check("Labels that cannot be used", other, choose, bool(len(other)) and blocks),
            *leaks,
            Check("Texts cut off", np.flatnonzero(lengths > max_length), "Their ends are not seen. Raise max_length."),
        ]
        if survey.spec.is_labelled
        else [
            Check("Nothing to train on", other, choose, bool(len(other)) and blocks),
            Check(
                "Answer begins beyond the cut-off",
                np.flatnonzero(first >= max_length),
                "Nothing of the answer is left. Raise max_length"
                + ("; they are skipped." if skips else ", or skip them."),
                bool((first >= max_length).any()) and blocks,
            ),
            *leaks,
            Check("Answers cut off", np.flatnonzero(is_cut), "Their ends are not learnt. Raise max_length."),
            Check(
                "Answers without a trained end token",
                np.flatnonzero(is_kept & ~is_cut & ((flags & ENDED) == 0)),
                "The model is not taught to stop: the template puts no end token after the answer.",
            ),
        ]
    )
    return [
        *usable,
        *of_task,
        *_of_text(survey),
        Check(
            "Mended by hand",
            survey.mended(),
            "They are read as they were mended; the file itself is as it was.",
            warns=False,
        ),
        _balance(survey),
    ]


def _of_text(survey: Survey) -> list[Check]:
    """Returns what is asked of the words themselves."""
    return [
        Check(
            "Special tokens in the text",
            survey.flagged(SPECIAL),
            "The template adds these itself; in the text they end turns where none ends.",
        ),
        Check(
            "Text that has a template already",
            np.setdiff1d(survey.flagged(FOREIGN), survey.flagged(SPECIAL)),
            "Another model's turn marks stand in the text as plain words. Take them out, or choose plain text.",
        ),
        Check(
            "Characters lost in decoding", survey.flagged(REPLACED), "They hold \ufffd. Read the source again as UTF-8."
        ),
        Check(
            "Characters read in a wrong encoding",
            survey.flagged(GARBLED),
            "Such as Ã© for é: the file was once read as Latin-1. Save it as UTF-8 from its source.",
        ),
        Check("Turns without words", survey.flagged(HOLLOW), "Some messages are empty; the template shows them so."),
    ]


def _balance(survey: Survey) -> Check:
    """Returns whether one of few distinct answers crowds out the others."""
    title, none = "Labels out of balance", np.empty(0, np.int64)
    labels, num = survey.labels, int((np.asarray(survey.num_tokens) > 0).sum())
    if not labels or len(labels) < 2 or num < 4 * len(labels):
        return Check(title, none, "")
    counts = labels.most_common()
    words = ", ".join(f"{label[:30]!r} {count / num:.0%}" for label, count in counts[:6])
    rare = counts[1:] if counts[0][1] > MOST_OF_ALL * num else []
    if not rare:
        return Check(title, none, f"Labels: {words}.")
    places = [i for i in range(survey.num_read) if survey.num_tokens[i] and survey.label(i) != counts[0][0]]
    return Check(title, np.asarray(places, np.int64), f"{words}: the model may learn to say just the first.")
