"""Random programs: where `step_influence` says False, no change of the input shows.

Steps of random inputs are replaced by others of all magnitudes and signs. Runs that
leave the bound are not counted: nothing is promised of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

import tdjax
from fuzz.programs import F, T, numbers, programs

pytestmark = pytest.mark.slow

VARIANTS = 64


# Its programs are quick, and few of them come near a fault.
@settings(max_examples=max(100, settings.default.max_examples))
@given(programs, st.sampled_from([1e6, 1e6, 50.0, 2.0]), st.integers(0, 99))
def test_false_is_certain(program, bound, seed):
    influence = tdjax.step_influence(program, jnp.ones((1, T, F)), bound=bound)
    if influence.all():
        return
    rng = np.random.default_rng(seed)
    x = numbers(rng, bound, VARIANTS, 1, T, F)
    run = jax.jit(jax.vmap(program.values))
    is_inside = lambda values: np.all(
        [np.all(np.abs(v) <= bound, (1, 2, 3)) for v in values], 0
    )
    before = jax.device_get(run(x))
    for j in range(T):
        changed = x.copy()
        changed[:, :, j] = numbers(rng, bound, VARIANTS, 1, F)
        after = jax.device_get(run(changed))
        counts = is_inside(before) & is_inside(after)
        moved = (before[-1] != after[-1]) & counts[:, None, None, None]
        wrong = moved.any((0, 1, 3)) & ~influence[:, j]
        if wrong.any():
            i = int(np.argmax(wrong))
            k = int(np.argmax(moved[:, :, i].any((1, 2))))
            note(f"x = {x[k]!r} and {changed[k]!r}: {before[-1][k]}, {after[-1][k]}")
            raise AssertionError(f"step {i} moves with step {j}: {program}")
