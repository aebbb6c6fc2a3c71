"""Places: where a function or layer is applied to all steps, and who decides how.

A call with `method="auto"` asks the resolver in effect for its lowering. While a model
is tuned, or runs with the options that were found for it, every call does.
"""

import contextlib
import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jax.sharding import PartitionSpec

from tdjax._checks import is_array
from tdjax._steps.effect import in_effect as in_effect
from tdjax._steps.lowering import AUTO, Lowering

T = TypeVar("T")


class Program(NamedTuple):
    """A place as a function by itself: `of(lowering)(*variables, *args, **kwargs)`."""

    of: Callable[[Lowering], Callable[..., Any]]
    variables: tuple = ()


class Place(NamedTuple):
    """One call of a function or layer over all steps.

    `name` is for people; `text()` says what is called, the same in every process;
    `called` is the function or layer itself.
    `fixed` are the options of an adapter that no tuner changes, and `depends()` is what
    else the program of a call depends on.
    """

    name: str
    called: Any
    text: Callable[[], str]
    program: Callable[[], Program]
    args: tuple
    kwargs: dict[str, Any]
    lowering: Lowering
    in_axes: Any
    out_axes: Any
    sharding: PartitionSpec | None = None
    fixed: tuple = ()
    depends: Callable[[], Any] = tuple


@runtime_checkable
class Resolver(Protocol):
    """Decides how the steps of a place are compiled."""

    @property
    def asks_all(self) -> bool:
        """Whether all places ask, or only those with `method="auto"`."""
        ...

    def run(self, place: Place, run: Callable[[Lowering], T]) -> T:
        """`run(lowering)` with the lowering for this place."""
        ...


_default: list[Resolver] = []


class FirstAsGiven:
    """A resolver that leaves the first place as it is, and is done: others are inside.

    They ask `outer`.
    """

    asks_all = True

    def __init__(self, outer: Resolver):
        self._outer = outer

    def run(self, place: Place, run: Callable[[Lowering], T]) -> T:
        with in_effect(self._outer):
            return run(place.lowering)


def set_default(resolver: Resolver) -> None:
    """The resolver where none is in effect."""
    _default[:] = [resolver]


def default_resolver() -> Resolver | None:
    """The one for `method="auto"` where none is in effect."""
    return _default[0] if _default else None


def resolver_for(lowering: Lowering) -> Resolver | None:
    """The one that a call with this lowering asks, or None."""
    resolver: Resolver | None = in_effect.value
    if resolver is not None and (resolver.asks_all or lowering.method == AUTO):
        return resolver
    return default_resolver() if lowering.method == AUTO else None


def function_text(fun: Callable) -> str:
    """The names of a function and of those that it wraps."""
    names: list[str] = []
    inner: Any = fun
    while inner is not None:
        is_partial = isinstance(inner, functools.partial)
        names += [] if is_partial else [type_text(inner)]
        inner = inner.func if is_partial else getattr(inner, "__wrapped__", None)
    return " of ".join(dict.fromkeys(names))


def type_text(thing: Any) -> str:
    """The name of a class or function; of other objects, of their class.

    Without modules, which change with versions: a name is not relied upon for more
    than the choice of a lowering.
    """
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return kind.__qualname__


def value_text(
    value: Any, kinds: dict[type, Callable[[Any], str]], inside: tuple = ()
) -> str:
    """A value without its address: arrays by their types, functions by their names.

    `kinds` are the texts of values of other kinds; `inside` is what the value is in.
    """
    of_kind = next((f for kind, f in kinds.items() if isinstance(value, kind)), None)
    if of_kind is not None:
        return of_kind(value)
    if any(value is outer for outer in inside):
        return type_text(value)
    one = functools.partial(value_text, kinds=kinds, inside=(*inside, value))
    if isinstance(value, Mapping):
        # JAX sorts the keys of dicts, and so loses their order.
        items = sorted((str(name), one(x)) for name, x in value.items())
        return f"{{{', '.join(f'{name}: {text}' for name, text in items)}}}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(one, value))})"
    if isinstance(value, np.ndarray | np.generic):
        with contextlib.suppress(TypeError, ValueError):  # Strings, say.
            value = jax.typeof(value)  # What it is in a program: float32, not float64.
    if is_array(value):
        return f"{value.dtype}{[*value.shape]}"
    if isinstance(value, str | bytes | int | float | complex | None):
        return repr(value)
    if isinstance(value, functools.partial):
        return f"partial{one((value.func, value.args, value.keywords))}"
    if isinstance(value, enum.Enum | PartitionSpec):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.repr]
        given = {name: getattr(value, name, None) for name in fields}
        return f"{type_text(value)}{one(given)}"
    if not jax.tree_util.all_leaves([value]):
        children = jax.tree.leaves(value, is_leaf=lambda x: x is not value)
        return f"{type_text(value)}{one(children)}"
    return function_text(value) if callable(value) else type_text(value)
