"""From Keras: one import line changes, then the model goes to Flax and back.

    python examples/from_keras.py

The tagger of tagging.py, in Keras: a bidirectional GRU with a Dense layer at every step
labels the characters of Python's standard library. The program needs Keras
(pip install "tdjax[keras]") and takes less than a minute on two CPU cores.

Keras compiles its own `TimeDistributed` step after step. That of tdjax has the same
arguments, weights and results, and is one program for all steps. Both take the same
training steps in turn; the times are printed, and drawn in runs/from_keras. Then the
model trains with `fit`, becomes a Flax module with the same predictions, trains on
with Optax, and its weights go back to Keras.

To copy: the import line, `make_loss`, and the end of `main`, from `to_flax` on.
"""

import argparse
import os
import time
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"  # Keras reads it when it is imported.

import jax
import jax.numpy as jnp
import keras
import matplotlib.pyplot as plt
import numpy as np
import optax
from keras.layers import TimeDistributed as KerasTimeDistributed

import tdjax
from tagging import majority_baseline, python_task
from tdjax.keras import TimeDistributed, from_flax, to_flax

HIDDEN, BATCH, STEPS, COMPARED_STEPS = 64, 32, 400, 10


def build_tagger(wrapper, vocabulary, tags, steps):
    """`(batch, time)` ids to `(batch, time, tags)` logits; the id 0 is padding."""
    gru = keras.layers.GRU(HIDDEN, return_sequences=True)
    layers = [
        keras.Input((None,), dtype="int32"),
        keras.layers.Embedding(vocabulary + 1, HIDDEN, mask_zero=True),
        keras.layers.Bidirectional(gru),
        wrapper(keras.layers.Dense(tags)),
    ]
    model = keras.Sequential(layers)
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, COMPARED_STEPS + steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(schedule), loss, metrics=["accuracy"])
    return model


def keras_examples(ids, labels, lengths):
    """`(ids, labels)` of windows, with the id 0 at padding and nowhere else."""
    is_valid = np.arange(ids.shape[1]) < lengths[:, None]
    return np.where(is_valid, ids[..., 0] + 1, 0), labels


def draw_batches(rng, examples, count):
    """`count` batches, one after the other in the same arrays."""
    rows = rng.integers(len(examples[0]), size=count * BATCH)
    return [array[rows] for array in examples]


def compare(models, examples):
    """Trains models in turn; returns each one's seconds: first step, median later."""
    seconds = {name: [] for name in models}
    for start in range(0, len(examples[0]), BATCH):
        batch = [array[start : start + BATCH] for array in examples]
        for name, model in models.items():
            begin = time.perf_counter()
            model.train_on_batch(*batch)
            seconds[name].append(time.perf_counter() - begin)
    return {name: (x[0], float(np.median(x[1:]))) for name, x in seconds.items()}


def train_in_keras(model, train, held_out, steps, rng):
    """Trains with `fit`, in ten parts; returns the held-out accuracy."""
    start, every, accuracy = time.perf_counter(), -(-steps // 10), 0.0
    for done in range(0, steps, every):
        count = min(every, steps - done)
        examples = draw_batches(rng, train, count)
        options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
        history = model.fit(*examples, **options).history
        accuracy = model.evaluate(*held_out, batch_size=128, verbose=0)[1]
        report("fit", done + count, steps, history["loss"][0], accuracy, start)
    return accuracy


def make_loss(module):
    """The loss and the accuracy of `fit`: means over the steps that are not padding."""

    def loss(params, ids, labels):
        logits = module.apply({"params": params}, ids)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        is_right = (logits.argmax(-1) == labels).astype(jnp.float32)
        return tuple(tdjax.masked_mean(x, ids != 0) for x in (losses, is_right))

    return loss


def train_in_flax(module, variables, train, held_out, steps, rng):
    """Trains with Optax; returns the variables and the held-out accuracy."""
    loss, start = make_loss(module), time.perf_counter()
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    @jax.jit
    def train_step(params, state, ids, labels):
        compute = jax.value_and_grad(loss, has_aux=True)
        (value, _), gradient = compute(params, ids, labels)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    params, evaluate, accuracy = variables["params"], jax.jit(loss), 0.0
    state = optimizer.init(params)
    for step in range(1, steps + 1):
        batch = draw_batches(rng, train, 1)
        params, state, value = train_step(params, state, *batch)
        if step % -(-steps // 3) == 0 or step == steps:
            accuracy = float(evaluate(params, *held_out)[1])
            report("Optax", step, steps, value, accuracy, start)
    return {**variables, "params": params}, accuracy


def report(name, step, steps, loss, accuracy, start):
    numbers = f"loss {loss:.3f}  held out {accuracy:.2%}"
    seconds = f"{time.perf_counter() - start:.0f} s"
    print(f"{name:5} {step:4}/{steps}  {numbers}  {seconds}", flush=True)


def difference(x, y):
    """The largest difference, relative to the largest number."""
    return float(np.abs(x - y).max() / np.abs(y).max())


def main(steps=STEPS, out=Path("runs/from_keras")):
    """Compares, trains, converts and draws; returns the results."""
    windows, held_out_windows, tags, vocabulary = python_task()
    train, held_out = keras_examples(*windows), keras_examples(*held_out_windows)
    rng, some = np.random.default_rng(0), held_out[0][-BATCH:]

    # The first one also pays for what starts up only once.
    wrappers = {"tdjax.keras": TimeDistributed, "keras.layers": KerasTimeDistributed}
    keras.utils.set_random_seed(0)
    sizes = vocabulary, len(tags), steps
    models = {name: build_tagger(x, *sizes) for name, x in wrappers.items()}
    model, original = models.values()
    original.set_weights(model.get_weights())
    seconds = compare(models, draw_batches(rng, train, COMPARED_STEPS))
    for name, (first, later) in seconds.items():
        print(f"{name}: first step {first:.1f} s, later steps {1000 * later:.0f} ms")
    same = difference(*(x.predict_on_batch(some) for x in models.values()))
    print(f"after {COMPARED_STEPS} steps their logits differ by {same:.1e}")

    in_keras = train_in_keras(model, train, held_out, steps, rng)
    module, variables = to_flax(model)
    apply, more = jax.jit(module.apply), -(-steps // 4)
    there = difference(apply(variables, some), model.predict_on_batch(some))
    variables, in_flax = train_in_flax(module, variables, train, held_out, more, rng)
    from_flax(variables, model)
    back = difference(model.predict_on_batch(some), apply(variables, some))
    print(f"Keras and Flax differ by {there:.1e}, and after the way back by {back:.1e}")

    majority, baseline = majority_baseline(windows, held_out_windows)
    print(f"tagger: {in_keras:.2%} of held-out steps right, {in_flax:.2%} after Optax")
    print(f"baseline, always {tags[majority]!r}: {baseline:.2%}")
    print("picture:", draw(seconds, out))
    accuracies = {"keras": in_keras, "flax": in_flax, "baseline": baseline}
    return {**accuracies, "differences": (same, there, back)}


def draw(seconds, out):
    plt.switch_backend("Agg")
    plt.style.use("tdjax.plots")
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.4), sharey=True)
    (first, later), (keras_first, keras_later) = seconds.values()
    panels = (first, keras_first), (1000 * later, 1000 * keras_later)
    for ax, values, unit in zip(axes, panels, ("{:.1f} s", "{:.0f} ms")):
        bars = ax.barh(list(seconds), values, height=0.5, color=["C0", "C1"])
        ax.bar_label(bars, fmt=unit, padding=4)
        ax.set(xticks=[], xlim=(0, 1.3 * max(values)))
    axes[0].set_xlabel("first step, with compilation")
    axes[1].set_xlabel("each later step")
    title = (
        f"With tdjax, Keras compiles in {first:.1f} s instead of {keras_first:.1f} s"
    )
    figure.suptitle(title, x=0.01, ha="left", size=12, weight="bold")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "seconds.png")
    return out / "seconds.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/from_keras"))
    main(**vars(parser.parse_args()))
