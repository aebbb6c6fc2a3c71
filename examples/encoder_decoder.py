"""Trains an encoder and a decoder: dates in English words to ISO dates.

    python examples/encoder_decoder.py

"Tuesday the third of March, nineteen eighty-seven" goes in, "1987-03-03" comes out: a
sequence of another length, character by character. A bidirectional GRU reads the
phrase. A second GRU writes the date: in training it is told the right character before
each one (teacher forcing), afterwards it goes by its own, step after step, until it
writes the end symbol. Attention lets each of its steps look at the whole phrase. No
date of the held-out phrases is in training. It takes about a minute on two CPU cores.

What to copy:

* `Translator`: lengths keep padding out of the recurrence and out of attention. One
  method, `decode`, takes all steps at once in training and one step at a time after it.
* `translate`: the decoder fed with its own output in `jax.lax.scan`, compiled once.
* `mean_loss`: `tdjax.lengths_to_mask` and `tdjax.masked_mean` make the loss the mean
  over the symbols that are there.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table
from rich.text import Text

import tdjax
from _attention_picture import save_attention
from _batches import in_batches, take
from _dates import LONGEST_DATE, LONGEST_PHRASE, draw_pairs, split_dates
from _display import results
from _main import run_example
from _options import Settings, option
from _problem import Problem
from _text_pairs import END, SYMBOLS, Pairs, as_pairs, as_text
from _trigrams import linear_baseline

# Of the ISO 8601 forms, with the end symbol.
LENGTHS = {"years": 5, "months": 8, "days": 11, "intervals": 17}
HELD_OUT = 1000
SHOWN, SHOWN_WRONG = 10, 3
EVALUATION_BATCH = 250


@dataclass(frozen=True)
class TranslationSettings(Settings):
    """The options of this example beside those of all."""

    out: Path = Path("runs/encoder_decoder")
    steps: int = 400
    batch_size: int = 64
    examples: int = option(20_000, "pairs of a phrase and a date to train on")
    hidden: int = option(64, "features of the embeddings and of each GRU")


class Encoded(NamedTuple):
    """A phrase as the decoder sees it: `(batch, time, features)`, and what is there."""

    steps: jax.Array
    mask: jax.Array


class Translator(nn.Module):
    """Phrases to the logits of dates."""

    hidden: int

    def setup(self):
        self.embed = nn.Embed(SYMBOLS, self.hidden)
        forward, backward = (nn.RNN(nn.GRUCell(self.hidden)) for _ in range(2))
        self.encoder = nn.Bidirectional(forward, backward, return_carry=True)
        self.decoder = nn.RNN(nn.GRUCell(self.hidden), return_carry=True)
        self.attention = nn.MultiHeadDotProductAttention(num_heads=1)
        self.first_carry = nn.Dense(self.hidden)
        self.head = tdjax.linen.TimeDistributed(nn.Dense(SYMBOLS))

    def __call__(self, phrases, phrase_lengths, previous):
        """The logits of all steps, given the symbols before them."""
        encoded, carry = self.encode(phrases, phrase_lengths)
        return self.decode(carry, previous, encoded)[1]

    def encode(self, phrases, lengths):
        mask = tdjax.lengths_to_mask(lengths, phrases.shape[1])
        ends, steps = self.encoder(self.embed(phrases), seq_lengths=lengths)
        carry = jnp.tanh(self.first_carry(jnp.concatenate(ends, axis=-1)))
        return Encoded(steps, mask), carry

    def decode(self, carry, previous, encoded):
        """The carry and the logits after the symbols `previous`, `(batch, time)`."""
        carry, y = self.decoder(self.embed(previous), initial_carry=carry)
        mask = encoded.mask[:, None, None, :]  # (batch, heads, queries, keys)
        seen = self.attention(y, encoded.steps, mask=mask, sow_weights=True)
        return carry, self.head(jnp.concatenate([y, seen], axis=-1))


def cross_entropies(model: Translator, params, pairs: Pairs) -> jax.Array:
    """`(batch, time)`: the losses of each symbol, given the right ones before it."""
    arguments = pairs.sources, pairs.source_lengths, previous(pairs.targets)
    logits: Any = model.apply({"params": params}, *arguments)
    return optax.softmax_cross_entropy_with_integer_labels(logits, pairs.targets)


def attention_weights(model: Translator, params, pairs: Pairs) -> np.ndarray:
    """`(batch, target_time, source_time)`, while the right symbols are written."""
    arguments = pairs.sources, pairs.source_lengths, previous(pairs.targets)
    apply = functools.partial(model.apply, mutable="intermediates")
    _, sown = jax.jit(apply)({"params": params}, *arguments)
    (weights,) = sown["intermediates"]["attention"]["attention_weights"]
    return np.asarray(weights[:, 0])  # of the only head


def previous(symbols):
    """The symbol before each; the decoder starts with an end."""
    return jnp.pad(symbols[:, :-1], ((0, 0), (1, 0)), constant_values=END)


def mean_loss(losses, pairs: Pairs) -> jax.Array:
    """The mean over the symbols up to the end of each text."""
    mask = tdjax.lengths_to_mask(pairs.target_lengths, losses.shape[1])
    return tdjax.masked_mean(losses, mask)


def translate(model: Translator, params, pairs: Pairs) -> jax.Array:
    """`(batch, time)`: the likeliest symbol, one after the other, up to `END`."""
    apply = functools.partial(model.apply, {"params": params})
    encoded, carry = apply(pairs.sources, pairs.source_lengths, method="encode")

    def step(state, _):
        carry, last, ended = state
        after: Any = apply(carry, last[:, None], encoded, method="decode")
        carry, logits = after
        symbol = jnp.where(ended, END, logits[:, 0].argmax(-1))
        return (carry, symbol, ended | (symbol == END)), symbol

    batch, time = pairs.targets.shape
    state = carry, jnp.full(batch, END), jnp.zeros(batch, bool)
    return jax.lax.scan(step, state, length=time)[1].T


@functools.partial(jax.jit, static_argnums=0)
def predict(model: Translator, params, pairs: Pairs):
    return cross_entropies(model, params, pairs), translate(model, params, pairs)


class Translation(Problem):
    """Trains an encoder and a decoder of dates.

    A batch is of `Pairs`.
    """

    quantities = {"loss": ".3f", "exact": ".1%"}

    def __init__(self, settings: TranslationSettings):
        dates, held_out_dates = split_dates()
        sizes = LONGEST_PHRASE, LONGEST_DATE + 1
        texts = draw_pairs(dates, settings.examples, settings.seed)
        self.held_out_texts = draw_pairs(held_out_dates, HELD_OUT, settings.seed)
        self.train = as_pairs(texts, *sizes)
        self.held_out = as_pairs(self.held_out_texts, *sizes)
        known = self.train.sources, self.train.targets
        self.linear = linear_baseline(*known, self.held_out.sources, SYMBOLS)
        exact = float(is_exact(self.linear, self.held_out).mean())
        self.baselines = {"exact": {"linear, of trigrams": exact}}
        self.model = Translator(settings.hidden)

    def init(self, key):
        some = take(self.train, slice(1))
        arguments = some.sources, some.source_lengths, some.targets
        return jax.jit(self.model.init)(key, *arguments)["params"]

    def loss(self, params, batch, key):
        return mean_loss(cross_entropies(self.model, params, batch), batch), {}

    def predict(self, params, examples):
        fun = functools.partial(predict, self.model, params)
        return in_batches(fun, examples, EVALUATION_BATCH)

    def evaluate(self, params, examples):
        losses, written = self.predict(params, examples)
        exact = is_exact(written, examples).mean()
        return {"loss": float(mean_loss(losses, examples)), "exact": float(exact)}

    def report(self, params, console, out):
        _, written = self.predict(params, self.held_out)
        exact = is_exact(written, self.held_out)
        by_linear = is_exact(self.linear, self.held_out)
        rows = {
            "encoder and decoder": by_kind(exact, self.held_out),
            "linear baseline, of trigrams": by_kind(by_linear, self.held_out),
        }
        console.print(samples(self.held_out_texts, written, exact))
        console.print(results("held-out dates, right to the last character", rows))
        longest = self.held_out.target_lengths.argmax()
        one = take(self.held_out, slice(longest, longest + 1))
        (weights,) = attention_weights(self.model, params, one)
        save_attention(out / "attention.png", weights, *self.held_out_texts[longest])
        print(f"attention       {out / 'attention.png'}")


def is_exact(written: np.ndarray, pairs: Pairs) -> np.ndarray:
    return (written == pairs.targets).all(axis=1)


def by_kind(exact: np.ndarray, pairs: Pairs) -> dict[str, str]:
    kinds = {kind: pairs.target_lengths == length for kind, length in LENGTHS.items()}
    kinds = {"all": np.full(len(exact), True), **kinds}
    return {kind: f"{exact[rows].mean():.1%}" for kind, rows in kinds.items()}


def samples(
    texts: list[tuple[str, str]], written: np.ndarray, exact: np.ndarray
) -> Table:
    """The first held-out pairs, and some that are wrong, if any are."""
    table = Table("words", "target", "prediction", title="held out")
    for row in np.union1d(np.arange(SHOWN), np.flatnonzero(~exact)[:SHOWN_WRONG]):
        words, target = texts[row]
        style = "" if exact[row] else "bold red"
        table.add_row(words, target, Text(as_text(written[row]), style))
    return table


def main(arguments: list[str]) -> int:
    return run_example(Translation, TranslationSettings, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
