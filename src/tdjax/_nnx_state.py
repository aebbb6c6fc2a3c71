"""What an NNX layer holds and writes: checks, and which variables have changed."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from tdjax._checks import describe, leaves_by_path
from tdjax._steps.places import type_text, value_text


def check_filter(carry: Any) -> None:
    """Refuses what is no filter of NNX, and the names of Linen's collections."""
    is_tag = isinstance(carry, str) or carry is True
    with contextlib.suppress(Exception):
        if not (is_tag or carry is None or carry is ...):
            nnx.filterlib.to_predicate(carry)
            return
    raise TypeError(
        "variable_carry must be False or a filter of variables such as nnx.BatchStat, "
        f"got {describe(carry)}."
    )


def set_paths(paths: dict[int, str], model: nnx.Module, kind: type) -> None:
    """Keeps the path of each module by its identity; a layer has its wrapper's.

    `kind` is the class of the wrappers.
    """
    paths.clear()
    nodes = [(".".join(map(str, path)), node) for path, node in nnx.iter_graph(model)]
    paths |= {id(x): path for path, x in nodes if isinstance(x, nnx.Module)}
    paths |= {id(x.layer): path for path, x in nodes if isinstance(x, kind)}


def is_in(state, carry: Any) -> Callable[[Any], bool]:
    """A test of whether a variable, by its path, goes from step to step."""
    if carry is False:
        return lambda path: False
    carried = leaves_by_path(nnx.filter_state(state, carry))
    return lambda path: jax.tree_util.keystr(path) in carried


def refuse_rngs(args, kwargs) -> None:
    """Refuses random streams as arguments: steps can't move the caller's counts."""
    is_rngs = lambda node: isinstance(node, nnx.Rngs | nnx.RngStream)
    named = {f"args[{i}]": arg for i, arg in enumerate(args)} | kwargs
    for name, value in named.items():
        if any(map(is_rngs, jax.tree.leaves(value, is_leaf=is_rngs))):
            raise TypeError(
                f"{name} must hold arrays, got an nnx.Rngs or nnx.RngStream. Give it "
                "to the layer when it is made, as in nnx.Dropout(0.5, rngs=rngs), or "
                "pass keys with a time axis of their own."
            )


def module_text(module) -> str:
    """A module, its attributes and the types of its variables."""
    kinds: dict[type, Callable[[Any], str]] = {
        nnx.Variable: lambda variable: value_text(jax.tree.leaves(variable), {}),
        nnx.Module: lambda node: type_text(type(node)),
    }
    # NNX keeps notes of its own in attributes such as `_pytree__nodes`.
    items = (
        (path, value)
        for path, value in nnx.iter_graph(module)
        if not (path and str(path[-1]).startswith("_pytree"))
    )
    texts = (f"{'.'.join(map(str, p))}={value_text(v, kinds)}" for p, v in items)
    return ", ".join(texts)


def static_attributes(layer) -> dict:
    static = bool | int | float | str | None
    items = nnx.iter_graph(layer)
    return {path: value for path, value in items if isinstance(value, static)}


def refuse_new_attributes(before: dict, after: dict) -> None:
    """Refuses new values of attributes: a step's copy returns only its variables."""
    for path, value in after.items():
        old = before.get(path, value)
        if old is not value and old != value:
            name = ".".join(map(str, path))
            raise TypeError(
                f"layer must keep what it writes in the call in an nnx.Variable, got "
                f"the attribute {name!r} set from {old!r} to {value!r}."
            )


def changed(before, after):
    """The variables that hold something new.

    NNX lets a function write only to variables of its own trace. A layer in evaluation
    may be closed over by `jax.jit`, so its unchanged statistics are not written back.
    """
    old = {path: jax.tree.leaves(value) for path, value in nnx.to_flat_state(before)}

    def same(path, value) -> bool:
        leaves, known = jax.tree.leaves(value), old.get(path, [])
        pairs = zip(leaves, known)
        return len(leaves) == len(known) and all(new is old for new, old in pairs)

    flat = nnx.to_flat_state(after)
    return nnx.from_flat_state([item for item in flat if not same(*item)])
