"""Whether code is still the code that was looked at.

A proof holds for a program. To find out the program costs as much as to prove something
of it again, so it is remembered by what makes the program: the functions and classes
that a layer leads to, through attributes, closures and the names in their code. A class
that is defined again, in a notebook say, is another object.
"""

import functools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# What these hold does not change while a program runs.
_FIXED = {"flax", "jax", "jaxlib", "numpy", "optax", *sys.stdlib_module_names}
# What instances of these hold is numbers, which a proof does not depend on.
_OF_ARRAYS = {"jax", "jaxlib", "numpy"}
_MOST = 10_000


class Identity:
    """All that a function or layer leads to; equal if it is the same objects.

    It keeps functions and classes alive, so that no other takes the place of one.
    Arrays are left out: a proof is one for all numbers.
    """

    def __init__(self, thing: Any):
        self._code: dict[int, Any] = {}
        self._values: list[str] = []
        self._seen: set[int] = set()
        waiting = [thing]
        while waiting and len(self._seen) < _MOST:
            waiting += self._look_at(waiting.pop())
        self._is_complete = not waiting

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Identity)
            and self._is_complete
            and self._values == other._values
            and self._code.keys() == other._code.keys()
        )

    __hash__ = None  # pyright: ignore

    def _look_at(self, thing: Any) -> Iterable[Any]:
        """Notes one thing, and returns those that it leads to."""
        if isinstance(thing, str | bytes | int | float | complex | None):
            self._values.append(repr(thing))
            return ()
        if id(thing) in self._seen or isinstance(thing, types.ModuleType):
            return ()
        self._seen.add(id(thing))
        if isinstance(thing, Mapping):
            return [*thing.keys(), *thing.values()]
        if isinstance(thing, list | tuple | set | frozenset):
            return [*thing]
        if isinstance(thing, functools.partial):
            return [thing.func, thing.args, thing.keywords]
        if isinstance(thing, types.MethodType):
            return [thing.__func__, thing.__self__]
        if not isinstance(thing, types.FunctionType | type):
            return _of_instance(thing)  # Of a new one, only what it holds counts.
        # A function that the same line makes again has the same code.
        code = thing if isinstance(thing, type) else thing.__code__
        self._code[id(code)] = code
        if str(thing.__module__).partition(".")[0] in _FIXED:
            return ()
        return _of_class(thing) if isinstance(thing, type) else _of_function(thing)


# Attributes by which Flax knows where a module is, and not what it does.
_PLACE = {"parent", "scope", "name", "_state", "_id", "_pytree__state"}


def _of_instance(thing: Any) -> Iterator[Any]:
    if (inner := getattr(thing, "__wrapped__", None)) is not None:
        yield inner  # The function under `jax.jit`, say.
    kinds = type(thing).__mro__
    yield type(thing)
    if type(thing).__module__.partition(".")[0] in _OF_ARRAYS:
        return
    names = [*getattr(thing, "__dict__", {})]
    for kind in kinds:
        slots = vars(kind).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else [*slots]
    is_of_flax = any(kind.__module__.startswith("flax.") for kind in kinds)
    left_out = _PLACE if is_of_flax else set()
    for name in names:
        if name not in left_out and not name.startswith("__") and hasattr(thing, name):
            yield from (name, getattr(thing, name))


def _of_class(kind: type) -> Iterator[Any]:
    yield from kind.__mro__[1:]
    for name, value in vars(kind).items():
        inner = getattr(value, "__wrapped__", None) or getattr(value, "fget", None)
        inner = inner or getattr(value, "__func__", None)
        yield from (x for x in (value, inner) if isinstance(x, types.FunctionType))
        is_set = not (name.startswith("__") or hasattr(value, "__get__"))
        if is_set and name != "_abc_impl":
            yield from (name, value)


def _of_function(fun: types.FunctionType) -> Iterator[Any]:
    for cell in fun.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # Not filled yet.
            continue
    yield from (fun.__defaults__, fun.__kwdefaults__)
    names = {*_names(fun.__code__)}
    for name in names & fun.__globals__.keys():
        value = fun.__globals__[name]
        if not isinstance(value, types.ModuleType):
            yield value
        elif value.__name__.partition(".")[0] not in _FIXED:
            yield from (vars(value)[n] for n in names & vars(value).keys())


def _names(code: types.CodeType) -> Iterator[str]:
    """The names in the code of a function, and of those inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
