"""Puts the indentation back into Python: words make lines, lines make a function.

    python examples/hierarchical.py

The question is, for every line of a function of the standard library: does it go one
step in, stay, or come back out, and how far? The words of the line alone don't say.
After `return x` a block is over, and the last line of a loop looks like any other, so
the lines around count too. It takes less than a minute on two CPU cores, and ends with
a function of a file that the model has not seen, as the model indents it. The labels of
documents made of sentences are learned in the same way.

    words (functions, lines, words) -> a GRU over the words of a line
          (functions, lines, hidden) -> a GRU each way over the lines of a function
          (functions, lines, steps)  -> a step in or out for every line

Both levels are ragged. The number of words is an input of the encoder, one slice for
each line; the number of lines is the mask of `TimeDistributed`. A third of the padded
lines are there. `capacity` is what the fullest batch of the run needs, half of them.

The baselines are the most frequent step, and a linear model of the words of a line and
of the line before, without any order.

What to copy:

* `LineEncoder` and `Indenter`: the two levels.
* `Hierarchical.predict`: where all examples are one batch, the capacity is exact.
"""

import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.panel import Panel
from rich.text import Text

import tdjax.linen
from _batches import most_steps, take
from _display import results
from _functions import (
    LINES,
    STEPS,
    VOCABULARY,
    Documents,
    Line,
    indent,
    python_functions,
)
from _main import run_example
from _options import InputError, Settings, option
from _problem import Problem, each_alone
from _sequences import NO_LABEL

OURS, FLAT = "words, lines, function", "bag-of-words baseline"
SHOWN = 20


@dataclass(frozen=True)
class HierarchicalSettings(Settings):
    """The options of this example beside those of all."""

    out: Path = Path("runs/hierarchical")
    steps: int = 400
    hidden: int = option(64, "features of a word, of a line and of each direction")


class LineEncoder(nn.Module):
    """`(lines, words)` ids and `(lines,)` counts to `(lines, hidden)`."""

    hidden: int

    @nn.compact
    def __call__(self, words, counts):
        x = nn.Embed(VOCABULARY, self.hidden)(words)
        last, _ = nn.RNN(nn.GRUCell(self.hidden), return_carry=True)(
            x, seq_lengths=counts
        )
        return last


class Indenter(nn.Module):
    """`Documents` to `(functions, lines, steps)` logits.

    The lines that are there are encoded and no others, at most `capacity` in all.
    """

    hidden: int
    capacity: int

    @nn.compact
    def __call__(self, functions):
        counts = functions.line_counts
        mask = tdjax.lengths_to_mask(counts, functions.words.shape[1])
        x = tdjax.linen.TimeDistributed(
            LineEncoder(self.hidden), method="fold", capacity=self.capacity
        )(functions.words, functions.word_counts, mask=mask)
        forward, backward = (nn.RNN(nn.GRUCell(self.hidden)) for _ in range(2))
        x = nn.Bidirectional(forward, backward)(x, seq_lengths=counts)
        return tdjax.linen.TimeDistributed(nn.Dense(len(STEPS)))(x)


class TwoLines(nn.Module):
    """The same logits, linear in the words of a line and of the line before."""

    @nn.compact
    def __call__(self, functions):
        words, counts = functions.words, functions.word_counts
        there = jnp.arange(words.shape[2]) < counts[..., None]
        embed = nn.Embed(VOCABULARY, 2 * len(STEPS))
        bags = jnp.sum(embed(words), axis=2, where=there[..., None])
        line, next_line = jnp.split(bags, 2, axis=-1)
        return line + jnp.pad(next_line, ((0, 0), (1, 0), (0, 0)))[:, :-1]


class Hierarchical(Problem):
    """Puts the indentation back into Python: words make lines, lines make a function.

    A batch is `Documents`.
    """

    quantities = {"loss": ".3f", "accuracy": ".1%", "accuracy of the bag": ".1%"}

    def __init__(self, settings: HierarchicalSettings):
        self.train, self.held_out, self.lines = python_functions()
        if not self.lines or not len(self.train.labels):
            raise InputError("this Python has no source of its standard library")
        labels = self.train.labels[self.train.labels != NO_LABEL]
        self.majority = np.full_like(self.held_out.labels, np.bincount(labels).argmax())
        right = float(right_lines(self.majority, self.held_out).mean())
        lines = {"majority class": right}
        self.baselines = {"accuracy": lines, "accuracy of the bag": lines}
        capacity = most_steps(self.train.line_counts, settings)
        self.encoded = capacity / (settings.batch_size * LINES)
        self.models = {OURS: Indenter(settings.hidden, capacity), FLAT: TwoLines()}

    def init(self, key):
        some = take(self.train, slice(1))
        return {
            name: jax.jit(model.init)(key, some) for name, model in self.models.items()
        }

    def optimizer(self, settings):
        # The best for the linear model is far higher.
        rate = 10 * settings.learning_rate
        higher = dataclasses.replace(settings, learning_rate=rate)
        rates = {OURS: settings, FLAT: higher}
        optimizers = {
            name: super(Hierarchical, self).optimizer(rates[name]) for name in rates
        }
        return each_alone(optimizers)

    def loss(self, params, batch, key):
        (ours, logits), (flat, _) = (
            mean_loss(model, params[name], batch) for name, model in self.models.items()
        )
        right = logits.argmax(-1) == batch.labels
        accuracy = tdjax.masked_mean(1.0 * right, batch.labels != NO_LABEL)
        return ours + flat, {"loss": ours, "accuracy": accuracy}

    def evaluate(self, params, examples):
        loss, ours = self.predict(params, examples, OURS)
        _, flat = self.predict(params, examples, FLAT)
        shares = (right_lines(steps, examples).mean() for steps in (ours, flat))
        return dict(zip(self.quantities, (float(loss), *map(float, shares))))

    def predict(self, params, examples, name: str) -> tuple[Any, np.ndarray]:
        """The loss, and the steps `(functions, lines)`, all in one batch."""
        model = self.models[name]
        if isinstance(model, Indenter):
            model = model.clone(capacity=int(examples.line_counts.sum()))
        loss, logits = mean_loss(model, params[name], examples)
        return loss, np.asarray(logits.argmax(-1))

    def report(self, params, console, out):
        steps = {
            name: self.predict(params, self.held_out, name)[1] for name in self.models
        }
        rows = {name: score(given, self.held_out) for name, given in steps.items()}
        rows["majority-class baseline"] = score(self.majority, self.held_out)
        count = f"{len(self.lines):,} held-out functions"
        console.print(indented(self.lines, steps[OURS], self.held_out))
        console.print(results(f"right in {count}", rows))
        there = self.train.line_counts.mean() / LINES
        print(f"padded lines    {there:.1%} are there, {self.encoded:.1%} are encoded")


@functools.partial(jax.jit, static_argnums=0)
def mean_loss(model, params, functions: Documents) -> tuple[jax.Array, jax.Array]:
    """Over the lines that have a label; and the logits."""
    logits: Any = model.apply(params, functions)
    labelled = functions.labels != NO_LABEL
    labels = jnp.where(labelled, functions.labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return tdjax.masked_mean(losses, labelled), logits


def right_lines(steps: np.ndarray, functions: Documents) -> np.ndarray:
    """Whether each step is right, of those that have a label: one after the other."""
    labelled = functions.labels != NO_LABEL
    return (steps == functions.labels)[labelled]


def score(steps: np.ndarray, functions: Documents) -> dict[str, str]:
    """The shares that are right: of lines, of those that come out, of functions."""
    labels = functions.labels
    wrong = (steps != labels) & (labels != NO_LABEL)
    shares = {
        "lines": right_lines(steps, functions),
        "lines that come out": ~wrong[labels >= STEPS.index("out")],
        "whole functions": ~wrong.any(axis=1),
    }
    return {name: f"{share.mean():.1%}" for name, share in shares.items()}


def indented(lines: list[list[Line]], steps: np.ndarray, functions: Documents) -> Panel:
    """A held-out function as the model indents it, and its mistakes."""
    # One that fits the screen, with as many steps out as any.
    out = (functions.labels >= STEPS.index("out")).sum(axis=1)
    row = int(np.argmax(np.where(functions.line_counts <= SHOWN, out, 0)))
    given, true = (x[row, 1 : len(lines[row])] for x in (steps, functions.labels))
    text = Text()
    for depth, line, right in zip(indent(given), lines[row], [True, *(given == true)]):
        text.append("    " * depth + line.text, "" if right else "red").append("\n")
    text.append(f"{(given != true).sum()} of {len(true)} steps wrong (red)", "bold")
    return Panel(text, title="a held-out function, its indentation by the model")


def main(arguments: list[str]) -> int:
    return run_example(Hierarchical, HierarchicalSettings, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
