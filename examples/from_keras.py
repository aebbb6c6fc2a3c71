"""From Keras: one import line, then the model as Flax, and its weights back in Keras.

    python examples/from_keras.py

builds the tagger of `tagging.py` in Keras: a bidirectional GRU with a Dense layer at
every step, on characters of the Python standard library. Keras compiles its own
`TimeDistributed` step after step. With the line

    from tdjax.keras import TimeDistributed

in the place of

    from keras.layers import TimeDistributed

nothing else in the model changes, and the table that the program prints shows what
does: the time to the first prediction and to the first step of training, the time of
each further step, and how far the results are apart, before and after that first step.
The model then trains with `fit`. Its `.keras` file becomes a Flax module with the same
outputs, which trains on with Optax, and whose weights go back into the Keras model.
All takes about a minute on two CPU cores.

It leaves the learning curve and the `.keras` files in `runs/from_keras`, and goes on
from there with `--resume` after Ctrl-C or `kill -9`.

What to copy:

* `build_tagger`: a Keras model in which the import line is an argument.
* `report`: a `.keras` file to Flax, training with Optax, and back to Keras.
* `make_loss`: what `fit` does with a mask, in JAX.
"""

import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console

import tdjax

# Keras reads it when it is imported.
os.environ.setdefault("KERAS_BACKEND", "jax")
try:
    import keras
except ImportError as error:
    needed = 'pip install "tdjax[keras]", and KERAS_BACKEND=jax if it is set'
    sys.exit(f"error: this program needs Keras on JAX: {needed} ({error})")

import tdjax.keras
from _batches import fingerprint, in_batches, take
from _checkpoints import checksum
from _display import results
from _keras_comparison import compare
from _keras_fit import EVALUATION_BATCH, FitRun, evaluate, fit, rows
from _main import run_program, save_curves, say_where
from _options import InputError, Settings, option
from _problem import QUANTITIES
from _python_source import python_task
from _sequences import NO_LABEL, Task, Windows, majority_accuracy

COMPARED_BATCHES = 9


@dataclass(frozen=True)
class KerasSettings(Settings):
    """The options of this example beside those of all."""

    steps: int = 400
    out: Path = Path("runs/from_keras")
    length: int = option(128, "characters in a sequence, at most")
    hidden: int = option(64, "features of the embedding and of each direction")
    optax_steps: int = option(100, "steps with Optax, after the conversion to Flax")


class Data(NamedTuple):
    """Examples are `(ids, labels)`."""

    task: Task
    train: Any
    held_out: Any

    @classmethod
    def load(cls, length: int) -> "Data":
        task = python_task(length)
        return cls(task, examples_of(task.train), examples_of(task.held_out))


def build_tagger(TimeDistributed, task: Task, settings: KerasSettings) -> keras.Model:
    """`(batch, time)` characters to `(batch, time, tags)` logits; 0 is padding."""
    length, hidden = task.train.labels.shape[1], settings.hidden
    gru = keras.layers.GRU(hidden, return_sequences=True)
    return keras.Sequential(
        [
            keras.Input((length,), dtype="int32"),
            keras.layers.Embedding(task.vocabulary + 1, hidden, mask_zero=True),
            keras.layers.Bidirectional(gru),
            TimeDistributed(keras.layers.Dense(len(task.tags))),
        ]
    )


def compiled_tagger(task: Task, settings: KerasSettings) -> keras.Model:
    """The model with the drop-in, ready for `fit`."""
    keras.utils.set_random_seed(settings.seed)
    model: Any = build_tagger(tdjax.keras.TimeDistributed, task, settings)
    schedule: Any = keras.optimizers.schedules.CosineDecay(
        settings.learning_rate, settings.steps
    )
    optimizer = keras.optimizers.Adam(schedule, global_clipnorm=1.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def examples_of(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """`(ids, labels)` with 0 at padding, as an embedding with `mask_zero` wants it."""
    there = windows.labels != NO_LABEL
    ids = np.where(there, windows.ids[..., 0] + 1, 0)
    return ids, np.where(there, windows.labels, 0)


def make_loss(module: Any):
    """Keras means the loss over the steps that are not masked; so does this."""

    def loss(params, examples):
        ids, labels = examples
        logits = module.apply({"params": params}, ids)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return tdjax.masked_mean(losses, ids != 0)

    return loss


def flax_accuracy(module: Any, variables: Any, examples: Any) -> float:
    ids, labels = examples
    predict = jax.jit(lambda ids: module.apply(variables, ids).argmax(-1))
    right = in_batches(predict, ids, EVALUATION_BATCH) == labels
    return float(right[ids != 0].mean())


def train_on(
    module: Any, variables: Any, train: Any, settings: KerasSettings
) -> dict[str, Any]:
    """Steps with Optax, on the batches that come next; returns the new variables."""
    schedule = optax.cosine_decay_schedule(
        settings.learning_rate / 5, settings.optax_steps
    )
    optimizer = optax.adam(schedule)
    compute = jax.grad(make_loss(module))

    @jax.jit
    def step(params, state, batch):
        updates, state = optimizer.update(compute(params, batch), state)
        return optax.apply_updates(params, updates), state

    params = variables["params"]
    state = optimizer.init(params)
    for done in range(settings.steps, settings.steps + settings.optax_steps):
        batch = rows(settings, done, done + 1, len(train[0]))
        params, state = step(params, state, take(train, batch))
    return {**variables, "params": params}


def report(
    run: FitRun, data: Data, settings: KerasSettings
) -> tuple[dict[str, float], keras.Model]:
    """Held-out accuracies on the way from Keras to Flax and back, and the model."""
    train, held_out = data.train, data.held_out
    accuracies = {"Keras, after fit": evaluate(run.model, held_out)["accuracy"]}
    module, variables = tdjax.keras.to_flax(run.file)
    measure = functools.partial(flax_accuracy, module, examples=held_out)
    accuracies["Flax, from the .keras file"] = measure(variables)
    variables = train_on(module, variables, train, settings)
    accuracies[f"Flax, {settings.optax_steps} steps with Optax later"] = measure(
        variables
    )
    model: Any = keras.saving.load_model(run.file)
    tdjax.keras.from_flax(variables, model)
    accuracies["Keras, with these weights"] = evaluate(model, held_out)["accuracy"]
    return accuracies, model


def start(data: Data, settings: KerasSettings) -> FitRun:
    sides = {"training data": data.train, "held-out data": data.held_out}
    identity = {name: fingerprint(side) for name, side in sides.items()}
    return FitRun(settings, identity, lambda: compiled_tagger(data.task, settings))


def show_comparison(run: FitRun, data: Data, settings: Any, console: Console) -> None:
    """What the import line does; a run that goes on knows it already."""
    if not run.notes:
        size = settings.batch_size
        some = take(data.train, slice(COMPARED_BATCHES * size))
        build = lambda layer: build_tagger(layer, data.task, settings)
        run.notes = compare(build, make_loss, some, size, console)
    title = "the first calls compile; deviation: the largest, from Keras' own layer"
    console.print(results(title, run.notes))


def program(settings: KerasSettings, console: Console) -> None:
    if (backend := keras.config.backend()) != "jax":
        raise InputError(f"KERAS_BACKEND is {backend!r}, this program needs 'jax'")
    data = Data.load(settings.length)
    run = start(data, settings)
    say_where(settings, run.step)
    show_comparison(run, data, settings, console)
    fit(run, data.train, data.held_out, console)
    majority = majority_accuracy(data.task)
    baselines = {"accuracy": {"majority class": majority}}
    curve = save_curves(settings.out, run.curve, QUANTITIES, baselines)
    accuracies, model = report(run, data, settings)
    accuracies["majority-class baseline"] = majority
    table = {name: {"accuracy": f"{x:.2%}"} for name, x in accuracies.items()}
    console.print(results("held-out characters right", table))
    model.save(settings.out / "from_flax.keras")
    print(f"learning curve  {curve}")
    print(f"Keras models    {run.file}, {settings.out / 'from_flax.keras'}")
    print(f"parameters      {checksum(run.model.get_weights())}")


def main(arguments: list[str]) -> int:
    description = "Takes a Keras model to tdjax.keras, to Flax, and back."
    return run_program(program, KerasSettings, arguments, description)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
