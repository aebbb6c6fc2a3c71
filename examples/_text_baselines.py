"""Bits per character without a neural network: counts of n-grams, and compression."""

import collections
import lzma
import math


def lzma_bits(train: str, held_out: str) -> float:
    """How much longer a compressed file gets by the held-out text, per character."""
    longer = _compressed_bits(train + held_out) - _compressed_bits(train)
    return longer / len(held_out)


def _compressed_bits(text: str) -> int:
    return 8 * len(lzma.compress(text.encode("ascii"), preset=9))


def n_gram_bits(train: str, held_out: str, context: int, symbols: int) -> float:
    """Of a character after up to `context` others, as often as it is in training.

    Shorter contexts are mixed in, by the number of different characters that were seen
    after the longer one (Witten-Bell): Chen and Goodman, An Empirical Study of
    Smoothing Techniques for Language Modeling, 1999, section 2.5.
    """
    counts = [_followers(train, length) for length in range(context + 1)]
    bits = 0.0
    for place, symbol in enumerate(held_out):
        probability = 1 / symbols
        for length in range(min(context, place) + 1):
            followers = counts[length].get(held_out[place - length : place])
            if followers is None:
                break
            seen, kinds = followers.total(), len(followers)
            weighted = followers[symbol] + kinds * probability
            probability = weighted / (seen + kinds)
        bits -= math.log2(probability)
    return bits / len(held_out)


def _followers(text: str, length: int) -> dict[str, collections.Counter[str]]:
    """What comes after each context of that length, and how often."""
    followers = collections.defaultdict(collections.Counter)
    for place in range(length, len(text)):
        followers[text[place - length : place]][text[place]] += 1
    return followers
