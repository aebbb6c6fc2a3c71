"""Random functions under random lowerings against a Python loop over the steps.

A function is drawn as a list of operations on the arrays of one step. Half of the
functions see masks, with infinity and NaN in the masked steps.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, note
from hypothesis import strategies as st

import tdjax
from helpers import BAD, x64

pytestmark = pytest.mark.slow


def matrix(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))


def matmul(x):
    return x @ matrix(x.shape[-1], 2).astype(x.dtype)


def convolve(x):
    """A convolution over the last axis, with one channel."""
    images = jnp.reshape(x, (x.shape[0], -1, 1))
    y = jax.lax.conv_general_dilated(
        images, matrix(2, 1, 2).astype(x.dtype), (1,), "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
    )  # fmt: skip
    return y[..., 0]


@jax.custom_jvp
def shifted(x):
    return x + 1


@shifted.defjvp
def _(primals, tangents):
    return shifted(*primals), 3 * tangents[0]


def running(x):
    """A scan over the last axis."""
    body = lambda carry, a: (jnp.tanh(carry + a), carry - a)
    start = jnp.zeros(x.shape[:-1], x.dtype)
    return jnp.moveaxis(jax.lax.scan(body, start, jnp.moveaxis(x, -1, 0))[1], 0, -1)


def of_the_largest(x):
    return jnp.take_along_axis(x, jnp.argmax(x, -1, keepdims=True), -1)


SMOOTH = {
    "sin": jnp.sin,
    "tanh": jax.checkpoint(jnp.tanh),
    "shifted": shifted,
    "half": lambda x: x / 2,
    "softmax": jax.nn.softmax,
    "reverse": lambda x: x[..., ::-1],
    "cumsum": lambda x: jnp.cumsum(x, -1),
    "last": lambda x: x[..., -1] if x.ndim > 1 else x,
    "mean": lambda x: jnp.mean(x, -1) if x.ndim > 1 else x,
    "new axis": lambda x: jnp.stack([x, -x], -1) if x.ndim < 3 else x,
    "matmul": matmul,
    "convolve": convolve,
    "running": running,
    "jitted": jax.jit(lambda x: x * jnp.cos(x)),
}
SHARP = {
    "relu": jax.nn.relu,
    "sort": lambda x: jnp.sort(x, -1),
    "largest": of_the_largest,
    "sign": jnp.sign,
    "select": lambda x: jnp.where(x > 0, x, x / 4),
}
# They need the last axis to be one of features.
OF_FEATURES = {
    "softmax", "reverse", "cumsum", "matmul", "convolve", "running", "sort", "largest",
}  # fmt: skip
MIXING = {
    "examples' mean": lambda x: x - jnp.mean(x, 0, keepdims=True),
    "turn examples": lambda x: x[::-1],
}
TO_OTHER_DTYPES = {
    "itself": lambda x: x,
    "argmax": lambda x: jnp.argmax(x, -1) if x.ndim > 1 else x > 0,
    "above": lambda x: x > 0.5,
    "rounded": lambda x: jnp.floor(jnp.clip(x, -9, 9) * 4).astype(jnp.int16),
}
PAIRS = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * jnp.tanh(b),
    "choose": lambda a, b: jnp.where(jax.lax.stop_gradient(b) > 0, a, -a),
}


class Program(NamedTuple):
    """Operations `(name, operand, operand)`, and the results `(name, value)`."""

    operations: list
    results: list

    def __call__(self, arrays, scale, *, offset):
        size = max(x.shape[0] if x.ndim else 1 for x in arrays.values())
        values = [self._start(x, size, scale.dtype) for x in arrays.values()]
        values[0] = values[0] * jnp.mean(scale) + offset
        for name, first, second in self.operations:
            a, b = (values[i % len(values)] for i in (first, second))
            values.append(_apply(name, a, b))
        results = {
            f"{i} {name}": TO_OTHER_DTYPES[name](values[-1 - pick % len(values)])
            for i, (name, pick) in enumerate(self.results)
        }
        return results, scale * 2

    @staticmethod
    def _start(x, size, dtype):
        """Floats with a batch, of any input."""
        x = x.astype(dtype)
        return x if x.ndim else jnp.broadcast_to(x, (size,))


def _apply(name, a, b):
    if name in PAIRS:
        if a.shape != b.shape:
            b = jnp.mean(b.reshape(b.shape[0], -1), -1)
            b = b.reshape(-1, *(1,) * (a.ndim - 1))
        return PAIRS[name](a, b)
    if name in OF_FEATURES and a.ndim == 1:
        a = a[:, None]
    return {**SMOOTH, **SHARP, **MIXING}[name](a)


class Case(NamedTuple):
    """A function, its inputs, and how it is applied to all steps."""

    program: Program
    inputs: dict[str, Any]
    axes: dict[str, int]
    out_axes: dict[str, int]
    lowering: dict[str, Any]
    mask: Any  # (batch, time), or None
    known_mask: bool
    dtype: Any

    @property
    def timesteps(self):
        return self.inputs["a"].shape[self.axes["a"]]

    @property
    def beyond(self):
        """(batch, time): the valid steps that are beyond the capacity."""
        if self.mask is None:
            return np.zeros((), bool)
        count = np.cumsum(self.mask).reshape(self.mask.shape)
        return self.mask & (count > self.lowering.get("capacity", count.size))

    @property
    def fits(self):
        return not self.beyond.any()

    @property
    def is_time_major(self):
        ranks = {name: x.ndim for name, x in self.inputs.items()}
        return all(axis % ranks[name] == 0 for name, axis in self.axes.items())


DTYPES = ["float32", "float32", "float64", "bfloat16", "float16"]


@st.composite
def cases(draw, masked):
    dtype = draw(st.sampled_from(DTYPES))
    method = draw(st.sampled_from(["vmap", "fold"]))
    may_mix = method == "vmap" and not masked
    names = [*SMOOTH, *PAIRS]
    # A value that is rounded otherwise may take another branch.
    is_half = dtype in ("bfloat16", "float16")
    names += [] if is_half else SHARP
    names += MIXING if may_mix else []
    operation = st.tuples(st.sampled_from(names), st.integers(0, 5), st.integers(0, 5))
    size = 3 if is_half else 6
    operations = draw(st.lists(operation, max_size=size))
    kinds = ["itself"] if is_half else [*TO_OTHER_DTYPES]
    result = st.tuples(st.sampled_from(kinds), st.integers(0, 5))
    program = Program(operations, draw(st.lists(result, min_size=1, max_size=3)))
    batch, timesteps = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    inputs, axes = {}, {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        features = draw(st.lists(st.integers(1, 3), max_size=2))
        has_batch = name == "a" or method == "fold" or draw(st.booleans())
        shape = [batch, *features] if has_batch else []
        axis = draw(st.integers(0, len(shape)))
        shape.insert(axis, timesteps)
        kind = dtype if name == "a" else draw(st.sampled_from([dtype, "int32", "bool"]))
        values = np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape)
        inputs[name] = (values * 2).astype(kind)
        axes[name] = axis - len(shape) * draw(st.booleans())
    sizes = st.sampled_from([None, 1, 2, timesteps, timesteps + 1])
    lowering = {
        "method": method,
        "chunk_size": draw(sizes),
        "unroll": draw(st.sampled_from([1, 2, True, False])),
        "remat": draw(st.booleans()),
    }
    mask = None
    if masked:
        bits = st.lists(
            st.booleans(), min_size=batch * timesteps, max_size=batch * timesteps
        )
        mask = np.reshape(draw(bits), (batch, timesteps))
        if draw(st.booleans()):
            spare = draw(st.integers(-2, 2))
            lowering["capacity"] = max(1, int(mask.sum()) + spare)
    case = Case(program, inputs, axes, {}, lowering, mask, draw(st.booleans()), dtype)
    with x64():
        shapes, _ = jax.eval_shape(functools.partial(one_step, case, 0), *start(case))
    out_axes = {
        name: draw(st.integers(-y.ndim - 1, y.ndim)) for name, y in shapes.items()
    }
    case = case._replace(out_axes=out_axes)
    if any(y.dtype == bool for y in shapes.values()):
        # Bools can't mark steps beyond an unknown mask's capacity.
        assume(case.fits)
        case = case._replace(known_mask=True)
    return case._replace(known_mask=case.known_mask and case.fits)


def start(case):
    """`(inputs, scale, offset)`: what may be differentiated."""
    scale = jnp.asarray([1.5, -0.25], case.dtype)
    return jax.tree.map(jnp.asarray, case.inputs), scale, jnp.asarray(0.5, case.dtype)


def one_step(case, step, inputs, scale, offset):
    take = lambda name, x: jax.lax.index_in_dim(
        x, step, case.axes[name] % x.ndim, keepdims=False
    )
    arrays = {name: take(name, x) for name, x in inputs.items()}
    return case.program(arrays, scale, offset=offset)


def loop(case, inputs, scale, offset):
    """The definition. Masked results are zeros, those beyond the capacity marked."""
    steps = []
    for t in range(case.timesteps):
        step, _ = one_step(case, t, inputs, scale, offset)
        if case.mask is not None:
            step = {name: put(y, ~case.mask[:, t], 0) for name, y in step.items()}
            step = {
                name: put(y, case.beyond[:, t], marker(y)) for name, y in step.items()
            }
        steps.append(step)
    stacked = {
        name: jnp.stack([step[name] for step in steps], axis)
        for name, axis in case.out_axes.items()
    }
    return stacked, scale * 2


def put(y, rows, value):
    """`y` with a value in some rows."""
    return jnp.where(
        rows.reshape(-1, *(1,) * (y.ndim - 1)), jnp.asarray(value, y.dtype), y
    )


def marker(y):
    if y.dtype == bool:
        return False
    return jnp.nan if is_float(y) else jnp.iinfo(y.dtype).min


def ours(case, inputs, scale, offset, mask):
    apply = tdjax.time_distributed(
        case.program,
        in_axes=(case.axes, None),
        out_axes=(case.out_axes, None),
        **case.lowering,
    )
    return apply(inputs, scale, offset=offset, mask=mask)


def spoil(case, inputs):
    """Bad numbers in the masked steps."""
    if case.mask is None:
        return inputs

    def change(name, x):
        if x.ndim == 1 or x.dtype == bool:
            return x
        valid = np.reshape(case.mask, (*case.mask.shape, *(1,) * (x.ndim - 2)))
        valid = np.moveaxis(valid, 1, case.axes[name])
        bad = np.resize(BAD, x.shape) if x.dtype != np.int32 else -(2**31)
        with np.errstate(over="ignore"):
            return jnp.where(valid, x, np.asarray(bad).astype(x.dtype))

    return {name: change(name, x) for name, x in inputs.items()}


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def value_and_gradients(apply, args):
    """The results, and the gradient of a weighted sum of those that are floats."""
    leaves, treedef = jax.tree.flatten(args)
    floats = [i for i, x in enumerate(leaves) if is_float(x)]

    def total(values):
        changed = [*leaves]
        for i, value in zip(floats, values):
            changed[i] = value
        y = apply(*jax.tree.unflatten(treedef, changed))
        weigh = lambda y: jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape)))
        return sum(weigh(x) for x in jax.tree.leaves(y) if is_float(x)), y

    gradients, y = jax.grad(total, has_aux=True)([leaves[i] for i in floats])
    return y, gradients


TOLERANCES = {"float32": 1e-4, "float64": 1e-12, "bfloat16": 0.1, "float16": 0.02}


def assert_close(case, got, want):
    """Integers are equal; floats deviate relative to the largest, or to one."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if not is_float(b):
            np.testing.assert_array_equal(a, b)
            continue
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(1.0, np.abs(b[np.isfinite(b)]).max(initial=0))
        np.testing.assert_allclose(a / scale, b / scale, 0, TOLERANCES[case.dtype])


def check(case):
    note(str(case))
    with x64():
        args = start(case)
        want = jax.jit(
            lambda *args: value_and_gradients(functools.partial(loop, case), args)
        )(*args)
        mask = case.mask
        if mask is not None and case.is_time_major:
            mask = mask.T
        spoiled = (spoil(case, args[0]), *args[1:])

        def run(mask, *args):
            apply = functools.partial(ours, case, mask=mask)
            return value_and_gradients(apply, args)

        if mask is None or case.known_mask:
            run = functools.partial(run, mask)
        else:
            spoiled = mask, *spoiled
        got = jax.jit(run)(*spoiled)
        # Gradients of steps beyond the capacity are NaN.
        compared = slice(None if case.fits else 1)
        assert_close(case, got[compared], want[compared])


@given(cases(masked=False))
def test_every_lowering_is_a_loop_over_the_steps(case):
    check(case)


@given(cases(masked=True))
def test_masked_and_packed_steps_are_a_loop_over_the_valid_ones(case):
    check(case)
