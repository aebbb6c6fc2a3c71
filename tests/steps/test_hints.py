"""Errors of a call: they name what was probably meant, and what to write instead."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tdjax

X = jnp.ones((2, 4, 3))
MASK = jnp.ones((2, 4), bool)
PARAMS = {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}
SQUARE = {"kernel": jnp.ones((3, 4))}
td = tdjax.time_distributed


def said(call, error):
    """The message and the notes of the error that `call` raises."""
    with pytest.raises(error) as caught:
        call()
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


def flipped(x, params):
    return tdjax.dense(params, x)


@pytest.mark.parametrize(
    ("call", "leaf"),
    [
        (lambda: td(tdjax.dense)(PARAMS, X), r"args\[0\]\['bias'\] .* got float32\[5\]"),
        (lambda: td(flipped)(X, {"kernel": PARAMS["kernel"]}),
         r"args\[1\]\['kernel'\] float32\[3,5\] has 5 on axis 1"),
        (lambda: td(tdjax.dense, in_axes=0)(PARAMS, X),
         r"args\[0\]\['bias'\] float32\[5\] has 5 on axis 0"),
        (lambda: td(tdjax.dense)(SQUARE, X),
         r"args\[0\]\['kernel'\] float32\[3\] \(axis 1 of float32\[3,4\] is time\)"),
        (lambda: td(tdjax.dense, method="fold")(SQUARE, X),
         r"args\[0\]\['kernel'\] float32\[3\] \(axis 1 of float32\[3,4\] is time\)"),
        (lambda: td(jnp.multiply)(2.0, X), r"args\[0\] .* got float"),
    ],
)  # fmt: skip
def test_parameters_taken_as_steps_are_named_with_the_remedy(user_errors, call, leaf):
    text = said(call, (TypeError, ValueError))
    assert re.search(leaf, text), text
    assert re.search("[Gg]ive (it )?None in in_axes (if|to what) every step", text), (
        text
    )


def test_many_arrays_are_not_all_listed(user_errors):
    text = said(lambda: td(lambda xs: xs["none"])([X] * 6), TypeError)
    assert "args[0][3] float32[2,3]" in text
    assert "args[0][4]" not in text


def test_an_input_without_a_time_axis(user_errors):
    text = said(lambda: td(jnp.sin)(jnp.ones(4)), ValueError)
    assert "args[0] is mapped over axis 1 and must have that axis" in text
    assert "One sequence without a batch, (time, ...), has in_axes=0" in text
    no_time = lambda: td(lambda x: x @ jnp.ones((3, 5)))(X[:, 0])
    text = said(no_time, TypeError)
    assert "args[0] float32[2] (axis 1 of float32[2,3] is time)" in text


@pytest.mark.parametrize("options", [{}, {"method": "fold"}, {"chunk_size": 2}])
@pytest.mark.parametrize("transform", [None, jax.jit, nnx.jit])
def test_an_nnx_module_in_a_closure_needs_the_adapter(options, transform):
    rngs = nnx.Rngs(0)
    for layer in (nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)):
        apply = td(lambda x, layer=layer: layer(x), **options)
        apply = transform(apply) if transform else apply
        text = said(lambda apply=apply: apply(X), Exception)
        assert "use tdjax.nnx.TimeDistributed" in text


class Scale:
    def __init__(self, factor):
        self.factor = factor


@pytest.mark.parametrize(
    ("fun", "message"),
    [
        (nn.Dense, r"got type .*linear\.Dense.* Use tdjax\.linen\.TimeDistributed\(Dense\(\.\.\.\)\)"),
        (nnx.Linear, r"got ModuleMeta .*linear\.Linear.* Use tdjax\.nnx\.TimeDistributed\(Linear\(\.\.\.\)\)"),
        (Scale, r"fun is the class Scale: .* Pass an instance or a function"),
    ],
)  # fmt: skip
def test_a_class_in_place_of_an_instance(user_errors, fun, message):
    assert re.search(message, said(lambda: td(fun)(X), TypeError))


def test_a_class_that_makes_arrays_is_a_function():
    assert td(jnp.float32)(X).shape == X.shape


def rows(x, scale):
    return x.sum(0, keepdims=True) * scale


@pytest.mark.parametrize(
    ("options", "mask", "option"),
    [
        ({"method": "fold"}, None, "With method='fold'"),
        ({"capacity": 8}, MASK, "With capacity=8"),
        ({"capacity": 8, "method": "fold"}, MASK, "With capacity=8"),
    ],
)
@pytest.mark.parametrize("fun", [lambda x, scale: x[:3] * scale, rows])
def test_a_shared_batch_is_named_under_fold_and_capacity(
    user_errors, options, mask, option, fun
):
    """Both where `fun` fails and where its result has a wrong shape."""
    scale = jnp.ones((2, 3))
    errors = (TypeError, ValueError)
    text = said(lambda: td(fun, **options)(X, mask=mask, scale=scale), errors)
    assert f"{option}, the rows that fun gets are steps of all examples" in text
    assert "kwargs['scale'] float32[2,3] is shared by all steps" in text
    apply = td(fun, in_axes=(1, None), **options)
    text = said(lambda: apply(X, scale, mask=mask), errors)
    assert "args[1] float32[2,3] is shared by all steps" in text


def test_what_has_no_batch_axis_is_not_named_under_fold(user_errors):
    add = td(lambda x, scale: x @ scale, method="fold")
    text = said(lambda: add(X, scale=jnp.ones((4, 3))), TypeError)
    assert "kwargs" not in text
