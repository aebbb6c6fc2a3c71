"""One answer for a sequence, or one at every step: the same GRU with two heads.

    python examples/many_to_one.py

Handwritten digits are read row by row, as sequences of eight steps of eight pixels. The
many-to-one model has its output layer on the last state and answers once, after the
last row. The many-to-many model has the same layer on all states and answers after
every row, so it learns to tell a digit before it is complete. The program takes less
than a minute on two CPU cores, and draws how often each is right after each row.

The targets differ in shape: `(batch,)` for the one, `(batch, time)` for the other. With
targets of another shape some losses fail, and others broadcast without a word. The
program lists which, and trains a third model on such targets. Every example meets the
labels of all 32 in its batch: the loss stays at 2.3, that of a guess.

What to copy:

- `Reader`: the same layers and parameters as many-to-one and as many-to-many.
- `cross_entropy`: a loss that refuses labels of another shape than the logits want.
"""

import argparse
import functools
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

import tdjax.linen

ROWS = PIXELS = 8
CLASSES, HELD_OUT, HIDDEN, BATCH, STEPS = 10, 397, 128, 32, 1000
TASKS = "many-to-one", "many-to-many", "wrong targets"
# Logits and labels that do not fit, and what a loss of one-hot labels makes of them.
MISFITS = {
    ((32, 8, 10), (32, 1)): "an example's label goes to all of its steps",
    ((32, 10), (32, 1)): "every label meets every example",
    ((8, 8, 10), (8,)): "the label of example i goes to step i of all",
}


class Reader(nn.Module):
    """`(batch, time, features)` to `(batch, classes)` logits, or one for each step.

    With `at_every_step` they are `(batch, time, classes)`.
    """

    at_every_step: bool = False

    @nn.compact
    def __call__(self, x):
        states = nn.RNN(nn.GRUCell(HIDDEN))(x)
        head = nn.Dense(CLASSES)
        if self.at_every_step:
            return tdjax.linen.TimeDistributed(head)(states)
        return head(states[:, -1])


def read_digits():
    """Training and held-out `(images, labels)`: `(n, rows, pixels)` and `(n,)`.

    The last digits of the file are held out, since neighbours in the file look alike:
    shuffled, the task is much easier.
    """
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    return [(images[x], labels[x]) for x in (slice(-HELD_OUT), slice(-HELD_OUT, None))]


def shift(key, images):
    """Moves each a pixel to the left, to the right, or not: new digits from old."""
    padded = jnp.pad(images, ((0, 0), (0, 0), (1, 1)))
    starts = jax.random.randint(key, (len(images),), 0, 3)
    cut = lambda image, start: jax.lax.dynamic_slice_in_dim(image, start, PIXELS, 1)
    return jax.vmap(cut)(padded, starts)


def cross_entropy(logits, labels):
    """The loss of each label: `(..., classes)` logits with `(...)` labels."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels of shape {labels.shape} don't fit logits of shape {logits.shape}: "
            f"they must be {logits.shape[:-1]}."
        )
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def one_hot_cross_entropy(logits, labels):
    """The same with one-hot labels, and without a look at the shapes."""
    return optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, CLASSES))


def loss(task, params, images, labels):
    """What each model learns from; the last is the mistake."""
    if task == "many-to-many":
        logits = Reader(at_every_step=True).apply(params, images)
        return cross_entropy(logits, jnp.repeat(labels[:, None], ROWS, axis=1)).mean()
    logits = Reader().apply(params, images)
    if task == "many-to-one":
        return cross_entropy(logits, labels).mean()
    return one_hot_cross_entropy(logits, labels[:, None]).mean()


@jax.jit
def accuracies(params, images, labels):
    """`(rows,)`, after each row; many-to-one parameters fit the other model too."""
    answers = Reader(at_every_step=True).apply(params, images).argmax(-1)
    return (answers == labels[:, None]).mean(0)


def main(steps=STEPS, out=Path("runs/many_to_one")):
    """Trains, reports and draws; returns held-out accuracies after each row."""
    train, held_out = read_digits()
    schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-3, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @functools.partial(jax.jit, static_argnums=0)
    def train_step(task, params, state, images, labels, key):
        images = shift(key, images)
        value, gradient = jax.value_and_grad(loss, 1)(task, params, images, labels)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    key, rng, start = jax.random.key(0), np.random.default_rng(0), time.perf_counter()
    params = dict.fromkeys(TASKS, jax.jit(Reader().init)(key, train[0][:1]))
    states = {task: optimizer.init(params[task]) for task in TASKS}
    for step in range(1, steps + 1):
        rows, values = rng.integers(len(train[0]), size=BATCH), {}
        batch = train[0][rows], train[1][rows], jax.random.fold_in(key, step)
        for task in TASKS:
            params[task], states[task], values[task] = train_step(
                task, params[task], states[task], *batch
            )
        if step % -(-steps // 10) == 0 or step == steps:
            results = {t: np.array(accuracies(params[t], *held_out)) for t in TASKS}
            shown = [f"{t} {values[t]:.3f} {results[t][-1]:.1%}" for t in TASKS]
            seconds = time.perf_counter() - start
            print(f"step {step:4}/{steps}", *shown, f"{seconds:.0f} s", sep="  ")

    results |= baselines(train, held_out)
    print("\nright after each of the 8 rows, held-out digits:")
    for name, values in results.items():
        print(f"{name:19}", *(f"{x:4.0%}" for x in values))
    print("\nlabels that do not fit, but broadcast if they are one-hot:")
    for (logits, labels), meaning in MISFITS.items():
        print(f"logits {logits}, labels {labels}: {meaning}")
    print("picture:", draw(results, out))
    return results


def baselines(train, held_out):
    """After each row, a regression on the pixels so far; the most frequent digit."""
    majority = np.mean(held_out[1] == np.bincount(train[1]).argmax())
    regressions = []
    for rows in range(1, ROWS + 1):
        seen = [x[:, :rows].reshape(len(x), -1) for x, _ in (train, held_out)]
        # Less regularised than by default: a better baseline here.
        model = LogisticRegression(C=10, max_iter=1000)
        with threadpool_limits(1):  # several threads are slower on small products
            model.fit(seen[0], train[1])
        regressions.append(model.score(seen[1], held_out[1]))
    regressions, majorities = np.array(regressions), np.full(ROWS, majority)
    return {"logistic regression": regressions, "majority class": majorities}


def draw(results, out):
    plt.switch_backend("Agg")
    plt.style.use("tdjax.plots")
    figure, ax = plt.subplots()
    rows, styles = np.arange(1, ROWS + 1), ("C0--", "C0-", "C3-", "C1-", "C2-")
    moves = 0.02, 0, 0, -0.06, 0  # labels of curves that end close together
    for (name, values), style, move in zip(results.items(), styles, moves):
        ax.plot(rows, values, style)
        label = f"{name} {values[-1]:.0%}"
        ax.text(ROWS + 0.2, values[-1] + move, label, color=style[:2], va="center")
    ax.set(xlabel="rows read", xticks=rows, ylim=(0, 1.02))
    ax.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    many, one = (results[task][5] for task in ("many-to-many", "many-to-one"))
    ax.set_title(
        f"After 6 of 8 rows, many-to-many is {many:.0%} right, many-to-one {one:.0%}"
    )
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "row_by_row.png")
    return out / "row_by_row.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/many_to_one"))
    main(**vars(parser.parse_args()))
