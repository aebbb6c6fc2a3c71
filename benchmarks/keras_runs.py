"""`predict` and `fit` of Keras models, with Keras' layer, ours, and as Flax modules."""

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.keras_models import RATE, Reported
from benchmarks.measure import Effort, deviation, original, summary, take_turns
from benchmarks.programs import Row

KERAS, DROP_IN, FLAX = "Keras", "drop-in", "Flax conversion"
OF = ("predict", "fit")
# It unrolls: the gradient of 1024 steps takes minutes, and 4096 steps an hour or more.
_MOST_STEPS = {"predict": 1024, "fit": 512}
_ATTEMPTS, _SLOW = 5, 2.0
# Float32, sums in another order, and the autoencoder's three steps of training.
_TOLERANCE = 1e-4


def rows(case: Reported, of: str, effort: Effort) -> list[Row]:
    """A row for each candidate; all agree with the first, ratios are to the first."""
    about: Row = {"case": case.name, "of": of, "model": case.title}
    about["timesteps"] = min(case.lengths)
    try:
        candidates = _candidates(case)
    except ImportError as error:
        reason = f"{type(error).__name__}: {error}"
        return [{**about, "candidate": KERAS, "missing": reason}]
    missing = []
    if max(case.lengths) > _MOST_STEPS[of]:
        del candidates[KERAS]
        reason = (
            f"not measured: too long to compile, it unrolls {max(case.lengths)} steps"
        )
        missing = [{**about, "candidate": KERAS, "missing": reason}]
    return _measure(about, case, of, candidates, effort) + missing


def _candidates(case: Reported) -> dict[str, Callable[[], "Run"]]:
    """How each is made, from a model that is new."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    import optax  # noqa: F401

    from tdjax.keras import TimeDistributed

    vmap = functools.partial(TimeDistributed, method="vmap")
    by_keras = lambda wrap: lambda: KerasRun(case.model(wrap))
    return {
        KERAS: by_keras(keras.layers.TimeDistributed),
        DROP_IN: by_keras(TimeDistributed),
        f'{DROP_IN}, "vmap"': by_keras(vmap),
        FLAX: lambda: FlaxRun(case.model(keras.layers.TimeDistributed)),
    }


def _measure(about: Row, case, of: str, candidates, effort: Effort) -> list[Row]:
    batches = case.batches(next(iter(candidates.values()))().model)
    attempts = _ATTEMPTS if effort.rounds > 2 else 1
    # The program of the first is worth keeping, and the others' start clears what is.
    started = {
        name: _start(candidates[name], of, batches, attempts)
        for name in reversed(candidates)
    }
    results = {name: started[name].results for name in candidates}
    differs = {name: _deviation(name, results) for name in candidates}
    many = batches * (case.passes if of == "fit" else 1)
    call = lambda run: functools.partial(getattr(run, of), many)
    seconds = take_turns({n: call(started[n].run) for n in candidates}, effort)
    per_step = {n: [each / len(many) for each in s] for n, s in seconds.items()}
    base = statistics.median(next(iter(per_step.values())))
    return [
        {
            **about,
            "candidate": name,
            **summary(times, base),
            "first_seconds": started[original(name)].first_seconds,
            "compile_seconds": started[original(name)].compile_seconds,
            "deviation": differs[original(name)],
        }
        for name, times in per_step.items()
    ]


class Start(NamedTuple):
    """The first call of a new model: through all lengths once, with nothing cached."""

    run: Any
    results: list[np.ndarray]
    first_seconds: float
    compile_seconds: float


def _start(make, of: str, batches: list, attempts: int) -> Start:
    """The median of several first calls, if they are fast."""
    runs: list[Any] = [make() for _ in range(attempts)]
    run: Any = runs[0]
    out: Any = None
    compilations, times = _compilations(), []
    for run in runs:
        if attempts > 1:
            jax.clear_caches()
        known, start = len(compilations), time.perf_counter()
        run.convert()
        out = getattr(run, of)(batches)
        times.append((time.perf_counter() - start, sum(compilations[known:])))
        if times[0][0] > _SLOW:
            break
    return Start(run, _results(run, out), *map(statistics.median, zip(*times)))


def _results(run, out) -> list[np.ndarray]:
    """The outputs; or the loss, and the weights that training has left."""
    return out if isinstance(out, list) else [np.asarray(out), *run.weights()]


@functools.cache
def _compilations() -> list[float]:
    """Seconds of whatever JAX has traced, lowered and compiled, as it tells itself."""
    seconds: list[float] = []

    def record(event: str, duration_secs: float, **kwargs):
        if event.startswith("/jax/core/compile/"):
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(record)
    return seconds


def _deviation(name: str, results: dict[str, list]) -> float:
    differs = deviation(name, results[name], next(iter(results.values())))
    if not differs <= _TOLERANCE:
        raise AssertionError(f"{name} differs by {differs:.1e}.")
    return differs


class KerasRun:
    """A Keras model, as its users run it."""

    def __init__(self, model):
        self.model = model

    def convert(self) -> None:
        """It is what it is."""

    def predict(self, batches: list) -> list[np.ndarray]:
        return [self.model.predict_on_batch(x) for x, _ in batches]

    def fit(self, batches: list) -> float:
        """The mean loss of one epoch."""
        each = (batch for batch in batches)  # Keras takes no other iterator
        options = {"steps_per_epoch": len(batches), "shuffle": False, "verbose": 0}
        done = self.model.fit(each, **options)
        return done.history["loss"][0]

    def weights(self) -> list[np.ndarray]:
        return self.model.get_weights()


class FlaxRun:
    """The Flax module of a Keras model, as Flax users run one."""

    def __init__(self, model):
        self.model = model

    def convert(self) -> None:
        import optax

        from tdjax.keras import to_flax

        module, variables = to_flax(self.model)
        optimizer = optax.sgd(RATE)
        self._state = variables, optimizer.init(variables)
        self._apply = jax.jit(module.apply)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, x, y):
            variables, memory = state
            loss = lambda v: ((module.apply(v, x, train=True) - y) ** 2).mean()
            value, gradient = jax.value_and_grad(loss)(variables)
            updates, memory = optimizer.update(gradient, memory)
            return (optax.apply_updates(variables, updates), memory), value

        self._step = step

    def predict(self, batches: list) -> list[np.ndarray]:
        return [np.array(self._apply(self._state[0], x)) for x, _ in batches]

    def fit(self, batches: list) -> float:
        losses = []
        for x, y in batches:
            self._state, loss = self._step(self._state, x, y)
            losses.append(loss)
        return float(np.mean(jax.device_get(losses)))

    def weights(self) -> list[np.ndarray]:
        """In Keras' order."""
        from tdjax.keras import from_flax

        from_flax(self._state[0], self.model)
        return self.model.get_weights()


Run = KerasRun | FlaxRun
