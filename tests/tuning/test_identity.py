"""When code is the same code: what a function or layer leads to."""

import dataclasses
import enum
import functools
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tdjax
from tdjax._tuning.identity import Identity
from tdjax._tuning.table import _shown


def module_of(source):
    """What a file or notebook with this source defines."""
    module = types.ModuleType("notebook")
    exec(source, vars(module))
    return module


SOURCE = """
import flax.linen as nn
def helper(x):
    return x * 2
class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return helper(nn.Dense(3)(x))
class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Inner()(x)
def calls(x):
    return [helper(y) for y in x]
"""


def test_new_instances_of_the_same_classes_are_the_same():
    notebook = module_of(SOURCE)
    assert Identity(notebook.Outer()) == Identity(notebook.Outer())
    assert Identity(notebook.Outer()) != Identity(notebook.Inner())
    assert Identity(nn.Dense(3)) != Identity(nn.Dense(4))
    layers = lambda: nn.Sequential([nn.Dense(3), nn.relu, notebook.Inner()])
    assert Identity(layers()) == Identity(layers())
    assert Identity(nnx.Linear(2, 3, rngs=nnx.Rngs(0))) == Identity(
        nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    )


def test_a_definition_anew_is_another_one_wherever_it_is_used():
    notebook = module_of(SOURCE)
    things = {
        "module": notebook.Outer,
        "function": lambda: notebook.calls,
        "jit": lambda: jax.jit(notebook.calls),
        "partial": lambda: functools.partial(notebook.calls, 1),
        "attribute": lambda: nn.Sequential([notebook.Outer()]),
        "closure": lambda: close_over(notebook.calls),
        "method": lambda: notebook.Outer().__call__,
    }
    before = {name: Identity(make()) for name, make in things.items()}
    same = {name: before[name] == Identity(make()) for name, make in things.items()}
    assert all(same.values()), same
    exec("def helper(x): return x - x.mean(0)", vars(notebook))
    same = {name: before[name] == Identity(make()) for name, make in things.items()}
    assert not any(same.values()), same


def close_over(fun):
    return lambda x: fun(x)


def test_values_in_closures_and_defaults_count_and_arrays_do_not():
    def make(flag, array, number=1):
        return lambda x, n=number: x * n if flag else x + array

    array = jnp.ones(3)
    code = Identity(make(True, array))
    assert code == Identity(make(True, array + 1))
    assert code != Identity(make(False, array))
    assert code != Identity(make(True, array, number=2))


def test_what_jax_returns_is_told_apart_by_what_is_in_it():
    make = lambda act: lambda x: act(x)
    of_tanh = Identity(make(jax.vmap(jnp.tanh)))
    assert of_tanh == Identity(make(jax.vmap(jnp.tanh)))
    assert of_tanh != Identity(make(jax.vmap(jnp.cumsum)))
    assert of_tanh != Identity(make(jax.vmap(jnp.tanh, in_axes=1)))


def test_layers_over_time_are_the_same_before_and_after_a_proof():
    over_time = tdjax.time_distributed(
        tdjax.time_distributed(jnp.tanh, method="auto"), method="auto"
    )
    before = Identity(over_time)
    _shown["a key"] = before, None
    assert before == Identity(over_time)
    del _shown["a key"]


def test_circles_end():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    assert Identity(even) == Identity(even)
    circle = types.SimpleNamespace(fun=even)
    circle.circle = circle
    assert Identity(circle) == Identity(circle)


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    mix: bool


def norm(x, center=False, mix=False):
    return x - x.mean(0) if mix else x


class Choice(enum.Enum):
    MIX = True
    KEEP = False


def with_derivative(derivative):
    @jax.custom_vjp
    def fun(x):
        return x

    fun.defvjp(close_over, derivative)
    return fun


def importing(helper):
    module = sys.modules.setdefault("imported_for_a_test", types.ModuleType("imported"))
    module.helper = helper
    return import_and_call


def import_and_call(x):
    import imported_for_a_test

    return imported_for_a_test.helper(x)


def with_attribute(mix):
    def fun(x):
        return norm(x, mix=fun.mix)

    fun.mix = mix
    return fun


def helper_of(mix):
    return norm if mix else module_of


def settings_of(mix):
    """Things that hold a setting, each in another way."""

    def keyword_default(x, *, mix=mix):
        return norm(x, mix=mix)

    name = {True: "mix", False: "center"}[mix]
    helper = {True: lambda x: x - x.mean(0), False: lambda x: x}[mix]
    package, inner = types.ModuleType("package"), types.ModuleType("package.inner")
    package.inner, inner.helper = inner, helper
    user = module_of("def user(x): return package.inner.helper(x)")
    user.package = package
    return {
        "keyword default": keyword_default,
        "name of a keyword": functools.partial(norm, **{name: 1}),
        "slots": close_over(Slots(mix)),
        "an attribute called name": close_over(types.SimpleNamespace(name=name)),
        "name of an attribute": close_over(types.SimpleNamespace(**{name: 1})),
        "number of NumPy": close_over(np.int64(mix)),
        "array of NumPy": close_over(np.array([mix])),
        "slice": close_over(slice(mix)),
        "member of an enum": close_over(Choice(mix)),
        "derivative": with_derivative(helper),
        "module in a module": user.user,
        "import in a function": importing(helper),
        "partial that JAX wraps": jax.checkpoint(functools.partial(norm, mix=mix)),
        "attribute of a function": with_attribute(mix),
        "order": functools.partial(norm, *[jnp.sin, jnp.cos][:: 1 if mix else -1]),
        "which one twice": functools.partial(norm, *(norm, module_of, helper_of(mix))),
    }


@pytest.mark.parametrize("how", list(settings_of(True)))
def test_settings_count_wherever_they_are(how):
    before = Identity(settings_of(True)[how])
    assert before != Identity(settings_of(False)[how])


def test_an_attribute_of_a_class_that_changes_counts():
    class Layer:
        mix = False

    layer = Layer()
    before = Identity(layer)
    assert before == Identity(layer)
    Layer.mix = True
    assert before != Identity(layer)
