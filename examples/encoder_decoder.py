"""Trains an encoder and a decoder with attention: dates in words to ISO 8601.

    python examples/encoder_decoder.py

"3 March to the fifth of Apr, nineteen eighty-seven" goes in, "1987-03-03/04-05" comes
out, character by character. A bidirectional GRU reads the phrase, a second GRU writes
the date. In training it reads the right characters, afterwards its own. It takes less
than a minute on two CPU cores, and leaves a picture in runs/encoder_decoder.

What to copy: `encode` passes its mask to `TimeDistributed`, so the decoder sees zeros
at padding; `decode` takes all steps at once in training, and single steps in
`translate`, where `jax.lax.scan` feeds the decoder with its own output.
"""

import argparse
import datetime
import random
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import Ridge

import tdjax.linen

HIDDEN, BATCH, STEPS, EXAMPLES, HELD_OUT = 64, 64, 600, 20_000, 1000
LONGEST_PHRASE, LONGEST_DATE = LONGEST = 88, len("1987-03-03/04-05") + 1
# Ids are ASCII codes; END follows each text and fills the rest of its row.
END, SYMBOLS = 0, 128

ONES = """one two three four five six seven eight nine ten eleven twelve thirteen
fourteen fifteen sixteen seventeen eighteen nineteen"""
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NTHS = """first second third fourth fifth sixth seventh eighth ninth tenth eleventh
twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth
twentieth"""
NUMBERS, NTHS = ["", *ONES.split()], ["", *NTHS.split()]
NUMBERS += [f"{ten}-{one}".strip("-") for ten in TENS.split() for one in NUMBERS[:10]]
NTHS += [f"twenty-{nth}" for nth in NTHS[1:10]] + ["thirtieth", "thirty-first"]
DAYS = ["{0.day} {0:%B}", "{0:%b} {0.day}", "{0:%B} {nth}", "the {word} of {0:%b}"]
DAYS += ["{0:%a} {word} {0:%b}", "{0:%a} the {nth} of {0:%B}"]
PHRASES = ["{first} {year}", "{first}, {year}", "in {year}, on {first}"]
PHRASES += ["{first} to {last} {year}", "from {first} to {last}, {year}"]
PHRASES += ["{year}, between {first} and {last}"]


def draw_texts(count, held_out):
    """A tuple of phrases and one of dates; every 20th day is held out."""
    rng, pairs = random.Random(held_out), []

    def say(day):
        word = NTHS[day.day]
        return rng.choice(DAYS).format(day, word=word, nth=f"{day.day}{word[-2:]}")

    for _ in range(count):
        century, rest = rng.randint(19, 20), rng.randint(10, 99)
        start = datetime.date(100 * century + rest, 1, 1).toordinal()
        days = [n for n in range(start, start + 365) if (n % 20 == 0) == held_out]
        first, last = map(datetime.date.fromordinal, sorted(rng.sample(days, 2)))
        year = rng.choice([f"{century}{rest}", f"{NUMBERS[century]} {NUMBERS[rest]}"])
        form = rng.choice(PHRASES)
        iso = f"{first}/{last:%m-%d}" if "{last}" in form else f"{first}"
        pairs.append((form.format(first=say(first), last=say(last), year=year), iso))
    return tuple(zip(*pairs))


def as_array(texts, size):
    """`(texts, size)` ids."""
    padded = "".join(text.ljust(size, "\0") for text in texts).encode("ascii")
    return np.frombuffer(padded, np.uint8).reshape(-1, size).astype(np.int32)


class Translator(nn.Module):
    """Phrases and the symbols before each of a date to its logits."""

    def setup(self):
        self.embed = nn.Embed(SYMBOLS, HIDDEN)
        forward, backward = (nn.RNN(nn.GRUCell(HIDDEN)) for _ in range(2))
        self.encoder = nn.Bidirectional(forward, backward, return_carry=True)
        self.memory = tdjax.linen.TimeDistributed(nn.Dense(HIDDEN))
        self.decoder = nn.RNN(nn.GRUCell(HIDDEN), return_carry=True)
        self.head = tdjax.linen.TimeDistributed(nn.Dense(SYMBOLS))

    def __call__(self, phrases, previous):
        carry, *encoded = self.encode(phrases)
        return self.decode(carry, previous, *encoded)[1]

    def encode(self, phrases):
        mask = phrases != END
        ends, steps = self.encoder(self.embed(phrases), seq_lengths=mask.sum(1))
        return ends[0], self.memory(steps, mask=mask), mask

    def decode(self, carry, previous, memory, mask):
        """The carry, the logits and the attention after the symbols `previous`."""
        carry, queries = self.decoder(self.embed(previous), initial_carry=carry)
        scores = jnp.einsum("bqf,bkf->bqk", queries, memory)
        weights = jax.nn.softmax(scores, where=mask[:, None])
        seen = jnp.einsum("bqk,bkf->bqf", weights, memory)
        return carry, self.head(jnp.concatenate([queries, seen], axis=-1)), weights


def mean_loss(model, params, phrases, dates):
    """Teacher forcing: each symbol is predicted from the right ones before it."""
    previous = jnp.pad(dates[:, :-1], ((0, 0), (1, 0)), constant_values=END)
    logits = model.apply(params, phrases, previous)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, dates)
    lengths = (dates != END).sum(1) + 1  # the first END is to be predicted too
    return tdjax.masked_mean(losses, tdjax.lengths_to_mask(lengths, LONGEST_DATE))


def translate(model, params, phrases):
    """The likeliest symbol at each step, up to END, and where the step looked."""
    carry, *encoded = model.apply(params, phrases, method="encode")

    def step(state, _):
        carry, last, ended = state
        arguments = carry, last[:, None], *encoded
        carry, logits, weights = model.apply(params, *arguments, method="decode")
        symbol = jnp.where(ended, END, logits[:, 0].argmax(-1))
        return (carry, symbol, ended | (symbol == END)), (symbol, weights[:, 0])

    start = carry, jnp.full(len(phrases), END), jnp.zeros(len(phrases), bool)
    _, written = jax.lax.scan(step, start, length=LONGEST_DATE)
    return [array.swapaxes(0, 1) for array in written]


def linear_baseline(train, dates, held_out):
    """Least squares from the trigrams of a phrase to each symbol of its date."""
    trigrams = CountVectorizer(analyzer="char", ngram_range=(3, 3), dtype=np.float32)
    x, symbols = trigrams.fit_transform(train), np.unique(dates)
    one_hot = (dates[..., None] == symbols).reshape(len(dates), -1).astype(np.float32)
    ridge = Ridge(fit_intercept=False, solver="cholesky").fit(x, one_hot)
    scores = ridge.predict(trigrams.transform(held_out))
    return symbols[scores.reshape(-1, LONGEST_DATE, len(symbols)).argmax(-1)]


def main(steps=STEPS, out=Path("runs/encoder_decoder")):
    """Trains, reports and draws; returns the shares of right dates."""
    texts = draw_texts(EXAMPLES, False), draw_texts(HELD_OUT, True)
    train, held_out = ([*map(as_array, side, LONGEST)] for side in texts)
    model, rng = Translator(), np.random.default_rng(0)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    @jax.jit
    def train_step(params, state, batch):
        value, gradient = jax.value_and_grad(mean_loss, 1)(model, params, *batch)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    predict = jax.jit(translate, static_argnums=0)
    params = jax.jit(model.init)(jax.random.key(0), *(array[:1] for array in train))
    state, start = optimizer.init(params), time.perf_counter()
    for step in range(1, steps + 1):
        rows = rng.integers(EXAMPLES, size=BATCH)
        params, state, value = train_step(params, state, [x[rows] for x in train])
        if step % -(-steps // 10) == 0 or step == steps:
            written, weights = predict(model, params, held_out[0])
            right = float(np.all(written == held_out[1], axis=1).mean())
            print(
                f"step {step:4}/{steps}  loss {value:.3f}  "
                f"held out {right:.1%}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )

    by_trigrams = linear_baseline(texts[0][0], train[1], texts[1][0])
    baseline = float((by_trigrams == held_out[1]).all(1).mean())
    print(f"translator: {right:.1%} of held-out dates right to the last digit")
    print(f"baseline, linear in trigrams: {baseline:.1%}")
    print("picture:", draw(*texts[1], weights, right, out))
    return {"translator": right, "baseline": baseline}


def draw(phrases, dates, weights, right, out):
    plt.switch_backend("Agg")
    plt.style.use("tdjax.plots")
    row = next(i for i, x in enumerate(phrases) if len(x) < 45 and "/" in dates[i])
    phrase, date = phrases[row], dates[row]
    figure, ax = plt.subplots()
    shown = weights[row, : len(date), : len(phrase)]
    ax.imshow(shown, "Blues", vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(len(phrase)), phrase, family="monospace")
    ax.set_yticks(range(len(date)), date, family="monospace")
    ax.set(xlabel="what it looks at", ylabel="what it writes")
    ax.set_title(f"{right:.1%} of held-out dates are right; dark is where it looks")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "attention.png")
    return out / "attention.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/encoder_decoder"))
    main(**vars(parser.parse_args()))
