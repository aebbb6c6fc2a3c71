"""Small CoNLL-U texts, for the tagging example."""

import numpy as np


def conllu_line(identifier, form="word", upos="NOUN"):
    return "\t".join([identifier, form, "_", upos, *"______"])


def sentences(count):
    """Of 2 to 5 words whose last letter tells the part of speech."""
    rng = np.random.default_rng(0)
    uposes = dict(zip("abc", ("NOUN", "VERB", "ADJ")))
    for _ in range(count):
        ends = rng.choice([*"abc"], rng.integers(2, 6))
        yield "\n".join(
            conllu_line(str(i), f"w{rng.integers(50)}{end}", uposes[end])
            for i, end in enumerate(ends, 1)
        )
