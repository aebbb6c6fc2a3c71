"""Days at a weather station, made up, with three targets that need different things."""

from typing import NamedTuple

import numpy as np

HOURS, SENSORS = 24, 3
BEFORE = 6
NOISE = 0.1

# What the target of an hour is made of.
SAME, OWN, OTHERS = "same formula", "own formula", "other hours"
TARGETS = (SAME, OWN, OTHERS)


class Days(NamedTuple):
    """`sensors` is `(days, hours, sensors)`, each target is `(days, hours, 1)`."""

    sensors: np.ndarray
    targets: dict[str, np.ndarray]


def read_days(seed: int, days: int) -> Days:
    """Temperature, humidity and wind of each hour, and the targets with their noise.

    * `SAME`: the temperature that is felt, by one formula of the hour's three sensors.
    * `OWN`: the heating needed, by a formula that is another at each hour.
    * `OTHERS`: how much warmer it is than 6 hours before, or than at midnight.
    """
    rng = np.random.default_rng(seed)
    sensors = _weather(rng, days)
    before = np.maximum(np.arange(HOURS) - BEFORE, 0)
    targets = {
        SAME: sensors @ [0.8, 0.4, -0.4],
        OWN: (sensors * _weights()).sum(2) + np.sin(_angles()),
        OTHERS: sensors[..., 0] - sensors[:, before, 0],
    }
    noise = rng.normal(0, NOISE, (len(TARGETS), days, HOURS))
    noisy = {name: targets[name] + noise[i] for i, name in enumerate(TARGETS)}
    arrays = {
        name: values[..., None].astype(np.float32) for name, values in noisy.items()
    }
    return Days(sensors.astype(np.float32), arrays)


def _weather(rng: np.random.Generator, days: int) -> np.ndarray:
    """Of variance 1 at each hour, and much like the hour before."""
    hours = [rng.normal(size=(days, SENSORS))]
    for _ in range(HOURS - 1):
        hours.append(0.8 * hours[-1] + 0.6 * rng.normal(size=(days, SENSORS)))
    return np.stack(hours, axis=1)


def _weights() -> np.ndarray:
    """`(hours, sensors)`."""
    phases = 2 * np.pi * np.arange(SENSORS) / SENSORS
    return 0.7 * np.cos(_angles()[:, None] + phases)


def _angles() -> np.ndarray:
    """`(hours,)`: once around in a day."""
    return 2 * np.pi * np.arange(HOURS) / HOURS
