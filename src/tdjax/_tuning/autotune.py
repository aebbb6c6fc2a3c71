"""Measure the lowerings on this device, and take the fastest that agrees."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from tdjax._checks import describe, is_array, is_concrete, leaves_by_path
from tdjax._jaxprs import constants
from tdjax._steps.axes import flatten_inputs, time_size
from tdjax._steps.lowering import Lowering
from tdjax._steps.mesh import devices_of_time
from tdjax._steps.transform import Distributed, P, R, time_distributed
from tdjax._tuning import cache
from tdjax._tuning.candidates import (
    Candidate,
    list_candidates,
    with_gradient,
)
from tdjax._tuning.processes import agreed_text, is_first, together
from tdjax._tuning.report import progress_bar
from tdjax._tuning.result import Tuning
from tdjax._tuning.search import Limits, agree, choose, find_reference, measure_all
from tdjax._tuning.settings import Settings


def autotune(
    fun: Callable[P, R],
    *args: Any,
    in_axes: Any = 1,
    out_axes: Any = 1,
    capacity: int | None = None,
    argnums: int | Sequence[int] | None = None,
    budget: int | float = 30.0,
    memory_limit: int | None = None,
    tolerance: int | float | None = None,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    cache: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Tuning[Distributed[P, R]]:
    """Finds the fastest lowering of `time_distributed(fun)` for these inputs.

    Compiles the lowerings (`method`, `chunk_size`, `unroll`, `remat`), compares the
    results of each with those of `method="vmap"`, and times those that agree, in turn,
    on the device of the inputs. `"fold"` is only taken if the program shows that it
    never mixes the examples of a batch. Of several processes, all must call it: they
    take what process 0 has measured. See docs/tuning.md.

    Args:
      fun: a function of one step, or what `time_distributed` returned. The options of
        the latter are kept, and its lowering is one of the candidates.
      *args: the arguments of a call, real data if you can.
      in_axes, out_axes, capacity: as in `time_distributed`; only for a function of one
        step.
      argnums: None to time the call alone; or the positions of the arguments to
        differentiate by, as in `jax.grad`, to time call and gradient together.
      budget: seconds for everything. A compilation that has begun is finished; none is
        started that is unlikely to finish in time.
      memory_limit: bytes of temporary memory that the compiled program may use, by
        XLA's analysis, without inputs and results.
      tolerance: the largest deviation from the reference, relative to the largest
        value of the result. By default 1e-10 for float64, 2e-4 for float32 on a CPU and
        3e-2 elsewhere; for bfloat16 (3e-2) and float16 (5e-3) at least twice the
        reference's own deviation from float32.
      candidates: the options to try instead of the default list, as mappings. The
        reference is measured too.
      cache: a folder that keeps results, for any number of functions and processes.
      **kwargs: keyword arguments of the call, such as `mask`.

    Returns:
      A `Tuning`: `.tuned` is `time_distributed(fun)` with the best options, `.options`
      are these options, `.show()` prints all candidates.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if a number is out of range, an option is given twice, `cache` is not
        a folder, or no lowering fits `memory_limit`.

    Example:
      >>> import jax, jax.numpy as jnp, tdjax
      >>> params = tdjax.init_dense(jax.random.key(0), 3, 5)
      >>> x = jnp.ones((2, 4, 3))
      >>> head = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1))
      >>> result = tdjax.autotune(head, params, x, budget=1)
      >>> result.tuned(params, x).shape
      (2, 4, 5)
    """
    over_time = _over_time(fun, in_axes, out_axes, capacity)
    make = lambda lowering: dataclasses.replace(over_time, lowering=lowering)
    options = over_time.lowering, over_time.in_axes
    subject = Subject(*options, make, make, (), over_time.sharding)
    settings = Settings(argnums, budget, memory_limit, tolerance, candidates, cache)
    return tune(subject, args, kwargs, settings)


def _over_time(fun, in_axes, out_axes, capacity) -> Distributed:
    given = {"in_axes": in_axes, "out_axes": out_axes, "capacity": capacity}
    if not isinstance(fun, Distributed):
        _refuse_wrapped(fun)
        return cast(Distributed, time_distributed(fun, **given))
    defaults = {"in_axes": 1, "out_axes": 1, "capacity": None}
    twice = {name: given[name] for name in given if given[name] != defaults[name]}
    if twice:
        raise ValueError(
            f"{', '.join(twice)} must be given to time_distributed only, got {twice} "
            "for a function that it has returned. Leave them out."
        )
    return fun


def _refuse_wrapped(fun: Any) -> None:
    """Refuses what has a time axis already, inside of `jit`, `partial` or a method."""
    inner = fun
    while inner is not None:
        is_partial = isinstance(inner, functools.partial)
        inner = inner.func if is_partial else getattr(inner, "__wrapped__", None)
        if isinstance(inner, Distributed):
            raise ValueError(
                "fun must be a function of one step, or what time_distributed "
                f"returned; got {describe(fun)} around the latter, which would map "
                "over a second time axis. Give it as it is, with all arguments: "
                "autotune(head, params, x); of a method, tune the function inside."
            )


class Subject(NamedTuple):
    """What is tuned."""

    base: Lowering  # The one that it has now.
    in_axes: Any
    make: Callable[[Lowering], Any]  # What the user gets back.
    program: Callable[[Lowering], Callable[..., Any]]  # The function to measure.
    variables: tuple = ()  # Arguments of the program before the inputs.
    sharding: PartitionSpec | None = None  # Of the inputs.


def tune(
    subject: Subject, inputs: tuple, kwargs: dict[str, Any], settings: Settings
) -> Tuning:
    """Measures the candidates of a subject, or finds them in the cache."""
    if jax.config.jax_disable_jit:  # pyright: ignore
        raise ValueError(
            "autotune measures compiled programs, and jax_disable_jit is on. Switch it "
            "off: with jax.disable_jit(False)."
        )
    limits = Limits(settings.budget, settings.memory_limit, settings.tolerance)
    _require_arrays("variables", subject.variables)
    _require_arrays("args", inputs)
    timesteps = time_size(flatten_inputs(inputs, subject.in_axes))
    if timesteps < 1:
        raise ValueError("args must have steps to measure, got 0 steps.")
    args = jax.tree.map(jnp.asarray, (*subject.variables, *inputs))
    candidates = list_candidates(
        subject.base,
        subject.base.capacity or timesteps // devices_of_time(subject.sharding),
        settings.argnums is not None,
        settings.candidates,
    )
    argnums = settings.positions(args)
    program_of, others = _with_keywords(subject.program, kwargs)
    args = *args, *others
    reference = program_of(candidates[0].lowering)
    try:
        about = together(
            lambda: _about(reference, args, argnums, subject, candidates, limits)
        )
    except Exception as error:
        # The reference may fail where what was given works.
        if subject.base.method == "fold":
            error.add_note(_OTHER_FUNCTION)
        raise
    folder = settings.folder()
    program, args = _program_to_measure(program_of, reference, args, argnums)
    found = cache.load(folder, about) if folder and is_first() else None
    stored = _of_first_process(found)
    compared_with = stored and find_reference(stored.candidates)
    if stored and compared_with:
        pair = compared_with.options, stored.options
        reference, best = (dataclasses.replace(subject.base, **x) for x in pair)
        if agree(reference, best, program, args, limits):
            tuned = subject.make(best)
            return dataclasses.replace(stored, tuned=tuned, from_cache=True)
    _measure(candidates, program, args, limits)
    _refuse_another_function(subject.base, candidates)
    tuning = Tuning(subject.make(choose(candidates).lowering), candidates, about)
    if folder and is_first():
        cache.store(folder, tuning)
    return tuning


def _of_first_process(found: Tuning | None) -> Tuning | None:
    """What process 0 found in its cache."""
    text = agreed_text(found and found.to_json())
    return found if is_first() or text is None else Tuning.from_json(text)


def _require_arrays(name: str, tree: Any) -> None:
    """Refuses what can't be an argument of a compiled function."""
    for path, x in leaves_by_path(tree).items():
        if isinstance(x, Tracer | jax.ShapeDtypeStruct):
            raise TypeError(
                "autotune runs the function, so its arguments must be arrays, outside "
                f"of jit, got {describe(x)}."
            )
        dtype = x.dtype if is_array(x) else np.result_type(type(x))
        kinds = np.bool_, np.number, jax.dtypes.extended
        if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            raise TypeError(
                f"{name} must hold arrays and numbers, which autotune compiles a "
                f"program for, got {describe(x)} at {name}{path}. Leave it out: fun "
                "can close over it, and a module can hold it."
            )


def _with_keywords(program_of: Callable, kwargs: dict[str, Any]) -> tuple[Any, tuple]:
    """`(program_of, args)` with keyword arguments, `args` behind the other arguments.

    They are closed over, so that the values of a mask are known. Arrays of several
    processes can't be: they become an argument.
    """
    for name, x in kwargs.items():
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(x)):
            raise TypeError(f"{name} must hold arrays with values, got {describe(x)}.")
    is_whole = lambda x: not isinstance(x, jax.Array) or is_concrete(x)
    closed = {k: x for k, x in kwargs.items() if all(map(is_whole, jax.tree.leaves(x)))}
    passed = {name: x for name, x in kwargs.items() if name not in closed}
    bound = lambda lowering: functools.partial(program_of(lowering), **closed)
    if not passed:
        return bound, ()

    def with_passed(lowering):
        return lambda *args: bound(lowering)(*args[:-1], **args[-1])

    return with_passed, (passed,)


def _program_to_measure(program_of, reference, args, argnums) -> tuple[Any, Any]:
    """`(program, args)`: the call, or the call and its gradient, of a lowering."""
    if not argnums:
        return program_of, args
    differentiate, args = with_gradient(reference, argnums, args)
    return lambda lowering: differentiate(program_of(lowering)), args


def _measure(candidates: list[Candidate], program, args, limits: Limits) -> None:
    with progress_bar(len(candidates)) as report:
        measure_all(candidates, program, args, limits, report)
    if not any(candidate.measured for candidate in candidates):
        used = [c.temporary_bytes for c in candidates if c.temporary_bytes]
        raise ValueError(
            f"memory_limit={limits.memory_limit} bytes is too small for every lowering "
            f"tried within budget={limits.budget} s; the least was "
            f"{min(used, default=None)} bytes."
        )


_OTHER_FUNCTION = (
    "What is given with method='fold' must be the same function under method='vmap', "
    "with which autotune compares every lowering. BatchNorm and Dropout in training "
    "are not: their statistics and their noise are others. Tune for inference "
    "(train=False, model.eval()), or give the layer with method='vmap'."
)


def _refuse_another_function(base: Lowering, candidates: list[Candidate]) -> None:
    """Refuses a given `fold` that the comparison has shown to be something else."""
    if base.method != "fold":
        return
    in_one_block = dataclasses.replace(base, chunk_size=None, unroll=1, remat=False)
    for candidate in candidates:
        is_given = candidate.lowering == in_one_block
        if is_given and candidate.verdict.startswith("other"):
            raise ValueError(f"{_OTHER_FUNCTION} Got {candidate.verdict}.")


def _about(
    reference, args, argnums, subject: Subject, candidates, limits: Limits
) -> dict[str, Any]:
    """What the measurements depend on, as JSON: the key of an entry in the cache."""
    device = _device(args)
    about = {
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "cores": os.cpu_count() if device.platform == "cpu" else None,
        "jax": jax.__version__,
        "tdjax": sys.modules["tdjax"].__version__,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "precision": getattr(jax.config, "jax_default_matmul_precision", None),
        "shapes": [str(jax.typeof(x)) for x in jax.tree.leaves(args)],
        "shardings": [_placement(x) for x in jax.tree.leaves(args)],
        "mesh": _mesh(jax.sharding.get_abstract_mesh()),
        "sharding": str(subject.sharding),
        "processes": jax.process_count(),
        "program": _fingerprint(reference, args),
        "argnums": argnums,
        "method": subject.base.method,
        "candidates": [candidate.options for candidate in candidates],
        "budget": limits.budget,
        "memory_limit": limits.memory_limit,
        "tolerance": limits.tolerance,
    }
    return json.loads(json.dumps(about))


def _device(args) -> Any:
    arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    devices = sorted(arrays[0].devices(), key=lambda d: d.id) if arrays else []
    return devices[0] if devices else jax.devices()[0]


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


def _fingerprint(reference, args) -> str:
    program = jax.make_jaxpr(reference)(*args)
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
