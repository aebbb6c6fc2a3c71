"""What the tests share: references that know nothing of tdjax, and comparisons."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console


def slow_but(quick, items):
    """Parameters of a test, all of them slow but those at the places `quick`."""
    slow = lambda item: pytest.param(item, marks=pytest.mark.slow)
    return [item if i in quick else slow(item) for i, item in enumerate(items)]


def numpy_dense(params, x):
    """The referee: float64, one step and one feature sum after the other."""
    kernel = np.asarray(params["kernel"], np.float64)
    bias = np.asarray(params.get("bias", np.zeros(kernel.shape[-1])), np.float64)
    x = np.asarray(x, np.float64)
    y = np.zeros((*x.shape[:-1], kernel.shape[1]))
    for place in np.ndindex(*x.shape[:-1]):
        y[place] = sum(x[place][i] * kernel[i] for i in range(kernel.shape[0])) + bias
    return y


def integers(seed, *shape):
    """Integer-valued float32: sums of products are exact in any order."""
    values = np.random.default_rng(seed).integers(-4, 5, shape)
    return jnp.asarray(values, jnp.float32)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


BAD = [np.nan, np.inf, -np.inf, 3e38]


def spoil(x, mask, bad=None):
    """`bad` in every masked step, by default all of `BAD` in turn."""
    bad = jnp.resize(jnp.array(BAD, x.dtype), x.shape) if bad is None else bad
    return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, bad)


def x64():
    """A context in which float64 stays float64."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


def assert_trees_close(got, want, rtol=2e-5, atol=2e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)
    ):
        name = jax.tree_util.keystr(path)
        assert np.shape(a) == np.shape(b), name
        np.testing.assert_allclose(a, b, rtol, atol, err_msg=name)


def assert_trees_equal(got, want):
    assert_trees_close(got, want, rtol=0, atol=0)


def lowerings(timesteps, methods=("vmap", "fold"), unrolls=(1, 2, True), whole=None):
    """Every method, chunk size (1, 3, T, more), unroll and remat that differ.

    `whole` are the chunk sizes for all steps at once: None, T and more.
    """
    whole = whole or (None, timesteps, timesteps + 2)
    loops = itertools.product((1, 3), unrolls, (False, True))
    single = itertools.product(whole, (1,), (False, True))
    return [
        {"method": method, "chunk_size": chunk, "unroll": unroll, "remat": remat}
        for method in methods
        for chunk, unroll, remat in (*single, *loops)
    ]


def quick_compile(fun, *args):
    """Compiles for correctness, not for speed: a third of the time."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    return jax.jit(fun).lower(*args).compile(compiler_options=options)(*args)


def run_on_devices(program, *arguments):
    """Runs a program of `tests/mesh` on 8 virtual devices, and returns its JSON."""
    here = Path(__file__).parent
    environment = {
        **os.environ,
        # With those that make the tests quick (conftest.py).
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
        + os.environ.get("XLA_FLAGS", ""),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, str(here / "mesh" / program), *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def printed(thing) -> str:
    """What rich prints of it."""
    console = Console(width=200)
    with console.capture() as captured:
        console.print(thing)
    return captured.get()
