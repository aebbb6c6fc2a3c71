"""Keras' recurrent layers as Flax Linen modules, with Keras' layout of the weights."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from tdjax._checks import describe, require_array
from tdjax._keras.modules.activations import Activation
from tdjax._keras.modules.initializers import glorot_uniform, orthogonal

LAYOUT = "(batch, time, features)"
TANH, SIGMOID = Activation("tanh"), Activation("sigmoid")


class Recurrent(nn.Module):
    """What the recurrent layers share: the loop over steps, masks and noise.

    Parameters: `kernel` `(features, gates * units)`, `recurrent_kernel`
    `(units, gates * units)` and, with `use_bias`, `bias` `(gates * units,)`.

    * **Masks**: a masked step keeps the states. Its output is that of the step before,
      or zero with `zero_output_for_mask`. Its input has no influence and gets no
      gradient, even if it is NaN.
    * **Dropout**: the noise of an example is the same at all steps.

    The fields have the names and meanings of Keras' arguments. With `unroll`, as in
    Keras, masked steps before the first valid one give zeros, not the initial state,
    and `zero_output_for_mask` does not count. `dtype` and `param_dtype` are Flax's.
    """

    units: int
    activation: Callable[..., Any] = TANH
    use_bias: bool = True
    return_sequences: bool = False
    return_state: bool = False
    go_backwards: bool = False
    unroll: bool = False
    zero_output_for_mask: bool = False
    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    implementation: int = 2
    dtype: Any = None
    param_dtype: Any = jnp.float32

    gates: ClassVar[int]
    state_count: ClassVar[int] = 1

    @nn.compact
    def __call__(self, sequences, initial_state=None, mask=None, train: bool = False):
        """Runs over `sequences`, `(batch, time, features)`.

        Returns `(batch, time, units)`, or `(batch, units)` of the last step; with
        `return_state`, `(output, *states)`. `initial_state` holds the states, each
        `(batch, units)`. `mask`, `(batch, time)`, is False at the steps to leave out.
        """
        require_array("sequences", sequences, 3, LAYOUT)
        _check_shapes(sequences, mask)
        kernel, recurrent_kernel, bias = self._make_params(sequences.shape[-1])
        sequences, kernel, recurrent_kernel, bias = promote_dtype(
            sequences, kernel, recurrent_kernel, bias, dtype=self.dtype
        )
        states = self._initial_states(initial_state, sequences)
        x, valid = self._steps_first(sequences, mask)
        input_bias, recurrent_bias = self.split_bias(bias)
        inputs = Product(kernel, input_bias, self._input_noise(x, train))
        noise = self._noise(self.recurrent_dropout, self.gates, states[0], train)
        recurrent = Product(recurrent_kernel, recurrent_bias, noise)

        def run(x, inputs):
            def step(states, now):
                x, valid = now
                return _step(self, states, x, valid, inputs, recurrent)

            return jax.lax.scan(step, states, (x, valid), unroll=self.unroll or 1)

        # One product for all steps, before the loop, is faster on an accelerator. On a
        # CPU its results, and in the gradient their cotangents, would have to go
        # through memory, which costs more than it saves.
        states, outputs = jax.lax.platform_dependent(
            x,
            cpu=lambda x: run(x, inputs),
            default=lambda x: run(self.split_gates(inputs(x)), None),
        )
        output = self._output(states[0], outputs, valid)
        return (output, *states) if self.return_state else output

    @nn.nowrap
    def cell(self, states, x, recurrent: "Product") -> list:
        """The states after a step, each `(batch, units)`, the output first.

        `x` is what the step's input gives to each gate; the state goes through the
        product `recurrent`.
        """
        raise NotImplementedError

    @nn.nowrap
    def split_gates(self, x) -> list:
        """`(..., gates * units)` as one array for each gate."""
        return jnp.split(x, self.gates, axis=-1)

    @nn.nowrap
    def split_bias(self, bias) -> tuple[Any, Any]:
        """The bias of the inputs' product and of the states'."""
        return bias, None

    @nn.nowrap
    def compute_mask(self, inputs, mask):
        """The mask of the output, or of all outputs if there are several."""
        if isinstance(mask, list | tuple):
            mask = mask[0]
        mask = mask if self.return_sequences else None
        return (mask, *[None] * self.state_count) if self.return_state else mask

    @nn.nowrap
    def bias_shape(self) -> tuple[int, ...]:
        return (self.gates * self.units,)

    @nn.nowrap
    def bias_init(self, key, shape, dtype):
        return jnp.zeros(shape, dtype)

    def _make_params(self, features):
        columns = self.gates * self.units
        param = lambda name, init, shape: self.param(
            name, init, shape, self.param_dtype
        )
        kernel = param("kernel", glorot_uniform, (features, columns))
        recurrent = param("recurrent_kernel", orthogonal, (self.units, columns))
        if not self.use_bias:
            return kernel, recurrent, None
        return kernel, recurrent, param("bias", self.bias_init, self.bias_shape())

    def _initial_states(self, given, sequences):
        shape = (sequences.shape[0], self.units)
        if given is None:
            return [jnp.zeros(shape, sequences.dtype)] * self.state_count
        given = list(given) if isinstance(given, list | tuple) else [given]
        if [jnp.shape(state) for state in given] != [shape] * self.state_count:
            raise ValueError(
                f"initial_state must be {self.state_count} array(s) of shape (batch, "
                f"units) = {shape}, got {', '.join(map(describe, given))}."
            )
        return [jnp.asarray(state, sequences.dtype) for state in given]

    def _steps_first(self, sequences, mask):
        """Inputs and mask with time first, in the order in which steps are taken."""
        x = self._in_order(sequences)
        if mask is None:
            return x, None
        valid = self._in_order(jnp.asarray(mask, bool)[..., None])
        return jnp.where(valid, x, 0), valid

    def _in_order(self, x):
        x = jnp.swapaxes(x, 0, 1)
        return x[::-1] if self.go_backwards else x

    def _input_noise(self, x, train):
        per_gate = self.implementation == 1 or self.recurrent_dropout
        like = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        return self._noise(self.dropout, self.gates if per_gate else 1, like, train)

    def _noise(self, rate, count, like, train):
        if not (train and rate):
            return None
        ones = jnp.ones((count, *like.shape), like.dtype)
        return nn.Dropout(rate)(ones, deterministic=False)

    def _output(self, last, outputs, valid):
        shown = self._shown(valid)
        if not self.return_sequences:
            return last if shown is None else jnp.where(shown[-1], last, 0)
        outputs = outputs if shown is None else jnp.where(shown, outputs, 0)
        return jnp.swapaxes(outputs, 0, 1)

    def _shown(self, valid):
        """Where outputs are not replaced by zeros; None for everywhere."""
        if valid is not None and self.unroll:
            return jnp.cumsum(valid, axis=0) > 0
        return valid if self.zero_output_for_mask else None


class Product(NamedTuple):
    """`x @ kernel + bias`, for `x` `(..., batch, size)`.

    With `noise`, `(count, batch, size)`, each of `count` blocks of columns sees `x`
    times its own noise.
    """

    kernel: Any
    bias: Any
    noise: Any

    def __call__(self, x):
        y = self._multiply(x)
        return y if self.bias is None else y + self.bias

    def _multiply(self, x):
        if self.noise is None:
            return x @ self.kernel
        blocks = jnp.split(self.kernel, self.noise.shape[0], axis=1)
        parts = [(x * noise) @ block for noise, block in zip(self.noise, blocks)]
        return jnp.concatenate(parts, axis=-1)


def _step(module: Recurrent, states, x, valid, inputs, recurrent):
    gates = x if inputs is None else module.split_gates(inputs(x))
    after = module.cell(states, gates, recurrent)
    if valid is not None:
        after = [jnp.where(valid, new, old) for new, old in zip(after, states)]
    return after, after[0] if module.return_sequences else None


def _check_shapes(sequences, mask) -> None:
    if sequences.ndim != 3:
        raise ValueError(
            f"sequences must have shape {LAYOUT}, got {describe(sequences)}. Wrap the "
            "layer in TimeDistributed for sequences of sequences."
        )
    if mask is not None and jnp.shape(mask) != sequences.shape[:2]:
        raise ValueError(
            f"mask must have shape (batch, time) = {sequences.shape[:2]}, got "
            f"{describe(mask)}."
        )


class SimpleRNN(Recurrent):
    """`h = activation(x @ kernel + bias + h @ recurrent_kernel)`."""

    gates: ClassVar[int] = 1

    @nn.nowrap
    def cell(self, states, x, recurrent):
        return [self.activation(x[0] + recurrent(states[0]))]


class LSTM(Recurrent):
    """Long short-term memory. Gates are input, forget, cell, output."""

    recurrent_activation: Callable[..., Any] = SIGMOID

    gates: ClassVar[int] = 4
    state_count: ClassVar[int] = 2

    @nn.nowrap
    def bias_init(self, key, shape, dtype):
        """Ones for the forget gate, as Keras' `unit_forget_bias`."""
        return jnp.zeros(shape, dtype).at[self.units : 2 * self.units].set(1)

    @nn.nowrap
    def cell(self, states, x, recurrent):
        h, c = states
        gates = map(jnp.add, x, self.split_gates(recurrent(h)))
        enter, forget, candidate, leave = gates
        kept = self.recurrent_activation(forget) * c
        c = kept + self.recurrent_activation(enter) * self.activation(candidate)
        return [self.recurrent_activation(leave) * self.activation(c), c]


class GRU(Recurrent):
    """Gated recurrent unit. Gates are update, reset, candidate.

    With `reset_after` the recurrent product has its own bias: `bias` is
    `(2, 3 * units)`.
    """

    recurrent_activation: Callable[..., Any] = SIGMOID
    reset_after: bool = True

    gates: ClassVar[int] = 3

    @nn.nowrap
    def bias_shape(self):
        shape = super().bias_shape()
        return (2, *shape) if self.reset_after else shape

    @nn.nowrap
    def split_bias(self, bias):
        return tuple(bias) if self.reset_after and self.use_bias else (bias, None)

    @nn.nowrap
    def cell(self, states, x, recurrent):
        [h] = states
        gates = self._reset_after if self.reset_after else self._reset_before
        update, candidate = gates(h, x, recurrent)
        return [update * h + (1 - update) * self.activation(candidate)]

    @nn.nowrap
    def _reset_after(self, h, x, recurrent):
        x_z, x_r, x_h = x
        h_z, h_r, h_h = self.split_gates(recurrent(h))
        reset = self.recurrent_activation(x_r + h_r)
        return self.recurrent_activation(x_z + h_z), x_h + reset * h_h

    @nn.nowrap
    def _reset_before(self, h, x, recurrent):
        x_z, x_r, x_h = x
        kernel, _, noise = recurrent
        kernel_zr, kernel_h = jnp.split(kernel, [2 * self.units], axis=1)
        noise_zr, noise_h = (None, None) if noise is None else (noise[:2], noise[2:])
        h_z, h_r = jnp.split(Product(kernel_zr, None, noise_zr)(h), 2, axis=-1)
        reset = self.recurrent_activation(x_r + h_r)
        h_h = Product(kernel_h, None, noise_h)(reset * h)
        return self.recurrent_activation(x_z + h_z), x_h + h_h
