"""Trains a sequence tagger: a bidirectional GRU with a Dense layer at every step.

    python examples/tagging.py

Each character of Python's standard library is labelled by `tokenize` as part of a
keyword, a name, a string, ... The tagger learns to colour files that it has not seen.
It takes less than a minute on two CPU cores, and leaves a picture in runs/tagging.

    python examples/tagging.py --conllu en_atis-ud-train.conllu en_atis-ud-dev.conllu

trains the same model on parts of speech, from two CoNLL-U files of Universal
Dependencies (https://universaldependencies.org).

Sequences are ragged: a batch is padded, and `tdjax.lengths_to_mask` says which steps
are there. With `mask=`, the head gives zeros at padding and gets no gradient from it,
and `tdjax.masked_mean` leaves padding out of the loss. Without the wrapper, `Dense` is
the same function at every valid step: the last lines of the output compare the two.
"""

import argparse
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import _python_source
import tdjax.linen
from _conllu import BUCKETS, UPOS, MalformedFile, read_conllu, word_ids

LENGTH, HIDDEN, BATCH, STEPS = 128, 64, 32, 700


class Tagger(nn.Module):
    """`(batch, time, features)` ids to `(batch, time, tags)` logits."""

    vocabulary: int
    tags: int
    bare_head: bool = False

    @nn.compact
    def __call__(self, ids, lengths, train=False):
        x = nn.Embed(self.vocabulary, HIDDEN)(ids).sum(axis=2)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        forward, backward = (nn.RNN(nn.GRUCell(HIDDEN)) for _ in range(2))
        x = nn.Bidirectional(forward, backward)(x, seq_lengths=lengths)
        head = nn.Dense(self.tags)
        if self.bare_head:
            return head(x)  # the same at valid steps, anything at padding
        mask = tdjax.lengths_to_mask(lengths, ids.shape[1])
        return tdjax.linen.TimeDistributed(head)(x, mask=mask)


def python_task():
    """Characters; a file's name decides whether it is held out."""
    sides = [
        windows(
            (_python_source.character_ids(source)[:, None], labels)
            for source in sources.values()
            for labels in [_python_source.label_characters(source)]
        )
        for sources in _python_source.read_sources()
    ]
    return *sides, _python_source.TAGS, _python_source.VOCABULARY


def conllu_task(paths):
    """Words, each with the ids of its form, its shape and its ends."""
    sides = [
        windows(
            (
                np.array([word_ids(word.form) for word in words]),
                np.array([UPOS.index(word.upos) for word in words]),
            )
            for words in read_conllu(path)
        )
        for path in paths
    ]
    return *sides, UPOS, BUCKETS


def windows(sequences):
    """`(ids, labels, lengths)`: sequences cut into windows, padded with zeros."""
    pieces = [
        (ids[start : start + LENGTH], labels[start : start + LENGTH])
        for ids, labels in sequences
        for start in range(0, len(labels), LENGTH)
    ]
    features = pieces[0][0].shape[1]
    all_ids = np.zeros((len(pieces), LENGTH, features), np.int32)
    all_labels = np.zeros((len(pieces), LENGTH), np.int32)
    for row, (ids, labels) in enumerate(pieces):
        all_ids[row, : len(ids)], all_labels[row, : len(ids)] = ids, labels
    return all_ids, all_labels, np.array([len(ids) for ids, _ in pieces], np.int32)


def main(steps=STEPS, out=Path("runs/tagging"), conllu=None):
    """Trains, reports and draws; returns the held-out accuracies."""
    train, held_out, tags, vocabulary = conllu_task(conllu) if conllu else python_task()
    model = Tagger(vocabulary, len(tags))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def loss(params, batch, dropout_key=None):
        ids, labels, lengths = batch
        train, rngs = dropout_key is not None, {"dropout": dropout_key}
        logits = model.apply(params, ids, lengths, train, rngs=rngs if train else None)
        mask = tdjax.lengths_to_mask(lengths, LENGTH)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        is_right = (logits.argmax(-1) == labels).astype(jnp.float32)
        return tdjax.masked_mean(losses, mask), tdjax.masked_mean(is_right, mask)

    @jax.jit
    def train_step(params, state, batch, dropout_key):
        compute = jax.value_and_grad(loss, has_aux=True)
        (value, _), gradient = compute(params, batch, dropout_key)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    accuracy = jax.jit(lambda params: loss(params, held_out)[1])
    key, rng = jax.random.key(0), np.random.default_rng(0)
    params = jax.jit(model.init)(key, held_out[0][:1], held_out[2][:1])
    state, curve, start = optimizer.init(params), [], time.perf_counter()
    for step in range(1, steps + 1):
        rows = rng.integers(len(train[0]), size=BATCH)
        batch = [array[rows] for array in train]
        batch_key = jax.random.fold_in(key, step)
        params, state, value = train_step(params, state, batch, batch_key)
        if step % -(-steps // 10) == 0 or step == steps:
            curve.append((step, float(accuracy(params))))
            print(
                f"step {step:4}/{steps}  loss {value:.3f}  "
                f"held out {curve[-1][1]:.2%}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )

    majority, baseline = majority_baseline(train, held_out)
    print(f"tagger: {curve[-1][1]:.2%} of held-out steps right")
    print(f"baseline, always {tags[majority]!r}: {baseline:.2%}")
    compare_heads(model, params, held_out)
    print("picture:", draw(curve, tags[majority], baseline, out))
    return {"tagger": curve[-1][1], "baseline": baseline}


def majority_baseline(train, held_out):
    """The most frequent tag of training, and how often it is right."""
    masks = [np.asarray(tdjax.lengths_to_mask(x[2], LENGTH)) for x in (train, held_out)]
    majority = np.bincount(train[1][masks[0]]).argmax()
    return majority, float((held_out[1][masks[1]] == majority).mean())


def compare_heads(model, params, examples):
    """Shows what a bare Dense makes of the same parameters."""
    ids, _, lengths = (array[-BATCH:] for array in examples)
    wrapped = jax.jit(model.apply)(params, ids, lengths)
    bare = jax.jit(model.clone(bare_head=True).apply)(params, ids, lengths)
    mask = tdjax.lengths_to_mask(lengths, LENGTH)[..., None]
    difference = jnp.abs(jnp.where(mask, wrapped - bare, 0)).max()
    at_padding = [jnp.abs(jnp.where(mask, 0, x)).max() for x in (wrapped, bare)]
    print(f"a bare Dense differs by at most {difference} at valid steps;")
    print("largest logit at padding: {:.1f} wrapped, {:.1f} bare".format(*at_padding))


def draw(curve, majority, baseline, out):
    plt.switch_backend("Agg")
    plt.style.use("tdjax.plots")
    figure, ax = plt.subplots()
    steps, accuracies = zip(*curve)
    ax.plot(steps, accuracies, color="C0", marker="o")
    ax.axhline(baseline, color="C1")
    ax.text(0, baseline + 0.02, f"always {majority!r}", color="C1")
    ax.set(ylim=(0, 1.02), xlim=(0, None), xlabel="training steps")
    ax.set_title(f"{accuracies[-1]:.1%} of the held-out steps get the right tag")
    ax.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "learning_curve.png")
    return out / "learning_curve.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/tagging"))
    parser.add_argument("--conllu", nargs=2, metavar=("TRAIN", "DEV"))
    try:
        main(**vars(parser.parse_args()))
    except (OSError, MalformedFile) as error:
        sys.exit(f"error: {error}")
