"""Puts the indentation back into Python: words make lines, lines make a function.

    python examples/hierarchical.py

Does a line of a function go one step in, stay, or come out, and how far? Its own words
don't say: after `return x` a block is over, and the last line of a loop looks like any
other. So the lines around it count too. The functions are those of Python's standard
library. It takes less than a minute on two CPU cores, and leaves in runs/hierarchical a
function that the model has not seen, as the model indents it.

    (functions, lines, words)    a GRU over the words of each line
    (functions, lines, hidden)   a GRU each way over the lines of each function
    (functions, lines, changes)  a change of depth at every line

What to copy: `LineEncoder` and `Indenter`, a `TimeDistributed` in a `TimeDistributed`.
Both levels are ragged, and each has a mask. A third of the padded lines are valid, so
`capacity` pays: only as many lines are computed as the fullest batch has.
"""

import argparse
import ast
import re
import time
import zlib
from itertools import pairwise
from pathlib import Path

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import SGDClassifier

import _python_source
import tdjax.linen

CHANGES = ("in", "same", "out", "out 2", "out 3")  # the last is 3 steps or more
VOCABULARY, LINES, WORDS, SHORTEST = 2048, 32, 16, 4
FILES, HIDDEN, BATCH, STEPS = 400, 64, 32, 250
WORD = re.compile(r"""["']+text["']+|\w+|\S""")


class LineEncoder(nn.Module):
    """`(lines, words)` ids to `(lines, hidden)`."""

    @nn.compact
    def __call__(self, words, word_mask):
        embed = nn.Embed(VOCABULARY, HIDDEN)
        x = tdjax.linen.TimeDistributed(embed)(words, mask=word_mask)
        rnn = nn.RNN(nn.GRUCell(HIDDEN), return_carry=True)
        last, _ = rnn(x, seq_lengths=word_mask.sum(axis=1))
        return last


class Indenter(nn.Module):
    """`(functions, lines, words)` ids to `(functions, lines, changes)` logits."""

    capacity: int  # at most so many lines are valid

    @nn.compact
    def __call__(self, words, word_mask, line_counts):
        mask = tdjax.lengths_to_mask(line_counts, words.shape[1])
        encode = tdjax.linen.TimeDistributed(
            LineEncoder(), method="fold", capacity=self.capacity
        )
        x = encode(words, word_mask, mask=mask)
        forward, backward = (nn.RNN(nn.GRUCell(HIDDEN)) for _ in range(2))
        x = nn.Bidirectional(forward, backward)(x, seq_lengths=line_counts)
        return tdjax.linen.TimeDistributed(nn.Dense(len(CHANGES)))(x, mask=mask)


def read_functions(source):
    """The functions of a file: lists of lines, each a statement or its head."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = "text"  # Strings may be longer than a line.
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = [line for line in ast.unparse(node).splitlines() if line]
            if len(lines) >= SHORTEST:
                yield lines[:LINES]


def depth_changes(lines):
    """The index in `CHANGES` of every line but the first."""
    depths = [(len(line) - len(line.lstrip())) // 4 for line in lines]
    return np.minimum(1 - np.diff(depths), len(CHANGES) - 1)


def pad(functions):
    """`(words, word_mask, line_counts, labels)`; a label of -1 stands for none."""
    words = np.zeros((len(functions), LINES, WORDS), np.int32)
    labels = np.full((len(functions), LINES), -1, np.int32)
    for row, lines in enumerate(functions):
        for column, line in enumerate(lines):
            # A word's id is a hash, which few words share; 0 is padding.
            kept = WORD.findall(line)[:WORDS]
            ids = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in kept]
            words[row, column, : len(ids)] = ids
        labels[row, 1 : len(lines)] = depth_changes(lines)
    return words, words > 0, np.array([len(x) for x in functions], np.int32), labels


def two_line_bags(functions):
    """The words of each labelled line, and of the line before, without their order."""
    return [
        [*WORD.findall(line), *(f"before: {word}" for word in WORD.findall(before))]
        for lines in functions
        for before, line in pairwise(lines)
    ]


def baselines(functions, labels, new_functions, new_labels):
    """Accuracies of a linear model of two lines' words, and of the majority label."""
    labels, new_labels = labels[labels >= 0], new_labels[new_labels >= 0]
    count = CountVectorizer(analyzer=list)
    linear = SGDClassifier("log_loss", random_state=0)  # logistic regression
    linear.fit(count.fit_transform(two_line_bags(functions)), labels)
    by_words = linear.score(count.transform(two_line_bags(new_functions)), new_labels)
    majority = np.bincount(labels).argmax()
    return by_words, majority, float((new_labels == majority).mean())


def main(steps=STEPS, out=Path("runs/hierarchical")):
    """Trains, reports and draws; returns the held-out accuracies."""
    functions, new_functions = (
        [lines for source in side.values() for lines in read_functions(source)]
        for side in _python_source.read_sources(FILES)
    )
    train, (*new, new_labels) = pad(functions), pad(new_functions)
    rows = np.random.default_rng(0).integers(len(functions), size=(steps, BATCH))
    model = Indenter(capacity=int(train[2][rows].sum(axis=1).max()))
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    def loss(params, batch):
        *inputs, labels = batch
        logits = model.apply(params, *inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return tdjax.masked_mean(losses, labels >= 0)

    @jax.jit
    def train_step(params, state, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    all_lines = model.clone(capacity=int(new[2].sum()))
    predict = jax.jit(lambda params: all_lines.apply(params, *new).argmax(-1))
    params = jax.jit(model.init)(jax.random.key(0), *(x[:1] for x in train[:3]))
    state, start = optimizer.init(params), time.perf_counter()
    for step in range(1, steps + 1):
        batch = [array[rows[step - 1]] for array in train]
        params, state, value = train_step(params, state, batch)
        if step % -(-steps // 10) == 0 or step == steps:
            predicted = np.asarray(predict(params))
            accuracy = float((predicted == new_labels)[new_labels >= 0].mean())
            result = f"loss {value:.3f}  held out {accuracy:.2%}"
            seconds = time.perf_counter() - start
            print(f"step {step:4}/{steps}  {result}  {seconds:.0f} s", flush=True)
    linear, majority, share = baselines(functions, train[3], new_functions, new_labels)
    print(f"{model.capacity} of the {BATCH * LINES} lines of a batch were computed")
    print(f"model: {accuracy:.2%} of held-out lines right")
    print(f"baseline, linear in the words of two lines: {linear:.2%}")
    print(f"baseline, always {CHANGES[majority]!r}: {share:.2%}")
    title = f"{accuracy:.1%} of held-out lines are right; linear baseline {linear:.1%}"
    print("picture:", draw(new_functions, predicted, new_labels, title, out))
    return {"model": accuracy, "linear": linear, "majority": share}


def draw(functions, predicted, labels, title, out):
    """The function with the most steps out, of those that fit, as the model has it."""
    plt.switch_backend("Agg")
    plt.style.use("tdjax.plots")
    figure, ax = plt.subplots()
    steps_out = (labels >= CHANGES.index("out")).sum(axis=1)
    row = np.argmax(steps_out * [len(lines) <= 20 for lines in functions])
    lines, label, change = functions[row], labels[row], predicted[row]
    wrong = (change != label) & (label >= 0)
    depths = np.cumsum([0, *1 - change[1:]]).clip(0)
    for y, line in enumerate(lines):
        note = f"  <- should be: {CHANGES[label[y]]}" if wrong[y] else ""
        text = "    " * depths[y] + line.strip() + note
        color = "C0" if wrong[y] else "black"
        plain = {"family": "monospace", "parse_math": False, "in_layout": False}
        ax.text(0, -y, text, size=8, c=color, **plain)
    ax.set(ylim=(-len(lines), 1), title=title)
    ax.axis("off")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "indented.png")
    return out / "indented.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/hierarchical"))
    main(**vars(parser.parse_args()))
