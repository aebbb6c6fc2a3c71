"""Trains a sequence tagger: a bidirectional GRU with a Dense layer at every step.

    python examples/tagging.py

reads the Python standard library that is on every machine, each character labelled by
`tokenize` as part of a keyword, a name, a string, ..., and learns to colour source code
of files that it has not seen. It takes about a minute on two CPU cores. It leaves the
learning curve and its checkpoints in `runs/tagging`, and goes on from there with
`--resume` after Ctrl-C or `kill -9`: on one machine's CPU, to the very bits that the
run would have had without the break.

    python examples/tagging.py --conllu en_atis-ud-train.conllu en_atis-ud-dev.conllu

trains the same model as a part-of-speech tagger on any two CoNLL-U files of Universal
Dependencies (https://universaldependencies.org).

What to copy:

* `Tagger`: lengths keep padding out of the recurrence, and
  `tdjax.linen.TimeDistributed` applies the output layer to every step.
* `masked_cross_entropy`: the mean over the steps that have a label, whatever is in the
  others.
* `train`: everything a run needs to go on is a function of the seed and the step, or is
  in the checkpoint.
"""

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from rich.console import Console

import tdjax.linen
from _checkpoints import Checkpoints, checksum, refuse_differences, write_atomically
from _conllu import conllu_task
from _display import Point, TrainingProgress, results, save_curve, snippet
from _options import Settings, parse_settings, resume_command
from _python_source import python_task
from _sequences import (
    NO_LABEL,
    InputError,
    Task,
    batch_rows,
    majority_accuracy,
)

POINTS_IN_CURVE = 10
EVALUATION_BATCH = 128


class Tagger(nn.Module):
    """`(batch, time, features)` ids to `(batch, time, tags)` logits.

    A symbol's embedding is the sum over its features. Nothing at or after a sequence's
    length reaches the logits before it.
    """

    vocabulary: int
    tags: int
    hidden: int
    dropout: float = 0.1

    @nn.compact
    def __call__(self, ids, lengths, train=False):
        x = nn.Embed(self.vocabulary, self.hidden)(ids).sum(axis=2)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        forward, backward = (nn.RNN(nn.GRUCell(self.hidden)) for _ in range(2))
        x = nn.Bidirectional(forward, backward)(x, seq_lengths=lengths)
        return tdjax.linen.TimeDistributed(nn.Dense(self.tags))(x)


def cross_entropies(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`(batch, time)`; 0 where there is no label, whatever the logits are there."""
    labelled = labels != NO_LABEL
    # Masked before the loss and not after: 0 times a NaN gradient is NaN.
    logits = jnp.where(labelled[..., None], logits, 0.0)
    labels = jnp.where(labelled, labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(labelled, losses, 0.0)


def masked_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over all labelled steps of the batch, 0 if there are none."""
    count = jnp.sum(labels != NO_LABEL)
    return jnp.sum(cross_entropies(logits, labels)) / jnp.maximum(count, 1)


class State(TrainState):
    """Parameters, optimiser state and step, and the key that all noise comes from."""

    key: jax.Array


def create_state(task: Task, settings: Settings) -> State:
    model = Tagger(task.vocabulary, len(task.tags), settings.hidden)
    params_key, key = jax.random.split(jax.random.key(settings.seed))
    sample = task.train.ids[:1], task.train.lengths[:1]
    variables = jax.jit(model.init)(params_key, *sample)
    return State.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optimizer(settings),
        key=key,
    )


def optimizer(settings: Settings) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.steps // 20, settings.steps
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


@jax.jit
def train_step(state: State, ids, labels, lengths):
    """One step of gradient descent; returns the new state, the loss, the accuracy."""
    rngs = {"dropout": jax.random.fold_in(state.key, state.step)}

    def loss_and_logits(params):
        variables = {"params": params}
        logits = state.apply_fn(variables, ids, lengths, train=True, rngs=rngs)
        return masked_cross_entropy(logits, labels), logits

    compute = jax.value_and_grad(loss_and_logits, has_aux=True)
    (loss, logits), gradients = compute(state.params)
    accuracy = jnp.sum(logits.argmax(-1) == labels) / jnp.sum(lengths)
    return state.apply_gradients(grads=gradients), loss, accuracy


class Score(NamedTuple):
    """A tag that training never saw is an error, and has no loss."""

    loss: float
    accuracy: float
    predicted: np.ndarray


def evaluate(state: State, ids, labels, lengths) -> Score:
    count = len(lengths)
    # The last batch is filled up with windows from the start, which are cut off again.
    rows = np.arange(-(-count // EVALUATION_BATCH) * EVALUATION_BATCH) % count
    batches = [
        _predict(state, ids[batch], labels[batch], lengths[batch])
        for batch in rows.reshape(-1, EVALUATION_BATCH)
    ]
    losses, predicted = (np.concatenate(parts)[:count] for parts in zip(*batches))
    loss = losses.sum() / max((labels != NO_LABEL).sum(), 1)
    accuracy = (predicted == labels).sum() / lengths.sum()
    return Score(float(loss), float(accuracy), predicted)


@jax.jit
def _predict(state: State, ids, labels, lengths):
    logits = state.apply_fn({"params": state.params}, ids, lengths)
    return cross_entropies(logits, labels), logits.argmax(-1)


def measure(state: State, task: Task) -> Point:
    """A point of the learning curve, on all held-out windows and as many others."""
    held_out = evaluate(state, *task.held_out.arrays)
    count = len(task.held_out.lengths)
    train = evaluate(state, *(array[:count] for array in task.train.arrays))
    return {
        "step": int(state.step),
        "train_loss": train.loss,
        "train_accuracy": train.accuracy,
        "held_out_loss": held_out.loss,
        "held_out_accuracy": held_out.accuracy,
    }


class Run:
    """A training run: its state, its learning curve, its checkpoints."""

    def __init__(self, task: Task, settings: Settings, checkpoints: Checkpoints):
        self.task, self.settings, self.checkpoints = task, settings, checkpoints
        self.identity = {"settings": settings.identity(), "task": task.identity()}
        self.curve: list[Point] = []
        self.state = create_state(task, settings)
        if checkpoints.latest is not None:
            self._resume()

    def _resume(self) -> None:
        record = self.checkpoints.record()
        for part, now in self.identity.items():
            refuse_differences(self.settings.out, record[part], now)
        self.curve = record["curve"]
        arrays = self.checkpoints.state(self._arrays())
        key = jax.random.wrap_key_data(arrays["key"])
        self.state = self.state.replace(**{**arrays, "key": key})

    def save(self) -> None:
        record = {**self.identity, "curve": self.curve}
        self.checkpoints.save(int(self.state.step), self._arrays(), record)

    def is_checkpoint(self, done: int) -> bool:
        last = done == self.settings.steps
        return last or done % self.settings.checkpoint_every == 0

    def _arrays(self) -> dict[str, Any]:
        state = self.state
        key = jax.random.key_data(state.key)
        arrays = {"params": state.params, "opt_state": state.opt_state, "key": key}
        return {**arrays, "step": jnp.asarray(state.step)}


def train(run: Run, console: Console) -> None:
    """Takes the steps that are left; on Ctrl-C saves the run and stops."""
    task, settings = run.task, run.settings
    first = int(run.state.step)
    with (
        noticed_interrupt() as interrupted,
        TrainingProgress(console, first, settings.steps) as progress,
    ):
        for step in range(first, settings.steps):
            rows = batch_rows(
                settings.seed, step, settings.batch_size, len(task.train.lengths)
            )
            batch = (array[rows] for array in task.train.arrays)
            run.state, loss, accuracy = train_step(run.state, *batch)
            done = step + 1
            progress.step(done, float(loss), float(accuracy))
            if is_point(done, settings.steps):
                run.curve.append(measure(run.state, task))
                progress.point(run.curve[-1])
            stop = interrupted.is_set()
            if stop or run.is_checkpoint(done):
                run.save()
            if stop:
                raise KeyboardInterrupt


def is_point(done: int, steps: int) -> bool:
    """Whether the learning curve has a point: evenly spaced, the last at the end."""
    return done * POINTS_IN_CURVE // steps > (done - 1) * POINTS_IN_CURVE // steps


@contextlib.contextmanager
def noticed_interrupt() -> Iterator[threading.Event]:
    """Notes the first Ctrl-C, so that it cannot break a step; a second one acts."""
    interrupted = threading.Event()

    def note(*_):
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def report(run: Run, console: Console) -> None:
    """Prints how good the tagger is, and where everything is."""
    task, out = run.task, run.settings.out
    baseline = majority_accuracy(task)
    score = evaluate(run.state, *task.held_out.arrays)
    plot, numbers = out / "learning_curve.png", out / "learning_curve.json"
    save_curve(plot, run.curve, baseline)
    content = json.dumps({"majority_class": baseline, "curve": run.curve}, indent=1)
    write_atomically(numbers, lambda file: file.write(content.encode()))
    console.print(snippet(task, score.predicted))
    console.print(results(task, score.accuracy, baseline))
    print(f"learning curve  {plot} ({numbers.name})")
    print(f"checkpoint      {run.checkpoints.path()}")
    print(f"parameters      {checksum(run.state.params)}")


def open_checkpoints(settings: Settings) -> Checkpoints:
    """The checkpoints of the run to go on with; a new run has none yet."""
    checkpoints = Checkpoints(settings.out / "checkpoints")
    if checkpoints.latest is not None and not settings.resume:
        raise InputError(
            f"{settings.out} holds a run already: go on with it with --resume, or "
            "give another folder with --out"
        )
    return checkpoints


def load_task(settings: Settings) -> Task:
    if settings.conllu:
        return conllu_task(*settings.conllu, settings.length)
    return python_task(settings.length)


def main(arguments: list[str]) -> int:
    settings = parse_settings(arguments, "Trains a sequence tagger.")
    console = Console()
    try:
        task = load_task(settings)
        run = Run(task, settings, open_checkpoints(settings))
        if settings.resume:
            print(f"Goes on from step {run.state.step} of {settings.steps}.")
        train(run, console)
        report(run, console)
    except KeyboardInterrupt:
        print("\nInterrupted. Go on with:", resume_command(sys.argv[0], arguments))
        return 130
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
