"""Whole models: every place where a layer is applied to all steps, tuned by itself.

1. The model is called once, as it is, and a resolver records the places (`Recorder`)
   and the arrays that reach them. Inside of `nn.scan` and its like there are no arrays,
   only their types: then random ones take their place.
2. Each place is tuned like a single layer, inner ones first.
3. The model is compiled as it was given and with all that was found, compared, and
   timed in turn. If it is not faster, it stays as it was given.
"""

import collections
import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.interpreters import ad

from tdjax._checks import describe, leaves_by_path
from tdjax._steps import places
from tdjax._steps.axes import partition
from tdjax._steps.lowering import Lowering
from tdjax._steps.places import Place, Program
from tdjax._tuning.autotune import require_measured, tune
from tdjax._tuning.candidates import TUNED, Candidate, choose
from tdjax._tuning.deviations import is_float
from tdjax._tuning.inputs import require_arrays
from tdjax._tuning.key import describe_machine
from tdjax._tuning.programs import with_gradient
from tdjax._tuning.report import progress_bar
from tdjax._tuning.result import Tuning
from tdjax._tuning.search import Limits, measure_all
from tdjax._tuning.settings import Settings
from tdjax._tuning.table import Options, Table, anywhere, in_effect, key_of

T = TypeVar("T")


class Model(NamedTuple):
    """A model as a function, `call(*args)`, and `make(options by key)`: it, tuned.

    `paths` are those of the layers of the last call, by their identity, if known.
    """

    name: str
    call: Callable[..., Any]
    args: tuple
    make: Callable[[dict[str, Options]], Any]
    paths: Mapping[int, str] = {}


class _Recorder:
    """A resolver that shows the places to `note`, and changes nothing."""

    asks_all = True

    def __init__(self, note: Callable[[Place], None]):
        self.note, self._outer = note, Table({}, outer=places.in_effect.value)

    def run(self, place: Place, run: Callable[[Lowering], T]) -> T:
        self.note(place)
        return self._outer.run(place, run)


@contextlib.contextmanager
def _noting(note: Callable[[Place], None]) -> Iterator[None]:
    """Shows the places to `note`."""
    recorder = _Recorder(note)
    try:
        with places.in_effect(recorder):
            yield
    finally:
        # JAX' caches keep the recorder, which is to keep no arrays.
        recorder.note = lambda place: None


def record(call: Callable[[], Any]) -> list[Place]:
    """The places of a call, in their order."""
    found: list[Place] = []

    def note(place: Place) -> None:
        program = place.program()  # Later, the variables may be gone.
        found.append(place._replace(program=lambda: program))

    with _noting(note):
        call()
    return found


def tune_model_or_layer(
    model: Model, tune_layer: Callable[[], Tuning], settings: Settings
) -> Tuning:
    """Tunes a module that applies layers to all steps, or is itself one for a step."""
    _refuse_flags(model.args[1:])
    failure = None
    try:
        if _has_places(model):
            return tune_model(model, settings)
    except _NoPlacesError as error:
        failure = error.__cause__
    try:
        tuning = tune_layer()
        # What is returned is the module in a wrapper: the table says so.
        return dataclasses.replace(tuning, name=f"TimeDistributed({tuning.name})")
    except Exception as error:
        if failure is not None:
            line = (str(failure).splitlines() or [""])[0]
            error.add_note(
                "The module was taken for a layer for one step, since as a model on "
                f"all steps it failed: {type(failure).__name__}: {line}"
            )
        raise


def _refuse_flags(args: tuple) -> None:
    for path, x in leaves_by_path(args).items():
        if isinstance(x, bool | str):
            raise TypeError(
                f"args must be arrays, got {describe(x)} at args{path}. Give flags by "
                "their names, as in autotune(..., train=False)."
            )


class _NoPlacesError(Exception):
    """A module failed on all steps before it came to a layer over time."""


def _has_places(model: Model) -> bool:
    found: list[str] = []
    try:
        with _noting(lambda place: found.append(place.name)):
            jax.eval_shape(model.call, *model.args)
    except Exception as error:
        if not found:
            raise _NoPlacesError from error  # As a layer for one step may do.
        error.add_note(
            "autotune called the module on all steps, as a model with layers over time "
            "inside. If it is for one step, give it in a TimeDistributed."
        )
        raise
    return bool(found)


def record_gradient(model: Model, argnums: list[int]) -> dict[str, list[bool]]:
    """By key, whether a gradient reaches the arguments of a place."""
    chosen = [
        i in argnums and is_float(x)
        for i, arg in enumerate(model.args)
        for x in jax.tree.leaves(arg)
    ]
    primals, rebuild = partition(model.args, chosen)

    def derive(primals):
        call = lambda primals: model.call(*rebuild(primals))
        return jax.jvp(call, (primals,), (primals,))

    reached: dict[str, list[bool]] = {}

    def note(place: Place) -> None:
        is_reached = lambda arg: any(map(_is_reached, jax.tree.leaves(arg)))
        now = [is_reached(arg) for arg in place.args]
        key = anywhere(key_of(place))  # The device of tracers is not known.
        reached[key] = [*map(operator.or_, now, reached.get(key, now))]

    with _noting(note):
        jax.eval_shape(derive, primals)
    return reached


def _is_reached(x: Any) -> bool:
    return isinstance(x, ad.JVPTracer)


def tune_model(model: Model, settings: Settings) -> Tuning:
    """Tunes all places of a model, and then measures the whole."""
    limits = Limits(settings.budget, settings.memory_limit, settings.tolerance)
    require_arrays("args", model.args)
    model = model._replace(args=jax.tree.map(jnp.asarray, model.args))
    argnums = settings.positions(model.args)
    found, named = _find(model, argnums)
    tunings: dict[str, Tuning] = {}
    failures: dict[str, str] = {}
    # Inner places come after those around them, and are tuned before.
    for key, (place, positions) in reversed(found.items()):
        if settings.interrupted.is_set():
            failures[named[key]] = "interrupted before its turn"
            continue
        parts = len(found) - len(tunings) - len(failures) + 1  # One is for the whole.
        budget = max(limits.left() / parts, 1e-3)
        # Options of the compiler are tried with the whole: they act on all of it.
        changes = {"argnums": positions, "budget": budget, "compiler_options": ()}
        of_place = dataclasses.replace(settings, **changes)
        try:
            with in_effect({}, _changes(tunings)):
                given = with_arrays(place)._replace(name=named[key])
                tunings[key] = tune(given, lambda lowering: None, of_place)
        except KeyboardInterrupt:
            # It came before anything of this place was timed.
            if not tunings or jax.process_count() > 1:
                raise
            settings.interrupted.set()
            failures[named[key]] = "interrupted before it was measured"
        except Exception as error:
            # A layer may need what only its surroundings have; others may still work.
            line = (str(error).splitlines() or [""])[0]
            failures[named[key]] = f"{type(error).__name__}: {line}"
    changes, candidates = _changes(tunings), []
    finished = all(tuning.finished for tuning in tunings.values())
    finished &= not settings.interrupted.is_set()
    if (changes or settings.compiler_options) and not settings.interrupted.is_set():
        candidates = [Candidate(Lowering(), is_default=True)]
        candidates += [Candidate(TUNED)] if changes else []
        run = functools.partial(_measure_whole, model, argnums, candidates, changes)
        try:
            finished &= run(limits, settings)
        except KeyboardInterrupt:
            # Nothing was timed; the places that were tuned are not lost.
            if not changes or jax.process_count() > 1:
                raise
            finished, candidates = False, []
        if candidates and choose(candidates).lowering != TUNED:
            changes = {}
    return Tuning(
        model.make(changes),
        candidates,
        {**describe_machine(model.args), "argnums": argnums},
        finished=finished,
        name=model.name,
        places={tuning.name: tuning for tuning in reversed(tunings.values())},
        failures=failures,
    )


def _find(model: Model, argnums: list[int]) -> tuple[dict[str, Any], dict[str, str]]:
    """`({key: (place, argnums of its gradient)}, {key: name})`."""
    found = record(lambda: model.call(*model.args))
    path = lambda place: model.paths.get(id(place.called)) or place.name
    found = [place._replace(name=path(place)) for place in found]
    reached = record_gradient(model, argnums) if argnums else {}
    has_types = lambda place: _has_types((place.args, place.kwargs))
    chosen: dict[str, int] = {}
    for i, place in enumerate(found):
        first = chosen.setdefault(key_of(place), i)
        # One with arrays is better than one with types.
        if has_types(found[first]) and not has_types(place):
            chosen[key_of(place)] = i
    by_variables = 0 in argnums

    def of(key: str, place: Place) -> list[int] | None:
        # A rule for a derivative may have other places; then all are taken for reached.
        own = reached.get(anywhere(key), [True] * len(place.args))
        return _positions(place, by_variables, own) if argnums else None

    places = {key: (found[i], of(key, found[i])) for key, i in chosen.items()}
    return places, _names(found)


def _positions(
    place: Place, by_variables: bool, reached: list[bool]
) -> list[int] | None:
    """A place's gradient is by its variables, and by what depends on the model's."""
    variables = place.program().variables
    # Inside of other transformations it is not known what depends on what.
    is_wanted = lambda arg, is_reached: is_reached or _has_types(arg)
    wanted = [*[by_variables] * len(variables), *map(is_wanted, place.args, reached)]
    chosen = map(operator.and_, wanted, map(_has_floats, (*variables, *place.args)))
    return [i for i, is_chosen in enumerate(chosen) if is_chosen] or None


def _has_floats(tree: Any) -> bool:
    return any(map(is_float, jax.tree.leaves(tree)))


def _measure_whole(
    model: Model,
    argnums: list[int],
    candidates: list[Candidate],
    changes: dict[str, Options],
    limits: Limits,
    settings: Settings,
) -> bool:
    """Measures the model as it was given and with the changes."""

    def tuned(*args):
        with in_effect({}, changes):
            return model.call(*args)

    calls = lambda candidate: tuned if candidate.lowering == TUNED else model.call
    program_of, args = calls, model.args
    if argnums:
        differentiate, args = with_gradient(model.call, argnums, args)
        program_of = lambda candidate: differentiate(calls(candidate))
    with progress_bar(len(candidates)) as report:
        given = candidates, program_of, args, limits, report, settings.interrupted
        # Both, however short the time is: without them all was in vain.
        finished = measure_all(*given, settings.compiler_options, least=2)
    require_measured(candidates, limits)
    return finished


def _changes(tunings: dict[str, Tuning]) -> dict[str, Options]:
    """The options of places that are better than as they were given."""
    return {k: t.options for k, t in tunings.items() if not t.best.is_default}


def _has_types(tree: Any) -> bool:
    """Whether it has types in the place of arrays."""
    return any(map(_is_type, jax.tree.leaves(tree)))


def _names(found: list[Place]) -> dict[str, str]:
    """A name for each key: all names under which it was found."""
    names: dict[str, dict[str, None]] = {}
    for place in found:
        names.setdefault(key_of(place), {})[place.name] = None
    joined = {key: ", ".join(each) for key, each in names.items()}
    counts = collections.Counter[str]()
    for key, name in joined.items():
        counts[name] += 1
        joined[key] = f"{name} ({counts[name]})" if counts[name] > 1 else name
    return joined


def gradient_of_all(place: Place) -> list[int] | None:
    """The positions of all arguments that have a gradient."""
    args = (*place.program().variables, *place.args)
    return [i for i, arg in enumerate(args) if _has_floats(arg)] or None


def with_arrays(place: Place) -> Place:
    """A place with random arrays where it has only the types of arrays."""

    def program() -> Program:
        of, variables = place.program()
        return Program(of, jax.tree.map(_as_array, variables))

    kwargs = dict(place.kwargs)
    capacity = place.lowering.capacity
    if capacity is not None and _is_type(kwargs.get("mask")):
        mask = kwargs["mask"]
        kwargs["mask"] = jnp.arange(mask.size).reshape(mask.shape) < capacity
    return place._replace(
        program=program,
        args=jax.tree.map(_as_array, place.args),
        kwargs=jax.tree.map(_as_array, kwargs),
    )


def _is_type(x: Any) -> bool:
    return isinstance(x, Tracer)


def _as_array(x: Any) -> Any:
    """Uniform numbers between 0 and 1, as variances may be; zeros for integers."""
    if not _is_type(x):
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), x.shape)
    if is_float(x):
        return jax.random.uniform(jax.random.key(0), x.shape).astype(x.dtype)
    return jnp.full(x.shape, x.dtype == bool, x.dtype)
