"""What both adapters say about layers and inputs that do not fit."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tdjax
from helpers import normal

X = normal(0, 3, 8)  # (batch, features), without time
KEY = jax.random.key(0)
LINEN, NNX = tdjax.linen.TimeDistributed, tdjax.nnx.TimeDistributed


class KerasLayer:
    """Looks like a layer of Keras, which need not be installed here."""


Layer = type("Layer", (KerasLayer,), {"__module__": "keras.src.layers.layer"})
Dense = type("Dense", (Layer,), {"__module__": "keras.src.layers.core.dense"})


def linear():
    return nnx.Linear(8, 5, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("wrap", "layer", "remedy"),
    [
        (LINEN, nn.Dense, r"Give an instance, Dense\(\.\.\.\)"),
        (NNX, nnx.Linear, r"Give an instance, Linear\(\.\.\.\)"),
        (LINEN, linear, "Use tdjax.time_distributed for a function"),
        (NNX, jnp.sin, "Use tdjax.time_distributed for a function"),
        (LINEN, linear(), "Use tdjax.nnx for it"),
        (LINEN, nnx.Linear, "Use tdjax.nnx for it"),
        (NNX, nn.Dense(5), "Use tdjax.linen for it"),
        (LINEN, [nn.Dense(5), nn.relu], r"nn\.Sequential\(layers\)"),
        (NNX, (linear(), nnx.relu), r"nnx\.Sequential\(\*layers\)"),
        (LINEN, Dense(), "Use tdjax.keras for it"),
        (NNX, Dense, "Use tdjax.keras for it"),
    ],
)
def test_what_is_no_layer_is_refused_with_a_remedy(user_errors, wrap, layer, remedy):
    module = "linen" if wrap is LINEN else "nnx"
    message = rf"layer must be an instance of flax\.{module}\.Module, got .*{remedy}"
    with pytest.raises(TypeError, match=message):
        wrap(layer)


@pytest.mark.parametrize("autotune", [tdjax.linen.autotune, tdjax.nnx.autotune])
def test_the_tuners_say_the_same(user_errors, autotune):
    args = ({}, X) if autotune is tdjax.linen.autotune else (X,)
    with pytest.raises(TypeError, match=r"module must be .*Sequential"):
        autotune([linear()], *args)


def notes(call):
    with pytest.raises(Exception, match=r".") as raised:
        call()
    return "\n".join(getattr(raised.value, "__notes__", []))


def dense_made_with_time():
    model = LINEN(nn.Dense(5))
    return model, model.init(jax.random.key(0), jnp.ones((3, 4, 8)))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: LINEN(nn.Conv(5, (3, 3))).init(jax.random.key(0), x),
        lambda x: (lambda model, v: model.apply(v, x))(*dense_made_with_time()),
        lambda x: NNX(linear())(x),
        lambda x: NNX(linear(), method="fold")(x[..., None]),
    ],
)
def test_an_input_without_a_time_axis_shows_what_was_taken_as_a_step(call):
    text = notes(lambda: call(X))
    assert re.search(r"One step of the input was float32\[(3|24,1)\]", text)
    assert text.count("call the layer without TimeDistributed") == 1


@pytest.mark.parametrize("wrap", [lambda x: LINEN(nn.Dense(5)).init(KEY, x), NNX])
def test_an_input_of_one_axis_has_no_time_axis(wrap):
    call = (lambda: NNX(linear())(X[0])) if wrap is NNX else (lambda: wrap(X[0]))
    with pytest.raises(ValueError, match=r"mapped over axis 1 and must have that axis"):
        call()


@pytest.mark.parametrize("mask", [jnp.ones((3, 4), int), jnp.array([4, 2, 0])])
def test_an_int_mask_and_lengths_are_explained(user_errors, mask):
    x = normal(0, 3, 4, 8)
    model, variables = dense_made_with_time()
    for call in (
        lambda: model.apply(variables, x, mask=mask),
        lambda: NNX(linear())(x, mask=mask),
    ):
        with pytest.raises(TypeError, match=r"mask\.astype\(bool\).*lengths_to_mask"):
            call()


def test_our_own_errors_get_no_note_about_the_layer():
    dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    x = normal(0, 3, 4, 8)
    for call in (
        lambda: NNX(linear())(x, mask=jnp.ones((3, 4), int)),
        lambda: NNX(dropout, share_rng=True, method="fold")(x),
        lambda: LINEN(nn.Dense(5), out_axes=7).init(KEY, x),
    ):
        assert "One step" not in notes(call)


def test_other_errors_of_a_layer_get_no_note():
    class Broken(nn.Module):
        @nn.compact
        def __call__(self, x):
            raise KeyError("mine")

    assert "One step" not in notes(lambda: LINEN(Broken()).init(jax.random.key(0), X))
