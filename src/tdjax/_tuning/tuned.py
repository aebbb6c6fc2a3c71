"""A tuned model: the same module, whose methods run with the options in effect."""

import functools
import inspect
from typing import Any

from tdjax._tuning.table import Options, in_effect


def in_tuning(module: Any, base: type, changes: dict[str, Options]) -> Any:
    """`module` with the options of its places, by `key_of`.

    It is of a subclass with the same name, and shares all attributes. `base` is the
    framework's class of modules, whose own methods stay as they are.
    """
    if not changes:
        return module
    kind = type(module)
    names = [
        name
        for each in kind.__mro__[: kind.__mro__.index(base)]
        for name, value in vars(each).items()
        if inspect.isfunction(value) and (name == "__call__" or name[:2] != "__")
    ]
    methods = {
        name: _with_context(getattr(kind, name), changes)
        for name in dict.fromkeys(names)
        if name != "setup"
    }
    methods["__reduce__"] = _reduce(kind, base, changes)
    subclass = type(kind.__name__, (kind,), {**methods, "__doc__": kind.__doc__})
    subclass.__module__, subclass.__qualname__ = kind.__module__, kind.__qualname__
    setattr(subclass, _PLAIN, kind)
    return _as(module, subclass)


# Where the class of a tuned module has that of the plain one.
_PLAIN = "_tdjax_plain"


def untuned(module: Any) -> Any:
    """The module that was tuned; one that was not, as it is."""
    kind = getattr(type(module), _PLAIN, None)
    return module if kind is None else _as(module, kind)


def _with_context(method: Any, changes: dict[str, Options]) -> Any:
    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with in_effect({}, changes):
            return method(self, *args, **kwargs)

    return run


def _reduce(kind: type, base: type, changes: dict[str, Options]) -> Any:
    """How a tuned module is pickled: as the plain one, and what to do with it."""

    def reduce(self):
        return in_tuning, (_as(self, kind), base, changes)

    # Linen takes the functions of a class for its methods.
    setattr(reduce, "nowrap", True)  # noqa: B010
    return reduce


def _as(module: Any, kind: type) -> Any:
    """A shallow copy of a module, as one of another class."""
    copied = object.__new__(kind)
    vars(copied).update(vars(module))
    return copied
