"""How long an accelerator is busy with a measurement, as its profiler says.

The host's clock also counts what the host needs to start a program, which is longer
than a short program itself. On a CPU both are the same, and the host's clock is taken.
"""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

# What a measurement is called in a trace, with its number.
_MARK = "tdjax measurement"
# The timeline of whole programs on a TPU, and of a GPU's queues.
_PROGRAMS, _QUEUE = "XLA Modules", "Stream"
Interval = tuple[float, float]


def mark(number: int) -> Any:
    """A context around a measurement."""
    return jax.profiler.TraceAnnotation(f"{_MARK} {number}")


@contextlib.contextmanager
def profiled(platform: str) -> Iterator[list]:
    """A list that holds the profile afterwards; none of a CPU, or if there is none."""
    profile: list[Any] = []
    if platform == "cpu":
        yield profile
        return
    with tempfile.TemporaryDirectory() as folder:
        is_on = _start(folder)
        try:
            yield profile
        finally:
            if is_on:
                jax.profiler.stop_trace()
        # Without a profile, the host's clock is what there is.
        with contextlib.suppress(Exception):
            (file,) = Path(folder).rglob("*.xplane.pb")
            profile.append(jax.profiler.ProfileData.from_file(str(file)))


def _start(folder: str) -> bool:
    try:
        jax.profiler.start_trace(folder)
    except Exception:
        return False  # The user's own trace is on, or the device has no profiler.
    return True


def busy_seconds(profile: Any, count: int) -> list[float]:
    """Of each marked measurement, for how long the busiest device was busy.

    It is 0 where the profile has no work of a device.
    """
    marks, devices = dict[str, Interval](), list[list[Interval]]()
    for plane in profile.planes:
        if plane.name.startswith("/device:"):
            devices.append(_merged(_work(plane)))
            continue
        for event in _events(plane.lines):
            if event.name.startswith(_MARK):
                marks[event.name] = _interval(event)
    none = (0.0, 0.0)
    spans = [marks.get(f"{_MARK} {number}", none) for number in range(count)]
    busy = lambda span: [_overlap(span, work) for work in devices]
    return [max(busy(span), default=0.0) * 1e-9 for span in spans]


def _work(plane: Any) -> list[Interval]:
    lines = list(plane.lines)
    programs = [line for line in lines if line.name == _PROGRAMS]
    queues = [line for line in lines if line.name.startswith(_QUEUE)]
    return [_interval(event) for event in _events(programs or queues)]


def _events(lines: Iterable[Any]) -> Iterator[Any]:
    for line in lines:
        yield from line.events


def _interval(event: Any) -> Interval:
    return event.start_ns, event.start_ns + event.duration_ns


def _merged(intervals: Sequence[Interval]) -> list[Interval]:
    """Without overlaps: kernels of several queues run at the same time."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _overlap(span: Interval, intervals: list[Interval]) -> float:
    shared = (min(span[1], end) - max(span[0], start) for start, end in intervals)
    return sum(max(0.0, each) for each in shared)
