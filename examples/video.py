"""Reads films: a conv net with BatchNorm for every frame, then a GRU. Flax NNX.

    python examples/video.py

Which handwritten digit is it, and which way does it go, in films of 2 to 9 noisy
frames? It takes less than a minute on two cores, and leaves a picture in runs/video.
The baseline, a mean over the frames in place of the GRU, can't tell a film from the
same run backwards, so it is right in half of the films at best.

Films are padded to 9 frames with NaN, which would ruin the training if anything used
it. `nnx.vmap` can't train this: it refuses a BatchNorm that steps share, and has no
mask. What to copy is `FilmReader`: `method="fold"` makes one batch of all frames, and
`FrameNet` gets the mask, so BatchNorm takes its statistics from the valid frames of all
films. With `capacity` only these frames are computed, in training and in inference, and
the results stay the same.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import tdjax.nnx

WAYS = {"↑": (-1, 0), "↓": (1, 0), "←": (0, -1), "→": (0, 1)}
LABELS = [f"{digit}{way}" for digit in range(10) for way in WAYS]
SHORTEST, LONGEST, CANVAS, SIZE, FASTEST, LOST = 2, 9, 16, 8, 3, 0.2
HELD_OUT, HIDDEN, BATCH, STEPS = 297, 64, 32, 600


class FrameNet(nnx.Module):
    """`(frames, height, width)` to `(frames, 2 * HIDDEN)`; `mask` is `(frames,)`."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 16, (5, 5), strides=2, rngs=rngs)
        self.conv_norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.what = nnx.Conv(16, HIDDEN, (3, 3), rngs=rngs)
        self.where = nnx.Linear(16 * (CANVAS // 2) ** 2, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(2 * HIDDEN, momentum=0.9, rngs=rngs)

    def __call__(self, frames, mask):
        x = self.conv(frames[..., None])
        x = nnx.relu(self.conv_norm(x, mask=mask[:, None, None, None]))
        what, where = self.what(x).max((1, 2)), self.where(x.reshape(len(x), -1))
        return self.norm(jnp.concatenate([what, where], -1), mask=mask[:, None])


class FilmReader(nnx.Module):
    """`(films, time, height, width)` to `(films, LABELS)` logits."""

    def __init__(self, rngs, in_order=True):
        self.frame_net, self.in_order = FrameNet(rngs), in_order
        if in_order:
            cell = nnx.GRUCell(2 * HIDDEN, HIDDEN, rngs=rngs)
            self.over_time = nnx.RNN(cell, return_carry=True, rngs=rngs)
        else:
            self.over_time = nnx.Linear(2 * HIDDEN, HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, 10 + len(WAYS), rngs=rngs)

    def __call__(self, frames, lengths, capacity=None):
        mask = tdjax.lengths_to_mask(lengths, frames.shape[1])
        every_frame = tdjax.nnx.TimeDistributed(
            self.frame_net, method="fold", capacity=capacity
        )
        x = every_frame(frames, mask, mask=mask)
        if self.in_order:
            x, _ = self.over_time(x, seq_lengths=lengths)
        else:
            x = nnx.relu(self.over_time(tdjax.masked_mean(x, mask, axis=1)))
        digit, way = jnp.split(self.head(x), [10], axis=-1)
        return (digit[:, :, None] + way[:, None]).reshape(len(x), -1)


def moving_digits():
    """Training and held-out films of scikit-learn's digits; no image is in both."""
    images, digits = load_digits(return_X_y=True)
    images = images.reshape(-1, SIZE, SIZE) / images.max()
    rng = np.random.default_rng(0)
    sides = np.split(rng.permutation(len(images)), [-HELD_OUT])
    return [make_films(rng, images[rows], digits[rows]) for rows in sides]


def make_films(rng, images, digits):
    """`(frames, lengths, labels)`, padded with NaN; each image goes every way."""
    labels = (digits[:, None] * len(WAYS) + np.arange(len(WAYS))).ravel()
    lengths = rng.integers(SHORTEST, LONGEST + 1, len(labels))
    frames = np.full((len(labels), LONGEST, CANVAS, CANVAS), np.nan, np.float32)
    directions, room = np.array([*WAYS.values()]), CANVAS - SIZE
    for row, length in enumerate(lengths):
        speed = rng.integers(1, min(FASTEST, room // (length - 1)) + 1)
        path = speed * directions[row % len(WAYS)] * np.arange(length)[:, None]
        start = rng.integers(-path.min(0), room - path.max(0) + 1)
        frames[row, :length] = 0
        for frame, (y, x) in zip(frames[row], start + path):
            frame[y : y + SIZE, x : x + SIZE] = images[row // len(WAYS)]
    frames[rng.random(frames.shape) < LOST] *= 0  # NaN stays NaN
    return frames, lengths, labels


@nnx.jit(static_argnums=2)
def train_step(model, optimizer, capacity, frames, lengths, labels):
    def loss(model):
        losses = optax.softmax_cross_entropy_with_integer_labels
        return losses(model(frames, lengths, capacity), labels).mean()

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


@nnx.jit(static_argnums=3)
def run(model, frames, lengths, capacity=None):
    return model(frames, lengths, capacity)


def main(steps=STEPS, out=Path("runs/video")):
    """Trains, reports and draws; returns the held-out accuracies."""
    train, (frames, lengths, labels) = moving_digits()
    answers = {"majority class": np.bincount(train[2]).argmax()}
    for name, in_order in (("mean", False), ("GRU", True)):
        model = FilmReader(nnx.Rngs(0), in_order)
        adam = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
        optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)
        batches = np.random.default_rng(0).integers(len(train[0]), size=(steps, BATCH))
        capacity = int(train[1][batches].sum(axis=1).max())  # room for every batch
        start = time.perf_counter()
        for step, rows in enumerate(batches, 1):
            model.train()
            batch = (array[rows] for array in train)
            loss = train_step(model, optimizer, capacity, *batch)
            if step % -(-steps // 5) == 0 or step == steps:
                model.eval()
                logits = run(model, frames, lengths, int(lengths.sum()))
                answers[name] = np.argmax(logits, axis=1)
                right = f"held out {np.mean(answers[name] == labels):.1%}"
                seconds = f"{time.perf_counter() - start:.0f} s"
                print(f"{name:4}  step {step:3}  loss {loss:.3f}  {right}  {seconds}")
    right = {name: float(np.mean(x == labels)) for name, x in answers.items()}
    print("right in held-out films:", *(f"{k} {x:.1%}" for k, x in right.items()))
    compare(model, frames, lengths)
    print("picture:", draw(frames, lengths, labels, answers, right, out))
    return right


def compare(model, frames, lengths):
    """Shows what packing saves, and that NaN in the padding does no harm."""
    results = []
    for capacity in (None, int(lengths.sum())):
        run(model, frames, lengths, capacity)  # compiles
        start = time.perf_counter()
        results.append(jax.block_until_ready(run(model, frames, lengths, capacity)))
        spent = time.perf_counter() - start
        print(f"capacity={capacity} of {len(frames) * LONGEST} frames: {spent:.2f} s")
    print(f"packing changes logits by at most {abs(results[0] - results[1]).max()}")
    model.train()
    for padded in frames, np.nan_to_num(frames):
        copy = nnx.clone(model)
        logits = run(copy, padded, lengths)
        results.append([logits, *jax.tree.leaves(nnx.state(copy, nnx.BatchStat))])
    changes = [abs(a - b).max() for a, b in zip(*results[2:])]
    print(f"0 in place of NaN changes logits and statistics by {max(changes)}")


def draw(frames, lengths, labels, answers, right, out):
    """A held-out film of each length, and what both models say of it."""
    plt.switch_backend("Agg")
    plt.style.use("tdjax.plots")
    rows = [np.flatnonzero(lengths == n)[7 * n] for n in range(SHORTEST, LONGEST + 1)]
    strips = np.pad(frames[rows], ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=1)
    figure, ax = plt.subplots(figsize=(7, 5.5))
    gray = plt.get_cmap("gray").with_extremes(bad="gainsboro")  # padding is NaN
    ax.imshow(strips.swapaxes(1, 2).reshape(len(rows) * (CANVAS + 2), -1), cmap=gray)
    ax.set_axis_off()
    for x, name, color in (166, "GRU", "C0"), (190, "mean", "C1"):
        ax.text(x, -4, name, color=color, weight="bold")
        for place, row in enumerate(rows):
            said, y = answers[name][row], (place + 0.5) * (CANVAS + 2)
            text = f"{LABELS[said]} {'✓' if said == labels[row] else '✗'}"
            ax.text(x, y, text, color=color, va="center")
    for y, x in (np.argwhere(np.isnan(frames[rows, :, 0, 0])) + 0.5) * (CANVAS + 2):
        ax.text(x, y, "NaN", color="C2", ha="center", va="center")
    title = "The GRU gets {GRU:.0%} of the held-out films right, the mean {mean:.0%}"
    ax.set_title(title.format(**right), pad=24)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "films.png")
    return out / "films.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/video"))
    main(**vars(parser.parse_args()))
