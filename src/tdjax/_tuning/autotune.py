"""Measure the lowerings on this device, and take the fastest that agrees."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

from tdjax._checks import adapter_of, describe, is_concrete
from tdjax._steps import places
from tdjax._steps.lowering import Lowering
from tdjax._steps.mesh import devices_of_time
from tdjax._steps.places import Place
from tdjax._steps.transform import Distributed, P, R, time_distributed
from tdjax._tuning import cache
from tdjax._tuning.candidates import Candidate, choose, list_candidates
from tdjax._tuning.going_on import merge, take_over, to_go_on_with
from tdjax._tuning.inputs import check_measurable
from tdjax._tuning.key import describe_measurements
from tdjax._tuning.processes import agreed_text, in_all, is_first, together
from tdjax._tuning.programs import with_gradient
from tdjax._tuning.report import progress_bar
from tdjax._tuning.result import Tuning
from tdjax._tuning.search import (
    MAY_CRASH,
    Limits,
    agree,
    find_reference,
    measure_all,
)
from tdjax._tuning.settings import Settings, refuse_lowering
from tdjax._tuning.table import key_of, plain_if_auto


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
    compiler_options: Sequence[Mapping[str, Any]] = (),
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
      *args: the arguments of a call over time, such as params and x `(batch, time,
        features)`: arrays and numbers, real data if you can.
      in_axes, out_axes, capacity: as in `time_distributed`; only if `fun` is a function
        of one step.
      argnums: None to time the call alone; or the positions of the arguments to
        differentiate by, as in `jax.grad`, to time call and gradient together. The
        gradient is of all results, with random cotangents.
      budget: seconds for everything. A compilation that has begun is finished; none is
        started that is unlikely to finish in time.
      memory_limit: bytes of temporary memory that the compiled program may use, by
        XLA's analysis, without inputs and results.
      tolerance: the largest deviation from the reference, relative to the largest
        value of the result. By default 1e-10 for float64, 2e-4 for float32 on a CPU and
        3e-2 elsewhere; for bfloat16 (3e-2) and float16 (5e-3) at least twice the
        reference's own deviation from float32.
      candidates: the options to try instead of the default list, as mappings, such as
        `[{"chunk_size": 4}, {"method": "fold"}]`. The reference, and the lowering of
        what `time_distributed` returned, are measured too.
      compiler_options: dicts of options of the compiler, as `jax.jit` takes them. The
        two fastest lowerings and the default are tried with each.
      cache: a folder that keeps results, for any number of functions and processes. An
        unfinished search goes on at the next call.
      **kwargs: keyword arguments of the call, such as `mask`. One of a name above is
        bound with `functools.partial`.

    Returns:
      A `Tuning`: `.tuned` is `time_distributed(fun)` with the best options, `.options`
      are these options, `.compiler_options` those for `jax.jit`, `.show()` prints all
      candidates.

    Raises:
      TypeError: if an argument is of the wrong kind, or inside of `jit`.
      ValueError: if a number is out of range, an option is given twice, `argnums`
        points at no float, there are no steps, `cache` is not a folder, no lowering
        fits the memory or all may crash, a given `"fold"` is another function than
        `"vmap"`, or `jax_disable_jit` is on.
      Exception: what `fun` raises under `"vmap"`.

    Warns:
      UserWarning: if a file of the cache is damaged or can't be written.

    Example:
      >>> import jax, jax.numpy as jnp, tdjax
      >>> params = tdjax.init_dense(jax.random.key(0), 3, 5)
      >>> x, options = jnp.ones((2, 4, 3)), {"argnums": 0, "budget": 1}
      >>> result = tdjax.autotune(tdjax.dense, params, x, in_axes=(None, 1), **options)
      >>> result.tuned(params, x).shape
      (2, 4, 5)
    """
    refuse_lowering(getattr(fun, "fun", fun), kwargs)
    over_time = _over_time(fun, in_axes, out_axes, capacity)
    make = lambda lowering: dataclasses.replace(over_time, lowering=lowering)
    limits = budget, memory_limit, tolerance
    settings = Settings(argnums, *limits, candidates, cache, compiler_options)
    return tune(over_time.place(args, kwargs), make, settings)


def _over_time(fun, in_axes, out_axes, capacity) -> Distributed:
    given = {"in_axes": in_axes, "out_axes": out_axes, "capacity": capacity}
    if not isinstance(fun, Distributed):
        _refuse_layer(fun)
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


def _refuse_layer(fun: Any) -> None:
    adapter = adapter_of(fun)
    if adapter is not None:
        theirs = "a Flax module" if adapter == "tdjax.keras" else "it"
        module = adapter.replace("keras", "linen")
        raise TypeError(
            f"fun must be a function of arrays, got {describe(fun)}. Use "
            f"{module}.autotune for {theirs}."
        )


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


def tune(
    place: Place,
    make: Callable[[Lowering], Any],
    settings: Settings,
    earlier: Tuning | None = None,
) -> Tuning:
    """Measures the candidates of a place, or finds them in the cache.

    `make(lowering)` is what the user gets back; `earlier` is an unfinished search.
    """
    limits = Limits(settings.budget, settings.memory_limit, settings.tolerance)
    program, base = place.program(), plain_if_auto(place.lowering)
    timesteps = check_measurable(place, program)
    args = jax.tree.map(jnp.asarray, (*program.variables, *place.args))
    candidates = list_candidates(
        base,
        base.capacity or timesteps // devices_of_time(place.sharding),
        settings.argnums is not None,
        settings.candidates,
    )
    argnums = settings.positions(args)
    of = lambda lowering: _as_given(program.of(lowering))
    program_of, others = _with_keywords(of, place.kwargs)
    args = *args, *others
    reference = candidates[0]
    try:
        program_of, args = _program_to_measure(
            program_of, program_of(reference.lowering), args, argnums
        )
        measured = program_of(reference), args, argnums
        about = together(
            lambda: describe_measurements(
                *measured, candidates, settings, place.sharding
            )
        )
    except Exception as error:
        # The reference may fail where what was given works.
        if base.method == "fold":
            error.add_note(_OTHER_FUNCTION)
        raise
    folder = settings.folder()
    names: dict[str, Any] = {"name": place.name, "key": key_of(place)}
    stored = _recall(folder, about, earlier)
    if stored and not _still_agrees(stored, base, program_of, args, limits):
        stored = None
    if stored and stored.finished:
        given = {"tuned": make(dataclasses.replace(base, **stored.options)), **names}
        return dataclasses.replace(stored, **given, from_cache=True)
    finished = _measure(candidates, stored, program_of, args, limits, settings)
    _refuse_another_function(base, candidates)
    tuned = make(choose(candidates).lowering)
    tuning = Tuning(tuned, candidates, about, finished=finished, **names)
    if folder and is_first():
        cache.store(folder, tuning)
    return tuning


def _as_given(fun: Callable) -> Callable:
    """`fun`, a place with a lowering, without a question for another one."""
    if places.in_effect.value is None:
        return fun

    def call(*args, **kwargs):
        with places.in_effect(places.FirstAsGiven(places.in_effect.value)):
            return fun(*args, **kwargs)

    return call


def _recall(
    folder: Path | None, about: dict[str, Any], earlier: Tuning | None
) -> Tuning | None:
    """What is known of the same measurements: from the cache, or an earlier search."""
    found = cache.load(folder, about) if folder and is_first() else None
    found = _of_first_process(found)
    if earlier is not None and in_all(earlier.about == about):
        return found or earlier
    return found


def _still_agrees(
    stored: Tuning, base: Lowering, program_of: Callable, args: tuple, limits: Limits
) -> bool:
    """Whether what was chosen gives the results of the reference, on these inputs."""
    reference = find_reference(stored.candidates)
    if reference is None:
        return not stored.finished
    of = dataclasses.replace(base, **reference.options)
    chosen = dataclasses.replace(base, **stored.options)
    known = dataclasses.replace(stored.best, lowering=chosen)
    return agree(of, known, program_of, args, limits)


def _of_first_process(found: Tuning | None) -> Tuning | None:
    """What process 0 found in its cache."""
    text = agreed_text(found and found.to_json())
    return found if is_first() or text is None else Tuning.from_json(text)


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
    """`(program_of, args)`: the call, or the call and its gradient, of a candidate."""
    of = lambda candidate: program_of(candidate.lowering)
    if not argnums:
        return of, args
    differentiate, args = with_gradient(reference, argnums, args)
    return lambda candidate: differentiate(of(candidate)), args


def _measure(
    candidates: list[Candidate],
    stored: Tuning | None,
    program_of: Callable,
    args: tuple,
    limits: Limits,
    settings: Settings,
) -> bool:
    """Measures in place, after what is stored; whether the search is finished."""
    waiting, options = candidates, settings.compiler_options
    if stored:
        take_over(candidates, stored.candidates)
        waiting = to_go_on_with(candidates, stored.best)
        # Those that were tried are candidates now.
        were_tried = any(c.compiler_options for c in stored.candidates)
        options = [] if were_tried else options
    with progress_bar(len(waiting)) as report:
        given = waiting, program_of, args, limits, report, settings.interrupted, options
        # The reference, and of a search that goes on, one that is new.
        finished = measure_all(*given, least=2 if stored else 1)
    if stored:
        finished = merge(candidates, waiting) and finished
    require_measured(candidates, limits)
    return finished


def require_measured(candidates: list[Candidate], limits: Limits) -> None:
    """Refuses a search in which nothing fits the memory."""
    if any(candidate.measured for candidate in candidates):
        return
    if any(candidate.verdict == MAY_CRASH for candidate in candidates):
        raise ValueError(
            f"fun has arrays of 7 axes or more, and JAX {jax.__version__} may crash on "
            "a program of it (jax-ml/jax issue 39257). Take JAX 0.12 or later, or "
            "fewer axes. Without the tuner, jax.jit(..., "
            "compiler_options={'xla_cpu_experimental_ynn_fusion_type': ''}) is safe."
        )
    if limits.memory_limit is None:
        raise ValueError(
            f"fun must fit the memory under some lowering; within budget="
            f"{limits.budget} s, no vmap lowering that was tried did. Give a larger "
            "budget=, a smaller chunk_size in candidates=, or smaller inputs."
        )
    used = [c.temporary_bytes for c in candidates if c.temporary_bytes]
    raise ValueError(
        f"memory_limit={limits.memory_limit} bytes is too small for every lowering "
        f"tried within budget={limits.budget} s; the least was "
        f"{min(used, default=None)} bytes."
    )


_OTHER_FUNCTION = (
    "What is given with method='fold' must be the same function under method='vmap', "
    "with which autotune compares every lowering. BatchNorm and Dropout in training "
    "are not: their statistics and their noise are those of all steps. Then there is "
    "nothing to choose: keep 'fold' as it is. Or give the layer with method='vmap', if "
    "its steps may have their own."
)


def _refuse_another_function(base: Lowering, candidates: list[Candidate]) -> None:
    """Refuses a given `fold` that the comparison has shown to be something else."""
    if base.method != "fold":
        return
    in_one_block = dataclasses.replace(base, chunk_size=None, unroll=1, remat=False)
    for candidate in candidates:
        is_given = candidate.lowering == in_one_block
        if is_given and candidate.verdict.startswith("other"):
            raise ValueError(f"{_OTHER_FUNCTION} Measured: {candidate.verdict}.")
