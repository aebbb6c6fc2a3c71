"""Keras' own `TimeDistributed`, the drop-in and Flax: times and deviations.

All three begin with the same weights and take the same steps of gradient descent.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np
import optax
from rich.console import Console

import tdjax.keras
from _batches import count, take

LAYERS = keras.layers.TimeDistributed, tdjax.keras.TimeDistributed
LEARNING_RATE = 0.1

Loss = Callable[[Any, Any], jax.Array]


def compare(
    build: Callable[[Any], keras.Model],
    make_loss: Callable[[Any], Loss],
    examples: Any,
    batch_size: int,
    console: Console,
) -> dict[str, dict[str, str]]:
    """Rows of a table. The first step is that of one batch, the others come after.

    Args:
      build: makes the model with the `TimeDistributed` that it is given.
      make_loss: the loss of a Flax module, a function of `params` and examples.
      examples: `(inputs, labels)` of a few batches.
      batch_size: examples in a step.
      console: says what is being measured.
    """
    own, drop_in = (build(layer) for layer in LAYERS)
    drop_in.set_weights(own.get_weights())
    candidates = {
        "keras.layers": _InKeras(own),
        "tdjax.keras": _InKeras(drop_in),
        "to_flax": _InFlax(drop_in, make_loss),
    }
    measured = {}
    for name, candidate in candidates.items():
        console.print(f"compiling and timing {name}", highlight=False)
        measured[name] = _measure(candidate, examples, batch_size)
    reference, *_ = measured.values()
    return {name: _row(one, reference) for name, one in measured.items()}


class _InKeras:
    """A Keras model that learns with `fit`."""

    def __init__(self, model: Any):
        self.model = model
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(LEARNING_RATE), loss)

    def predict(self, inputs) -> np.ndarray:
        return self.model.predict_on_batch(inputs)

    def fit(self, examples, batch_size: int) -> None:
        options: Any = {"shuffle": False, "verbose": 0}
        self.model.fit(*examples, batch_size=batch_size, **options)

    def variables(self) -> Any:
        return tdjax.keras.to_flax(self.model)[1]


class _InFlax:
    """The Flax module that a Keras model becomes, and a step of Optax."""

    def __init__(self, model: keras.Model, make_loss: Callable[[Any], Loss]):
        module, self._variables = tdjax.keras.to_flax(model)
        gradient = jax.grad(make_loss(module))
        optimizer = optax.sgd(LEARNING_RATE)
        self._apply = jax.jit(module.apply)
        self._optimizer = optimizer.init(self._variables["params"])

        @jax.jit
        def step(params, state, examples):
            updates, state = optimizer.update(gradient(params, examples), state)
            return optax.apply_updates(params, updates), state

        self._step = step

    def predict(self, inputs) -> np.ndarray:
        return np.asarray(self._apply(self._variables, inputs))

    def fit(self, examples, batch_size: int) -> None:
        params, state = self._variables["params"], self._optimizer
        for start in range(0, count(examples), batch_size):
            batch = take(examples, slice(start, start + batch_size))
            params, state = self._step(params, state, batch)
        self._optimizer = state
        self._variables = {**self._variables, "params": jax.block_until_ready(params)}

    def variables(self) -> Any:
        return self._variables


def _measure(candidate: Any, examples: Any, batch_size: int) -> dict[str, Any]:
    first = take(examples, slice(batch_size))
    rest = take(examples, slice(batch_size, None))
    predict = lambda: candidate.predict(first[0])
    outputs, prediction = _timed(predict)
    _, step = _timed(lambda: candidate.fit(first, batch_size))
    after, outputs_after = candidate.variables(), predict()
    _, steps = _timed(lambda: candidate.fit(rest, batch_size))
    return {
        "prediction": prediction,
        "first step": step,
        "step": steps * batch_size / count(rest),
        "results": [outputs],
        "results after": [outputs_after, *jax.tree.leaves(after)],
    }


def _timed(fun: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return fun(), time.perf_counter() - start


def _row(one: dict[str, Any], reference: dict[str, Any]) -> dict[str, str]:
    deviation = lambda name: f"{_deviation(one[name], reference[name]):.1g}"
    return {
        "first predict": f"{one['prediction']:.1f} s",
        "first step": f"{one['first step']:.1f} s",
        "later steps": f"{1000 * one['step']:.0f} ms",
        "deviation": deviation("results"),
        "after training": deviation("results after"),
    }


def _deviation(arrays: list, references: list) -> float:
    """The largest difference between two arrays, relative to the largest number."""
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(arrays, references)]
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)
