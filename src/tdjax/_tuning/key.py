"""What measurements depend on: the key of an entry in the cache."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tdjax._checks import is_concrete
from tdjax._jaxprs import constants
from tdjax._tuning.candidates import Candidate
from tdjax._tuning.clock import device_of
from tdjax._tuning.settings import Settings


def describe_measurements(
    program: Callable,
    args: tuple,
    argnums: list[int],
    candidates: list[Candidate],
    settings: Settings,
    sharding: PartitionSpec | None,
) -> dict[str, Any]:
    """What the measurements depend on, as JSON: the key of an entry in the cache.

    `program` is the reference as it is measured, with its gradient.
    """
    about = {
        **describe_machine(args),
        "shapes": [str(jax.typeof(x)) for x in jax.tree.leaves(args)],
        "shardings": [_placement(x) for x in jax.tree.leaves(args)],
        "mesh": _mesh(jax.sharding.get_abstract_mesh()),
        "sharding": str(sharding),
        "program": _fingerprint(program, args),
        "argnums": argnums,
        "default": next(c.options for c in candidates if c.is_default),
        "candidates": [candidate.options for candidate in candidates],
        "compiler_options": settings.compiler_options,
        "memory_limit": settings.memory_limit,
        "tolerance": settings.tolerance,
    }
    return json.loads(json.dumps(about))


def describe_machine(args: tuple) -> dict[str, Any]:
    """The device of the arguments, the versions, and what changes every program."""
    device = device_of(args)
    return {
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "cpu": _describe_cpu() if device.platform == "cpu" else None,
        "processes": jax.process_count(),
        "jax": jax.__version__,
        "tdjax": sys.modules["tdjax"].__version__,
        "flags": [os.environ.get(n, "") for n in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
        "precision": getattr(jax.config, "jax_default_matmul_precision", None),
    }


def _describe_cpu() -> str:
    """The model, and the cores that this process may use."""
    can_tell = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if can_tell else os.cpu_count()
    return f"{cores} cores of {_cpu_model()}"


@functools.cache
def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _placement(x: jax.Array) -> str | int:
    """How an array is split over a mesh, or over how many devices otherwise."""
    sharding = x.sharding
    if isinstance(sharding, NamedSharding):
        return f"{sharding.spec} of {_mesh(sharding.mesh)}"
    return len(sharding.device_set)


def _mesh(mesh) -> str:
    """The names, sizes and kinds of its axes."""
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
    return ", ".join(f"{name}={size} {kind}" for name, size, kind in axes)


def _fingerprint(program, args) -> str:
    program = jax.make_jaxpr(program)(*args)
    # Functions inside of a jaxpr are printed with their addresses.
    text = re.sub(r" at 0x[0-9a-f]+", "", str(program))
    fingerprint = hashlib.sha256(text.encode())
    for constant in constants(program):
        fingerprint.update(_as_bytes(constant))
    return fingerprint.hexdigest()


def _as_bytes(constant: Any) -> bytes:
    if jnp.issubdtype(constant.dtype, jax.dtypes.extended):
        constant = jax.random.key_data(constant)
    if not is_concrete(constant):  # Other processes hold parts of it.
        constant = constant.addressable_data(0)
    return np.asarray(constant).tobytes()
