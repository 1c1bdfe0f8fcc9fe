"""The colours that carry meaning, in the page and in figures alike."""

BASE = "#3b76c4"
"""The base model, W0."""

ADAPTED = "#d9691a"
"""The adapter: ΔW, the adapted model, its training."""

ADAPTED_SOFT = "#efb07c"
"""The adapter's less important twin: the noisy training loss beside the held-out one."""

SECOND = "#7a5bb5"
"""A second adapter beside the first, where the base is not what it is compared with."""

SECOND_SOFT = "#b9a6dc"
"""Its less important twin."""

CHANCE = "#8a94a6"
"""The null: what pure chance would show."""

BASE_TEXT, ADAPTED_TEXT = ("#2f64ad", "#86aee6"), ("#a64a08", "#f28c3f")
"""The same two as the colour of words, which need more contrast than marks: on light, and on dark."""
