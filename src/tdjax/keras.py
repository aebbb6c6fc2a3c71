"""Keras 3: a `TimeDistributed` that compiles in constant time, and models to Flax.

It needs Keras with the JAX backend: `pip install "tdjax[keras]"`, and
`KERAS_BACKEND=jax` in the environment before Keras is imported.
"""

from typing import Any, Literal, no_type_check

try:
    import keras
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'tdjax.keras needs Keras on JAX: pip install "tdjax[keras]", and set '
        "KERAS_BACKEND=jax in the environment before Keras is imported.",
        name=error.name,
    ) from error
from keras import ops

from tdjax._checks import describe
from tdjax._keras.convert import from_flax, to_flax, trainable_params
from tdjax._keras.drop_in.independent import equal_method
from tdjax._keras.drop_in.steps import distribute_layer
from tdjax._keras.modules.graph import FlaxModel
from tdjax._keras.modules.time import ended_axes
from tdjax._keras.registry import convert_layer, register_rule
from tdjax._keras.rules.time import OPTIONS, convert_time_distributed
from tdjax._steps.lowering import Lowering
from tdjax._steps.stateful import check_share_rng

__all__ = [
    "FlaxModel",
    "TimeDistributed",
    "convert_layer",
    "from_flax",
    "register_rule",
    "replace_time_distributed",
    "to_flax",
    "trainable_params",
]

# Tracebacks and documentation name the place where users find a name. Not so for
# FlaxModel: a pickled one is loaded from its own module, without Keras.
for _public in (convert_layer, from_flax, register_rule, to_flax, trainable_params):
    _public.__module__ = __name__


def __dir__() -> list[str]:
    return __all__


@keras.saving.register_keras_serializable(package="tdjax")
class TimeDistributed(keras.layers.TimeDistributed):
    """`keras.layers.TimeDistributed`, as one program for all steps.

    Keras calls the wrapped layer once per step, so a program for 1024 steps is 1024
    times as long. This layer has the same arguments, weights, configuration and
    results, and compiles as fast for 4096 steps as for 16. It also counts an activity
    regularizer of the wrapped layer, which Keras ignores.

    * **State**: each step starts with what the step before wrote, as in Keras: the
      moving statistics of `BatchNormalization` move once per step. Under
      `method="fold"` they are statistics of batch and time together, and move once.
    * **Randomness**: each step draws its own noise, from the seeds of Keras' loop.
    * **Losses and metrics**: weight regularizers count once. What the wrapped layer
      adds in a call (`add_loss`, activity regularizers) is summed over steps, and
      metrics see every step.
    * **Masks**: `(batch, time)` or longer; the wrapped layer gets the slice of its
      step, if it takes a mask. Masked steps are computed, and the mask is passed on,
      reduced by `any` over axes that the output does not have. With several inputs,
      the first mask is used.
    * **Several inputs and outputs**: any nest of tensors with time on axis 1, which
      Keras' own layer does not support.

    Args:
      layer: the `keras.Layer` to apply to every step.
      method: `"vmap"` or `"fold"`, as in `tdjax.time_distributed`. None is the faster
        `"fold"` if `layer` consists of Keras' own layers that treat examples
        independently and draw no noise, so that both are equal; else `"vmap"`.
      chunk_size, unroll, remat: as in `tdjax.time_distributed`.
      share_rng: whether all steps draw the same noise.
      **kwargs: those of every Keras layer: `name`, `dtype`, `trainable`.

    Raises:
      RuntimeError: if Keras has another backend than JAX.
      ValueError: if `layer` is not a Keras layer, an input has fewer than 3 axes, a
        mask does not fit, or `tdjax.time_distributed` refuses an option.

    Example:
      >>> import keras, numpy as np, tdjax.keras
      >>> x = np.ones((2, 50, 10), "float32")
      >>> tdjax.keras.TimeDistributed(keras.layers.Dense(5))(x).shape
      (2, 50, 5)
    """

    # Keras looks at the parameters of `__init__`; run-time type checks wrap it.
    @no_type_check
    def __init__(
        self,
        layer: keras.Layer,
        *,
        method: Literal["vmap", "fold"] | None = None,
        chunk_size: int | None = None,
        unroll: int | bool = 1,
        remat: bool = False,
        share_rng: bool = False,
        **kwargs: Any,
    ):
        _require_jax()
        super().__init__(layer, **kwargs)
        self._set_options(method, chunk_size, unroll, remat, share_rng)

    def _set_options(self, method, chunk_size, unroll, remat, share_rng):
        _check_options(method, chunk_size, unroll, remat, share_rng)
        self.method, self.chunk_size, self.unroll = method, chunk_size, unroll
        self.remat, self.share_rng = remat, share_rng

    def lowering(self) -> Lowering:
        """How the steps are lowered, with the method that None means here."""
        method = self.method or equal_method(self.layer, share_rng=self.share_rng)
        return Lowering(method, self.chunk_size, self.unroll, self.remat)

    def get_config(self):
        """The configuration of Keras' layer, and the options of this one."""
        options = {name: getattr(self, name) for name in OPTIONS}
        return super().get_config() | options

    def build(self, input_shape):
        """Builds the wrapped layer for one step."""
        step_shape = keras.tree.map_shape_structure(_step_shape, input_shape)
        keras.layers.Wrapper.build(self, step_shape)

    def compute_output_shape(self, input_shape) -> Any:
        """The shapes that the wrapped layer gives for one step, with time."""
        as_tensor = lambda shape: keras.KerasTensor(shape, dtype=self.compute_dtype)
        inputs = keras.tree.map_shape_structure(as_tensor, input_shape)
        specs = self.compute_output_spec(inputs)
        return keras.tree.map_structure(lambda spec: spec.shape, specs)

    def compute_output_spec(self, inputs, training=None, mask=None):
        """The same, with dtypes."""
        step = lambda x: keras.KerasTensor(_step_shape(x.shape), dtype=x.dtype)
        specs = self.layer.compute_output_spec(keras.tree.map_structure(step, inputs))
        timesteps = keras.tree.flatten(inputs)[0].shape[1]

        def over_time(y):
            # Floats are cast by this layer's policy, and not by the wrapped layer's.
            is_float = keras.backend.is_float_dtype(y.dtype)
            dtype = self.compute_dtype if is_float else y.dtype
            return keras.KerasTensor((y.shape[0], timesteps, *y.shape[1:]), dtype)

        return keras.tree.map_structure(over_time, specs)

    def compute_mask(self, inputs, previous_mask=None):
        """The mask, without the axes that the output does not have."""
        masks = [m for m in keras.tree.flatten(previous_mask) if m is not None]
        if not masks or len(masks[0].shape) <= 2:
            return masks[0] if masks else None
        mask, output = masks[0], keras.tree.flatten(self.compute_output_spec(inputs))[0]
        rest = ended_axes(mask.shape, output.shape)
        return ops.any(mask, axis=rest) if rest else mask

    def call(self, inputs, training=None, mask=None):
        """`(batch, time, ...)`, or a nest of such tensors; the same out."""
        keras.tree.map_structure(lambda x: _step_shape(x.shape), inputs)
        mask = _check_mask(mask, inputs)
        y, losses = distribute_layer(
            self.layer, inputs, mask, training, self.lowering(), self.share_rng
        )
        for loss in losses:
            self.add_loss(loss)
        return y


register_rule(TimeDistributed)(convert_time_distributed)


def _check_options(method, chunk_size, unroll, remat, share_rng) -> None:
    lowering = Lowering(method or "vmap", chunk_size, unroll, remat)
    if share_rng:
        check_share_rng(lowering)


def _require_jax() -> None:
    if keras.config.backend() != "jax":
        raise RuntimeError(
            "tdjax.keras.TimeDistributed needs the JAX backend of Keras, got "
            f"{keras.config.backend()!r}. Set KERAS_BACKEND=jax in the environment "
            "before Keras is imported."
        )


def _step_shape(shape) -> tuple:
    if len(shape) < 3:
        raise ValueError(
            "The input of `TimeDistributed` must have at least 3 dimensions, (batch, "
            f"time, ...), got the shape {tuple(shape)}."
        )
    return (shape[0], *shape[2:])


def _check_mask(mask, inputs):
    """The mask, or None if it holds no array."""
    shapes = [x.shape for x in keras.tree.flatten(inputs)]
    masks = [m for m in keras.tree.flatten(mask) if m is not None]
    for array in masks:
        if len(array.shape) < 2:
            raise ValueError(
                "The `mask` passed to the `TimeDistributed` layer must be at least 2D, "
                f"(batch, time), got {describe(array)}. tdjax.lengths_to_mask makes "
                "one of lengths."
            )
        if any(array.shape[:2] != shape[:2] for shape in shapes):
            raise ValueError(
                "The `mask` passed to the `TimeDistributed` layer has a shape "
                f"{array.shape} that does not start with the (batch, time) of the "
                f"input, of shape {shapes[0] if len(shapes) == 1 else shapes}."
            )
    return mask if masks else None


def replace_time_distributed(
    model: keras.Model,
    *,
    method: Literal["vmap", "fold"] | None = None,
    chunk_size: int | None = None,
    unroll: int | bool = 1,
    remat: bool = False,
    share_rng: bool = False,
) -> keras.Model:
    """Makes every `keras.layers.TimeDistributed` of a model the drop-in.

    The model is changed in place: its layers, weights, optimizer and what it was
    compiled with stay the same objects. Layers at any depth are found; subclasses of
    Keras' layer are left alone. Activity regularizers of wrapped layers, which Keras'
    layer ignores, count from then on.

    Args:
      model: a Keras model, built or not, compiled or not.
      method, chunk_size, unroll, remat, share_rng: as in `TimeDistributed`, for every
        replaced layer.

    Returns:
      `model`.

    Raises:
      RuntimeError, TypeError, ValueError: if Keras does not use JAX, `model` is not a
        Keras model, or `tdjax.time_distributed` refuses an option.

    Example:
      >>> import keras, tdjax.keras
      >>> layer = keras.layers.TimeDistributed(keras.layers.Dense(5))
      >>> model = keras.Sequential([keras.Input((50, 10)), layer])
      >>> model = tdjax.keras.replace_time_distributed(model)
      >>> isinstance(model.layers[0], tdjax.keras.TimeDistributed)
      True
    """
    _require_jax()
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {describe(model)}.")
    options = (method, chunk_size, unroll, remat, share_rng)
    _check_options(*options)
    for layer in model._flatten_layers():
        if type(layer) is keras.layers.TimeDistributed:
            # The classes differ in their methods only. A new object would have to
            # replace the old one in every graph, optimizer and list of layers.
            layer.__class__ = TimeDistributed
            layer._set_options(*options)
        if isinstance(layer, keras.Model):
            # These were compiled with the replaced layers.
            layer.train_function = layer.test_function = layer.predict_function = None
    return model
