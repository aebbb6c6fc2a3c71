"""Random programs: what is shown to keep examples apart gives the same in any batch."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.programs import F, T, numbers, programs
from tdjax._tuning.independence import find_mixing

pytestmark = pytest.mark.slow


# Most programs mix, and are then not run.
@settings(max_examples=max(100, settings.default.max_examples))
@given(programs, st.integers(0, 99))
def test_what_is_shown_to_keep_examples_apart_does(program, seed):
    """Here the steps of the programs are the examples of a batch."""
    x = numbers(np.random.default_rng(seed), 100.0, T, F)
    call = lambda arrays: program(arrays[0][None])[0]
    if find_mixing(call, [x], [1], 1, 1) is not None:
        return
    run = jax.jit(call)
    order = np.array([2, 0, 3, 0])
    np.testing.assert_array_equal(run([x[order]]), run([x])[order])
