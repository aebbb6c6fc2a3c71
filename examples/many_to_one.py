"""One answer for a sequence, or one at every step: the same GRU with two heads.

    python examples/many_to_one.py

reads handwritten digits row by row, as sequences of eight steps of eight pixels. The
many-to-one model puts its output layer on the last state alone and answers once, after
the last row. The many-to-many model puts the same layer on all states and answers after
every row, and so learns to tell a digit before it is complete. Both begin with the same
parameters and train side by side, each as if alone. It takes about half a minute on two
CPU cores.

The targets differ in shape: `(batch,)` for the one, `(batch, time)` for the other. With
the wrong pair some losses fail, and others broadcast and train on nonsense. The program
shows which.

What to copy:

* `Reader`: the same layers as many-to-one and many-to-many. The parameters are those of
  either, so a trained model of one kind can be used as the other.
* `cross_entropy` in `_pairing.py`: a loss that refuses labels of another shape than the
  logits want.
"""

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

import tdjax.linen
from _batches import in_batches
from _digits import (
    CLASSES,
    PIXELS,
    ROWS,
    logistic_regressions,
    majority_accuracy,
    read_digits,
)
from _display import results
from _main import run_example
from _options import Settings, option
from _pairing import MISMATCHES, cross_entropy, mismatches, refusal
from _problem import Problem
from _row_by_row import save_picture

NAMES = ("many-to-one", "many-to-many")


@dataclass(frozen=True)
class DigitsSettings(Settings):
    """The options of this example beside those of all."""

    out: Path = Path("runs/many_to_one")
    hidden: int = option(128, "features of the GRU")


class Reader(nn.Module):
    """`(batch, time, features)` to `(batch, classes)` logits, or one for each step.

    With `at_every_step` they are `(batch, time, classes)`.
    """

    hidden: int
    at_every_step: bool

    @nn.compact
    def __call__(self, x):
        states: Any = nn.RNN(nn.GRUCell(self.hidden))(x)
        head = nn.Dense(CLASSES)
        if self.at_every_step:
            return tdjax.linen.TimeDistributed(head)(states)
        return head(states[:, -1])


class RowByRow(Problem):
    """Reads digits row by row, to answer at the end or after every row."""

    quantities = {f"{name} accuracy": ".1%" for name in NAMES}

    def __init__(self, settings: DigitsSettings):
        self.train, self.held_out = read_digits()
        self.majority = majority_accuracy(self.train, self.held_out)
        self.regressions = logistic_regressions(self.train, self.held_out)
        baseline = {"logistic regression": self.regressions[-1]}
        self.baselines = dict.fromkeys(self.quantities, baseline)
        self.models: dict[str, Reader] = {
            name: Reader(settings.hidden, at_every_step=name == "many-to-many")
            for name in NAMES
        }

    def init(self, key):
        params = jax.jit(self.models["many-to-one"].init)(key, self.train[0][:1])
        return dict.fromkeys(NAMES, params)

    def optimizer(self, settings):
        # One for each: clipping by the norm of both would make a model out of them.
        alone = super().optimizer(settings)
        return optax.multi_transform(
            dict.fromkeys(NAMES, alone), dict(zip(NAMES, NAMES))
        )

    def loss(self, params, batch, key):
        images, labels = shifted(key, batch[0]), batch[1]
        losses: dict[str, Any] = {}
        for name, target in targets(labels).items():
            logits: Any = self.models[name].apply(params[name], images)
            losses[name] = cross_entropy(logits, target).mean()
        return losses["many-to-one"] + losses["many-to-many"], losses

    def answers(self, params, examples) -> dict[str, np.ndarray]:
        """`(n, rows)`: the digit that each model takes it for after each row.

        The many-to-one model is asked before the end too: as the other, with its own
        parameters.
        """
        predict = functools.partial(_predict, self.models["many-to-many"], params)
        return in_batches(lambda batch: predict(batch[0]), examples, 128)

    def accuracies(self, params, examples) -> dict[str, np.ndarray]:
        """`(rows,)` after each row."""
        answers, labels = self.answers(params, examples), examples[1]
        return {name: (answers[name] == labels[:, None]).mean(0) for name in NAMES}

    def evaluate(self, params, examples):
        accuracies = self.accuracies(params, examples)
        return {f"{name} accuracy": float(accuracies[name][-1]) for name in NAMES}

    def report(self, params, console, out):
        console.print(results("a batch of 32", self.shapes(params)))
        console.print(results("Optax on labels that do not fit", mismatches()))
        print(f"cross_entropy refuses them all: {refusal(*next(iter(MISMATCHES)))}\n")
        after_rows = self.accuracies(params, self.held_out)
        after_rows["logistic regression (baseline)"] = np.array(self.regressions)
        after_rows["majority class (baseline)"] = np.full(ROWS, self.majority)
        table = {
            name: {str(row): f"{x:.0%}" for row, x in enumerate(accuracies, 1)}
            for name, accuracies in after_rows.items()
        }
        console.print(results("held-out digits told after row ...", table))
        answers = self.answers(params, self.held_out)["many-to-many"]
        images, labels = self.held_out
        save_picture(out / "row_by_row.png", images, labels, answers, after_rows)
        print(f"picture         {out / 'row_by_row.png'}")

    def shapes(self, params) -> dict[str, dict[str, str]]:
        """Of a batch of 32 and what comes of it, and the number of parameters."""
        images, labels = (array[:32] for array in self.train)
        rows = {}
        for name, target in targets(labels).items():
            logits: Any = jax.eval_shape(self.models[name].apply, params[name], images)
            size = sum(leaf.size for leaf in jax.tree.leaves(params[name]))
            shapes = {"input": images, "logits": logits, "labels": target}
            rows[name] = {key: str(array.shape) for key, array in shapes.items()}
            rows[name]["parameters"] = f"{size:,}"
        return rows


@functools.partial(jax.jit, static_argnums=0)
def _predict(model: Reader, params, images):
    logits: dict[str, Any] = {name: model.apply(params[name], images) for name in NAMES}
    return {name: values.argmax(-1) for name, values in logits.items()}


def targets(labels: Any) -> dict[str, jax.Array]:
    """What each model is to answer: the digit once, or the digit after every row."""
    after_rows = jnp.repeat(labels[:, None], ROWS, axis=1)
    return {"many-to-one": jnp.asarray(labels), "many-to-many": after_rows}


def shifted(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each a pixel to the left, to the right, or where it is: new digits from old."""
    padded = jnp.pad(images, ((0, 0), (0, 0), (1, 1)))
    starts = jax.random.randint(key, (len(images),), 0, 3)
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=PIXELS, axis=1)
    return jax.vmap(cut)(padded, starts)


def main(arguments: list[str]) -> int:
    return run_example(RowByRow, DigitsSettings, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
