"""The training loop of every example: it shows progress, and goes on where it stopped.

Everything a run needs to go on is a function of the seed and the step, or is in the
checkpoint.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState
from rich.console import Console

from _batches import batch_rows, count, take
from _checkpoints import Checkpoints, refuse_differences
from _display import Point, TrainingProgress
from _options import Settings
from _problem import Problem

POINTS_IN_CURVE = 10


class State(TrainState):
    """Parameters, optimiser state and step, and the key that all noise comes from.

    `apply_fn` is the loss.
    """

    key: jax.Array


def create_state(problem: Problem, settings: Settings) -> State:
    params_key, key = jax.random.split(jax.random.key(settings.seed))
    return State.create(
        apply_fn=problem.loss,
        params=problem.init(params_key),
        tx=problem.optimizer(settings),
        key=key,
    )


@jax.jit
def train_step(state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
    """One step of gradient descent; returns the new state, the loss and more."""
    key = jax.random.fold_in(state.key, state.step)
    compute = jax.value_and_grad(state.apply_fn, has_aux=True)
    (loss, metrics), gradients = compute(state.params, batch, key)
    return state.apply_gradients(grads=gradients), {"loss": loss, **metrics}


def measure(state: State, problem: Problem) -> Point:
    """A point of the learning curve, on all held-out examples and as many others."""
    some = take(problem.train, slice(count(problem.held_out)))
    train = problem.evaluate(state.params, some)
    held_out = problem.evaluate(state.params, problem.held_out)
    point: Point = {"step": int(state.step)}
    for name in problem.quantities:
        point[f"train_{name}"] = float(train[name])
        point[f"held_out_{name}"] = float(held_out[name])
    return point


class Run:
    """A training run: its state, its learning curve, its checkpoints."""

    def __init__(self, problem: Problem, settings: Settings, checkpoints: Checkpoints):
        self.problem, self.settings = problem, settings
        self.checkpoints = checkpoints
        self.identity = {"settings": settings.identity(), "task": problem.identity()}
        self.curve: list[Point] = []
        self.state = create_state(problem, settings)
        if checkpoints.latest is not None:
            self._resume()

    def _resume(self) -> None:
        record, arrays, damages = self.checkpoints.restore(
            self._arrays(), self._refuse_other_run
        )
        for damage in damages:
            print(f"{damage}. It is deleted; the run goes on from the one before.")
        self.curve = record["curve"]
        key = jax.random.wrap_key_data(arrays["key"])
        self.state = self.state.replace(**{**arrays, "key": key})

    def _refuse_other_run(self, record: dict[str, Any]) -> None:
        for part, now in self.identity.items():
            refuse_differences(self.settings.out, record[part], now)

    def save(self) -> None:
        record = {**self.identity, "curve": self.curve}
        self.checkpoints.save(int(self.state.step), self._arrays(), record)

    def is_checkpoint(self, done: int) -> bool:
        last = done == self.settings.steps
        return last or done % self.settings.checkpoint_every == 0

    def batch(self, step: int) -> Any:
        settings, examples = self.settings, self.problem.train
        rows = batch_rows(settings.seed, step, settings.batch_size, count(examples))
        return take(examples, rows)

    def _arrays(self) -> dict[str, Any]:
        state = self.state
        key = jax.random.key_data(state.key)
        arrays = {"params": state.params, "opt_state": state.opt_state, "key": key}
        return {**arrays, "step": jnp.asarray(state.step)}


def train(run: Run, console: Console) -> None:
    """Takes the steps that are left; on Ctrl-C saves the run and stops."""
    first, steps = int(run.state.step), run.settings.steps
    with (
        noticed_interrupt() as interrupted,
        TrainingProgress(console, first, steps, run.problem.quantities) as progress,
    ):
        for step in range(first, steps):
            run.state, metrics = train_step(run.state, run.batch(step))
            done = step + 1
            progress.step(done, {name: float(x) for name, x in metrics.items()})
            if is_point(done, steps):
                run.curve.append(measure(run.state, run.problem))
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
