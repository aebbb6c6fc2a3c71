"""How the results of two programs are compared."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp

from tdjax._mesh import like_type_of
from tdjax._tuning.clock import device_of

# The largest deviation from the reference, relative to its largest value. Another order
# of summation causes errors that grow with the square root of the number of terms.
_TOLERANCES = {"float64": 1e-10, "float32": 2e-4, "float16": 5e-3, "bfloat16": 3e-2}
# Matrix units may round the factors of float32 products to 10 bits, or to 7.
_MATRIX_UNIT_TOLERANCE = 3e-2
# What is this much smaller in double precision is zero but for rounding, and two
# programs round to numbers that are at most this many times as large.
_VANISHES, _ROUNDING = 1e-3, 10.0
# A sum in half precision that is further off than this has lost its meaning.
_LARGEST_OF_HALF = 0.5


class Tolerances:
    """The deviation allowed in each result of a reference.

    `run(*args)` gives the results; `given` is the user's tolerance for all, or None.
    """

    def __init__(self, reference: Any, run: Callable, args: tuple, given: float | None):
        self._reference, self._run, self._args = reference, run, args
        self._given, self._is_sharp = given, False
        leaves = jax.tree.leaves(reference)
        self._limits = [
            given or default_tolerance(x.dtype, device_of(x).platform) for x in leaves
        ]

    def has_shapes_of(self, results: Any) -> bool:
        """Whether results have the shapes and dtypes of the reference."""
        shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
        return shapes(results) == shapes(self._reference)

    def agrees(self, results: Any) -> tuple[float, bool]:
        """`(the largest deviation, whether all are allowed)`."""
        errors = list(map(float, jax.tree.leaves(deviations(results, self._reference))))
        if not self._allows(errors) and self._given is None and not self._is_sharp:
            self._is_sharp = True
            self._limits = list(map(max, self._limits, self._of_rounding()))
        return max(errors, default=0.0), self._allows(errors)

    def _allows(self, errors: list[float]) -> bool:
        return all(error <= limit for error, limit in zip(errors, self._limits))

    def _of_rounding(self) -> list[float]:
        """What rounding may cost in each result, found by more digits.

        A sum in half precision may be further off than usual. Two programs that are
        each as far from the truth as the reference differ by twice as much at most. In
        single precision, a result that is zero but for rounding has no scale: the
        gradient of a bias before a normalisation is one.
        """
        leaves = jax.tree.leaves(self._reference)
        limits = [0.0] * len(leaves)
        if any(_is_half(x) for x in leaves):
            errors = self._with(_is_half, jnp.float32, deviations)
            # What overflows in half precision has no deviation to go by.
            is_known = lambda error: error <= _LARGEST_OF_HALF
            limits = [2 * e if is_known(e) else 0.0 for e in errors or limits]
        elif not any(_is_single(x) for x in leaves):
            return limits
        with _double_precision():
            sizes = self._with(_is_single, jnp.float64, _relative_sizes)
        vanishes = [size <= _VANISHES for size in sizes or [math.inf] * len(leaves)]
        return [_ROUNDING if v else limit for v, limit in zip(vanishes, limits)]

    def _with(self, is_narrow, wide, compare) -> list[float] | None:
        """`compare(reference, results)` of arguments with more digits."""
        widen = lambda x: x.astype(wide) if is_narrow(x) else x
        try:
            truth = jax.jit(self._run)(*jax.tree.map(widen, self._args))
        except Exception:
            return None  # fun takes no other dtype
        return list(map(float, jax.tree.leaves(compare(self._reference, truth))))


def is_float(x) -> bool:
    """Whether it can be differentiated: real or complex."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _is_half(x) -> bool:
    return is_float(x) and x.dtype.itemsize == 2


def _is_single(x) -> bool:
    return x.dtype == jnp.float32


def _double_precision():
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return getattr(jax.experimental, "enable_x64")()  # Before JAX 0.9.  # noqa: B009


@jax.jit
def _relative_sizes(got, want):
    """For each leaf in single precision, how large `want` is beside `got`."""

    def relative_size(got, want):
        if not _is_single(got) or got.size == 0:
            return jnp.inf
        scale = jnp.max(jnp.abs(got)).astype(want.dtype)
        return jnp.where(scale > 0, jnp.max(jnp.abs(want)) / scale, jnp.inf)

    return jax.tree.map(relative_size, got, want)


@jax.jit
def deviations(got, want):
    """For each leaf, the largest difference relative to its largest finite value."""
    return jax.tree.map(_deviation, got, want)


def _deviation(got, want):
    got = like_type_of(got, want)
    if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
        got, want = jax.random.key_data(got), jax.random.key_data(want)
    if want.size == 0:
        return jnp.zeros(())
    if not is_float(want):
        return jnp.where(jnp.array_equal(got, want), 0.0, jnp.inf)
    same = (got == want) | (jnp.isnan(got) & jnp.isnan(want))
    finite = jnp.isfinite(want)
    scale = jnp.max(jnp.abs(jnp.where(finite, want, 0)))
    error = jnp.abs(jnp.where(finite, got - want, jnp.inf)) / jnp.maximum(scale, 1e-30)
    return jnp.max(jnp.where(same, 0, jnp.where(jnp.isnan(error), jnp.inf, error)))


def default_tolerance(dtype, platform: str) -> float:
    """The deviation that another order of summation may cause."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return 0.0
    name = jnp.finfo(dtype).dtype.name  # of a complex number's parts
    tolerance = _TOLERANCES.get(name, _MATRIX_UNIT_TOLERANCE)
    if name == "float32" and platform != "cpu":
        return max(tolerance, _MATRIX_UNIT_TOLERANCE)
    return tolerance
