"""Training with Keras' `fit`, in parts, so that a stopped run goes on.

A part is one call of `fit`, with the batches up to the next checkpoint. Which examples
they have is a function of the seed and the step, and Keras keeps the step beside the
optimiser's state in the `.keras` file.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from rich.console import Console

from _batches import batch_rows, count, take
from _checkpoints import (
    checksum_of_bytes,
    checksum_of_record,
    refuse_differences,
    refuse_existing,
    write_atomically,
)
from _display import Point, TrainingProgress
from _options import InputError, Settings
from _problem import QUANTITIES
from _training import is_point

EVALUATION_BATCH = 128


class FitRun:
    """A compiled model in training: its files, its learning curve.

    Args:
      settings: of the run; with `resume` it goes on from what is in `out`.
      task: what must be the same for a run to go on, beside the settings, as JSON.
      make_model: makes the compiled model of a new run.
    """

    def __init__(
        self,
        settings: Settings,
        task: dict[str, Any],
        make_model: Callable[[], keras.Model],
    ):
        self.settings = settings
        self.file, self._record = (
            settings.out / name for name in ("model.keras", "record.json")
        )
        self.identity = {"settings": settings.identity(), "task": task}
        self.notes: dict[str, Any] = {}
        self.curve: list[Point] = []
        self._files: list[str] = []
        if not self.file.exists():
            self.model = make_model()
        elif settings.resume:
            self._resume()
        else:
            refuse_existing(settings.out)

    def _resume(self) -> None:
        try:
            record = dict(json.loads(self._record.read_text()))
            is_sound = record.pop("checksum") == checksum_of_record(record)
            digest = checksum_of_bytes(self.file.read_bytes())
            if not is_sound or digest not in record["files"]:
                raise ValueError("these are not the bytes that were saved")
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.file} or {self._record.name} is damaged ({error}): start "
                "again, with another --out"
            ) from error
        for part, now in self.identity.items():
            refuse_differences(self.settings.out, record[part], now)
        self.model: Any = keras.saving.load_model(self.file)
        # Not the other one of the record, which a kill kept from its place.
        self.notes, self._files = record["notes"], [digest]
        # The record is written first: it may be a point ahead.
        self.curve = [point for point in record["curve"] if point["step"] <= self.step]

    @property
    def step(self) -> int:
        return int(self.model.optimizer.iterations.value)

    def save(self) -> None:
        """Replaces the files by whole new ones, whenever the run is killed.

        The record has the checksums of two models: the old one may still be there.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_name(f".{self.file.name}")
        self.model.save(unfinished)
        self._files = [*self._files[-1:], checksum_of_bytes(unfinished.read_bytes())]
        record = {**self.identity, "notes": self.notes, "curve": self.curve}
        record["files"] = self._files
        sealed = {**record, "checksum": checksum_of_record(record)}
        content = json.dumps(sealed, indent=1).encode()
        write_atomically(self._record, lambda file: file.write(content))
        os.replace(unfinished, self.file)

    def next_stop(self) -> int:
        """The next step with a checkpoint or a point of the learning curve."""
        steps, every = self.settings.steps, self.settings.checkpoint_every
        ahead = range(self.step + 1, steps)
        stops = (done for done in ahead if done % every == 0 or is_point(done, steps))
        return next(stops, steps)


def fit(run: FitRun, train: Any, held_out: Any, console: Console) -> None:
    """Takes the steps that are left. Examples are `(inputs, labels)`."""
    steps, size = run.settings.steps, run.settings.batch_size
    with TrainingProgress(console, run.step, steps, QUANTITIES) as progress:
        while run.step < steps:
            first, stop = run.step, run.next_stop()
            inputs, labels = take(train, rows(run.settings, first, stop, count(train)))
            shown = _Shown(progress, first)
            options: Any = {"shuffle": False, "verbose": 0, "callbacks": [shown]}
            run.model.fit(inputs, labels, batch_size=size, **options)
            if is_point(stop, steps):
                run.curve.append(_measure(run, train, held_out))
                progress.point(run.curve[-1])
            run.save()


def rows(settings: Settings, first: int, stop: int, count: int) -> np.ndarray:
    """The examples of the batches from one step to another."""
    batches = [
        batch_rows(settings.seed, step, settings.batch_size, count)
        for step in range(first, stop)
    ]
    return np.concatenate(batches)


def evaluate(model: Any, examples: Any) -> dict[str, float]:
    inputs, labels = examples
    options: Any = {"verbose": 0, "return_dict": True}
    return model.evaluate(inputs, labels, batch_size=EVALUATION_BATCH, **options)


def _measure(run: FitRun, train: Any, held_out: Any) -> Point:
    sides = {"train": take(train, slice(count(held_out))), "held_out": held_out}
    point: Point = {"step": run.step}
    for side, examples in sides.items():
        values = evaluate(run.model, examples)
        point |= {f"{side}_{name}": float(values[name]) for name in QUANTITIES}
    return point


class _Shown(keras.callbacks.Callback):
    """Shows the steps of one part in the progress of all."""

    def __init__(self, progress: TrainingProgress, first: int):
        super().__init__()
        self._progress, self._first = progress, first

    def on_train_batch_end(self, batch, logs=None):
        metrics = {name: float(value) for name, value in (logs or {}).items()}
        self._progress.step(self._first + batch + 1, metrics)
