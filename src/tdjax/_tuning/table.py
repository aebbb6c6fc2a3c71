"""Which options are in effect at which place: tables, and contexts that hold them."""

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from tdjax._checks import is_array, is_concrete, warn
from tdjax._steps import places
from tdjax._steps.axes import partition
from tdjax._steps.fold import watch_fold
from tdjax._steps.lowering import AUTO, Lowering, OnPlatform
from tdjax._steps.mesh import devices_of_time
from tdjax._steps.places import Place, value_text
from tdjax._tuning.candidates import OPTIONS, change
from tdjax._tuning.clock import device_of
from tdjax._tuning.identity import Identity
from tdjax._tuning.independence import find_mixing

T = TypeVar("T")
_DEVICE = ', "device": '
_log = logging.getLogger("tdjax")
Options = dict[str, Any]


def key_of(place: Place) -> str:
    """What a place is known by, in every process: what is called, on what and where.

    Whether the call is differentiated is not known while it is traced.
    """
    lowering, sharding = plain_if_auto(place.lowering), place.sharding
    if sharding is not None:  # A chunk is one of the steps of a device.
        sharding = f"{sharding}, time over {devices_of_time(sharding)}"
    names = "axis_name", "spmd_axis_name", "capacity"
    fields = {
        "call": place.text(),
        "args": value_text(place.args, {}),
        "keywords": value_text(place.kwargs, {}),
        "axes": f"{place.in_axes} -> {place.out_axes}",
        "fixed": value_text([*place.fixed, sharding], {}),
        "named": [str(getattr(lowering, name)) for name in names],
        "given": {name: getattr(lowering, name) for name in OPTIONS},
        "device": device_kind((place.args, place.kwargs)),
    }
    return json.dumps(fields)


def anywhere(key: str) -> str:
    """A key without its last field, the device."""
    return key.rpartition(_DEVICE)[0]


def plain_if_auto(lowering: Lowering) -> Lowering:
    """The reference in place of `method="auto"`."""
    return change(lowering) if lowering.method == AUTO else lowering


def device_kind(args: Any = ()) -> str:
    """The kind of the device of arrays; of tracers, that where arrays go by default."""
    is_known = lambda x: isinstance(x, jax.Array) and is_concrete(x)
    known = [*filter(is_known, jax.tree.leaves(args))]
    return (device_of(known) if known else default_device()).device_kind


def default_device() -> Any:
    """Where arrays go by default."""
    default = jax.config.jax_default_device  # pyright: ignore
    is_name = default is None or isinstance(default, str)
    return jax.devices(default)[0] if is_name else default


class Table:
    """A resolver that looks places up; others go to the one that was in effect before.

    Attributes:
      of_auto: the options of places with `method="auto"`, by `key_of`.
      of_all: the options of places with whatever options, in a tuned model, on
        whatever device it runs.
    """

    def __init__(
        self,
        of_auto: Mapping[str, Options],
        of_all: Mapping[str, Options] | None = None,
        outer: places.Resolver | None = None,
    ):
        self.of_auto: dict[str, Options] = dict(of_auto)
        self.outer = outer
        self.of_all = {anywhere(key): o for key, o in (of_all or {}).items()}
        self._content = str(self.of_auto), str(self.of_all), outer

    @property
    def asks_all(self) -> bool:
        return bool(self.of_all) or (self.outer is not None and self.outer.asks_all)

    def run(self, place: Place, run: Callable[[Lowering], T]) -> T:
        key, is_auto = key_of(place), place.lowering.method == AUTO
        options = self.of_all.get(anywhere(key))
        options = options or (self.of_auto.get(key) if is_auto else None)
        if options is not None:
            _log.debug("%s: in a table, %s", place.name, options)
            return run_with(options, place, run)
        if is_auto:
            _log.debug("%s: not in this table, %s", place.name, key)
        return self.run_unknown(key, place, run)

    def run_unknown(self, key: str, place: Place, run: Callable[[Lowering], T]) -> T:
        """What is not in the table."""
        del key
        if self.outer is not None and (self.outer.asks_all or _is_auto(place)):
            return self.outer.run(place, run)
        resolver = places.default_resolver() if _is_auto(place) else None
        return resolver.run(place, run) if resolver else run(place.lowering)

    # Part of the keys of JAX's caches: the same content is the same program.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)


def _is_auto(place: Place) -> bool:
    return place.lowering.method == AUTO


# Of the code of each place, by its key, what in it may mix examples, or None.
_shown: dict[str, tuple[Identity, str | None]] = {}


def run_with(
    options: Options,
    place: Place,
    run: Callable[[Lowering], T],
    platform: str | None = None,
) -> T:
    """`run(lowering)` with these options; `"fold"` only if it is shown to be right.

    With `platform`, only where the program is compiled for it.

    The same holds where `"fold"` was given, and others are as good only if it is. A
    table knows layers and functions by their names, and they may have changed. What was
    shown in this process holds as long as the code is the same.
    """
    plain = plain_if_auto(place.lowering)
    lowering = change(plain, **options)
    chosen = lowering
    if platform is not None:
        chosen = OnPlatform(**vars(place.lowering), platform=platform, chosen=lowering)
    if _examples_together(lowering) == _examples_together(plain):
        return run(chosen)
    code = place.called, place.args, place.kwargs, place.depends()
    key, identity = key_of(place), Identity(code)
    known, reason = _shown.get(key, (None, None))
    if known != identity:
        folded = lowering if lowering.method == "fold" else plain
        reason = _why_not_folded(place, folded)
        _shown[key] = identity, reason
    if reason is None:
        return run(chosen)
    warn(
        f"{place.name} may depend on the rest of the batch under method='fold': "
        f"{reason}. The tuning in effect is left out, and it is called as it was "
        "written. If it was written with 'fold', write 'vmap', and tune it again.",
    )
    return run(plain)


def _examples_together(lowering: Lowering) -> Any:
    """Which examples one call has: a step's own, or those of the steps of a block."""
    # A block of one step is the same program under every method.
    folds = lowering.method == "fold" and lowering.chunk_size != 1
    return lowering.chunk_size if folds else "of one step"


def _why_not_folded(place: Place, lowering: Lowering) -> str | None:
    """What in a place may mix examples, if it is folded; None if nothing does.

    The place is traced by itself, so that the call leaves nothing behind.
    """
    reasons: list[str | None] = []
    try:
        of, variables = place.program()
        everything = (variables, place.args, place.kwargs)
        chosen = [*map(is_array, jax.tree.leaves(everything))]
        arrays, rebuild = partition(everything, chosen)

        def call(arrays):
            variables, args, kwargs = rebuild(arrays)
            return of(lowering)(*variables, *args, **kwargs)

        watch = lambda *fold: reasons.append(find_mixing(*fold))
        with places.in_effect(None), watch_fold(watch):
            jax.eval_shape(call, arrays)
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        return f"it can't be traced by itself ({type(error).__name__}: {line})"
    return reasons[0] if reasons else None  # Or nothing was folded.


@contextlib.contextmanager
def in_effect(
    of_auto: Mapping[str, Options], of_all: Mapping[str, Options] | None = None
) -> Iterator[None]:
    """Puts tables in effect, before those that are."""
    with entered(Table(of_auto, of_all, places.in_effect.value)):
        yield


def entered(resolver: places.Resolver) -> Any:
    """A context with this resolver; part of the keys of JAX's caches."""
    return places.in_effect(resolver)


class Contexts(threading.local):
    """The contexts that each thread has entered, the last one at the end."""

    def __init__(self):
        self.stack: list[Any] = []


_contexts = Contexts()


def enter(of_auto: Mapping[str, Options]) -> None:
    """`in_effect`, for a class with `__enter__` and `__exit__`."""
    context = in_effect(of_auto)
    context.__enter__()
    _contexts.stack.append(context)


def leave(*error: Any) -> None:
    """The other half of `enter`."""
    _contexts.stack.pop().__exit__(*error)
