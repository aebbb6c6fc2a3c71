"""Whether code is still the code that was looked at.

A proof holds for a program. To find out the program costs as much as to prove something
of it again, so it is remembered by what makes the program: the functions, classes and
settings that a layer and its arguments lead to, through attributes, closures and the
names in their code. A class that a notebook defines a second time is another object.
"""

import functools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

# What these hold does not change while a program runs.
_FIXED = {
    "flax", "jax", "jaxlib", "numpy", "optax", "tdjax", *sys.stdlib_module_names
}  # fmt: skip
# Of instances of these, the class counts, and the rules of derivatives.
_OF_ARRAYS = {"jax", "jaxlib", "numpy"}
_DERIVATIVES = ("jvp", "fwd", "bwd")
_MOST = 10_000
# NumPy arrays of at most so many entries may be settings.
_FEW_ENTRIES = 64


class Identity:
    """All that a thing leads to, in order; equal if it is the same.

    It keeps functions and classes alive, so that no other takes the place of one.
    JAX' arrays are left out: a proof is one for all numbers.
    """

    def __init__(self, thing: Any):
        # Functions and classes as they are; other things as text.
        self._parts: list[Any] = []
        self._seen: dict[int, int] = {}
        waiting, alive = [thing], []
        while waiting and len(alive) < _MOST:
            alive.append(waiting.pop())
            waiting += self._look_at(alive[-1])
        self._is_complete = not waiting

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Identity)
            and self._is_complete
            and len(self._parts) == len(other._parts)
            and all(map(_is_same, self._parts, other._parts))
        )

    __hash__ = None  # pyright: ignore

    def _look_at(self, thing: Any) -> Iterable[Any]:
        """Notes one thing, and returns those that it leads to."""
        if isinstance(thing, str | bytes | int | float | complex | np.generic | None):
            self._parts.append(repr(thing))
            return ()
        if isinstance(thing, np.ndarray):
            few = thing.size <= _FEW_ENTRIES
            self._parts.append(repr(thing) if few else "array")
            return ()
        if isinstance(thing, types.ModuleType | jax.Array):
            return ()
        if id(thing) in self._seen:
            self._parts.append(f"#{self._seen[id(thing)]}")
            return ()
        self._seen[id(thing)] = len(self._seen)
        if isinstance(thing, Mapping):
            return [*thing.keys(), *thing.values()]
        if isinstance(thing, list | tuple | set | frozenset):
            self._parts.append(f"{len(thing)}")
            return [*thing]
        if isinstance(thing, functools.partial):
            return [thing.func, thing.args, thing.keywords]
        if isinstance(thing, types.MethodType):
            return [thing.__func__, thing.__self__]
        if not isinstance(thing, types.FunctionType | type):
            if not _has_attributes(thing):  # A slice, say.
                self._parts.append(repr(thing))
            return _of_instance(thing)  # Of a new one, only what it holds counts.
        if isinstance(thing, type):
            self._parts.append(thing)
            return () if _is_fixed(thing.__module__) else _of_class(thing)
        # A function that the same line makes again has the same code.
        self._parts.append(thing.__code__)
        return _of_function(thing)


def _is_same(one: Any, other: Any) -> bool:
    return one == other if isinstance(one, str) else one is other


def _is_fixed(module: Any) -> bool:
    return str(module).partition(".")[0] in _FIXED


def _has_attributes(thing: Any) -> bool:
    has_slots = any("__slots__" in vars(kind) for kind in type(thing).__mro__)
    return has_slots or hasattr(thing, "__dict__")


# Attributes by which Flax knows where a module is, and not what it does.
_PLACE = {"parent", "scope", "name", "_state", "_id", "_pytree__state"}


def _of_instance(thing: Any) -> Iterator[Any]:
    if (inner := getattr(thing, "__wrapped__", None)) is not None:
        yield inner  # The function under `jax.jit`, say.
    kinds = type(thing).__mro__
    yield type(thing)
    if type(thing).__module__.partition(".")[0] in _OF_ARRAYS:
        yield from (getattr(thing, name, None) for name in _DERIVATIVES)
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
    # All that `jax.vmap` returns has the same code, and the module of what it maps.
    for cell in fun.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # Not filled yet.
            continue
    yield from (fun.__defaults__, fun.__kwdefaults__, vars(fun))
    if _is_fixed(fun.__module__):
        return
    names = sorted({*_names(fun.__code__)})
    # A function may import what it uses.
    imported = {name: sys.modules[name] for name in names if name in sys.modules}
    yield from _named(names, {**imported, **fun.__globals__}, set())


def _named(names: list[str], where: Mapping[str, Any], seen: set[str]) -> Iterator[Any]:
    """What the names are, and what they are in modules that they lead to."""
    for name in names:
        value = where.get(name)
        if not isinstance(value, types.ModuleType):
            yield value
        elif value.__name__ not in seen and not _is_fixed(value.__name__):
            seen.add(value.__name__)
            yield from _named(names, vars(value), seen)


def _names(code: types.CodeType) -> Iterator[str]:
    """The names in the code of a function, and of those inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
