"""What is not converted is refused by name and place, and what is lost is told."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers as k

from helpers import normal
from parity.keras_parity import assert_parity, sequential
from tdjax._keras import registry
from tdjax.keras import (
    convert_layer,
    from_flax,
    register_rule,
    to_flax,
    trainable_params,
)

pytestmark = pytest.mark.usefixtures("user_errors")


class Unknown(k.Layer):
    def call(self, inputs):
        return inputs


class Doubled(k.Dense):
    def call(self, inputs):
        return 2 * super().call(inputs)


class Renamed(k.Dense):
    pass


def raises(error, *parts):
    return pytest.raises(error, match="(?s)" + ".*".join(parts))


def test_unknown_layer_is_named_with_its_place_and_a_rule():
    model = sequential(k.Dense(3), Unknown(name="odd"), shape=(3,))
    model.name = "tall"
    with raises(
        TypeError,
        r"'odd' \(Unknown\), layer 2 of 'tall'",
        r"@tdjax\.keras\.register_rule\(Unknown\)",
    ):
        to_flax(model)


def test_unknown_layer_deep_inside():
    inner = sequential(k.Dense(3), Unknown(name="odd"), shape=(3,))
    inner.name = "inner"
    model = sequential(k.TimeDistributed(inner, name="td"), shape=(4, 3))
    model.name = "outer"
    with raises(
        TypeError,
        "'odd' .Unknown., layer 2 of 'inner', inside 'td', layer 1 of 'outer'",
    ):
        to_flax(model)


def test_unknown_operation_is_named():
    inputs = keras.Input((4, 3), name="x")
    model = keras.Model(inputs, keras.ops.cumsum(inputs, axis=1), name="sums")
    with raises(TypeError, r"'cumsum[_0-9]*' \(Cumsum\), in 'sums'"):
        to_flax(model)


def test_a_subclass_with_a_call_of_its_own_needs_a_rule_of_its_own():
    with raises(TypeError, r"\(Doubled\)"):
        to_flax(sequential(Doubled(3), shape=(3,)))
    assert_parity(sequential(Renamed(3), shape=(3,)), normal(1, 2, 3))


class Scale(k.Layer):
    def build(self, input_shape):
        self.factor = self.add_weight(shape=(input_shape[-1],), name="factor")

    def call(self, inputs, training=False, mask=None):
        valid = 1 if mask is None else keras.ops.cast(mask, "float32")[..., None]
        return inputs * self.factor * valid * (2 if training else 1)

    def compute_mask(self, inputs, previous_mask):
        inverted = keras.ops.logical_not
        return None if previous_mask is None else inverted(previous_mask)


class FlaxScale(nn.Module):
    @nn.compact
    def __call__(self, inputs, mask=None, train=False):
        factor = self.param("factor", nn.initializers.ones, inputs.shape[-1:])
        valid = 1 if mask is None else mask[..., None]
        return inputs * factor * valid * (2 if train else 1)

    def compute_mask(self, inputs, mask):
        return None if mask is None else ~mask


@pytest.mark.parametrize("train", [False, True])
def test_a_rule_of_ones_own(train):
    @register_rule(Scale)
    def convert(layer):
        return FlaxScale(), {"params": {"factor": layer.factor}}

    ids = np.array([[1, 2, 0], [3, 0, 0]], np.int32)
    embedding = k.Embedding(4, 3, mask_zero=True)
    wrapped = k.TimeDistributed(sequential(Scale(), shape=(2,)))
    layers = embedding, Scale(), k.GRU(2, return_sequences=True), wrapped
    assert_parity(sequential(*layers, shape=(3,), dtype="int32"), ids, train=train)


@pytest.mark.parametrize("result", [None, FlaxScale(), (FlaxScale(), [1]), ({}, {})])
def test_a_rule_must_return_a_module_and_variables(result, monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    register_rule(Unknown)(lambda layer: result)
    with raises(TypeError, "'odd' .Unknown., layer 1", "must return"):
        to_flax(sequential(Unknown(name="odd"), k.Dense(1), shape=(3,)))


@pytest.mark.parametrize("wrong", [3, "Dense", nn.Dense, k.Dense(3)])
def test_a_rule_is_for_a_keras_class(wrong):
    with raises(TypeError, "register_rule takes a subclass of keras.layers.Layer"):
        register_rule(wrong)


def with_lora():
    layer = k.Dense(3, name="odd")
    model = sequential(layer, shape=(3,))
    layer.enable_lora(1)
    return model


def quantized():
    model = sequential(k.Dense(4, name="odd"), shape=(4,))
    model.quantize("int8")
    return model


REFUSED = {
    "channels_first": lambda: sequential(
        k.Flatten("channels_first", name="odd"), shape=(3, 4)
    ),
    "channels_first ": lambda: sequential(
        k.MaxPooling1D(data_format="channels_first", name="odd"), shape=(3, 4)
    ),
    "renorm=True": lambda: sequential(
        k.BatchNormalization(renorm=True, name="odd"), shape=(3,)
    ),
    "noise_shape": lambda: sequential(
        k.Dropout(0.1, noise_shape=(2, 3), name="odd"), shape=(3,)
    ),
    "axis must be the last": lambda: sequential(
        k.GroupNormalization(2, axis=1, name="odd"), shape=(4, 3)
    ),
    "bilinear": lambda: sequential(
        k.UpSampling2D(interpolation="bilinear", name="odd"), shape=(4, 4, 3)
    ),
    "LoRA": with_lora,
    "quantized": quantized,
}


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize`")
@pytest.mark.parametrize("reason", REFUSED)
def test_settings_without_a_counterpart_are_refused(reason):
    with raises(ValueError, "'odd' .*, layer 1 of ", reason.strip()):
        to_flax(REFUSED[reason]())


def test_a_model_without_weights_is_refused():
    with raises(ValueError, "'empty' .Sequential.", "not connected yet|no weights yet"):
        to_flax(keras.Sequential([k.Dense(3)], name="empty"))
    with raises(ValueError, "no weights yet"):
        convert_layer(k.Dense(3))


def test_a_subclassed_model_is_refused():
    class Own(keras.Model):
        def call(self, inputs):
            return inputs

    model = Own()
    model(np.ones((1, 2)))
    with raises(TypeError, "Own", "Sequential and Functional models are converted"):
        to_flax(model)


def test_an_optional_input_is_refused():
    inputs = keras.Input((3,), name="maybe", optional=True)
    with raises(ValueError, "'maybe' is optional"):
        to_flax(keras.Model(inputs, k.Dense(2)(inputs)))


def test_a_weight_at_two_places_is_refused():
    dense, inputs = k.Dense(3, name="dense"), keras.Input((4, 3))
    inner = sequential(dense, shape=(4, 3))
    with raises(ValueError, "dense/bias", "two places", "bias"):
        to_flax(keras.Model(inputs, k.Add()([inner(inputs), dense(inputs)])))


@pytest.mark.parametrize("model", [None, 3, nn.Dense(3), [k.Dense(3)]])
def test_only_keras_models_and_paths_are_taken(model):
    with raises(TypeError, "model must be a Keras model"):
        to_flax(model)
    with raises(TypeError, "model must be a Keras model"):
        from_flax({}, model)
    with raises(TypeError, "model must be a Keras model"):
        trainable_params(model)


def test_inputs_of_another_structure_or_shape():
    left, right = keras.Input((3,), name="left"), keras.Input((3,), name="right")
    module, variables = to_flax(keras.Model([left, right], left + right))
    x = jnp.ones((2, 3))
    with raises(ValueError, r"takes \['left', 'right'\], got"):
        module.apply(variables, x)
    with raises(ValueError, r"takes \['left', 'right'\], got"):
        module.apply(variables, {"left": x})
    with raises(ValueError, "'right' must have shape .None, 3., got", "2,4"):
        module.apply(variables, [x, jnp.ones((2, 4))])


def test_an_input_may_lack_a_last_axis_of_one():
    module, variables = to_flax(sequential(k.Dense(2), shape=(1,)))
    x = normal(1, 4, 1)
    want = module.apply(variables, x)
    assert jnp.array_equal(module.apply(variables, x[:, 0]), want)
    assert jnp.array_equal(module.apply(variables, x[..., None]), want)


def test_variables_that_do_not_fit_change_nothing():
    model = sequential(k.Dense(2, name="head"), shape=(3,))
    _, variables = to_flax(model)
    before = [np.asarray(weight.value) for weight in model.weights]
    ones = jax.tree.map(jnp.ones_like, variables["params"]["head"])
    wrong = {
        r"lacks \['params'\]\['head'\]\['bias'\]": {"head": {"kernel": ones["kernel"]}},
        r"no place in the model for \['params'\]\['tail'\]\['kernel'\]": {
            "head": ones,
            "tail": {"kernel": 1},
        },
        r"\['params'\]\['head'\]\['kernel'\] must have shape \(3, 2\), got": {
            "head": {**ones, "kernel": jnp.ones((2, 3))}
        },
    }
    for message, params in wrong.items():
        with raises(ValueError, message):
            from_flax({"params": params}, model)
    for weight, value in zip(model.weights, before):
        assert np.array_equal(weight.value, value)


def test_what_keras_adds_to_the_loss_is_told():
    layers = (
        k.Dense(2, kernel_regularizer="l2", name="one"),
        k.TimeDistributed(k.Dense(2, bias_constraint="non_neg"), name="two"),
        k.ReLU(name="three", activity_regularizer="l1"),
        k.ActivityRegularization(l2=0.1, name="four"),
    )
    model = sequential(*layers, shape=(4, 3))
    with pytest.warns(UserWarning, match="The Flax module leaves out") as caught:
        to_flax(model)
    (told,) = {str(warning.message) for warning in caught}
    assert "regularizer of ['params']['one']['kernel']" in told
    assert "constraint of ['params']['two']['bias']" in told
    assert "activity regularizer of 'three'" in told
    assert "activity regularizer of 'four'" in told
    assert told.count(" of ") == 4


def test_variables_written_back_stay_the_users_own():
    model = sequential(k.Dense(2), shape=(3,))
    model.compile("sgd", "mse")
    module, variables = to_flax(model)
    variables = jax.tree.map(lambda leaf: leaf + 1, variables)
    x = np.ones((2, 3), "float32")
    from_flax(variables, model)
    model.fit(x, x[:, :2], verbose=0)
    assert module.apply(variables, x).shape == (2, 2)


@pytest.mark.parametrize("shape", [(9,), (2, 9), (2, 4, 3, 1)])
def test_a_mask_that_does_not_fit_the_input_is_refused(shape):
    module, variables = to_flax(sequential(k.TimeDistributed(k.Dense(2)), shape=(4, 3)))
    with raises(ValueError, "mask of input", "batch, time"):
        module.apply(variables, np.ones((2, 4, 3)), mask=np.ones(shape, bool))


def test_a_rule_covers_its_weights_and_gives_variables(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    model = sequential(Scale(name="scale"), shape=(3,))
    for variables, message in [
        (lambda layer: {"params": {}}, "leaves out its weights"),
        (lambda layer: {"scale": layer.factor}, "by collection"),
        (lambda layer: {"params": {"factor": np.ones(3)}}, "the Keras variable itself"),
    ]:
        register_rule(Scale)(lambda layer, v=variables: (FlaxScale(), v(layer)))
        with pytest.raises((TypeError, ValueError), match=message):
            to_flax(model)


def test_hints_of_what_was_given_instead():
    model = sequential(k.Dense(2, name="one"), shape=(3,))
    other = sequential(k.Dense(2, name="other"), shape=(3,))
    module, variables = to_flax(model)
    with raises(ValueError, "Did you mean {'params': variables}"):
        from_flax(variables["params"], model)
    with raises(ValueError, "shapes agree"):
        from_flax(variables, other)
    with raises(TypeError, "to_flax returns .module, variables."):
        from_flax((module, variables), model)
    with raises(TypeError, "in memory"):
        from_flax(variables, "model.keras")
    with raises(TypeError, "any Python code"):
        to_flax(sequential(k.Lambda(lambda x: x), shape=(3,)))
