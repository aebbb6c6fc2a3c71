"""How a Linen layer shares the scope of its wrapper, and is lifted over time.

A scope holds the variables and random streams of one module. The layer gets the scope
of its wrapper (`adopt`), so that its variables have the names and initial values that
they have without one. In a call, `flax.core.lift.pack` opens the scope into variables
and keys and makes scopes of them again: the layer becomes a pure function that
`distribute_layer` can run over all steps.
"""

import contextlib
import dataclasses
import re
import weakref
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import DenyList, FrozenDict, Scope, lift
from flax.core.scope import in_filter
from flax.linen import module as flax_module

from tdjax._checks import describe
from tdjax._mesh import names_in
from tdjax._steps.hints import explained
from tdjax._steps.lowering import Lowering
from tdjax._steps.mesh import mesh_axes
from tdjax._steps.mesh_layers import distribute_layer
from tdjax._steps.places import type_text, value_text
from tdjax._steps.stateful import LayerState


def require_variables(variables: Any) -> None:
    """Refuses what is no dict of collections, an input in its place above all."""
    if not isinstance(variables, Mapping):
        raise TypeError(
            "variables must be a dict of collections, as module.init returns, got "
            f"{describe(variables)}. Write autotune(module, variables, x)."
        )


def written_collections(variables: Mapping[str, Any], mutable: Any) -> list[str]:
    """The collections that a call may write to, and make.

    A layer may do something else where it can write: training is another place.
    """
    there = {name for name in variables if in_filter(mutable, name)}
    if isinstance(mutable, bool):
        return [*sorted(there), *["all others"] * mutable]
    if isinstance(mutable, DenyList):
        left_out = written_collections({}, mutable.deny)
        return [*sorted(there), f"all but {left_out}"]
    named = [mutable] if isinstance(mutable, str) else mutable
    return sorted({*there, *named})


def adopt(layer: nn.Module, scope: Scope) -> nn.Module:
    """Binds `layer` to `scope`; a layer that modules share is bound only once."""
    if layer.parent is None:
        clones, outside = _clones(scope.root), layer._id
        if outside in clones:
            return clones[outside]
        clones[outside] = layer = layer.clone(name=None)
    object.__setattr__(layer, "parent", scope)
    object.__setattr__(layer, "name", scope.name or "layer")
    layer.__post_init__()
    return layer


def rename(layer: nn.Module, name: str) -> None:
    """Gives a layer made inside of a compact method the name given to its wrapper.

    Linen has named it already, `Dense_0` for example; that name is free again, unless a
    layer made later has taken the next one.
    """
    parent, old, kind = layer.parent, layer.name or "", type(layer).__name__
    if old == name:
        return
    is_automatic = re.fullmatch(rf"{kind}_\d+", old)
    is_new = layer._state.setup_called == flax_module.SetupState.NEW
    is_new = is_new and not layer._state.children
    if not is_automatic or not is_new or not isinstance(parent, nn.Module):
        raise ValueError(
            f"name={name!r} names the layer, which has the name {old!r} already. Give "
            f"the name to the layer alone, {kind}(..., name={name!r})."
        )
    children, cursors = parent._state.children, parent._state.autoname_cursor
    del children[old]
    parent.scope.reservations.pop(old, None)  # pyright: ignore
    if old == f"{kind}_{cursors.get(kind, 0) - 1}":
        cursors[kind] -= 1
    # In place, since the user may share the layer.
    children[name] = layer
    object.__setattr__(layer, "name", name)
    object.__setattr__(layer, "scope", parent.scope.push(name))  # pyright: ignore


def _clones(root: Scope):
    """Where Flax keeps the clones of modules that were made outside of others."""
    if hasattr(flax_module, "_caches"):
        return flax_module._caches.setdefault(root, weakref.WeakValueDictionary())
    # Since Flax 0.12.12 the root scope keeps them.
    if not hasattr(root, "_submodule_adoption_cache"):
        root._submodule_adoption_cache = weakref.WeakValueDictionary()  # pyright: ignore
    return root._submodule_adoption_cache  # pyright: ignore


def lift_over_time(call, options, lowering: Lowering, mask, kwargs):
    """Lifts `call(layer, *args)`, a function of one step, to all steps."""
    initializing = options.is_initializing()
    axes = thaw(options.in_axes), thaw(options.out_axes)
    sharding = None if initializing else options.sharding
    if initializing and mask is None:
        lowering = dataclasses.replace(lowering, capacity=None)
    # Along these mesh axes a device has a part of its own, not to be split again.
    taken = () if sharding is None else mesh_axes(sharding).names
    is_carried = _is_in(options.variable_carry or False)
    # While initialising, a layer may write to any variable; what it writes is dropped,
    # since the plain call has made the variables already.
    written = True if initializing else DenyList(("params",))

    def lifted(scopes, *args):
        counters = [_copy(scope.rng_counters) for scope in jax.tree.leaves(scopes)]

        def over_time(scope_fn, repack, variables, rngs, args):
            def step(kwargs, variables, rngs, *args):
                scope = scope_fn(_without_names(variables, taken), rngs)
                # Each block counts its random draws from the same start.
                for inner, counter in zip(jax.tree.leaves(scope), counters):
                    inner.rng_counters.clear()
                    inner.rng_counters.update(_copy(counter))
                with _rules_without(taken):
                    return call(scope, *args, **kwargs), repack(scope)

            state = LayerState(variables, rngs, options.share_rng, is_carried)
            y, after = distribute_layer(
                step, kwargs, state, args, mask, *axes, lowering, sharding
            )
            return y, () if initializing else _with_names_of(variables, after)

        return lift.pack(over_time, (True,), (written,), (True,))(scopes, args)

    return lifted


def _copy(counters: dict) -> dict:
    """Counters of random draws, with those of submodules, which are dicts inside."""
    return {k: _copy(v) if isinstance(v, dict) else v for k, v in counters.items()}


@contextlib.contextmanager
def _rules_without(taken: tuple[str, ...]):
    """Flax's rules for logical axes, without these mesh axes."""
    rules = [
        (name, _other_axes(axes, taken)) for name, axes in nn.get_logical_axis_rules()
    ]
    with nn.logical_axis_rules(rules) if taken else contextlib.nullcontext():
        yield


def _without_names(variables: Any, taken: tuple[str, ...]) -> Any:
    """Variables whose boxes (`nn.with_partitioning`) do not name these mesh axes."""

    def change(x):
        if type(x) is not nn.Partitioned:  # Those of logical axes follow the rules.
            return x
        names: Any = tuple(_other_axes(axes, taken) for axes in x.names)
        return x.replace(names=names)

    return jax.tree.map(change, variables, is_leaf=_is_box) if taken else variables


def _with_names_of(before: Any, after: Any) -> Any:
    """The variables `after`, in boxes that name what those `before` named."""
    named = jax.tree_util.tree_leaves_with_path(before, is_leaf=_is_box)
    names = {path: x.names for path, x in named if type(x) is nn.Partitioned}

    def change(path, x):
        is_known = type(x) is nn.Partitioned and path in names
        return x.replace(names=names[path]) if is_known else x

    return jax.tree_util.tree_map_with_path(change, after, is_leaf=_is_box)


def _is_box(x) -> bool:
    return isinstance(x, nn.meta.AxisMetadata)


def _other_axes(axes: Any, taken: tuple[str, ...]) -> Any:
    """An entry of a `PartitionSpec`, without these mesh axes."""
    rest = tuple(name for name in names_in(axes) if name not in taken)
    return rest[0] if len(rest) == 1 else rest or None


def _is_in(collections):
    """A test of whether a variable, by its path, is in one of some collections."""

    def is_in(path) -> bool:
        keys = (k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        return in_filter(collections, next(keys))

    return is_in


def lift_one_step(call, axis_name):
    """Lifts a function of scopes to one step of a time axis with a name."""

    def over_one_step(scope_fn, repack, variables, rngs, args, kwargs):
        def step():
            scope = scope_fn(variables, rngs)
            call(scope, *args, **kwargs)
            return repack(scope)

        stacked = jax.vmap(step, axis_size=1, axis_name=axis_name)()
        return (), jax.tree.map(lambda value: value[0], stacked)

    packed = lift.pack(over_one_step, (True,), (True,), (True,))
    return lambda scopes, *args, **kwargs: packed(scopes, args, kwargs)


def module_text(module: nn.Module) -> str:
    """A module and its attributes, the same in every process."""
    texts = []
    for field in dataclasses.fields(module):
        if field.name in _OF_SCOPES:
            continue
        text = value_text(getattr(module, field.name, None), _KINDS)
        # By its text: unpickled, a default is another object.
        if text != value_text(field.default, _KINDS):
            texts.append(f"{field.name}={text}")
    return f"{type_text(type(module))}({', '.join(texts)})"


def variables_by_itself(layer: nn.Module) -> dict[str, Any]:
    """The variables that a bound layer has when it is unbound.

    Layers in its fields may have been made outside, as those of an `nn.Sequential` in a
    compact method are. Their variables are the parent's; unbound, they are its own,
    under the name of the field.
    """
    variables = {kind: dict(tree) for kind, tree in layer.variables.items()}
    own: Any = layer.scope
    for field in dataclasses.fields(layer):
        value = getattr(layer, field.name, None)
        if field.name in _OF_SCOPES:
            continue
        try:
            leaves = jax.tree_util.tree_flatten_with_path(value)[0]
        except (TypeError, ValueError):
            continue  # A dict whose keys can't be sorted: no pytree of layers.
        for path, inner in leaves:
            scope = inner.scope if isinstance(inner, nn.Module) else None
            if scope is None or scope.path[: len(own.path)] == own.path:
                continue
            keys = [str(getattr(key, "idx", getattr(key, "key", key))) for key in path]
            for kind, tree in inner.variables.items():
                variables.setdefault(kind, {})["_".join([field.name, *keys])] = tree
    return variables


_OF_SCOPES = ("parent", "name")
_KINDS = {nn.Module: module_text}


def call_layer(method: str, layer, *args, **kwargs):
    """Calls a method of the layer on one step."""
    with explained(args):
        return getattr(layer, method)(*args, **kwargs)


def thaw(axes: Any) -> Any:
    """Undoes the freezing of attributes by Linen, so that axes are plain pytrees."""
    if isinstance(axes, dict | FrozenDict):
        return {key: thaw(value) for key, value in axes.items()}
    if type(axes) in (tuple, list):
        return type(axes)(map(thaw, axes))
    return axes
