"""The time of an accelerator, read from profiles as they are written for one."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

import tdjax
from tdjax._tuning import rounds
from tdjax._tuning.clock import device_of
from tdjax._tuning.device_time import busy_seconds, mark, profiled


def event(name, start, end):
    picoseconds = f"offset_ps: {start}000000 duration_ps: {end - start}000000"
    return f"events {{ metadata_id: {name} {picoseconds} }}"


def plane(name, lines, names=()):
    """`lines` has the events of each timeline, in microseconds."""
    text = [
        f'lines {{ name: "{line}" timestamp_ns: 7 {" ".join(events)} }}'
        for line, events in lines.items()
    ]
    text += [
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{each}" }} }}'
        for i, each in enumerate(names)
    ]
    return f'planes {{ name: "{name}" {" ".join(text)} }}'


NAMES = ["work", "tdjax measurement 0", "tdjax measurement 1", "tdjax measurement 2"]
HOST = plane(
    "/host:CPU",
    {"python": [event(1, 0, 10), event(2, 20, 60)], "other": [event(3, 70, 80)]},
    NAMES,
)


def read(*planes):
    profile = jax.profiler.ProfileData.from_text_proto(" ".join(planes))
    return [1e6 * seconds for seconds in busy_seconds(profile, 3)]


def gpu(number=0, **queues):
    lines = {f"Stream #{name}": events for name, events in queues.items()}
    return plane(f"/device:GPU:{number}", lines, NAMES)


def test_kernels_that_overlap_count_once():
    one = [event(0, 2, 5), event(0, 21, 31)]
    other = [event(0, 4, 8), event(0, 25, 35), event(0, 40, 41)]
    got = read(HOST, gpu(a=one, b=other))
    assert got == pytest.approx([6, 15, 0])


def test_what_is_outside_of_a_measurement_does_not_count():
    got = read(HOST, gpu(a=[event(0, 8, 25), event(0, 61, 69), event(0, 75, 99)]))
    assert got == pytest.approx([2, 5, 5])


def test_of_several_devices_the_busiest_counts():
    got = read(HOST, gpu(0, a=[event(0, 1, 2)]), gpu(1, a=[event(0, 1, 4)]))
    assert got == pytest.approx([3, 0, 0])


def test_of_a_tpu_whole_programs_count():
    lines = {
        "XLA Modules": [event(0, 22, 52)],
        "XLA Ops": [event(0, 22, 30), event(0, 31, 59)],
        "Steps": [event(0, 0, 99)],
    }
    assert read(HOST, plane("/device:TPU:0", lines, NAMES)) == pytest.approx([0, 30, 0])


def test_without_a_device_nothing_is_known():
    assert read(HOST) == [0, 0, 0]


def test_marks_are_in_a_real_profile():
    with profiled("pretend") as profile, mark(0):
        jax.block_until_ready(jnp.sin(jnp.ones(3)))
    names = [
        event.name
        for plane in profile[0].planes
        for line in plane.lines
        for event in line.events
    ]
    assert "tdjax measurement 0" in names
    assert busy_seconds(profile[0], 1) == [0]


def test_while_the_user_profiles_there_is_no_profile(tmp_path):
    jax.profiler.start_trace(tmp_path)
    try:
        with profiled("pretend") as profile:
            pass
    finally:
        jax.profiler.stop_trace()
    assert profile == []


def test_on_a_cpu_nothing_is_profiled(monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", pytest.fail)
    assert device_of({"x": jnp.ones(3), "n": 1}).platform == "cpu"
    with profiled("cpu") as profile:
        pass
    assert profile == []


@pytest.mark.parametrize("knows", [True, False])
def test_the_race_takes_the_time_of_the_device(monkeypatch, knows):
    """The host says that both take as long, the device that one is twice as fast."""
    sizes = []

    @contextlib.contextmanager
    def pretend(platform):
        sizes.clear()
        yield [sizes]

    def timed(program, args, calls=1):
        is_whole = "while" not in program.as_text()
        sizes.append((2e-4 if is_whole else 1e-4) * calls)
        return 1e-3, program(*args)

    def busy(profile, count):
        return profile[:count] if knows else [0.0] * count

    monkeypatch.setattr(rounds, "profiled", pretend)
    monkeypatch.setattr(rounds, "timed", timed)
    monkeypatch.setattr(rounds, "busy_seconds", busy)
    result = tdjax.autotune(
        lambda x: jnp.sin(x) @ jnp.ones((4, 4)), jnp.ones((2, 8, 4)), budget=60,
        candidates=[{"chunk_size": 1}],
    )  # fmt: skip
    if knows:
        assert result.options["chunk_size"] == 1
        assert result.best.run_seconds == pytest.approx(1e-4)
        assert result.best.ratio == pytest.approx(0.5)
    else:
        assert result.best.ratio == pytest.approx(1)
